# Half of a model in two rounds, 0.7 * 0.7 = 0.49 of its parameters: what a round of distillation repairs makes the next
# cut cheaper. This file is for prune.py. After each round train.py learns from the teacher's labels.
# train_stdlib_bpe.py makes the teacher, distill_stdlib_bpe.py says how to make its labels.
#     python prune.py config/prune_rounds.py --out_dir=out-stdlib-bpe --save_dir=out-round1
#     python train.py config/distill_stdlib_bpe.py --init_from=out-round1/best.pt --out_dir=out-round1-distilled --max_iters=100
#     python prune.py config/prune_rounds.py --out_dir=out-round1-distilled --save_dir=out-round2
#     python train.py config/distill_stdlib_bpe.py --init_from=out-round2/best.pt --out_dir=out-round2-distilled --max_iters=100
# train.py takes the shape from the checkpoint that it starts from, whatever its config says.
keep_params = 0.7
calibration_batches = 16    # 256 windows
