# Which block is better at the character scale, ours or a Llama's? The shape and the tokens of nanoGPT's CPU run on
# Python source: with our block, and with a Llama's of as many weights (swiglu has three matrices, so its hidden layer
# is two thirds as wide). The last is ours with swiglu alone. Same tokens, same rates, three seeds each.
#     python bench.py --mode=ladder config/ladder_blocks.py
# 2 CPU cores: 12 minutes. README.md beside this file has the results.
mode = 'ladder'
ladder = 'out-ladder-blocks/ladder.json'
record = 'config/ladder_blocks.json'
timed = 'none'
seeds = '1337,1338,1339'

_train = 'python train.py config/train_shakespeare_cpu.py --dataset=stdlib_char --eval_interval=0 --save_interval=0'
_swiglu = '--mlp=swiglu --n_hidden=341'
_llama = f'{_swiglu} --qk_norm=False --embed_norm=False --softcap=0'
rungs = f'''
                     | python data/stdlib_char/prepare.py
control: our block   | {_train} --seed={{seed}} --out_dir=out-block-ours-{{seed}}
a Llama's block      | {_train} {_llama} --seed={{seed}} --out_dir=out-block-llama-{{seed}}
ours, but swiglu     | {_train} {_swiglu} --seed={{seed}} --out_dir=out-block-swiglu-{{seed}}
'''
