# To go on from a trained model, or one that pruning has cost little: a fifth of the usual learning rates. It goes behind
# the config of the training that it changes:
#     python train.py config/distill_stdlib_bpe.py config/recover.py --init_from=out-X/best.pt --out_dir=out-X-on --max_iters=300
muon_lr = 0.004
adam_lr = 0.001
