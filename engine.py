"""
Everything about producing tokens: plain decoding first, then what makes it fast.

    from engine import Engine, Sampling, Speculation
    engine = Engine(model)
    rows = engine.complete([ids_a, ids_b], 100, Sampling(temperature=0.8, top_k=200, seed=1337))    # token lists
    for step in engine.generate([ids], 100, Sampling(seed=1), Speculation('head', n=4)):
        for row, tokens in step: ...                                # new tokens of each row, as they come

`decode` below is the whole of decoding, for one text and one token at a time; its cache is in data/cache.py, its draw
in data/sampling.py. What follows makes it faster and never changes the text: many rows at once, drafts that are
verified together (speculation), a cache that a conversation keeps, and whole rounds compiled into one call.
"""
import codecs
import functools
import sys
import time
from dataclasses import dataclass, replace

import torch

from data.cache import FEW, KVCache, StaticCache
from data.drafters import DRAFTERS, HEADS, Depth, draft_head, draft_multi_token
from data.kernels import KernelRound
from data.layouts import step_of
from data.sampling import COLD, Noise, Sampling, common_length, draw

PREFILL_CHUNK = 256     # tokens of a prompt that are read in one pass, which bounds the memory that a long prompt takes
                        # (512 are slower on a CPU, which must find and clear more fresh memory for every layer)

# -----------------------------------------------------------------------------
# plain decoding: read the prompt, then one step and one draw for every token

@torch.inference_mode()
def decode(model, prompt, max_new_tokens, sampling):
    """
    prompt (a list of token ids) -> the list of max_new_tokens ids that follow it. This is the slow and simple way;
    tests/test_engine.py compares all other ways with it.
    """
    device, text = model.cos.device, list(prompt)
    cache = KVCache(model.config, batch=1, device=device)
    noise = Noise(sampling.seed, model.config.vocab_size, device)

    # prefill: the prompt without its last token goes through the trunk, many tokens in a pass. What the trunk returns
    # is not needed, only the keys and values that it leaves in the cache.
    for start in range(0, len(prompt) - 1, PREFILL_CHUNK):
        chunk = prompt[start:min(start + PREFILL_CHUNK, len(prompt) - 1)]
        model.trunk(torch.tensor([chunk], device=device), cache)

    for _ in range(max_new_tokens):
        # one step: only the newest token is read; attention finds the keys and values of all others in the cache
        last = torch.tensor([text[-1:]], device=device)                     # (1, 1)
        logits = model.logits(model.trunk(last, cache))                     # (1, 1, vocab_size)
        # the draw: noise depends only on the seed, the row (0) and the position, so that a run can be repeated
        token = draw(logits, noise([0], [len(text)], 1), sampling)          # (1, 1)
        text.append(token.item())
    return text[len(prompt):]

# -----------------------------------------------------------------------------
# speculation: guess some tokens, let the model read them all in one pass, keep those that it would have drawn itself

@dataclass(frozen=True)
class Speculation:
    """
    Settings of speculative decoding. drafter: 'head' (the draft head), 'mtp' (multi-token heads), 'ngram' (prompt
    lookup), 'random', 'none', or a function of your own, see data/drafters.py.
    """
    drafter: object = 'head'
    n: int = 8                  # the most tokens that are drafted for a pass
    adapt: bool = True          # draft fewer, or none, if that has been faster so far

    def check(self, model):
        """AssertionError if model cannot be decoded with these settings."""
        assert callable(self.drafter) or self.drafter in DRAFTERS, \
            f"drafter ({self.drafter}) must be one of {', '.join(DRAFTERS)}, or a function"
        assert 0 <= self.n < FEW, \
            f"{self.n} drafts are too many: give at most {FEW - 1}, more tokens at once are attended in another order"
        head = HEADS.get(self.drafter)
        assert head is None or hasattr(model, head), (
            f"drafter ({self.drafter}) needs a model with a {head} head, which this one has not: "
            f"train one with --{head}_n=4, or draft with ngram")


def count_kept(drafts, drawn):
    """
    How many drafts of a row are kept: all up to the first that differs from what the model drew in its place. drafts:
    the k tokens that were guessed; drawn: the k+1 tokens that the model drew, drawn[i] after the text and i drafts.

    drawn[0] follows the text itself, so it is right whatever was guessed. drawn[1] follows the first draft: it is right
    if that draft equals drawn[0]. And so on. The text therefore continues with the model's own draws, up to and
    including the first that differs from its draft (or the one after the last draft). No probabilities are compared:
    the noise of a position is the same for every drafter, and so is the text (drafter-invariant sampling, arXiv
    2408.07978).
    """
    kept = 0
    while kept < len(drafts) and drafts[kept] == drawn[kept]:
        kept += 1
    return kept


def step_plain(model, cache, last, noise, pick):
    """
    Decodes n tokens one after the other. last (B, 1): the newest token of each row; noise (B, n, V); pick(logits,
    noise) draws -> the tokens read (B, n), the tokens drawn (B, n), the states of those read (B, n, n_embd).
    """
    tokens, states = [last], []
    for i in range(noise.size(1)):
        x = model.trunk(tokens[-1], cache)                                  # (B, 1, n_embd)
        states.append(x)
        tokens.append(pick(model.logits(x), noise[:, i:i + 1]))             # (B, 1)
    return torch.cat(tokens[:-1], dim=1), torch.cat(tokens[1:], dim=1), torch.cat(states, dim=1)


def step_speculative(model, cache, x, last, texts, noise, draft, pick):
    """
    Drafts k tokens and reads them in one pass. x (B, 1, n_embd): the state from which last (B, 1) was drawn; noise
    (B, k+1, V) -> the tokens read, which are last and the drafts (B, k+1); what the model draws after each of them
    (B, k+1); and their states (B, k+1, n_embd).
    """
    drafts = draft(model, x, last, texts, noise[:, :-1], pick)              # (B, k)
    tokens = torch.cat((last, drafts), dim=1)
    states = model.trunk(tokens, cache)
    return tokens, pick(model.logits(states), noise[:, :tokens.size(1)]), states

# -----------------------------------------------------------------------------
# many rows at once

class Rows:
    """The rows that are not finished: place b of the batch is row numbers[b], whose text so far is texts[b]."""
    def __init__(self, prompts, num_samples, max_new_tokens, stop):
        self.numbers = list(range(len(prompts) * num_samples))
        self.texts = [list(prompts[row // num_samples]) for row in self.numbers]
        self.limits = [len(text) + max_new_tokens for text in self.texts]
        self.stop = stop

    def room(self, cache):
        """How many tokens may still be added: up to the limits of the rows and to the end of the context."""
        return min(cache.block_size - max(cache.lengths), max(m - len(t) for m, t in zip(self.limits, self.texts)))

    def add(self, drawn, kept):
        """
        Appends to row b its kept drafts and one draw more, drawn[b][:kept[b] + 1], as far as its limit and its stop
        tokens allow -> the new tokens of each row.
        """
        new = []
        for text, limit, tokens, n in zip(self.texts, self.limits, drawn, kept):
            tokens = tokens[:min(n + 1, limit - len(text))]
            stops = [i for i, token in enumerate(tokens) if token in self.stop]
            if stops:
                tokens = tokens[:stops[0] + 1]
            text += tokens
            new.append(tokens)
        return new

    def going(self):
        """The places of the rows that are not finished."""
        return [b for b, text in enumerate(self.texts) if len(text) < self.limits[b] and text[-1] not in self.stop]

    def keep(self, places):
        self.numbers, self.texts, self.limits = (
            [old[b] for b in places] for old in (self.numbers, self.texts, self.limits))


class Rounds:
    """
    The rounds of one generation. A round reads the last token of every row and k <= n drafts. It is plain (k = 0),
    speculative, or, for a single sequence, one call: of kernels.cpp, or compiled (then always with n drafts). Such a
    call without a drafter decodes k + 1 tokens one after the other; the first k count as drafts that were all kept.
    """
    def __init__(self, engine, rows, sampling, speculation):
        self.model, self.adapt, self.n = engine.model, speculation.adapt, speculation.n
        if speculation.drafter == 'mtp':
            self.n = min(self.n, engine.config.multi_token_n)
        self.draft = DRAFTERS.get(speculation.drafter, speculation.drafter) if self.n else None
        if isinstance(self.draft, type):            # a class: a drafter that learns during the generation
            self.draft = self.draft()
        self.depth = Depth(self.n)
        self.pick = functools.partial(draw, sampling=sampling)
        self.device, self.cold = engine.device, sampling.temperature < COLD
        self.random = Noise(sampling.seed, engine.config.vocab_size, engine.device)
        self.kernel = self.compiled = None
        if len(rows.numbers) == 1 and self.draft is None:
            self.kernel = KernelRound(self.model, sampling) if KernelRound.pays(self.model, sampling) else None
        if engine.compile and len(rows.numbers) == 1 and self.draft in (None, draft_head, draft_multi_token):
            self.compiled = engine.compiled_step(self.draft, sampling)

    def drafts(self, x, room):
        """
        How many tokens the next round drafts, when there is room for so many more tokens. 0 before the first pass:
        drafters read the state x of the last token but one, which is not known yet.
        """
        room -= 1                                   # a round gives one token more than it has drafts
        if x is None:
            return 0
        if self.draft is None:                      # several tokens are decoded in one call; compiled, only if n fit
            most = min(room, self.n)
            return most if self.kernel or self.compiled and most == self.n else 0
        if self.adapt and not self.compiled:
            return min(room, self.depth.choose())
        return min(room, self.n)

    def noise(self, rows, n):
        """-> (B, n, V). At temperature 0 the largest logit wins whatever the noise, so it is all zeros there."""
        if self.cold:
            return torch.zeros((), device=self.device).expand(len(rows.texts), n, self.random.vocab_size)
        return self.random(rows.numbers, [len(text) for text in rows.texts], n)

    def run(self, rows, cache, x, k):
        """-> tokens read (B, k+1), tokens drawn (B, k+1), states (B, k+1, n_embd)"""
        noise = self.noise(rows, k + 1)
        last = torch.tensor([text[-1:] for text in rows.texts], device=self.device)
        if self.kernel:
            return self.kernel(cache, last, noise)
        if self.compiled and k == self.n and x is not None:
            start = torch.tensor(cache.lengths[0], device=self.device)
            result = self.compiled(cache.store, start, x, last, noise)
            cache.lengths[0] += k + 1
            return result
        if k:
            return step_speculative(self.model, cache, x, last, rows.texts, noise, self.draft, self.pick)
        return step_plain(self.model, cache, last, noise, self.pick)

# -----------------------------------------------------------------------------
# the engine

MOST_LAYERS = 12        # a round unrolls its layers and tokens: compiling 30 layers did not end in nine minutes


def rounds_pay(model):
    """Whether a model has few enough layers to compile whole rounds of it; if not, prints a line."""
    n = model.config.n_layer
    if n > MOST_LAYERS:
        print(f'compile: whole rounds of {n} layers would take minutes to compile (up to {MOST_LAYERS} do not): '
              'decoding token by token', file=sys.stderr)
    return n <= MOST_LAYERS


class Engine:
    """
    Decodes with one model. compile=True compiles the decoding of single sequences, which pays after some thousand
    tokens; on a GPU only one generation may then run at a time. cache_dtype may be torch.int8.
    After a generation, stats holds tokens, passes (of the trunk), seconds, prefill_seconds, first_seconds (to the first
    token), tok_s (after the prompts were read), drafted, kept, reused (tokens of the prompt that were in the cache of a
    conversation), and accepted: how many passes of a row kept 0, 1, 2, ... drafts.
    """
    def __init__(self, model, compile=False, cache_dtype=torch.float32):
        assert not compile or step_of(model) == 'PyTorch', \
            'compile=True compiles what PyTorch does: arrange the model by for_decoding(model, kernels=False)'
        self.model, self.config, self.device = model.eval(), model.config, model.cos.device
        self.compile, self.cache_dtype = compile, cache_dtype
        self.stats = {}
        self.steps = {}                     # compiled rounds, by drafter and sampling
        self.graph_cache = None             # the cache of compiled rounds on a GPU
        self.forget()

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, sampling=Sampling(), speculation=None, stop=(), num_samples=1,
                 slide=False, reuse=False):
        """
        Continues every prompt (a token list) num_samples times, all in one batch; row r belongs to prompt
        r // num_samples. Yields [(row, new tokens), ...] for every pass. A row ends after max_new_tokens or with a
        token of stop (which is yielded), and leaves the batch. slide=True: a row that has filled the context continues
        from its later half. Without it, prompt and max_new_tokens may be at most block_size + 1 tokens (the last one
        drawn is not read): else AssertionError. reuse=True (one prompt, one sample): keeps the cache, and continues
        from it if the next prompt begins with the same tokens, as in a chat. speculation never changes the text; but
        compiled rounds may differ from plain ones where two tokens score almost the same.
        """
        clock = time.perf_counter()
        speculation = speculation or Speculation('none')
        self.check(prompts, max_new_tokens, num_samples, speculation, slide, reuse)
        rows = Rows(prompts, num_samples, max_new_tokens, stop)
        rounds = Rounds(self, rows, sampling, speculation)
        cache, held = self.open_cache(rounds, prompts, max_new_tokens, reuse)
        x = self.read(cache, [prompt[held:-1] for prompt in prompts], num_samples)
        self.start_stats(rounds, held, clock)
        while rows.numbers and max_new_tokens:
            began = time.perf_counter()
            k = rounds.drafts(x, rows.room(cache))
            read, drawn, x = rounds.run(rows, cache, x, k)
            k = read.size(1) - 1                                            # the drafter may have found fewer
            drawn = drawn.tolist()
            kept = [count_kept(tokens[1:], own) for tokens, own in zip(read.tolist(), drawn)]
            new = rows.add(drawn, kept)
            if k:       # go back to the last token that was right: its state, and the cache up to it
                places = torch.arange(len(kept), device=self.device)
                x = x[places, torch.tensor(kept, device=self.device)][:, None]                  # (B, 1, n_embd)
                cache.rewind([length - k + n for length, n in zip(cache.lengths, kept)])
            if reuse:
                self.held_text, self.held_cache = rows.texts[0], cache
            if rounds.draft:
                rounds.depth.saw(k, kept, time.perf_counter() - began)
            self.count(rounds, k, kept, new, clock)
            yield list(zip(rows.numbers, new))

            going = rows.going()
            if not going:
                break
            if len(going) < len(kept):
                cache.keep(going)
                rows.keep(going)
                x = x[going]
            if max(cache.lengths) == cache.block_size:
                self.slide(cache, rows, x)
                self.forget()               # the cache no longer holds the text from its beginning
                reuse = False

    def check(self, prompts, max_new_tokens, num_samples, speculation, slide, reuse):
        speculation.check(self.model)
        assert not reuse or len(prompts) * num_samples == 1, \
            f"reuse=True is for one prompt and one sample, not {len(prompts)} and {num_samples}"
        for prompt in prompts:
            self.check_length(len(prompt), max_new_tokens, slide)

    def check_length(self, n, max_new_tokens, slide=False):
        """AssertionError if max_new_tokens cannot follow a prompt of n tokens."""
        room = self.config.block_size
        assert n > 0, "the prompt is empty: start with at least one character"
        assert n <= room and (slide or n + max_new_tokens <= room + 1), (
            f"the prompt's {n} tokens + max_new_tokens ({max_new_tokens}) do not fit the context of {room}: "
            "shorten one of them, or let the window slide (slide=True)")

    # -------------------------------------------------------------------------
    # reading prompts

    @torch.inference_mode()
    def prefill(self, cache, prompts):
        """
        Reads prompts (token lists of any lengths) into the rows of cache -> the states of their last tokens,
        (B, 1, n_embd).
        """
        before = cache.lengths
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        # padded on the right: no real token ever sees the padding
        ids = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)                            # (B, longest)
        last = None
        for start in range(0, ids.size(1), PREFILL_CHUNK):
            x = self.model.trunk(ids[:, start:start + PREFILL_CHUNK].to(self.device), cache)
            at = (lengths - 1 - start).clamp(0, x.size(1) - 1)
            state = x[torch.arange(len(prompts), device=self.device), at][:, None]              # (B, 1, n_embd)
            # rows that ended in an earlier chunk have their state already
            last = state if last is None else torch.where((lengths > start)[:, None, None], state, last)
        cache.rewind([n + len(prompt) for n, prompt in zip(before, prompts)])                   # forgets the padding
        return last

    def read(self, cache, prompts, num_samples):
        """prefill, then a row for each sample -> the states of the rows' last tokens; None if nothing was read."""
        x = self.prefill(cache, prompts) if any(prompts) else None
        if num_samples > 1:
            copies = [b for b in range(len(prompts)) for _ in range(num_samples)]
            cache.keep(copies)
            x = x[copies] if x is not None else None
        return x

    # -------------------------------------------------------------------------
    # reuse: a part of the prompt that is already in the cache is not read again

    def forget(self):
        """Drops the text and the cache of the last generation."""
        self.held_text, self.held_cache = [], None

    def open_cache(self, rounds, prompts, max_new_tokens, reuse):
        """
        -> the cache to decode with, and how many tokens of the prompt it already holds: with reuse, the common prefix
        of the prompt and the last text.
        """
        on_gpu, room = rounds.compiled and self.device.type == 'cuda', self.room_for(rounds, prompts, max_new_tokens)
        text, cache = [], None
        if reuse:
            text, cache = self.held_text, self.held_cache
            self.forget()                       # until a pass has ended, nothing is certain about what the cache holds
        if on_gpu and cache is not self.graph_cache:
            text, cache = [], None              # a CUDA graph writes into its own cache only
        if cache is None and on_gpu:
            cache = self.open_graph_cache()
        elif cache is None:
            cache = KVCache(self.config, len(prompts), room, self.cache_dtype, self.device)
        # The last token of a text is in the cache only if it was a draft. It is read again in any case, so that results
        # do not depend on the drafter. The last token of the prompt is read by the first round.
        held = common_length([text[:-1], prompts[0][:-1]])
        cache.rewind([held] * len(prompts))
        cache.grow(room)
        return cache, held

    def room_for(self, rounds, prompts, max_new_tokens):
        """How many tokens the cache must hold, drafts included."""
        room, longest = max(map(len, prompts)) + max_new_tokens + rounds.n, self.config.block_size
        if rounds.compiled:                     # every size is compiled anew, so only powers of two are used
            room = longest if self.device.type == 'cuda' else 1 << (room - 1).bit_length()
        return min(room, longest)

    # -------------------------------------------------------------------------
    # sliding on beyond the context

    def slide(self, cache, rows, x):
        """Reads the later half of rows that have filled the context again, from position 0, and updates their x."""
        for b, n in enumerate(cache.lengths):
            if n == cache.block_size:
                fresh = KVCache(self.config, 1, None, self.cache_dtype, self.device)
                later = rows.texts[b][-max(2, n // 2):-1]
                x[b] = self.prefill(fresh, [later])[0]
                cache.replace(b, fresh)

    # -------------------------------------------------------------------------
    # compiled rounds

    def compiled_step(self, draft, sampling):
        """
        A whole round as one compiled function, (store, start, x, last, noise) -> (tokens read, tokens drawn, states). A
        small model spends most of a token's time on calling some hundred operations; this is a single call.
        """
        key = draft, replace(sampling, seed=0)      # the seed matters only to the noise, which is an argument
        if key in self.steps:
            return self.steps[key]
        model, pick = self.model, functools.partial(draw, sampling=key[1])

        def step(store, start, x, last, noise):
            cache = StaticCache(store, start)
            if draft is None:
                return step_plain(model, cache, last, noise, pick)
            return step_speculative(model, cache, x, last, None, noise, draft, pick)
        # On a GPU a round is launched as one CUDA graph, instead of some hundred kernels. inplace_buffers is off
        # because inductor of torch 2.13 would overwrite the states of a drafted pass while they are still read.
        options = {'cpp_wrapper' if self.device.type == 'cpu' else 'triton.cudagraphs': True, 'inplace_buffers': False}
        # drafters, temperatures and cache sizes all compile this same function
        torch._dynamo.config.recompile_limit = 64
        self.steps[key] = torch.compile(step, dynamic=False, fullgraph=True, options=options)
        return self.steps[key]

    def open_graph_cache(self):
        """
        The only cache for compiled rounds on a GPU, for a whole context: a CUDA graph keeps its tensors' addresses.
        """
        if self.graph_cache is None:
            self.graph_cache = KVCache(self.config, 1, None, self.cache_dtype, self.device)
            for tensors in self.graph_cache.store.values():
                for t in tensors:
                    torch._dynamo.mark_static_address(t)
        self.forget()                           # whatever text it held is overwritten
        return self.graph_cache

    # -------------------------------------------------------------------------
    # what it cost

    def start_stats(self, rounds, held, clock):
        self.stats = {'tokens': 0, 'passes': 0, 'seconds': 0.0, 'drafted': 0, 'kept': 0,
                      'accepted': [0] * (rounds.n + 1), 'reused': held,
                      'prefill_seconds': time.perf_counter() - clock}

    def count(self, rounds, k, kept, new, clock):
        """Adds a round of k drafts, of which kept were right, with these new tokens."""
        stats = self.stats
        if rounds.draft:
            stats['drafted'] += k * len(kept)
            stats['kept'] += sum(kept)
        for n in kept:
            stats['accepted'][n] += 1
        stats['passes'] += 1 if rounds.draft else k + 1
        stats['tokens'] += sum(map(len, new))
        stats['seconds'] = time.perf_counter() - clock
        stats.setdefault('first_seconds', stats['seconds'])
        stats['tok_s'] = stats['tokens'] / max(1e-9, stats['seconds'] - stats['prefill_seconds'])

    # -------------------------------------------------------------------------
    # ways to call it

    def complete(self, prompts, max_new_tokens, sampling=Sampling(), speculation=None, num_samples=1, **how):
        """The new tokens of every row, as a list of lists; arguments as generate."""
        out = [[] for _ in range(len(prompts) * num_samples)]
        for step in self.generate(prompts, max_new_tokens, sampling, speculation, num_samples=num_samples, **how):
            for row, tokens in step:
                out[row] += tokens
        return out

    def stream(self, tokenizer, prompt, max_new_tokens, stop_strings=(), sampling=Sampling(), speculation=None,
               stop=(), **how):
        """
        Yields the text that follows prompt (a token list), piece by piece, in whole characters. It ends before the
        first of stop_strings (text that may be the beginning of one is held back until that is decided) or with a token
        of stop. Stop tokens, and the token that begins a document, are not shown.
        """
        hidden = {tokenizer.bos, *stop}
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        waiting = ''
        for step in self.generate([prompt], max_new_tokens, sampling, speculation, stop, **how):
            row, tokens = step[0]
            waiting += decoder.decode(tokenizer.decode_bytes(t for t in tokens if t not in hidden))
            found = [waiting.find(s) for s in stop_strings if s in waiting]
            if found:
                yield waiting[:min(found)]
                return
            beginnings = [s[:n] for s in stop_strings for n in range(1, len(s))]
            wait = max((len(s) for s in beginnings if waiting.endswith(s)), default=0)
            if len(waiting) > wait:
                yield waiting[:len(waiting) - wait]
                waiting = waiting[len(waiting) - wait:]
        yield waiting + decoder.decode(b'', final=True)

