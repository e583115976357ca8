"""
Rounding after training, with the errors fed back (GPTQ, arXiv 2210.17323). A library.

    quantised = gptq(model, batches, bits=4)        # the float model stays as it is (but for keep_before)
"""
import math

import torch

from data.loader import progress
from data.machine import give_back_memory
from data.rounding import GROUP, IntLinear, Rounded, convert, format_of, round_rows, sharing
from model import norm


@torch.no_grad()
def gptq_weight(w, hessian, bits=4, group=GROUP, damping=0.01, keep_before=False):
    """
    round_weight for w (rows, cols), but for the least change of its products with inputs x of which hessian
    (cols, cols) is the sum of x x^T (GPTQ, arXiv 2210.17323, algorithm 1): column after column is rounded, and the
    columns still to come make up for the error as well as they can. A group's step is chosen when its turn comes,
    from its columns as they are by then, and may be negative: see signed_step. -> Rounded, and with keep_before the
    weights (rows, cols) float32 as they were when each was rounded, else None.
    """
    form = format_of(bits)
    peak = w.abs().amax(dim=1)
    scale = torch.where(peak > 0, peak / (-form.least * most_steps(form)), 1.0)                  # (rows,)
    inverse = inverse_cholesky(hessian, damping).to(w.device)
    x = (w.float() / scale[:, None]).T.contiguous()                              # (cols, rows): a column lies in one piece
    v, step = torch.empty_like(x), None
    before = torch.empty_like(x) if keep_before else None
    if form.steps > 1:
        step = torch.empty(len(w), math.ceil(len(x) / group), dtype=torch.int8, device=w.device)
    for start in range(0, len(x), group):
        # round the columns of a group one by one; all later groups are corrected for them in one product
        end = min(start + group, len(x))
        block, here = x[start:end], inverse[start:end, start:end]
        errors = torch.empty_like(block)
        s = 1
        if form.steps > 1:
            importance = 1 / here.diagonal().square()       # less where later columns can make up for an error
            s = signed_step(block, importance, form)                             # (rows,)
            step[:, start // group] = s
        for j in range(end - start):
            if keep_before:
                before[start + j] = block[j]
            v[start + j] = (block[j] / s).round().clamp(form.least, form.edge) * s
            errors[j] = (block[j] - v[start + j]) / here[j, j]
            block[j + 1:].addr_(here[j, j + 1:], errors[j], alpha=-1)
        x[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    before = before.T * scale[:, None] if keep_before else None
    return Rounded(v.T.contiguous().to(torch.int8), scale, step, bits, group), before


def most_steps(form):
    """The largest step whose multiples, form.least of them included, are int8."""
    return min(form.steps, 127 // -form.least)


def signed_step(x, importance, form):
    """
    The columns x (group, rows) of a group in units of their rows' scales, and how much an error in each of them matters,
    importance (group,) -> the step of each row (rows,) that has the least squared error. Four bits have sixteen values,
    -8, ..., 7, one more on one side than on the other: with a negative step it is on the side of the largest weight.
    """
    best = error = None
    for sign in (1, -1):
        y = sign * x
        # a smaller step would clip something
        unclipped = torch.maximum(y.amax(dim=0) / form.edge, y.amin(dim=0) / form.least)
        for less in range(form.tries):
            step = (unclipped.ceil() - less).clamp(1, most_steps(form))
            e = ((y / step).round().clamp(form.least, form.edge) * step - y).square()
            e = (importance[:, None] * e).sum(dim=0)
            if best is None:
                best, error = sign * step, e
            else:
                best = torch.where(e < error, sign * step, best)
                error = torch.minimum(e, error)
    return best


def inverse_cholesky(hessian, damping):
    """
    hessian (cols, cols) -> U (cols, cols) float32, upper triangular, the Cholesky factor of the inverse, computed in
    float64: row j says by how much each later column changes to make up for an error in column j.
    """
    hessian = hessian.cpu().to(torch.float64, copy=True)         # on the CPU: some GPUs have no float64
    # without the damping, inputs that are always zero would stop the decomposition
    hessian.diagonal().add_(damping * hessian.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


def second_moment(inputs):
    """
    inputs: a list of (..., cols) -> the sum of x x^T (cols, cols) over all tokens x, rounded as an integer matrix rounds
    what it reads.
    """
    total = 0
    for x in inputs:
        xq, xs = round_rows(x.float())
        x = (xq * xs).flatten(0, -2)                                             # (tokens, cols)
        total = total + x.T @ x
    return total


def read_by(module, run):
    """The inputs that module reads while run() runs, a list."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run()
    hook.remove()
    return seen


def fit(target, source, names, inputs, bits, group, keep_before):
    """
    Rounds the float matrices of source (a module) with these names, which all read inputs, and puts them into target.
    keep_before: see gptq.
    """
    weights = [source.get_submodule(name).weight for name in names]
    rounded, before = gptq_weight(torch.cat(weights), second_moment(inputs), bits, group, keep_before=keep_before)
    sizes = [len(w) for w in weights]
    steps = [None] * len(names) if rounded.step is None else rounded.step.split(sizes)
    for name, v, scale, step in zip(names, rounded.v.split(sizes), rounded.scale.split(sizes), steps):
        target.set_submodule(name, IntLinear.holding(Rounded(v, scale, step, bits, group)))
    if keep_before:
        for name, w in zip(names, before.split(sizes)):
            source.get_submodule(name).weight = torch.nn.Parameter(w.contiguous())
    give_back_memory()


@torch.no_grad()
def gptq(model, batches, bits=4, group=GROUP, tables_bits=8, keep_before=False):
    """
    A float model -> a converted copy, its matrices rounded by gptq_weight for what they read in batches, a list of
    (x, y). Layer by layer: the inputs come from the layers that are rounded already, and are rounded as they will be.
    Tables are rounded as by convert. keep_before: the float matrices become what they were when each of their weights
    was rounded to its nearest integer, see rounding.behind; else they stay.
    """
    how = bits, group, keep_before
    fitted = convert(sharing(model), bits, group, tables_bits)
    eps = model.config.norm_eps
    states = [fitted.embed(x) for x, _ in batches]                               # (B, T, n_embd) each
    layers = list(zip(fitted.transformer.h, model.transformer.h))
    for block, source in progress(layers, len(layers), 'layers fitted by GPTQ'):
        # In the order in which the block computes: each matrix is fitted to what those before it, rounded, give it.
        inputs = [norm(x, eps) for x in states]
        fit(block.attn, source.attn, ('c_q', 'c_k', 'c_v'), inputs, *how)
        inputs = read_by(block.attn.c_proj, lambda: [
            block.attn(x, fitted.cos[:x.size(1), None], fitted.sin[:x.size(1), None], None) for x in inputs])
        fit(block.attn, source.attn, ('c_proj',), inputs, *how)
        states = [x + block.attn.c_proj(y) for x, y in zip(states, inputs)]
        inputs = [norm(x, eps) for x in states]
        fit(block.mlp, source.mlp, source.mlp.readers, inputs, *how)
        inputs = read_by(block.mlp.c_proj, lambda: [block.mlp(x) for x in inputs])
        fit(block.mlp, source.mlp, ('c_proj',), inputs, *how)
        states = [x + block.mlp.c_proj(y) for x, y in zip(states, inputs)]
    fit_heads(fitted, model, batches, how)
    return fitted


def fit_heads(fitted, model, batches, how):
    """gptq's last part: the extra heads, which are MLPs that read the finished trunk's states."""
    heads = [name.removesuffix('.c_fc') for name, _ in model.named_modules()
             if name.endswith('.c_fc') and 'transformer' not in name]
    for head in heads:
        for part in ('c_fc', 'c_proj'):
            name = f'{head}.{part}'
            inputs = read_by(fitted.get_submodule(name), lambda: [fitted(x, y) for x, y in batches])
            fit(fitted, model, (name,), inputs, *how)
