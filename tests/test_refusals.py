"""
What cannot work is said in one line, by every script, before anything is written. How knobs are read and checked:
test_configurator.py; what a file may hold: test_checkpoint.py.
"""
import shutil
import sys

import pytest
from conftest import TINY, altered, content, make_dataset, refused, run, toy_text, train

from data.checkpoint import load_checkpoint

# {} is the folder of the fixture below
FIRST = {'train.py': [*TINY, '--dataset={}/data', '--out_dir={}/new'],
         'sample.py': ['--out_dir={}/good', '--start=the', '--max_new_tokens=5'],
         'bench.py': ['--device=cpu', '--rounds=1', '--prompt_tokens=6', '--new_tokens=12', '--memory=False'],
         'distill.py': ['--compile=False'],
         'prune.py': ['--out_dir={}/good', '--save_dir={}/new'],
         'quantize.py': ['--out_dir={}/good', '--save_dir={}/new']}
PLAN = '--mode=memory --plan=True --vocab_size=65 '

BAD = {  # script -> [(flags, what the line must say)]
    'train.py': [
        ('--dataset=nothing', 'data/text/prepare.py .*--name=nothing'),
        ('--dataset={}/short', r'val.bin has 12 tokens, fewer than block_size \+ 1 \(17\)'),
        ('--init_from=resume', 'no checkpoint at'),
        ('--init_from=resume --out_dir={}/weights', 'weights alone'),
        ('--init_from=resume --out_dir={}/good --total_batch_size=128', 'total_batch_size=64'),
        ('--init_from=resume --out_dir={}/good --dataset={}/other',
         'dataset is .* there and .*other. here: resume with'),
        ('--init_from=resume --out_dir={}/good --n_layer=3', 'n_layer is 2 there and 3 here'),
        ('--init_from={}/good/best.pt --dataset={}/other', 'another tokenizer'),
        ('--init_from={}/good/best.pt --draft_n=3 --block_size=3', 'block_size'),
        ('--teacher={}/nothing', 'no teacher at'),
        ('--teacher=nanochat:nowhere --dataset=nothing', 'distill.py --fetch=d32 .*7.2 GB.*--teacher=random:d32'),
        ('--teacher={}/good --dataset={}/other', 'another tokenizer'),
        ('--teacher={}/good --block_size=20', r'a context of 16, which must be .* block_size \(20\)'),
        ('--train_only=draft', 'give --draft_n=4'),
        ('--train_only=draft --draft_n=2 --teacher={}/good', 'without a teacher'),
        ('--own_samples=0.5', 'own_samples'),
        ('--fsdp=True', 'start several, torchrun'),
        ('--fsdp=True --batch_size=auto', 'give a number of rows'),
        ('--batch_size=auto --total_batch_size=100', r'total_batch_size \(100\) .* \(1\*16\*1=16\): try 96'),
        ('--total_batch_size=100', r'total_batch_size \(100\) .* \(4\*16\*1=64\): try 128'),
        ('--device=cuda:99', 'device'),
        ('--out_dir=', 'out_dir'),
        ('--out_dir={}/good/log.csv/x', 'cannot make the folder'),
        ('--wandb_log=True', 'pip install wandb')],
    'sample.py': [
        ('--out_dir={}/nothing', 'no checkpoint at'),
        ('--weights=int8', 'python quantize.py --out_dir='),
        ('--start=the%cat', "no token for '%': .*; leave them out of the prompt"),
        ('--start=', 'prompt is empty'),
        ('--drafter=head', 'needs a model with a draft head'),
        ('--chat=True', 'special tokens'),
        ('--chat=True --num_samples=2', 'num_samples .2. at 1'),
        ('--chat=True --interactive=True', 'interactive .True. off'),
        ('--system=x', "system .'x'. is .*give --chat=True")],
    'bench.py': [
        ('--shape=d13', r'shape \(d13\) must be tiny, d12, or the out_dir of a trained model'),
        ('--mode=quality', r'shape \(tiny\) has random weights'),
        ('--formats=f32,int3', r"formats \(f32,int3\) must be of f32, .*'int3' is not"),
        ('--drafters=none,luck', r"drafters .* none, head, mtp, ngram, random; 'luck' is not"),
        ('--batches=1,0', r'batches \(1,0\)'),
        ('--new_tokens=400', r'prompt_tokens \(6\) \+ new_tokens \(400\) do not fit the context of 256'),
        ('--device=nowhere', r'device \(nowhere\) cannot be used here'),
        ('--llama2c=data', 'measured with --peers=True'),
        ('--peers=True --gguf=nowhere.gguf', 'no GGUF file at nowhere.gguf'),
        ('--peers=True --gguf=bench.py --llamacpp=data', r'llamacpp \(data\) has no llama-bench: .*cmake'),
        ('--mode=train --muon_rl=1', 'unknown key .*muon_lr'),
        ('--mode=train --batch_size=auto', r'batch_size \(auto\) must be an int'),
        ('--mode=train --init_from=x.pt', r'init_from \(x.pt\)'),
        ('{}/plan.py', 'mode .memory. must be said on the command line, --mode=memory'),
        (PLAN + '--target_params=many', r'target_params \(many\) must be'),
        (PLAN + '--target_params=1000B', r'target_params \(1000B\) .* too many')],
    'distill.py': [
        ('', 'give --teacher='),
        ('--fetch=d32', '--fetch= needs --out_dir='),
        ('--to_hf={}/hf --to_picochat={}/p --teacher={}/good', 'one of the four at a time'),
        ('--teacher={}/good --to_hf={}/hf', 'takes a teacher with a BPE'),
        ('--teacher={}/good --out_dir={}/l --method=topk --k=99', r'k \(99\) must be at most the vocabulary'),
        ('--teacher={}/good --out_dir={}/l --calibrate=True',
         'calibrate=True needs teachers that have not seen the text'),
        ('--teacher=random:d2 --out_dir={}/l', 'does not say which dataset')],
    'prune.py': [
        ('--layers=5', 'at most the 2'),
        ('--neuron_prune_ratio=0.5 --save_dir={}/good', 'another folder'),
        ('--out_dir={}/gone --neuron_prune_ratio=0.5',
         r'importance \(obs\), refit \(True\) without a text: give --dataset='),
        ('--out_dir={}/gone --channel_prune_ratio=0.5 --importance=l1 --refit=False', r'no rotate \(True\)'),
        ('--out_dir={}/gone --layers=1', r'no layer_importance \(loss\)'),
        ('--out_dir={}/gone --vocab_keep=9', 'no vocab_keep')],
    'quantize.py': [
        ('--bits=4 --method=qat', 'quant_bits'),
        ('--out_dir={}/qat --bits=4 --method=qat --group=32', 'quant_group'),
        ('--dataset={}/other', 'has another tokenizer than'),
        ('--out_dir={}/gone --dataset=nowhere', 'no dataset in data/nowhere')]}

LIMITS = {  # script -> {knob: values that it may not have}
    'train.py': dict(
        n_layer='none auto 0', n_head='0', n_kv_head='four 2.5 -1', head_dim='True', n_hidden='-2', block_size='none',
        batch_size='0', max_iters='0 none', multi_token_n='-1', draft_n='none', warmup_iters='-1', log_interval='auto',
        eval_interval='-2', save_interval='none', sample_tokens='-1', seed='-1 none 99999999999999999999', dropout='2',
        decay_frac='none', qat_start='1.5', muon_lr='none -1', grad_clip='-1', weight_decay='-0.1', divergence='tv',
        train_only='trunk', alpha='2', temperature='0', ema='1', total_batch_size='-64', quant_bits='3',
        dtype='float16'),
    'sample.py': dict(
        weights='int3', drafter='heads', draft_n='-1 16', max_new_tokens='-1 1.5', temperature='-0.5 none warm',
        top_k='fifty 0 -3 1.5 True', top_p='x 2 -0.1', min_p='x 3', num_samples='0 none', seed='none',
        threads='-1 none'),
    'bench.py': dict(mode='decoed', draft_n='16', gpu='h1'),
    'distill.py': dict(method='best', k='0'),
    'prune.py': dict(head_prune_ratio='1', neuron_prune_ratio='-0.1', importance='magic', keep_params='0'),
    'quantize.py': dict(method='foo', group='48', tables_bits='5', calib_batches='-1', bits='5')}


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    """A folder with a run that is good, and others with one thing wrong each."""
    root = tmp_path_factory.mktemp('house')
    data = make_dataset(root / 'data')
    make_dataset(root / 'other', toy_text() + 'xyz')
    make_dataset(root / 'short', val=12)
    train(root / 'good', data, '--max_iters=30', '--muon_lr=0.05')  # or it would be refused as a teacher
    best = root / 'good' / 'best.pt'
    altered(best, root / 'gone', dataset='gone')
    altered(best, root / 'qat', knobs=load_checkpoint(best)['knobs'] | {'quant_bits': 4, 'quant_group': 64})
    (root / 'weights').mkdir()
    shutil.copy(best, root / 'weights' / 'ckpt.pt')
    (root / 'plan.py').write_text("mode = 'memory'\n")
    return root


@pytest.fixture
def refuses(house, monkeypatch, in_process):
    """refuses(script, flags, pattern): in one line, and nothing is written."""
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    before = content(house)

    def check(script, flags, pattern):
        words = [*FIRST[script], *flags.split(' ')] if flags else FIRST[script]
        got = run(script, *(word.replace('{}', str(house)) for word in words))
        lines = got.err.splitlines(keepends=True)  # bench.py first says which peers are absent
        got.err = ''.join(line for line in lines if line.startswith('error') or 'pip install' not in line)
        refused(got, pattern)
        assert content(house) == before
    return check


@pytest.mark.parametrize('script, flags, pattern', [(script, *row) for script, rows in BAD.items() for row in rows])
def test_a_line_says_what_cannot_work(refuses, script, flags, pattern):
    refuses(script, flags, pattern)


@pytest.mark.parametrize('script, knob, value', [
    (script, knob, value) for script, knobs in LIMITS.items() for knob, values in knobs.items()
    for value in values.split()])
def test_a_line_says_what_a_knob_may_be(refuses, script, knob, value):
    refuses(script, f'--{knob}={value}', knob)
