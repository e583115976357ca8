# A BPE teacher that a CPU can train: python data/stdlib_bpe/prepare.py first (4,096 tokens, learned on the standard library).
# 6 layers, 6 heads, 384 wide: 13.8M parameters. 2 CPU cores: about 3.9k tokens/s, so 2,000 steps of 4,096 tokens take half an hour.
out_dir = 'out-stdlib-bpe'
dataset = 'stdlib_bpe'

n_layer, n_head, n_embd = 6, 6, 384
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 2000            # 8.2M tokens
muon_lr = 0.02
adam_lr = 0.005

eval_interval = 500
save_interval = 500
sample_interval = 500
