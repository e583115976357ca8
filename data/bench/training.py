"""
Measures or plans the training that train.py's knobs describe: tokens/s, bytes, hours and dollars. A library for
bench.py --mode=train and --mode=memory; estimate.py beside it takes the steps.

    t = read_training(['config/train_stdlib_bpe.py'])       # train.py's knobs, resolved, as a namespace
    rows, facts = time_training(k, t)                       # k: bench.py's knobs, resolved, as a namespace
    rows = weigh_training(k, t, config, batches=[1, 2, 4])  # bytes of a step, estimated and measured
    rows = shapes_to_plan(k, t, config)                     # shapes of about k.target_params parameters
"""
import json
import os
import re
import sys
import tempfile
from statistics import median
from types import SimpleNamespace

from torch._subclasses.fake_tensor import FakeTensorMode

from data.bench.estimate import (ASSUMED_UTILISATION, GPUS, Training, forwards_a_step, shape_of_training,
                                 shapes_of_size, time_steps, training_bytes, write_random)
from data.bench.timing import speed, start
from data.compiling import can_compile
from data.machine import PEAK_FLOPS, keep_memory, peak_flops, pick_device, pick_dtype


def read_training(words, plan=False):
    """words of a command line -> t, train.py's knobs as train.py reads these words. plan: for another machine."""
    t = SimpleNamespace(**start('train.py', *words, '--knobs'))
    assert t.batch_size != 'auto', 'batch_size (auto) must be an int here: what a number of rows takes is measured'
    assert t.init_from == 'scratch' and not t.train_only, (
        f'a whole training from random weights is measured: init_from ({t.init_from}) and train_only ({t.train_only}) '
        'cannot be; give the shape, --init_from=scratch and --train_only=')
    t.device = pick_device(t.device)
    t.dtype = 'bfloat16' if plan and t.dtype == 'auto' else pick_dtype(t.dtype, t.device)
    t.compile = t.compile and (plan or can_compile(t.device))
    return t

# -----------------------------------------------------------------------------
# --mode=train: how long a step takes

def time_training(k, t):
    """-> a row for each way of taking a step, eager first, then those of nanoGPT; and a dict of common facts"""
    keep_memory()
    c = shape_of_training(t, k.vocab_size)
    tokens = forwards_a_step(t, t.batch_size) * t.batch_size * c.block_size
    with tempfile.TemporaryDirectory() as folder:
        write_random(folder, t, c.vocab_size)
        others = nanogpt_runs(k, t, c, folder) if k.nanogpt else []
        training = Training(t, c, t.batch_size, folder)
        runs, gemm, peaks = time_steps(training, c, k.steps, k.rounds, k.any_length)
    flops, peak = training.trained.flops_per_token(), peak_flops(k.device)
    rates = {way: [1000 * tokens / sum(ms.values()) for ms in run] for way, run in runs.items()}
    rows = []
    for way, run in runs.items():
        rows.append({'run': 'steps', 'way': way, 'dtype': t.dtype, **speed(rates[way], ratio=rates['eager']),
                     'ms': {part: median(ms[part] for ms in run) for part in run[0]},
                     'utilisation': flops * median(rates[way]) / gemm, 'peak_bytes': peaks.get(way),
                     'mfu': peak and flops * median(rates[way]) / peak})
    for run in others:
        row = {key: run[key] for key in ('run', 'way', 'dtype')} | speed(run['tok_s_rounds'], ratio=run['ours'])
        rows.append(dict.fromkeys(rows[0]) | row | {'ratio': 1 / row['ratio']})
    return rows, {'params': training.model.params()['total'], 'tokens_per_step': tokens, 'flops_per_token': flops,
                  'gemm_tflops': gemm / 1e12}


def nanogpt_runs(k, t, c, folder):
    """-> tokens/s of nanoGPT's train.py in k.nanogpt, and of our own train.py, on the dataset in folder"""
    return start('tests/peers.py', nanogpt=k.nanogpt, training=json.dumps(vars(t) | {'dataset': folder}),
                 vocab_size=c.vocab_size, steps=k.steps, rounds=k.rounds, device=k.device)['rows']

# -----------------------------------------------------------------------------
# --mode=memory: the estimate beside what a step takes

def describe_training(t, c):
    """-> parameters by group, FLOPs per token, and the parameters of each teacher, all without memory for weights"""
    with FakeTensorMode(allow_non_fake_inputs=True):
        training = Training(t, c, 1)
    return training.model.params(), training.trained.flops_per_token(), training.teacher_params


def weigh_training(k, t, c, batches):
    """-> a row for each batch: estimated bytes by part, and the measured peak of a process (None: not Linux)"""
    can_measure = k.device.startswith('cuda') or os.path.exists('/proc/self/clear_refs')
    # only tensors are to be measured: by itself glibc would keep freed blocks of less than 32 MB, and gaps between them
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    rows = []
    for batch in batches:
        print(f'a batch of {batch} rows', file=sys.stderr, flush=True)
        row = {'batch': batch, **training_bytes(t, c, batch), 'eager': None, 'compiled': None, 'ratio': None}
        for way in ('eager', 'compiled')[:1 + t.compile] if can_measure else ():
            step_tokens = forwards_a_step(t, batch) * batch * c.block_size
            knobs = vars(t) | dict(batch_size=batch, total_batch_size=step_tokens, compile=way == 'compiled')
            row[way] = start('bench.py', mode='memory', vocab_size=c.vocab_size, threads=k.threads,
                             child=json.dumps(knobs))['peak']
        if row['eager']:
            row['ratio'] = row['peak'] / row['eager']
        rows.append(row)
    return rows

# -----------------------------------------------------------------------------
# --mode=memory --plan=True: what a training would take on a GPU

def rate_on_gpu(k):
    """-> where a plan's FLOP/s come from, in words and as entries of its document"""
    share, peak = k.utilisation or ASSUMED_UTILISATION, PEAK_FLOPS[GPUS[k.gpu][0]]
    source = 'given' if k.utilisation else 'ASSUMED: measure it there with --mode=train and give --utilisation='
    return (f'{100 * share:.0f} % of {peak / 1e12:.0f} TFLOP/s, {source}',
            {'gpu': k.gpu, 'utilisation': share, 'assumed': not k.utilisation})


def shapes_to_plan(k, t, c):
    """-> a row for each of the five shapes nearest to k.target_params, and what training it takes"""
    found = re.fullmatch(r'(\d+(?:\.\d+)?)([KMB]?)', k.target_params)
    assert found, f'target_params ({k.target_params}) must be a number of parameters, like 38M'
    target = float(found[1]) * {'': 1, 'K': 1e3, 'M': 1e6, 'B': 1e9}[found[2]]
    rows = shapes_of_size(k, t, c, target)
    assert rows, (f'target_params ({k.target_params}) are too few for a vocabulary of {c.vocab_size:,}, whose tables '
                  'alone take more, or too many for 96 layers: give another number, or a smaller --vocab_size')
    return rows[:5]
