# The sub-megabyte model: 3 layers, 4 heads, 192 wide, 909,696 weights. It is trained through int8 rounding on tiny
# Shakespeare (nanoGPT's split and 65 characters), and quantize.py writes it as a file of 0.93 MB.
#     python data/shakespeare_char/prepare.py
#     python train.py config/qat_shakespeare_char.py
#     python quantize.py --out_dir=out-qat-shakespeare
#     python sample.py --out_dir=out-qat-shakespeare --start=ROMEO: --num_samples=3
# 2 CPU cores: 13 minutes of training. Validation loss: 1.456 nats (nanoGPT: 1.4697 with 10.65M parameters).
out_dir = 'out-qat-shakespeare'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd, n_hidden = 3, 4, 192, 384
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 3200            # 13.1M tokens: 13 passes over the text
dropout = 0.1               # because the text is seen so often
weight_decay = 0.1
muon_lr = 0.02
adam_lr = 0.005
quant_bits = 8
qat_start = 0.0             # from the first step

eval_interval = 400
save_interval = 400
sample_interval = 1600
