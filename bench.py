"""
Measures, one thing a mode. Here is how fast it decodes, and against what: everything is timed in this process, interleaved; medians.

    python bench.py --mode=decode                                        # the quick start's shape, random weights: seconds
    python bench.py --mode=decode --shape=d12                            # 12 layers, 768, MQA, vocabulary 65,536: minutes
    python bench.py --mode=decode --shape=out-quickstart --drafters=none,ngram --batches=1,4
    python bench.py --mode=decode --peers=True --llama2c=FOLDER          # beside transformers and llama2.c, if they are there
    python bench.py --mode=quality --shape=out-quickstart                # loss of each format, and of an int8 cache, on the validation split

You will see a table, then one line of JSON. The first row is the yardstick: float32, F.linear, a cache, one sequence. The columns:
    x plain     tokens/s over the yardstick's in the same round; x nocache: over a whole forward for every token
    first ms    from the prompt to its first token
    GB/s        weights that a pass of trunk and lm_head reads (of wte its row; what drafters read is not counted) times passes/s
    % memory    that, of the rate at which these threads read 512 MiB; a small model's weights come from a cache, so it may exceed 100
    rows        a cached pass over 2, 4, 5, 8 tokens of a sequence, over a pass over 1: what it costs to check drafts
    tok/verify  tokens that a pass settled, per sequence
Every row must give the text of its format's plain row, or part from it at a tie (scores within 1e-4); if one does not, the numbers
are printed all the same, but the status is 1. Peers run in processes of their own, each right after a fresh one of ours, to which
their ratio is (tests/peers.py).
"""
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from data.loader import Loader
from data.tokenizer import from_meta
from engine import DRAFTERS, HEADS, Engine, KVCache, Noise
from model import GPT, GPTConfig, can_compile, check_device, check_knobs, evaluate, load_checkpoint, load_model
from quantize import PackedInt8Linear, convert, export, for_decoding, load

SHAPES = {
    'tiny': dict(n_layer=3, n_head=4, n_embd=192, n_hidden=384, vocab_size=65, block_size=256),
    'd12': dict(n_layer=12, n_head=6, n_embd=768, use_mqa=True, vocab_size=65536, block_size=1024)}
FORMATS = ('f32', 'f32-packed', 'f32-compiled', 'bf16-packed', 'f16-packed', 'int8', 'int8-packed', 'int8-compiled', 'int4', 'int4-packed', 'int4-compiled', 'int4-bf16', 'int4-bf16-compiled')
LENGTHS = (1, 2, 4, 5, 8)                               # tokens in a pass, for rows_cost

# -----------------------------------------------------------------------------
mode = 'decode'             # decode, quality
# decode and quality: the model
shape = 'tiny'              # tiny or d12, with random weights; or the out_dir of a trained model
formats = 'f32,int8,int8-packed'    # f32, int8, int4; -packed (also bf16-, f16-): as sample.py runs it; -compiled: with its --compile=True, a minute for each; int4-bf16: 4 bits in memory
# decode
drafters = 'none'           # none, head, mtp, ngram, random; none is always measured
batches = '1'               # sequences decoded together, like 1,4,16
draft_n = 4                 # at most so many drafts at a time
prompt_tokens = 64          # random ids; a trained model writes its own prompts
new_tokens = 128
rounds = 5
temperature = None          # None: 0 for random weights, 0.8 for a trained model
recompute = True            # measure decoding without a cache, too
memory = True               # and what an int8 process takes of it, beyond one that has decoded something (Linux, CPU)
peers = False               # measure transformers (pip install transformers) and llama2.c, too
llama2c = ''                # folder of llama2.c's binaries run and runq, or the path of one of them
# the machine
seed = 1337
device = 'cuda' if torch.cuda.is_available() else 'cpu'
threads = 0                 # CPU threads; 0: PyTorch's own choice
child = ''                  # private: what a process started by this script measures
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())


def fail(message):
    raise SystemExit(f'error: {message}')


check_knobs(config, ('threads', int, 0, math.inf), ('seed', int, -math.inf, math.inf))
check_device(device)
if threads:
    torch.set_num_threads(threads)
cpuinfo = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
machine = {'cpu': (re.findall(r'model name\s*: (.*)', cpuinfo) or [platform.processor() or platform.machine()])[0]}
machine |= {'gpu': torch.cuda.get_device_name(device)} if device.startswith('cuda') else {}
machine |= {'threads': torch.get_num_threads(), 'torch': torch.__version__}


def report(table, **document):
    """Lines of text cells -> a table, the first three columns to the left; then everything as one line of JSON, numbers to seven digits."""
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print('  '.join(text.ljust(w) if i < 3 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))))
    document = {'mode': mode, 'machine': machine, **document}
    print(json.dumps(json.loads(json.dumps(document), parse_float=lambda x: float(f'{float(x):.7g}'))))


def start(*files, **knobs):
    """Runs a script and its flags (the knobs, by name) in a process of its own -> the JSON document that its output ends with; if it fails, its last line is ours."""
    got = subprocess.run([sys.executable, *files, *(f'--{k}={v}' for k, v in knobs.items())], capture_output=True, text=True)
    if got.returncode:
        fail(f"{files[0]}: {(got.stderr.strip() or f'status {got.returncode}').splitlines()[-1].removeprefix('error: ')}")
    print(got.stderr, end='', file=sys.stderr)
    return json.loads(got.stdout.splitlines()[-1])


def median(values):
    return statistics.median(list(values)[1:])  # without round 0

# -----------------------------------------------------------------------------
# --mode=decode and quality: the model, in a format

def listed(knob, known):
    items = list(dict.fromkeys(config[knob].replace(' ', '').split(',')))
    wrong = [item for item in items if item not in known]
    return fail(f"{knob} ({config[knob]}) must be of {', '.join(known)}; {wrong[0]!r} is not") if wrong else items


if mode in ('decode', 'quality'):
    check_knobs(config, ('prompt_tokens new_tokens rounds draft_n', int, 1, math.inf), ('temperature', float, 0, math.inf), may_be_none='temperature')
    formats, drafters = listed('formats', FORMATS), list(dict.fromkeys(['none'] + listed('drafters', DRAFTERS)))
    if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', batches):
        fail(f'batches ({batches}) must be numbers from 1 on, like 1,4,16')
    batches = sorted({int(b) for b in batches.split(',')})
    if shape not in SHAPES and not os.path.isdir(shape):
        fail(f"shape ({shape}) must be {', '.join(SHAPES)}, or the out_dir of a trained model")
    if shape in SHAPES and mode == 'quality':
        fail(f'shape ({shape}) has random weights, and quality is that of a trained model: give its out_dir')
    if temperature is None:
        temperature = 0.0 if shape in SHAPES else 0.8


def build(shape, format):
    """-> an Engine. Random weights are the same in every format, with the heads that the drafters need; a trained model has its own."""
    weights, _, how = format.partition('-')
    if shape in SHAPES:
        noise = torch.Generator().manual_seed(seed)
        model = GPT(GPTConfig(**SHAPES[shape], draft_n=4 * ('head' in drafters), multi_token_n=3 * ('mtp' in drafters)))
        for p in model.parameters():            # none of the usual zeros: every path must have work to do
            torch.nn.init.normal_(p, std=0.05, generator=noise)
        model = model.to(device)
    else:
        best, integers = os.path.join(shape, 'best.pt'), os.path.join(shape, f'{weights}.safetensors')
        if os.path.exists(integers) and os.path.getmtime(integers) >= os.path.getmtime(best):
            model = load(integers, device)[0]
        else:                                   # an older file of integers may be of an earlier training
            model = load_model(best, device)[0]
    if weights in ('int8', 'int4') and not hasattr(model, 'rounding'):
        model = convert(model, int(weights[3:]))
    pack = {'f32-packed': torch.float32, 'bf16-packed': torch.bfloat16, 'f16-packed': torch.float16, 'int4-bf16': torch.bfloat16}.get(format.removesuffix('-compiled'))
    return Engine(for_decoding(model, pack) if how else model, compile=how.endswith('compiled') and can_compile(device))


def bytes_per_pass(model):
    """Bytes of weights that one pass of trunk and lm_head over one token reads: all their tensors, packed ones too, and a row of wte."""
    def nbytes(*parts):
        tensors = [t for part in parts for m in part.modules() for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values()) if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    return nbytes(model.transformer.h, model.lm_head) + nbytes(model.transformer.wte) // model.config.vocab_size


def measure_quality():
    state = load_checkpoint(os.path.join(shape, 'best.pt'))
    tokenizer, rows = from_meta(state['tokenizer']), []
    for f in formats:
        model = build(shape, f).model
        c = model.config
        loader = Loader(os.path.join('data', state['dataset']), 'val', 16, c.block_size, device=device)
        for dtype in (torch.float32, torch.int8):
            make_cache = lambda batch: KVCache(c, batch, dtype=dtype, device=device)
            result = evaluate(model, loader.eval_batches(), tokenizer.token_bytes, make_cache)
            one = make_cache(1)
            rows.append({'shape': shape, 'format': f, 'cache': str(dtype).removeprefix('torch.'), 'val_loss': result['loss'], 'val_bpb': result['bpb'],
                         'kv_bytes_per_token': one.nbytes() / one.size})
    report([['format', 'cache', 'nats', 'bits/byte', 'cache bytes a token']] +
           [[r['format'], r['cache'], f"{r['val_loss']:.5f}", f"{r['val_bpb']:.5f}", f"{r['kv_bytes_per_token']:,.0f}"] for r in rows], rows=rows)

# -----------------------------------------------------------------------------
# --mode=decode: what is timed

prompts, texts, parted = [], {}, []             # of each sequence; of each format, by sequence; what is wrong


def decode(engine, drafter='none', batch=1):
    """-> texts of the first batch prompts, and the engine's stats with its tokens/s and passes/s once the prompt is read."""
    text = engine.complete(prompts[:batch], new_tokens, temperature=temperature, seed=seed, drafter=drafter, draft_n=draft_n)
    s = engine.stats
    seconds = s['seconds'] - s['prefill_seconds']
    return text, s | {'tok_s': s['tokens'] / seconds, 'passes_s': s['passes'] / seconds}


@torch.inference_mode()
def pass_seconds(engine, cache):
    """-> {n: seconds} of a cached pass, up to the most probable tokens, over n tokens of one sequence."""
    start, ids, times = cache.lengths, torch.tensor([prompts[0][:1] * max(LENGTHS)], device=device), {n: [] for n in LENGTHS}
    for n in LENGTHS * 5:
        clock = time.perf_counter()
        engine.model.logits(engine.model.trunk(ids[:, :n], cache)).argmax(dim=-1).tolist()
        times[n].append(time.perf_counter() - clock)
        cache.rewind(start)
    return {n: statistics.median(t) for n, t in times.items()}


@torch.inference_mode()
def without_cache(engine, text):
    """-> tokens/s with a forward over everything so far for each token, at up to 16 places spread over the text."""
    ids, n = torch.tensor([prompts[0] + text], device=device), min(16, len(text))
    clock = time.perf_counter()
    for i in range(n):
        x = engine.model.trunk(ids[:, :prompt_tokens + i * len(text) // n])
        engine.model.logits(x[:, -1:]).argmax(dim=-1).tolist()
    return n / (time.perf_counter() - clock)


def bandwidth(big):
    """-> bytes/s at which these threads read memory: the faster of a sum and a matrix-vector product, as neither is everywhere."""
    times, m = [], big.view(-1, 8192)
    for read in (big.sum, lambda: m @ m[0]):
        clock = time.perf_counter()
        read().amax().item()                    # .item() waits for a GPU
        times.append(time.perf_counter() - clock)
    return big.nbytes / min(times)


@torch.inference_mode()
def difference(engine, row, expected, got):
    """What is wrong with a row's text, or None if it is the expected one, or parts from it where two tokens' scores are within 1e-4."""
    if got == expected:
        return None
    n = next(i for i in range(new_tokens) if got[i] != expected[i])
    score = engine.model(torch.tensor([prompts[row] + expected[:n]], device=device))[0, -1]
    if temperature:
        score = score + temperature * Noise(seed, score.numel(), device)([row], [prompt_tokens + n], 1)[0, 0]
    gap = abs(score[expected[n]] - score[got[n]]).item()
    return f'sequence {row}: token {n} is {got[n]}, not {expected[n]}, and their scores differ by {gap:.2g}' if gap > 1e-4 else None


def memory_taken(path):
    """-> {'memory_bytes': how much this process grows by loading the int8 file at path and decoding with it, 'file_bytes', 'cache_bytes'}."""
    def resident():
        with open('/proc/self/statm') as f:
            return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    small = for_decoding(convert(GPT(GPTConfig(block_size=64, vocab_size=PackedInt8Linear.ROWS, n_layer=1, n_head=1, n_embd=64))))
    Engine(small).complete([[1] * 4], 8)                            # what the libraries take for themselves is taken
    before = resident()
    engine = Engine(for_decoding(load(path)[0]))
    for step in engine.generate([[1] * prompt_tokens], new_tokens, temperature=temperature, seed=seed):
        grown = resident() - before
    size, cache = os.path.getsize(path), KVCache(engine.config, 1, prompt_tokens + new_tokens).nbytes()
    return {'memory_bytes': grown, 'file_bytes': size, 'cache_bytes': cache, 'memory_ratio': grown / (size + cache)}


def measure_decode():
    if child:
        return print(json.dumps(memory_taken(child)))
    plain = build(shape, 'f32')
    c, params = plain.config, plain.model.params()['total']
    if prompt_tokens + new_tokens > c.block_size:
        fail(f'prompt_tokens ({prompt_tokens}) + new_tokens ({new_tokens}) do not fit the context of {c.block_size}: lower them')
    for drafter in drafters:
        if drafter in HEADS and not hasattr(plain.model, HEADS[drafter]):
            fail(f'drafter ({drafter}) needs a model with a {HEADS[drafter]} head, which {shape} has not: train one with --{HEADS[drafter]}_n=4, or draft with ngram')
    if shape in SHAPES:
        prompts[:] = torch.randint(c.vocab_size, (max(batches), prompt_tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    else:                                       # from the token before any text, or the first of the vocabulary, where a newline mostly is
        first = from_meta(load_model(os.path.join(shape, 'best.pt'))[1]['tokenizer']).bos or 0
        prompts[:] = [[first] + text for text in plain.complete([[first]], prompt_tokens - 1, temperature=0.8, num_samples=max(batches), seed=seed + 1)]
    if llama2c and not peers:
        fail(f'llama2c ({llama2c}) is measured with --peers=True')
    if peers and device != 'cpu':
        fail(f'peers are measured on --device=cpu, not on {device}')
    others = {'rows': []}
    if peers:                                   # first, as they may refuse
        their_shape = {k: getattr(c, k) for k in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_hidden', 'vocab_size', 'block_size', 'tie_weights')}
        others = start('tests/peers.py', **their_shape, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, llama2c=llama2c, seed=seed, threads=torch.get_num_threads())

    engines = {'f32': plain} | {f: build(shape, f) for f in formats if f != 'f32'}
    runs = {key: [] for key in [('f32', 'none', 1)] + [(f, d, b) for f in formats for d in drafters for b in batches]}
    costs, slow, rates = {f: [] for f in engines}, [], []
    caches = {f: KVCache(c, 1, prompt_tokens + max(LENGTHS), device=device) for f in engines if not f.endswith('compiled')}
    for f, cache in caches.items():
        engines[f].prefill(cache, [prompts[0][:c.block_size - max(LENGTHS)]])
    big = torch.ones(2**27, device=device)      # 512 MiB, written: pages never touched are all one page of zeros, read from the cache
    for r in range(rounds + 1):                 # round 0 warms up
        for (f, drafter, batch), run in runs.items():
            text, stats = decode(engines[f], drafter, batch)
            known = texts.setdefault(f, [])     # by row; the plain runs come first
            wrong = [difference(engines[f], row, *pair) for row, pair in enumerate(zip(known, text))]
            parted.extend([f'format {f}, drafter {drafter}, batch {batch}, {w}' for w in wrong if w])
            known += text[len(known):]
            run.append(stats)
        for f, cache in caches.items():
            costs[f].append(pass_seconds(engines[f], cache))
        slow += [without_cache(plain, texts['f32'][0])] if recompute else []
        rates.append(bandwidth(big))
        print(f'round {r} of {rounds}' if r else 'warm', file=sys.stderr)

    empty = dict.fromkeys(['decoder', 'shape', 'format', 'drafter', 'batch', 'tok_s', 'tok_s_rounds', 'ratio_plain_f32', 'ratio_recompute', 'first_token_ms', 'gb_s',
                           'share_of_bandwidth', 'rows_cost', 'tokens_per_verify', 'accepted', 'kv_bytes_per_token', 'weight_bytes', 'params',
                           'memory_bytes', 'file_bytes', 'cache_bytes', 'memory_ratio'])
    empty |= {'shape': shape, 'drafter': 'none', 'batch': 1, 'params': params}
    yardstick, rows = [s['tok_s'] for s in runs['f32', 'none', 1]], []
    for (f, drafter, batch), run in runs.items():
        tok_s, size = [s['tok_s'] for s in run], bytes_per_pass(engines[f].model)
        gb_s = size * median(s['passes_s'] for s in run) / 1e9
        accepted = [sum(n) for n in zip(*(s['accepted'] for s in run[1:]))]
        rows.append(empty | {
            'decoder': 'picochat', 'format': f, 'drafter': drafter, 'batch': batch, 'tok_s': median(tok_s), 'tok_s_rounds': tok_s[1:],
            'ratio_plain_f32': median(a / b for a, b in zip(tok_s, yardstick)), 'ratio_recompute': median(a / b for a, b in zip(tok_s, slow)) if slow else None,
            'first_token_ms': 1000 * median(s['first_seconds'] for s in run), 'gb_s': gb_s, 'share_of_bandwidth': gb_s * 1e9 / median(rates),
            'rows_cost': {str(n): median(t[n] / t[1] for t in costs[f]) for n in LENGTHS[1:]} if costs[f] else None,
            'tokens_per_verify': 1.0 if drafter == 'none' else sum(s['tokens'] for s in run[1:]) / sum(accepted), 'accepted': None if drafter == 'none' else accepted,
            'kv_bytes_per_token': plain.model.kv_bytes_per_token(), 'weight_bytes': size})
    if slow:
        rows.append(empty | {'decoder': 'no cache', 'format': 'f32', 'tok_s': median(slow), 'tok_s_rounds': slow[1:], 'ratio_recompute': 1.0,
                             'ratio_plain_f32': median(a / b for a, b in zip(slow, yardstick))})
    plain = engines = caches = cache = big = None   # the other processes get the memory
    if memory and device == 'cpu' and os.path.exists('/proc/self/statm'):
        with tempfile.TemporaryDirectory() as folder:
            export(f'{folder}/int8.safetensors', convert(build(shape, 'f32').model), {})
            rows.append(empty | {'decoder': 'picochat alone', 'format': 'int8-packed'} | start(
                'bench.py', child=f'{folder}/int8.safetensors', prompt_tokens=prompt_tokens, new_tokens=new_tokens, temperature=temperature, seed=seed, device=device, threads=torch.get_num_threads()))
    if others['rows']:
        ours = [rate for row in others['rows'] for rate in row['ours']]
        rows.append(empty | {'decoder': 'picochat alone', 'format': 'f32', 'tok_s': statistics.median(ours), 'tok_s_rounds': ours, 'ratio_plain_f32': 1.0, 'params': others['params']})
    for row in others['rows']:
        rows.append(empty | {k: row[k] for k in ('decoder', 'format', 'tok_s_rounds', 'params')} | {
            'tok_s': statistics.median(row['tok_s_rounds']), 'ratio_plain_f32': statistics.median(a / b for a, b in zip(row['tok_s_rounds'], row['ours']))})

    table = [['decoder', 'format', 'drafter', 'batch', 'tok/s', 'x plain', 'x nocache', 'first ms', 'GB/s', '% memory', 'rows 2 4 5 8', 'tok/verify']]
    for row in rows:
        def cell(key, digits, factor=1):
            return '-' if row[key] is None else f'{factor * row[key]:,.{digits}f}'
        table.append([row['decoder'], row['format'], row['drafter'], str(row['batch']), cell('tok_s', 1), cell('ratio_plain_f32', 2), cell('ratio_recompute', 2), cell('first_token_ms', 1),
                      cell('gb_s', 2), cell('share_of_bandwidth', 0, 100), ' '.join(f'{x:.2f}' for x in (row['rows_cost'] or {}).values()) or '-', cell('tokens_per_verify', 2)])
    for row in rows:
        if row['memory_ratio']:
            print(f"int8-packed takes {row['memory_bytes'] / 2**20:,.1f} MiB of memory, {row['memory_ratio']:.2f} times its file and cache ({row['file_bytes'] / 2**20:,.1f} + {row['cache_bytes'] / 2**20:,.1f})")
    report(table, bandwidth_gb_s=median(rates) / 1e9, rows=rows)
    if parted:
        fail('another text than the plain row: ' + '; '.join(parted))

# -----------------------------------------------------------------------------
# the mode

modes = {'decode': measure_decode, 'quality': measure_quality}
if mode not in modes:
    fail(f"mode ({mode}) must be {', '.join(modes)}: there is no other")
modes[mode]()
