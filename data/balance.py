"""
The same float network, turned and scaled into one that rounds better. A library; quantize.py uses it.

    model = balance(model, batches)             # batches: a list of (x, y) to look at; logits stay as they are

A row of integers has one scale, which its largest number sets. So rounding costs most where a few numbers are much
larger than the rest: trained transformers have some channels that stand out in the residual stream, and neurons that
fire a hundred times as strongly as others. These changes take that away. None of them changes what the float network
computes, and all but the last, of weights alone, cost nothing when it runs:

- The residual stream is turned by a random orthogonal matrix (QuaRot, arXiv 2404.00456). RMSNorm without weights does
  not notice, all that reads or writes the stream is turned along, and what stood out in one channel is spread over all.
- Where a tied Llama has c_out, the stream gets another size, so that c_out adds as little to it as it can.
- The values of each key/value head are turned likewise, and what c_proj reads of its query heads is turned back.
- What both c_proj read is smoothed (SmoothQuant, arXiv 2211.10438): a neuron that fires strongly is scaled down where
  it is written and up where it is read, half of the way in logarithms, so that its weights stand out half as much as
  its activations did.
- Hidden units are turned by Hadamard matrices of 32 before mlp.c_proj reads them, and its weights turned back. This one
  has to be done as the model runs (GPTConfig.hadamard): by 5 sums and differences for a unit, beside hundreds of
  products. No change of weights can do it, since a unit is made by a function that no turn passes through.
"""
import math
from dataclasses import replace

import torch

from data.slicing import C_OUT, build, rotate_channels
from model import hadamard

EXPONENT = 0.5          # how much of a neuron's size moves from its activations into its weights: 0 nothing, 1 all
TURN = 32               # hidden units that are turned together, or a smaller power of 2 that divides n_hidden


@torch.no_grad()
def balance(model, batches, seed=0):
    """
    A GPT -> an equal one (a copy), in eval mode. batches: a list of (x, y); seed: of the turns. Without batches nothing
    is smoothed.
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
    Where c_out adds to what it reads (out_proj), a stream of another size, so that it adds the least it can: norms do
    not notice the size, and what is small next to a large diagonal would be lost in the rounding. In place: the state's
    tensors must be its own, each by itself.
    Extra heads read states that are normed, whose size stays 1; only what they norm themselves has another eps, which
    moves their logits by about norm_eps * size^2 / 2 of their size, for SmolLM2 by 2e-5.
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
    return (q * r.diagonal().sign()).float()            # with the signs all orthogonal matrices are equally likely


def turn_values(attn, generator):
    """Turns the values of every key/value head, and back what c_proj reads of the query heads that it serves."""
    kv, D = attn.n_kv_head, attn.head_dim
    value = attn.c_v.weight.view(kv, D, -1)                                     # (kv, D, n_embd)
    proj = attn.c_proj.weight.view(-1, kv, attn.n_head // kv, D)                # (n_embd, kv, query heads, D)
    for head in range(kv):
        turn = rotation(D, generator).to(value)
        value[head] = turn @ value[head]
        proj[:, head] = proj[:, head] @ turn.T


def turn_hidden(model):
    """Turns hidden units before c_proj reads them, in place: the same network. Returns model."""
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
        # a value serves several query heads: it has one scale, and the largest of what they make of it counts
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
    The largest of what is read and of the weights that read it, (K,) both -> by what to divide the one and multiply
    the other (K,). What never fires stays as it is.
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
