"""Teachers' files: what nanochat, GPT-2 and Hugging Face say of the same weights and texts, and what is refused."""
import json
import math
import os
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (TEXTS, TINY, TOK, V, Evil, far, logits_of, nanogpt_state, randomise,
                      reference_forward, refuses, result_of, run, write_gpt2_tokenizer, write_hf_gpt2, write_llama,
                      write_nanogpt)

from data.checkpoint import load_model, save_checkpoint
from data.foreign.gpt2 import load_gpt2
from data.foreign.llama import load_llama
from data.foreign.nanochat import NANOCHAT, fetch_nanochat, load_nanochat, random_teacher
from data.foreign_tokenizer import hf_folder_tokenizer
from data.teachers import check_teachers, load_teacher
from data.tokenizer import CharTokenizer, fingerprint, train_bpe
from data.writer import write_dataset
from model import GPT, GPTConfig, rope_tables

GOLDEN = '../shared/data/nanochat_e0'


@pytest.fixture
def ours():
    return randomise(GPT(GPTConfig(block_size=40, vocab_size=V, n_layer=1, n_head=4, n_embd=32)))


# ----- nanochat

E0 = dict(sequence_len=40, vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


def e0_state(rows=V, prefix=''):
    """Random weights under nanochat's names; rows beyond V are padding."""
    torch.manual_seed(0)
    state = {'transformer.wte.weight': torch.randn(rows, 32).bfloat16(), 'lm_head.weight': torch.randn(rows, 32)}
    for i in range(2):
        for name, shape in (
                ('attn.c_q', (32, 32)), ('attn.c_k', (16, 32)), ('attn.c_v', (16, 32)), ('attn.c_proj', (32, 32)),
                ('mlp.c_fc', (128, 32)), ('mlp.c_proj', (32, 128))):
            state[f'transformer.h.{i}.{name}.weight'] = 0.3 * torch.randn(shape)
    return {prefix + k: v for k, v in state.items()}


def write_nanochat(folder, bpe, state=None, step=7, home=None, **meta):
    home = home or folder
    for path in (folder, home):
        os.makedirs(path, exist_ok=True)
    torch.save(e0_state() if state is None else state, f'{folder}/model_{step:06d}.pt')
    json.dump({'model_config': E0 | meta}, open(f'{folder}/meta_{step:06d}.json', 'w'))
    pickle.dump(bpe._encoding, open(f'{home}/tokenizer.pkl', 'wb'))
    torch.save(torch.tensor(bpe.token_bytes, dtype=torch.int32), f'{home}/token_bytes.pt')
    return str(folder)


# padding is cut off, also where the settings count it: the tokenizer knows how many tokens there are
@pytest.mark.parametrize('rows, prefix, meta', [
    (V, '', {}), (V, '_orig_mod.', {}), (V, 'module._orig_mod.', {}), (320, '', {}), (320, '', dict(vocab_size=320))])
def test_nanochat(tmp_path, bpe, rows, prefix, meta):
    state = e0_state(rows, prefix)
    model, tokenizer = load_nanochat(write_nanochat(tmp_path, bpe, state, **meta))
    idx, plain = torch.randint(V, (2, 40)), {name[len(prefix):]: t for name, t in state.items()}
    config = GPTConfig(40, rows, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, rope_bf16=True)
    expected = torch.stack([reference_forward(config, plain, row)[:, :V] for row in idx])
    assert far(logits_of(model, idx), expected) < 1e-4
    # without the rounding of the tables to bfloat16 the logits differ
    model.cos, model.sin = rope_tables(replace(model.config, rope_bf16=False))
    assert far(logits_of(model, idx), expected) > 1e-3
    assert fingerprint(tokenizer) == fingerprint(bpe)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.params()['total'] == 2 * V * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 8 * 32 * 32)


@pytest.mark.skipif(not os.path.isdir(GOLDEN), reason='no nanochat files here')
def test_nanochats_own_logits():
    golden = torch.load(f'{GOLDEN}/golden.pt', weights_only=True)
    model, tokenizer = load_nanochat(GOLDEN)
    assert far(logits_of(model, golden['x']), golden['logits']) < 1e-5
    model.cos, model.sin = rope_tables(replace(model.config, rope_bf16=False))
    assert far(logits_of(model, golden['x']), golden['logits']) > 1e-3
    assert tokenizer.encode(golden['text']) == golden['ids']


def test_steps_and_places(tmp_path, bpe):
    folder, home = tmp_path / 'base_checkpoints' / 'd2', tmp_path / 'tokenizer'
    first, second = e0_state(), {k: 2 * v for k, v in e0_state().items()}
    write_nanochat(folder, bpe, first, 90, home)
    write_nanochat(folder, bpe, second, 1000, home)
    model, tokenizer = load_nanochat(str(folder))
    assert torch.equal(model.lm_head.weight, second['lm_head.weight']) and tokenizer.vocab_size == V


def test_token_bytes(tmp_path, bpe):
    folder = write_nanochat(tmp_path, bpe)
    as_text = [len(bpe.decode([i]).encode()) if n else 0 for i, n in enumerate(bpe.token_bytes)]
    # they differ for a token that is half a character: it is 1 byte, but as text it becomes U+FFFD, which is 3
    assert as_text != bpe.token_bytes
    torch.save(torch.tensor(as_text), f'{folder}/token_bytes.pt')
    load_nanochat(folder)
    for other in (bpe.token_bytes[:-1], [1] * V, bpe.token_bytes[::-1]):
        torch.save(torch.tensor(other), f'{folder}/token_bytes.pt')
        refuses('do not belong together', load_nanochat, folder)
    os.remove(f'{folder}/token_bytes.pt')
    load_nanochat(folder)
    pickle.dump(train_bpe(TEXTS, V - 1)._encoding, open(f'{folder}/tokenizer.pkl', 'wb'))
    refuses(f'{V - 1} tokens.*do not belong together', load_nanochat, folder)


VALUES, GATE = 'value_embeds.1.weight', 'transformer.h.1.attn.ve_gate.weight'


@pytest.mark.parametrize('era, keys', [
    ('E1', {'resid_lambdas': (2,), 'x0_lambdas': (2,)}),
    ('E2', {'resid_lambdas': (2,), VALUES: (V, 16), GATE: (2, 32)}),
    ('January', {'resid_lambdas': (2,), 'bigram_embed.weight': (V, 16), VALUES: (V, 16)}),
    ('E3', {'resid_lambdas': (2,), VALUES: (V, 16), GATE: (2, 12)}),
    ('E4', {'smear_gate.weight': (1, 24), 'resid_lambdas': (2,), VALUES: (V, 16), GATE: (2, 12)}),
    ('gpt2:PATH', {'transformer.h.0.attn.c_attn.weight': (96, 32)})])
def test_later_eras_are_refused_by_name(tmp_path, bpe, era, keys):
    for prefix in ('', '_orig_mod.'):
        state = e0_state(prefix=prefix) | {prefix + k: torch.zeros(shape) for k, shape in keys.items()}
        refuses(era, load_nanochat, write_nanochat(tmp_path, bpe, state))


@pytest.mark.parametrize('change, meta, match', [
    (lambda w: {name: w[name] for name in w if 'lm_head' not in name}, {}, 'lm_head.weight is missing'),
    (lambda w: e0_state(350), {}, r'wte.weight is \(350, 32\)'),
    (lambda w: [1], {}, 'not a whole nanochat'),
    (lambda w: w, {'n_layer': 3}, 'its n_layer is 3, and its 14 tensors are those of at most 2'),
    (lambda w: w, {'n_head': 5}, 'n_head .5. must be|n_embd')])
def test_tensors_that_do_not_fit_their_settings(tmp_path, bpe, change, meta, match):
    refuses(match, load_nanochat, write_nanochat(tmp_path, bpe, change(e0_state()), **meta))


def test_fetch(server, tmp_path, bpe):
    there, here = str(tmp_path / 'there'), str(tmp_path / 'here')
    write_nanochat(there, bpe, step=650)
    names = sorted(os.listdir(there))
    server.pages = {f'/karpathy/nanochat-d32/resolve/main/{name}': {
        'body': open(f'{there}/{name}', 'rb').read(), 'headers': {'ETag': f'"{name}"'}}
                    for name in names}
    server.pages['/karpathy/nanochat-d32/resolve/main/model_000650.pt']['cuts'] = [20_000]
    refuses('cut short', fetch_nanochat, 'd32', here, server.url)
    assert 'model_000650.pt' not in os.listdir(here)
    assert fetch_nanochat('d32', here, server.url) == here and sorted(os.listdir(here)) == names
    assert server.asked[-1][0].endswith('model_000650.pt') and server.asked[-1][1].startswith('bytes=')
    model, tokenizer = load_nanochat(here)
    assert torch.equal(model.lm_head.weight, e0_state()['lm_head.weight'])
    assert fingerprint(tokenizer) == fingerprint(bpe)
    refuses('answered 404', fetch_nanochat, 'd34', here, server.url)
    refuses('one of d32, d34', fetch_nanochat, 'd20', here, server.url)


@pytest.mark.parametrize('name, n', [('d20', 560_988_160), ('d32', 1_879_048_192), ('d34', 2_217_082_880)])
def test_random_teachers_have_nanochats_shapes(name, n):
    model, tokenizer = random_teacher(name, 'meta')
    assert tokenizer is None and model.params()['total'] == n
    assert model.config.block_size == 2048 and model.config.head_dim == 128
    if name in NANOCHAT:
        assert NANOCHAT[name]['params'] == n
        assert NANOCHAT[name]['bytes'] == sum(p.numel() * (2 if 'wte' in k else 4)
                                              for k, p in model.named_parameters())


def test_a_random_teacher_teaches(tmp_path):
    """The step of the ten-dollar run, small: its FLOPs are the student's for training and the teacher's forward."""
    tokenizer = CharTokenizer(chr(i + 2048 * (i >= 0xd800)) for i in range(65536))
    write_dataset(str(tmp_path / 'data'), tokenizer, np.arange(2000), np.arange(40), source='toy')
    got = run('train.py', *TINY, f'--dataset={tmp_path}/data', f'--out_dir={tmp_path}/out', '--teacher=random:d2',
              '--n_kv_head=1', '--multi_token_n=1', '--draft_n=2', '--max_iters=2', '--eval_interval=0')
    assert got.status == 0 and 'teacher random' not in got.out, got.err  # it need not know the text
    done = result_of(got)
    student, teacher = load_model(f'{tmp_path}/out/best.pt')[0], random_teacher('d2', 'meta')[0]
    teacher.config.block_size = 16
    assert re.search(r'step 2/2 \| loss ce [\d.]+ \+ kl [\d.]+ \+ multi_token [\d.]+ \+ draft [\d.]+ ', got.out)
    assert done['flops'] == done['tokens'] * (student.flops_per_token() + teacher.flops_per_token(training=False))


@pytest.mark.parametrize('spec, dataset, has_tokenizer', [
    ('{}', 'toy', True), ('{}/best.pt', 'toy', True), ('nanochat:{}/d2/', None, True), ('gpt2:{}/ckpt.pt', None, False),
    ('random:d2', None, False)])
def test_load_teacher(tmp_path, bpe, ours, spec, dataset, has_tokenizer):
    save_checkpoint(f'{tmp_path}/best.pt', ours, bpe.meta(), dataset='toy')
    write_nanochat(tmp_path / 'd2', bpe)
    write_nanogpt(tmp_path / 'ckpt.pt')
    spec = spec.format(tmp_path)
    teacher = load_teacher(spec)
    assert (teacher.name, teacher.dataset, teacher.hold_out) == (spec, dataset, '')
    assert (teacher.tokenizer is not None) == has_tokenizer
    model, idx = teacher.model, torch.arange(10)[None]
    logits = logits_of(model, idx)
    assert logits.shape == (1, 10, model.config.vocab_size) and logits.dtype == torch.float32 and logits.std() > 0.1
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    blocks = sum(p.numel() for n, p in model.named_parameters() if '.h.' in n)
    assert model.flops_per_token(training=False) > 2 * blocks and model.config.block_size >= 10
    if dataset:
        assert torch.equal(logits, logits_of(ours, idx))
    files = check_teachers(spec)
    assert len(files) == (not spec.startswith('random')) and all(map(os.path.isfile, files))


@pytest.mark.parametrize('spec, match', [
    ('{}/nothing', 'no teacher at'), ('gpt2:{}/nothing', 'no GPT-2 at'), ('gpt2:{}/d2', 'no GPT-2 at'),
    ('gpt2:{}/best.pt', 'not a whole'), ('random:d3', 'random:d32')])
def test_what_is_no_teacher(tmp_path, bpe, ours, spec, match):
    save_checkpoint(f'{tmp_path}/best.pt', ours, bpe.meta(), dataset='toy')
    write_nanochat(tmp_path / 'd2', bpe)
    refuses(match, load_teacher, spec.format(tmp_path))


# ----- GPT-2 and nanoGPT

def nanogpt_forward(w, idx, gelu='none'):
    T = idx.size(1)
    norm = lambda x, name: F.layer_norm(x, (32,), w[f'transformer.{name}.weight'], w.get(f'transformer.{name}.bias'))
    linear = lambda x, name: F.linear(x, w[f'transformer.{name}.weight'], w.get(f'transformer.{name}.bias'))
    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:T]
    for i in range(2):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2)
                   for t in linear(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn').split(32, dim=-1))
        scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f'h.{i}.attn.c_proj')
        x = x + linear(F.gelu(linear(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc'), approximate=gelu), f'h.{i}.mlp.c_proj')
    return norm(x, 'ln_f') @ w['lm_head.weight'].T


@pytest.mark.parametrize('bias, tied, prefix', [
    (True, True, ''), (False, False, '_orig_mod.'), (False, True, 'module.'), (True, False, '_orig_mod.module.')])
def test_nanogpt(tmp_path, bias, tied, prefix):
    w = nanogpt_state(bias, tied)
    masks = {f'transformer.h.{i}.attn.bias': torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    path = write_nanogpt(tmp_path / 'ckpt.pt', w | masks, prefix, bias=bias)
    idx = torch.randint(50, (3, 24))
    for spec in (path, str(tmp_path)):
        model, tokenizer = load_gpt2(spec)
        logits = logits_of(model, idx)
        assert far(logits, nanogpt_forward(w, idx)) < 1e-4
        # so it does tell the two kinds of GELU apart
        assert far(logits, nanogpt_forward(w, idx, 'tanh')) > 1e-4
        assert tokenizer is None and (model.lm_head.weight is model.transformer.wte.weight) == tied
        expected = sum(t.numel() for t in w.values()) - (50 * 32 if tied else 0)
        assert sum(p.numel() for p in model.parameters()) == expected


def test_nanogpts_padding_is_cut_off(tmp_path):
    w = nanogpt_state() | {'transformer.wte.weight': torch.randn(50304, 32)}
    w['lm_head.weight'] = w['transformer.wte.weight']
    model, _ = load_gpt2(write_nanogpt(tmp_path / 'ckpt.pt', w, vocab_size=50304))
    assert model.config.vocab_size == 50257 and model.lm_head.weight is model.transformer.wte.weight
    idx = torch.randint(50257, (1, 24))
    assert far(logits_of(model, idx), nanogpt_forward(w, idx)[..., :50257]) < 1e-4


def write_ckpt(folder, **args):
    return write_nanogpt(folder / 'ckpt.pt', **args)


@pytest.mark.parametrize('write, args, match', [
    (write_ckpt, dict(use_rmsnorm=True), 'use_rmsnorm=True'),
    (write_ckpt, dict(n_layer=3), 'h.2.ln_1.weight is missing'),
    (write_ckpt, dict(n_layer=1), 'h.1.ln_1.weight is unknown'),
    (write_hf_gpt2, dict(activation_function='relu'), 'activation_function='),
    (write_hf_gpt2, dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=')])
def test_odd_gpt2s(tmp_path, write, args, match):
    refuses(match, load_gpt2, write(tmp_path, **args))


@pytest.mark.parametrize('settings', [V, 384])
@pytest.mark.parametrize('write', [write_ckpt, write_hf_gpt2])
def test_gpt2s_padding_is_cut_off(tmp_path, write, settings):
    write_gpt2_tokenizer(tmp_path, TOK)
    w = nanogpt_state() | {'transformer.wte.weight': torch.randn(384, 32)}
    w['lm_head.weight'] = w['transformer.wte.weight']
    if write is write_ckpt:
        write_ckpt(tmp_path, state=w, vocab_size=settings)
    else:
        write_hf_gpt2(tmp_path, vocab_size=settings)
        stored = torch.load(tmp_path / 'pytorch_model.bin', weights_only=True)
        torch.save(stored | {'wte.weight': w['transformer.wte.weight']}, tmp_path / 'pytorch_model.bin')
    model, tokenizer = load_gpt2(str(tmp_path))
    assert tokenizer.vocab_size == model.config.vocab_size == V == len(model.lm_head.weight)
    idx = torch.randint(V, (1, 24))
    expected = nanogpt_forward(w, idx, 'none' if write is write_ckpt else 'tanh')[..., :V]
    assert far(logits_of(model, idx), expected) < 1e-4


@pytest.mark.parametrize('how', [
    {}, dict(tie_word_embeddings=False, activation_function='gelu', layer_norm_epsilon=1e-3, n_inner=40)])
def test_gpt2_equals_transformers(tmp_path, how):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=24, n_layer=2, n_head=4, n_embd=32, **how)))
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / 'model.safetensors').exists()
    idx = torch.randint(50, (3, 24))
    with torch.no_grad():
        expected = theirs(idx).logits
    assert expected.std() > 0.1 and far(logits_of(load_gpt2(str(tmp_path))[0], idx), expected) < 1e-4


@pytest.mark.parametrize('name, load, write', [
    ('model_000007.pt', load_nanochat, write_nanochat), ('ckpt.pt', load_gpt2, lambda folder, bpe: write_ckpt(folder)),
    ('pytorch_model.bin', load_gpt2, lambda folder, bpe: write_hf_gpt2(folder)),
    ('pytorch_model.bin', load_llama, lambda folder, bpe: write_llama(folder))])
def test_every_loader_comes_to_the_guards(tmp_path, bpe, name, load, write):
    """In files of torch before 1.6, which are no zip archives, too. What else they refuse is in test_checkpoint.py."""
    folder = tmp_path / 'at'
    folder.mkdir()
    write(folder, bpe)
    path = folder / name
    before = {name: t.clone() for name, t in load(str(folder))[0].state_dict().items()}
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    weights = state.get('model', state)
    key = next(key for key in weights if '1.mlp' in key and key.endswith('weight'))
    one = weights[key].clone()
    one[2, 1] = -math.inf

    def save(change, old):
        changed = weights | change  # nanoGPT's are one part of several
        torch.save(state | {'model': changed} if 'model' in state else changed, path,
                   _use_new_zipfile_serialization=not old)
    for old in (False, True):
        save({}, old)
        assert all(torch.equal(t, before[name]) for name, t in load(str(folder))[0].state_dict().items())
        for change, match in (({key: one}, '1 of the .* numbers of .*1.mlp.* are NaN or infinite'),
                              ({key: torch.zeros(3, 3)}, r'1.mlp.* is \(3, 3\) instead of'),
                              ({'extra': torch.zeros(1)}, 'extra is unknown'),
                              ({'extra': Evil(tmp_path / 'made')}, 'it names posix.mkdir')):
            save(change, old)
            refuses(f'{name} .*{match}', load, str(folder))
    at = len(whole) // 2
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    for damaged, match in ((whole[:len(whole) // 2], 'not a whole'), (b'', 'not a whole'), (flipped, 'damaged')):
        path.write_bytes(damaged)
        refuses(f'{name} is {match}', load, str(folder))
    assert not (tmp_path / 'made').exists()


def test_gpt2_tokenizer(tmp_path):
    assert hf_folder_tokenizer(tmp_path) is None
    write_gpt2_tokenizer(tmp_path, TOK)
    assert fingerprint(hf_folder_tokenizer(tmp_path)) == fingerprint(TOK)
    # the one file that the hub has of gpt2, older than the key use_regex
    vocab = json.loads((tmp_path / 'vocab.json').read_text())
    lines = (tmp_path / 'merges.txt').read_text(encoding='utf-8').split('\n')
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one' / 'tokenizer.json').write_text(json.dumps({
        'added_tokens': [{'id': vocab.pop('<|endoftext|>'), 'content': '<|endoftext|>'}], 'normalizer': None,
        'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True},
        'model': {'vocab': vocab, 'merges': lines[1:-1]}}))
    assert fingerprint(hf_folder_tokenizer(tmp_path / 'one')) == fingerprint(TOK)
    (tmp_path / 'merges.txt').write_text('\n'.join(lines[:1] + lines[2:3] + lines[1:2] + lines[3:]), encoding='utf-8')
    refuses("GPT-2's manner", hf_folder_tokenizer, tmp_path)
    refuses("GPT-2's manner", load_gpt2, write_hf_gpt2(tmp_path))
