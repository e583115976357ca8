# What pruning costs, and what brings it back: the teacher on the standard library cut by 25, 50 and 65 % of its parameters, by each score, at the same shapes.
#     python data/stdlib_bpe/prepare.py && python bench.py --mode=ladder config/ladder_prune.py         # after ladder_stdlib.py it takes that one's teacher, labels and student
# plain: what is left keeps its weights. refit: it is fitted by least squares, and channels are cut along principal axes. +1 and +5: after so
# many per cent of the teacher's training tokens, learnt from its labels at a fifth of its rates. 2 CPU cores: some two hours (estimated; README has what was run).
mode = 'ladder'
ladder = 'out-ladder-prune/ladder.json'
seeds = '1337,1338,1339'        # of the recovery that is set against a training from scratch
timed = 'teacher,depth: 3 layers of 6,width: as many parameters,MQA aligned,drafting: whole,drafting: halved neurons,drafting: halved neurons +5'
_shape = {25: '--neuron_prune_ratio=0.5', 50: '--neuron_prune_ratio=0.5 --channel_prune_ratio=0.3334', 65: '--neuron_prune_ratio=0.6 --channel_prune_ratio=0.5'}
_prune = 'python prune.py --out_dir=out-stdlib-bpe'
_learn = 'python train.py config/distill_stdlib_bpe.py --teacher=labels-stdlib-bpe --eval_interval=0 --save_interval=0 --muon_lr=0.004 --adam_lr=0.001'
_lines = ['teacher | python train.py config/train_stdlib_bpe.py', ' | python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe']


def _rung(name, command):
    """The out_dir of a rung is made of its name."""
    _lines.append(f"{name} | {command}out-prune-{name.replace(' % ', '-').replace(' ', '-').replace(':', '').replace('+', '')}")


def _cut(percent):
    for score in ('random', 'l1', 'activation', 'taylor', 'refit'):
        how = '--importance=taylor' if score == 'refit' else f'--importance={score} --refit=False --rotate=False'
        _rung(f'{percent} % {score}', f'{_prune} {_shape[percent]} {how} --save_dir=')


def _recover(name, steps, share):
    folder = next(line for line in _lines if line.startswith(f'{name} |')).split('--save_dir=')[1]
    each = '{seed}' if (name, share) == ('50 % refit', 5) else ''
    _rung(f'{name} +{share}', f"{_learn} --init_from={folder}/best.pt --max_iters={steps}{each and ' --seed=' + each} --out_dir=")
    _lines[-1] += each and f'-{each}'


_cut(50)
for _score in ('refit', 'l1', 'taylor'):
    _recover(f'50 % {_score}', 70, 5)
for _merge in ('aligned', 'plain', 'first'):
    _rung(f'MQA {_merge}', f'{_prune} --kv_heads=1 --kv_merge={_merge} --save_dir=')
_recover('MQA aligned', 70, 5)
for _name, _how in (('depth: 3 layers of 6', '--layers=3'), ('width: as many parameters', '--neuron_prune_ratio=0.3516 --channel_prune_ratio=0.25')):
    _rung(_name, f'{_prune} {_how} --save_dir=')
_cut(25)
_cut(65)
_recover('50 % refit', 14, 1)
_recover('50 % l1', 14, 1)
for _name in ('depth: 3 layers of 6', 'width: as many parameters', 'MQA first', 'MQA plain', '50 % random', '50 % activation'):
    _recover(_name, 70, 5)
_scratch = 'python train.py config/train_stdlib_bpe.py --n_embd=256 --head_dim=64 --n_hidden=768 --max_iters=350 --eval_interval=0 --save_interval=0'
_rung('50 % control: from scratch +25', f'{_scratch} --out_dir=')
_rung('50 % control: labels from scratch +25', f'{_scratch} --teacher=labels-stdlib-bpe --alpha=0.9 --out_dir=')
_rung('50 % measured', f'{_prune} --keep_params=0.5 --save_dir=')
_recover('50 % measured', 70, 5)
# a model that drafts, its neurons halved: the head is cut along; before and after a short training of both
_draft = 'out-prune-drafting'
_student = 'out-distill-stdlib-bpe-1337'
_lines += [f' | python train.py config/distill_stdlib_bpe.py --seed=1337 --out_dir={_student} --teacher=labels-stdlib-bpe',
           f'drafting: whole | python train.py config/draft_stdlib_bpe.py --max_iters=500 --init_from={_student}/best.pt --out_dir=out-draft-stdlib-bpe && python quantize.py --out_dir=out-draft-stdlib-bpe',
           f'drafting: halved neurons | python prune.py --out_dir=out-draft-stdlib-bpe --neuron_prune_ratio=0.5 --save_dir={_draft} && python quantize.py --out_dir={_draft}',
           f'drafting: halved neurons +5 | {_learn} --init_from={_draft}/best.pt --max_iters=70 --out_dir={_draft}-5 && python quantize.py --out_dir={_draft}-5']
rungs = '\n'.join(_lines)
