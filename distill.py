"""
Distillation: a student that learns from a teacher's distributions beside the text.

    python train.py config/distill_stdlib_bpe.py --teacher=out-stdlib-bpe
        # the teacher runs beside the student
    python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe
        # or only once: 12 sampled soft labels a token, on disk
    python train.py config/distill_stdlib_bpe.py
        # ... from which any number of students learn

    python distill.py --teacher=gguf:SmolLM2-135M.gguf --to_picochat=out-smollm
        # a Llama that someone else trained, as best.pt, for every other script; so of hf:FOLDER and nanochat:FOLDER
    python distill.py --fetch=d32 --out_dir=teachers/d32
        # nanochat's d32, 7.2 GB; then --teacher=nanochat:teachers/d32
    python distill.py --teacher=out-smollm --to_hf=hf-smollm
        # for transformers' LlamaForCausalLM, or NanoChatForCausalLM if the block is nanochat's
    python distill.py --teacher=out-smollm/int8.safetensors --to_gguf=smollm.gguf --gguf_type=q8_0
        # for llama.cpp, here what the integers stand for

    from distill import Distiller
    losses = Distiller(student, [teacher])(idx, targets)  # {'ce': ..., 'kl': ..., ...}, each in nats per unmasked token

A teacher is one of these, or several joined by +, whose probabilities are averaged (data/foreign/kinds.py reads those
that are not ours):
    out-stdlib-bpe      a picochat model, its out_dir or a .pt; or an int8.safetensors, in float
    gguf:FILE           a Llama of llama.cpp's format
    hf:FOLDER           a folder of Hugging Face's: a Llama, or anything else that transformers loads
    nanochat:FOLDER     of the d20-d34 era; later ones by py:
    gpt2:PATH           nanoGPT's ckpt.pt, or a folder of Hugging Face's gpt2
    py:FILE             a Python file of your own, with load(device) -> (model, tokenizer or None); it is run
    random:d32          the shape of that nanochat with random weights, to measure with
Before a teacher teaches, its loss on some of the text is printed beside that of guessing by the tokens' frequencies; if
it is no better, it is refused. Labels are written for every token of the training split, with at least a quarter of the
context to its left (but for the first ones). Sampled ones are unbiased: the expected gradient is that of the whole
distribution (arXiv 2503.16870). Those of --method=topk are not, unless k is the vocabulary.
"""
import contextlib
import math
import os
import shlex
import sys
import time
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoint import save_checkpoint
from data.compiling import DEEP, can_compile, compile_blocks
from data.files import hold, in_repo, json_line
from data.foreign.export import GGUF_TYPES, export_gguf, export_hf
from data.foreign.gpt2 import GPT2
from data.foreign.kinds import refuse_other_blocks
from data.foreign.nanochat import fetch_nanochat
from data.judge import check_reading
from data.labels import Labels, Recipe, fit_temperature, refuse_labels, write_labels
from data.loader import Loader
from data.machine import autocast, keep_memory, pick_device, pick_dtype, shard
from data.record import already, record
from data.signals import interrupt_on_stop
from data.teachers import (check_teachers, fitted, in_bfloat16, load_teacher, load_teachers, teacher_log_probs,
                           teacher_names)
from data.tokenizer import from_meta
from model import GPT, chunked, or_one, rope_tables

# -----------------------------------------------------------------------------
# how far two distributions are apart: log-probabilities of student and teacher (..., V) -> nats (...)

def forward_kl(s, t):
    """KL(teacher || student): the student must cover everything that the teacher thinks possible."""
    return (t.exp() * (t - s)).sum(dim=-1)


def reverse_kl(s, t):
    """KL(student || teacher): the student must not say what the teacher would not (arXiv 2306.08543)."""
    return forward_kl(t, s)


def jsd(s, t):
    """Jensen-Shannon divergence: the mean distance of both to the distribution halfway (arXiv 2306.13649)."""
    middle = torch.logaddexp(s, t) - math.log(2)
    return (forward_kl(middle, s) + forward_kl(middle, t)) / 2


DIVERGENCES = {'forward_kl': forward_kl, 'reverse_kl': reverse_kl, 'jsd': jsd}


class Distiller(nn.Module):
    """
    forward(idx, targets) -> the student's losses and 'kl', its distance from the teachers (a list of models) in nats
    per unmasked token, times temperature^2, which keeps gradients of the same size at any temperature (arXiv
    1503.02531). With labels (of Labels.batch) no teacher runs. All losses are means over unmasked tokens, so that alpha
    means the same for any batch. Logits of student and teachers exist for one chunk of tokens at a time. Only the
    student's parameters are parameters of this module.
    """
    def __init__(self, student, teachers=(), divergence='forward_kl', temperature=1.0):
        super().__init__()
        self.student, self.divergence, self.temperature = student, DIVERGENCES[divergence], temperature
        self.teachers = list(teachers)          # a plain list, in which nn.Module does not look for parameters

    def flops_per_token(self):
        teachers = sum(teacher.flops_per_token(training=False) for teacher in self.teachers)
        return self.student.flops_per_token() + teachers

    def forward(self, idx, targets, *labels, counts=None):
        T = self.temperature
        counts = counts or self.student.target_counts(targets)
        x = self.student.trunk(idx)
        with torch.no_grad():
            # with labels: (B, T, k) ids, (B, T, k) weights and (B, T) entropy; without: (B, T, n_embd) of each teacher
            soft = labels or [teacher.trunk(idx) for teacher in self.teachers]

        def nats(x, targets, *soft):
            """A chunk of N tokens -> cross-entropy and KL of each, (N, 2)."""
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

        # chunks are chosen by the size of the student's logits; those of each teacher take as much again
        rows = [part.flatten(0, 1) for part in (x, *soft)]      # (B*T, ...) each
        both = chunked(nats, self.student.config.vocab_size, rows[0], targets.flatten(), *rows[1:])
        ce, kl = both.sum(dim=0) / or_one(counts['ce'])
        return {'ce': ce, 'kl': kl} | self.student.head_losses(x, targets, idx, counts)


def make_learner(student, spec, loader, tokenizer, *, divergence='forward_kl', temperature=1.0, dataset=None,
                 device='cpu', dtype='float32', fsdp=False):
    """
    What train.py trains, by its knob teacher, spec. '': (the student itself, None). A folder of labels: (a Distiller,
    its Labels). Teachers, joined by +: (a Distiller that runs them beside the student, None). loader: the training
    split, whose tokens and block_size the teachers must be able to read; dtype: in bfloat16 the teachers' matrices are
    kept in that; fsdp: the teachers are sharded over the processes, too. ValueError if something does not fit.
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
    if fsdp:                                    # a model that is not our GPT stays whole
        kind = torch.device(device).type
        models = [shard(model, kind) if isinstance(model, GPT) else model.to(device) for model in models]
    elif dtype == 'bfloat16':
        models = [in_bfloat16(model) for model in models]
    with autocast(device, dtype):
        check_reading([replace(teacher, model=model) for teacher, model in zip(teachers, models)], loader)
    return Distiller(student, models, divergence, temperature), None

# -----------------------------------------------------------------------------
# the script, whose functions read its knobs: labels, fetching, converting

def convert():
    """Writes the teacher in another format -> the folder or file that it is in."""
    path = os.path.join(to_picochat, 'best.pt')
    if to_picochat and os.path.exists(path):
        raise ValueError(f"to_picochat ({to_picochat}) already holds a best.pt: give another folder")
    refuse_other_blocks(teacher)
    t = load_teacher(teacher)
    ours, kind = isinstance(t.model, GPT), getattr(t.tokenizer, 'kind', '')
    assert ours and kind, (
        f"a teacher that is converted must have picochat's own blocks and a tokenizer, like gguf:FILE, hf:FOLDER or "
        f"nanochat:FOLDER, unlike {teacher}")
    shorten(t.model, block_size)
    if to_hf or to_gguf:
        assert kind == 'bpe', (f"{'to_hf' if to_hf else 'to_gguf'} ({to_hf or to_gguf}) takes a teacher with a BPE, "
                               f"not {teacher}")
    if to_hf:
        return export_hf(t.model, t.tokenizer, to_hf)
    if to_gguf:
        return export_gguf(t.model, t.tokenizer, to_gguf, gguf_type, dataset or t.dataset)
    say_size(t.model)
    # whether it held out a part of its text must not get lost
    save_checkpoint(path, t.model, t.tokenizer.meta(), step=0, dataset=dataset or t.dataset, data=t.data,
                    knobs={'hold_out': t.hold_out})
    return to_picochat


def shorten(model, block_size):
    """Shortens a model's context to block_size tokens, in place, with its tables of positions. 0: leaves it."""
    c = model.config
    assert block_size <= c.block_size, (
        f"block_size ({block_size}) is more than {teacher}'s context, {c.block_size}: lower it, or leave it out")
    if block_size:
        c.block_size = block_size
        model.cos, model.sin = rope_tables(c)


def say_size(model):
    """Prints the model's size in two lines."""
    c = model.config
    print(f"{teacher}: {model.params()['total']:,} weights, {c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads "
          f"of {c.head_dim} on {c.n_kv_head} key/value heads, {c.mlp} of {c.n_hidden}, {c.vocab_size:,} tokens")
    print(f"context: {c.block_size:,} tokens, whose keys and values take "
          f"{c.block_size * model.kv_bytes_per_token() / 1e6:,.0f} MB (--block_size= makes it shorter)", flush=True)


def label():
    """Labels the dataset, into out_dir -> the contents of meta.json."""
    refuse_labels(out_dir)                      # before anything that takes long
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
    # models of other libraries are not compiled
    compiles = compile and can_compile(device) and all(isinstance(t.model, (GPT, GPT2)) for t in teachers)
    precision = pick_dtype(dtype, device)
    with autocast(device, precision):
        check_reading(teachers, loader)
    for t in teachers:
        if compiles and isinstance(t.model, GPT) and t.model.config.n_layer >= DEEP:
            compile_blocks(t.model)
        elif compiles:
            t.model.trunk, t.model.logits = torch.compile(t.model.trunk), torch.compile(t.model.logits)
        if precision == 'bfloat16':
            in_bfloat16(t.model)
    print(f"labels: {loader.n_tokens:,} tokens of {text} by {teacher}, on {device} in {precision}"
          f"{'; the teachers are compiled first, which takes a minute' if compiles else ''}", flush=True)
    with autocast(device, precision):
        calibration = fit_temperature(teachers, loader) if calibrate else 1.0
        recipe = Recipe(method, k, temperature, calibration, seed)
        return write_labels(out_dir, teachers, loader, recipe, {'teacher': teacher, 'dtype': precision})


def make(product):
    """Does what the knobs ask for -> the JSON document."""
    began = time.perf_counter()
    if not (fetch or to_picochat or to_hf or to_gguf):
        meta = label()
        size, seconds = os.path.getsize(product), time.perf_counter() - began
        print(f"{product}: {size:,} bytes for {meta['tokens']:,} tokens, {meta['tokens'] / seconds:,.0f} tokens/s")
        return {'file': product, 'bytes': size, 'seconds': round(seconds, 2), **meta}
    written = fetch_nanochat(fetch, out_dir) if fetch else convert()
    files = [written]
    if os.path.isdir(written):
        files = [os.path.join(written, name) for name in os.listdir(written) if name[0] != '.']
    return {'file': written, 'bytes': sum(map(os.path.getsize, files)), 'tokens': 0,
            'seconds': round(time.perf_counter() - began, 2)}


if __name__ == '__main__':
    # -------------------------------------------------------------------------
    teacher = ''                # as above
    out_dir = ''                # where the labels go, or what is fetched
    fetch = ''                  # d32 or d34: download that nanochat
    to_picochat = ''            # a folder: write the teacher there as a picochat checkpoint
    to_hf = ''                  # a folder: write the teacher there as Hugging Face's Llama or NanoChat, as its block is
    to_gguf = ''                # a file: write the teacher there for llama.cpp, if its block is a Llama's
    gguf_type = 'f16'           # f16, q8_0, q4_0, q4_1 or f32: of the matrices in that file
    dataset = ''                # a folder under data/; empty: the teacher's own; to_gguf writes its name into the file
    method = 'sample'           # sample: k draws a token, unbiased; topk: the k most probable, biased unless k is all
    k = 12
    temperature = 1.0           # of the distributions; the student must be trained at the same
    calibrate = False           # first fit a temperature on text that the teachers have not seen (hold_out)
    block_size = 0              # context of the teacher; 0: its own
    batch_size = 16             # windows a pass
    seed = 1337
    device = 'auto'             # cuda, mps, cpu
    dtype = 'auto'              # float32 or bfloat16 (autocast); auto: bfloat16 where it is faster, as train.py does
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
    device = pick_device(device)
    keep_memory()
    jobs = sum(map(bool, (fetch, to_picochat, to_hf, to_gguf)))
    assert jobs or teacher and out_dir, (
        "give --teacher= (the out_dir of a trained model) and --out_dir= (a folder for its labels)")
    assert jobs == 0 or jobs == 1 and (out_dir if fetch else teacher), (
        "--fetch= needs --out_dir= (where the files go); --to_picochat=, --to_hf= or --to_gguf= need --teacher= (what "
        "is written there); one of the four at a time")
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
            document = make(product)
        except KeyboardInterrupt as stop:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f'stopped: the same command goes on from what is in {os.path.dirname(product)}', flush=True)
            sys.exit(128 + stop.args[0])
        if not fetch:
            # what is converted has cost what the model did
            record(product, document, reads, starts_from=reads[0] if jobs and reads else None)
    print(json_line(document))
