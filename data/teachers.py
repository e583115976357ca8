"""
Teachers: how they are named and loaded, and what they must give. A library of distill.py.

    teacher = load_teacher('gguf:SmolLM2.gguf')         # a Teacher; data/foreign/kinds.py reads those that are not ours
    teachers = load_teachers('out-a+out-b', tokenizer, block_size)      # two, whose probabilities are averaged
"""
import math
import os
import shlex
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import quantize
from data.checkpoint import load_model
from data.foreign.causal_lm import InOne
from data.foreign.export import dequantised
from data.foreign.kinds import FILES, KINDS
from data.foreign.weights import drop_padding, padded
from data.loader import dataset_of
from data.tokenizer import fingerprint, from_meta


@dataclass
class Teacher:
    """A teacher: the model, and what is known about it."""
    name: str                   # as the user gave it: 'out-stdlib-bpe', 'nanochat:teachers/d32'
    model: nn.Module            # in eval mode, without gradients
    tokenizer: object = None    # None: unknown
    dataset: str = None         # the folder under data/ that it was trained on; None: unknown
    hold_out: str = ''          # the part of that dataset that it has not seen, like '1/4'; empty: it has seen all
    data: str = None            # the sha256 of the text that it was trained on


def teacher_names(spec):
    """'A+B+...' -> the names A, B, ...; an existing path with a + in it is one name."""
    parts, names = spec.split('+') if spec else [], []
    while parts:
        n = len(parts)                          # of the longest name that exists; if none does, up to the next +
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
    'A+B+...', or a folder of labels -> the files that they are read from. ValueError if the files of another project's
    model are missing: a script calls this before it looks for data, which are prepared with that model's tokenizer.
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
    'gguf:FILE' and the other KINDS, or a picochat checkpoint (a .pt, or a folder with a best.pt), or an integer
    checkpoint of quantize.py -> Teacher. ValueError if it is missing, damaged, hostile or of another kind.
    """
    kind, _, path = name.partition(':')
    if kind in KINDS:
        model, tokenizer = KINDS[kind](path, device)
        return Teacher(name, model.requires_grad_(False), tokenizer)
    for kind, marks in (('gguf', name.endswith('.gguf')), ('py', name.endswith('.py')),
                        ('hf', os.path.exists(os.path.join(name, 'config.json')))):
        if marks and not os.path.exists(os.path.join(name, 'best.pt')):
            raise ValueError(f"the teacher {name} is no picochat model: name it as {kind}:{name}")
    if name.endswith('.safetensors'):           # of quantize.py; as a teacher it computes in float
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
    The Teacher, made ready for texts of that dataset in windows of block_size tokens. ValueError if its tokens are
    others, or its context is shorter.
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
    c.block_size = block_size                   # flops_per_token then counts attention over no more tokens than that
    same = teacher.dataset and dataset and os.path.normpath(teacher.dataset) == os.path.normpath(dataset)
    return teacher if same else replace(teacher, hold_out='')   # what it held out is no part of another text


def load_teachers(spec, tokenizer, block_size, device='cpu', dataset=None):
    """'A+B+...' -> list of Teacher, all of them fitted. ValueError names one that is missing or does not fit."""
    return [fitted(load_teacher(name, device), tokenizer, block_size, dataset) for name in teacher_names(spec)]


def in_bfloat16(model):
    """Converts the matrices to bfloat16, in place, once: autocast would convert them again in every pass."""
    if isinstance(model, InOne):                # models of other libraries stay as they are
        return model
    for module in model.modules():
        if isinstance(module, nn.Linear):       # a new parameter, so a tied embedding keeps its float32 weights
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    return model


def teacher_log_probs(models, states, temperature, may=None):
    """
    The teachers' models and the states (N, n_embd) of each -> the mean of their distributions at temperature, as
    log-probabilities (N, V). may: (models, N) bool, which model counts for which token; None: all of them.
    """
    logs = [F.log_softmax(model.logits(x) / temperature, dim=-1) for model, x in zip(models, states)]
    if len(logs) == 1:
        return logs[0]
    logs = torch.stack(logs)                    # (models, N, V)
    if may is None:
        return logs.logsumexp(dim=0) - math.log(len(logs))
    return logs.masked_fill(~may[..., None], -math.inf).logsumexp(dim=0) - may.sum(dim=0).log()[:, None]
