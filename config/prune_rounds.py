# Half of a model in two rounds, 0.7 * 0.7 = 0.49 of its parameters: what a round of distillation repairs makes the next cut cheaper.
# For prune.py, and train.py in between, at a fifth of the rates of the first training:
#     python prune.py config/prune_rounds.py --out_dir=out-stdlib-bpe --save_dir=out-round1
#     python train.py config/distill_stdlib_bpe.py --init_from=out-round1/best.pt --out_dir=out-round1-distilled --muon_lr=0.004 --adam_lr=0.001 --max_iters=100
#     python prune.py config/prune_rounds.py --out_dir=out-round1-distilled --save_dir=out-round2
#     python train.py config/distill_stdlib_bpe.py --init_from=out-round2/best.pt --out_dir=out-round2-distilled --muon_lr=0.004 --adam_lr=0.001 --max_iters=100
# The shape is the checkpoint's, whatever the second config says; its labels are the teacher's (python distill.py).
keep_params = 0.7
importance = 'taylor'
calibration_batches = 16    # 256 windows
