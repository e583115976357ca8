# Chat fine-tuning of the BPE model on questions about the standard library: the same loop, low rates, and the loss is
# that of the answers alone. The shape is the checkpoint's.
#     python data/pydoc_chat/prepare.py         # after config/train_stdlib_bpe.py has made out-stdlib-bpe
#     python train.py config/sft_pydoc.py
#     python quantize.py --out_dir=out-sft-pydoc && python sample.py --out_dir=out-sft-pydoc --chat=True
# One CPU core: 6 minutes; 491,520 tokens, 1.3 passes over the rows. Validation loss: from 6.121 to 2.585 nats a token.
init_from = 'out-stdlib-bpe/best.pt'
out_dir = 'out-sft-pydoc'
dataset = 'pydoc_chat'

block_size = 256            # the rows of the dataset
batch_size = 16             # 4,096 tokens a step, of which 44 % are learnt
max_iters = 120
muon_lr = 0.004             # a fifth of what the model was trained with
adam_lr = 0.001
warmup_iters = 10

eval_interval = 120         # and before the first step
save_interval = 100
sample_interval = 0
