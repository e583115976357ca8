"""
The block with a Llama's switches (swiglu, no norms of q, k and embeddings, no cap, a last gain before a tied table):
what holds for picochat's own block holds for it. tests/test_prune.py has cuts, tests/test_hub.py other people's files.
"""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, SMALL, randomise, train

from data.checkpoint import load_model
from data.layouts import for_decoding
from engine import Engine, KVCache, Sampling, Speculation, decode
from model import GPT, GPTConfig, rope_tables
from quantize import convert, export, gptq, load, prepare

SHAPES = [LLAMA, LLAMA | dict(out_proj=False, tie_weights=False, rope_base=500.0), dict(mlp='swiglu'),
          dict(qk_norm=False, softcap=0.0)]


def make(block_size=64, **shape):
    return randomise(GPT(GPTConfig(**SMALL | dict(n_kv_head=2, block_size=block_size) | shape)), std=0.3)


def ids(rows=2, n=40):
    return torch.randint(50, (rows, n), generator=torch.Generator().manual_seed(1))


def log_of_vocabulary(model):
    return math.log(model.config.vocab_size)


def llama(model, x):
    """A Llama written out from its paper (arXiv 2302.13971) in float64: ids (T,) -> logits (T, vocab_size)."""
    c, w = model.config, {name: t.double() for name, t in model.state_dict().items()}
    T, D, g = len(x), c.head_dim, c.n_head // c.n_kv_head

    def rms(x):
        return x / (x.square().mean(dim=-1, keepdim=True) + c.norm_eps).sqrt()

    def turned(x):                          # (T, heads, D), by minus the angle
        angle = torch.arange(T)[:, None, None] * c.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), dim=-1)

    h = w['transformer.wte.weight'][x]
    for i in range(c.n_layer):
        q, k, v, proj, gate, fc, mlp = (w[f'transformer.h.{i}.{name}.weight'] for name in (
            'attn.c_q', 'attn.c_k', 'attn.c_v', 'attn.c_proj', 'mlp.c_gate', 'mlp.c_fc', 'mlp.c_proj'))
        n = rms(h)
        q, k, v = ((n @ m.T).view(T, -1, D) for m in (q, k, v))
        q, k = turned(q), turned(k)
        heads = []
        for head in range(c.n_head):
            scores = q[:, head] @ k[:, head // g].T / D ** 0.5
            heads.append(scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1) @ v[:, head // g])
        h = h + torch.cat(heads, dim=1) @ proj.T
        n = rms(h)
        h = h + (F.silu(n @ gate.T) * (n @ fc.T)) @ mlp.T
    h = rms(h)
    if c.out_proj:
        h = h + h @ w['transformer.c_out.weight'].T
    return h @ w['lm_head.weight'].T


@pytest.mark.parametrize('shape', SHAPES[:2])
def test_it_is_a_llama(shape):
    model, x = make(**shape), ids(1)
    assert (model(x)[0].double() - llama(model, x[0])).abs().max() < 1e-4
    assert not torch.equal(rope_tables(model.config)[0], rope_tables(GPTConfig(**vars(model.config) | {'rope_base': 7.0}))[0])


@pytest.mark.parametrize('shape', SHAPES)
@torch.no_grad()
def test_cached_chunked_and_batched_equal_the_full_forward(shape):
    model, x = make(**shape), ids()
    for widths in ([1] * 40, [7] * 5 + [5], [30, 1, 9]):
        cache = KVCache(model.config, 2, 16)
        states = torch.cat([model.trunk(part, cache) for part in x.split(widths, dim=1)], dim=1)
        assert (model.logits(states) - model(x)).abs().max() < 2e-4


@pytest.mark.parametrize('shape', SHAPES[:2])
def test_text_does_not_depend_on_how_it_is_decoded(shape):
    """Integers: plain, arranged for decoding, with drafts and in a batch, to the token."""
    model = convert(make(multi_token_n=2, draft_n=2, **shape), 8)
    prompts, sampling = ids().tolist(), Sampling(temperature=0.9, seed=3)
    expected = decode(model, prompts[0], 16, sampling)
    engine = Engine(for_decoding(copy.deepcopy(model)))
    assert engine.complete(prompts, 16, sampling)[0] == expected
    for drafter in ('head', 'mtp', 'ngram'):
        assert engine.complete(prompts[:1], 16, sampling, Speculation(drafter, 3))[0] == expected


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('shape', SHAPES[:2])
@torch.no_grad()
def test_trained_through_the_rounding_it_is_the_file(shape, bits, tmp_path):
    model, x = make(**shape), ids()
    fake, integers = prepare(copy.deepcopy(model), bits), convert(copy.deepcopy(model), bits)
    # an activation half-way between two integers may fall to either side
    assert ((fake(x) - integers(x)).abs() < 1e-4).float().mean() > 0.9
    size = export(f'{tmp_path}/a.safetensors', integers, {'kind': 'char', 'chars': 'ab'})
    again, state = load(f'{tmp_path}/a.safetensors')
    assert state['config'] == model.config and torch.equal(again(x), integers(x))
    assert size < 1.1 * sum(t.nbytes for t in integers.state_dict().values()) + 4096


def test_gptq_is_better_than_rounding():
    model, batches = make(**LLAMA), [(ids(8), ids(8))]
    exact, error = model(ids(8)), {}
    for name, other in (('rounded', convert(copy.deepcopy(model), 4)), ('fitted', gptq(model, batches, 4))):
        error[name] = (other(ids(8)) - exact).square().mean()
    assert error['fitted'] < 0.8 * error['rounded']


def test_it_is_trained_from_scratch(toy, tmp_path):
    flags = [toy, '--mlp=swiglu', '--qk_norm=False', '--embed_norm=False', '--softcap=0', '--norm_eps=1e-5',
             '--rope_base=500']
    whole = train(tmp_path / 'whole', *flags)
    model, state = load_model(f'{tmp_path}/whole/best.pt')
    c = model.config
    assert (c.mlp, c.qk_norm, c.embed_norm, c.softcap, c.norm_eps, c.rope_base) == ('swiglu', False, False, 0, 1e-5, 500)
    assert c.n_hidden == 42 and 'transformer.h.0.mlp.c_gate.weight' in state['model']
    assert whole['val_loss'] < log_of_vocabulary(model)
