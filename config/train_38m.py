# 37,748,736 parameters: 4 layers, 512 wide, 8 heads of 64, and a vocabulary of 24,576 (2 * 24,576 * 512 parameters in
# its two tables). For your own text, on one GPU.
#     python data/text/prepare.py --input=FOLDER --level=bpe --vocab_size=24576 --name=text24k
#     python train.py config/train_38m.py
# 20 tokens a parameter are 755M tokens: 11,520 steps of 65,536. It has not been run to its end: no time and no loss of
# it are known.
out_dir = 'out-38m'
dataset = 'text24k'

n_layer, n_head, n_embd, head_dim = 4, 8, 512, 64
block_size = 1024
batch_size = 32
total_batch_size = 65536
max_iters = 11520
warmup_iters = 100
decay_frac = 0.4
muon_lr = 0.02
adam_lr = 0.003

eval_interval = 500
save_interval = 500
sample_interval = 1000
