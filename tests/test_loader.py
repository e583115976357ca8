"""data/loader.py and data/writer.py: batches, and the datasets they are read from."""
import hashlib
import json
import os
import random
import time

import numpy as np
import pytest
import torch
from conftest import content, refuses

import data.files
import data.loader
from data.files import sha256_of
from data.foreign_tokenizer import load_tokenizer
from data.loader import Loader, held_out, load_meta
from data.tokenizer import BPETokenizer, CharTokenizer, from_meta
from data.writer import pack_rows, split_texts, stdlib_files, write_chats, write_dataset, write_texts

N = 1000
# a token a position, so that a batch tells where it was taken
TOKENIZER = CharTokenizer(map(chr, range(0x100, 0x100 + N)))


def dataset(path, n_train=N, n_val=203, masks=None):
    write_dataset(path, TOKENIZER, np.arange(n_train), np.arange(n_val), 'test', masks)
    return path


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp('data'))


def windows(loader, steps, **kw):
    """The first token of every row of these steps."""
    return [int(i) for step in steps for i in loader.batch(step, **kw)[0][:, 0]]


# ----- batches

def test_a_batch_depends_on_its_number_only(data_dir):
    there = Loader(data_dir, 'train', 4, 16, seed=5)
    back = Loader(data_dir, 'train', 4, 16, seed=5)
    forward = [there.batch(step)[0] for step in range(40)]  # more than two epochs
    backward = [back.batch(step)[0] for step in reversed(range(40))][::-1]
    assert all(map(torch.equal, forward, backward))
    assert not torch.equal(forward[0], Loader(data_dir, 'train', 4, 16, seed=6).batch(0)[0])


@pytest.mark.parametrize('n_tokens, block_size', [
    (1000, 16), (1000, 1), (1000, 999), (1000, 400), (33, 16), (32, 16), (17, 16)])
def test_an_epoch_is_each_window_once(tmp_path, n_tokens, block_size):
    loader = Loader(dataset(tmp_path, n_train=n_tokens), 'train', 1, block_size)
    shifts = set()
    for epoch in range(5):
        starts = sorted(windows(loader, range(epoch * loader.n_windows, (epoch + 1) * loader.n_windows)))
        assert starts == list(range(starts[0], starts[0] + loader.n_windows * block_size, block_size))
        assert n_tokens - loader.n_windows * block_size <= 2 * block_size  # no more than this is left out of an epoch
        shifts.add(starts[0])
    assert len(shifts) > 1 or n_tokens == loader.n_windows * block_size + 1  # there is no other place to start


@pytest.mark.parametrize('world_size, batch_size, block_size', [
    (1, 4, 16), (1, 5, 202), (1, 3, 7), (2, 3, 16), (3, 4, 50)])
def test_evaluation_has_every_target_once(data_dir, world_size, batch_size, block_size):
    targets, n_batches = [], set()
    for rank in range(world_size):
        batches = list(Loader(data_dir, 'val', batch_size, block_size).eval_batches(rank, world_size))
        n_batches.add(len(batches))
        for x, y in batches:
            assert x.shape == y.shape == (batch_size, block_size) and x.min() >= 0
            assert torch.equal(y[y >= 0], x[y >= 0] + 1) and x.dtype == y.dtype == torch.int64
            targets += y[y >= 0].tolist()
    assert sorted(targets) == list(range(1, 203)) and len(n_batches) == 1


@pytest.mark.parametrize('row', [None, 16])
def test_a_part_is_held_out(tmp_path, row):
    write_dataset(tmp_path, TOKENIZER, np.arange(N), np.arange(203), 'test', extra=row and {'row': row})
    parts = [held_out(f'{i}/3', np.arange(N), N, row) for i in (1, 2, 3)]
    assert (sum(part.astype(int) for part in parts) == 1).all()
    for i, part in enumerate(parts):
        loader = Loader(tmp_path, 'train', 4, 16, hold_out=f'{i + 1}/3')
        x = torch.cat([loader.batch(step)[0] for step in range(200)])
        assert loader.n_tokens == N - part.sum() and not part[x.numpy()].any()
        assert row or len(x.unique()) == loader.n_tokens - 1  # the last is a target only
        rows = part[:N // (row or 1) * (row or 1)].reshape(-1, row or 1)
        assert (rows.all(axis=1) | ~rows.any(axis=1)).all()
        assert abs(rows.mean() - 1 / 3) < 0.02 and (np.diff(rows[:, 0].astype(int)) != 0).sum() == 1 + (i == 1)


@pytest.mark.parametrize('fold', ['0/3', '4/3', '1/1', 'half', '1/2/3', '-1/3'])
def test_what_is_no_part_is_refused(data_dir, fold):
    refuses(rf'hold_out \({fold}\) must be like 1/4', Loader, data_dir, 'train', 4, 16, hold_out=fold)


def test_masked_tokens_are_no_targets(tmp_path):
    masks = np.arange(N) % 3 == 0, np.arange(203) % 5 == 0
    dataset(tmp_path, masks=masks)
    x, y = Loader(tmp_path, 'train', 4, 16).batch(0)
    assert torch.equal(y, torch.where((x + 1) % 3 == 0, x + 1, -1))
    targets = [t for x, y in Loader(tmp_path, 'val', 4, 16).eval_batches() for t in y.flatten().tolist() if t != -1]
    assert targets == list(range(5, 203, 5))


@pytest.mark.parametrize('files, message', [
    ({}, 'no dataset in .*python data/text/prepare.py --input=FILE_OR_FOLDER --name=out, or for conversations'),
    ({'prepare.py': ''}, 'no dataset in .*run python .*/out/prepare.py')])
def test_missing_datasets_name_the_command(tmp_path, files, message):
    (tmp_path / 'out').mkdir()
    for name, text in files.items():
        (tmp_path / 'out' / name).write_text(text)
    refuses(message, Loader, tmp_path / 'out', 'train', 4, 4)


@pytest.mark.parametrize('changes, match', [
    ({'dtype': 'float16'}, "type 'float16', says meta.json, and not uint16 or uint32"),
    ({'dtype': 'int16'}, "type 'int16'"),
    ({'dtype': ['uint16']}, 'it says that dtype is'),
    ({'train_tokens': 900}, 'train.bin has 2,000 bytes, and meta.json says 900 tokens of 2'),
    ({'train_tokens': '1000'}, "there are '1000' tokens"), ({'row': 16.0}, 'in rows of 16.0'),
    ({'sha256': None}, 'it says that sha256 is None'),
    ({'sha256': {'train.bin': 'ab'}}, 'is not the file that meta.json describes: its sha256 is .*, and ab is expected'),
    ({'ids': np.full(N, N, 'uint16')}, 'train.bin has the id 1,000, and ids are 0 to 999'),
    ({'chars': 'ab'}, 'train.bin has the id 999, and ids are 0 to 1'),
    ({'chars': 3}, 'a tokenizer of kind .char. needs chars')])
def test_a_dataset_is_what_its_meta_says(tmp_path, changes, match):
    meta = json.loads((dataset(tmp_path) / 'meta.json').read_text()) | changes
    if 'ids' in changes:
        meta.pop('ids').tofile(tmp_path / 'train.bin')
        meta['sha256']['train.bin'] = sha256_of(tmp_path / 'train.bin')
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    refuses(f'{match}.*run .*prepare.py', Loader, tmp_path, 'train', 4, 16)


@pytest.mark.parametrize('content', ['[' * 10**5, '[1]', '{"a": 1', '\xff'])
def test_a_meta_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / 'meta.json').write_text(content, encoding='latin-1')
    for read in (load_meta, load_tokenizer):
        refuses('meta.json is damaged.*: run python data/text|meta.json is damaged.*: use', read, tmp_path)


def test_a_large_file_is_checked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data.files, 'LARGE', 1)
    monkeypatch.setattr(data.files, 'MEMORY', str(tmp_path / 'memory.json'))
    read = []
    monkeypatch.setattr(data.loader, 'sha256_of', lambda path: read.append(path) or sha256_of(path))
    folder = dataset(tmp_path / 'data')
    for _ in range(3):
        Loader(folder, 'train', 4, 16)
    assert len(read) == 1
    path, changed = folder / 'train.bin', np.arange(N, dtype='uint16')[::-1]
    before = os.stat(path)
    time.sleep(0.02)
    changed.tofile(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):  # what is wrong is not remembered
        refuses('not the file that meta.json describes', Loader, folder, 'train', 4, 16)
    assert len(read) == 3


# ----- rows of chats

BPE = BPETokenizer({bytes([b]): b for b in range(256)})
BOS, END = BPE.bos, BPE.special('<|assistant_end|>')


def chats(n, longest, seed=0):
    rng, count = random.Random(seed), iter(range(10**6))
    conversations = []
    for _ in range(n):
        messages = [{'role': role, 'content': f'{next(count)}'.ljust(rng.randint(5, longest), '.')}
                    for _ in range(rng.randint(1, 3)) for role in ('user', 'assistant')]
        conversations.append(BPE.render_chat(messages))
    return conversations


def test_rows_hold_whole_conversations():
    train, row = chats(60, 12), 100
    all_ids, all_mask = (part.reshape(-1, row) for part in pack_rows(train, row, BOS))
    found = []
    for ids, mask in zip(all_ids.tolist(), all_mask.tolist()):
        cuts = [i for i, token in enumerate(ids) if token == BOS] + [row]
        assert cuts[0] == 0
        parts = [(ids[a:b], mask[a:b]) for a, b in zip(cuts, cuts[1:])]
        found += [part for part in parts if part != ([BOS], [0])]  # that is padding
    assert sorted(found) == sorted(train)
    assert len(all_ids) <= 1.1 * sum(len(ids) for ids, _ in train) / row + 1


@pytest.mark.parametrize('split, n', [('train', 60), ('val', 7)])
@pytest.mark.parametrize('world_size, batch_size', [(1, 1), (1, 4), (2, 3)])
def test_an_epoch_of_rows_has_every_answer_once(tmp_path, split, n, world_size, batch_size):
    given = {'train': chats(60, 12), 'val': chats(7, 12, seed=1)}
    write_chats(tmp_path, BPE, given['train'], given['val'], 100, 'test')
    loader = Loader(tmp_path, split, batch_size, 100)
    rows = {tuple(row) for row in loader.tokens.reshape(-1, 100).tolist()}
    answers = sorted(token for ids, mask in given[split] for token, learn in zip(ids, mask) if learn)
    learnt = lambda batches: sorted(token for _, y in batches for token in y[y >= 0].tolist())

    assert learnt(batch for rank in range(world_size) for batch in loader.eval_batches(rank, world_size)) == answers
    n_windows = loader.n_windows
    assert n_windows == len(rows)
    for epoch in range(2):  # sample by sample, as steps and rows count them
        samples = [loader.rows([loader._start(i)]) for i in range(epoch * n_windows, (epoch + 1) * n_windows)]
        assert learnt(samples) == answers
        assert {tuple(x[0].tolist()) for x, _ in samples} == rows
        for x, y in samples:  # no target is of another row
            assert y[0, -1] == -1
            assert torch.equal(y[:, :-1][y[:, :-1] >= 0], x[:, 1:][y[:, :-1] >= 0])
    for step in range(9):
        assert {tuple(x) for x in loader.batch(step)[0].tolist()} <= rows


def test_long_conversations_are_cut_at_a_turn(tmp_path, capsys):
    say = lambda *sizes: BPE.render_chat([{'role': ('user', 'assistant')[i % 2], 'content': 'x' * n}
                                          for i, n in enumerate(sizes)])
    whole, long, unanswered, question, too_long = say(3, 4), say(3, 4, 5, 40), say(3, 4, 5), say(3), say(3, 40)
    given = [whole, long, unanswered, question, too_long]
    write_chats(tmp_path, BPE, given, [whole], 32, 'test')
    said = capsys.readouterr().out
    assert '3 and 1 conversations with 4 answers in 2 and 1 rows of 32 tokens' in said
    assert '1 conversations are cut at a turn, 2 left out' in said
    ids, mask = (np.fromfile(tmp_path / f'train{name}', kind).reshape(-1, 32).tolist()
                 for name, kind in (('.bin', np.uint16), ('.mask.bin', np.uint8)))
    assert ids == [whole[0] * 2 + [BOS] * 8, whole[0] + [BOS] * 20]
    assert mask == [whole[1] * 2 + [0] * 8, whole[1] + [0] * 20]
    meta = load_meta(tmp_path)
    assert (meta['kind'], meta['row']) == ('chat', 32) and from_meta(meta).meta() == BPE.meta()
    with pytest.raises(ValueError, match='0 for training, 0 for validation; 6 have no answer that ends within a row'):
        write_chats(tmp_path, BPE, given, [whole], 8, 'test')
    assert load_meta(tmp_path) == meta


@pytest.mark.parametrize('block_size', [63, 32, 128])
def test_rows_need_their_block_size(tmp_path, block_size):
    write_chats(tmp_path, BPE, chats(9, 9), chats(2, 9), 64, 'test')
    with pytest.raises(ValueError, match=f'rows of 64 tokens, and block_size is {block_size}: give --block_size=64'):
        Loader(tmp_path, 'train', 4, block_size)


# ----- files

def test_meta_says_what_is_in_the_files(tmp_path, capsys):
    meta = write_texts(tmp_path, ['abba'], ['cab'], 'char', 'test')
    assert meta == load_meta(tmp_path) and meta['dtype'] == 'uint16' and meta['source'] == 'test'
    assert (meta['vocab_size'], meta['token_bytes'], meta['train_tokens'], meta['val_tokens']) == (3, [1, 1, 1], 4, 3)
    for name, digest in meta['sha256'].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert from_meta(meta).decode(np.fromfile(tmp_path / 'train.bin', np.uint16)) == 'abba'
    assert '4 training and 3 validation tokens' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = CharTokenizer(map(chr, range(0x10000, 0x10000 + 65537)))
    write_dataset(tmp_path, tokenizer, [0, 65536, 1], [65536, 65535], 'test')
    x, y = Loader(tmp_path, 'train', 1, 2).batch(0)
    assert load_meta(tmp_path)['dtype'] == 'uint32' and y.tolist() == [[65536, 1]]


def test_a_plain_dataset_replaces_a_masked_one_whole(tmp_path):
    dataset(tmp_path, masks=(np.zeros(N), np.zeros(203)))
    dataset(tmp_path)
    assert (Loader(tmp_path, 'train', 4, 16).batch(0)[1] >= 0).all()
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


def test_files_that_are_right_are_left_alone(tmp_path):
    files = lambda: {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    dataset(tmp_path)
    first = files()
    dataset(tmp_path)
    assert files() == first
    dataset(tmp_path, n_val=204)
    second = files()
    assert [name for name in sorted(second) if second[name] != first[name]] == ['meta.json', 'val.bin']
    (tmp_path / 'train.bin').write_bytes(b'damaged')
    dataset(tmp_path, n_val=204)
    assert np.fromfile(tmp_path / 'train.bin', np.uint16).tolist() == list(range(N)) and load_meta(tmp_path)


def test_killed_while_files_are_replaced_there_is_no_dataset(tmp_path, monkeypatch):
    dataset(tmp_path)
    replace = os.replace

    def dies(old, new):
        if new.endswith('val.bin'):
            raise KeyboardInterrupt
        replace(old, new)
    monkeypatch.setattr(os, 'replace', dies)
    with pytest.raises(KeyboardInterrupt):
        dataset(tmp_path, 500, 100)
    assert sorted(os.listdir(tmp_path)) == ['train.bin', 'val.bin']


@pytest.mark.parametrize('write, message', [
    (lambda at: write_dataset(at, TOKENIZER, np.arange(N), [N], 'x'), 'val.bin: .*expected 0..999'),
    (lambda at: write_dataset(at, TOKENIZER, [], [1], 'x'), 'train.bin: no tokens'),
    (lambda at: write_dataset(at, TOKENIZER, [1, 2], [1], 'x', ([1], [1])), 'one value a token'),
    (lambda at: write_dataset(at / 'meta.json', TOKENIZER, [1], [1], 'x'), 'cannot make the folder .*File exists'),
    (lambda at: write_texts(at, ['abc'], [''], 'char', 'x'), 'too little text: 3 characters for training'),
    (lambda at: write_texts(at, ['text'], ['more'], 'bpe', 'x', 100_000), 'vocab_size .* is out of reach')])
def test_what_cannot_be_written_leaves_the_old_dataset(tmp_path, write, message):
    dataset(tmp_path)
    before = content(tmp_path)
    refuses(message, write, tmp_path)
    assert content(tmp_path) == before


def test_splits_hold_out_whole_texts():
    texts = {f'{i}.txt': f'{i}' * (i + 1) for i in range(50)}
    train, val = split_texts(texts, 0.1)
    assert sorted(train + val) == sorted(texts.values()) and not set(train) & set(val)
    total = sum(map(len, texts.values()))
    assert 0.08 * total <= sum(map(len, val)) <= 0.1 * total + 1
    assert split_texts(dict(reversed(texts.items())), 0.1) == (train, val)
    assert split_texts({'a': 'aaaa', 'b': 'bb'}, 0.1) == (['aaaa'], ['bb'])  # neither fits: the shorter
    assert split_texts({'a': '0123456789'}, 0.1) == (['012345678'], ['9'])
    odd = os.fsdecode(b'caf\xe9.txt')  # a name that is not UTF-8
    assert split_texts({odd: 'a', 'b': 'bb'}, 0.1) == (['bb'], ['a'])


def test_stdlib_files(tmp_path):
    for name in ('b.py', 'a/__init__.py', 'a/sub.py', 'a/tests/t.py', 'test/t.py', 'site-packages/x.py',
                 'config-3/y.py', 'not-a-module.py', '_sysconfigdata_x.py', 'notes.txt', 'a/data.pyc', 'bad.py'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b'\xff' if name == 'bad.py' else name.encode())
    assert stdlib_files(tmp_path) == [('a', 'a/__init__.py'), ('a.sub', 'a/sub.py'), ('b', 'b.py')]
    refuses('no .py files', stdlib_files, tmp_path / 'nowhere')
