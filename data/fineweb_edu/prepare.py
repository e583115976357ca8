"""
FineWeb-Edu in the teacher's own tokens: nanochat's parquet shards of about 250M characters each,
for the run on one GPU.

$ pip install pyarrow
$ python data/fineweb_edu/prepare.py --tokenizer=teachers/d32 --shards=15
    15 shards: some 0.8B tokens, 1.5 GB to download, 1.7 GB to keep
$ python data/fineweb_edu/prepare.py --tokenizer=teachers/d32 --input=FOLDER
    shard_*.parquet that you have: no download

tokenizer is nanochat's tokenizer.pkl or the folder that holds it, gguf:FILE, hf:FOLDER, an out_dir or checkpoint of
picochat, or another data/<name>. Every document starts with its <|bos|>. The last shard is for validation, as nanochat
has it, its first val_docs documents. Stopped, it goes on with the shard it was at.
"""

import hashlib
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.download import download
from data.files import atomic_write, hold, in_repo
from data.foreign_tokenizer import load_tokenizer
from data.tokenizer import fingerprint
from data.writer import write_dataset

# -----------------------------------------------------------------------------
out_dir = in_repo('data/fineweb_edu')
tokenizer = ''  # the teacher's; python distill.py --fetch=d32 --out_dir=teachers/d32 brings one
shards = 15  # for training, from the first on
val_shard = 1822  # the last one
val_docs = 20000  # of it
input = ''  # a folder with the shards; empty: download them into out_dir
url = 'https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main'

limits = {'shards val_shard val_docs': (1, None)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())
import pyarrow.parquet

assert val_shard >= shards, f'val_shard ({val_shard}) must not be one of the first {shards} shards, which are training'
words = load_tokenizer(tokenizer)
if words.bos is None:
    raise ValueError(f'the tokenizer at tokenizer ({tokenizer}) has no <|bos|> or <|endoftext|> to stand before a '
                     'document: give another')
dtype = np.dtype('uint16' if words.vocab_size <= 65536 else 'uint32')
# in the names of what is left by a run that was stopped: another tokenizer or source makes other tokens
made_of = hashlib.sha256(f'{fingerprint(words)} {input or url}'.encode()).hexdigest()[:8]


def tokens_of(shard, most=None):
    """A shard, and how many of its documents to take (None: all) -> the path of a plain file with their tokens."""
    path = os.path.join(out_dir, f"shard_{shard:05d}.{made_of}{f'.{most}' if most else ''}.tokens")
    if os.path.exists(path):  # then it is whole
        return path
    name = f'shard_{shard:05d}.parquet'
    if input:
        parquet = os.path.join(input, name)
    else:
        parquet = download(f'{url}/{name}', os.path.join(out_dir, f'{made_of}.{name}'))
    if not os.path.exists(parquet):
        raise ValueError(f'{parquet} is not there: put it there, or leave --input= out to download it')

    def write(f):
        for texts in documents(parquet, most):
            for ids in words.encode_batch(texts):
                f.write(np.array([words.bos] + ids, dtype).tobytes())
    atomic_write(path, write)
    if not input:
        os.remove(parquet)  # its tokens are what is needed
    print(f'{name}: {os.path.getsize(path) // dtype.itemsize:,} tokens', flush=True)
    return path


def documents(parquet, most):
    """Yields the texts of a parquet file, some at a time, the first `most` of them (None: all)."""
    left = most or float('inf')
    try:
        for group in pyarrow.parquet.ParquetFile(parquet).iter_batches(1024, columns=['text']):
            texts = group.column('text').to_pylist()[:int(min(left, 1024))]
            yield texts
            left -= len(texts)
            if left <= 0:
                break
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'no tokens could be made of {parquet}: {e}: use another copy') from None


class Joined:
    """Files of tokens one after another, read in slices."""

    def __init__(self, paths):
        self.parts = [np.memmap(path, dtype, 'r') for path in paths]

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, at):
        out, start = [], 0
        for part in self.parts:
            out.append(part[max(0, at.start - start):max(0, at.stop - start)])
            start += len(part)
        return np.concatenate(out)


hold(out_dir)
train = [tokens_of(shard) for shard in range(shards)]
val = tokens_of(val_shard, val_docs)
write_dataset(out_dir, words, Joined(train), Joined([val]), f'FineWeb-Edu, shards 0 to {shards - 1} of {input or url}')
for path in [*train, val]:
    os.remove(path)
