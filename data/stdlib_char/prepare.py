"""
The running Python's own standard library as characters: the quick start's dataset,
the same on any machine with that Python, offline.

$ python data/stdlib_char/prepare.py

Takes about a second and writes train.bin, val.bin and meta.json next to this file. With Python 3.11.7 you see

    715 files; 17 more have characters outside ASCII and are left out
    11 modules are held out: _markupbase _pyio getpass hmac imp mailbox optparse pickletools pipes reprlib sndhdr
    data/stdlib_char: 10,511,760 training and 387,514 validation tokens, vocabulary of 97 (char),
        sha256 8ba904dd d68e410a
"""

import string
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.files import in_repo
from data.tokenizer import CharTokenizer
from data.writer import stdlib_files, stdlib_held_out, stdlib_source, write_texts

# -----------------------------------------------------------------------------
out_dir = in_repo('data/stdlib_char')
root = ''  # another folder of Python files to read instead
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())

# Tabs, line ends and printable ASCII, whether they occur or not: any plain prompt can be encoded, and every Python
# gives the same vocabulary. Some twenty files have another character. Rather than a row of the vocabulary for each of
# hundreds of letters, those files are left out.
chars = '\t\n ' + string.digits + string.ascii_letters + string.punctuation

files = stdlib_files(root)
plain = [(module, text) for module, text in files if set(text) <= set(chars)]
train = [text for module, text in plain if not stdlib_held_out(module)]
val = [text for module, text in plain if stdlib_held_out(module)]
modules = sorted({module.split('.')[0] for module, text in plain if stdlib_held_out(module)})
print(f'{len(plain)} files; {len(files) - len(plain)} more have characters outside ASCII and are left out')
print(f'{len(modules)} modules are held out: {" ".join(modules)}')
write_texts(out_dir, train, val, 'char', stdlib_source(), tokenizer=CharTokenizer(chars))
