"""
What comes from outside and is not meant well: text that commands a terminal, names that command a shell, folders of
somebody else's. (More: test_checkpoint.py, test_files.py, test_loader.py, test_tokenizer.py, test_distill.py.)
"""
import contextlib
import json
import math
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
from conftest import TINY, altered, build, content, make_dataset, ran, refused, refuses, run, train

from data.bench.ladder import read_record, summary
from data.checkpoint import save_checkpoint
from data.compiling import private_cache
from data.files import shown
from data.machine import join_processes
from data.record import made, record
from data.tokenizer import CharTokenizer


# ----- the terminal

def test_control_characters_are_shown():
    text = 'plain \t\n é 日本 😀'
    assert shown(text) == text
    assert shown('\x1b]0;title\x07 \r\x00\x7f\x9b31m\x1b[31mred') == r'\x1b]0;title\x07 \x0d\x00\x7f\x9b31m\x1b[31mred'


def at_terminal(*args):
    """Such a command with a terminal as its stdout and stderr -> what reached the terminal."""
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, *args], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b''
    with contextlib.suppress(OSError):  # so a terminal ends under Linux
        while more := os.read(ours, 4096):
            seen += more
    os.close(ours)
    process.wait()
    return seen.replace(b'\r\n', b'\n')


def test_a_model_does_not_command_the_terminal(tmp_path):
    tokenizer = CharTokenizer('\x1b\x07\x9b[]')
    save_checkpoint(tmp_path / 'best.pt', build(tokenizer), tokenizer.meta(), step=1, dataset='x')
    command = ['sample.py', f'--out_dir={tmp_path}', '--start=[', '--max_new_tokens=60']
    text = run(*command).out
    assert '\x1b' in text  # files and pipes get the bytes
    seen = at_terminal(*command)
    assert rb'\x1b' in seen and not re.search(rb'[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]', seen)
    assert seen == shown(text).encode()


def test_neither_stream_commands_the_terminal(tmp_path):
    """What a foreign record says, or a child has printed, reaches stderr."""
    (tmp_path / 'x.py').write_text(
        f"import sys\nsys.path.insert(0, {os.getcwd()!r})\nfrom data.files import in_repo\n"
        "exec(open(in_repo('configurator.py')).read())\n"
        "for stream in (sys.stdout, sys.stderr):\n    print('\\x1b]0;owned\\x07', file=stream, flush=True)\n")
    assert at_terminal(tmp_path / 'x.py') == rb'\x1b]0;owned\x07' + b'\n' + rb'\x1b]0;owned\x07' + b'\n'


def test_an_error_does_not_command_the_terminal():
    got = run('train.py', '--dataset=\x1b]0;owned\x07')
    refused(got, r'no dataset in .*\\x1b\]0;owned\\x07')
    assert '\x1b' not in got.err


# ----- the compiler's cache

@pytest.fixture
def shared(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '')  # so that what a test makes of it is undone
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
    return tmp_path


@pytest.mark.parametrize('how', ['ours', 'others may write', 'a link', 'a file', 'of another user'])
def test_a_cache_that_somebody_else_has_made_is_not_taken(shared, how, monkeypatch, capsys):
    path = shared / f'picochat-inductor-{os.getuid()}'
    if how == 'a link':
        (shared / 'other').mkdir(mode=0o700)
        path.symlink_to(shared / 'other')
    elif how == 'a file':
        path.touch(mode=0o700)
    else:
        path.mkdir()
        path.chmod(0o777 if how == 'others may write' else 0o700)
    if how == 'of another user':
        uid = os.getuid()
        path.rename(shared / f'picochat-inductor-{uid + 1}')
        monkeypatch.setattr(os, 'getuid', lambda: uid + 1)
    private_cache()
    taken = os.environ['TORCHINDUCTOR_CACHE_DIR']
    assert taken.startswith(str(path.parent / 'picochat-inductor-')) and os.listdir(taken) == []
    assert (taken in (str(path), f'{path.parent}/picochat-inductor-{os.getuid()}')) == (how == 'ours')
    assert stat.S_IMODE(os.stat(taken).st_mode) == 0o700
    assert ('is not ours alone' in capsys.readouterr().err) == (how != 'ours')


def test_an_error_has_an_end(tmp_path):
    state = {'picochat': 1, 'config': {'x' * 10**6: 1}, 'tokenizer': {}, 'model': {}}
    torch.save(state, tmp_path / 'best.pt')
    got = run('sample.py', f'--out_dir={tmp_path}', '--weights=float', '--start=a')
    refused(got, 'was written by another version.*xxx [.]{3} xxx.*use the version that wrote it')
    assert len(got.err) < 2100


def test_who_waits_for_processes_says_so(monkeypatch, capsys):
    """As if torchrun had started one of two."""
    for name, value in {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    timer = threading.Timer
    monkeypatch.setattr(threading, 'Timer', lambda seconds, *what: timer(seconds / 1000, *what))
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend: time.sleep(0.3))
    assert join_processes('cpu') == (0, 2, 'cpu')
    assert capsys.readouterr().err == 'waiting for the other processes of WORLD_SIZE=2: torchrun starts them all\n'


@pytest.mark.parametrize('names', [
    {'RANK': 'x'}, {'RANK': '-1'}, {'RANK': '1'}, {'WORLD_SIZE': '0'}, {'WORLD_SIZE': '2'},
    {'WORLD_SIZE': '2', 'RANK': '0'}, {'WORLD_SIZE': '2', 'MASTER_ADDR': 'x', 'MASTER_PORT': '1'},
    {'WORLD_SIZE': '2', 'RANK': '2', 'MASTER_ADDR': 'x', 'MASTER_PORT': '1'}])
def test_an_environment_that_is_not_of_torchrun(monkeypatch, names):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    assert join_processes('cpu') == (0, 1, 'cpu')
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    refused(run('train.py', '--device=cpu'), 'in the environment are not of torchrun: unset them, or start torchrun')


# ----- names that a checkpoint gives to datasets

SHELL = 'mine; touch owned #'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    at = tmp_path_factory.mktemp('model')
    data = make_dataset(at / 'data', level='bpe')
    train(at / 'out', data, '--max_iters=1')
    return at / 'out', data


def named(out, folder, name):
    return f"--out_dir={altered(out / 'best.pt', folder, dataset=name)}"


@pytest.mark.parametrize('script, flags', [('prune.py', ['--vocab_keep=270']), ('prune.py', []), ('quantize.py', [])])
@pytest.mark.parametrize('name', [SHELL, '..', ['x'], 7, 'a\nb'])
def test_odd_names_of_datasets_are_refused(model, tmp_path, script, flags, name):
    got = run(script, named(model[0], tmp_path, name), *flags, *[f'--save_dir={tmp_path}/new'] * (script == 'prune.py'))
    refused(got, 'names the dataset .* which is not the name of a folder in data/: if you know that dataset, give it')


def test_no_dataset_is_written_where_a_checkpoint_says(model, tmp_path):
    out, data = model
    folder = os.path.dirname(data.removeprefix('--dataset='))
    before = set(content(folder))
    prune = ['prune.py', f'--out_dir={out}', f'--save_dir={tmp_path}/new', '--vocab_keep=270']
    refused(run(*prune), 'names the dataset .*/data.*, which is not the name of a folder in data/')
    assert {path for path in content(folder) if 'data' in os.path.relpath(path, folder).split(os.sep)[0]} <= before
    got = run(*prune, data)
    assert got.status == 0 and os.path.exists(f'{folder}/data_v270/meta.json'), got.err


def test_commands_that_are_printed_survive_a_shell(model, tmp_path):
    odd = tmp_path / SHELL
    data = make_dataset(odd, level='bpe')
    prune = ['prune.py', named(model[0], tmp_path, 'x'), f'--save_dir={odd}', data]
    got = ran(*prune, '--neuron_prune_ratio=0.5')
    command, = re.findall(r'with: (python .*)', got.out)
    words = shlex.split(command)
    assert words[:3] == ['python', 'train.py', f'--init_from={odd}/best.pt'] and data in words
    subprocess.run(command.replace('python', 'true', 1), shell=True, check=True, cwd=tmp_path)
    assert not (tmp_path / 'owned').exists()
    (odd / 'p').mkdir()
    (odd / 'p' / 'prepare.py').touch()
    chars = make_dataset(tmp_path / 'chars')
    for got, wanted in (
            (run('train.py', *TINY, chars, f'--init_from={odd}/best.pt', f'--out_dir={tmp_path}/new'),
             f'--tokenizer={shlex.quote(f"{odd}/best.pt")}'),
            (run('data/text/prepare.py', '--input=LICENSE', f'--tokenizer={odd}/p', f'--out_dir={tmp_path}/d'),
             f'run python {shlex.quote(f"{odd}/p/prepare.py")}, or'),
            (run('sample.py', f'--out_dir={odd}', '--weights=int8'), f'quantize.py --out_dir={shlex.quote(str(odd))} '),
            (run('train.py', f'--dataset={odd}/{SHELL}'), f'--name={shlex.quote(SHELL)}, or'),
            (run('distill.py', f'--teacher={odd}/no', f'--out_dir={tmp_path}/l'),
             f'distill.py --teacher=... --out_dir={shlex.quote(f"{odd}/no")})')):
        refused(got, re.escape(wanted))


# ----- documents that say something else than we have written

@pytest.mark.parametrize('path, value, match', [
    (('step',), 'x', "says that step is 'x', not int"), (('step',), -1, 'says that step is -1'),
    (('knobs',), ['x'], r"says that knobs is \['x'\], not dict"), (('best',), {}, 'says that loss is None'),
    (('best', 'loss'), math.nan, 'says that loss is nan'), (('knobs', 'hold_out'), 7, 'says that hold_out is 7'),
    (('knobs', 'muon_lr'), torch.ones(2), 'says that the knob muon_lr was tensor'),
    (('knobs', 'init_from'), None, 'says that init_from is None'), (('config', 'n_hidden'), True, 'n_hidden is True'),
    (('optimizers',), [7], 'no whole state of its optimizers'),
    (('optimizers',), [{'state': {99: {}}}], 'optimizer has for parameter 99'),
    (('optimizers',), [{'state': {0: {'momentum': torch.ones(3)}}}], 'numbers of shape .*3'),
    (('fast_bf16',), torch.ones(2), 'of bfloat16, neither True nor False'),
    (('ema',), {'x': torch.ones(2)}, 'a moving average of x that is not of its shape')])
def test_a_training_goes_on_from_what_a_training_has_written(model, tmp_path, path, value, match):
    out, data = model
    part = state = torch.load(out / 'ckpt.pt', weights_only=True)
    for key in path[:-1]:
        part = part[key]
    part.pop(path[-1]) if value is None else part.update({path[-1]: value})
    torch.save(state, tmp_path / 'ckpt.pt')
    refused(run('train.py', *TINY, data, f'--out_dir={tmp_path}', '--init_from=resume'), match)


@pytest.mark.parametrize('change, match', [
    (lambda e: 'x', 'best.pt is'), (lambda e: {}, 'command is None'), (lambda e: e | {'times': []}, 'times is'),
    (lambda e: {key: e[key] for key in e if key != 'cost'}, 'cost is None'),
    (lambda e: e | {'cost': e['cost'] | {'train_flops': 'x'}}, 'train_.* is'),
    (lambda e: e | {'cost': e['cost'] | {'labels': {'x': '1'}}}, 'x is')])
def test_a_record_says_what_was_recorded(tmp_path, change, match):
    record(f'{tmp_path}/best.pt', {'iters': 1, 'tokens': 2})
    whole = json.loads((tmp_path / 'made.json').read_text())['best.pt']
    assert made(f'{tmp_path}/best.pt') == whole
    (tmp_path / 'made.json').write_text(json.dumps({'best.pt': change(whole)}))
    refuses(f'made.json is damaged, it says that {match}.*: remove it', made, f'{tmp_path}/best.pt')


@pytest.mark.parametrize('row, match', [
    ({'bytes': -8}, 'bytes is -8'), ({'val_bpb': {}}, 'val_bpb is'), ({'train_flops': [1]}, 'train_flops is'),
    ({'name': ['x']}, 'name is'), ({'labels': {'x': 'y'}}, 'x is'), ({'tok_s': True}, 'tok_s is'),
    ({'bpb_new': 'x'}, 'bpb_new is')])
def test_a_ladders_rows_are_of_numbers(tmp_path, row, match):
    path, good = tmp_path / 'ladder.json', {'name': 'a', 'bytes': 9, 'tasks_centred': -0.1, 'tok_s': None}
    path.write_text(json.dumps({'rows': [good, good | {'name': 'b', 'tok_s': 3, 'bytes': None}]}))
    assert len(summary(read_record(path)['rows'])) == 2  # null is what could not be measured
    path.write_text(json.dumps({'rows': [good, good | row]}))
    refuses(f'ladder.json is damaged, it says that {match}', read_record, path)


def test_a_document_has_a_bottom(tmp_path):
    (tmp_path / 'r.json').write_text('{"rows": [{"name": "a", "tasks": ' + '[' * 500 + ']' * 500 + '}]}')
    refused(run('bench.py', '--mode=table', f'--record={tmp_path}/r.json'), 'r.json is damaged.*brackets in brackets')
