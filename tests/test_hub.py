"""
Llamas of a hub, in and out, as transformers and gguf read them; and teachers that are not our block.
With `pip install gguf safetensors transformers` everything runs.
"""
import json
import os
import struct
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest
import torch
from conftest import (HF_LLAMA, TEXTS, TOK, V, far, llama_state, logits_of, prompt_of, ran, randomise,
                      refused, refuses, run, write_gpt2_tokenizer, write_hf_gpt2, write_llama)

import quantize
from data.bench.decoding import open_model, quality
from data.checkpoint import load_model
from data.foreign.causal_lm import InOne, load_py
from data.foreign.export import chat_template, export_gguf, export_hf
from data.foreign.kinds import KINDS
from data.foreign.llama import LLAMA, other_architecture
from data.foreign_tokenizer import hf_tokenizer
from data.rounding import convert
from data.teachers import check_teachers, load_teacher
from data.tokenizer import BPETokenizer, train_bpe
from data.writer import write_dataset
from distill import Distiller
from model import GPT, GPTConfig


def llama_forward(state, idx, **shape):
    """A Llama in plain formulas."""
    c = HF_LLAMA | shape
    w = {name.removesuffix('.weight'): t.float() for name, t in state.items()}
    D = c['hidden_size'] // c['num_attention_heads']
    rms = lambda x, gain: x * (x.square().mean(-1, keepdim=True) + c['rms_norm_eps']).rsqrt() * gain
    angle = torch.outer(torch.arange(idx.size(1)).float(), c['rope_theta'] ** (-torch.arange(0, D, 2) / D))
    cos, sin = angle.cos(), angle.sin()  # (T, D/2)

    def turn(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    x = w['model.embed_tokens'][idx]
    for i in range(c['num_hidden_layers']):
        at = f'model.layers.{i}'
        y = rms(x, w[f'{at}.input_layernorm'])
        q, k, v = ((y @ w[f'{at}.self_attn.{n}_proj'].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in 'qkv')
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
        scores = (turn(q) @ turn(k).mT / D ** 0.5).masked_fill(
            torch.ones(idx.size(1), idx.size(1)).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f'{at}.self_attn.o_proj'].T
        y = rms(x, w[f'{at}.post_attention_layernorm'])
        x = x + (torch.nn.functional.silu(y @ w[f'{at}.mlp.gate_proj'].T) * (y @ w[f'{at}.mlp.up_proj'].T)
                 ) @ w[f'{at}.mlp.down_proj'].T
    return rms(x, w['model.norm']) @ w.get('lm_head', w['model.embed_tokens']).T


GGUF = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output',
        'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm', 'self_attn.q_proj': 'attn_q',
        'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output',
        'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down', 'model.layers': 'blk'}


def write_gguf(path, state=None, kind='F32', more=(), drawn={}, architecture='llama', pre='gpt-2', **shape):
    """By gguf's own writer. more: further settings; drawn: the bytes of tensors that are rounded already."""
    gguf = pytest.importorskip('gguf')
    c, state = HF_LLAMA | shape, llama_state(**shape) if state is None else state
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, name in (
            ('context_length', 'max_position_embeddings'), ('block_count', 'num_hidden_layers'),
            ('embedding_length', 'hidden_size'), ('feed_forward_length', 'intermediate_size'),
            ('attention.head_count', 'num_attention_heads'), ('attention.head_count_kv', 'num_key_value_heads')):
        writer.add_uint32(f'{architecture}.{key}', c[name])
    writer.add_float32(f'{architecture}.attention.layer_norm_rms_epsilon', c['rms_norm_eps'])
    writer.add_float32(f'{architecture}.rope.freq_base', c['rope_theta'])
    for key, value in dict(more).items():
        writer.add_uint32(f'{architecture}.{key}', value)
    model = hf_tokenizer(TOK)['model']
    names = [*sorted(model['vocab'], key=model['vocab'].get)]
    names += [name for name in TOK.special_tokens if name not in names]
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types([3 if name in TOK.special_tokens else 1 for name in names])
    writer.add_token_merges(model['merges'])
    for name, tensor in state.items():
        dtype = getattr(gguf.GGMLQuantizationType, kind if tensor.ndim > 1 else 'F32')
        rows = drawn[name] if name in drawn else gguf.quants.quantize(tensor.float().numpy(), dtype)
        for part, heads in (('q_proj', c['num_attention_heads']), ('k_proj', c['num_key_value_heads'])):
            if part in name:  # row j * D/2 + i of a head becomes row 2i + j
                D = len(rows) // heads
                rows = rows[[h * D + j * (D // 2) + i for h in range(heads) for i in range(D // 2) for j in range(2)]]
        for theirs, short in GGUF.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, rows, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def our_llama(turned=False, **shape):
    """A model of ours that is a Llama. turned: c_out is no diagonal, as after a rotation of the residual stream."""
    config = GPTConfig(block_size=40, vocab_size=V, n_layer=2, n_head=4, n_embd=32, **LLAMA | shape)
    model = randomise(GPT(config), 0.4)
    if model.config.out_proj and not turned:
        model.transformer.c_out.weight.data = torch.diag(torch.randn(32))
    return model


IDX = torch.arange(80).view(2, 40) * 3 % V

# ----- in

@pytest.mark.parametrize('shape', [
    {}, dict(num_key_value_heads=4, tie_word_embeddings=True), dict(num_key_value_heads=1, rms_norm_eps=1e-5),
    dict(rope_theta=1e6, tie_word_embeddings=True, vocab_size=V + 4), dict(model_type='mistral', sliding_window=None)])
def test_a_llama_in_a_folder(tmp_path, shape):
    model, tokenizer = KINDS['hf'](write_llama(tmp_path, tok=TOK, **shape))
    expected = llama_forward(llama_state(**shape), IDX, **shape)[..., :V]  # padding is cut off
    assert expected.std() > 1 and far(logits_of(model, IDX), expected) < 1e-4
    assert tokenizer.meta() == TOK.meta() and model.config.vocab_size == V
    assert (model.lm_head.weight is model.transformer.wte.weight) == shape.get('tie_word_embeddings', False)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_narrow_weights_old_buffers_and_wrappers(tmp_path, dtype):
    state = {f'module.{name}': t.to(dtype) for name, t in llama_state().items()}
    model, tokenizer = KINDS['hf'](write_llama(tmp_path, state | {'model.layers.0.self_attn.rotary_emb.inv_freq': IDX}))
    plain = {name.removeprefix('module.'): t for name, t in state.items()}
    assert tokenizer is None and far(logits_of(model, IDX), llama_forward(plain, IDX)) < 1e-4


@pytest.mark.parametrize('kind', ['bin', 'safetensors'])
@pytest.mark.parametrize('name, write', [('hf', write_llama), ('gpt2', write_hf_gpt2)])
def test_shards(tmp_path, name, write, kind):
    save = torch.save if kind == 'bin' else pytest.importorskip('safetensors.torch').save_file
    folder, load, where = write(tmp_path), KINDS[name], {}
    expected, state = load(folder)[0].state_dict(), torch.load(tmp_path / 'pytorch_model.bin', weights_only=True)
    os.remove(tmp_path / 'pytorch_model.bin')
    for i in range(3):
        part = dict([*state.items()][i::3])
        save(part, f'{folder}/part{i}.{kind}')
        where |= dict.fromkeys(part, f'part{i}.{kind}')
    index = tmp_path / {'bin': 'pytorch_model.bin.index.json', 'safetensors': 'model.safetensors.index.json'}[kind]
    index.write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': where}))
    again = load(folder)[0].state_dict()
    assert all(torch.equal(again[key], t) for key, t in expected.items())
    assert check_teachers(f'{name}:{folder}') == [str(index)]
    last = [*where][-1]
    for text, match in ((json.dumps({'weight_map': where | {last: f'part{(len(where) + 1) % 3}.{kind}'}}),
                         f'part.* does not hold {last}'),
                        (json.dumps({'weight_map': where | {last: '../elsewhere.bin'}}), 'it names files elsewhere'),
                        ('{"weight_map": [', 'does not say which tensor is in which file')):
        index.write_text(text)
        refuses(match, load, folder)
    index.write_text(json.dumps({'weight_map': where}))
    os.remove(f'{folder}/part1.{kind}')
    refuses('part1.* is not there, one of the 3 files', load, folder)


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1'])
@pytest.mark.parametrize('tied', [False, True])
def test_gguf(tmp_path, kind, tied, capsys):
    gguf = pytest.importorskip('gguf')
    shape = dict(tie_word_embeddings=tied, intermediate_size=64)
    path = write_gguf(tmp_path / 'a.gguf', kind=kind, **shape)
    model, tokenizer = KINDS['gguf'](path)
    dtype = getattr(gguf.GGMLQuantizationType, kind)
    state = {name: t if t.ndim == 1 else torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(t.numpy(), dtype), dtype).astype(np.float32))
             for name, t in llama_state(**shape).items()}
    assert far(logits_of(model, IDX), llama_forward(state, IDX, **shape)) < 1e-4
    assert tokenizer.meta() == TOK.meta() and model.config.norm_eps == 1e-3 and model.config.block_size == 40
    assert ('rounded before (Q' in capsys.readouterr().out) == (kind[0] == 'Q')


SCALES = {'Q4_K': [0, 2], 'Q5_K': [0, 2], 'Q6_K': [208]}  # the bytes of a block where 16-bit floats begin


@pytest.mark.parametrize('kind', SCALES)
def test_k_quants(tmp_path, kind):
    """In blocks of 256. gguf reads them and cannot write them, so their bytes are drawn."""
    gguf = pytest.importorskip('gguf')
    dtype, rng = getattr(gguf.GGMLQuantizationType, kind), np.random.default_rng(0)
    shape = dict(hidden_size=256, intermediate_size=256)
    state, size = llama_state(**shape), gguf.GGML_QUANT_SIZES[dtype][1]
    drawn = {name: rng.integers(256, size=(len(t), t.size(1) // 256, size), dtype=np.uint8)
             for name, t in state.items() if t.ndim > 1}
    for name, blocks in drawn.items():
        for at in SCALES[kind]:
            scales = rng.normal(size=blocks.shape[:2] + (1,), scale=2e-4).astype(np.float16)
            blocks[..., at:at + 2] = scales.view(np.uint8)
        state[name] = torch.from_numpy(gguf.quants.dequantize(blocks.reshape(len(blocks), -1), dtype))
    drawn = {name: blocks.reshape(len(blocks), -1) for name, blocks in drawn.items()}
    path = write_gguf(tmp_path / 'a.gguf', state, drawn=drawn, kind=kind, **shape)
    model, _ = KINDS['gguf'](path)
    expected = llama_forward(state, IDX, **shape)
    assert expected.std() > 0.1 and far(logits_of(model, IDX), expected) < 1e-4


@pytest.mark.parametrize('shape, match', [
    (dict(rope_scaling={'rope_type': 'llama3', 'factor': 8.0}), 'positions are scaled .rope_scaling: llama3'),
    (dict(rope_parameters={'rope_type': 'yarn', 'rope_theta': 1e4}), 'positions are scaled .rope_parameters: yarn'),
    (dict(attention_bias=True), 'attention_bias is True'), (dict(mlp_bias=True), 'mlp_bias is True'),
    (dict(hidden_act='gelu'), 'hidden_act is gelu'), (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(model_type='mistral', sliding_window=16), 'window of 16 tokens'),
    (dict(model_type='qwen2'), 'architecture is qwen2, it adds biases'),
    (dict(model_type='gemma3'), 'architecture is gemma3')])
def test_what_is_more_than_a_llama(tmp_path, shape, match):
    folder = write_llama(tmp_path / 'hf', **shape)
    got = run('distill.py', f'--teacher=hf:{folder}', f'--to_picochat={tmp_path}/out')
    refused(got, f'{match}.*--teacher=hf:FOLDER')
    assert os.listdir(tmp_path) == ['hf']


@pytest.mark.parametrize('lie, match', [
    (dict(num_hidden_layers=3), 'n_layer is 3'), (dict(num_hidden_layers=1), 'layers.1.* is unknown'),
    (dict(hidden_size=64), r'is \(300, 32\) instead of \(300, 64\)'), (dict(vocab_size=301), r'instead of \(301, 32\)'),
    (dict(num_attention_heads=2), r'k_proj.weight is \(16, 32\) instead of \(32, 32\)'),
    (dict(num_attention_heads=3), 'multiple'), (dict(head_dim=7), 'must be even'),
    (dict(max_position_embeddings=2**50), 'block_size'), (dict(tie_word_embeddings=True), 'has another'),
    (dict(rope_theta=0), 'base of its positions is 0.0'), (dict(model_type=7), 'no model_type')])
def test_a_config_that_lies(tmp_path, lie, match):
    refuses(match, KINDS['hf'], write_llama(tmp_path, llama_state(), **lie))


def test_folders_that_are_not_whole(tmp_path):
    folder = write_llama(tmp_path, llama_state() | {'model.layers.0.self_attn.q_proj.bias': torch.zeros(32)})
    refuses('q_proj.bias is unknown', KINDS['hf'], folder)
    refuses('has 310 tokens and its tokenizer 300', KINDS['hf'], write_llama(tmp_path / 'b', tok=TOK, vocab_size=310))
    for name, made in (('config.json', b'{'), ('config.json', b'[]'), ('pytorch_model.bin', b'no')):
        write_llama(folder)
        (tmp_path / name).write_bytes(made)
        refuses(f'{name} (does not describe|is not a whole)', KINDS['hf'], folder)
    os.remove(tmp_path / 'pytorch_model.bin')
    for look in (KINDS['hf'], lambda path: check_teachers(f'hf:{path}')):
        refuses('no weights in .*model.safetensors', look, write_llama(tmp_path / 'c') and folder)


def test_bad_gguf_files(tmp_path):
    path = write_gguf(tmp_path / 'a.gguf')
    whole = open(path, 'rb').read()
    for n in (0, 3, 30, 2000, len(whole) // 2, len(whole) - 1):
        open(path, 'wb').write(whole[:n])
        got = run('distill.py', f'--teacher=gguf:{path}', f'--to_picochat={tmp_path}/out')
        refused(got, 'a.gguf is (not a whole|no) GGUF file')
    assert os.listdir(tmp_path) == ['a.gguf']
    refuses('no GGUF file at', KINDS['gguf'], f'{tmp_path}/b.gguf')
    # one setting, x, a list of so many integers: gguf would read nothing as often, and keep it
    open(path, 'wb').write(struct.pack('<4sIQQQ1sIIQ', b'GGUF', 3, 0, 1, 1, b'x', 9, 4, 10**12) + bytes(64))
    refuses('a.gguf is not a whole GGUF file .ValueError: it ends too early', KINDS['gguf'], path)
    assert other_architecture(['x']) == "its architecture is ['x']"  # a file may say it in any type
    nan = llama_state()
    nan['lm_head.weight'][0, 0] = np.inf
    for match, how in (('architecture is qwen2, it adds biases', dict(architecture='qwen2')),
                       ('pre-tokenizer', dict(pre='tekken')),
                       ('expert_count is 8', dict(more={'expert_count': 8})),
                       ('rope.dimension_count is 4, and a head has 8', dict(more={'rope.dimension_count': 4})),
                       ('it has blk.0.attn_q_norm.weight', dict(state=llama_state() | {
                           'model.layers.0.attn_q_norm.weight': torch.ones(8)})),
                       ('n_layer is 3', dict(state=llama_state(), num_hidden_layers=3)),
                       ('lm_head.weight are NaN or infinite', dict(state=nan))):
        refuses(match, KINDS['gguf'], write_gguf(path, **how))


def test_from_a_folder_to_a_chat_without_data(tmp_path):
    folder = write_llama(tmp_path / 'hf', tok=TOK, tie_word_embeddings=True)
    got = run('distill.py', f'--teacher=hf:{folder}', f'--to_picochat={tmp_path}/out', '--block_size=24')
    assert got.status == 0 and 'context: 24 tokens' in got.out, got.err
    model, state = load_model(f'{tmp_path}/out/best.pt')
    expected = llama_forward(llama_state(tie_word_embeddings=True), IDX[:, :24])
    assert model.config.block_size == 24 and state['dataset'] is None
    assert far(logits_of(model, IDX[:, :24]), expected) < 1e-4
    again = 'distill.py', f'--teacher=hf:{folder}', f'--to_picochat={tmp_path}/out'
    refused(run(*again), 'already holds a best.pt')
    refused(run(*again, f'--to_picochat={tmp_path}/other', '--block_size=99'), '99.* is more than')
    ran('quantize.py', f'--out_dir={tmp_path}/out')
    for weights in ('float', 'int8'):
        how = f'--weights={weights}', '--compile=False', '--start=the', '--max_new_tokens=4'
        assert ran('sample.py', f'--out_dir={tmp_path}/out', *how).out.startswith('the')

# ----- out

SHAPES = [dict(n_kv_head=2), dict(tie_weights=True, norm_eps=1e-5),
          dict(head_dim=12, n_hidden=40, n_kv_head=1, rope_base=500.0, out_proj=True),
          dict(tie_weights=True, out_proj=True), dict(tie_weights=True, out_proj=True, turned=True)]


def our_block(**shape):
    return randomise(GPT(GPTConfig(block_size=40, vocab_size=V, n_layer=2, n_head=4, n_embd=32, **shape)), 0.4)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('how', ['hf', 'gguf'])
def test_out_and_in_again(tmp_path, shape, how, capsys):
    model = our_llama(**shape)
    if how == 'hf':
        pytest.importorskip('safetensors')
        back, tokenizer = KINDS['hf'](export_hf(model, TOK, tmp_path))
    else:
        pytest.importorskip('gguf')
        back, tokenizer = KINDS['gguf'](export_gguf(model, TOK, f'{tmp_path}/a.gguf', 'f32'))
    turned = shape.get('turned', False)
    assert ('lm_head becomes a table of its own' in capsys.readouterr().out) == turned
    assert far(logits_of(back, IDX), logits_of(model, IDX)) < (1e-4 if model.config.out_proj else 1e-6)
    assert tokenizer.meta() == TOK.meta() and back.config.tie_weights == (model.config.tie_weights and not turned)
    assert torch.equal(back.transformer.h[1].attn.c_q.weight, model.transformer.h[1].attn.c_q.weight)


@pytest.mark.parametrize('name, make, shape', [
    *(('LlamaForCausalLM', our_llama, shape) for shape in SHAPES),
    ('NanoChatForCausalLM', our_block, dict(n_kv_head=2)), ('NanoChatForCausalLM', our_block, dict(tie_weights=True)),
    ('NanoChatForCausalLM', our_block,
     dict(head_dim=12, n_hidden=40, n_kv_head=1, rope_base=500.0, multi_token_n=1, draft_n=2))])
def test_transformers_gives_the_same_logits(tmp_path, bpe, name, make, shape, capsys):
    transformers = pytest.importorskip('transformers')
    model, tokenizer = make(**shape), bpe if make is our_block else TOK
    export_hf(model, tokenizer, tmp_path)
    assert ('draft heads are left out' in capsys.readouterr().out) == ('draft_n' in shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(IDX).logits
    assert type(theirs).__name__ == name and expected.std() > 1
    assert far(logits_of(model, IDX), expected) < 2e-4
    its = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert its.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert its.bos_token_id == tokenizer.bos == theirs.config.bos_token_id


@pytest.mark.parametrize('how', [
    {}, dict(tie_word_embeddings=True, num_key_value_heads=1), dict(head_dim=16, rope_parameters={
        'rope_type': 'default', 'rope_theta': 3e5}), dict(model_type='mistral')])
def test_a_folder_of_transformers_own(tmp_path, how):
    transformers = pytest.importorskip('transformers')
    c = {key: value for key, value in (HF_LLAMA | how).items() if key != 'rope_theta'}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        **c | ({'sliding_window': None} if 'model_type' in how else {})))
    randomise(theirs, 0.4).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(IDX).logits
    model = KINDS['hf'](str(tmp_path))[0]
    assert isinstance(model, GPT) and far(logits_of(model, IDX), expected) < 2e-4


def test_our_own_block_comes_back(tmp_path):
    pytest.importorskip('safetensors')
    model = randomise(GPT(GPTConfig(block_size=40, vocab_size=V, n_layer=1, n_head=4, n_embd=32, n_kv_head=2)))
    back, tokenizer = KINDS['hf'](export_hf(model, TOK, tmp_path))
    assert back.config == model.config and tokenizer.meta() == TOK.meta()
    assert torch.equal(logits_of(back, IDX), logits_of(model, IDX))


@pytest.mark.parametrize('kind', ['f16', 'q8_0', 'q4_0', 'q4_1'])
def test_rounded_gguf_files(tmp_path, kind):
    gguf = pytest.importorskip('gguf')
    model = our_llama(n_hidden=64)
    back, _ = KINDS['gguf'](export_gguf(model, TOK, f'{tmp_path}/a.gguf', kind))
    w, again = (m.transformer.h[0].mlp.c_proj.weight for m in (model, back))
    step = {'f16': 2**-11 * w.abs().max(), 'q8_0': w.abs().max() / 127, 'q4_0': w.abs().max() / 7,
            'q4_1': (w.max() - w.min()) / 15}[kind]
    assert 0 < far(w, again) < step
    gate, up = (next(t for t in gguf.GGUFReader(f'{tmp_path}/a.gguf').tensors if t.name == f'blk.1.ffn_{name}.weight')
                for name in ('gate', 'up'))
    both = np.concatenate([gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in (gate, up)])
    assert np.allclose(np.square(both).mean(axis=0), 1, atol=0.05)


def test_a_gguf_is_measured_like_a_checkpoint(tmp_path):
    pytest.importorskip('gguf')
    ids = [i % V for i in range(200)]
    write_dataset(str(tmp_path / 'toy'), TOK, ids, ids, 'toy')
    path = export_gguf(our_llama(), TOK, f'{tmp_path}/a.gguf', 'q8_0', dataset=f'{tmp_path}/toy')
    model, data, tokenizer = open_model(SimpleNamespace(device='cpu'), path)
    assert data == f'{tmp_path}/toy' and tokenizer.meta() == TOK.meta()
    back, _ = KINDS['gguf'](path)
    assert torch.equal(logits_of(model, IDX), logits_of(back, IDX))
    assert quality(model, data, tokenizer, None).keys() >= {'val_loss'}

    nameless = export_gguf(our_llama(), TOK, f'{tmp_path}/b.gguf', 'q8_0')
    refuses('does not say which dataset', open_model, SimpleNamespace(device='cpu'), nameless)


def test_what_cannot_go_out(tmp_path):
    pytest.importorskip('gguf'), pytest.importorskip('safetensors')
    ours = randomise(GPT(GPTConfig(block_size=40, vocab_size=V, n_layer=1, n_head=4, n_embd=32)))
    refuses("mlp=relu2, qk_norm=True.* is not llama's", export_gguf, ours, TOK, f'{tmp_path}/a.gguf')
    refuses('qk_norm=True', export_hf, our_llama(qk_norm=True), TOK, tmp_path)
    refuses('softcap=15.0', export_hf, our_llama(softcap=15.0), TOK, tmp_path)
    refuses('int8', export_hf, convert(our_llama()), TOK, tmp_path)
    refuses('own BPE of 300 tokens', export_hf, our_llama(), train_bpe(TEXTS, V - 1), tmp_path)
    refuses('is a folder, and a GGUF is one file', export_gguf, our_llama(), TOK, str(tmp_path))
    refuses('llama.cpp knows ways to cut text', export_gguf, our_llama(), train_bpe(TEXTS, V), f'{tmp_path}/a.gguf')
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('bits, tied', [(8, False), (8, True), (4, True)])
def test_integers_go_out_as_what_they_stand_for(tmp_path, bits, tied):
    model = convert(our_llama(tie_weights=tied, n_kv_head=2), bits, search=False)
    path = f'{tmp_path}/int{bits}.safetensors'
    quantize.export(path, model, TOK.meta())
    teacher = load_teacher(path)
    block, rounded = teacher.model.transformer.h[0], model.transformer.h[0]
    assert torch.equal(block.attn.c_k.weight, rounded.attn.c_k.integers() * rounded.attn.c_k.scale[:, None])
    assert torch.equal(teacher.model.transformer.wte(IDX), model.transformer.wte(IDX))
    assert (teacher.model.lm_head.weight is teacher.model.transformer.wte.weight) == tied
    assert teacher.tokenizer.meta() == TOK.meta()
    pytest.importorskip('safetensors')
    ran('distill.py', f'--teacher={path}', f'--to_hf={tmp_path}/hf')
    assert torch.equal(logits_of(KINDS['hf'](f'{tmp_path}/hf')[0], IDX), logits_of(teacher.model, IDX))


CHATS = [[{'role': 'user', 'content': 'hi'}],
         [{'role': 'system', 'content': "it's"}, {'role': 'user', 'content': 'hi'},
          {'role': 'assistant', 'content': 'yo'}, {'role': 'user', 'content': '{{ x }}'}]]


@pytest.mark.parametrize('chat', CHATS)
@pytest.mark.parametrize('system', [None, 'Be "kind",\nisn\'t that \\ {{ it }}?'])
@pytest.mark.parametrize('names', [['<|endoftext|>', '<|im_start|>', '<|im_end|>'], None])
def test_chat_templates_say_what_the_tokenizer_says(chat, system, names):
    bytes_alone = {bytes([b]): b for b in range(256)}
    tok = BPETokenizer(bytes_alone, special_tokens=names, system=system) if names else BPETokenizer(bytes_alone)
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
    text = jinja.from_string(chat_template(tok)).render(messages=chat, add_generation_prompt=True)
    assert text == tok.decode(prompt_of(tok, chat))


# ----- teachers that are not our block

def test_a_kind_that_was_forgotten(tmp_path):
    folder = write_llama(tmp_path)
    for kind, name in (('hf', folder), ('py', write_py(tmp_path)), ('gguf', f'{tmp_path}/a.gguf')):
        refuses(f'name it as {kind}:{name}', load_teacher, name)


PY = """
import torch
from types import SimpleNamespace
torch.manual_seed(0)
table = torch.randn(64, {V})

class Model:
    config = SimpleNamespace(vocab_size={V}, block_size=32)
    def __call__(self, idx):
        # this token and those before it
        return table[idx % 64].cumsum(dim=1)

def load(device):
    return Model(), None
"""


def write_py(folder, text=PY, **change):
    text = text.replace('{V}', str(V))
    for old, new in change.get('change', []):
        assert old in text
        text = text.replace(old, new)
    (folder / 'teacher.py').write_text(text)
    return f'{folder}/teacher.py'


def test_a_python_file_teaches(tmp_path):
    model, tokenizer = load_py(write_py(tmp_path))
    assert tokenizer is None and (model.config.vocab_size, model.config.block_size) == (V, 32)
    torch.manual_seed(0)
    expected = torch.randn(64, V)[IDX % 64].cumsum(dim=1)
    assert torch.equal(logits_of(model, IDX), expected)
    # in any pieces
    states = model.trunk(IDX).flatten(0, 1)
    assert torch.equal(torch.cat([model.logits(s) for s in states.split(7)]), expected.flatten(0, 1))
    assert torch.equal(model.logits(states[[70, 3, 44]]), expected.flatten(0, 1)[[70, 3, 44]])


@pytest.mark.parametrize('change, match', [
    ([('def load', 'def lead')], 'no function load'), ([('import torch\n', 'import torch.no\n')], 'could not be run'),
    ([('return Model(), None', '1 / 0')], "load.'cpu'. of .* failed .ZeroDivisionError"),
    ([('return Model(), None', 'raise SystemExit(3)')], "failed .SystemExit: 3"),
    ([('return Model(), None', 'return Model()')], r'must return .model, tokenizer or None., not a Model'),
    ([('block_size=32', 'context=32')], r'config.block_size, whole numbers, not .300, None'),
    ([('cumsum', 'softmix')], 'cannot teach .AttributeError'), ([('table[', '0 / 0 * table[')], 'cannot teach'),
    ([('vocab_size=300', 'vocab_size=301')], r'gave .1, 8, 300. logits for 8 tokens of a vocabulary of 301'),
    ([('.cumsum(dim=1)', '.flip(1)')], 'looks ahead'), ([('Model(), None', 'Model(), 7')], 'must be one of ours')])
def test_python_files_that_do_not_teach(tmp_path, change, match):
    refuses(match, load_py, write_py(tmp_path, change=change))
    refuses('no Python file at', check_teachers, f'py:{tmp_path}/nothing.py')
    (tmp_path / 'teacher.txt').write_text(PY)
    refuses('no Python file at .*teacher.txt: py: takes one, like', check_teachers, f'py:{tmp_path}/teacher.txt')


def wrapped(model):
    return InOne(model, model, model.config.vocab_size, model.config.block_size)


@pytest.mark.parametrize('chunk', [2**27, 4 * V * 5])
def test_a_model_in_one_teaches_what_it_teaches_in_two(monkeypatch, chunk):
    monkeypatch.setattr('model.LOSS_CHUNK_BYTES', chunk)
    teacher, found = our_llama(n_kv_head=2), []
    for teachers in ([teacher], [wrapped(teacher)], [teacher, wrapped(teacher)]):
        student = our_llama()
        losses = Distiller(student, teachers)(IDX[:, :16], IDX[:, 1:17])
        losses['kl'].backward()
        found.append((losses['kl'].item(), student.lm_head.weight.grad))
    for kl, grad in found[1:]:
        assert kl == pytest.approx(found[0][0], rel=1e-5) and torch.allclose(grad, found[0][1], atol=1e-6)


@pytest.mark.parametrize('kind, more, parts', [
    ('qwen2', {}, True), ('qwen3', dict(head_dim=8), True),
    ('gemma2', dict(head_dim=8, final_logit_softcapping=3.0), False)])
def test_any_model_of_transformers_teaches(tmp_path, kind, more, parts):
    transformers = pytest.importorskip('transformers')
    shape = {key: HF_LLAMA[key] for key in HF_LLAMA if key not in ('model_type', 'hidden_act', 'rope_theta')}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape | more))
    randomise(theirs, 0.3).save_pretrained(tmp_path)
    write_gpt2_tokenizer(tmp_path, TOK)
    teacher = load_teacher(f'hf:{tmp_path}')
    with torch.no_grad():
        expected = theirs(IDX).logits
    assert far(logits_of(teacher.model, IDX), expected) < 1e-5 and teacher.tokenizer.meta() == TOK.meta()
    assert isinstance(teacher.model, InOne) != parts and teacher.model.config.block_size == 40
    weights = sum(p.numel() for p in theirs.parameters())
    assert weights < teacher.model.flops_per_token(training=False) < 3 * weights


def test_what_transformers_does_not_load(tmp_path):
    pytest.importorskip('transformers')
    folder = write_llama(tmp_path, model_type='qwen2')  # whose biases are not there
    refuses('are missing', KINDS['hf'], folder)
    refuses('does not load', KINDS['hf'], write_llama(tmp_path, model_type='nosuchthing'))
    deep = write_llama(tmp_path, llama_state(), model_type='qwen2', num_hidden_layers=10**7)
    refuses('says that it has 10000000 layers, and .* has .* tensors', KINDS['hf'], deep)
