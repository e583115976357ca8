# The ten-dollar run, for one GPU of 40-80 GB: nanochat's d32 teaches a student of 12 layers, 768 wide, 6 heads of 128 with one key/value
# head: 173,801,472 weights, and heads that draft. Not run to its end yet: no figure of it is claimed anywhere.
#     python distill.py --fetch=d32 --out_dir=teachers/d32                                  # 7.2 GB, with its tokenizer
#     pip install pyarrow && python data/fineweb_edu/prepare.py --tokenizer=teachers/d32 --shards=20
#     python train.py config/distill_d12_mqa.py
# The teacher is 56 % of the arithmetic (bench.py --mode=memory --plan=True). Labelling once (python distill.py --teacher=nanochat:teachers/d32 --dataset=fineweb_edu
# --out_dir=labels-d32 --block_size=1024: 26 bytes a token) and training on --teacher=labels-d32 makes every further epoch cost a plain one's.
# The shape without any download but data: --teacher=random:d32. On a laptop: config/distill_stdlib_bpe.py.
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
batch_size = 16
total_batch_size = 131072
max_iters = 8000            # 1.05 billion tokens
warmup_iters = 50
decay_frac = 0.5
muon_lr = 0.02
adam_lr = 0.003

eval_interval = 500
save_interval = 500
sample_interval = 1000
