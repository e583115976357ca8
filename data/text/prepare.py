"""
Your own text, in one command.

$ python data/text/prepare.py --input=diary.txt --name=diary
    characters; the last tenth is for validation
$ python data/text/prepare.py --input=my_notes --level=bpe --vocab_size=1024 --name=notes
    every .txt and .md in a folder and below, but for hidden ones; whole files held out
$ python data/text/prepare.py --input=my_notes --tokenizer=teachers/d32 --name=notes
    in a teacher's tokens, for its students

Writes data/<name>/ and ends with the counts of tokens. Then: python train.py --dataset=diary
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.files import in_repo, read_text, visible_files
from data.foreign_tokenizer import load_tokenizer
from data.writer import dataset_dir, split_texts, write_texts

# -----------------------------------------------------------------------------
input = ''  # a text file, or a folder of .txt and .md files, also in folders below; UTF-8
name = 'mytext'  # the dataset's name
level = 'char'  # char: one token a character, for small texts; bpe: learnt tokens, from about 1 MB on
vocab_size = 4096  # of a bpe: tokens, of which 256 are the bytes and nine are special
tokenizer = ''  # instead: gguf:FILE, hf:FOLDER, an out_dir or checkpoint, nanochat's folder, or another data/<name>
val_fraction = 0.1  # of the characters are held out
out_dir = ''  # empty: data/<name>

limits = {'level': ['char', 'bpe'], 'vocab_size': (265, None), 'val_fraction': (1e-6, 0.999)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())

assert os.path.exists(input), f'there is no file or folder {input!r}: give --input=FILE_OR_FOLDER'
out_dir = dataset_dir(out_dir, name)
tokenizer = load_tokenizer(tokenizer) if tokenizer else None

paths = visible_files(input, ('.txt', '.md')) if os.path.isdir(input) else [input]
texts, seen, n_same = {}, set(), 0
for path in paths:
    text = read_text(path)
    if text in seen:
        n_same += 1
    elif text.strip():
        texts[os.path.relpath(path, input).replace(os.sep, '/')] = text
        seen.add(text)
if n_same:
    print(f'{n_same:,} files are the same as others and are left out')
if len(texts) > 1:  # what one file ends with should not run into the next one's first line
    texts = {name: text.rstrip('\n') + '\n\n' for name, text in texts.items()}
n_chars = sum(map(len, texts.values()))
if n_chars < 1000:
    raise ValueError(f'{n_chars:,} characters in {len(texts)} .txt or .md file(s) at {input}: '
                     'at least 1,000 are needed')

train, val = split_texts(texts, val_fraction)
print(f'{len(texts):,} file(s), {n_chars:,} characters')
write_texts(out_dir, train, val, level, os.path.basename(os.path.abspath(input)), vocab_size,
            tokenizer)
