"""Scripts from other folders take their code from beside themselves; ~/; and compilers that do not work."""
import glob
import json
import os
import re

import pytest

import data.compiling
from conftest import TINY, python, refused, result_of, run, toy_text

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ['train.py', 'sample.py', 'quantize.py', 'prune.py', 'distill.py', 'bench.py', 'data/text/prepare.py',
           'data/chat/prepare.py', 'data/shakespeare_char/prepare.py', 'data/graham_char/prepare.py',
           'data/stdlib_char/prepare.py', 'data/stdlib_bpe/prepare.py', 'data/pydoc_chat/prepare.py',
           'data/fineweb_edu/prepare.py']


@pytest.fixture(scope='module')
def trap(tmp_path_factory):
    """A folder whose own configurator.py, data and train.py must never run."""
    folder = tmp_path_factory.mktemp('trap')
    for path in ('configurator.py', 'train.py', 'model.py', 'data/__init__.py', 'data/files.py', 'data/loader.py'):
        os.makedirs((folder / path).parent, exist_ok=True)
        (folder / path).write_text('raise RuntimeError("a foreign file was run")\n')
    return folder


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_take_their_code_from_beside_themselves(trap, monkeypatch, script):
    monkeypatch.chdir(trap)
    monkeypatch.setenv('HOME', '/home/me')
    home = 'record' if script == 'bench.py' else 'out_dir'
    got = run(os.path.join(ROOT, script), '--knobs', f'--{home}=~/x')
    assert (got.status, got.err) == (0, '')
    assert json.loads(got.out)[home] == '/home/me/x'
    knobs = json.loads(run(os.path.join(ROOT, script), '--knobs').out)
    for knob in ('out_dir', 'tokenizer'):  # datasets lie beside the code, too
        if 'prepare' in script and knobs.get(knob):
            assert knobs[knob].startswith(os.path.join(ROOT, 'data') + os.sep)


def test_prepare_train_quantize_and_sample_from_elsewhere(trap, tmp_path, monkeypatch):
    (trap / 'text.txt').write_text(toy_text())
    data = tmp_path / 'data'
    # as if a package named data were installed, too
    got = python(f'{ROOT}/data/text/prepare.py', '--input=text.txt', f'--out_dir={data}', cwd=trap,
                 PYTHONPATH=str(trap))
    assert got.status == 0, got.err
    (trap / 'mine.py').write_text('out_dir = "run"\n')
    got = python(f'{ROOT}/train.py', 'config/quickstart.py', 'mine.py', *TINY, f'--dataset={data}', cwd=trap)
    assert result_of(got)['out_dir'] == 'run'
    monkeypatch.chdir(trap)
    assert run(f'{ROOT}/quantize.py', '--out_dir=run').status == 0
    got = run(f'{ROOT}/sample.py', '--out_dir=run', '--start=FILE:text.txt', '--slide=True')
    assert got.status == 0 and got.out.startswith(toy_text()[:-1]), got.err
    assert {'best.pt', 'int8.safetensors', 'log.csv'} <= set(os.listdir(trap / 'run'))


def test_prepare_in_its_own_folder():
    refused(python('prepare.py', '--input=nowhere', cwd=f'{ROOT}/data/text'), 'there is no file or folder .nowhere.')
    for name in (name for name in os.listdir(f'{ROOT}/data') if glob.glob(f'{ROOT}/data/{name}/[!p]*.py')):
        refused(run('data/text/prepare.py', f'--input={__file__}', f'--name={name}'), 'is a folder of code in data/')


@pytest.mark.parametrize('flag, value', [
    ('--out_dir=~/x', 'HOME/x'),
    ('--start=FILE:~/x y', 'FILE:HOME/x y'),
    ('--start=~', '~'), ('--start=~x/y', '~x/y'), ('--start=a ~/b', 'a ~/b'), ('--start=x/~/y', 'x/~/y'),
    ('--stop=~/', 'HOME/')])
def test_home(monkeypatch, tmp_path, flag, value):
    (tmp_path / 'home.py').write_text('out_dir = "~/from/a/file"\n')
    monkeypatch.setenv('HOME', str(tmp_path))
    knobs = json.loads(run('sample.py', tmp_path / 'home.py', flag, '--knobs').out)
    key = re.match(r'--(\w+)=', flag)[1]
    assert knobs[key] == value.replace('HOME', str(tmp_path))
    if key != 'out_dir':
        assert knobs['out_dir'] == f'{tmp_path}/from/a/file'


@pytest.mark.parametrize('value', ['~/a', 'gpt2:~/a', 'nanochat:~/a', '~/a+gpt2:~/b+c', 'a+~/b'])
def test_home_of_teachers(monkeypatch, tmp_path, value):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert json.loads(run('train.py', f'--teacher={value}', '--knobs').out)['teacher'] == value.replace('~', str(tmp_path))


@pytest.mark.parametrize('name, value, why', [
    ('g++', 'exit 1', r'g\+\+ does not work \(status 1\)'),
    ('g++', 'echo no space left >&2; exit 2', r'g\+\+ does not work \(no space left\)'),
    ('g++', 'for a; do case $a in *.so) exit 1;; esac; done; exec /usr/bin/g++ "$@"',  # only trying shows it
     'a first small compilation failed: .*'),
    ('TORCHINDUCTOR_CACHE_DIR', '{}/g++/cache', r'TORCHINDUCTOR_CACHE_DIR \(.*\) cannot be written: Not a directory'),
    ('CXX', 'no-such-compiler', r'no C\+\+ compiler was found.*'), ('PATH', '', r'no C\+\+ compiler was found.*')])
def test_without_a_compiler_that_works_it_goes_on(toy, tmp_path, monkeypatch, name, value, why):
    """A line says why. The g++ of the test answers --version like the true one."""
    (tmp_path / 'g++').write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec /usr/bin/g++ --version\n{value}\n')
    (tmp_path / 'g++').chmod(0o755)
    monkeypatch.delenv('CXX', raising=False)
    if name == 'g++':
        monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', f'{tmp_path}/cache')
        monkeypatch.setenv('CXX', 'g++')
        name, value = 'PATH', f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv(name, value.format(tmp_path))
    train = python if 'compilation' in why else run  # a process of its own, as torch keeps what it has compiled
    got = train('train.py', *TINY, toy, '--compile=True', '--max_iters=2', f'--out_dir={tmp_path}/out')
    assert got.status == 0 and 'compile=False' in got.out
    assert re.fullmatch(f'compile: off, {why}; going on in eager mode, slower\n', got.err), got.err


def test_nothing_is_compiled_where_it_is_off(monkeypatch, toy, tmp_path):
    monkeypatch.setattr(data.compiling, 'what_fails', lambda *args: pytest.fail('it compiled'))
    assert run('train.py', *TINY, toy, '--max_iters=1', f'--out_dir={tmp_path}').status == 0
    assert run('sample.py', f'--out_dir={tmp_path}', '--start=the').status == 0
