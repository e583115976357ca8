"""
Your own text, in one command.

$ python data/text/prepare.py --input=diary.txt --name=diary
    characters; the last tenth is for validation
$ python data/text/prepare.py --input=my_notes --level=bpe --vocab_size=1024 --name=notes
    every .txt and .md in a folder; whole files held out
$ python data/text/prepare.py --input=my_notes --tokenizer=teachers/d32 --name=notes
    in a teacher's tokens, for its students

Writes data/<name>/ and ends with the counts of tokens. Then: python train.py --dataset=diary
"""

import os
import sys

sys.path.insert(0, '.')  # run from the repo root
from data.loader import read_text, split_texts, write_texts
from data.tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
input = ''  # a text file, or a folder of .txt and .md files, also in folders below; UTF-8
name = 'mytext'  # the dataset's name
level = 'char'  # char: one token a character, for small texts; bpe: learnt tokens, from about 1 MB on
vocab_size = 4096  # of a bpe: tokens, of which 256 are the bytes and nine are special
tokenizer = ''  # instead: a folder with nanochat's tokenizer.pkl, a gpt2's of Hugging Face, or another data/<name>
val_fraction = 0.1  # of the characters are held out
out_dir = ''  # empty: data/<name>
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())

if not os.path.exists(input):
    sys.exit(f'error: there is no file or folder {input!r}: give --input=FILE_OR_FOLDER')
if not val_fraction or not 0 < val_fraction < 1:
    sys.exit(f'error: val_fraction is {val_fraction}: it must lie between 0 and 1')
if not out_dir and (name in ('', '.', '..') or os.path.basename(name) != name):
    sys.exit(f'error: name is {name!r}: it names a folder in data/, without slashes')

try:
    tokenizer = load_tokenizer(tokenizer) if tokenizer else None
except (OSError, ValueError, KeyError) as e:
    sys.exit(f'error: no tokenizer at tokenizer ({tokenizer}): {e}')
paths = [input]
if os.path.isdir(input):
    paths = sorted(os.path.join(folder, f) for folder, _, names in os.walk(input)
                   for f in names if f.lower().endswith(('.txt', '.md')))
texts = {os.path.relpath(path, input).replace(os.sep, '/'): read_text(path) for path in paths}
if len(texts) > 1:  # what one file ends with should not run into the next one's first line
    texts = {key: text.rstrip('\n') + '\n\n' for key, text in texts.items() if text.strip()}
n_chars = sum(map(len, texts.values()))
if n_chars < 1000:
    sys.exit(f'error: {n_chars:,} characters in {len(texts)} .txt or .md file(s) at {input}: at least 1,000 are needed')

train, val = split_texts(texts, val_fraction)
print(f'{len(texts):,} file(s), {n_chars:,} characters')
write_texts(out_dir or f'data/{name}', train, val, level, os.path.basename(os.path.abspath(input)), vocab_size,
            tokenizer)
