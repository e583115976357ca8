"""
Distillation: a student that learns from a teacher's distributions beside the text.

    python train.py config/distill_stdlib_bpe.py --teacher=out-stdlib-bpe
        # the teacher runs beside the student
    python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe
        # or only once: 12 sampled soft labels a token, on disk
    python train.py config/distill_stdlib_bpe.py
        # ... from which any number of students learn

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
probabilities are averaged. data/foreign.py reads those that are not ours. Before it teaches, its loss on some of the
text is printed beside what guessing by the tokens' frequencies gives, and it is refused if it is no better than that.
Labels are written for every token of the training split, with at least a quarter of the context to its left (but for
the first ones). Sampled ones are unbiased: the expected gradient is that of the whole distribution (arXiv 2503.16870).
Those of --method=topk are not, unless k is the vocabulary.
"""
import contextlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import quantize
from data.causal_lm import InOne
from data.checkpoint import load_model, save_checkpoint
from data.export import GGUF_TYPES, dequantised, export_gguf, export_hf
from data.files import atomic_write, check_once, check_types, hold, in_repo, json_line, read_json, sync_folder
from data.foreign import FILES, KINDS, refuse_other_blocks
from data.gpt2 import GPT2
from data.judge import check_reading, may_label, tokens_each_may_label
from data.loader import Loader, copy_to, dataset_of
from data.nanochat import fetch_nanochat
from data.record import already, record
from data.signals import interrupt_on_stop
from data.tokenizer import fingerprint, from_meta, vocab_size_of
from data.weights import drop_padding, padded
from data.machine import autocast, can_compile, pick_device, pick_dtype, shard
from model import GPT, chunked, or_one, rope_tables

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


def teacher_log_probs(models, states, temperature, may=None):
    """
    The teachers' models and the states (N, n_embd) of each -> the mean of their distributions at temperature, as
    log-probabilities (N, V). may: (models, N) bool, which of them have a say on which token; all, if it is None.
    """
    logs = [F.log_softmax(model.logits(x) / temperature, dim=-1) for model, x in zip(models, states)]
    if len(logs) == 1:
        return logs[0]
    logs = torch.stack(logs)                    # (models, N, V)
    if may is None:
        return logs.logsumexp(dim=0) - math.log(len(logs))
    return logs.masked_fill(~may[..., None], -math.inf).logsumexp(dim=0) - may.sum(dim=0).log()[:, None]


class Distiller(nn.Module):
    """
    forward(idx, targets) -> the student's losses and 'kl', its distance from the teachers (a list of models), in nats
    per unmasked token and times temperature^2, which keeps gradients of the same size at any temperature (arXiv
    1503.02531). With labels (of Labels.batch) no teacher is run. Losses are means over unmasked tokens: they do not
    change when the batch or its rows become twice as long, so alpha means the same everywhere. Logits of student and
    teachers exist for one chunk of tokens at a time. Only the student's parameters are parameters of this module.
    """
    def __init__(self, student, teachers=(), divergence='forward_kl', temperature=1.0):
        super().__init__()
        self.student, self.divergence, self.temperature = student, DIVERGENCES[divergence], temperature
        self.teachers = list(teachers)          # a plain list: nn.Module does not look for parameters in it

    def flops_per_token(self):
        teachers = sum(teacher.flops_per_token(training=False) for teacher in self.teachers)
        return self.student.flops_per_token() + teachers

    def forward(self, idx, targets, *labels, counts=None):
        T = self.temperature
        counts = counts or self.student.target_counts(targets)                  # see there
        x = self.student.trunk(idx)
        with torch.no_grad():
            # with labels: (B, T, k) ids, (B, T, k) weights and (B, T) entropy; without: (B, T, n_embd) of each teacher
            soft = labels or [teacher.trunk(idx) for teacher in self.teachers]

        def nats(x, targets, *soft):
            """A chunk of N tokens -> cross-entropy and distance of each, (N, 2)."""
            logits = self.student.logits(x)
            s = F.log_softmax(logits, dim=-1)
            ce = F.nll_loss(s, targets, ignore_index=-1, reduction='none')
            if T != 1:
                s = F.log_softmax(logits / T, dim=-1)
            if labels:
                ids, weight, entropy = soft
                kl = -(weight * s.gather(-1, ids)).sum(dim=-1) - entropy
            else:
                with torch.no_grad():
                    t = teacher_log_probs(self.teachers, soft, T)
                kl = self.divergence(s, t)
            return torch.stack((ce, T * T * kl * (targets >= 0)), dim=-1)

        rows = [part.flatten(0, 1) for part in (x, *soft)]      # (B*T, ...) each
        both = chunked(nats, self.student.config.vocab_size, rows[0], targets.flatten(), *rows[1:])
        ce, kl = both.sum(dim=0) / or_one(counts['ce'])
        return {'ce': ce, 'kl': kl} | self.student.head_losses(x, targets, idx, counts)

# -----------------------------------------------------------------------------
# teachers

@dataclass
class Teacher:
    """Who teaches, as a value: the model, and what is known about it."""
    name: str                   # as it was asked for: 'out-stdlib-bpe', 'nanochat:teachers/d32'
    model: nn.Module            # in eval mode, without gradients
    tokenizer: object = None    # None: it does not say
    dataset: str = None         # the folder under data/ that it was trained on; None: it does not say
    hold_out: str = ''          # the part of that dataset that it has not seen, like '1/4'; empty: it has seen all
    data: str = None            # the sha256 of the text that it was trained on


def teacher_names(spec):
    """'A+B+...' -> the names A, B, ...; where a path with a + in it is there, it is one name."""
    parts, names = spec.split('+') if spec else [], []
    while parts:
        n = len(parts)                          # the longest name that is there, or what stands before the next +
        while n > 1 and not os.path.exists(path_of('+'.join(parts[:n]))):
            n -= 1
        names.append('+'.join(parts[:n]))
        parts = parts[n:]
    return names


def path_of(name):
    """'gpt2:PATH' -> PATH; a name without a kind is a path."""
    kind, _, path = name.partition(':')
    return path if kind in KINDS else name


def check_teachers(spec):
    """
    'A+B+...', or a folder of labels -> the files that they are read from. ValueError if a teacher of another project's
    making is not there: its data are prepared with its tokenizer, so a script asks for it before it looks for data.
    """
    files = []
    for name in teacher_names(spec):
        kind, _, path = name.partition(':')
        if kind in FILES:
            files.append(FILES[kind](path))
        elif kind not in KINDS:
            labels = os.path.join(name, 'labels.bin')
            files.append(labels if os.path.exists(labels) else checkpoint_of(name))
    return files


def checkpoint_of(name):
    """A picochat teacher is named by its out_dir, or by a .pt in it."""
    return os.path.join(name, 'best.pt') if os.path.isdir(name) else name


def load_teacher(name, device='cpu'):
    """
    'nanochat:FOLDER', 'gpt2:PATH', 'random:d32', or a picochat checkpoint (a .pt, or a folder with a best.pt) ->
    Teacher. ValueError for what is missing, damaged, hostile or of another kind.
    """
    kind, _, path = name.partition(':')
    if kind in KINDS:
        model, tokenizer = KINDS[kind](path, device)
        return Teacher(name, model.requires_grad_(False), tokenizer)
    if name.endswith('.safetensors'):           # of quantize.py; as a teacher it is in float
        model, state = quantize.load(name, device)
        return Teacher(name, dequantised(model), from_meta(state['tokenizer']), dataset_of(state, name))
    if not os.path.exists(name):
        raise ValueError(f"no teacher at {name}: train one (python train.py ...), "
                         f"or write its labels there (python distill.py --teacher=... --out_dir={shlex.quote(name)})")
    model, state = load_model(checkpoint_of(name), device)
    return Teacher(name, model.requires_grad_(False), from_meta(state['tokenizer']), dataset_of(state, name),
                   state.get('knobs', {}).get('hold_out', ''), state.get('data'))


def fitted(teacher, tokenizer, block_size, dataset=None):
    """
    The Teacher as one for texts of that dataset, in windows of block_size tokens. ValueError if it reads other ids, or
    fewer of them at once.
    """
    theirs, c = teacher.tokenizer, teacher.model.config
    if theirs is None and c.vocab_size == padded(tokenizer.vocab_size):
        drop_padding(teacher.model, tokenizer.vocab_size)
    if theirs is not None and fingerprint(theirs) != fingerprint(tokenizer):
        raise ValueError(f"the teacher {teacher.name} has another tokenizer ({theirs.vocab_size:,} tokens) "
                         f"than the data ({tokenizer.vocab_size:,}): prepare the data with the teacher's own")
    if c.vocab_size != tokenizer.vocab_size or c.block_size < block_size:
        raise ValueError(f"the teacher {teacher.name} has a vocabulary of {c.vocab_size:,} and a context of "
                         f"{c.block_size}, which must be {tokenizer.vocab_size:,} and at least "
                         f"block_size ({block_size})")
    c.block_size = block_size                   # it attends to no more, which flops_per_token counts
    same = teacher.dataset and dataset and os.path.normpath(teacher.dataset) == os.path.normpath(dataset)
    return teacher if same else replace(teacher, hold_out='')   # of another text it has held out nothing


def load_teachers(spec, tokenizer, block_size, device='cpu', dataset=None):
    """'A+B+...' -> list of Teacher, all of them fitted. ValueError says which is not there, or does not fit."""
    return [fitted(load_teacher(name, device), tokenizer, block_size, dataset) for name in teacher_names(spec)]


def in_bfloat16(model):
    """Its matrices in bfloat16, in place: autocast would make the same of them anew, from float32, for every pass."""
    for module in () if isinstance(model, InOne) else model.modules():
        if isinstance(module, nn.Linear):       # a new parameter: an embedding that is tied to it stays as it is
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    return model


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
    if any(teacher.hold_out for teacher in teachers):
        raise ValueError(f"a teacher in {spec} was trained with hold_out: write labels "
                         f"(python distill.py --teacher={shlex.quote(spec)} --out_dir=FOLDER), "
                         "which it gives only for what it has not seen")
    models = [teacher.model for teacher in teachers]
    if fsdp:                                    # a GPT-2 is small enough to stay whole
        kind = torch.device(device).type
        models = [shard(model, kind) if isinstance(model, GPT) else model.to(device) for model in models]
    elif dtype == 'bfloat16':
        models = [in_bfloat16(model) for model in models]
    with autocast(device, dtype):
        check_reading([replace(teacher, model=model) for teacher, model in zip(teachers, models)], loader)
    return Distiller(student, models, divergence, temperature), None

# -----------------------------------------------------------------------------
# how teachers read a text: in windows of block_size tokens, each of which starts three quarters of a window after the
# one before. So every place in the text lies beyond the first quarter of one window, and that one labels it: its
# teacher has seen at least a quarter of a window before it. (Rows of chats hold whole conversations: they do not
# overlap.)

def overlap(loader):
    """How many tokens a window shares with the one before."""
    return 0 if loader.row else loader.block_size // 4


def stride(loader):
    """Tokens from the start of one window to that of the next."""
    return loader.block_size - overlap(loader)


def first_place(batch, loader):
    """
    Where batch number so many of windows begins to label, which is where the one before ends. The first begins with
    the text.
    """
    return batch * loader.batch_size * stride(loader) + overlap(loader) if batch else 0


@torch.no_grad()
def read_windows(batch, teachers, loader):
    """
    Runs the teachers over batch number so many of windows, which labels N places, in each the token that comes next.
    -> the first of the places; the models of the teachers who may label any of them, the states (N, n_embd) of each;
    and may (models, N), who may label which. The last batch may reach beyond the end of the text.
    """
    windows = [batch * loader.batch_size + i for i in range(loader.batch_size)]
    x, _ = loader.rows([window * stride(loader) for window in windows])         # (B, T)
    places = torch.arange(first_place(batch, loader), first_place(batch + 1, loader), device=x.device)     # (N,)
    # the window that labels a place; the start of the text lies in the first one alone
    window = ((places - overlap(loader)) // stride(loader)).clamp(min=0)
    position = places - window * stride(loader)                                 # of the place within that window
    following = (places + 1).clamp(max=loader.n_tokens - 1)
    may = torch.stack([may_label(teacher, following, loader) for teacher in teachers])
    models = [teacher.model for teacher, here in zip(teachers, may) if here.any()]
    states = [model.trunk(x)[window - windows[0], position] for model in models]
    return first_place(batch, loader), models, states, may[may.any(dim=1)]


@torch.no_grad()
def fit_temperature(teachers, loader, batches=16):
    """
    -> the temperature of 0.8, 0.85, ..., 2 at which the teachers' distributions give the text the most probability, by
    so many batches spread over it: teachers that have read their own text often are too sure of what they have not
    read (arXiv 1706.04599). Of teachers that have seen this text it says nothing.
    """
    tokens_each_may_label(teachers, loader)     # raises if nobody may label some token
    vocab_size = teachers[0].model.config.vocab_size
    grid = [round(0.8 + 0.05 * i, 2) for i in range(25)]
    nats = torch.zeros(25, dtype=torch.float64)
    total = math.ceil(loader.n_tokens / (loader.batch_size * stride(loader)))
    for batch in range(0, total, math.ceil(total / batches)):
        first, models, states, may = read_windows(batch, teachers, loader)
        following = slice(first + 1, first + 1 + may.size(1))                   # ends where the text does
        y = torch.from_numpy(loader.tokens[following].astype(np.int64)).to(may.device)
        rows = torch.arange(len(y))
        if loader.mask is not None:             # of chats only what is learnt
            rows = rows[torch.from_numpy(loader.mask[following] != 0)]
        rows = rows[::max(1, len(rows) * vocab_size // 2**25)]  # evenly spaced, fewer with a large vocabulary
        states = [s[rows] for s in states]
        for i, temperature in enumerate(grid):
            log_p = teacher_log_probs(models, states, temperature, may[:, rows])
            nats[i] -= log_p.gather(1, y[rows, None]).sum().cpu()
        print(f'calibrating: at token {first:,} of {loader.n_tokens:,}', flush=True)
    return grid[nats.argmin()]

# -----------------------------------------------------------------------------
# soft labels on disk

@dataclass
class Recipe:
    """Labels are of the teachers' distributions at temperature * calibration, for a student at temperature."""
    method: str = 'sample'      # sample: k draws a token; topk: the k most probable
    k: int = 12
    temperature: float = 1.0
    calibration: float = 1.0    # see fit_temperature
    seed: int = 1337            # of the draws


def label_type(method, k, vocab_size):
    """
    The record of one token: the teachers' entropy in nats, k ids, and for topk their probabilities;
    samples weigh 1/k each.
    """
    fields = [('entropy', '<f2'), ('ids', '<u2' if vocab_size <= 2**16 else '<u4', (k,))]
    if method == 'topk':
        fields.append(('p', '<f2', (k,)))
    return np.dtype(fields)


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


@torch.no_grad()
def label_batch(batch, teachers, loader, recipe):
    """The records (N,) of the places that this batch of windows labels, as far as the text goes."""
    vocab_size = teachers[0].model.config.vocab_size
    generator = torch.Generator(loader.device).manual_seed(hash((recipe.seed, batch)))
    first, models, states, may = read_windows(batch, teachers, loader)
    labels = np.empty(may.size(1), label_type(recipe.method, recipe.k, vocab_size))
    for rows in torch.arange(len(labels)).split(max(1, 2**25 // vocab_size)):   # 128 MiB of logits at a time
        log_p = teacher_log_probs(models, [s[rows] for s in states], recipe.temperature * recipe.calibration,
                                  may[:, rows])
        ids, p = choose_labels(log_p, recipe.method, recipe.k, generator)
        labels['entropy'][rows] = -(log_p.exp() * log_p).sum(dim=-1).cpu()
        labels['ids'][rows] = ids.cpu()
        if p is not None:
            labels['p'][rows] = p.cpu()
    return labels[:loader.n_tokens - first]


def describe(teachers, loader, recipe):
    """What meta.json says of labels, their cost included."""
    T = loader.block_size
    counts = tokens_each_may_label(teachers, loader)
    flops = sum(count * teacher.model.flops_per_token(training=False) for teacher, count in zip(teachers, counts))
    return {**asdict(recipe), 'vocab_size': teachers[0].model.config.vocab_size, 'block_size': T,
            'batch_size': loader.batch_size, 'tokens': loader.n_tokens, 'data': loader.meta['sha256']['train.bin'],
            'flops': T / stride(loader) * flops}


def refuse_labels(folder):
    """ValueError if there are labels already."""
    if os.path.exists(os.path.join(folder, 'meta.json')):
        raise ValueError(f"{folder} already holds labels: give another --out_dir, or remove it")


def write_labels(folder, teachers, loader, recipe=Recipe(), about=()):
    """
    Labels for every token of the loader's split, a record each, into folder/labels.bin, and meta.json last: without it
    a folder is not a set of labels. about: what else meta.json is to say. Goes on with a labels.bin.part that it finds,
    and ends with the same bytes. Returns what meta.json says.
    """
    meta = dict(about) | describe(teachers, loader, recipe)
    whole, begun = os.path.join(folder, 'labels.bin'), os.path.join(folder, 'begun.json')
    part = f'{whole}.part'
    with hold(folder):
        refuse_labels(folder)
        if not os.path.exists(begun):
            for path in (whole, part):          # without a meta.json they are no labels
                if os.path.exists(path):
                    os.remove(path)
            atomic_write(begun, lambda f: f.write(json.dumps(meta).encode()))
        elif read_json(begun, 'remove the folder, or give another --out_dir') != meta:
            raise ValueError(f"{folder} holds half-written labels of another kind ({begun} says which): "
                             "remove the folder, or give another --out_dir")
        # if only what is whole is there, we were killed between the last two lines
        if os.path.exists(part) or not os.path.exists(whole):
            write_records(part, teachers, loader, recipe)
            os.replace(part, whole)
            sync_folder(folder)
        os.replace(begun, os.path.join(folder, 'meta.json'))
    return meta


def write_records(path, teachers, loader, recipe):
    """The records of all tokens -> the file at path, which may hold the first of them already."""
    n = loader.n_tokens
    size = label_type(recipe.method, recipe.k, teachers[0].model.config.vocab_size).itemsize
    with open(path, 'ab') as f:
        # what is there ends with a whole batch, or with a torn one, which is written again
        done = f.tell() // size
        batch = max(0, done - overlap(loader)) // (loader.batch_size * stride(loader))
        f.seek(f.truncate(size * first_place(batch, loader)))
        began = told = time.perf_counter()
        while f.tell() < size * n:
            records = label_batch(batch, teachers, loader, recipe).tobytes()
            try:
                f.write(records)
                f.flush()
            except OSError as e:
                raise OSError(f"could not write {path}: {e.strerror}; what is there is kept: "
                              "free some disk space and run the same command again") from e
            batch += 1
            now, seen = time.perf_counter(), f.tell() // size
            if now - told > 5:
                told = now
                print(f'{seen:,} of {n:,} tokens, {(seen - done) / (now - began):,.0f} tokens/s', flush=True)
        os.fsync(f.fileno())


LABELS_META = {'data': str, 'tokens': int, 'method': str, 'k': int, 'vocab_size': int, 'temperature': float}


def check_labels(path, table, vocab_size, remedy):
    """ValueError unless all ids are of the vocabulary, and all else are numbers."""
    for i in range(0, len(table), 2**20):
        for name in table.dtype.names:
            part = table[name][i:i + 2**20]
            right = (part < vocab_size) if name == 'ids' else np.isfinite(part) & (part >= 0)
            if not right.all():
                raise ValueError(f"{path} has {name} that cannot be ({part[~right].flat[0]}): {remedy}")


class Labels:
    """
    A folder that write_labels wrote, for the data that it was written for.
    batch(starts, block_size) -> what Distiller takes.
    """
    def __init__(self, folder, loader, device='cpu'):
        again = f"write them again, python distill.py --teacher=... --out_dir={shlex.quote(str(folder))}"
        meta, path = os.path.join(folder, 'meta.json'), os.path.join(folder, 'labels.bin')
        self.meta, vocab_size = read_json(meta, again), vocab_size_of(loader.meta)
        if 'data' not in self.meta or not os.path.exists(path):
            raise ValueError(f"{folder} holds no whole labels: write some, "
                             "python distill.py --teacher=... --out_dir=ANOTHER")
        m = check_types(self.meta, meta, again, LABELS_META)
        # the loader has fewer tokens than the labels if it holds out a part
        if m['data'] != loader.meta['sha256']['train.bin'] or m['tokens'] != loader.n_tokens:
            raise ValueError(f"the labels in {folder} were written for other tokens than this dataset has: {again}")
        if m['vocab_size'] != vocab_size:
            raise ValueError(f"the labels in {folder} are of {m['vocab_size']:,} tokens, and this dataset has "
                             f"{vocab_size:,}: {again}")
        if m['method'] not in ('sample', 'topk') or not 1 <= m['k'] <= 2**16:
            raise ValueError(f"the labels in {folder} are {m['k']} of method {m['method']!r:.20} a token, "
                             f"which nothing writes: {again}")
        kind = label_type(m['method'], m['k'], vocab_size)
        size, expected = os.path.getsize(path), m['tokens'] * kind.itemsize
        if size != expected:
            raise ValueError(f"{path} has {size:,} bytes, expected {expected:,}: write the labels again")
        self.table, self.device = np.memmap(path, kind, 'r'), device  # (n_tokens,)
        check_once(path, [m['method'], m['k'], vocab_size], lambda: check_labels(path, self.table, vocab_size, again))

    def batch(self, starts, block_size):
        """
        starts: B places in the split -> ids (B, T, k) int64, weights (B, T, k) and entropy (B, T) float32,
        for the tokens after those places.
        """
        places = np.array(starts)[:, None] + np.arange(block_size)  # (B, T)
        rows = self.table[np.minimum(places, len(self.table) - 1)]
        ids = torch.from_numpy(rows['ids'].astype(np.int64))
        entropy = torch.from_numpy(rows['entropy'].astype(np.float32))
        if 'p' in rows.dtype.names:
            weight = torch.from_numpy(rows['p'].astype(np.float32))
        else:
            weight = torch.full(ids.shape, 1 / ids.size(-1))
        return copy_to(self.device, ids, weight, entropy)

# -----------------------------------------------------------------------------
# the script: labels, fetching, converting

if __name__ == '__main__':
    # -------------------------------------------------------------------------
    teacher = ''                # as above
    out_dir = ''                # where the labels go, or what is fetched
    fetch = ''                  # d32 or d34: download that nanochat
    to_picochat = ''            # a folder: write the teacher there as a picochat checkpoint
    to_hf = ''                  # a folder: write the teacher there as Hugging Face's Llama or NanoChat, as its block is
    to_gguf = ''                # a file: write the teacher there for llama.cpp, if its block is a Llama's
    gguf_type = 'f16'           # f16, q8_0, q4_0 or f32: of the matrices in that file
    dataset = ''                # a folder under data/; empty: the one the teacher was trained on
    method = 'sample'           # sample: k draws a token, unbiased; topk: the k most probable, biased unless k is the vocabulary
    k = 12
    temperature = 1.0           # of the distributions; the student must be trained at the same
    calibrate = False           # teachers trained with hold_out are first made as unsure as their errors on the text call for (fit_temperature)
    block_size = 0              # context of the teacher; 0: its own
    batch_size = 16             # windows a pass
    seed = 1337
    device = 'auto'             # cuda, mps, cpu
    dtype = 'auto'              # float32 or bfloat16 (autocast); auto: bfloat16 where the device multiplies it faster, as train.py runs a teacher
    compile = True              # torch.compile; needs a C++ compiler on a CPU, goes on without one
    limits = {                  # what they may be
        'k batch_size': (1, None),
        'block_size': (0, None),
        'seed': (0, 2**63 - 1),
        'temperature': (1e-3, None),
        'method': ['sample', 'topk'],
        'gguf_type': [*GGUF_TYPES],
        'dtype': ['auto', 'float32', 'bfloat16'],
    }
    exec(open(in_repo('configurator.py')).read())
    # -------------------------------------------------------------------------

    def convert():
        """The teacher in another format -> the folder that it is written in."""
        path = os.path.join(to_picochat, 'best.pt')
        if to_picochat and os.path.exists(path):
            raise ValueError(f"to_picochat ({to_picochat}) already holds a best.pt: give another folder")
        refuse_other_blocks(teacher)
        t = load_teacher(teacher)
        ours, kind = isinstance(t.model, GPT), getattr(t.tokenizer, 'kind', '')
        if to_hf or to_gguf:
            assert ours and kind == 'bpe', (
                f"{'to_hf' if to_hf else 'to_gguf'} ({to_hf or to_gguf}) takes a teacher of picochat's own blocks with "
                f"a BPE, not {teacher}")
            shorten(t.model, block_size)
            return (export_hf(t.model, t.tokenizer, to_hf) if to_hf else
                    export_gguf(t.model, t.tokenizer, to_gguf, gguf_type))
        assert ours and kind, (
            f"to_picochat ({to_picochat}) takes a teacher of picochat's own blocks with a tokenizer, like gguf:FILE, "
            f"hf:FOLDER or nanochat:FOLDER, not {teacher}")
        shorten(t.model, block_size)
        say_size(t.model)
        # a teacher that held out a part stays one
        save_checkpoint(path, t.model, t.tokenizer.meta(), step=0, dataset=dataset or t.dataset, data=t.data,
                        knobs={'hold_out': t.hold_out})
        return to_picochat

    def shorten(model, block_size):
        """Cuts a model's context, in place: its tables of positions become shorter. 0: as it is."""
        c = model.config
        assert block_size <= c.block_size, (
            f"block_size ({block_size}) is more than the context of {teacher}, {c.block_size}: lower it, or leave it out")
        if block_size:
            c.block_size = block_size
            model.cos, model.sin = rope_tables(c)

    def say_size(model):
        """What was read, in two lines."""
        c = model.config
        print(f"{teacher}: {model.params()['total']:,} weights, {c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads of "
              f"{c.head_dim} on {c.n_kv_head} key/value heads, {c.mlp} of {c.n_hidden}, {c.vocab_size:,} tokens")
        print(f"context: {c.block_size:,} tokens, whose keys and values take "
              f"{c.block_size * model.kv_bytes_per_token() / 1e6:,.0f} MB (--block_size= makes it shorter)", flush=True)

    def label():
        """Labels of the dataset, in out_dir -> what meta.json says."""
        refuse_labels(out_dir)                  # before it takes long
        teachers = [load_teacher(name, device) for name in teacher_names(teacher)]
        text, context = dataset or teachers[0].dataset, block_size or teachers[0].model.config.block_size
        assert text, f"{teacher} does not say which dataset to label: give --dataset="
        loader = Loader(os.path.join(in_repo('data'), text), 'train', batch_size, context, device=device)
        tokenizer = from_meta(loader.meta)
        teachers = [fitted(t, tokenizer, context, text) for t in teachers]
        assert not calibrate or all(t.hold_out for t in teachers), (
            f"calibrate=True needs teachers that have not seen the text, trained with --hold_out=, all of {teacher}")
        assert method == 'sample' or k <= tokenizer.vocab_size, (
            f"k ({k}) must be at most the vocabulary ({tokenizer.vocab_size:,})")
        # what others wrote is run as it is
        compiles = compile and can_compile(device) and all(isinstance(t.model, (GPT, GPT2)) for t in teachers)
        precision = pick_dtype(dtype, device)
        with autocast(device, precision):
            check_reading(teachers, loader)
        for t in teachers:
            if compiles:
                t.model.trunk, t.model.logits = torch.compile(t.model.trunk), torch.compile(t.model.logits)
            if precision == 'bfloat16':
                in_bfloat16(t.model)
        print(f"labels: {loader.n_tokens:,} tokens of {text} by {teacher}, on {device} in {precision}"
              f"{'; the teachers are compiled first, which takes a minute' if compiles else ''}", flush=True)
        with autocast(device, precision):
            calibration = fit_temperature(teachers, loader) if calibrate else 1.0
            recipe = Recipe(method, k, temperature, calibration, seed)
            return write_labels(out_dir, teachers, loader, recipe, {'teacher': teacher, 'dtype': precision})

    began = time.perf_counter()
    device = pick_device(device)
    jobs = bool(fetch) + bool(to_picochat) + bool(to_hf) + bool(to_gguf)
    assert jobs or teacher and out_dir, (
        "give --teacher= (the out_dir of a trained model) and --out_dir= (a folder for its labels)")
    assert jobs == 0 or jobs == 1 and (out_dir if fetch else teacher), (
        "--fetch= needs --out_dir= (where the files go); --to_picochat=, --to_hf= or --to_gguf= need --teacher= (what is "
        "written there); one of the four at a time")
    name = 'best.pt' if to_picochat else 'model.safetensors' if to_hf else 'labels.bin'
    product = to_gguf or os.path.join(to_picochat or to_hf or out_dir, name)
    # in a ladder (bench.py), what this very command has made from these files is not made again
    reads = check_teachers(teacher)
    if dataset:
        reads.append(os.path.join(in_repo('data'), dataset, 'meta.json'))
    hold(os.path.dirname(product), os.path.basename(to_gguf))
    document = None if fetch else already(product, reads)
    if document is None:
        interrupt_on_stop()
        try:
            if jobs:
                written = fetch_nanochat(fetch, out_dir) if fetch else convert()
            else:
                meta = label()
        except KeyboardInterrupt as stop:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f'stopped: the same command goes on from what is in {os.path.dirname(product)}', flush=True)
            sys.exit(128 + stop.args[0])
        seconds = time.perf_counter() - began
        if jobs:
            files = ([os.path.join(written, name) for name in os.listdir(written) if name[0] != '.']
                     if os.path.isdir(written) else [written])
            size = sum(map(os.path.getsize, files))
            document = {'file': written, 'bytes': size, 'tokens': 0, 'seconds': round(seconds, 2)}
        else:
            size = os.path.getsize(product)
            print(f"{product}: {size:,} bytes for {meta['tokens']:,} tokens, {meta['tokens'] / seconds:,.0f} tokens/s")
            document = {'file': product, 'bytes': size, 'seconds': round(seconds, 2), **meta}
        if not fetch:
            record(product, document, reads)
    print(json_line(document))
