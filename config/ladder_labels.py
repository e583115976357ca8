# What distillation is worth for a pruned model: SmolLM2-135M cut to a quarter of its weights, then trained for the same
# 80 steps on the text alone, and with seven tenths of its loss from labels of the corrected whole.
#     python bench.py --mode=ladder config/ladder_smol.py       # makes the teacher, its labels and the text
#     python bench.py --mode=ladder config/ladder_labels.py
# 2 CPU cores: 50 minutes. README.md beside this file has the results.
mode = 'ladder'
ladder = 'out-ladder-labels/ladder.json'
record = 'config/ladder_labels.json'
timed = 'none'
seeds = '1337,1338,1339'

_train = ('python train.py --dataset=stdlib_smol_parts --block_size=512 --batch_size=4 --total_batch_size=4096 '
          '--muon_steps=3 --eval_interval=0 --save_interval=0 --sample_interval=0 --max_iters=80 --muon_lr=0.004 '
          '--adam_lr=0.0006 --init_from=out-smol-quarter0/best.pt')
rungs = f'''
control: the text alone         | {_train} --seed={{seed}} --out_dir=out-labels-text-{{seed}}
labels, their share 0.7         | {_train} --teacher=labels-smol --alpha=0.7 --seed={{seed}} --out_dir=out-labels-7-{{seed}}
'''
