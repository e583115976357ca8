"""
Measures and plans, a mode for each: decoding, quality, training speed, memory, curves of losses, ladders of models.

    python bench.py --mode=decode                                # the quick start's shape, random weights: seconds
    python bench.py --mode=decode --shape=out-quickstart --drafters=none,ngram --batches=1,4
    python bench.py --shape=d12 --peers=True --llama2c=FOLDER --nanochat=FOLDER     # beside other programs: minutes
    python bench.py --mode=quality --shape=out-quickstart        # loss of each format, and of an int8 cache
    python bench.py --mode=train config/train_stdlib_bpe.py      # tokens/s, ms by part; --peers=FOLDER: beside nanoGPT
    python bench.py --mode=memory config/train_38m.py --vocab_size=24576 --batches=1,2,4    # estimate, measured peak
    python bench.py --mode=memory config/distill_d12_mqa.py --plan=True --gpu=a100-80 --price=0.54  # hours, dollars
    python bench.py --mode=memory --plan=True --target_params=38M --vocab_size=24576        # shapes of that size
    python bench.py --mode=plot out-*/log.csv                    # curves of losses, to losses.png
    python bench.py --mode=ladder config/ladder_quick.py         # builds models, then measures all of them in one run
    python bench.py --mode=ladder config/ladder_quick.py --check=out-ladder-quick/ladder.json       # what has changed?

train and memory take the knobs and configs of train.py (python train.py --help); without prepared data, --vocab_size=.
A ladder builds only what no ladder.json has recorded, and replaces no folder that a ladder has not made.

You will see a table, then one line of JSON. What is timed runs in this process, interleaved: each row once, then each
again; medians; ratios are of the same round. Other programs run in processes of their own.

decode: the first row is the yardstick: float32, F.linear, a cache, one sequence. The columns:
    x plain     tokens/s over the yardstick's; x nocache: over a whole forward for every token
    GB/s        weights that a pass of trunk and lm_head reads (of wte its row; not what drafters read) times passes/s
    % memory    that, of the rate at which these threads read 512 MiB; beyond 100 where weights come from a cache
    rows        a cached pass over 2, 4, 5, 8 tokens of a sequence, over a pass over 1: what it costs to check drafts
    tok/verify  tokens that a pass settled, per sequence
Every row must give the text of its format's plain row, or part from it at a tie (scores within 1e-4; compiled for
a GPU 0.1); if one does not, the numbers are printed all the same, but the status is 1.

train: steps as train.py takes them, on random tokens. dynamic: compiled for any length, as a first step on shorter rows
shows. % GEMM: FLOPs that the step needs, over those of the fastest matrix product of the same run in the same dtype; on
a GPU MFU, over those of its data sheet, and the peak of memory, too.
On a CPU nanoGPT trains in float32 whatever dtype says: give --dtype=float32 for like and like.

memory: the estimate (peak) counts the tensors that exist at a time in an eager step, taken on tensors that have shapes
but no memory. Measured is what a fresh process takes beyond what libraries and compiler took in a first pass (Linux;
torch.cuda's own count on a GPU), glibc giving back at once what is freed. cache: of as many sequences that decode.
"""
import contextlib
import csv
import ctypes
import gc
import glob
import importlib.util
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from statistics import mean, median, stdev, variance

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.loader import Loader, data_of, load_meta, write_dataset
from data.tokenizer import CharTokenizer, from_meta
from distill import DIVERGENCES, Distiller, in_bfloat16, load_teacher
from engine import DRAFTERS, FEW, HEADS, Engine, KVCache, parting
from model import (GPT, GPTConfig, LOSS_CHUNK_BYTES, PEAK_FLOPS, atomic_write, can_compile, check_device, check_knobs,
                   compile_step, evaluate, fast_bf16, load_checkpoint, make_config, make_optimizers, peak_flops, update)
from quantize import PackedInt8Linear, convert, export, for_decoding, load, prepare

SHAPES = {
    'tiny': dict(n_layer=3, n_head=4, n_embd=192, n_hidden=384, vocab_size=65, block_size=256),
    'd12': dict(n_layer=12, n_head=6, n_embd=768, use_mqa=True, vocab_size=65536, block_size=1024)}
# int8-packed and int4-packed are what sample.py runs; -compiled is with its --compile=True: one sequence, a minute of
# compiling for each. f32-, bf16- and f16-packed and int4-bf16 (4 bits in memory) are other layouts
FORMATS = ('f32', 'f32-packed', 'f32-compiled', 'bf16-packed', 'bf16-compiled', 'f16-packed',
           'int8', 'int8-packed', 'int8-compiled',
           'int4', 'int4-packed', 'int4-compiled', 'int4-bf16', 'int4-bf16-compiled')
LENGTHS = (1, 2, 4, 5, 8)                               # tokens in a pass, for rows_cost
GPUS = {'a100-40': ('A100', 40e9), 'a100-80': ('A100', 80e9), 'h100': ('H100', 80e9), 'h200': ('H200', 141e9),
        'rtx3090': ('RTX 3090', 24e9), 'rtx4090': ('RTX 4090', 24e9)}          # name in PEAK_FLOPS, bytes of memory
# shares of a GPU: of its FLOP/s, where none was measured; of its memory, as CUDA and gaps between tensors take some
ASSUMED_UTILISATION, USABLE = 0.4, 0.9
# what a step takes compiled for a GPU, over the estimate, which is of an eager one: losses come in larger chunks there
# (d12 with its teacher, 8 rows, on an H100: 22.5 GB, eager 13.3, the estimate 11.7)
COMPILED_MEMORY = 1.9
# a shard of FineWeb-Edu, see data/fineweb_edu/prepare.py: 20 of them are 1.1B tokens of 65,536 kinds and 2 GB
SHARD_TOKENS, SHARD_BYTES = 55 * 10**6, 100 * 10**6

# -----------------------------------------------------------------------------
mode = 'decode'             # decode, quality, train, memory, plot, ladder
# decode and quality: the model
shape = 'tiny'              # tiny or d12, with random weights; or the out_dir of a trained model
formats = 'f32,int8,int8-packed'    # f32, int8, int4; int8-, int4-packed: as in sample.py; others: see FORMATS
# decode
drafters = 'none'           # none, head, mtp, ngram, random; none is always measured
batches = ''                # sequences together, like 1,4,16; empty: 1, in mode=memory batch_size, a half and a quarter
draft_n = 4                 # at most so many drafts at a time
prompt_tokens = 64          # random ids; a trained model writes its own prompts
new_tokens = 128
rounds = 5                  # of mode=train, too
temperature = None          # None: 0 for random weights, 0.8 for a trained model
recompute = True            # measure decoding without a cache, too
memory = True               # and what a process takes of it, beyond one that has decoded something (Linux, CPU)
peers = None                # True: transformers and llama2.c, too; in mode=train: the folder of a copy of nanoGPT
llama2c = ''                # folder of llama2.c's binaries run and runq, or the path of one of them
nanochat = ''               # folder of a copy of nanochat as it was in 2025, see tests/peers.py
# train and memory; what is not here is a knob of train.py's
vocab_size = 0              # 0: the dataset's, if it is prepared, or the teacher's
steps = 10                  # training steps a round
any_length = True           # train: steps compiled for any length, too
measured = True             # memory: the measured peak of each batch, too, with and without torch.compile
# --mode=memory --plan=True: nothing is run
plan = False
gpu = 'h100'                # a100-40, a100-80, h100, h200, rtx3090, rtx4090
price = 0.0                 # dollars a GPU hour
utilisation = 0.0           # share of the GPU's peak FLOP/s, measured there by --mode=train; 0: 0.4 is assumed
target_params = ''          # like 38M: proposes shapes of about so many parameters
tokens_per_param = 20.0     # how long they are trained (Chinchilla, arXiv 2203.15556)
# plot
logs = 'out*/log.csv'       # files, with * as in a shell, several joined by a comma
png = 'losses.png'
# ladder
rungs = ''                  # a line each, "name | python SCRIPT ... && ...", which builds it; no name: preparation
seeds = '1337'              # a line with {seed} in it is built for each of these
ladder = 'out-ladder/ladder.json'   # the record, to go on from; the picture and what the scripts print lie beside it
timed = 'all'               # the rungs whose decoding is timed, by name, joined by commas; all or none
compiled = ''               # those of them that are timed in compiled rounds, too, half a minute for each
int8_cache = ''             # the rungs whose cache is int8, in bytes, loss and speed; they may be other rungs' files
check = ''                  # such a record: measure its files again, build nothing, and say what has changed
# the machine
seed = 1337
device = 'auto'             # cuda, cpu
threads = 0                 # CPU threads; 0: PyTorch's own choice
child = ''                  # private: what a process started by this script measures
# -----------------------------------------------------------------------------
# of train.py the blocks between its rules that are its knobs, with their defaults, and what they may be
_, TRAIN_KNOBS, _, TRAIN_CHECKS, *_ = re.split(r'^# -+\n', open('train.py').read(), flags=re.M)
if {'--mode=train', '--mode=memory'} & set(sys.argv):
    exec(TRAIN_KNOBS)       # they are ours then, and configs for train.py apply here
csvs = [arg for arg in sys.argv if arg.endswith('.csv') and arg[0] != '-'] if '--mode=plot' in sys.argv else []
if csvs:                    # a shell has put the files' names in the place of out-*/log.csv
    sys.argv = [arg for arg in sys.argv if arg not in csvs] + [f"--logs={','.join(csvs)}"]
exec(open('configurator.py').read())


def fail(message):
    raise SystemExit(f'error: {message}')


check_knobs(config, ('threads', int, 0, math.inf), ('seed', int, 0, 2**63 - 1), ('rounds steps', int, 1, math.inf))
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
check_device(device)
if device.startswith('cuda:'):
    torch.cuda.set_device(device)               # what is counted and waited for below is the current device's
if threads:
    torch.set_num_threads(threads)
    os.environ['OMP_NUM_THREADS'] = str(threads)                    # for the processes that are started here
cpuinfo = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
machine = {'cpu': (re.findall(r'model name\s*: (.*)', cpuinfo) or [platform.processor() or platform.machine()])[0]}
if device.startswith('cuda'):
    machine['gpu'] = torch.cuda.get_device_name(device)
machine |= {'threads': torch.get_num_threads(), 'torch': torch.__version__}
tells_memory = memory and device == 'cpu' and os.path.exists('/proc/self/status')

if mode in ('train', 'memory'):
    if 'n_layer' not in config:
        fail(f'mode ({mode}) takes the knobs of train.py, and must be given on the command line: --mode={mode}')
    exec(TRAIN_CHECKS)
    check_knobs(config, ('batch_size', int, 1, math.inf), ('vocab_size', int, 0, math.inf),
                ('price tokens_per_param', float, 0, math.inf), ('utilisation', float, 0, 1))
    plan = mode == 'memory' and (plan or bool(target_params))       # shapes are proposed without running anything
    if dtype == 'auto':
        dtype = 'bfloat16' if fast_bf16(device) or plan else 'float32'
    compile = compile and (plan or can_compile(device))
    tokens_per_step = total_batch_size or batch_size * block_size
    accumulation = max(1, round(tokens_per_step / (batch_size * block_size)))
    # the peak of a process is Linux's to tell, or CUDA's
    measured = measured and (device.startswith('cuda') or os.path.exists('/proc/self/clear_refs'))
    if device.startswith('cuda'):
        torch.set_float32_matmul_precision('high')                  # as train.py does
else:
    check_knobs(config, ('prompt_tokens new_tokens', int, 1, math.inf), ('draft_n', int, 1, FEW - 1),
                ('temperature', float, 0, math.inf), may_be_none='temperature')
    if temperature is None:
        temperature = 0.0 if mode == 'decode' and shape in SHAPES else 0.8

# -----------------------------------------------------------------------------
# what several modes need

def report(columns, lines, **document):
    """
    columns: (heading, key of a line or function of it, format, divisor), of which the last two may be absent -> a table
    of lines, and one line of JSON, whose rows are the lines unless the document has others. None is '-'; a column of
    nothing else is left out; without a format it is text, to the left.
    """
    table = []
    for heading, key, *how in columns:
        form, by = [*how, None][:2] if how else ('', None)
        values = [key(line) if callable(key) else line.get(key) for line in lines]
        cells = [heading] + ['-' if v is None else f'{v / by if by else v:{form}}' for v in values]
        if any(v is not None for v in values):
            pad = str.rjust if how else str.ljust
            table.append([pad(cell, max(map(len, cells))) for cell in cells])
    print('\n'.join('  '.join(line) for line in zip(*table)))
    print(json.dumps({'mode': mode, 'machine': machine, 'rows': lines} | document))


def numbered(knob):
    if not re.fullmatch(r'([1-9]\d*(,[1-9]\d*)*)?', config[knob]):
        fail(f'{knob} ({config[knob]}) must be numbers from 1 on, like 1,4,16')
    return sorted({int(n) for n in config[knob].split(',') if n})


def in_rounds(of=''):
    """Yields 0, for a round that only warms up, then 1 to rounds; stderr hears when one is over."""
    for r in range(rounds + 1):
        yield r
        print(of + (f'round {r} of {rounds}' if r else 'warm'), file=sys.stderr, flush=True)


def start(script, cwd=None, document=True, **knobs):
    """A script with these knobs, in a process of its own -> the JSON that ends its output, or all of the output."""
    got = subprocess.run([sys.executable, script, *(f'--{k}={v}' for k, v in knobs.items())],
                         capture_output=True, text=True, cwd=cwd)
    if got.returncode:
        said = (got.stderr.strip() or f'status {got.returncode}').splitlines()[-1]
        fail(f"{script}: {said.removeprefix('error: ')}")
    print(got.stderr, end='', file=sys.stderr)
    return json.loads(got.stdout.splitlines()[-1]) if document else got.stdout


def speed(rates, **others):
    """tokens/s by round -> a row's tok_s and tok_s_rounds, and key=others: the ratio to theirs in the same round."""
    return {'tok_s': median(rates), 'tok_s_rounds': rates} | {
        key: median(a / b for a, b in zip(rates, theirs)) for key, theirs in others.items() if theirs}


def timed_call(f):
    """-> seconds"""
    clock = time.perf_counter()
    f()
    return time.perf_counter() - clock


def resident(key='VmRSS'):
    """Bytes of memory that this process has, or VmHWM: had at most (Linux)."""
    return 1024 * int(re.search(rf'{key}:\s+(\d+)', open('/proc/self/status').read())[1])

# -----------------------------------------------------------------------------
# --mode=decode and quality: the model, in a format

def listed(knob, known):
    items = list(dict.fromkeys(config[knob].replace(' ', '').split(',')))
    wrong = [item for item in items if item not in known]
    if wrong:
        fail(f"{knob} ({config[knob]}) must be of {', '.join(known)}; {wrong[0]!r} is not")
    return items


if mode in ('decode', 'quality'):
    formats, drafters = listed('formats', FORMATS), list(dict.fromkeys(['none'] + listed('drafters', DRAFTERS)))
    batches = numbered('batches') or [1]
    if shape not in SHAPES and not os.path.isdir(shape):
        fail(f"shape ({shape}) must be {', '.join(SHAPES)}, or the out_dir of a trained model")
    if shape in SHAPES and mode == 'quality':
        fail(f'shape ({shape}) has random weights, and quality is that of a trained model: give its out_dir')
    if any(f.endswith('compiled') for f in formats) and not can_compile(device):
        fail(f'formats ({",".join(formats)}) need a C++ compiler: leave those with -compiled out')
    if 'bf16-compiled' in formats and device == 'cpu':
        fail(f'formats ({",".join(formats)}): bf16-compiled is for a GPU, there is no compiling oneDNN\'s layout')
    if device != 'cpu' and any(f.startswith('int4-bf16') for f in formats):
        fail(f'formats ({",".join(formats)}): int4-bf16 is a layout for CPUs')
    if (llama2c or nanochat) and not peers:
        fail(f'llama2c ({llama2c}) and nanochat ({nanochat}) are measured with --peers=True')


def open_model(file):
    """A checkpoint, or a file of integers -> the model, the folder of its data, its tokenizer."""
    model, state = load(file, device)
    return model, *data_of(state, file)


def build(shape, format):
    """-> an Engine. Random weights are the same in every format; heads are there that the drafters need."""
    weights, _, how = format.partition('-')
    if shape in SHAPES:
        noise = torch.Generator().manual_seed(seed)
        model = GPT(GPTConfig(**SHAPES[shape], draft_n=4 * ('head' in drafters), multi_token_n=3 * ('mtp' in drafters)))
        for p in model.parameters():            # none of the usual zeros: every path must have work to do
            torch.nn.init.normal_(p, std=0.05, generator=noise)
        model = model.to(device)
    else:
        best, integers = os.path.join(shape, 'best.pt'), os.path.join(shape, f'{weights}.safetensors')
        # an older file of integers may be of an earlier training
        newer = os.path.exists(integers) and os.path.getmtime(integers) >= os.path.getmtime(best)
        model = load(integers if newer else best, device)[0]
    if weights in ('int8', 'int4') and not hasattr(model, 'rounding'):
        model = convert(model, int(weights[3:]))
    pack = {'f32-packed': torch.float32, 'bf16-packed': torch.bfloat16, 'bf16': torch.bfloat16,
            'f16-packed': torch.float16, 'int4-bf16': torch.bfloat16}.get(format.removesuffix('-compiled'))
    return Engine(for_decoding(model, pack) if how else model, compile=how.endswith('compiled'))


def bytes_per_pass(model):
    """Of weights, in one pass of trunk and lm_head over one token: all their tensors, packed ones too, a row of wte."""
    def nbytes(*parts):
        return sum(t.nbytes for part in parts for m in part.modules()
                   for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())
                   if isinstance(t, torch.Tensor))
    return nbytes(model.transformer.h, model.lm_head) + nbytes(model.transformer.wte) // model.config.vocab_size


def quality(model, data, tokenizer, dtype):
    """-> loss on the whole validation split, through a cache of dtype (None: without one), and such a cache's bytes."""
    c = model.config
    result = evaluate(model, Loader(data, 'val', 16, c.block_size, device=device).eval_batches(), tokenizer.token_bytes,
                      dtype and (lambda batch: KVCache(c, batch, dtype=dtype, device=device)))
    return {'val_loss': result['loss'], 'val_bpb': result['bpb'],
            'kv_bytes_per_token': model.kv_bytes_per_token(dtype == torch.int8)}


def measure_quality():
    _, data, tokenizer = open_model(os.path.join(shape, 'best.pt'))
    rows = []
    for f in formats:
        model = build(shape, f).model
        rows += [{'shape': shape, 'format': f, 'cache': str(dtype).removeprefix('torch.')}
                 | quality(model, data, tokenizer, dtype) for dtype in (torch.float32, torch.int8)]
    report([('format', 'format'), ('cache', 'cache'), ('nats', 'val_loss', '.5f'), ('bits/byte', 'val_bpb', '.5f'),
            ('cache bytes a token', 'kv_bytes_per_token', ',.0f')], rows)

# -----------------------------------------------------------------------------
# decoding, of ladders too

def must_fit(config, whose):
    if prompt_tokens + new_tokens > config.block_size:
        fail(f'prompt_tokens ({prompt_tokens}) + new_tokens ({new_tokens}) do not fit the context of '
             f'{config.block_size} that {whose} has: lower them')


def decode(engine, prompts, seed, drafter):
    """-> the texts, and the engine's stats."""
    text = engine.complete(prompts, new_tokens, temperature=temperature, seed=seed, drafter=drafter, draft_n=draft_n)
    return text, engine.stats


def memory_taken(path):
    """How much this process grows by loading the file at path and decoding with it, and what there is to hold."""
    small = for_decoding(convert(GPT(GPTConfig(
        block_size=64, vocab_size=PackedInt8Linear.ROWS, n_layer=1, n_head=1, n_embd=64))))
    Engine(small).complete([[1] * 4], 8)                            # what the libraries take for themselves is taken
    before, dtype = resident(), torch.int8 if int8_cache == path else torch.float32
    engine = Engine(for_decoding(load(path, device)[0]), cache_dtype=dtype)
    for step in engine.generate([[1] * prompt_tokens], new_tokens, temperature=temperature, seed=seed):
        grown = resident() - before
    size, cache = os.path.getsize(path), KVCache(engine.config, 1, prompt_tokens + new_tokens, dtype).nbytes()
    return {'memory_bytes': grown, 'file_bytes': size, 'cache_bytes': cache, 'memory_ratio': grown / (size + cache)}


def memory_alone(path, int8=False):
    """The same of a fresh process."""
    return start('bench.py', **config | dict(
        mode='decode', child=path, int8_cache=path if int8 else '', temperature=temperature, device=device,
        threads=torch.get_num_threads()))

# -----------------------------------------------------------------------------
# --mode=decode

prompts, texts, parted = [], {}, []             # of each sequence; of each format, by sequence; what is wrong


@torch.inference_mode()
def pass_seconds(engine):
    """-> {n: seconds} of a cached pass, up to the most probable tokens, over n tokens of one sequence."""
    cache, times = KVCache(engine.config, 1, prompt_tokens + max(LENGTHS), device=device), {n: [] for n in LENGTHS}
    engine.prefill(cache, [prompts[0][:engine.config.block_size - max(LENGTHS)]])
    before = cache.lengths
    ids, m = torch.tensor([prompts[0][:1] * max(LENGTHS)], device=device), engine.model
    for n in LENGTHS * 5:
        times[n].append(timed_call(lambda: m.logits(m.trunk(ids[:, :n], cache)).argmax(dim=-1).tolist()))
        cache.rewind(before)
    return {n: median(t) for n, t in times.items()}


@torch.inference_mode()
def without_cache(engine, text):
    """-> tokens/s with a forward over everything so far for each token, at up to 16 places spread over the text."""
    ids, n, m = torch.tensor([prompts[0] + text], device=device), min(16, len(text)), engine.model
    ends = [prompt_tokens + i * len(text) // n for i in range(n)]
    return n / timed_call(lambda: [m.logits(m.trunk(ids[:, :end])[:, -1:]).argmax(dim=-1).tolist() for end in ends])


def bandwidth(big):
    """-> bytes/s at which these threads read memory, by a sum or a matrix-vector product: neither is always faster."""
    m = big.view(-1, 8192)
    return big.nbytes / min(timed_call(lambda: read().amax().item())       # .item() waits for a GPU
                            for read in (big.sum, lambda: m @ m[0]))


def difference(engine, row, expected, got):
    """
    What is wrong with a row's text; None if it is the expected one, or parts from it at a tie. Compiled for a GPU, the
    same floats are summed in one order or another, and an activation between two integers may be rounded to either.
    """
    parts = parting(engine.model, prompts[row], expected, got, temperature, row, seed)
    if parts and parts[1] > (0.1 if engine.compile and device != 'cpu' else 1e-4):
        return (f'sequence {row}: token {parts[0]} is {got[parts[0]]}, not {expected[parts[0]]}, '
                f'and their scores differ by {parts[1]:.2g}')


def measure_decode():
    if child:
        return print(json.dumps(memory_taken(child)))
    plain = build(shape, 'f32')
    c, params = plain.config, plain.model.params()['total']
    must_fit(c, shape)
    for drafter in drafters:
        if drafter in HEADS and not hasattr(plain.model, HEADS[drafter]):
            fail(f'drafter ({drafter}) needs a model with a {HEADS[drafter]} head, which {shape} has not: '
                 f'train one with --{HEADS[drafter]}_n=4, or draft with ngram')
    if shape in SHAPES:
        prompts[:] = torch.randint(c.vocab_size, (max(batches), prompt_tokens),
                                   generator=torch.Generator().manual_seed(seed)).tolist()
    else:
        # prompts start from the token that stands before any text, or the vocabulary's first, which is mostly a newline
        first = from_meta(load_checkpoint(os.path.join(shape, 'best.pt'))['tokenizer']).bos or 0
        prompts[:] = [[first] + text for text in plain.complete(
            [[first]], prompt_tokens - 1, temperature=0.8, num_samples=max(batches), seed=seed + 1)]
    others = []
    if peers:                                   # first, as they may refuse
        if c.head_dim != c.n_embd // c.n_head:
            fail(f'peers have heads of n_embd / n_head ({c.n_embd} / {c.n_head}) channels, and {shape} of {c.head_dim}')
        their_shape = {k: getattr(c, k) for k in (
            'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_hidden', 'vocab_size', 'block_size', 'tie_weights')}
        got = start('tests/peers.py', **their_shape, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds,
                    llama2c=llama2c, nanochat=nanochat, seed=seed, device=device,
                    threads=torch.get_num_threads())
        ours = [rate for row in got['rows'] for rate in row['ours']]
        alone = {'decoder': 'picochat alone', 'format': 'f32', 'params': got['params'], 'tok_s_rounds': ours}
        others = [{k: row[k] for k in ('decoder', 'format', 'params')}
                  | speed(row['tok_s_rounds'], ratio_plain_f32=row.get('ours', ours))
                  for row in (alone, *got['rows']) if ours]

    engines = {'f32': plain} | {f: build(shape, f) for f in formats if f != 'f32'}
    # an engine that compiles does so for one sequence, and not for these two drafters
    runs = {('f32', 'none', 1): []} | {
        (f, d, b): [] for f in formats for d in drafters for b in ([1] if f.endswith('compiled') else batches)
        if not (f.endswith('compiled') and d in ('ngram', 'random'))}
    costs, slow, rates = {f: [] for f in engines if not f.endswith('compiled')}, [], []
    # 512 MiB, written to: pages never touched would all be one page of zeros, read from the processor's cache
    big = torch.ones(2**27, device=device)
    for r in in_rounds():
        for (f, drafter, batch), run in runs.items():
            text, stats = decode(engines[f], prompts[:batch], seed, drafter)
            known = texts.setdefault(f, [])     # by row; the plain runs come first
            wrong = [difference(engines[f], row, *pair) for row, pair in enumerate(zip(known, text))]
            parted.extend([f'format {f}, drafter {drafter}, batch {batch}, {w}' for w in wrong if w])
            known += text[len(known):]
            run.append(stats)
        for f, cost in costs.items():
            cost.append(pass_seconds(engines[f]))
        slow += [without_cache(plain, texts['f32'][0])] if recompute else []
        rates.append(bandwidth(big))
    for seen in (*runs.values(), *costs.values(), slow, rates):
        del seen[:1]                            # round 0

    yardstick, rows = [s['tok_s'] for s in runs['f32', 'none', 1]], []
    for (f, drafter, batch), run in runs.items():
        size = bytes_per_pass(engines[f].model)
        gb_s = size * median(s['tok_s'] * s['passes'] / s['tokens'] for s in run) / 1e9
        accepted = [sum(n) for n in zip(*(s['accepted'] for s in run))]
        rows.append({
            'decoder': 'picochat', 'format': f, 'drafter': drafter, 'batch': batch,
            **speed([s['tok_s'] for s in run], ratio_plain_f32=yardstick, ratio_recompute=slow),
            'first_token_ms': 1000 * median(s['first_seconds'] for s in run),
            'gb_s': gb_s, 'share_of_bandwidth': gb_s * 1e9 / median(rates),
            'rows_cost': {str(n): median(t[n] / t[1] for t in costs[f]) for n in LENGTHS[1:]} if f in costs else None,
            'tokens_per_verify': 1.0 if drafter == 'none' else sum(s['tokens'] for s in run) / sum(accepted),
            'accepted': None if drafter == 'none' else accepted,
            'kv_bytes_per_token': plain.model.kv_bytes_per_token(), 'weight_bytes': size})
    if slow:
        rows.append({'decoder': 'no cache', 'format': 'f32'}
                    | speed(slow, ratio_plain_f32=yardstick, ratio_recompute=slow))
    plain = engines = big = None                # the other process gets the memory
    if tells_memory:
        with tempfile.TemporaryDirectory() as folder:
            export(f'{folder}/int8.safetensors', convert(build(shape, 'f32').model), {})
            alone = memory_alone(f'{folder}/int8.safetensors')
        rows.append({'decoder': 'picochat alone', 'format': 'int8-packed'} | alone)
        print(f"int8-packed takes {alone['memory_bytes'] / 2**20:,.1f} MiB of memory, "
              f"{alone['memory_ratio']:.2f} times its file and cache "
              f"({alone['file_bytes'] / 2**20:,.1f} + {alone['cache_bytes'] / 2**20:,.1f})")
    # what a row does not have is None
    empty = dict.fromkeys([*rows[0], 'ratio_recompute', 'memory_bytes', 'file_bytes', 'cache_bytes', 'memory_ratio'])
    empty |= {'shape': shape, 'drafter': 'none', 'batch': 1, 'params': params}
    rows = [empty | row for row in rows + others]
    report([('decoder', 'decoder'), ('format', 'format'), ('drafter', 'drafter'), ('batch', 'batch', 'd'),
            ('tok/s', 'tok_s', ',.1f'), ('x plain', 'ratio_plain_f32', ',.2f'),
            ('x nocache', 'ratio_recompute', ',.2f'), ('first ms', 'first_token_ms', ',.1f'),
            ('GB/s', 'gb_s', ',.2f'), ('% memory', 'share_of_bandwidth', ',.0f', 0.01),
            ('rows ' + ' '.join(map(str, LENGTHS[1:])),
             lambda r: r['rows_cost'] and ' '.join(f'{x:.2f}' for x in r['rows_cost'].values())),
            ('tok/verify', 'tokens_per_verify', '.2f')],
           rows, bandwidth_gb_s=median(rates) / 1e9)
    if parted:
        fail('another text than the plain row: ' + '; '.join(parted))

# -----------------------------------------------------------------------------
# --mode=train and memory: the training that a config describes, on random tokens

def shape_of_config():
    """The config's GPTConfig; its vocabulary is vocab_size, or the dataset's, or nanochat's if that teaches."""
    if init_from != 'scratch' or train_only:
        fail(f'a whole training from random weights is measured: init_from ({init_from}) and train_only ({train_only}) '
             'cannot be; give the shape, --init_from=scratch and --train_only=')
    folder, size = os.path.join('data', dataset), vocab_size
    if not size and os.path.exists(os.path.join(folder, 'meta.json')):
        size = load_meta(folder)['vocab_size']
    size = size or 65536 * teacher.startswith(('nanochat:', 'random:'))
    if not size:
        fail(f'{folder} is not prepared, so the vocabulary is not known: give it, as in --vocab_size=4096')
    return make_config({k: config[k] for k in GPTConfig.__dataclass_fields__ if k in config} | {'vocab_size': size},
                       'the config')


def teachers_of_config(c):
    """-> the teachers' models, of nanochat's d32 and its like with random weights; of labels, the samples a token."""
    meta, models = os.path.join(teacher, 'meta.json'), []
    if teacher.startswith('labels') and not os.path.exists(teacher):
        return [], 12                           # what distill.py writes
    if teacher and os.path.exists(meta):
        return [], json.load(open(meta))['k']
    for name in teacher.split('+') if teacher else ():
        named = re.fullmatch(r'nanochat:(?:.*/)?(d\d+)/?', name)       # no gigabytes are read to measure its shape
        if named or name.startswith('random:'):
            model = load_teacher(f'random:{named[1]}' if named else name, device)[0]
        else:
            with unset_fake_temporarily():      # a file has numbers to look at; what it takes is counted by a copy
                model = load_teacher(name, device)[0]
            model._apply(torch.clone)
        if model.config.vocab_size != c.vocab_size or model.config.block_size < c.block_size:
            fail(f'the teacher {name} has a vocabulary of {model.config.vocab_size:,} and a context of '
                 f'{model.config.block_size}, which must be {c.vocab_size:,} and at least block_size ({c.block_size}): '
                 'give --vocab_size= or another teacher')
        model.config.block_size = c.block_size      # it attends to no more, which flops_per_token counts
        model.n_params = sum(p.numel() for p in model.parameters())     # before tied tables come apart
        models.append(in_bfloat16(model) if dtype == 'bfloat16' and not fsdp else model)
    return models, 0


def write_random(folder, vocab):
    """A dataset of random tokens: characters, for train.py, the halves of surrogate pairs left out."""
    ids = np.random.default_rng(seed).integers(vocab, size=2**20)
    with contextlib.redirect_stdout(None):
        write_dataset(folder, CharTokenizer(chr(i + 2048 * (i >= 0xd800)) for i in range(vocab)),
                      ids, ids[:2 * block_size + 1], 'random')


def set_up(c, batch, folder=None):
    """
    -> the model, what makes losses of (x, y, ...), the optimizers, and step(forward, T, accumulation), which takes a
    step as train.py does, on rows of T tokens of folder (without one, of zeros) -> its seconds by part.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = GPT(c)
    optimizers = make_optimizers(model, muon_lr, adam_lr, weight_decay, muon_steps)
    if quant_bits:
        prepare(model, quant_bits, quant_group, tables_bits)
    teachers, k = teachers_of_config(c)
    loader, number = folder and Loader(folder, 'train', batch, c.block_size, seed, device=device), itertools.count()
    autocast = torch.autocast(device.split(':')[0], torch.bfloat16, enabled=dtype == 'bfloat16')
    averages = [p.detach().clone() for p in model.parameters()] if ema else []

    def clock():
        if not device.startswith('cpu'):
            torch.accelerator.synchronize()
        return time.perf_counter()

    def step(forward, T, accumulation):
        took, last = dict.fromkeys(('data', 'forward', 'backward', 'optimizer'), 0.0), clock()

        def lap(part):
            nonlocal last
            now = clock()
            took[part], last = took[part] + now - last, now
        for _ in range(accumulation):
            x, y = (t[:, :T].contiguous() for t in (
                loader.batch(next(number)) if folder else torch.zeros(2, batch, T, dtype=torch.long, device=device)))
            soft = (x[..., None].expand(-1, -1, k).contiguous(), torch.full((*x.shape, k), 1 / k, device=device),
                    torch.zeros(x.shape, device=device)) if k else ()
            lap('data')
            with autocast:
                loss = sum(forward(x, y, *soft).values())
                lap('forward')
                loss.backward()
            lap('backward')
        update(model, optimizers, grad_clip)
        for p, a in zip(model.parameters(), averages):
            a.lerp_(p.detach(), 1 - ema)
        lap('optimizer')
        return took

    return model.train(), Distiller(model, teachers, divergence, temperature) if teacher else model, optimizers, step

# -----------------------------------------------------------------------------
# --mode=train

@torch.inference_mode()
def gemm_rate(c):
    """-> FLOP/s of the fastest of some products in the training's dtype: a large square one, and those of an MLP."""
    big, best = 2048 if device == 'cpu' else 8192, 0.0
    for m, k, n in ((big, big, big),
                    (batch_size * c.block_size, c.n_embd, c.n_hidden),
                    (batch_size * c.block_size, c.n_hidden, c.n_embd)):
        a, b = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in ((m, k), (n, k)))
        for _ in range(3):
            best = max(best, 2 * m * k * n / timed_call(lambda: F.linear(a, b)[0, 0].item()))    # it waits for a GPU
    return best


def time_steps(c, folder):
    """
    -> {way: ms by part of each round's mean step}, FLOP/s of a matrix product, on a GPU {way: bytes at its peak}, FLOPs a
    token, parameters.
    """
    model, trained, _, step = set_up(c, batch_size, folder)
    compiled = lambda **how: compile_step(trained, batch_size * c.block_size, c.vocab_size, **how)
    forwards = {'eager': trained} | ({'compiled': compiled()} if compile else {}) | (
        {'dynamic': compiled(dynamic=True)} if compile and any_length else {})
    runs, gemm, peaks = {way: [] for way in forwards}, 0.0, {}
    for r in in_rounds():
        for way, forward in forwards.items():
            if way == 'dynamic' and not r:
                step(forward, c.block_size // 2 + 1, accumulation)
            if device.startswith('cuda'):
                torch.cuda.reset_peak_memory_stats()
            parts = [step(forward, c.block_size, accumulation) for _ in range(steps)]
            runs[way].append({part: 1000 * sum(p[part] for p in parts) / steps for part in parts[0]})
            if device.startswith('cuda'):
                peaks[way] = torch.cuda.max_memory_allocated()      # the last round's, when all is compiled
        gemm = max(gemm, gemm_rate(c))
    return {way: run[1:] for way, run in runs.items()}, gemm, peaks, trained.flops_per_token(), model.params()['total']


def time_scripts(c, folder, ways):
    """
    -> {(who, way): tokens/s of each round} of our train.py and nanoGPT's, on data/random in folder. nanoGPT's are by
    the times that it prints, the first five left out; it runs in folder, where it looks for two files.
    """
    data = f'{folder}/data/random'
    atomic_write(f'{data}/meta.pkl', lambda f: pickle.dump({'vocab_size': c.vocab_size}, f))
    shutil.copy(os.path.join(peers, 'configurator.py'), folder)
    both = dict(log_interval=1, device=device, dtype=dtype)
    ours = {k: config[k] for k in re.findall(r'^(\w+) = ', TRAIN_KNOBS, re.M)} | both | dict(
        dataset=data, out_dir=f'{folder}/ours', max_iters=steps + 5,
        eval_interval=0, save_interval=0, sample_interval=0)
    theirs = {k: getattr(c, k) for k in ('n_layer', 'n_head', 'n_embd', 'dropout', 'block_size')} | both | dict(
        dataset='random', out_dir='out', max_iters=steps + 4, eval_interval=10**9, eval_iters=1,
        always_save_checkpoint=False, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    runs = {(who, way): [] for way in ways for who in ('train.py', 'nanoGPT')}
    for r in range(rounds):
        for (who, way), rates in runs.items():
            compiled = {'compile': way == 'compiled'}
            if who == 'train.py':
                rates.append(start('train.py', **ours | compiled)['tok_s'])
            else:
                said = start(os.path.abspath(f'{peers}/train.py'), folder, document=False, **theirs | compiled)
                ms = median(map(float, re.findall(r'^iter \d+: loss .*, time ([\d.]+)ms', said, re.M)[5:]))
                rates.append(1000 * accumulation * batch_size * c.block_size / ms)
        print(f'peers, round {r + 1} of {rounds}', file=sys.stderr)
    return runs


def measure_train():
    c = shape_of_config()
    tokens = accumulation * batch_size * c.block_size
    if peers:
        odd = [k for k in ('n_kv_head', 'head_dim', 'n_hidden', 'multi_token_n', 'draft_n', 'teacher', 'quant_bits')
               if config[k]]
        if odd or c.vocab_size > 65536 or not os.path.isfile(os.path.join(str(peers), 'train.py')):
            fail(f"peers ({peers}) must be the folder of a copy of github.com/karpathy/nanoGPT, "
                 f"and the shape one that it has{f', without {odd[0]}' if odd else ''}")
    with tempfile.TemporaryDirectory() as folder:
        write_random(f'{folder}/data/random', c.vocab_size)
        runs, gemm, peaks, flops, params = time_steps(c, f'{folder}/data/random')
        gc.collect()
        torch.cuda.empty_cache()                # the other processes get the memory
        others = time_scripts(c, folder, [way for way in runs if way != 'dynamic']) if peers else {}
    rates = {way: [1000 * tokens / sum(ms.values()) for ms in run] for way, run in runs.items()}
    rows = [{'run': 'steps', 'way': way, 'dtype': dtype} | speed(rates[way], ratio=rates['eager'])
            | {'ms': {part: median(ms[part] for ms in run) for part in run[0]},
               'utilisation': flops * median(rates[way]) / gemm, 'peak_bytes': peaks.get(way),
               'mfu': peak_flops(device) and flops * median(rates[way]) / peak_flops(device)}
            for way, run in runs.items()]
    for (who, way), run in others.items():
        rows.append({'run': who, 'way': way, 'dtype': 'float32' if who == 'nanoGPT' and device == 'cpu' else dtype}
                    | speed(run) | {'ratio': median(a / b for a, b in zip(others['train.py', way], run)),
                                    'ms': None, 'utilisation': None, 'peak_bytes': None, 'mfu': None})
    report([('run', 'run'), ('way', 'way'), ('dtype', 'dtype'), ('tok/s', 'tok_s', ',.0f'), ('ratio', 'ratio', '.2f'),
            *((f'ms: {part}', lambda r, part=part: r['ms'] and r['ms'][part], '.1f') for part in rows[0]['ms']),
            ('% GEMM', 'utilisation', '.0f', 0.01), ('% MFU', 'mfu', '.0f', 0.01), ('GiB', 'peak_bytes', '.1f', 2**30)],
           rows, params=params, tokens_per_step=tokens, flops_per_token=flops, gemm_tflops=gemm / 1e12)

# -----------------------------------------------------------------------------
# --mode=memory: the estimate beside what it takes

def peak_of_training(c):
    """-> bytes by which three steps make this process grow, once libraries and compiler have taken theirs."""
    def three_steps(folder):
        model, trained, _, step = set_up(c, batch_size, folder)
        forward = compile_step(trained, batch_size * c.block_size, c.vocab_size) if compile else trained
        for _ in range(3):
            step(forward, c.block_size, min(accumulation, 2))
    cuda = device.startswith('cuda')
    with tempfile.TemporaryDirectory() as folder:
        write_random(folder, c.vocab_size)
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


class Living(TorchDispatchMode):
    """Inside, counts the bytes of tensors that are made and still exist: now, and at most. Fake ones count as true."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.known:                    # not a view of one that is known
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def forget(self, key, size):
        self.known.remove(key)
        self.now -= size


def training_bytes(c, batch, fake=True):
    """
    -> bytes of an eager step on batch rows, found by taking it, on fake tensors: nothing needs to fit anywhere, nothing
    is multiplied. activations: what a forward keeps for backward; logits: one chunk of them in float32.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext(), Living() as living:
        model, trained, optimizers, step = set_up(c, batch)
        kept = []

        def forward(*rows):
            before, losses = living.now, trained(*rows)
            kept.append(living.now - before)
            return losses
        for _ in range(2):                      # the first one makes the optimizers' states
            living.peak = 0
            # A step has the same tokens, whatever the batch. Two passes are enough: further ones take no more memory.
            step(forward, c.block_size, min(2, max(1, accumulation * batch_size // batch)))
        count = lambda tensors: sum(t.nbytes for t in tensors)
        weights, teachers = count(model.parameters()), getattr(trained, 'teachers', ())
        return {'weights': weights + count(model.buffers()), 'gradients': weights,
                'optimizer': sum(count(state.values()) for o in optimizers for state in o.state.values()),
                'averages': weights * (ema > 0), 'teacher': sum(count(t.parameters()) for t in teachers),
                'activations': kept[-1],
                'logits': 4 * c.vocab_size * min(batch * c.block_size, LOSS_CHUNK_BYTES // (4 * c.vocab_size)),
                'peak': living.peak, 'cache': batch * c.block_size * model.kv_bytes_per_token()}


def measure_memory():
    c = shape_of_config()
    if child:
        return print(json.dumps({'peak': peak_of_training(c)}))
    if target_params:
        return plan_shapes(c)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, trained, *_ = set_up(c, 1)
    groups, teachers = model.params(), getattr(trained, 'teachers', ())
    spoken = ('parameters: ' + ', '.join(f'{group} {n:,}' for group, n in groups.items() if n)
              + ''.join(f"; of a teacher {t.n_params:,}" for t in teachers))
    if plan:
        return plan_training(c, groups, spoken, trained.flops_per_token())
    rows = []
    # only tensors are to be measured: by itself glibc would keep freed blocks of less than 32 MB, and gaps between them
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    for batch in numbered('batches') or sorted({max(1, batch_size // 4), max(1, batch_size // 2), batch_size}):
        parts = training_bytes(c, batch)
        knobs = config | dict(
            child='memory', vocab_size=c.vocab_size, batch_size=batch, device=device, dtype=dtype,
            total_batch_size=max(1, accumulation * batch_size // batch) * batch * c.block_size)
        got = {way: start('bench.py', **knobs | {'compile': way == 'compiled'})['peak']
               for way in ('eager', 'compiled')[:1 + compile] if measured}
        rows.append({'batch': batch} | parts | {'eager': None, 'compiled': None} | got
                    | {'ratio': parts['peak'] / got['eager'] if got else None})
    print(f'{spoken}; MiB:')
    report([('batch', 'batch', 'd'), *((part, part, ',.1f', 2**20) for part in parts),
            ('measured: eager', 'eager', ',.1f', 2**20), ('compiled', 'compiled', ',.1f', 2**20),
            ('peak / eager', 'ratio', '.3f')],
           rows, dtype=dtype, params=groups)

# -----------------------------------------------------------------------------
# --mode=memory --plan=True: what a training would take on a GPU

if mode == 'memory' and plan:
    check_knobs(config, ('gpu', GPUS))
    counted_on = dict(gpu=gpu, utilisation=utilisation or ASSUMED_UTILISATION, assumed=not utilisation)
    gpu_flops, gpu_bytes = PEAK_FLOPS[GPUS[gpu][0]], GPUS[gpu][1]
    source = (f"{100 * counted_on['utilisation']:.0f} % of {gpu_flops / 1e12:.0f} TFLOP/s, "
              + ('given' if utilisation else 'ASSUMED: measure it there with --mode=train and give --utilisation='))


def bill(tokens, flops):
    """For so many tokens, at so many FLOPs each."""
    rate = counted_on['utilisation'] * gpu_flops / flops
    hours = tokens / rate / 3600
    return {'tokens': tokens, 'flops_per_token': flops, 'tok_s': rate,
            'hours': hours, 'dollars': hours * price if price else None}


def plan_shapes(c):
    """
    Shapes of about target_params, the nearest first, and what training them takes: for each depth the width of 64
    channels a head, 32 to 192 channels a layer.
    """
    found = re.fullmatch(r'(\d+(?:\.\d+)?)([KMB]?)', target_params)
    if not found:
        fail(f'target_params ({target_params}) must be a number of parameters, like 38M')
    target, rows = float(found[1]) * {'': 1, 'K': 1e3, 'M': 1e6, 'B': 1e9}[found[2]], []
    tables = (1 if tie_weights else 2) * c.vocab_size
    for depth in range(1, 97):
        # 12 * depth * width^2 + tables * width = target, solved for the width, which is rounded to whole heads
        width = 64 * round((math.sqrt(tables**2 + 48 * depth * target) - tables) / (24 * depth) / 64)
        if not 32 * depth <= width <= 192 * depth:
            continue
        with torch.device('meta'):
            model = GPT(GPTConfig(c.block_size, c.vocab_size, depth, width // 64, None, width, tie_weights=tie_weights))
        n = model.params()['total']
        tokens = round(tokens_per_param * n)
        shards = math.ceil(tokens / SHARD_TOKENS)
        rows.append({'n_layer': depth, 'n_embd': width, 'n_head': width // 64, 'params': n,
                     'shards': shards, 'download_bytes': shards * SHARD_BYTES,
                     'disk_bytes': (2 if c.vocab_size <= 65536 else 4) * shards * SHARD_TOKENS,
                     'steps': math.ceil(tokens / tokens_per_step)}
                    | bill(tokens, model.flops_per_token()))
    if not rows:
        fail(f'target_params ({target_params}) are too few for a vocabulary of {c.vocab_size:,}, whose tables alone '
             'take more, or too many for 96 layers: give another number, or a smaller --vocab_size')
    print(f'vocabulary {c.vocab_size:,}, context {c.block_size}, {tokens_per_param:g} tokens a parameter; '
          f'{gpu}, {source}')
    report([('depth', 'n_layer', 'd'), ('width', 'n_embd', 'd'), ('heads', 'n_head', 'd'),
            ('parameters', 'params', ',d'), ('tokens', 'tokens', ',d'), ('steps', 'steps', ',d'),
            ('shards', 'shards', 'd'), ('download GB', 'download_bytes', '.1f', 1e9),
            ('disk GB', 'disk_bytes', '.1f', 1e9), ('hours', 'hours', ',.2f'), ('dollars', 'dollars', ',.2f')],
           sorted(rows, key=lambda row: abs(row['params'] - target))[:5], **counted_on)


def plan_training(c, groups, spoken, flops):
    """What fits of the config's training, and what all of it would take."""
    rows, room, decides = [], USABLE * gpu_bytes, 'compiled' if compile else 'peak'
    while not rows or rows[-1]['fits']:                             # 1, 2, 4, ... until one does not fit
        batch = 2 ** len(rows)
        if batch < 4 or 4 * c.vocab_size * c.block_size * batch <= 32 * LOSS_CHUNK_BYTES:
            parts = training_bytes(c, batch)
        else:
            # So many chunks of logits would take minutes. By now everything grows in proportion to the batch, to within
            # 1 % (d12 with its teacher, 128 rows): twice as many rows more take twice as much more.
            parts = {part: 3 * rows[-1][part] - 2 * rows[-2][part] for part in parts}
        if compile:
            parts['compiled'] = COMPILED_MEMORY * parts['peak']
        rows.append({'batch': batch} | parts | {'fits': parts[decides] <= room})
    low = 0
    # The peak grows by as much or more for each further row: a straight line between the last two batches errs on the
    # safe side.
    if len(rows) > 1:
        a, b = rows[-2:]
        low = a['batch'] + int((room - a[decides]) / (b[decides] - a[decides]) * a['batch'])
    cost = bill(max_iters * tokens_per_step, flops)
    print(spoken)
    print(f"{gpu}: {gpu_bytes / 1e9:.0f} GB, of which {100 * USABLE:.0f} % are counted on; "
          f"the largest batch that fits is {low} rows of {c.block_size}, between two of these by proportion"
          if low else f'{gpu}: not even one row fits into {room / 1e9:.0f} GB')
    print(f"{cost['tokens']:,} tokens of {flops:,} FLOPs; {source}: "
          f"{cost['tok_s']:,.0f} tokens/s, {cost['hours']:,.2f} GPU hours"
          + (f", {cost['dollars']:,.2f} dollars" if price else ''))
    print('GB:')
    report([('batch', 'batch', 'd'), ('fits', lambda r: 'yes' if r['fits'] else 'no'),
            *((part, part, ',.2f', 1e9) for part in parts)],
           rows, params=groups, largest_batch=low, **counted_on, **cost)

# -----------------------------------------------------------------------------
# --mode=plot

def plot():
    paths = sorted({path for pattern in logs.split(',') for path in glob.glob(pattern.strip())})
    if not paths:
        fail(f'logs ({logs}) match no file: give the log.csv of one or more trainings')
    if not importlib.util.find_spec('matplotlib'):
        fail('mode=plot draws with matplotlib: pip install matplotlib')
    import matplotlib.figure
    figure, rows = matplotlib.figure.Figure(figsize=(8, 5)), []
    axes = figure.subplots()
    for path in paths:
        with open(path, newline='') as f:
            read = list(csv.DictReader(f))
        if not read or not {'tokens', 'train_loss', 'val_loss'} <= set(read[0]):
            fail(f'{path} has no line yet, or is no log.csv of train.py: it lacks tokens, train_loss and val_loss')
        training, validation = ([(int(r['tokens']), float(r[key])) for r in read if r[key]]
                                for key in ('train_loss', 'val_loss'))
        curve, = axes.plot(*zip(*training), alpha=0.4, linewidth=1)
        if validation:
            axes.plot(*zip(*validation), color=curve.get_color(), marker='o', markersize=3,
                      label=os.path.dirname(path) or path)
        rows.append({'log': path, 'steps': int(read[-1]['step']), 'tokens': int(read[-1]['tokens']),
                     'train_loss': training[-1][1], 'best_val_loss': min((y for _, y in validation), default=None)})
    axes.set(xlabel='tokens', ylabel='nats a token')
    axes.legend(title='validation; thin: training')
    atomic_write(png, lambda f: figure.savefig(f, dpi=150, format='png'))
    report([('log', 'log'), ('steps', 'steps', ',d'), ('training', 'train_loss', '.4f'),
            ('best validation', 'best_val_loss', '.4f')], rows, file=png)

# -----------------------------------------------------------------------------
# --mode=ladder: builds rungs with the other scripts, then measures them all in one run, each beside its controls

def read_rungs():
    """The knob's lines -> [(name, seed or None, command)], a line with {seed} once for each of seeds."""
    if not re.fullmatch(r'\d+(,\d+)*', seeds):
        fail(f'seeds ({seeds}) must be numbers, like 1337,1338,1339')
    out = []
    for line in filter(None, map(str.strip, rungs.splitlines())):
        name, bar, command = (part.strip() for part in line.partition('|'))
        if not bar or any(part.split()[:1] != ['python'] for part in command.split('&&')):
            fail(f'rungs: a line is "name | python SCRIPT ... && python SCRIPT ...", and {line!r} is not')
        out += ([(name, int(s), command.replace('{seed}', s)) for s in seeds.split(',')] if '{seed}' in command
                else [(name, None, command)])
    if not any(name for name, *_ in out):
        fail('rungs: none are given: python bench.py --mode=ladder config/ladder_quick.py')
    return out


def occupied(command):
    """The first folder that the command would write models or labels into and that has some, or None."""
    for part in command.split('&&'):
        script, *words = shlex.split(part)[1:]
        files = [word for word in words if word.endswith('.py') and os.path.exists(word)]
        told = ({k: v for file in files
                 for k, _, v in re.findall(r'^(out_dir|save_dir) *= *([\'"])(.*?)\2', open(file).read(), re.M)}
                | dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word))
        folder = told.get('save_dir') or told.get('out_dir') or ('out' if script == 'train.py' else '')
        if script == 'prune.py' and not told.get('save_dir'):
            folder = told.get('out_dir', 'out-quickstart').rstrip('/') + '-pruned'
        if script != 'quantize.py' and any(os.path.exists(os.path.join(folder, name))
                                           for name in ('ckpt.pt', 'best.pt', 'labels.bin')):
            return folder


def build_rung(name, seed, command, folders):
    """
    Runs a rung's commands; what they print goes to a file beside the ladder. -> its row: the model's file and what it
    cost, with what that one of folders {folder: row} cost that it starts from; apart, the FLOPs of labels, by folder.
    """
    called = f"{name or command.split('&&')[0].removeprefix('python ')} {seed or ''}".strip()[-60:]
    log = os.path.join(os.path.dirname(ladder), re.sub(r'\W+', '-', called) + '.log')
    row = {'name': name, 'seed': seed, 'command': command, 'file': None, 'mtime': 0,
           'train_tokens': 0, 'train_seconds': 0, 'train_flops': 0, 'labels': {}}
    for n, part in enumerate(command.split('&&')):
        print(f'[{called}] {part.strip()} > {log}', file=sys.stderr, flush=True)
        with open(log, 'a' if n else 'w') as out:
            print(f"$ {part.strip()}", file=out, flush=True)        # one that prints nothing must not count twice
            got = subprocess.run([sys.executable, *shlex.split(part)[1:]],
                                 stdout=out, stderr=subprocess.PIPE, text=True)
        if got.returncode:
            fail(f"rung {name!r}: {part.strip()!r} ended with status {got.returncode}: "
                 f"{(got.stderr.strip() or 'no word').splitlines()[-1]}; what it printed is in {log}")
        last = (open(log).read().splitlines() or [''])[-1]
        said = json.loads(last) if last.startswith('{') else {}     # a prepare.py ends without a document
        for folder, below in folders.items():
            found = set(re.findall(rf'--(init_from|out_dir|teacher)={re.escape(folder)}(?![^\s/+])', part))
            if not found or folder == said.get('out_dir'):
                continue
            if found != {'teacher'}:
                row['labels'] |= below.get('labels', {})
                for k in ('tokens', 'seconds', 'flops'):
                    row[f'train_{k}'] += below[f'train_{k}']
            elif below['file'].endswith('labels.bin'):
                row['labels'][folder] = below['train_flops']        # once, however many trainings they serve
        for k in ('tokens', 'seconds', 'flops') if 'iters' in said else ('seconds', 'flops'):
            row[f'train_{k}'] += said.get(k) or 0
        row['file'] = said.get('file') or (
            os.path.join(said['out_dir'], 'best.pt') if 'out_dir' in said else row['file'])
    return row | ({'mtime': os.path.getmtime(row['file'])} if row['file'] else {})


def untimed(row):
    """Timings of another run do not compare with those of this one."""
    return {k: v for k, v in row.items() if not k.startswith(('tok', 'same', 'spec', 'memory'))}


def measure_rung(file, int8):
    """-> a rung's parameters, bytes and quality, on its integers if it has them, with an int8 cache if it has one."""
    model, data, tokenizer = open_model(file)
    with torch.device('meta'):
        params = GPT(model.config).params()
    return {'params': params['total'], 'params_by_group': params, 'bytes': os.path.getsize(file), 'int8_cache': int8,
            **quality(model, data, tokenizer, torch.int8 if int8 else None)}


def write_ladder(rows, others, building=None):
    """
    others: rungs of earlier runs that this one did not come to, or does not have: they stay a ladder's own. building:
    the command that runs now: what is in its folder is not somebody else's if it is stopped.
    """
    document = {'mode': mode, 'machine': machine, 'building': building, 'rows': rows, 'others': [*others]}
    atomic_write(ladder, lambda f: f.write(json.dumps(document, indent=1).encode()))


def build_ladder(wanted):
    """
    -> the rungs' rows, and those that were recorded here besides. Built is what no ladder has recorded as it is, and
    what is older than what it is made of.
    """
    def is_intact(row):
        return bool(row['file']) and os.path.exists(row['file']) and os.path.getmtime(row['file']) == row['mtime']
    last = json.load(open(ladder)) if os.path.exists(ladder) else {'rows': []}
    everything = lambda record: record['rows'] + record.get('others', [])
    above, rows = {row['command']: row for row in everything(last)}, []     # each is kept until this run gets to it
    # a rung may stand in the record of another ladder, too, and may have been built again by that one
    records = [json.load(open(path)) for path in glob.glob('out-ladder*/ladder.json')] + [last]
    known = {row['command']: row for row in sorted(itertools.chain(*map(everything, records)), key=is_intact)}
    for name, rung_seed, command in wanted:
        # of several files in a folder the first: its rung made the folder
        folders = {os.path.dirname(row['file']): row for row in reversed(rows) if row['file']}
        row = known.get(command)
        intact = row and is_intact(row)
        stale = intact and any(
            below['mtime'] > row['mtime'] and re.search(rf'(?<![\w-]){re.escape(folder)}(?![\w-])', command)
            for folder, below in folders.items())
        if not intact and command != last.get('building') and occupied(command):
            fail(f'rung {name!r} would replace what is in {occupied(command)}, and is not as a ladder made it: '
                 'move that away, or give the rung another folder')
        if stale and row['file'].endswith('labels.bin'):
            shutil.rmtree(os.path.dirname(row['file']))             # distill.py replaces no labels
        if stale or not intact:
            write_ladder(rows, above.values(), command)
            row = build_rung(name, rung_seed, command, folders)
        if name and not row['file']:
            fail(f'rung {name!r}: its command names no model file; a line that only prepares has no name')
        row = untimed(row) | {'name': name, 'seed': rung_seed}
        int8 = name in int8_cache.split(',')
        if name and row.get('int8_cache') != int8:
            row |= measure_rung(row['file'], int8)
        rows.append(row)
        known[command] = row                    # another rung may be the same file, say with another cache
        above.pop(command, None)
        write_ladder(rows, above.values())
    return rows, [*above.values()]


def time_rungs(rows):
    """
    Adds tokens/s, plain and drafting, eager and maybe compiled, as sample.py runs them, interleaved, in every round on
    another text of the validation split; whether the texts are the same, with drafts and compiled; and memory.
    """
    runs, usual = [], torch.get_num_threads()
    for row in rows:
        model, data, _ = open_model(row['file'])
        must_fit(model.config, row['name'])
        text = Loader(data, 'val', 1, model.config.block_size)
        drafters = ['none'] + [d for d, head in HEADS.items() if hasattr(model, head)][:1]
        model = for_decoding(model)
        for how in ('', '_compiled') if row['name'] in compiled.split(',') and can_compile(device) else ('',):
            engine = Engine(model, bool(how), torch.int8 if row['int8_cache'] else torch.float32)
            runs += [(row, f'tok_s{kind}{how}', engine, text, drafter, [])
                     for kind, drafter in zip(('', '_speculative'), drafters)]
    for r in in_rounds('timing, '):
        for row, key, engine, text, drafter, seen in runs:
            torch.set_num_threads(threads or (1 if row['params'] < 4e6 else usual))
            prompt = text.rows([1024 * r % max(1, text.n_tokens - prompt_tokens)])[0][:, :prompt_tokens].tolist()
            seen.append((*decode(engine, prompt, seed + r, drafter), prompt[0], seed + r))
    torch.set_num_threads(usual)
    for row, key, engine, *_, seen in runs:
        texts, stats, prompts, seeds = zip(*seen)
        row[key] = median(s['tok_s'] for s in stats[1:])
        if key == 'tok_s':                      # a row's plain run comes first
            plain = texts
        elif key == 'tok_s_speculative':
            row['tokens_per_verify'] = sum(s['tokens'] for s in stats) / sum(sum(s['accepted']) for s in stats)
            row['speculation_exact'] = texts == plain
        else:       # compiled, what is float has its sums in another order, and at a tie a text may part from the plain
            parts = [parting(engine.model, p, a, b, temperature, 0, s)
                     for p, (a,), (b,), s in zip(prompts, plain, texts, seeds)]
            row[key.replace('tok_s', 'same_texts')] = mean(part is None for part in parts)
            row['same_texts_gap'] = max(row.get('same_texts_gap', 0), *(part[1] if part else 0 for part in parts))
    for row in rows if tells_memory else ():
        row['memory_bytes'] = memory_alone(row['file'], row['int8_cache'])['memory_bytes']


def welch(a, b):
    """Two lists of losses -> p of Welch's two-sided t-test, by angles; None if one of them has a single value."""
    if min(len(a), len(b)) < 2:
        return None
    va, vb = (variance(x) / len(x) for x in (a, b))
    if not va + vb:
        return float(mean(a) == mean(b))
    t = (mean(a) - mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1))
    area = lambda end: end * sum(math.cos(end * (i + 0.5) / 10000) ** (df - 1) for i in range(10000))
    return 1 - area(math.atan(abs(t) / math.sqrt(df))) / area(math.pi / 2)


def draw_ladder(names, path):
    """Bytes, and tokens/s, against bits per byte, as a picture; controls are crosses."""
    if not importlib.util.find_spec('matplotlib'):
        return print('no picture: pip install matplotlib', file=sys.stderr)
    import matplotlib.figure
    figure = matplotlib.figure.Figure(figsize=(12, 5))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in zip(axes, ('bytes', 'tok_s'), ('bytes of the file', 'tokens/s, one sequence, plain')):
        for name, rows in names.items():
            points = [(row[key], row['val_bpb']) for row in rows if row.get(key)]
            if points:
                axis.scatter(*zip(*points), marker='x' if 'control' in name else 'o')
                axis.annotate(name, points[0], xytext=(4, 4), textcoords='offset points', fontsize=8)
        axis.set(xscale='log', xlabel=label)
    axes[0].set_ylabel('bits per byte, validation')
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f'drawn: {path}', file=sys.stderr)


def measure_ladder():
    recorded = json.load(open(check)) if os.path.isfile(check) else {'machine': machine}
    old, wanted = [row for row in recorded.get('rows', []) if row['name']], [] if check else read_rungs()
    if check and not old:
        fail(f'check ({check}) is not there, or records no rung: '
             'build a ladder first, python bench.py --mode=ladder config/ladder_quick.py')
    if recorded['machine'] != machine:
        print(f"note: {check} is of another machine: {recorded['machine']}", file=sys.stderr)
    there = {row['name'] for row in old} | {name for name, *_ in wanted if name}
    for knob, words in (('timed', ('all', 'none')), ('compiled', ('',)), ('int8_cache', ('',))):
        for name in config[knob].split(',') if config[knob] not in words else ():
            if name not in there:
                fail(f'{knob} ({config[knob]}) names {name!r}, which is no rung')
    rows, others = build_ladder(wanted)
    for row in old:
        if not os.path.exists(row['file']):
            fail(f"rung {row['name']!r}: {row['file']} is not there any more: build the ladder again")
        rows.append(untimed(row) | measure_rung(row['file'], row.get('int8_cache', False)))
    shown, names = [row for row in rows if row['name']], {}
    for row in shown:
        names.setdefault(row['name'], []).append(row)
    if timed != 'none':                         # of a rung with several seeds the first one is timed
        time_rungs([names[name][0] for name in (names if timed == 'all' else dict.fromkeys(timed.split(',')))])
    if check:
        changes = [f"{new['name']}{'' if new['seed'] is None else ' ' + str(new['seed'])}: "
                   f"{key} was {before[key]:.6g} and is {new[key]:.6g}"
                   for before, new in zip(old, rows)
                   for key, noise in (('bytes', 0), ('val_loss', 1e-4), ('tokens_per_verify', 0.1),
                                      ('tok_s', 0.3), ('tok_s_speculative', 0.3))
                   if before.get(key) and new.get(key) and abs(new[key] / before[key] - 1) > noise]
        print('\n'.join(changes or ['nothing changed beyond noise']))
    else:
        write_ladder(rows, others)
        draw_ladder(names, os.path.splitext(ladder)[0] + '.png')

    all_flops = lambda row: {'train_flops': row['train_flops'] + sum(row.get('labels', {}).values())}
    lines, first = [], shown[0]
    control = next((same for name, same in names.items() if 'control' in name), None)
    for same in names.values():
        row, losses = same[0], [row['val_loss'] for row in same]
        lines.append(row | all_flops(row) | {
            'smaller': first['bytes'] / row['bytes'], 'val_bpb': mean(row['val_bpb'] for row in same),
            'val_loss': mean(losses), 'deviation': stdev(losses) if len(same) > 1 else None,
            'p': welch(losses, [r['val_loss'] for r in control]) if control and control is not same else None}
            | {f'x_{key}': row[key] / first['tok_s'] for key in ('tok_s', 'tok_s_speculative')
               if key in row and 'tok_s' in first})
    report([('rung', 'name'), ('parameters', 'params', ',d'), ('bytes', 'bytes', ',d'), ('x less', 'smaller', '.1f'),
            ('KV B/token', 'kv_bytes_per_token', ',.0f'), ('nats', 'val_loss', '.4f'), ('+-', 'deviation', '.4f'),
            ('bits/byte', 'val_bpb', '.4f'), ('p', 'p', '.1g'),
            ('tok/s', 'tok_s', ',.0f'), ('x', 'x_tok_s', '.2f'),
            ('drafting', 'tok_s_speculative', ',.0f'), ('x', 'x_tok_s_speculative', '.2f'),
            ('compiled', 'tok_s_compiled', ',.0f'), ('drafting', 'tok_s_speculative_compiled', ',.0f'),
            ('tok/verify', 'tokens_per_verify', '.2f'), ('MiB', 'memory_bytes', ',.1f', 2**20),
            ('Mtokens', 'train_tokens', ',.1f', 1e6), ('seconds', 'train_seconds', ',.0f'),
            ('PFLOPs', 'train_flops', ',.1f', 1e15)],
           lines, rows=[{k: v for k, v in row.items() if k != 'mtime'} | all_flops(row) for row in shown])
    wrong = [row['name'] for row in shown
             if row['file'].endswith('.safetensors') and row.get('speculation_exact') is False]
    if wrong:
        fail(f"{', '.join(wrong)}: another text with drafts than without, on integers")
    wrong = [f"{row['name']} {row['same_texts_gap']:.2g}" for row in shown if row.get('same_texts_gap', 0) > 1]
    if wrong:
        fail(f"another text compiled, by scores that far apart: {', '.join(wrong)}")

# -----------------------------------------------------------------------------
# the mode

modes = {'decode': measure_decode, 'quality': measure_quality, 'train': measure_train, 'memory': measure_memory,
         'plot': plot, 'ladder': measure_ladder}
if mode not in modes:
    fail(f"mode ({mode}) must be {', '.join(modes)}: there is no other")
modes[mode]()
