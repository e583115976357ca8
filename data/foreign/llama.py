"""
A Llama of someone else's making, in: read from Hugging Face's folder or from a GGUF file, and turned into our GPT with
the same logits. (data/foreign/export.py is the way out.)

    from data.foreign.llama import load_gguf, load_llama
    model, tokenizer = load_gguf('SmolLM2-135M-Instruct.Q4_1.gguf')
    model, tokenizer = load_llama('SmolLM2-135M')       # a folder with config.json and model.safetensors

Our block is a Llama's with mlp='swiglu', qk_norm=False, embed_norm=False and softcap=0. What else differs is moved into
the weights (as_ours):
- Norms have gains there and none here. A norm's gains are multiplied into the columns of the matrices that read it; the
  last one's into lm_head, or, where lm_head is the table of the embeddings, into a matrix before it (out_proj).
- A Llama turns the pairs (i, i + head_dim/2) of q and k by the position's angle, and we by minus that. To negate the
  second half of each head mirrors the pairs, and then both turn alike.
- A GGUF file turns neighbours, (2i, 2i + 1), instead: the rows of its q and k are in another order.
"""
import os
from dataclasses import replace

import numpy as np
import torch

from data.checkpoint import config_from, plain_names, without_memory
from data.checks import check_size, check_tensors
from data.foreign.weights import (cut_padding, expecting, hf_file, make, padded_sizes, read_config, read_weights,
                                  shape_in)
from data.foreign_tokenizer import gguf_tokenizer, hf_folder_tokenizer, open_gguf
from model import GPT

# the switches that make our block a Llama's
LLAMA = {'mlp': 'swiglu', 'qk_norm': False, 'embed_norm': False, 'softcap': 0.0}

# how other architectures differ from our block, by the names that config.json and GGUF files have for them
TOO_MUCH = {'qwen2': 'it adds biases to q, k and v', 'qwen3': 'its norms of q and k have gains, and come before RoPE',
            'gemma': 'it has another norm and scales its embeddings', 'phi3': 'it turns only a part of each head',
            'gpt_neox': 'it has LayerNorms and biases', 'gptneox': 'it has LayerNorms and biases',
            'gpt2': 'it has LayerNorms, biases and learned positions', 'mixtral': 'it has experts'}


def refuse(file, odd):
    """ValueError if a model is no plain Llama, with the remedy. odd: the differences, in words."""
    if odd:
        raise ValueError(f"{file} is not our block, a plain Llama's: {'; '.join(odd)}. As a teacher it need not be: "
                         "python train.py --teacher=hf:FOLDER takes what transformers loads")


def other_architecture(name):
    """The architecture of a model that is no Llama, in words."""
    name = str(name)
    why = f", {TOO_MUCH[name]}" if name in TOO_MUCH else ''
    return f"its architecture is {name:.40}{why}"

# -----------------------------------------------------------------------------
# Hugging Face's folder

def what_is_odd(c):
    """A config.json as a dict -> how the model differs from a plain Llama, a list of words; empty if it is one."""
    if c['model_type'] not in ('llama', 'mistral'):
        return [other_architecture(c['model_type'])]
    odd = []
    for key, plain in (('hidden_act', 'silu'), ('attention_bias', False), ('mlp_bias', False),
                       ('partial_rotary_factor', 1.0), ('quantization_config', None)):
        if c.get(key, plain) not in (plain, None):
            odd.append(f"{key} is {str(c[key]):.60}")
    window = c.get('sliding_window', 4096 if c['model_type'] == 'mistral' else None)
    if window is not None and window < c.get('max_position_embeddings', 0):
        odd.append(f"it sees a window of {window} tokens (sliding_window)")
    for key in ('rope_scaling', 'rope_parameters'):
        rope = c.get(key) or {}
        kind = rope.get('rope_type', rope.get('type', 'default')) if isinstance(rope, dict) else rope
        if kind != 'default':
            odd.append(f"its positions are scaled ({key}: {str(kind):.40})")
    return odd


def shape_of(c, path):
    """The config.json of a plain Llama as a dict -> GPTConfig."""
    with expecting(f"{path} does not say a Llama's shape"):
        rope = {'rope_theta': c.get('rope_theta', 10000.0)} | (c.get('rope_parameters') or {})
        shape = {'n_kv_head': c['num_attention_heads'], 'tie_weights': c.get('tie_word_embeddings', False),
                 'norm_eps': float(c.get('rms_norm_eps', 1e-6)), 'rope_base': float(rope['rope_theta'])}
        return llama_config(shape | shape_in(c), path)


def llama_config(shape, path):
    """The settings in which Llamas differ from each other, as a dict -> GPTConfig."""
    assert shape['rope_base'] > 0, f"the base of its positions is {shape['rope_base']}"
    return config_from(shape | LLAMA, path)


def load_llama(folder, device='cpu'):
    """
    A Hugging Face folder of a plain Llama: config.json, the weights in float32, float16 or bfloat16 (model.safetensors
    or pytorch_model.bin, or several of them and an index) and tokenizer.json -> GPT with its logits, float32, in eval
    mode on device, and its tokenizer. ValueError for anything else.
    """
    c, path = read_config(folder), os.path.join(folder, 'config.json')
    refuse(folder, what_is_odd(c))
    file = hf_file(folder)
    config = shape_of(c, path)
    stored = read_weights(file)
    with expecting(f"{file} is not a whole checkpoint"):
        # old files also hold the frequencies of the rotary positions, which we compute
        weights = {name: t for name, t in plain_names(stored).items() if not name.endswith('rotary_emb.inv_freq')}
    table, head = weights.get('model.embed_tokens.weight'), weights.get('lm_head.weight')
    if config.tie_weights and head is not None:
        if not torch.is_tensor(table) or not torch.is_tensor(head) or not torch.equal(table, head):
            raise ValueError(f"{path} says that lm_head is the table of the embeddings, and {file} has another: "
                             "use another copy")
        del weights['lm_head.weight']
    return build(weights, config, hf_folder_tokenizer(folder), file, device)

# -----------------------------------------------------------------------------
# a GGUF file, the format of llama.cpp

GGUF_NAMES = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
GGUF_LAYER = {'attn_norm': 'input_layernorm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj',
              'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj', 'ffn_norm': 'post_attention_layernorm',
              'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
GGUF_SHAPE = {'context_length': 'block_size', 'block_count': 'n_layer', 'embedding_length': 'n_embd',
              'feed_forward_length': 'n_hidden', 'attention.head_count': 'n_head',
              'attention.head_count_kv': 'n_kv_head', 'attention.key_length': 'head_dim',
              'attention.layer_norm_rms_epsilon': 'norm_eps', 'rope.freq_base': 'rope_base'}
# known settings besides: two widths of a head that must be head_dim, and one that follows from the tensors
GGUF_MORE = {'attention.value_length', 'rope.dimension_count', 'vocab_size'}
GGUF_DATASET = 'picochat.dataset'       # a setting of our own, which other programs ignore


def find_gguf(path):
    """The path itself. ValueError if there is no GGUF file."""
    if not os.path.isfile(path):
        raise ValueError(f"no GGUF file at {path}: name the file itself, like gguf:models/SmolLM2-135M.Q8_0.gguf")
    with open(path, 'rb') as f:
        magic = f.read(4)
    if magic != b'GGUF':
        raise ValueError(f"{path} is no GGUF file: it begins with {magic!r}: use another copy")
    return path


def gguf_dataset(path):
    """The dataset that the model in a GGUF of ours was trained on; '' if the file does not say."""
    field = open_gguf(find_gguf(path)).fields.get(GGUF_DATASET)
    return field.contents() if field else ''


def load_gguf(path, device='cpu'):
    """
    A GGUF file of a plain Llama -> GPT with the logits of its dequantised weights, float32, in eval mode on device, and
    its tokenizer. ValueError for anything else.
    """
    reader = open_gguf(find_gguf(path))
    with expecting(f"{path} is not a whole GGUF file"):
        said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith('tokenizer.')}
        architecture = said['general.architecture']
        rows = {t.name: int(t.shape[-1]) for t in reader.tensors}       # shapes are written from right to left there
    if architecture != 'llama':
        refuse(path, [other_architecture(architecture)])
    config, odd = gguf_shape({key[6:]: value for key, value in said.items() if key.startswith('llama.')}, rows, path)
    refuse(path, odd)
    tokenizer = gguf_tokenizer(reader, path)
    weights = {}
    for tensor in reader.tensors:
        weights[hf_name(tensor.name)] = dequantised(tensor, config, path)
    say_what_was_lost(reader.tensors, path)
    return build(weights, config, tokenizer, path, device)


def gguf_shape(said, rows, path):
    """
    A file's llama.* settings, and how many rows each of its tensors has -> GPTConfig, and how it differs from a plain
    Llama, a list of words.
    """
    odd = [f"{key} is {str(said[key]):.40}" for key in said if key not in {*GGUF_SHAPE, *GGUF_MORE}
           and not (key == 'rope.scaling.type' and said[key] == 'none')]
    odd += [f"it has {name}" for name in rows if hf_name(name) is None][:3]
    with expecting(f"{path} does not say a Llama's shape"):
        n_head = said['attention.head_count']
        shape = {'n_kv_head': n_head, 'head_dim': said['embedding_length'] // n_head, 'rope_base': 10000.0}
        shape |= {ours: said[theirs] for theirs, ours in GGUF_SHAPE.items() if theirs in said}
        # floats have 32 bits there: 9.999999747378752e-06 means 1e-5
        shape |= {key: float(str(np.float32(shape[key]))) for key in ('norm_eps', 'rope_base')}
        shape |= {'tie_weights': 'output.weight' not in rows, 'vocab_size': rows['token_embd.weight']}
        for key in ('attention.value_length', 'rope.dimension_count'):
            if said.get(key, shape['head_dim']) != shape['head_dim']:
                odd.append(f"{key} is {said[key]}, and a head has {shape['head_dim']}")
        return llama_config(shape, path), odd


def hf_name(name):
    """'blk.0.attn_q.weight' -> 'model.layers.0.self_attn.q_proj.weight'; None: no plain Llama has that tensor."""
    *place, what, kind = ('',) + tuple(name.split('.'))
    layer = place[1:]
    if kind == 'weight' and not layer and what in GGUF_NAMES:
        return f'{GGUF_NAMES[what]}.weight'
    if kind == 'weight' and layer[:1] == ['blk'] and len(layer) == 2 and what in GGUF_LAYER:
        return f'model.layers.{layer[1]}.{GGUF_LAYER[what]}.weight'
    return None


def dequantised(tensor, config, path):
    """A tensor of a GGUF file -> the numbers that it stands for, float32; rows of q and k in Hugging Face's order."""
    from gguf.quants import dequantize
    with expecting(f"{path} holds {tensor.name} as {tensor.tensor_type.name}, which cannot be read"):
        x = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for part, heads in (('attn_q.', config.n_head), ('attn_k.', config.n_kv_head)):
            if part in tensor.name:
                x = in_halves(x, heads)
    return x


def in_halves(rows, heads):
    """The rows (heads * head_dim, n) of a GGUF's q or k: 2i + j of a head goes to j * head_dim/2 + i."""
    return rows.view(heads, -1, 2, rows.size(-1)).transpose(1, 2).reshape(rows.shape)


def interleaved(rows, heads):
    """The inverse of in_halves."""
    return rows.view(heads, 2, -1, rows.size(-1)).transpose(1, 2).reshape(rows.shape)


def say_what_was_lost(tensors, path):
    """Prints a note if the file's matrices were rounded: what was lost then is not counted here."""
    kinds = sorted({t.tensor_type.name for t in tensors if len(t.shape) > 1} - {'F32', 'F16', 'BF16'})
    if kinds:
        print(f"note: the weights in {path} were rounded before ({', '.join(kinds)}); as they are there, they are the "
              "float model here", flush=True)

# -----------------------------------------------------------------------------
# either of them, as ours

# a matrix of our block -> its name in Hugging Face's, and the norm there whose gains multiply what it reads
LAYER = {'attn.c_q': ('self_attn.q_proj', 'input_layernorm'), 'attn.c_k': ('self_attn.k_proj', 'input_layernorm'),
         'attn.c_v': ('self_attn.v_proj', 'input_layernorm'), 'attn.c_proj': ('self_attn.o_proj', None),
         'mlp.c_gate': ('mlp.gate_proj', 'post_attention_layernorm'),
         'mlp.c_fc': ('mlp.up_proj', 'post_attention_layernorm'), 'mlp.c_proj': ('mlp.down_proj', None)}
MIRRORED = ('attn.c_q', 'attn.c_k')     # our model turns q and k by minus the angle


def llama_shapes(c):
    """GPTConfig -> {name of a LlamaForCausalLM's tensor: a meta tensor of its shape}."""
    own = without_memory(GPT, replace(c, n_layer=1)).state_dict()
    gains = torch.empty(c.n_embd, device='meta')
    tensors = {'model.embed_tokens': own['transformer.wte.weight'], 'model.norm': gains}
    if not c.tie_weights:
        tensors['lm_head'] = own['lm_head.weight']
    for i in range(c.n_layer):
        for name, (theirs, norm) in LAYER.items():
            tensors[f'model.layers.{i}.{theirs}'] = own[f'transformer.h.0.{name}.weight']
            if norm:
                tensors[f'model.layers.{i}.{norm}'] = gains
    return {f'{name}.weight': tensor for name, tensor in tensors.items()}


def build(weights, config, tokenizer, path, device):
    """A Llama's tensors by Hugging Face's names, its shape, its tokenizer -> our GPT and the tokenizer. ValueError."""
    with expecting(f"{path} does not hold a Llama's tensors"):
        check_size(config, {name.replace('model.layers.', 'transformer.h.'): t for name, t in weights.items()}, path)
    check_tensors(llama_shapes(config), weights, path)
    state = as_ours(weights, config)
    if tokenizer is not None:
        if config.vocab_size not in padded_sizes(tokenizer.vocab_size):
            raise ValueError(f"{path} has {config.vocab_size:,} tokens and its tokenizer {tokenizer.vocab_size:,}: "
                             "they do not belong together, use those of one model")
        config.vocab_size = cut_padding(state, config.vocab_size, tokenizer)
    return make(GPT, config, state, path, device), tokenizer


def as_ours(weights, config):
    """
    The tensors of a LlamaForCausalLM, {name: tensor}, a dict that is emptied -> the state dict of the GPT with the same
    logits. config, its GPTConfig, gets out_proj=True if that is needed.
    """
    def take(name):
        return weights.pop(f'{name}.weight').float()

    table, last = take('model.embed_tokens'), take('model.norm')
    state = {'transformer.wte.weight': table}
    if not config.tie_weights:
        state['lm_head.weight'] = take('lm_head') * last
    else:
        state['lm_head.weight'] = table
        config.out_proj = not torch.equal(last, torch.ones_like(last))
        if config.out_proj:
            state['transformer.c_out.weight'] = torch.diag(last - 1)
    for i in range(config.n_layer):
        at, to = f'model.layers.{i}', f'transformer.h.{i}'
        gains = {norm: take(f'{at}.{norm}') for norm in ('input_layernorm', 'post_attention_layernorm')}
        for name, (theirs, norm) in LAYER.items():
            w = take(f'{at}.{theirs}')
            if name in MIRRORED:
                w = mirrored(w, config.head_dim)
            state[f'{to}.{name}.weight'] = w * gains[norm] if norm else w
    return state


def mirrored(rows, head_dim):
    """(heads * head_dim, n) -> the same with the second half of each head's rows negated."""
    signs = torch.ones(head_dim)
    signs[head_dim // 2:] = -1
    return rows * signs.repeat(len(rows) // head_dim)[:, None]
