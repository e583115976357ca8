"""
Turns and scales a float network into an equal one that rounds better. A library; quantize.py uses it.

    model = balance(model, batches)             # batches: a list of (x, y), calibration text; the logits do not change

A row of integers has one scale, which its largest number sets. So rounding costs most where a few numbers are much
larger than the rest: trained transformers have some channels that stand out in the residual stream, and neurons that
fire a hundred times as strongly as others. The changes below even that out. None of them changes what the float network
computes. All but the last change only weights, and cost nothing at run time:

- The residual stream is turned by a random orthogonal matrix (QuaRot, arXiv 2404.00456). RMSNorm without weights gives
  the same, turned; every matrix that reads or writes the stream is turned to match; and an outlier of one channel is
  spread over all.
- Where a tied Llama has c_out, the stream is scaled so that c_out adds as little to it as possible.
- The values of each key/value head are turned likewise, and c_proj, which reads them, is turned back.
- What both c_proj read is smoothed (SmoothQuant, arXiv 2211.10438): a neuron that fires strongly is scaled down where
  it is written and up where it is read, half of the way in logarithms, so that its weights stand out half as much as
  its activations did.
- Hidden units are turned by Hadamard matrices of 32 before mlp.c_proj reads them, and its weights are turned back. No
  change of weights can do this, since the activation function in between does not commute with a turn. So it happens at
  run time (GPTConfig.hadamard): 5 sums and differences for a unit, beside hundreds of products.
"""
import math
from dataclasses import replace

import torch

from data.slicing import C_OUT, build, rotate_channels
from model import hadamard

EXPONENT = 0.5          # how much of a neuron's size moves from its activations into its weights: 0 nothing, 1 all
TURN = 32               # hidden units turned together; a smaller power of 2 where 32 does not divide n_hidden


@torch.no_grad()
def balance(model, batches, seed=0):
    """
    A GPT -> an equal one (a copy), in eval mode. batches: a list of (x, y), without which nothing is smoothed; seed: of
    the random turns.
    """
    random = torch.Generator().manual_seed(seed)
    turn = rotation(model.config.n_embd, random).to(model.cos.device)
    model = build(*scaled_stream(*rotate_channels(model.state_dict(), model.config, turn)))
    for block in model.transformer.h:
        turn_values(block.attn, random)
    if batches:
        smooth(model, batches)
    return turn_hidden(model)


def scaled_stream(state, config):
    """
    lm_head reads x + c_out(x) where there is a c_out (out_proj), and c_out may have a large diagonal, next to which its
    small numbers would be lost in the rounding. The stream is therefore scaled by the mean of 1 + that diagonal: then
    c_out has nearly none left. Norms do not notice the size of a stream. Changes state's tensors in place, which must
    not share memory.
    Extra heads read normed states, whose size stays 1. Only their own norms now have another eps, which moves their
    logits by about norm_eps * size^2 / 2 of their size, for SmolLM2 by 2e-5.
    """
    if not config.out_proj or config.embed_norm:
        return state, config
    eye = torch.eye(config.n_embd).to(state[C_OUT])
    whole = eye + state[C_OUT]
    size = whole.diagonal().mean().abs().item() or 1.0
    for name, w in state.items():
        writes = name.startswith('transformer') and name.endswith(('c_proj.weight', 'wte.weight'))
        if writes or name == 'lm_head.weight':
            w.mul_(size)
    if config.draft_n:
        state['draft.c_fc.weight'][:, config.n_embd:] /= size       # reads an embedding
    state[C_OUT] = whole / size - eye
    return state, replace(config, norm_eps=config.norm_eps * size ** 2)


def rotation(n, generator):
    """A random orthogonal matrix (n, n), float32."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * r.diagonal().sign()).float()            # the signs make all orthogonal matrices equally likely


def turn_values(attn, generator):
    """Turns the values of every key/value head, and turns c_proj back for the query heads that read them."""
    kv, D = attn.n_kv_head, attn.head_dim
    value = attn.c_v.weight.view(kv, D, -1)                                     # (kv, D, n_embd)
    proj = attn.c_proj.weight.view(-1, kv, attn.n_head // kv, D)                # (n_embd, kv, query heads, D)
    for head in range(kv):
        turn = rotation(D, generator).to(value)
        value[head] = turn @ value[head]
        proj[:, head] = proj[:, head] @ turn.T


def turn_hidden(model):
    """Makes the model turn its hidden units before c_proj reads them, and turns c_proj back, in place -> model."""
    size = math.gcd(TURN, model.config.n_hidden)
    model.config = replace(model.config, hadamard=size)
    for block in model.transformer.h:
        block.mlp.turned = size
        weight = block.mlp.c_proj.weight
        weight.copy_(hadamard(weight, size) / size)
    return model


def smooth(model, batches):
    """Scales what both c_proj of every block read, in place, by how large it gets while the model reads batches."""
    largest = peaks(model, batches)
    for i, block in enumerate(model.transformer.h):
        attn, mlp = block.attn, block.mlp
        # several query heads read the same value, so they share a scale, set by the largest of them
        kv, heads, D = attn.n_kv_head, attn.n_head // attn.n_kv_head, attn.head_dim
        read = largest[f'transformer.h.{i}.attn.c_proj'].view(kv, heads, D).amax(dim=1)             # (kv, D)
        weights = attn.c_proj.weight.abs().amax(dim=0).view(kv, heads, D).amax(dim=1)
        scale = scales(read, weights)
        attn.c_v.weight.div_(scale.view(-1, 1))
        attn.c_proj.weight.mul_(scale[:, None].expand(-1, heads, -1).reshape(-1))

        scale = scales(largest[f'transformer.h.{i}.mlp.c_proj'], mlp.c_proj.weight.abs().amax(dim=0))   # (n_hidden,)
        mlp.c_fc.weight.div_(mlp.undo(scale)[:, None])
        mlp.c_proj.weight.mul_(scale)


def scales(read, weights):
    """
    The largest activation and the largest weight of each of K inputs, (K,) both -> the factors (K,) by which to divide
    the activations and multiply the weights; 1 for inputs that are always zero.
    """
    scale = (read / weights).pow(EXPONENT)
    return torch.where((read > 0) & (weights > 0), scale, 1.0)


def peaks(model, batches):
    """{'transformer.h.0.attn.c_proj': (K,), ...}: the largest absolute number that each c_proj of the trunk reads."""
    largest = {}
    for name, module in model.named_modules():
        if name.startswith('transformer.h.') and name.endswith('c_proj'):
            largest[name] = torch.zeros(module.weight.size(1), device=module.weight.device)

    def watch(name):
        def look(module, args):
            largest[name] = torch.maximum(largest[name], args[0].abs().flatten(0, -2).amax(dim=0))
        return look
    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in largest]
    for x, _ in batches:
        model.trunk(x)
    for hook in hooks:
        hook.remove()
    return largest
