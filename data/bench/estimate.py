"""
What a training costs: takes a step as train.py does, on random tokens, or on meta-like tensors that have shapes but no
memory; and what the whole training would cost on a GPU. A library for bench.py --mode=train and --mode=memory.

    training = Training(t, config, rows=4, folder='data/random')        # t: train.py's knobs, resolved, as a namespace
    seconds = training.step(training.trained, T=256, accumulation=2)    # {'data', 'forward', 'backward', 'optimizer'}
    training_bytes(t, config, rows=4)['peak']                           # bytes of a step that is not taken
"""
import contextlib
import ctypes
import gc
import math
import os
import re
import sys
import tempfile
import time
import weakref
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.bench.timing import in_rounds, resident, timed_call
from data.checkpoint import without_memory
from data.compiling import compile_step
from data.files import in_repo, read_json
from data.loader import Loader, load_meta
from data.machine import PEAK_FLOPS, autocast
from data.optimizers import Averages, make_optimizers, update
from data.rounding import prepare
from data.teachers import in_bfloat16, load_teacher, teacher_names
from data.tokenizer import CharTokenizer
from data.writer import write_dataset
from distill import Distiller
from model import GPT, GPTConfig, LOSS_CHUNK_BYTES, config_of, rows_in_a_chunk


def forwards_a_step(t, rows):
    """-> how many forwards over so many rows make a step"""
    return max(1, round((t.total_batch_size or t.batch_size * t.block_size) / (rows * t.block_size)))


def teachers_of_training(t, c):
    """-> the teachers' models (random weights for nanochat's d32 and the like); for labels, the samples per token."""
    meta = os.path.join(t.teacher, 'meta.json')
    if t.teacher and os.path.exists(meta):
        return [], read_json(meta, 'write the labels again', {'k': int})['k']
    if t.teacher.startswith('labels') and not os.path.exists(t.teacher):
        return [], 12                           # what distill.py writes
    models = []
    for name in teacher_names(t.teacher):
        nanochat_shape = re.fullmatch(r'nanochat:(?:.*/)?(d\d+)/?', name)
        if nanochat_shape or name.startswith('random:'):                # no gigabytes are read to measure a shape
            model = load_teacher(f'random:{nanochat_shape[1]}' if nanochat_shape else name, t.device).model
        else:
            with unset_fake_temporarily():      # a file has numbers to look at; what it takes is counted by a copy
                model = load_teacher(name, t.device).model
            model._apply(torch.clone)
        assert model.config.vocab_size == c.vocab_size and model.config.block_size >= c.block_size, (
            f'the teacher {name} has a vocabulary of {model.config.vocab_size:,} and a context of '
            f'{model.config.block_size}, which must be {c.vocab_size:,} and at least block_size ({c.block_size}): '
            'give --vocab_size= or another teacher')
        model.config.block_size = c.block_size      # it attends to no more, which flops_per_token counts
        models.append(model)
    return models, 0


class Training:
    """
    A training, set up as in train.py: model; trained, which computes losses of (x, y, ...); optimizers; averages.
    Batches have so many rows of the dataset in folder; without a folder they are zeros.
    """
    def __init__(self, t, c, rows, folder=None):
        torch.manual_seed(t.seed)
        with torch.device(t.device):
            self.model = GPT(c).train()
        self.optimizers = make_optimizers(self.model, t.muon_lr, t.adam_lr, t.weight_decay, t.muon_steps)
        if t.quant_bits:
            prepare(self.model, t.quant_bits, t.quant_group, t.tables_bits)
        self.teachers, self.k = teachers_of_training(t, c)
        self.teacher_params = [sum(p.numel() for p in teacher.parameters()) for teacher in self.teachers]
        if t.dtype == 'bfloat16' and not t.fsdp:                        # where tied tables come apart
            self.teachers = [in_bfloat16(teacher) for teacher in self.teachers]
        self.trained = (Distiller(self.model, self.teachers, t.divergence, t.temperature) if t.teacher
                        else self.model)
        self.loader = folder and Loader(folder, 'train', rows, c.block_size, t.seed, device=t.device)
        self.averages = Averages(self.model, t.ema, {})
        self.t, self.rows, self.number = t, rows, 0

    def batch(self, T):
        """-> x and y (rows, T); with labels also ids and weights (rows, T, k) and entropy (rows, T)"""
        if self.loader:
            x, y = self.loader.batch(self.number)
            x, y = x[:, :T].contiguous(), y[:, :T].contiguous()
            self.number += 1
        else:
            x, y = torch.zeros(2, self.rows, T, dtype=torch.long, device=self.t.device)
        if not self.k:
            return x, y
        ids = x[..., None].expand(-1, -1, self.k).contiguous()
        weights = torch.full(ids.shape, 1 / self.k, device=self.t.device)
        return x, y, ids, weights, torch.zeros(x.shape, device=self.t.device)

    def step(self, forward, T, accumulation):
        """Takes a step of `accumulation` forwards, on rows of T tokens -> its seconds by part."""
        clock = Laps(self.t.device)
        for _ in range(accumulation):
            batch = self.batch(T)
            clock.lap('data')
            with autocast(self.t.device, self.t.dtype):
                loss = sum(forward(*batch).values())
                clock.lap('forward')
                loss.backward()
            clock.lap('backward')
        update(self.model, self.optimizers, self.t.grad_clip)
        self.averages.update(1)
        clock.lap('optimizer')
        return clock.took


class Laps:
    """A clock for the parts of a step, which waits for a GPU."""
    def __init__(self, device):
        self.device = device
        self.took, self.last = dict.fromkeys(('data', 'forward', 'backward', 'optimizer'), 0.0), self.now()

    def now(self):
        if not self.device.startswith('cpu'):
            torch.accelerator.synchronize()
        return time.perf_counter()

    def lap(self, part):
        now = self.now()
        self.took[part] += now - self.last
        self.last = now

# -----------------------------------------------------------------------------
# measuring steps, on random tokens

def shape_of_training(t, vocab_size=0):
    """-> its GPTConfig; the vocabulary is vocab_size, or the dataset's, or nanochat's if that teaches."""
    folder, size = os.path.join(in_repo('data'), t.dataset), vocab_size
    if not size and os.path.exists(os.path.join(folder, 'meta.json')):
        size = load_meta(folder)['vocab_size']
    if not size and t.teacher.startswith(('nanochat:', 'random:')):
        size = 65536
    assert size, f'{folder} is not prepared, so the vocabulary is not known: give it, as in --vocab_size=4096'
    return config_of(vars(t), size)


def write_random(folder, t, vocab_size):
    """Writes a dataset of random tokens, characters without surrogates, for train.py."""
    ids = np.random.default_rng(t.seed).integers(vocab_size, size=2**20)
    characters = CharTokenizer(chr(i + 2048 * (i >= 0xd800)) for i in range(vocab_size))
    with contextlib.redirect_stdout(None):
        write_dataset(folder, characters, ids, ids[:2 * t.block_size + 1], 'random')


@torch.inference_mode()
def gemm_rate(t, c):
    """-> FLOP/s of the fastest of some products in the training's dtype: a large square one, and those of an MLP."""
    big, rows, best = 2048 if t.device == 'cpu' else 8192, t.batch_size * c.block_size, 0.0
    for m, k, n in ((big, big, big), (rows, c.n_embd, c.n_hidden), (rows, c.n_hidden, c.n_embd)):
        a, b = (torch.randn(shape, device=t.device).to(getattr(torch, t.dtype)) for shape in ((m, k), (n, k)))
        for _ in range(3):
            best = max(best, 2 * m * k * n / timed_call(lambda: F.linear(a, b)[0, 0].item()))    # it waits for a GPU
    return best


def time_steps(training, c, steps, rounds, any_length):
    """-> {way: ms by part of each round's mean step}, FLOP/s of a matrix product, on a GPU {way: bytes at its peak}"""
    t, tokens = training.t, training.rows * c.block_size
    forwards = {'eager': training.trained}
    if t.compile:
        forwards['compiled'] = compile_step(training.trained, tokens, c.vocab_size)
    if t.compile and any_length:
        forwards['dynamic'] = compile_step(training.trained, tokens, c.vocab_size, dynamic=True)
    runs, gemm, peaks, accumulation = {way: [] for way in forwards}, 0.0, {}, forwards_a_step(t, t.batch_size)
    for r in in_rounds(rounds):
        for way, forward in forwards.items():
            if way == 'dynamic' and not r:
                training.step(forward, c.block_size // 2 + 1, accumulation)
            if t.device.startswith('cuda'):
                torch.cuda.reset_peak_memory_stats()
            parts = [training.step(forward, c.block_size, accumulation) for _ in range(steps)]
            runs[way].append({part: 1000 * mean(p[part] for p in parts) for part in parts[0]})
            if t.device.startswith('cuda'):
                peaks[way] = torch.cuda.max_memory_allocated()      # the last round's, when all is compiled
        gemm = max(gemm, gemm_rate(t, c))
    return {way: run[1:] for way, run in runs.items()}, gemm, peaks


def peak_of_training(t, c):
    """-> by how many bytes three steps make this process grow, after libraries and compiler have taken theirs."""
    def three_steps(folder):
        training = Training(t, c, t.batch_size, folder)
        forward = training.trained
        if t.compile:
            forward = compile_step(forward, t.batch_size * c.block_size, c.vocab_size)
        for _ in range(3):
            training.step(forward, c.block_size, min(forwards_a_step(t, t.batch_size), 2))
    cuda = t.device.startswith('cuda')
    with tempfile.TemporaryDirectory() as folder:
        write_random(folder, t, c.vocab_size)
        three_steps(folder)
        gc.collect()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)                        # what is free goes back to the system
            with open('/proc/self/clear_refs', 'w') as f:
                f.write('5')                                        # from here on the peak is counted anew (man 5 proc)
            before = resident()
        three_steps(folder)
    return (torch.cuda.max_memory_allocated() if cuda else resident('VmHWM')) - before

# -----------------------------------------------------------------------------
# memory

class Living(TorchDispatchMode):
    """A context that counts the bytes of living tensors, now and at most, fake tensors included."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.known:                    # not a view of one that is known
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def forget(self, key, size):
        self.known.remove(key)
        self.now -= size


def training_bytes(t, c, rows, fake=True):
    """
    -> bytes of an eager step on so many rows, found by taking it on fake tensors, which need no memory and no time.
    activations: what a forward keeps for backward; logits: one chunk of them in float32.
    """
    def nbytes(tensors):
        return sum(x.nbytes for x in tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext(), Living() as living:
        training, kept = Training(t, c, rows), []

        def forward(*batch):
            before, losses = living.now, training.trained(*batch)
            kept.append(living.now - before)
            return losses
        for _ in range(2):                      # the first one makes the optimizers' states
            living.peak = 0
            # further forwards take no more memory
            training.step(forward, c.block_size, min(2, forwards_a_step(t, rows)))
        weights = nbytes(training.model.parameters())
        states = [state for optimizer in training.optimizers for state in optimizer.state.values()]
        return {'weights': weights + nbytes(training.model.buffers()), 'gradients': weights,
                'optimizer': sum(nbytes(state.values()) for state in states),
                'averages': weights * (t.ema > 0),
                'teacher': sum(nbytes(teacher.parameters()) for teacher in training.teachers),
                'activations': kept[-1],
                'logits': 4 * c.vocab_size * min(rows * c.block_size, rows_in_a_chunk(c.vocab_size)),
                'peak': living.peak, 'cache': rows * c.block_size * training.model.kv_bytes_per_token()}

# -----------------------------------------------------------------------------
# a plan: what a training would take on a GPU

GPUS = {'a100-40': ('A100', 40e9), 'a100-80': ('A100', 80e9), 'h100': ('H100', 80e9), 'h200': ('H200', 141e9),
        'rtx3090': ('RTX 3090', 24e9), 'rtx4090': ('RTX 4090', 24e9)}          # name in PEAK_FLOPS, bytes of memory
# shares of a GPU: of its FLOP/s, where none was measured; of its memory, as CUDA and gaps between tensors take some
ASSUMED_UTILISATION, USABLE = 0.4, 0.9
# what a step takes compiled for a GPU, over the estimate, which is of an eager one: losses come in larger chunks there
# (d12 with its teacher, 8 rows, on an H100: 22.5 GB, eager 13.3, the estimate 11.7)
COMPILED_MEMORY = 1.9
# a shard of FineWeb-Edu, see data/fineweb_edu/prepare.py: 20 of them are 1.1B tokens of 65,536 kinds and 2 GB
SHARD_TOKENS, SHARD_BYTES = 55 * 10**6, 100 * 10**6


def bill(k, tokens, flops):
    """
    k: bench.py's knobs (gpu, utilisation, price). So many tokens, at so many FLOPs each -> tokens/s, hours, dollars,
    for a row.
    """
    rate = (k.utilisation or ASSUMED_UTILISATION) * PEAK_FLOPS[GPUS[k.gpu][0]] / flops
    hours = tokens / rate / 3600
    return {'tokens': tokens, 'flops_per_token': flops, 'tok_s': rate,
            'hours': hours, 'dollars': hours * k.price if k.price else None}


def shape_of_size(t, c, depth, target):
    """-> a meta GPT of so many layers, heads of 64 and about target parameters; None if it would be far too wide"""
    # 12 * depth * width^2 + tables * width = target, solved for the width, which is rounded to whole heads
    tables = (1 if t.tie_weights else 2) * c.vocab_size
    width = 64 * round((math.sqrt(tables**2 + 48 * depth * target) - tables) / (24 * depth) / 64)
    if not 32 * depth <= width <= 192 * depth:
        return None
    shape = GPTConfig(c.block_size, c.vocab_size, depth, width // 64, None, width, tie_weights=t.tie_weights)
    return without_memory(GPT, shape)


def shapes_of_size(k, t, c, target):
    """-> a row for each shape of about target parameters, the nearest first, with the cost of its training"""
    rows = []
    for model in filter(None, (shape_of_size(t, c, depth, target) for depth in range(1, 97))):
        n = model.params()['total']
        tokens = round(k.tokens_per_param * n)
        shards = math.ceil(tokens / SHARD_TOKENS)
        rows.append({'n_layer': model.config.n_layer, 'n_embd': model.config.n_embd, 'n_head': model.config.n_head,
                     'params': n, 'shards': shards, 'download_bytes': shards * SHARD_BYTES,
                     'disk_bytes': (2 if c.vocab_size <= 65536 else 4) * shards * SHARD_TOKENS,
                     'steps': math.ceil(tokens / (t.total_batch_size or t.batch_size * t.block_size)),
                     **bill(k, tokens, model.flops_per_token())})
    return sorted(rows, key=lambda row: abs(row['params'] - target))


def batches_that_fit(t, c, room):
    """-> rows for batches of 1, 2, 4, ... up to the first that needs more than room; and the largest that fits"""
    rows, decides = [], 'compiled' if t.compile else 'peak'
    while not rows or rows[-1]['fits']:
        batch = 2 ** len(rows)
        print(f'a batch of {batch} rows', file=sys.stderr, flush=True)
        if batch < 4 or 4 * c.vocab_size * c.block_size * batch <= 32 * LOSS_CHUNK_BYTES:
            parts = training_bytes(t, c, batch)
        else:
            # So many chunks of logits would take minutes. By now everything grows in proportion to the batch, to within
            # 1 % (d12 with its teacher, 128 rows): twice as many rows more take twice as much more.
            parts = {part: 3 * rows[-1][part] - 2 * rows[-2][part] for part in parts}
        if t.compile:
            parts['compiled'] = COMPILED_MEMORY * parts['peak']
        rows.append({'batch': batch} | parts | {'fits': parts[decides] <= room})
    if len(rows) == 1:
        return rows, 0
    # The peak grows by as much or more for each further row: a straight line between the last two is on the safe side.
    a, b = rows[-2:]
    return rows, a['batch'] + int((room - a[decides]) / (b[decides] - a[decides]) * a['batch'])
