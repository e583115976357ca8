"""
Other people's files of weights: reads and checks them, and makes a model of them. A library of the files beside it. No
code in a pickle is ever run.
"""
import contextlib
import json
import os

import torch

from data.checkpoint import load_tensors, with_weights, without_memory
from data.checks import check_size, check_tensors, tensors_in
from data.files import read_text
from model import GPT

def load_weights(file):
    """A state dict of torch.save -> {name: tensor}."""
    if os.path.getsize(file) > 2**30:
        print(f'reading {file}, {os.path.getsize(file) / 1e9:.1f} GB', flush=True)
    return load_tensors(file)


@contextlib.contextmanager
def expecting(what, remedy='use another copy'):
    """Turns any error inside the block into a ValueError: files of others may hold anything."""
    try:
        yield
    except (Exception, SystemExit) as e:        # a user's own .py may even end the program
        found = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise ValueError(f"{what} ({found}): {remedy}") from e


def make(kind, config, state, path, device, tied=False):
    """
    kind(config) with the tensors of state, which must be exactly those it needs, as float32 on device and in eval mode.
    tied: for other kinds than GPT, lm_head is the embedding's table. path: the file, for the message of a ValueError.
    """
    with expecting(f"{path} does not have the tensors of its own settings"):
        if config.n_layer > len(state):         # even without memory, a million layers take long to create
            raise ValueError(f"{config.n_layer:,} layers of {len(state):,} tensors")
        if kind is GPT:
            check_size(config, dict(tensors_in(state)), path)
        model = without_memory(kind, config)    # so the weights are in memory only once
    check_tensors(model.state_dict(), state, path)
    weights = {name: state.pop(name).to(device, torch.float32).contiguous() for name in [*state]}
    if kind is GPT:
        return with_weights(config, weights, device)
    model.load_state_dict(weights, assign=True)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval()

# -----------------------------------------------------------------------------
# Hugging Face's folders

# ours -> what config.json calls it
HF_SHAPE = {'block_size': 'max_position_embeddings', 'vocab_size': 'vocab_size', 'n_layer': 'num_hidden_layers',
            'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size',
            'head_dim': 'head_dim', 'n_hidden': 'intermediate_size'}
HF_FILES = ['model.safetensors', 'pytorch_model.bin']
HF_FILES += [f'{name}.index.json' for name in HF_FILES]     # a large model's, which say in which file each tensor is


def hf_file(folder):
    """The file of the weights, or their index, in a folder of Hugging Face's. ValueError if there is none."""
    for name in HF_FILES:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise ValueError(f"no weights in {folder} ({', '.join(HF_FILES)} are not there): name a folder that has them, as a "
                     "model's page on Hugging Face lists them, with its config.json and tokenizer.json")


def read_config(folder):
    """The config.json in a folder -> dict. ValueError if there is none, or it is something else."""
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        raise ValueError(f"no model of Hugging Face's at {folder} ({path} is not there): name a folder with its "
                         "config.json, model.safetensors and tokenizer.json")
    with expecting(f"{path} does not describe a model"):
        c = json.loads(read_text(path))
        if not isinstance(c.get('model_type'), str):
            raise ValueError("it has no model_type")
    return c


def shape_in(c):
    """A config.json as a dict -> what it says of the shape, in our names. KeyError if something is missing."""
    may_lack = ('num_key_value_heads', 'head_dim')
    return {ours: c[theirs] for ours, theirs in HF_SHAPE.items() if theirs not in may_lack or c.get(theirs) is not None}


def read_weights(file):
    """The file that hf_file found -> {name: tensor}."""
    return read_shards(file) if file.endswith('.json') else read_hf(file)


def read_hf(file):
    """A .bin of torch.save or a .safetensors -> {name: tensor}."""
    if file.endswith('.bin'):
        return load_weights(file)
    import safetensors.torch
    with expecting(f"{file} is not a whole file of safetensors"):
        # Copies: what it gives are windows into the file, and who overwrote that would change the model as it runs.
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}


def names_in(file):
    """What hf_file found -> the names of its tensors, which a .safetensors says without being read."""
    if file.endswith('.json'):
        with expecting(f"{file} does not say which tensor is in which file"):
            return list(json.loads(read_text(file))['weight_map'])
    if file.endswith('.bin'):
        return list(load_weights(file))
    import safetensors
    with expecting(f"{file} is not a whole file of safetensors"), safetensors.safe_open(file, 'pt') as f:
        return list(f.keys())


def read_shards(index):
    """An index.json, which names the file beside it that each tensor is in -> {name: tensor} of them all."""
    with expecting(f"{index} does not say which tensor is in which file"):
        where = json.loads(read_text(index))['weight_map']
        files = sorted(set(where.values()))
        if any(name != os.path.basename(name) for name in files):
            raise ValueError("it names files elsewhere")
    state = {}
    for name in files:
        path = os.path.join(os.path.dirname(index), name)
        if not os.path.isfile(path):
            raise ValueError(f"{path} is not there, one of the {len(files)} files that {index} names: "
                             "copy or download it as well")
        shard = read_hf(path)
        lost = [tensor for tensor, at in where.items() if at == name and tensor not in shard]
        if lost:
            raise ValueError(f"{path} does not hold {lost[0]}, as {index} says: use another copy")
        state |= shard
    return state

# -----------------------------------------------------------------------------
# rows of a vocabulary that stand for no token

def padded(n):
    """Tables of a vocabulary of n are often given as many rows as the next multiple of 64: that is faster."""
    return -(-n // 64) * 64


def padded_sizes(n):
    """How many rows a table of n tokens may have: n, or the next multiple of something."""
    return {n} | {-(-n // multiple) * multiple for multiple in (8, 64, 128, 256, 512)}


def cut_padding(state, vocab_size, tokenizer=None):
    """
    Takes the rows that stand for no token out of a state dict's tables. vocab_size: what the model's settings say,
    which may count the padding; the tokenizer, if there is one, knows. -> the true vocab_size.
    """
    if tokenizer is not None and vocab_size in padded_sizes(tokenizer.vocab_size):
        vocab_size = tokenizer.vocab_size
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        table = state.get(name)
        if torch.is_tensor(table) and table.ndim and len(table) in padded_sizes(vocab_size):
            state[name] = table[:vocab_size]
    return vocab_size


def drop_padding(model, vocab_size):
    """The same for a model that is loaded, in place, when only the data know how many tokens there are."""
    if hasattr(model, 'transformer'):           # others cut their logits
        for table in {model.transformer.wte.weight, model.lm_head.weight}:
            table.data = table.data[:vocab_size]
    model.config.vocab_size = vocab_size
