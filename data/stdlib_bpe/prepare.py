"""
The running Python's own standard library in BPE tokens, for teachers and students that train in minutes on a CPU. Offline.

$ python data/stdlib_bpe/prepare.py
$ python data/stdlib_bpe/prepare.py --vocab_size=1024 --out_dir=data/stdlib_bpe1k

The vocabulary is learnt from the training text only, and the modules held out are those of stdlib_char; files with characters outside ASCII
are in here too. Takes COUNTTIME. With Python 3.11.7 you see

COUNTS
"""

import sys

sys.path.insert(0, '.')  # run from the repo root
from data.loader import stdlib_files, stdlib_held_out, stdlib_source, write_texts

# -----------------------------------------------------------------------------
out_dir = 'data/stdlib_bpe'
vocab_size = 4096  # tokens, of which 256 are the bytes and nine are special
root = ''  # another folder of Python files to read instead
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())

files = stdlib_files(root)
train = [text for module, text in files if not stdlib_held_out(module)]
val = [text for module, text in files if stdlib_held_out(module)]
n_train, n_val = (sum(len(text.encode()) for text in texts) for texts in (train, val))
print(f'{len(files)} files; training text {n_train:,} bytes, validation {n_val:,}')
meta = write_texts(out_dir, train, val, 'bpe', stdlib_source(), vocab_size)
print(f'{n_train / meta["train_tokens"]:.2f} bytes a token in training, {n_val / meta["val_tokens"]:.2f} in validation')
