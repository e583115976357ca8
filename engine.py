"""
Everything about producing tokens: the key/value cache, sampling, batched decoding, streaming.

    from engine import Engine
    engine = Engine(model)
    for step in engine.generate([ids], max_new_tokens=100, temperature=0.8, top_k=200, seed=1337):
        for row, tokens in step: ...                                # new tokens of each row, as they come
    rows = engine.complete([ids_a, ids_b], max_new_tokens=100)      # or all at once: a list of token lists

Randomness is counter-based: the noise of a draw is a hash of (seed, row, position), nothing else. So a run is reproducible, rows of one
prompt differ from their first token on, and a row does not depend on which other rows are decoded beside it.
"""
import codecs
import time

import torch
import torch.nn.functional as F

PREFILL_CHUNK = 512     # tokens of prompt per pass: bounds the memory of a long prompt
BUCKET = 128            # decoding attends to the cache's length rounded up to this, masked; see KVCache.attend

# -----------------------------------------------------------------------------
# the cache

class KVCache:
    """
    Keys and values of every layer, (n_layer, B, n_kv_head, T_max, head_dim) each, allocated once, and a length per row.
    advance(T) makes room for T more tokens in every row; the trunk then calls attend once per layer. rewind forgets tokens again.
    """
    def __init__(self, config, batch, max_tokens=None, dtype=torch.float32, device='cpu'):
        self.block_size = config.block_size
        size = min(-(-(max_tokens or config.block_size) // BUCKET) * BUCKET, -(-config.block_size // BUCKET) * BUCKET)
        shape = (config.n_layer, batch, config.n_kv_head, size, config.head_dim)
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch              # tokens held by each row; plain ints: asking a GPU for them would stall it

    def advance(self, T):
        """Takes T more tokens into every row. Returns their positions: (T,) when all rows have the same length, else (B, T)."""
        longest = max(self.lengths) + T
        assert longest <= self.block_size, f"{longest} tokens do not fit the context of {self.block_size}: shorten the prompt or ask for fewer new tokens"
        if longest > self.k.size(3):            # grow by doubling, in whole buckets
            extra = min(self.k.size(3), -(-self.block_size // BUCKET) * BUCKET - self.k.size(3))
            extra = max(extra, -(-longest // BUCKET) * BUCKET - self.k.size(3))
            self.k, self.v = F.pad(self.k, (0, 0, 0, extra)), F.pad(self.v, (0, 0, 0, extra))
        device = self.k.device
        self.T, self.start = T, self.lengths[0] if len(set(self.lengths)) == 1 else None
        self.S = -(-longest // BUCKET) * BUCKET
        if self.start is not None:
            position = torch.arange(self.start, self.start + T, device=device)               # (T,)
        else:
            position = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(T, device=device)   # (B, T)
            self.rows, self.position = torch.arange(len(self.lengths), device=device)[:, None], position
        visible = torch.arange(self.S, device=device) <= position.unsqueeze(-1)              # (T, S) or (B, T, S)
        self.mask = torch.zeros(visible.shape, dtype=self.k.dtype, device=device).masked_fill_(~visible, float('-inf'))
        self.lengths = [n + T for n in self.lengths]
        return position

    def attend(self, layer, q, k, v):
        """
        q (B, T, n_head, head_dim), k and v (B, T, n_kv_head, head_dim) -> (B, T, n_head, head_dim): writes k and v behind what the rows
        hold and lets every query see all keys up to its own position.
        A few tokens (decoding, verifying drafts) are attended one by one, each in a call of the very shape that a single token has: the
        sums are then taken in the same order, and the result for a token is bit for bit the same however many are verified with it.
        """
        B, T, n_head, head_dim = q.shape
        K, V, n_kv = self.k[layer], self.v[layer], k.size(2)                                 # (B, n_kv_head, T_max, head_dim)
        if self.start is not None:
            K[:, :, self.start:self.start + T], V[:, :, self.start:self.start + T] = k.transpose(1, 2), v.transpose(1, 2)
        else:
            K[self.rows, :, self.position], V[self.rows, :, self.position] = k.to(K.dtype), v.to(V.dtype)
        K, V = K[:, :, :self.S], V[:, :, :self.S]
        mask = self.mask if self.mask.ndim == 3 else self.mask.expand(B, T, self.S)          # (B, T, S)
        q = q.to(K.dtype)
        if T > 16:                                                                           # a prompt: all its queries in one call
            y = F.scaled_dot_product_attention(q.transpose(1, 2), K, V, mask[:, None], enable_gqa=n_kv < n_head)
            return y.transpose(1, 2)
        q = q.view(B, T, n_kv, n_head // n_kv, head_dim)             # the query heads that share a key head are the rows of one product
        if B == 1:
            y = F.scaled_dot_product_attention(q[0], K.expand(T, -1, -1, -1), V.expand(T, -1, -1, -1), mask[0, :, None, None])[None]
        else:
            y = torch.stack([F.scaled_dot_product_attention(q[:, t], K, V, mask[:, t, None, None]) for t in range(T)], dim=1)
        return y.reshape(B, T, n_head, head_dim)

    def rewind(self, lengths):
        """Row b keeps its first lengths[b] tokens. What lay behind them is overwritten by what comes next."""
        assert all(0 <= n <= m for n, m in zip(lengths, self.lengths)), f"cannot rewind rows of {self.lengths} tokens to {lengths}"
        self.lengths = list(lengths)

    def keep(self, rows):
        """Only these rows go on, in this order; a row may be named twice (samples of one prompt)."""
        index = torch.tensor(rows, device=self.k.device)
        self.k, self.v = self.k[:, index], self.v[:, index]
        self.lengths = [self.lengths[r] for r in rows]

    def nbytes(self):
        return self.k.nbytes + self.v.nbytes

# -----------------------------------------------------------------------------
# sampling

def mix(h):
    """A 32-bit hash of Python ints (lowbias32, Ellis 2018): every bit of h changes every bit of the result."""
    h = ((h ^ (h >> 16)) * 0x7feb352d) & 0xffffffff
    h = ((h ^ (h >> 15)) * 0x846ca68b) & 0xffffffff
    return h ^ (h >> 16)


def gumbel(keys, vocab_size):
    """keys (...) int64, one per draw -> Gumbel noise (..., vocab_size) float32; id i of key k gets a hash of (k, i): mix() again, on tensors."""
    h = (keys.unsqueeze(-1) + 0x9e3779b9 * torch.arange(1, vocab_size + 1, device=keys.device)) & 0xffffffff
    h = ((h ^ (h >> 16)) * 0x7feb352d) & 0xffffffff
    h = ((h ^ (h >> 15)) * 0x846ca68b) & 0xffffffff
    h = h ^ (h >> 16)
    u = ((h >> 8).float() + 0.5) * 2.0 ** -24                       # 24 bits: strictly between 0 and 1 in float32
    return -torch.log(-torch.log(u))


def noise_keys(seed, rows, positions):
    """seed int, rows (B,) and positions (B, T) ints as lists -> keys (B, T) int64 for gumbel."""
    s = mix(mix(seed & 0xffffffff) ^ (seed >> 32 & 0xffffffff))
    return torch.tensor([[mix(mix(s + row & 0xffffffff) + p & 0xffffffff) for p in ps] for row, ps in zip(rows, positions)])


def draw(logits, noise, temperature, top_k=None, top_p=None, min_p=None):
    """
    logits, noise (..., V) -> ids (...). argmax(logits / temperature + Gumbel noise) is a sample of softmax(logits / temperature)
    (Gumbel-max); temperature 0 is the argmax. The filters cut, in this order: all but the top_k largest; all outside the smallest set with
    probability top_p; all less probable than min_p times the most probable.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float('-inf'))
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        out = (p.cumsum(dim=-1) - p) >= top_p                       # what comes before already holds top_p; the first always stays
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float('-inf'))
    if min_p is not None and min_p > 0:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), float('-inf'))
    return (logits + noise).argmax(dim=-1)

# -----------------------------------------------------------------------------
# decoding

class Engine:
    """Decodes with one model. stats holds what the last generation did: tokens, passes, seconds, prefill_seconds."""
    def __init__(self, model):
        self.model, self.config, self.device = model.eval(), model.config, model.cos.device
        self.stats = {}

    @torch.inference_mode()
    def prefill(self, prompts, max_tokens):
        """Token lists of any lengths -> (cache holding all of them, the state of each one's last token (B, 1, n_embd))."""
        longest = max(map(len, prompts))
        assert min(map(len, prompts)) > 0, "an empty prompt: start with at least one token"
        cache = KVCache(self.config, len(prompts), max_tokens, device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for b, p in enumerate(prompts):
            ids[b, :len(p)] = torch.tensor(p)                       # padded on the right: no real token ever sees the padding
        last = None
        for start in range(0, longest, PREFILL_CHUNK):
            x = self.model.trunk(ids[:, start:start + PREFILL_CHUNK].to(self.device), cache)
            at = (lengths - 1 - start).clamp(0, x.size(1) - 1)
            state = x[torch.arange(len(prompts), device=self.device), at][:, None]           # (B, 1, n_embd)
            last = state if last is None else torch.where((lengths > start)[:, None, None], state, last)
        cache.rewind([len(p) for p in prompts])                     # the padding's keys are forgotten
        return cache, last

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0, stop=(), num_samples=1, slide=False):
        """
        Decodes every prompt (token lists) num_samples times, all in one batch; row r belongs to prompt r // num_samples. Yields, per pass,
        [(row, new tokens), ...]. A row ends after max_new_tokens or with a token in stop (which is yielded), and leaves the batch.
        Prompt + max_new_tokens beyond block_size raise an AssertionError with the numbers; with slide=True a row that has filled the
        context goes on from the later half of it instead.
        """
        longest, block_size = max(map(len, prompts)), self.config.block_size
        assert longest <= block_size and (slide or longest + max_new_tokens <= block_size + 1), \
            f"prompt ({longest} tokens) + max_new_tokens ({max_new_tokens}) exceed the context of {block_size}: shorten one of them, or let the window slide"
        self.stats = {'tokens': 0, 'passes': 0, 'seconds': 0.0, 'prefill_seconds': 0.0}
        clock = time.perf_counter()
        cache, x = self.prefill(prompts, min(longest + max_new_tokens, block_size))
        rows = [r for r in range(len(prompts) * num_samples)]       # the rows still going; position b of the batch is row rows[b]
        ids = [list(prompts[r // num_samples]) for r in rows]
        limit = [len(i) + max_new_tokens for i in ids]
        if num_samples > 1:
            copies = [r // num_samples for r in rows]
            cache.keep(copies)
            x = x[copies]
        self.stats['prefill_seconds'] = time.perf_counter() - clock
        while rows and max_new_tokens:
            logits = self.model.logits(x[:, -1])                    # (B, V)
            noise = gumbel(noise_keys(seed, rows, [[len(i)] for i in ids])[:, 0].to(self.device), logits.size(-1)) if temperature else None
            new = draw(logits, noise, temperature, top_k, top_p, min_p).tolist()
            for i, t in zip(ids, new):
                i.append(t)
            self.stats['tokens'] += len(rows)
            self.stats['seconds'] = time.perf_counter() - clock
            yield [(row, [t]) for row, t in zip(rows, new)]
            going = [b for b, t in enumerate(new) if t not in stop and len(ids[b]) < limit[b]]
            if len(going) < len(rows):
                if not going:
                    break
                cache.keep(going)
                rows, ids, limit = [rows[b] for b in going], [ids[b] for b in going], [limit[b] for b in going]
            if max(cache.lengths) == block_size:                    # slide: read the later half again, then go on from it
                cache, x = self.prefill([i[-(block_size // 2):] for i in ids], block_size)
            else:
                x = self.model.trunk(torch.tensor([i[-1:] for i in ids], device=self.device), cache)
            self.stats['passes'] += 1

    def complete(self, prompts, max_new_tokens, **how):
        """The new tokens of every row, as a list of lists; arguments as generate."""
        out = [[] for _ in range(len(prompts) * how.get('num_samples', 1))]
        for step in self.generate(prompts, max_new_tokens, **how):
            for row, tokens in step:
                out[row] += tokens
        return out


    def stream(self, tokenizer, prompt, max_new_tokens, stop_strings=(), **how):
        """
        Yields the text that follows prompt (a token list), piece by piece and in whole characters: the bytes of an unfinished one wait for
        the rest. Ends before the first of stop_strings; text that may be the beginning of one is held back until that is decided.
        """
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        held = ''
        for step in self.generate([prompt], max_new_tokens, **how):
            held += decoder.decode(tokenizer.decode_bytes(step[0][1]))
            found = [at for at in (held.find(s) for s in stop_strings) if at >= 0]
            if found:
                yield held[:min(found)]
                return
            wait = max((n for s in stop_strings for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
            if len(held) > wait:
                yield held[:len(held) - wait]
                held = held[len(held) - wait:]
        yield held + decoder.decode(b'', final=True)
