"""engine.py: cached = chunked = batched = full forward; the sampling law; whole characters."""
import math
import shutil
from collections import Counter

import pytest
from conftest import BPE, CHAR, build, randomise, with_heads
import torch

import quantize as Q
from data.tokenizer import BPETokenizer, CharTokenizer
from engine import Chat, Engine, KVCache, Noise, draw, gumbel, mix, parting
from model import GPT, GPTConfig


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
        cache = KVCache(model.config, 3)
        Engine(model).prefill(cache, [ids[b, :n].tolist() for b, n in enumerate(lengths)])
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
    """
    int8: sums of integers are exact and attention takes each token in the same shape, so nothing can differ, and
    nothing does.
    """
    model = Q.convert(build(kv=kv))
    ids = torch.randint(96, (1, 200))
    outs = []
    with torch.no_grad():
        for width in (1, 5, 16):
            cache, at, out = KVCache(model.config, 1), 0, []
            while at < 200:
                n = min(width, 200 - at)
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


@pytest.mark.parametrize('how', [
    dict(temperature=1.0), dict(temperature=0.7, top_k=5), dict(temperature=1.3, top_p=0.8), dict(min_p=0.1)])
def test_a_row_does_not_depend_on_its_neighbours(how):
    model = build(kv=2)
    prompts = [CHAR.encode(t) for t in ('hello', 'yes', 'a third one')]
    together = Engine(model).complete(prompts, 60, seed=5, num_samples=2, **how)
    assert together == Engine(model).complete(prompts, 60, seed=5, num_samples=2, **how)
    assert together[:2] == Engine(model).complete(prompts[:1], 60, seed=5, num_samples=2, **how)
    # rows differ from the first token on
    assert len({r[0] for r in Engine(model).complete(prompts[:1], 1, seed=5, num_samples=30)}) > 5
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
    g = Noise(1, 20)(range(100), [7] * 100, 50)                                     # (rows, positions, ids)
    # a function of seed, row and position
    assert torch.equal(Noise(1, 20)([5, 3], [9, 20], 2), torch.stack((g[5, 2:4], g[3, 13:15])))
    g = g.flatten(0, 1)
    assert len(g[:, 0].unique()) > 4990 and g.isfinite().all()
    assert Noise(1337, 65536)([0], [36], 1).isfinite().all()            # id 45874 has the largest hash there is
    # the distribution function is exp(-exp(-x))
    for x in (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0):
        p = math.exp(-math.exp(-x))
        assert abs((g < x).float().mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / g.numel())
    z = (g - g.mean()) / g.std()
    # neighbouring draws and neighbouring ids are unrelated
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1])):
        assert abs((a * b).mean().item()) < 0.02


def test_the_filters():
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    noise = gumbel(torch.tensor([mix(i) for i in range(4000)]), 5)
    seen = lambda **how: sorted(set(draw(p.log().expand(4000, 5), noise, 1.0, **how).tolist()))
    assert seen() == [0, 1, 2, 3, 4] and seen(top_k=2) == [0, 1] and seen(top_k=9) == seen(top_p=1.0) == [0, 1, 2, 3, 4]
    assert seen(top_p=0.4) == seen(top_p=0.0) == [0] and seen(top_p=0.6) == [0, 1] and seen(top_p=0.95) == [0, 1, 2, 3]
    assert seen(min_p=0.2) == [0, 1, 2] and seen(top_k=4, min_p=0.4) == [0, 1]
    assert draw(p.log(), None, 0).item() == 0


def g_test(counts, probabilities, n):
    """G = 2 sum O ln(O / E) and its degrees of freedom."""
    assert set(counts) <= {k for k, p in probabilities.items() if p > 0}
    return (2 * sum(c * math.log(c / (n * probabilities[k])) for k, c in counts.items()),
            sum(p > 0 for p in probabilities.values()) - 1)


def test_the_sampling_law():
    """Three tokens after a prompt, V = 4: 100,000 samples against the exact probability of all 64 continuations."""
    model = randomise(GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=2, n_embd=16)), std=0.4)
    T, N = 0.9, 100_000
    exact = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            exact = {k + (v,): p * q for k, p in exact.items()
                     for v, q in enumerate((model(torch.tensor([[1, *k]]))[0, -1] / T).softmax(-1).tolist())}
    counts = Counter()
    for seed in range(N // 5000):
        counts.update(map(tuple, Engine(model).complete([[1]], 3, temperature=T, seed=seed, num_samples=5000)))
    g, dof = g_test(counts, exact, N)
    assert g < dof + 4 * math.sqrt(2 * dof), f'G = {g:.1f} for {dof} degrees of freedom'


def test_streaming_whole_characters_and_stop_strings():
    model = build(BPE, 1)
    engine = Engine(model)
    prompt = BPE.encode('the')
    # random bytes: a torture for a UTF-8 decoder
    for seed in range(3):
        ids = engine.complete([prompt], 200, seed=seed)[0]
        assert ''.join(engine.stream(BPE, prompt, 200, seed=seed)) == BPE.decode(ids)
    euro = '€'.encode()
    fake = Engine(model)
    fake.generate = lambda *a, **k: iter([[(0, [b])] for b in b'a' + euro + b'bSTxSTOPyz'])
    assert list(fake.stream(BPE, prompt, 9)) == ['a', '€', 'b', 'S', 'T', 'x', 'S', 'T', 'O', 'P', 'y', 'z', '']
    assert list(fake.stream(BPE, prompt, 9, stop_strings=['STOP'])) == ['a', '€', 'b', 'STx', '']

# -----------------------------------------------------------------------------
# speculation: the same seed gives the same text, whatever the drafter


def oracle(accuracy, texts):
    """A drafter that knows the text and is wrong now and then: exercises every length of acceptance."""
    def draft(model, x, last, ids, noise, pick):
        out = []
        for row in ids:
            truth = next(t for t in texts if t[:len(row)] == row)[len(row):]
            out.append([t if mix(len(row) + n) % 100 < accuracy else (t + 1) % noise.size(2)
                        for n, t in enumerate(truth + [0] * noise.size(1))][:noise.size(1)])
        return torch.tensor(out)
    return draft


@pytest.mark.parametrize('quantised', [False, True])
@pytest.mark.parametrize('tokenizer, kv', [(CHAR, 4), (CHAR, 1), (BPE, 2)])
def test_speculation_never_changes_the_text(tokenizer, kv, quantised):
    model = with_heads(tokenizer, kv)
    engine = Engine(Q.convert(model) if quantised else model)
    prompts = [tokenizer.encode(t) for t in ('the one', 'another one, longer', 'x')]
    n = 0
    for temperature in (0, 0.7, 1, 1.3):
        how = dict(seed=3, temperature=temperature, top_k=20 if temperature == 0.7 else None,
                   top_p=0.9 if temperature == 1.3 else None)
        plain = engine.complete(prompts, 60, **how)
        texts = [p + t for p, t in zip(prompts, plain)]
        alone = engine.complete(prompts[1:2], 60, **(how | dict(seed=4)))
        for i, drafter in enumerate(('head', 'mtp', 'ngram', 'random', oracle(100, texts), oracle(60, texts))):
            for k in {1, 8, 2 + (n + i) % 5}:
                assert engine.complete(prompts, 60, drafter=drafter, draft_n=k, adapt=k % 2 == 0,
                                       **how) == plain, (drafter, k, temperature)
                n += 1
            if isinstance(drafter, str):
                assert engine.complete(prompts[1:2], 60, drafter=drafter, **(how | dict(seed=4))) == alone
        engine.complete(prompts[:1], 60, drafter=oracle(100, texts), draft_n=5, adapt=False, **how)
        # 6 tokens a pass but for the first and the last
        assert engine.stats['passes'] <= 13 and engine.stats['accepted'][5] >= 9 and engine.stats['tokens'] == 60


def test_speculation_with_stops_samples_streams_and_sliding():
    model = with_heads(CHAR, 2)
    engine = Engine(model)
    prompts = [CHAR.encode('ab'), CHAR.encode('something else')]
    for how in (dict(stop=[5, 40, 70]), dict(num_samples=3), dict(slide=True)):
        length = 300 if 'slide' in how else 100
        plain = engine.complete(prompts, length, seed=1, **how)
        for drafter in ('head', 'ngram', 'random'):
            assert engine.complete(prompts, length, seed=1, drafter=drafter, draft_n=4, **how) == plain, (how, drafter)
    text = ''.join(engine.stream(CHAR, prompts[0], 100, seed=2))
    for stops in ([], [text[30:33]]):
        assert (''.join(engine.stream(CHAR, prompts[0], 100, stops, seed=2, drafter='random'))
                == ''.join(engine.stream(CHAR, prompts[0], 100, stops, seed=2)))
    assert engine.complete(prompts, 50, seed=1, drafter='head', draft_n=0) == engine.complete(prompts, 50, seed=1)
    for drafter, n in (('heads', 4), ('head', 16)):
        with pytest.raises(AssertionError, match='draft'):
            next(engine.generate(prompts, 5, drafter=drafter, draft_n=n))
    with pytest.raises(AssertionError, match='draft head'):
        next(Engine(build()).generate([[1]], 5, drafter='head'))


def test_heads_draft_what_they_were_trained_for():
    """
    A draft head and multi-token heads trained to know the next tokens of a fixed cycle have all their drafts kept.
    """
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
        engine.complete([[0, 5]], 40, temperature=0, drafter=drafter, draft_n=k, adapt=False)
        assert engine.stats['kept'] >= 0.9 * engine.stats['drafted'] - k


@pytest.mark.parametrize('bits', [0, 8, 4])
def test_prepared_for_decoding_is_the_same_model(bits):
    """The same logits and text; its drafts are chosen among the first 64 tokens, and the text is still the same."""
    model, fused = (with_heads(BPE, 2) for _ in range(2))
    if bits:
        Q.convert(model, bits), Q.convert(fused, bits)
    x = torch.randint(259, (2, 30))
    Q.for_decoding(fused, draft_vocab=64)
    assert torch.allclose(model(x), fused(x), atol=0 if bits else 1e-4)
    assert model.logits(x := model.trunk(x))[..., :64].allclose(
        fused.logits(x, fused.draft_lm_head), atol=0 if bits else 1e-4)
    plain = Engine(model).complete([[1, 2]], 50)
    assert (max(plain[0]) >= 64
            and Engine(fused).complete([[1, 2]], 50) == Engine(fused).complete([[1, 2]], 50, drafter='head') == plain)


def test_packed_floats_are_nearly_the_same_model():
    model, x = with_heads(BPE, 2), torch.randint(259, (2, 30))
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.5), (torch.float16, 0.05)):
        assert (Q.for_decoding(with_heads(BPE, 2), dtype)(x) - model(x)).abs().max() < close


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, '_reorder_linear_weight'), reason='needs oneDNN')
def test_packed_floats_are_the_same_product():
    linear = torch.nn.Linear(64, 48, bias=False)
    x = torch.randn(2, 5, 64)
    assert torch.allclose(Q.PackedLinear(linear.weight, torch.float32)(x), linear(x), atol=1e-5)
    assert torch.allclose(Q.PackedLinear(linear.weight, torch.bfloat16)(x), linear(x), atol=0.05)


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'c++', 'clang++'))),
                    reason='torch.compile needs a C++ compiler on a CPU')
@pytest.mark.parametrize('drafter, dtype', [
    ('none', torch.float32), ('head', torch.float32), ('mtp', torch.float32), ('head', torch.int8)])
def test_compiled_rounds_give_the_same_text(drafter, dtype):
    model = Q.convert(with_heads(CHAR, 1, block_size=96))
    how = dict(drafter=drafter, draft_n=4, temperature=0.8, seed=9)
    prompts = [CHAR.encode('To be'), CHAR.encode('x')]
    compiled = Engine(model, compile=True, cache_dtype=dtype)
    for p in prompts:
        plain = Engine(model, cache_dtype=dtype).complete([p], 80, temperature=0.8, seed=9)
        assert compiled.complete([p], 80, **how) == plain and compiled.stats['tokens'] == 80
        assert compiled.complete([p], 80, stop=plain[0][20:21], **how)[0] == plain[0][:plain[0].index(plain[0][20]) + 1]
        assert compiled.complete([p], 60, reuse=True, **how) == [plain[0][:60]]
    assert len(compiled.steps) == 1


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'c++', 'clang++'))),
                    reason='torch.compile needs a C++ compiler on a CPU')
def test_a_compiled_draft_head_alone_gives_the_same_text():
    """Without other heads: inductor, reusing buffers in place, made NaN of this one's states."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=96, vocab_size=96, n_layer=2, n_head=4, n_kv_head=1, n_embd=32, draft_n=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    how = dict(temperature=0.8, seed=9)
    plain, = Engine(Q.convert(model)).complete([[1, 2, 3]], 40, **how)
    got, = Engine(model, compile=True).complete([[1, 2, 3]], 40, drafter='head', draft_n=4, **how)
    assert parting(model, [1, 2, 3], plain, got, 0.8, 0, 9) is None


def test_int8_cache_equals_attending_to_rounded_keys():
    """
    An int8 cache is a cache of rounded keys and values: the same network with its keys and values rounded gives the
    same logits.
    """
    model = build(kv=2)
    ids = torch.randint(96, (2, 150))
    plain = KVCache(model.config, 2)
    plain.attend_exactly = plain.attend
    def rounded(layer, q, k, v):
        k, v = ((lambda r, s: r * s)(*Q.round_rows(t)) for t in (k, v))
        return plain.attend_exactly(layer, q, k, v)
    plain.attend = rounded
    small = KVCache(model.config, 2, dtype=torch.int8)
    with torch.no_grad():
        for at, n in ((0, 100), (100, 1), (101, 4)):
            a, b = (model.logits(model.trunk(ids[:, at:at + n], cache)) for cache in (plain, small))
            assert torch.allclose(a, b, atol=1e-4)
    # head_dim is only 8 here: the scales weigh half as much as the integers
    assert small.nbytes() < 0.4 * plain.nbytes()
    for cache, int8 in ((plain, False), (small, True)):
        assert cache.nbytes() == 2 * cache.size * model.kv_bytes_per_token(int8)
    engine = Engine(model, cache_dtype=torch.int8)
    assert engine.complete([[3] * 9, [4] * 20], 60, drafter='random') == engine.complete([[3] * 9, [4] * 20], 60)


def test_a_conversation_keeps_its_cache():
    model = build(kv=1)
    engine, text = Engine(model), CHAR.encode('first question')
    for turn in range(4):
        answer = engine.complete([text], 30, temperature=0, reuse=True)[0]
        # all but the new question and the answer's last token
        assert engine.stats['reused'] == (0 if turn == 0 else len(text) - 10), turn
        assert answer == Engine(model).complete([text], 30, temperature=0)[0]
        text = text + answer + CHAR.encode('and then?')
    engine.complete([CHAR.encode('something else')], 5, reuse=True)
    assert engine.stats['reused'] == 0
    edited = text[:40] + CHAR.encode('no, rather')
    engine.complete([text], 5, reuse=True)
    assert (engine.complete([edited], 30, temperature=0, reuse=True)
            == Engine(model).complete([edited], 30, temperature=0)
            and engine.stats['reused'] == 40)
    # read, but nothing was said: the cache no longer holds the text of before
    engine.complete([CHAR.encode('something else')], 0, reuse=True)
    assert (engine.complete([edited], 30, temperature=0, reuse=True)
            == Engine(model).complete([edited], 30, temperature=0))


def test_an_exchange_taken_back_leaves_no_trace():
    """In a chat: neither in what it holds nor in the cache."""
    tokenizer = BPETokenizer({bytes([b]): b for b in range(256)})
    model = build(tokenizer, kv=1)
    one, other = (Chat(Engine(model), tokenizer) for _ in range(2))
    ask = lambda chat, question: ''.join(chat.ask(question, 20, temperature=0))
    assert ask(one, 'first') == ask(other, 'first') != ''
    ask(one, 'a question to be taken back')
    one.exchanges.pop()
    other.engine.held = ([], None)
    assert (ask(one, 'what comes instead of it') == ask(other, 'what comes instead of it')
            and one.engine.stats['reused'] > 20 and other.engine.stats['reused'] == 0)
    assert one.exchanges == other.exchanges and len(one.exchanges) == 2
