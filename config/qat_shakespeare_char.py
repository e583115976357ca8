# The sub-megabyte model: 3 layers, 4 heads, 192 wide, 909,696 weights, trained through int8 rounding on tiny Shakespeare (nanoGPT's
# split and 65 characters), for quantize.py to write as a file of 0.93 MB.
# 2 CPU cores: 11 minutes of training; validation loss 1.460 nats (nanoGPT: 1.4697 with 10.65M parameters). --max_iters=2500: 1.476.
out_dir = 'out-qat-shakespeare'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd, n_hidden = 3, 4, 192, 384
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 3200            # 13.1M tokens: 13 passes over the text, hence
dropout = 0.1
weight_decay = 0.1
muon_lr = 0.02
adam_lr = 0.005
quant_bits = 8
qat_start = 0.0             # from the first step

eval_interval = 400
save_interval = 400
sample_interval = 1600
