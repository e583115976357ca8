"""
Soft labels: how teachers read a text, what is stored of their distributions, and how a student gets it back. A library
of distill.py.

    write_labels(folder, teachers, loader, Recipe(k=12))        # continues labels that are half-written
    Labels(folder, loader).batch(starts, block_size)            # -> ids, weights and entropy, for a Distiller
"""
import json
import math
import os
import shlex
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from data.files import check_once, check_types, hold, read_json, remove, sync_folder, write_text
from data.judge import may_label, tokens_each_may_label
from data.loader import copy_to
from data.teachers import teacher_log_probs
from data.tokenizer import vocab_size_of

# -----------------------------------------------------------------------------
# how teachers read a text: in windows of block_size tokens that overlap by a quarter. A window labels the places beyond
# its first quarter, so that every label has at least a quarter of a window as context; only the first window labels all
# of its places. (Rows of chats hold whole conversations and do not overlap.)

def overlap(loader):
    """How many tokens a window shares with the previous one."""
    return 0 if loader.row else loader.block_size // 4


def stride(loader):
    """Tokens from the start of one window to that of the next."""
    return loader.block_size - overlap(loader)


def first_place(batch, loader):
    """
    The first place that this batch of windows labels, which follows the last one of the previous batch. Batch 0 begins
    at the start of the text.
    """
    return batch * loader.batch_size * stride(loader) + overlap(loader) if batch else 0


@torch.no_grad()
def read_windows(batch, teachers, loader):
    """
    Runs the teachers over one batch of windows, which labels N places: what comes after each of these tokens.
    -> the first place; the models of the teachers who may label any of them; the states (N, n_embd) of each model; and
    may (models, N), which model may label which place. The last batch may reach beyond the end of the text.
    """
    windows = [batch * loader.batch_size + i for i in range(loader.batch_size)]
    x, _ = loader.rows([window * stride(loader) for window in windows])         # (B, T)
    places = torch.arange(first_place(batch, loader), first_place(batch + 1, loader), device=x.device)     # (N,)
    # which window labels a place; the first quarter of window 0 is labelled by window 0 itself
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
    Calibrates the teachers: teachers that have read their own text many times are too sure of text that they have not
    read (arXiv 1706.04599). -> the temperature of 0.8, 0.85, ..., 2 at which their distributions give the text the most
    probability, measured on so many batches spread over it. Meaningless for teachers that have seen this text.
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
        if loader.mask is not None:             # of chats, only the tokens to be learnt
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
    """
    How labels are made: of the teachers' distributions at temperature * calibration, for a student that trains at
    temperature.
    """
    method: str = 'sample'      # sample: k draws a token; topk: the k most probable
    k: int = 12
    temperature: float = 1.0
    calibration: float = 1.0    # see fit_temperature
    seed: int = 1337            # of the draws


def label_type(method, k, vocab_size):
    """
    The record of one token: the teachers' entropy in nats, k ids, and for topk their probabilities. (Samples need none:
    each weighs 1/k.)
    """
    fields = [('entropy', '<f2'), ('ids', '<u2' if vocab_size <= 2**16 else '<u4', (k,))]
    if method == 'topk':
        fields.append(('p', '<f2', (k,)))
    return np.dtype(fields)


@torch.no_grad()
def choose_labels(log_p, method, k, generator):
    """
    log_p (N, V) -> ids (N, k), k draws or the k most probable tokens; and for topk their probabilities (N, k), scaled
    to sum to 1.
    """
    if method == 'sample':
        return torch.multinomial(log_p.exp(), k, replacement=True, generator=generator), None
    p, ids = log_p.exp().topk(k, dim=-1)
    return ids, p / p.sum(dim=-1, keepdim=True)


@torch.no_grad()
def label_batch(batch, teachers, loader, recipe):
    """The records (N,) of the places that this batch of windows labels, up to the end of the text."""
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
    """The contents of meta.json: how the labels were made, for which text, and what they cost."""
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
    Writes a record for every token of the loader's split to folder/labels.bin, and meta.json last: a folder without it
    is no set of labels. about: more entries for meta.json. Continues a labels.bin.part that it finds, with the same
    bytes in the end. Returns the contents of meta.json.
    """
    meta = dict(about) | describe(teachers, loader, recipe)
    whole, begun = os.path.join(folder, 'labels.bin'), os.path.join(folder, 'begun.json')
    part = f'{whole}.part'
    with hold(folder):
        refuse_labels(folder)
        if not os.path.exists(begun):
            remove(whole, part)                 # leftovers that no begun.json describes
            write_text(begun, json.dumps(meta))
        elif read_json(begun, 'remove the folder, or give another --out_dir') != meta:
            raise ValueError(f"{folder} holds half-written labels of another kind ({begun} says which): "
                             "remove the folder, or give another --out_dir")
        # if labels.bin is there and its .part is not, an earlier run was killed just before it wrote meta.json
        if os.path.exists(part) or not os.path.exists(whole):
            write_records(part, teachers, loader, recipe)
            os.replace(part, whole)
            sync_folder(folder)
        os.replace(begun, os.path.join(folder, 'meta.json'))
    return meta


def write_records(path, teachers, loader, recipe):
    """Writes the records of all tokens to the file at path, which may already hold the first of them."""
    n = loader.n_tokens
    size = label_type(recipe.method, recipe.k, teachers[0].model.config.vocab_size).itemsize
    with open(path, 'ab') as f:
        # continue after the last whole batch; one that was torn off in the middle is written again
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
    """ValueError unless all ids are below vocab_size and all other values are finite and at least 0."""
    for i in range(0, len(table), 2**20):
        for name in table.dtype.names:
            part = table[name][i:i + 2**20]
            right = (part < vocab_size) if name == 'ids' else np.isfinite(part) & (part >= 0)
            if not right.all():
                raise ValueError(f"{path} has {name} that cannot be ({part[~right].flat[0]}): {remedy}")


class Labels:
    """
    The labels in a folder that write_labels wrote, for the dataset they were written for. ValueError if they are
    missing, damaged, or were written for other data.
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
        starts: B places in the split -> for the T = block_size tokens after each of them: ids (B, T, k) int64, weights
        (B, T, k) and entropy (B, T) float32.
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
