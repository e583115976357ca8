"""
Kills train.py at random moments, closes its terminal, starts two in one folder: nothing may be lost or mixed
(tests/README.md).

$ python tests/kill.py                      three minutes; the last line is a JSON document. Not on Windows: it forks
"""
import contextlib
import csv
import glob
import io
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')   # a fork and threads do not go together
sys.path.insert(0, '.')                         # run from the repo root
# torch's optimizers import it when first used: a second that each child would spend again
import torch._dynamo
from data.checkpoint import load_checkpoint
from data.files import in_repo
from data.machine import fast_bf16
from data.writer import write_texts

# -----------------------------------------------------------------------------
trials = 100
hups = 20
races = 20
seed = 0                # of the moments
limits = {'trials hups races': (0, None)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())


def start(args, gate=None):
    """train.py in a child of this process -> its pid and what it prints, errors too. gate: it waits for this pipe's end."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            sys.stdout = sys.stderr = os.fdopen(write, 'w')
            if gate:
                os.close(gate[1])
                os.read(gate[0], 1)
            sys.argv = ['train.py', *args]
            runpy.run_path('train.py', run_name='__main__')
            status = 0
        except BaseException as e:
            sys.excepthook(type(e), e, e.__traceback__)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    return pid, os.fdopen(read)


def end_of(pid):
    """Waits for a child -> its exit status, negative if a signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def step_of(line):
    """'step 12/1000 | loss ...' -> 12"""
    return int(line.split()[1].split('/')[0])


def is_step(line):
    return line.startswith('step ') and line.endswith('\n') and 'validation' not in line


def losses_of(folder):
    """log.csv -> {step: its loss, as written}; no step may be there twice."""
    with open(f'{folder}/log.csv') as f:
        rows = list(csv.DictReader(f))
    losses = {int(row['step']): row['train_loss'] for row in rows}
    assert len(rows) == len(losses), f'log.csv has steps twice: {[row["step"] for row in rows]}'
    return losses


def held_step(folder):
    """-> the step of the ckpt.pt there, 0 if there is none; best.pt must be whole and no newer than the next step."""
    ckpt, best = f'{folder}/ckpt.pt', f'{folder}/best.pt'
    held = load_checkpoint(ckpt)['step'] if os.path.exists(ckpt) else 0
    assert not os.path.exists(best) or load_checkpoint(best)['step'] <= held + 1
    return held


def stop(signum, args, saved, soon):
    """A training from step saved gets the signal after its first step (soon) or at its start -> steps told, status"""
    pid, out = start(args + [f"--init_from={'resume' if saved else 'scratch'}"])
    steps = []
    if soon:
        said = []
        for line in out:
            said.append(line)
            if is_step(line):
                break
        assert said and is_step(said[-1]), f'train.py ended by itself: {said[-1:]}'
        assert step_of(line) == saved + 1, f'the checkpoint held step {saved}, the run went on with {line}'
        steps.append(saved + 1)
    time.sleep(rng.random() * 0.2)
    os.kill(pid, signum)
    steps += [step_of(line) for line in out if is_step(line)]
    return steps, end_of(pid)


def kill(args, folder):
    """-> the step that is held after so many kills, how many came while a file was written, how many at the start."""
    mid_save, early, saved, half = 0, 0, 0, {}
    for trial in range(trials):
        steps, status = stop(signal.SIGKILL, args, saved, rng.random() < 0.9)
        assert status == -signal.SIGKILL, f'trial {trial}: train.py ended by itself'
        # a step's line comes before its save, so the step of the last line may be lost
        expected = max([saved] + [step - 1 for step in steps])
        saved = held_step(folder)
        assert saved >= expected, f'trial {trial}: step {expected} had been saved, the checkpoint holds {saved}'
        now = {path: os.path.getmtime(path) for path in glob.glob(f'{folder}/*.tmp')}
        # what earlier kills left half-written stays until that file is written again
        mid_save, half = mid_save + bool(now.items() - half.items()), now
        early += len(steps) < 2
    return saved, mid_save, early


def hang_up(args, folder, saved):
    """-> the step that is held after so many closed terminals. Each time it must be the last one that was made."""
    for trial in range(hups):
        steps, status = stop(signal.SIGHUP, args, saved, True)
        assert status == 0, f'hup {trial}: train.py ended with status {status}'
        saved = held_step(folder)
        assert saved == steps[-1], f'hup {trial}: step {steps[-1]} was made, the checkpoint holds {saved}'
        assert max(losses_of(folder)) == saved, f'hup {trial}: log.csv does not end with step {saved}'
    return saved


def race(args, folder):
    """Two trainings of different seeds in one new folder -> which of them won it."""
    gate = os.pipe()
    pair = [start(args + [f'--seed={seed}', f'--out_dir={folder}', '--max_iters=20'], gate) for seed in (1, 2)]
    for end in gate:
        os.close(end)
    said = [out.read() for _, out in pair]
    statuses = [end_of(pid) for pid, _ in pair]
    assert sorted(statuses) == [0, 1], f'two trainings in one folder ended with {statuses}: {said}'
    won = statuses.index(0)
    wanted = f'error: {folder} is being written by process {pair[won][0]}: wait for it, or give another folder\n'
    assert said[1 - won].endswith(wanted) and 'Traceback' not in said[1 - won], said[1 - won]
    for name in ('ckpt.pt', 'best.pt'):
        assert load_checkpoint(f'{folder}/{name}')['knobs']['seed'] == won + 1, f'{name} is of the other one'
    reported = {step_of(line): line.split()[4] for line in said[won].splitlines(keepends=True) if is_step(line)}
    losses = {step: f'{float(loss):.4f}' for step, loss in losses_of(folder).items()}
    assert losses == reported and len(losses) == 20, 'log.csv is not what the winner reported'
    return won


def uninterrupted(args, folder, until):
    """-> {step: its loss} of a run that nobody stopped before that step."""
    pid, out = start(args + ['--init_from=scratch', f'--out_dir={folder}'])
    assert any(line.startswith(f'step {until + 1}/') for line in out)
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    return losses_of(folder)


rng = random.Random(seed)
fast_bf16('cpu')  # measured once: on a busy machine trainings might find other answers
with tempfile.TemporaryDirectory() as folder:
    text = 'the cat sat on the mat and went on sitting there\n' * 40
    with contextlib.redirect_stdout(io.StringIO()):
        write_texts(f'{folder}/data', [text], [text[:200]], 'char', 'toy')
    args = [f'--dataset={folder}/data', f'--out_dir={folder}/out', '--compile=False', '--n_layer=1', '--n_head=2',
            '--n_embd=128', '--block_size=8', '--batch_size=1', '--max_iters=1000000', '--adam_lr=1e-4',
            '--muon_lr=1e-4', '--log_interval=1', '--save_interval=1', '--eval_interval=3', '--sample_interval=0']
    saved, mid_save, early = kill(args, f'{folder}/out')
    saved = hang_up(args, f'{folder}/out', saved)
    assert saved or not trials + hups, 'every signal came before the first save'
    if saved:  # an uninterrupted run has seen the same data: its losses are the same
        losses, whole = losses_of(f'{folder}/out'), uninterrupted(args, f'{folder}/whole', saved)
        assert all(losses[step] == whole[step] for step in range(1, saved + 1)), 'a resumed run saw other data'
    first = sum(race(args, f'{folder}/race{i}') == 0 for i in range(races))
print(f'{trials} kills, {mid_save} of them while a file was being written, {early} before the second step; {hups} closed '
      f'terminals; the last checkpoint is of step {saved:,}; nothing was lost')
print(f'{races} times two trainings in one folder: {first} times the first won, never a mixture')
print(json.dumps({'trials': trials, 'mid_save': mid_save, 'early': early, 'step': saved, 'hups': hups, 'races': races,
                  'first_won': first}))
