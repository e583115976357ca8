"""
Tiny Shakespeare, 1.1 MB of his plays as characters: the reference that everyone knows,
with nanoGPT's vocabulary and 90/10 split.

$ python data/shakespeare_char/prepare.py                      downloads it, once
$ python data/shakespeare_char/prepare.py --input=FILE         takes a copy that you have

You see

    data/shakespeare_char: 1,003,854 training and 111,540 validation tokens, vocabulary of 65 (char),
        sha256 6ec30560 d37d30cc
"""

import hashlib
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.download import download
from data.files import hold, in_repo, read_text
from data.writer import split_texts, write_texts

# -----------------------------------------------------------------------------
out_dir = in_repo('data/shakespeare_char')
input = ''  # a local text file; empty: download
url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())

sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
hold(out_dir)
path = input or download(url, os.path.join(out_dir, 'input.txt'), sha256, size=1_115_394)
text = read_text(path)
train, val = split_texts({path: text}, 0.1)
counts = len(set(text)), len(train[0]), len(val[0])
if hashlib.sha256(text.encode()).hexdigest() == sha256:
    assert counts == (65, 1_003_854, 111_540), \
        f'{counts} characters in vocabulary, training and validation; nanoGPT has (65, 1003854, 111540)'
else:
    print(f'{path} is not the original: losses cannot be compared with those of others')
write_texts(out_dir, train, val, 'char', 'tiny Shakespeare' if not input else os.path.basename(input))
