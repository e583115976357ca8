"""
Everything about producing tokens: the key/value cache, sampling, batched decoding, streaming, chat.

    from engine import Engine
    engine = Engine(model)
    for step in engine.generate([ids], max_new_tokens=100, temperature=0.8, top_k=200, seed=1337):
        for row, tokens in step: ...                                # new tokens of each row, as they come
    rows = engine.complete([ids_a, ids_b], max_new_tokens=100)      # or all at once: a list of token lists

Randomness is counter-based: the noise of a draw is a hash of (seed, row, position), nothing else. So a run is
reproducible, rows of one prompt differ from their first token on, and a row does not depend on which other rows are
decoded beside it.
"""
import codecs
import functools
import math
import time

import torch
import torch.nn.functional as F

from quantize import round_rows

PREFILL_CHUNK = 512     # tokens of prompt per pass: bounds the memory of a long prompt
FEW = 16                # up to so many tokens at once are attended one by one, as decoding does
BUCKET = 64             # decoding attends to the cache's length rounded up to this, masked; see KVCache.attend

# -----------------------------------------------------------------------------
# the cache

def round_up(n):
    return -(-n // BUCKET) * BUCKET


class KVCache:
    """
    Keys and values of every layer, n_layer tensors (B, n_kv_head, T_max, head_dim) each, and a length per row.
    dtype=torch.int8 keeps them as integers with a scale per token and head: 4 times less memory than float32.
    advance(T) makes room for T more tokens in every row; the trunk then calls attend once per layer. rewind forgets
    tokens again.
    """
    def __init__(self, config, batch, max_tokens=None, dtype=torch.float32, device='cpu'):
        self.block_size, self.lengths = config.block_size, [0] * batch      # plain ints: asking a GPU would stall it
        shape = (batch, config.n_kv_head, round_up(max_tokens or config.block_size))
        layers = lambda *width, dtype: [torch.zeros(*shape, *width, dtype=dtype, device=device)
                                        for _ in range(config.n_layer)]
        self.store = {name: layers(config.head_dim, dtype=dtype) for name in 'kv'}
        self.int8 = dtype == torch.int8
        if self.int8:
            self.store |= {f'{name}_scale': layers(1, dtype=torch.float32) for name in 'kv'}
        self.make_stairs()

    def make_stairs(self):
        """0, 0, ..., -inf, -inf, ...: a window of it is the mask of one query."""
        first = self.store['k'][0]
        self.size, n = first.size(2), max(first.size(0), first.size(2))
        self.numbers = torch.arange(n, device=first.device)
        self.stairs = torch.zeros(2 * n, dtype=torch.float32 if self.int8 else first.dtype, device=first.device)
        self.stairs[n:] = float('-inf')

    def change(self, f):
        """Every tensor of the store becomes f(tensor)."""
        self.store = {name: [f(t) for t in tensors] for name, tensors in self.store.items()}
        self.make_stairs()

    def grow(self, n):
        """Room for n tokens a row, by doubling."""
        if n > self.size:
            size = min(max(2 * self.size, round_up(n)), round_up(self.block_size))
            self.change(lambda t: F.pad(t, (0, 0, 0, size - self.size)))

    def advance(self, T):
        """
        Takes T more tokens into every row. Returns their positions: a slice when all rows have the same length, else
        (B, T).
        """
        longest = max(self.lengths) + T
        assert longest <= self.block_size, (
            f"{longest} tokens do not fit the context of {self.block_size}: "
            "shorten the prompt or ask for fewer new tokens")
        self.grow(longest)
        S, start = round_up(longest), self.lengths[0]
        if len(set(self.lengths)) == 1:
            self.position = slice(start, start + T)
            ends = self.numbers[self.position][None]                            # (1, T)
        else:
            self.rows = self.numbers[:len(self.lengths), None]                  # (B, 1)
            self.position = ends = (torch.tensor(self.lengths, device=self.numbers.device)[:, None]
                                    + self.numbers[:T])                         # (B, T)
        # (B or 1, T, 1, 1, S): 0 up to the position, then -inf
        self.mask = self.stairs.unfold(0, S, 1)[self.numbers.numel() - 1 - ends][:, :, None, None]
        self.lengths = [n + T for n in self.lengths]
        return self.position

    def put(self, name, layer, x):
        """Writes x (B, T, n_kv_head, ...) behind what the rows hold; returns all of it, (B, n_kv_head, S, ...)."""
        t = self.store[name][layer]
        if isinstance(self.position, slice):
            t[:, :, self.position] = x.transpose(1, 2)
        else:
            t[self.rows, :, self.position] = x.to(t.dtype)
        return t[:, :, :self.mask.size(-1)]

    def put_both(self, layer, k, v):
        """Writes k and v (B, T, n_kv_head, head_dim) -> all that the layer holds, (B, n_kv_head, S, head_dim) both."""
        if not self.int8:
            return self.put('k', layer, k), self.put('v', layer, v)
        (k, k_scale), (v, v_scale) = round_rows(k), round_rows(v)
        return (self.put('k', layer, k).float() * self.put('k_scale', layer, k_scale),
                self.put('v', layer, v).float() * self.put('v_scale', layer, v_scale))

    def attend(self, layer, q, k, v):
        """
        q (B, T, n_head, head_dim), k and v (B, T, n_kv_head, head_dim) -> (B, T, n_head, head_dim): writes k and v
        behind what the rows hold and lets every query see all keys up to its own position.
        """
        K, V = self.put_both(layer, k, v)
        q = q.to(K.dtype)
        if q.size(1) <= FEW:
            return attend_each(q, K, V, self.mask)
        # a prompt: all its queries in one call
        y = F.scaled_dot_product_attention(q.transpose(1, 2), K, V, self.mask[:, None, :, 0, 0],
                                           enable_gqa=k.size(2) < q.size(2))
        return y.transpose(1, 2)

    def rewind(self, lengths):
        """Row b keeps its first lengths[b] tokens. What lay behind them is overwritten by what comes next."""
        assert all(0 <= n <= m for n, m in zip(lengths, self.lengths)), \
            f"cannot rewind rows of {self.lengths} tokens to {lengths}"
        self.lengths = list(lengths)

    def keep(self, rows):
        """Only these rows go on, in this order; a row may be named twice (samples of one prompt)."""
        index = torch.tensor(rows, device=self.numbers.device)
        self.lengths = [self.lengths[r] for r in rows]
        self.change(lambda t: t[index])

    def replace(self, row, other):
        """Row becomes what the one-row cache other holds."""
        n = self.lengths[row] = other.lengths[0]
        for name, tensors in self.store.items():
            for mine, its in zip(tensors, other.store[name]):
                mine[row, :, :n] = its[0, :, :n]

    def nbytes(self):
        return sum(t.nbytes for tensors in self.store.values() for t in tensors)


def attend_each(q, K, V, mask):
    """
    A few queries per row, q (B, T, n_head, head_dim) over K and V (B, n_kv_head, S, head_dim), mask
    (B or 1, T, 1, 1, S). Each is attended in a call of one query per head, the very shape that a single token has, and
    S is a whole number of BUCKETs: sums are taken in the same order, and the result for a token is bit for bit the same
    however many are verified with it, in whatever batch.
    """
    B, T, gqa = q.size(0), q.size(1), K.size(1) < q.size(2)
    if B == 1:                          # the T queries take the place of the batch
        return F.scaled_dot_product_attention(
            q[0].unsqueeze(2), K.expand(T, -1, -1, -1), V.expand(T, -1, -1, -1), mask[0], enable_gqa=gqa).view(q.shape)
    return torch.stack([
        F.scaled_dot_product_attention(q[:, t].unsqueeze(2), K, V, mask[:, t], enable_gqa=gqa).squeeze(2)
        for t in range(T)], dim=1)


class StaticCache(KVCache):
    """
    A KVCache's tensors, of one row, seen from inside a compiled step: the length is a tensor, every call attends to all
    T_max places.
    """
    def __init__(self, store, start):
        self.store, self.start, self.int8 = store, start, 'k_scale' in store

    def advance(self, T):
        self.position = self.start + torch.arange(T, device=self.start.device)               # (T,)
        self.start = self.start + T
        visible = torch.arange(self.store['k'][0].size(2), device=self.start.device) <= self.position[:, None]
        self.mask = torch.where(visible, 0.0, float('-inf'))[None, :, None, None]            # (1, T, 1, 1, T_max)
        return self.position

    def put(self, name, layer, x):
        t = self.store[name][layer]
        return t.index_copy_(2, self.position, x.transpose(1, 2).to(t.dtype))

    def attend(self, layer, q, k, v):
        K, V = self.put_both(layer, k, v)
        # one query a call: compiled, attend_each's expand would copy K and V for every query
        each = zip(q.to(K.dtype).split(1, dim=1), self.mask.split(1, dim=1))
        return torch.cat([attend_each(q, K, V, mask) for q, mask in each], dim=1)

# -----------------------------------------------------------------------------
# sampling

def mix(h):
    """
    A 32-bit hash of ints below 2^32, or of an int64 tensor of them (lowbias32, Ellis 2018): every bit of h changes
    every bit of the result.
    """
    h = ((h ^ (h >> 16)) * 0x7feb352d) & 0xffffffff
    h = ((h ^ (h >> 15)) * 0x846ca68b) & 0xffffffff
    return h ^ (h >> 16)


def gumbel(keys, vocab_size):
    """
    keys (...) int64 below 2^32, one per draw -> Gumbel noise (..., vocab_size) float32; id i of key k gets a hash of
    (k, i).
    """
    h = mix((keys.unsqueeze(-1) + 0x9e3779b9 * torch.arange(1, vocab_size + 1, device=keys.device)) & 0xffffffff)
    # 24 bits; the clamp is for the largest, which float32 would round up to 1, whose noise is infinite
    u = (((h >> 8).float() + 0.5) * 2.0 ** -24).clamp(max=1 - 2.0 ** -24)
    return -torch.log(-torch.log(u))


class Noise:
    """
    noise(rows, starts, n) -> (B, n, V): what row rows[b] draws with at the positions starts[b], starts[b] + 1, ... of
    its text.
    """
    def __init__(self, seed, vocab_size, device='cpu'):
        self.seed = mix(mix(seed & 0xffffffff) ^ (seed >> 32 & 0xffffffff))
        self.vocab_size, self.device, self.ahead = vocab_size, device, {}        # row -> (first position, noise (m, V))

    def __call__(self, rows, starts, n):
        out = []
        for row, start in zip(rows, starts):
            first, g = self.ahead.get(row, (0, ()))
            # a small vocabulary's noise is made for many positions in one go
            if not first <= start <= start + n <= first + len(g):
                m, key = max(n, min(64, 8192 // self.vocab_size)), mix(self.seed + row & 0xffffffff)
                g = gumbel(mix(torch.arange(start, start + m, device=self.device) + key & 0xffffffff), self.vocab_size)
                self.ahead[row], first = (start, g), start
            out.append(g[start - first:start - first + n])
        return out[0][None] if len(out) == 1 else torch.stack(out)


def draw(logits, noise, temperature, top_k=None, top_p=None, min_p=None):
    """
    logits, noise (..., V) -> ids (...). argmax(logits / temperature + Gumbel noise) is a sample of
    softmax(logits / temperature) (Gumbel-max); temperature 0 is the argmax. The filters cut, in this order: all but the
    top_k largest; all outside the smallest set with probability top_p; all less probable than min_p times the most
    probable.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float('-inf'))
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # out: what comes before already holds top_p; the first always stays
        out = (p.cumsum(dim=-1) - p) >= max(top_p, 1e-9)
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float('-inf'))
    if min_p is not None and min_p > 0:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), float('-inf'))
    return (logits + noise).argmax(dim=-1)

@torch.no_grad()
def parting(model, prompt, plain, other, temperature=0.0, row=0, seed=0):
    """
    Two continuations of prompt (token lists), drawn as that row of that seed -> None if they are equal; else the place
    where they part, and how far apart the scores of the two tokens are there, by a whole forward: 0 is a tie.
    """
    if plain == other:
        return None
    at = next((i for i, (a, b) in enumerate(zip(plain, other)) if a != b), None)
    if at is None:                              # one text ends early: never a tie
        return min(len(plain), len(other)), math.inf
    score = model(torch.tensor([prompt + plain[:at]], device=model.cos.device))[0, -1]
    if temperature:
        score = score + temperature * Noise(seed, len(score), score.device)([row], [len(prompt) + at], 1)[0, 0]
    gap = (score[plain[at]] - score[other[at]]).abs().item()
    return at, math.inf if math.isnan(gap) else gap

# -----------------------------------------------------------------------------
# drafters: (model, x, last, ids, noise, pick) -> up to k tokens for every row, (B, k) int64, that may come next
# ids is every row's text, last (B, 1) the end of it, x (B, 1, n_embd) the trunk's state from which last was drawn;
# noise (B, k, V) is what the target itself will draw with at those positions, so a drafter that knows the distribution
# guesses the very sample; pick draws ids from logits and noise.

def draft_head(model, x, last, ids, noise, pick):
    """The draft cell, fed its own draws."""
    out = [last]
    for n in range(noise.size(1)):
        x = model.draft_state(x, out[-1])
        logits = model.logits(x, model.draft_lm_head)
        out.append(pick(logits, noise[:, n:n + 1, :logits.size(-1)]))    # (B, 1)
    return torch.cat(out[1:], dim=1)


def draft_multi_token(model, x, last, ids, noise, pick):
    """The multi-token heads, all from one state: the first predicts what follows the last token, and so on."""
    return pick(model.logits(torch.cat([model.multi_token_state(x, i) for i in range(noise.size(1))], dim=1)), noise)


def draft_ngram(model, x, last, ids, noise, pick, longest=8):
    """
    What followed the latest earlier occurrence of the text's last tokens, as many of them as can be found (prompt
    lookup).
    """
    k, out = noise.size(1), []
    for row in ids:
        found = row[-1:] * k
        for n in range(min(longest, len(row) - 1), 0, -1):
            tail = row[-n:]
            at = next((i for i in range(len(row) - n - 1, -1, -1) if row[i:i + n] == tail), None)
            if at is not None:
                found = (row[at + n:at + n + k] + found)[:k]
                break
        out.append(found)
    return torch.tensor(out, device=noise.device)


def draft_random(model, x, last, ids, noise, pick):
    """Nonsense: the adversary that must not change the text either."""
    return torch.tensor([[mix(31 * len(row) + n + row[-1]) % noise.size(2) for n in range(noise.size(1))]
                         for row in ids], device=noise.device)


DRAFTERS = {'none': None, 'head': draft_head, 'mtp': draft_multi_token, 'ngram': draft_ngram, 'random': draft_random}
HEADS = {'head': 'draft', 'mtp': 'multi_token'}         # drafters that need a head -> the model's name for it


class Depth:
    """
    How many tokens to draft: the k that promises most tokens a second. A chain of k drafts of which each is kept with
    probability a gives (1 - a^(k+1)) / (1 - a) tokens; what a round of k costs is a line through the rounds timed so
    far. It decides speed, never the text.
    """
    def __init__(self, most):
        self.most, self.kept, self.offered = most, 1.0, 2.0   # a starts at 1/2
        self.idle = 0                                         # rounds in a row without drafts
        self.sums = [0.0] * 5                                 # n, k, k*k, t, k*t over rounds, older ones counting less

    def choose(self):
        n, k, kk, t, kt = self.sums
        spread = n * kk - k * k
        if spread <= 1e-3 * n * n:                                   # no line yet: alternate
            return self.most // (1 + int(n + 0.5) % 2)
        slope = max(0.0, (n * kt - k * t) / spread)
        base = max(1e-9, (t - slope * k) / n)
        a = min(0.99, self.kept / self.offered)
        k = max(range(self.most + 1), key=lambda k: (1 - a ** (k + 1)) / (1 - a) / (base + slope * k))
        self.idle = 0 if k else self.idle + 1
        # without drafts for long: the text may have become easier, so try again now and then
        return k if self.idle % 16 < 15 else max(1, self.most // 2)

    def saw(self, k, kept, offered, seconds):
        """A round of k drafts took seconds; of the offered drafts that were tried, kept were kept."""
        self.kept, self.offered = 0.98 * self.kept + kept, 0.98 * self.offered + offered
        self.sums = [0.95 * s + x for s, x in zip(self.sums, (1, k, k * k, seconds, k * seconds))]

# -----------------------------------------------------------------------------
# decoding

class Engine:
    """
    Decodes with one model. compile=True compiles the decoding of single sequences, which pays after some thousand
    tokens; cache_dtype may be torch.int8. After a generation, stats holds tokens, passes of the trunk, seconds in all,
    prefill_seconds, first_seconds (to the first token), tok_s (once the prompts are read), drafted, kept, and accepted:
    how many passes of a row kept 0, 1, 2, ... drafts. Compiled for a GPU, it makes one generation at a time.
    """
    def __init__(self, model, compile=False, cache_dtype=torch.float32):
        self.model, self.config, self.device = model.eval(), model.config, model.cos.device
        self.compile, self.cache_dtype = compile, cache_dtype
        self.stats, self.steps, self.held, self.fixed = {}, {}, ([], None), None

    def compiled(self, draft, n, pick):
        """
        A whole round as one compiled call, (store, start, x, last, noise) -> (tokens read, tokens drawn, the state of
        each token read): n drafts, one pass over n+1 tokens, the draws. Without a drafter the n+1 tokens are decoded
        one after the other, so its drafts are always right. In a small model most of a token's time is the calling of
        some hundred operations; this calls one.
        """
        key = (draft, n, tuple(sorted(pick.keywords.items())))
        if key not in self.steps:
            def step(store, start, x, last, noise):
                cache, model = StaticCache(store, start), self.model
                if draft is None:
                    tokens, states = [last], []
                    for i in range(n + 1):
                        states.append(model.trunk(tokens[-1], cache))
                        tokens.append(pick(model.logits(states[-1]), noise[:, i:i + 1]))
                    return torch.cat(tokens[:-1], dim=1), torch.cat(tokens[1:], dim=1), torch.cat(states, dim=1)
                tokens = torch.cat((last, draft(model, x, last, None, noise[:, :n], pick)), dim=1)
                states = model.trunk(tokens, cache)
                return tokens, pick(model.logits(states), noise), states
            # On a GPU a round is launched as one CUDA graph, instead of some hundred kernels. Without inplace_buffers:
            # inductor of torch 2.13 lets a drafted pass's states be overwritten while they are read.
            options = {'cpp_wrapper' if self.device.type == 'cpu' else 'triton.cudagraphs': True,
                       'inplace_buffers': False}
            # drafters, temperatures and cache sizes all compile this same function
            torch._dynamo.config.recompile_limit = 64
            self.steps[key] = torch.compile(step, dynamic=False, fullgraph=True, options=options)
        return self.steps[key]

    def graph_cache(self):
        """The one cache of compiled rounds on a GPU, as long as the context: a CUDA graph knows tensors by address."""
        if not self.fixed:
            self.fixed = KVCache(self.config, 1, None, self.cache_dtype, self.device)
            for tensors in self.fixed.store.values():
                for t in tensors:
                    torch._dynamo.mark_static_address(t)
        self.held = ([], None)                  # whatever text it held is overwritten
        return self.fixed

    @torch.inference_mode()
    def prefill(self, cache, prompts):
        """
        Reads prompts (token lists of any lengths) into the rows of cache. Returns the state of each one's last token
        (B, 1, n_embd).
        """
        longest, before = max(map(len, prompts)), cache.lengths
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        # padded on the right: no real token ever sees the padding
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p, dtype=torch.long) for p in prompts], batch_first=True)
        last = None
        for start in range(0, longest, PREFILL_CHUNK):
            x = self.model.trunk(ids[:, start:start + PREFILL_CHUNK].to(self.device), cache)
            at = (lengths - 1 - start).clamp(0, x.size(1) - 1)
            state = x[torch.arange(len(prompts), device=self.device), at][:, None]           # (B, 1, n_embd)
            last = state if last is None else torch.where((lengths > start)[:, None, None], state, last)
        cache.rewind([n + len(p) for n, p in zip(before, prompts)])    # the padding's keys are forgotten
        return last

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0, stop=(),
                 num_samples=1, slide=False, drafter='none', draft_n=8, adapt=True, reuse=False):
        """
        Decodes every prompt (token lists) num_samples times, all in one batch; row r belongs to prompt
        r // num_samples. Yields, per pass, [(row, new tokens), ...]. A row ends after max_new_tokens or with a token in
        stop (which is yielded), and leaves the batch. Prompt + max_new_tokens beyond block_size raise an AssertionError
        with the numbers; with slide=True a row that has filled the context goes on from the later half of it instead.

        drafter ('head', 'mtp', 'ngram', 'random' or a function) makes decoding speculative: up to draft_n tokens (15 at
        most) are guessed, one pass reads them all, the target makes its own draw at every position, and drafts are kept
        exactly as long as they equal these draws; then the target's draw is taken. So the text is the target's own,
        token for token, at any temperature and with any drafter (drafter-invariant sampling, arXiv 2408.07978; what
        compiling adds to that, by its roundings, README says).
        adapt=False always drafts draft_n.

        reuse=True (one prompt, one sample) keeps the cache and goes on from it when the next prompt begins with the
        same tokens, as in a chat.
        """
        longest, block_size = max(map(len, prompts)), self.config.block_size
        assert not reuse or len(prompts) * num_samples == 1, \
            f"reuse=True is for one prompt and one sample, not {len(prompts)} and {num_samples}"
        assert min(map(len, prompts)) > 0, "an empty prompt: start with at least one token"
        assert longest <= block_size and (slide or longest + max_new_tokens <= block_size + 1), (
            f"prompt ({longest} tokens) + max_new_tokens ({max_new_tokens}) exceed the context of {block_size}: "
            "shorten one of them, or let the window slide")
        assert callable(drafter) or drafter in DRAFTERS, \
            f"drafter {drafter!r} must be one of {', '.join(DRAFTERS)}, or a function"
        assert 0 <= draft_n < FEW, \
            f"draft_n ({draft_n}) must be below {FEW}: more tokens at once are attended in another order"
        assert drafter not in HEADS or hasattr(self.model, HEADS[drafter]), (
            f"drafter {drafter!r} needs a model with a {HEADS[drafter]} head: "
            f"train one with {HEADS[drafter]}_n > 0, or draft with ngram")
        draft_n = min(draft_n, self.config.multi_token_n) if drafter == 'mtp' else draft_n
        draft = DRAFTERS.get(drafter, drafter) if draft_n else None
        self.stats = stats = {'tokens': 0, 'passes': 0, 'seconds': 0.0, 'drafted': 0, 'kept': 0,
                              'accepted': [0] * (draft_n + 1)}
        clock = time.perf_counter()
        static, room = None, min(longest + max_new_tokens + draft_n, block_size)
        pick = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if self.compile and len(prompts) * num_samples == 1 and draft in (None, draft_head, draft_multi_token):
            # few sizes, since each is compiled anew; on a GPU one
            room = block_size if self.device.type == 'cuda' else min(1 << (room - 1).bit_length(), block_size)
            static = self.compiled(draft, draft_n, pick)
        # a conversation goes on: what of the prompt the last cache holds is not read again
        text, cache = self.held if reuse else ([], None)
        if static and self.device.type == 'cuda' and cache is not self.fixed:
            text, cache = [], None              # kept by other drafters: no graph knows it
        if reuse:
            self.held = ([], None)      # stopped before the first pass is through, it holds no text that is known
        cache = cache or (self.graph_cache() if static and self.device.type == 'cuda' else
                          KVCache(self.config, len(prompts), room, self.cache_dtype, self.device))
        # the last token is in the cache only if it was drafted: reading it again makes all drafters alike
        pairs = list(zip(text[:-1], prompts[0][:-1]))
        stats['reused'] = shared = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        cache.rewind([shared] * len(prompts))
        cache.grow(room)
        # the last token of the prompt is the first to be decoded
        x = self.prefill(cache, [p[shared:-1] for p in prompts]) if longest - 1 > shared else None
        rows = list(range(len(prompts) * num_samples))      # the rows still going; place b of the batch is row rows[b]
        ids = [list(prompts[r // num_samples]) for r in rows]
        limit = [len(i) + max_new_tokens for i in ids]
        if num_samples > 1:
            copies = [r // num_samples for r in rows]
            cache.keep(copies)
            x = x[copies] if x is not None else None
        stats['prefill_seconds'] = time.perf_counter() - clock
        depth = Depth(draft_n)
        none = torch.zeros((), device=self.device)          # at temperature 0 the largest logit wins whatever the noise
        noise = (Noise(seed, self.config.vocab_size, self.device) if temperature
                 else lambda rows, starts, n: none.expand(len(rows), n, self.config.vocab_size))
        while rows and max_new_tokens:
            began = time.perf_counter()
            room = min(block_size - max(cache.lengths), max(m - len(i) for m, i in zip(limit, ids))) - 1
            k = (0 if x is None or (draft is None and not (static and room >= draft_n))
                 else min(room, depth.choose() if adapt and not static else draft_n))
            g = noise(rows, [len(i) for i in ids], k + 1)               # (B, k+1, V)
            tokens = last = torch.tensor([i[-1:] for i in ids], device=self.device)
            if static and k == draft_n and x is not None:
                tokens, drawn, x = static(cache.store, torch.tensor(cache.lengths[0], device=self.device), x, last, g)
                cache.lengths[0] += k + 1
            else:
                if k:
                    drafts = draft(self.model, x, last, ids, g[:, :k], pick)
                    k = drafts.size(1)
                    tokens = torch.cat((last, drafts), dim=1)           # (B, k+1)
                x = self.model.trunk(tokens, cache)                     # (B, k+1, n_embd)
                drawn = pick(self.model.logits(x), g[:, :k + 1])
            drawn = drawn.tolist()
            kept = [next((n for n in range(k) if guess[n + 1] != own[n]), k)
                    for guess, own in zip(tokens.tolist(), drawn)]
            # n drafts that were right, and one token more
            new = [own[:min(n + 1, m - len(i))] for own, n, m, i in zip(drawn, kept, limit, ids)]
            if stop:
                new = [t[:next((j + 1 for j, token in enumerate(t) if token in stop), len(t))] for t in new]
            for i, t in zip(ids, new):
                i += t
            if k:
                x = x[torch.arange(len(rows), device=self.device), torch.tensor(kept, device=self.device)][:, None]
                cache.rewind([m - k + n for m, n in zip(cache.lengths, kept)])
            if draft:
                depth.saw(k, sum(kept), sum(min(n + 1, k) for n in kept), time.perf_counter() - began)
                stats['drafted'] += k * len(rows)
                stats['kept'] += sum(kept)
            for n in kept:
                stats['accepted'][n] += 1
            if reuse:
                self.held = (ids[0], cache)
            stats['passes'] += 1 if draft else k + 1
            stats['tokens'] += sum(map(len, new))
            stats['seconds'] = time.perf_counter() - clock
            stats.setdefault('first_seconds', stats['seconds'])
            stats['tok_s'] = stats['tokens'] / max(1e-9, stats['seconds'] - stats['prefill_seconds'])
            yield list(zip(rows, new))
            going = [b for b, t in enumerate(new) if t[-1] not in stop and len(ids[b]) < limit[b]]
            if not going:
                break
            if len(going) < len(rows):
                cache.keep(going)
                rows, ids, limit = ([old[b] for b in going] for old in (rows, ids, limit))
                x = x[going]
            for b, n in enumerate(cache.lengths):
                if n == block_size:                                 # slide: read the later half again and go on from it
                    fresh = KVCache(self.config, 1, None, self.cache_dtype, self.device)
                    x[b] = self.prefill(fresh, [ids[b][-max(2, block_size // 2):-1]])[0]
                    cache.replace(b, fresh)
                    self.held, reuse = ([], None), False            # it no longer holds the text from its beginning

    def complete(self, prompts, max_new_tokens, **how):
        """The new tokens of every row, as a list of lists; arguments as generate."""
        out = [[] for _ in range(len(prompts) * how.get('num_samples', 1))]
        for step in self.generate(prompts, max_new_tokens, **how):
            for row, tokens in step:
                out[row] += tokens
        return out

    def stream(self, tokenizer, prompt, max_new_tokens, stop_strings=(), stop=(), **how):
        """
        Yields the text that follows prompt (a token list), piece by piece and in whole characters: the bytes of an
        unfinished one wait for the rest. Ends before the first of stop_strings; text that may be the beginning of one
        is held back until that is decided. The tokens in stop end it, too, and are no part of it.
        """
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        held = ''
        for step in self.generate([prompt], max_new_tokens, stop=stop, **how):
            held += decoder.decode(tokenizer.decode_bytes(t for t in step[0][1] if t not in stop))
            found = [at for at in (held.find(s) for s in stop_strings) if at >= 0]
            if found:
                yield held[:min(found)]
                return
            wait = max((n for s in stop_strings for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
            if len(held) > wait:
                yield held[:len(held) - wait]
                held = held[len(held) - wait:]
        yield held + decoder.decode(b'', final=True)

# -----------------------------------------------------------------------------
# chat

class Chat:
    """
    A conversation, in the form that BPETokenizer.render_chat trains: exchanges is a list of token lists, each from
    user_start to assistant_end (exchanges.pop() takes the last one back, exchanges.clear() forgets all). The answers
    are kept as the tokens that were drawn.
    """
    def __init__(self, engine, tokenizer):
        self.engine, self.tokenizer, self.exchanges = engine, tokenizer, []
        self.special = frozenset(map(tokenizer.special, tokenizer.special_tokens))

    def ask(self, question, max_new_tokens, **how):
        """
        Streams the answer to question (str), a special token ends it; how as Engine.generate. Left early, by break or
        Ctrl+C, what was said until then stays in the conversation. Where the context is too small for it all and for an
        answer of max_new_tokens, or of a quarter of the context if that is less, the oldest exchanges go; self.dropped
        says how many. ValueError, with the conversation as it was, if the question does not fit alone.
        """
        t, block_size = self.tokenizer, self.engine.config.block_size
        question = t.render_prompt([{'role': 'user', 'content': question}])[1:]      # without bos
        room = block_size - min(max_new_tokens, block_size // 4)
        if 1 + len(question) > room:
            raise ValueError(f"the question's {len(question)} tokens do not fit the context of {block_size} "
                             f"with an answer of {block_size - room}: shorten it")
        before = len(self.exchanges)
        while 1 + sum(map(len, self.exchanges)) + len(question) > room:
            self.exchanges.pop(0)
        self.dropped = before - len(self.exchanges)
        prompt = [t.bos, *(token for exchange in self.exchanges for token in exchange), *question]
        try:
            yield from self.engine.stream(t, prompt, min(max_new_tokens, block_size + 1 - len(prompt)),
                                          stop=self.special, reuse=True, **how)
        finally:
            answer = [token for token in self.engine.held[0][len(prompt):] if token not in self.special]
            while any(s in t.decode(answer) for s in how.get('stop_strings', ())):
                answer.pop()                    # the stop, and what one pass drew behind it, was not said
            self.exchanges.append([*question, *answer, t.special('<|assistant_end|>')])
