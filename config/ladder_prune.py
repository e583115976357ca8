# What pruning costs and what brings it back: the teacher on the standard library cut by 25, 50 and 65 % of its
# parameters, by each score, at the same shapes.
#     python bench.py --mode=ladder config/ladder_prune.py
# A score alone: what is left keeps its weights. obs, and taylor refit: it is fitted by least squares, and channels are
# cut along principal axes. +1 and +5: after so many per cent of the teacher's training tokens, learnt from its labels
# with a quarter of its tokens a step, and of its rates.
# After ladder_distill.py it takes that one's teacher, labels and pruned eighth.
# 2 CPU cores: two hours, as two processes of one thread each, after the teacher and its labels (README.md here has the
# results). The rungs that matter most come first.
mode = 'ladder'
ladder = 'out-ladder-prune/ladder.json'
record = 'config/ladder_prune.json'
seeds = '1337,1338,1339'        # of the half's recovery
timed = ('teacher,MQA aligned,depth: 3 layers of 6,width: as many parameters,'
         'drafting: whole,drafting: halved neurons,drafting: halved neurons +5')

_cut = 'python prune.py --out_dir=out-stdlib-bpe'
_shapes = {'25': '--neuron_prune_ratio=0.5',
           '50': '--neuron_prune_ratio=0.5 --channel_prune_ratio=0.3334',
           '65': '--neuron_prune_ratio=0.6 --channel_prune_ratio=0.5'}
_alone = '--refit=False --rotate=False'
_scores = {'obs': '--importance=obs',
           **{score: f'--importance={score} {_alone}' for score in ('l1', 'taylor', 'activation', 'random')}}
_train = 'python train.py config/distill_stdlib_bpe.py --teacher=labels-stdlib-bpe --save_interval=0'
_learn = f'{_train} --batch_size=4 --muon_lr=0.005 --adam_lr=0.00125'
_scratch = ('--n_layer=6 --n_head=6 --n_kv_head=6 --n_embd=256 --head_dim=64 --n_hidden=768 '
            '--tie_weights=False')


def _after(name, folder, share=5, each_seed=False):
    """
    The line that lets what is in out-prune-FOLDER recover, with so many per cent of the tokens of the teacher's 1,400
    steps, each of which had four times as many.
    """
    each, tail = ('--seed={seed} ', '-{seed}') if each_seed else ('', '')
    return (f'{name} +{share} | {_learn} {each}--init_from=out-prune-{folder}/best.pt --max_iters={56 * share} '
            f'--out_dir=out-prune-{folder}-{share}{tail}')


def _grid(percent):
    """Each score at once, after 5 % and after 1 % of the tokens."""
    return [*(f'{percent} % {score} | {_cut} {_shapes[percent]} {how} --save_dir=out-prune-{percent}-{score}'
              for score, how in _scores.items()),
            *(_after(f'{percent} % {score}', f'{percent}-{score}', share,
                     each_seed=(percent, share, score) == ('50', 5, 'obs'))
              for share in (5, 1) for score in _scores)]


rungs = '\n'.join([
    ' | python data/stdlib_bpe/prepare.py',
    'teacher | python train.py config/train_stdlib_bpe.py',
    ' | python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe',
    *_grid('50'),
    # the half's shape from random weights, with five times the tokens
    f'50 % control: from scratch +25 | {_train} {_scratch} --max_iters=350 --out_dir=out-prune-scratch',
    # all query heads on one key/value head
    *(f'MQA {merge} | {_cut} --kv_heads=1 --kv_merge={merge} --save_dir=out-prune-mqa-{merge}'
      for merge in ('aligned', 'plain', 'first')),
    _after('MQA aligned', 'mqa-aligned'),
    # as many parameters, from fewer layers or from narrower ones
    f'depth: 3 layers of 6 | {_cut} --layers=3 --save_dir=out-prune-depth',
    (f'width: as many parameters | {_cut} --neuron_prune_ratio=0.3516 --channel_prune_ratio=0.25 '
     '--save_dir=out-prune-width'),
    _after('depth: 3 layers of 6', 'depth'), _after('width: as many parameters', 'width'),
    *_grid('25'), *_grid('65'),
    # a model that drafts, its neurons halved: the head is cut along; before and after a short training of both
    f' | {_cut} --neuron_prune_ratio=0.8412 --head_prune_ratio=0.6667 --kv_heads=1 --channel_prune_ratio=0.6667 '
    '--save_dir=out-eighth-stdlib-bpe',
    ' | python train.py config/distill_stdlib_bpe.py --seed=1337 --init_from=out-eighth-stdlib-bpe/best.pt '
    '--teacher=labels-stdlib-bpe --out_dir=out-eighth-distilled-1337',
    ('drafting: whole | python train.py config/draft_stdlib_bpe.py --max_iters=300 '
     '--init_from=out-eighth-distilled-1337/best.pt --out_dir=out-draft-stdlib-bpe '
     '&& python quantize.py --out_dir=out-draft-stdlib-bpe'),
    ('drafting: halved neurons | python prune.py --out_dir=out-draft-stdlib-bpe --neuron_prune_ratio=0.5 '
     '--save_dir=out-prune-drafting && python quantize.py --out_dir=out-prune-drafting'),
    (f'drafting: halved neurons +5 | {_learn} --init_from=out-prune-drafting/best.pt --max_iters=280 '
     '--out_dir=out-prune-drafting-5 && python quantize.py --out_dir=out-prune-drafting-5'),
    # not run yet: Taylor's order with the refit, and what to cut chosen by measured loss instead of by this file
    f'50 % taylor refit | {_cut} {_shapes["50"]} --importance=taylor --save_dir=out-prune-50-taylor-refit',
    f'50 % measured | {_cut} --keep_params=0.5 --save_dir=out-prune-measured',
    _after('50 % measured', 'measured'),
])
