"""
Kills train.py at random moments, a hundred times, and looks at what is left: after each kill ckpt.pt and best.pt must
be whole, no step that was reported as saved may be lost, and the next run must go on from there. In the end every
step's loss must be that of a run that nobody killed.

$ python tests/kill.py --trials=100         half a minute; the last line is a JSON document.
                                            Not on Windows: it forks, to import torch once
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
from data.writer import write_texts

# -----------------------------------------------------------------------------
trials = 100
seed = 0                # of the moments
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())


def start(args):
    """train.py in a child of this process -> its pid and what it prints."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.dup2(write, 1)
            sys.argv = ['train.py', *args]
            runpy.run_path('train.py', run_name='__main__')
        finally:
            os._exit(1)                         # it trains until it is killed: any other end is a failure
    os.close(write)
    return pid, os.fdopen(read)


rng = random.Random(seed)
mid_save, early, saved, half = 0, 0, 0, {}
with tempfile.TemporaryDirectory() as folder:
    text = 'the cat sat on the mat and went on sitting there\n' * 40
    with contextlib.redirect_stdout(io.StringIO()):
        write_texts(f'{folder}/data', [text], [text[:200]], 'char', 'toy')
    ckpt, best = f'{folder}/out/ckpt.pt', f'{folder}/out/best.pt'
    args = [f'--dataset={folder}/data', f'--out_dir={folder}/out', '--compile=False', '--n_layer=1', '--n_head=2',
            '--n_embd=128', '--block_size=8', '--batch_size=1', '--max_iters=1000000', '--adam_lr=1e-4',
            '--muon_lr=1e-4', '--log_interval=1', '--save_interval=1', '--eval_interval=3', '--sample_interval=0']
    for trial in range(trials):
        pid, out = start(args + [f"--init_from={'resume' if saved else 'scratch'}"])
        if rng.random() < 0.9:                  # while it steps and saves, else while it starts
            reported = next((line for line in out if line.startswith('step ')), None)
            assert reported, f'trial {trial}: train.py ended by itself'
            assert int(reported.split()[1].split('/')[0]) == saved + 1, (
                f'trial {trial}: {ckpt} held step {saved}, the run went on with {reported}')
        time.sleep(rng.random() * 0.2)
        os.kill(pid, signal.SIGKILL)
        lines = [line for line in out if line.startswith('step ') and line.endswith('\n')]
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), f'trial {trial}: train.py ended by itself'
        steps = [int(line.split()[1].split('/')[0]) for line in lines if 'validation' not in line]
        was, saved = saved, load_checkpoint(ckpt)['step'] if os.path.exists(ckpt) else 0
        # a step's line comes before its save, so the step of the last line may be lost
        expected = max([was] + [step - 1 for step in steps])
        assert saved >= expected, f'trial {trial}: step {expected} had been saved, {ckpt} holds {saved}'
        assert not os.path.exists(best) or load_checkpoint(best)['step'] <= saved + 1
        now = {path: os.path.getmtime(path) for path in glob.glob(f'{folder}/out/*.tmp')}
        # what earlier kills left half-written stays until that file is written again
        mid_save, half = mid_save + bool(now.items() - half.items()), now
        early += not lines
    with open(f'{folder}/out/log.csv') as f:    # a resumed run takes back the steps that no checkpoint holds
        rows = list(csv.DictReader(f))
        losses = {int(row['step']): row['train_loss'] for row in rows}
    assert len(rows) == len(losses), f'log.csv has steps twice: {[row["step"] for row in rows]}'
    assert saved, 'every kill came before the first save'
    # an uninterrupted run to there has seen the same data: its losses are the same
    pid, out = start(args + ['--init_from=scratch', f'--out_dir={folder}/whole'])
    next(line for line in out if line.startswith(f'step {saved + 1}/'))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(f'{folder}/whole/log.csv') as f:
        whole = {int(row['step']): row['train_loss'] for row in csv.DictReader(f)}
    assert all(losses[step] == whole[step] for step in range(1, saved + 1)), 'a resumed run saw other data'
print(f'{trials} kills, {mid_save} of them while a file was being written, {early} before the second step; '
      f'the last checkpoint is of step {saved:,}; nothing was lost')
print(json.dumps({'trials': trials, 'mid_save': mid_save, 'early': early, 'step': saved}))
