"""
Other people's models: read as teachers, and ours written the way others read them. Nobody's pickle runs anything here.

    from data.foreign import KINDS
    model, tokenizer = KINDS['nanochat']('teachers/d32', 'cpu')     # a folder of nanochat, of its d20 to d34
    model, tokenizer = KINDS['gpt2']('ckpt.pt', 'cpu')              # nanoGPT's file, or Hugging Face's gpt2 folder
    model, tokenizer = KINDS['random']('d32', 'cpu')                # that nanochat's shape, to measure with

Whoever made it, a model offers what a teacher needs: config.vocab_size, config.block_size, trunk(idx) -> states,
logits(states) -> float32, flops_per_token(). tokenizer is None where none lies beside the model. A file that is
missing, damaged, hostile or of another kind is a ValueError that names it.

To add a kind, write a function (path, device) -> (model, tokenizer or None), and name it in KINDS at the end. If it
reads files, name in FILES a function that finds them.
"""
import contextlib
import json
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoint import check_tensors, load_tensors, plain_names
from data.files import atomic_write, download, hold, read_text
from data.foreign_tokenizer import hf_tokenizer, load_gpt2_tokenizer, load_nanochat_tokenizer
from model import GPT, GPTConfig, rope_tables


def load_weights(file):
    """A state dict of torch.save -> {name: tensor}, mapped from the disk: they take no memory until they are used."""
    if os.path.getsize(file) > 2**30:
        print(f'reading {file}, {os.path.getsize(file) / 1e9:.1f} GB', flush=True)
    return load_tensors(file, mmap=True)


@contextlib.contextmanager
def expecting(what):
    """Files of others may hold anything: whatever goes wrong inside means that they are not what was expected."""
    try:
        yield
    except Exception as e:
        found = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise ValueError(f"{what} ({found}): use another copy") from e


def make(kind, config, state, path, device):
    """kind(config) with the tensors of state, which must be exactly its own, as float32 on device and in eval mode."""
    # a model without weights: so they are in memory only once
    with expecting(f"{path} does not have the tensors of its own settings"), torch.device('meta'):
        model = kind(config)
    check_tensors(model.state_dict(), state, path)
    weights = {name: tensor.to(device, torch.float32).contiguous() for name, tensor in state.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def padded(n):
    """Tables of a vocabulary of n are often given as many rows as the next multiple of 64: that is faster."""
    return -(-n // 64) * 64


def cut_padding(state, vocab_size, tokenizer=None):
    """
    Takes the rows that stand for no token out of a state dict's tables. vocab_size: what the model's settings say,
    which may count the padding; the tokenizer, if there is one, knows. -> the true vocab_size.
    """
    if tokenizer is not None and vocab_size == padded(tokenizer.vocab_size):
        vocab_size = tokenizer.vocab_size
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        if torch.is_tensor(state.get(name)) and state[name].ndim and len(state[name]) == padded(vocab_size):
            state[name] = state[name][:vocab_size]
    return vocab_size


def drop_padding(model, vocab_size):
    """The same for a model that is loaded, in place, when only the data know how many tokens there are."""
    for table in {model.transformer.wte.weight, model.lm_head.weight}:
        table.data = table.data[:vocab_size]
    model.config.vocab_size = vocab_size

# -----------------------------------------------------------------------------
# nanochat, of its first era (E0, 2025-10-13 to 2026-01-11): picochat's own block

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


def fetch_nanochat(name, folder, host='https://huggingface.co'):
    """
    Downloads the four files of NANOCHAT[name] into folder, going on from what is there, checked by the sha256 that
    their host tells; returns folder. DownloadError says what went wrong.
    """
    assert name in NANOCHAT, f"fetch ({name}) must be one of {', '.join(NANOCHAT)}"
    repo, step, size = (NANOCHAT[name][key] for key in ('repo', 'step', 'bytes'))
    print(f"{host}/{repo} -> {folder}: about {size / 1e9:.1f} GB", flush=True)
    with hold(folder):
        for file in ('tokenizer.pkl', 'token_bytes.pt', f'meta_{step:06d}.json', f'model_{step:06d}.pt'):
            download(f'{host}/{repo}/resolve/main/{file}', os.path.join(folder, file))
    return folder


def find_nanochat(path, step=None):
    """
    A folder -> the file of its weights, model_XXXXXX.pt: of the last step, or of this one. ValueError says where to get
    one.
    """
    files = os.listdir(path) if os.path.isdir(path) else []
    steps = {int(file[6:-3]): file for file in sorted(files) if re.fullmatch(r'model_\d+\.pt', file)}
    if not steps:
        raise ValueError(f"no nanochat checkpoint (model_XXXXXX.pt) in {path!r}: fetch one with "
                         "python distill.py --fetch=d32 --out_dir=teachers/d32 "
                         f"({NANOCHAT['d32']['bytes'] / 1e9:.1f} GB), try its shape, without data, with "
                         "python bench.py --mode=train config/distill_d12_mqa.py --teacher=random:d32, "
                         "or run config/distill_stdlib_bpe.py, which a laptop can")
    step = max(steps) if step is None else step
    if step not in steps:
        raise ValueError(f"{path} has no step {step}: take one of {', '.join(map(str, steps))}")
    return os.path.join(path, steps[step])


def load_nanochat(path, device='cpu', step=None):
    """
    A nanochat folder of the d20-d34 era -> GPT with nanochat's own logits, float32, on device, and its tokenizer.
    The folder holds model_XXXXXX.pt (the last step, or this one) and meta_XXXXXX.json; tokenizer.pkl and token_bytes.pt
    lie there, too, or in ../../tokenizer, as nanochat leaves them. ValueError for anything else.
    """
    file = find_nanochat(path, step)
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
    model = make(GPT, config, state, file, device)
    model.cos, model.sin = (table.to(device) for table in rope_tables(config))     # they were made without memory, too
    return model, tokenizer


def later_era(state):
    """What these tensors are of instead of era E0, in words; None if they are of E0."""
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
        # lm_head starts at zero, and would predict every token alike
        nn.init.normal_(model.lm_head.weight, std=model.config.n_embd ** -0.5)
    return model.eval(), None

# -----------------------------------------------------------------------------
# GPT-2 and nanoGPT

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
    """GPT-2 (Radford et al. 2019) as a teacher: LayerNorm, learned positions, GELU, names as everywhere."""
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
        """As GPT's, for which see there."""
        c, t = self.config, self.transformer
        weights = sum(p.numel() for part in (t.h, t.ln_f) for p in part.parameters()) + c.vocab_size * c.n_embd
        return (3 if training else 1) * (2 * weights + 4 * c.n_layer * c.n_embd * c.block_size)


# what GPT2 can do; GELU: Hugging Face's names -> PyTorch's
GELU = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}
PLAIN = {'model_type': ['gpt2'], 'activation_function': GELU, 'scale_attn_weights': [True],
         'scale_attn_by_inverse_layer_idx': [False]}
HF_FILES = ['model.safetensors', 'pytorch_model.bin']
HF_FILES += [f'{name}.index.json' for name in HF_FILES]     # a large model's, which say in which file each tensor is


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
    lies beside it (load_gpt2_tokenizer), or None. ValueError for anything else.
    """
    file = find_gpt2(path)
    read = read_hf_gpt2 if os.path.basename(file) in HF_FILES else read_nanogpt
    shape, state = read(file)
    with expecting(f"{file} and what lies beside it are not a whole checkpoint of GPT-2 or nanoGPT"):
        # old checkpoints hold their causal masks
        state = {name: t for name, t in state.items() if not name.endswith(('.attn.bias', '.attn.masked_bias'))}
        tokenizer = load_gpt2_tokenizer(os.path.dirname(file))
        shape['vocab_size'] = cut_padding(state, shape['vocab_size'], tokenizer)
        wte = state['transformer.wte.weight']
        tied = 'lm_head.weight' not in state or torch.equal(state['lm_head.weight'], wte)
        state.setdefault('lm_head.weight', wte)
        config = GPT2Config(**shape, bias='transformer.ln_f.bias' in state)
    model = make(GPT2, config, state, file, device)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model, tokenizer


def read_nanogpt(file):
    """
    nanoGPT's ckpt.pt -> the shape as a dict (GPT2Config's names), and the state dict. Its GELU is the exact one; until
    May 2023 it was the tanh, and a checkpoint does not say when it was made.
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
    stored = read_shards(file) if file.endswith('.json') else read_hf(file)
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


def read_hf(file):
    """A .bin of torch.save or a .safetensors -> {name: tensor}."""
    if file.endswith('.bin'):
        return load_weights(file)
    import safetensors.torch
    with expecting(f"{file} is not a whole file of safetensors"):
        return safetensors.torch.load_file(file)


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


def refuse_odd(file, odd):
    if odd:
        raise ValueError(f"{file} is not a plain GPT-2 ({', '.join(odd)}): it would need another forward")

# -----------------------------------------------------------------------------
# the other way: ours as Hugging Face's NanoChat, which turns q and k by minus theta, too

HF_NAMES = {'transformer.wte': 'model.embed_tokens', 'transformer.h.': 'model.layers.',
            'attn.c_q': 'self_attn.q_proj', 'attn.c_k': 'self_attn.k_proj', 'attn.c_v': 'self_attn.v_proj',
            'attn.c_proj': 'self_attn.o_proj', 'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}


def export_hf(model, tokenizer, folder):
    """
    Writes a float GPT and its BPE into folder, for transformers' NanoChatForCausalLM and AutoTokenizer: the same
    logits, the same ids. Multi-token and draft heads have no place there and are left out. There, special tokens are
    read out of text, unless split_special_tokens=True. Returns folder.
    """
    import safetensors.torch
    assert tokenizer.kind == 'bpe' and tokenizer.vocab_size == model.config.vocab_size, (
        f"expected the model's own BPE of {model.config.vocab_size} tokens, "
        f"not a {tokenizer.kind} tokenizer of {tokenizer.vocab_size}")
    texts = {'tokenizer.json': hf_tokenizer(tokenizer),
             'tokenizer_config.json': hf_tokenizer_config(model.config, tokenizer),
             'config.json': hf_config(model.config, tokenizer)}
    files = {'model.safetensors': safetensors.torch.save(hf_tensors(model), metadata={'format': 'pt'})}
    files |= {name: json.dumps(text).encode() for name, text in texts.items()}
    with hold(folder):
        for name, content in files.items():
            atomic_write(os.path.join(folder, name), lambda f: f.write(content))
    return folder


def hf_tensors(model):
    """GPT -> {NanoChatForCausalLM's name: tensor, float32}."""
    tensors, left_out = {}, []
    for name, tensor in model.state_dict().items():
        assert tensor.is_floating_point(), f"{name} is {tensor.dtype}: export the float model, before it is quantised"
        if name.startswith(('multi_token.', 'draft.')):
            left_out.append(name)
        elif not (model.config.tie_weights and name == 'lm_head.weight'):
            for ours, theirs in HF_NAMES.items():
                name = name.replace(ours, theirs)
            tensors[name] = tensor.detach().cpu().float().contiguous()
    if left_out:
        print(f"note: {len(left_out)} tensors of multi-token and draft heads are left out: "
              "Hugging Face's NanoChat has none")
    return tensors


def hf_config(c, tokenizer):
    """GPTConfig -> the content of config.json."""
    ends = [tokenizer.special(name) for name in ('<|assistant_end|>', '<|bos|>') if name in tokenizer.special_tokens]
    return {'architectures': ['NanoChatForCausalLM'], 'model_type': 'nanochat',
            'vocab_size': c.vocab_size, 'hidden_size': c.n_embd, 'intermediate_size': c.n_hidden,
            'num_hidden_layers': c.n_layer, 'num_attention_heads': c.n_head, 'num_key_value_heads': c.n_kv_head,
            'head_dim': c.head_dim, 'max_position_embeddings': c.block_size, 'hidden_act': 'relu2',
            'rms_norm_eps': torch.finfo(torch.float32).eps,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_base},
            'final_logit_softcapping': c.softcap, 'tie_word_embeddings': c.tie_weights,
            'bos_token_id': tokenizer.bos, 'eos_token_id': ends or None, 'pad_token_id': None, 'dtype': 'float32'}


def hf_tokenizer_config(c, tokenizer):
    """GPTConfig and its BPE -> the content of tokenizer_config.json."""
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': c.block_size,
                'clean_up_tokenization_spaces': False}
    if tokenizer.bos is not None:
        settings['bos_token'] = tokenizer.decode([tokenizer.bos])
    return settings

# -----------------------------------------------------------------------------
# what may stand before the colon of --teacher=KIND:PATH, and the file that it is read from, which a script asks for
# before it does anything long

KINDS = {'nanochat': load_nanochat, 'gpt2': load_gpt2, 'random': random_teacher}
FILES = {'nanochat': find_nanochat, 'gpt2': find_gpt2}
