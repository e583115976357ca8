# Four teachers for the sub-megabyte model, of its own shape, in float. Each is trained without a quarter of the text,
# which it then labels: what a teacher says of text that it has read ten times is mostly memory.
#     t=out-teacher-shakespeare
#     for i in 1 2 3 4; do python train.py config/teacher_shakespeare_char.py --hold_out=$i/4 --out_dir=$t-$i; done
#     python distill.py --teacher=$t-1+$t-2+$t-3+$t-4 --out_dir=labels-shakespeare --method=topk --k=65 --calibrate=True
# 2 CPU cores: 5 minutes each, if two run at a time with OMP_NUM_THREADS=1. Validation losses: 1.50 to 1.51 nats, and
# 1.79 without the last quarter, which stands next to the validation text.
# The labels, for every training token, take half a minute and 263 MB. k is the whole vocabulary here: the labels are
# the distributions themselves. distill_shakespeare_char.py learns from them.
out_dir = 'out-teacher-shakespeare-1'
dataset = 'shakespeare_char'
hold_out = '1/4'

n_layer, n_head, n_embd, n_hidden = 3, 4, 192, 384
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 1000            # 4.1M tokens, 5.4 passes: few enough to go without dropout
weight_decay = 0.1
muon_lr = 0.02
adam_lr = 0.005

eval_interval = 250
save_interval = 500
sample_interval = 0
