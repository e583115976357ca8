# The quarter of SmolLM2 learns to answer questions about the standard library: from the answers alone, and from them and
# the soft labels of the whole (of 8,192 tokens), which learns it first.
#     python bench.py --mode=ladder config/ladder_smol.py             # makes the whole and its quarter
#     python bench.py --mode=ladder config/ladder_smol_chat.py
#     python sample.py --out_dir=out-smol-chat-quarter --weights=int4 --chat=True --temperature=0
# 2 CPU cores: 25 minutes. README.md beside this file has the results.
mode = 'ladder'
ladder = 'out-ladder-smol-chat/ladder.json'
record = 'config/ladder_smol_chat.json'
timed = 'none'

_train = ('python train.py --dataset=pydoc_smol --block_size=512 --batch_size=4 --total_batch_size=4096 '
          '--muon_steps=3 --eval_interval=0 --save_interval=40 --sample_interval=0')
_quarter = f'{_train} --init_from=out-smol-quarter/best.pt --max_iters=60 --muon_lr=0.004 --adam_lr=0.0006'
rungs = f'''
                              | python data/pydoc_chat/prepare.py --tokenizer=out-smol-teacher --name=pydoc_smol --row=512
the whole                     | {_train} --init_from=out-smol-teacher/best.pt --max_iters=30 --muon_lr=0.002 --adam_lr=0.0003 --out_dir=out-smol-chat-teacher
                              | python distill.py --teacher=out-smol-chat-teacher --out_dir=labels-smol-chat --batch_size=4
quarter from labels           | {_quarter} --teacher=labels-smol-chat --alpha=0.7 --out_dir=out-smol-chat-quarter
... in 4 bits                 | python quantize.py --report=False --out_dir=out-smol-chat-quarter --bits=4
control: quarter, answers only | {_quarter} --out_dir=out-smol-chat-text
'''
