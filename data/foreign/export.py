"""
Writes our models in other projects' formats: a folder for transformers, a GGUF file for llama.cpp.
(data/foreign/llama.py and data/foreign/nanochat.py read these formats.)

    from data.foreign.export import export_gguf, export_hf
    export_hf(model, tokenizer, 'hf-stdlib-bpe')        # LlamaForCausalLM or NanoChatForCausalLM, with the same logits
    export_gguf(model, tokenizer, 'model.gguf', 'f16')  # only if the block is a Llama's

What their models do not have is left out or moved: multi-token and draft heads are left out; the matrix before lm_head
(out_proj) becomes the gains of the last norm if it is diagonal, as in a Llama that came from elsewhere, and is
multiplied into lm_head if not.
"""
import copy
import json
import os

import torch
import torch.nn as nn

from data.files import atomic_write, hold
from data.foreign.llama import GGUF_DATASET, GGUF_LAYER, GGUF_NAMES, LAYER, LLAMA, MIRRORED, interleaved, mirrored
from data.foreign.nanochat import HF_NAMES
from data.foreign.weights import HF_SHAPE
from data.foreign_tokenizer import hf_tokenizer, pre_tokenizer_of
from data.layouts import float_linear
from data.rounding import IntEmbedding, Integers
from model import hadamard

# the switches of the blocks that others have
BLOCKS = {'nanochat': {'mlp': 'relu2', 'qk_norm': True, 'embed_norm': True}, 'llama': LLAMA}


def is_block(c, kind):
    """Whether a GPTConfig's block is of this kind, one of BLOCKS."""
    return all(getattr(c, name) == value for name, value in BLOCKS[kind].items())


def block_of(c, kinds=BLOCKS):
    """GPTConfig -> the kind of its block, one of BLOCKS. AssertionError names its switches if it is of none."""
    for kind in kinds:
        if is_block(c, kind):
            return kind
    switches = ', '.join(f'{name}={getattr(c, name)}' for name in LLAMA)
    known = ' or '.join(f"{kind}'s ({', '.join(f'{name}={value}' for name, value in BLOCKS[kind].items())})"
                        for kind in kinds)
    raise AssertionError(f"this model's block ({switches}) is not {known}, and no other can be written")


def check_tokenizer(model, tokenizer):
    assert getattr(tokenizer, 'kind', '') == 'bpe' and tokenizer.vocab_size == model.config.vocab_size, (
        f"expected the model's own BPE of {model.config.vocab_size} tokens, "
        f"not a {getattr(tokenizer, 'kind', None)} tokenizer of {getattr(tokenizer, 'vocab_size', 0)}")


def dequantised(model):
    """An integer model, as quantize.load gives it -> the float model that its integers stand for, a copy."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Integers):
            weight = module.integers() * module.scale[:, None]
            embeds = isinstance(module, IntEmbedding)
            model.set_submodule(name, nn.Embedding.from_pretrained(weight) if embeds else float_linear(weight))
    if model.config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval()

# -----------------------------------------------------------------------------
# tensors

def own_tensors(model):
    """GPT -> its tensors on the CPU, float32, without multi-token and draft heads, nor a tied lm_head."""
    tensors, left_out = {}, []
    for name, tensor in model.state_dict().items():
        assert tensor.is_floating_point(), f"{name} is {tensor.dtype}: export the float model, before it is quantised"
        if name.startswith(('multi_token.', 'draft.')):
            left_out.append(name)
        elif not (model.config.tie_weights and name == 'lm_head.weight'):
            tensors[name] = tensor.detach().cpu().float().contiguous()
        if name.startswith('transformer.h.') and name.endswith('mlp.c_proj.weight') and model.config.hadamard:
            tensors[name] = hadamard(tensors[name], model.config.hadamard)      # others do not turn hidden units
    if left_out:
        print(f"note: {len(left_out)} tensors of multi-token and draft heads are left out: others' models have none")
    return tensors


def without_c_out(tensors, gains):
    """
    Removes transformer.c_out from own_tensors. -> the gains (n_embd,) of the norm before lm_head that do the same, if
    gains is True and c_out is diagonal; otherwise None, and it is multiplied into lm_head.
    """
    c_out = tensors.pop('transformer.c_out.weight', None)
    if c_out is None:
        return None
    c_out = torch.eye(len(c_out)) + c_out
    if gains and torch.equal(c_out, c_out.diag().diag()):
        return c_out.diag()
    if 'lm_head.weight' not in tensors:
        print(f"note: lm_head becomes a table of its own, {tensors['transformer.wte.weight'].numel():,} weights more: "
              "what stands before it has no other place there")
    tensors['lm_head.weight'] = tensors.get('lm_head.weight', tensors['transformer.wte.weight']) @ c_out
    return None


def nanochat_tensors(model):
    """GPT of nanochat's block -> {NanoChatForCausalLM's name: tensor}."""
    tensors, theirs = own_tensors(model), {}
    without_c_out(tensors, gains=False)
    for name, tensor in tensors.items():
        for ours, other in HF_NAMES.items():
            name = name.replace(ours, other)
        theirs[name] = tensor
    return theirs


def llama_tensors(model):
    """GPT of a Llama's block -> {LlamaForCausalLM's name: tensor}. All gains of norms are 1, except the last norm's."""
    c, own = model.config, own_tensors(model)
    ones = torch.ones(c.n_embd)
    last = without_c_out(own, gains=True)
    theirs = {'model.embed_tokens': own['transformer.wte.weight'], 'model.norm': ones if last is None else last}
    if 'lm_head.weight' in own:
        theirs['lm_head'] = own['lm_head.weight']
    for i in range(c.n_layer):
        for name, (other, norm) in LAYER.items():
            w, to = own[f'transformer.h.{i}.{name}.weight'], f'model.layers.{i}'
            if norm:
                theirs.setdefault(f'{to}.{norm}', ones.clone())
            theirs[f'{to}.{other}'] = mirrored(w, c.head_dim) if name in MIRRORED else w
    return {f'{name}.weight': tensor for name, tensor in theirs.items()}


def with_gains(tensors):
    """
    llama_tensors -> those of the same model, whose norms have gains: each column of the matrices that read a norm is
    divided by its rms, which becomes the gain. With all columns of one size, rounding in groups of columns loses less.
    """
    tensors = dict(tensors)
    for name in [name for name in tensors if 'model.layers.' in name and 'layernorm' in name]:
        at, norm = name.removesuffix('.weight').rsplit('.', 1)
        readers = [f'{at}.{matrix}.weight' for matrix, read in LAYER.values() if read == norm]
        size = torch.cat([tensors[reader] for reader in readers]).square().mean(dim=0).sqrt()   # (n_embd,)
        tensors[name] = torch.where(size > 0, size, 1.0)
        for reader in readers:
            tensors[reader] = tensors[reader] / tensors[name]
    return tensors


def eps_of(c):
    """The epsilon that the norms add to the mean square in float32."""
    return c.norm_eps or torch.finfo(torch.float32).eps

# -----------------------------------------------------------------------------
# the tokenizer

def ends_of(tokenizer):
    """The ids of the tokens that end an answer or a text, the one that ends an answer first."""
    answer = {'nanochat': '<|assistant_end|>', 'chatml': '<|im_end|>'}.get(tokenizer.chat)
    first = [tokenizer.special(answer)] if answer else []
    return first + sorted(tokenizer.ends - {*first})


def chat_template(tokenizer):
    """The format of conversations as a Jinja template, which transformers and llama.cpp run; None if there is none."""
    if tokenizer.chat == 'chatml':
        line = (tokenizer.system or '').replace('\\', r'\\').replace("'", r"\'").replace('\n', r'\n')
        default = ("{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\n" + line
                   + "<|im_end|>\\n' }}{% endif %}" if line else '')
        return ("{% for message in messages %}" + default
                + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    if tokenizer.chat == 'nanochat':    # the system line is put before the first question
        return ("{{ '<|bos|>' }}{% for message in messages %}{% if message['role'] != 'system' %}"
                "{{ '<|' + message['role'] + '_start|>' }}"
                "{% if loop.index == 2 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}"
                "{% endif %}{{ message['content'] + '<|' + message['role'] + '_end|>' }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}")
    return None

# -----------------------------------------------------------------------------
# Hugging Face's folder

def export_hf(model, tokenizer, folder):
    """
    Writes a float GPT and its BPE into folder, for transformers' LlamaForCausalLM or NanoChatForCausalLM and
    AutoTokenizer: the same logits, the same ids. (transformers finds special tokens in text, unless
    split_special_tokens=True.) Returns folder. AssertionError if the block is neither a Llama's nor nanochat's.
    """
    import safetensors.torch
    check_tokenizer(model, tokenizer)
    kind = block_of(model.config)
    tensors = {'nanochat': nanochat_tensors, 'llama': llama_tensors}[kind](model)
    texts = {'tokenizer.json': hf_tokenizer(tokenizer),
             'tokenizer_config.json': hf_tokenizer_config(model.config, tokenizer),
             'config.json': hf_config(model.config, tokenizer, kind, tied='lm_head.weight' not in tensors)}
    files = {'model.safetensors': safetensors.torch.save(tensors, metadata={'format': 'pt'})}
    files |= {name: json.dumps(text).encode() for name, text in texts.items()}
    with hold(folder):
        for name, content in files.items():
            atomic_write(os.path.join(folder, name), lambda f: f.write(content))
    return folder


def hf_config(c, tokenizer, kind, tied):
    """GPTConfig -> the content of config.json."""
    about = {
        'nanochat': {'architectures': ['NanoChatForCausalLM'], 'hidden_act': 'relu2',
                     'final_logit_softcapping': c.softcap or None},
        # older transformers read the base of RoPE from a place of its own
        'llama': {'architectures': ['LlamaForCausalLM'], 'hidden_act': 'silu', 'attention_bias': False,
                  'mlp_bias': False, 'rope_theta': c.rope_base}}[kind]
    return about | {theirs: getattr(c, ours) for ours, theirs in HF_SHAPE.items()} | {
        'model_type': kind, 'rms_norm_eps': eps_of(c),
        'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_base}, 'tie_word_embeddings': tied,
        'bos_token_id': tokenizer.bos, 'eos_token_id': ends_of(tokenizer) or None, 'pad_token_id': None,
        'dtype': 'float32'}


def hf_tokenizer_config(c, tokenizer):
    """GPTConfig and its BPE -> the content of tokenizer_config.json."""
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': c.block_size,
                'clean_up_tokenization_spaces': False}
    if tokenizer.bos is not None:
        settings['bos_token'] = tokenizer.decode([tokenizer.bos])
    if ends_of(tokenizer):
        settings['eos_token'] = tokenizer.decode(ends_of(tokenizer)[:1])
    if tokenizer.chat:
        settings['chat_template'] = chat_template(tokenizer)
    return settings

# -----------------------------------------------------------------------------
# llama.cpp's file

GGUF_TYPES = ('f16', 'q8_0', 'q4_0', 'q4_1', 'f32')     # of the matrices


def export_gguf(model, tokenizer, path, kind='f16', dataset=None):
    """
    Writes a float GPT with a Llama's block and its BPE as a GGUF file, for llama.cpp and what is built on it. kind: one
    of GGUF_TYPES; norms are always float32, and with q4_0 and q4_1 the vocabulary's tables are q8_0. dataset: the one
    the model was trained on, so that a ladder of bench.py can measure the file. Returns path.
    AssertionError if it is another block, or if llama.cpp cannot cut text as the tokenizer does.
    """
    import gguf
    check_tokenizer(model, tokenizer)
    block_of(model.config, ['llama'])
    assert not os.path.isdir(path), f"{path} is a folder, and a GGUF is one file: name it, like {path}/model.gguf"
    pre = pre_tokenizer_of(tokenizer.pattern)
    assert pre, ("llama.cpp knows ways to cut text by name, and this tokenizer's is none of them: take one of another "
                 "model, like --tokenizer=gguf:FILE of data/text/prepare.py, and train on that")
    tensors = llama_tensors(model)
    if kind != 'f32':           # f16, too, as llama.cpp's own tool may round it later
        tensors = with_gains(tensors)

    def write(f):
        writer = gguf.GGUFWriter(f.name, 'llama')
        describe_model(writer, model.config)
        if dataset:
            writer.add_string(GGUF_DATASET, dataset)
        describe_tokenizer(writer, tokenizer, pre)
        for name, tensor in tensors.items():
            add_tensor(writer, gguf_name(name), tensor, model.config, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with hold(os.path.dirname(path), os.path.basename(path)):
        atomic_write(path, write)
    return path


def describe_model(writer, c):
    """Writes a GPTConfig as the settings of a GGUF file."""
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(eps_of(c))
    writer.add_vocab_size(c.vocab_size)


def describe_tokenizer(writer, tokenizer, pre):
    """Writes a BPE as the settings of a GGUF file. pre: llama.cpp's name for how it cuts text."""
    import gguf
    content = hf_tokenizer(tokenizer)
    names = content['model']['vocab'] | {token['content']: token['id'] for token in content['added_tokens']}
    special = {*tokenizer.special_ids}
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(names, key=names.get))
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
                            for i in range(tokenizer.vocab_size)])
    writer.add_token_merges(content['model']['merges'])
    if tokenizer.bos is not None:
        writer.add_bos_token_id(tokenizer.bos)
    if ends_of(tokenizer):
        writer.add_eos_token_id(ends_of(tokenizer)[0])
    # bos comes before a text, but not before a conversation in ChatML
    writer.add_add_bos_token(tokenizer.bos is not None and tokenizer.chat != 'chatml')
    if tokenizer.chat:
        writer.add_chat_template(chat_template(tokenizer))


def gguf_name(name):
    """'model.layers.0.self_attn.q_proj.weight' -> 'blk.0.attn_q.weight'"""
    plain = name.removesuffix('.weight')
    for theirs, hf in GGUF_NAMES.items():
        if plain == hf:
            return f'{theirs}.weight'
    _, _, layer, what = plain.split('.', 3)
    return f'blk.{layer}.{next(theirs for theirs, hf in GGUF_LAYER.items() if hf == what)}.weight'


def add_tensor(writer, name, tensor, c, kind):
    """Writes a Llama's tensor, whose rows are in Hugging Face's order, rounded to kind."""
    import gguf
    for part, heads in (('attn_q.', c.n_head), ('attn_k.', c.n_kv_head)):
        if part in name:
            tensor = interleaved(tensor, heads)
    if tensor.ndim == 1:
        kind = 'f32'
    elif kind in ('q4_0', 'q4_1') and name in ('token_embd.weight', 'output.weight'):
        kind = 'q8_0'
    if kind[0] == 'q' and tensor.size(-1) % 32:
        print(f"note: {name} stays in 16 bits: its rows of {tensor.size(-1)} are not a multiple of 32")
        kind = 'f16'
    dtype = getattr(gguf.GGMLQuantizationType, kind.upper())
    writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), dtype), raw_dtype=dtype)
