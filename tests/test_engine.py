"""engine.py: cached = chunked = batched = speculative = compiled = full forward; the sampling law; whole characters."""
import copy
import itertools
import math
from collections import Counter

import pytest
import torch

import engine as E
import model as M
import data.rounding as R
from conftest import BPE, CHAR, LLAMA, build, needs_compiler, randomise, with_heads
from data import cache as C
from data.cache import KVCache, StaticCache
from data.layouts import PackedInt4Linear, PackedInt8Linear, for_decoding, step_of
from data.sampling import Noise, draw, gumbel, mix
from engine import Engine, Sampling, Speculation, decode
from model import GPT, GPTConfig

UNTIED = LLAMA | dict(out_proj=False, tie_weights=False, rope_base=500.0)
# our block with every kind of key heads and both tokenizers, a Llama's, and blocks with some of its switches
MODELS = [(CHAR, 4, {}), (CHAR, 1, {}), (BPE, 2, {}), (CHAR, 2, LLAMA), (CHAR, 2, UNTIED),
          (CHAR, 2, dict(mlp='swiglu')), (CHAR, 2, dict(qk_norm=False, softcap=0.0))]
FORMS = {'float': lambda model: model, 'int8': R.convert, 'arranged': for_decoding,
         'int8, arranged': lambda model: for_decoding(R.convert(model)),
         'int4, arranged': lambda model: for_decoding(R.convert(model, 4))}
GREEDY = Sampling(temperature=0)


def in_passes(model, ids, widths, cache):
    parts = ids.split(widths, dim=1)
    return torch.cat([model.logits(model.trunk(part, cache)) for part in parts], dim=1)

# ----- who sees whom

def window_of_3(query, key):
    return (key <= query) & (key > query - 3)


def by_the_rule(q, k, v):
    """Attention written out, (B, heads, T, head_dim), with the mask that model.sees defines."""
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    place = torch.arange(q.size(2))
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~M.sees(place[:, None], place), float('-inf'))
    return scores.softmax(dim=-1) @ v


def static_cache(model):
    return StaticCache(KVCache(model.config, 1).store, torch.tensor(0))


WAYS = {
    'full forward (model.causal_attention)': lambda model, ids: model(ids),
    'one token after the other (data.cache.KVCache)': lambda model, ids: in_passes(model, ids, 1, KVCache(model.config, 2)),
    'the prompt in chunks (data.cache.KVCache)': lambda model, ids: in_passes(model, ids, 25, KVCache(model.config, 2)),
    'compiled rounds (data.cache.StaticCache)': lambda model, ids: torch.cat([
        in_passes(model, row, 5, static_cache(model)) for row in ids[:, None]])}


@pytest.mark.parametrize('rule', ['as it is', 'a window of 3'])
@pytest.mark.parametrize('way', WAYS)
def test_every_mask_is_the_rule_of_sees(way, rule, monkeypatch):
    """
    model.sees says which query sees which key. If you change it (a sliding window, say), this test names the masks that
    do not follow. Only PyTorch's is_causal in model.causal_attention cannot follow by itself: you change that.
    """
    if rule == 'a window of 3':
        if 'causal_attention' in way:
            pytest.skip('is_causal is written out there')
        for module in (M, C):
            monkeypatch.setattr(module, 'sees', window_of_3)
    model, ids = build(kv=2), torch.randint(96, (2, 100))
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(M, 'causal_attention', by_the_rule)
            expected = model(ids)
        assert torch.allclose(WAYS[way](model, ids), expected, atol=1e-4), f'another mask than sees: {way}'

# ----- the cache

@pytest.mark.parametrize('tokenizer, kv, shape', MODELS)
@pytest.mark.parametrize('widths', [1, 7, [100, 1, 1, 90, 60, 28]])
def test_cached_and_chunked_equal_the_full_forward(tokenizer, kv, shape, widths):
    model = build(tokenizer, kv, **shape)
    ids = torch.randint(tokenizer.vocab_size, (3, 280))
    with torch.no_grad():
        got = in_passes(model, ids, widths, KVCache(model.config, 3, max_tokens=10))  # it grows as it goes
        assert torch.allclose(got, model(ids), atol=1e-4)


@pytest.mark.parametrize('kv, shape', [(4, {}), (2, {}), (1, {}), (2, LLAMA), (2, UNTIED)])
@pytest.mark.parametrize('lengths', [[40, 40, 40], [40, 3, 77]])
def test_ragged_rows_and_rewind_equal_the_full_forward(kv, shape, lengths, monkeypatch):
    monkeypatch.setattr(E, 'PREFILL_CHUNK', 7)  # chunks of prompts end anywhere
    model = build(kv=kv, **shape)
    ids = torch.randint(96, (3, 90))
    with torch.inference_mode():
        cache = KVCache(model.config, 3)
        last = Engine(model).prefill(cache, [ids[b, :n].tolist() for b, n in enumerate(lengths)])
        assert cache.lengths == lengths
        for b, n in enumerate(lengths):
            assert torch.allclose(model.logits(last[b]), model(ids[b:b + 1, :n])[0, -1], atol=1e-4)
        model.trunk(torch.randint(96, (3, 6)), cache)                               # drafts that were wrong ...
        cache.rewind(lengths)                                                       # ... and are forgotten
        new = torch.stack([ids[b, n:n + 5] for b, n in enumerate(lengths)])
        got = model.logits(model.trunk(new, cache))
        for b, n in enumerate(lengths):
            assert torch.allclose(got[b], model(ids[b:b + 1, :n + 5])[0, n:], atol=1e-4)
        cache.keep([2, 0])
        got = model.logits(model.trunk(ids[[2, 0], :1], cache))
        assert torch.allclose(got[1, 0], model(torch.cat((ids[:1, :45], ids[:1, :1]), 1))[0, 45], atol=1e-4)


@pytest.mark.parametrize('bits', [8, 4])
# silu's last few numbers, that fill no vector, come from another exp: n_hidden is a multiple
@pytest.mark.parametrize('kv, shape', [(4, {}), (2, {}), (1, {}), (2, LLAMA | dict(n_hidden=96))])
def test_five_tokens_at_once_are_bit_for_bit_those_one_by_one(kv, shape, bits):
    """Sums of integers are exact and attention takes each token in the same shape, so nothing can differ."""
    model = R.convert(build(kv=kv, **shape), bits)
    ids = torch.randint(96, (1, 200))
    with torch.no_grad():
        one_by_one, *others = (in_passes(model, ids, width, KVCache(model.config, 1)) for width in (1, 5, 16))
    for other in others:
        assert torch.equal(other, one_by_one)


def test_int8_cache_equals_attending_to_rounded_keys():
    model = build(kv=2)
    ids = torch.randint(96, (2, 150))
    plain, small = KVCache(model.config, 2), KVCache(model.config, 2, dtype=torch.int8)
    attend = plain.attend

    def rounded(t):
        r, scale = R.round_rows(t)
        return r * scale
    plain.attend = lambda layer, q, k, v: attend(layer, q, rounded(k), rounded(v))
    with torch.no_grad():
        a, b = (in_passes(model, ids, [100, 1, 4, 45], cache) for cache in (plain, small))
    assert torch.allclose(a, b, atol=1e-4)
    # head_dim is only 8: the scales weigh half as much as the integers
    assert small.nbytes() < 0.4 * plain.nbytes()
    for cache, int8 in ((plain, False), (small, True)):
        assert cache.nbytes() == 2 * cache.size * model.kv_bytes_per_token(int8)
    engine, prompts = Engine(model, cache_dtype=torch.int8), [[3] * 9, [4] * 20]
    assert engine.complete(prompts, 60, speculation=Speculation('random')) == engine.complete(prompts, 60)

# ----- plain decoding, and many rows at once

@pytest.mark.parametrize('tokenizer, kv, shape', MODELS)
def test_generation_equals_recomputing_everything(tokenizer, kv, shape):
    model = build(tokenizer, kv, **shape)
    prompts = [tokenizer.encode(t) for t in ('the', 'a longer prompt, of the other kind', 'x')]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(40):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        expected.append(ids[len(prompt):])
    assert [decode(model, p, 40, GREEDY) for p in prompts] == expected
    assert [Engine(model).complete([p], 40, GREEDY)[0] for p in prompts] == expected
    assert Engine(model).complete(prompts, 40, GREEDY) == expected


@pytest.mark.parametrize('sampling', [
    Sampling(seed=5), Sampling(0.7, top_k=5, seed=5), Sampling(1.3, top_p=0.8, seed=5), Sampling(min_p=0.1, seed=5)])
def test_a_row_does_not_depend_on_its_neighbours(sampling):
    engine = Engine(build(kv=2))
    prompts = [CHAR.encode(t) for t in ('hello', 'yes', 'a third one')]
    together = engine.complete(prompts, 60, sampling, num_samples=2)
    assert together == engine.complete(prompts, 60, sampling, num_samples=2)
    assert together[:2] == engine.complete(prompts[:1], 60, sampling, num_samples=2)
    assert together[0] == decode(engine.model, prompts[0], 60, sampling)
    first = {row[0] for row in engine.complete(prompts[:1], 1, Sampling(seed=5), num_samples=30)}
    assert len(first) > 5  # rows differ from the first token on
    assert together != engine.complete(prompts, 60, Sampling(seed=6), num_samples=2)


def test_rows_end_where_they_should():
    engine = Engine(build())
    prompts = [CHAR.encode('ab'), CHAR.encode('cde')]
    free = engine.complete(prompts, 50, GREEDY)
    stop = free[0][10]
    got = engine.complete(prompts, 50, GREEDY, stop=[stop])
    assert got == [row[:row.index(stop) + 1] if stop in row else row for row in free]
    assert len(got[0]) <= 11
    assert len(engine.complete(prompts, 298)[1]) == 298
    long = engine.complete(prompts, 500, GREEDY, slide=True)
    assert len(long[0]) == 500
    assert long[0][:200] == engine.complete(prompts, 200, GREEDY)[0]


# ----- sampling

def test_gumbel_is_gumbel():
    g = Noise(1, 20)(range(100), [7] * 100, 50)  # (rows, positions, ids)
    # a function of seed, row and position
    assert torch.equal(Noise(1, 20)([5, 3], [9, 20], 2), torch.stack((g[5, 2:4], g[3, 13:15])))
    # ... and not of what was asked for before: rows for drafts that were wrong are used again
    again = Noise(1, 20)
    for start, n in ((7, 5), (8, 5), (13, 9), (13, 2), (7, 3), (30, 70)):
        assert torch.equal(again([4], [start], n)[0, :50], Noise(1, 20)([4], [start], n)[0, :50])
        assert torch.equal(again([4], [start], 1)[0, 0], g[4, start - 7])
    g = g.flatten(0, 1)
    assert len(g[:, 0].unique()) > 4990
    assert g.isfinite().all()
    assert Noise(1337, 65536)([0], [36], 1).isfinite().all()  # id 45874 has the largest hash there is
    # the distribution function is exp(-exp(-x))
    for x in (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0):
        p = math.exp(-math.exp(-x))
        assert abs((g < x).float().mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / g.numel())
    # neighbouring draws and neighbouring ids are unrelated
    z = (g - g.mean()) / g.std()
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1])):
        assert abs((a * b).mean().item()) < 0.02


@pytest.mark.parametrize('filters, left', [
    ({}, 5), (dict(top_k=2), 2), (dict(top_k=9), 5), (dict(top_p=1.0), 5), (dict(top_p=0.4), 1), (dict(top_p=0.0), 1),
    (dict(top_p=0.6), 2), (dict(top_p=0.95), 4), (dict(min_p=0.2), 3), (dict(top_k=4, min_p=0.4), 2)])
def test_the_filters(filters, left):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()
    noise = gumbel(torch.tensor([mix(i) for i in range(4000)]), 5)
    seen = draw(logits.expand(4000, 5), noise, Sampling(**filters))
    assert sorted(set(seen.tolist())) == list(range(left))
    assert draw(logits, None, Sampling(temperature=0, **filters)).item() == 0


def test_the_sampling_law():
    """Three tokens after a prompt, V = 4: 12,000 samples against the exact probability of all 64 continuations."""
    model = randomise(GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=2, n_embd=16)), std=0.4)
    T, N = 0.9, 12_000
    exact = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            longer = {}
            for text, p in exact.items():
                law = (model(torch.tensor([[1, *text]]))[0, -1] / T).softmax(-1).tolist()
                longer |= {(*text, token): p * q for token, q in enumerate(law)}
            exact = longer
    counts = Counter()
    for seed in range(N // 4000):
        counts.update(map(tuple, Engine(model).complete([[1]], 3, Sampling(T, seed=seed), num_samples=4000)))
    # a G-test
    g = 2 * sum(n * math.log(n / (N * exact[text])) for text, n in counts.items())
    dof = len(exact) - 1
    assert g < dof + 4 * math.sqrt(2 * dof), f'G = {g:.1f} for {dof} degrees of freedom'

# ----- streaming

@pytest.mark.parametrize('seed', range(3))
def test_streaming_equals_decoding_at_the_end(seed):
    """Random bytes: a torture for a UTF-8 decoder. Markers between documents are not said."""
    engine, prompt = Engine(build(BPE, 1)), BPE.encode('the')
    ids, = engine.complete([prompt], 200, Sampling(seed=seed))
    assert ''.join(engine.stream(BPE, prompt, 200, sampling=Sampling(seed=seed))) == BPE.decode(
        [token for token in ids if token != BPE.bos])


@pytest.mark.parametrize('stops, pieces', [
    ([], ['a', '€', 'b', 'S', 'T', 'x', 'S', 'T', 'O', 'P', 'y', 'z', '']),
    (['STOP'], ['a', '€', 'b', 'STx', '']),
    (['y', 'Py'], ['a', '€', 'b', 'S', 'T', 'x', 'S', 'T', 'O', ''])])
def test_streaming_whole_characters_and_stop_strings(stops, pieces):
    fake = Engine(build(BPE, 1))
    fake.generate = lambda *args, **how: iter([[(0, [b])] for b in 'a€bSTxSTOPyz'.encode()])
    assert list(fake.stream(BPE, [1], 9, stops)) == pieces

# ----- speculation: the same seed gives the same text, whatever the drafter

def oracle(accuracy, texts):
    """A drafter that knows the text and is wrong now and then: exercises every length of acceptance."""
    def draft(model, x, last, rows, noise, pick):
        k, vocab_size = noise.shape[1:]
        out = []
        for row in rows:
            truth = next(t for t in texts if t[:len(row)] == row)[len(row):] + [0] * k
            right = [mix(len(row) + n) % 100 < accuracy for n in range(k)]
            out.append([token if ok else (token + 1) % vocab_size for token, ok in zip(truth, right)])
        return torch.tensor(out)
    return draft


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('tokenizer, kv, shape', [
    (CHAR, 4, {}), (CHAR, 1, {}), (BPE, 2, {}), (CHAR, 2, LLAMA), (CHAR, 2, UNTIED)])
def test_speculation_never_changes_the_text(tokenizer, kv, shape, form):
    engine = Engine(FORMS[form](with_heads(tokenizer, kv, **shape)))
    prompts = [tokenizer.encode(t) for t in ('the one', 'another one, longer', 'x')]
    widths = itertools.cycle([1, 8, 2, 5, 3, 15, 4, 1, 6])
    for sampling in (Sampling(0, seed=3), Sampling(0.7, top_k=20, seed=3), Sampling(1.3, top_p=0.9, seed=3)):
        plain = engine.complete(prompts, 30, sampling)
        texts = [p + t for p, t in zip(prompts, plain)]
        alone = decode(engine.model, prompts[0], 30, sampling)
        for drafter in ('head', 'mtp', 'ngram', 'random', oracle(100, texts), oracle(60, texts)):
            k = next(widths)
            speculation = Speculation(drafter, k, adapt=k % 2 == 0)
            assert engine.complete(prompts, 30, sampling, speculation) == plain, speculation
            assert engine.complete(prompts[:1], 30, sampling, Speculation(drafter)) == [alone], drafter
        engine.complete(prompts[:1], 30, sampling, Speculation(oracle(100, texts), 5, adapt=False))
        assert engine.stats['tokens'] == 30
        assert engine.stats['passes'] <= 7  # 6 tokens a pass but for the first and the last
        assert engine.stats['accepted'][5] >= 4


@pytest.mark.parametrize('drafter', ['head', 'ngram', 'random'])
@pytest.mark.parametrize('length, how', [
    (100, dict(stop=[5, 40, 70])), (100, dict(num_samples=3)), (300, dict(slide=True))])
def test_speculation_with_stops_samples_and_sliding(drafter, length, how):
    engine = Engine(with_heads(CHAR, 2))
    prompts = [CHAR.encode('ab'), CHAR.encode('something else')]
    plain = engine.complete(prompts, length, Sampling(seed=1), **how)
    assert engine.complete(prompts, length, Sampling(seed=1), Speculation(drafter, 4), **how) == plain
    assert engine.complete(prompts, length, Sampling(seed=1), Speculation(drafter, 0), **how) == plain


def test_heads_draft_what_they_were_trained_for():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=16, n_layer=1, n_head=2, n_embd=32, multi_token_n=2, draft_n=3))
    text = torch.arange(2000) * 5 % 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(60):
        at = torch.randint(1900, (16,))
        x, y = (torch.stack([text[i + o:i + o + 32] for i in at]) for o in (0, 1))
        optimizer.zero_grad()
        sum(model(x, y).values()).backward()
        optimizer.step()
    engine = Engine(model)
    for drafter, k in (('head', 6), ('mtp', 2)):
        engine.complete([[0, 5]], 40, GREEDY, Speculation(drafter, k, adapt=False))
        assert engine.stats['kept'] >= 0.9 * engine.stats['drafted'] - k

# ----- reuse

def test_a_conversation_keeps_its_cache():
    model = build(kv=1)
    engine, text = Engine(model), CHAR.encode('first question')

    def check(prompt, reused):
        answer, = engine.complete([prompt], 30, GREEDY, reuse=True)
        assert engine.stats['reused'] == reused
        assert answer == decode(model, prompt, 30, GREEDY)
        return answer
    for turn in range(4):
        # all but the new question and the answer's last token
        text = text + check(text, len(text) - 10 if turn else 0) + CHAR.encode('and then?')
    engine.complete([CHAR.encode('something else')], 5, reuse=True)
    assert engine.stats['reused'] == 0
    edited = text[:40] + CHAR.encode('no, rather')
    engine.complete([text], 5, reuse=True)
    check(edited, 40)
    # read, but nothing was said: the cache no longer holds the text of before
    engine.complete([CHAR.encode('something else')], 0, reuse=True)
    check(edited, 0)

# ----- compiled rounds

def compiled_equals_plain(drafter, dtype, **heads):
    torch._dynamo.reset()
    shape = dict(block_size=96, vocab_size=96, n_layer=1, n_head=4, n_kv_head=1, n_embd=32)
    model = R.convert(randomise(GPT(GPTConfig(**shape, **heads)), std=0.1))
    how = dict(sampling=Sampling(0.8, seed=9), speculation=Speculation(drafter, 2))
    compiled = Engine(model, compile=True, cache_dtype=dtype)
    for p in [CHAR.encode('To be'), CHAR.encode('x')]:
        plain, = Engine(model, cache_dtype=dtype).complete([p], 80, Sampling(0.8, seed=9))
        stop = plain[20]
        assert compiled.complete([p], 80, **how) == [plain]
        assert compiled.stats['tokens'] == 80
        assert compiled.complete([p], 80, stop=[stop], **how) == [plain[:plain.index(stop) + 1]]
        assert compiled.complete([p], 60, reuse=True, **how) == [plain[:60]]
    assert len(compiled.steps) == 1


@needs_compiler
def test_compiled_rounds_give_the_same_text():
    """A draft head without other heads: inductor, reusing buffers in place, made NaN of its states."""
    compiled_equals_plain('head', torch.int8, draft_n=2)


@pytest.mark.parametrize('drafter', ['none', 'mtp'])
def test_rounds_are_one_graph_that_gives_the_same_text(drafter, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, options, **how: compile(f, backend='eager', **how))
    compiled_equals_plain(drafter, torch.float32, multi_token_n=2)

# ----- layouts

@pytest.mark.parametrize('kernels', [True, False])
@pytest.mark.parametrize('bits', [0, 8, 4])
def test_prepared_for_decoding_is_the_same_model(bits, kernels, monkeypatch):
    """The same logits (of integers to the bit, but for norms by kernels.cpp) and text, with any drafts."""
    monkeypatch.setattr(PackedInt8Linear, 'ROWS', 50)
    model = with_heads(BPE, 2)
    if bits:
        R.convert(model, bits, tables_bits=bits)
    fused = for_decoding(copy.deepcopy(model), draft_vocab=64, kernels=kernels)
    assert not any('c_q' in name.split('.') for name, _ in fused.named_modules())
    ids, close = torch.randint(259, (2, 30)), 1e-4 if not bits else 1e-5 if step_of(fused) == 'kernels' else 0
    states = model.trunk(ids)
    assert torch.allclose(model(ids), fused(ids), rtol=0, atol=close)
    assert torch.allclose(model.logits(states)[..., :64], fused.draft_logits(states), rtol=0, atol=close)
    same = for_decoding(copy.deepcopy(model)) if step_of(fused) == 'kernels' else model
    plain = Engine(same).complete([[1, 2]], 50)
    assert max(plain[0]) >= 64
    model.config.draft_vocab = 50  # what a head was trained to choose from is what it chooses from
    assert model.draft_logits(states).size(-1) == 50
    assert for_decoding(copy.deepcopy(model), kernels=kernels).draft_lm_head(states).size(-1) == 50
    assert Engine(fused).complete([[1, 2]], 50) == plain
    assert Engine(fused).complete([[1, 2]], 50, speculation=Speculation('head')) == plain


@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-4), (torch.bfloat16, 0.5), (torch.float16, 0.05)])
def test_packed_floats_are_nearly_the_same_model(dtype, close):
    model, ids = with_heads(BPE, 2), torch.randint(259, (2, 30))
    assert (for_decoding(copy.deepcopy(model), dtype)(ids) - model(ids)).abs().max() < close


# not lm_head, nor the 16 columns of the heads' c_proj
@pytest.mark.parametrize('bits, packed', [(8, 0), (4, 2 * 4 + 4)])
def test_staying_at_4_bits_is_nearly_the_same_model(bits, packed):
    model, ids = R.convert(with_heads(BPE, 2), bits, tables_bits=bits), torch.randint(259, (2, 30))
    small = for_decoding(copy.deepcopy(model), torch.bfloat16)
    assert sum(isinstance(m, PackedInt4Linear) for m in small.modules()) == packed
    difference = (small(ids) - model(ids)).abs().mean()
    assert 0 < difference < 0.05 if packed else difference == 0
