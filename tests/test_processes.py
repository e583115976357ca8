"""Processes beside and around ours: two that write in one folder, signals, a terminal or a pipe that closes."""
import errno
import json
import os
import pty
import signal
import sys

import pytest

import data.files
import data.loader
from conftest import TINY, log, make_dataset, refused, refuses, run, start, toy_text, train
from data.checkpoint import load_checkpoint
from data.files import hold, release_all
from data.signals import on_stop, passed_on

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
BUFFERED = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}


@pytest.fixture(autouse=True)
def nothing_is_held_after_a_test():
    yield
    release_all()


@pytest.fixture
def holder():
    """holder(folder, name) -> another process that holds it, until it is killed."""
    started = []

    def holds(folder, name=''):
        code = 'import sys, time; from data.files import hold; hold(*sys.argv[1:]); print("held"); time.sleep(60)'
        process = start('-uc', code, folder, name)
        started.append(process)
        assert process.stdout.readline() == 'held\n'
        return process
    yield holds
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    train(folder / 'out', make_dataset(folder / 'data'), '--max_iters=60', '--eval_interval=60')
    (folder / 'text.txt').write_text(toy_text())
    return folder


# ----- two writers in one folder

def test_the_second_is_refused_until_the_first_has_ended(tmp_path, holder):
    first = holder(tmp_path / 'f')
    refuses(f'^{tmp_path}/f is being written by process {first.pid}: wait for it, or', hold, tmp_path / 'f')
    hold(tmp_path)                                              # another folder
    hold(tmp_path / 'f', 'int8.safetensors')                    # one file of it
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / 'f' / '.lock').exists()  # it is in nobody's way
    hold(tmp_path / 'f')
    hold(str(tmp_path / 'f' / '..' / 'f'))  # what is ours already


def test_a_lock_harms_nothing(tmp_path, monkeypatch):
    """Where there are no locks, where there can be no file, and where somebody has laid a link."""
    (tmp_path / 'precious').write_text('text')
    (tmp_path / '.lock').symlink_to(tmp_path / 'precious')
    hold(tmp_path)
    assert (tmp_path / 'precious').read_text() == 'text'
    monkeypatch.setattr(data.files.fcntl, 'flock', lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, 'no')))
    hold(tmp_path / 'f')
    release_all()
    assert sorted(os.listdir(tmp_path)) == ['.lock', 'precious']


@pytest.mark.parametrize('name, command', [
    ('', 'train.py {tiny} --dataset={m}/data --out_dir={x}'),
    ('', 'train.py {tiny} --dataset={m}/data --out_dir={x} --init_from=resume'),
    ('', 'distill.py --teacher={m}/out --out_dir={x} --compile=False'),
    ('', 'distill.py --teacher={m}/out --to_picochat={x}'),
    ('', 'distill.py --fetch=d32 --out_dir={x}'),
    ('', 'prune.py --out_dir={m}/out --save_dir={x} --neuron_prune_ratio=0.5'),
    ('int8.safetensors', 'quantize.py --out_dir={m}/out --save_dir={x}'),
    ('', 'data/text/prepare.py --input={m}/text.txt --out_dir={x}'),
    ('', 'data/shakespeare_char/prepare.py --input={m}/text.txt --out_dir={x}'),
    ('ladder.json', 'bench.py --mode=ladder --device=cpu --ladder={x}/ladder.json --rungs=a|python_a.py'),
], ids=lambda value: value[:30])
def test_every_script_that_writes_is_refused(model, tmp_path, holder, name, command):
    first = holder(tmp_path, name)
    before = os.listdir(tmp_path)
    words = command.format(x=tmp_path, m=model, tiny=' '.join(TINY)).split()
    got = run(*[word.replace('python_', 'python ') for word in words])
    where = tmp_path / name if name else tmp_path
    refused(got, f'{where} is being written by process {first.pid}')
    assert os.listdir(tmp_path) == before


def test_quantising_beside_a_training(model, tmp_path, holder):
    holder(tmp_path)
    got = run('quantize.py', f'--out_dir={model}/out', f'--save_dir={tmp_path}')
    assert got.status == 0 and (tmp_path / 'int8.safetensors').exists(), got.err


def test_records_of_one_folder_are_all_kept(tmp_path):
    code = 'import sys; from data.record import record; [record(f"{sys.argv[1]}/{sys.argv[2]}{i}", {}) for i in range(30)]'
    for process in [start('-c', code, tmp_path, name) for name in 'ab']:
        assert process.communicate() == ('', '')
    assert json.load(open(tmp_path / 'made.json')).keys() == {f'{name}{i}' for name in 'ab' for i in range(30)}


def test_prune_says_what_it_replaces(model, tmp_path):
    words = 'prune.py', f'--out_dir={model}/out', f'--save_dir={tmp_path}', '--neuron_prune_ratio=0.5'
    assert 'replaced' not in run(*words).out
    assert f'note: {tmp_path}/best.pt will be replaced\n' in run(*words).out


# ----- signals

def test_what_is_ignored_stays_so():
    """As nohup has it."""
    told = []
    before = {signum: signal.getsignal(signum) for signum in STOPS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        on_stop(lambda signum, frame: told.append(signum))
        for signum in STOPS:
            os.kill(os.getpid(), signum)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert told == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize('signum', STOPS)
def test_labels_that_are_stopped_go_on(model, tmp_path, monkeypatch, signum):
    words = 'distill.py', f'--teacher={model}/out', '--compile=False', '--batch_size=8', '--device=cpu'
    rows, part = data.loader.Loader.rows, tmp_path / 'x' / 'labels.bin.part'

    def signalled(self, starts):
        if part.exists() and part.stat().st_size:
            os.kill(os.getpid(), signum)
        return rows(self, starts)
    with monkeypatch.context() as m:
        m.setattr(data.loader.Loader, 'rows', signalled)
        got = run(*words, f'--out_dir={tmp_path}/x')
    assert got.status == 128 + signum and not got.err
    assert got.out.endswith(f'stopped: the same command goes on from what is in {tmp_path}/x\n')
    assert sorted(os.listdir(tmp_path / 'x')) == ['begun.json', 'labels.bin.part']
    assert run(*words, f'--out_dir={tmp_path}/x').status == 0


CHILD = '''
import signal, sys, time
def leave(*args):
    time.sleep(0.5)
    open(sys.argv[1], 'w').write('saved')
    sys.exit(0)
for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    signal.signal(getattr(signal, name), leave)
print('ready')
time.sleep(60)
'''


@pytest.mark.parametrize('signum', STOPS)
def test_a_signal_is_passed_on_and_waited_for(tmp_path, signum):
    child = start('-uc', CHILD, tmp_path / 'f')
    with pytest.raises(SystemExit) as left:
        with passed_on(child) as asked:
            assert child.stdout.readline() == 'ready\n'
            os.kill(os.getpid(), signum)
            child.communicate()
    assert left.value.code == 128 + signum and asked == [signum] and (tmp_path / 'f').read_text() == 'saved'


# ----- nobody reads any more

def test_a_terminal_that_is_closed(model, tmp_path):
    """A training in it is saved: SIGHUP comes, and from then on nothing can be printed."""
    words = ['train.py', *TINY, f'--dataset={model}/data', '--max_iters=100000', f'--out_dir={tmp_path}']
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, *words])
    said = b''
    while b'step 2/' not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert load_checkpoint(f'{tmp_path}/ckpt.pt')['step'] == int(log(tmp_path)[-1]['step']) >= 2


def unread(*words, read=0):
    """The command in a pipe whose reader leaves after so many lines -> its exit status and stderr."""
    process = start(*words, env=BUFFERED)
    for _ in range(read):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    return process.wait(), err


def test_a_training_that_nobody_reads_is_saved(model, tmp_path):
    words = 'train.py', *TINY, f'--dataset={model}/data', '--max_iters=100000', f'--out_dir={tmp_path}'
    assert unread(*words, read=3) == (0, '')
    assert load_checkpoint(f'{tmp_path}/ckpt.pt')['step'] == int(log(tmp_path)[-1]['step']) > 0


@pytest.mark.parametrize('product, command', [
    ('{x}/meta.json', 'data/text/prepare.py --input={m}/text.txt --out_dir={x}'),
    ('{x}/int8.safetensors', 'quantize.py --out_dir={m}/out --save_dir={x} --device=cpu'),
    ('{m}', 'data/text/prepare.py --help'),
])
def test_work_that_nobody_reads_is_done(model, tmp_path, product, command):
    assert unread(*command.format(m=model, x=tmp_path).split()) == (0, '')
    assert os.path.exists(product.format(m=model, x=tmp_path))


def test_a_text_that_nobody_reads_ends(model):
    status, err = unread('sample.py', f'--out_dir={model}/out', '--start=the', '--weights=float', '--slide=True',
                         '--max_new_tokens=100000', '--device=cpu')
    assert status == 1 and not err


def test_sources_go_after_a_sync(tmp_path, monkeypatch):
    """What write_dataset has written, or has found to be there already, is on the disk when it returns."""
    done = []
    for name in ('replace', 'fsync'):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: done.append(name) or real(*args))
    for _ in range(2):
        done.clear()
        make_dataset(tmp_path / 'data')
        assert done[-1] == 'fsync' and done.count('fsync') == 4
