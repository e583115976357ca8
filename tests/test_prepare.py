"""data/*/prepare.py, run as their users run them; what they would download comes from a server of our own."""
import json
import os
import re
import pickle

import numpy as np
import pytest
from conftest import content, make_dataset, refused, run, write_gpt2_tokenizer

from data.foreign_tokenizer import GPT2_PATTERN
from data.loader import Loader, load_meta
from data.tokenizer import fingerprint, from_meta, train_bpe

SHAKESPEARE = os.path.join('..', 'shared', 'data', 'tinyshakespeare.txt')


def prepare(name, *flags):
    got = run(f'data/{name}/prepare.py', *flags)
    assert got.status == 0 and not got.err, got.err
    return got.out


def fails(error, name, *flags):
    refused(run(f'data/{name}/prepare.py', *flags), error)


def texts_of(folder):
    """What is in train.bin and val.bin, decoded."""
    meta = load_meta(folder)
    return [from_meta(meta).decode(np.fromfile(folder / f'{split}.bin', meta['dtype'])) for split in ('train', 'val')]


# ----- the standard library: optparse is held out, see test_loader.py

@pytest.fixture
def library(tmp_path):
    root = tmp_path / 'lib'
    (root / 'bundle').mkdir(parents=True)
    (root / 'optparse.py').write_text('def parse(options):\n\treturn options\n')
    (root / 'bundle' / '__init__.py').write_text('from .one import *\n')
    (root / 'bundle' / 'one.py').write_text('def one():\n    return 1\n' * 20)
    (root / 'umlaut.py').write_text('name = "M\u00fcller"\n', encoding='utf-8')
    return root


def test_stdlib_char(library, tmp_path):
    said = prepare('stdlib_char', f'--root={library}', f'--out_dir={tmp_path}/out')
    assert '3 files; 1 more' in said and 'held out: optparse' in said
    assert texts_of(tmp_path / 'out') == ['from .one import *\n' + 'def one():\n    return 1\n' * 20,
                                          'def parse(options):\n\treturn options\n']
    assert load_meta(tmp_path / 'out')['vocab_size'] == 97


def test_stdlib_bpe(library, tmp_path):
    prepare('stdlib_bpe', f'--root={library}', f'--out_dir={tmp_path}/out', '--vocab_size=270')
    train, val = texts_of(tmp_path / 'out')
    assert val == '<|bos|>def parse(options):\n\treturn options\n'
    # learnt from these texts alone
    assert from_meta(load_meta(tmp_path / 'out')).meta() == train_bpe(train.split('<|bos|>'), 270).meta()
    assert train.count('<|bos|>') == 3 and 'M\u00fcller' in train and load_meta(tmp_path / 'out')['vocab_size'] == 270
    fails('vocab_size .4096. is out of reach', 'stdlib_bpe', f'--root={library}', f'--out_dir={tmp_path}/out')
    # a share of the training files, and all of those held out
    prepare('stdlib_bpe', f'--root={library}', f'--out_dir={tmp_path}/third', '--vocab_size=270', '--share=0.34')
    assert texts_of(tmp_path / 'third')[0].count('<|bos|>') == 1
    assert texts_of(tmp_path / 'third')[1] == val
    assert load_meta(tmp_path / 'out')['vocab_size'] == 270
    # six tenths of the lines of each training file, in one piece
    prepare('stdlib_bpe', f'--root={library}', f'--out_dir={tmp_path}/parts', '--vocab_size=270', '--part=0.6')
    whole, parts = train.split('<|bos|>')[1:], texts_of(tmp_path / 'parts')[0].split('<|bos|>')[1:]
    assert len(parts) == len(whole) > 1
    for text, part in zip(whole, parts):
        assert part in text and len(part.splitlines()) == round(0.6 * len(text.splitlines()))
    assert texts_of(tmp_path / 'parts')[1] == val


# ----- chats

ZOO = '''"""Animals. And more of them."""
import random
class Cat(Animal, metaclass=Meta):
    """A small carnivore.

    It purrs."""
    def __init__(self, name: str, *, legs=4):
        self.name = name
    @property
    def age(self):
        """In years, since its birth."""
    def purr(self, loud=False, *, times: int = 2 + 1, **how):
        """purr([loud])

        Make a sound like a motor. Ends soon."""
    @staticmethod
    def count(a, b, /):
        """Count all that there are."""
    def _hide(self):
        """Nobody sees this one."""
if random:
    async def feed(*animals):
        """Give them what they eat."""
def silent(x):
    pass
'''


@pytest.fixture
def bpe_dir(tmp_path):
    make_dataset(tmp_path / 'bpe', 'some text of some words, and some more', 4, 'bpe', 268)
    return tmp_path / 'bpe'


def conversations(folder):
    """What a chat dataset holds: {split: set of conversations as text}."""
    return {split: set(text.split('<|bos|>')) - {''} for split, text in zip(('train', 'val'), texts_of(folder))}


def test_pydoc_chat(bpe_dir, tmp_path):
    (tmp_path / 'lib').mkdir()
    (tmp_path / 'lib' / 'zoo.py').write_text(ZOO)
    # optparse is held out
    (tmp_path / 'lib' / 'optparse.py').write_text('def parse(options):\n    """Read the options given."""\n')
    (tmp_path / 'lib' / 'broken.py').write_text('def (')
    seen = set()
    for seed in range(30):
        said = prepare('pydoc_chat', f'--root={tmp_path}/lib', f'--tokenizer={bpe_dir}', f'--out_dir={tmp_path}/out',
                       f'--seed={seed}', '--row=512')
        assert '6 conversations for training and 1 for validation' in said and '1 files are not Python' in said
        found = conversations(tmp_path / 'out')
        assert (len(found['train']) == 6 and len(found['val']) == 1 and 'optparse.parse' in min(found['val'])
                and 'optparse' not in ''.join(found['train']))
        seen |= {tuple(exchange.removesuffix('<|assistant_end|>').split('<|user_end|><|assistant_start|>'))
                 for chat in found['train'] for exchange in chat.split('<|user_start|>')[1:]}
    assert {('What is the module zoo for?', 'Animals.'), ('What is in it?', 'Cat, feed and silent.'),
            ('What is the class zoo.Cat?', 'A small carnivore.'),
            ('What are the methods of zoo.Cat?', 'age, purr and count.'),
            ('What is zoo.Cat derived from?', 'Animal.'), ('How do I call it?', 'zoo.Cat(name, *, legs=4)'),
            ('What does zoo.Cat.purr do?', 'Make a sound like a motor.'),
            ('What is the signature of zoo.Cat.purr?', 'zoo.Cat.purr(loud=False, *, times=2 + 1, **how)'),
            ('What are its arguments?', 'It takes loud, times and **how.'), ('What is the default of times?', '2 + 1.'),
            ('What are its arguments?', 'It takes a and b.'),
            ('What does zoo.Cat.age hold?', 'In years, since its birth.'),
            ('Which method of zoo.Cat does this: Count all that there are.', 'zoo.Cat.count'),
            ('Which function of zoo does this: Give them what they eat.', 'zoo.feed'),
            ('Which arguments does zoo.feed take?', 'It takes *animals.')} <= seen
    assert not any(word in text for exchange in seen for text in exchange
                   for word in ('hide', 'self', 'str', 'Nobody', 'None', 'zoo.silent'))
    before = content(tmp_path / 'out')
    prepare('pydoc_chat', f'--root={tmp_path}/lib', f'--tokenizer={bpe_dir}', f'--out_dir={tmp_path}/out',
            '--seed=29', '--row=512')
    assert content(tmp_path / 'out') == before
    fails('no tokenizer at .data/nothing', 'pydoc_chat', '--tokenizer=data/nothing', f'--out_dir={tmp_path}/out')


def test_your_own_chats(bpe_dir, tmp_path):
    turn = lambda i: [{'role': 'user', 'content': f'What is {i}?'}, {'role': 'assistant', 'content': f'A number, {i}.'}]
    lines = [json.dumps({'messages': [{'role': 'system', 'content': 'Be brief.'}] + turn(i)} if i % 2 else turn(i))
             for i in range(20)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines + ['', lines[3]]) + '\n')
    (tmp_path / 'b.jsonl').write_text('\n'.join(lines[:2]))
    text = lambda i: ('<|user_start|>' + 'Be brief.\n\n' * (i % 2)
                      + f'What is {i}?<|user_end|><|assistant_start|>A number, {i}.<|assistant_end|>')
    how = f'--tokenizer={bpe_dir}', f'--out_dir={tmp_path}/out', '--row=128'
    prepare('chat', f'--input={tmp_path}/a.jsonl', *how)
    found = conversations(tmp_path / 'out')
    assert (found['train'] | found['val'] == set(map(text, range(20)))
            and 1 <= len(found['val']) <= 2 and not found['train'] & found['val'])
    prepare('chat', f'--input={tmp_path}/a.jsonl', f'--val_input={tmp_path}/b.jsonl', *how)
    assert conversations(tmp_path / 'out') == {'train': set(map(text, range(2, 20))), 'val': {text(0), text(1)}}
    x, y = Loader(tmp_path / 'out', 'val', 1, 128).rows([0])
    a, b = (f'A number, {i}.<|assistant_end|>' for i in (0, 1))
    assert from_meta(load_meta(bpe_dir)).decode(y[y >= 0]) in (a + b, b + a)


def test_chats_as_sharegpt_has_them(bpe_dir, tmp_path):
    ours = [[{'role': 'system', 'content': 'Be brief.'}][:i % 2] + [{'role': 'user', 'content': f'What is {i}?'},
             {'role': 'assistant', 'content': f'{i}.'}] for i in range(9)]
    names = {'system': 'system', 'user': 'human', 'assistant': 'gpt'}
    theirs = [{'id': 'x', 'conversations': [{'from': names[m['role']], 'value': m['content']} for m in chat]}
              for chat in ours]
    held = '[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]'
    (tmp_path / 'val.jsonl').write_text(held)
    for name, chats in (('ours', ours), ('theirs', theirs)):
        (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, chats)))
        prepare('chat', f'--input={tmp_path}/in.jsonl', f'--val_input={tmp_path}/val.jsonl', f'--tokenizer={bpe_dir}',
                f'--out_dir={tmp_path}/{name}', '--row=64')
    assert [*content(tmp_path / 'ours').values()] == [*content(tmp_path / 'theirs').values()]


GOOD = '[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]'


@pytest.mark.parametrize('text, flags, error', [
    (f'{GOOD}\n\n{{"messages": ', [], r'line 3: this is not JSON \(.*column 14\)'),
    (f'{GOOD}\n[{{"role": "bot", "content": ""}}]', [], "line 2: message 0 has role 'bot', expected 'user'"),
    pytest.param('[' * 10**5, [], 'line 1: too many brackets in brackets', id='deep'),
    (f'{GOOD}\n{{"conversations": [{{"from": "gpt", "value": "Hi."}}]}}', [], "line 2: message 0 has role 'assistant'"),
    (f'{GOOD}\n{{"conversations": [{{"from": "human"}}]}}', [], 'line 2: message 0 must be'),
    (f'{GOOD}\n{{"conversations": "Hi."}}', [], 'line 2: a conversation is a list'),
    (GOOD, [], r'has 1 conversation\(s\): at least two'),
    (GOOD, ['--val_input={}/nothing.jsonl'], 'No such file or directory: .*nothing.jsonl'),
    (GOOD, ['--val_input={}/in.jsonl'], 'too few conversations: 0 for training, 1'),
    (GOOD.replace('Hello.', 'Hello' * 200) + f'\n{GOOD}', [], '1 have no answer that ends within a row of 64')])
def test_chat_errors(bpe_dir, tmp_path, text, flags, error):
    (tmp_path / 'in.jsonl').write_text(text)
    fails(error, 'chat', f'--input={tmp_path}/in.jsonl', f'--tokenizer={bpe_dir}', f'--out_dir={tmp_path}/out',
          '--row=64', *[flag.format(tmp_path) for flag in flags])
    assert not (tmp_path / 'out').exists()


# ----- Shakespeare

def test_shakespeare_from_a_file(tmp_path):
    (tmp_path / 'play.txt').write_text('To be, or not to be\n' * 10)
    said = prepare('shakespeare_char', f'--input={tmp_path}/play.txt', f'--out_dir={tmp_path}/out')
    assert 'not the original' in said
    assert texts_of(tmp_path / 'out') == ['To be, or not to be\n' * 9, 'To be, or not to be\n']


def test_shakespeare_refuses_another_download(server, tmp_path):
    for body, error in (b'To be', '5 bytes instead of 1,115,394'), (b'x' * 1_115_394, 'sha256 .* instead of'):
        server.pages['/input.txt'] = {'body': body}
        fails(error, 'shakespeare_char', f'--url={server.url}/input.txt', f'--out_dir={tmp_path}')
        assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists(SHAKESPEARE), reason='no copy of tiny Shakespeare here')
def test_the_real_shakespeare(server, tmp_path):
    with open(SHAKESPEARE, 'rb') as f:
        server.pages['/input.txt'] = {'body': f.read()}
    for _ in range(2):
        said = prepare('shakespeare_char', f'--url={server.url}/input.txt', f'--out_dir={tmp_path}')
        assert '1,003,854 training and 111,540 validation tokens, vocabulary of 65' in said
    assert len(server.asked) == 1
    assert 'not the original' not in prepare('shakespeare_char', f'--input={SHAKESPEARE}', f'--out_dir={tmp_path}')


# where a line ends with \, the page's own line goes on in the next one
INDEX = '''<html><head><title>Essays</title></head><body><table><tr><td><map name=12ab><area href="index.html"></map>
<td><a href="index.html"><img src="logo.gif" /></a>If you're not sure, try <a href="taste.html">On Taste</a>.<br />
%s<a href="https://cdn.example.com/chapter.txt?t=1">Chapter 1</a><a href="articles.html">Essays</a></td></tr></table>'''
ESSAY = '''<html><head><title>%s</title><style>td {color: black}</style><script>var x = "<br>noise";</script></head>\
<body><table><tr><td><map name=12ab><area href="index.html"></map></td><td><table><tr><td><img alt="%s" /><br /><br />
<font>March 2005<br /><br />%s
a second line \u2014 it\u2019s
\u201cone\u201d paragraph&nbsp;still&hellip; <font>[<a href="#f1n"><font>1</font></a>]</font><br /><br />
A na\u00efve one, in <i> italics</i>&mdash;&#146;quoted&#146;.<br /><br /><b>Notes</b><br><br>\
[<a name="f1n">1</a>] Snow\u2603man.
<pre>(def f (x)
  (* x x))</pre></font></td></tr></table><script>more noise</script></td></tr></table></body></html>'''
WORDS = ('Some words here. ' * 10).strip()
TEXT = f'''March 2005\n\n{WORDS} a second line -- it's "one" paragraph still... [1]\n
A naive one, in italics--'quoted'.\n\nNotes\n\n[1] Snowman.\n\n(def f (x)\n  (* x x))'''


def test_graham(server, tmp_path):
    """Whole essays are held out, no page is asked for twice; saved pages will do, too."""
    names = ['taste', 'wealth', 'nerds', 'hackers']
    links = ''.join(f'<img src="dot.gif" /><a href="{name}.html">On {name.title()}</a><br /><br />\n' for name in names)
    server.pages['/articles.html'] = {'body': (INDEX % links).encode()}
    (tmp_path / 'saved').mkdir()
    for name in names:
        page = ESSAY % (f'On {name.title()}', name, WORDS)
        server.pages[f'/{name}.html'] = {'body': page.encode()}
        (tmp_path / 'saved' / f'{name}.html').write_bytes(page.encode('cp1252', errors='ignore'))
    how = 'graham_char', f'--index_url={server.url}/articles.html', f'--out_dir={tmp_path}/out', '--pause=0'
    assert 'ASCII spelling are dropped: \\u2603' in prepare(*how)
    train, val = texts_of(tmp_path / 'out')
    expected = {f'On {name.title()}\n\n{TEXT}\n\n\n' for name in names}
    assert {text + '\n\n\n' for text in (train + val).split('\n\n\n') if text} == expected and val in expected
    prepare(*how)
    assert [path for path, _ in server.asked] == ['/articles.html'] + [f'/{name}.html' for name in names]
    prepare('graham_char', f'--input={tmp_path}/saved', f'--out_dir={tmp_path}/again')
    assert sorted(''.join(texts_of(tmp_path / 'again'))) == sorted(train + val)

# ----- your own text

def test_text_from_a_folder(tmp_path):
    folder = tmp_path / 'notes'
    (folder / 'below').mkdir(parents=True)
    for i in range(20):
        (folder / ('below' if i % 2 else '') / f'{i}.{"md" if i % 3 else "txt"}').write_text(
            f'note {i}: some words and more words\n' * 9 + 'some words')
    (folder / 'picture.jpg').write_bytes(b'\xff\xd8')
    (folder / 'empty.txt').write_text('')
    said = prepare('text', f'--input={folder}', f'--out_dir={tmp_path}/out', '--level=bpe', '--vocab_size=280')
    assert '20 file(s)' in said
    train, val = texts_of(tmp_path / 'out')
    assert train.count('<|bos|>') == 18 and val.count('<|bos|>') == 2
    assert train.count('some words\n\n<|bos|>') == 17  # what one file ends with stays apart from the next
    assert train.count('some words') == 180 and val.count('some words') == 20
    assert load_meta(tmp_path / 'out')['vocab_size'] == 280


def test_text_in_a_teachers_tokens(tmp_path):
    text = 'Some words, and some more.\n' * 100
    (tmp_path / 'words.txt').write_text(text)
    how = f'--input={tmp_path}/words.txt', f'--out_dir={tmp_path}/out'
    gpt2 = train_bpe(['some low words'] * 3, 260, GPT2_PATTERN, ['<|endoftext|>'])
    write_gpt2_tokenizer(tmp_path, gpt2)
    prepare('text', *how, f'--tokenizer={tmp_path}')
    meta = load_meta(tmp_path / 'out')
    assert fingerprint(from_meta(meta)) == fingerprint(gpt2) and meta['source'] == 'words.txt'
    assert '|'.join(texts_of(tmp_path / 'out')).split('<|endoftext|>') == ['', text[:2430] + '|', text[2430:]]
    # another dataset's, by characters, must have them all
    prepare('text', *how, f'--out_dir={tmp_path}/chars')
    prepare('text', *how, f'--tokenizer={tmp_path}/chars')
    assert load_meta(tmp_path / 'out')['chars'] == load_meta(tmp_path / 'chars')['chars']
    (tmp_path / 'words.txt').write_text(text + 'caf\u00e9' * 200)
    fails('no token for .*\u00e9.: .*; take them out of the text, or leave --tokenizer= away', 'text', *how,
          f'--tokenizer={tmp_path}/chars')


def test_text_leaves_out_hidden_files_and_copies(tmp_path):
    for name, text in (('a.txt', 'words of a\n'), ('b.txt', 'other words\n'), ('below/c.md', 'words of a\n'),
                       ('.ipynb_checkpoints/a.txt', 'words of an older a\n'), ('below/.trash/x/d.md', 'gone\n')):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).write_text(text * 100)
    (tmp_path / 'in' / '._a.txt').write_bytes(b'\x00\x05\x16\xff')
    said = prepare('text', f'--input={tmp_path}/in', f'--out_dir={tmp_path}/out')
    assert '3 hidden files skipped\n1 files are the same as others and are left out\n2 file(s), 2,302 ' in said
    assert sorted(texts_of(tmp_path / 'out')) == ['other words\n' * 100 + '\n', 'words of a\n' * 100 + '\n']


def test_text_stays_in_its_folder(tmp_path):
    for name in ('in/a.txt', 'secret.txt', 'elsewhere/b.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'words of {name}\n' * 100)
    (tmp_path / 'in' / 'own.txt').symlink_to('a.txt')
    (tmp_path / 'in' / 'diary.txt').symlink_to(tmp_path / 'secret.txt')
    (tmp_path / 'in' / 'below').symlink_to(tmp_path / 'elsewhere')
    said = prepare('text', f'--input={tmp_path}/in', f'--out_dir={tmp_path}/out', '--val_fraction=0.5')
    assert re.search('2 links that lead out of .*/in skipped: copy .*\n1 files are the same', said)
    assert {line for text in texts_of(tmp_path / 'out') for line in text.split('\n')} == {'words of in/a.txt', ''}


@pytest.mark.parametrize('flags, error', [
    (['--input=/no/such'], 'there is no file or folder'),
    (['--input={}/small.txt'], '35 characters'),
    (['--input={}/latin.txt'], 'is not UTF-8 text'),
    (['--input={}/folder'], '0 characters in 0'),
    (['--input={}/good.txt', '--level=bpe'], 'vocab_size .4096. is out of reach'),
    (['--input={}/good.txt', '--level=bpe', '--vocab_size=100'], r'vocab_size \(100\) must be an int of at least 265'),
    (['--input={}/good.txt', '--tokenizer={}/folder'], 'no tokenizer at .*folder'),
    (['--input={}/good.txt', '--tokenizer={}/unigram'], 'is a SentencePiece tokenizer'),
    (['--input={}/good.txt', '--out_dir=', '--name=../elsewhere'], 'without slashes')])
def test_text_errors(tmp_path, flags, error):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'small.txt').write_text('a b c d' * 5)
    (tmp_path / 'latin.txt').write_bytes('caf\u00e9 '.encode('latin-1') * 1000)
    (tmp_path / 'good.txt').write_text('Some words, and some more.\n' * 100)
    (tmp_path / 'unigram').mkdir()
    (tmp_path / 'unigram' / 'tokenizer.json').write_text('{"model": {"vocab": [["a", -1.0]]}, "added_tokens": []}')
    fails(error, 'text', f'--out_dir={tmp_path}/out', *[flag.format(tmp_path) for flag in flags])
    assert not (tmp_path / 'out' / 'meta.json').exists()


# ----- FineWeb-Edu: shards of our own, and a tokenizer.pkl as nanochat pickles it

@pytest.fixture
def shards(tmp_path):
    pa, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    (tmp_path / 'tokenizer.pkl').write_bytes(pickle.dumps(train_bpe(['low lower lowest'] * 3, 270)._encoding))
    documents = {shard: [f'lower {shard} {i}\n' * (i % 3 + 1) for i in range(1500)] for shard in (0, 1, 9)}
    for shard, texts in documents.items():
        parquet.write_table(pa.table({'text': texts}), tmp_path / f'shard_{shard:05d}.parquet', row_group_size=700)
    return documents


def test_fineweb_edu(shards, server, tmp_path):
    """Downloaded or local, resumed or not: the documents in order, each after a <|bos|>; our own shards are gone."""
    expected = ['<|bos|>' + '<|bos|>'.join(shards[0] + shards[1]), '<|bos|>' + '<|bos|>'.join(shards[9][:1200])]
    how = f'--tokenizer={tmp_path}', '--shards=2', '--val_shard=9', '--val_docs=1200'
    prepare('fineweb_edu', *how, f'--input={tmp_path}', f'--out_dir={tmp_path}/local')
    assert texts_of(tmp_path / 'local') == expected
    first, second, last = names = [f'/shard_{shard:05d}.parquet' for shard in shards]
    server.pages |= {name: {'body': (tmp_path / name[1:]).read_bytes()} for name in names}
    there = server.pages.pop(last)
    how = *how, f'--url={server.url}', f'--out_dir={tmp_path}/fetched'
    fails('shard_00009.parquet answered 404', 'fineweb_edu', *how)
    server.pages[last] = there
    prepare('fineweb_edu', *how)
    assert texts_of(tmp_path / 'fetched') == expected
    assert sorted(os.listdir(tmp_path / 'fetched')) == ['meta.json', 'train.bin', 'val.bin']
    assert [path for path, _ in server.asked] == [first, second, last, last]


def test_fineweb_edu_mixes_no_sources(shards, server, tmp_path):
    server.pages['/shard_00000.parquet'] = {'body': (tmp_path / 'shard_00001.parquet').read_bytes()}
    how = f'--tokenizer={tmp_path}', '--shards=1', '--val_shard=9', f'--out_dir={tmp_path}/out'
    fails('shard_00009.parquet answered 404', 'fineweb_edu', *how, f'--url={server.url}')
    prepare('fineweb_edu', *how, f'--input={tmp_path}')
    assert texts_of(tmp_path / 'out')[0] == '<|bos|>' + '<|bos|>'.join(shards[0])
    assert str(tmp_path) in (tmp_path / 'out' / 'meta.json').read_text()


def test_what_fineweb_edu_cannot_be_made_of(shards, tmp_path):
    how = 'fineweb_edu', f'--tokenizer={tmp_path}', f'--out_dir={tmp_path}/out'
    fails(r'val_shard \(9\) must not be one of the first 20', *how, '--shards=20', '--val_shard=9')
    fails('nowhere/shard_00000.parquet is not there', *how, '--input=nowhere')
    path = tmp_path / 'shard_00000.parquet'
    path.write_bytes(path.read_bytes()[:-9])  # a parquet's index is at its end
    fails('no tokens could be made of .*shard_00000.parquet: .*', *how, f'--input={tmp_path}')
    assert not any(name.endswith(('.tokens', '.json')) for name in os.listdir(tmp_path / 'out'))
