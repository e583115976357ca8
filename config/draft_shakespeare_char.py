# A draft head for the sub-megabyte model, trained on the frozen model as it runs, int8: on the text and on what the model writes itself.
# 2 CPU cores: about 3 minutes. Then: python quantize.py --out_dir=out-draft-shakespeare
#     python sample.py --out_dir=out-draft-shakespeare --drafter=head --compile=True --show_stats=True
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
