"""
The GPT: configuration, trunk, heads, losses, accounting and evaluation. Everything else imports this file.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(block_size=256, vocab_size=65, n_layer=3, n_head=4, n_embd=192, n_hidden=384))
    logits = model(idx)                 # idx (B, T) int64 -> (B, T, vocab_size) float32
    losses = model(idx, targets)        # {'ce': nats per token, ...}

The block is nanochat's of the d20-d34 era, so that those weights load: RMSNorm without weights, rotary positions and
then a norm of q and k, relu^2, no biases, a norm after the embedding, logits soft-capped at 15. Switches of GPTConfig
make it a Llama's: mlp='swiglu', qk_norm=False, embed_norm=False, softcap=0. Training, decoding and distillation all use
the one trunk; lm_head reads it, and, when asked for, multi-token heads and a draft head do.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data.attention

MLPS = ('relu2', 'swiglu')          # an MLP's activation functions
LOSS_CHUNK_BYTES = 128 * 2**20      # losses are computed over chunks of tokens whose fp32 logits take at most this much
GPU_CHUNKS = 8                      # compiled for a GPU, chunks are this many times larger: fewer pieces to launch

@dataclass
class GPTConfig:
    """The shape of a model. Every dimension is free; None becomes the usual value, in __post_init__."""
    block_size: int = 1024
    vocab_size: int = 65536
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int | None = None    # None: n_head (MHA). 1 is MQA, in between is GQA
    n_embd: int = 768
    head_dim: int | None = None     # None: n_embd / n_head
    n_hidden: int | None = None     # None: 4 * n_embd; of swiglu 8/3 of it, which are as many weights
    use_mqa: bool = False           # another way to say n_kv_head=1
    tie_weights: bool = False       # lm_head is wte
    dropout: float = 0.0            # on the embedding and on what each branch adds; only for small data seen many times
    # nanochat's block as it stands here; a Llama's is swiglu, False, False, 0.0
    mlp: str = 'relu2'              # one of MLPS
    qk_norm: bool = True            # q and k are normed after they are turned
    embed_norm: bool = True         # embeddings are normed before the first block
    softcap: float = 15.0           # logits lie in (-15, 15): a cheap guard against runaway ones; 0: off
    norm_eps: float = 0.0           # what every norm adds to the mean square; 0: the machine epsilon
    out_proj: bool = False          # lm_head reads x + c_out(x): the last gain of a tied Llama
    hadamard: int = 0               # hidden units are turned by Hadamard matrices of this size (data/balance.py)
    rope_base: float = 10000.0
    rope_bf16: bool = False         # rotary tables rounded to bfloat16, as nanochat's models were trained with
    multi_token_n: int = 0          # heads for t+2, t+3, ...
    multi_token_hidden_mult: float = 0.5
    draft_n: int = 0                # how far the draft head is unrolled in training; 0: no draft head
    draft_hidden_mult: float = 0.5
    draft_vocab: int = 0            # the draft head chooses among the first so many tokens, in a BPE the frequent ones

    def __post_init__(self):
        if self.use_mqa:
            assert self.n_kv_head in (None, 1), \
                f"use_mqa=True means n_kv_head=1, but n_kv_head={self.n_kv_head}: give one of them"
            self.n_kv_head = 1
        if self.head_dim is None:
            assert self.n_embd % self.n_head == 0, \
                f"n_embd ({self.n_embd}) is not a multiple of n_head ({self.n_head}): change one or set head_dim"
            self.head_dim = self.n_embd // self.n_head
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        assert self.mlp in MLPS, f"mlp ({str(self.mlp):.40}) must be one of {', '.join(MLPS)}"
        if self.n_hidden is None:
            self.n_hidden = 4 * self.n_embd if self.mlp == 'relu2' else 8 * self.n_embd // 3
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'head_dim', 'n_hidden'):
            assert getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be at least 1"
        assert self.n_head % self.n_kv_head == 0, (
            f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head}): "
            "each key/value head serves equally many query heads")
        assert max(self.multi_token_n, self.draft_n) < self.block_size, (
            f"multi_token_n ({self.multi_token_n}) and draft_n ({self.draft_n}) look further than "
            f"block_size ({self.block_size}): lower them")
        assert not self.hadamard or (self.hadamard & (self.hadamard - 1) == 0 and self.n_hidden % self.hadamard == 0), (
            f"hadamard ({self.hadamard}) must be a power of 2 that divides n_hidden ({self.n_hidden})")
        assert 0 <= self.draft_vocab <= self.vocab_size, (
            f"draft_vocab ({self.draft_vocab}) must be 0 (all tokens) to vocab_size ({self.vocab_size})")
        assert self.head_dim % 2 == 0, f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs"


def config_of(knobs, vocab_size):
    """The GPTConfig that a script's knobs (a dict with more in it) describe, for a vocabulary of this size."""
    known = {name: knobs[name] for name in GPTConfig.__dataclass_fields__ if name in knobs}
    return GPTConfig(**known | {'vocab_size': vocab_size})

# -----------------------------------------------------------------------------
# the trunk

def norm(x, eps=0.0):
    """RMSNorm without weights (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=eps or None)


def softcap(y, cap):
    """Squashes logits y into (-cap, cap); small ones hardly change (Gemma 2, arXiv 2408.00118). 0: no cap."""
    return cap * torch.tanh(y / cap) if cap else y


def hadamard(x, n):
    """
    Multiplies every n neighbours of x (..., K) by the Hadamard matrix of size n, a power of 2. Each output is the sum
    of all n inputs with its own signs, so one very large input is spread over all outputs; twice gives n times x. Made
    of sums and differences only, so the bits do not depend on how many rows there are.
    """
    half = 1
    while half < n:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(dim=-2)                    # (..., K / (2 half), half) both
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x


def rope_tables(config):
    """(cos, cos) and (sin, -sin) of every position, (block_size, head_dim) float32 both (arXiv 2104.09864)."""
    freq = config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float32), freq)
    cos, sin = (t.bfloat16().float() if config.rope_bf16 else t for t in (angle.cos(), angle.sin()))
    return torch.cat((cos, cos), dim=1), torch.cat((sin, -sin), dim=1)


def rotate(x, cos, sin):
    """Turns the pairs (i, i + head_dim/2) of x (..., heads, head_dim) by minus the position's angle."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def sees(query, key):
    """
    Whether a token at position query attends to the one at position key: to itself and all before it. Every mask in the
    repo is made of this rule. query and key: ints or tensors that broadcast -> bool of the same shape.
    """
    return key <= query


def causal_attention(q, k, v):
    """
    q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim) -> (B, n_head, T, head_dim). is_causal=True is the
    rule of sees; PyTorch's kernels are faster with it than with a mask.
    """
    if data.attention.is_faster(v):
        return data.attention.attention(q.to(v.dtype), k.to(v.dtype), v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) < q.size(1))


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, c.n_head, c.n_kv_head, c.head_dim
        self.qk_norm, self.eps = c.qk_norm, c.norm_eps
        self.c_q = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=False)
        self.c_k = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False)
        self.c_v = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False)
        self.c_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        # for decoding these three are joined (layouts.for_decoding); in training they are separate, for Muon
        self.c_qkv = None

    def forward(self, x, cos, sin, cache):
        return self.c_proj(self.hidden(x, cos, sin, cache))

    def hidden(self, x, cos, sin, cache):
        """What c_proj reads: (B, T, n_embd) -> (B, T, n_head * head_dim)."""
        q, k, v = self.queries_keys_values(x, cos, sin)                          # (B, T, heads, head_dim)
        if cache is None:
            y = causal_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        else:
            y = cache.attend(self.layer, q, k, v)                                # (B, T, n_head, head_dim) either way
        return y.flatten(2)

    def queries_keys_values(self, x, cos, sin):
        """(B, T, n_embd) -> q (B, T, n_head, head_dim), k and v (B, T, n_kv_head, head_dim); q and k are rotated."""
        B, T, _ = x.shape
        n_q, n_kv = self.n_head, self.n_kv_head
        qkv = torch.cat((self.c_q(x), self.c_k(x), self.c_v(x)), dim=-1) if self.c_qkv is None else self.c_qkv(x)
        qk, v = qkv.view(B, T, n_q + 2 * n_kv, self.head_dim).split((n_q + n_kv, n_kv), dim=2)
        qk = rotate(qk, cos, sin)
        if self.qk_norm:
            qk = norm(qk, self.eps)
        return *qk.split((n_q, n_kv), dim=2), v


class MLP(nn.Module):
    """relu^2 (Primer, arXiv 2109.08668)"""
    readers = ('c_fc',)                 # the matrices that read x

    @staticmethod
    def undo(scale):
        """By what to divide c_fc's rows so that hidden units become scale times smaller."""
        return scale.sqrt()

    def __init__(self, n_in, n_hidden, n_out, turned=0):
        super().__init__()
        self.c_fc = nn.Linear(n_in, n_hidden, bias=False)
        self.c_proj = nn.Linear(n_hidden, n_out, bias=False)
        self.turned = turned            # GPTConfig.hadamard

    def forward(self, x):
        return self.c_proj(self.hidden(x))

    def hidden(self, x):
        """What c_proj reads: (..., n_in) -> (..., n_hidden)."""
        return hadamard(F.relu(self.c_fc(x)).square(), self.turned)


class SwiGLU(nn.Module):
    """A Llama's MLP: hidden units are multiplied by gates, which a second matrix computes (arXiv 2002.05202)."""
    readers = ('c_gate', 'c_fc')

    @staticmethod
    def undo(scale):
        return scale

    def __init__(self, n_in, n_hidden, n_out, turned=0):
        super().__init__()
        self.turned = turned
        self.c_gate = nn.Linear(n_in, n_hidden, bias=False)
        self.c_fc = nn.Linear(n_in, n_hidden, bias=False)
        self.c_proj = nn.Linear(n_hidden, n_out, bias=False)
        self.c_gate_fc = None           # a decoder joins the two that read x, as Attention's c_qkv joins three

    def forward(self, x):
        return self.c_proj(self.hidden(x))

    def hidden(self, x):
        """As MLP's."""
        if self.c_gate_fc is None:
            gate, hidden = self.c_gate(x), self.c_fc(x)
        else:
            gate, hidden = self.c_gate_fc(x).chunk(2, dim=-1)
        return hadamard(F.silu(gate) * hidden, self.turned)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attn = Attention(c, layer)
        self.mlp = (SwiGLU if c.mlp == 'swiglu' else MLP)(c.n_embd, c.n_hidden, c.n_embd, c.hadamard)
        self.dropout, self.eps = c.dropout, c.norm_eps

    def forward(self, x, cos, sin, cache):
        x = x + F.dropout(self.attn(norm(x, self.eps), cos, sin, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(norm(x, self.eps)), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            h=nn.ModuleList(Block(c, i) for i in range(c.n_layer))))
        if c.out_proj:
            self.transformer['c_out'] = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        # one residual MLP per distance; they share lm_head: another vocabulary table each would outweigh the trunk
        if c.multi_token_n:
            hidden = round(c.multi_token_hidden_mult * c.n_embd)
            self.multi_token = nn.ModuleList(MLP(c.n_embd, hidden, c.n_embd) for _ in range(c.multi_token_n))
        # one cell, applied again for each further token; it reads the state and the token just drafted
        if c.draft_n:
            self.draft = MLP(2 * c.n_embd, round(c.draft_hidden_mult * c.n_embd), c.n_embd)
            self.draft_lm_head = None   # a decoder puts lm_head's first rows here, if draft_vocab says so
        self.norm, self.softcap = norm, softcap     # a decoder may have others (layouts.for_decoding)
        cos, sin = rope_tables(c)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        Branch outputs and lm_head start at zero (unless it is tied, and starts as the embedding): the first loss is
        exactly ln(vocab_size) and every block starts as the identity.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
                zero = name.endswith(('c_proj', 'c_out')) or (name == 'lm_head' and not self.config.tie_weights)
                nn.init.normal_(module.weight, std=0.0 if zero else std)
        # embed() norms each row, so a row's length does not change the output. But it decides how far a step of AdamW
        # turns the row: rows with entries of size 1 would hardly be turned at all.
        nn.init.normal_(self.transformer.wte.weight, std=self.config.n_embd ** -0.5)

    def embed(self, idx):
        """(B, T) ids -> (B, T, n_embd): embeddings, as the trunk and the draft cell read them."""
        x = self.transformer.wte(idx)
        return self.norm(x, self.config.norm_eps) if self.config.embed_norm else x

    def trunk(self, idx, cache=None):
        """
        idx (B, T) int64 -> (B, T, n_embd), the states that all heads read. Without a cache the T tokens start at
        position 0; with one (data/cache.py) they follow what each row of it holds, and it stores their keys and values.
        """
        if cache is None:
            assert idx.size(1) <= self.config.block_size, \
                f"{idx.size(1)} tokens do not fit block_size ({self.config.block_size}): shorten the input"
            cos, sin = self.cos[:idx.size(1), None], self.sin[:idx.size(1), None]    # (T, 1, head_dim)
        else:
            position = cache.advance(idx.size(1))                # a slice of T when all rows agree, else (B, T)
            cos, sin = self.cos[position].unsqueeze(-2), self.sin[position].unsqueeze(-2)
        x = F.dropout(self.embed(idx), self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cos, sin, cache)
        return self.norm(x, self.config.norm_eps)

    # -------------------------------------------------------------------------
    # the heads

    def logits(self, x, head=None):
        """
        States (..., n_embd) -> logits (..., vocab_size), at least float32. head: a module to use in place of lm_head,
        whose outputs are then the last dimension.
        """
        y = (head or self.lm_head)(self.before_head(x))
        return self.softcap(y.to(torch.promote_types(y.dtype, torch.float32)), self.config.softcap)

    def before_head(self, x):
        """States (..., n_embd) -> the input of lm_head, of the same shape."""
        return x + self.transformer.c_out(x) if self.config.out_proj else x

    def multi_token_state(self, x, i):
        """The trunk's state at t -> the state from which lm_head predicts token t+2+i; (..., n_embd) both."""
        return norm(x + self.multi_token[i](x), self.config.norm_eps)

    def draft_state(self, x, idx):
        """
        One step of the draft cell: a state x (B, T, n_embd) and the token after it, idx (B, T) -> the next state. From
        the trunk's state at t and token t+1 it makes the state that predicts t+2; applied again, t+3, and so on.
        """
        return norm(x + self.draft(torch.cat((x, self.embed(idx)), dim=-1)), self.config.norm_eps)

    def draft_logits(self, state):
        """Draft states (..., n_embd) -> logits of what the cell chooses from, (..., draft_vocab or vocab_size)."""
        if self.draft_lm_head is not None:
            return self.logits(state, self.draft_lm_head)
        n = self.config.draft_vocab or self.config.vocab_size
        if type(self.lm_head) is nn.Linear:     # multiply the first n rows only; a matrix that rounds cannot be cut
            return self.logits(state, lambda x: F.linear(x, self.lm_head.weight[:n]))
        return self.logits(state)[..., :n]

    def draft_loss(self, x, targets, idx, count):
        """
        The draft cell's loss, nats; arguments as in head_losses, count (draft_n,). A draft is kept if the model itself
        draws it, so the cell learns the model's distribution, not the text: KL(model || cell), both over the tokens
        that the cell chooses from. The model gets no gradient from this.
        """
        c, states, state = self.config, [], x
        for i in range(c.draft_n):              # as in decoding, but with the text's tokens, also masked ones
            state = self.draft_state(state, shift(idx, 1 + i, 0))
            # moved by 1+i places: beside the model's own state for the same prediction
            states.append(F.pad(state, (0, 0, 1 + i, -1 - i)).flatten(0, 1))

        def log_p(state):
            return F.log_softmax(self.draft_logits(state), dim=-1)

        def nats(x, *states):
            with torch.no_grad():
                own = log_p(x)
            kl = [(own.exp() * (own - log_p(state))).sum(dim=-1) for state in states]
            return torch.stack(kl, dim=-1)                                       # (N, draft_n)

        loss = chunked(nats, c.vocab_size, x.detach().flatten(0, 1), *states, times=1 + c.draft_n)
        step, place = torch.arange(c.draft_n, device=x.device), torch.arange(x.size(1), device=x.device)[:, None]
        keep = ((targets >= 0)[..., None] & (place > step)).flatten(0, 1)        # (N, draft_n)
        return ((loss * keep).sum(dim=0) / or_one(count)).mean()

    def forward(self, idx, targets=None, return_multi_token=False, counts=None):
        """
        model(idx)                    -> logits (B, T, vocab_size) float32
        model(idx, targets)           -> {'ce': ..., 'multi_token': ..., 'draft': ...}, nats per unmasked target, for
                                         the heads that exist
        ... return_multi_token=True   -> loss, logits, {'head_2': logits, ...}
        targets (B, T) int64 are idx shifted by one; -1 masks a position. counts: what sums of losses are divided by, as
        target_counts gives them; by default those of this batch.
        """
        x = self.trunk(idx)
        if return_multi_token:
            heads = {f'head_{i + 2}': self.logits(self.multi_token_state(x, i))
                     for i in range(self.config.multi_token_n)}
            return self.cross_entropy(x, targets), self.logits(x), heads
        if targets is None:
            return self.logits(x)
        counts = counts or self.target_counts(targets)
        ce = self.cross_entropy(x, targets, reduction='sum') / or_one(counts['ce'])
        return {'ce': ce} | self.head_losses(x, targets, idx, counts)

    def target_counts(self, targets):
        """
        targets (B, T) -> over how many targets each loss is a mean: {'ce': (), 'multi_token': (multi_token_n,),
        'draft': (draft_n,)}, for the heads that exist. If a step consists of several batches whose masks differ, all of
        them are divided by their mean counts: then it does not matter how the step is cut into batches.
        """
        places = torch.arange(targets.size(1), device=targets.device)
        learnt = targets >= 0
        counts = {'ce': learnt.sum()}
        for head, n in (('multi_token', self.config.multi_token_n), ('draft', self.config.draft_n)):
            if n:       # head i predicts 1+i places further on, so nothing predicts a row's first 1+i targets
                counts[head] = torch.stack([(learnt & (places > i)).sum() for i in range(n)])
        return counts

    def head_losses(self, x, targets, idx, counts=None):
        """
        x (B, T, n_embd): the trunk's states; targets, idx (B, T): as in forward; counts: of target_counts ->
        {'multi_token': ..., 'draft': ...}, nats per unmasked target, for the heads that exist.
        """
        losses, n = {}, self.config.multi_token_n
        counts = counts or self.target_counts(targets)
        if n:       # head i at position t predicts the target of position t+1+i
            sums = [self.cross_entropy(self.multi_token_state(x, i), shift(targets, 1 + i), reduction='sum')
                    for i in range(n)]
            losses['multi_token'] = sum(s / or_one(count) for s, count in zip(sums, counts['multi_token'])) / n
        if self.config.draft_n:
            losses['draft'] = self.draft_loss(x, targets, idx, counts['draft'])
        return losses

    def cross_entropy(self, x, targets, reduction='mean'):
        """
        States (B, T, n_embd), targets (B, T) with -1 masked -> nats: the mean over unmasked targets, their sum, or
        (B * T,) for reduction='none'.
        """
        def nats(x, targets):
            return F.cross_entropy(self.logits(x), targets, ignore_index=-1, reduction='none')
        loss = chunked(nats, self.config.vocab_size, x.flatten(0, 1), targets.flatten())
        if reduction == 'none':
            return loss
        return loss.sum() if reduction == 'sum' else loss.sum() / or_one((targets >= 0).sum())

    # -------------------------------------------------------------------------
    # accounting: one definition each; the parts sum to the total

    def params(self):
        """Parameters by part; a tied lm_head counts once, as embedding."""
        count = dict.fromkeys(PARTS.values(), 0)
        for name, p in self.named_parameters():
            count[part_of(name)] += p.numel()
        return count | {'total': sum(count.values())}

    def flops_per_token(self, training=True):
        """
        FLOPs of a token at full context: 2 per weight that is multiplied and 4 * head_dim per head and key; backward
        costs twice as much as forward (PaLM, arXiv 2204.02311, appendix B). Training a draft head also takes the
        model's own logits for draft_vocab tokens, forward only.
        """
        c, n = self.config, self.params()
        logits = (c.vocab_size + c.n_embd * c.out_proj) * c.n_embd
        drafts = ((c.draft_vocab or c.vocab_size) + c.n_embd * c.out_proj) * c.n_embd
        weights = n['trunk'] + logits * (1 + c.multi_token_n) + n['multi_token'] + (drafts + n['draft']) * c.draft_n
        forward = 2 * weights + 4 * c.n_layer * c.n_head * c.head_dim * c.block_size
        return 3 * forward + 2 * drafts * (c.draft_n > 0) if training else forward

    def kv_bytes_per_token(self, int8=False):
        """Bytes of the cache for one token of context: float32, or integers with a float32 scale for each head."""
        c = self.config
        return 2 * c.n_layer * c.n_kv_head * (c.head_dim + 4 if int8 else 4 * c.head_dim)


# what names of weights begin with -> the part they belong to
PARTS = {'transformer.wte': 'embedding', 'transformer.c_out': 'head', 'transformer': 'trunk', 'lm_head': 'head',
         'multi_token': 'multi_token', 'draft': 'draft'}
NEW_HEADS = ('multi_token', 'draft')        # heads that a training may add to a model


def part_of(name):
    """The name of a weight -> its part, one of PARTS."""
    return next(part for start, part in PARTS.items() if name.startswith(start))


def or_one(count):
    """count, with 1 in the place of 0: a sum divided by it is 0, not NaN, for a batch without targets."""
    return count + (count == 0)


def shift(x, n, fill=-1):
    """x (B, T) moved n places to the left, with fill at the end; -1 masks a target."""
    return F.pad(x[:, n:], (0, n), value=fill)


def chunked(f, vocab_size, *rows, times=1):
    """
    f(*rows) -> (N,), computed in chunks of the N rows whose fp32 logits fit into LOSS_CHUNK_BYTES (compiled for a GPU,
    GPU_CHUNKS times that). Backward computes each chunk again instead of keeping it, so that memory does not grow with
    N * vocab_size. times: how many sets of logits f computes for a row.
    """
    n = rows_in_a_chunk(vocab_size, times)
    if rows[0].device.type == 'cuda' and torch.compiler.is_compiling():
        n *= GPU_CHUNKS
    if rows[0].size(0) <= n:
        return f(*rows)
    parts = zip(*(r.split(n) for r in rows))
    return torch.cat([checkpoint(f, *part, use_reentrant=False) for part in parts])


def rows_in_a_chunk(vocab_size, times=1):
    """How many rows have logits that take LOSS_CHUNK_BYTES, if each has `times` sets of them."""
    return max(1, LOSS_CHUNK_BYTES // (4 * vocab_size * times))


# -----------------------------------------------------------------------------
# evaluation: the one place that measures loss

class LossTotal:
    """
    Adds up the losses of batches. token_bytes: the bytes of each id. Special tokens have 0 bytes, and count neither as
    bits nor as bytes in bits per byte (nanochat's definition).
    """
    def __init__(self, token_bytes=None, device='cpu'):
        self.size = None if token_bytes is None else torch.tensor(token_bytes, device=device)
        self.sums = torch.zeros(4, dtype=torch.float64)     # nats, tokens, nats of tokens with bytes, bytes

    def add(self, nats, targets):
        """nats (N,) float32 of targets (N,) int64; -1 is masked."""
        self.sums[0] += nats.sum().item()
        self.sums[1] += (targets >= 0).sum().item()
        if self.size is not None:
            size = self.size[targets.clamp(min=0)] * (targets >= 0)
            self.sums[2] += nats[size > 0].sum().item()
            self.sums[3] += size.sum().item()

    def result(self):
        """-> {'loss': nats per token, 'bpb': bits per byte or None, 'tokens': targets counted}, over all processes."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        nats, tokens, nats_of_bytes, n_bytes = self.sums.tolist()
        assert tokens > 0, "the validation split has no unmasked targets"
        bpb = nats_of_bytes / math.log(2) / n_bytes if n_bytes else None
        return {'loss': nats / tokens, 'bpb': bpb, 'tokens': int(tokens)}


@torch.no_grad()
def evaluate(model, batches, token_bytes=None, make_cache=None):
    """
    The loss over batches of (x, y), y = -1 masked -> {'loss': nats per token, 'bpb': bits per byte, 'tokens': targets
    counted}. make_cache(rows) -> cache: measures the loss of decoding with such caches. Leaves the model in eval mode.
    """
    model.eval()
    device = model.cos.device
    total = LossTotal(token_bytes, device)
    for x, y in batches:
        x, y = x.to(device), y.to(device)                                        # (B, T) both
        cache = make_cache(len(x)) if make_cache else None
        states = model.trunk(x, cache)
        total.add(model.cross_entropy(states, y, reduction='none'), y.flatten())
    return total.result()
