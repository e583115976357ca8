# A draft head for the student of distill_stdlib_bpe.py, which is frozen meanwhile.
#     python train.py config/draft_stdlib_bpe.py
#     python quantize.py --out_dir=out-draft-stdlib-bpe
#     python sample.py --out_dir=out-draft-stdlib-bpe --drafter=head
# 2 CPU cores: some minutes. It gives nothing (README.md beside this file, under ladder_stdlib.py).
init_from = 'out-distill-stdlib-bpe/best.pt'
out_dir = 'out-draft-stdlib-bpe'
dataset = 'stdlib_bpe'
train_only = 'draft'
own_samples = 0.5
draft_n = 5

block_size = 256
batch_size = 16
max_iters = 1000
muon_lr = 0.02
quant_bits = 8

eval_interval = 0
save_interval = 500
sample_interval = 0
