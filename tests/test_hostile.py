"""
What comes from outside and is not meant well: text that commands a terminal, names that command a shell, folders that
are somebody else's. (Hostile checkpoints: test_checkpoint.py; downloads: test_files.py; datasets: test_loader.py;
tokenizers: test_tokenizer.py; labels: test_distill.py.)

$ python -m pytest tests/test_hostile.py
"""
import contextlib
import json
import math
import os
import re
import resource
import shlex
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
from conftest import (TEXTS, TINY, TOK, V, altered, build, content, make_dataset, our_llama, refused, run, train,
                      write_nanochat, write_nanogpt)

from data.bench.ladder import read_record, summary
from data.checkpoint import save_checkpoint
from data.compiling import can_compile, private_cache
from data.files import private_folder, shown
from data.foreign.causal_lm import load_causal_lm
from data.foreign.export import export_gguf, export_hf
from data.foreign.gpt2 import load_gpt2
from data.foreign.llama import load_gguf, load_llama
from data.foreign.nanochat import load_nanochat
from data.kernels import library
from data.machine import join_processes
from data.record import made, record
from data.tokenizer import CharTokenizer, train_bpe


# -----------------------------------------------------------------------------
# the terminal

def test_control_characters_are_shown():
    text = 'plain \t\n é 日本 😀'
    assert shown(text) == text
    assert shown('\x1b]0;title\x07 \r\x00\x7f\x9b31m\x1b[31mred') == r'\x1b]0;title\x07 \x0d\x00\x7f\x9b31m\x1b[31mred'


@pytest.fixture(scope='module')
def speaks_to_terminals(tmp_path_factory):
    """The out_dir of a model that writes next to nothing but escape sequences."""
    out = tmp_path_factory.mktemp('out')
    tokenizer = CharTokenizer('\x1b\x07\x9b[]')
    save_checkpoint(out / 'best.pt', build(tokenizer), tokenizer.meta(), step=1, dataset='x')
    return out


def at_terminal(*args):
    """Such a command with a terminal as its stdout and stderr -> what reached the terminal."""
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, *args], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b''
    with contextlib.suppress(OSError):              # so a terminal ends under Linux
        while more := os.read(ours, 4096):
            seen += more
    os.close(ours)
    process.wait()
    return seen.replace(b'\r\n', b'\n')


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='no terminals of this kind')
def test_a_model_does_not_command_the_terminal(speaks_to_terminals):
    command = ['sample.py', f'--out_dir={speaks_to_terminals}', '--start=[', '--max_new_tokens=60']
    text = run(*command).out
    assert '\x1b' in text                           # files and pipes get the bytes
    seen = at_terminal(*command)
    assert rb'\x1b' in seen and not re.search(rb'[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]', seen)
    assert seen == shown(text).encode()


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='no terminals of this kind')
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


def test_a_server_does_not_command_the_terminal(server, tmp_path):
    server.pages['/f'] = {'status': 404, 'reason': '\x1b]0;owned\x07'}
    got = run('data/shakespeare_char/prepare.py', f'--url={server.url}/f', f'--out_dir={tmp_path}/x')
    refused(got, r'answered 404 \\x1b\]0;owned\\x07')


# -----------------------------------------------------------------------------
# the compiler's cache

@pytest.fixture
def shared(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '')   # so that what a test makes of it is undone
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
    return tmp_path


def test_the_compilers_cache_is_ours_alone(shared, monkeypatch):
    private_cache()
    path = os.environ['TORCHINDUCTOR_CACHE_DIR']
    assert os.path.dirname(path) == str(shared) and stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert private_folder('picochat-inductor') == path                  # it is found again
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', f'{shared}/mine')
    private_cache()
    assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == f'{shared}/mine'              # the user's own wish


@pytest.mark.parametrize('how', ['others may write', 'a link', 'a file', 'of another user'])
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
    assert taken not in (str(path), f'{path.parent}/picochat-inductor-{os.getuid()}')
    assert stat.S_IMODE(os.stat(taken).st_mode) == 0o700 and 'is not ours alone' in capsys.readouterr().err


@pytest.mark.parametrize('named', ['', 'none/cache'])
def test_without_any_cache_training_goes_on_in_eager_mode(shared, named, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, 'tempdir', f'{shared}/gone')
    (shared / 'none').touch()                           # a file, in which no folder can be made
    if named:
        monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', f'{shared}/{named}')
    assert not can_compile('cpu') and library.__wrapped__() is None
    assert 'compile: off, no folder for what is compiled can be made (No such file' in capsys.readouterr().err


def test_an_error_has_an_end(tmp_path):
    """However long the name that it names."""
    state = {'picochat': 1, 'config': {'x' * 10**6: 1}, 'tokenizer': {}, 'model': {}}
    torch.save(state, tmp_path / 'best.pt')
    got = run('sample.py', f'--out_dir={tmp_path}', '--weights=float', '--start=a')
    refused(got, 'was written by another version.*xxx [.]{3} xxx.*use the version that wrote it')
    assert len(got.err) < 2100


# -----------------------------------------------------------------------------
# processes

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


# -----------------------------------------------------------------------------
# names that a checkpoint gives to datasets

SHELL = 'mine; touch owned #'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """The out_dir of a training on BPE tokens, and the folder of its dataset."""
    at = tmp_path_factory.mktemp('model')
    data = make_dataset(at / 'data', level='bpe')
    train(at / 'out', data, '--max_iters=1')
    return at / 'out', data


def named(out, folder, name):
    """The same model, but for the dataset that it says it was trained on."""
    return f"--out_dir={altered(out / 'best.pt', folder, dataset=name)}"


@pytest.mark.parametrize('script, flags', [('prune.py', ['--vocab_keep=270']), ('prune.py', []), ('quantize.py', [])])
@pytest.mark.parametrize('name', [SHELL, '..', ['x'], 7, 'a\nb'])
def test_odd_names_of_datasets_are_refused(model, tmp_path, script, flags, name):
    got = run(script, named(model[0], tmp_path, name), *flags, *[f'--save_dir={tmp_path}/new'] * (script == 'prune.py'))
    refused(got, 'names the dataset .* which is not the name of a folder in data/: if you know that dataset, give it')


def test_odd_knobs_are_refused(model, tmp_path):
    altered(model[0] / 'best.pt', tmp_path, knobs=['x'])
    for script in ('prune.py', 'quantize.py'):
        got = run(script, f'--out_dir={tmp_path}', *[f'--save_dir={tmp_path}/new'] * (script == 'prune.py'))
        refused(got, r"best.pt is damaged, it says that knobs is \['x'\], not dict: use another copy")


def test_no_dataset_is_written_where_a_checkpoint_says(model, tmp_path):
    """Its path is read from; a new dataset goes beside it only if the user names it."""
    out, data = model
    folder = os.path.dirname(data.removeprefix('--dataset='))
    before = set(content(folder))
    prune = ['prune.py', f'--out_dir={out}', f'--save_dir={tmp_path}/new', '--vocab_keep=270']
    refused(run(*prune), 'names the dataset .*/data.*, which is not the name of a folder in data/')
    assert {path for path in content(folder) if 'data' in os.path.relpath(path, folder).split(os.sep)[0]} <= before
    got = run(*prune, data)
    assert got.status == 0 and os.path.exists(f'{folder}/data_v270/meta.json'), got.err


def test_commands_that_are_printed_survive_a_shell(model, tmp_path):
    """A dataset's folder, and those of models, may have any name: what is printed is that command and no other."""
    odd = tmp_path / SHELL
    data = make_dataset(odd, level='bpe')
    prune = ['prune.py', named(model[0], tmp_path, 'x'), f'--save_dir={odd}', data]
    got = run(*prune, '--neuron_prune_ratio=0.5')
    assert got.status == 0, got.err
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


# -----------------------------------------------------------------------------
# a teacher's file that changes while it teaches

@pytest.mark.parametrize('load, write', [
    (load_nanochat, lambda path: write_nanochat(path, train_bpe(TEXTS, V), n_layer=10**7)),
    (load_nanochat, lambda path: write_nanochat(path, train_bpe(TEXTS, V), sequence_len=10**9)),
    (load_gpt2, lambda path: write_nanogpt(path / 'ckpt.pt', n_layer=10**7))])
def test_a_teacher_asks_for_no_more_than_its_file_holds(tmp_path, load, write):
    write(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match='does not have the tensors of its own settings .*(10,000,000|8,000,000,000)'):
        load(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000         # kB


def test_transformers_is_asked_for_no_more_than_a_file_holds(tmp_path):
    pytest.importorskip('transformers')
    export_hf(smollm(), TOK, tmp_path)
    c = json.loads((tmp_path / 'config.json').read_text())
    for layers in (10**7, 'x'):
        (tmp_path / 'config.json').write_text(json.dumps(c | {'num_hidden_layers': layers}))
        with pytest.raises(ValueError, match=f"says that it has '?{layers}'? layers, and .* has .* tensors"):
            load_causal_lm(str(tmp_path))


def test_a_list_in_a_gguf_file_ends_with_the_file(tmp_path):
    """gguf would read nothing 10**12 times, and keep it."""
    pytest.importorskip('gguf')
    head = struct.pack('<4sIQQQ1sIIQ', b'GGUF', 3, 0, 1, 1, b'x', 9, 4, 10**12)     # one setting, x, a list of integers
    (tmp_path / 'x.gguf').write_bytes(head + bytes(64))
    with pytest.raises(ValueError, match='x.gguf is not a whole GGUF file .ValueError: it ends too early'):
        load_gguf(str(tmp_path / 'x.gguf'))


def smollm():
    return our_llama(n_kv_head=2, out_proj=True, tie_weights=True)


def in_transformers(folder, device='cpu'):
    pytest.importorskip('transformers')
    return load_causal_lm(folder, device)


@pytest.mark.parametrize('load, write, needs', [
    (load_gpt2, lambda path: write_nanogpt(path / 'ckpt.pt'), None),
    (load_nanochat, lambda path: write_nanochat(path, train_bpe(TEXTS, V)), None),
    (load_llama, lambda path: export_hf(smollm(), TOK, path), 'safetensors'),
    (in_transformers, lambda path: export_hf(smollm(), TOK, path), 'safetensors'),
    (lambda path: load_gguf(f'{path}/x.gguf'),
     lambda path: export_gguf(smollm(), TOK, path / 'x.gguf', 'f32'), 'gguf')])
def test_a_teacher_does_not_change_with_its_file(tmp_path, load, write, needs):
    """Nor does it end with a bus error when somebody copies a shorter one over it: nothing of it is read later."""
    if needs:
        pytest.importorskip(needs)
    write(tmp_path)
    teacher, _ = load(str(tmp_path))
    idx = torch.arange(8)[None]
    with torch.no_grad():
        before = teacher.logits(teacher.trunk(idx))
        for path in tmp_path.iterdir():
            with open(path, 'r+b') as f:                # in place: a new file of that name would be another one
                f.write(bytes(path.stat().st_size))
        assert torch.equal(teacher.logits(teacher.trunk(idx)), before)
    if os.path.exists('/proc/self/maps'):               # Linux
        with open('/proc/self/maps') as f:
            assert str(tmp_path) not in f.read()


# -----------------------------------------------------------------------------
# documents that say something else than we have written

def in_checkpoint(path, value):
    """-> a checkpoint whose part at the path of keys is that value; nothing: it is taken out."""
    def change(state):
        part = state
        for key in path[:-1]:
            part = part[key]
        part.pop(path[-1]) if value is None else part.update({path[-1]: value})
        return state
    return change


@pytest.mark.parametrize('path, value, match', [
    (('step',), 'x', "says that step is 'x', not int"), (('step',), -1, 'says that step is -1'),
    (('step',), None, 'says that step is None'), (('seconds',), [], 'says that seconds is'),
    (('total_batch_size',), {}, 'says that total_batch_size is'), (('best',), {}, 'says that loss is None'),
    (('best', 'loss'), math.nan, 'says that loss is nan'), (('knobs', 'hold_out'), 7, 'says that hold_out is 7'),
    (('knobs', 'muon_lr'), torch.ones(2), 'says that the knob muon_lr was tensor'),
    (('knobs', 'init_from'), None, 'says that init_from is None'), (('config', 'n_hidden'), True, 'n_hidden is True'),
    (('optimizers',), [7], 'no whole state of its optimizers'), (('optimizers',), 7, 'says that optimizers is 7'),
    (('optimizers',), [{'state': {0: 1}}], 'no whole state of its optimizers'),
    (('optimizers',), [{'state': {99: {}}}], 'optimizer has for parameter 99'),
    (('optimizers',), [{'state': {0: {'momentum': torch.ones(3)}}}], 'numbers of shape .*3'),
    (('ema',), {'x': torch.ones(2)}, 'a moving average of x that is not of its shape'),
    (('ema',), {'lm_head.weight': torch.ones(1)}, 'a moving average of lm_head.weight that is not')])
def test_a_training_goes_on_from_what_a_training_has_written(model, tmp_path, path, value, match):
    out, data = model
    state = in_checkpoint(path, value)(torch.load(out / 'ckpt.pt', weights_only=True))
    torch.save(state, tmp_path / 'ckpt.pt')
    refused(run('train.py', *TINY, data, f'--out_dir={tmp_path}', '--init_from=resume'), match)


@pytest.mark.parametrize('entry, match', [
    ('x', 'says that best.pt is'), ({}, 'says that command is None'),
    ({'document': {}}, 'says that cost is None'), ({'times': []}, 'says that times is'),
    ({'cost': {'train_flops': 'x'}}, 'says that train_.* is'), ({'cost': {'labels': {'x': '1'}}}, 'says that x is')])
def test_a_record_says_what_was_recorded(tmp_path, entry, match):
    record(f'{tmp_path}/best.pt', {'iters': 1, 'tokens': 2})
    whole = json.loads((tmp_path / 'made.json').read_text())['best.pt']
    assert made(f'{tmp_path}/best.pt') == whole
    if entry == {'document': {}}:
        del whole['cost']
    elif entry:
        entry = whole | {key: {**whole[key], **part} if part else part for key, part in entry.items()} \
            if isinstance(entry, dict) else entry
    (tmp_path / 'made.json').write_text(json.dumps({'best.pt': whole if entry == {'document': {}} else entry}))
    with pytest.raises(ValueError, match=f'made.json is damaged, it {match}.*: remove it'):
        made(f'{tmp_path}/best.pt')


@pytest.mark.parametrize('row, match', [
    ({'bytes': 'x'}, 'bytes is'), ({'val_bpb': {}}, 'val_bpb is'), ({'train_flops': [1]}, 'train_flops is'),
    ({'name': ['x']}, 'name is'), ({'labels': {'x': 'y'}}, 'x is'), ({'tok_s': True}, 'tok_s is'),
    ({'bpb_new': 'x'}, 'bpb_new is')])
def test_a_ladders_rows_are_of_numbers(tmp_path, row, match):
    path, good = tmp_path / 'ladder.json', {'name': 'a', 'bytes': 9, 'val_loss': 1.0, 'val_bpb': 1.5, 'tok_s': None}
    path.write_text(json.dumps({'rows': [good, good | {'name': 'b', 'tok_s': 3, 'bytes': None}]}))
    assert len(summary(read_record(path)['rows'])) == 2         # null is what could not be measured
    path.write_text(json.dumps({'rows': [good, good | row]}))
    with pytest.raises(ValueError, match=f'ladder.json is damaged, it says that {match}'):
        read_record(path)


def test_a_document_has_a_bottom(tmp_path):
    """JSON reads what nothing of ours would walk through."""
    (tmp_path / 'r.json').write_text('{"rows": [{"name": "a", "tasks": ' + '[' * 500 + ']' * 500 + '}]}')
    refused(run('bench.py', '--mode=table', f'--record={tmp_path}/r.json'), 'r.json is damaged.*brackets in brackets')
