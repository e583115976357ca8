# The sub-megabyte model of qat_shakespeare_char.py, which here learns from its teachers' distributions as well as from
# the text. First the commands in teacher_shakespeare_char.py, which make the labels. Then the student, and its control,
# which is the same in everything but the teacher:
#     python train.py config/distill_shakespeare_char.py
#     python train.py config/distill_shakespeare_char.py --teacher= --out_dir=out-control-shakespeare
# 2 CPU cores: 17 minutes on one thread. Validation loss: 1.4240 nats, the control 1.4746, and 1.4631 with
# --dropout=0.1. README.md beside this file has more.
out_dir = 'out-distill-shakespeare'
dataset = 'shakespeare_char'
teacher = 'labels-shakespeare'
alpha = 0.5                 # at 0.8 it ended at 1.505

n_layer, n_head, n_embd, n_hidden = 3, 4, 192, 384
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 3200            # 13.1M tokens
dropout = 0.0               # with 0.1, here and in the teachers, it ended at 1.4484
weight_decay = 0.1
muon_lr = 0.02
adam_lr = 0.005
quant_bits = 8

eval_interval = 400
save_interval = 400
sample_interval = 0
