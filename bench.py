"""
Measures and plans, a mode for each: decoding, quality, knowledge, training speed, memory, curves of losses, ladders.

    python bench.py --mode=decode                                # the quick start's shape, random weights: seconds
    python bench.py --mode=decode --shape=out-quickstart --drafters=none,ngram --batches=1,4
    python bench.py --shape=d12 --peers=True --llama2c=FOLDER --nanochat=FOLDER     # beside other programs: minutes
    python bench.py --shape=out-smollm --formats=int8-packed --peers=True   # a Llama: llama.cpp with the same weights
    python bench.py --mode=quality --shape=out-quickstart        # bytes, loss, KL of each format, and of an int8 cache
    python bench.py --mode=quality --shape=out-quickstart --texts=mine=FILE         # and bits per byte of another text
    python bench.py --mode=quality --shape=out-mine --formats=f32,int8,out-mine-qat/int4.safetensors,q8_0  # other files
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
    x plain     tokens/s over the yardstick's; x nocache: over a whole forward for every token; x drafts: over the
                same format without a drafter
    GB/s        weights that a pass of trunk and lm_head reads (of wte its row; not what drafters read) times passes/s
    % memory    that, of the rate at which these threads read 512 MiB; beyond 100 where weights come from a cache
    rows        a cached pass over 2, 4, 5, 8 tokens of a sequence, over a pass over 1: what it costs to check drafts
    tok/verify  tokens that a pass settled, per sequence
    X / it      with --peers=True of a trained Llama: how many times as fast our format X was in the same round, in
                decoding, and behind prompt tok/s in reading a prompt of 512 tokens; see tests/same_weights.py
Every row must give the text of its format's plain row, or part from it at a tie (scores within 1e-4; compiled for
a GPU 0.1); if one does not, the numbers are printed all the same, but the status is 1.

train and memory measure the training that train.py's knobs and configs describe (python train.py --help), on random
tokens; our own knobs are flags there. Without prepared data, give --vocab_size=.
quality: bytes of the file; KL: the mean, and the largest at one place, of KL(float || format) in nats; % flips: places
where another token is the most probable one. llama.cpp's formats are read back as floats.
train: steps as train.py takes them. dynamic: compiled for any length, as a step on shorter rows shows (in bfloat16
on a CPU for each length anew: data/attention.py). % GEMM: FLOPs that the step needs, over those of the fastest matrix
product of the same run in the same dtype; on a GPU MFU, over those of its data sheet. On a CPU nanoGPT trains in
float32: give --dtype=float32 for like and like.
memory: peak is the estimate for an eager step, see data/bench/estimate.py. Measured is what a new process takes beyond
what libraries and compiler took in a first pass (Linux; torch.cuda's count on a GPU), glibc giving back at once what
is freed. cache: of as many sequences that decode.
ladder: a list of commands, see data/bench/ladder.py. One that was stopped goes on where it was. Two ladders share what
the same commands make, and files that no ladder has made are not replaced.
"""
import glob
import importlib.util
import json
import os
import re
import sys
from statistics import median
from types import SimpleNamespace

import torch

from data.bench.curves import draw_curves
from data.bench.decoding import (FORMATS, GGUF_KINDS, LENGTHS, SHAPES, build, check_context, decode_in_rounds,
                                 decoding_rows, make_prompts, memory_row, memory_taken, price_list, quality)
from data.bench.estimate import GPUS, USABLE, batches_that_fit, bill, peak_of_training, shape_of_training
from data.bench.ladder import (by_name, columns_of, compare_records, draw, read_record, read_rungs, summary,
                               with_labels, write_record)
from data.bench.rungs import build_ladder, check_decoding, how_to_answer, measure_again, time_rungs, words_of
from data.bench.tasks import measure
from data.bench.timing import resident, speed, start
from data.bench.training import (describe_training, rate_on_gpu, read_training, shapes_to_plan, time_training,
                                 weigh_training)
from data.compiling import can_compile
from data.files import in_repo, json_line
from data.foreign.export import is_block
from data.loader import data_of, without_text
from data.machine import describe_machine, pick_device
from data.tokenizer import from_meta
from engine import DRAFTERS, FEW, Speculation
from quantize import load

# -----------------------------------------------------------------------------
mode = 'decode'             # decode, quality, tasks, train, memory, plot, ladder, table
# decode and quality: the model
shape = 'tiny'              # tiny or d12, with random weights; or the out_dir of a trained model
formats = 'f32,int8,int8-packed'    # FORMATS of data/bench/decoding.py; in quality its GGUF_KINDS and files, too
# decode
drafters = 'none'           # none, head, mtp, ngram, random; none is always measured
batches = ''                # sequences together, like 1,4,16; empty: 1, in mode=memory batch_size, a half and a quarter
draft_n = 4                 # at most so many drafts at a time
prompt_tokens = 64          # random ids; a trained model writes its own prompts, if there are no texts
new_tokens = 128
rounds = 5                  # of mode=train, too
temperature = None          # None: 0 for random weights, 0.8 for a trained model
recompute = True            # measure decoding without a cache, too
memory = True               # and what a process takes of it, beyond one that has decoded something (Linux, CPU)
peers = False               # other programs: with a trained Llama's weights, or of another shape, see tests/README.md
gguf = ''                   # a GGUF file that llama.cpp decodes with, too, whatever our model is
llamacpp = ''               # folder of a built llama.cpp's llama-bench, and llama-quantize
llama2c = ''                # folder of llama2.c's binaries run and runq, or the path of one of them
nanochat = ''               # folder of a copy of nanochat as it was in 2025, see tests/peers.py
# quality, tasks and ladder
tasks = ''                  # a .jsonl file of questions, see data/bench/tasks.py: every rung of a ladder answers them
questions = 0               # so many of them, drawn; 0: all
num_fewshot = 0             # answered examples before each
delimiter = ' '             # between question and answer; \n is a new line
texts = ''                  # new=FILE,general=FILE: further texts, for bits per byte; in decode for prompts
text_bytes = 200_000        # at most so many bytes of each; 0: all
caches = 'float32,int8'     # quality: what the cache of each format holds, one or both
# train and memory; what is not here is a knob of train.py's
vocab_size = 0              # 0: the dataset's, if it is prepared, or the teacher's
steps = 10                  # training steps a round
any_length = True           # train: steps compiled for any length, too
nanogpt = ''                # train: folder of a copy of nanoGPT, whose train.py runs, too
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
with_int8_cache = ''        # the rungs whose cache is int8, in bytes, loss and speed; files may be other rungs', too
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
training_words, words_given = [], sys.argv[1:]
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
assert mode not in ('train', 'memory', 'plot', 'table') or f'--mode={mode}' in words_given, (
    f'mode ({mode}) must be said on the command line, --mode={mode}, which is read in another way then')

# -----------------------------------------------------------------------------
# what several modes need

def report(columns, lines, **document):
    """
    columns: (heading, key of a line or function of it, format, unit), of which the last two may be absent -> a table of
    lines, and one line of JSON, whose rows are the lines unless the document has others. None is '-'; a column of
    nothing else is left out; without a format it is text, to the left.
    """
    table = []
    for heading, key, *how in columns:
        form, unit = how[0] if how else '', how[1] if len(how) > 1 else None
        values = [key(line) if callable(key) else line.get(key) for line in lines]
        if any(value is not None for value in values):
            cells = ['-' if v is None else f'{v / unit if unit else v:{form}}' for v in values]
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
    words = words_of(config[knob])
    for word in words:
        assert word in known, f"{knob} ({config[knob]}) must be of {', '.join(known)}; {word!r} is not"
    return words

# -----------------------------------------------------------------------------
# --mode=decode and quality: the model, in a format

def check_shape():
    """Whether what decode and quality are asked to measure is there and can run."""
    assert shape in SHAPES or os.path.isdir(shape), \
        f"shape ({shape}) must be {', '.join(SHAPES)}, or the out_dir of a trained model"
    assert shape not in SHAPES or mode == 'decode', \
        f'shape ({shape}) has random weights, and quality is that of a trained model: give its out_dir'
    for f in wanted_formats():
        assert f != 'q4_k_m' or llamacpp and os.access(os.path.join(llamacpp, 'llama-quantize'), os.X_OK), \
            f'formats ({formats}): q4_k_m needs llama.cpp\'s own tool, --llamacpp=FOLDER with a llama-quantize in it'
        assert not f.endswith('compiled') or can_compile(device), \
            f'formats ({formats}) need a C++ compiler: leave those with -compiled out'
        assert f != 'bf16-compiled' or device != 'cpu', \
            f"formats ({formats}): bf16-compiled is for a GPU, there is no compiling oneDNN's layout"
        assert not f.startswith('int4-bf16') or device == 'cpu', f'formats ({formats}): int4-bf16 is a layout for CPUs'


def wanted_formats():
    """The knob formats as a list; quality also takes llama.cpp's formats and integer checkpoints."""
    files = [word for word in words_of(formats) if word.endswith('.safetensors')]
    return listed('formats', [*FORMATS, *GGUF_KINDS, *files] if mode == 'quality' else FORMATS)


def measure_quality():
    check_shape()
    file = os.path.join(shape, 'best.pt')
    state, data = load(file, device)[1], None
    tokenizer = from_meta(state['tokenizer'])
    if not texts or not without_text(state, file):      # a model of somebody else's has no dataset here
        data, _ = data_of(state, file)
    rows = []
    models, prices = price_list(k, wanted_formats(), data, tokenizer)
    for f, model in models.items():
        for cache in ['float32'] if f in GGUF_KINDS else listed('caches', ['float32', 'int8']):
            dtype = getattr(torch, cache)
            row = {'shape': shape, 'format': f, 'cache': cache,
                   'kv_bytes_per_token': model.kv_bytes_per_token(dtype == torch.int8)}
            if dtype == torch.float32:
                row |= prices[f]
            elif data:
                row |= quality(model, data, tokenizer, dtype)
            rows.append(row | measure(model, tokenizer, dtype, texts, text_bytes))
    others = [(key.removeprefix('bpb_'), key, '.5f') for key in rows[0] if key.startswith('bpb_')]
    report([('format', 'format'), ('bytes', 'bytes', ',d'), ('cache', 'cache'), ('nats', 'val_loss', '.5f'),
            ('bits/byte', 'val_bpb', '.5f'), ('KL', 'mean_kl', '.5f'), ('largest', 'max_kl', '.3f'),
            ('% flips', 'top1_flips', '.2f', 0.01), *others,
            ('cache bytes a token', 'kv_bytes_per_token', ',.0f')], rows)

# -----------------------------------------------------------------------------
# --mode=tasks

def measure_tasks():
    assert shape not in SHAPES, \
        f'shape ({shape}) has random weights, which know nothing: give the out_dir of a trained model, or its file'
    assert tasks, 'tasks () must be a .jsonl file of questions: data/bench/tasks.py says what stands in it'
    model, state = load(os.path.join(shape, 'best.pt') if os.path.isdir(shape) else shape, device)
    rows = measure(model, from_meta(state['tokenizer']), **how_to_answer(k))['tasks']
    report([('questions about', 'kind'), ('held out', lambda r: {True: 'yes', False: 'no'}.get(r.get('heldout'))),
            ('questions', 'questions', ',d'), ('% right', 'accuracy', '.1f', 0.01), ('+-', 'error', '.1f', 0.01),
            ('% by chance', 'chance', '.1f', 0.01), ('centred', 'centred', '.3f'), ('+-', 'centred_error', '.3f'),
            ('p', 'p', '.1g')], rows, shape=shape, **how_to_answer(k))

# -----------------------------------------------------------------------------
# --mode=decode

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
    same = {key: getattr(c, key) for key in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_hidden', 'vocab_size',
                                             'block_size', 'tie_weights')}
    same |= {key: config[key] for key in ('prompt_tokens', 'new_tokens', 'rounds', 'llama2c', 'nanochat', 'seed')}
    got = start('tests/peers.py', **same, device=device, threads=torch.get_num_threads())
    ours = [rate for row in got['rows'] for rate in row['ours']]
    if not ours:
        return []
    alone = {'decoder': 'picochat alone', 'format': 'f32', 'params': got['params'], 'tok_s_rounds': ours}
    return [{key: row[key] for key in ('decoder', 'format', 'params')}
            | speed(row['tok_s_rounds'], ratio_plain_f32=row.get('ours', ours)) for row in (alone, *got['rows'])]


def columns_of_peers():
    """Of other programs with the same weights: by how much each of our formats is faster, in decoding and prompts."""
    def over_it(key):
        return [(f'{f} / it', lambda row, f=f: (row.get(key) or {}).get(f), '.2f') for f in listed('formats', FORMATS)]
    return [*over_it('ours_over_it'), ('prompt tok/s', 'prompt_tok_s', ',.0f'), *over_it('prompt_ours_over_it'),
            ('MiB', lambda row: row.get('prompt_tok_s') and row['memory_bytes'], ',.0f', 2**20), ('same', 'same', 'd')]


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
        return print(json.dumps(memory_taken(k, child)))
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
    others = measure_peers(plain.config) if peers else []      # first, as they may refuse
    engines = {'f32': plain} | {f: build(k, f) for f, *_ in wanted if f != 'f32'}
    runs, costs, slow, rates, wrong = decode_in_rounds(k, engines, prompts, wanted)
    rows = decoding_rows(engines, runs, costs, slow, rates)
    del plain, engines                          # the other process gets the memory
    if memory and device == 'cpu' and resident():
        rows.append(memory_row(k))
        mib = {part: rows[-1][f'{part}_bytes'] / 2**20 for part in ('memory', 'file', 'cache')}
        print(f"int8-packed takes {mib['memory']:,.1f} MiB of memory, {rows[-1]['memory_ratio']:.2f} times its file "
              f"and cache ({mib['file']:,.1f} + {mib['cache']:,.1f})")
    # what a row does not have is None
    empty = dict.fromkeys([*rows[0], 'ratio_recompute', 'ratio_no_drafts', 'memory_bytes', 'file_bytes', 'cache_bytes',
                           'memory_ratio'])
    empty |= dict.fromkeys(key for row in others for key in row)
    empty |= {'shape': shape, 'drafter': 'none', 'batch': 1, 'params': params}
    rows = [empty | row for row in rows + others]
    report([('decoder', 'decoder'), ('format', 'format'), ('drafter', 'drafter'), ('batch', 'batch', 'd'),
            ('tok/s', 'tok_s', ',.1f'), ('x plain', 'ratio_plain_f32', ',.2f'),
            ('x nocache', 'ratio_recompute', ',.2f'), ('x drafts', 'ratio_no_drafts', '.2f'),
            ('first ms', 'first_token_ms', ',.1f'),
            ('GB/s', 'gb_s', ',.2f'), ('% memory', 'share_of_bandwidth', ',.0f', 0.01),
            ('rows ' + ' '.join(map(str, LENGTHS[1:])),
             lambda r: r['rows_cost'] and ' '.join(f'{x:.2f}' for x in r['rows_cost'].values())),
            ('tok/verify', 'tokens_per_verify', '.2f'), *columns_of_peers()],
           rows, bandwidth_gb_s=median(rates) / 1e9)
    if wrong:
        raise ValueError('another text than the plain row: ' + '; '.join(wrong))

# -----------------------------------------------------------------------------
# --mode=train and memory: the training that a config describes, on random tokens

def measure_train():
    rows, facts = time_training(k, t)
    parts = [(f'ms: {part}', lambda r, part=part: r['ms'] and r['ms'][part], '.1f') for part in rows[0]['ms']]
    report([('run', 'run'), ('way', 'way'), ('dtype', 'dtype'), ('tok/s', 'tok_s', ',.0f'), ('ratio', 'ratio', '.2f'),
            *parts, ('% GEMM', 'utilisation', '.0f', 0.01), ('% MFU', 'mfu', '.0f', 0.01),
            ('GiB', 'peak_bytes', '.1f', 2**30)], rows, **facts)


def measure_memory():
    c = shape_of_training(t, vocab_size)
    if child:
        return print(json.dumps({'peak': peak_of_training(t, c)}))
    if target_params:
        return plan_shapes(c)
    groups, flops, teachers = describe_training(t, c)
    print('parameters: ' + ', '.join(f'{group} {n:,}' for group, n in groups.items() if n)
          + ''.join(f'; of a teacher {n:,}' for n in teachers))
    if plan:
        return plan_training(c, groups, flops)
    n = t.batch_size
    rows = weigh_training(k, t, c, numbered('batches') or sorted({max(1, n // 4), max(1, n // 2), n}))
    print('MiB:')
    parts = [key for key in rows[0] if key not in ('batch', 'eager', 'compiled', 'ratio')]
    report([('batch', 'batch', 'd'), *((part, part, ',.1f', 2**20) for part in parts),
            ('measured: eager', 'eager', ',.1f', 2**20), ('compiled', 'compiled', ',.1f', 2**20),
            ('peak / eager', 'ratio', '.3f')],
           rows, dtype=t.dtype, params=groups)


def plan_shapes(c):
    """Shapes of about target_params, the nearest first, and what training them takes."""
    rows, (source, counted_on) = shapes_to_plan(k, t, c), rate_on_gpu(k)
    print(f'vocabulary {c.vocab_size:,}, context {c.block_size}, {tokens_per_param:g} tokens a parameter; '
          f'{gpu}, {source}')
    report([('depth', 'n_layer', 'd'), ('width', 'n_embd', 'd'), ('heads', 'n_head', 'd'),
            ('parameters', 'params', ',d'), ('tokens', 'tokens', ',d'), ('steps', 'steps', ',d'),
            ('shards', 'shards', 'd'), ('download GB', 'download_bytes', '.1f', 1e9),
            ('disk GB', 'disk_bytes', '.1f', 1e9), ('hours', 'hours', ',.2f'), ('dollars', 'dollars', ',.2f')],
           rows, **counted_on)


def plan_training(c, groups, flops):
    """What fits of the config's training, and what all of it would take."""
    memory, room = GPUS[gpu][1], USABLE * GPUS[gpu][1]
    rows, largest = batches_that_fit(t, c, room)
    cost = bill(k, t.max_iters * (t.total_batch_size or t.batch_size * t.block_size), flops)
    source, counted_on = rate_on_gpu(k)
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
    path = png or 'losses.png'
    report([('log', 'log'), ('steps', 'steps', ',d'), ('training', 'train_loss', '.4f'),
            ('best validation', 'best_val_loss', '.4f')], draw_curves(paths, path), file=path)

# -----------------------------------------------------------------------------
# --mode=ladder: runs the commands that build each rung, then measures all rungs in one run, each beside its controls

def measure_table():
    """A record's Markdown table, and its picture."""
    document = read_record(record)
    lines, everything = summary(document['rows']), columns_of(document['rows'])
    known = {column[1]: column for column in everything}
    report([known[key] for key in listed('columns', known)] if columns else everything, lines,
           machine=document.get('machine'), date=document.get('date'))
    if png:
        draw(lines, png)


def measure_ladder():
    recorded, wanted = read_record(check) if check else None, [] if check else read_rungs(rungs, seeds)
    there = {row['name'] for row in recorded['rows']} if check else {name for name, *_ in wanted if name}
    for knob, words in (('timed', ('all', 'none')), ('compiled', ('',)), ('with_int8_cache', ('',))):
        if config[knob] not in words:
            listed(knob, there)
    if check and recorded.get('machine') != machine:
        print(f"note: {check} is of another machine: {recorded.get('machine')}", file=sys.stderr)
    rows = measure_again(k, recorded['rows']) if check else build_ladder(k, wanted, machine)
    names = by_name(rows)
    if timed != 'none':                         # of a rung with several seeds the first one is timed
        first = [names[name][0] for name in (names if timed == 'all' else listed('timed', there))]
        # a GGUF is llama.cpp's to decode: --mode=decode --peers=True has it beside us
        time_rungs(k, [row for row in first if not row['file'].endswith('.gguf')])
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

t = None
if mode in ('train', 'memory'):                 # a process that another one has started gets what that has read
    t = SimpleNamespace(**json.loads(child)) if child else read_training(training_words, plan)
    seed, device = t.seed, t.device
device = pick_device(device)
if device.startswith('cuda:'):
    torch.cuda.set_device(device)               # what is counted and waited for above is the current device's
if device.startswith('cuda') and t:
    torch.set_float32_matmul_precision('high')  # as train.py does
if threads:
    torch.set_num_threads(threads)
    os.environ['OMP_NUM_THREADS'] = str(threads)                    # for the processes that are started here
machine = describe_machine(device)
if temperature is None:
    temperature = 0.0 if mode == 'decode' and shape in SHAPES else 0.8
k = SimpleNamespace(**{key: globals()[key] for key in config})      # the knobs, resolved
{'decode': measure_decode, 'quality': measure_quality, 'tasks': measure_tasks, 'train': measure_train,
 'memory': measure_memory, 'plot': measure_plot, 'ladder': measure_ladder, 'table': measure_table}[mode]()
