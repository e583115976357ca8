# A teacher for the sub-megabyte model: 4 layers, 256 wide, 3,179,008 weights, dropout against its twelve passes over tiny Shakespeare.
# 2 CPU cores with bfloat16 arithmetic: about 20 minutes. Then its distributions for every training token, 263 MB, three minutes:
#     python distill.py --teacher=out-teacher-shakespeare --out_dir=labels-shakespeare --method=topk --k=65
# (k is the whole vocabulary here: the labels are the distributions themselves.)
out_dir = 'out-teacher-shakespeare'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd, n_hidden = 4, 4, 256, 1024
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 3000            # 12.3M tokens
dropout = 0.2
weight_decay = 0.1
muon_lr = 0.02
adam_lr = 0.005

eval_interval = 500
save_interval = 500
sample_interval = 0
