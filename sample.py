"""
Completes text with a trained model: float, or the int8 or int4 file running on its integers. Needs nothing but out_dir.

    python sample.py --out_dir=out-quickstart --start="def main(" --num_samples=3
    python sample.py --out_dir=out-quickstart --start=FILE:prompt.txt --temperature=0.5 --top_k=20
    python sample.py --out_dir=out-quickstart --interactive=True
    python sample.py --out_dir=out-sft-pydoc --chat=True                # a line is a question
    python sample.py --out_dir=out-sft-pydoc --chat=True --system="Answer in one sentence."

In a chat the lines /undo (takes the last question back), /reset (forgets all) and /quit are commands, and nothing else
is: /etc/hosts? is a question, and so is what follows // or a space (//undo asks: /undo). A question of several lines, a
pasted one for example, stands between two lines of three quotes, \"\"\".

stdout receives text only; what it cost goes to stderr with --show_stats=True, one JSON document last.
"""
import os
import re
import sys

import torch

from data.checkpoint import without_memory
from data.compiling import can_compile
from data.conversation import Chat
from data.files import in_repo, json_line, read_text, shown
from data.layouts import for_decoding, step_of
from data.machine import keep_memory, pick_device
from data.rounding import BITS
from data.tokenizer import from_meta
from engine import DRAFTERS, FEW, Engine, Sampling, Speculation, rounds_pay
from model import GPT
from quantize import int_share, load

# -----------------------------------------------------------------------------
out_dir = 'out-quickstart'
weights = 'auto'            # float (best.pt), int8 or int4 (their .safetensors), auto: the newest of them
start = '\n'                # the prompt; \n is a new line, \t a tab, \\ a backslash; or FILE:path, less its line end
num_samples = 1
max_new_tokens = None       # None: 200, or what the context has room for
temperature = 0.8           # 0: always the most probable token; 1: the model's own distribution
top_k = None                # only the k most probable tokens
top_p = None                # only the smallest set of tokens that holds this much probability
min_p = None                # only tokens at least this share as probable as the most probable one
stop = ''                   # text to stop before; \n, \t and \\ as in start
run_on = False              # go on with another document where one ends
seed = 1337
drafter = 'none'            # guesses tokens ahead, the text stays the same: head, mtp (the model's), ngram, random
draft_n = 4                 # at most so many at a time
draft_vocab = 0             # the draft head chooses among the first so many tokens: cheaper; 0: as it was trained
compile = 'auto'            # auto: integers on a CPU decode by data/kernels.cpp, which g++ compiles once, in a second
                            # True: torch.compile of whole rounds, for small float models; False: without a compiler
int8_cache = False          # keys and values as integers: a little over a quarter of the cache's memory, some quality
slide = False               # go on beyond the context, from its later half
interactive = False         # keep the model loaded and ask for prompts
chat = False                # a conversation with a model that was fine-tuned for it: every line is a question
system = ''                 # what a chat begins with, \n as in start; empty: the line that came with the model, if any
show_stats = False          # of the last prompt or question
device = 'auto'             # cuda, mps or cpu; auto: the first of them that is there
threads = 0                 # CPU threads; 0: one for models below 4M parameters, which is faster, else PyTorch's choice
limits = {                  # what they may be
    'weights': ['auto', 'float', *(f'int{bits}' for bits in BITS)],
    'num_samples top_k': (1, None),
    'max_new_tokens threads draft_vocab': (0, None),
    'temperature': (0.0, None),
    'top_p min_p': (0.0, 1.0),
    'seed': (None, None),
    'drafter': list(DRAFTERS),
    'draft_n': (0, FEW - 1),
    'compile': ['auto', 'True', 'False'],
}
exec(open(in_repo('configurator.py')).read())
# -----------------------------------------------------------------------------
# what happens to a prompt

MOST = 200                  # new tokens, where max_new_tokens says nothing


def find_weights():
    """
    -> the kind of weights and their file. 'auto' takes the newest, as an integer checkpoint may be left from an earlier
    training.
    """
    files = {'float': 'best.pt'} | {f'int{bits}': f'int{bits}.safetensors' for bits in BITS}
    files = {name: os.path.join(out_dir, file) for name, file in files.items()}
    if weights != 'auto':
        return weights, files[weights]
    found = [name for name in files if os.path.exists(files[name])]
    newest = max(found, key=lambda name: os.path.getmtime(files[name]), default='float')
    if len(found) > 1:
        print(f"weights=auto: {files[newest]}, the newest of {', '.join(found)}; --weights= chooses", file=sys.stderr)
    return newest, files[newest]


def typed(text):
    r"""A text from the command line, with \n, \t and \\ for what is hard to type there -> the text that is meant."""
    meant = {r'\n': '\n', r'\t': '\t', r'\\': '\\'}
    return re.sub(r'\\[nt\\]', lambda found: meant[found[0]], text)


def encode(text):
    """text -> its token ids, and how many are to follow. ValueError or AssertionError if the model cannot go on."""
    ids = tokenizer.encode(text)
    if tokenizer.bos is not None:
        ids = [tokenizer.bos] + ids
    room = model.config.block_size
    if slide and len(ids) > room:
        print(f'note: of the {len(ids)} tokens of the prompt, the context holds the last {room}', file=sys.stderr)
        ids = ids[-room:]
    n = max_new_tokens
    if n is None:
        n = MOST if slide else max(1, min(MOST, room + 1 - len(ids)))
    engine.check_length(len(ids), n, slide)
    return ids, n


def stream(pieces):
    for piece in pieces:
        print(piece, end='', flush=True)


def complete(prompt, ids, n):
    """Streams one sample; several are decoded together and printed one after the other."""
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    # tokens that mark the beginning or end of a document: the text ends where the model draws one
    ends = [] if run_on else sorted(tokenizer.ends)
    if num_samples == 1:
        stream(engine.stream(tokenizer, ids, n, stops, sampling, speculation, ends, slide=slide))
        print()
        return
    for row in engine.complete([ids], n, sampling, speculation, num_samples, stop=ends, slide=slide):
        text = tokenizer.decode([token for token in row if token not in tokenizer.ends])
        if stops:
            text = text.partition(stops[0])[0]
        print(prompt + text + '\n---------------')


def interact():
    """Completes one prompt after another. The end of the input ends the last prompt, as a line ### does."""
    print('Type a prompt, of several lines if you like; a line ### asks for the completion; Ctrl+C leaves.',
          file=sys.stderr)
    lines = []
    for line in sys.stdin:
        line = line.rstrip('\r\n')
        if line == '###':
            respond('\n'.join(lines) or '\n')
            lines = []
        else:
            lines.append(line)
    if any(lines):
        respond('\n'.join(lines))


def respond(prompt):
    """Shows a prompt and completes it. A prompt that is too long is refused, and the next one can follow."""
    global seed
    grey, plain = ('\033[90m', '\033[0m') if sys.stdout.isatty() else ('', '')
    try:
        ids, n = encode(prompt)
    except (AssertionError, ValueError) as e:
        print(f'error: {shown(str(e))}', file=sys.stderr)
        return
    if num_samples == 1:
        print(f'{grey}{prompt}{plain}', end='')
    complete(prompt, ids, n)
    seed += 1


def converse():
    """Answers one line after another; several lines between triple quotes are one question."""
    global seed
    print('A line is a question, and so is all between two lines """; /undo takes the last one back, /reset forgets '
          'all, /quit or Ctrl+C leaves; Ctrl+C stops an answer.', file=sys.stderr)
    talk, at_terminal = Chat(engine, tokenizer, typed(system) or None), sys.stdin.isatty()
    while True:
        if at_terminal:
            print('> ', end='', flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        command = line.rstrip()
        if not line or command == '/quit':
            return
        if command == '/reset':
            talk.exchanges.clear()
        elif command == '/undo':
            del talk.exchanges[-1:]
        else:
            # '//undo' is the question '/undo'
            question = several_lines() if command == '"""' else line[line.startswith('//'):].strip()
            if question.strip():
                answer(talk, question)
                seed += 1                       # so that the same question may get another answer after /undo


def several_lines():
    """-> the lines up to the next line of three quotes, or to the end of the input."""
    lines = []
    for line in iter(sys.stdin.readline, ''):
        if line.rstrip() == '"""':
            break
        lines.append(line.rstrip('\r\n'))
    return '\n'.join(lines)


def answer(talk, question):
    """Streams the answer to a question; Ctrl+C stops it, and a question too long is refused."""
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    n = MOST if max_new_tokens is None else max_new_tokens
    try:
        stream(talk.ask(question, n, stops, sampling=sampling, speculation=speculation, slide=slide))
    except KeyboardInterrupt:
        pass
    except ValueError as e:                     # the conversation goes on without it
        print(f'error: {shown(str(e))}', file=sys.stderr)
        return
    print(flush=True)
    if talk.dropped:
        print(f'note: the context of {model.config.block_size} tokens is full; '
              f'the oldest {talk.dropped} of the exchanges are forgotten', file=sys.stderr)


def print_stats():
    """Two lines on stderr about the last text: one for people, one of JSON."""
    stats = {'tokens': 0, 'seconds': 0.0, 'prefill_seconds': 0.0, 'tok_s': 0.0, 'accepted': []} | engine.stats
    numbers = {
        'tokens': stats['tokens'],
        'seconds': round(stats['seconds'], 4),
        'prefill_seconds': round(stats['prefill_seconds'], 4),
        'tok_s': round(stats['tok_s'], 1),
        'tokens_per_verify': stats['tokens'] / max(1, sum(stats['accepted'])) if drafter != 'none' else 1.0,
        'weights': kind,
        'drafter': drafter,
        'step': 'compiled rounds' if rounds else step_of(model),
        'params': n_params,
        'file': path,
        'bytes': os.path.getsize(path),
        'int_share': share,
        'kv_bytes_per_token': model.kv_bytes_per_token(int8_cache),
        'device': device}
    print(f"{path}: {n_params:,} parameters in {numbers['bytes']:,} bytes, {100 * share:.1f} % of them integers; "
          f"{numbers['tok_s']:,} tok/s by {numbers['step']}; {numbers['kv_bytes_per_token']:,} bytes of cache a token",
          file=sys.stderr)
    print(json_line(numbers), file=sys.stderr)

# -----------------------------------------------------------------------------
# load the model

assert not chat or (num_samples == 1 and not interactive), (
    f"chat=True has one answer to each line: leave num_samples ({num_samples}) at 1 "
    f"and interactive ({interactive}) off")
assert chat or not system, f"system ({system!r:.40}) is the first line of a conversation: give --chat=True with it"
if hasattr(sys.stdin, 'reconfigure'):
    sys.stdin.reconfigure(errors='replace')     # bytes that are not UTF-8 must not end a chat
device = pick_device(device)
keep_memory()                               # a prompt's tensors come and go with every layer
kind, path = find_weights()
model, state = load(path, device)
tokenizer = from_meta(state['tokenizer'])
assert not chat or tokenizer.chat, (
    f"chat=True needs a model with special tokens like <|assistant_end|> or <|im_end|>, and {path} has none: "
    "train on BPE, then config/sft_pydoc.py")
stops = [typed(stop)] if stop else []
speculation = Speculation(drafter, draft_n)
speculation.check(model)
n_params = without_memory(GPT, model.config).params()['total']
share = 0.0 if kind == 'float' else int_share(model)
if threads or n_params < 4e6:
    torch.set_num_threads(threads or 1)
rounds = compile == 'True' and can_compile(device) and rounds_pay(model)
model = for_decoding(model, draft_vocab=draft_vocab, kernels=compile != 'False' and not rounds)
engine = Engine(model, rounds, torch.int8 if int8_cache else torch.float32)

# -----------------------------------------------------------------------------
# and write

if chat or interactive:
    try:
        converse() if chat else interact()
    except KeyboardInterrupt:                   # the way to leave
        print(file=sys.stderr if chat else sys.stdout)
else:
    prompt = read_text(start[5:]).removesuffix('\n') if start.startswith('FILE:') else typed(start)
    ids, n = encode(prompt)
    if num_samples == 1:
        print(prompt, end='')
    complete(prompt, ids, n)
if show_stats:
    print_stats()
