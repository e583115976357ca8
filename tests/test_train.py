"""
train.py end to end, on a toy text that is made here: what resumes, accumulates, runs in parallel or is compiled must equal what
does not; what cannot work must say so in one line and leave everything as it was.

$ python -m pytest tests/test_train.py        about a minute; most runs share this process, to import torch once
"""
import contextlib
import csv
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import data.loader
from data.loader import write_texts
from model import fast_bf16, load_checkpoint

TINY = ['--compile=False', '--dtype=float32', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4', '--max_iters=8',
        '--log_interval=1', '--eval_interval=2', '--save_interval=0', '--sample_interval=0']


def toy_text(lines=120):
    rng = random.Random(0)
    return ''.join(' '.join(rng.choices('the cat sat on a mat and ran'.split(), k=8)) + '\n' for _ in range(lines))


def make_dataset(folder, text=toy_text(), val=700, level='char', vocab_size=275):
    """Writes text as a dataset, its first val characters again as the validation split -> the flag that names it."""
    with contextlib.redirect_stdout(io.StringIO()):
        write_texts(str(folder), [text], [text[:val]], level, 'toy', vocab_size)
    return f'--dataset={folder}'


def run(script, *args, stdin=''):
    """
    The script with these arguments, in this process -> status, out, err, and the knobs and names it ended with. What would be a traceback
    is raised here.
    """
    argv, before = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    out, err, status, names = io.StringIO(), io.StringIO(), 0, {}
    sys.argv, sys.stdin = [script, *map(str, args)], io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            names = runpy.run_path(script, run_name='__main__')
    except SystemExit as e:                         # as the interpreter does: a text goes to stderr and makes the status 1
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        err.write(f'{e.code}\n' if isinstance(e.code, str) else '')
    finally:
        sys.argv, sys.stdin = argv, sys.__stdin__
        for s, handler in before.items():
            signal.signal(s, handler)
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), names=names)


def train(out_dir, *args):
    """A run that must succeed -> its JSON document."""
    got = run('train.py', *TINY, f'--out_dir={out_dir}', *args)
    assert got.status == 0 and not got.err, got.err
    return json.loads(got.out.splitlines()[-1])


def start(*args, **how):
    """The same in a process of its own."""
    return subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def refused(got, pattern):
    """One line on stderr that matches, nothing else, status 1."""
    assert got.status == 1 and re.fullmatch(f'error: .*(?:{pattern}).*\n', got.err), got.err


def content(folder):
    """Every file and folder below folder, with what is in it."""
    return {os.path.join(at, name): None if name in folders else open(os.path.join(at, name), 'rb').read()
            for at, folders, files in os.walk(folder) for name in folders + files}


def log(out_dir):
    return list(csv.DictReader(open(f'{out_dir}/log.csv')))


def tensors(x, name=''):
    """All tensors in nested dicts and lists, by where they are."""
    if isinstance(x, torch.Tensor):
        return {name: x}
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in tensors(value, f'{name}/{key}').items()}


def largest_difference(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 5
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('data') / 'toy')


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(step, signum): this process gets the signal in the middle of that step."""
    batch = data.loader.Loader.batch

    def at(stop_in, signum):
        def batch_and_signal(self, step, *args):
            if step == stop_in:
                os.kill(os.getpid(), signum)
            return batch(self, step, *args)
        monkeypatch.setattr(data.loader.Loader, 'batch', batch_and_signal)
    return at


# -----------------------------------------------------------------------------
# equalities

@pytest.mark.parametrize('args', [[], ['--dropout=0.3'], ['--total_batch_size=128', '--warmup_iters=3', '--tie_weights=True'], ['--quant_bits=8', '--qat_start=0.5'],
                                  ['--dropout=0.3', '--total_batch_size=128', '--quant_bits=8', '--qat_start=0.5', '--multi_token_n=2', '--draft_n=2']], ids=' '.join)
def test_resumed_equals_uninterrupted(toy, tmp_path, interrupt, args):
    """Stopped before, at, and after the step where the rounding begins (4): weights, optimizers, best.pt and losses are the same bits."""
    whole = train(tmp_path / 'whole', toy, *args)
    for i, (at, signum) in enumerate([(3, signal.SIGTERM), (4, signal.SIGINT), (7, signal.SIGTERM)]):
        interrupt(at - 1, signum)
        stopped = train(tmp_path / 'parts', toy, *args, '--init_from=resume' if i else '--init_from=scratch')
        assert stopped['iters'] == at == load_checkpoint(f'{tmp_path}/parts/ckpt.pt')['step']
    interrupt(None, None)
    with open(tmp_path / 'parts' / 'log.csv', 'a') as f:
        f.write('8,512,9.9,9.9,,,0.1,1\n')                                             # as if a step had been logged and then the power was cut
    resumed = train(tmp_path / 'parts', toy, *args, '--init_from=resume')
    same = ('iters', 'tokens', 'params', 'val_loss', 'val_bpb', 'best_val_loss', 'best_step')
    assert {k: whole[k] for k in same} == {k: resumed[k] for k in same}
    for name in ('ckpt.pt', 'best.pt'):
        a, b = (load_checkpoint(f'{tmp_path}/{run}/{name}') for run in ('whole', 'parts'))
        assert largest_difference(a, b) == 0 and a['step'] == b['step'] and a['best'] == b['best']
    for name in ('step', 'train_loss', 'val_loss', 'lr_factor'):
        assert [row[name] for row in log(tmp_path / 'whole')] == [row[name] for row in log(tmp_path / 'parts')]
    assert [int(row['step']) for row in log(tmp_path / 'parts')] == list(range(1, 9))
    again = train(tmp_path / 'parts', toy, *args, '--init_from=resume')                # nothing left to do
    assert {k: again[k] for k in same} == {k: whole[k] for k in same} and again['seconds'] == resumed['seconds']


def test_best_is_of_the_weights_that_will_run(toy, tmp_path):
    """Nothing is learnt here, so the first evaluation is the best one; the first after the rounding began, that is."""
    still = [toy, '--muon_lr=0', '--adam_lr=0']
    assert train(tmp_path / 'a', *still)['best_step'] == 2
    assert train(tmp_path / 'b', *still, '--quant_bits=8', '--qat_start=0.5')['best_step'] == 6


def test_resuming_takes_this_runs_rates(toy, tmp_path):
    train(tmp_path, toy, '--max_iters=2')
    before = load_checkpoint(f'{tmp_path}/ckpt.pt')
    train(tmp_path, toy, '--max_iters=4', '--init_from=resume', '--muon_lr=0', '--adam_lr=0')
    after = load_checkpoint(f'{tmp_path}/ckpt.pt')
    assert after['step'] == 4 and largest_difference(before['model'], after['model']) == 0


def test_the_loss_before_fine_tuning(toy, tmp_path):
    """Of a checkpoint it is the loss that it ended with, through the rounding too; a resumed run still knows it; others have none."""
    first = train(tmp_path / 'a', toy)
    source = f'--init_from={tmp_path}/a/best.pt'
    tuned = train(tmp_path / 'b', toy, source, '--max_iters=2')
    assert tuned['val_loss_before'] == first['best_val_loss'] != tuned['val_loss'] and first['val_loss_before'] is None
    assert train(tmp_path / 'b', toy, '--init_from=resume', '--max_iters=4')['val_loss_before'] == first['best_val_loss']
    assert train(tmp_path / 'c', toy, source, '--max_iters=1', '--eval_interval=0')['val_loss_before'] is None
    rounded = train(tmp_path / 'd', toy, source, '--quant_bits=8', '--muon_lr=0', '--adam_lr=0')
    assert rounded['val_loss_before'] == rounded['val_loss'] != first['best_val_loss']


def test_accumulation_equals_one_large_batch(toy, tmp_path, monkeypatch):
    monkeypatch.setattr('model.fast_bf16', lambda device: False)                       # Muon's bfloat16 would hide mistakes
    args = [toy, '--multi_token_n=1', '--draft_n=2']
    a = train(tmp_path / 'a', *args, '--batch_size=8')
    b = train(tmp_path / 'b', *args, '--batch_size=4', '--total_batch_size=128')
    c = train(tmp_path / 'c', *args, '--batch_size=4')
    at = {name: load_checkpoint(f'{tmp_path}/{name}/ckpt.pt')['model'] for name in 'abc'}
    assert a['tokens'] == b['tokens'] == 2 * c['tokens'] and abs(a['val_loss'] - b['val_loss']) < 1e-5
    assert largest_difference(at['a'], at['b']) < 1e-4 and largest_difference(at['a'], at['c']) > 1e-2


def test_two_processes_equal_one(toy, tmp_path, interrupt):
    """torchrun on gloo; the second process has an out_dir of its own, where nothing may appear, and it alone is asked to stop."""
    args = [toy, '--max_iters=100', '--total_batch_size=128', '--eval_interval=1']
    line = ' '.join([f'echo $BASHPID > {tmp_path}/pid$RANK; exec {sys.executable} train.py', *TINY, *args, f'--out_dir={tmp_path}/rank$RANK'])
    p = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--no-python', 'bash', '-c', line)
    timer = threading.Timer(60, p.terminate)                                           # processes that disagree wait for each other
    timer.start()
    out = []
    for text in p.stdout:
        out.append(text)
        if text.startswith('step 2/'):
            os.kill(int(open(f'{tmp_path}/pid1').read()), signal.SIGTERM)
    timer.cancel()
    assert p.wait() == 0, p.stderr.read()
    assert sum(text.startswith('{') for text in out) == sum(text.startswith('model:') for text in out) == 1
    assert os.listdir(tmp_path / 'rank1') == []
    two = json.loads(out[-1])
    assert 2 <= two['iters'] < 100
    interrupt(two['iters'] - 1, signal.SIGTERM)
    one = train(tmp_path / 'one', *args)
    loose = 100 if fast_bf16('cpu') else 1
    assert one['iters'] == two['iters'] and one['tokens'] == two['tokens'] and abs(one['val_loss'] - two['val_loss']) < 1e-5 * loose
    a, b = (load_checkpoint(f'{tmp_path}/{name}/ckpt.pt') for name in ('one', 'rank0'))
    assert largest_difference(a['model'], b['model']) < 1e-4 * loose
    assert [row['step'] for row in log(tmp_path / 'one')] == [row['step'] for row in log(tmp_path / 'rank0')]


def test_sigterm_to_a_process(toy, tmp_path, interrupt):
    """The real thing, once; and another process computes the same bits."""
    p = start('train.py', *TINY, toy, '--max_iters=5000', '--eval_interval=0', f'--out_dir={tmp_path}/a')
    for text in p.stdout:
        if text.startswith('step 3/'):
            p.send_signal(signal.SIGTERM)
            break
    rest, err = p.communicate()
    assert p.returncode == 0 and not err
    done = json.loads(rest.splitlines()[-1])
    assert 3 <= done['iters'] < 5000 and done['val_loss'] is None
    interrupt(done['iters'] - 1, signal.SIGINT)
    train(tmp_path / 'b', toy, '--max_iters=5000', '--eval_interval=0')
    a, b = (load_checkpoint(f'{tmp_path}/{name}/ckpt.pt') for name in 'ab')
    assert a['step'] == b['step'] and largest_difference(a, b) == 0


def test_killed_at_any_moment():
    """`python tests/kill.py` does the full hundred."""
    p = start('tests/kill.py', '--trials=6')
    out, err = p.communicate()
    assert p.returncode == 0 and not err, err
    assert json.loads(out.splitlines()[-1])['trials'] == 6


# -----------------------------------------------------------------------------
# torch.compile

@pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')), reason='torch.compile needs a C++ compiler')
def test_compiled_equals_eager(toy, tmp_path):
    """Also across the step where the rounding begins: the compiled code must not go on without it."""
    args = [toy, '--n_layer=1', '--max_iters=6', '--eval_interval=0', '--muon_lr=0.1', '--quant_bits=8']
    p = start('train.py', *TINY, *args, '--qat_start=0.5', '--compile=True', f'--out_dir={tmp_path}/compiled')
    out, err = p.communicate()
    assert p.returncode == 0 and 'compile=True' in out, err
    train(tmp_path / 'eager', *args, '--qat_start=0.5')
    train(tmp_path / 'float', *args, '--quant_bits=0')
    compiled, eager, plain = ([float(row['train_loss']) for row in log(tmp_path / name)] for name in ('compiled', 'eager', 'float'))
    difference = lambda a, b: max(abs(x - y) for x, y in zip(a, b, strict=True))
    assert eager[:3] == plain[:3]
    assert 10 * difference(compiled, eager) < difference(eager, plain)


@pytest.mark.parametrize('name, value', [('CXX', 'no-such-compiler'), ('PATH', '')])
def test_without_a_compiler_it_goes_on(toy, tmp_path, monkeypatch, name, value):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv(name, value)
    got = run('train.py', *TINY, toy, '--max_iters=1', '--compile=True', '--device=cpu', f'--out_dir={tmp_path}')
    assert got.status == 0 and 'no C++ compiler was found' in got.err and 'compile=False' in got.out


# -----------------------------------------------------------------------------
# what goes wrong

def test_nan_keeps_the_last_good_checkpoint(toy, tmp_path):
    train(tmp_path / 'run', toy, '--max_iters=2')
    state = load_checkpoint(f'{tmp_path}/run/ckpt.pt')
    state['model']['transformer.h.0.attn.c_q.weight'][3, 4] = math.nan
    torch.save(state, f'{tmp_path}/poisoned.pt')
    before = content(tmp_path)
    for args, pattern in ((['--init_from=resume', '--adam_lr=1e300', '--save_interval=1'], 'weights .* at step 2; .*ckpt.pt still holds step 2: .*adam_lr'),
                          (['--init_from=resume', '--adam_lr=1e300', '--log_interval=3'], 'loss .*nan.* at step 3; .*ckpt.pt still holds step 2: '),
                          ([f'--init_from={tmp_path}/poisoned.pt', f'--out_dir={tmp_path}/new'], 'loss .*nan.* at step 0; nothing had been saved')):
        refused(run('train.py', *TINY, toy, '--eval_interval=0', f'--out_dir={tmp_path}/run', *args), pattern)
        assert all(content(tmp_path)[path] == was for path, was in before.items() if path.endswith('.pt'))
    assert [row['step'] for row in log(tmp_path / 'run')][:2] == ['1', '2']


@pytest.fixture(scope='module')
def house(toy, tmp_path_factory):
    """A folder with a good run and with everything that can be wrong."""
    root = tmp_path_factory.mktemp('house')
    train(root / 'good', toy, '--max_iters=1')
    make_dataset(root / 'other', toy_text() + 'xyz')
    make_dataset(root / 'short', val=12)
    make_dataset(root / 'strange')
    (root / 'strange' / 'meta.json').write_text('{"kind": "runes"}')
    make_dataset(root / 'rows')
    (root / 'rows' / 'meta.json').write_text(json.dumps(data.loader.load_meta(root / 'rows') | {'row': 32}))
    good = (root / 'good' / 'ckpt.pt').read_bytes()
    for name, damaged in (('truncated', good[:len(good) // 2]), ('text', b'hello'), ('weights', (root / 'good' / 'best.pt').read_bytes())):
        (root / name).mkdir()
        (root / name / 'ckpt.pt').write_bytes(damaged)
    (root / 'foreign').mkdir()
    torch.save({'model': {}, 'iter_num': 3}, root / 'foreign' / 'ckpt.pt')
    return root


BAD = [                                             # flags; what the line must say. {} is the folder above
    ('--dataset={}/nothing', 'run python data/text/prepare.py .*nothing'),
    ('--dataset=shakespeare_char_', 'run python data/text/prepare.py'),
    ('--dataset={}/short', 'val.bin has 12 tokens, fewer than block_size'),
    ('--dataset={}/strange', 'runes'),
    ('--dataset={}/rows', 'rows of 32 tokens, and block_size is 16: give --block_size=32'),
    ('--init_from=resume', 'no checkpoint at'),
    ('--init_from=resume --out_dir={}/truncated', 'not a whole'),
    ('--init_from=resume --out_dir={}/text', 'not a whole'),
    ('--init_from=resume --out_dir={}/foreign', 'expected the keys .* found .*iter_num'),
    ('--init_from=resume --out_dir={}/weights', 'weights alone'),
    ('--init_from=resume --out_dir={}/good --total_batch_size=128', 'total_batch_size=64'),
    ('--init_from=resume --out_dir={}/good --dataset={}/other', 'same data'),
    ('--init_from={}/good/best.pt --dataset={}/other', 'another tokenizer'),
    ('--init_from=resume --out_dir={}/good --n_layer=3', 'n_layer is 2 there and 3 here'),
    ('--divergence=tv', r'divergence \(tv\) must be one of forward_kl'),
    ('--train_only=trunk', r'train_only \(trunk\)'),
    ('--train_only=draft', 'give --draft_n=4'),
    ('--train_only=draft --draft_n=2 --teacher={}/good', 'without a teacher'),
    ('--own_samples=0.5', 'own_samples'),
    ('--alpha=2', 'alpha'),
    ('--temperature=0', 'temperature'),
    ('--teacher={}/nothing', 'no checkpoint at'),
    ('--teacher={}/good --dataset={}/other', 'another tokenizer'),
    ('--teacher={}/good --block_size=20', r'a context of 16, which must be .* block_size \(20\)'),
    ('--init_from={}/good', 'no checkpoint at'),
    ('--init_from=', 'no checkpoint at'),
    ('--max_itres=3', 'max_iters'),
    ('--tie_weights=3', 'takes a bool'),
    ('--dropout=high', 'takes a float'),
    ('config/nothing.py', 'no config file'),
    ('--n_head=3', r'n_embd \(16\) .* n_head \(3\)'),
    ('--n_kv_head=3', 'n_kv_head'),
    ('--head_dim=5', 'even'),
    ('--total_batch_size=100', r'total_batch_size \(100\) .* \(4\*16\*1=64\): try 128'),
    ('--total_batch_size=-64', 'total_batch_size'),
    ('--quant_bits=3', 'quant_bits'),
    ('--dtype=float16', 'dtype'),
    ('--device=foo', 'device'),
    ('--device=cuda:99', 'device'),
    ('--out_dir=', 'out_dir'),
    ('--out_dir={}/good/log.csv/x', 'out_dir'),
    ('--wandb_log=True', 'pip install wandb'),
    *((f'--{knob}={value}', knob) for knob, values in {
        'n_layer': 'none auto 0', 'n_head': '0', 'n_kv_head': 'four 2.5 -1', 'head_dim': 'True', 'n_hidden': '-2', 'block_size': 'none', 'batch_size': '0 auto',
        'max_iters': '0 none', 'multi_token_n': '-1', 'draft_n': 'none', 'warmup_iters': '-1', 'log_interval': 'auto', 'eval_interval': '-2', 'save_interval': 'none',
        'sample_tokens': '-1', 'seed': '-1 none 99999999999999999999', 'dropout': '2', 'decay_frac': 'none', 'qat_start': '1.5', 'muon_lr': 'none -1',
        'grad_clip': '-1', 'weight_decay': '-0.1'}.items() for value in values.split()),
]


@pytest.mark.parametrize('flags, pattern', BAD, ids=[flags for flags, _ in BAD])
def test_bad_input(toy, house, monkeypatch, flags, pattern):
    monkeypatch.setitem(sys.modules, 'wandb', None)                                    # as if it were not installed
    before = content(house)
    refused(run('train.py', *TINY, toy, f'--out_dir={house}/new', *flags.replace('{}', str(house)).split(' ')), pattern)
    assert content(house) == before


def test_bad_input_to_a_process(tmp_path):
    p = start('train.py', '--dataset=nothing', f'--out_dir={tmp_path}/new')
    out, err = p.communicate()
    refused(SimpleNamespace(status=p.returncode, err=err), 'data/text/prepare.py .*--name=nothing')
    assert not out and os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# what is printed

def test_the_documents(toy, tmp_path):
    """train.py's and quantize.py's last line; a text without newlines; samples on the way."""
    data = make_dataset(tmp_path / 'data', toy_text().replace('\n', ' '))
    got = run('train.py', *TINY, data, f'--out_dir={tmp_path}/out', '--sample_interval=4', '--sample_tokens=40', '--quant_bits=8')
    result = json.loads(got.out.splitlines()[-1])
    assert result.keys() >= {'out_dir', 'iters', 'tokens', 'seconds', 'tok_s', 'params', 'val_loss', 'val_bpb'}
    assert result['iters'] == 8 and result['tokens'] == 8 * 64 and result['params'] == got.names['model'].params()['total']
    assert math.isclose(result['val_bpb'], result['val_loss'] / math.log(2))           # one byte a character here
    assert got.out.count('----- sample at step') == 2
    assert [row['val_loss'] != '' for row in log(tmp_path / 'out')] == [False, True] * 4
    assert sorted(os.listdir(tmp_path / 'out')) == ['best.pt', 'ckpt.pt', 'log.csv']

    got = run('quantize.py', f'--out_dir={tmp_path}/out')
    small = json.loads(got.out.splitlines()[-1])
    assert got.status == 0 and small.keys() >= {'file', 'bytes', 'bits', 'compression', 'int_share', 'val_loss_float', 'val_loss_quant', 'bpb_float', 'bpb_quant', 'mean_kl', 'top1_flips'}
    assert small['bytes'] == os.path.getsize(small['file']) and small['bits'] == 8 and small['int_share'] > 0.9
    assert abs(small['val_loss_quant'] - result['best_val_loss']) < 1e-5               # what was trained through the rounding is what runs
