"""
Your own conversations, for chat fine-tuning: a JSON document a line, a list of messages or an object with messages,
of which the first may be a system message.

    [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}

$ python data/chat/prepare.py --input=chats.jsonl --name=mychat
    a tenth is held out; equal lines count once
$ python data/chat/prepare.py --input=chats.jsonl --val_input=held_out.jsonl --name=mychat

Writes data/<name>/ and ends with the counts of tokens. Then:
    python train.py config/sft_pydoc.py --dataset=mychat --out_dir=out-mychat
"""

import json
import os
import sys

sys.path.insert(0, '.')  # run from the repo root
from data.loader import chat_tokenizer, read_text, split_texts, write_chats

# -----------------------------------------------------------------------------
input = ''  # the conversations, a line each; UTF-8
val_input = ''  # more of them, for validation; empty: val_fraction of the first are held out
val_fraction = 0.1
name = 'mychat'  # the dataset's name
tokenizer = 'data/stdlib_bpe'  # the dataset whose tokenizer it is: the one that the model was trained on
row = 256  # tokens a row, which must be the block_size of training
out_dir = ''  # empty: data/<name>
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())

if not input:
    sys.exit('error: input is empty: give --input=FILE.jsonl, a conversation a line')
if not val_input and (not val_fraction or not 0 < val_fraction < 1):
    sys.exit(f'error: val_fraction is {val_fraction}: it must lie between 0 and 1')
if not out_dir and (name in ('', '.', '..') or os.path.basename(name) != name):
    sys.exit(f'error: name is {name!r}: it names a folder in data/, without slashes')
tokenizer = chat_tokenizer(tokenizer)


def read(path):
    """A file -> {line: (ids, mask)}, equal lines once."""
    chats = {}
    for n, line in enumerate(read_text(path).split('\n'), 1):
        try:
            if line.strip():
                chats[line] = tokenizer.render_chat(json.loads(line))
        except json.JSONDecodeError as e:
            sys.exit(f'error: {path}, line {n}: this is not JSON ({e.msg}, column {e.colno}): '
                     'expected a conversation a line')
        except ValueError as e:  # what render_chat says
            sys.exit(f'error: {path}, line {n}: {e}')
    return chats


chats = read(input)
if val_input:
    held = read(val_input)
    train, val = [chat for line, chat in chats.items() if line not in held], list(held.values())
elif len(chats) > 1:
    train, val = ([chats[line] for line in lines]
                  for lines in split_texts({line: line for line in chats}, val_fraction))
else:
    sys.exit(f'error: {input} has {len(chats)} conversation(s): at least two are needed, or --val_input=FILE.jsonl')
write_chats(out_dir or f'data/{name}', tokenizer, train, val, row, os.path.basename(input))
