"""
Other people's tokenizers: nanochat's pickle and GPT-2's files in, Hugging Face's tokenizer.json out. A library.

>>> from data.foreign_tokenizer import hf_tokenizer, load_gpt2_tokenizer, load_nanochat_tokenizer, load_tokenizer
>>> load_tokenizer('teachers/d32').encode('hello')  # doctest: +SKIP
"""

import io
import os
import pickle

from data.files import read_json, read_text
from data.tokenizer import BPETokenizer, bpe_parts, from_meta

AGAIN = 'use another copy'
LARGEST = 2**26  # bytes of a tokenizer.pkl; one of 65,536 tokens has 1 MB


def load_tokenizer(path):
    """
    A teacher's tokenizer, whoever made it: path is a folder with meta.json (data prepared here), with tokenizer.json or
    vocab.json and merges.txt (Hugging Face's gpt2), or with nanochat's tokenizer.pkl; or that file itself.
    ValueError if there is none of them, or if it is damaged or of another kind.
    """
    if os.path.exists(os.path.join(path, 'meta.json')):
        return from_meta(read_json(os.path.join(path, 'meta.json'), AGAIN))
    tokenizer = load_gpt2_tokenizer(path)
    if tokenizer:
        return tokenizer
    if not os.path.isfile(path) and not os.path.isfile(os.path.join(path, 'tokenizer.pkl')):
        raise ValueError(f"no tokenizer at {str(path)!r}: expected nanochat's tokenizer.pkl or its folder, a folder of "
                         "Hugging Face's gpt2, or another data/<name>; "
                         'python distill.py --fetch=d32 --out_dir=teachers/d32 brings one')
    return load_nanochat_tokenizer(path)


# -----------------------------------------------------------------------------
# nanochat: a pickle. A pickle is a program, and this reader runs none of it.

class _PickledEncoding:
    """
    Stands in for tiktoken.Encoding while a pickle is read:
    keeps the state as data, so that not even tiktoken runs on it.
    """

    def __setstate__(self, state):
        self.state = state


class _EncodingUnpickler(pickle._Unpickler):
    """
    Every name in a pickle, and so everything that it could call, passes through find_class:
    this one knows a single name. (It is the one written in Python: that in C takes as much memory as a pickle of a few
    bytes asks for.)
    """

    def find_class(self, module, name):
        if (module, name) != ('tiktoken.core', 'Encoding'):
            raise ValueError(f'it asks for {module!r}.{name!r}, and only tiktoken.core.Encoding is allowed; '
                             'nothing in it was run')
        return _PickledEncoding


def load_nanochat_tokenizer(path):
    """
    nanochat's tokenizer.pkl (a pickled tiktoken.Encoding), or the folder that holds it
    -> BPETokenizer with the same ids.

    It is read by an unpickler that can build one inert object and call nothing, so a hostile or damaged file is a
    ValueError that names it, and does nothing. FileNotFoundError if it is not there.
    """
    if os.path.isdir(path):
        path = os.path.join(path, 'tokenizer.pkl')
    with open(path, 'rb') as f:
        try:
            content = f.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ValueError(f'it has more than {LARGEST:,} bytes')
            state = getattr(_EncodingUnpickler(io.BytesIO(content)).load(), 'state', None)
            if not isinstance(state, dict):  # tiktoken pickles its own encodings as a mere name, to be downloaded
                raise ValueError('it has no table of tokens')
            ranks, special = state['mergeable_ranks'], state['special_tokens']
            names = sorted(special, key=special.get)
            if [special[name] for name in names] != list(range(len(ranks), len(ranks) + len(names))):
                raise ValueError('its special tokens are not the last ids of the vocabulary')
            return BPETokenizer(ranks, state['pat_str'], names)
        except Exception as error:  # garbage makes pickle raise nearly anything; what matters is that it stops here
            raise ValueError(f'{path} is not a nanochat tokenizer.pkl: {type(error).__name__}: {error}') from None


# -----------------------------------------------------------------------------
# GPT-2, as Hugging Face keeps it

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_characters():
    """
    {byte: character}: GPT-2's files write tokens as text, each byte as a visible character,
    those that have none in Latin-1 as the ones from 256 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in visible}
    for i, byte in enumerate(sorted(set(range(256)) - set(visible))):
        characters[byte] = chr(256 + i)
    return characters


def load_gpt2_tokenizer(folder):
    """
    tokenizer.json, or vocab.json and merges.txt, in GPT-2's manner -> BPETokenizer with the same ids.
    None without them, ValueError if of another kind.
    """
    one, vocab_path, merges_path = (os.path.join(folder, name)
                                    for name in ('tokenizer.json', 'vocab.json', 'merges.txt'))
    if os.path.exists(one):
        path = one
        vocab, merges = _read_tokenizer_json(path)
    elif os.path.exists(vocab_path) and os.path.exists(merges_path):
        path = vocab_path
        vocab = read_json(path, AGAIN)
        lines = read_text(merges_path).split('\n')
        merges = [line.split(' ') for line in lines if line and not line.startswith('#version')]
    else:
        return None

    # Ranks say the same as a list of merges if the ids of what is merged are in the list's order.
    n = 256 + len(merges)
    byte = {character: byte for byte, character in byte_characters().items()}
    try:
        tokens = sorted(vocab, key=vocab.get)
        fits = (bool(vocab) and [vocab[token] for token in tokens] == list(range(len(tokens)))
                and set(tokens[:256]) == set(byte) and tokens[256:n] == [''.join(merge) for merge in merges])
    except TypeError:  # ids or merges that are something else
        fits = False
    if not fits:
        raise ValueError(f"{path} is not a tokenizer in GPT-2's manner: expected a BPE of ids for the 256 bytes, "
                         'then for the merges in their order, then for special tokens')
    ranks = {bytes(byte[c] for c in token): i for i, token in enumerate(tokens[:n])}
    return BPETokenizer(ranks, GPT2_PATTERN, tokens[n:])


def _read_tokenizer_json(path):
    """tokenizer.json -> {token: id}, [(left, right), ...] of the merges; empty ones if it is not in GPT-2's manner."""
    content = read_json(path, AGAIN, {'model': dict})
    model, cutter = content['model'], content.get('pre_tokenizer') or {}
    plain = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}
    if (not isinstance(model.get('vocab'), dict)  # a Unigram's are pairs
            or content.get('normalizer') is not None or not isinstance(cutter, dict)
            or plain != {'use_regex': True} | {key: value for key, value in cutter.items() if key in plain}):
        return {}, []
    try:
        added = {token['content']: token['id'] for token in content.get('added_tokens', [])}
        merges = [merge.split(' ') if isinstance(merge, str) else merge for merge in model.get('merges', [])]
    except (TypeError, KeyError):
        return {}, []
    return model['vocab'] | added, merges


# -----------------------------------------------------------------------------
# Ours, for Hugging Face

def hf_tokenizer(tokenizer):
    """
    BPETokenizer -> the content of a tokenizer.json (Hugging Face's tokenizers) with the same ids for the same text.
    ValueError: see merges_of.
    """
    meta, character = tokenizer.meta(), byte_characters()
    text = lambda token: ''.join(character[byte] for byte in token)
    tokens = [token.encode('latin-1') for token in meta['ranks']]
    special = [{'id': len(tokens) + i, 'content': name, 'special': True, 'single_word': False, 'lstrip': False,
                'rstrip': False, 'normalized': False} for i, name in enumerate(meta['special_tokens'])]
    by_bytes = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    split = {'type': 'Split', 'pattern': {'Regex': meta['pattern']}, 'behavior': 'Isolated', 'invert': False}
    return {'version': '1.0', 'added_tokens': special, 'normalizer': None,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, by_bytes]},
            'post_processor': None, 'decoder': by_bytes,
            'model': {'type': 'BPE', 'vocab': {text(token): i for i, token in enumerate(tokens)},
                      'merges': [f'{text(a)} {text(b)}' for a, b in merges_of(tokens)]}}


def merges_of(tokens):
    """
    tokens (list of bytes, in id order) -> [(left, right), ...], what each token longer than a byte is merged from:
    ranks do not say it, but merging its own bytes does. ValueError for a token that no merging reaches.
    """
    ranks = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(bpe_parts(token, ranks)) for token in tokens if len(token) > 1]
    for pair in pairs:
        if len(pair) != 2:
            token = b''.join(pair)
            raise ValueError(f'token {ranks[token]} ({token}) is not made of two tokens before it: '
                             'a list of merges cannot express that')
    return pairs
