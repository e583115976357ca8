"""
Writing a dataset: texts or conversations -> tokens -> data/<name>/, which data/loader.py reads. A library of the
prepare.py scripts, without torch.

>>> from data.writer import split_texts, write_texts
>>> train, val = split_texts({'a.txt': 'some text. ' * 99}, val_fraction=0.1)
>>> meta = write_texts('/tmp/picochat/mytext', train, val, 'char', source='a.txt')
/tmp/picochat/mytext: 980 training and 109 validation tokens, vocabulary of 8 (char), sha256 a7b1a205 0d381eb9
"""

import bisect
import json
import os
import platform
import sysconfig
import zlib

import numpy as np

from data.files import hold, in_repo, remove, saving, sha256_of, sync_folder, write_temporary
from data.foreign_tokenizer import load_tokenizer
from data.loader import progress
from data.tokenizer import CharTokenizer, train_bpe


# -----------------------------------------------------------------------------
# Texts, and which of them are held out

def split_texts(texts, val_fraction):
    """
    dict of name -> text -> (list of training texts, list of validation texts), each in the order of the names.

    Of many texts, whole ones are held out: in the order of a hash of their names, each that still fits into
    val_fraction of all characters (if none does, the shortest). So a text stays in its split when others change a
    little. Of a single text the end is held out.
    """
    if len(texts) == 1:
        text, = texts.values()
        cut = int(len(text) * (1 - val_fraction))
        return [text[:cut]], [text[cut:]]
    names = sorted(texts)
    room = round(val_fraction * sum(map(len, texts.values())))
    held = set()
    for name in sorted(names, key=lambda name: zlib.crc32(name.encode(errors='surrogateescape'))):
        if len(texts[name]) <= room:
            held.add(name)
            room -= len(texts[name])
    held = held or {min(names, key=lambda name: len(texts[name]))}
    return [texts[name] for name in names if name not in held], [texts[name] for name in names if name in held]


def stdlib_files(root=''):
    """
    The Python files of the standard library -> list of (module name, text), sorted; a module of a package is called
    'asyncio.events'.

    root: another folder to walk than the running Python's own. Left out are tests, installed packages, folders and
    files that cannot be imported (config-3.12-...), generated files (they name the machine of the build), and files
    that are not UTF-8.
    """
    root = root or sysconfig.get_paths()['stdlib']
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if d.isidentifier() and d not in ('test', 'tests', 'idle_test', '__pycache__')]
        for name in names:
            path = os.path.join(folder, name)
            stem, extension = os.path.splitext(name)
            if extension != '.py' or not stem.isidentifier() or not os.path.isfile(path):
                continue
            if stem.startswith('_sysconfigdata'):
                continue
            parts = os.path.relpath(path, root)[:-len('.py')].split(os.sep)
            if len(parts) > 1 and parts[-1] == '__init__':
                parts.pop()
            try:
                with open(path, encoding='utf-8') as f:
                    files.append(('.'.join(parts), f.read()))
            except UnicodeDecodeError:  # old Pythons have files in other encodings
                continue
    if not files:
        raise ValueError(f'no .py files in {root}: this Python may have its library in a zip; '
                         'use another one, or --root=FOLDER')
    return sorted(files, key=lambda file: file[0])


def stdlib_held_out(module):
    """
    Whether a module of the standard library is held out for validation, by a hash of its top-level name, so that no
    package is in both splits.

    Of the twenty residues 7 was chosen, as it gives neither too little text nor one giant module: _pyio, pickletools,
    mailbox, optparse and some small ones, which are 3 to 4 % of the text in every Python from 3.6 to 3.13.
    """
    return zlib.crc32(module.split('.')[0].encode()) % 20 == 7


def stdlib_source():
    """The source of the text, for meta.json."""
    return f'standard library of {platform.python_implementation()} {platform.python_version()}'


# -----------------------------------------------------------------------------
# Texts -> tokens

def write_texts(data_dir, train, val, level, source, vocab_size=4096, tokenizer=None):
    """
    Lists of training and validation texts -> a dataset, and its meta as a dict.

    level 'char': a token for each character that occurs; the texts are concatenated as they are.
    level 'bpe': a BPE of vocab_size tokens, learnt from the training texts alone; each text starts with its bos.
    tokenizer: an existing tokenizer of either kind; level and vocab_size are then ignored.
    ValueError: too little text, a vocabulary too small or too large for it, or without some of its characters.
    """
    if not any(train) or not any(val):
        raise ValueError(f'there is too little text: {sum(map(len, train)):,} characters for training, '
                         f'{sum(map(len, val)):,} for validation')
    n_chars = sum(map(len, train)) + sum(map(len, val))
    if n_chars > 20_000_000 and level == 'bpe':
        print(f'{n_chars:,} characters: at some 2 million a second', flush=True)
    if tokenizer is None and level == 'char':
        tokenizer = CharTokenizer(''.join(set().union(*train, *val)))
    elif tokenizer is None:
        tokenizer = train_bpe(train, vocab_size)
    return write_dataset(data_dir, tokenizer, text_ids(tokenizer, train), text_ids(tokenizer, val), source)


def text_ids(tokenizer, texts):
    """A list of texts -> their tokens, one text after another, an array of uint32; with a BPE each starts with bos."""
    if tokenizer.kind == 'char':
        return char_ids(tokenizer, ''.join(texts))
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    ids, hundreds = [], range(0, len(texts), 100)
    for i in progress(hundreds, len(hundreds), 'hundreds of texts encoded', every=10):
        for tokens in tokenizer.encode_batch(texts[i:i + 100]):
            ids.append(np.array(start + tokens, dtype=np.uint32))
    return np.concatenate(ids)


def char_ids(tokenizer, text):
    """
    tokenizer.encode(text) as an array of uint32, some five times faster: a table maps code points to ids.
    """
    codes = np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)
    present = np.flatnonzero(np.bincount(codes))
    table = np.zeros(present[-1] + 1 if len(present) else 1, dtype=np.uint32)
    table[present] = tokenizer.encode(''.join(map(chr, present)),
                                      'take them out of the text, or leave --tokenizer= away: the dataset then has a '
                                      'vocabulary of its own, for models that are trained on it from scratch')
    return table[codes]


# -----------------------------------------------------------------------------
# Conversations -> rows of tokens

def chat_tokenizer(path):
    """The tokenizer that path names, see load_tokenizer, for chat. ValueError if it has no format for that."""
    tokenizer = load_tokenizer(path)
    if not tokenizer.chat:
        raise ValueError(f'tokenizer ({path}) has no special tokens like <|assistant_end|> or <|im_end|>, '
                         'which chat needs: take that of a BPE dataset, like data/stdlib_bpe')
    return tokenizer


def write_chats(data_dir, tokenizer, train, val, row, source):
    """
    Lists of training and validation conversations, each as render_chat returns it -> a dataset in rows of row tokens,
    and its meta as a dict.

    A row is a window of training. So all batches have one shape, no answer is seen without its question, and the first
    token of a row, which has no target, is one that opens a conversation. ValueError if no conversation of train or val
    fits in a row.
    """
    stop = tokenizer.turn('assistant', '')[1][0]
    train, train_cut, train_out = cut_chats(train, row, stop)
    val, val_cut, val_out = cut_chats(val, row, stop)
    if not train or not val:
        raise ValueError(f'there are too few conversations: {len(train):,} for training, {len(val):,} for validation; '
                         f'{train_out + val_out:,} have no answer that ends within a row of {row} tokens')
    pad = stop if tokenizer.bos is None else tokenizer.bos
    train_ids, train_mask = pack_rows(train, row, pad)
    val_ids, val_mask = pack_rows(val, row, pad)

    n = len(train_ids) + len(val_ids)
    learnt = int(train_mask.sum()) + int(val_mask.sum())
    used = sum(len(ids) for ids, _ in train + val)
    answers = sum(len(answer_ends(*chat, stop)) for chat in train + val)
    print(f'{len(train):,} and {len(val):,} conversations with {answers:,} answers in '
          f'{len(train_ids) // row:,} and {len(val_ids) // row:,} rows of {row} tokens: '
          f'{100 * learnt / n:.1f} % of the tokens are learnt, {100 * (1 - used / n):.1f} % are padding; '
          f'{train_cut + val_cut:,} conversations are cut at a turn, {train_out + val_out:,} left out')
    return write_dataset(data_dir, tokenizer, train_ids, val_ids, source, (train_mask, val_mask),
                         {'kind': 'chat', 'row': row})


def cut_chats(chats, row, stop):
    """
    Conversations as (ids, mask) -> those that fit in row tokens, how many were cut, and how many left out.

    A conversation is cut after the last answer that ends (with the token stop) within the row; without such an answer
    it is left out.
    """
    kept, n_cut, n_out = [], 0, 0
    for ids, mask in chats:
        ends = answer_ends(ids[:row], mask, stop)
        if not ends:
            n_out += 1
            continue
        n_cut += any(mask[ends[-1]:])
        kept.append((ids[:ends[-1]], mask[:ends[-1]]))
    return kept, n_cut, n_out


def answer_ends(ids, mask, stop):
    """Where answers end: after each token stop of the assistant's own (in ChatML it also ends what users say)."""
    return [i + 1 for i, (token, learn) in enumerate(zip(ids, mask)) if learn and token == stop]


def pack_rows(chats, row, pad):
    """
    chats: list of (ids, mask), none longer than row -> ids, mask: arrays (n_rows * row,), uint32 and uint8.

    Best fit: the longest come first, and each goes whole into the fullest row that has room for it. The rest of a row
    is pad, with mask 0. Conversations of equal length are taken in the order of a hash, so that those that share a row
    are unrelated.
    """
    rows, room = [], []  # room: (tokens still free, number of the row), sorted
    for ids, mask in sorted(chats, key=lambda chat: (-len(chat[0]), zlib.crc32(str(chat[0]).encode()))):
        at = bisect.bisect_left(room, (len(ids),))
        if at < len(room):
            free, r = room.pop(at)
        else:
            free, r = row, len(rows)
            rows.append(([], []))
        rows[r][0].extend(ids)
        rows[r][1].extend(mask)
        bisect.insort(room, (free - len(ids), r))

    all_ids = np.full((len(rows), row), pad, dtype='uint32')
    all_mask = np.zeros((len(rows), row), dtype='uint8')
    for r, (ids, mask) in enumerate(rows):
        all_ids[r, :len(ids)] = ids
        all_mask[r, :len(mask)] = mask
    return all_ids.ravel(), all_mask.ravel()


# -----------------------------------------------------------------------------
# Tokens -> files

def dataset_dir(out_dir, name):
    """out_dir, or data/<name> if that is empty."""
    if out_dir:
        return out_dir
    assert name not in ('', '.', '..') and os.path.basename(name) == name, \
        f'name ({name}) must be that of a folder in data/, without slashes'
    assert name not in ('bench', 'foreign'), f'name ({name}) is a folder of code in data/: take another'
    return in_repo(f'data/{name}')


def write_dataset(data_dir, tokenizer, train_ids, val_ids, source, masks=None, extra=None):
    """
    Writes train.bin, val.bin and meta.json into data_dir, prints the counts, and returns the meta as a dict.

    train_ids, val_ids: sequences or arrays of token ids (a memmap will do, as they are read in slices). masks: None, or
    a pair of sequences of the same lengths, 1 where the token is to be learnt. source: where the text is from. extra: a
    dict of more entries for meta.json.
    All files are completed under other names before any file of an older dataset is touched; files that would not
    change are left alone. AssertionError for ids that are not in the vocabulary, ValueError if the folder cannot be
    written to.
    """
    dtype = np.dtype('uint16' if tokenizer.vocab_size <= 65536 else 'uint32')
    arrays = {'train.bin': (train_ids, dtype, tokenizer.vocab_size), 'val.bin': (val_ids, dtype, tokenizer.vocab_size)}
    if masks is not None:
        assert [len(m) for m in masks] == [len(train_ids), len(val_ids)], \
            f'masks of {[len(m) for m in masks]} tokens for {[len(train_ids), len(val_ids)]}: one value a token'
        arrays['train.mask.bin'] = masks[0], np.dtype('uint8'), 2
        arrays['val.mask.bin'] = masks[1], np.dtype('uint8'), 2

    new = {}  # name -> the complete file that will get this name
    try:
        with hold(data_dir), saving(data_dir):
            for name, (values, kind, bound) in arrays.items():
                write = lambda f: write_integers(f, values, kind, bound, name)
                new[name] = write_temporary(os.path.join(data_dir, name), write)
            digests = {name: sha256_of(path) for name, path in new.items()}
            meta = {**tokenizer.meta(), 'vocab_size': tokenizer.vocab_size, 'token_bytes': list(tokenizer.token_bytes),
                    'source': source, 'dtype': dtype.name, 'train_tokens': len(train_ids), 'val_tokens': len(val_ids),
                    'sha256': digests, **(extra or {})}
            text = json.dumps(meta).encode()
            new['meta.json'] = write_temporary(os.path.join(data_dir, 'meta.json'), lambda f: f.write(text))
            replace_dataset(data_dir, new)
            sync_folder(data_dir)  # from here on the sources may be deleted
    finally:
        remove(*new.values())
    print(f'{data_dir}: {len(train_ids):,} training and {len(val_ids):,} validation tokens, '
          f'vocabulary of {tokenizer.vocab_size:,} ({meta["kind"]}), '
          f'sha256 {digests["train.bin"][:8]} {digests["val.bin"][:8]}')
    return meta


def write_integers(f, values, dtype, bound, name):
    """A sequence of integers below bound -> a file, little-endian, a slice at a time."""
    assert len(values) > 0, f'{name}: no tokens'
    for i in range(0, len(values), 1 << 22):
        piece = np.asarray(values[i:i + (1 << 22)])
        assert 0 <= piece.min() and piece.max() < bound, \
            f'{name}: values {piece.min()}..{piece.max()}, expected 0..{bound - 1}'
        f.write(piece.astype(dtype.newbyteorder('<')).tobytes())


def replace_dataset(data_dir, new):
    """Moves new files (name -> path, meta.json among them) to their names; those that did not change are left alone."""
    here = lambda name: os.path.join(data_dir, name)
    changed = [name for name, path in new.items()
               if not os.path.isfile(here(name)) or sha256_of(here(name)) != sha256_of(path)]
    gone = [name for name in ('train.mask.bin', 'val.mask.bin') if name not in new and os.path.exists(here(name))]
    if not changed and not gone:
        return
    # An older meta.json is removed first: if we are killed in between, there is no dataset, rather than new tokens with
    # an old vocabulary.
    remove(*map(here, ('meta.json', *gone)))
    for name in [name for name in changed if name != 'meta.json'] + ['meta.json']:
        os.replace(new[name], here(name))
