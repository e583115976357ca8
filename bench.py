"""
Measures and plans, a mode for each: decoding, quality, knowledge, training speed, memory, curves of losses, ladders.

    python bench.py --mode=decode                                # the quick start's shape, random weights: seconds
    python bench.py --mode=decode --shape=out-quickstart --drafters=none,ngram --batches=1,4
    python bench.py --shape=d12 --peers=True --llama2c=FOLDER --nanochat=FOLDER     # beside other programs: minutes
    python bench.py --shape=out-smollm --formats=int8-packed --peers=True   # a Llama: llama.cpp with the same weights
    python bench.py --mode=quality --shape=out-quickstart        # loss of each format, and of an int8 cache
    python bench.py --mode=quality --shape=out-quickstart --texts=mine=FILE         # and bits per byte of another text
    python bench.py --mode=tasks --tasks=FILE.jsonl --shape=out-quickstart          # how many questions it answers
    python bench.py --mode=train config/train_stdlib_bpe.py      # tokens/s, ms by part; --nanogpt=FOLDER: beside it
    python bench.py --mode=memory config/train_38m.py --vocab_size=24576 --batches=1,2,4    # estimate, measured peak
    python bench.py --mode=memory config/distill_d12_mqa.py --plan=True --gpu=a100-80 --price=0.54  # hours, dollars
    python bench.py --mode=memory --plan=True --target_params=38M --vocab_size=24576        # shapes of that size
    python bench.py --mode=plot out-*/log.csv                    # curves of losses, to losses.png
    python bench.py --mode=ladder config/ladder_quick.py         # builds models, then measures all of them in one run
    python bench.py --mode=ladder config/ladder_quick.py --check=out-ladder-quick/ladder.json  # what has changed?
    python bench.py --mode=table config/ladder_stdlib.json       # a ladder's record as a Markdown table, and a picture

You will see a table, then one line of JSON. What is timed runs in this process, interleaved: each row once, then each
again; medians; ratios are of the same round. Other programs run in processes of their own.

decode: the first row is the yardstick: float32, F.linear, a cache, one sequence. The columns:
    x plain     tokens/s over the yardstick's; x nocache: over a whole forward for every token
    GB/s        weights that a pass of trunk and lm_head reads (of wte its row; not what drafters read) times passes/s
    % memory    that, of the rate at which these threads read 512 MiB; beyond 100 where weights come from a cache
    rows        a cached pass over 2, 4, 5, 8 tokens of a sequence, over a pass over 1: what it costs to check drafts
    tok/verify  tokens that a pass settled, per sequence
    X / it      with --peers=True of a trained Llama, see tests/same_weights.py: how many times as fast our format X
                was in the same round; before prompt tok/s in decoding, behind it in reading a prompt of 512 tokens
Every row must give the text of its format's plain row, or part from it at a tie (scores within 1e-4; compiled for
a GPU 0.1); if one does not, the numbers are printed all the same, but the status is 1.

train and memory measure the training that train.py's knobs and configs describe (python train.py --help), on random
tokens; our own knobs are flags there. Without prepared data, give --vocab_size=.
train: steps as train.py takes them. dynamic: compiled for any length, as a first step on shorter rows shows. % GEMM:
FLOPs that the step needs, over those of the fastest matrix product of the same run in the same dtype; on a GPU MFU,
over those of its data sheet. On a CPU nanoGPT trains in float32: give --dtype=float32 for like and like.
memory: peak is the estimate for an eager step, see data/estimate.py. Measured is what a fresh process takes beyond what
libraries and compiler took in a first pass (Linux; torch.cuda's own count on a GPU), glibc giving back at once what is
freed. cache: of as many sequences that decode.
ladder: a list of commands, see data/ladder.py. One that was stopped goes on where it was, two share what the same words
make, and what no ladder has made is not replaced.
"""
import contextlib
import csv
import ctypes
import gc
import glob
import importlib.util
import json
import math
import os
import platform
import re
import sys
import tempfile
from statistics import mean, median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from data.checkpoint import config_from
from data.decoding import FORMATS, SHAPES, build, check_context, make_prompts
from data.estimate import (ASSUMED_UTILISATION, GPUS, SHARD_BYTES, SHARD_TOKENS, USABLE, Training, batches_that_fit,
                           bill, micro_batches, shape_of_size, training_bytes)
from data.export import is_block
from data.files import atomic_write, hold, in_repo, json_line, read_json
from data.ladder import (build_rung, by_name, columns_of, compare_records, draw, read_record, read_rungs, summary,
                         untimed, with_labels, write_record)
from data.loader import Loader, data_are_gone, data_of, load_meta
from data.tasks import asked, measure
from data.timing import in_rounds, resident, speed, start, timed_call
from data.tokenizer import CharTokenizer, from_meta
from data.writer import write_dataset
from data.layouts import PackedInt8Linear, for_decoding
from engine import DRAFTERS, FEW, HEADS, Engine, KVCache, Sampling, Speculation, first_difference
from data.machine import PEAK_FLOPS, can_compile, peak_flops, pick_device, pick_dtype
from model import GPT, GPTConfig, compile_step, evaluate
from quantize import convert, export, load

LENGTHS = (1, 2, 4, 5, 8)                               # tokens in a pass, for rows_cost

# -----------------------------------------------------------------------------
mode = 'decode'             # decode, quality, tasks, train, memory, plot, ladder, table
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
peers = False               # other programs: with a trained Llama's weights, or of another shape, see tests/README.md
gguf = ''                   # a GGUF file that llama.cpp decodes with, too, whatever our model is
llamacpp = ''               # folder of a built llama.cpp's llama-bench
llama2c = ''                # folder of llama2.c's binaries run and runq, or the path of one of them
nanochat = ''               # folder of a copy of nanochat as it was in 2025, see tests/peers.py
# quality, tasks and ladder
tasks = ''                  # a .jsonl file of questions, see data/tasks.py: every rung of a ladder answers them
questions = 0               # so many of them, drawn; 0: all
num_fewshot = 0             # answered examples before each
delimiter = ' '             # between question and answer; \n is a new line
texts = ''                  # new=FILE,general=FILE: bits per byte of further texts, in quality and ladder
text_bytes = 200_000        # at most so many bytes of each; 0: all
# train and memory; what is not here is a knob of train.py's
vocab_size = 0              # 0: the dataset's, if it is prepared, or the teacher's
steps = 10                  # training steps a round
any_length = True           # train: steps compiled for any length, too
nanogpt = ''                # train: folder of a copy of nanoGPT, whose train.py runs, too
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
png = ''                    # the picture, of mode=table too; empty: losses.png, and no picture of a table
# ladder
rungs = ''                  # a line each, "name | python SCRIPT ... && ...", which builds it; no name: preparation
seeds = '1337'              # a line with {seed} in it is built for each of these
ladder = 'out-ladder/ladder.json'   # what is measured so far; the picture and what the scripts print lie beside it
record = ''                 # where that goes when it is whole, to be kept: config/ladder_X.json; mode=table reads it
columns = ''                # of the table, by their keys in that file, joined by commas; empty: all that there are
timed = 'all'               # the rungs whose decoding is timed, by name, joined by commas; all or none
compiled = ''               # those of them that are timed in compiled rounds, too, half a minute for each
int8_cache = ''             # the rungs whose cache is int8, in bytes, loss and speed; they may be other rungs' files
check = ''                  # such a record: measure its files again, build nothing, and say what has changed
# the machine
seed = 1337
device = 'auto'             # cuda, mps, cpu
threads = 0                 # CPU threads; 0: PyTorch's own choice
child = ''                  # private: what a process started by this script measures
limits = {                  # what they may be
    'mode': ['decode', 'quality', 'tasks', 'train', 'memory', 'plot', 'ladder', 'table'],
    'prompt_tokens new_tokens rounds steps': (1, None),
    'draft_n': (1, FEW - 1),                            # more tokens at once are attended in another order
    'temperature price tokens_per_param': (0.0, None),
    'utilisation': (0, 1),
    'gpu': [*GPUS],
    'vocab_size threads questions num_fewshot text_bytes': (0, None),
    'seed': (0, 2**63 - 1)}
# -----------------------------------------------------------------------------
# Of the command line train.py gets its configs, and all knobs that are not ours alone. FILE.csv stands for
# --logs=FILE.csv (a shell has spelt out-*/log.csv out), FILE.json for --record=FILE.json.
training_words = []
ours = {key for key, value in globals().items() if value is None or isinstance(value, (int, float, str))}
ours -= {'seed', 'device', 'temperature', 'draft_n'}                    # train.py has these, too
if {'--mode=train', '--mode=memory'} & set(sys.argv) and not {'-h', '--help', '--knobs'} & set(sys.argv):
    training_words = [word for word in sys.argv[1:] if word[:2] != '--' or word[2:].partition('=')[0] not in ours]
    sys.argv = [word for word in sys.argv if word not in training_words]
elif {'--mode=plot', '--mode=table'} & set(sys.argv):
    csvs, jsons = ([word for word in sys.argv if word.endswith(end) and word[0] != '-'] for end in ('.csv', '.json'))
    sys.argv = [word for word in sys.argv if word not in csvs + jsons]
    sys.argv += [f"--logs={','.join(csvs)}"] * bool(csvs) + [f"--record={','.join(jsons)}"] * bool(jsons)
exec(open(in_repo('configurator.py')).read())

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
        form, divisor = [*how, None][:2] if how else ('', None)
        values = [key(line) if callable(key) else line.get(key) for line in lines]
        if any(value is not None for value in values):
            cells = ['-' if v is None else f'{v / divisor if divisor else v:{form}}' for v in values]
            width = max(len(cell) for cell in [heading, *cells])
            rule = ['-' * (width - 1) + ':' if how else '-' * width] if mode == 'table' else []
            pad = str.rjust if how else str.ljust
            table.append([pad(cell, width) for cell in [heading, *rule, *cells]])
    for cells in zip(*table):
        print(f"| {' | '.join(cells)} |" if mode == 'table' else '  '.join(cells))
    print(json_line({'mode': mode, 'machine': machine, 'rows': lines} | document))


def numbered(knob):
    """A knob like '1,4,16' -> the numbers in order."""
    text = config[knob]
    assert re.fullmatch(r'([1-9]\d*(,[1-9]\d*)*)?', text), f'{knob} ({text}) must be numbers from 1 on, like 1,4,16'
    return sorted({int(n) for n in text.split(',') if n})


def listed(knob, known):
    """A knob like 'a,b' -> its words, each of which must be known."""
    words = list(dict.fromkeys(config[knob].replace(' ', '').split(',')))
    for word in words:
        assert word in known, f"{knob} ({config[knob]}) must be of {', '.join(known)}; {word!r} is not"
    return words


def describe_machine():
    """-> what a document says of where it was measured"""
    cpuinfo = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    named = re.findall(r'model name\s*: (.*)', cpuinfo)
    gpu = {'gpu': torch.cuda.get_device_name(device)} if device.startswith('cuda') else {}
    return {'cpu': named[0] if named else platform.processor() or platform.machine(), **gpu,
            'threads': torch.get_num_threads(), 'torch': torch.__version__}

# -----------------------------------------------------------------------------
# --mode=decode and quality: the model, in a format

def check_shape():
    """Whether what decode and quality are asked to measure is there and can run."""
    assert shape in SHAPES or os.path.isdir(shape), \
        f"shape ({shape}) must be {', '.join(SHAPES)}, or the out_dir of a trained model"
    assert shape not in SHAPES or mode == 'decode', \
        f'shape ({shape}) has random weights, and quality is that of a trained model: give its out_dir'
    for f in listed('formats', FORMATS):
        assert not f.endswith('compiled') or can_compile(device), \
            f'formats ({formats}) need a C++ compiler: leave those with -compiled out'
        assert f != 'bf16-compiled' or device != 'cpu', \
            f"formats ({formats}): bf16-compiled is for a GPU, there is no compiling oneDNN's layout"
        assert not f.startswith('int4-bf16') or device == 'cpu', f'formats ({formats}): int4-bf16 is a layout for CPUs'


def open_model(file):
    """A checkpoint, or an int8 or int4 one -> the model, the folder of its data, its tokenizer."""
    model, state = load(file, device)
    return model, *data_of(state, file)


def bytes_per_pass(model):
    """Of weights, in one pass of trunk and lm_head over one token: all their tensors, packed ones too, a row of wte."""
    def nbytes(*parts):
        modules = [module for part in parts for module in part.modules()]
        values = [v for m in modules for v in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())]
        return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))
    return nbytes(model.transformer.h, model.lm_head) + nbytes(model.transformer.wte) // model.config.vocab_size


def quality(model, data, tokenizer, dtype):
    """-> loss on the whole validation split, through a cache of dtype (None: without one), and such a cache's bytes."""
    c = model.config
    make_cache = dtype and (lambda batch: KVCache(c, batch, dtype=dtype, device=device))
    batches = Loader(data, 'val', 16, c.block_size, device=device).eval_batches()
    result = evaluate(model, batches, tokenizer.token_bytes, make_cache)
    return {'val_loss': result['loss'], 'val_bpb': result['bpb'],
            'kv_bytes_per_token': model.kv_bytes_per_token(dtype == torch.int8)}


def measure_quality():
    check_shape()
    file = os.path.join(shape, 'best.pt')
    state, data = load(file, device)[1], None
    tokenizer = from_meta(state['tokenizer'])
    if not texts or not data_are_gone(state):           # a model of somebody else's has no dataset here
        data, _ = data_of(state, file)
    rows = []
    for f in listed('formats', FORMATS):
        model = build(k, f).model
        for dtype in (torch.float32, torch.int8):
            row = {'shape': shape, 'format': f, 'cache': str(dtype).removeprefix('torch.')}
            if data:
                row |= quality(model, data, tokenizer, dtype)
            rows.append(row | measure(model, tokenizer, dtype, texts, text_bytes))
    others = [(key.removeprefix('bpb_'), key, '.5f') for key in rows[0] if key.startswith('bpb_')]
    report([('format', 'format'), ('cache', 'cache'), ('nats', 'val_loss', '.5f'), ('bits/byte', 'val_bpb', '.5f'),
            *others, ('cache bytes a token', 'kv_bytes_per_token', ',.0f')], rows)

# -----------------------------------------------------------------------------
# --mode=tasks

def how_to_answer():
    return {'tasks': tasks, 'questions': questions, 'num_fewshot': num_fewshot, 'seed': seed,
            'delimiter': delimiter.replace('\\n', '\n')}


def measure_tasks():
    assert shape not in SHAPES, \
        f'shape ({shape}) has random weights, which know nothing: give the out_dir of a trained model, or its file'
    assert tasks, 'tasks () must be a .jsonl file of questions: data/tasks.py says what stands in it'
    model, state = load(os.path.join(shape, 'best.pt') if os.path.isdir(shape) else shape, device)
    rows = measure(model, from_meta(state['tokenizer']), **how_to_answer())['tasks']
    report([('questions about', 'kind'), ('held out', lambda r: {True: 'yes', False: 'no'}.get(r.get('heldout'))),
            ('questions', 'questions', ',d'), ('% right', 'accuracy', '.1f', 0.01), ('+-', 'error', '.1f', 0.01),
            ('% by chance', 'chance', '.1f', 0.01), ('centred', 'centred', '.3f'), ('+-', 'centred_error', '.3f'),
            ('p', 'p', '.1g')], rows, shape=shape, **how_to_answer())

# -----------------------------------------------------------------------------
# decoding, of ladders too

def decode(engine, prompts, seed, drafter):
    """-> the texts, and the engine's stats"""
    text = engine.complete(prompts, new_tokens, Sampling(temperature, seed=seed), Speculation(drafter, draft_n))
    return text, engine.stats


def memory_taken(path):
    """How much this process grows by loading the file at path and decoding with it, and what there is to hold."""
    small = GPTConfig(block_size=64, vocab_size=PackedInt8Linear.ROWS, n_layer=1, n_head=1, n_embd=64)
    Engine(for_decoding(convert(GPT(small)))).complete([[1] * 4], 8)        # so libraries have taken their own memory
    before, dtype = resident(), torch.int8 if int8_cache == path else torch.float32
    engine = Engine(for_decoding(load(path, device)[0]), cache_dtype=dtype)
    for _ in engine.generate([[1] * prompt_tokens], new_tokens, Sampling(temperature, seed=seed)):
        grown = resident() - before
    size, cache = os.path.getsize(path), KVCache(engine.config, 1, prompt_tokens + new_tokens, dtype).nbytes()
    return {'memory_bytes': grown, 'file_bytes': size, 'cache_bytes': cache, 'memory_ratio': grown / (size + cache)}


def memory_alone(path, int8=False):
    """The same of a fresh process."""
    knobs = config | dict(mode='decode', child=path, int8_cache=path if int8 else '', temperature=temperature,
                          device=device, threads=torch.get_num_threads())
    return start('bench.py', **knobs)

# -----------------------------------------------------------------------------
# --mode=decode

@torch.inference_mode()
def pass_seconds(engine, prompt):
    """-> {n: seconds} of a cached pass, up to the most probable tokens, over n tokens of one sequence."""
    m, longest = engine.model, max(LENGTHS)
    cache = KVCache(engine.config, 1, prompt_tokens + longest, device=device)
    engine.prefill(cache, [prompt[:engine.config.block_size - longest]])
    before, ids = cache.lengths, torch.tensor([prompt[:1] * longest], device=device)
    times = {n: [] for n in LENGTHS}
    for n in LENGTHS * 5:
        times[n].append(timed_call(lambda: m.logits(m.trunk(ids[:, :n], cache)).argmax(dim=-1).tolist()))
        cache.rewind(before)
    return {n: median(t) for n, t in times.items()}


@torch.inference_mode()
def without_cache(engine, prompt, text):
    """-> tokens/s with a forward over everything so far for each token, at up to 16 places spread over the text."""
    ids, n, m = torch.tensor([prompt + text], device=device), min(16, len(text)), engine.model
    ends = [prompt_tokens + i * len(text) // n for i in range(n)]
    return n / timed_call(lambda: [m.logits(m.trunk(ids[:, :end])[:, -1:]).argmax(dim=-1).tolist() for end in ends])


def bandwidth(big):
    """-> bytes/s at which these threads read memory, by a sum or a matrix-vector product: neither is always faster."""
    m = big.view(-1, 8192)
    reads = (big.sum, lambda: m @ m[0])
    return big.nbytes / min(timed_call(lambda: read().amax().item()) for read in reads)    # .item() waits for a GPU


def difference(engine, prompt, row, expected, got):
    """
    What is wrong with a row's text; None if it is the expected one, or parts from it at a tie. Compiled for a GPU, the
    same floats are summed in one order or another, and an activation between two integers may be rounded to either.
    """
    found = first_difference(engine.model, prompt, expected, got, temperature, row, seed)
    if found and found[1] > (0.1 if engine.compile and device != 'cpu' else 1e-4):
        return (f'sequence {row}: token {found[0]} is {got[found[0]]}, not {expected[found[0]]}, '
                f'and their scores differ by {found[1]:.2g}')


def measure_peers(c):
    """-> rows of other programs, each beside ours in a process of its own: with these weights, or with this shape"""
    if gguf or shape not in SHAPES and is_block(c, 'llama'):
        assert not (llama2c or nanochat), 'llama2c and nanochat have random weights, which are measured without a gguf'
        same = {key: config[key] for key in ('shape', 'formats', 'prompt_tokens', 'new_tokens', 'rounds', 'gguf',
                                             'llamacpp')}
        rows = start('tests/same_weights.py', **same, seed=seed, device=device, threads=torch.get_num_threads())['rows']
        return [row | speed(row['tok_s_rounds'], ratio_plain_f32=rows[0]['tok_s_rounds']) for row in rows]
    assert c.head_dim == c.n_embd // c.n_head, \
        f'peers have heads of n_embd / n_head ({c.n_embd} / {c.n_head}) channels, and {shape} of {c.head_dim}'
    same = {k: getattr(c, k) for k in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_hidden', 'vocab_size',
                                       'block_size', 'tie_weights')}
    same |= {k: config[k] for k in ('prompt_tokens', 'new_tokens', 'rounds', 'llama2c', 'nanochat', 'seed')}
    got = start('tests/peers.py', **same, device=device, threads=torch.get_num_threads())
    ours = [rate for row in got['rows'] for rate in row['ours']]
    if not ours:
        return []
    alone = {'decoder': 'picochat alone', 'format': 'f32', 'params': got['params'], 'tok_s_rounds': ours}
    return [{k: row[k] for k in ('decoder', 'format', 'params')}
            | speed(row['tok_s_rounds'], ratio_plain_f32=row.get('ours', ours)) for row in (alone, *got['rows'])]


def columns_of_peers():
    """Of other programs with the same weights: by how much each of our formats is faster, in decoding and prompts."""
    def over_it(key):
        return [(f'{f} / it', lambda row, f=f: (row.get(key) or {}).get(f), '.2f') for f in listed('formats', FORMATS)]
    return [*over_it('ours_over_it'), ('prompt tok/s', 'prompt_tok_s', ',.0f'), *over_it('prompt_ours_over_it'),
            ('MiB', lambda row: row.get('prompt_tok_s') and row['memory_bytes'], ',.0f', 2**20), ('same', 'same', 'd')]


def decode_in_rounds(engines, prompts, wanted):
    """
    Decodes all of wanted, (format, drafter, batch), once a round, and measures passes, and memory's rate. -> by round
    the stats of each of wanted, {format: passes' seconds}, tokens/s without a cache, bytes/s of memory; what is wrong.
    """
    runs, texts, wrong = {key: [] for key in wanted}, {}, []
    costs, slow, rates = {f: [] for f in engines if not f.endswith('compiled')}, [], []
    # 512 MiB, written to: pages never touched would all be one page of zeros, read from the processor's cache
    big = torch.ones(2**27, device=device)
    for r in in_rounds(rounds):
        for (f, drafter, batch), stats in runs.items():
            text, got = decode(engines[f], prompts[:batch], seed, drafter)
            known = texts.setdefault(f, [])     # by row; the plain runs come first
            for row, (expected, own) in enumerate(zip(known, text)):
                found = difference(engines[f], prompts[row], row, expected, own)
                if found:
                    wrong.append(f'format {f}, drafter {drafter}, batch {batch}, {found}')
            known += text[len(known):]
            stats.append(got)
        for f, cost in costs.items():
            cost.append(pass_seconds(engines[f], prompts[0]))
        if recompute:
            slow.append(without_cache(engines['f32'], prompts[0], texts['f32'][0]))
        rates.append(bandwidth(big))
    for seen in (*runs.values(), *costs.values(), slow, rates):
        del seen[:1]                            # round 0
    return runs, costs, slow, rates, wrong


def decoding_rows(engines, runs, costs, slow, rates):
    """-> a row for each of runs, and one for decoding without a cache"""
    yardstick, rows = [s['tok_s'] for s in runs['f32', 'none', 1]], []
    for (f, drafter, batch), run in runs.items():
        size = bytes_per_pass(engines[f].model)
        gb_s = size * median(s['tok_s'] * s['passes'] / s['tokens'] for s in run) / 1e9
        accepted = [sum(n) for n in zip(*(s['accepted'] for s in run))]
        plain = drafter == 'none'
        rows.append({
            'decoder': 'picochat', 'format': f, 'drafter': drafter, 'batch': batch,
            **speed([s['tok_s'] for s in run], ratio_plain_f32=yardstick, ratio_recompute=slow),
            'first_token_ms': 1000 * median(s['first_seconds'] for s in run),
            'gb_s': gb_s, 'share_of_bandwidth': gb_s * 1e9 / median(rates),
            'rows_cost': {str(n): median(t[n] / t[1] for t in costs[f]) for n in LENGTHS[1:]} if f in costs else None,
            'tokens_per_verify': 1.0 if plain else sum(s['tokens'] for s in run) / sum(accepted),
            'accepted': None if plain else accepted,
            'kv_bytes_per_token': engines['f32'].model.kv_bytes_per_token(), 'weight_bytes': size})
    if slow:
        rows.append({'decoder': 'no cache', 'format': 'f32'}
                    | speed(slow, ratio_plain_f32=yardstick, ratio_recompute=slow))
    return rows


def memory_row():
    """-> the row of an int8 file that a fresh process decodes with"""
    with tempfile.TemporaryDirectory() as folder:
        export(f'{folder}/int8.safetensors', convert(build(k, 'f32').model), {})
        alone = memory_alone(f'{folder}/int8.safetensors')
    print(f"int8-packed takes {alone['memory_bytes'] / 2**20:,.1f} MiB of memory, "
          f"{alone['memory_ratio']:.2f} times its file and cache "
          f"({alone['file_bytes'] / 2**20:,.1f} + {alone['cache_bytes'] / 2**20:,.1f})")
    return {'decoder': 'picochat alone', 'format': 'int8-packed'} | alone


def formats_drafters_and_batches(sizes):
    """-> what is to be decoded, the yardstick first, then each format's plain row before its others"""
    wanted = [('f32', 'none', 1)]
    for f in listed('formats', FORMATS):
        for drafter in dict.fromkeys(['none'] + listed('drafters', DRAFTERS)):
            # an engine that compiles does so for one sequence, and not for these two drafters
            if not f.endswith('compiled'):
                wanted += [(f, drafter, batch) for batch in sizes]
            elif drafter not in ('ngram', 'random'):
                wanted.append((f, drafter, 1))
    return list(dict.fromkeys(wanted))


def measure_decode():
    if child:
        return print(json.dumps(memory_taken(child)))
    assert peers or not (gguf or llamacpp or llama2c or nanochat), \
        'gguf, llamacpp, llama2c and nanochat are measured with --peers=True'
    check_shape()
    sizes = numbered('batches') or [1]
    wanted = formats_drafters_and_batches(sizes)
    plain = build(k, 'f32')
    check_context(k, plain.config, shape)
    for _, drafter, _ in wanted:
        Speculation(drafter).check(plain.model)
    prompts, params = make_prompts(k, plain, max(sizes)), plain.model.params()['total']
    others = measure_peers(plain.config) if peers else []         # first, as they may refuse
    engines = {'f32': plain} | {f: build(k, f) for f, *_ in wanted if f != 'f32'}
    runs, costs, slow, rates, wrong = decode_in_rounds(engines, prompts, wanted)
    rows = decoding_rows(engines, runs, costs, slow, rates)
    del plain, engines                          # the other process gets the memory
    if tells_memory:
        rows.append(memory_row())
    # what a row does not have is None
    empty = dict.fromkeys([*rows[0], 'ratio_recompute', 'memory_bytes', 'file_bytes', 'cache_bytes', 'memory_ratio'])
    empty |= dict.fromkeys(key for row in others for key in row)
    empty |= {'shape': shape, 'drafter': 'none', 'batch': 1, 'params': params}
    rows = [empty | row for row in rows + others]
    report([('decoder', 'decoder'), ('format', 'format'), ('drafter', 'drafter'), ('batch', 'batch', 'd'),
            ('tok/s', 'tok_s', ',.1f'), ('x plain', 'ratio_plain_f32', ',.2f'),
            ('x nocache', 'ratio_recompute', ',.2f'), ('first ms', 'first_token_ms', ',.1f'),
            ('GB/s', 'gb_s', ',.2f'), ('% memory', 'share_of_bandwidth', ',.0f', 0.01),
            ('rows ' + ' '.join(map(str, LENGTHS[1:])),
             lambda r: r['rows_cost'] and ' '.join(f'{x:.2f}' for x in r['rows_cost'].values())),
            ('tok/verify', 'tokens_per_verify', '.2f'), *columns_of_peers()],
           rows, bandwidth_gb_s=median(rates) / 1e9)
    if wrong:
        raise ValueError('another text than the plain row: ' + '; '.join(wrong))

# -----------------------------------------------------------------------------
# --mode=train and memory: the training that a config describes, on random tokens

def read_training():
    """-> t, the knobs of the training to measure, as train.py itself makes them out of the command line."""
    if child:                                   # another process has asked already
        return SimpleNamespace(**json.loads(child))
    t = SimpleNamespace(**start('train.py', *training_words, '--knobs'))
    assert t.batch_size != 'auto', 'batch_size (auto) must be an int here: what a number of rows takes is measured'
    assert t.init_from == 'scratch' and not t.train_only, (
        f'a whole training from random weights is measured: init_from ({t.init_from}) and train_only ({t.train_only}) '
        'cannot be; give the shape, --init_from=scratch and --train_only=')
    t.device = pick_device(t.device)
    t.dtype = 'bfloat16' if plan and t.dtype == 'auto' else pick_dtype(t.dtype, t.device)
    t.compile = t.compile and (plan or can_compile(t.device))
    return t


def shape_of_training():
    """-> its GPTConfig; the vocabulary is vocab_size, or the dataset's, or nanochat's if that teaches."""
    folder, size = os.path.join(in_repo('data'), t.dataset), vocab_size
    if not size and os.path.exists(os.path.join(folder, 'meta.json')):
        size = load_meta(folder)['vocab_size']
    if not size and t.teacher.startswith(('nanochat:', 'random:')):
        size = 65536
    assert size, f'{folder} is not prepared, so the vocabulary is not known: give it, as in --vocab_size=4096'
    shape = {k: v for k, v in vars(t).items() if k in GPTConfig.__dataclass_fields__}
    return config_from(shape | {'vocab_size': size}, 'the config')


def write_random(folder, vocab):
    """A dataset of random tokens: characters, for train.py, the halves of surrogate pairs left out."""
    ids = np.random.default_rng(t.seed).integers(vocab, size=2**20)
    characters = CharTokenizer(chr(i + 2048 * (i >= 0xd800)) for i in range(vocab))
    with contextlib.redirect_stdout(None):
        write_dataset(folder, characters, ids, ids[:2 * t.block_size + 1], 'random')


# -----------------------------------------------------------------------------
# --mode=train

@torch.inference_mode()
def gemm_rate(c):
    """-> FLOP/s of the fastest of some products in the training's dtype: a large square one, and those of an MLP."""
    big, rows, best = 2048 if device == 'cpu' else 8192, t.batch_size * c.block_size, 0.0
    for m, k, n in ((big, big, big), (rows, c.n_embd, c.n_hidden), (rows, c.n_hidden, c.n_embd)):
        a, b = (torch.randn(shape, device=device).to(getattr(torch, t.dtype)) for shape in ((m, k), (n, k)))
        for _ in range(3):
            best = max(best, 2 * m * k * n / timed_call(lambda: F.linear(a, b)[0, 0].item()))    # it waits for a GPU
    return best


def time_steps(training, c):
    """-> {way: ms by part of each round's mean step}, FLOP/s of a matrix product, on a GPU {way: bytes at its peak}"""
    tokens = t.batch_size * c.block_size
    forwards = {'eager': training.trained}
    if t.compile:
        forwards['compiled'] = compile_step(training.trained, tokens, c.vocab_size)
    if t.compile and any_length:
        forwards['dynamic'] = compile_step(training.trained, tokens, c.vocab_size, dynamic=True)
    runs, gemm, peaks, accumulation = {way: [] for way in forwards}, 0.0, {}, micro_batches(t, t.batch_size)
    for r in in_rounds(rounds):
        for way, forward in forwards.items():
            if way == 'dynamic' and not r:
                training.step(forward, c.block_size // 2 + 1, accumulation)
            if device.startswith('cuda'):
                torch.cuda.reset_peak_memory_stats()
            parts = [training.step(forward, c.block_size, accumulation) for _ in range(steps)]
            runs[way].append({part: 1000 * mean(p[part] for p in parts) for part in parts[0]})
            if device.startswith('cuda'):
                peaks[way] = torch.cuda.max_memory_allocated()      # the last round's, when all is compiled
        gemm = max(gemm, gemm_rate(c))
    return {way: run[1:] for way, run in runs.items()}, gemm, peaks


def measure_train():
    c = shape_of_training()
    tokens = micro_batches(t, t.batch_size) * t.batch_size * c.block_size
    with tempfile.TemporaryDirectory() as folder:
        write_random(folder, c.vocab_size)
        others = []
        if nanogpt:                             # beside our train.py
            others = start('tests/peers.py', nanogpt=nanogpt, training=json.dumps(vars(t) | {'dataset': folder}),
                           vocab_size=c.vocab_size, steps=steps, rounds=rounds, device=device)['rows']
        training = Training(t, c, t.batch_size, folder)
        runs, gemm, peaks = time_steps(training, c)
    flops, params = training.trained.flops_per_token(), training.model.params()['total']
    rows, rates = [], {way: [1000 * tokens / sum(ms.values()) for ms in run] for way, run in runs.items()}
    for way, run in runs.items():
        rows.append({'run': 'steps', 'way': way, 'dtype': t.dtype, **speed(rates[way], ratio=rates['eager']),
                     'ms': {part: median(ms[part] for ms in run) for part in run[0]},
                     'utilisation': flops * median(rates[way]) / gemm, 'peak_bytes': peaks.get(way),
                     'mfu': peak_flops(device) and flops * median(rates[way]) / peak_flops(device)})
    for run in others:
        row = {key: run[key] for key in ('run', 'way', 'dtype')} | speed(run['tok_s_rounds'], ratio=run['ours'])
        rows.append(dict.fromkeys(rows[0]) | row | {'ratio': 1 / row['ratio']})
    parts = [(f'ms: {part}', lambda r, part=part: r['ms'] and r['ms'][part], '.1f') for part in rows[0]['ms']]
    report([('run', 'run'), ('way', 'way'), ('dtype', 'dtype'), ('tok/s', 'tok_s', ',.0f'), ('ratio', 'ratio', '.2f'),
            *parts, ('% GEMM', 'utilisation', '.0f', 0.01), ('% MFU', 'mfu', '.0f', 0.01),
            ('GiB', 'peak_bytes', '.1f', 2**30)],
           rows, params=params, tokens_per_step=tokens, flops_per_token=flops, gemm_tflops=gemm / 1e12)

# -----------------------------------------------------------------------------
# --mode=memory: the estimate beside what it takes

def peak_of_training(c):
    """-> bytes by which three steps make this process grow, once libraries and compiler have taken theirs."""
    def three_steps(folder):
        training = Training(t, c, t.batch_size, folder)
        forward = training.trained
        if t.compile:
            forward = compile_step(forward, t.batch_size * c.block_size, c.vocab_size)
        for _ in range(3):
            training.step(forward, c.block_size, min(micro_batches(t, t.batch_size), 2))
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


def measure_memory():
    c = shape_of_training()
    if child:
        return print(json.dumps({'peak': peak_of_training(c)}))
    if target_params:
        return plan_shapes(c)
    with FakeTensorMode(allow_non_fake_inputs=True):
        training = Training(t, c, 1)
    groups = training.model.params()
    print('parameters: ' + ', '.join(f'{group} {n:,}' for group, n in groups.items() if n)
          + ''.join(f'; of a teacher {n:,}' for n in training.teacher_params))
    if plan:
        return plan_training(c, groups, training.trained.flops_per_token())
    can_measure = measured and (device.startswith('cuda') or os.path.exists('/proc/self/clear_refs'))
    # only tensors are to be measured: by itself glibc would keep freed blocks of less than 32 MB, and gaps between them
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    rows, n = [], t.batch_size
    for batch in numbered('batches') or sorted({max(1, n // 4), max(1, n // 2), n}):
        print(f'a batch of {batch} rows', file=sys.stderr, flush=True)
        row = {'batch': batch, **training_bytes(t, c, batch), 'eager': None, 'compiled': None, 'ratio': None}
        for way in ('eager', 'compiled')[:1 + t.compile] if can_measure else ():
            step_tokens = micro_batches(t, batch) * batch * c.block_size
            knobs = vars(t) | dict(batch_size=batch, total_batch_size=step_tokens, compile=way == 'compiled')
            row[way] = start('bench.py', mode='memory', vocab_size=c.vocab_size, threads=threads,
                             child=json.dumps(knobs))['peak']
        if row['eager']:
            row['ratio'] = row['peak'] / row['eager']
        rows.append(row)
    print('MiB:')
    parts = [key for key in rows[0] if key not in ('batch', 'eager', 'compiled', 'ratio')]
    report([('batch', 'batch', 'd'), *((part, part, ',.1f', 2**20) for part in parts),
            ('measured: eager', 'eager', ',.1f', 2**20), ('compiled', 'compiled', ',.1f', 2**20),
            ('peak / eager', 'ratio', '.3f')],
           rows, dtype=t.dtype, params=groups)

# -----------------------------------------------------------------------------
# --mode=memory --plan=True: what a training would take on a GPU

def budget():
    return SimpleNamespace(gpu=gpu, utilisation=utilisation, price=price)


def source_of_rate():
    """-> where a plan's FLOP/s come from, in words, and for its document"""
    share, peak = utilisation or ASSUMED_UTILISATION, PEAK_FLOPS[GPUS[gpu][0]]
    source = 'given' if utilisation else 'ASSUMED: measure it there with --mode=train and give --utilisation='
    return (f'{100 * share:.0f} % of {peak / 1e12:.0f} TFLOP/s, {source}',
            {'gpu': gpu, 'utilisation': share, 'assumed': not utilisation})


def plan_shapes(c):
    """Shapes of about target_params, the nearest first, and what training them takes."""
    found = re.fullmatch(r'(\d+(?:\.\d+)?)([KMB]?)', target_params)
    assert found, f'target_params ({target_params}) must be a number of parameters, like 38M'
    target = float(found[1]) * {'': 1, 'K': 1e3, 'M': 1e6, 'B': 1e9}[found[2]]
    rows, (source, counted_on) = [], source_of_rate()
    for model in filter(None, (shape_of_size(t, c, depth, target) for depth in range(1, 97))):
        n = model.params()['total']
        tokens = round(tokens_per_param * n)
        shards = math.ceil(tokens / SHARD_TOKENS)
        rows.append({'n_layer': model.config.n_layer, 'n_embd': model.config.n_embd, 'n_head': model.config.n_head,
                     'params': n, 'shards': shards, 'download_bytes': shards * SHARD_BYTES,
                     'disk_bytes': (2 if c.vocab_size <= 65536 else 4) * shards * SHARD_TOKENS,
                     'steps': math.ceil(tokens / (t.total_batch_size or t.batch_size * t.block_size)),
                     **bill(budget(), tokens, model.flops_per_token())})
    assert rows, (f'target_params ({target_params}) are too few for a vocabulary of {c.vocab_size:,}, whose tables '
                  'alone take more, or too many for 96 layers: give another number, or a smaller --vocab_size')
    print(f'vocabulary {c.vocab_size:,}, context {c.block_size}, {tokens_per_param:g} tokens a parameter; '
          f'{gpu}, {source}')
    report([('depth', 'n_layer', 'd'), ('width', 'n_embd', 'd'), ('heads', 'n_head', 'd'),
            ('parameters', 'params', ',d'), ('tokens', 'tokens', ',d'), ('steps', 'steps', ',d'),
            ('shards', 'shards', 'd'), ('download GB', 'download_bytes', '.1f', 1e9),
            ('disk GB', 'disk_bytes', '.1f', 1e9), ('hours', 'hours', ',.2f'), ('dollars', 'dollars', ',.2f')],
           sorted(rows, key=lambda row: abs(row['params'] - target))[:5], **counted_on)


def plan_training(c, groups, flops):
    """What fits of the config's training, and what all of it would take."""
    memory, room = GPUS[gpu][1], USABLE * GPUS[gpu][1]
    rows, largest = batches_that_fit(t, c, room)
    cost = bill(budget(), t.max_iters * (t.total_batch_size or t.batch_size * t.block_size), flops)
    source, counted_on = source_of_rate()
    print(f"{gpu}: {memory / 1e9:.0f} GB, of which {100 * USABLE:.0f} % are counted on; "
          f"the largest batch that fits is {largest} rows of {c.block_size}, between two of these by proportion"
          if largest else f'{gpu}: not even one row fits into {room / 1e9:.0f} GB')
    dollars = f", {cost['dollars']:,.2f} dollars" if price else ''
    print(f"{cost['tokens']:,} tokens of {flops:,} FLOPs; {source}: {cost['tok_s']:,.0f} tokens/s, "
          f"{cost['hours']:,.2f} GPU hours{dollars}")
    print('GB:')
    parts = [(part, part, ',.2f', 1e9) for part in rows[0] if part not in ('batch', 'fits')]
    report([('batch', 'batch', 'd'), ('fits', lambda r: 'yes' if r['fits'] else 'no'), *parts],
           rows, params=groups, largest_batch=largest, **counted_on, **cost)

# -----------------------------------------------------------------------------
# --mode=plot

def measure_plot():
    paths = sorted({path for pattern in logs.split(',') for path in glob.glob(pattern.strip())})
    if not paths:
        raise ValueError(f'logs ({logs}) match no file: give the log.csv of one or more trainings')
    import matplotlib.figure
    figure, rows = matplotlib.figure.Figure(figsize=(8, 5)), []
    axes = figure.subplots()
    for path in paths:
        with open(path, newline='') as f:
            read = list(csv.DictReader(f))
        if not read or not {'tokens', 'train_loss', 'val_loss'} <= set(read[0]):
            raise ValueError(f'{path} has no line yet, or is no log.csv of train.py: '
                             'it lacks tokens, train_loss and val_loss')
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
    path = png or 'losses.png'
    atomic_write(path, lambda f: figure.savefig(f, dpi=150, format='png'))
    report([('log', 'log'), ('steps', 'steps', ',d'), ('training', 'train_loss', '.4f'),
            ('best validation', 'best_val_loss', '.4f')], rows, file=path)

# -----------------------------------------------------------------------------
# --mode=ladder: runs the commands that build each rung, then measures all rungs in one run, each beside its controls

def measure_rung(file, int8):
    """
    -> a rung's parameters, bytes and quality, on its integers if it has them, with an int8 cache if it has one; and
    what it knows of other texts and of tasks.
    """
    print(f'    measuring {file}', file=sys.stderr, flush=True)
    model, data, tokenizer = open_model(file)
    with torch.device('meta'):
        params = GPT(model.config).params()
    return {'params': params['total'], 'params_by_group': params, 'bytes': os.path.getsize(file), 'int8_cache': int8,
            **quality(model, data, tokenizer, torch.int8 if int8 else None),
            **measure(model, tokenizer, torch.int8 if int8 else None, texts, text_bytes, **how_to_answer())}


def build_ladder(wanted):
    """-> the rows of all rungs, measured; what the ladder's last run measured of the same file is not measured again"""
    hold(os.path.dirname(ladder), os.path.basename(ladder))         # rungs are held by the scripts that make them
    identity = ('command', 'file', 'made', 'int8_cache', 'beside')
    known = {}
    if os.path.exists(ladder):
        before = read_json(ladder, 'move it away', {'rows': list})['rows']
        known = {tuple(row.get(key) for key in identity): row for row in before if isinstance(row, dict)}
    rows = []
    for name, rung_seed, command in wanted:
        row = build_rung(ladder, name, rung_seed, command)
        if row:
            row['int8_cache'] = name in int8_cache.split(',')
            row['beside'] = asked(texts, text_bytes, **how_to_answer()) or None
            before = known.get(tuple(row[key] for key in identity)) if row['made'] else None
            measured_now = untimed(before) if before else measure_rung(row['file'], row['int8_cache'])
            rows.append(measured_now | row)
            write_record(ladder, rows, machine)
    return rows


def measure_again(recorded):
    """-> the recorded rungs' rows, measured anew"""
    rows = []
    for row in recorded:
        if not os.path.exists(str(row.get('file'))):
            raise ValueError(f"rung {row['name']!r}: {row.get('file')} is not there any more: build the ladder again")
        rows.append(untimed(row) | measure_rung(row['file'], row.get('int8_cache', False)))
    return rows


def timed_runs(rows):
    """-> what is timed: (row, key of its tokens/s, engine, text, drafter, a list for what is seen)"""
    runs = []
    for row in rows:
        model, data, _ = open_model(row['file'])
        check_context(k, model.config, row['name'])
        text = Loader(data, 'val', 1, model.config.block_size)
        drafters = {'tok_s': 'none'}
        for drafter, head in HEADS.items():
            if hasattr(model, head):
                drafters.setdefault('tok_s_speculative', drafter)
        compiles = row['name'] in compiled.split(',') and can_compile(device)
        for how in ('', '_compiled') if compiles else ('',):
            model = for_decoding(open_model(row['file'])[0], kernels=not how)
            engine = Engine(model, bool(how), torch.int8 if row['int8_cache'] else torch.float32)
            runs += [(row, key + how, engine, text, drafter, []) for key, drafter in drafters.items()]
    return runs


def time_rungs(rows):
    """
    Adds tokens/s, plain and drafting, eager and maybe compiled, as sample.py runs them, interleaved, in every round on
    another text of the validation split; whether the texts are the same, with drafts and compiled; and memory.
    """
    runs, usual = timed_runs(rows), torch.get_num_threads()
    for r in in_rounds(rounds, 'timing, '):
        for row, key, engine, text, drafter, seen in runs:
            torch.set_num_threads(threads or (1 if row['params'] < 4e6 else usual))
            start_at = 1024 * r % max(1, text.n_tokens - prompt_tokens)
            prompt = text.rows([start_at])[0][0, :prompt_tokens].tolist()
            (own,), stats = decode(engine, [prompt], seed + r, drafter)
            seen.append((prompt, own, stats, seed + r))
    torch.set_num_threads(usual)
    for row, key, engine, _, _, seen in runs:
        row[key] = median(stats['tok_s'] for _, _, stats, _ in seen[1:])
        if key == 'tok_s':                      # a row's plain run comes first
            plain = [own for _, own, _, _ in seen]
        elif key == 'tok_s_speculative':
            accepted = sum(sum(stats['accepted']) for _, _, stats, _ in seen)
            row['tokens_per_verify'] = sum(stats['tokens'] for _, _, stats, _ in seen) / accepted
            row['speculation_exact'] = plain == [own for _, own, _, _ in seen]
        else:       # compiled, what is float has its sums in another order, and at a tie a text may part from the plain
            parts = [first_difference(engine.model, prompt, expected, own, temperature, 0, drawn)
                     for expected, (prompt, own, _, drawn) in zip(plain, seen)]
            row[key.replace('tok_s', 'same_texts')] = mean(part is None for part in parts)
            gaps = [part[1] for part in parts if part]
            row['same_texts_gap'] = max([row.get('same_texts_gap', 0), *gaps])
    for row in rows if tells_memory else ():
        row['memory_bytes'] = memory_alone(row['file'], row['int8_cache'])['memory_bytes']


def measure_table():
    """A record's Markdown table, and its picture."""
    document = read_record(record)
    lines, everything = summary(document['rows']), columns_of(document['rows'])
    known = {column[1]: column for column in everything}
    report([known[key] for key in listed('columns', known)] if columns else everything, lines,
           machine=document['machine'], date=document.get('date'))
    if png:
        draw(lines, png)


def check_decoding(rows):
    """ValueError if drafts or compiling gave another text than plain decoding, where they must not."""
    for row in rows:
        if row['file'].endswith('.safetensors') and row.get('speculation_exact') is False:
            raise ValueError(f"{row['name']}: another text with drafts than without, on integers")
        if row.get('same_texts_gap', 0) > 1:
            raise ValueError(f"{row['name']}: another text compiled, by scores {row['same_texts_gap']:.2g} apart")


def measure_ladder():
    recorded, wanted = read_record(check) if check else None, [] if check else read_rungs(rungs, seeds)
    there = {row['name'] for row in recorded['rows']} if check else {name for name, *_ in wanted if name}
    for knob, words in (('timed', ('all', 'none')), ('compiled', ('',)), ('int8_cache', ('',))):
        if config[knob] not in words:
            listed(knob, there)
    if check and recorded.get('machine') != machine:
        print(f"note: {check} is of another machine: {recorded.get('machine')}", file=sys.stderr)
    rows = measure_again(recorded['rows']) if check else build_ladder(wanted)
    names = by_name(rows)
    if timed != 'none':                         # of a rung with several seeds the first one is timed
        time_rungs([names[name][0] for name in (names if timed == 'all' else listed('timed', there))])
    lines = summary(rows)
    if check:
        print('\n'.join(compare_records(recorded['rows'], rows) or ['nothing changed beyond noise']))
    else:
        for path in filter(None, (ladder, record)):
            write_record(path, rows, machine)
        if importlib.util.find_spec('matplotlib'):
            draw(lines, os.path.splitext(ladder)[0] + '.png')
        else:                                   # the record is whole without it
            print('no picture: pip install matplotlib', file=sys.stderr)
    report(columns_of(rows), lines, rows=[with_labels(row) for row in rows])
    check_decoding(rows)

# -----------------------------------------------------------------------------
# the machine, and the mode

t = read_training() if mode in ('train', 'memory') else None
if t:
    seed, device = t.seed, t.device
device = pick_device(device)
if device.startswith('cuda:'):
    torch.cuda.set_device(device)               # what is counted and waited for above is the current device's
if device.startswith('cuda') and t:
    torch.set_float32_matmul_precision('high')  # as train.py does
if threads:
    torch.set_num_threads(threads)
    os.environ['OMP_NUM_THREADS'] = str(threads)                    # for the processes that are started here
machine = describe_machine()
tells_memory = memory and device == 'cpu' and os.path.exists('/proc/self/status')
if temperature is None:
    temperature = 0.0 if mode == 'decode' and shape in SHAPES else 0.8
k = SimpleNamespace(**{key: globals()[key] for key in config})      # the knobs, resolved
{'decode': measure_decode, 'quality': measure_quality, 'tasks': measure_tasks, 'train': measure_train,
 'memory': measure_memory, 'plot': measure_plot, 'ladder': measure_ladder, 'table': measure_table}[mode]()
