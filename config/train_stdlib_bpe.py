# A BPE teacher that a CPU can train: 6 layers, 6 heads, 384 wide, 13.8M parameters.
#     python data/stdlib_bpe/prepare.py           # 4,096 tokens, learned on the standard library
#     python train.py config/train_stdlib_bpe.py
# 2 CPU cores with bfloat16 arithmetic: half an hour and more, at 2.5k to 3.9k tokens/s. Validation loss: 2.997 nats a
# token.
out_dir = 'out-stdlib-bpe'
dataset = 'stdlib_bpe'

n_layer, n_head, n_embd = 6, 6, 384
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 1400            # 5.7M tokens, 1.7 passes over the text
muon_lr = 0.02
adam_lr = 0.005

eval_interval = 350
save_interval = 200
sample_interval = 0
