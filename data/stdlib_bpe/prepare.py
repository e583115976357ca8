"""
The running Python's own standard library in BPE tokens, for teachers and students that train in minutes on a CPU.
Offline.

$ python data/stdlib_bpe/prepare.py
$ python data/stdlib_bpe/prepare.py --vocab_size=1024 --name=stdlib_bpe1k
$ python data/stdlib_bpe/prepare.py --tokenizer=out-smollm2 --name=stdlib_smollm2
    in the tokens of a model that is there already, for its students

The vocabulary is learnt from the training text only, and the modules held out are those of stdlib_char; files with
characters outside ASCII are in here too. Takes some 5 seconds of one core. With Python 3.11.7 you see

    732 files; training text 11,692,222 bytes, validation 387,514
    data/stdlib_bpe: 3,373,951 training and 106,318 validation tokens, vocabulary of 4,096 (bpe),
        sha256 30e3d2a5 7c5cd9a5
    3.47 bytes a token in training, 3.64 in validation
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.files import in_repo
from data.foreign_tokenizer import load_tokenizer
from data.writer import dataset_dir, stdlib_files, stdlib_held_out, stdlib_source, write_texts

# -----------------------------------------------------------------------------
name = 'stdlib_bpe'  # the dataset's name
vocab_size = 4096  # tokens, of which 256 are the bytes and nine are special
tokenizer = ''  # instead: gguf:FILE, hf:FOLDER, an out_dir or checkpoint, nanochat's folder, or another data/<name>
share = 1.0  # of the training files, evenly spread over them; held-out modules are all there
part = 1.0  # of each training file: one stretch of its lines, which begins elsewhere in every file
root = ''  # another folder of Python files to read instead
out_dir = ''  # empty: data/<name>

limits = {'vocab_size': (265, None), 'share part': (0.001, 1.0)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())

assert not tokenizer or out_dir or name != 'stdlib_bpe', (
    f"tokenizer ({tokenizer}) makes other tokens than those of data/stdlib_bpe: give them a --name= of their own")
out_dir = dataset_dir(out_dir, name)
tokenizer = load_tokenizer(tokenizer) if tokenizer else None


def stretch(text, i):
    """
    A part of the text of file number i. Where it begins differs from file to file: multiples of the golden ratio spread
    the places evenly.
    """
    lines = text.splitlines(keepends=True)
    start = round(0.618034 * i % 1 * (1 - part) * len(lines))
    return ''.join(lines[start:start + round(part * len(lines))])


files = stdlib_files(root)
train = [text for module, text in files if not stdlib_held_out(module)]
train = [text for i, text in enumerate(train) if int((i + 1) * share) > int(i * share)]
if part < 1:
    train = list(filter(None, map(stretch, train, range(len(train)))))
val = [text for module, text in files if stdlib_held_out(module)]
n_train, n_val = (sum(len(text.encode()) for text in texts) for texts in (train, val))
print(f'{len(files)} files; training text {n_train:,} bytes, validation {n_val:,}')
meta = write_texts(out_dir, train, val, 'bpe', stdlib_source(), vocab_size, tokenizer)
print(f'{n_train / meta["train_tokens"]:.2f} bytes a token in training, {n_val / meta["val_tokens"]:.2f} in validation')
