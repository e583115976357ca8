"""
Downloads and reads nanochat models of the first era (E0, 2025-10-13 to 2026-01-11), whose block is picochat's own.

    from data.foreign.nanochat import load_nanochat
    model, tokenizer = load_nanochat('teachers/d32', 'cpu')
"""
import json
import os
import re

import torch
import torch.nn as nn

from data.checkpoint import config_from, load_tensors, plain_names
from data.download import download
from data.files import hold, read_text
from data.foreign.weights import (cut_padding, expecting, hf_file, load_weights, make, read_config, read_weights,
                                  shape_in)
from data.foreign_tokenizer import hf_folder_tokenizer, load_nanochat_tokenizer
from model import GPT, GPTConfig

# d32 is a finished chat model (650 steps of chat fine-tuning after its pretraining), d34 is a base model.
# bytes: the size of the weights' file, in which all is float32 but the embedding, which is bfloat16.
NANOCHAT = {'d32': dict(repo='karpathy/nanochat-d32', step=650, params=1_879_048_192,
                        bytes=4 * 1_879_048_192 - 2 * 65536 * 2048),
            'd34': dict(repo='karpathy/nanochat-d34', step=169150, params=2_217_082_880,
                        bytes=4 * 2_217_082_880 - 2 * 65536 * 2176)}

# What only later nanochats have, newest first: a part of a tensor's name, how wide that tensor is where the name alone
# does not tell two eras apart, and what their forward does that ours does not.
LATER = (('smear_gate', None, 'of era E4 (from 2026-03-14): the embedding is smeared from the token before, '
                              'a state from half-way is subtracted, q and k are scaled by 1.2'),
         ('ve_gate', 12, 'of era E3 (from 2026-03-09): the rotary base is 100,000, q and k are scaled by 1.15, '
                         'value embeddings are gated by 3 * sigmoid'),
         ('bigram_embed', None, 'of a few days in January 2026 (between E1 and E3): pairs of tokens are embedded, too'),
         ('value_embeds', None, 'of era E2 (from 2026-01-18): gated value embeddings are added to v'),
         ('resid_lambdas', None, 'of era E1 (from 2026-01-11): residual stream and embedding are mixed before '
                                 'each block, some layers see half the context'),
         ('attn.c_attn', None, 'not nanochat but of the GPT-2 family: name it as gpt2:PATH'))


# Hugging Face's NanoChat, which turns q and k by minus theta, too: our names and what they are there
HF_NAMES = {'transformer.wte': 'model.embed_tokens', 'transformer.h.': 'model.layers.',
            'attn.c_q': 'self_attn.q_proj', 'attn.c_k': 'self_attn.k_proj', 'attn.c_v': 'self_attn.v_proj',
            'attn.c_proj': 'self_attn.o_proj', 'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}


def fetch_nanochat(name, folder, host='https://huggingface.co'):
    """
    Downloads the four files of NANOCHAT[name] into folder, resuming partial ones; their sha256 are checked against the
    host's. Returns folder. DownloadError says what went wrong.
    """
    assert name in NANOCHAT, f"fetch ({name}) must be one of {', '.join(NANOCHAT)}"
    repo, step, size = (NANOCHAT[name][key] for key in ('repo', 'step', 'bytes'))
    print(f"{host}/{repo} -> {folder}: about {size / 1e9:.1f} GB", flush=True)
    with hold(folder):
        for file in ('tokenizer.pkl', 'token_bytes.pt', f'meta_{step:06d}.json', f'model_{step:06d}.pt'):
            download(f'{host}/{repo}/resolve/main/{file}', os.path.join(folder, file))
    return folder


def find_nanochat(path):
    """A folder -> the file of its weights, model_XXXXXX.pt, of the last step. ValueError says where to get one."""
    files = os.listdir(path) if os.path.isdir(path) else []
    steps = {int(file[6:-3]): file for file in sorted(files) if re.fullmatch(r'model_\d+\.pt', file)}
    if not steps:
        raise ValueError(f"no nanochat checkpoint (model_XXXXXX.pt) in {path!r}: fetch one with "
                         "python distill.py --fetch=d32 --out_dir=teachers/d32 "
                         f"({NANOCHAT['d32']['bytes'] / 1e9:.1f} GB), try its shape, without data, with "
                         "python bench.py --mode=train config/distill_d12_mqa.py --teacher=random:d32, "
                         "or run config/distill_stdlib_bpe.py, which a laptop can")
    return os.path.join(path, steps[max(steps)])


def load_nanochat(path, device='cpu'):
    """
    A nanochat folder of the d20-d34 era -> GPT with nanochat's own logits, float32, on device, and its tokenizer.
    The folder holds model_XXXXXX.pt (the last step is taken) and meta_XXXXXX.json; tokenizer.pkl and token_bytes.pt are
    there, too, or in ../../tokenizer, where nanochat leaves them. ValueError for anything else.
    """
    file = find_nanochat(path)
    meta = re.sub(r'model_(\d+)\.pt$', lambda m: f'meta_{int(m[1]):06d}.json', file)
    home = path if os.path.exists(os.path.join(path, 'tokenizer.pkl')) else os.path.join(path, '..', '..', 'tokenizer')
    not_whole = f"{file}, {meta} and {home} are not a whole nanochat checkpoint"
    state = load_weights(file)
    with expecting(not_whole):
        state = plain_names(state)
        era = later_era(state)
    if era:
        raise ValueError(f"{file} is {era}; only nanochats until 2026-01-11 (era E0: d20, d32, d34) load here")
    with expecting(not_whole):
        c = json.loads(read_text(meta))['model_config']
        config = GPTConfig(c['sequence_len'], c['vocab_size'], c['n_layer'], c['n_head'], c['n_kv_head'], c['n_embd'],
                           rope_bf16=True)
        tokenizer = load_nanochat_tokenizer(home)
    # nanochat pads the vocabulary's tables, and cuts the logits of the padding off
    config.vocab_size = cut_padding(state, config.vocab_size, tokenizer)
    check_token_bytes(tokenizer, home, config.vocab_size, file)
    return make(GPT, config, state, file, device), tokenizer


def load_hf_nanochat(folder, device='cpu'):
    """
    A folder of Hugging Face's NanoChat, as data/foreign/export.py writes one -> GPT with its logits, float32, in eval
    mode on device, and its tokenizer. ValueError for anything else.
    """
    file, path = hf_file(folder), os.path.join(folder, 'config.json')
    c = read_config(folder)
    with expecting(f"{path} does not say a nanochat's shape"):
        odd = [f'{key}={c[key]}' for key, plain in (('hidden_act', 'relu2'), ('attention_bias', False))
               if c.get(key, plain) != plain]
        rope = c.get('rope_parameters') or {}
        if odd or rope.get('rope_type', 'default') != 'default':
            raise ValueError(f"{', '.join(odd)} {rope}")
        eps = c.get('rms_norm_eps', 1e-6)
        block = {'softcap': float(c.get('final_logit_softcapping', 15.0) or 0), 'tie_weights': c['tie_word_embeddings'],
                 'norm_eps': 0.0 if eps == torch.finfo(torch.float32).eps else eps,
                 'rope_base': float(rope.get('rope_theta', 10000.0))}
        config = config_from(shape_in(c) | block, path)
    stored = read_weights(file)
    with expecting(f"{file} is not a whole checkpoint"):
        state = {}
        for name, tensor in plain_names(stored).items():
            for ours, theirs in HF_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor
        if config.tie_weights:
            state['lm_head.weight'] = state['transformer.wte.weight']
    tokenizer = hf_folder_tokenizer(folder)
    config.vocab_size = cut_padding(state, config.vocab_size, tokenizer)
    return make(GPT, config, state, file, device), tokenizer


def later_era(state):
    """Which later era these tensors belong to, in words; None if they are of era E0."""
    for part, width, what in LATER:
        for name, tensor in state.items():
            if part in name and width in (None, tensor.size(-1)):
                return what


def check_token_bytes(tokenizer, home, vocab_size, file):
    """ValueError unless the tokenizer in home, its token_bytes.pt (if there is one) and the weights belong together."""
    path = os.path.join(home, 'token_bytes.pt')
    sizes = tokenizer.token_bytes
    if os.path.exists(path):
        table = load_tensors(path)
        with expecting(f"{path} is not nanochat's table of bytes a token"):
            sizes = table.tolist()
    fits = len(sizes) == tokenizer.vocab_size == vocab_size
    if fits:
        # nanochat used to measure a token as text, in which half a character is U+FFFD, 3 bytes; later as bytes
        for i, (size, as_bytes) in enumerate(zip(sizes, tokenizer.token_bytes)):
            as_text = len(tokenizer.decode([i]).encode()) if as_bytes else 0
            fits = fits and size in (as_bytes, as_text)
    if not fits:
        raise ValueError(f"the tokenizer in {home} ({tokenizer.vocab_size} tokens), "
                         f"its token_bytes.pt ({len(sizes)}) and {file} ({vocab_size}) do not belong together: "
                         "use those of one training")


def random_teacher(name, device='cpu'):
    """
    'd20', 'd32', 'd34', ... -> a GPT of that nanochat's shape with random weights, to measure speed and memory without
    its files; no tokenizer.
    """
    depth = int(name[1:]) if re.fullmatch(r'd[1-9]\d{0,2}', name) else 1
    assert depth % 2 == 0, (f"teacher random:{name} must be random:d and an even number of layers, "
                            "each 64 channels of the width, in heads of 128: try random:d32")
    with torch.device(device):
        model = GPT(GPTConfig(block_size=2048, vocab_size=65536, n_layer=depth, n_head=depth // 2, n_embd=64 * depth))
        # lm_head would start at zero, and predict all tokens alike
        nn.init.normal_(model.lm_head.weight, std=model.config.n_embd ** -0.5)
    return model.eval(), None
