"""
The block with a Llama's switches (swiglu, no norms of q, k and embeddings, no cap, a last gain before a tied table):
what holds for picochat's own block holds for it. tests/test_prune.py has cuts, tests/test_hub.py other people's files.
"""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, SMALL, largest_difference, randomise, train, two
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prune
from data.cache import KVCache
from data.checkpoint import load_checkpoint, load_model, save_checkpoint
from data.layouts import for_decoding
from data.loader import load_meta
from data.tokenizer import from_meta
from engine import Engine, Sampling, Speculation, decode
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
@torch.no_grad()
def test_ragged_prompts_in_chunks_and_drafts_that_are_forgotten(shape, monkeypatch):
    monkeypatch.setattr('engine.PREFILL_CHUNK', 7)
    model, x, lengths = make(**shape), ids(3), [40, 3, 24]
    more = ids(3, 5)
    whole = [model(torch.cat((row[:n], new))[None])[0] for row, n, new in zip(x, lengths, more)]
    cache = KVCache(model.config, 3, 16)
    last = Engine(model).prefill(cache, [row[:n].tolist() for row, n in zip(x, lengths)])
    assert cache.lengths == lengths
    for state, n, logits in zip(last, lengths, whole):
        assert (model.logits(state) - logits[n - 1]).abs().max() < 2e-4
    model.trunk(x[:, :6], cache)
    cache.rewind(lengths)
    for logits, n, expected in zip(model.logits(model.trunk(more, cache)), lengths, whole):
        assert (logits - expected[n:]).abs().max() < 2e-4


@pytest.mark.parametrize('bits', [0, 8, 4])
@pytest.mark.parametrize('shape', SHAPES[:2])
def test_text_does_not_depend_on_how_it_is_decoded(shape, bits):
    """Plain, arranged for decoding, with every drafter and in a batch, to the token."""
    model = make(multi_token_n=2, draft_n=2, **shape)
    model = convert(model, bits) if bits else model
    prompts, sampling = ids().tolist(), Sampling(temperature=0.9, seed=3)
    engine = Engine(for_decoding(copy.deepcopy(model)))
    texts = engine.complete(prompts, 16, sampling)
    assert texts[0] == decode(model, prompts[0], 16, sampling)
    for drafter, k in (('head', 3), ('mtp', 2), ('ngram', 7), ('random', 15)):
        assert engine.complete(prompts[:1], 16, sampling, Speculation(drafter, k)) == texts[:1], drafter
        assert engine.complete(prompts, 16, sampling, Speculation(drafter, k, adapt=False)) == texts, drafter


@pytest.mark.parametrize('bits', [8, 4])
@torch.no_grad()
def test_integers_are_the_same_bits_however_many_tokens_are_read_at_once(bits):
    model, x = convert(make(**LLAMA), bits), ids(1)
    one_by_one, *others = (
        torch.cat([model.trunk(part, cache) for part in x.split(width, dim=1)], dim=1)
        for width, cache in [(width, KVCache(model.config, 1)) for width in (1, 5, 16)])
    for other in others:
        assert torch.equal(other, one_by_one)


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
    model = load_model(f'{tmp_path}/whole/best.pt')[0]
    c = model.config
    assert (c.mlp, c.qk_norm, c.embed_norm, c.softcap, c.norm_eps, c.rope_base) == ('swiglu', False, False, 0, 1e-5, 500)
    assert c.n_hidden == 42 and 'transformer.h.0.mlp.c_gate.weight' in model.state_dict()
    assert whole['val_loss'] < log_of_vocabulary(model)


# -----------------------------------------------------------------------------
# what it costs, what is cut off, and who trains it

@pytest.mark.parametrize('shape', [dict(n_kv_head=4), *SHAPES[:2]])
def test_flops_are_those_that_torch_counts(shape):
    """To the last one, of both blocks, forward and backward."""
    model, x = make(**shape), ids(3, 64)        # as many as the context has room for
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:       # of others it does not know
        logits = model(x)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    counted = [forward.get_total_flops(), backward.get_total_flops()]
    assert counted[0] == x.numel() * model.flops_per_token(training=False)
    assert sum(counted) == x.numel() * model.flops_per_token()


def what_it_reads(model, name, x):
    """The input of the first layer's matrix of that name, for tokens x -> (x.numel(), columns)"""
    read = []
    hook = model.get_submodule(f'transformer.h.0.{name}').register_forward_hook(
        lambda module, args, out: read.append(args[0].flatten(0, 1)))
    model(x)
    hook.remove()
    return read[0]


@pytest.mark.parametrize('how, name, keep, columns', [
    ('keep_neurons', 'mlp.c_proj', list(range(0, 85, 2)), list(range(0, 85, 2))),
    ('keep_heads', 'attn.c_proj', [[1], [2]], list(range(8, 24)))])
@torch.no_grad()
def test_refit_is_the_least_squares_solution(how, name, keep, columns):
    """Of what c_proj reads in a Llama, gated hidden units for one: what is left gives nearly what the whole gave."""
    model, x = make(**LLAMA), ids(40)
    moments = prune.measure(model, [(x, x)])[1]
    cut = [prune.build(*getattr(prune, how)(model.state_dict(), model.config, [keep] * 2, *fit))
           for fit in ((moments,), ())]
    fitted, plain = (m.get_submodule(f'transformer.h.0.{name}').weight for m in cut)
    read, whole = what_it_reads(model, name, x), model.get_submodule(f'transformer.h.0.{name}').weight
    best = torch.linalg.lstsq(read[:, columns], read @ whole.T).solution.T

    def error(weight):
        return (read[:, columns] @ weight.T - read @ whole.T).square().mean()
    assert torch.equal(plain, whole[:, columns])
    assert error(fitted) < 1.01 * error(best) < 0.9 * error(plain)


def test_two_processes_and_shards_equal_one(toy, tmp_path, monkeypatch):
    """A tied model with a last gain, as SmolLM2, goes on learning from the text and from itself as it was."""
    monkeypatch.setattr('data.optimizers.fast_bf16', lambda device: False)        # Muon's bfloat16 would hide mistakes
    tokenizer = from_meta(load_meta(toy.removeprefix('--dataset=')))
    model = make(16, **LLAMA | dict(vocab_size=tokenizer.vocab_size))
    save_checkpoint(f'{tmp_path}/smol/best.pt', model, tokenizer.meta(), step=0, dataset='gone')
    train(tmp_path / 'teacher', toy, f'--init_from={tmp_path}/smol/best.pt', '--max_iters=30', '--eval_interval=30')
    args = [toy, f'--init_from={tmp_path}/teacher/best.pt', f'--teacher={tmp_path}/teacher', '--max_iters=2',
            '--total_batch_size=128', '--adam_lr=0.01']
    train(tmp_path / 'one', *args)
    for name, more in (('two', []), ('shards', ['--fsdp=True'])):
        said = two(*args, *more, f'--out_dir={tmp_path}/{name}')
        assert [p.status for p in said] == [0, 0], said[0].err + said[1].err
    one, *others = (load_checkpoint(f'{tmp_path}/{name}/ckpt.pt') for name in ('one', 'two', 'shards'))
    assert one['config']['out_proj'] and one['config']['tie_weights']
    assert largest_difference(one['model'], load_checkpoint(f'{tmp_path}/teacher/best.pt')['model']) > 0.01
    for other in others:
        for part in ('model', 'optimizers'):
            assert largest_difference(one[part], other[part]) < 1e-4
        assert abs(one['best']['loss'] - other['best']['loss']) < 1e-5
