# The whole way on the standard library in BPE: a teacher, a student with an eighth of its weights beside its controls, integers, half a teacher, drafts.
#     python bench.py --mode=ladder config/ladder_stdlib.py
# 2 CPU cores: some two hours (estimated: it was built in parts), nearly all of it training; a run that is stopped goes on at the rung it was at. Each line is the command that builds it.
mode = 'ladder'
ladder = 'out-ladder-stdlib/ladder.json'
seeds = '1337,1338,1339'        # of the student and of the control that differs from it in the labels alone
draft_n = 4
compiled = 'teacher,student int8,student int8 drafting'
_again = '--init_from=out-distill-stdlib-bpe-1337/best.pt --muon_lr=0.004 --adam_lr=0.001 --max_iters=300 --eval_interval=100'     # a fifth of the rates

rungs = f'''
                      | python data/stdlib_bpe/prepare.py
teacher               | python train.py config/train_stdlib_bpe.py
                      | python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe
CE control            | python train.py config/distill_stdlib_bpe.py --seed={{seed}} --out_dir=out-control-stdlib-bpe-{{seed}} --teacher=
student               | python train.py config/distill_stdlib_bpe.py --seed={{seed}} --out_dir=out-distill-stdlib-bpe-{{seed}} --teacher=labels-stdlib-bpe
student int8          | python quantize.py --out_dir=out-distill-stdlib-bpe-1337
student int4 rtn      | python quantize.py --out_dir=out-distill-stdlib-bpe-1337 --bits=4 --method=rtn --save_dir=out-rtn4-stdlib-bpe
student int4 gptq     | python quantize.py --out_dir=out-distill-stdlib-bpe-1337 --bits=4 --method=gptq
student int4 qat      | python train.py config/distill_stdlib_bpe.py {_again} --quant_bits=4 --teacher=labels-stdlib-bpe --out_dir=out-qat4-stdlib-bpe && python quantize.py --out_dir=out-qat4-stdlib-bpe --bits=4
teacher int8          | python quantize.py --out_dir=out-stdlib-bpe
half a teacher        | python prune.py --out_dir=out-stdlib-bpe --neuron_prune_ratio=0.5 --channel_prune_ratio=0.3334 --importance=taylor --save_dir=out-prune-50-refit
half, distilled 5 %   | python train.py config/distill_stdlib_bpe.py --teacher=labels-stdlib-bpe --eval_interval=0 --save_interval=0 --muon_lr=0.004 --adam_lr=0.001 --init_from=out-prune-50-refit/best.pt --max_iters=70 --seed=1337 --out_dir=out-prune-50-refit-5-1337
student int8 drafting | python train.py config/draft_stdlib_bpe.py --max_iters=500 --init_from=out-distill-stdlib-bpe-1337/best.pt --out_dir=out-draft-stdlib-bpe && python quantize.py --out_dir=out-draft-stdlib-bpe
'''
