"""
Your own conversations, for chat fine-tuning: a JSON document a line, in any of these forms; the first message may be
of the system.

    [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}      as ShareGPT has it

$ python data/chat/prepare.py --input=chats.jsonl --name=mychat
    a tenth is held out; equal lines count once
$ python data/chat/prepare.py --input=chats.jsonl --val_input=held_out.jsonl --name=mychat

Writes data/<name>/ and ends with the counts of tokens. Then:
    python train.py config/sft_pydoc.py --dataset=mychat --out_dir=out-mychat
"""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.files import in_repo, read_text
from data.writer import chat_tokenizer, dataset_dir, split_texts, write_chats

# -----------------------------------------------------------------------------
input = ''  # the conversations, a line each; UTF-8
val_input = ''  # more of them, for validation; empty: val_fraction of the first are held out
val_fraction = 0.1
name = 'mychat'  # the dataset's name
tokenizer = in_repo('data/stdlib_bpe')  # the model's: the dataset it was trained on, an out_dir, gguf:FILE, hf:FOLDER
row = 256  # tokens a row, which must be the block_size of training
out_dir = ''  # empty: data/<name>

limits = {'row': (8, None), 'val_fraction': (1e-6, 0.999)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())

assert input, 'input is empty: give --input=FILE.jsonl, a conversation a line'
out_dir = dataset_dir(out_dir, name)
tokenizer = chat_tokenizer(tokenizer)


def messages_of(document):
    """A line's document -> the same with ShareGPT's names replaced by ours; what is wrong with it, render_chat says."""
    if not isinstance(document, dict) or not isinstance(document.get('conversations'), list):
        return document
    roles = {'human': 'user', 'gpt': 'assistant'}
    return [{'role': roles.get(str(turn.get('from')), turn.get('from')), 'content': turn.get('value')}
            if isinstance(turn, dict) else turn for turn in document['conversations']]


def read(path):
    """A file -> {line: (ids, mask)}, equal lines once."""
    chats = {}
    for n, line in enumerate(read_text(path).split('\n'), 1):
        if not line.strip():
            continue
        try:
            chats[line] = tokenizer.render_chat(messages_of(json.loads(line)))
        except RecursionError:
            raise ValueError(f'{path}, line {n}: too many brackets in brackets: '
                             'expected a conversation a line') from None
        except json.JSONDecodeError as e:
            raise ValueError(f'{path}, line {n}: this is not JSON ({e.msg}, column {e.colno}): '
                             'expected a conversation a line') from None
        except ValueError as e:  # render_chat says what is wrong, but not where
            raise ValueError(f'{path}, line {n}: {e}') from None
    return chats


chats = read(input)
if val_input:
    held = read(val_input)
    train = [chat for line, chat in chats.items() if line not in held]
    val = list(held.values())
else:
    if len(chats) < 2:
        raise ValueError(f'{input} has {len(chats)} conversation(s): '
                         'at least two are needed, or --val_input=FILE.jsonl')
    train_lines, val_lines = split_texts({line: line for line in chats}, val_fraction)
    train = [chats[line] for line in train_lines]
    val = [chats[line] for line in val_lines]
write_chats(out_dir, tokenizer, train, val, row, os.path.basename(input))
