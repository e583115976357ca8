"""
Teachers with other blocks than ours: any causal language model that transformers loads, or a user's own Python file.

    from data.foreign.causal_lm import load_causal_lm, load_py
    model, tokenizer = load_causal_lm('models/Qwen3-0.6B', 'cpu')   # a folder of Hugging Face's
    model, tokenizer = load_py('my_teacher.py', 'cpu')              # a file with load(device)

They can teach and write labels; to be quantised, pruned or sampled from, a model must be our block.
"""
import importlib.util
import os
from types import SimpleNamespace

import torch
import torch.nn as nn

from data.checks import check_finite
from data.foreign.weights import expecting, hf_file, names_in, padded_sizes, read_config
from data.foreign_tokenizer import hf_folder_tokenizer


class InTwo(nn.Module):
    """A model of transformers that, like ours, consists of a trunk and an lm_head on its states."""
    def __init__(self, model, vocab_size, block_size):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        self.model = model

    def trunk(self, idx):
        """idx (B, T) int64 -> states (B, T, n_embd)."""
        return self.model.base_model(idx, use_cache=False).last_hidden_state

    def logits(self, x):
        """States (..., n_embd) -> logits (..., vocab_size) in float32."""
        return self.model.get_output_embeddings()(x)[..., :self.config.vocab_size].float()

    def flops_per_token(self, training=True):
        return flops_of(self.model, self.config.block_size, training)


class InOne(nn.Module):
    """
    A model of which we know only that run(idx (B, T)) gives logits (B, T, at least vocab_size). In the place of a
    token's state it has the ids of the token's whole row and the token's place in it. logits() then runs the rows that
    it needs, so that there are never more logits in memory than those of a few rows.
    It is not compiled, and runs in the dtype it has: autocast is off.
    """
    def __init__(self, run, model, vocab_size, block_size):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        self.run, self.model = run, model
        self.latest = None, None                # the last row and its logits, which the next call often needs again

    @torch.compiler.disable
    def trunk(self, idx):
        """idx (B, T) int64 -> (B, T, T + 1): for each token the ids of its row, and its place."""
        B, T = idx.shape
        place = torch.arange(T, device=idx.device).expand(B, T)
        return torch.cat((idx[:, None].expand(B, T, T), place[..., None]), dim=-1)

    @torch.compiler.disable
    @torch.no_grad()
    def logits(self, states):
        """(..., T + 1) of trunk -> logits (..., vocab_size) in float32."""
        flat = states.flatten(0, -2)            # (N, T + 1)
        rows, which = flat[:, :-1].unique_consecutive(dim=0, return_inverse=True)
        row, found = self.latest
        known = row is not None and torch.equal(row, rows[0])
        parts = [found] if known else []
        if len(rows) > known:
            with torch.autocast(rows.device.type, enabled=False):
                parts.append(self.run(rows[known:])[..., :self.config.vocab_size].float())
        found = torch.cat(parts)                # (rows, T, vocab_size)
        self.latest = rows[-1], found[-1:].clone()
        return found[which, flat[:, -1]].unflatten(0, states.shape[:-1])

    def flops_per_token(self, training=True):
        return flops_of(self.model, self.config.block_size, training)


def number_in(c, names, usual):
    """The first of these settings of a model that is an int; usual if none is."""
    return next((getattr(c, name) for name in names if isinstance(getattr(c, name, None), int)), usual)


def flops_of(model, block_size, training):
    """
    FLOPs of a token: 2 for each weight of a matrix that is multiplied, and those of attention if the model's config
    tells how many layers it has and how wide they are.
    """
    if not isinstance(model, nn.Module):
        return 0
    c = getattr(model, 'config', None)
    layers, width = number_in(c, ('num_hidden_layers', 'n_layer'), 0), number_in(c, ('hidden_size', 'n_embd'), 0)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    weights = sum(p.numel() for p in model.parameters() if p not in tables or p in heads)
    return (3 if training else 1) * (2 * weights + 4 * layers * width * block_size)


@torch.no_grad()
def check_teaches(model, device):
    """ValueError unless the logits have the right shape, are finite, and do not depend on later tokens."""
    V = model.config.vocab_size
    idx = torch.arange(8, device=device)[None] % V
    other = idx.clone()
    other[0, -1] = (other[0, -1] + 1) % V
    logits, changed = (model.logits(model.trunk(x)) for x in (idx, other))
    if logits.shape != (1, 8, V) or not logits.isfinite().all():
        raise ValueError(f"it gave {tuple(logits.shape)} logits for 8 tokens of a vocabulary of {V:,}, "
                         f"{(~logits.isfinite()).sum().item():,} of them no finite numbers")
    if (logits - changed)[0, :-1].abs().max() > 1e-3 * logits.abs().max():
        raise ValueError("it looks ahead: its logits change with a token that comes later")

# -----------------------------------------------------------------------------
# transformers

# names that configurations have for the context; without any of them there is no limit
CONTEXT = ('max_position_embeddings', 'n_positions', 'n_ctx', 'max_seq_len', 'max_sequence_length', 'seq_length')


def load_causal_lm(folder, device='cpu'):
    """
    A Hugging Face folder of any causal language model that transformers knows -> a teacher with its logits, float32, in
    eval mode on device, and its tokenizer, or None where there is none. No code in the folder is run. ValueError.
    """
    import transformers
    transformers.utils.logging.disable_progress_bar()
    file, c = hf_file(folder), read_config(folder)
    layers, held = c.get('num_hidden_layers', c.get('n_layer', 0)), len(names_in(file))
    if not isinstance(layers, int) or layers > held:
        raise ValueError(f"{folder} says that it has {layers!r:.20} layers, and {file} has {held:,} tensors: "
                         "use another copy")
    with expecting(f"transformers does not load {folder} as a causal language model"):
        model, about = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True)
        if about['missing_keys']:
            raise ValueError(f"{sorted(about['missing_keys'])[0]} and maybe others are missing")
    # copies, since transformers maps the file: overwriting it would change a running model
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    check_finite(model.state_dict(), file)
    model = model.to(device).eval()
    c = model.config.get_text_config()
    block_size, tokenizer = number_in(c, CONTEXT, 2**20), hf_folder_tokenizer(folder)
    n = c.vocab_size
    if tokenizer is not None:
        if n not in padded_sizes(tokenizer.vocab_size):
            raise ValueError(f"{folder} has a model of {n:,} tokens and a tokenizer of {tokenizer.vocab_size:,}: they "
                             "do not belong together, use those of one model")
        n = tokenizer.vocab_size
    whole = InOne(lambda idx: model(idx, use_cache=False).logits, model, n, block_size)
    with expecting(f"{folder} cannot teach", 'take a causal language model'):
        check_teaches(whole, device)
    parts = InTwo(model, n, block_size)
    return parts if is_in_two(parts, whole, device) else whole, tokenizer


@torch.no_grad()
def is_in_two(parts, whole, device):
    """Whether logits are just lm_head of the trunk's states: some models scale or cap them."""
    if parts.model.get_output_embeddings() is None or parts.model.base_model is parts.model:
        return False
    idx = torch.arange(8, device=device)[None] % parts.config.vocab_size
    return torch.equal(parts.logits(parts.trunk(idx)), whole.logits(whole.trunk(idx)))

# -----------------------------------------------------------------------------
# a user's own file

def load_py(path, device='cpu'):
    """
    A Python file with load(device) -> (model, tokenizer or None), where model(idx (B, T) int64) gives logits (B, T,
    vocab_size), and model.config.vocab_size and model.config.block_size say of which and how many tokens. The file is
    the user's own code, and is run. -> a teacher, and the tokenizer. ValueError.
    """
    see = 'PICOCHAT_TRACE=1 shows where'

    print(f"note: {path} is run, as code of your own: never name a file here that you have not read", flush=True)
    with expecting(f"{path} could not be run", see):
        spec = importlib.util.spec_from_file_location('teacher', path)
        file = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(file)
    if not callable(getattr(file, 'load', None)):
        raise ValueError(f"{path} has no function load(device): it must return a model and its tokenizer, or None")
    with expecting(f"load({device!r}) of {path} failed", see):
        made = file.load(device)
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(f"load(device) of {path} must return (model, tokenizer or None), not a {type(made).__name__}")
    model, tokenizer = made
    c = getattr(model, 'config', None)
    sizes = [getattr(c, name, None) for name in ('vocab_size', 'block_size')]
    if not callable(model) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"the model of {path} must be callable and have config.vocab_size and config.block_size, "
                         f"whole numbers, not {sizes}")
    if isinstance(model, nn.Module):
        model.eval().requires_grad_(False)
    if tokenizer is not None and not hasattr(tokenizer, 'meta'):
        raise ValueError(f"the tokenizer of {path} must be one of ours, as load_tokenizer(PATH) of "
                         f"data/foreign_tokenizer.py gives, or None, not a {type(tokenizer).__name__}")
    teacher = InOne(lambda idx: model(idx), model, *sizes)
    with expecting(f"the model of {path} cannot teach", see):
        check_teaches(teacher, device)
    return teacher, tokenizer


def find_py(path):
    """The path itself. ValueError if there is no such file, or it is no .py."""
    if not os.path.isfile(path) or not path.endswith('.py'):
        raise ValueError(f"no Python file at {path}: py: takes one, like py:mine.py, with a function load(device)")
    return path
