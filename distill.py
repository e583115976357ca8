"""
Distillation: a student that learns from a teacher's distributions beside the text.

    python train.py config/distill_stdlib_bpe.py                        # the teacher runs beside the student
    python distill.py --teacher=out-stdlib-bpe --out_dir=labels         # or only once: 12 sampled soft labels a token, on disk
    python train.py config/distill_stdlib_bpe.py --teacher=labels       # ... and any number of students learn from them

    from distill import Distiller
    losses = Distiller(student, [teacher])(idx, targets)                # {'ce': ..., 'kl': ..., ...}, each in nats per unmasked token

A teacher is a picochat model (its out_dir or a .pt), or several joined by +, whose probabilities are averaged. Losses are means over
unmasked tokens: they do not change when the batch or its rows become twice as long, so alpha means the same everywhere.
Labels are written for every token of the training split, with at least half a context to its left. Sampled ones are unbiased: the
expected gradient is that of the whole distribution (arXiv 2503.16870). Those of --method=topk are not, unless k is the vocabulary.
"""
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.loader import Loader
from data.tokenizer import fingerprint, from_meta
from model import atomic_write, check_device, check_knobs, chunked, load_model

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


def teacher_log_probs(teachers, states, temperature):
    """Each teacher's states (N, n_embd) -> the mean of their distributions at temperature, as log-probabilities (N, V)."""
    logs = [F.log_softmax(teacher.logits(x) / temperature, dim=-1) for teacher, x in zip(teachers, states)]
    return logs[0] if len(logs) == 1 else torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))


class Distiller(nn.Module):
    """
    forward(idx, targets) -> the student's losses and 'kl', its distance from the teachers, in nats per unmasked token and times temperature^2,
    which keeps gradients of the same size at any temperature (arXiv 1503.02531). With labels (of Labels.batch) no teacher is run.
    Logits of student and teachers exist for one chunk of tokens at a time. Only the student's parameters are parameters of this module.
    """
    def __init__(self, student, teachers=(), divergence='forward_kl', temperature=1.0):
        super().__init__()
        self.student, self.divergence, self.temperature = student, DIVERGENCES[divergence], temperature
        self.teachers = list(teachers)                                           # in a list nn.Module does not look for parameters

    def forward(self, idx, targets, *labels):
        T = self.temperature
        x = self.student.trunk(idx)
        with torch.no_grad():
            soft = labels or [teacher.trunk(idx) for teacher in self.teachers]   # (B, T, k) ids, weights, and (B, T) entropy; or (B, T, n_embd) each

        def nats(x, targets, *soft):
            logits = self.student.logits(x)
            ce = F.cross_entropy(logits, targets, ignore_index=-1, reduction='none')
            s = F.log_softmax(logits / T, dim=-1)
            if labels:
                ids, weight, entropy = soft
                kl = -(weight * s.gather(-1, ids)).sum(dim=-1) - entropy
            else:
                with torch.no_grad():
                    t = teacher_log_probs(self.teachers, soft, T)
                kl = self.divergence(s, t)
            return torch.stack((ce, T * T * kl * (targets >= 0)), dim=-1)        # (N, 2)

        both = chunked(nats, self.student.config.vocab_size, x.flatten(0, 1), targets.flatten(), *(part.flatten(0, 1) for part in soft))
        ce, kl = both.sum(dim=0) / (targets >= 0).sum().clamp(min=1)
        return {'ce': ce, 'kl': kl} | self.student.head_losses(x, targets)

# -----------------------------------------------------------------------------
# soft labels on disk

def label_type(method, k, vocab_size):
    """The record of one token: the teachers' entropy in nats, k ids, and for topk their probabilities; samples weigh 1/k each."""
    return np.dtype([('entropy', '<f2'), ('ids', '<u2' if vocab_size <= 2**16 else '<u4', (k,))] + [('p', '<f2', (k,))] * (method == 'topk'))


@torch.no_grad()
def choose_labels(log_p, method, k, generator):
    """log_p (N, V) -> ids (N, k): k draws, or the k most probable; and for topk their probabilities (N, k), made to sum to 1."""
    if method == 'sample':
        return torch.multinomial(log_p.exp(), k, replacement=True, generator=generator), None
    p, ids = log_p.exp().topk(k, dim=-1)
    return ids, p / p.sum(dim=-1, keepdim=True)


@torch.no_grad()
def write_labels(folder, teachers, loader, about, method='sample', k=12, temperature=1.0, seed=1337, say=print):
    """
    Labels for every token of the loader's split, a record each, into folder/labels.bin, and meta.json last: without it a folder is not
    a set of labels. The loader's block_size is the teachers' context; windows overlap by half, and the later half of each is kept. Goes on
    with a labels.bin.part that it finds, and ends with the same bytes. Returns meta.
    """
    T, S, n = loader.block_size, loader.block_size // 2, loader.n_tokens
    vocab_size, device = teachers[0].config.vocab_size, teachers[0].cos.device
    record, part = label_type(method, k, vocab_size), os.path.join(folder, 'labels.bin.part')
    meta = about | {'method': method, 'k': k, 'temperature': temperature, 'seed': seed, 'vocab_size': vocab_size, 'block_size': T, 'batch_size': loader.batch_size,
                    'tokens': n, 'data': loader.meta['sha256']['train.bin'], 'flops': 2 * n * sum(t.flops_per_token(training=False) for t in teachers)}
    os.makedirs(folder, exist_ok=True)
    begun = os.path.join(folder, 'begun.json')
    if os.path.exists(begun) and json.load(open(begun)) != meta:
        raise SystemExit(f"error: {folder} holds half-written labels of another kind ({begun} says which): remove the folder, or give another --out_dir")
    atomic_write(begun, lambda f: f.write(json.dumps(meta).encode()))
    done = os.path.getsize(part) // record.itemsize if os.path.exists(part) else 0
    step = loader.batch_size * S                                                 # tokens that a batch of windows settles; the first settles T - S more
    batch = max(0, done - (T - S)) // step
    first = time.perf_counter()
    with open(part, 'ab') as f:
        f.truncate(record.itemsize * (batch * step + (T - S) * (batch > 0)))
        while f.tell() < record.itemsize * n:
            generator = torch.Generator(device).manual_seed(hash((seed, batch)))
            x, _ = loader.rows([batch * step + i * S for i in range(loader.batch_size)])     # (B, T)
            states = [teacher.trunk(x) for teacher in teachers]
            states = [torch.cat((s[0, :T - S], s[:, T - S:].flatten(0, 1))) if batch == 0 else s[:, T - S:].flatten(0, 1) for s in states]      # (N, n_embd)
            out = np.empty(len(states[0]), record)
            for rows in torch.arange(len(out)).split(max(1, 2**25 // vocab_size)):           # 128 MiB of logits at a time
                log_p = teacher_log_probs(teachers, [s[rows] for s in states], temperature)
                ids, p = choose_labels(log_p, method, k, generator)
                out['entropy'][rows], out['ids'][rows] = (-(log_p.exp() * log_p).sum(dim=-1)).cpu(), ids.cpu()
                if p is not None:
                    out['p'][rows] = p.cpu()
            f.write(out[:n - f.tell() // record.itemsize].tobytes())
            f.flush()
            batch += 1
            if batch % 50 == 0:
                seen = f.tell() // record.itemsize
                say(f'{seen:,} of {n:,} tokens, {(seen - done) / (time.perf_counter() - first):,.0f} tokens/s')
    os.replace(part, os.path.join(folder, 'labels.bin'))
    atomic_write(os.path.join(folder, 'meta.json'), lambda f: f.write(json.dumps(meta).encode()))
    os.remove(begun)
    return meta


class Labels:
    """A folder that write_labels wrote, for the data that it was written for. batch(starts, block_size) -> what Distiller takes."""
    def __init__(self, folder, loader, device='cpu'):
        with open(os.path.join(folder, 'meta.json')) as f:
            self.meta = m = json.load(f)
        if m['data'] != loader.meta['sha256']['train.bin']:
            raise SystemExit(f"error: the labels in {folder} were written for other tokens than this dataset has: write them again, python distill.py --teacher=... --out_dir={folder}")
        record, path = label_type(m['method'], m['k'], m['vocab_size']), os.path.join(folder, 'labels.bin')
        if os.path.getsize(path) != m['tokens'] * record.itemsize:
            raise SystemExit(f"error: {path} has {os.path.getsize(path):,} bytes, expected {m['tokens'] * record.itemsize:,}: write the labels again")
        self.table, self.device = np.memmap(path, record, 'r'), device           # (n_tokens,)

    def batch(self, starts, block_size):
        """starts: B places in the split -> ids (B, T, k) int64, weights (B, T, k) and entropy (B, T) float32, for the tokens after those places."""
        rows = self.table[np.minimum(np.array(starts)[:, None] + np.arange(block_size), len(self.table) - 1)]
        ids = torch.from_numpy(rows['ids'].astype(np.int64))
        weight = torch.from_numpy(rows['p'].astype(np.float32)) if 'p' in rows.dtype.names else torch.full(ids.shape, 1 / ids.size(-1))
        return tuple(t.to(self.device) for t in (ids, weight, torch.from_numpy(rows['entropy'].astype(np.float32))))

# -----------------------------------------------------------------------------
# teachers

def load_teacher(spec, device='cpu'):
    """A spec of one teacher -> (model in eval mode without gradients, its tokenizer, the dataset it was trained on)."""
    path = os.path.join(spec, 'best.pt') if os.path.isdir(spec) else spec
    model, state = load_model(path, device)
    return model.requires_grad_(False), from_meta(state['tokenizer']), state.get('dataset')


def load_teachers(spec, tokenizer, block_size, device='cpu'):
    """'A+B+...' -> list of teachers that read the tokenizer's ids and at least block_size of them at once. One line says which does not."""
    teachers = []
    for name in spec.split('+'):
        teacher, theirs, _ = load_teacher(name, device)
        if theirs is not None and fingerprint(theirs) != fingerprint(tokenizer):
            raise SystemExit(f"error: the teacher {name} has another tokenizer ({theirs.vocab_size:,} tokens) than the data ({tokenizer.vocab_size:,}): prepare the data with the teacher's own")
        if teacher.config.vocab_size != tokenizer.vocab_size or teacher.config.block_size < block_size:
            raise SystemExit(f"error: the teacher {name} has a vocabulary of {teacher.config.vocab_size:,} and a context of {teacher.config.block_size}, which must be {tokenizer.vocab_size:,} and at least block_size ({block_size})")
        teachers.append(teacher)
    return teachers

# -----------------------------------------------------------------------------
# the script: labels

if __name__ == '__main__':
    # -------------------------------------------------------------------------
    teacher = ''                # out_dir or .pt of a picochat model; A+B averages two
    out_dir = ''                # where the labels go
    dataset = ''                # a folder under data/; empty: the one the teacher was trained on
    method = 'sample'           # sample: k draws a token, unbiased; topk: the k most probable, biased unless k is the vocabulary
    k = 12
    temperature = 1.0           # of the distributions; the student must be trained at the same
    block_size = 0              # context of the teacher; 0: its own
    batch_size = 16             # windows a pass
    seed = 1337
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    exec(open('configurator.py').read())
    # -------------------------------------------------------------------------
    check_knobs(config, ('k batch_size', int, 1, math.inf), ('block_size', int, 0, math.inf), ('seed', int, 0, 2**63 - 1), ('temperature', float, 1e-3, math.inf))
    check_device(device)
    if method not in ('sample', 'topk'):
        raise SystemExit(f"error: method ({method}) must be sample or topk")
    if not teacher or not out_dir:
        raise SystemExit("error: give --teacher= (the out_dir of a trained model) and --out_dir= (a folder for its labels)")
    if os.path.exists(os.path.join(out_dir, 'meta.json')):
        raise SystemExit(f"error: {out_dir} already holds labels: give another --out_dir, or remove it")
    first, _, trained_on = load_teacher(teacher.split('+')[0], device)
    loader = Loader(os.path.join('data', dataset or trained_on), 'train', batch_size, block_size or first.config.block_size, device=device)
    teachers = load_teachers(teacher, from_meta(loader.meta), loader.block_size, device)
    if k > teachers[0].config.vocab_size and method == 'topk':
        raise SystemExit(f"error: k ({k}) must be at most the vocabulary ({teachers[0].config.vocab_size:,})")
    began = time.perf_counter()
    meta = write_labels(out_dir, teachers, loader, {'teacher': teacher}, method, k, temperature, seed)
    path = os.path.join(out_dir, 'labels.bin')
    seconds = time.perf_counter() - began
    print(f"{path}: {os.path.getsize(path):,} bytes for {loader.n_tokens:,} tokens, {loader.n_tokens / seconds:,.0f} tokens/s")
    print(json.dumps({'file': path, 'bytes': os.path.getsize(path), 'tokens': loader.n_tokens, 'seconds': round(seconds, 2), **meta}))
