"""
What several test files share. Tests run from the repo root, on one thread, and never from the network.
`from conftest import run, refused`: helpers live here or in the one file that uses them.
"""
import contextlib
import csv
import http.server
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # for the processes they start, too
os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, '.')
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    signal.signal(signum, handler)  # nohup, or the background of a shell, has them ignored

import torch

import data.loader
from data.files import release_all
from data.foreign.llama import LLAMA as SWITCHES
from data.foreign_tokenizer import GPT2_PATTERN, byte_characters, merges_of
from data.tokenizer import BPETokenizer, CharTokenizer, train_bpe
from data.writer import write_texts
from model import GPT, GPTConfig

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ('g++', 'c++', 'clang++'))),
                                    reason='torch.compile needs a C++ compiler on a CPU')

# ----- running the scripts

TINY = ['--device=cpu', '--compile=False', '--dtype=float32', '--n_layer=2', '--n_head=2', '--n_embd=16',
        '--block_size=16', '--batch_size=4', '--max_iters=8', '--log_interval=1', '--eval_interval=2',
        '--save_interval=0', '--sample_interval=0']


def toy_text(lines=120):
    rng = random.Random(0)
    return ''.join(' '.join(rng.choices('the cat sat on a mat and ran'.split(), k=8)) + '\n' for _ in range(lines))


def make_dataset(folder, text=toy_text(), val=700, level='char', vocab_size=275):
    """Writes text as a dataset, its first val characters again as the validation split -> the flag that names it."""
    with contextlib.redirect_stdout(io.StringIO()):
        write_texts(str(folder), [text], [text[:val]], level, 'toy', vocab_size)
    return f'--dataset={folder}'


def run(script, *args, stdin=''):
    """The script with these arguments, in this process -> status, out, err (tracebacks are raised), its names"""
    argv, hook = sys.argv, sys.excepthook
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    out, err, status, names = io.StringIO(), io.StringIO(), 0, {}
    sys.argv, sys.stdin, sys.excepthook = [script, *map(str, args)], io.StringIO(stdin), sys.__excepthook__
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                names = runpy.run_path(script, run_name='__main__')
            except Exception as e:
                status = 1
                told = sys.excepthook is not sys.__excepthook__ and sys.excepthook(type(e), e, e.__traceback__)
                if not told:
                    raise
    except SystemExit as e:  # as the interpreter does: a text goes to stderr and makes the status 1
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        err.write(f'{e.code}\n' if isinstance(e.code, str) else '')
    finally:
        sys.argv, sys.stdin, sys.excepthook = argv, sys.__stdin__, hook
        release_all()
        for s, handler in before.items():
            signal.signal(s, handler)
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), names=names)


def ran(script, *args, **how):
    """A run that must succeed -> what run gives."""
    got = run(script, *args, **how)
    assert got.status == 0, got.err
    return got


def result_of(got):
    """The JSON document that a run which must have succeeded ends with."""
    assert got.status == 0, got.err
    return json.loads(got.out.splitlines()[-1])


def train(out_dir, *args):
    """A run that must succeed -> its JSON document."""
    got = run('train.py', *TINY, f'--out_dir={out_dir}', *args)
    assert not got.err
    return result_of(got)


def start(*args, **how):
    """Python with these arguments in a process of its own -> its Popen."""
    return subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **how)


def python(*args, cwd=None, **environment):
    """Python in a process of its own, which must not wait; what is in environment changes it -> status, out, err"""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | environment)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


class Here:
    """What subprocess.Popen is to a script of ours that starts another one: that one runs in this process, at once."""
    popen = subprocess.Popen

    def __new__(cls, command, **how):
        here = command[0] == sys.executable and str(command[1]).endswith('.py') and not how.get('cwd')
        return object.__new__(cls) if here else cls.popen(command, **how)

    def __init__(self, command, stdout=None, stderr=None, env=os.environ, **how):
        self.args, self.pid, before = command, os.getpid(), os.environ.copy()
        os.environ.update(env)
        try:
            got = run(*command[1:])
            self.returncode, self.said = got.status, (got.out, got.err)
        except Exception as e:
            self.returncode, self.said = 1, ('', f'{type(e).__name__}: {e}\n')
        finally:
            os.environ.clear()
            os.environ.update(before)
        if hasattr(stdout, 'write'):
            stdout.write(self.said[0])
        self.stdout, self.stderr = io.StringIO(''.join(self.said)), io.StringIO(self.said[1])

    def communicate(self, *args, **how):
        return self.said

    def wait(self, timeout=None):
        return self.returncode

    poll = wait

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def in_process(monkeypatch):
    """What scripts start runs in this process, to import torch once; monkeypatch.undo() where a process is the point."""
    monkeypatch.setattr(subprocess, 'Popen', Here)


def refused(got, pattern):
    """One line on stderr that matches, nothing else, status 1."""
    assert got.status == 1 and re.fullmatch(f'error: .*(?:{pattern}).*\n', got.err), got.err


def content(folder):
    """Every file and folder below folder, with what is in it."""
    return {os.path.join(at, name): None if name in folders else open(os.path.join(at, name), 'rb').read()
            for at, folders, files in os.walk(folder) for name in folders + files}


def altered(source, folder, **change):
    """The checkpoint at source with other parts, as folder/best.pt -> the folder."""
    os.makedirs(folder, exist_ok=True)
    torch.save(torch.load(source, weights_only=True) | change, f'{folder}/best.pt')
    return folder


def log(out_dir):
    return list(csv.DictReader(open(f'{out_dir}/log.csv')))


def tensors(x, name=''):
    """All tensors in nested dicts and lists, by where they are."""
    if isinstance(x, torch.Tensor):
        return {name: x}
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in tensors(value, f'{name}/{key}').items()}


def largest_difference(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 5
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('data') / 'toy')


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(step, signum): this process gets the signal in the middle of that step."""
    batch = data.loader.Loader.batch

    def at(stop_in, signum):
        def batch_and_signal(self, step, *args):
            if step == stop_in:
                os.kill(os.getpid(), signum)
            return batch(self, step, *args)
        monkeypatch.setattr(data.loader.Loader, 'batch', batch_and_signal)
    return at


# ----- a web server

class Server(http.server.ThreadingHTTPServer):
    """
    A web server on this machine. pages: path -> dict of body (bytes), and of what is odd about it: status, reason,
    location (a redirect), ranges=False (Range is ignored), cuts (so many bytes are sent of the first answer, the
    second, ..., then the line goes dead), length=False (no Content-Length), headers (with an ETag, If-Range is obeyed),
    more (what follows a range beyond its end). asked: [(path, value of Range or None)], in the order of the requests.
    """

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.pages, self.asked = {}, []
        self.url = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, request, client_address):  # a client that hangs up is no news
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    knows_if_range = True

    def do_GET(self):
        page = self.server.pages.get(self.path, {'status': 404, 'body': b'no such page'})
        wanted = self.headers['Range']
        self.server.asked.append((self.path, wanted))
        body, status, headers = page.get('body', b''), page.get('status', 200), dict(page.get('headers', {}))
        version = self.headers['If-Range']
        if self.knows_if_range and version not in (None, headers.get('ETag'), headers.get('Last-Modified')):
            wanted = None
        if 'location' in page:
            status = 302
            headers['Location'] = page['location']
        elif wanted and status == 200 and page.get('ranges', True):
            start = int(wanted.removeprefix('bytes=').removesuffix('-'))
            if start >= len(body):
                status, body, headers['Content-Range'] = 416, b'', f'bytes */{len(body)}'
            else:
                status, headers['Content-Range'] = 206, f'bytes {start}-{len(body) - 1}/{len(body)}'
                body = body[start:] + page.get('more', b'')
        self.send_response(status, page.get('reason'))
        if page.get('length', True):
            headers.setdefault('Content-Length', str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if page.get('cuts'):
            body = body[:page['cuts'].pop(0)]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


# ----- small models and tokenizers

SMALL = dict(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_embd=32)

# the switches that make the block a Llama's, of a tied model with a last gain, as SmolLM2's
LLAMA = SWITCHES | dict(norm_eps=1e-5, out_proj=True, tie_weights=True)


def randomise(model, std=0.2):
    """Weights that make every path matter: the initial zeros would hide most mistakes."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


CHAR = CharTokenizer('\n' + ''.join(map(chr, range(32, 127))))

BPE = BPETokenizer({bytes([b]): b for b in range(256)} | {b'th': 256, b'the': 257, b' the': 258},
                   special_tokens=['<|bos|>'])


def build(tokenizer=CHAR, kv=4, block_size=300, **heads):
    return randomise(GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=4,
                                   n_embd=32, n_kv_head=kv, **heads)))


def with_heads(tokenizer, kv, block_size=160, **shape):
    return build(tokenizer, kv, block_size, multi_token_n=3, draft_n=4, **shape)


def reference_forward(c, state, idx):
    """The papers' formulas, a token at a time and in float64, without model.py: ids (T,) -> logits (T, vocab_size)."""
    w = {k: v.double() for k, v in state.items()}
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    x = rms(w['transformer.wte.weight'][idx])  # (T, n_embd)
    for i in range(c.n_layer):
        a = {k: w[f'transformer.h.{i}.attn.{k}.weight'] for k in ('c_q', 'c_k', 'c_v', 'c_proj')}
        h = rms(x)
        out = torch.zeros(len(idx), c.n_head * c.head_dim, dtype=torch.float64)
        for head in range(c.n_head):
            kv = head // (c.n_head // c.n_kv_head)
            rows, kv_rows = (slice(head * c.head_dim, (head + 1) * c.head_dim),
                             slice(kv * c.head_dim, (kv + 1) * c.head_dim))
            q, k, v = h @ a['c_q'][rows].T, h @ a['c_k'][kv_rows].T, h @ a['c_v'][kv_rows].T
            half = c.head_dim // 2
            turn = torch.tensor([[t * c.rope_base ** (-2 * j / c.head_dim) for j in range(half)]
                                 for t in range(len(idx))], dtype=torch.float64)
            cos, sin = (table.bfloat16().double() if c.rope_bf16 else table for table in (turn.cos(), turn.sin()))
            q, k = (rms(torch.cat((a * cos + b * sin, b * cos - a * sin), -1))
                    for a, b in (y.split(half, dim=1) for y in (q, k)))
            score = (q @ k.T / math.sqrt(c.head_dim)).masked_fill(
                torch.ones(len(idx), len(idx)).triu(1).bool(), -math.inf)
            out[:, rows] = score.softmax(-1) @ v
        x = x + out @ a['c_proj'].T
        x = x + ((rms(x) @ w[f'transformer.h.{i}.mlp.c_fc.weight'].T).clamp(min=0).square()
                 @ w[f'transformer.h.{i}.mlp.c_proj.weight'].T)
    return 15 * torch.tanh(rms(x) @ w['lm_head.weight'].T / 15)


def batches(n=2, vocab_size=50):
    """[(x, y)] of noise, 3 rows of 20 tokens each."""
    ids = torch.randint(vocab_size, (n, 3, 21), generator=torch.Generator().manual_seed(5))
    return [(x[:, :-1], x[:, 1:]) for x in ids]


@torch.no_grad()
def outputs(model, x=None):
    """Logits of lm_head and of the heads that there are, of two steps of the draft cell, (N, vocab_size)."""
    x = batches()[0][0] if x is None else x
    state = model.trunk(x)
    states = [state, *(model.multi_token_state(state, i) for i in range(model.config.multi_token_n))]
    if model.config.draft_n:
        draft = model.draft_state(state, x)
        states += [draft, model.draft_state(draft, x.flip(1))]
    return model.logits(torch.cat(states)).flatten(0, 1)


# SmolLM2's chat template, but for what its system line says
TEMPLATE = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
            "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


# ----- other people's models

TEXTS = ['The inner theatre, the other thing: 42 zebras & 1234 more.\n\n' * 9,
         "def f(x):\n    return x  # naïve 日本語 it's we'll\n" * 9]

V = 300

@pytest.fixture(scope='module')
def bpe():
    return train_bpe(TEXTS, V)


TOK = train_bpe(TEXTS, V, GPT2_PATTERN, ['<|endoftext|>'])  # in GPT-2's manner


ARGS = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, bias=True, vocab_size=50, dropout=0.0)


def nanogpt_state(bias=True, tied=True):
    torch.manual_seed(1)
    w = {'transformer.wte.weight': torch.randn(50, 32), 'transformer.wpe.weight': torch.randn(24, 32),
         'transformer.ln_f.weight': torch.randn(32)}
    for i in range(2):
        for name, shape in (('ln_1', (32,)), ('attn.c_attn', (96, 32)), ('attn.c_proj', (32, 32)),
                            ('ln_2', (32,)), ('mlp.c_fc', (128, 32)), ('mlp.c_proj', (32, 128))):
            w[f'transformer.h.{i}.{name}.weight'] = 0.3 * torch.randn(shape)
    if bias:
        w |= {k.replace('weight', 'bias'): 0.3 * torch.randn(v.size(0))
              for k, v in w.items() if 'ln_' in k or '.c_' in k}
    return w | {'lm_head.weight': w['transformer.wte.weight'] if tied else torch.randn(50, 32)}


def write_nanogpt(path, state=None, prefix='', **args):
    torch.save({'model': {prefix + k: v for k, v in (nanogpt_state() if state is None else state).items()},
                'optimizer': {}, 'model_args': ARGS | args, 'iter_num': 3, 'best_val_loss': torch.tensor(1.0),
                'config': {}}, path)
    return str(path)


def write_hf_gpt2(folder, **config):
    """nanogpt_state() as the gpt2 folders of the hub have it: four transposed weights, no prefix, no lm_head, masks."""
    state = {k.removeprefix('transformer.'): v.t().contiguous() if '.c_' in k and v.ndim == 2 else v
             for k, v in nanogpt_state().items() if k != 'lm_head.weight'}
    torch.save(state | {'h.0.attn.bias': torch.ones(1, 1, 24, 24), 'h.0.attn.masked_bias': torch.tensor(-1e4)},
               folder / 'pytorch_model.bin')
    (folder / 'config.json').write_text(json.dumps(
        {'model_type': 'gpt2', 'n_positions': 24, 'vocab_size': 50, 'n_layer': 2, 'n_head': 4, 'n_embd': 32} | config))
    return str(folder)


def write_gpt2_tokenizer(folder, tok):
    """vocab.json and merges.txt as GPT-2 has them."""
    tokens, character = [t.encode('latin-1') for t in tok.meta()['ranks']], byte_characters()
    text = lambda token: ''.join(character[b] for b in token)
    vocab = ({text(token): i for i, token in enumerate(tokens)}
             | {name: tok.special(name) for name in tok.special_tokens})
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'merges.txt').write_text(
        '#version: 0.2\n' + ''.join(f'{text(a)} {text(b)}\n' for a, b in merges_of(tokens)), encoding='utf-8')


# the config.json of a small Llama of Hugging Face's
HF_LLAMA = {'model_type': 'llama', 'vocab_size': V, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
            'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 40, 'rms_norm_eps': 1e-3,
            'rope_theta': 500.0, 'hidden_act': 'silu', 'tie_word_embeddings': False}


def llama_state(**shape):
    """Random weights under Hugging Face's names."""
    c = HF_LLAMA | shape
    torch.manual_seed(0)
    n, hidden = c['hidden_size'], c['intermediate_size']
    kv = n // c['num_attention_heads'] * c['num_key_value_heads']
    state = {'model.embed_tokens': torch.randn(c['vocab_size'], n), 'model.norm': torch.randn(n)}
    for i in range(c['num_hidden_layers']):
        layer = {'self_attn.q_proj': (n, n), 'self_attn.k_proj': (kv, n), 'self_attn.v_proj': (kv, n),
                 'self_attn.o_proj': (n, n), 'mlp.gate_proj': (hidden, n), 'mlp.up_proj': (hidden, n),
                 'mlp.down_proj': (n, hidden), 'input_layernorm': (n,), 'post_attention_layernorm': (n,)}
        state |= {f'model.layers.{i}.{name}': 0.4 * torch.randn(shape) for name, shape in layer.items()}
    if not c['tie_word_embeddings']:
        state['lm_head'] = 0.3 * torch.randn(c['vocab_size'], n)
    return {f'{name}.weight': tensor for name, tensor in state.items()}


def write_llama(folder, state=None, tok=None, **shape):
    """A folder of Hugging Face's that needs no package."""
    os.makedirs(folder, exist_ok=True)
    torch.save(llama_state(**shape) if state is None else state, f'{folder}/pytorch_model.bin')
    with open(f'{folder}/config.json', 'w') as f:
        json.dump(HF_LLAMA | shape, f)
    if tok:
        write_gpt2_tokenizer(folder, tok)
    return str(folder)


class Evil:
    """Whoever unpickles it makes the folder."""
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def prompt_of(tokenizer, conversation):
    """A conversation that ends with the user -> its ids and what opens the answer."""
    return tokenizer.render_chat(conversation)[0] + tokenizer.turn('assistant', '')[0]


def logits_of(model, idx):
    with torch.no_grad():
        return model.logits(model.trunk(idx))


def far(a, b):
    return (a - b).abs().max()


def refuses(match, f, *args, **how):
    """f(*args, **how) says no in one line that matches, which is returned."""
    with pytest.raises((ValueError, AssertionError), match=match) as e:
        f(*args, **how)
    message = str(e.value)
    assert '\n' not in message and len(message) < 1000
    return message
