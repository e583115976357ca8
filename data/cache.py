"""
The cache of keys and values, by which a decoding step needs to read only the newest tokens. A library of engine.py.

    cache = KVCache(model.config, batch=2)
    states = model.trunk(idx, cache)            # idx (2, T) continue both rows; their keys and values are stored
    cache.rewind([10, 7])                       # forgets all but the first 10 tokens of row 0 and 7 of row 1

Attention is computed differently here than in training: its results must not depend on how many tokens are read
together. That is what makes speculation exact.
"""
import torch
import torch.nn.functional as F

from model import sees
from data.rounding import round_rows

FEW = 16                # a pass over at most so many tokens of a row is a decoding step: PyTorch computes attention one
                        # token at a time (attend_each), and data/kernels.py does all layers in one call
BUCKET = 64             # attention reads the cache up to its length rounded up to a multiple of this, see attend_each


def round_up(n):
    return -(-n // BUCKET) * BUCKET


def additive(visible, dtype):
    """visible (B or 1, T, S) bool -> a mask to add to attention scores, (B or 1, T, 1, 1, S): 0 or minus infinity."""
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, float('-inf'))[:, :, None, None]


class KVCache:
    """
    The keys and values of every layer, and the number of tokens in every row (rows may differ). advance(T) makes room
    for T more tokens in each row; then every layer calls attend once. rewind forgets the last tokens again.
    dtype=torch.int8 stores integers with one scale for each token and head: nearly 4 times less memory than float32.
    """

    def __init__(self, config, batch, max_tokens=None, dtype=torch.float32, device='cpu'):
        self.block_size = config.block_size
        self.lengths = [0] * batch                  # plain ints: asking a GPU for them would stall it
        self.int8 = dtype == torch.int8
        shape = (batch, config.n_kv_head, round_up(max_tokens or config.block_size))
        widths = {'k': (config.head_dim, dtype), 'v': (config.head_dim, dtype)}
        if self.int8:
            widths |= {'k_scale': (1, torch.float32), 'v_scale': (1, torch.float32)}
        # store['k'][layer] is (B, n_kv_head, T_max, head_dim)
        self.store = {name: [torch.zeros(*shape, width, dtype=kind, device=device) for _ in range(config.n_layer)]
                      for name, (width, kind) in widths.items()}
        self.count()

    def count(self):
        """Sets size, the number of positions there is room for, and numbers, a tensor 0, 1, 2, ..., for indexing."""
        k = self.store['k'][0]
        self.size = k.size(2)
        self.numbers = torch.arange(max(k.size(0), self.size), device=k.device)

    def change(self, f):
        """Replaces every tensor t of the store by f(t)."""
        self.store = {name: [f(t) for t in tensors] for name, tensors in self.store.items()}
        self.count()

    def grow(self, n):
        """Makes room for at least n tokens in a row: the size is doubled, so that this happens seldom."""
        if n > self.size:
            size = min(max(2 * self.size, round_up(n)), round_up(self.block_size))
            self.change(lambda t: F.pad(t, (0, 0, 0, size - self.size)))

    def advance(self, T):
        """
        Adds T tokens to the length of every row -> their positions: a slice if all rows have the same length, else
        (B, T).
        """
        longest = max(self.lengths) + T
        assert longest <= self.block_size, (
            f"{longest} tokens do not fit the context of {self.block_size}: "
            "shorten the prompt or ask for fewer new tokens")
        self.grow(longest)
        self.starts = torch.tensor(self.lengths)                                # (B,), on the CPU, for data/kernels.py
        if len(set(self.lengths)) == 1:
            self.position = slice(self.lengths[0], longest)
        else:
            self.position = self.starts.to(self.numbers.device)[:, None] + self.numbers[:T]     # (B, T)
        self.reach, self.mask = round_up(longest), None
        self.lengths = [n + T for n in self.lengths]
        return self.position

    def visible(self):
        """The mask of this pass, (B or 1, T, 1, 1, S), made once for all layers."""
        if self.mask is None:
            query = self.numbers[None, self.position] if isinstance(self.position, slice) else self.position
            key = self.numbers[:self.reach]                                     # (S,)
            self.mask = additive(sees(query[..., None], key), torch.float32 if self.int8 else self.store['k'][0].dtype)
        return self.mask

    def put(self, name, layer, x):
        """Appends x (B, T, n_kv_head, ...) to what the rows hold -> all of that, (B, n_kv_head, S, ...)."""
        t = self.store[name][layer]
        if isinstance(self.position, slice):
            t[:, :, self.position] = x.transpose(1, 2)
        else:
            rows = self.numbers[:t.size(0), None]                               # (B, 1)
            t[rows, :, self.position] = x.to(t.dtype)
        return t[:, :, :self.reach]

    def put_both(self, layer, k, v):
        """Appends k and v (B, T, n_kv_head, head_dim) -> all that the layer holds, (B, n_kv_head, S, head_dim) both."""
        if not self.int8:
            return self.put('k', layer, k), self.put('v', layer, v)
        k, k_scale = round_rows(k)
        v, v_scale = round_rows(v)
        return (self.put('k', layer, k).float() * self.put('k_scale', layer, k_scale),
                self.put('v', layer, v).float() * self.put('v_scale', layer, v_scale))

    def attend(self, layer, q, k, v):
        """
        q (B, T, n_head, head_dim), k and v (B, T, n_kv_head, head_dim) -> (B, T, n_head, head_dim): appends k and v to
        what the rows hold; then every query attends to the keys that it sees.
        """
        K, V = self.put_both(layer, k, v)
        q = q.to(K.dtype)
        if q.size(1) <= FEW:
            return attend_each(q, K, V, self.visible())
        # a prompt: all its queries in one call
        mask = self.visible()[:, None, :, 0, 0]                                   # (B or 1, 1, T, S)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), K, V, mask, enable_gqa=k.size(2) < q.size(2))
        return y.transpose(1, 2)

    def rewind(self, lengths):
        """Row b keeps its first lengths[b] tokens; the others will be overwritten."""
        assert all(0 <= n <= m for n, m in zip(lengths, self.lengths)), \
            f"cannot rewind rows of {self.lengths} tokens to {lengths}"
        self.lengths = list(lengths)

    def keep(self, rows):
        """Keeps only these rows, in this order; a row may be named several times (samples of one prompt)."""
        index = torch.tensor(rows, device=self.numbers.device)
        self.lengths = [self.lengths[r] for r in rows]
        self.change(lambda t: t[index])

    def replace(self, row, other):
        """Replaces a row by the only row of the cache other."""
        n = self.lengths[row] = other.lengths[0]
        for name, tensors in self.store.items():
            for mine, its in zip(tensors, other.store[name]):
                mine[row, :, :n] = its[0, :, :n]

    def nbytes(self):
        return sum(t.nbytes for tensors in self.store.values() for t in tensors)


def attend_each(q, K, V, mask):
    """
    Attention of a few queries per row, q (B, T, n_head, head_dim), over K and V (B, n_kv_head, S, head_dim); mask
    (B or 1, T, 1, 1, S). Every query has a call of its own, with the same shapes as in decoding a single token, and S
    is a multiple of BUCKET. So sums are always taken in the same order: the result for a token is bit for bit the same
    however many tokens are verified with it, and in whatever batch.
    """
    B, T = q.shape[:2]
    gqa = K.size(1) < q.size(2)
    if B == 1:                                      # one call, in which the T queries are the batch
        return F.scaled_dot_product_attention(
            q[0].unsqueeze(2), K.expand(T, -1, -1, -1), V.expand(T, -1, -1, -1), mask[0], enable_gqa=gqa).view(q.shape)
    each = [F.scaled_dot_product_attention(q[:, t].unsqueeze(2), K, V, mask[:, t], enable_gqa=gqa).squeeze(2)
            for t in range(T)]
    return torch.stack(each, dim=1)

# -----------------------------------------------------------------------------
# inside compiled rounds

class StaticCache(KVCache):
    """
    The tensors of a KVCache of one row, as a compiled step uses them: the length is a tensor, and attention always goes
    over all T_max places.
    """
    def __init__(self, store, start):
        self.store, self.start, self.int8 = store, start, 'k_scale' in store

    def advance(self, T):
        k = self.store['k'][0]
        self.position = self.start + torch.arange(T, device=k.device)                        # (T,)
        self.start = self.start + T
        key = torch.arange(k.size(2), device=k.device)                                       # (T_max,)
        visible = sees(self.position[:, None], key)[None]                                    # (1, T, T_max)
        self.mask = additive(visible, torch.float32 if self.int8 else k.dtype)
        return self.position

    def put(self, name, layer, x):
        t = self.store[name][layer]
        return t.index_copy_(2, self.position, x.transpose(1, 2).to(t.dtype))

    def attend(self, layer, q, k, v):
        K, V = self.put_both(layer, k, v)
        # one query a call: compiled, attend_each's expand would copy K and V for every query
        each = zip(q.to(K.dtype).split(1, dim=1), self.mask.split(1, dim=1))
        return torch.cat([attend_each(q, K, V, mask) for q, mask in each], dim=1)
