# The whole way on the standard library in BPE. A teacher is pruned to an eighth of its weights, which then train on,
# from its labels or on the text. Beside that the controls, then integers, and a head that drafts. Each line is the
# command that builds it.
#     python bench.py --mode=ladder config/ladder_stdlib.py
# 2 CPU cores: some three and a half hours (estimated from rungs that ran on one thread each), nearly all of it training.
# A run that is stopped goes on at the rung where it was. README has the results, under "The BPE path".
mode = 'ladder'
ladder = 'out-ladder-stdlib/ladder.json'
seeds = '1337,1338,1339'        # of the trainings of 600 steps
draft_n = 4
compiled = 'teacher,student int8,student int4 qat,student int4 qat and cache'
int8_cache = 'student int4 qat and cache'

_prune = 'python prune.py --out_dir=out-stdlib-bpe'
_eighth = '--neuron_prune_ratio=0.8412 --head_prune_ratio=0.6667 --kv_heads=1 --channel_prune_ratio=0.6667'
_its_shape = '--n_layer=6 --n_head=2 --n_embd=128 --head_dim=64 --n_kv_head=1 --n_hidden=244 --tie_weights=False'
_train = 'python train.py config/distill_stdlib_bpe.py'
_labels = '--teacher=labels-stdlib-bpe'         # named, so that their cost is counted
_pruned = '--init_from=out-eighth-stdlib-bpe/best.pt'
_round = 'python quantize.py --out_dir'
_int4 = f'{_train} --max_iters=1200 --muon_lr=0.005 --adam_lr=0.00125 --init_from=out-long-03/best.pt --quant_bits=4'
_qat = f'{_int4} {_labels} --alpha=0.3 --out_dir=out-qat4-03 && {_round}=out-qat4-03 --bits=4'
_draft = 'python train.py config/draft_stdlib_bpe.py --max_iters=300 --init_from=out-long-03/best.pt'
# The controls from random weights are 4 layers of 160 with tied tables: of this size the better shape for that. 6,400
# steps of it are as many FLOPs as the labels and 5,000 steps of the eighth.
rungs = f'''
                              | python data/stdlib_bpe/prepare.py
teacher                       | python train.py config/train_stdlib_bpe.py
                              | python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe
an eighth of the teacher      | {_prune} {_eighth} --save_dir=out-eighth-stdlib-bpe
control: text alone 600 steps | {_train} --seed={{seed}} --out_dir=out-control-stdlib-bpe-{{seed}} --teacher=
the eighth from labels 600    | {_train} --seed={{seed}} {_pruned} {_labels} --out_dir=out-eighth-distilled-{{seed}}
the eighth on text 600        | {_train} --seed={{seed}} {_pruned} --out_dir=out-eighth-text-{{seed}} --teacher=
control: its shape random 600 | {_train} {_its_shape} --seed=1337 --out_dir=out-control-eighth --teacher=
the eighth on text 5000       | {_train} --max_iters=5000 --eval_interval=1000 {_pruned} --out_dir=out-long-text --teacher=
student: labels at 0.3 5000   | {_train} {_labels} --alpha=0.3 --max_iters=5000 {_pruned} --out_dir=out-long-03
control: equal FLOPs          | {_train} --max_iters=6400 --eval_interval=1000 --seed=1337 --out_dir=out-control-flops --teacher=
student int8                  | {_round}=out-long-03
student int4 gptq             | {_round}=out-long-03 --bits=4 --method=gptq
student int4 qat on text      | {_int4} --out_dir=out-qat4-03-text --teacher= && {_round}=out-qat4-03-text --bits=4
student int4 qat              | {_qat}
student int4 qat and cache    | {_qat}
teacher int8                  | {_round}=out-stdlib-bpe
student int8 drafting         | {_draft} --out_dir=out-draft-03 && {_round}=out-draft-03
'''
