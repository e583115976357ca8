# The shape and the token budget of nanoGPT's README run on a CPU, exactly: 4 layers, 4 heads, 128 wide, context 64,
# 2,000 steps of 12 x 64 tokens (1.54M tokens), 65 characters.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_cpu.py
# 2 CPU cores with bfloat16 arithmetic: 75 seconds. Validation loss: 1.571 nats; nanoGPT's README says 1.88.
out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd = 4, 4, 128
block_size = 64
batch_size = 12
max_iters = 2000
muon_lr = 0.01
muon_steps = 3
adam_lr = 0.005

eval_interval = 1000
save_interval = 1000
sample_interval = 0
