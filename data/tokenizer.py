"""
Text <-> token ids: one token a character, or byte-pair encoding (BPE). A library; data/<name>/prepare.py, engine.py and
sample.py use it. From the repo root:

>>> from data.tokenizer import CharTokenizer, train_bpe, from_meta, fingerprint
>>> tok = CharTokenizer('hello world')  # the vocabulary: the sorted unique characters of this text
>>> tok.encode('hello'), tok.decode([3, 2, 4, 4, 5])
([3, 2, 4, 4, 5], 'hello')
>>> tok = train_bpe(['low lower lowest, slow slower slowest'], vocab_size=256 + 4 + 9) # bytes + merges + special tokens
>>> [tok.decode([i]) for i in tok.encode('slow lows')]
['s', 'low', ' ', 'low', 's']
>>> ids, mask = tok.render_chat([{'role': 'user', 'content': 'low?'}, {'role': 'assistant', 'content': 'lower'}])
>>> tok.decode(i for i, m in zip(ids, mask) if m)  # the tokens that a chat model learns
'lower<|assistant_end|>'
>>> fingerprint(from_meta(tok.meta())) == fingerprint(tok)  # meta() is what meta.json and checkpoints hold
True

A BPE of 4,096 on Python's standard library (12 MB of text) trains in 4 s on one core of a 2-core virtual machine.
Nothing here touches the network: tiktoken does the encoding, with our own table of tokens.
"""

import contextlib
import hashlib
import heapq
import json
import time
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import regex  # comes with tiktoken, and has its \p{L}
import tiktoken

# How text is cut before any merging: no token crosses a cut. This is GPT-4's pattern, except that numbers are cut into
# at most two digits, so that a small vocabulary is not spent on three-digit numbers. It is exactly the pattern that
# nanochat trains with: its teachers must see the same cuts.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")

# In nanochat's order: the last ids of the vocabulary. The python and output ones are for tool calls; no dataset here
# has them yet.
SPECIAL_TOKENS = ('<|bos|>', '<|user_start|>', '<|user_end|>', '<|assistant_start|>', '<|assistant_end|>',
                  '<|python_start|>', '<|python_end|>', '<|output_start|>', '<|output_end|>')

# The special token that begins a text: ours and nanochat's; the one that GPT-2, SmolLM and Qwen put between two texts;
# Llama 3's. A text ends with one of ENDS, or with this token again.
BOS = ('<|bos|>', '<|endoftext|>', '<|begin_of_text|>')
ENDS = ('<|endoftext|>', '<|end_of_text|>', '<|im_end|>', '<|eot_id|>')
# Formats of conversations, and the special tokens that they need.
CHATS = {'nanochat': {*SPECIAL_TOKENS[:5]}, 'chatml': {'<|im_start|>', '<|im_end|>'}}

# Characters of every kind, for a test: the pieces into which a pattern cuts this must make up the whole of it.
ALL_KINDS = ''.join(map(chr, range(0x3100))) + "It's 12345 \r\n\r\n  x\t\t\u65e5\u672c\u8a9e \U0001f600\U0010ffff --- "


# -----------------------------------------------------------------------------
# Characters

class CharTokenizer:
    """
    One token per character (Unicode code point); ids are ranks in code-point order.

    chars: str, any text; its sorted unique characters become the vocabulary.
    ValueError if it is empty or has half a surrogate pair.
    Attributes: vocab_size int; bos and chat None, ends empty (there are no special tokens); chars str;
    token_bytes list of int, UTF-8 bytes of each id.
    """
    kind = 'char'
    bos = chat = None
    ends = frozenset()

    def __init__(self, chars):
        self.chars = ''.join(sorted(set(chars)))
        if not self.chars:
            raise ValueError('a character vocabulary needs at least one character, and this text is empty')
        if not _is_text(self.chars):
            raise ValueError('half a surrogate pair is no character, and this vocabulary has one: leave it out')
        self.vocab_size = len(self.chars)
        self._ids = {c: i for i, c in enumerate(self.chars)}
        self.token_bytes = [len(c.encode('utf-8')) for c in self.chars]

    def encode(self, text, remedy='leave them out of the prompt, or train a model on a text that has them'):
        """
        str -> list of int, one per character. ValueError names the characters that are not in the vocabulary, and the
        remedy, which depends on what the text is for.
        """
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            # repr keeps newlines and unprintable characters on the one line; an alphabet of thousands is cut short
            known, more = repr(self.chars[:120]), '...' if self.vocab_size > 120 else ''
            names = ', '.join(map(repr, unknown[:5])) + (f' and {len(unknown) - 5} more' if len(unknown) > 5 else '')
            raise ValueError(f'no token for {names}: the vocabulary has {self.vocab_size} characters, {known}{more}; '
                             f'{remedy}')
        return [self._ids[c] for c in text]

    def decode(self, ids):
        """iterable of int -> str. ValueError for an id outside the vocabulary."""
        return ''.join([self.chars[i] for i in _checked(ids, self.vocab_size)])

    def decode_bytes(self, ids):
        """iterable of int -> bytes, UTF-8. ValueError for an id outside the vocabulary."""
        return self.decode(ids).encode('utf-8')

    def meta(self):
        """dict of plain types for JSON; from_meta undoes it."""
        return {'kind': 'char', 'chars': self.chars}


# -----------------------------------------------------------------------------
# Byte-pair encoding

class BPETokenizer:
    """
    Byte-level BPE: text becomes bytes, and bytes are merged into tokens. tiktoken does the encoding.

    ranks: dict of bytes -> 0..n-1, the text tokens in the order of their ids. A lower rank merges earlier.
    pattern: str, the regular expression that cuts text into pieces before merging
        (tiktoken's dialect, Rust's fancy-regex).
    special_tokens: names, in the order of their ids. special_ids: list of int, their ids, which may be anywhere
        (SmolLM2 has them first); None: the last ones, n, n+1, ... Text tokens have all other ids.
    bos: the name of the special token that begins a text, or None; 'auto': the first of BOS that exists.
    chat: 'nanochat', 'chatml' or None, the format of conversations; 'auto': the one whose special tokens exist.
    system: the default system line of a chat, or None.
    normalizer: 'NFC' (text is first brought into Unicode's composed form: Qwen2), or None.

    Some single bytes may have no token. A character that needs one is then read as U+FFFD, whose own bytes must have
    tokens, so that every string can be encoded.
    ValueError: ranks or ids with holes, no bytes of U+FFFD, a special token twice, a pattern that does not parse.
    Attributes: vocab_size int, special tokens included; bos int, an id, or None; ends set of int, the tokens that end a
    text; pattern, chat, system, normalizer; special_tokens list of str; special_ids list of int; text_ids list of int,
    the ids of text tokens by rank; token_bytes list of int, bytes of each id and 0 for special tokens (bits per byte
    leaves those out).
    """
    kind = 'bpe'

    def __init__(self, ranks, pattern=PATTERN, special_tokens=SPECIAL_TOKENS, special_ids=None, bos='auto',
                 chat='auto', system=None, normalizer=None):
        n, self.special_tokens = len(ranks), list(special_tokens)
        if sorted(ranks.values()) != list(range(n)):
            raise ValueError(f'{n} BPE tokens must have the ids 0..{n - 1}, each once: a token is missing or repeated')
        self.vocab_size = n + len(self.special_tokens)
        self.special_ids = list(range(n, self.vocab_size)) if special_ids is None else list(special_ids)
        self._special_ids = dict(zip(self.special_tokens, self.special_ids))
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self.pattern, self.system, self.normalizer = pattern, system, normalizer
        self._bos = self._usual_bos() if bos == 'auto' else bos
        self.chat = self._usual_chat() if chat == 'auto' else chat
        self._check()
        self.bos = self._special_ids.get(self._bos)
        self.ends = {i for name, i in self._special_ids.items() if name in (self._bos, *ENDS)}

        special = set(self.special_ids)
        self._merged = sorted(ranks, key=ranks.get)  # bytes of rank 0, 1, ...
        self.text_ids = [i for i in range(self.vocab_size) if i not in special]  # of rank 0, 1, ...
        self._bytes = self._by_id(self._merged, [name.encode('utf-8') for name in self.special_tokens])
        self.token_bytes = self._by_id(map(len, self._merged), [0] * len(special))
        # tiktoken wants all bytes, and ids without holes. So it works with ranks: first those of the text tokens, then
        # those of bytes without a token (which never occur in its input), then those of special tokens (which it never
        # finds in text).
        whole = ranks | {bytes([byte]): n + i for i, byte in enumerate(self._missing)}
        names = {name: len(whole) + i for i, name in enumerate(self.special_tokens)}
        try:
            self._encoding = tiktoken.Encoding('picochat', pat_str=pattern, mergeable_ranks=whole, special_tokens=names)
        except ValueError as e:
            raise ValueError(f'the pattern of this tokenizer, {pattern!r:.60}, is none ({e}): use another') from None
        with contextlib.suppress(regex.error, TimeoutError):  # patterns that only tiktoken understands
            if not all(match.group() for match in regex.finditer(pattern, ALL_KINDS, timeout=5)):
                raise ValueError(f'the pattern of this tokenizer, {pattern!r:.60}, matches where there is nothing, of '
                                 'which tiktoken dies: use another tokenizer')
        self.encode(ALL_KINDS)  # raises now, rather than at somebody's prompt, if the pattern skips some characters

    def _usual_bos(self):
        return next((name for name in BOS if name in self._special_ids), None)

    def _usual_chat(self):
        return next((chat for chat, names in CHATS.items() if self._special_ids.keys() >= names), None)

    def _check(self):
        """ValueError unless special tokens have distinct names and ids, and pattern, bos, chat and normalizer fit."""
        ids, n = self.special_ids, len(self.special_tokens)
        if len(self.pattern) > 2**14:  # compiled, a pattern takes 3 kB of memory for each of its characters
            raise ValueError(f'the pattern of this tokenizer has {len(self.pattern):,} characters: use another')
        if not all(map(_is_text, [self.pattern, *self.special_tokens])):
            raise ValueError('the pattern or a special token of this tokenizer has half a surrogate pair, which is no '
                             'character: use another tokenizer')
        if len(set(self.special_tokens)) < n:
            raise ValueError(f'a special token is there twice: {self.special_tokens!r:.200}')
        whole = len(ids) == n and all(type(i) is int and 0 <= i < self.vocab_size for i in ids)
        if not whole or ids != sorted(set(ids)):
            raise ValueError(f'{n} special tokens must have as many ids below {self.vocab_size}, in rising order, '
                             f'not {ids!r:.200}')
        if set(self._missing) & set('\ufffd'.encode()):
            raise ValueError(f'{len(self._missing)} single bytes have no BPE token (the first is {self._missing[0]}), '
                             'among them those of U+FFFD, which would stand for them: use another tokenizer')
        if self._bos not in (None, *self.special_tokens):
            raise ValueError(f'there is no special token {self._bos!r:.80} to stand before a text')
        if self.chat is not None and not self._special_ids.keys() >= CHATS.get(self.chat, {None}):
            raise ValueError(f'chat is {self.chat!r:.40}, and must be one of {", ".join(CHATS)}, '
                             'with its special tokens')
        if self.normalizer not in (None, 'NFC'):
            raise ValueError(f'text would be brought into the form {self.normalizer!r:.40}, and only NFC is known here')

    def _by_id(self, of_text, of_specials):
        """Values for the text tokens, by rank, and for the special tokens -> one list, by id."""
        values = dict(zip(self.text_ids, of_text)) | dict(zip(self.special_ids, of_specials))
        return [values[i] for i in range(self.vocab_size)]

    def encode(self, text):
        """
        str -> list of int. Special tokens are never read out of text: '<|bos|>' typed by a user is seven ordinary
        characters. Half a surrogate pair becomes U+FFFD (tiktoken's choice), and so does a character whose bytes have
        no tokens.
        ValueError for half a million white-space characters in a row, and if the pattern fails on a text.
        """
        if len(text) >= 1_000_000:
            # tiktoken backtracks over runs of white space, and a million of it crashes it (a Rust panic, no exception).
            # Other runs are fine. With the lookbehind each run is tried once, not at each of its characters.
            run = regex.search(r'(?<!\s)\s{500000}', text)
            if run:
                raise ValueError(f'500,000 white-space characters in a row, from character {run.start()} on: '
                                 'tiktoken cannot split that; shorten it')
        if self.normalizer:
            text = unicodedata.normalize(self.normalizer, text)
        text, n_bytes = self._writable(text)
        try:
            ranks = self._encoding.encode(text, disallowed_special=())  # names of special tokens are plain text
        except BaseException as e:
            if not isinstance(e, ValueError) and type(e).__name__ != 'PanicException':  # Rust's is no Exception
                raise
            raise ValueError(f'the pattern of this tokenizer, {self.pattern!r:.60}, takes too long to cut a text: '
                             'use another tokenizer') from None
        ids = list(map(self.text_ids.__getitem__, ranks))
        if sum(map(self.token_bytes.__getitem__, ids)) != n_bytes:
            raise ValueError(f'the pattern of this tokenizer, {self.pattern!r:.60}, leaves out some of a text: '
                             'use another tokenizer')
        return ids

    def _writable(self, text):
        """A text -> the same with U+FFFD for characters without tokens, and its length in UTF-8 bytes."""
        content = _utf8(text)
        if not self._missing or content == content.translate(None, self._missing):
            return text, len(content)
        missing = set(self._missing)
        text = ''.join('\ufffd' if missing & set(c.encode()) else c for c in content.decode())
        return text, len(text.encode())

    def encode_batch(self, texts):
        """list of str -> list of lists of int, each as encode's, on several threads."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.encode, texts))

    def special(self, name):
        """'<|bos|>' -> its id. ValueError if this tokenizer has no such token."""
        if name not in self._special_ids:
            raise ValueError(f'no special token {name!r} among the {len(self.special_tokens)} of this tokenizer, '
                             f'{self.special_tokens!r:.200}')
        return self._special_ids[name]

    def decode(self, ids):
        """
        iterable of int -> str; bytes that are not UTF-8 become U+FFFD, special tokens their names.
        ValueError for an unknown id.
        """
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        """
        iterable of int -> bytes. A character may be cut in two at either end.
        ValueError for an id outside the vocabulary.
        """
        return b''.join([self._bytes[i] for i in _checked(ids, self.vocab_size)])

    def meta(self):
        """
        dict of plain types for JSON; from_meta undoes it. Tokens are in id order, each byte written as the Latin-1
        character of its value. Keys that our own tokenizers do not need are there only if their values are unusual.
        """
        meta = {'kind': 'bpe', 'ranks': [token.decode('latin-1') for token in self._merged],
                'pattern': self.pattern, 'special_tokens': self.special_tokens[:]}
        if self.special_ids and self.special_ids[0] < len(self._merged):
            meta['special_ids'] = self.special_ids[:]
        for key, value, usual in (('bos', self._bos, self._usual_bos()), ('chat', self.chat, self._usual_chat()),
                                  ('system', self.system, None), ('normalizer', self.normalizer, None)):
            if value != usual:
                meta[key] = value
        return meta

    # Conversations. nanochat writes:  <|bos|><|user_start|>Hi<|user_end|><|assistant_start|>Hello<|assistant_end|>
    # ChatML, one message a line:  <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    # with the system line as a message of its own before them; in nanochat's it is a part of the first question.

    def chat_start(self, system, question):
        """
        The system line (str; '' for none, None for the tokenizer's own) and the first question -> the ids with which
        the conversation begins, and the question as it is to be written after them. ValueError if the tokenizer has no
        format for conversations.
        """
        if self.chat is None:
            raise ValueError("this tokenizer has no special tokens for conversations, neither nanochat's, like "
                             "<|assistant_end|>, nor ChatML's, like <|im_end|>: chat needs one that has")
        if self.chat == 'nanochat':
            return [self.special('<|bos|>')], question if system is None else f'{system}\n\n{question}'
        system = self.system if system is None else system
        return sum(self.turn('system', system), []) if system else [], question

    def turn(self, role, text):
        """A message -> three lists of ids: what opens it; its text and the token that ends it; what follows it."""
        if self.chat == 'nanochat':
            return [self.special(f'<|{role}_start|>')], self.encode(text) + [self.special(f'<|{role}_end|>')], []
        # an answer must not be merged with the line end before it, after which the model begins to draw
        head, text = (f'{role}\n', text) if role == 'assistant' else ('', f'{role}\n{text}')
        return ([self.special('<|im_start|>')] + self.encode(head),
                self.encode(text) + [self.special('<|im_end|>')], self.encode('\n'))

    def render_chat(self, conversation):
        """
        A conversation in the tokenizer's format.

        conversation: list of {'role', 'content'}, or {'messages': that list}. Roles are user, assistant, user, ...;
            a system message may come first: in nanochat's format it is put in front of the first user's text, with a
            blank line between.
        Returns ids, mask: lists of int of the same length. mask is 1 for what the assistant must learn: its text and
            the token that ends it, but not what opens its message, which the engine writes.
        ValueError names the message that is wrong.
        """
        system, turns = _turns(conversation)
        ids, turns[0] = self.chat_start(system, turns[0])
        mask = [0] * len(ids)
        for i, text in enumerate(turns):
            opening, said, behind = self.turn(('user', 'assistant')[i % 2], text)
            ids += opening + said + behind
            mask += [0] * len(opening) + [i % 2] * len(said) + [0] * len(behind)
        return ids, mask


def _utf8(text):
    """A text in UTF-8, with surrogates as tiktoken reads them: a pair is one character, half of one is U+FFFD."""
    try:
        return text.encode('utf-8')
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode('utf-8')


def _is_text(text):
    """Whether a str can be written as UTF-8: half a surrogate pair, which JSON can spell, cannot."""
    return _utf8(text).decode() == text


def _checked(ids, vocab_size):
    ids = list(ids)
    bad = [int(i) for i in ids if not 0 <= i < vocab_size]
    if bad:
        raise ValueError(f'token id {bad[0]} is outside this vocabulary (0..{vocab_size - 1}): '
                         'is this the tokenizer of that model?')
    return ids


def _turns(conversation):
    """A conversation -> its system line or None, and the texts of user and assistant in turn. ValueError."""
    messages = conversation.get('messages') if isinstance(conversation, dict) else conversation
    if not isinstance(messages, (list, tuple)):
        raise ValueError('a conversation is a list of {role, content} or an object with messages, '
                         f'not {type(messages).__name__}')
    for i, message in enumerate(messages):
        if not (isinstance(message, dict) and isinstance(message.get('role'), str)
                and isinstance(message.get('content'), str)):
            raise ValueError(f'message {i} must be {{"role": text, "content": text}}, not {message!r:.80}')
    turns = [(message['role'], message['content']) for message in messages]
    has_system = bool(turns) and turns[0][0] == 'system'
    for i, (role, _) in enumerate(turns[has_system:]):
        expected = ('user', 'assistant')[i % 2]
        if role != expected:
            raise ValueError(f'message {i + has_system} has role {role!r}, expected {expected!r}: '
                             f'an optional system message, then user and assistant in turn')
    if len(turns) == has_system:
        raise ValueError('a conversation needs at least one user message')
    texts = [text for _, text in turns]
    return (texts[0], texts[1:]) if has_system else (None, texts)


# -----------------------------------------------------------------------------
# Training a BPE

def train_bpe(texts, vocab_size, pattern=PATTERN, special_tokens=SPECIAL_TOKENS):
    """
    Learns merges by the usual greedy rule (Sennrich et al. 2016, on bytes): cuts the texts into pieces, then repeatedly
    makes a new token of the most frequent pair of adjacent tokens. Of equally frequent pairs the one with the smallest
    ids wins, left id first. So the result depends only on the text (not even on its order), and equals that of rustbpe,
    which trained nanochat's tokenizers.

    texts: iterable of str (documents; no piece spans two). Each is cut as a whole, so a corpus larger than memory must
        come in parts.
    vocab_size: int, tokens in all: 256 bytes, the merges, and the special tokens last. At most 1,114,112 (see _Pairs).
    Returns a BPETokenizer.
    ValueError if vocab_size is too small for the bytes, or if the text has too few pairs to merge.
    """
    if isinstance(texts, str):
        raise ValueError('texts is one string and must be several: give [text]')
    n_merged = vocab_size - len(special_tokens)  # bytes and merges
    if n_merged < 256:
        raise ValueError(f'vocab_size ({vocab_size}) must be at least {256 + len(special_tokens)}: '
                         f'256 bytes and {len(special_tokens)} special tokens')
    split = regex.compile(pattern)
    pieces = Counter()
    for text in texts:
        pieces.update(match.group() for match in split.finditer(text))
    pairs = _Pairs(pieces)
    tokens = [bytes([byte]) for byte in range(256)]
    told = time.monotonic()
    while len(tokens) < n_merged:
        if time.monotonic() - told > 10:
            print(f'{len(tokens):,} of {n_merged:,} tokens learnt', flush=True)
            told = time.monotonic()
        pair = pairs.most_frequent()
        if pair is None:
            raise ValueError(f'vocab_size ({vocab_size}) is out of reach: this text has only {len(tokens) - 256} '
                             f'merges; give more text, or at most vocab_size={len(tokens) + len(special_tokens)}')
        left, right = map(ord, pair)
        tokens.append(tokens[left] + tokens[right])
        pairs.merge(pair, chr(len(tokens) - 1))
    return BPETokenizer({token: i for i, token in enumerate(tokens)}, pattern, special_tokens)


class _Pairs:
    """
    The words of a text, and how often each pair of adjacent tokens occurs in them.

    A word is a str whose characters *are* token ids, chr(id). A pair is then a str of two characters; str.split finds
    it (leftmost first, without overlaps, fast even in a word of a million letters), and pairs compare as their ids do.
    In 'aaa' the pair 'aa' counts twice, as in every BPE trainer.
    """

    def __init__(self, pieces):
        """pieces: dict of a piece of text -> how often it occurs."""
        self.words = [piece.encode('utf-8').decode('latin-1') for piece in pieces]  # a token a byte, to begin with
        self.counts = list(pieces.values())
        self.pair_count = Counter()
        self.where = defaultdict(set)  # pair -> indices of the words that have it, or had it once
        for i, word in enumerate(self.words):
            for pair in map(str.__add__, word, word[1:]):
                self.pair_count[pair] += self.counts[i]
                self.where[pair].add(i)
        # The heap holds each pair once, with a count that may be too high, never too low: a merge raises only counts of
        # pairs with the new token, and those are pushed after the merge.
        self.heap = [(-count, pair) for pair, count in self.pair_count.items()]
        heapq.heapify(self.heap)

    def most_frequent(self):
        """Takes the most frequent pair from the heap; None if there is none left."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            if -count == self.pair_count[pair]:  # the count is up to date, so no other pair is more frequent
                return pair
            if self.pair_count[pair]:
                heapq.heappush(self.heap, (-self.pair_count[pair], pair))
        return None

    def merge(self, pair, new):
        """Replaces the pair by the token new in all words."""
        left, right = pair
        fresh = set()
        for i in self.where.pop(pair):
            parts = self.words[i].split(pair)
            if len(parts) == 1:  # an earlier merge has removed the pair from this word
                continue
            self.words[i] = new.join(parts)
            # only pairs that touch the new token change; an empty part means that two pairs were neighbours
            changes = Counter()
            for k, (before, after) in enumerate(zip(parts, parts[1:])):
                changes[pair] -= 1
                if before or k > 0:
                    changes[(before[-1] if before else right) + left] -= 1
                    changes[(before[-1] if before else new) + new] += 1
                if after:
                    changes[right + after[0]] -= 1
                    changes[new + after[0]] += 1
            for p, change in changes.items():
                self.pair_count[p] += change * self.counts[i]
                if new in p:
                    self.where[p].add(i)
                    fresh.add(p)
        for p in fresh:
            heapq.heappush(self.heap, (-self.pair_count[p], p))


# -----------------------------------------------------------------------------
# To and from files

def kind_of(meta):
    """What .meta() returned -> 'char', 'bpe' or 'chat'. ValueError if keys of that kind are missing or wrong."""
    bpe = {'ranks': list, 'pattern': str, 'special_tokens': list}
    needs = {'char': {'chars': str}, 'bpe': bpe, 'chat': bpe}
    kind = meta.get('kind') if isinstance(meta, dict) else None
    if not isinstance(kind, str) or kind not in needs:
        raise ValueError(f'unknown tokenizer kind {kind!r:.40}: expected one of {", ".join(needs)}; '
                         'run the data set\'s prepare.py again')
    missing = [key for key, type in needs[kind].items() if not isinstance(meta.get(key), type)]
    names = [name for key in needs[kind] if key not in missing for name in meta[key]]
    if missing or not all(isinstance(name, str) for name in names):
        raise ValueError(f'a tokenizer of kind {kind!r} needs {", ".join(missing or needs[kind])}: '
                         'run the data set\'s prepare.py again')
    if kind != 'char' and any(not name.isascii() and max(name) > '\xff' for name in meta['ranks']):
        raise ValueError('ranks of a tokenizer have a byte beyond 255: run the data set\'s prepare.py again')
    return kind


def from_meta(meta):
    """
    What .meta() returned -> the tokenizer. Also takes a whole meta.json: other keys are ignored,
    and kind 'chat' (a chat data set) has a BPE inside.
    ValueError for another kind, a missing key, or a vocabulary that contradicts itself.
    """
    if kind_of(meta) == 'char':
        tokenizer = CharTokenizer(meta['chars'])
        # ids are positions in this string: sorting it now would renumber the tokens that a model has learnt
        if tokenizer.chars != meta['chars']:
            raise ValueError('the characters of a vocabulary must be sorted and unique: '
                             'run the data set\'s prepare.py again')
        return tokenizer
    may = {'special_ids': list, 'bos': str, 'chat': str, 'system': str, 'normalizer': str}
    more = {key: meta[key] for key in may if key in meta}
    wrong = [key for key, value in more.items() if value is not None and not isinstance(value, may[key])]
    if wrong:
        raise ValueError(f'{wrong[0]} of a tokenizer is {more[wrong[0]]!r:.40}: run the data set\'s prepare.py again')
    return BPETokenizer({token.encode('latin-1'): i for i, token in enumerate(meta['ranks'])}, meta['pattern'],
                        meta['special_tokens'], **more)


def vocab_size_of(meta):
    """What .meta() returned -> the number of tokens, without creating the tokenizer. ValueError: see kind_of."""
    return len(meta['chars']) if kind_of(meta) == 'char' else len(meta['ranks']) + len(meta['special_tokens'])


def fingerprint(tokenizer):
    """
    sha256 (64 hex digits) of the tokenizer's meta as canonical JSON, without bos, chat and system. It is equal for two
    tokenizers with the same ids for the same tokens.
    """
    meta = {key: value for key, value in tokenizer.meta().items() if key not in ('bos', 'chat', 'system')}
    return hashlib.sha256(json.dumps(meta, sort_keys=True, separators=(',', ':')).encode('ascii')).hexdigest()
