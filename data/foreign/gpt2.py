"""
GPT-2 and nanoGPT as teachers: another block than ours, with its own forward pass.

    from data.foreign.gpt2 import load_gpt2
    model, tokenizer = load_gpt2('ckpt.pt', 'cpu')     # nanoGPT's file, or Hugging Face's gpt2 folder
"""
import json
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoint import plain_names
from data.files import read_text
from data.foreign.weights import HF_FILES, cut_padding, expecting, load_weights, make, padded, read_weights
from data.foreign_tokenizer import hf_folder_tokenizer

@dataclass
class GPT2Config:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_hidden: int
    bias: bool = True           # of LayerNorms and Linears
    eps: float = 1e-5           # of LayerNorms
    gelu: str = 'none'          # 'none': the exact one, 'tanh': its approximation


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019) as a teacher: LayerNorm, learned positions, GELU; modules have the usual names."""
    def __init__(self, config):
        super().__init__()
        self.config = c = config

        def linear(n_in, n_out):
            return nn.Linear(n_in, n_out, bias=c.bias)

        def layer_norm():
            return nn.LayerNorm(c.n_embd, eps=c.eps, bias=c.bias)

        def block():
            attn = dict(c_attn=linear(c.n_embd, 3 * c.n_embd), c_proj=linear(c.n_embd, c.n_embd))
            mlp = dict(c_fc=linear(c.n_embd, c.n_hidden), c_proj=linear(c.n_hidden, c.n_embd))
            return nn.ModuleDict(dict(ln_1=layer_norm(), attn=nn.ModuleDict(attn),
                                      ln_2=layer_norm(), mlp=nn.ModuleDict(mlp)))

        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(block() for _ in range(c.n_layer)),
            ln_f=layer_norm()))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)

    def trunk(self, idx):
        """idx (B, T) int64 -> states (B, T, n_embd)."""
        c, t, T = self.config, self.transformer, idx.size(1)
        assert T <= c.block_size, f"{T} tokens do not fit block_size ({c.block_size}): shorten the input"
        x = t.wte(idx) + t.wpe.weight[:T]       # (B, T, n_embd)
        for block in t.h:
            qkv = block.attn.c_attn(block.ln_1(x)).view(-1, T, 3, c.n_head, c.n_embd // c.n_head)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim) each
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, n_embd)
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate=c.gelu))
        return t.ln_f(x)

    def logits(self, x):
        """States (..., n_embd) -> logits (..., vocab_size) in float32."""
        return self.lm_head(x).float()

    def flops_per_token(self, training=True):
        """As GPT.flops_per_token."""
        c, t = self.config, self.transformer
        weights = sum(p.numel() for part in (t.h, t.ln_f) for p in part.parameters()) + c.vocab_size * c.n_embd
        return (3 if training else 1) * (2 * weights + 4 * c.n_layer * c.n_embd * c.block_size)


# what GPT2 can do; GELU: Hugging Face's names -> PyTorch's
GELU = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}
PLAIN = {'model_type': ['gpt2'], 'activation_function': GELU, 'scale_attn_weights': [True],
         'scale_attn_by_inverse_layer_idx': [False]}


def find_gpt2(path):
    """
    nanoGPT's ckpt.pt or its folder, or a Hugging Face gpt2 folder (with a config.json) -> the file of the weights.
    ValueError if there is none.
    """
    # a config.json says that the folder is one of Hugging Face's
    names = HF_FILES if os.path.exists(os.path.join(path, 'config.json')) else ['ckpt.pt']
    files = [os.path.join(path, name) for name in names] if os.path.isdir(path) else [path]
    for file in files:
        if os.path.isfile(file):
            return file
    raise ValueError(f"no GPT-2 at {path} ({' or '.join(files)} is not there): name nanoGPT's ckpt.pt, "
                     "or a Hugging Face folder with its config.json and weights")


def load_gpt2(path, device='cpu'):
    """
    nanoGPT's ckpt.pt (or its folder), or a Hugging Face gpt2 folder (config.json, and model.safetensors or
    pytorch_model.bin, or several of them and an index) -> GPT2, float32, in eval mode on device, and the tokenizer that
    lies beside it (hf_folder_tokenizer), or None. ValueError for anything else.
    """
    file = find_gpt2(path)
    read = read_hf_gpt2 if os.path.basename(file) in HF_FILES else read_nanogpt
    shape, state = read(file)
    with expecting(f"{file} and what lies beside it are not a whole checkpoint of GPT-2 or nanoGPT"):
        # old checkpoints hold their causal masks
        state = {name: t for name, t in state.items() if not name.endswith(('.attn.bias', '.attn.masked_bias'))}
        tokenizer = hf_folder_tokenizer(os.path.dirname(file))
        shape['vocab_size'] = cut_padding(state, shape['vocab_size'], tokenizer)
        wte = state['transformer.wte.weight']
        tied = 'lm_head.weight' not in state or torch.equal(state['lm_head.weight'], wte)
        state.setdefault('lm_head.weight', wte)
        config = GPT2Config(**shape, bias='transformer.ln_f.bias' in state)
    return make(GPT2, config, state, file, device, tied), tokenizer


def read_nanogpt(file):
    """
    nanoGPT's ckpt.pt -> the shape as a dict (GPT2Config's names), and the state dict. We take its GELU to be the exact
    one; until May 2023 it was the tanh approximation, and checkpoints do not tell their date.
    """
    saved = load_weights(file)
    with expecting(f"{file} is not a whole checkpoint of nanoGPT"):
        saved = dict(saved)
        c, state = saved['model_args'], plain_names(saved['model'])
        known = 'n_layer n_head n_embd block_size bias vocab_size dropout'.split()
        odd = [f'{key}={c[key]}' for key in c if key not in known]      # the setting of a fork, with other blocks
        shape = {key: c[key] for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')}
        shape |= {'n_hidden': 4 * c['n_embd'], 'gelu': 'none'}
        if shape['vocab_size'] == padded(50257):    # GPT-2's, whose tokenizer nanoGPT does not keep
            shape['vocab_size'] = 50257
    refuse_odd(file, odd)
    return shape, state


def read_hf_gpt2(file):
    """The weights' file in a Hugging Face gpt2 folder -> shape as a dict (GPT2Config's names), and the state dict."""
    stored = read_weights(file)
    with expecting(f"{file} and its config.json are not a whole checkpoint of GPT-2"):
        c = json.loads(read_text(os.path.join(os.path.dirname(file), 'config.json')))
        odd = [f'{key}={c[key]}' for key in PLAIN if key in c and c[key] not in PLAIN[key]]
        shape = {key: c[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
        shape |= {'block_size': c['n_positions'], 'n_hidden': c.get('n_inner') or 4 * c['n_embd'],
                  'eps': c.get('layer_norm_epsilon', 1e-5),
                  'gelu': GELU.get(c.get('activation_function', 'gelu_new'))}
        state = {}
        for name, tensor in plain_names(stored).items():
            if not name.startswith(('transformer.', 'lm_head.')):
                name = f'transformer.{name}'
            if re.search(r'\.(c_attn|c_proj|c_fc)\.weight$', name):
                tensor = tensor.t()             # these are stored as (in, out)
            state[name] = tensor
    refuse_odd(file, odd)
    return shape, state


def refuse_odd(file, odd):
    if odd:
        raise ValueError(f"{file} is not a plain GPT-2 ({', '.join(odd)}): it would need another forward")
