# What distillation is worth for a pruned model: SmolLM2-135M cut to a quarter of its weights, then trained for the same
# few steps on the text alone, with seven tenths of its loss from labels of the corrected whole, and on these alone.
#     python bench.py --mode=ladder config/ladder_smol.py       # makes the teacher, its labels and the text
#     python bench.py --mode=ladder config/ladder_labels.py
# 2 CPU cores: 20 minutes. README.md beside this file has the results.
mode = 'ladder'
ladder = 'out-ladder-labels/ladder.json'
record = 'config/ladder_labels.json'
timed = 'none'
seeds = '1337,1338,1339'

_train = ('python train.py --dataset=stdlib_smol_parts --block_size=512 --batch_size=4 --total_batch_size=4096 '
          '--muon_steps=3 --eval_interval=0 --save_interval=0 --sample_interval=0 --max_iters=20 --muon_lr=0.004 '
          '--adam_lr=0.0006 --init_from=out-smol-quarter0/best.pt --seed={seed}')
rungs = f'''
control: the text alone         | {_train} --out_dir=out-labels-text-{{seed}}
labels, their share 0.7         | {_train} --teacher=labels-smol --alpha=0.7 --out_dir=out-labels-7-{{seed}}
labels alone                    | {_train} --teacher=labels-smol --alpha=1 --out_dir=out-labels-10-{{seed}}
'''
