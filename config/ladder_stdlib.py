# The whole way on the standard library in BPE: a teacher, a student with an eighth of its weights beside its controls,
# integers, half a teacher, drafts. Each line is the command that builds it.
#     python bench.py --mode=ladder config/ladder_stdlib.py
# 2 CPU cores: some two hours (estimated: it was built in parts), nearly all of it training. A run that is stopped goes
# on at the rung where it was. README has the losses, under "The BPE path".
mode = 'ladder'
ladder = 'out-ladder-stdlib/ladder.json'
seeds = '1337,1338,1339'        # of the student and of the control that differs from it in the labels alone
draft_n = 4
compiled = 'teacher,student int8,student int8 drafting'

_student = 'python train.py config/distill_stdlib_bpe.py'
_learn = f'{_student} config/recover.py --teacher=labels-stdlib-bpe'     # named, so that its cost is counted
_again = f'{_learn} --max_iters=300 --init_from=out-distill-stdlib-bpe-1337/best.pt'
_round = 'python quantize.py --out_dir'
rungs = f'''
                      | python data/stdlib_bpe/prepare.py
teacher               | python train.py config/train_stdlib_bpe.py
                      | python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe
CE control            | {_student} --seed={{seed}} --out_dir=out-control-stdlib-bpe-{{seed}} --teacher=
student               | {_student} --seed={{seed}} --out_dir=out-distill-stdlib-bpe-{{seed}} --teacher=labels-stdlib-bpe
student int8          | {_round}=out-distill-stdlib-bpe-1337
student int4 rtn      | {_round}=out-distill-stdlib-bpe-1337 --bits=4 --method=rtn --save_dir=out-rtn4-stdlib-bpe
student int4 gptq     | {_round}=out-distill-stdlib-bpe-1337 --bits=4 --method=gptq
student, on in float  | {_again} --out_dir=out-float-on-stdlib-bpe
student int4 qat      | {_again} --quant_bits=4 --out_dir=out-qat4-stdlib-bpe && {_round}=out-qat4-stdlib-bpe --bits=4
teacher int8          | {_round}=out-stdlib-bpe
half a teacher        | python prune.py --out_dir=out-stdlib-bpe --neuron_prune_ratio=0.5 --channel_prune_ratio=0.3334 --importance=taylor --save_dir=out-prune-50-refit
half, distilled 5 %   | {_learn} --save_interval=0 --seed=1337 --init_from=out-prune-50-refit/best.pt --max_iters=70 --out_dir=out-prune-50-refit-5-1337
student int8 drafting | python train.py config/draft_stdlib_bpe.py --max_iters=500 --init_from=out-distill-stdlib-bpe-1337/best.pt --out_dir=out-draft-stdlib-bpe && {_round}=out-draft-stdlib-bpe
'''
