# Every kind of rung, in trainings so small that the losses mean little: to see the whole before the real thing.
#     python bench.py --mode=ladder config/ladder_quick.py
# 2 CPU cores: 8 minutes.
mode = 'ladder'
ladder = 'out-ladder-quick/ladder.json'
record = 'config/ladder_quick.json'
rounds = 3
_train = ('python train.py --dataset=stdlib_bpe --block_size=256 --batch_size=8 --max_iters=160 '
          '--eval_interval=0 --save_interval=0 --sample_interval=0 --compile=False')
_student = f'{_train} --n_layer=2 --n_head=3 --n_embd=96 --n_kv_head=1 --tie_weights=True'
_head = '--init_from=out-quick-student/best.pt --quant_bits=8 --train_only=draft --draft_n=4 --max_iters=60'
rungs = f'''
              | python data/stdlib_bpe/prepare.py
teacher       | {_train} --n_layer=4 --n_head=4 --n_embd=192 --out_dir=out-quick-teacher
CE control    | {_student} --out_dir=out-quick-control
student       | {_student} --teacher=out-quick-teacher --out_dir=out-quick-student
int8          | python quantize.py --out_dir=out-quick-student
int4          | python quantize.py --out_dir=out-quick-student --bits=4
half teacher  | python prune.py --out_dir=out-quick-teacher --neuron_prune_ratio=0.5 --channel_prune_ratio=0.375 --save_dir=out-quick-half
... distilled | {_train} config/recover.py --init_from=out-quick-half/best.pt --teacher=out-quick-teacher --max_iters=40 --out_dir=out-quick-half-distilled
int8 drafting | {_train} {_head} --out_dir=out-quick-draft && python quantize.py --out_dir=out-quick-draft
'''
