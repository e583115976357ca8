"""
data/kernels.py: integers in C++ give PyTorch's products to the bit, whatever is read with them; and prompt lookup.
"""
import copy
import random
from types import SimpleNamespace

import pytest
import torch

import data.kernels as K
from conftest import CHAR, build, randomise, refuses
from data.cache import KVCache
from data.drafters import Index
from data.layouts import for_decoding, for_measuring, step_of
from data.rounding import IntLinear, convert, round_weight
from data.sampling import draw
from engine import Engine, Sampling, Speculation, decode, rounds_pay, step_plain
from model import GPT, GPTConfig, evaluate
from quantize import compare, export, load

needs_kernels = pytest.mark.skipif(K.library() is None, reason='kernels.cpp needs a C++ compiler')
SHAPES = {
    # 64, 16 and 8: kernels.cpp takes each in another way; whoever decodes drops nothing
    'ours': dict(n_kv_head=1, head_dim=88, dropout=0.1),
    'a Llama': dict(mlp='swiglu', qk_norm=False, embed_norm=False, softcap=0.0, norm_eps=1e-5, out_proj=True,
                    n_kv_head=2, hadamard=32)}


def two(shape, bits, tables_bits=8):
    model = randomise(GPT(GPTConfig(block_size=120, vocab_size=96, n_layer=2, n_head=4, n_embd=64, n_hidden=128,
                                    multi_token_n=2, draft_n=2, **SHAPES[shape])), std=0.12)
    plain = convert(model, bits, tables_bits=tables_bits)
    return plain, for_decoding(copy.deepcopy(plain))


@needs_kernels
@pytest.mark.parametrize('bits, group, cols', [(8, 32, 7), (8, 32, 192), (4, 32, 192), (4, 64, 128), (4, 128, 256)])
def test_a_product_is_the_same_bits(bits, group, cols, monkeypatch):
    torch.manual_seed(0)
    linear = IntLinear.holding(round_weight(torch.randn(21, cols), bits, group))
    fast = K.KernelLinear(linear)
    for rows, exact in [(n, True) for n in (1, 2, 3, 4, 5, 6, 9, K.ROWS, K.ROWS + 1, 200)] + [(200, False)]:
        monkeypatch.setattr(K, 'INT_MM_IS_EXACT', exact)  # if not, the kernels multiply any number of rows
        x = 10 * torch.randn(1, rows, cols)
        x[0, 0] = 0
        x[0, -1] = 10 * x[0, -1].sign()  # all at the edge
        rest = torch.randn(1, rows, 21)
        assert torch.equal(fast(x), linear(x))
        assert torch.equal(fast.read(x, rest=rest), rest + linear(x))


@needs_kernels
@pytest.mark.parametrize('name, value', [('bits', 3), ('group', 16), ('step', -19), ('step', 19)])
def test_integers_that_the_kernels_do_not_know_are_left_to_pytorch(name, value):
    linear = IntLinear.holding(round_weight(torch.randn(8, 128), 4))
    assert K.KernelLinear.fits(linear)
    setattr(linear, name, torch.full_like(linear.step, value) if name == 'step' else value)
    assert not K.KernelLinear.fits(linear)


@needs_kernels
@pytest.mark.parametrize('what, reads', [
    (K.NORM, lambda x: torch.nn.functional.rms_norm(x, (96,), eps=1e-5)), (K.RELU2, lambda x: x.relu().square()),
    (K.SWIGLU, lambda x: torch.nn.functional.silu(x[..., :96]) * x[..., 96:])])
def test_what_a_matrix_reads(what, reads):
    x = 5 * torch.randn(200, 192 if what == K.SWIGLU else 96)
    linear = IntLinear.holding(round_weight(torch.eye(96)))
    fast = K.KernelLinear(linear)
    got, expected = fast.read(x, what, 1e-5), linear(reads(x))
    assert ((got - expected).abs() < 1e-5 * expected.abs().amax(dim=-1, keepdim=True)).float().mean() > 0.999
    assert torch.equal(torch.cat([fast.read(few, what, 1e-5) for few in x.split(7)]), got)


@needs_kernels
@pytest.mark.parametrize('cache', [torch.float32, torch.int8])
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('shape', SHAPES)
@torch.inference_mode()
def test_it_is_the_same_block(shape, bits, cache):
    plain, fast = two(shape, bits)
    assert step_of(plain) == 'PyTorch' and step_of(fast) == 'kernels'
    ids = torch.randint(96, (3, 100))

    def states(model, widths, rows=slice(None), size=None):
        kept = KVCache(model.config, len(ids[rows]), size, cache)
        parts = ids[rows].split(widths, dim=1)
        return torch.cat([model.trunk(part, kept) for part in parts], dim=1)
    one_by_one = states(fast, [1] * 100)
    near = (one_by_one - states(plain, [1] * 100)).abs().amax(dim=-1) < 1e-4
    assert near.float().mean() > 0.5  # where an activation fell to the other side, it is not
    for widths in ([100], [40, 5, 16, 15, 9, 1, 14], [17, 83]):
        assert torch.equal(states(fast, widths, size=10), one_by_one)
    assert torch.equal(states(fast, [40, 7, 53], slice(1, 2)), one_by_one[1:2])
    kept = KVCache(fast.config, 3, None, cache)  # rows of different lengths go on by many tokens
    fast.trunk(ids[:, :40], kept)
    kept.rewind([3, 40, 17])
    longer = torch.stack([row[n:n + 60] for row, n in zip(ids, kept.lengths)])
    expected = torch.stack([row[n:n + 60] for row, n in zip(one_by_one, (3, 40, 17))])
    assert torch.equal(fast.trunk(longer, kept), expected)
    # ids that lie otherwise in memory
    assert torch.equal(fast.trunk(ids.t().contiguous().t(), KVCache(fast.config, 3, None, cache)), one_by_one)


@needs_kernels
@pytest.mark.parametrize('shape, bits', [('ours', 8), ('a Llama', 4)])
def test_text_of_many_rows_and_of_an_int8_cache(shape, bits):
    fast, prompt = two(shape, bits)[1], [CHAR.encode('to be')]
    many = Engine(fast).complete(prompt, 20, Sampling(0.8, seed=3), num_samples=K.ROWS + 4)
    assert many[:1] == Engine(fast).complete(prompt, 20, Sampling(0.8, seed=3))
    small = Engine(fast, cache_dtype=torch.int8)
    assert small.complete(prompt, 20, speculation=Speculation('random', 4)) == small.complete(prompt, 20)


@needs_kernels
@pytest.mark.parametrize('shape', SHAPES)
def test_a_matrix_of_4_bits_that_the_kernels_do_not_know_is_one_of_8_bits(shape):
    model = two(shape, 4)[0]
    linear, x = model.transformer.h[1].mlp.c_proj, torch.randn(3, 128)
    linear.step = torch.full_like(linear.step, 19)
    fast = for_decoding(copy.deepcopy(model))
    its = fast.transformer.h[0].blocks[1].mlp.c_proj
    assert step_of(fast) == 'kernels' and its.group == 0 and torch.equal(its(x), linear(x))


@pytest.mark.parametrize('shape, bits', [('ours', 8), ('a Llama', 4)])
def test_measuring_gives_the_same_loss(shape, bits):
    plain, x = two(shape, bits)[0], torch.randint(20, (3, 4, 101), generator=torch.Generator().manual_seed(0))
    batches, sizes = [(rows[:, :-1], rows[:, 1:]) for rows in x], [1] * plain.config.vocab_size
    fast = for_measuring(copy.deepcopy(plain))
    assert compare(plain, [fast], batches, sizes)[0]['max_kl'] == 0  # first: evaluate ends what drops things
    assert evaluate(fast, batches, sizes) == evaluate(plain, batches, sizes)
    floats = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16))
    assert for_measuring(floats) is floats


@needs_kernels
@pytest.mark.parametrize('shape, bits, tables_bits', [('ours', 8, 8), ('a Llama', 4, 4)])
@pytest.mark.parametrize('sampling', [Sampling(0), Sampling(0.7, seed=2), Sampling(0.9, top_k=3)])
@pytest.mark.parametrize('cache', [torch.float32, torch.int8])
def test_a_round_is_its_steps(shape, bits, tables_bits, sampling, cache, monkeypatch):
    """Tokens drawn in one call are those of the plain decoder, whatever the rounds; so are the states, to the bit."""
    model = two(shape, bits, tables_bits)[1]
    model.config.softcap /= 30                  # so that logits feel it
    with monkeypatch.context() as m:
        m.setattr(K.KernelRound, 'pays', staticmethod(lambda *args: False))
        expected, = Engine(model, cache_dtype=cache).complete([[1, 2, 3]], 100, sampling)
    assert cache == torch.int8 or expected == decode(model, [1, 2, 3], 100, sampling)
    rounds, usual = [], K.KernelRound.__call__

    def step_by_step(self, cache, last, noise):
        """The same round by steps of the same model, on a cache of its own."""
        rounds.append(noise.size(1))
        other = copy.deepcopy(cache)
        got = usual(self, cache, last, noise)
        steps = step_plain(model, other, last, noise, lambda *args: draw(*args, sampling))
        assert all(torch.equal(a, b) for a, b in zip(got, steps)) and other.lengths == cache.lengths
        return got
    monkeypatch.setattr(K.KernelRound, '__call__', step_by_step)
    for n in (0, 4, 8):
        engine = Engine(model, cache_dtype=cache)
        assert engine.complete([[1, 2, 3]], 100, sampling, Speculation('none', n=n)) == [expected]
        stopped, = engine.complete([[1, 2, 3]], 100, sampling, stop=[expected[20]])
        assert stopped == expected[:expected.index(expected[20]) + 1]
    assert {1, 5, 9} <= set(rounds)


@needs_kernels
def test_what_a_round_does_not_know_is_decoded_by_steps(monkeypatch):
    model = two('ours', 8)[1]
    assert K.KernelRound.pays(model, Sampling(top_k=5))
    assert not K.KernelRound.pays(model, Sampling(top_p=0.9)) and not K.KernelRound.pays(model, Sampling(min_p=0.1))
    assert not K.KernelRound.pays(two('ours', 8)[0], Sampling())
    monkeypatch.setattr(K.KernelRound, '__call__', None)        # whoever calls it fails
    Engine(model).complete([[1, 2, 3]] * 2, 10)
    Engine(model).complete([[1, 2, 3]], 10, speculation=Speculation('head'))
    monkeypatch.setattr(K.KernelRound, 'MOST', 1000)
    assert not K.KernelRound.pays(model, Sampling())


@needs_kernels
@pytest.mark.parametrize('shape, bits', [('ours', 8), ('a Llama', 4)])
def test_a_file_is_in_memory_once(shape, bits, tmp_path):
    plain, path = two(shape, bits)[0], f'{tmp_path}/m.safetensors'
    export(path, plain, CHAR.meta())
    loaded = load(path)[0]
    memory = loaded.transformer.wte.weight.untyped_storage().data_ptr()
    fast = for_decoding(loaded)
    for block in fast.transformer.h[0].blocks:
        for matrix in (block.attn.c_qkv, block.attn.c_proj, block.reader, block.mlp.c_proj):
            buffers = list(matrix.linear.buffers())
            assert len(buffers) == (2 if bits == 8 else 3)
            assert {t.untyped_storage().data_ptr() for t in buffers} == {memory}
    assert Engine(fast).complete([[1, 2]], 30) == Engine(for_decoding(plain)).complete([[1, 2]], 30)


def test_without_a_compiler_it_is_pytorch(monkeypatch):
    monkeypatch.setattr(K, 'library', lambda: None)
    plain, fast = two('ours', 4)
    assert step_of(fast) == 'PyTorch'
    assert Engine(fast).complete([[1, 2]], 30) == Engine(plain).complete([[1, 2]], 30)


def test_a_file_drafts_among_the_first_tokens_without_a_compiler(tmp_path):
    """Of lm_head and of its first rows, whose scales begin at one place in memory, each keeps its own."""
    plain, path = two('ours', 8)[0], f'{tmp_path}/m.safetensors'
    export(path, plain, CHAR.meta())
    fast = for_decoding(load(path)[0], draft_vocab=30, kernels=False)
    drafting = Engine(fast).complete([[1, 2]], 30, speculation=Speculation('head'))
    assert drafting == Engine(plain).complete([[1, 2]], 30)


@needs_kernels
def test_whole_rounds_are_compiled_of_few_layers_only(capsys):
    refuses('kernels=False', Engine, two('ours', 8)[1], compile=True)
    assert not rounds_pay(SimpleNamespace(config=GPTConfig(n_layer=30)))
    assert rounds_pay(build()) and 'whole rounds of 30 layers' in capsys.readouterr().err


def look_up(text, k, longest=8):
    """What Index.look_up gives, by going through the whole text."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        for at in range(len(text) - n - 1, -1, -1):
            if text[at:at + n] == text[-n:]:
                return n, text[at + n:at + n + k]
    return 0, []


def test_the_index_finds_what_a_search_finds():
    rng = random.Random(0)
    for _ in range(50):
        text = rng.choices(range(4), k=rng.randrange(1, 6))
        index = Index(text, 8)
        for _ in range(20):
            assert index.look_up(4) == look_up(text, 4)
            text += rng.choices(range(4), k=rng.randrange(1, 4))
