# A draft head (110,592 weights) for the sub-megabyte model of qat_shakespeare_char.py. The model is frozen and runs as
# int8; the head learns from the text and from what the model writes itself.
#     python train.py config/draft_shakespeare_char.py
#     python quantize.py --out_dir=out-draft-shakespeare
#     python sample.py --out_dir=out-draft-shakespeare --drafter=head --compile=True --show_stats=True
# 2 CPU cores: about 3 minutes. At temperature 1 a pass with six drafts settles 4.00 tokens.
init_from = 'out-qat-shakespeare/best.pt'
out_dir = 'out-draft-shakespeare'
dataset = 'shakespeare_char'
train_only = 'draft'
own_samples = 0.5
draft_n = 6
draft_hidden_mult = 1.0

block_size = 256
batch_size = 16
max_iters = 1000
muon_lr = 0.02
quant_bits = 8

eval_interval = 0
save_interval = 500
sample_interval = 0
