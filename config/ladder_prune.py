# What pruning costs and what brings it back: the teacher on the standard library cut by 25, 50 and 65 % of its
# parameters, by each score, at the same shapes.
#     python bench.py --mode=ladder config/ladder_prune.py
# A score alone: what is left keeps its weights. obs, and taylor refit: it is fitted by least squares, and channels are
# cut along principal axes. +1 and +5: after so many per cent of the teacher's training tokens, learnt from its labels
# at its own rates (at a fifth of them a half recovered less: 3.314 nats after 5 % instead of 3.242).
# After ladder_stdlib.py it takes that one's teacher, labels and student.
# 2 CPU cores: two hours (estimated; README has what was run). The rungs that matter most come first.
mode = 'ladder'
ladder = 'out-ladder-prune/ladder.json'
seeds = '1337,1338,1339'        # of the recoveries that are set against others
timed = ('teacher,depth: 3 layers of 6,width: as many parameters,MQA aligned,'
         'drafting: whole,drafting: halved neurons,drafting: halved neurons +5')

_cut = 'python prune.py --out_dir=out-stdlib-bpe'
_shapes = {'25': '--neuron_prune_ratio=0.5',
           '50': '--neuron_prune_ratio=0.5 --channel_prune_ratio=0.3334',
           '65': '--neuron_prune_ratio=0.6 --channel_prune_ratio=0.5'}
_alone = '--refit=False --rotate=False'
_scores = {**{score: f'--importance={score} {_alone}' for score in ('random', 'l1', 'activation', 'taylor')},
           'obs': '--importance=obs'}
_learn = 'python train.py config/distill_stdlib_bpe.py --teacher=labels-stdlib-bpe --save_interval=0'
_scratch = ('python train.py config/train_stdlib_bpe.py --n_embd=256 --head_dim=64 --n_hidden=768 --max_iters=350 '
            '--eval_interval=0 --save_interval=0')


def _cuts(percent):
    return [f'{percent} % {score} | {_cut} {_shapes[percent]} {how} --save_dir=out-prune-{percent}-{score}'
            for score, how in _scores.items()]


def _after(name, folder, share=5, each_seed=False):
    """The line that lets what is in out-prune-FOLDER recover, with so many per cent of the teacher's 1,400 steps."""
    each, tail = ('--seed={seed} ', '-{seed}') if each_seed else ('', '')
    return (f'{name} +{share} | {_learn} {each}--init_from=out-prune-{folder}/best.pt --max_iters={14 * share} '
            f'--out_dir=out-prune-{folder}-{share}{tail}')


rungs = '\n'.join([
    ' | python data/stdlib_bpe/prepare.py',
    'teacher | python train.py config/train_stdlib_bpe.py',
    ' | python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe',
    # half: each score at once, after 1 % and after 5 % of the tokens; the same shape from scratch with five times those
    *_cuts('50'),
    f'50 % taylor refit | {_cut} {_shapes["50"]} --importance=taylor --save_dir=out-prune-50-taylor-refit',
    _after('50 % obs', '50-obs', each_seed=True), _after('50 % l1', '50-l1', each_seed=True),
    _after('50 % taylor', '50-taylor'), _after('50 % obs', '50-obs', 1), _after('50 % l1', '50-l1', 1),
    (f'50 % control: labels from scratch +25 | {_scratch} --teacher=labels-stdlib-bpe --alpha=0.9 '
     '--out_dir=out-prune-scratch-labels'),
    # all query heads on one key/value head
    *(f'MQA {merge} | {_cut} --kv_heads=1 --kv_merge={merge} --save_dir=out-prune-mqa-{merge}'
      for merge in ('aligned', 'plain', 'first')),
    *(_after(f'MQA {merge}', f'mqa-{merge}') for merge in ('aligned', 'plain')),
    # as many parameters, from fewer layers or from narrower ones
    f'depth: 3 layers of 6 | {_cut} --layers=3 --save_dir=out-prune-depth',
    (f'width: as many parameters | {_cut} --neuron_prune_ratio=0.3516 --channel_prune_ratio=0.25 '
     '--save_dir=out-prune-width'),
    _after('depth: 3 layers of 6', 'depth'), _after('width: as many parameters', 'width'),
    # the other two sizes, and what is left of the half
    *_cuts('25'), _after('25 % obs', '25-obs'),
    *_cuts('65'), _after('65 % obs', '65-obs'),
    f'50 % control: from scratch +25 | {_scratch} --out_dir=out-prune-scratch',
    _after('50 % activation', '50-activation'), _after('50 % random', '50-random'),
    # what to cut chosen by measured loss instead of by this file
    f'50 % measured | {_cut} --keep_params=0.5 --save_dir=out-prune-measured',
    _after('50 % measured', 'measured'),
    # a model that drafts, its neurons halved: the head is cut along; before and after a short training of both
    f' | {_cut} --neuron_prune_ratio=0.8412 --head_prune_ratio=0.6667 --kv_heads=1 --channel_prune_ratio=0.6667 '
    '--save_dir=out-eighth-stdlib-bpe',
    ' | python train.py config/distill_stdlib_bpe.py --seed=1337 --init_from=out-eighth-stdlib-bpe/best.pt '
    '--teacher=labels-stdlib-bpe --out_dir=out-eighth-distilled-1337',
    ('drafting: whole | python train.py config/draft_stdlib_bpe.py --max_iters=500 '
     '--init_from=out-eighth-distilled-1337/best.pt --out_dir=out-draft-stdlib-bpe '
     '&& python quantize.py --out_dir=out-draft-stdlib-bpe'),
    ('drafting: halved neurons | python prune.py --out_dir=out-draft-stdlib-bpe --neuron_prune_ratio=0.5 '
     '--save_dir=out-prune-drafting && python quantize.py --out_dir=out-prune-drafting'),
    (f'drafting: halved neurons +5 | {_learn} --init_from=out-prune-drafting/best.pt --max_iters=70 '
     '--out_dir=out-prune-drafting-5 && python quantize.py --out_dir=out-prune-drafting-5'),
])
