"""engine.py: cached = chunked = batched = full forward; the sampling law; whole characters."""
import math
from collections import Counter

import pytest
import torch

import engine as E
import quantize as Q
from data.tokenizer import BPETokenizer, CharTokenizer
from engine import Engine, KVCache, draw, gumbel, noise_keys
from model import GPT, GPTConfig
from test_model import randomise

CHAR = CharTokenizer('\n' + ''.join(map(chr, range(32, 127))))
BPE = BPETokenizer({bytes([b]): b for b in range(256)} | {b'th': 256, b'the': 257, b' the': 258}, special_tokens=['<|bos|>'])


def build(tokenizer=CHAR, kv=4, block_size=300):
    return randomise(GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=4, n_embd=32, n_kv_head=kv)))


MODELS = [(CHAR, 4), (CHAR, 2), (CHAR, 1), (BPE, 4), (BPE, 1)]


@pytest.mark.parametrize('tokenizer, kv', MODELS)
def test_cached_and_chunked_equal_the_full_forward(tokenizer, kv):
    model = build(tokenizer, kv)
    ids = torch.randint(tokenizer.vocab_size, (3, 280))
    with torch.no_grad():
        full = model(ids)
        for chunks in ([1] * 280, [7] * 40, [100, 1, 1, 90, 60, 28]):
            cache, at, out = KVCache(model.config, 3, max_tokens=10), 0, []         # it grows as it goes
            for n in chunks:
                out.append(model.logits(model.trunk(ids[:, at:at + n], cache)))
                at += n
            assert torch.allclose(torch.cat(out, 1), full, atol=1e-4)


@pytest.mark.parametrize('kv', [4, 2, 1])
@pytest.mark.parametrize('ragged', [False, True])
def test_ragged_rows_and_rewind_equal_the_full_forward(kv, ragged):
    model = build(kv=kv)
    ids = torch.randint(96, (3, 90))
    lengths = [40, 3, 77] if ragged else [40, 40, 40]
    with torch.inference_mode():
        cache, _ = Engine(model).prefill([ids[b, :n].tolist() for b, n in enumerate(lengths)], 90)
        assert cache.lengths == lengths
        junk = torch.randint(96, (3, 6))
        model.trunk(junk, cache)                                                    # drafts that were wrong ...
        cache.rewind(lengths)                                                       # ... and are forgotten
        new = torch.stack([ids[b, n:n + 5] for b, n in enumerate(lengths)])
        got = model.logits(model.trunk(new, cache))
        for b, n in enumerate(lengths):
            assert torch.allclose(got[b], model(ids[b:b + 1, :n + 5])[0, n:], atol=1e-4)
        cache.keep([2, 0])
        got = model.logits(model.trunk(ids[[2, 0], :1], cache))
        assert torch.allclose(got[1, 0], model(torch.cat((ids[:1, :45], ids[:1, :1]), 1))[0, 45], atol=1e-4)


@pytest.mark.parametrize('kv', [4, 2, 1])
def test_five_tokens_at_once_are_bit_for_bit_those_one_by_one(kv):
    """int8: sums of integers are exact and attention takes each token in the same shape, so nothing can differ, and nothing does."""
    model = Q.convert(build(kv=kv))
    ids = torch.randint(96, (1, 200))
    outs = []
    with torch.no_grad():
        for width in (1, 5, 16):
            cache, at, out = KVCache(model.config, 1), 0, []
            while at < 200:
                n = min(width, 200 - at, E.BUCKET - at % E.BUCKET)
                out.append(model.logits(model.trunk(ids[:, at:at + n], cache)))
                at += n
            outs.append(torch.cat(out, 1))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def reference_greedy(model, ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[-n:]


@pytest.mark.parametrize('tokenizer, kv', MODELS)
def test_generation_equals_recomputing_everything(tokenizer, kv):
    model = build(tokenizer, kv)
    prompts = [tokenizer.encode(t) for t in ('the', 'a longer prompt, of the other kind', 'x')]
    expected = [reference_greedy(model, p, 40) for p in prompts]
    assert Engine(model).complete(prompts, 40, temperature=0) == expected
    assert [Engine(model).complete([p], 40, temperature=0)[0] for p in prompts] == expected


@pytest.mark.parametrize('how', [dict(temperature=1.0), dict(temperature=0.7, top_k=5), dict(temperature=1.3, top_p=0.8), dict(min_p=0.1)])
def test_a_row_does_not_depend_on_its_neighbours(how):
    model = build(kv=2)
    prompts = [CHAR.encode(t) for t in ('hello', 'yes', 'a third one')]
    together = Engine(model).complete(prompts, 60, seed=5, num_samples=2, **how)
    assert together == Engine(model).complete(prompts, 60, seed=5, num_samples=2, **how)
    assert together[:2] == Engine(model).complete(prompts[:1], 60, seed=5, num_samples=2, **how)
    assert len({r[0] for r in Engine(model).complete(prompts[:1], 1, seed=5, num_samples=30)}) > 5   # rows differ from the first token on
    assert together != Engine(model).complete(prompts, 60, seed=6, num_samples=2, **how)


def test_rows_end_where_they_should():
    model = build()
    prompts = [CHAR.encode('ab'), CHAR.encode('cde')]
    free = Engine(model).complete(prompts, 50, temperature=0)
    stop = free[0][10]
    got = Engine(model).complete(prompts, 50, temperature=0, stop=[stop])
    cut = lambda r: r[:r.index(stop) + 1] if stop in r else r
    assert got == [cut(r) for r in free] and len(got[0]) <= 11
    with pytest.raises(AssertionError, match='300'):
        Engine(model).complete(prompts, 299)
    assert len(Engine(model).complete(prompts, 298)[1]) == 298
    long = Engine(model).complete(prompts, 500, temperature=0, slide=True)
    assert len(long[0]) == 500 and long[0][:200] == Engine(model).complete(prompts, 200, temperature=0)[0]


def test_gumbel_is_gumbel():
    keys = noise_keys(1, range(100), [range(50)] * 100).flatten()
    g = gumbel(keys, 20)
    assert len(keys.unique()) == 5000 and g.isfinite().all()
    for x in (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0):                                       # the distribution function exp(-exp(-x))
        p = math.exp(-math.exp(-x))
        assert abs((g < x).float().mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / g.numel())
    z = (g - g.mean()) / g.std()
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1])):                           # neighbouring draws and neighbouring ids are unrelated
        assert abs((a * b).mean().item()) < 0.02


def test_the_filters():
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    noise = gumbel(noise_keys(0, [0], [range(4000)])[0], 5)
    seen = lambda **how: sorted(set(draw(p.log().expand(4000, 5), noise, 1.0, **how).tolist()))
    assert seen() == [0, 1, 2, 3, 4] and seen(top_k=2) == [0, 1] and seen(top_k=9) == seen(top_p=1.0) == [0, 1, 2, 3, 4]
    assert seen(top_p=0.4) == [0] and seen(top_p=0.6) == [0, 1] and seen(top_p=0.95) == [0, 1, 2, 3]
    assert seen(min_p=0.2) == [0, 1, 2] and seen(top_k=4, min_p=0.4) == [0, 1]
    assert draw(p.log(), None, 0).item() == 0


def g_test(counts, probabilities, n):
    """G = 2 sum O ln(O / E) and its degrees of freedom."""
    assert set(counts) <= {k for k, p in probabilities.items() if p > 0}
    return 2 * sum(c * math.log(c / (n * probabilities[k])) for k, c in counts.items()), sum(p > 0 for p in probabilities.values()) - 1


def test_the_sampling_law():
    """Three tokens after a prompt, V = 4: 100,000 samples against the exact probability of all 64 continuations."""
    model = randomise(GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=2, n_embd=16)), std=0.4)
    T, N = 0.9, 100_000
    exact = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            exact = {k + (v,): p * q for k, p in exact.items() for v, q in enumerate((model(torch.tensor([[1, *k]]))[0, -1] / T).softmax(-1).tolist())}
    counts = Counter()
    for seed in range(N // 5000):
        counts.update(map(tuple, Engine(model).complete([[1]], 3, temperature=T, seed=seed, num_samples=5000)))
    g, dof = g_test(counts, exact, N)
    assert g < dof + 4 * math.sqrt(2 * dof), f'G = {g:.1f} for {dof} degrees of freedom'


def test_streaming_whole_characters_and_stop_strings():
    model = build(BPE, 1)
    engine = Engine(model)
    prompt = BPE.encode('the')
    for seed in range(3):                                                           # random bytes: a torture for a UTF-8 decoder
        ids = engine.complete([prompt], 200, seed=seed)[0]
        assert ''.join(engine.stream(BPE, prompt, 200, seed=seed)) == BPE.decode(ids)
    euro = '€'.encode()
    fake = Engine(model)
    fake.generate = lambda *a, **k: iter([[(0, [b])] for b in b'a' + euro + b'bSTxSTOPyz'])
    assert list(Engine.stream(fake, BPE, prompt, 9)) == ['a', '€', 'b', 'S', 'T', 'x', 'S', 'T', 'O', 'P', 'y', 'z', '']
    assert list(Engine.stream(fake, BPE, prompt, 9, stop_strings=['STOP'])) == ['a', '€', 'b', 'STx', '']
