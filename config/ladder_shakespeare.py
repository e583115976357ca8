# The character path: what training through int8 is worth beside rounding afterwards, 4 bits of both, and a draft head.
#     python bench.py --mode=ladder config/ladder_shakespeare.py
# 2 CPU cores: 33 minutes, nearly all of it for two trainings of 3,200 steps.
mode = 'ladder'
ladder = 'out-ladder-shakespeare/ladder.json'
record = 'config/ladder_shakespeare.json'
compiled = 'control: float,int8'
draft_n = 6
temperature = 1.0
_train = 'python train.py config/qat_shakespeare_char.py'
_round = 'python quantize.py --out_dir'
rungs = f'''
                 | python data/shakespeare_char/prepare.py
control: float   | {_train} --quant_bits=0 --out_dir=out-float-shakespeare
float -> int8    | {_round}=out-float-shakespeare
float -> int4    | {_round}=out-float-shakespeare --bits=4 --method=rtn --balance=False --save_dir=out-float-shakespeare/rtn
float -> gptq    | {_round}=out-float-shakespeare --bits=4 --method=gptq
through int8     | {_train} --out_dir=out-qat-shakespeare
int8             | {_round}=out-qat-shakespeare
int8 -> gptq     | {_round}=out-qat-shakespeare --bits=4 --method=gptq
int8 drafting    | python train.py config/draft_shakespeare_char.py --init_from=out-qat-shakespeare/best.pt --out_dir=out-draft-shakespeare && {_round}=out-draft-shakespeare
'''
