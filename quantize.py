"""
Weights as integers: one rounding rule, used by training (fake-quant), by the file and by the modules that run.

    python quantize.py --out_dir=out-quickstart             # best.pt -> int8.safetensors, loss before and after
    python quantize.py --out_dir=out-quickstart --bits=4    # -> int4.safetensors: the tables at 8 bits, the rest at 4

    from quantize import prepare, convert, gptq, export, load
    prepare(model, bits)            # trains through the rounding (straight-through, arXiv 1308.3432)
    convert(model, bits)            # integer modules: nothing is dequantised, at load or later
    model = gptq(model, batches)    # the same for a model that was trained in float, with its errors fed back
    export(path, model, tokenizer_meta);  model, state = load(path)

Weights are integers v from -127 to 127 times one scale per output row (embedding: per token). With 8 bits v is any of
them. With 4, every group of 32 (64, 128) columns has a step from 1 to 18, and v is -7, ..., 7 times the step: the file
and the modules hold two weights in a byte and a byte per step, and what is multiplied is the same kind of integers (a
scale in two levels: VS-Quant, arXiv 2102.04503). The table BITS says all that is known of 8 and 4 bits.
Activations: int8, one scale per token row, found as they come. Products are summed as integers, which is exact in any
order: the result for one token cannot depend on its neighbours.
"""
import copy
import json
import math
import os
import re
import shlex
import sys
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoint import (check_size, check_tensors, config_from, load_model, read_safetensors,
                             write_safetensors)
from data.loader import Loader, data_are_gone, data_of, progress
from data.machine import pick_device
from model import GPT, LOSS_CHUNK_BYTES, LossTotal, rope_tables


@dataclass(frozen=True)
class IntFormat:
    """What a weight of so many bits is."""
    edge: int           # v is -edge, ..., edge, times a step where there are steps; edge * steps is at most 127
    steps: int          # a group of columns chooses its step from 1, ..., steps; 1: there are no groups
    tries: int          # the search tries so many of these, downwards from the least that clips nothing
    stored: int         # bits that a weight takes in the file and in memory
    method: str         # how quantize.py rounds a model that was trained in float


BITS = {8: IntFormat(edge=127, steps=1, tries=1, stored=8, method='rtn'),
        4: IntFormat(edge=7, steps=18, tries=4, stored=4, method='gptq')}
GROUPS = (32, 64, 128)  # columns that share a step: at 4 bits 0.53, 0.52 or 0.51 bytes a weight
GROUP = GROUPS[0]
# the vocabulary's matrices, which have bits of their own, and the small one between
TABLES = ('transformer.wte', 'lm_head', 'transformer.c_out')


def format_of(bits):
    """The entry of BITS. ValueError names the bits that there are."""
    if bits not in BITS:
        raise ValueError(f"bits ({bits}) must be one of {', '.join(map(str, BITS))}")
    return BITS[bits]


@dataclass
class Rounded:
    """
    A rounded matrix: v (rows, cols) int8, scale (rows,) float32, and step (rows, groups) int8, or None where the format
    has no steps; groups = ceil(cols / group). The matrix is about v * scale.
    """
    v: torch.Tensor
    scale: torch.Tensor
    step: torch.Tensor | None = None
    bits: int = 8
    group: int = GROUP

    def float(self):
        """The matrix that the integers stand for, (rows, cols) float32."""
        return self.v * self.scale[:, None]

# -----------------------------------------------------------------------------
# the rule

def round_weight(w, bits=8, group=GROUP, search=True):
    """
    w (rows, cols) float -> Rounded. Rounds to nearest, ties to even; a row of zeros has scale 1.
    The largest weight of a row lies at the edge of its integers; search=False (with groups) puts that of a group at the
    edge of the group's as well, instead of choosing its step.
    """
    form = format_of(bits)
    w = w.float()
    peak = w.abs().amax(dim=1, keepdim=True)
    scale = torch.where(peak > 0, peak / (form.edge * form.steps), 1.0)          # (rows, 1)
    x = w / scale
    if form.steps == 1:
        v = x.round().clamp(-form.edge, form.edge)
        return Rounded(v.to(torch.int8), scale.squeeze(1), None, bits, group)
    # Whole groups, and the columns that are left, are rounded apart: when the last group is padded with zeros instead,
    # inductor of torch 2.11 and 2.13 gets it wrong.
    whole = w.size(1) - w.size(1) % group
    parts = [x[:, :whole].unflatten(1, (-1, group)), x[:, None, whole:]]     # (rows, groups, group), (rows, 1, rest)
    parts = [part for part in parts if part.numel()]
    steps = [choose_step(part, form, search) for part in parts]                  # (rows, groups, 1), (rows, 1, 1)
    v = torch.cat([round_to(part, step, form.edge).flatten(1) for part, step in zip(parts, steps)], dim=1)
    step = torch.cat(steps, dim=1).squeeze(2)
    return Rounded(v.to(torch.int8), scale.squeeze(1), step.to(torch.int8), bits, group)


def round_to(x, step, edge):
    """The nearest of -edge, ..., edge times step."""
    return (x / step).round().clamp(-edge, edge) * step


def choose_step(x, form, search=True):
    """
    x (..., group) in units of its row's scale -> step (..., 1): of the form.tries largest steps that make sense the one
    with the least squared error. Smaller ones clip the largest weights so that the others are met more closely.
    """
    least = x.abs().amax(dim=-1, keepdim=True) / form.edge                       # below this something is clipped
    if not search:
        return least.round().clamp(1, form.steps)
    best = error = None
    for less in range(form.tries):
        step = (least.ceil() - less).clamp(1, form.steps)
        e = (round_to(x, step, form.edge) - x).square().sum(dim=-1, keepdim=True)
        if best is None:
            best, error = step, e
        else:
            best = torch.where(e < error, step, best)
            error = torch.minimum(e, error)
    return best


def pack(rounded):
    """
    Rounded -> what file and memory hold of its v: v itself at 8 bits; at 4, v / step + 8, two of them in a byte,
    (rows, ceil(cols / 2)) uint8.
    """
    form, cols = format_of(rounded.bits), rounded.v.size(1)
    if form.stored == 8:
        return rounded.v
    each = rounded.step.repeat_interleave(rounded.group, dim=1)[:, :cols]
    q = (rounded.v // each + form.edge + 1).to(torch.uint8)
    return into_bytes(q, form.stored)


def unpack(packed, step, bits, group, cols):
    """pack's (..., bytes) and step (..., groups) -> v (..., cols) int8."""
    form = format_of(bits)
    if form.stored == 8:
        return packed
    q = out_of_bytes(packed, form.stored, cols).to(torch.int8) - (form.edge + 1)
    return q * step.repeat_interleave(group, dim=-1)[..., :cols]


def into_bytes(q, width):
    """
    q (rows, cols) uint8 below 2^width, which divides 8 -> (rows, ceil(cols * width / 8)) uint8. At 4 bits the left half
    of the columns is in the low bits of the bytes, the right half in the high ones.
    """
    n = 8 // width
    parts = F.pad(q, (0, -q.size(1) % n)).chunk(n, dim=1)
    return sum(part << (i * width) for i, part in enumerate(parts))


def out_of_bytes(packed, width, cols):
    """into_bytes' (..., bytes) -> q (..., cols) uint8."""
    parts = [(packed >> (i * width)) & (2**width - 1) for i in range(8 // width)]
    return torch.cat(parts, dim=-1)[..., :cols]


def round_rows(x):
    """
    Activations x (..., K) -> xq (..., K), integers in [-127, 127] kept as float, and xs (..., 1):
    x is about xq * xs.
    """
    peak = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    return (x * (127 / peak)).round_(), peak / 127

# -----------------------------------------------------------------------------
# training through the rounding

def fake_weight(w, bits=8, group=GROUP):
    """w as it will be after export, with the gradient of w itself (straight-through)."""
    with torch.no_grad():
        rounded = round_weight(w, bits, group).float()
    # what is added is zero; the value of w + (rounded - w) might be off in its last bit
    return rounded + (w - w.detach())


class FakeLinear(nn.Linear):
    def forward(self, x):
        xq, xs = round_rows(x.detach().float())
        return F.linear(xq * xs + (x - x.detach()), fake_weight(self.weight, self.bits, self.group))


class FakeEmbedding(nn.Embedding):
    def forward(self, idx):
        return F.embedding(idx, fake_weight(self.weight, self.bits, self.group))


def prepare(model, bits=8, group=GROUP, tables_bits=8):
    """
    Makes every Linear and Embedding of model round as it will after export, in place and for good. Only the forward
    differs, so only the class of a module changes: weights, their names and whatever holds them (optimizers, FSDP)
    stay.
    In float32 the results are those of the integers. Under bfloat16 autocast, which only training uses, a product takes
    the rounded values in bfloat16, and so rounds them once more.
    """
    fake = {nn.Linear: FakeLinear, nn.Embedding: FakeEmbedding}
    for name, module in model.named_modules():
        if type(module) in fake:
            module.__class__ = fake[type(module)]
            module.bits = tables_bits if name in TABLES else bits
            module.group = group
    return model

# -----------------------------------------------------------------------------
# running on the integers

def int_matmul(xq, w):
    """
    xq (M, K) and w (N, K), integers in [-127, 127], w int8 -> their exact product xq @ w.T (M, N),
    int32 or float32.
    """
    if xq.device.type == 'cpu':
        return torch._int_mm(xq.to(torch.int8), w.t())      # int32: what it is multiplied with makes it float
    if xq.device.type == 'cuda' and w.size(0) % 8 == 0 and w.size(1) % 8 == 0:
        M = xq.size(0)                                       # cuBLAS wants at least 17 rows
        return torch._int_mm(F.pad(xq.to(torch.int8), (0, 0, 0, max(0, 17 - M))), w.t())[:M].float()
    return float_matmul(xq, w)


def float_matmul(xq, w):
    """
    int_matmul where the device has no integer kernel: a float32 holds every integer up to 2^24,
    so sums over at most 1,040 products are exact.
    """
    parts = zip(xq.float().split(1040, dim=1), w.split(1040, dim=1))
    return sum((a @ b.float().t()).to(torch.int32) for a, b in parts).float()


def register_integers(module, rounded):
    """
    Gives module the buffers weight (rows, cols) int8 or packed (rows, bytes) uint8, scale (rows,) float32 and step
    (rows, groups) int8 or None, and says of what format they are.
    """
    module.bits, module.group, module.cols = rounded.bits, rounded.group, rounded.v.size(1)
    module.register_buffer('weight', pack(rounded))
    module.register_buffer('scale', rounded.scale)
    module.register_buffer('step', rounded.step)


class IntLinear(nn.Module):
    """
    x (..., K) -> (..., N) float32, of a Rounded (N, K). PyTorch has no exact product of 4-bit integers on CPUs or GPUs:
    a call at 4 bits unpacks the matrix to int8, which takes ten times as long as the product. engine.for_decoding has
    faster ways.
    """
    def __init__(self, rounded):
        super().__init__()
        register_integers(self, rounded)

    def integers(self):
        """v (N, K) int8."""
        return unpack(self.weight, self.step, self.bits, self.group, self.cols)

    def forward(self, x):
        xq, xs = round_rows(x.float())
        y = int_matmul(xq.flatten(0, -2), self.integers()).view(*x.shape[:-1], -1)
        return y * self.scale * xs


class IntEmbedding(nn.Module):
    """idx (...) -> (..., n_embd) float32, of a Rounded (vocab_size, n_embd)."""
    def __init__(self, rounded):
        super().__init__()
        register_integers(self, rounded)

    def forward(self, idx):
        step = None if self.step is None else self.step[idx]
        v = unpack(self.weight[idx], step, self.bits, self.group, self.cols)
        return v.float() * self.scale[idx].unsqueeze(-1)


def convert(model, bits=8, group=GROUP, tables_bits=8, search=True):
    """
    Replaces every Linear and Embedding of model by its integer form, in place; vocabularies have tables_bits, all else
    has bits. A tied lm_head keeps sharing the embedding's integers. search: see round_weight.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            kind = IntLinear if isinstance(module, nn.Linear) else IntEmbedding
            its_bits = tables_bits if name in TABLES else bits
            model.set_submodule(name, kind(round_weight(module.weight.detach(), its_bits, group, search)))
    if model.config.tie_weights:
        for buffer in ('weight', 'scale', 'step'):
            setattr(model.lm_head, buffer, getattr(model.transformer.wte, buffer))
    return model.eval()


def rounding_of(model):
    """{'bits', 'group', 'tables_bits'}, convert's arguments, as a converted model's modules say; None for floats."""
    table, matrix = model.transformer.wte, model.transformer.h[0].mlp.c_fc
    if not isinstance(table, IntEmbedding):
        return None
    return {'bits': matrix.bits, 'group': matrix.group, 'tables_bits': table.bits}

# -----------------------------------------------------------------------------
# rounding after training, with the errors fed back

def gptq_weight(w, hessian, bits=4, group=GROUP, damping=0.01):
    """
    round_weight for w (rows, cols), but for the least change of its products with inputs x of which hessian
    (cols, cols) is the sum of x x^T (GPTQ, arXiv 2210.17323, algorithm 1): column after column is rounded, and the
    columns still to come make up for the error as well as they can. A group's step is chosen when its turn comes,
    from its columns as they are by then.
    """
    if w.device.type == 'mps':                  # which has no float64
        fitted = gptq_weight(w.cpu(), hessian.cpu(), bits, group, damping)
        step = None if fitted.step is None else fitted.step.to(w.device)
        return Rounded(fitted.v.to(w.device), fitted.scale.to(w.device), step, bits, group)
    form = format_of(bits)
    nearest = round_weight(w, bits, group)      # its scale stays; v and step are chosen anew
    scale, step, v = nearest.scale, nearest.step, torch.empty_like(nearest.v)
    x = (w / scale[:, None]).double()
    hessian = hessian.double()
    # without the damping, inputs that are always zero would stop the Cholesky decomposition
    hessian = hessian + (damping * hessian.diagonal().mean() + 1e-12) * torch.eye(w.size(1), device=w.device)
    # row j of U: how later columns answer an error in column j
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, w.size(1), group):
        block, upper = x[:, start:start + group], U[start:start + group, start:start + group]
        errors = torch.zeros_like(block)
        s = 1
        if form.steps > 1:
            s = choose_step(block.float(), form)                                 # (rows, 1)
            step[:, start // group] = s.squeeze(1)
        for j in range(block.size(1)):
            column = block[:, j:j + 1]                                           # (rows, 1)
            rounded = round_to(column, s, form.edge)
            v[:, start + j:start + j + 1] = rounded
            errors[:, j:j + 1] = (column - rounded) / upper[j, j]
            block[:, j + 1:] -= errors[:, j:j + 1] * upper[j, j + 1:]
        # the columns of later groups, in one product
        x[:, start + group:] -= errors @ U[start:start + group, start + group:]
    return Rounded(v, scale, step, bits, group)


def second_moments(model, names, run):
    """
    {name: sum of x x^T (cols, cols)} over the tokens x that model's matrices of these names read while run() runs,
    rounded as an integer matrix rounds them.
    """
    sums = dict.fromkeys(names, 0.0)

    def reads(name):
        def add(module, args):
            xq, xs = round_rows(args[0].float())
            x = (xq * xs).flatten(0, -2)                                         # (tokens, cols)
            sums[name] = sums[name] + x.T @ x
        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(reads(name)) for name in names]
    run()
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
def gptq(model, batches, bits=4, group=GROUP, tables_bits=8):
    """
    A float model -> a converted copy, its matrices rounded by gptq_weight for what they read in batches, a list of
    (x, y). Layer by layer: the inputs come from the layers that are rounded already, and are rounded as they will be.
    Tables are rounded as by convert.
    """
    fitted = convert(copy.deepcopy(model), bits, group, tables_bits)

    def fit(names, run):
        """Rounds the matrices of these names for what they read while run() runs."""
        for name, hessian in second_moments(fitted, names, run).items():
            rounded = gptq_weight(model.get_submodule(name).weight, hessian, bits, group)
            fitted.set_submodule(name, IntLinear(rounded))

    states = [fitted.embed(x) for x, _ in batches]                               # (B, T, n_embd) each
    blocks = fitted.transformer.h
    for i, block in enumerate(progress(blocks, len(blocks), 'layers fitted by GPTQ')):
        def run():
            return [block(x, fitted.cos[:x.size(1), None], fitted.sin[:x.size(1), None], None) for x in states]
        # in the order in which the block computes: each is fitted to what the ones before it, rounded, give it
        readers = ('mlp.c_gate', 'mlp.c_fc') if model.config.mlp == 'swiglu' else ('mlp.c_fc',)
        for names in (('attn.c_q', 'attn.c_k', 'attn.c_v'), ('attn.c_proj',), readers, ('mlp.c_proj',)):
            fit([f'transformer.h.{i}.{name}' for name in names], run)
        states = run()
    # the extra heads are MLPs too
    heads = [name.removesuffix('.c_fc') for name, _ in fitted.named_modules()
             if name.endswith('.c_fc') and 'transformer' not in name]
    if heads:
        for part in ('c_fc', 'c_proj'):
            fit([f'{head}.{part}' for head in heads], lambda: [fitted(x, y) for x, y in batches])
    return fitted

# -----------------------------------------------------------------------------
# the file: an integer checkpoint, its shape, rounding and tokenizer in the metadata

FORMAT = 'picochat-int'


def stored_modules(model):
    """{name: integer module} of a converted model, each that the file holds: a tied head is the embedding's."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (IntLinear, IntEmbedding)) and not (model.config.tie_weights and name == 'lm_head')}


def file_state(model):
    """What a converted model's file holds: its state dict, a tied head left out."""
    return {f'{name}.{key}': t for name, module in stored_modules(model).items()
            for key, t in module.state_dict().items()}


def int_share(model):
    """Share of the numbers in the model's file that are integers (the rest are scales)."""
    integers = floats = 0
    for module in stored_modules(model).values():
        integers += len(module.scale) * module.cols
        integers += 0 if module.step is None else module.step.numel()
        floats += module.scale.numel()
    return integers / (integers + floats)


def bytes_by_group(model):
    """
    {'embedding', 'trunk', 'head', ...: bytes of its integers, 'scales': bytes of all scales and steps};
    the file has a header besides.
    """
    groups = {'transformer.wte': 'embedding', 'transformer.c_out': 'head', 'transformer.h': 'trunk', 'lm_head': 'head',
              'multi_token': 'multi_token', 'draft': 'draft'}
    count = {}
    for name, t in file_state(model).items():
        key = next(group for start, group in groups.items() if name.startswith(start))
        if name.endswith(('scale', 'step')):
            key = 'scales'
        count[key] = count.get(key, 0) + t.nbytes
    return count


def export(path, model, tokenizer_meta, dataset=None):
    """Writes a converted model with shape, tokenizer and the name of its dataset to path; returns the file's bytes."""
    metadata = {'config': asdict(model.config), 'rounding': rounding_of(model), 'tokenizer': tokenizer_meta,
                'dataset': dataset}
    metadata = {'format': FORMAT} | {key: json.dumps(value) for key, value in metadata.items()}
    return write_safetensors(path, file_state(model), metadata)


def load(path, device='cpu'):
    """
    path -> the integer model on device, in eval mode, and {'config', 'tokenizer', 'dataset', 'rounding'}; of a .pt what
    load_model gives. ValueError says in one line what is wrong with a damaged or foreign file. (The sha256 in it finds
    damage, not tampering: who changes a file on purpose writes another sha256.)
    """
    if path.endswith('.pt'):
        return load_model(path, device)
    if not os.path.isfile(path):
        bits = re.fullmatch(r'int(\d+)\.safetensors', os.path.basename(path))
        raise ValueError(f"no quantised model at {path}: make one with python quantize.py "
                         f"--out_dir={shlex.quote(os.path.dirname(path) or '.')}{f' --bits={bits[1]}' if bits else ''}")
    tensors, metadata = read_safetensors(path, FORMAT, device)
    state = read_metadata(metadata, path)
    state['config'] = config = config_from(state['config'], path)
    check_size(config, tensors, path)
    with torch.device('meta'):                               # the float model never takes any memory
        model = convert(GPT(config), **state['rounding'])
    if config.tie_weights:
        tensors |= {name.replace('transformer.wte', 'lm_head'): t for name, t in tensors.items() if 'wte' in name}
    check_tensors(model.state_dict(), tensors, path)
    model.load_state_dict(tensors, assign=True)
    model.cos, model.sin = (t.to(device) for t in rope_tables(config))
    return model.eval(), state


def read_metadata(metadata, path):
    """What export wrote about a model. ValueError if it is something else."""
    try:
        state = {key: json.loads(metadata.get(key, 'null')) for key in ('config', 'rounding', 'tokenizer', 'dataset')}
        bits, group, tables_bits = (state['rounding'][key] for key in ('bits', 'group', 'tables_bits'))
        known = {bits, tables_bits} <= {*BITS} and type(group) is int and group > 0 and len(state['rounding']) == 3
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{path} does not say how its weights are rounded: use another copy, or run quantize.py again")
    return state

# -----------------------------------------------------------------------------
# what it cost

# compare's, in a document
MEASURED = ('val_loss_float', 'val_loss_quant', 'bpb_float', 'bpb_quant', 'mean_kl', 'max_kl', 'top1_flips')


@torch.no_grad()
def compare(model, quantised, batches, token_bytes):
    """
    One pass of both models over batches of (x, y), y = -1 masked. -> 'val_loss_float', 'val_loss_quant', 'bpb_float',
    'bpb_quant' as evaluate has them; 'mean_kl', 'max_kl' of KL(float || quantised) in nats; and 'top1_flips', at what
    share of the positions another token is the most probable one.
    """
    total_float, total_quant = (LossTotal(token_bytes, model.cos.device) for _ in range(2))
    kl_sum = kl_max = flips = n = 0
    rows = max(1, LOSS_CHUNK_BYTES // (4 * model.config.vocab_size))             # as evaluate has them at a time
    for x, y in batches:
        y, nats_float, nats_quant = y.flatten(), [], []
        states = model.trunk(x).flatten(0, 1), quantised.trunk(x).flatten(0, 1)  # (B * T, n_embd)
        for a, b, targets in zip(states[0].split(rows), states[1].split(rows), y.split(rows)):
            a = F.log_softmax(model.logits(a), dim=-1)                           # (rows, vocab_size)
            b = F.log_softmax(quantised.logits(b), dim=-1)
            nats_float.append(F.nll_loss(a, targets, ignore_index=-1, reduction='none'))
            nats_quant.append(F.nll_loss(b, targets, ignore_index=-1, reduction='none'))
            kl = (a.exp() * (a - b)).sum(dim=-1)[targets >= 0].cpu()
            kl_sum += kl.double().sum().item()
            kl_max = max([kl_max] + kl.tolist())
            flips += (a.argmax(-1) != b.argmax(-1))[targets >= 0].sum().item()
            n += len(kl)
        total_float.add(torch.cat(nats_float), y)
        total_quant.add(torch.cat(nats_quant), y)
    before, after = total_float.result(), total_quant.result()
    return {'val_loss_float': before['loss'], 'val_loss_quant': after['loss'],
            'bpb_float': before['bpb'], 'bpb_quant': after['bpb'],
            'mean_kl': kl_sum / n, 'max_kl': kl_max, 'top1_flips': flips / n}

# -----------------------------------------------------------------------------
# the script

METHODS = ('rtn', 'clip', 'gptq', 'qat')


def has_groups(bits, tables_bits):
    return any(format_of(b).steps > 1 for b in (bits, tables_bits))


def trained_with(state):
    """
    How a checkpoint's weights were trained, in the words of train.py's knobs. quant_bits is 0 for those that were
    trained in float, or saved before their rounding had begun.
    """
    knobs = {'quant_bits': 0, 'quant_group': GROUP, 'tables_bits': 8, 'qat_start': 0.0, 'max_iters': 0}
    knobs |= state.get('knobs', {})
    began = math.ceil(knobs['qat_start'] * knobs['max_iters'])
    if knobs['qat_start'] and state['step'] <= began:
        knobs['quant_bits'] = 0
    return {name: knobs[name] for name in ('quant_bits', 'quant_group', 'tables_bits')}


def choose_method(method, wanted, trained, source):
    """'auto' -> how weights that were trained so are rounded as wanted; both are in the words of train.py's knobs."""
    group_counts = has_groups(wanted['quant_bits'], wanted['tables_bits'])
    as_trained = all(wanted[name] == trained[name] for name in wanted if name != 'quant_group' or group_counts)
    assert method != 'qat' or as_trained, (
        f"method (qat) needs weights trained with {wanted}, and {source}'s were with {trained}: "
        "train again, or use another method")
    if method != 'auto':
        return method
    return 'qat' if as_trained else format_of(wanted['quant_bits']).method


def say(result):
    """The document for people."""
    path, size, parts = result['file'], result['bytes'], result['bytes_by_group']
    parts = parts | {'header': size - sum(parts.values())}
    print(f"{path}: {size:,} bytes, {result['compression']:.2f}x smaller than the {result['params']:,} weights in "
          f"float32; {100 * result['int_share']:.1f} % of its numbers are integers")
    print(f"bytes: {', '.join(f'{name} {n:,}' for name, n in parts.items())}")
    if result['val_loss_quant'] is None:
        return
    print("loss on the whole validation split: "
          f"float {result['val_loss_float']:.4f} nats ({result['bpb_float']:.4f} bits per byte), "
          f"int{result['bits']} by {result['method']} {result['val_loss_quant']:.4f} ({result['bpb_quant']:.4f})")


if __name__ == '__main__':
    from data.files import hold, in_repo, json_line
    from data.record import already, record
    # -------------------------------------------------------------------------
    out_dir = 'out-quickstart'      # where train.py left best.pt
    weights = 'best.pt'             # the float checkpoint in out_dir
    save_dir = ''                   # where the file goes; empty: into out_dir
    bits = 8                        # 8 or 4
    method = 'auto'                 # rtn: to nearest; clip: with steps searched, of which 8 bits have none; gptq: fitted to calibration data; qat: as the weights were trained
                                    # auto: qat if they were trained with quant_bits=bits; else gptq at 4 bits,
                                    # and rtn at 8, where nothing is left to gain
    group = 0                       # 4 bits: columns that share a step, 32, 64 or 128; 0: as trained, or 32
    tables_bits = 0                 # of the vocabularies, 8 or 4; 0: as trained, or 8
    calib_batches = 16              # gptq: so many times 16 rows of the training split
    dataset = ''                    # a folder under data/; empty: the one the model was trained on
    device = 'auto'
    limits = {
        'bits': [*BITS],
        'tables_bits': [0, *BITS],
        'group': [0, *GROUPS],
        'method': ['auto', *METHODS],
        'calib_batches': (1, None),
    }
    exec(open(in_repo('configurator.py')).read())
    # -------------------------------------------------------------------------
    device = pick_device(device)
    source = os.path.join(out_dir, weights)
    path = os.path.join(save_dir or out_dir, f'int{bits}.safetensors')
    # this file alone is held, not the folder: a training there may go on, of whose best.pt a whole one is read
    hold(os.path.dirname(path), os.path.basename(path))
    done = already(path, [source])
    if done is not None:
        print(json_line(done))
        sys.exit()

    model, state = load_model(source, device)
    trained = trained_with(state)
    group, tables_bits = group or trained['quant_group'], tables_bits or trained['tables_bits']
    wanted = {'quant_bits': bits, 'quant_group': group, 'tables_bits': tables_bits}
    method = choose_method(method, wanted, trained, out_dir)
    block_size = model.config.block_size
    gone = data_are_gone(state, dataset)
    if gone:
        text = f"{os.path.join(in_repo('data'), str(state.get('dataset')))}, which {source} was trained on, is gone"
        if method == 'gptq':
            raise ValueError(f"{text}, and method gptq is fitted to a text: give --method=clip, which needs none, or "
                             "--dataset= with another text in the same tokens")
        print(f"note: {text}: the file is written and not measured; --dataset= with another text in the same tokens "
              "would measure it")
    else:
        data_dir, tokenizer = data_of(state, out_dir, dataset)
        validation = Loader(data_dir, 'val', 16, block_size, device=device)

    if method == 'gptq':
        training = Loader(data_dir, 'train', 16, block_size, device=device)
        batches = [training.batch(step) for step in range(calib_batches)]
        quantised = gptq(model, batches, bits, group, tables_bits)
    else:
        quantised = convert(copy.deepcopy(model), bits, group, tables_bits, search=method != 'rtn')
    size = export(path, quantised, state['tokenizer'], dataset or state.get('dataset'))

    quantised = load(path, device)[0]                        # what is measured is the file
    n = model.params()['total']
    result = {'file': path, 'bytes': size, 'bits': bits, 'method': method,
              'group': group if has_groups(bits, tables_bits) else None, 'tables_bits': tables_bits,
              'compression': 4 * n / size, 'params': n, 'int_share': int_share(quantised),
              'bytes_by_group': bytes_by_group(quantised), **dict.fromkeys(MEASURED)}
    if not gone:
        result |= compare(model, quantised, validation.eval_batches(), tokenizer.token_bytes)
    say(result)
    record(path, result, [source], starts_from=source)
    print(json_line(result))
