# A student with an eighth of the teacher's weights: 4 layers, 160 wide, 5 heads of 32 with one key/value head, tables
# tied; 1,679,360 weights.
#     python data/stdlib_bpe/prepare.py
#     python train.py config/train_stdlib_bpe.py                                  # the teacher, 13,762,560 weights
#     python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe      # 12 sampled labels a token, 88 MB
#     python train.py config/distill_stdlib_bpe.py
# The teacher can also run beside the student, without labels: --teacher=out-stdlib-bpe.
# The control, on the text alone: --teacher= --out_dir=out-control-stdlib-bpe
# 2 CPU cores: a few minutes for the student. Far better than from random weights is to start from the teacher, pruned
# to an eighth; and in longer trainings the labels must have less of the loss (--alpha=0.3): README.md here.
#     python prune.py --out_dir=out-stdlib-bpe --neuron_prune_ratio=0.8412 --head_prune_ratio=0.6667 --kv_heads=1 --channel_prune_ratio=0.6667 --save_dir=out-eighth-stdlib-bpe
#     python train.py config/distill_stdlib_bpe.py --init_from=out-eighth-stdlib-bpe/best.pt --out_dir=out-eighth-distilled
out_dir = 'out-distill-stdlib-bpe'
dataset = 'stdlib_bpe'
teacher = 'labels-stdlib-bpe'
alpha = 0.9

n_layer, n_head, n_embd, head_dim, n_hidden = 4, 5, 160, 32, 608
n_kv_head = 1
tie_weights = True
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 600             # 2.5M tokens
muon_lr = 0.02
adam_lr = 0.005

eval_interval = 0           # only at the end
save_interval = 200
sample_interval = 0
