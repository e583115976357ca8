"""
Completes text with a trained model: float, or the int8 or int4 file running on its integers. Needs nothing but out_dir.

    python sample.py --out_dir=out-quickstart --start="def main(" --num_samples=3
    python sample.py --out_dir=out-quickstart --start=FILE:prompt.txt --temperature=0.5 --top_k=20
    python sample.py --out_dir=out-quickstart --interactive=True
    python sample.py --out_dir=out-sft-pydoc --chat=True                # a line is a question; /undo, /reset, /quit

stdout receives text only; what it cost goes to stderr with --show_stats=True, one JSON document last.
"""
import json
import math
import os
import sys

import torch

from data.loader import read_text
from data.tokenizer import from_meta
from engine import DRAFTERS, FEW, HEADS, Chat, Engine
from model import GPT, can_compile, check_device, check_knobs
from quantize import for_decoding, int_share, load

# -----------------------------------------------------------------------------
out_dir = 'out-quickstart'
weights = 'auto'            # float (best.pt), int8 (int8.safetensors), int4 (int4.safetensors), auto: the newest of them
start = '\n'                # the prompt, or FILE:path to read it from a file
num_samples = 1
max_new_tokens = 200
temperature = 0.8           # 0: always the most probable token; 1: the model's own distribution
top_k = None                # only the k most probable tokens
top_p = None                # only the smallest set of tokens that holds this much probability
min_p = None                # only tokens at least this share as probable as the most probable one
stop = ''                   # text to stop before
seed = 1337
drafter = 'none'            # guesses tokens ahead, never changes the text: head, mtp (heads the model must have), ngram, random
draft_n = 4                 # at most so many at a time
draft_vocab = 0             # the draft head chooses among the first so many tokens only: cheaper for a large vocabulary; 0: all
compile = False             # compile whole rounds: some 30 s once, then several times the speed for a small model
int8_cache = False          # keys and values as integers: a quarter of the cache's memory and a little more, some quality
slide = False               # go on beyond the context, from its later half
interactive = False         # keep the model loaded and ask for prompts
chat = False                # a conversation with a model that was fine-tuned for it: every line is a question
show_stats = False          # of the last prompt or question
device = 'cuda' if torch.cuda.is_available() else 'cpu'
threads = 0                 # CPU threads; 0: one for a model below 4M parameters, where two would only wait for each other, else PyTorch's choice
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())

for stream in (sys.stdin, sys.stdout):          # a byte that is no text, or a character the terminal has not, ends nothing
    if hasattr(stream, 'reconfigure'):
        stream.reconfigure(errors='replace')
check_knobs(config, ('num_samples top_k', int, 1, math.inf), ('max_new_tokens threads draft_vocab', int, 0, math.inf),
            ('draft_n', int, 0, FEW - 1), ('seed', int, -math.inf, math.inf),
            ('temperature', float, 0, math.inf), ('top_p min_p', float, 0, 1),
            ('drafter', DRAFTERS), ('weights', ('auto', 'float', 'int8', 'int4')), may_be_none='top_k top_p min_p')
check_device(device)
if chat and (num_samples > 1 or interactive):
    raise SystemExit(f"error: chat=True has one answer to each line: leave num_samples ({num_samples}) at 1 "
                     f"and interactive ({interactive}) off")
files = ({'float': os.path.join(out_dir, 'best.pt')}
         | {name: os.path.join(out_dir, f'{name}.safetensors') for name in ('int8', 'int4')})
if weights == 'auto':                           # the newest: integers may be left over from an earlier training
    weights = max((name for name in files if os.path.exists(files[name])),
                  key=lambda name: os.path.getmtime(files[name]), default='float')
path = files[weights]
model, state = load(path, device)
tokenizer = from_meta(state['tokenizer'])
if chat and '<|assistant_end|>' not in getattr(tokenizer, 'special_tokens', ()):
    raise SystemExit("error: chat=True needs a model with special tokens like <|assistant_end|>, "
                     f"and {path} has none: train on BPE, then config/sft_pydoc.py")
needs = HEADS.get(drafter)
if needs and not hasattr(model, needs):
    raise SystemExit(f"error: drafter ({drafter}) needs a model with a {needs} head, which {path} has not: "
                     f"train one with --{needs}_n=4, or draft with ngram")
with torch.device('meta'):
    n_params = GPT(model.config).params()['total']
if threads or n_params < 4e6:
    torch.set_num_threads(threads or 1)
share = 0.0 if weights == 'float' else int_share(model)
engine = Engine(for_decoding(model, draft_vocab=draft_vocab), compile and can_compile(device),
                torch.int8 if int8_cache else torch.float32)
how = dict(drafter=drafter, draft_n=draft_n,
           temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, slide=slide)


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
        raise SystemExit(f"error: the prompt's {len(ids)} tokens + max_new_tokens ({max_new_tokens}) "
                         f"do not fit the context of {room}: shorten one of them, or give --slide=True")
    return ids


def complete(prompt, ids):
    """Streams one sample; several are decoded together and printed one after the other."""
    if num_samples == 1:
        for piece in engine.stream(tokenizer, ids, max_new_tokens, stop_strings=[stop] if stop else [],
                                   seed=seed, **how):
            print(piece, end='', flush=True)
        print()
    else:
        for row in engine.complete([ids], max_new_tokens, num_samples=num_samples, seed=seed, **how):
            text = tokenizer.decode(row)
            print(prompt + (text.partition(stop)[0] if stop else text) + '\n---------------')


def answer(talk, question):
    """Streams the answer to a question; Ctrl+C stops it, and a question too long is refused."""
    try:
        for piece in talk.ask(question, max_new_tokens, stop_strings=[stop] if stop else [], seed=seed, **how):
            print(piece, end='', flush=True)
    except KeyboardInterrupt:
        pass
    except ValueError as e:                     # the conversation goes on without it
        print(f'error: {e}', file=sys.stderr)
        return
    print(flush=True)
    if talk.dropped:
        print(f'note: the context of {model.config.block_size} tokens is full; '
              f'the oldest {talk.dropped} of the exchanges are forgotten', file=sys.stderr)


if chat:
    print('A line is a question; /undo takes the last one back, /reset forgets all, /quit or Ctrl+C leaves; '
          'Ctrl+C stops an answer.', file=sys.stderr)
    talk, at_terminal = Chat(engine, tokenizer), sys.stdin.isatty()
    try:
        while True:
            if at_terminal:
                print('> ', end='', flush=True, file=sys.stderr)
            line = sys.stdin.readline()
            word = line.strip()
            if not line or word == '/quit':
                break
            if word == '/reset':
                talk.exchanges.clear()
            elif word == '/undo':
                del talk.exchanges[-1:]
            elif word[:1] == '/':
                print(f'error: {word} is no command: /undo, /reset, /quit', file=sys.stderr)
            elif word:
                answer(talk, word)
                seed += 1                       # asked again after /undo, it may answer otherwise
    except KeyboardInterrupt:
        print(file=sys.stderr)
elif interactive:
    print('Type a prompt, of several lines if you like; a line ### asks for the completion; Ctrl+C leaves.',
          file=sys.stderr)
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
            complete(prompt, ids)
            seed += 1
    except KeyboardInterrupt:
        print()
else:
    prompt = read_text(start[5:]) if start.startswith('FILE:') else start
    ids = encode(prompt)
    if num_samples == 1:
        print(prompt, end='')
    complete(prompt, ids)

if show_stats:
    s = {'tokens': 0, 'seconds': 0.0, 'prefill_seconds': 0.0, 'tok_s': 0.0, 'accepted': []} | engine.stats
    kv = model.kv_bytes_per_token(engine.cache_dtype == torch.int8)
    numbers = {'tokens': s['tokens'],
               'seconds': round(s['seconds'], 4), 'prefill_seconds': round(s['prefill_seconds'], 4),
               'tok_s': round(s['tok_s'], 1),
               'tokens_per_verify': s['tokens'] / max(1, sum(s['accepted'])) if drafter != 'none' else 1.0,
               'weights': weights, 'drafter': drafter, 'params': n_params, 'file': path, 'bytes': os.path.getsize(path),
               'int_share': share, 'kv_bytes_per_token': kv, 'device': device}
    print(f"{path}: {n_params:,} parameters in {numbers['bytes']:,} bytes, {100 * share:.1f} % of them integers; "
          f"{numbers['tok_s']:,} tok/s; {kv:,} bytes of cache a token", file=sys.stderr)
    print(json.dumps(numbers), file=sys.stderr)
