"""
Reading a dataset: batches as a pure function of the step. From the repo root:

>>> from data.loader import Loader
>>> loader = Loader('data/stdlib_char', 'train', batch_size=4, block_size=256, seed=1337)
>>> x, y = loader.batch(step=0)
    # (4, 256) int64 each; y is x shifted by one token, and -1 where there is nothing to learn
>>> x, y = loader.batch(step=1000)
    # any step, in any order: a batch depends on nothing but its number, so resuming needs no state
>>> for x, y in Loader('data/stdlib_char', 'val', 4, 256).eval_batches(): ...
    # every token once

A dataset is train.bin and val.bin (plain integers, no header), meta.json, and for chats train.mask.bin and val.mask.bin
(one byte a token: 1 where the token is to be learnt). If meta.json has a row length, the files consist of rows of so
many tokens, each of which holds whole conversations, and a window is a row. data/writer.py writes all of this.
"""

import math
import os
import re
import shlex
import sys
import time

import numpy as np

from data.files import check_once, in_repo, read_json, sha256_of
from data.tokenizer import fingerprint, from_meta, vocab_size_of
# only Loader.rows imports torch, which takes seconds: preparing a dataset does without it


def progress(steps, total, what, every=5.0, quiet=False):
    """Yields from steps; every few seconds it prints to stderr how many of the total are done."""
    said = time.perf_counter()
    for n, step in enumerate(steps):
        if time.perf_counter() - said > every and not quiet:
            print(f'{n:,} of {total:,} {what}', file=sys.stderr, flush=True)
            said = time.perf_counter()
        yield step


class Loader:
    """
    Batches of one split as a pure function of the step: no state to save, resume is exact.

    An epoch is the split cut into windows of block_size tokens, each read once, in random order. The first window
    starts at a random place, so that a token has another position in another epoch. (If meta.json has a row length,
    the windows are the rows.) Samples are counted over steps, then micro-batches, then rows; sample i is window
    i % n_windows of epoch i // n_windows. Processes play no part in this: they take turns at a step's micro-batches
    (train.py), so two processes see in each step what one process sees with twice the accumulation.
    """

    def __init__(self, data_dir, split, batch_size, block_size, seed=0, device='cpu', hold_out=''):
        """
        data_dir: like 'data/stdlib_char'; split: 'train' or 'val'; batch_size: rows of a micro-batch; block_size:
        tokens of a row; device: where the batches go; hold_out: a part of the split to leave out, see held_out.
        ValueError if the split is missing, damaged, or too short.
        """
        self.batch_size, self.block_size, self.seed, self.device = batch_size, block_size, seed, device
        self._open(data_dir, split, hold_out)
        self._cut(f'{data_dir}/{split}.bin')
        self._epoch = None, None, None          # the current epoch: number, start of its first window, window order

    def _open(self, data_dir, split, hold_out):
        """Opens the tokens of a split, and the mask of those to be learnt."""
        self.meta = load_meta(data_dir)
        self.row, self.n_tokens = self.meta.get('row'), self.meta.get(f'{split}_tokens')
        if any(type(n) is not int or n < 1 for n in (self.n_tokens, self.row or 1)):
            raise ValueError(f'{data_dir}/meta.json says that there are {self.n_tokens!r:.20} tokens, in rows of '
                             f'{self.row!r:.20}: run prepare.py again')
        path = os.path.join(data_dir, f'{split}.bin')
        self.tokens = self._map(path, self.meta['dtype'], vocab_size_of(self.meta))  # (n_tokens,)
        self.mask = None                        # or (n_tokens,): 1 where the token is to be learnt
        if f'{split}.mask.bin' in self.meta['sha256']:
            self.mask = self._map(os.path.join(data_dir, f'{split}.mask.bin'), 'uint8', 2)
        if hold_out:                            # the rest is copied into memory
            left = ~held_out(hold_out, np.arange(self.n_tokens), self.n_tokens, self.row)
            self.tokens, self.n_tokens = self.tokens[left], int(left.sum())
            if self.mask is not None:
                self.mask = self.mask[left]

    def _cut(self, path):
        """Counts the windows of block_size tokens. ValueError if there is none, or rows have another length."""
        block_size = self.block_size
        if self.row and self.row != block_size:
            raise ValueError(f'{os.path.dirname(path)} is packed in rows of {self.row} tokens, and block_size is '
                             f'{block_size}: give --block_size={self.row} in training, or prepare it again with '
                             f'--row={block_size}')
        if not self.row and self.n_tokens < block_size + 1:
            raise ValueError(f'{path} has {self.n_tokens:,} tokens, fewer than block_size + 1 ({block_size + 1:,}): '
                             'use a smaller block_size, or more text')
        if self.row:
            self.n_windows = self.n_tokens // self.row
        else:
            # one fewer than fit, so that the first one can start at block_size places and all epochs are equally long
            self.n_windows = max(1, self.n_tokens // block_size - 1)

    def _map(self, path, dtype, bound):
        """Maps the integers of a file, which must be below bound, into memory; they are read as they are used."""
        if dtype not in ('uint8', 'uint16', 'uint32'):
            raise ValueError(f'{path} has tokens of type {dtype!r:.20}, says meta.json, and not uint16 or uint32: '
                             'run prepare.py again')
        dtype = np.dtype(dtype).newbyteorder('<')
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != self.n_tokens * dtype.itemsize:
            raise ValueError(f'{path} has {size:,} bytes, and meta.json says {self.n_tokens:,} tokens of '
                             f'{dtype.itemsize}: run prepare.py again')
        integers = np.memmap(path, dtype=dtype, mode='r')
        expected = self.meta['sha256'].get(os.path.basename(path))
        check_once(path, [expected, bound], lambda: check_integers(path, integers, bound, expected))
        return integers

    def batch(self, step, micro=0, accumulation=1):
        """
        Micro-batch `micro` of the `accumulation` of this step -> x, y: (batch_size, block_size) int64;
        y is -1 where the mask is 0.
        """
        return self.rows(self.starts(step, micro, accumulation))

    def starts(self, step, micro=0, accumulation=1):
        """The places in the split where the rows of that batch start: batch_size ints."""
        first = (step * accumulation + micro) * self.batch_size
        return [int(self._start(first + row)) for row in range(self.batch_size)]

    def _start(self, i):
        """The place where sample i starts. Its inputs and its last target are tokens start .. start + block_size."""
        epoch, index = divmod(i, self.n_windows)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            # a random shift that leaves room for all windows
            shift = 0 if self.row else rng.integers(self.n_tokens - self.n_windows * self.block_size)
            self._epoch = epoch, shift, rng.permutation(self.n_windows)
        _, shift, order = self._epoch
        return shift + order[index] * self.block_size

    def eval_batches(self, rank=0, world_size=1):
        """
        Yields x, y: (batch_size, block_size) int64 over the whole split, in order; if processes share the work, the
        batches of this rank. Over all ranks every token but the first is a target exactly once. All batches have the
        same shape and all ranks equally many of them: places beyond the end have y = -1.
        """
        n_windows = math.ceil((self.n_tokens - 1) / self.block_size)
        n_batches = math.ceil(n_windows / (self.batch_size * world_size))
        for i in progress(range(n_batches), n_batches, 'batches measured', quiet=rank > 0):
            first = (i * world_size + rank) * self.batch_size
            yield self.rows([(first + row) * self.block_size for row in range(self.batch_size)])

    def rows(self, starts):
        """The windows that start at these places -> x, y as batch gives them."""
        import torch
        at = np.array(starts)[:, None] + np.arange(self.block_size + 1)  # (B, T+1)
        inside = at < self.n_tokens
        at = np.minimum(at, self.n_tokens - 1)  # beyond the end the last token is repeated, without a target
        rows = self.tokens[at].astype(np.int64)  # (B, T+1)
        learn = inside if self.mask is None else inside & (self.mask[at] != 0)
        x = torch.from_numpy(np.ascontiguousarray(rows[:, :-1]))  # (B, T)
        y = torch.from_numpy(np.where(learn[:, 1:], rows[:, 1:], -1))  # (B, T)
        return copy_to(self.device, x, y)


def validation(data_dir, block_size, device='cpu'):
    """
    The validation split as a Loader to measure a model of that context on: in rows of block_size tokens, at most 2,048
    (chats in their own rows). Long rows come four at a time, to save memory and to show progress more often.
    """
    length = load_meta(data_dir).get('row') or min(block_size, 2048)
    return Loader(data_dir, 'val', 16 if length <= 512 else 4, length, device=device)


def check_integers(path, integers, bound, sha256):
    """ValueError unless the file at path has this sha256, and all its integers are below bound."""
    found = sha256_of(path)
    if found != sha256:
        raise ValueError(f'{path} is not the file that meta.json describes: its sha256 is {found}, and {sha256} is '
                         'expected: run prepare.py again')
    for i in range(0, len(integers), 1 << 22):
        largest = integers[i:i + (1 << 22)].max()
        if largest >= bound:
            raise ValueError(f'{path} has the id {largest:,}, and ids are 0 to {bound - 1:,}: run prepare.py again')


def copy_to(device, *tensors):
    """The tensors on that device. To a GPU they are copied from pinned memory, while it goes on computing."""
    if str(device).startswith('cuda'):
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)


def micro_batches(total_batch_size, rows, block_size, processes=1):
    """
    How many forward passes over so many rows, on each process, make a step of total_batch_size tokens (0: one pass).
    AssertionError if the tokens cannot be divided so.
    """
    tokens = rows * block_size * processes
    assert total_batch_size % tokens == 0, (
        f"total_batch_size ({total_batch_size}) must be a multiple of "
        f"batch_size*block_size*processes ({rows}*{block_size}*{processes}={tokens}): "
        f"try {max(1, round(total_batch_size / tokens)) * tokens}")
    return max(1, total_batch_size // tokens)


def held_out(fold, places, n_tokens, row=None):
    """
    Which places of a text lie in the part of it that is held out.

    fold: which part, '2/4' for the second quarter; where a text consists of rows of row tokens, parts end between rows.
    places: array or tensor of ints, positions in a text of n_tokens -> bools of the same shape. ValueError if fold is
    not of that form.
    """
    i, n = map(int, fold.split('/')) if re.fullmatch(r'\d{1,4}/\d{1,4}', fold) else (0, 0)
    if not 1 <= i <= n > 1:
        raise ValueError(f'hold_out ({fold}) must be like 1/4, the first of four parts of the training text, or empty')
    size = row or 1
    part = places // size * n // max(1, n_tokens // size)
    return part % n == i - 1                    # tokens after the last whole row belong to the first part


def load_meta(data_dir):
    """meta.json of a dataset as a dict. ValueError if it is missing or broken, with the command to run."""
    data_dir = os.fspath(data_dir)
    path = os.path.join(data_dir, 'meta.json')
    script = shlex.quote(os.path.join(data_dir, 'prepare.py').replace(os.sep, '/'))
    # a folder without a prepare.py was made from somebody's own text, or its name is misspelt
    if not os.path.exists(os.path.join(data_dir, 'prepare.py')):
        name = shlex.quote(os.path.basename(os.path.normpath(data_dir)))
        script = (f'data/text/prepare.py --input=FILE_OR_FOLDER --name={name}, '
                  f'or for conversations data/chat/prepare.py --input=FILE.jsonl --name={name}')
    if not os.path.exists(path):
        raise ValueError(f'no dataset in {data_dir} ({path} is not there): run python {script}')
    return read_json(path, f'run python {script} again', {'dtype': str, 'sha256': dict})


def dataset_of(state, source, to_write=False):
    """
    The dataset that a checkpoint's dict names, '' if it names none: a folder in data/, or a path. to_write=True: we are
    about to write a new dataset beside it, so only a plain name is allowed. ValueError for anything else.
    """
    name = state.get('dataset') or ''
    plain = isinstance(name, str) and re.fullmatch(r'[\w.-]*', name) and name not in ('.', '..')
    path = isinstance(name, str) and os.sep in name
    if not plain and (to_write or not path):
        raise ValueError(f'{source} names the dataset {name!r:.100}, which is not the name of a folder in data/: '
                         'if you know that dataset, give it with --dataset=')
    return name


def without_text(state, source, dataset=''):
    """Why there is no text to measure the checkpoint at source on, in words; None if there is one."""
    if dataset:
        return None
    name = dataset_of(state, source)
    folder = os.path.join(in_repo('data'), name)
    if not name:
        return f'{source} does not say what it was trained on'
    return None if os.path.exists(f'{folder}/meta.json') else f'{folder}, which {source} was trained on, is gone'


def data_of(state, source, dataset=''):
    """
    The data that belong to a checkpoint -> the folder, and the tokenizer.

    state: the loaded checkpoint; source: its path, for the message; dataset: another one than it was trained on, or
    empty. ValueError if checkpoint and data do not have the same tokenizer.
    """
    data_dir = os.path.join(in_repo('data'), dataset or dataset_of(state, source))
    tokenizer = from_meta(state['tokenizer'])
    if fingerprint(from_meta(load_meta(data_dir))) != fingerprint(tokenizer):
        known = state.get('dataset')            # None for a model from elsewhere
        remedy = (f'the dataset it was trained on ({known}), or prepare that as it was' if known else
                  f'one that was prepared with --tokenizer={shlex.quote(str(source))}')
        raise ValueError(f'{data_dir} has another tokenizer than {source} was trained with: give {remedy}')
    return data_dir, tokenizer
