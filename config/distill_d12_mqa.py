# The ten-dollar run, for one GPU of 40 to 80 GB: nanochat's d32 teaches a student of 12 layers, 768 wide, 6 heads of
# 128 with one key/value head: 173,801,472 weights, and heads that draft.
#     python distill.py --fetch=d32 --out_dir=teachers/d32                                # 7.2 GB, with its tokenizer
#     pip install pyarrow
#     python data/fineweb_edu/prepare.py --tokenizer=teachers/d32 --shards=15             # 0.8B tokens, 1.5 GB
#     python bench.py --mode=memory config/distill_d12_mqa.py --plan=True --gpu=h100 --price=2 --utilisation=0.302
#     python train.py config/distill_d12_mqa.py
# Steps of it ran on an H100 of 80 GB at 43,511 tokens/s and 21 GiB (2026-11-27, random weights in the teacher): all of
# it would take 5.0 hours. It has not been made to its end yet, so no loss of it is known.
#
# The teacher is 55 % of the arithmetic. Labels written once (26 bytes a token) make every further epoch cost what one
# without a teacher costs:
#     python distill.py --teacher=nanochat:teachers/d32 --dataset=fineweb_edu --out_dir=labels-d32 --block_size=1024
#     python train.py config/distill_d12_mqa.py --teacher=labels-d32
# The control, on the text alone: --teacher= --out_dir=out-d12-control
# A step of that shape, without the teacher's weights and without data:
#     python bench.py --mode=train config/distill_d12_mqa.py --teacher=random:d32 --any_length=False
# On a laptop: config/distill_stdlib_bpe.py.
out_dir = 'out-d12-mqa'
dataset = 'fineweb_edu'
teacher = 'nanochat:teachers/d32'
alpha = 0.5
temperature = 1.0

n_layer, n_head, n_embd, n_kv_head = 12, 6, 768, 1
multi_token_n = 3
multi_token_hidden_mult = 0.5
draft_n = 4
draft_hidden_mult = 0.5
block_size = 1024
batch_size = 8              # 22 GB
total_batch_size = 131072
max_iters = 6000            # 786M tokens
warmup_iters = 50
decay_frac = 0.5
muon_lr = 0.02
adam_lr = 0.003

eval_interval = 500
save_interval = 500
sample_interval = 1000
