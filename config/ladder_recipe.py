# What each ingredient of the character model's training gives: one is changed at a time, at a third of the length. And
# training on in 4 bits, beside a control that trains on in float.
#     python bench.py --mode=ladder config/ladder_recipe.py
# 2 CPU cores: 45 minutes (estimated), for seven trainings of 1,000 steps and three of 200.
# README.md beside this file has those that were run.
mode = 'ladder'
ladder = 'out-ladder-recipe/ladder.json'
record = 'config/ladder_recipe.json'
timed = 'none'
_how = '--eval_interval=0 --save_interval=0 --sample_interval=0'
_train = f'python train.py config/qat_shakespeare_char.py --max_iters=1000 {_how}'
_on = ('python train.py config/qat_shakespeare_char.py config/recover.py '
       f'--max_iters=200 {_how} --init_from=out-recipe-float/best.pt')
_round = 'python quantize.py --out_dir'
rungs = f'''
                      | python data/shakespeare_char/prepare.py
control               | {_train} --out_dir=out-recipe-control && {_round}=out-recipe-control
float                 | {_train} --quant_bits=0 --out_dir=out-recipe-float
float -> int8         | {_round}=out-recipe-float
float -> int4 rtn     | {_round}=out-recipe-float --bits=4 --method=rtn --balance=False --save_dir=out-recipe-float/rtn
float -> int4 gptq    | {_round}=out-recipe-float --bits=4 --method=gptq
float, on in float    | {_on} --quant_bits=0 --out_dir=out-recipe-on-float
float, on in 4 bits   | {_on} --quant_bits=4 --out_dir=out-recipe-on-int4 && {_round}=out-recipe-on-int4 --bits=4
... from its own KL    | {_on} --quant_bits=4 --teacher=out-recipe-float --out_dir=out-recipe-on-kl && {_round}=out-recipe-on-kl --bits=4
context 512           | {_train} --block_size=512 --batch_size=8 --out_dir=out-recipe-512 && {_round}=out-recipe-512
MQA, wider MLP        | {_train} --n_kv_head=1 --n_hidden=528 --out_dir=out-recipe-mqa && {_round}=out-recipe-mqa
averaged weights      | {_train} --ema=0.998 --out_dir=out-recipe-ema && {_round}=out-recipe-ema
no dropout            | {_train} --dropout=0 --out_dir=out-recipe-nodrop && {_round}=out-recipe-nodrop
int8 in the last fifth | {_train} --qat_start=0.8 --out_dir=out-recipe-late && {_round}=out-recipe-late
'''
