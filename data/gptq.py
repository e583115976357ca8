"""
Rounding after training, with the errors fed back (GPTQ, arXiv 2210.17323). A library.

    quantised = gptq(model, batches, bits=4)        # the float model stays as it is
"""
import copy

import torch

from data.loader import progress
from data.rounding import (GROUP, IntLinear, Rounded, choose_step, convert, format_of, round_rows, round_to,
                           round_weight)

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

