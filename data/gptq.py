"""
Rounding after training, with the errors fed back: GPTQ (arXiv 2210.17323). A library.

A matrix is rounded column by column, and the columns that are still float are changed to make up for the errors made so
far, as well as they can for the inputs that the matrix reads from a calibration text. Usually a rounded matrix is to
give what its float weights give from the same inputs, which earlier rounding has changed. With aim it is to give what
the float model gives from its own, unchanged inputs (as in GPTAQ, arXiv 2504.02692): better on texts like the
calibration text, worse on others.

    quantised = gptq(model, batches, bits=4)        # the float model is unchanged (unless keep_before)
"""
import itertools
import math

import torch

from data.loader import progress
from data.machine import give_back_memory
from data.rounding import GROUP, IntEmbedding, IntLinear, Rounded, convert, format_of, round_rows, sharing
from model import NEW_HEADS, norm


@torch.no_grad()
def gptq_weight(w, hessian, bits=4, group=GROUP, keep_before=False, lack=None):
    """
    Rounds w (rows, cols) so that its products w x change least (GPTQ, arXiv 2210.17323, algorithm 1). hessian
    (cols, cols): the sum of x x^T over the inputs x. Columns are rounded one after the other, and those still to come
    make up for each error. A group's step is chosen when its turn comes, from its columns as they are by then; it may
    be negative, see signed_step. lack (rows, cols): the sum of d x^T, if the products are to become w x + d.
    -> Rounded, and with keep_before the weights (rows, cols) float32 just before each was rounded, else None.
    """
    form, inverse = format_of(bits), inverse_cholesky(hessian).to(w.device)
    if lack is not None:
        w = w + lack @ inverse.T @ inverse              # least squares: the part of d that is linear in x
    peak = w.abs().amax(dim=1)
    scale = torch.where(peak > 0, peak / (-form.least * most_steps(form)), 1.0)                  # (rows,)
    x = (w.float() / scale[:, None]).T.contiguous()                              # (cols, rows): columns in one piece
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
            importance = 1 / here.diagonal().square()       # smaller where later columns can make up for an error
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
    """The largest step at which all multiples, down to form.least times the step, are int8."""
    return min(form.steps, 127 // -form.least)


def signed_step(x, importance, form):
    """
    Chooses the step of each row (rows,) that has the least squared error. x (group, rows): the columns of a group, in
    units of their rows' scales; importance (group,): how much an error in each column matters. Four bits have sixteen
    values, -8, ..., 7: one more below zero than above. With a negative step that extra value lies on the other side.
    """
    steps, errors = [], []
    for sign in (1, -1):
        y = sign * x
        # a smaller step would clip something
        unclipped = torch.maximum(y.amax(dim=0) / form.edge, y.amin(dim=0) / form.least)
        for less in range(form.tries):
            step = (unclipped.ceil() - less).clamp(1, most_steps(form))
            e = ((y / step).round().clamp(form.least, form.edge) * step - y).square()
            steps.append(sign * step)
            errors.append((importance[:, None] * e).sum(dim=0))
    least = torch.stack(errors).argmin(dim=0, keepdim=True)                      # the first of equals
    return torch.stack(steps).gather(0, least)[0]                                # (rows,)


def inverse_cholesky(hessian):
    """
    hessian (cols, cols) -> U (cols, cols) float32, upper triangular: the Cholesky factor of the inverse hessian,
    computed in float64. Row j says how much each later column changes to make up for an error in column j.
    """
    hessian = hessian.cpu().to(torch.float64, copy=True)         # on the CPU: some GPUs have no float64
    # without this damping, inputs that are always zero would stop the decomposition
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


def what_it_needs(w, inputs, wanted=None):
    """
    The arguments of gptq_weight, hessian (cols, cols) and lack (rows, cols), for a matrix w (rows, cols) that reads
    inputs, a list of (..., cols). wanted: what it is to give, a list of (..., rows). Without it the matrix is to give
    what w gives, and lack is None.

    When cols numbers are fitted to so many tokens, a share of cols / tokens of what the fit finds is noise. That much
    of lack is left out, so that a short text is not learnt by heart.
    """
    cols, tokens = w.size(1), sum(x.numel() // x.size(-1) for x in inputs)
    hessian = w.new_zeros(cols, cols)
    lack = torch.zeros_like(w) if wanted else None
    for x, target in zip(inputs, wanted or itertools.repeat(None)):
        xq, xs = round_rows(x.float())
        x = (xq * xs).flatten(0, -2)                                # (tokens, cols), rounded as the module rounds them
        hessian.addmm_(x.T, x)
        if wanted:
            short = target.float().flatten(0, -2) - x @ w.T                                      # (tokens, rows)
            lack.addmm_(short.T, x)
    if wanted:
        lack *= max(0.0, 1 - cols / tokens)
    return hessian, lack


def read_by(module, run):
    """The inputs that module gets while run() runs, a list."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run()
    hook.remove()
    return seen


def fit(target, source, names, inputs, bits, group, keep_before, wanted=None, all_alike=0.0):
    """
    Rounds the float matrices of source (a module) with these names, which all read the same inputs, and puts the
    results into target. wanted: their outputs, concatenated, see what_it_needs; keep_before: see gptq; all_alike: the
    weight of a second aim beside the inputs, that errors are equally small in all columns.
    """
    weights = [source.get_submodule(name).weight for name in names]
    w = torch.cat(weights)
    hessian, lack = what_it_needs(w, inputs, wanted)
    hessian.diagonal().add_(all_alike * hessian.diagonal().mean())
    rounded, before = gptq_weight(w, hessian, bits, group, keep_before=keep_before, lack=lack)
    sizes = [len(w) for w in weights]
    steps = [None] * len(names) if rounded.step is None else rounded.step.split(sizes)
    for name, v, scale, step in zip(names, rounded.v.split(sizes), rounded.scale.split(sizes), steps):
        target.set_submodule(name, IntLinear.holding(Rounded(v, scale, step, bits, group)))
    if keep_before:
        for name, w in zip(names, before.split(sizes)):
            source.get_submodule(name).weight = torch.nn.Parameter(w.contiguous())
    give_back_memory()


@torch.no_grad()
def gptq(model, batches, bits=4, group=GROUP, tables_bits=8, keep_before=False, aim=False):
    """
    A float model -> an integer copy, whose matrices gptq_weight has rounded for what they read in batches, a list of
    (x, y). This goes layer by layer, so that the inputs of a layer come from layers that are already rounded. aim: the
    float model reads the text besides, and its outputs are what the rounded matrices are to give. Tables of 8 bits are
    rounded by convert, which costs next to nothing; if tables have 4 bits, lm_head (which a tied wte shares) and c_out
    are fitted, by fit_tables. keep_before: replaces the weights of the float model by those just before each was
    rounded, see rounding.behind.
    """
    how = bits, group, keep_before
    fitted = convert(sharing(model), bits, group, tables_bits)
    floats = [model.embed(x) for x, _ in batches] if aim else None
    if format_of(tables_bits).steps > 1:
        fit_tables(fitted, model, batches, (tables_bits, group, keep_before))
    states = [fitted.embed(x) for x, _ in batches]                               # (B, T, n_embd) each
    layers = list(zip(fitted.transformer.h, model.transformer.h))
    for block, source in progress(layers, len(layers), 'layers fitted by GPTQ'):
        states, floats = fit_block(fitted, block, source, states, floats, how)
    fit_heads(fitted, model, states, floats, batches, how)
    if model.config.tie_weights:                # only now: fit_heads still needs the float table, for a draft head
        model.transformer.wte.weight = model.lm_head.weight
    return fitted


def fit_tables(fitted, model, batches, how):
    """
    Rounds lm_head's table, and c_out before it, for the states that the float model gives. A tied table also holds the
    embeddings, for which all columns matter alike: both aims get the same weight.
    """
    tied = model.config.tie_weights
    states = [model.trunk(x) for x, _ in batches]                                # (B, T, n_embd) each
    if model.config.out_proj:
        fit(fitted.transformer, model.transformer, ('c_out',), states, *how)
    fit(fitted, model, ('lm_head',), [fitted.before_head(x) for x in states], *how, all_alike=float(tied))
    if tied:
        fitted.transformer.wte = IntEmbedding.sharing(fitted.lm_head)


def fit_heads(fitted, model, states, floats, batches, how):
    """gptq's last part: the extra heads, which read the states of the finished trunk."""
    def read(model, name, states):
        """What the matrix with this name reads, a list of (..., cols)."""
        states = [norm(x, model.config.norm_eps) for x in states]
        return read_by(model.get_submodule(name),
                       lambda: [model.head_losses(x, y, ids) for x, (ids, y) in zip(states, batches)])
    heads = [name.removesuffix('.c_fc') for name, _ in model.named_modules()
             if name.startswith(NEW_HEADS) and name.endswith('.c_fc')]
    for head in heads:
        names = f'{head}.c_fc', f'{head}.c_proj'
        wanted = [None, None]
        if floats:                              # computed for both before fit may change the first one's weights
            wanted = [[model.get_submodule(name)(x) for x in read(model, name, floats)] for name in names]
        for name, outputs in zip(names, wanted):
            fit(fitted, model, (name,), read(fitted, name, states), *how, wanted=outputs)


def fit_block(model, block, source, states, floats, how):
    """
    Rounds the matrices of source, a float block, into block, in the order in which they compute: each is fitted to what
    the rounded ones before it give. states: the residual stream before this block, a list of (B, T, n_embd); floats:
    the same in the float model, if both c_proj are to make up for what the stream has lost so far, or None.
    -> states and floats after this block.
    """
    eps = model.config.norm_eps

    def positions(x):
        return model.cos[:x.size(1), None], model.sin[:x.size(1), None], None
    for own, given, readers, besides in ((block.attn, source.attn, ('c_q', 'c_k', 'c_v'), positions),
                                         (block.mlp, source.mlp, source.mlp.readers, lambda x: ())):
        inputs = [norm(x, eps) for x in states]
        read_wanted = added_wanted = None
        if floats:                              # generators, since these tensors are large: one batch at a time
            matrices, float_inputs = [given.get_submodule(name) for name in readers], [norm(x, eps) for x in floats]
            read_wanted = (torch.cat([matrix(x) for matrix in matrices], dim=-1) for x in float_inputs)
            floats = [x + given(y, *besides(y)) for x, y in zip(floats, float_inputs)]
            # what the rounded half would have to add so that the stream is that of the float model
            added_wanted = (f - x for f, x in zip(floats, states))
        fit(own, given, readers, inputs, *how, wanted=read_wanted)
        inputs = [own.hidden(x, *besides(x)) for x in inputs]
        fit(own, given, ('c_proj',), inputs, *how, wanted=added_wanted)
        states = [x + own.c_proj(y) for x, y in zip(states, inputs)]
    return states, floats
