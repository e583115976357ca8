"""
Other people's tokenizers: reads nanochat's pickle, Hugging Face's folders and llama.cpp's GGUF files, and writes
tokenizer.json. A library; the prepare.py scripts call load_tokenizer with their knob --tokenizer=.

>>> from data.foreign_tokenizer import gguf_tokenizer, hf_folder_tokenizer, hf_tokenizer, load_tokenizer
>>> load_tokenizer('teachers/d32').encode('hello')  # doctest: +SKIP
>>> load_tokenizer('gguf:SmolLM2-135M-Instruct.Q4_1.gguf').special_ids[:3]  # doctest: +SKIP
[0, 1, 2]
"""

import glob
import io
import json
import os
import pickle
import re
import shlex

from data.files import read_json, read_text
from data.tokenizer import BOS, CHATS, PATTERN, BPETokenizer, from_meta
from data.vocabulary import bpe_parts

AGAIN = 'use another copy'
LARGEST = 2**26  # bytes of a tokenizer.pkl; one of 65,536 tokens has 1 MB


# files of a picochat out_dir, each of which holds the tokenizer
MODELS = ('best.pt', 'int*.safetensors')


def load_tokenizer(path):
    """
    Reads a tokenizer of any kind. path is 'gguf:FILE', 'hf:FOLDER', or a folder or file whose kind is recognised: a
    dataset prepared here (meta.json), a model trained or quantised here (its out_dir or a file in it; its data need not
    exist any more), a Hugging Face folder (tokenizer.json, or vocab.json and merges.txt), nanochat's tokenizer.pkl.
    ValueError if there is no tokenizer, or if it is damaged or of another kind.
    """
    path = str(path)
    if path.startswith('gguf:') or path.endswith('.gguf'):
        return gguf_tokenizer(path.removeprefix('gguf:'))
    if path.startswith('hf:'):
        tokenizer = hf_folder_tokenizer(path.removeprefix('hf:'))
        if tokenizer is None:
            raise ValueError(f'no tokenizer in {path}: expected a folder with tokenizer.json, or with vocab.json and '
                             'merges.txt: copy or download them as well')
        return tokenizer

    at = lambda name: os.path.join(path, name)
    if os.path.exists(at('meta.json')):
        return from_meta(read_json(at('meta.json'), AGAIN))
    models = [file for name in MODELS for file in sorted(glob.glob(os.path.join(glob.escape(path), name)))]
    if not models and os.path.isfile(path) and path.endswith(('.pt', '.safetensors')):
        models = [path]
    if models:
        from quantize import load  # imports PyTorch, which the other kinds do without
        return from_meta(load(models[0])[1]['tokenizer'])
    tokenizer = hf_folder_tokenizer(path)
    if tokenizer is not None:
        return tokenizer
    if os.path.isfile(path) or os.path.isfile(at('tokenizer.pkl')):
        return load_nanochat_tokenizer(path)
    remedy = f'run python {shlex.quote(at("prepare.py"))}, or ' if os.path.exists(at('prepare.py')) else ''
    raise ValueError(f'no tokenizer at {path!r}: {remedy}expected a prepared data/<name>, an out_dir or checkpoint of '
                     "picochat, gguf:FILE, hf:FOLDER, nanochat's tokenizer.pkl or its folder; "
                     'python distill.py --fetch=d32 --out_dir=teachers/d32 brings one')


# -----------------------------------------------------------------------------
# nanochat's is a pickle. A pickle is a program; this reader does not run it.

class _PickledEncoding:
    """
    Stands in for tiktoken.Encoding while a pickle is read, and keeps its state as plain data.
    """

    def __setstate__(self, state):
        self.state = state


class _EncodingUnpickler(pickle._Unpickler):
    """
    Every name in a pickle, and so everything that it could call, passes through find_class, which here allows a single
    name. (This is Python's own unpickler; the one in C allocates as much memory as a pickle of a few bytes asks for.)
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

    It is read by an unpickler that can build one inert object and call nothing. ValueError names a hostile or damaged
    file, FileNotFoundError a missing one.
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
# Byte-level BPE, as Hugging Face and llama.cpp keep it

# How text is cut before merging, by llama.cpp's names. A tokenizer.json has two steps for SmolLM's: it cuts out every
# digit, then applies GPT-2's pattern to what lies between. One expression does both, if white space before a digit is
# taken as a whole, as it is at the end of a text.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {'gpt-2': GPT2_PATTERN,
            'smollm': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
            'llama-bpe': _LLAMA3,
            'qwen2': _LLAMA3.replace('{1,3}', '')}
NORMALIZERS = {'qwen2': 'NFC'}  # a GGUF does not say it

SENTENCEPIECE = ('{} is a SentencePiece tokenizer, and only BPE of bytes is read here: take a model with a tokenizer '
                 'like that of GPT-2, SmolLM, Llama 3 or Qwen2')


def pre_tokenizer_of(pattern):
    """A pattern -> llama.cpp's name for it, or None."""
    return next((name for name, known in PATTERNS.items() if known == pattern), None)


def byte_characters():
    """
    {byte: character}: GPT-2's files write the bytes of tokens as visible characters; bytes without one in Latin-1
    become the characters from 256 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in visible}
    for i, byte in enumerate(sorted(set(range(256)) - set(visible))):
        characters[byte] = chr(256 + i)
    return characters


def byte_level_bpe(path, vocab, merges, added, pattern, normalizer=None, bos=None, add_bos=False, template=None):
    """
    The contents of a tokenizer file -> BPETokenizer with the same ids.

    path: str, for messages. vocab: {token as text: id}, with the added ones. merges: list of (left, right), the first
    is merged first. added: set of ids that no text is read as. bos, add_bos, template: see settings_of.
    ValueError if it is not a BPE of bytes, or if its ids do not say in which order tokens are merged.
    """
    byte = {character: byte for byte, character in byte_characters().items()}
    try:
        tokens = sorted(vocab, key=vocab.get)
        whole = bool(tokens) and [vocab[token] for token in tokens] == list(range(len(tokens)))
        made = [vocab[left + right] for left, right in merges] if whole else []
    except (TypeError, ValueError, KeyError):  # ids or merges that are something else, or make no token
        whole = False
    if not whole or made != sorted(made):
        raise ValueError(f"{path} is not a tokenizer in GPT-2's manner: expected a BPE with ids from 0 on, without "
                         'holes, those of merged tokens in the order of the merges')
    # what is neither a byte nor merged is never read out of text, either
    of_text = {i for token, i in vocab.items() if token in byte} | set(made)
    special = [i for i in range(len(tokens)) if i in added or i not in of_text]
    is_special = set(special)
    try:
        written = [bytes(byte[c] for c in token) for i, token in enumerate(tokens) if i not in is_special]
    except KeyError as e:
        raise ValueError(f"{path} is not a tokenizer in GPT-2's manner: {e} stands for no byte") from None
    names = [tokens[i] for i in special]
    return BPETokenizer({token: rank for rank, token in enumerate(written)}, pattern, names, special,
                        normalizer=normalizer, **settings_of({*names}, bos, add_bos, template))


def settings_of(names, bos, add_bos, template):
    """
    Other settings in a tokenizer file -> BPETokenizer's settings as a dict.

    names: of the special tokens. bos: the name of what they call bos, or None; add_bos: whether a text begins with it.
    template: the chat template (Jinja), or None; nothing here runs it, but its default system line is taken from it.

    Our bos begins a text, and so separates two. What files call bos may be something else: SmolLM2's begins the
    messages of a chat. So theirs is used only if the file says to put it before every text, or if none of the usual
    ones exists.
    """
    settings = {}
    if isinstance(bos, str) and bos in names and (add_bos or not names & {*BOS}) and bos != '<|im_start|>':
        settings['bos'] = bos
    if template is not None and '<|im_start|>' not in template and names >= CHATS['chatml']:
        settings['chat'] = None
    line = re.search(r"<\|im_start\|>system(?:\n|\\n)([^{}<'\"]+)<\|im_end\|>", template or '')
    if line and names >= CHATS['chatml']:
        settings['system'] = line[1].replace('\\n', '\n')
    return settings


def hf_folder_tokenizer(folder):
    """
    A Hugging Face folder's tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json -> BPETokenizer with
    the same ids. None without them, ValueError if of another kind.
    """
    at = lambda name: os.path.join(folder, name)
    config = read_json(at('tokenizer_config.json'), AGAIN) if os.path.exists(at('tokenizer_config.json')) else {}
    if os.path.exists(at('tokenizer.json')):
        path = at('tokenizer.json')
        table = _read_tokenizer_json(path)
    elif os.path.exists(at('vocab.json')) and os.path.exists(at('merges.txt')):
        path, kind = at('vocab.json'), config.get('tokenizer_class', 'GPT2Tokenizer')
        if kind not in ('GPT2Tokenizer', 'GPT2TokenizerFast'):
            raise ValueError(f'{folder} has a {kind!s:.40} without its tokenizer.json, which says how text is cut: '
                             'copy or download it as well')
        lines = read_text(at('merges.txt')).split('\n')
        table = {'vocab': read_json(path, AGAIN), 'added': set(), 'pattern': GPT2_PATTERN,
                 'merges': [line.split(' ') for line in lines if line and not line.startswith('#version')]}
    elif os.path.exists(at('tokenizer.model')):
        raise ValueError(SENTENCEPIECE.format(at('tokenizer.model')))
    else:
        return None
    template = config.get('chat_template')
    if isinstance(template, list):  # several of them, with names
        named = {str(t.get('name')): t.get('template') for t in template if isinstance(t, dict)}
        template = named.get('default')
    if os.path.exists(at('chat_template.jinja')):
        template = read_text(at('chat_template.jinja'))
    bos = config.get('bos_token')
    said = {'bos': bos.get('content') if isinstance(bos, dict) else bos, 'add_bos': config.get('add_bos_token') is True,
            'template': template if isinstance(template, str) else None}
    return byte_level_bpe(path, **(said | table))


def _read_tokenizer_json(path):
    """tokenizer.json -> arguments for byte_level_bpe, a dict. ValueError if it is no byte-level BPE."""
    content = read_json(path, AGAIN, {'model': dict})
    model = content['model']
    kind = model.get('type', 'BPE')
    if kind == 'Unigram' or isinstance(model.get('vocab'), list) or model.get('byte_fallback'):
        raise ValueError(SENTENCEPIECE.format(path))
    normalizer = content.get('normalizer')
    normalizer = normalizer.get('type') if isinstance(normalizer, dict) else normalizer
    strange = [f', {key} {model[key]!r:.40}' for key in ('continuing_subword_prefix', 'end_of_word_suffix')
               if model.get(key)]
    if kind != 'BPE' or strange or normalizer not in (None, 'NFC') or not isinstance(model.get('vocab'), dict):
        raise ValueError(f"{path} is not a tokenizer in GPT-2's manner, but a {kind!r:.40} with normalizer "
                         f'{normalizer!r:.40}{"".join(strange)}: use another one')
    try:
        added = {token['content'] + '': token['id'] for token in content.get('added_tokens') or []}      # texts alone
        merges = [merge.split(' ') if isinstance(merge, str) else merge for merge in model.get('merges', [])]
        table = {'vocab': model['vocab'] | added, 'merges': merges, 'added': {*added.values()},
                 'normalizer': normalizer}
        processor = content.get('post_processor') or {}
        for step in processor.get('processors', [processor]):  # which may put a token before every text
            if step.get('type') == 'TemplateProcessing' and 'SpecialToken' in step['single'][0]:
                table |= {'bos': step['single'][0]['SpecialToken']['id'], 'add_bos': True}
    except (TypeError, KeyError, AttributeError, IndexError):
        raise ValueError(f"{path} is not a tokenizer in GPT-2's manner: its added tokens, merges or post-processor are "
                         'of another form') from None
    return table | {'pattern': _pattern_of(content.get('pre_tokenizer'), path)}


# What a tokenizer.json's pre-tokenizers say, where it does not matter that one is the only step of a sequence.
BY_BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}


def by_pattern(pattern):
    """The pre-tokenizers of a tokenizer.json that cut text as this expression says."""
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
    return [split, BY_BYTES | {'use_regex': False}]


def _pattern_of(cutter, path):
    """The pre-tokenizer of a tokenizer.json -> the pattern that does the same. ValueError if it is not a known one."""
    known = [(PATTERNS['gpt-2'], [BY_BYTES]),
             (PATTERNS['smollm'], [{'type': 'Digits', 'individual_digits': True}, BY_BYTES])]
    known += [(pattern, by_pattern(pattern)) for pattern in (*PATTERNS.values(), PATTERN)]
    steps = cutter.get('pretokenizers') if isinstance(cutter, dict) and 'pretokenizers' in cutter else [cutter]
    plain = []
    for step in steps if isinstance(steps, list) else [steps]:
        if isinstance(step, dict):
            usual = {'use_regex': True} if step.get('type') == 'ByteLevel' else {}
            step = {key: value for key, value in (usual | step).items() if key != 'trim_offsets'}
        plain.append(step)
    for pattern, expected in known:
        if plain == expected:
            return pattern
    raise ValueError(f"{path} is not a tokenizer in GPT-2's manner, or cuts text in a way that is not known here, "
                     f'{json.dumps(plain):.200}: use another one; known are those of {", ".join(PATTERNS)}')


# -----------------------------------------------------------------------------
# GGUF, llama.cpp's files

NORMAL = 1  # the type of a token of text; special, unused and user-defined ones are others


def open_gguf(path):
    """path -> gguf.GGUFReader. ValueError if it is no whole GGUF file."""
    import gguf
    if not os.path.isfile(path):
        raise ValueError(f'there is no file {str(path)!r}: give the path of a .gguf')

    class Reader(gguf.GGUFReader):
        """Of a list that claims to be longer than the file, GGUFReader would read nothing, again and again."""
        def _get(self, offset, dtype, count=1, **how):
            found = super()._get(offset, dtype, count, **how)
            if len(found) < count:
                raise ValueError('it ends too early')
            return found
    try:
        return Reader(path)
    except Exception as e:  # garbage makes it raise nearly anything
        raise ValueError(f'{path} is not a whole GGUF file ({type(e).__name__}: {str(e)[:80]}): {AGAIN}') from None


def gguf_tokenizer(reader, path=''):
    """
    A GGUF's path, or what open_gguf made of it (then path is for messages) -> BPETokenizer with the same ids.
    ValueError if its tokenizer is damaged or of another kind.
    """
    if not hasattr(reader, 'fields'):
        reader, path = open_gguf(reader), reader
    path = path or 'the GGUF file'

    def get(key, kind, default=None):
        try:
            field = reader.fields.get(f'tokenizer.{key}')
            value = default if field is None else field.contents()
        except Exception as e:  # lengths beyond the file, text that is none
            value = e
        if value is not default and not isinstance(value, kind):
            raise ValueError(f'{path} is damaged, it says that tokenizer.{key} is {value!r:.40}: {AGAIN}')
        return value

    model, pre = get('ggml.model', str), get('ggml.pre', str)
    if model == 'llama':
        raise ValueError(SENTENCEPIECE.format(path))
    if model != 'gpt2' or pre not in PATTERNS:
        raise ValueError(f'{path} has a tokenizer of kind {model!r:.40} with pre-tokenizer {pre!r:.40}, and what is '
                         f"read here is kind 'gpt2' with {', '.join(PATTERNS)}: take a model with one of them")
    tokens, merges, types = (get(f'ggml.{key}', list, []) for key in ('tokens', 'merges', 'token_type'))
    if not all(isinstance(text, str) for text in tokens + merges) or len(types) not in (0, len(tokens)):
        raise ValueError(f'{path} is damaged, its tokens, merges and types of tokens do not fit together: {AGAIN}')
    added = {i for i, kind in enumerate(types) if kind != NORMAL}
    bos = get('ggml.bos_token_id', int)
    vocab = {token: i for i, token in enumerate(tokens)}
    return byte_level_bpe(path, vocab, [pair.split(' ') for pair in merges], added, PATTERNS[pre], NORMALIZERS.get(pre),
                          tokens[bos] if bos in range(len(tokens)) else None, get('ggml.add_bos_token', bool),
                          get('chat_template', str))


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
    ids = dict(zip(tokenizer.special_tokens, tokenizer.special_ids))
    special = [{'id': i, 'content': name, 'special': True, 'single_word': False, 'lstrip': False,
                'rstrip': False, 'normalized': False} for name, i in ids.items()]
    vocab = {text(token): i for token, i in zip(tokens, tokenizer.text_ids)}
    if 'special_ids' in meta:  # only a token of the vocabulary has its place in there; others come after it
        vocab |= ids
    by_bytes = BY_BYTES | {'trim_offsets': True, 'use_regex': False}
    cutter, _ = by_pattern(meta['pattern'])
    return {'version': '1.0', 'added_tokens': special,
            'normalizer': {'type': 'NFC'} if tokenizer.normalizer else None,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [cutter, by_bytes]},
            'post_processor': None, 'decoder': by_bytes,
            'model': {'type': 'BPE', 'vocab': vocab, 'merges': [f'{text(a)} {text(b)}' for a, b in merges_of(tokens)]}}


def merges_of(tokens):
    """
    tokens (list of bytes, in id order) -> [(left, right), ...], the two parts of each token longer than a byte. They
    are found by merging the token's own bytes. ValueError for a token that cannot be merged.
    """
    ranks = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(bpe_parts(token, ranks)) for token in tokens if len(token) > 1]
    for pair in pairs:
        if len(pair) != 2:
            token = b''.join(pair)
            raise ValueError(f'token {ranks[token]} ({token}) is not made of two tokens before it: '
                             'a list of merges cannot express that')
    return pairs
