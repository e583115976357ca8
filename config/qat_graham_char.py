# The model of qat_shakespeare_char.py on Paul Graham's essays.
#     python data/graham_char/prepare.py          # downloads them, politely, a page a second: some five minutes
#     python train.py config/qat_graham_char.py
#     python quantize.py --out_dir=out-qat-graham && python sample.py --out_dir=out-qat-graham
# 2 CPU cores: about 10 minutes of training.
out_dir = 'out-qat-graham'
dataset = 'graham_char'

n_layer, n_head, n_embd, n_hidden = 3, 4, 192, 384
block_size = 256
batch_size = 16
max_iters = 3200            # 13.1M tokens: 4 to 5 passes over some 3M characters
weight_decay = 0.1
muon_lr = 0.02
adam_lr = 0.005
quant_bits = 8

eval_interval = 400
save_interval = 400
sample_interval = 1600
