"""
Completes text with a trained model: float, or the int8 file running on its integers. Needs nothing but out_dir.

    python sample.py --out_dir=out-quickstart --start="def main(" --num_samples=3
    python sample.py --out_dir=out-quickstart --start=FILE:prompt.txt --temperature=0.5 --top_k=20
    python sample.py --out_dir=out-quickstart --interactive=True

stdout receives text only; what it cost goes to stderr with --show_stats=True, one JSON document last.
"""
import json
import math
import os
import sys

import torch

from data.loader import read_text
from data.tokenizer import from_meta
from engine import Engine
from model import load_model
from quantize import int_share, load

# -----------------------------------------------------------------------------
out_dir = 'out-quickstart'
weights = 'auto'            # float (best.pt), int8 (int8.safetensors), auto: int8 if there is one
start = '\n'                # the prompt, or FILE:path to read it from a file
num_samples = 1
max_new_tokens = 200
temperature = 0.8           # 0: always the most probable token; 1: the model's own distribution
top_k = None                # only the k most probable tokens
top_p = None                # only the smallest set of tokens that holds this much probability
min_p = None                # only tokens at least this share as probable as the most probable one
stop = ''                   # text to stop before
seed = 1337
slide = False               # go on beyond the context, from its later half
interactive = False         # keep the model loaded and ask for prompts
show_stats = False
device = 'cuda' if torch.cuda.is_available() else 'cpu'
threads = 0                 # CPU threads; 0: PyTorch's own choice
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())

for names, kind, least, most in (               # the configurator knows a knob's type, but not what it counts
        ('num_samples top_k', int, 1, math.inf), ('max_new_tokens threads', int, 0, math.inf), ('seed', int, -math.inf, math.inf),
        ('temperature', float, 0, math.inf), ('top_p min_p', float, 0, 1)):
    for name in names.split():
        value = config[name]
        if not (value is None and name in ('top_k', 'top_p', 'min_p')) and not (type(value) in (int, kind) and least <= value <= most):
            raise SystemExit(f"error: {name} ({value}) must be {'an int' if kind is int else 'a number'} of at least {least}{'' if most == math.inf else f' and at most {most}'}")
try:
    torch.zeros(1, device=device).item()
except (RuntimeError, AssertionError) as e:
    raise SystemExit(f"error: device ({device}) cannot be used here: {str(e).splitlines()[0]}")
if threads:
    torch.set_num_threads(threads)
if weights not in ('auto', 'float', 'int8'):
    raise SystemExit(f"error: weights ({weights}) must be auto, float or int8")
quantised = os.path.join(out_dir, 'int8.safetensors')
path = quantised if weights == 'int8' or (weights == 'auto' and os.path.exists(quantised)) else os.path.join(out_dir, 'best.pt')
model, state = (load if path == quantised else load_model)(path, device)
tokenizer = from_meta(state['tokenizer'])
engine = Engine(model)
how = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, slide=slide)


def encode(text):
    try:
        ids = tokenizer.encode(text)
    except ValueError as e:                     # a character that the vocabulary lacks
        raise SystemExit(f'error: {e}')
    if tokenizer.bos is not None:
        ids = [tokenizer.bos] + ids
    room = model.config.block_size
    if not ids:
        raise SystemExit("error: the prompt is empty: give --start= at least one character")
    if len(ids) > room or (not slide and len(ids) + max_new_tokens > room + 1):
        raise SystemExit(f"error: the prompt's {len(ids)} tokens + max_new_tokens ({max_new_tokens}) do not fit the context of {room}: shorten one of them, or give --slide=True")
    return ids


def complete(ids):
    """Streams one sample; several are decoded together and printed one after the other."""
    if num_samples == 1:
        for piece in engine.stream(tokenizer, ids, max_new_tokens, stop_strings=[stop] if stop else [], seed=seed, **how):
            print(piece, end='', flush=True)
        print()
    else:
        for row in engine.complete([ids], max_new_tokens, num_samples=num_samples, seed=seed, **how):
            text = tokenizer.decode(row)
            print(prompt + (text.partition(stop)[0] if stop else text) + '\n---------------')


if interactive:
    print('Type a prompt, of several lines if you like; a line ### asks for the completion; Ctrl+C leaves.', file=sys.stderr)
    grey, plain = ('\033[90m', '\033[0m') if sys.stdout.isatty() else ('', '')
    try:
        while True:
            lines = []
            for line in sys.stdin:
                if line.rstrip('\n') == '###':
                    break
                lines.append(line)
            else:
                break                           # end of input
            prompt = ''.join(lines)[:-1] or '\n'
            try:
                ids = encode(prompt)
            except SystemExit as e:             # the model stays loaded; only this prompt is refused
                print(e, file=sys.stderr)
                continue
            if num_samples == 1:
                print(f'{grey}{prompt}{plain}', end='')
            complete(ids)
            seed += 1
    except KeyboardInterrupt:
        print()
else:
    prompt = read_text(start[5:]) if start.startswith('FILE:') else start
    ids = encode(prompt)
    if num_samples == 1:
        print(prompt, end='')
    complete(ids)

if show_stats:
    s = {'tokens': 0, 'seconds': 0.0, 'prefill_seconds': 0.0, 'accepted': []} | engine.stats
    n = model.config
    kv = model.kv_bytes_per_token()
    numbers = {'tokens': s['tokens'], 'seconds': round(s['seconds'], 4), 'prefill_seconds': round(s['prefill_seconds'], 4),
               'tok_s': round(s['tokens'] / max(1e-9, s['seconds'] - s['prefill_seconds']), 1), 'tokens_per_verify': s['tokens'] / max(1, sum(s['accepted'])),
               'weights': 'int8' if path == quantised else 'float', 'drafter': 'none', 'file': path, 'bytes': os.path.getsize(path),
               'int_share': int_share(model) if path == quantised else 0.0, 'kv_bytes_per_token': kv, 'device': device}
    print(f"{path}: {numbers['bytes']:,} bytes, {100 * numbers['int_share']:.1f} % int8; {numbers['tok_s']:,} tok/s; {kv:,} bytes of cache a token", file=sys.stderr)
    print(json.dumps(numbers), file=sys.stderr)
