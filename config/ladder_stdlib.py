# The whole way on the standard library in BPE. A teacher is pruned to an eighth of its weights, which then train on from
# its labels. Beside that the controls, then integers, and a head that drafts. Each line is the command that builds it.
#     python bench.py --mode=ladder config/ladder_stdlib.py
# 2 CPU cores: 76 minutes, nearly all of it training. One that is stopped goes on where it was.
# README.md beside this file has the results.
mode = 'ladder'
ladder = 'out-ladder-stdlib/ladder.json'
record = 'config/ladder_stdlib.json'
draft_n = 4
compiled = 'teacher,student int8,student int4 qat,student int4 qat and cache'
with_int8_cache = 'student int4 qat and cache'

# Steps of 4,096 tokens. equal: as many FLOPs as the labels and the student's steps take.
_teacher, _student, _equal, _int4, _draft = 900, 1300, 3500, 600, 100
# the longer run of README.md beside this:   1400, 5000, 6400, 1200, 300

_train = 'python train.py config/distill_stdlib_bpe.py'
_labels = '--teacher=labels-bpe --alpha=0.3'
_eighth = '--neuron_prune_ratio=0.8412 --head_prune_ratio=0.6667 --kv_heads=1 --channel_prune_ratio=0.6667'
_pruned = f'--init_from=out-bpe-eighth/best.pt --max_iters={_student}'
_slow = f'--max_iters={_int4} --muon_lr=0.005 --adam_lr=0.00125'       # a quarter of the rates
_round = 'python quantize.py --out_dir'
_qat = (f'{_train} {_labels} {_slow} --init_from=out-bpe-student/best.pt --quant_bits=4 --out_dir=out-bpe-int4 '
        f'&& {_round}=out-bpe-int4 --bits=4')
# The control from random weights is 4 layers of 160 with tied tables: of this size the better shape for that.
rungs = f'''
                           | python data/stdlib_bpe/prepare.py
teacher                    | python train.py config/train_stdlib_bpe.py --max_iters={_teacher} --eval_interval=0 --muon_steps=3 --out_dir=out-bpe-teacher
teacher int8               | {_round}=out-bpe-teacher
                           | python distill.py --teacher=out-bpe-teacher --out_dir=labels-bpe
an eighth of the teacher   | python prune.py --out_dir=out-bpe-teacher {_eighth} --save_dir=out-bpe-eighth
control: that, on the text | {_train} --teacher= {_pruned} --out_dir=out-bpe-text
student: that, from labels | {_train} {_labels} {_pruned} --out_dir=out-bpe-student
control: equal FLOPs       | {_train} --teacher= --max_iters={_equal} --out_dir=out-bpe-equal
student int8               | {_round}=out-bpe-student
student int4 gptq          | {_round}=out-bpe-student --bits=4 --method=gptq
student int4 qat           | {_qat}
student int4 qat and cache | {_qat}
student int8 drafting      | python train.py config/draft_stdlib_bpe.py --max_iters={_draft} --init_from=out-bpe-student/best.pt --out_dir=out-bpe-draft && {_round}=out-bpe-draft
'''
