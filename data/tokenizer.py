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
>>> tok.decode(i for i, m in zip(ids, mask) if m)  # what a chat model learns to say
'lower<|assistant_end|>'
>>> fingerprint(from_meta(tok.meta())) == fingerprint(tok)  # meta() is what meta.json and checkpoints keep
True

A BPE of 4,096 on Python's standard library (12 MB of text) trains in 4 s on one core of a 2-core virtual machine.
Nothing here touches the network: tiktoken does the encoding, with our own table of tokens.
"""

import hashlib
import heapq
import json
import math
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import regex  # comes with tiktoken, and has its \p{L}
import tiktoken

# How text is cut before any merging: no token crosses a cut. It is GPT-4's pattern, but numbers go in groups of at most
# two digits, so that a small vocabulary is not spent on three-digit numbers. To the letter it is what nanochat trains
# with: its teachers must see the same cuts.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")

# In nanochat's order: the last ids of the vocabulary. The python and output ones are for tool calls; no dataset here
# has them yet.
SPECIAL_TOKENS = ('<|bos|>', '<|user_start|>', '<|user_end|>', '<|assistant_start|>', '<|assistant_end|>',
                  '<|python_start|>', '<|python_end|>', '<|output_start|>', '<|output_end|>')

# Characters of every kind, alone and together: any pattern must cut this into pieces that are the whole of it.
ALL_KINDS = ''.join(map(chr, range(0x3100))) + "It's 12345 \r\n\r\n  x\t\t\u65e5\u672c\u8a9e \U0001f600\U0010ffff --- "


# -----------------------------------------------------------------------------
# Characters

class CharTokenizer:
    """
    One token per character (Unicode code point); ids are ranks in code-point order.

    chars: str, any text; its sorted unique characters become the vocabulary.
    ValueError if it is empty or has half a surrogate pair.
    Attributes: vocab_size int; bos None (there are no special tokens); chars str;
    token_bytes list of int, UTF-8 bytes of each id.
    """
    kind = 'char'
    bos = None

    def __init__(self, chars):
        self.chars = ''.join(sorted(set(chars)))
        if not self.chars:
            raise ValueError('a character vocabulary needs at least one character, and this text is empty')
        self.vocab_size = len(self.chars)
        self._ids = {c: i for i, c in enumerate(self.chars)}
        self.token_bytes = [len(c.encode('utf-8')) for c in self.chars]

    def encode(self, text, remedy='leave them out of the prompt, or train a model on a text that has them'):
        """
        str -> list of int, one per character. ValueError names the characters that are not in the vocabulary, and says
        what to do about it, which depends on what the text is for.
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
    Byte-level BPE: every string has an encoding, since each single byte is a token. tiktoken does the work.

    ranks: dict of bytes -> id, ids 0..n-1. A lower id merges earlier.
    pattern: str, the regular expression that cuts text into pieces before merging
        (tiktoken's dialect, Rust's fancy-regex).
    special_tokens: names; they get the ids n, n+1, ... in this order.
    ValueError: ids with holes, a byte without a token, a special token twice, a pattern that does not parse.
    Attributes: vocab_size int, special tokens included; bos int, the id of what stands before a text, <|bos|> or
    GPT-2's <|endoftext|>, or None; pattern str; special_tokens list of str;
    token_bytes list of int, bytes of each id and 0 for special tokens (bits per byte leaves those out).
    """
    kind = 'bpe'

    def __init__(self, ranks, pattern=PATTERN, special_tokens=SPECIAL_TOKENS):
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f'{len(ranks)} BPE tokens must have the ids 0..{len(ranks) - 1}, each once: '
                             'a token is missing or repeated')
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f'{len(missing)} single bytes have no BPE token (the first is {missing[0]}): '
                             'not every text could be encoded')
        self.pattern = pattern
        self.special_tokens = list(special_tokens)
        self._special_ids = {name: len(ranks) + i for i, name in enumerate(self.special_tokens)}
        if len(self._special_ids) < len(self.special_tokens):
            raise ValueError(f'a special token is there twice: {self.special_tokens}')
        self.bos = self._special_ids.get('<|bos|>', self._special_ids.get('<|endoftext|>'))
        self._merged = sorted(ranks, key=ranks.get)  # bytes of id 0, 1, ...
        self._bytes = self._merged + [name.encode('utf-8') for name in self.special_tokens]
        self.vocab_size = len(self._bytes)
        self.token_bytes = [len(token) for token in self._merged] + [0] * len(self.special_tokens)
        self._encoding = tiktoken.Encoding('picochat', pat_str=pattern, mergeable_ranks=ranks,
                                           special_tokens=self._special_ids)
        self.encode(ALL_KINDS)  # raises, now rather than at somebody's prompt, if the pattern leaves some of it out

    def encode(self, text):
        """
        str -> list of int. Special tokens are never read out of text: '<|bos|>' typed by a user is seven ordinary
        characters. Half a surrogate pair becomes U+FFFD (tiktoken's choice).
        ValueError for half a million white-space characters in a row, and where the pattern is not up to a text.
        """
        if len(text) >= 1_000_000:
            # tiktoken backtracks over runs of white space, and dies of a million (a Rust panic, not an exception).
            # Other runs are fine. The lookbehind below tries each run once, not at each of its characters.
            run = regex.search(r'(?<!\s)\s{500000}', text)
            if run:
                raise ValueError(f'500,000 white-space characters in a row, from character {run.start()} on: '
                                 'tiktoken cannot split that; shorten it')
        try:
            ids = self._encoding.encode(text, disallowed_special=())  # they are not refused, either
        except BaseException as e:
            if not isinstance(e, ValueError) and type(e).__name__ != 'PanicException':  # Rust's own is no Exception
                raise
            raise ValueError(f'the pattern of this tokenizer, {self.pattern!r:.60}, takes too long to cut a text: '
                             'use another tokenizer') from None
        if sum(map(self.token_bytes.__getitem__, ids)) != _utf8_length(text):
            raise ValueError(f'the pattern of this tokenizer, {self.pattern!r:.60}, leaves out some of a text: '
                             'use another tokenizer')
        return ids

    def encode_batch(self, texts):
        """list of str -> list of lists of int, each as encode's, on several threads."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.encode, texts))

    def special(self, name):
        """'<|bos|>' -> its id. ValueError if this tokenizer has no such token."""
        if name not in self._special_ids:
            raise ValueError(f'no special token {name!r}, only {self.special_tokens}: '
                             'chat needs a tokenizer trained with SPECIAL_TOKENS')
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
        dict of plain types for JSON; from_meta undoes it.
        Tokens are in id order, each byte as the Latin-1 character of its value.
        """
        return {'kind': 'bpe', 'ranks': [token.decode('latin-1') for token in self._merged],
                'pattern': self.pattern, 'special_tokens': self.special_tokens[:]}

    def render_chat(self, conversation, max_tokens=None):
        """
        A conversation as nanochat writes it:
        bos, then user_start text user_end assistant_start text assistant_end for each exchange.

        conversation: list of {'role', 'content'}, or {'messages': that list}. Roles are user, assistant, user, ...;
            a system message may come first and is put in front of the first user's text, with a blank line between.
        max_tokens: cut to so many tokens, or None.
        Returns ids, mask: lists of int of one length. mask is 1 where the assistant speaks: its text and its
            assistant_end, which it must learn to say, but not its assistant_start, which the engine says for it.
        ValueError names the message that is wrong.
        """
        ids, mask = [self.special('<|bos|>')], [0]

        def add(tokens, learn):
            ids.extend(tokens)
            mask.extend([learn] * len(tokens))

        for role, text in _turns(conversation):
            add([self.special(f'<|{role}_start|>')], 0)
            add(self.encode(text) + [self.special(f'<|{role}_end|>')], int(role == 'assistant'))
        return ids[:max_tokens], mask[:max_tokens]

    def render_prompt(self, conversation):
        """
        A conversation that ends with the user -> its ids and assistant_start: the model goes on from there.
        ValueError as above.
        """
        if _turns(conversation)[-1][0] != 'user':
            raise ValueError('the last message of a prompt must be the user\'s: the assistant is about to answer it')
        return self.render_chat(conversation)[0] + [self.special('<|assistant_start|>')]


def _utf8_length(text):
    """Bytes of a text in UTF-8; of surrogates, as tiktoken reads them: two are one character, half of one U+FFFD."""
    try:
        return len(text.encode('utf-8'))
    except UnicodeEncodeError:
        return len(text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode('utf-8'))


def _checked(ids, vocab_size):
    ids = list(ids)
    bad = [int(i) for i in ids if not 0 <= i < vocab_size]
    if bad:
        raise ValueError(f'token id {bad[0]} is outside this vocabulary (0..{vocab_size - 1}): '
                         'is this the tokenizer of that model?')
    return ids


def _turns(conversation):
    """
    A conversation -> list of (role, text), user and assistant in turn, the system message merged;
    or a ValueError.
    """
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
    if has_system:
        (_, system), (_, user), *rest = turns
        turns = [('user', f'{system}\n\n{user}'), *rest]
    return turns


# -----------------------------------------------------------------------------
# Training a BPE

def train_bpe(texts, vocab_size, pattern=PATTERN, special_tokens=SPECIAL_TOKENS):
    """
    Learns merges by the usual greedy rule (Sennrich et al. 2016, on bytes): cut the texts into pieces, then again and
    again make a token of the adjacent pair of tokens that is most frequent. Of equally frequent pairs, the one with the
    smallest ids wins, left id first: the result depends on nothing but the text (not even on its order), and is the one
    of rustbpe, which trained nanochat's tokenizers.

    texts: iterable of str (documents; no piece spans two). Each is cut in one go,
        so a corpus beyond memory should come in parts.
    vocab_size: int, tokens in all: 256 bytes, the merges, and the special tokens last. At most 1,114,112 (see _Pairs).
    Returns a BPETokenizer.
    ValueError if vocab_size is too small for the bytes, or if the text has fewer merges than asked.
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

    A word is a str whose characters *are* token ids, chr(id): a pair is a str of two, str.split finds it (leftmost
    first, no overlaps, in C: also in a word of a million letters), and pairs compare as their ids do. In 'aaa' the pair
    'aa' counts twice, as in every BPE trainer.
    """

    def __init__(self, pieces):
        """pieces: dict of a piece of text -> how often it occurs."""
        self.words = [piece.encode('utf-8').decode('latin-1') for piece in pieces]  # a token a byte, to begin with
        self.counts = list(pieces.values())
        self.pair_count = Counter()
        self.where = defaultdict(set)  # pair -> indices of the words that have it, or had it: nobody is taken out
        for i, word in enumerate(self.words):
            for pair in map(str.__add__, word, word[1:]):
                self.pair_count[pair] += self.counts[i]
                self.where[pair].add(i)
        # The heap holds each pair once, with a count that may be out of date, but only too high: a merge adds only to
        # pairs that have the new token, and those are pushed when it is done.
        self.heap = [(-count, pair) for pair, count in self.pair_count.items()]
        heapq.heapify(self.heap)

    def most_frequent(self):
        """The pair that occurs most often, which leaves the heap; None if there is no pair left."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            if -count == self.pair_count[pair]:  # a top entry whose count is still true is the most frequent pair
                return pair
            if self.pair_count[pair]:
                heapq.heappush(self.heap, (-self.pair_count[pair], pair))
        return None

    def merge(self, pair, new):
        """Where the pair stands in a word, the token new takes its place."""
        left, right = pair
        fresh = set()
        for i in self.where.pop(pair):
            parts = self.words[i].split(pair)
            if len(parts) == 1:  # an earlier merge has taken the pair from this word
                continue
            self.words[i] = new.join(parts)
            # Only what touches the new token changes. Where a part is empty, two pairs were neighbours.
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

def from_meta(meta):
    """
    What .meta() returned -> the tokenizer. Also takes a whole meta.json: other keys are ignored,
    and kind 'chat' (a chat data set) has a BPE inside.
    ValueError for another kind, a missing key, or a vocabulary that contradicts itself.
    """
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
    if kind == 'char':
        tokenizer = CharTokenizer(meta['chars'])
        # ids are positions: sorting the characters now would renumber what a model has learnt
        if tokenizer.chars != meta['chars']:
            raise ValueError('the characters of a vocabulary must be sorted and unique: '
                             'run the data set\'s prepare.py again')
        return tokenizer
    return BPETokenizer({token.encode('latin-1'): i for i, token in enumerate(meta['ranks'])}, meta['pattern'],
                        meta['special_tokens'])


def vocab_size_of(meta):
    """What .meta() returned -> the number of tokens, without making the tokenizer."""
    return len(meta.get('chars', ())) or len(meta.get('ranks', ())) + len(meta.get('special_tokens', ()))


def fingerprint(tokenizer):
    """
    sha256 (64 hex digits) of the tokenizer's meta as canonical JSON:
    equal when two tokenizers have the same ids for the same tokens.
    """
    return hashlib.sha256(
        json.dumps(tokenizer.meta(), sort_keys=True, separators=(',', ':')).encode('ascii')).hexdigest()


# -----------------------------------------------------------------------------
# Smaller vocabularies

def bpe_parts(token, ranks):
    """
    A BPE token (bytes) -> the tokens that BPE makes of these bytes just before it makes that one:
    two, if it is ever made; else more.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def cut_tokenizer(tokenizer, counts, keep):
    """
    tokenizer, how often each id occurs, how many tokens to keep -> their ids in ascending order, and a tokenizer in
    which they are 0..keep-1.

    Characters: the most frequent stay, and encode refuses the others as it does every unknown one. BPE: bytes and
    special tokens stay. Always the rarest token goes that no other one left is made of, and its parts inherit its
    count. So every token left can still be merged from bytes, and text without cut tokens is encoded as before; where
    one stood its parts stand, or what they merge to with their neighbours.
    """
    specials = [] if tokenizer.kind == 'char' else tokenizer.special_tokens
    least = 1 if tokenizer.kind == 'char' else 256 + len(specials)
    if not least <= keep <= tokenizer.vocab_size:
        raise ValueError(f'vocab_keep ({keep}) must be at least {least} and at most the {tokenizer.vocab_size} tokens '
                         'that there are')
    if tokenizer.kind == 'char':
        by_frequency = sorted(range(tokenizer.vocab_size), key=lambda i: (-counts[i], i))
        ids = sorted(by_frequency[:keep])
        return ids, CharTokenizer(tokenizer.decode(ids))
    merged = [token.encode('latin-1') for token in tokenizer.meta()['ranks']]
    cut = _rarest(merged, counts, tokenizer.vocab_size - keep)
    ids = [i for i in range(tokenizer.vocab_size) if i not in cut]
    ranks = {merged[old]: new for new, old in enumerate(ids[:keep - len(specials)])}
    return ids, BPETokenizer(ranks, tokenizer.pattern, specials)


def _rarest(tokens, counts, n):
    """The ids of n of the tokens (bytes, in id order) that are missed least, as cut_tokenizer chooses them; a set."""
    ranks = {token: i for i, token in enumerate(tokens)}
    parts = {i: [ranks[part] for part in bpe_parts(token, ranks)] for i, token in enumerate(tokens) if len(token) > 1}
    users = Counter()  # how many tokens are made of this one
    for made_of in parts.values():
        users.update(set(made_of))
    counts, cut = [int(count) for count in counts], set()
    leaves = [(counts[i], -i) for i in parts if not users[i]]
    heapq.heapify(leaves)
    while len(cut) < n:
        i = -heapq.heappop(leaves)[1]
        cut.add(i)
        for part in parts[i]:
            counts[part] += counts[i]
        for part in set(parts[i]):
            users[part] -= 1
            if part in parts and not users[part]:
                heapq.heappush(leaves, (counts[part], -part))
    return cut


def recode(ids, old, new):
    """
    An array of the old tokenizer's ids -> the same text in the new one's, an array.
    Cut characters are left out: nothing can stand for them.
    """
    ids = np.asarray(ids)
    if old.kind == 'char':
        table = np.array([new.chars.find(c) for c in old.chars])[ids]
        return table[table >= 0]
    # special tokens are the last ids in both; what stands between them is text
    is_special = ids >= old.vocab_size - len(old.special_tokens)
    out, start = [], 0
    for at in np.flatnonzero(is_special).tolist():
        out += new.encode(old.decode(ids[start:at]))
        out.append(int(ids[at]) - old.vocab_size + new.vocab_size)
        start = at + 1
    out += new.encode(old.decode(ids[start:]))
    return np.array(out)
