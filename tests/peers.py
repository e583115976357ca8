"""
Other decoders on a shape, in turn with ours: transformers' generate, llama2.c, and nanochat's. How: tests/README.md.

    python tests/peers.py                                   # the tiny shape of bench.py; pip install transformers first
    python tests/peers.py --llama2c=FOLDER                  # with llama2.c's binaries run and runq, too
    python tests/peers.py --nanochat=FOLDER                 # with a copy of nanochat, of 2025: git checkout 790f3be

nanochat's GPT of that time is our very shape, if the MLP is four times as wide as the stream. The last line is JSON.
"""
import importlib.util
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))  # the repo
from data.bench.timing import TokenClock
from data.files import atomic_write, in_repo
from engine import Engine, Sampling
from data.machine import pick_device
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
n_layer = 3
n_head = 4
n_kv_head = None
n_embd = 192
n_hidden = 384
vocab_size = 65
block_size = 256
tie_weights = False
prompt_tokens = 64
new_tokens = 128
rounds = 5
llama2c = ''                # folder of llama2.c's binaries run and runq, or the path of one of them
nanochat = ''               # folder of a copy of github.com/karpathy/nanochat
seed = 1337
device = 'cpu'              # or cuda, where llama2.c does not run
threads = 0                 # CPU threads; 0: PyTorch's own choice
peer = ''                   # private: the decoder and format that a child process measures
# private: bench.py --mode=train gives these
nanogpt = ''                # folder of a copy of github.com/karpathy/nanoGPT
training = ''               # train.py's knobs as JSON; its dataset is random tokens
steps = 10
limits = {'prompt_tokens new_tokens rounds steps': (1, None), 'threads': (0, None)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())


def say(line):
    print(line, file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# nanoGPT's training

def output_of(command, **how):
    """What a process prints. ValueError if it fails."""
    got = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors='replace', **how)
    if got.returncode:
        raise ValueError(f"{' '.join(map(str, command[:2]))[-80:]} ended with status {got.returncode}: "
                         f"{got.stderr.strip()[-200:]}")
    return got.stdout


def flags(knobs):
    return [f'--{key}={value}' for key, value in knobs.items()]


def training_rows(t):
    """train.py's knobs -> rows of tokens/s of our train.py and of nanoGPT, in a folder of its own, in turn."""
    forwards = max(1, round((t['total_batch_size'] or t['batch_size'] * t['block_size'])
                            / (t['batch_size'] * t['block_size'])))
    both = dict(log_interval=1, device=t['device'], dtype=t['dtype'])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(t['dataset'], f'{folder}/data/random')
        atomic_write(f'{folder}/data/random/meta.pkl', lambda f: pickle.dump({'vocab_size': vocab_size}, f))
        shutil.copy(f'{nanogpt}/configurator.py', folder)
        ours = t | both | dict(out_dir=f'{folder}/ours', max_iters=steps + 5, eval_interval=0, save_interval=0,
                               sample_interval=0)
        theirs = {k: t[k] for k in ('n_layer', 'n_head', 'n_embd', 'dropout', 'block_size', 'batch_size')}
        theirs |= both | dict(
            dataset='random', out_dir='out', max_iters=steps + 4, eval_interval=10**9, eval_iters=1,
            always_save_checkpoint=False, gradient_accumulation_steps=forwards)
        rows = []
        for way in ('eager', 'compiled')[:1 + t['compile']]:
            rates = {'train.py': [], 'nanoGPT': []}
            for r in range(rounds):
                compiled = {'compile': way == 'compiled'}
                said = output_of([sys.executable, 'train.py', *flags(ours | compiled)])
                rates['train.py'].append(json.loads(said.splitlines()[-1])['tok_s'])
                said = output_of([sys.executable, os.path.abspath(f'{nanogpt}/train.py'), *flags(theirs | compiled)],
                                 cwd=folder)
                ms = re.findall(r'^iter \d+: loss .*, time ([\d.]+)ms', said, re.M)[5:]
                tokens = forwards * t['batch_size'] * t['block_size']
                rates['nanoGPT'].append(1000 * tokens / median(map(float, ms)))
                say(f'peers, {way}, round {r + 1} of {rounds}')
            for who, seen in rates.items():
                dtype = 'float32' if who == 'nanoGPT' and t['device'] == 'cpu' else t['dtype']
                rows.append({'run': who, 'way': way, 'dtype': dtype, 'tok_s_rounds': seen, 'ours': rates['train.py']})
    return rows


if nanogpt:
    t = json.loads(training)
    odd = [k for k in ('n_kv_head', 'head_dim', 'n_hidden', 'multi_token_n', 'draft_n', 'teacher', 'quant_bits')
           if t[k]]
    if odd or vocab_size > 65536 or not os.path.isfile(f'{nanogpt}/train.py'):
        raise ValueError(f"nanogpt ({nanogpt}) must be the folder of a copy of github.com/karpathy/nanoGPT, "
                         f"and the shape one that it has{f', without {odd[0]}' if odd else ''}")
    print(json.dumps({'rows': training_rows(t)}))
    sys.exit()

# -----------------------------------------------------------------------------
# the shape

c = GPTConfig(**{k: config[k] for k in GPTConfig.__dataclass_fields__ if k in config})
hidden = max(64, round(c.n_hidden * 2 / 3 / 64) * 64)    # a multiple of the groups of 64 that llama2.c quantises in
prompt = torch.randint(c.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
device = pick_device(device)
if threads:
    torch.set_num_threads(threads)

# -----------------------------------------------------------------------------
# what a child measures -> {'tok_s': once the prompt is read, 'params'}

def picochat_rate():
    """Ours: float32, a cache, eager."""
    model = GPT(c).to(device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    engine = Engine(model)
    for _ in range(2):  # the first run warms up
        engine.complete([prompt], new_tokens, Sampling(temperature=0))
    return {'tok_s': engine.stats['tok_s'], 'params': model.params()['total']}


def transformers_rate(dtype):
    """Hugging Face's generate, with its cache; after the first token."""
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=c.n_embd, intermediate_size=hidden, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, vocab_size=c.vocab_size, max_position_embeddings=c.block_size,
        tie_word_embeddings=c.tie_weights, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    model = model.to(device, dtype).eval()
    ids = torch.tensor([prompt], device=device)
    for clock in (TokenClock(), TokenClock()):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                       streamer=clock)
    assert len(clock.times) == new_tokens + 1, f'{len(clock.times) - 1} tokens, not {new_tokens}'
    return {'tok_s': (new_tokens - 1) / (clock.times[-1] - clock.times[1]),
            'params': sum(p.numel() for p in model.parameters())}


def nanochat_rate():
    """nanochat's Engine, float32, after the first token."""
    sys.path.insert(0, nanochat)
    # it is for checkpoints, and would ask for tokenizers that token ids need not have
    sys.modules['nanochat.checkpoint_manager'] = SimpleNamespace(load_model=None)
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig
    model = GPT(GPTConfig(sequence_len=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                          n_kv_head=c.n_kv_head, n_embd=c.n_embd)).to(device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    nothing_ends = SimpleNamespace(encode_special=lambda name: -1, get_bos_token_id=lambda: -1)
    for _ in range(2):  # the first run warms up
        times = [time.perf_counter()
                 for _ in Engine(model, nothing_ends).generate(prompt, max_tokens=new_tokens, temperature=0)]
    return {'tok_s': (new_tokens - 1) / (times[-1] - times[0]), 'params': sum(p.numel() for p in model.parameters())}


if peer:
    print(json.dumps(picochat_rate() if peer == 'picochat-f32' else nanochat_rate() if peer == 'nanochat-f32'
                     else transformers_rate(torch.bfloat16 if peer == 'transformers-bf16' else torch.float32)))
    sys.exit()

# -----------------------------------------------------------------------------
# llama2.c

def llama2c_files(folder):
    """Random weights in llama2.c's formats 0 (float32) and 2 (int8, a scale per 64), a tokenizer -> parameters"""
    noise = np.random.default_rng(seed)
    L, D, H, V, KV, tied = c.n_layer, c.n_embd, hidden, c.vocab_size, c.n_kv_head * c.head_dim, c.tie_weights
    # wq wk wv wo; w1 w2 w3; the classifier
    attention, mlp, head = [D * D, KV * D, KV * D, D * D], [H * D] * 3, [V * D] * (not tied)
    ones = np.ones((2 * L + 1) * D, np.float32)  # the norms

    def write(f, values):
        if values.size == V * D:
            values[D:2 * D] = 0  # token 1 would end the text; at score 0 it is never the best
        values.tofile(f)

    with open(f'{folder}/f32.bin', 'wb') as f:
        f.write(struct.pack('<7i', D, H, L, c.n_head, c.n_kv_head, V if tied else -V, c.block_size))
        for n in (V * D, 'norm', *attention, 'norm', *mlp):
            write(f, ones[:L * D] if n == 'norm'
                  else noise.standard_normal(n if n == V * D else L * n, np.float32) * np.float32(0.05))
        write(f, ones[:D])
        write(f, np.zeros(c.block_size * c.head_dim, np.float32))  # rotary tables, once
        for n in head:
            write(f, noise.standard_normal(n, np.float32))
    with open(f'{folder}/int8.bin', 'wb') as f:
        f.write(struct.pack('<2I7iBi', 0x616b3432, 2, D, H, L, c.n_head, c.n_kv_head, V, c.block_size, tied, 64)
                .ljust(256, b'\0'))
        write(f, ones)
        for n in (V * D, *(n for n in attention + mlp for _ in range(L)), *head):
            write(f, noise.integers(-127, 128, n, np.int8))
            write(f, np.full(n // 64, 0.05 / 73, np.float32))  # 73 is the deviation of such integers
    with open(f'{folder}/tokenizer.bin', 'wb') as f:
        f.write(struct.pack('<i', 1) + struct.pack('<fi1s', 0.0, 1, b'a') * V)
    return V * D + sum(head) + L * sum(attention + mlp) + ones.size


def llama2c_rate(binary, file):
    """-> tokens/s as it reports them, greedy, to as many places as the others reach."""
    got = subprocess.run([binary, file, '-z', f'{os.path.dirname(file)}/tokenizer.bin', '-t', '0',
                          '-n', str(prompt_tokens + new_tokens)],
                         env=os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())},
                         capture_output=True, text=True, errors='replace')
    found = re.search(r'achieved tok/s: ([\d.]+)', got.stderr)
    if not found:
        raise ValueError(f'{binary} reported no speed, status {got.returncode}: {got.stderr.strip()[-200:]}')
    return float(found[1])

# -----------------------------------------------------------------------------
# what will run; whatever cannot is said before anything is timed

params = sum(GPT(c).params()[group] for group in ('embedding', 'trunk', 'head'))
assert c.n_head * c.head_dim == c.n_embd and abs(3 * hidden - 2 * c.n_hidden) * c.n_embd * c.n_layer <= 0.02 * params, (
    'peers need a shape that a Llama can match within 2 % of its parameters, '
    f'with n_head * head_dim = n_embd: {c} is not that')
assert prompt_tokens + new_tokens <= c.block_size, (
    f'prompt_tokens ({prompt_tokens}) + new_tokens ({new_tokens}) do not fit the context of {c.block_size}: lower them')
assert not llama2c or device == 'cpu', f'llama2c ({llama2c}) runs on --device=cpu, not on {device}'
others = {}                                     # (decoder, format) -> binary
if importlib.util.find_spec('transformers'):
    others |= {('transformers', 'f32'): None, ('transformers', 'bf16'): None}
else:
    say('transformers is absent: pip install transformers')
if llama2c:
    folder = llama2c if os.path.isdir(llama2c) else os.path.dirname(llama2c)
    others |= {('llama2.c', 'f32'): os.path.join(folder, 'run'), ('llama2.c', 'int8'): os.path.join(folder, 'runq')}
else:
    say('llama2.c is absent: build its run and runq, and give --llama2c=FOLDER')
if nanochat:
    if not os.path.isfile(f'{nanochat}/nanochat/engine.py') or c.n_hidden != 4 * c.n_embd or c.tie_weights:
        raise ValueError(f'nanochat ({nanochat}) must be a copy of github.com/karpathy/nanochat, git checkout 790f3be, '
                         f'and n_hidden ({c.n_hidden}) 4 * n_embd ({c.n_embd}), as it has no other, with two '
                         'vocabulary tables')
    others['nanochat', 'f32'] = None
for binary in filter(None, others.values()):
    if not os.access(binary, os.X_OK):
        raise ValueError(f'llama2c ({llama2c}) has no {os.path.basename(binary)}: in a copy of '
                         'github.com/karpathy/llama2.c, gcc -Ofast -fopenmp -march=native -o run run.c -lm; '
                         'runq likewise')

# -----------------------------------------------------------------------------
# the rounds

def child(what):
    """What a fresh process of this script prints with --peer=what."""
    knobs = config | {'peer': what, 'llama2c': '', 'threads': torch.get_num_threads()}
    return json.loads(output_of([sys.executable, 'tests/peers.py', *flags(knobs)]).splitlines()[-1])


rows = [{'decoder': decoder, 'format': format, 'params': None, 'tok_s_rounds': [], 'ours': []}
        for decoder, format in others]
with tempfile.TemporaryDirectory() as folder:
    size = llama2c_files(folder) if llama2c else None
    for r in range(rounds if others else 0):
        for row, ((decoder, format), binary) in zip(rows, others.items()):
            row['ours'].append(child('picochat-f32')['tok_s'])
            got = ({'tok_s': llama2c_rate(binary, f'{folder}/{format}.bin'), 'params': size} if binary
                   else child(f'{decoder}-{format}'))
            row['tok_s_rounds'].append(got['tok_s'])
            row['params'] = got['params']
        say(f'peers, round {r + 1} of {rounds}')
for row in rows:
    print(f"{row['decoder']} {row['format']}: {', '.join(f'{rate:,.1f}' for rate in row['tok_s_rounds'])} tokens/s; "
          f"picochat f32 beside it: {', '.join(f'{rate:,.1f}' for rate in row['ours'])}")
print(json.dumps({'params': params, 'rows': rows}))
