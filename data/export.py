"""
Ours, written the way others read it: a folder for transformers.

    from data.export import export_hf
    export_hf(model, tokenizer, 'hf-stdlib-bpe')
"""
import json
import os

import torch

from data.files import atomic_write, hold
from data.foreign_tokenizer import hf_tokenizer
from data.nanochat import HF_NAMES


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
