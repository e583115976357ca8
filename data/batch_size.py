"""
batch_size=auto: finds how many rows of a batch fit this machine, by short trial runs of the training itself.

A trial is train.py with the same knobs, some number of rows and two steps, in a process of its own, with its teacher,
optimizers and compiler. Its exit status is the answer. 0: the rows fit; 3 (set by configurator.py) or killed: memory
ran out; anything else is an error of another kind, and ends the search with its message.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile

import torch

from data.files import in_repo, read_json, write_text
from data.signals import passed_on

PORTION = 0.9       # the share of the free memory to use; other programs and later steps need some, too
OUT_OF_MEMORY = (3, -9, 137)
AGAIN = 'remove it, and the rows are looked for again'


def rows_that_fit(knobs, most, divide, device, path, agree):
    """
    The largest number of rows, up to most, with which two steps run. knobs: train.py's; divide: whether the number must
    divide most; path: a JSON file that remembers answers with all that they depend on; agree(n): the least n over all
    processes. -> rows, and in words how they were found.
    """
    sizes = [n for n in range(1, most + 1) if not divide or most % n == 0]
    knobs = knobs | {'max_iters': 2, 'eval_interval': -1, 'save_interval': -1, 'sample_interval': 0, 'qat_start': 0.0,
                     'own_samples': 0.0, 'wandb_log': False, 'device': device}
    memory = free_memory_of(device)
    machine = torch.cuda.get_device_name(device) if device.startswith('cuda') else platform.machine()
    question = {k: v for k, v in knobs.items() if k not in ('out_dir', 'batch_size', 'seed')}
    key = json.dumps([machine, torch.get_num_threads(), torch.__version__, most, divide, question])
    known = read_json(path, AGAIN) if os.path.exists(path) else {}
    kept = known.get(key, [0, 0])
    if not isinstance(kept, list) or [type(n) for n in kept] != [int, int] or kept[0] not in (0, *sizes):
        raise ValueError(f'{path} is damaged, {kept!r:.40} is no number of rows: {AGAIN}')
    rows, memory_then = kept
    # an answer that was found with more free memory than now does not count
    rows = agree(rows if memory > 0.95 * memory_then else 0)
    if rows:
        return rows, f'as {path} says'
    index = largest_that_fits(lambda n: agree(run_trial(knobs, sizes[n - 1], device, memory)), len(sizes))
    assert index, (f"batch_size=auto: not even one row of block_size ({knobs['block_size']}) tokens fits the "
                   f"{memory / 2**20:,.0f} MiB that are left on {device}: "
                   "use a smaller block_size or model, or several GPUs with fsdp=True")
    rows = sizes[index - 1]
    if device.startswith('cuda'):               # trials may use all free memory there, so leave a margin
        rows = max(n for n in sizes if n <= max(1, PORTION * rows))
    write_text(path, json.dumps(known | {key: (rows, memory)}, indent=0))
    return rows, f'the most of 1 to {most} that fit {memory / 2**20:,.0f} MiB, nine tenths of what is free'


def run_trial(knobs, rows, device, memory):
    """Whether two steps with so many rows run within so many bytes of memory."""
    tokens = rows * knobs['block_size']
    # two micro-batches a step are enough: more of them take no more memory
    if knobs['total_batch_size']:
        knobs = knobs | {'total_batch_size': min(2 * tokens, max(tokens, knobs['total_batch_size']))}
    alone = {k: v for k, v in os.environ.items() if k not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'PICOCHAT_LADDER')}
    with tempfile.TemporaryDirectory() as out_dir:
        flags = knobs | {'batch_size': rows, 'out_dir': out_dir}
        trial = subprocess.Popen([sys.executable, in_repo('train.py'), *(f'--{k}={v}' for k, v in flags.items())],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=alone)
        if device == 'cpu':
            limit_memory(trial.pid, memory)
        with passed_on(trial):
            said = trial.communicate()[1].strip()
    fits = trial.returncode == 0
    print(f"batch_size=auto: {rows} rows {'fit' if fits else 'do not fit'}", file=sys.stderr, flush=True)
    if not fits and trial.returncode not in OUT_OF_MEMORY:
        raise ValueError(f"batch_size=auto: a trial of {rows} rows ended with status {trial.returncode}: "
                         f"{(said or 'no word').splitlines()[-1].removeprefix('error: ')}")
    return fits


def largest_that_fits(fits, most):
    """
    The largest n <= most with fits(n), 0 if there is none; fits must hold for all smaller n, too. Doubles n until it
    does not fit, then bisects: at most 2 * log2(most) + 2 calls.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good

# -----------------------------------------------------------------------------
# memory

def free_memory_of(device):
    """Bytes that a training may use here: PORTION of what is free on the GPU, or (Linux) for this process."""
    if device.startswith('cuda'):
        return int(PORTION * torch.cuda.mem_get_info(device)[0])
    assert device == 'cpu' and platform.system() == 'Linux', (
        f"batch_size=auto needs a CUDA GPU, or a CPU under Linux, not {device} under {platform.system()}: "
        "give a number of rows")
    return int(PORTION * free_memory() / int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def limit_memory(pid, memory):
    """
    Limits a process to so many bytes beyond what this one has mapped, which has loaded the same libraries. Allocations
    beyond that fail; without a limit Linux would kill the process, or its neighbours.
    """
    import resource                             # not on Windows
    limit, most = mapped() + memory, resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, most))


def mapped():
    """Bytes of address space that this process has mapped, most of it libraries (Linux)."""
    with open('/proc/self/statm') as f:
        return int(f.read().split()[0]) * os.sysconf('SC_PAGE_SIZE')


def free_memory(root='/'):
    """
    Bytes of memory that processes here can still use under Linux: what is free on the machine, or less if this
    process's control group, or a group above it, is limited to less.
    """
    def read(*path):
        with open(os.path.join(root, *path)) as f:
            return f.read()

    left = [1024 * int(read('proc/meminfo').partition('MemAvailable:')[2].split()[0])]
    for line in read('proc/self/cgroup').splitlines():
        _, kinds, path = line.split(':', 2)     # '0::/a/b', or of version 1 '9:memory:/a/b'
        if kinds and 'memory' not in kinds.split(','):
            continue
        base, most, now = ('memory', 'limit_in_bytes', 'usage_in_bytes') if kinds else ('', 'max', 'current')
        parts = [part for part in path.split('/') if part]
        for n in range(len(parts) + 1):
            group = os.path.join('sys/fs/cgroup', base, *parts[:n], 'memory.')
            if os.path.exists(os.path.join(root, group + most)) and read(group + most).strip() != 'max':
                # inactive_file: cached files, which are dropped when memory is needed
                cached = dict(line.split() for line in read(group + 'stat').splitlines()).get('inactive_file', 0)
                left.append(int(read(group + most)) - int(read(group + now)) + int(cached))
    return max(0, min(left))
