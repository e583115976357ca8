"""
How the next token is drawn from the model's distribution, in a way that can be repeated and does not depend on how the
text is decoded. A library of engine.py.

    noise = Noise(seed=1337, vocab_size=model.config.vocab_size)
    token = draw(logits, noise([0], [len(text)], 1), Sampling(temperature=0.8, top_k=200))      # logits (1, 1, V)

A draw is the argmax of logits plus noise, and the noise is a hash of seed, row and position. That is why speculation
gives exactly the same text, whatever was guessed.
"""
import math
from dataclasses import dataclass

import torch

# Below this temperature logits / temperature might overflow. Already far above it the noise is smaller than the last
# digit of logits / temperature, so that the most probable token always wins.
COLD = 1e-20


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution. The filters are applied in this order; None: off."""
    temperature: float = 1.0        # 0, or less than COLD: the most probable token
    top_k: int | None = None        # keep the k most probable tokens
    top_p: float | None = None      # keep the smallest set of tokens that holds this much probability
    min_p: float | None = None      # keep tokens at least this share as probable as the most probable one
    seed: int = 0


def draw(logits, noise, sampling):
    """
    logits and noise (..., V) -> ids (...). The argmax of logits / temperature + Gumbel noise is a sample of
    softmax(logits / temperature) (the Gumbel-max trick).
    """
    if sampling.temperature < COLD:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float('-inf'))
    if sampling.top_p is not None and sampling.top_p < 1:
        p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # a token is dropped if more probable ones already hold top_p; the first one always stays
        out = (p.cumsum(dim=-1) - p) >= max(sampling.top_p, 1e-9)
        out = torch.zeros_like(out).scatter(-1, order, out)                 # back from sorted order to ids
        logits = logits.masked_fill(out, float('-inf'))
    if sampling.min_p is not None and sampling.min_p > 0:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p < sampling.min_p * p.amax(dim=-1, keepdim=True), float('-inf'))
    return (logits + noise).argmax(dim=-1)


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
    keys (...) int64 below 2^32, one for every draw -> Gumbel noise (..., vocab_size) float32. The noise of token i is
    computed from a hash of (key, i).
    """
    ids = torch.arange(1, vocab_size + 1, device=keys.device)
    h = mix((keys.unsqueeze(-1) + 0x9e3779b9 * ids) & 0xffffffff)
    # uniform in (0, 1), with 24 bits; clamped, since float32 would round the largest one to 1, whose noise is infinite
    u = (((h >> 8).float() + 0.5) * 2.0 ** -24).clamp(max=1 - 2.0 ** -24)
    return -torch.log(-torch.log(u))


class Noise:
    """
    noise(rows, starts, n) -> (B, n, V): the noise of the draws of row rows[b] at positions starts[b], starts[b] + 1,
    ... of its text. It is a hash of seed, row and position and of nothing else: runs can be repeated, several samples
    of one prompt differ from their first token on, and a row does not depend on the rows beside it.
    """
    def __init__(self, seed, vocab_size, device='cpu'):
        self.seed = mix(mix(seed & 0xffffffff) ^ (seed >> 32 & 0xffffffff))
        self.vocab_size, self.device = vocab_size, device
        self.made = {}                              # row -> (first position, noise (positions, V)), made in advance

    def __call__(self, rows, starts, n):
        noise = [self.of_row(row, start, n) for row, start in zip(rows, starts)]
        return noise[0][None] if len(noise) == 1 else torch.stack(noise)

    def of_row(self, row, start, n):
        """-> (n, V)"""
        first, made = self.made.get(row, (start, torch.empty(0, self.vocab_size, device=self.device)))
        # noise that was made for drafts which turned out wrong is used again when their positions come
        made = made[start - first:] if first <= start else made[:0]
        if len(made) < n:
            # small vocabularies: for many positions at once
            many = max(n - len(made), min(64, 8192 // self.vocab_size))
            positions = torch.arange(start + len(made), start + len(made) + many, device=self.device)
            key = mix(self.seed + row & 0xffffffff)
            made = torch.cat((made, gumbel(mix(positions + key & 0xffffffff), self.vocab_size)))
        self.made[row] = start, made
        return made[:n]


def common_length(rows):
    """The length of the longest common prefix of rows (lists)."""
    for n, values in enumerate(zip(*rows)):
        if len(set(values)) > 1:
            return n
    return min(map(len, rows))


@torch.no_grad()
def first_difference(model, prompt, plain, other, temperature=0.0, row=0, seed=0):
    """
    Compares plain and other, two continuations of prompt (token lists) that were drawn with the noise of that row and
    seed -> None if they are equal, else (place, gap): the first place where they differ, and how far apart the scores
    of the two tokens are there, by a forward pass over the whole text. A gap of about 0 is a tie, which floating-point
    rounding may decide either way.
    """
    if plain == other:
        return None
    place = common_length([plain, other])
    if place == min(len(plain), len(other)):        # one text ends early, which is never a tie
        return place, math.inf
    score = model(torch.tensor([prompt + plain[:place]], device=model.cos.device))[0, -1]       # (V,)
    if temperature:
        noise = Noise(seed, len(score), score.device)([row], [len(prompt) + place], 1)[0, 0]
        score = score + temperature * noise
    gap = (score[plain[place]] - score[other[place]]).abs().item()
    return place, math.inf if math.isnan(gap) else gap
