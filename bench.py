"""
How fast it decodes, and against what. Everything is timed in this process, interleaved: each row once, then each again, medians at the end.

    python bench.py --mode=decode                                        # a 1.2M-parameter character model, random weights: seconds
    python bench.py --mode=decode --shape=d12 --formats=f32,int8         # 12 layers, 768, MQA, vocabulary 65,536: minutes
    python bench.py --mode=decode --shape=out-quickstart --drafters=none,ngram --batches=1,4
    python bench.py --mode=decode --peers=True --llama2c=FOLDER          # beside transformers and llama2.c, if they are there

You will see a table, then one line of JSON. The first row is the yardstick: float32, F.linear, a cache, one sequence. What the columns mean:
    x plain    tokens/s over the first row's of the same round; x nocache: over a full forward for every token, as without a cache
    first ms   from the prompt to its first token
    GB/s       bytes of weights that a pass of trunk and lm_head reads (of wte only its rows; what a drafter reads is not counted) times passes/s;
               % memory: of the rate at which these threads sum a 512 MiB buffer. Above 100 the weights come from a cache, not from memory
    rows       time of a cached pass over 2, 4, 5, 8 tokens of one sequence, over the time of a pass over 1: what checking drafts costs
    tok/verify tokens that a pass of the model settled, per sequence; 1 without drafts
Every row must produce the text of its format's plain row, or part from it only at a tie (logits within 1e-4); if one does not, the
numbers are printed all the same, but the status is 1. Peers run in processes of their own, each right after a fresh one of ours, and
their ratio is to that; llama2.c starts at its first token where the others have read the prompt, which flatters it a little.
"""
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from data.tokenizer import from_meta
from engine import DRAFTERS, Engine, KVCache, Noise
from model import GPT, GPTConfig, check_device, check_knobs, load_model
from quantize import convert, for_decoding, load

SHAPES = {
    'tiny': dict(n_layer=3, n_head=4, n_embd=192, n_hidden=384, vocab_size=65, block_size=256),
    'd12': dict(n_layer=12, n_head=6, n_embd=768, use_mqa=True, vocab_size=65536, block_size=1024)}
FORMATS = ('f32', 'f32-fused', 'f32-compiled', 'int8', 'int8-fused', 'int8-compiled')
HEADS = {'head': 'draft', 'mtp': 'multi_token'}         # drafters that need a head -> the model's name for it
ROWS = (1, 2, 4, 5, 8)

# -----------------------------------------------------------------------------
mode = 'decode'
shape = 'tiny'              # tiny or d12, with random weights; or the out_dir of a trained model
formats = 'f32,int8'        # also with -fused (q, k, v in one product, as sample.py runs) and -compiled (fused, torch.compile: minutes at first)
drafters = 'none'           # none, head, mtp, ngram, random; none is always measured
batches = '1'               # sequences decoded together
draft_n = 4                 # at most so many drafts at a time
prompt_tokens = 64          # random ids; a trained model writes its own prompts
new_tokens = 128
rounds = 5
temperature = None          # None: 0 for random weights, 0.8 for a trained model
recompute = True            # measure decoding without a cache, too
peers = False               # measure transformers (pip install transformers) and llama2.c, too
llama2c = ''                # folder with llama2.c's binaries run and runq, or the path of one of them
seed = 1337
device = 'cuda' if torch.cuda.is_available() else 'cpu'
threads = 0                 # CPU threads; 0: PyTorch's own choice
peer = ''                   # not for you: what a child process of --peers=True measures
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())


def fail(message):
    raise SystemExit(f'error: {message}')


def names(knob, known):
    """The comma list in a knob; every item must be known."""
    items = list(dict.fromkeys(filter(None, config[knob].replace(' ', '').split(','))))
    for item in items:
        if item not in known:
            fail(f"{knob} ({item}) must be of {', '.join(known)}")
    return items or fail(f'{knob} is empty: give at least one')


if mode != 'decode':
    fail(f'mode ({mode}) must be decode: there is no other yet')
check_knobs(config, ('prompt_tokens new_tokens rounds draft_n', int, 1, math.inf), ('threads', int, 0, math.inf), ('seed', int, -math.inf, math.inf),
            ('temperature', float, 0, math.inf), may_be_none='temperature')
check_device(device)
formats, drafters = names('formats', FORMATS), ['none'] + [d for d in names('drafters', ('none', *DRAFTERS)) if d != 'none']
if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', batches):
    fail(f'batches ({batches}) must be numbers from 1 on, like 1,4,16')
batches = sorted({int(b) for b in batches.split(',')})
trained = shape not in SHAPES
if trained and not os.path.isdir(shape):
    fail(f"shape ({shape}) must be {', '.join(SHAPES)}, or the out_dir of a trained model")
if temperature is None:
    temperature = 0.8 if trained else 0.0
if threads:
    torch.set_num_threads(threads)

# -----------------------------------------------------------------------------
# the model, in a format

def build(shape, format):
    """shape in a format -> an Engine. Random weights are the same in every format, with the heads that drafters ask for."""
    weights, _, how = format.partition('-')
    if trained:
        best, int8 = os.path.join(shape, 'best.pt'), os.path.join(shape, 'int8.safetensors')
        fresh = os.path.exists(int8) and (not os.path.exists(best) or os.path.getmtime(int8) >= os.path.getmtime(best))
        model = load(int8, device)[0] if weights == 'int8' and fresh else load_model(best, device)[0]
        fresh = fresh and weights == 'int8'
    else:
        heads = {'draft_n': 4 * ('head' in drafters), 'multi_token_n': 3 * ('mtp' in drafters)}
        model, fresh = GPT(GPTConfig(**SHAPES[shape], **heads)), False
        noise = torch.Generator().manual_seed(seed)
        for p in model.parameters():            # not the usual zeros: every path must have work to do
            torch.nn.init.normal_(p, std=0.05, generator=noise)
        model = model.to(device)
    if weights == 'int8' and not fresh:
        model = convert(model)
    return Engine(for_decoding(model) if how else model, compile=how == 'compiled')


def bytes_per_pass(model):
    """Bytes of the weights that one pass of trunk and lm_head over one token reads: all of their tensors, packed ones too, and a row of wte."""
    def nbytes(*parts):
        tensors = [t for m in parts for n in m.modules() for t in (*n._parameters.values(), *n._buffers.values(), *vars(n).values()) if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    return nbytes(model.transformer.h, model.lm_head) + nbytes(model.transformer.wte) // model.config.vocab_size

# -----------------------------------------------------------------------------
# what is timed

def decode(engine, drafter='none', batch=1):
    """Texts of the first batch prompts, and the engine's stats with rate (tokens/s after the prompt has been read) added."""
    texts = engine.complete(prompts[:batch], new_tokens, temperature=temperature, seed=seed, drafter=None if drafter == 'none' else drafter, draft_n=draft_n)
    s = engine.stats
    return texts, s | {'rate': s['tokens'] / (s['seconds'] - s['prefill_seconds'])}


@torch.inference_mode()
def passes(engine, cache, repeats=5):
    """Seconds of a cached pass, to the next token, over each of ROWS tokens of one sequence: lists of repeats times."""
    start, ids, out = cache.lengths, torch.tensor([prompts[0][:1] * max(ROWS)], device=device), {n: [] for n in ROWS}
    for _ in range(repeats):
        for n in ROWS:
            clock = time.perf_counter()
            engine.model.logits(engine.model.trunk(ids[:, :n], cache)).argmax(dim=-1).tolist()
            out[n].append(time.perf_counter() - clock)
            cache.rewind(start)
    return out


@torch.inference_mode()
def without_cache(engine, text):
    """Tokens/s of a forward over everything so far for each token, at up to 16 places spread over the text."""
    ids, n = torch.tensor([prompts[0] + text], device=device), min(16, len(text))
    clock = time.perf_counter()
    for i in range(n):
        end = len(prompts[0]) + i * len(text) // n
        engine.model.logits(engine.model.trunk(ids[:, :end])[:, -1:]).argmax(dim=-1).tolist()
    return n / (time.perf_counter() - clock)


def bandwidth():
    """Bytes/s of memory that these threads read."""
    clock = time.perf_counter()
    big.sum().item()
    return big.nbytes / (time.perf_counter() - clock)


@torch.inference_mode()
def gap(engine, row, expected, n, token):
    """By how much the expected token n of a row beat this one."""
    ids = prompts[row] + expected[:n]
    logits = engine.model(torch.tensor([ids], device=device))[0, -1]
    if temperature:
        logits = logits + temperature * Noise(seed, engine.config.vocab_size, device)([row], [len(ids)], 1)[0, 0]
    return abs(logits[expected[n]] - logits[token]).item()

# -----------------------------------------------------------------------------
# peers: a Llama of as many parameters, since its gated MLP has three matrices where ours has two

def llama_hidden(c):
    return max(64, round(2 * c.n_hidden / 3 / 64) * 64)             # llama2.c's groups of 64 must divide it


def transformers_rate(c, dtype):
    """-> tokens/s after the first one, parameters. Hugging Face's generate, greedy, with its cache."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=c.n_embd, intermediate_size=llama_hidden(c), num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
        vocab_size=c.vocab_size, max_position_embeddings=c.block_size, tie_word_embeddings=c.tie_weights, bos_token_id=None, eos_token_id=None, pad_token_id=0)).to(dtype).eval()

    class Clock:                                                     # generate() calls it with the prompt, then with every token
        def __init__(self): self.times = []
        def put(self, ids): self.times.append(time.perf_counter())
        def end(self): pass

    for clock in (Clock(), Clock()):                                 # the first is the warm-up
        ids = torch.tensor(prompts[:1])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens + 1, do_sample=False, streamer=clock)
    assert len(clock.times) == new_tokens + 2, f'{len(clock.times)} calls for {new_tokens + 1} tokens'
    return new_tokens / (clock.times[-1] - clock.times[1]), sum(p.numel() for p in model.parameters())


def llama2c_files(folder, c):
    """Random weights in llama2.c's formats: version 0 (float32), version 2 (int8, a scale per 64), and a tokenizer. Returns the parameters."""
    noise = np.random.default_rng(seed)
    L, D, H, V, KV = c.n_layer, c.n_embd, llama_hidden(c), c.vocab_size, c.n_kv_head * c.head_dim
    layers = [D * D, KV * D, KV * D, D * D], [H * D] * 3             # wq wk wv wo, w1 w2 w3
    head = [] if c.tie_weights else [V * D]
    header = [D, H, L, c.n_head, c.n_kv_head, V, c.block_size]

    def floats(n):
        return noise.standard_normal(n, dtype=np.float32) * np.float32(0.05)

    def table(values):                                               # (V * D,): token 1 would end the text; with a row of zeros it never wins
        values[D:2 * D] = 0
        return values

    ones = np.ones(L * D, np.float32)
    with open(f'{folder}/f32.bin', 'wb') as f:
        f.write(struct.pack('<7i', *header[:5], V if c.tie_weights else -V, c.block_size))
        table(floats(V * D)).tofile(f)
        for group in layers:
            ones.tofile(f)                                           # the norm before attention, before the MLP
            for n in group:
                floats(L * n).tofile(f)
        ones[:D].tofile(f)
        np.zeros(c.block_size * c.head_dim, np.float32).tofile(f)    # once the rotary tables, now skipped
        for n in head:
            table(floats(n)).tofile(f)
    with open(f'{folder}/int8.bin', 'wb') as f:
        f.write(struct.pack('<Ii7iBi', 0x616b3432, 2, *header, c.tie_weights, 64).ljust(256, b'\0'))
        np.ones((2 * L + 1) * D, np.float32).tofile(f)
        for n in [V * D] + [n for group in layers for n in group for _ in range(L)] + head:
            q = noise.integers(-127, 128, n, np.int8)
            (table(q) if n == V * D else q).tofile(f)
            np.full(n // 64, 0.05 / 73, np.float32).tofile(f)        # 73: the deviation of such integers
    with open(f'{folder}/tokenizer.bin', 'wb') as f:
        f.write(struct.pack('i', 1) + struct.pack('<fi1s', 0.0, 1, b'a') * V)
    return V * D + sum(head) + L * sum(map(sum, layers)) + (2 * L + 1) * D


def llama2c_rate(binary, folder, format):
    """-> tokens/s as it reports them; greedy, over as many places as the others reach."""
    out = subprocess.run([binary, f'{folder}/{format}.bin', '-z', f'{folder}/tokenizer.bin', '-t', '0', '-n', str(prompt_tokens + new_tokens)],
                         env=os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())}, capture_output=True, text=True, errors='replace')
    found = re.search(r'achieved tok/s: ([\d.]+)', out.stderr)
    return float(found[1]) if found else fail(f'{binary} reported no speed, status {out.returncode}: {out.stderr.strip()[-200:]}')


def child(what):
    """What a fresh process of this script measures -> {'tok_s', 'params'}."""
    knobs = dict(shape=shape, prompt_tokens=prompt_tokens, new_tokens=new_tokens, temperature=temperature, seed=seed, device=device, threads=torch.get_num_threads())
    out = subprocess.run([sys.executable, __file__, f'--peer={what}', *(f'--{k}={v}' for k, v in knobs.items())], capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1]) if out.returncode == 0 else fail(f"the process for {what} ended with status {out.returncode}: {out.stderr.strip().splitlines()[-1]}")


def measure_peers(c):
    """Rows of what is present, and of our plain decoder in a process of its own."""
    found, rows = [], []
    if importlib.util.find_spec('transformers'):
        found += [('transformers', 'f32', None), ('transformers', 'bf16', None)]
    else:
        print('transformers is absent: pip install transformers', file=sys.stderr)
    if not llama2c:
        print('llama2.c is not measured: build its run and runq, and name their folder with --llama2c=', file=sys.stderr)
    found += [('llama2.c', format, binary) for format, binary in binaries.items()]
    with tempfile.TemporaryDirectory() as folder:
        params = llama2c_files(folder, c) if binaries else None
        ours, theirs, ratios = [], {}, {}
        for r in range(rounds):
            for decoder, format, binary in found:
                plain = child('picochat-f32')
                got = {'tok_s': llama2c_rate(binary, folder, format), 'params': params} if binary else child(f'{decoder}-{format}')
                ours.append(plain['tok_s'])
                theirs.setdefault((decoder, format, got['params']), []).append(got['tok_s'])
                ratios.setdefault((decoder, format), []).append(got['tok_s'] / plain['tok_s'])
            print(f'peers, round {r + 1} of {rounds}', file=sys.stderr)
    if found:
        rows.append({'decoder': 'fresh process', 'format': 'f32', 'tok_s': statistics.median(ours), 'ratio_plain_f32': 1.0, 'params': plain['params']})
    for (decoder, format, params), rates in theirs.items():
        rows.append({'decoder': decoder, 'format': format, 'tok_s': statistics.median(rates), 'ratio_plain_f32': statistics.median(ratios[decoder, format]), 'params': params})
    return rows

# -----------------------------------------------------------------------------
# what will run, checked before anything is timed

baseline = build(shape, 'f32')
c, longest = baseline.config, prompt_tokens + new_tokens
if longest > c.block_size:
    fail(f'prompt_tokens ({prompt_tokens}) + new_tokens ({new_tokens}) do not fit the context of {c.block_size}: lower them')
for drafter in drafters:
    if drafter in HEADS and not hasattr(baseline.model, HEADS[drafter]):
        fail(f'drafter ({drafter}) needs a model with a {HEADS[drafter]} head, which {shape} has not: train one with --{HEADS[drafter]}_n=4, or draft with ngram')
if trained:                                     # from the token before any text, or the first of the vocabulary, where a newline mostly is
    first = from_meta(load_model(os.path.join(shape, 'best.pt'))[1]['tokenizer']).bos or 0
    prompts = [[first] + text for text in baseline.complete([[first]], prompt_tokens - 1, temperature=0.8, num_samples=max(batches), seed=seed + 1)]
else:
    prompts = torch.randint(c.vocab_size, (max(batches), prompt_tokens), generator=torch.Generator().manual_seed(seed)).tolist()
if peer:
    decoder, format = peer.split('-')
    if decoder == 'transformers':
        rate, params = transformers_rate(c, {'f32': torch.float32, 'bf16': torch.bfloat16}[format])
    else:
        decode(baseline)
        rate, params = decode(baseline)[1]['rate'], baseline.model.params()['total']
    print(json.dumps({'tok_s': rate, 'params': params}))
    sys.exit()
binaries = {}
if llama2c and not peers:
    fail('llama2c is given: add --peers=True to measure it')
if peers:
    if device != 'cpu' or c.n_head * c.head_dim != c.n_embd:
        fail(f'peers run on the CPU, on shapes whose heads make up n_embd: give --device=cpu, or another shape' )
    here = llama2c if os.path.isdir(llama2c) else os.path.dirname(llama2c)
    binaries = {format: os.path.join(here, name) for format, name in (('f32', 'run'), ('int8', 'runq'))} if llama2c else {}
    for binary in binaries.values():
        if not os.path.isfile(binary):
            fail(f'no {binary}: build it in a copy of github.com/karpathy/llama2.c with gcc -Ofast -fopenmp -march=native -o run run.c -lm, and runq likewise')
    if abs(llama_hidden(c) * 3 - c.n_hidden * 2) * c.n_embd * c.n_layer > 0.02 * baseline.model.params()['total']:
        fail(f'no Llama of {llama_hidden(c)} hidden is within 2 % of the parameters of n_hidden ({c.n_hidden}): choose another shape')

# -----------------------------------------------------------------------------
# rounds

engines = {'f32': baseline} | {f: build(shape, f) for f in formats if f != 'f32'}
todo = list(dict.fromkeys([('f32', 'none', 1)] + [(f, d, b) for f in formats for d in drafters for b in batches]))
texts, parted = {}, []                          # a format's texts by row; the rows that did not produce them
runs, costs, slow, memory = {t: [] for t in todo}, {f: {n: [] for n in ROWS} for f in engines}, [], []
caches = {f: KVCache(c, 1, prompt_tokens + max(ROWS), device=device) for f in engines if not f.endswith('compiled')}
for f, cache in caches.items():
    engines[f].prefill(cache, [prompts[0][:c.block_size - max(ROWS)]])
big = torch.ones(2**27, device=device)          # 512 MiB, written: untouched pages would all be one page of zeros
for r in range(rounds + 1):                     # round 0 warms up
    for f, drafter, batch in todo:
        text, stats = decode(engines[f], drafter, batch)
        known = texts.setdefault(f, [])
        for row, (got, expected) in enumerate(zip(text, known)):
            n = next((i for i in range(new_tokens) if got[i] != expected[i]), None)
            if n is not None and (difference := gap(engines[f], row, expected, n, got[n])) > 1e-4:
                parted.append(f'format {f}, drafter {drafter}, batch {batch}, sequence {row}: token {n} is {got[n]}, not {expected[n]}, whose logit is {difference:.2g} away')
        known += text[len(known):]
        runs[f, drafter, batch] += [stats]
    for f, cache in caches.items():
        for n, seconds in passes(engines[f], cache).items():
            costs[f][n] += seconds
    slow += [without_cache(baseline, texts['f32'][0])] if recompute else []
    memory += [bandwidth()]
    print('warm' if r == 0 else f'round {r} of {rounds}', file=sys.stderr)
del big

# -----------------------------------------------------------------------------
# the report

def median(values):
    return statistics.median(list(values)[1:])  # without round 0


KEYS = ('decoder shape format drafter batch tok_s tok_s_rounds ratio_plain_f32 ratio_recompute first_token_ms gb_s share_of_bandwidth rows_cost '
        'tokens_per_verify accepted kv_bytes_per_token weight_bytes params').split()
empty = dict.fromkeys(KEYS) | {'shape': shape, 'drafter': 'none', 'batch': 1}
plain, rows = [s['rate'] for s in runs['f32', 'none', 1]], []
for (f, drafter, batch), run in runs.items():
    rate, model, drafting = [s['rate'] for s in run], engines[f].model, drafter != 'none'
    size, seconds = bytes_per_pass(model), {n: statistics.median(t[5:]) for n, t in costs[f].items() if t}
    gb_s = median(s['passes'] * size / (s['seconds'] - s['prefill_seconds']) for s in run) / 1e9
    accepted = [sum(n) for n in zip(*(s['accepted'] for s in run[1:]))]
    rows.append(empty | {
        'decoder': 'picochat', 'format': f, 'drafter': drafter, 'batch': batch, 'tok_s': median(rate), 'tok_s_rounds': rate[1:],
        'ratio_plain_f32': median(a / b for a, b in zip(rate, plain)), 'ratio_recompute': median(a / b for a, b in zip(rate, slow)) if slow else None,
        'first_token_ms': 1000 * median(s['first_seconds'] for s in run), 'gb_s': gb_s, 'share_of_bandwidth': gb_s * 1e9 / median(memory),
        'rows_cost': {str(n): seconds[n] / seconds[1] for n in ROWS[1:]} if seconds else None,
        'tokens_per_verify': sum(s['tokens'] for s in run[1:]) / sum(accepted) if drafting else 1.0, 'accepted': accepted if drafting else None,
        'kv_bytes_per_token': model.kv_bytes_per_token(), 'weight_bytes': size, 'params': baseline.model.params()['total']})
if slow:
    rows.append(empty | {'decoder': 'no cache', 'format': 'f32', 'tok_s': median(slow), 'tok_s_rounds': slow[1:], 'ratio_plain_f32': median(a / b for a, b in zip(slow, plain)),
                         'ratio_recompute': 1.0, 'params': rows[0]['params']})
engines = caches = cache = baseline = model = None      # the children get the memory
if peers:
    rows += [empty | row for row in measure_peers(c)]

table = [['decoder', 'format', 'drafter', 'batch', 'tok/s', 'x plain', 'x nocache', 'first ms', 'GB/s', '% memory', 'rows 2 4 5 8', 'tok/verify', 'MB a pass']]
for row in rows:
    def show(key, form, factor=1):
        return '-' if row[key] is None else form.format(factor * row[key])
    table.append([row['decoder'], row['format'], row['drafter'], str(row['batch']), show('tok_s', '{:,.1f}'), show('ratio_plain_f32', '{:.2f}'), show('ratio_recompute', '{:.2f}'),
                  show('first_token_ms', '{:.1f}'), show('gb_s', '{:.2f}'), show('share_of_bandwidth', '{:.0f}', 100), ' '.join(f'{x:.2f}' for x in (row['rows_cost'] or {}).values()) or '-',
                  show('tokens_per_verify', '{:.2f}'), show('weight_bytes', '{:.2f}', 1e-6)])
widths = [max(map(len, column)) for column in zip(*table)]
for line in table:
    print('  '.join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))
if device == 'cpu':
    cpuinfo = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    name = (re.findall(r'model name\s*: (.*)', cpuinfo) or [platform.processor() or platform.machine()])[0]
else:
    name = torch.cuda.get_device_name(device)
print(json.dumps({'mode': mode, 'machine': {'cpu' if device == 'cpu' else 'gpu': name, 'threads': torch.get_num_threads(), 'torch': torch.__version__},
                  'bandwidth_gb_s': median(memory) / 1e9, 'rows': rows}))
if parted:
    fail('another text than the plain row: ' + '; '.join(parted))
