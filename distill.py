"""
Distillation: a student that learns from a teacher's distributions beside the text.

    python train.py config/distill_stdlib_bpe.py --teacher=out-stdlib-bpe
        # the teacher runs beside the student
    python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe
        # or only once: 12 sampled soft labels a token, on disk
    python train.py config/distill_stdlib_bpe.py
        # ... and any number of students learn from them

    python distill.py --fetch=d32 --out_dir=teachers/d32
        # nanochat's d32, 7.2 GB; then --teacher=nanochat:teachers/d32
    python distill.py --teacher=nanochat:teachers/d32 --dataset=fineweb_edu --to_picochat=out-d32
        # as best.pt, for every other script
    python distill.py --teacher=out-stdlib-bpe --to_hf=hf-stdlib-bpe
        # for transformers' NanoChatForCausalLM

    from distill import Distiller
    losses = Distiller(student, [teacher])(idx, targets)  # {'ce': ..., 'kl': ..., ...}, each in nats per unmasked token

A teacher is a picochat model (its out_dir or a .pt), nanochat:FOLDER (of the d20-d34 era), gpt2:PATH (nanoGPT's ckpt.pt
or Hugging Face's folder), random:d32 (that shape with random weights, to measure with), or several joined by +, whose
probabilities are averaged. Losses are means over unmasked tokens: they do not change when the batch or its rows become
twice as long, so alpha means the same everywhere.
Labels are written for every token of the training split, with at least a quarter of the context to its left (but for
the first ones). Sampled ones are unbiased: the expected gradient is that of the whole distribution (arXiv 2503.16870).
Those of --method=topk are not, unless k is the vocabulary.
"""
import json
import math
import os
import re
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.loader import Loader, copy_to, download, held_out, read_text
from data.tokenizer import fingerprint, from_meta, hf_tokenizer, load_gpt2_tokenizer, load_nanochat_tokenizer
from model import (GPT, GPTConfig, SOFTCAP, atomic_write, can_compile, check_device, check_knobs, chunked, fast_bf16,
                   load_model, load_tensors, rope_tables, save_checkpoint, shard)

# -----------------------------------------------------------------------------
# how far two distributions are apart: log-probabilities of student and teacher (..., V) -> nats (...)

def forward_kl(s, t):
    """KL(teacher || student): the student must cover all that the teacher thinks possible."""
    return (t.exp() * (t - s)).sum(dim=-1)


def reverse_kl(s, t):
    """KL(student || teacher): the student must not say what the teacher would not (arXiv 2306.08543)."""
    return forward_kl(t, s)


def jsd(s, t):
    """Jensen-Shannon divergence: the mean distance of both to the distribution halfway (arXiv 2306.13649)."""
    middle = torch.logaddexp(s, t) - math.log(2)
    return (forward_kl(middle, s) + forward_kl(middle, t)) / 2


DIVERGENCES = {'forward_kl': forward_kl, 'reverse_kl': reverse_kl, 'jsd': jsd}


def teacher_log_probs(teachers, states, temperature, asked=None):
    """
    Each teacher's states (N, n_embd) -> the mean of their distributions at temperature, as log-probabilities (N, V).
    asked: (teachers, N) bool, which of them have a say on which token; all, if it is None.
    """
    logs = [F.log_softmax(teacher.logits(x) / temperature, dim=-1) for teacher, x in zip(teachers, states)]
    if len(logs) == 1:
        return logs[0]
    if asked is None:
        return torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))
    return (torch.stack(logs).masked_fill(~asked[..., None], -math.inf).logsumexp(dim=0)
            - asked.sum(dim=0).log()[:, None])


def in_bfloat16(teacher):
    """Its matrices in bfloat16, in place: autocast would make the same of them anew, from float32, for every pass."""
    for module in teacher.modules():
        if isinstance(module, nn.Linear):       # a new parameter: an embedding that is tied to it stays as it is
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    return teacher


class Distiller(nn.Module):
    """
    forward(idx, targets) -> the student's losses and 'kl', its distance from the teachers, in nats per unmasked token
    and times temperature^2, which keeps gradients of the same size at any temperature (arXiv 1503.02531). With labels
    (of Labels.batch) no teacher is run. Logits of student and teachers exist for one chunk of tokens at a time. Only
    the student's parameters are parameters of this module.
    """
    def __init__(self, student, teachers=(), divergence='forward_kl', temperature=1.0):
        super().__init__()
        self.student, self.divergence, self.temperature = student, DIVERGENCES[divergence], temperature
        self.teachers = list(teachers)          # a plain list: nn.Module does not look for parameters in it

    def flops_per_token(self):
        return (self.student.flops_per_token()
                + sum(teacher.flops_per_token(training=False) for teacher in self.teachers))

    def forward(self, idx, targets, *labels):
        T = self.temperature
        x = self.student.trunk(idx)
        with torch.no_grad():
            # with labels: (B, T, k) ids, (B, T, k) weights and (B, T) entropy; without: (B, T, n_embd) of each teacher
            soft = labels or [teacher.trunk(idx) for teacher in self.teachers]

        def nats(x, targets, *soft):
            logits = self.student.logits(x)
            s = F.log_softmax(logits, dim=-1)
            ce = F.nll_loss(s, targets, ignore_index=-1, reduction='none')
            s = s if T == 1 else F.log_softmax(logits / T, dim=-1)              # computed anew only where it differs
            if labels:
                ids, weight, entropy = soft
                kl = -(weight * s.gather(-1, ids)).sum(dim=-1) - entropy
            else:
                with torch.no_grad():
                    t = teacher_log_probs(self.teachers, soft, T)
                kl = self.divergence(s, t)
            return torch.stack((ce, T * T * kl * (targets >= 0)), dim=-1)  # (N, 2)

        both = chunked(nats, self.student.config.vocab_size, x.flatten(0, 1), targets.flatten(),
                       *(part.flatten(0, 1) for part in soft))
        ce, kl = both.sum(dim=0) / (targets >= 0).sum().clamp(min=1)
        return {'ce': ce, 'kl': kl} | self.student.head_losses(x, targets, idx)

# -----------------------------------------------------------------------------
# soft labels on disk

def label_type(method, k, vocab_size):
    """
    The record of one token: the teachers' entropy in nats, k ids, and for topk their probabilities;
    samples weigh 1/k each.
    """
    return np.dtype([('entropy', '<f2'), ('ids', '<u2' if vocab_size <= 2**16 else '<u4', (k,))]
                    + [('p', '<f2', (k,))] * (method == 'topk'))


@torch.no_grad()
def choose_labels(log_p, method, k, generator):
    """
    log_p (N, V) -> ids (N, k): k draws, or the k most probable;
    and for topk their probabilities (N, k), made to sum to 1.
    """
    if method == 'sample':
        return torch.multinomial(log_p.exp(), k, replacement=True, generator=generator), None
    p, ids = log_p.exp().topk(k, dim=-1)
    return ids, p / p.sum(dim=-1, keepdim=True)


def stride(loader):
    """
    Tokens from one window of the teachers' to the next: they overlap by a quarter, which is kept of the earlier one
    (rows of chats do not overlap).
    """
    return loader.row or loader.block_size - loader.block_size // 4


def says(teacher, places, loader):
    """
    On which tokens, of those at places (N,), the teacher has a say: on what it has not seen if it was trained with
    hold_out, or on all. (N,) bool.
    """
    fold = getattr(teacher, 'hold_out', '')
    return held_out(fold, places, loader.n_tokens, loader.row) if fold else torch.ones_like(places, dtype=torch.bool)


def count_said(teachers, loader):
    """On how many of the loader's tokens each teacher has a say. One line if nobody has a say on some."""
    if not any(getattr(t, 'hold_out', '') for t in teachers):
        return [loader.n_tokens] * len(teachers)
    for t in teachers:
        if getattr(t, 'hold_out', '') and getattr(t, 'data', None) not in (None, loader.meta['sha256']['train.bin']):
            raise SystemExit(f"error: a teacher held out {t.hold_out} of a text that has been prepared anew since, and "
                             "has other tokens now: train it again")
    said = torch.stack([says(t, torch.arange(loader.n_tokens), loader) for t in teachers])      # (teachers, n_tokens)
    if not said.any(dim=0).all():
        first = said.any(dim=0).int().argmin().item()
        raise SystemExit(f"error: nobody can label token {first:,} of {loader.n_tokens:,}: every teacher has seen it; "
                         "add one that was trained with --hold_out= of that part")
    return said.sum(dim=1).tolist()


@torch.no_grad()
def teachers_on(batch, teachers, loader):
    """
    Batch number so many of windows of the loader's block_size -> the first place it settles, the teachers who have a
    say there, the states (N, n_embd) of each, and asked (teachers, N), on which of its N places.
    """
    T, S, B = loader.block_size, stride(loader), loader.batch_size
    x, _ = loader.rows([(batch * B + i) * S for i in range(B)])                  # (B, T)
    first = batch * B * S + (T - S) * (batch > 0)
    # y (N,): the places of the tokens that are predicted
    y = (first + 1 + torch.arange(B * S + (T - S) * (batch == 0), device=x.device)).clamp(max=loader.n_tokens - 1)
    asked = torch.stack([says(t, y, loader) for t in teachers])                  # (teachers, N)
    near = [t for t, here in zip(teachers, asked) if here.any()]
    states = [t.trunk(x) for t in near]
    settled = [s[:, T - S:].flatten(0, 1) for s in states]                       # (N, n_embd) each
    if batch == 0:                              # nothing comes before the first window: it settles its start, too
        settled = [torch.cat((s[0, :T - S], rest)) for s, rest in zip(states, settled)]
    return first, near, settled, asked[asked.any(dim=1)]


@torch.no_grad()
def fit_temperature(teachers, loader, batches=16):
    """
    -> the temperature of 0.8, 0.85, ..., 2 at which the teachers' distributions give the text the most probability, by
    so many batches spread over it: teachers that have read their own text often are too sure of what they have not
    read (arXiv 1706.04599). Of teachers that have seen this text it says nothing.
    """
    count_said(teachers, loader)                # ends here if nobody has a say on some token
    total = math.ceil(loader.n_tokens / (loader.batch_size * stride(loader)))
    grid, nats = [round(0.8 + 0.05 * i, 2) for i in range(25)], torch.zeros(25, dtype=torch.float64)
    for batch in range(0, total, math.ceil(total / batches)):
        first, near, states, asked = teachers_on(batch, teachers, loader)
        y = torch.from_numpy(loader.tokens[first + 1:first + 1 + asked.size(1)].astype(np.int64)).to(asked.device)
        # with a large vocabulary only some of the tokens, evenly spaced
        rows = torch.arange(len(y))
        if loader.mask is not None:             # of chats only what is learnt
            rows = rows[torch.from_numpy(loader.mask[first + 1:first + 1 + len(y)] != 0)]
        rows = rows[::max(1, len(rows) * teachers[0].config.vocab_size // 2**25)]
        for i, t in enumerate(grid):
            nats[i] -= (teacher_log_probs(near, [s[rows] for s in states], t, asked[:, rows])
                        .gather(1, y[rows, None]).sum().cpu())
    return grid[nats.argmin()]


@torch.no_grad()
def write_labels(folder, teachers, loader, about, method='sample', k=12, temperature=1.0, seed=1337, calibration=1.0):
    """
    Labels for every token of the loader's split, a record each, into folder/labels.bin, and meta.json last: without it
    a folder is not a set of labels. They are of the teachers' distributions at temperature * calibration, for a student
    at temperature; what calibration is, fit_temperature says. Goes on with a labels.bin.part that it finds, and ends
    with the same bytes. Returns meta.
    """
    T, S, n, V = loader.block_size, stride(loader), loader.n_tokens, teachers[0].config.vocab_size
    said = count_said(teachers, loader)
    record, part = label_type(method, k, V), os.path.join(folder, 'labels.bin.part')
    meta = about | {'method': method, 'k': k, 'temperature': temperature, 'calibration': calibration, 'seed': seed,
                    'vocab_size': V, 'block_size': T, 'batch_size': loader.batch_size, 'tokens': n,
                    'data': loader.meta['sha256']['train.bin'],
                    'flops': T / S * sum(count * t.flops_per_token(training=False) for t, count in zip(teachers, said))}
    os.makedirs(folder, exist_ok=True)
    begun = os.path.join(folder, 'begun.json')
    if os.path.exists(begun) and json.load(open(begun)) != meta:
        raise SystemExit(f"error: {folder} holds half-written labels of another kind ({begun} says which): "
                         "remove the folder, or give another --out_dir")
    atomic_write(begun, lambda f: f.write(json.dumps(meta).encode()))
    step = loader.batch_size * S                # tokens that a batch of windows settles; the first settles T - S more
    clock = time.perf_counter()
    with open(part, 'ab') as f:                 # its end is where f stands
        done = f.tell() // record.itemsize
        batch = max(0, done - (T - S)) // step
        f.seek(f.truncate(record.itemsize * (batch * step + (T - S) * (batch > 0))))
        while f.tell() < record.itemsize * n:
            generator = torch.Generator(loader.device).manual_seed(hash((seed, batch)))
            first, near, states, asked = teachers_on(batch, teachers, loader)
            out = np.empty(asked.size(1), record)
            for rows in torch.arange(len(out)).split(max(1, 2**25 // V)):       # 128 MiB of logits at a time
                log_p = teacher_log_probs(near, [s[rows] for s in states], temperature * calibration, asked[:, rows])
                ids, p = choose_labels(log_p, method, k, generator)
                out['entropy'][rows], out['ids'][rows] = (-(log_p.exp() * log_p).sum(dim=-1)).cpu(), ids.cpu()
                if p is not None:
                    out['p'][rows] = p.cpu()
            f.write(out[:n - first].tobytes())
            f.flush()
            batch += 1
            if batch % 50 == 0:
                seen = f.tell() // record.itemsize
                print(f'{seen:,} of {n:,} tokens, {(seen - done) / (time.perf_counter() - clock):,.0f} tokens/s')
    os.replace(part, os.path.join(folder, 'labels.bin'))
    os.replace(begun, os.path.join(folder, 'meta.json'))
    return meta


class Labels:
    """
    A folder that write_labels wrote, for the data that it was written for.
    batch(starts, block_size) -> what Distiller takes.
    """
    def __init__(self, folder, loader, device='cpu'):
        self.meta = m = json.loads(read_text(os.path.join(folder, 'meta.json')))
        if 'data' not in m or not os.path.exists(os.path.join(folder, 'labels.bin')):
            raise SystemExit(f"error: {folder} holds no whole labels: write some, "
                             "python distill.py --teacher=... --out_dir=ANOTHER")
        # the loader has fewer tokens than the labels if it holds out a part
        if m['data'] != loader.meta['sha256']['train.bin'] or m['tokens'] != loader.n_tokens:
            raise SystemExit(f"error: the labels in {folder} were written for other tokens than this dataset has: "
                             f"write them again, python distill.py --teacher=... --out_dir={folder}")
        record, path = label_type(m['method'], m['k'], m['vocab_size']), os.path.join(folder, 'labels.bin')
        if os.path.getsize(path) != m['tokens'] * record.itemsize:
            raise SystemExit(f"error: {path} has {os.path.getsize(path):,} bytes, "
                             f"expected {m['tokens'] * record.itemsize:,}: write the labels again")
        self.table, self.device = np.memmap(path, record, 'r'), device  # (n_tokens,)

    def batch(self, starts, block_size):
        """
        starts: B places in the split -> ids (B, T, k) int64, weights (B, T, k) and entropy (B, T) float32,
        for the tokens after those places.
        """
        rows = self.table[np.minimum(np.array(starts)[:, None] + np.arange(block_size), len(self.table) - 1)]
        ids = torch.from_numpy(rows['ids'].astype(np.int64))
        weight = (torch.from_numpy(rows['p'].astype(np.float32)) if 'p' in rows.dtype.names
                  else torch.full(ids.shape, 1 / ids.size(-1)))
        return copy_to(self.device, ids, weight, torch.from_numpy(rows['entropy'].astype(np.float32)))

# -----------------------------------------------------------------------------
# teachers: whoever made them, they offer config.block_size, config.vocab_size,
# trunk(idx) -> states and logits(states) -> float32

# d32 is a finished chat model (650 steps of chat fine-tuning after its pretraining), d34 is a base model.
# bytes: the size of the weights' file, in which all is float32 but the embedding, which is bfloat16.
NANOCHAT = {'d32': dict(repo='karpathy/nanochat-d32', step=650, params=1_879_048_192,
                        bytes=4 * 1_879_048_192 - 2 * 65536 * 2048),
            'd34': dict(repo='karpathy/nanochat-d34', step=169150, params=2_217_082_880,
                        bytes=4 * 2_217_082_880 - 2 * 65536 * 2176)}

# what only later nanochats have, newest first, and how wide it is where that tells two apart
LATER = (('smear_gate', None, 'of era E4 (from 2026-03-14): the embedding is smeared from the token before, '
                              'a state from half-way is subtracted, q and k are scaled by 1.2'),
         ('ve_gate', 12, 'of era E3 (from 2026-03-09): the rotary base is 100,000, q and k are scaled by 1.15, '
                         'value embeddings are gated by 3 * sigmoid'),
         ('bigram_embed', None, 'of a few days in January 2026 (between E1 and E3): pairs of tokens are embedded, too'),
         ('value_embeds', None, 'of era E2 (from 2026-01-18): gated value embeddings are added to v'),
         ('resid_lambdas', None, 'of era E1 (from 2026-01-11): residual stream and embedding are mixed before '
                                 'each block, some layers see half the context'),
         ('attn.c_attn', None, 'not nanochat but of the GPT-2 family: name it as gpt2:PATH'))


@dataclass
class Teacher:
    """Who teaches, as a value: the model, and what is known about it."""
    name: str                   # as it was asked for: 'out-stdlib-bpe', 'nanochat:teachers/d32'
    model: nn.Module            # in eval mode, without gradients
    tokenizer: object = None    # None: it does not say
    dataset: str = None         # the folder under data/ that it was trained on; None: it does not say
    hold_out: str = ''          # the part of that dataset that it has not seen, like '1/4'; empty: it has seen all
    data: str = None            # the sha256 of the text that it was trained on


def load_teacher(spec, device='cpu'):
    """
    'nanochat:FOLDER', 'gpt2:PATH', 'random:d32', or a picochat checkpoint (a .pt, or a folder with a best.pt) -> Teacher.
    ValueError for what is missing, damaged, hostile or of another kind.
    """
    kind, _, path = spec.partition(':')
    if kind == 'nanochat':
        model, tokenizer = load_nanochat(path, device)
    elif kind == 'gpt2':
        model, tokenizer = load_gpt2(path, device)
    elif kind == 'random':
        model, tokenizer = random_teacher(path, device), None
    elif not os.path.exists(spec):
        raise ValueError(f"no teacher at {spec}: train one (python train.py ...), "
                         f"or write its labels there (python distill.py --teacher=... --out_dir={spec})")
    else:
        path = os.path.join(spec, 'best.pt') if os.path.isdir(spec) else spec
        model, state = load_model(path, device)
        return Teacher(spec, model.requires_grad_(False), from_meta(state['tokenizer']), state.get('dataset'),
                       state.get('knobs', {}).get('hold_out', ''), state.get('data'))
    return Teacher(spec, model.requires_grad_(False), tokenizer)


def load_teachers(spec, tokenizer, block_size, device='cpu', dataset=None):
    """
    'A+B+...' -> list of Teacher, who all read the tokenizer's ids and at least block_size of them at once. Their
    hold_out is that of dataset: who was trained on another has held out nothing of it. ValueError says which does not
    fit.
    """
    teachers = []
    for name in spec.split('+'):
        teacher = load_teacher(name, device)
        same = teacher.dataset and dataset and os.path.normpath(teacher.dataset) == os.path.normpath(dataset)
        if not same:
            teacher.hold_out = ''
        theirs, c = teacher.tokenizer, teacher.model.config
        if theirs is not None and fingerprint(theirs) != fingerprint(tokenizer):
            raise ValueError(f"the teacher {name} has another tokenizer ({theirs.vocab_size:,} tokens) "
                             f"than the data ({tokenizer.vocab_size:,}): prepare the data with the teacher's own")
        if c.vocab_size != tokenizer.vocab_size or c.block_size < block_size:
            raise ValueError(f"the teacher {name} has a vocabulary of {c.vocab_size:,} and a context of "
                             f"{c.block_size}, which must be {tokenizer.vocab_size:,} and at least "
                             f"block_size ({block_size})")
        c.block_size = block_size               # it attends to no more, which flops_per_token counts
        teachers.append(teacher)
    return teachers


def check_teachers(spec):
    """
    ValueError if a teacher of spec in another project's format is not there. A script asks before it looks for data,
    which are prepared with that teacher's tokenizer.
    """
    for name in spec.split('+'):
        if name.startswith('nanochat:'):
            find_nanochat(name.partition(':')[2])


def make_learner(student, spec, loader, tokenizer, *, divergence='forward_kl', temperature=1.0, dataset=None,
                 device='cpu', dtype='float32', fsdp=False):
    """
    What a training loop calls: spec '' -> (the student itself, None); a folder of labels -> (a Distiller, its Labels);
    teachers, joined by + -> (a Distiller that runs them beside the student, None). loader: the training split, whose
    tokens and block_size the teachers must read; dtype bfloat16: teachers keep their matrices in it; fsdp: processes
    share out the teachers, too. ValueError says what does not fit.
    """
    if not spec:
        return student, None
    if os.path.exists(os.path.join(spec, 'meta.json')):
        labels = Labels(spec, loader, device)
        if labels.meta['temperature'] != temperature or divergence != 'forward_kl':
            raise ValueError(f"the labels in {spec} are for forward_kl at temperature "
                             f"{labels.meta['temperature']}, not for {divergence} at {temperature}: "
                             "write others, or train beside the teacher itself")
        return Distiller(student, temperature=temperature), labels
    teachers = load_teachers(spec, tokenizer, loader.block_size, 'cpu' if fsdp else device, dataset)
    if any(t.hold_out for t in teachers):
        raise ValueError(f"a teacher in {spec} was trained with hold_out: write labels "
                         f"(python distill.py --teacher={spec} --out_dir=FOLDER), "
                         "which it gives only for what it has not seen")
    models = [t.model for t in teachers]
    if fsdp:                                    # a GPT-2 is small enough to stay whole
        models = [shard(m, device.split(':')[0]) if isinstance(m, GPT) else m.to(device) for m in models]
    elif dtype == 'bfloat16':
        models = [in_bfloat16(m) for m in models]
    return Distiller(student, models, divergence, temperature), None


def random_teacher(name, device='cpu'):
    """
    'd20', 'd32', 'd34', ... -> a GPT of that nanochat's shape with random weights:
    to measure speed and memory without the files.
    """
    depth = int(name[1:]) if re.fullmatch(r'd[1-9]\d{0,2}', name) else 1
    if depth % 2:
        raise SystemExit(f"error: teacher random:{name} must be random:d and an even number of layers, "
                         "each 64 channels of the width, in heads of 128: try random:d32")
    with torch.device(device):
        model = GPT(GPTConfig(block_size=2048, vocab_size=65536, n_layer=depth, n_head=depth // 2, n_embd=64 * depth))
        # lm_head starts at zero, and would predict every token alike
        nn.init.normal_(model.lm_head.weight, std=model.config.n_embd ** -0.5)
    return model.eval()


def fetch_nanochat(name, folder, host='https://huggingface.co'):
    """
    Downloads the four files of NANOCHAT[name] into folder, going on from what is there, checked by the sha256 that
    their host tells; returns folder. SystemExit says what went wrong.
    """
    if name not in NANOCHAT:
        raise SystemExit(f"error: fetch ({name}) must be one of {', '.join(NANOCHAT)}")
    repo, step, size = (NANOCHAT[name][k] for k in ('repo', 'step', 'bytes'))
    print(f"{host}/{repo} -> {folder}: about {size / 1e9:.1f} GB", flush=True)
    for file in ('tokenizer.pkl', 'token_bytes.pt', f'meta_{step:06d}.json', f'model_{step:06d}.pt'):
        download(f'{host}/{repo}/resolve/main/{file}', os.path.join(folder, file))
    return folder


def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def fill(kind, config, state, path, device):
    """kind(config) with the tensors of state, which must be exactly its own, as float32 on device and in eval mode."""
    with torch.device('meta'):                  # the weights are in memory once
        model = kind(config)
    own = model.state_dict()
    wrong = [f'{k} is missing' for k in own if k not in state] + [f'{k} is unknown' for k in state if k not in own]
    wrong += [f'{k} is {tuple(state[k].shape)} instead of {tuple(own[k].shape)}'
              for k in own if k in state and state[k].shape != own[k].shape]
    if wrong:
        raise SystemExit(f"error: {path} does not have the tensors of its own settings: "
                         f"{', '.join(wrong[:3])}{', ...' if wrong[3:] else ''}: use another copy")
    model.load_state_dict({k: v.to(device, torch.float32).contiguous() for k, v in state.items()}, assign=True)
    return model.eval()


def find_nanochat(path, step=None):
    """
    A folder -> the step of its checkpoint (the last one, or this one) and the path of it.
    SystemExit, in one line, says where to get one.
    """
    files = os.listdir(path) if os.path.isdir(path) else []
    steps = {int(file[6:-3]): file for file in sorted(files) if re.fullmatch(r'model_\d+\.pt', file)}
    if not steps:
        raise SystemExit(f"error: no nanochat checkpoint (model_XXXXXX.pt) in {path!r}: fetch one with "
                         "python distill.py --fetch=d32 --out_dir=teachers/d32 "
                         f"({NANOCHAT['d32']['bytes'] / 1e9:.1f} GB), try its shape, without data, with "
                         "python bench.py --mode=train config/distill_d12_mqa.py --teacher=random:d32, "
                         "or run config/distill_stdlib_bpe.py, which a laptop can")
    step = max(steps) if step is None else step
    if step not in steps:
        raise SystemExit(f"error: {path} has no step {step}: take one of {', '.join(map(str, steps))}")
    return step, os.path.join(path, steps[step])


def load_nanochat(path, device='cpu', step=None):
    """
    A nanochat folder of the d20-d34 era (E0, 2025-10-13 to 2026-01-11) -> GPT with nanochat's own logits, float32, on
    device, and its tokenizer. The folder holds model_XXXXXX.pt (the last step, or this one) and meta_XXXXXX.json;
    tokenizer.pkl and token_bytes.pt lie there, too, or in ../../tokenizer, as nanochat leaves them. SystemExit, in one
    line, for anything else; no pickle runs anything.
    """
    step, file = find_nanochat(path, step)
    home = path if os.path.exists(os.path.join(path, 'tokenizer.pkl')) else os.path.join(path, '..', '..', 'tokenizer')
    meta, token_bytes = os.path.join(path, f'meta_{step:06d}.json'), os.path.join(home, 'token_bytes.pt')
    try:
        # torch.compile puts _orig_mod. in front
        state = {k.replace('_orig_mod.', ''): v for k, v in load_tensors(file, mmap=True).items()}
        for key, width, what in LATER:
            if any(key in k and width in (None, v.size(-1)) for k, v in state.items()):
                raise SystemExit(f"error: {file} is {what}; "
                                 "only nanochats until 2026-01-11 (era E0: d20, d32, d34) load here")
        c = json.loads(read_text(meta))['model_config']
        config = GPTConfig(c['sequence_len'], c['vocab_size'], c['n_layer'], c['n_head'], c['n_kv_head'], c['n_embd'],
                           rope_bf16=True)
        tokenizer = load_nanochat_tokenizer(home)
        sizes = load_tensors(token_bytes).tolist() if os.path.exists(token_bytes) else tokenizer.token_bytes
    except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError) as e:
        raise SystemExit(f"error: {file}, {meta} and {home} are not a whole nanochat checkpoint ({one_line(e)}): "
                         "use another copy")
    # nanochat used to measure a token as text, in which half a character is U+FFFD, 3 bytes; later as bytes
    as_text = [len(tokenizer.decode([i]).encode()) if n else 0 for i, n in enumerate(tokenizer.token_bytes)]
    if (not len(sizes) == tokenizer.vocab_size == config.vocab_size
            or any(n not in either for n, *either in zip(sizes, as_text, tokenizer.token_bytes))):
        raise SystemExit(f"error: the tokenizer in {home} ({tokenizer.vocab_size} tokens), "
                         f"its token_bytes.pt ({len(sizes)}) and {file} ({config.vocab_size}) do not belong together: "
                         "use those of one training")
    # nanochat pads these rows to a multiple of 64, and cuts the logits of the padding off
    for key in ('transformer.wte.weight', 'lm_head.weight'):
        if key in state and len(state[key]) == -(-config.vocab_size // 64) * 64:
            state[key] = state[key][:config.vocab_size]
    model = fill(GPT, config, state, file, device)
    model.cos, model.sin = (t.to(device) for t in rope_tables(config))
    return model, tokenizer

# -----------------------------------------------------------------------------
# GPT-2 and nanoGPT

class GPT2(nn.Module):
    """
    GPT-2 (Radford et al. 2019) as a teacher: LayerNorm, learned positions, GELU, names as everywhere.
    config: see load_gpt2.
    """
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        linear = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=c.bias)
        layer_norm = lambda: nn.LayerNorm(c.n_embd, eps=c.eps, bias=c.bias)
        block = lambda: nn.ModuleDict(dict(
            ln_1=layer_norm(),
            attn=nn.ModuleDict(dict(c_attn=linear(c.n_embd, 3 * c.n_embd), c_proj=linear(c.n_embd, c.n_embd))),
            ln_2=layer_norm(),
            mlp=nn.ModuleDict(dict(c_fc=linear(c.n_embd, c.n_hidden), c_proj=linear(c.n_hidden, c.n_embd)))))
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(block() for _ in range(c.n_layer)), ln_f=layer_norm()))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)

    def trunk(self, idx):
        """idx (B, T) int64 -> states (B, T, n_embd)."""
        c, t, T = self.config, self.transformer, idx.size(1)
        assert T <= c.block_size, f"{T} tokens do not fit block_size ({c.block_size}): shorten the input"
        x = t.wte(idx) + t.wpe.weight[:T]
        for block in t.h:
            qkv = block.attn.c_attn(block.ln_1(x)).view(-1, T, 3, c.n_head, c.n_embd // c.n_head)
            # q, k and v are (B, n_head, T, head_dim) each
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, n_embd)
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate=c.gelu))
        return t.ln_f(x)

    def logits(self, x):
        """States (..., n_embd) -> logits (..., vocab_size) in float32."""
        return self.lm_head(x).float()

    def flops_per_token(self, training=True):
        """As GPT's, for which see there."""
        c, t = self.config, self.transformer
        weights = sum(p.numel() for part in (t.h, t.ln_f) for p in part.parameters()) + c.vocab_size * c.n_embd
        return (3 if training else 1) * (2 * weights + 4 * c.n_layer * c.n_embd * c.block_size)


# what GPT2 can do; GELU: Hugging Face's names -> PyTorch's
GELU = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}
PLAIN = {'model_type': ['gpt2'], 'activation_function': GELU, 'scale_attn_weights': [True],
         'scale_attn_by_inverse_layer_idx': [False]}


def load_gpt2(path, device='cpu'):
    """
    nanoGPT's ckpt.pt (or its folder), or a Hugging Face gpt2 folder (config.json, and model.safetensors or
    pytorch_model.bin) -> GPT2, float32, in eval mode on device, and the tokenizer that lies beside it
    (load_gpt2_tokenizer), or None. The rows by which nanoGPT pads GPT-2's vocabulary are cut off. Its GELU is the exact
    one; until May 2023 it was the tanh, and a checkpoint does not say when it was made. SystemExit, in one line, for
    anything else.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    hf = folder == path and os.path.exists(os.path.join(path, 'config.json'))
    names = ('model.safetensors', 'pytorch_model.bin') if hf else ('ckpt.pt',)
    name = next((n for n in names if os.path.exists(os.path.join(path, n))), names[0])
    file = os.path.join(path, name) if folder == path else path
    try:
        if hf:
            c = json.loads(read_text(os.path.join(path, 'config.json')))
            state = load_tensors(file, mmap=True) if name.endswith('.bin') else import_safetensors().load_file(file)
            state = {f"{'' if k.startswith(('transformer.', 'lm_head.')) else 'transformer.'}{k}": v
                     for k, v in state.items()}
            # these weights are stored as (in, out)
            state = {k: v.t() if re.search(r'\.(c_attn|c_proj|c_fc)\.weight$', k) else v for k, v in state.items()}
            odd = [f'{k}={c[k]}' for k in PLAIN if k in c and c[k] not in PLAIN[k]]
        else:
            saved = dict(load_tensors(file, mmap=True))
            c, state = saved['model_args'], {k.replace('_orig_mod.', ''): v for k, v in saved['model'].items()}
            # any other setting is of a fork, with other blocks
            odd = [f'{k}={c[k]}' for k in c
                   if k not in 'n_layer n_head n_embd block_size bias vocab_size dropout'.split()]
        # old checkpoints hold their causal masks
        state = {k: v for k, v in state.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
        tied = 'lm_head.weight' not in state or torch.equal(state['lm_head.weight'], state['transformer.wte.weight'])
        state['lm_head.weight'] = state.get('lm_head.weight', state['transformer.wte.weight'])
        vocab = c['vocab_size']
        if vocab == 50304 and not hf:           # GPT-2's 50,257 tokens, which nanoGPT pads to a multiple of 64
            vocab = 50257
            state |= {k: state[k][:vocab] for k in ('transformer.wte.weight', 'lm_head.weight')}
        config = SimpleNamespace(block_size=c['n_positions' if hf else 'block_size'], vocab_size=vocab,
                                 n_layer=c['n_layer'], n_head=c['n_head'], n_embd=c['n_embd'],
                                 n_hidden=c.get('n_inner') or 4 * c['n_embd'],
                                 bias='transformer.ln_f.bias' in state, eps=c.get('layer_norm_epsilon', 1e-5),
                                 gelu=GELU.get(c.get('activation_function', 'gelu_new')) if hf else 'none')
        tokenizer = load_gpt2_tokenizer(folder)
    except Exception as e:                      # the safetensors package has an exception of its own for damaged files
        raise SystemExit(f"error: {file} and what lies beside it are not a whole checkpoint of GPT-2 or nanoGPT "
                         f"({one_line(e)}): use another copy")
    if odd:
        raise SystemExit(f"error: {file} is not a plain GPT-2 ({', '.join(odd)}): it would need another forward")
    model = fill(GPT2, config, state, file, device)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model, tokenizer


# -----------------------------------------------------------------------------
# the other way: Hugging Face's NanoChat, which turns q and k by minus theta, too

HF_NAMES = {'transformer.wte': 'model.embed_tokens', 'transformer.h.': 'model.layers.',
            'attn.c_q': 'self_attn.q_proj', 'attn.c_k': 'self_attn.k_proj', 'attn.c_v': 'self_attn.v_proj',
            'attn.c_proj': 'self_attn.o_proj', 'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise SystemExit("error: model.safetensors needs one more package: pip install safetensors")
    return safetensors.torch


def export_hf(model, tokenizer, folder):
    """
    Writes a float GPT and its BPE into folder, for transformers' NanoChatForCausalLM and AutoTokenizer: the same
    logits, the same ids. Multi-token and draft heads have no place there and are left out. There, special tokens are
    read out of text, unless split_special_tokens=True.
    """
    c = model.config
    assert tokenizer.kind == 'bpe' and tokenizer.vocab_size == c.vocab_size, (
        f"expected the model's own BPE of {c.vocab_size} tokens, "
        f"not a {tokenizer.kind} tokenizer of {tokenizer.vocab_size}")
    tensors, left_out = {}, []
    for name, t in model.state_dict().items():
        assert t.is_floating_point(), f"{name} is {t.dtype}: export the float model, before it is quantised"
        if name.startswith(('multi_token.', 'draft.')):
            left_out.append(name)
        elif not (c.tie_weights and name == 'lm_head.weight'):
            for ours, theirs in HF_NAMES.items():
                name = name.replace(ours, theirs)
            tensors[name] = t.detach().cpu().float().contiguous()
    if left_out:
        print(f"note: {len(left_out)} tensors of multi-token and draft heads are left out: "
              "Hugging Face's NanoChat has none")
    ends = [tokenizer.special(name) for name in ('<|assistant_end|>', '<|bos|>') if name in tokenizer.special_tokens]
    config = {'architectures': ['NanoChatForCausalLM'], 'model_type': 'nanochat',
              'vocab_size': c.vocab_size, 'hidden_size': c.n_embd, 'intermediate_size': c.n_hidden,
              'num_hidden_layers': c.n_layer, 'num_attention_heads': c.n_head, 'num_key_value_heads': c.n_kv_head,
              'head_dim': c.head_dim, 'max_position_embeddings': c.block_size, 'hidden_act': 'relu2',
              'rms_norm_eps': torch.finfo(torch.float32).eps,
              'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_base},
              'final_logit_softcapping': SOFTCAP, 'tie_word_embeddings': c.tie_weights,
              'bos_token_id': tokenizer.bos, 'eos_token_id': ends or None, 'pad_token_id': None, 'dtype': 'float32'}
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': c.block_size,
                'clean_up_tokenization_spaces': False} | (
                    {'bos_token': tokenizer.decode([tokenizer.bos])} if tokenizer.bos is not None else {})
    texts = {'tokenizer.json': hf_tokenizer(tokenizer), 'tokenizer_config.json': settings, 'config.json': config}
    data = import_safetensors().save(tensors, metadata={'format': 'pt'})
    files = {'model.safetensors': data} | {name: json.dumps(text).encode() for name, text in texts.items()}
    for name, content in files.items():
        atomic_write(os.path.join(folder, name), lambda f: f.write(content))
    return folder


# -----------------------------------------------------------------------------
# the script: labels, fetching, exporting

if __name__ == '__main__':
    # -------------------------------------------------------------------------
    teacher = ''                # as above
    out_dir = ''                # where the labels go, or what is fetched
    fetch = ''                  # d32 or d34: download that nanochat
    to_picochat = ''            # a folder: write the teacher there as a picochat checkpoint
    to_hf = ''                  # a folder: write the teacher there in Hugging Face's NanoChat format
    dataset = ''                # a folder under data/; empty: the one the teacher was trained on
    method = 'sample'           # sample: k draws a token, unbiased; topk: the k most probable, biased unless k is the vocabulary
    k = 12
    temperature = 1.0           # of the distributions; the student must be trained at the same
    calibrate = False           # teachers trained with hold_out are first made as unsure as their errors on the text call for (fit_temperature)
    block_size = 0              # context of the teacher; 0: its own
    batch_size = 16             # windows a pass
    seed = 1337
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    dtype = 'auto'              # float32 or bfloat16 (autocast); auto: bfloat16 where the device multiplies it faster, as train.py runs a teacher
    compile = True              # torch.compile; needs a C++ compiler on a CPU, goes on without one
    exec(open('configurator.py').read())
    # -------------------------------------------------------------------------
    check_knobs(config, ('k batch_size', int, 1, math.inf), ('block_size', int, 0, math.inf),
                ('seed', int, 0, 2**63 - 1), ('temperature', float, 1e-3, math.inf),
                ('method', ('sample', 'topk')), ('dtype', ('auto', 'float32', 'bfloat16')))
    check_device(device)
    began = time.perf_counter()
    if fetch or to_picochat or to_hf:
        if bool(fetch) + bool(to_picochat) + bool(to_hf) > 1 or fetch and not out_dir or not fetch and not teacher:
            raise SystemExit("error: --fetch= needs --out_dir= (where the files go); --to_picochat= or --to_hf= need "
                             "--teacher= (what is written there); one of the three at a time")
        if fetch:
            folder = fetch_nanochat(fetch, out_dir)
        else:
            model, tokenizer, trained_on = load_teacher(teacher)
            if to_picochat and not (isinstance(model, GPT) and tokenizer and (dataset or trained_on)):
                raise SystemExit(f"error: to_picochat ({to_picochat}) takes a teacher of picochat's own blocks with a "
                                 "tokenizer, like nanochat:FOLDER, and --dataset= to measure it on, "
                                 f"not {teacher} and dataset ({dataset})")
            if to_hf and not (isinstance(model, GPT) and getattr(tokenizer, 'kind', '') == 'bpe'):
                raise SystemExit(f"error: to_hf ({to_hf}) takes a teacher of picochat's own blocks with a BPE, "
                                 f"not {teacher}")
            if to_picochat and os.path.exists(os.path.join(to_picochat, 'best.pt')):
                raise SystemExit(f"error: to_picochat ({to_picochat}) already holds a best.pt: give another folder")
            folder = to_picochat or export_hf(model, tokenizer, to_hf)
            if to_picochat:
                # a fold stays one
                save_checkpoint(os.path.join(folder, 'best.pt'), model, tokenizer.meta(), step=0,
                                dataset=dataset or trained_on, data=getattr(model, 'data', None),
                                knobs={'hold_out': getattr(model, 'hold_out', '')})
        size = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
        print(json.dumps({'file': folder, 'bytes': size, 'tokens': 0,
                          'seconds': round(time.perf_counter() - began, 2)}))
        raise SystemExit
    if not teacher or not out_dir:
        raise SystemExit("error: give --teacher= (the out_dir of a trained model) "
                         "and --out_dir= (a folder for its labels)")
    if os.path.exists(os.path.join(out_dir, 'meta.json')):
        raise SystemExit(f"error: {out_dir} already holds labels: give another --out_dir, or remove it")
    first, _, trained_on = load_teacher(teacher.split('+')[0])
    dataset, block_size = dataset or trained_on, block_size or first.config.block_size
    first = None                                # frees its memory
    if not dataset:
        raise SystemExit(f"error: {teacher} does not say which dataset to label: give --dataset=")
    loader = Loader(os.path.join('data', dataset), 'train', batch_size, block_size, device=device)
    teachers = load_teachers(teacher, from_meta(loader.meta), block_size, device, dataset)
    if calibrate and not all(t.hold_out for t in teachers):
        raise SystemExit("error: calibrate=True needs teachers that have not seen the text, "
                         f"trained with --hold_out=, all of {teacher}")
    if k > teachers[0].config.vocab_size and method == 'topk':
        raise SystemExit(f"error: k ({k}) must be at most the vocabulary ({teachers[0].config.vocab_size:,})")
    if compile and can_compile(device):
        for t in teachers:
            t.trunk, t.logits = torch.compile(t.trunk), torch.compile(t.logits)
    dtype = ('bfloat16' if fast_bf16(device) else 'float32') if dtype == 'auto' else dtype
    if dtype == 'bfloat16':
        teachers = [in_bfloat16(t) for t in teachers]
    with torch.autocast(device.split(':')[0], torch.bfloat16, enabled=dtype == 'bfloat16'):
        calibration = fit_temperature(teachers, loader) if calibrate else 1.0
        try:
            meta = write_labels(out_dir, teachers, loader, {'teacher': teacher, 'dtype': dtype},
                                method, k, temperature, seed, calibration)
        except OSError as e:
            raise SystemExit(f"error: could not write in {out_dir}: {e.strerror}; what is there is kept: "
                             "free some disk space and run the same command again")
    path = os.path.join(out_dir, 'labels.bin')
    seconds = time.perf_counter() - began
    print(f"{path}: {os.path.getsize(path):,} bytes for {loader.n_tokens:,} tokens, "
          f"{loader.n_tokens / seconds:,.0f} tokens/s")
    print(json.dumps({'file': path, 'bytes': os.path.getsize(path), 'seconds': round(seconds, 2), **meta}))
