"""data/batch_size.py: the search finds the limit, trials are the training itself, only memory is taken for memory."""
import math
import re
import sys

import pytest

import data.batch_size
from conftest import TINY, refuses, result_of, run, start
from data.batch_size import free_memory, largest_that_fits, rows_that_fit

KNOBS = {'block_size': 16, 'total_batch_size': 0, 'n_embd': 16}


def test_largest_that_fits():
    for limit in [*range(201), *(2**k + d for k in range(8, 20) for d in (-1, 0, 1))]:
        for most in (1, 2, 3, 7, 64, 100, 200, 10**6):
            asked = []
            assert largest_that_fits(lambda n: asked.append(n) or n <= limit, most) == min(limit, most)
            assert all(1 <= n <= most for n in asked) and len(asked) == len(set(asked)) <= 2 * math.log2(most) + 2


def search(monkeypatch, path, room, most=24, divide=False, agree=lambda n: n, memory=1000, **knobs):
    monkeypatch.setattr(data.batch_size, 'free_memory_of', lambda device: memory)
    monkeypatch.setattr(data.batch_size, 'run_trial', lambda knobs, rows, device, memory: rows <= room)
    return rows_that_fit(KNOBS | knobs, most, divide, 'cpu', str(path), agree)[0]


@pytest.mark.parametrize('room, divide, found', [
    (1, False, 1), (2, False, 2), (3, False, 3), (8, False, 8), (9, False, 9), (99, False, 24),
    (1, True, 1), (5, True, 4), (7, True, 6), (12, True, 12), (13, True, 12)])
def test_every_limit_is_found(monkeypatch, tmp_path, room, divide, found):
    assert search(monkeypatch, tmp_path / 'b.json', room, divide=divide) == found


def test_answers_are_kept_by_what_they_depend_on(monkeypatch, tmp_path):
    path = tmp_path / 'b.json'
    assert search(monkeypatch, path, 9) == 9
    assert search(monkeypatch, path, 20) == 9                       # the answer that is kept
    assert search(monkeypatch, path, 20, n_embd=32) == 20           # of another model
    assert search(monkeypatch, path, 4, memory=500) == 4            # found with more memory than there is now


@pytest.mark.parametrize('damage', [
    lambda known: '[1', lambda known: '[1]', lambda known: '{' * 10**5,
    lambda known: known.replace('9', '10000000'), lambda known: known.replace('9', '"a"')])
def test_damaged_answers_are_refused(monkeypatch, tmp_path, damage):
    path = tmp_path / 'b.json'
    search(monkeypatch, path, 9)
    path.write_text(damage(path.read_text()))
    refuses('b.json is damaged.*: remove it, and the rows are looked for again', search, monkeypatch, path, 9)


def test_processes_take_the_least(monkeypatch, tmp_path):
    """agree is given what this process found, and answers with what the one with the least room says."""
    asked = []

    def with_a_smaller_neighbour(n):
        asked.append(n)
        return n and len(asked) < 3  # two trials fit both, the third only this process
    assert search(monkeypatch, tmp_path / 'b.json', 9, agree=with_a_smaller_neighbour) < 9


def test_nothing_fits(monkeypatch, tmp_path):
    refuses('not even one row of block_size .16. .*smaller', search, monkeypatch, tmp_path / 'b.json', 0)


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems do not limit the memory of a process')
def test_under_a_real_limit(toy, tmp_path, monkeypatch):
    """In 300 MiB one of 31 rows fits; what is found is trained with, and equals a run that is given the number."""
    # this process, which runs all the tests, has mapped more than a training that begins
    fresh = start('-c', 'import distill, engine; from data.batch_size import mapped; print(mapped())').communicate()[0]
    monkeypatch.setattr(data.batch_size, 'mapped', lambda: int(fresh))
    monkeypatch.setattr(data.batch_size, 'free_memory_of', lambda device: 300 * 2**20)
    args = [*TINY, toy, '--n_layer=1', '--n_embd=128', '--block_size=512', '--max_iters=1', f'--total_batch_size={31 * 512}']
    got = run('train.py', *args, '--batch_size=auto', f'--out_dir={tmp_path}/auto')
    found = result_of(got)
    assert found['batch_size'] == 1 and '1 rows fit' in got.err and '31 rows do not fit' in got.err
    number = run('train.py', *args, '--batch_size=1', f'--out_dir={tmp_path}/number')
    assert result_of(number)['val_loss'] == found['val_loss']


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems do not limit the memory of a process')
def test_other_errors_are_told(toy, tmp_path, monkeypatch, in_process):
    monkeypatch.setattr(data.batch_size, 'limit_memory', lambda pid, memory: None)  # it would be our own
    got = run('train.py', *TINY, toy, '--batch_size=auto', '--train_only=draft', f'--out_dir={tmp_path}')
    assert got.status == 1
    assert re.search('a trial of 1 rows ended with status 1: train_only=draft needs that head', got.err.splitlines()[-1])


def test_free_memory_is_the_least_that_anything_allows(tmp_path):
    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return free_memory(tmp_path)
    assert write({'proc/meminfo': 'MemTotal:     9000 kB\nMemAvailable:    8000 kB\n',
                  'proc/self/cgroup': '0::/a/b\n'}) == 8000 * 1024
    group = lambda path, most, now, cached: {
        f'{path}/memory.max': most, f'{path}/memory.current': now,
        f'{path}/memory.stat': f'anon 7\ninactive_file {cached}\n'}
    assert write(group('sys/fs/cgroup/a/b', 'max\n', '900\n', 0)) == 8000 * 1024
    assert write(group('sys/fs/cgroup/a', '5000000\n', '2000000\n', 500_000)) == 3_500_000
    assert write(group('sys/fs/cgroup/a/b', '1000\n', '4000\n', 0)) == 0
    old = 'sys/fs/cgroup/memory/c/memory.'  # version 1
    assert write({'proc/self/cgroup': '9:cpu:/a/b\n4:memory:/c\n', f'{old}limit_in_bytes': '3000',
                  f'{old}usage_in_bytes': '1000', f'{old}stat': 'inactive_file 5'}) == 2005
