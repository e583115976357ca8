"""
Smaller vocabularies: drops the tokens that a text needs least, and encodes the text again in those that are left. A
library; prune.py --vocab_keep= uses it.

>>> from data.tokenizer import train_bpe
>>> from data.vocabulary import cut_tokenizer
>>> tok = train_bpe(['low lower lowest, slow slower slowest'], vocab_size=256 + 4 + 9)
>>> counts = [0] * 269
>>> for i in tok.encode('slow lows'):
...     counts[i] += 1
>>> ids, smaller = cut_tokenizer(tok, counts, keep=267)
>>> [smaller.decode([i]) for i in smaller.encode('slow lower')]  # as bytes, but for the two tokens that stay
['s', 'low', ' ', 'low', 'e', 'r']
"""

import heapq
import math
from collections import Counter

import numpy as np

from data.tokenizer import CharTokenizer, from_meta


def bpe_parts(token, ranks):
    """
    A BPE token (bytes) -> the tokens that BPE has merged these bytes into just before it would merge them into this
    token: two, or more if BPE never gets to it.
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
    tokenizer, counts (how often each id occurs), keep (how many tokens to keep) -> the ids that are kept, in ascending
    order, and a tokenizer in which they are 0..keep-1.

    Characters: the most frequent are kept, and encode refuses the others like any unknown character. BPE: bytes and
    special tokens are kept. Of the others the rarest is dropped, among those that no remaining token is made of; its
    parts inherit its count; and so on. So every token that is left can still be merged from bytes. Text without dropped
    tokens is encoded as before; a dropped token becomes its parts, or what these merge to with their neighbours.
    """
    least = 1 if tokenizer.kind == 'char' else tokenizer.token_bytes.count(1) + len(tokenizer.special_ids)
    if not least <= keep <= tokenizer.vocab_size:
        raise ValueError(f'vocab_keep ({keep}) must be at least {least} and at most the {tokenizer.vocab_size} tokens '
                         'that there are')
    if tokenizer.kind == 'char':
        by_frequency = sorted(range(tokenizer.vocab_size), key=lambda i: (-counts[i], i))
        ids = sorted(by_frequency[:keep])
        return ids, CharTokenizer(tokenizer.decode(ids))
    meta, of_text, special = tokenizer.meta(), tokenizer.text_ids, set(tokenizer.special_ids)
    cut = _rarest([tokenizer.decode_bytes([i]) for i in of_text], [counts[i] for i in of_text],
                  tokenizer.vocab_size - keep)
    gone = {of_text[rank] for rank in cut}
    ids = [i for i in range(tokenizer.vocab_size) if i not in gone]
    return ids, from_meta(meta | {
        'ranks': [token for rank, token in enumerate(meta['ranks']) if rank not in cut],
        'special_ids': [new for new, old in enumerate(ids) if old in special]})


def _rarest(tokens, counts, n):
    """tokens (bytes, by rank) -> the ranks of the n of them that cut_tokenizer drops, a set."""
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
    An array of the old tokenizer's ids -> an array of the new one's, for the same text. Characters that were dropped
    are left out, as nothing can replace them.
    """
    ids = np.asarray(ids)
    if old.kind == 'char':
        table = np.array([new.chars.find(c) for c in old.chars])[ids]
        return table[table >= 0]
    # a special token becomes the one of the same name; the text between special tokens is encoded again
    special = dict(zip(old.special_ids, map(new.special, old.special_tokens)))
    out, start = [], 0
    for at in np.flatnonzero(np.isin(ids, old.special_ids)).tolist():
        out += new.encode(old.decode(ids[start:at]))
        out.append(special[int(ids[at])])
        start = at + 1
    out += new.encode(old.decode(ids[start:]))
    return np.array(out)
