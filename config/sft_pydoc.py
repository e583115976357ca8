# Chat fine-tuning of the BPE model on questions about the standard library: the same loop, low rates, the loss on answers alone.
#     python data/pydoc_chat/prepare.py                         # after config/train_stdlib_bpe.py has made out-stdlib-bpe
#     python train.py config/sft_pydoc.py
#     python quantize.py --out_dir=out-sft-pydoc && python sample.py --out_dir=out-sft-pydoc --chat=True
# The shape is the checkpoint's. 6 minutes on one thread; 491,520 tokens are 1.3 passes over the rows.
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
