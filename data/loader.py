"""
From text to training batches: download, split, tokenise, write data/<name>/, and read it back. A library; the
prepare.py scripts use the upper half of this file, train.py the last part. From the repo root:

>>> from data.loader import Loader
>>> loader = Loader('data/stdlib_char', 'train', batch_size=4, block_size=256, seed=1337)
>>> x, y = loader.batch(step=0)
    # (4, 256) int64 each; y is x one token on, and -1 where there is nothing to learn
>>> x, y = loader.batch(step=1000)
    # any step, in any order: a batch depends on nothing but its number, so resuming needs no state
>>> for x, y in Loader('data/stdlib_char', 'val', 4, 256).eval_batches(): ...
    # every token once

A dataset is train.bin and val.bin (plain integers, no header), for chat train.mask.bin and val.mask.bin (a byte a
token, 1 where it is to be learnt), and meta.json, which is written last: a folder without it is not a dataset. Where
meta.json has a row, the files are rows of so many tokens that hold whole conversations, and a window is a row.
"""

import bisect
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sysconfig
import time
import zlib

import numpy as np

from data.tokenizer import CharTokenizer, from_meta, train_bpe
# requests and torch are imported where they are used: training needs no requests, and preparing needs no torch,
# which takes seconds to import.


# -----------------------------------------------------------------------------
# Downloads

class DownloadError(SystemExit):
    """
    A download that did not work: ends a script with one line and status 1,
    unless somebody catches it and looks at .reason.
    """

    def __init__(self, message, reason):
        super().__init__(f'error: {message}')
        self.reason = reason  # the HTTP status as an int, or 'unreachable', 'cut short', 'altered'


def download(url, path, sha256=None, size=None, pause=0.0):
    """
    Fetches url into the file at path, by way of path + '.part', and returns path.
    Nothing is fetched if the file is there and right.

    sha256: hex digits, size: bytes; both are checked if given. Without a sha256 the one is checked that Hugging Face
    tells of large files. pause: seconds to wait before asking, out of politeness.
    DownloadError: unreachable, an HTTP error, cut short (the .part stays and the next call goes on from there), or
    altered, that is, not of that sha256 or size (the .part is removed). What was at path before is replaced by a right
    file or not at all.
    """
    import requests
    path = os.fspath(path)
    part = path + '.part'
    if os.path.exists(path) and not _mismatch(path, sha256, size):
        return path
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    time.sleep(pause)

    have = os.path.getsize(part) if os.path.exists(part) else 0
    # identity: if the server compressed it, what arrives would be neither the bytes that Content-Length counts nor
    # those of the range
    headers = {'User-Agent': 'picochat/1.0 (a small educational language model)', 'Accept-Encoding': 'identity'}
    if have:
        headers['Range'] = f'bytes={have}-'
    total, reason, cause = size, 'unreachable', None
    try:
        with requests.get(url, headers=headers, stream=True, timeout=60) as r:
            reason = 'cut short'
            # what Hugging Face says of a large file, where it sends us on to the server that has it
            told = [h.headers['X-Linked-Etag'].strip('"') for h in (*r.history, r) if 'X-Linked-Etag' in h.headers]
            sha256 = sha256 or next((tag for tag in told if re.fullmatch('[0-9a-f]{64}', tag)), None)
            # bytes 5-99/100 with a 206; bytes */100 with a 416, which says that nothing comes after what we have
            whole = re.fullmatch(r'bytes (?:(\d+)-\d+|\*)/(\d+)', r.headers.get('Content-Range', ''))
            if have and r.status_code in (206, 416):
                # not so if our part is longer than their file, or if they send another range
                if not whole or int(whole[1] or whole[2]) != have:
                    os.remove(part)
                    return download(url, path, sha256, size)  # from the start, and without Range
                total = int(whole[2])
            elif r.status_code == 200:  # the whole file, also where a range was asked for: many servers know none
                have = 0
                if 'Content-Length' in r.headers and 'Content-Encoding' not in r.headers:
                    total = int(r.headers['Content-Length'])
            else:
                raise DownloadError(f'{url} answered {r.status_code} {r.reason}', r.status_code)
            if r.status_code != 416:
                with open(part, 'ab' if have else 'wb') as f:
                    # a small chunk, because nothing arrives of the one during which the line goes dead
                    for chunk in r.iter_content(1 << 13):
                        f.write(chunk)
    except OSError as e:  # those of requests are OSErrors as well; what arrived so far is in the .part
        cause = e
    got = os.path.getsize(part) if os.path.exists(part) else 0
    # only the name of an error, or its short text: those of requests run over many lines
    why = cause and (getattr(cause, 'strerror', None) or type(cause).__name__)
    if reason == 'unreachable':
        raise DownloadError(f'cannot reach {url} ({why}): try again later, or put the file at {path} yourself', reason)
    if cause or got < (total or 0):
        raise DownloadError(f'{url} was cut short' + (f' ({why})' if why else '')
                            + f': {got:,} of {total or "unknown"} bytes are kept in {part}, '
                            'run the same command again to go on from there', reason)
    mismatch = _mismatch(part, sha256, size)
    if mismatch:
        os.remove(part)
        raise DownloadError(f'{url} is not the file that was expected: {mismatch}; it was refused, '
                            f'{path} is as it was', 'altered')
    os.replace(part, path)
    return path


def _mismatch(path, sha256, size):
    """What differs between the file and what it should be, in words; '' if nothing does."""
    if size is not None and os.path.getsize(path) != size:
        return f'{os.path.getsize(path):,} bytes instead of {size:,}'
    if sha256 is not None:
        digest = hashlib.sha256()
        with open(path, 'rb') as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != sha256.lower():
            return f'sha256 {digest.hexdigest()} instead of {sha256.lower()}'
    return ''


# -----------------------------------------------------------------------------
# Texts, and which of them are held out

def read_text(path):
    """
    A UTF-8 file -> str, with \\n for every line end; a byte order mark is left out.
    A one-line error if it is not UTF-8 or not there.
    """
    try:
        with open(path, encoding='utf-8-sig') as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise SystemExit(f'error: {path} is not UTF-8 text (byte {e.start:,}): convert it, or leave it out')
    except OSError as e:
        raise SystemExit(f'error: cannot read {path}: {e.strerror}')


def split_texts(texts, val_fraction):
    """
    dict of name -> text -> (list of training texts, list of validation texts), each in the order of the names.

    Of many texts, whole ones are held out: in the order of a hash of their names, each that still fits into
    val_fraction of all characters (if none does, the shortest). So a text stays on its side when the others change a
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
    The Python files of the standard library -> list of (module name, text), sorted;
    'asyncio.events' is of the package asyncio.

    root: str, another folder to walk; by default the running Python's own. Left out: tests, installed packages, folders
    and files that cannot be imported (config-3.12-...), what the build generated (it names its machine), and files that
    are not UTF-8.
    """
    root = root or sysconfig.get_paths()['stdlib']
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if d.isidentifier() and d not in ('test', 'tests', 'idle_test', '__pycache__')]
        for name in names:
            path = os.path.join(folder, name)
            stem, extension = os.path.splitext(name)
            if (extension == '.py' and stem.isidentifier() and not stem.startswith('_sysconfigdata')
                    and os.path.isfile(path)):
                parts = os.path.relpath(path, root)[:-len('.py')].split(os.sep)
                module = '.'.join(parts[:-1] if len(parts) > 1 and parts[-1] == '__init__' else parts)
                try:
                    with open(path, encoding='utf-8') as f:
                        files.append((module, f.read()))
                except UnicodeDecodeError:  # old Pythons have files in other encodings
                    continue
    if not files:
        raise SystemExit(f'error: no .py files in {root}: this Python may have its library in a zip; '
                         'use another one, or --root=FOLDER')
    return sorted(files, key=lambda file: file[0])


def stdlib_held_out(module):
    """
    Whether a module of the standard library is for validation, by a hash of its top-level name:
    no package is on both sides.

    Of the twenty residues, 7 gives neither too little nor one giant: _pyio, pickletools, mailbox, optparse and some
    small ones, which are 3 to 4 % of the text in every Python from 3.6 to 3.13.
    """
    return zlib.crc32(module.split('.')[0].encode()) % 20 == 7


def stdlib_source():
    """What meta.json says about where the text is from."""
    return f'standard library of {platform.python_implementation()} {platform.python_version()}'


# -----------------------------------------------------------------------------
# Texts -> tokens -> files

def char_ids(tokenizer, text):
    """
    tokenizer.encode(text) as an array of uint32, some five times faster:
    each character's code point looks up its id in a table.
    """
    codes = np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)
    present = np.flatnonzero(np.bincount(codes))
    table = np.zeros(present[-1] + 1 if len(present) else 1, dtype=np.uint32)
    table[present] = tokenizer.encode(''.join(map(chr, present)))
    return table[codes]


def write_texts(data_dir, train, val, level, source, vocab_size=4096, tokenizer=None):
    """
    Lists of training and validation texts -> a dataset, and its meta as a dict.

    level 'char': one token a character, all that occur; the texts one after another as they are.
    level 'bpe': a BPE of vocab_size tokens, learnt from the training texts alone; each text starts with its bos.
    tokenizer: one that is there already, of either kind; level and vocab_size then say nothing.
    """
    if level not in ('char', 'bpe'):
        raise SystemExit(f'error: level is {level!r}: use char or bpe')
    if not any(train) or not any(val):
        raise SystemExit(f'error: there is too little text: {sum(map(len, train)):,} characters for training, '
                         f'{sum(map(len, val)):,} for validation')
    if type(vocab_size) is not int:
        raise SystemExit(f'error: vocab_size is {vocab_size!r}: a bpe needs a number')
    try:
        if tokenizer is None:
            tokenizer = (CharTokenizer(''.join(set().union(*train, *val))) if level == 'char'
                         else train_bpe(train, vocab_size))
        if tokenizer.kind == 'char':
            train_ids, val_ids = (char_ids(tokenizer, ''.join(texts)) for texts in (train, val))
        else:
            start = [] if tokenizer.bos is None else [tokenizer.bos]
            encode = lambda text: np.array(start + tokenizer.encode(text), dtype=np.uint32)
            train_ids, val_ids = (np.concatenate([encode(text) for text in texts]) for texts in (train, val))
    except ValueError as e:  # a vocabulary too small for the bytes, too large for the text, or without its characters
        raise SystemExit(f'error: {e}')
    return write_dataset(data_dir, tokenizer, train_ids, val_ids, source)


def chat_tokenizer(data_dir):
    """
    The tokenizer of the dataset in data_dir, for chat.
    A one-line error if there is none, or if it has no special tokens.
    """
    try:
        tokenizer = from_meta(load_meta(data_dir))
    except ValueError as e:
        raise SystemExit(f'error: {data_dir}: {e}')
    if '<|assistant_end|>' not in getattr(tokenizer, 'special_tokens', ()):
        raise SystemExit(f'error: tokenizer ({data_dir}) has no special tokens like <|assistant_end|>, '
                         'which chat needs: take that of a BPE dataset, like data/stdlib_bpe')
    return tokenizer


def pack_rows(chats, row, pad):
    """
    chats: list of (ids, mask), none longer than row -> ids, mask: arrays (n_rows * row,), uint32 and uint8. Best fit:
    the longest comes first, each goes whole into the fullest row that has room for it; what stays free is pad, with
    mask 0. Equal lengths are taken in the order of a hash, so that neighbours in a row have nothing to do with each
    other.
    """
    rows, room = [], []  # room: (tokens still free, number of the row), sorted
    for ids, mask in sorted(chats, key=lambda chat: (-len(chat[0]), zlib.crc32(str(chat[0]).encode()))):
        at = bisect.bisect_left(room, (len(ids),))
        free, r = room.pop(at) if at < len(room) else (row, len(rows))
        if r == len(rows):
            rows.append(([], []))
        rows[r][0].extend(ids)
        rows[r][1].extend(mask)
        bisect.insort(room, (free - len(ids), r))
    fill = lambda tokens, value: tokens + [value] * (row - len(tokens))
    return tuple(np.array([fill(part, value) for part in parts], dtype=kind).ravel()
                 for parts, value, kind in zip(zip(*rows), (pad, 0), ('uint32', 'uint8')))


def write_chats(data_dir, tokenizer, train, val, row, source):
    """
    Lists of training and validation conversations, each as render_chat returns it -> a dataset in rows of row tokens,
    and its meta as a dict.

    One row is one window of training, so no batch has a shape of its own, no answer comes without its question, and the
    first token of a row, <|bos|>, is nobody's target. Of a conversation longer than a row the last exchanges are left
    out, if need be all of them.
    """
    if type(row) is not int or row < 8:
        raise SystemExit(f'error: row is {row!r}: it is the number of tokens in a row, at least 8; '
                         'training takes it as block_size')
    stop, parts, n_cut, n_out = tokenizer.special('<|assistant_end|>'), [], 0, 0
    for chats in (train, val):
        ends = [max((i + 1 for i, token in enumerate(ids[:row]) if token == stop), default=0) for ids, _ in chats]
        n_cut += sum(end > 0 and any(mask[end:]) for end, (_, mask) in zip(ends, chats))
        n_out += ends.count(0)
        parts.append([(ids[:end], mask[:end]) for end, (ids, mask) in zip(ends, chats) if end])
    if not all(parts):
        raise SystemExit(f'error: there are too few conversations: {len(parts[0]):,} for training, '
                         f'{len(parts[1]):,} for validation; {n_out:,} have no answer that ends within '
                         f'a row of {row} tokens')
    (train_ids, train_mask), (val_ids, val_mask) = (pack_rows(chats, row, tokenizer.bos) for chats in parts)
    chats = parts[0] + parts[1]
    used = sum(len(ids) for ids, _ in chats)
    n = len(train_ids) + len(val_ids)
    print(f'{len(parts[0]):,} and {len(parts[1]):,} conversations with '
          f'{sum(ids.count(stop) for ids, _ in chats):,} answers in '
          f'{len(train_ids) // row:,} and {len(val_ids) // row:,} rows of {row} tokens: '
          f'{100 * (int(train_mask.sum()) + int(val_mask.sum())) / n:.1f} % of the tokens are learnt, '
          f'{100 * (1 - used / n):.1f} % are padding; '
          f'{n_cut:,} conversations are cut at a turn, {n_out:,} left out')
    return write_dataset(data_dir, tokenizer, train_ids, val_ids, source, (train_mask, val_mask),
                         {'kind': 'chat', 'row': row})


@contextlib.contextmanager
def writing(folder):
    """A folder that cannot be written, or a full disk, ends in one line."""
    try:
        yield
    except OSError as e:
        raise SystemExit(f'error: cannot write {folder}: {e.strerror}: free some disk space, or give another folder')


def write_dataset(data_dir, tokenizer, train_ids, val_ids, source, masks=None, extra=None):
    """
    Writes train.bin, val.bin and meta.json into data_dir, prints the counts, and returns the meta as a dict.

    train_ids, val_ids: sequences or arrays of token ids (a memmap will do: they are read in slices). masks: None, or a
    pair of sequences of the same lengths, 1 where the token is to be learnt. source: str, where the text is from.
    extra: dict of more to keep in meta.json.
    All files are complete under another name before the first of an older dataset is touched.
    """
    dtype = np.dtype('uint16' if tokenizer.vocab_size <= 65536 else 'uint32')
    files = {'train.bin': (train_ids, dtype, tokenizer.vocab_size), 'val.bin': (val_ids, dtype, tokenizer.vocab_size)}
    if masks is not None:
        assert [len(m) for m in masks] == [len(train_ids), len(val_ids)], \
            f'masks of {[len(m) for m in masks]} tokens for {[len(train_ids), len(val_ids)]}: one value a token'
        files |= {'train.mask.bin': (masks[0], np.dtype('uint8'), 2), 'val.mask.bin': (masks[1], np.dtype('uint8'), 2)}
    with writing(data_dir):
        os.makedirs(data_dir, exist_ok=True)
        at = lambda name: os.path.join(data_dir, name)

        digests = {}
        for name, (values, kind, bound) in files.items():
            assert len(values) > 0, f'{name}: no tokens'
            digest = hashlib.sha256()
            with open(at(name + '.part'), 'wb') as f:
                for i in range(0, len(values), 1 << 22):
                    piece = np.asarray(values[i:i + (1 << 22)])
                    assert 0 <= piece.min() and piece.max() < bound, \
                        f'{name}: values {piece.min()}..{piece.max()}, expected 0..{bound - 1}'
                    piece = piece.astype(kind.newbyteorder('<')).tobytes()
                    digest.update(piece)
                    f.write(piece)
            digests[name] = digest.hexdigest()
        meta = {**tokenizer.meta(), 'vocab_size': tokenizer.vocab_size, 'token_bytes': list(tokenizer.token_bytes),
                'source': source, 'dtype': dtype.name, 'train_tokens': len(train_ids), 'val_tokens': len(val_ids),
                'sha256': digests, **(extra or {})}
        with open(at('meta.json.part'), 'w', encoding='utf-8') as f:
            json.dump(meta, f)

        # An older meta.json goes before its files do: if we are killed in between, there is no dataset, rather than
        # one of new tokens with an old vocabulary.
        for name in ('meta.json', 'train.mask.bin', 'val.mask.bin'):
            if os.path.exists(at(name)):
                os.remove(at(name))
        for name in [*files, 'meta.json']:
            os.replace(at(name + '.part'), at(name))
    print(f'{data_dir}: {len(train_ids):,} training and {len(val_ids):,} validation tokens, '
          f'vocabulary of {tokenizer.vocab_size:,} ({meta["kind"]}), '
          f'sha256 {digests["train.bin"][:8]} {digests["val.bin"][:8]}')
    return meta


# -----------------------------------------------------------------------------
# Files -> batches

def load_meta(data_dir):
    """meta.json of a dataset as a dict. A one-line error that names the command to run if it is missing or broken."""
    data_dir = os.fspath(data_dir)
    path = os.path.join(data_dir, 'meta.json')
    script = os.path.join(data_dir, 'prepare.py').replace(os.sep, '/')
    if not os.path.exists(script):  # a dataset made from somebody's own text, or a slip of the pen
        name = os.path.basename(os.path.normpath(data_dir))
        script = (f'data/text/prepare.py --input=FILE_OR_FOLDER --name={name}, '
                  f'or for conversations data/chat/prepare.py --input=FILE.jsonl --name={name}')
    if not os.path.exists(path):
        raise SystemExit(f'error: no dataset in {data_dir} ({path} is not there): run python {script}')
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except ValueError:
        raise SystemExit(f'error: {path} is damaged, it is not JSON: run python {script} again')


def data_of(state, source, dataset=''):
    """
    What a checkpoint holds, its name -> the folder of its data (or of dataset), and its tokenizer. One line if the two
    do not belong together.
    """
    data_dir, tokenizer = os.path.join('data', dataset or state['dataset']), from_meta(state['tokenizer'])
    if from_meta(load_meta(data_dir)).meta() != tokenizer.meta():
        raise SystemExit(f"error: {data_dir} has another tokenizer than {source} was trained with: give the dataset it "
                         f"was trained on ({state['dataset']}), or prepare that as it was")
    return data_dir, tokenizer


def held_out(fold, places, n_tokens, row=None):
    """
    fold '2/4', the second quarter, between rows if there are any -> which of the places (array or tensor of ints) in a
    text of n_tokens it leaves out, as bools. A one-line error for what is no fold.
    """
    i, n = map(int, fold.split('/')) if re.fullmatch(r'\d{1,4}/\d{1,4}', fold) else (0, 0)
    if not 1 <= i <= n > 1:
        raise SystemExit(f"error: hold_out ({fold}) must be like 1/4, the first of four parts of the training text, "
                         "or empty")
    part = places // (row or 1) * n // max(1, n_tokens // (row or 1))
    return part % n == i - 1                    # the tokens behind the last whole row go with the first part


class Loader:
    """
    Batches of one split as a pure function of the step: no state to save, resume is exact.

    An epoch is the split cut into windows of block_size tokens, each once, in random order; where the first window
    starts is random too, so a token is seen at other positions in other epochs; where meta.json has a row, windows are
    the rows. Sample number i, counted over steps, micro-batches, ranks and rows in this order, is window i % n_windows
    of epoch i // n_windows. So two processes see, step by step, what one process sees with twice the accumulation.
    """

    def __init__(self, data_dir, split, batch_size, block_size, seed=0, rank=0, world_size=1, device='cpu',
                 hold_out=''):
        """
        data_dir: like 'data/stdlib_char'; split: 'train' or 'val'; batch_size: rows a micro-batch of this process;
        block_size: tokens a row; rank of world_size processes; device: where the batches go; hold_out: a part of the
        split that is left out, see held_out. A one-line error if the split is missing, damaged, or too short.
        """
        assert 0 <= rank < world_size, f'rank ({rank}) must be in 0..{world_size - 1}, of world_size ({world_size})'
        assert batch_size > 0 and block_size > 0, \
            f'batch_size ({batch_size}) and block_size ({block_size}) must be at least 1'
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.rank, self.world_size, self.device = rank, world_size, device
        self.meta = load_meta(data_dir)
        path = os.path.join(data_dir, f'{split}.bin')
        dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        self.n_tokens = self.meta[f'{split}_tokens']
        self.tokens = self._map(path, dtype)  # (n_tokens,)
        mask_path = os.path.join(data_dir, f'{split}.mask.bin')
        # the mask is (n_tokens,) as well: 1 where the token is to be learnt; None: all are
        self.mask = self._map(mask_path, np.dtype('uint8')) if f'{split}.mask.bin' in self.meta['sha256'] else None
        self.row = self.meta.get('row')
        if hold_out:                            # what is left is copied into memory
            left = ~held_out(hold_out, np.arange(self.n_tokens), self.n_tokens, self.row)
            self.tokens, self.n_tokens = self.tokens[left], int(left.sum())
            if self.mask is not None:
                self.mask = self.mask[left]
        if self.row and self.row != block_size:
            raise SystemExit(f'error: {data_dir} is packed in rows of {self.row} tokens, '
                             f'and block_size is {block_size}: '
                             f'give --block_size={self.row} in training, or prepare it again with --row={block_size}')
        if not self.row and self.n_tokens < block_size + 1:
            raise SystemExit(f'error: {path} has {self.n_tokens:,} tokens, fewer than block_size + 1 '
                             f'({block_size + 1:,}): use a smaller block_size, or more text')
        # One window fewer than fit, so that the first has block_size places to start and all epochs have one length.
        self.n_windows = self.n_tokens // self.row if self.row else max(1, self.n_tokens // block_size - 1)
        self._epoch = None, None, None  # number, start of the first window, order of the windows: the one in use

    def _map(self, path, dtype):
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != self.n_tokens * dtype.itemsize:
            raise SystemExit(f'error: {path} has {size:,} bytes, and meta.json says {self.n_tokens:,} tokens of '
                             f'{dtype.itemsize}: run prepare.py again')
        return np.memmap(path, dtype=dtype, mode='r')

    def batch(self, step, micro=0, accumulation=1):
        """
        Micro-batch `micro` of the `accumulation` of this step -> x, y: (batch_size, block_size) int64;
        y is -1 where the mask is 0.
        """
        return self.rows(self.starts(step, micro, accumulation))

    def starts(self, step, micro=0, accumulation=1):
        """Where the rows of that batch start in the split: batch_size ints."""
        assert 0 <= micro < accumulation, \
            f'micro ({micro}) must be in 0..{accumulation - 1}, of accumulation ({accumulation})'
        first = ((step * accumulation + micro) * self.world_size + self.rank) * self.batch_size
        return [int(self._start(first + row)) for row in range(self.batch_size)]

    def _start(self, i):
        """Where sample i starts in the split. Its tokens and the target of the last are start .. start + block_size."""
        epoch, index = divmod(i, self.n_windows)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            # any shift that leaves room for all windows
            shift = 0 if self.row else rng.integers(self.n_tokens - self.n_windows * self.block_size)
            self._epoch = epoch, shift, rng.permutation(self.n_windows)
        _, shift, order = self._epoch
        return shift + order[index] * self.block_size

    def eval_batches(self, batch_size=None):
        """
        Yields x, y: (batch_size, block_size) int64 over the whole split, in order, for this rank. Over all ranks every
        token but the first is a target exactly once. All shapes are the same and all ranks have as many batches: what
        is beyond the end has y = -1.
        """
        batch_size = batch_size or self.batch_size
        n_windows = math.ceil((self.n_tokens - 1) / self.block_size)
        for i in range(math.ceil(n_windows / (batch_size * self.world_size))):
            first = (i * self.world_size + self.rank) * batch_size
            yield self.rows([(first + row) * self.block_size for row in range(batch_size)])

    def rows(self, starts):
        """The windows that start at these places -> x, y as batch gives them."""
        import torch
        at = np.array(starts)[:, None] + np.arange(self.block_size + 1)  # (B, T+1)
        inside = at < self.n_tokens
        at = np.minimum(at, self.n_tokens - 1)  # beyond the end stands the last token: as an input it has no target
        rows = self.tokens[at].astype(np.int64)  # (B, T+1)
        learn = inside if self.mask is None else inside & (self.mask[at] != 0)
        x = torch.from_numpy(np.ascontiguousarray(rows[:, :-1]))  # (B, T)
        y = torch.from_numpy(np.where(learn[:, 1:], rows[:, 1:], -1))  # (B, T)
        return copy_to(self.device, x, y)


def copy_to(device, *tensors):
    """The tensors on that device. To a GPU they go from pinned memory: that overlaps with what it is doing."""
    if str(device).startswith('cuda'):
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)
