# The quick start: a character model of Python source, trained through int8 rounding on the standard library of the
# Python that you run.
#     python data/stdlib_char/prepare.py
#     python train.py config/quickstart.py
#     python quantize.py --out_dir=out-quickstart
#     python sample.py --out_dir=out-quickstart --start="def read(self, " --show_stats=True
# 2 CPU cores: under 3 minutes of training. Validation loss: 1.18 nats a character.
out_dir = 'out-quickstart'
dataset = 'stdlib_char'

n_layer, n_head, n_embd, n_hidden = 3, 4, 192, 384
block_size = 256
batch_size = 16             # 4,096 tokens a step
max_iters = 800             # 3.3M tokens: a third of one pass over the text
muon_lr = 0.02
adam_lr = 0.01
quant_bits = 8              # trained as it will run: weights and activations rounded to 8 bits

eval_interval = 400
sample_interval = 400
