"""data/tokenizer.py: training, metas, chats, and nanochat's pickles."""

import argparse
import difflib
import inspect
import json
import os
import pickle
import random
import textwrap
from collections import Counter

import pytest
from conftest import Evil, prompt_of, python, refuses
import regex
import tiktoken

from data.foreign_tokenizer import load_nanochat_tokenizer
from data.tokenizer import (PATTERN, SPECIAL_TOKENS, BPETokenizer, CharTokenizer, fingerprint, from_meta, train_bpe,
                            vocab_size_of)
from quantize import compact, spread

# Real text that is on every machine. It differs between Python versions, so nothing below expects particular tokens.
TEXTS = [inspect.getsource(module) for module in (textwrap, difflib, argparse)]
HARD = ['', ' ', '\n', '\r\n\r\n', '   x\t\t\n \n', 'a' * 500, ' ' * 500 + 'x', "it's WE'LL I'd", '12345678 3.14',
        '<|bos|><|user_start|>', 'h\u00e9llo e\u0301', '\u4f60\u597d\u3000\u4e16\u754c', 'a\x00b\x1c\x85\xa0c',
        '\u0660\u0661\u0662 \u00bd \u2167', '\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7',
        '\u202e\ufeff\ufffd\ufffe\uffff\U0010ffff']


@pytest.fixture(scope='module')
def bpe():
    return train_bpe(TEXTS, 256 + 400 + 9)


def merge(word, pair, new):
    out, i = [], 0
    while i < len(word):
        hit = tuple(word[i:i + 2]) == pair
        out.append(new if hit else word[i])
        i += 2 if hit else 1
    return out


def naive_merges(text, n):
    """The definition of BPE training: recount everything for each merge. Returns pairs of ids in order."""
    words = [list(piece.encode('utf-8')) for piece in regex.findall(PATTERN, text)]
    merges = []
    for new in range(256, 256 + n):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(word, pair, new) for word in words]
        merges.append(pair)
    return merges


def test_char_round_trip():
    text = ''.join(HARD)
    tok = CharTokenizer(text)
    assert tok.chars == ''.join(sorted(set(text))) and tok.vocab_size == len(tok.chars) and tok.bos is None
    assert tok.encode(tok.chars) == list(range(tok.vocab_size))
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.decode_bytes(ids) == text.encode('utf-8')
    assert sum(tok.token_bytes[i] for i in ids) == len(text.encode('utf-8'))
    assert tok.encode('') == [] and tok.decode([]) == ''


def test_char_errors():
    tok = CharTokenizer('abc\n')
    message = refuses('4 characters', tok.encode, 'a\u00e9\tb')
    assert repr('\u00e9') in message and repr('\t') in message and repr('\nabc') in message
    assert 'and 15 more' in refuses("'d', 'e', 'f', 'g', 'h'", tok.encode, 'defghijklmnopqrstuvw')
    refuses('token id 4', tok.decode, [4])
    refuses('empty', CharTokenizer, '')


# ----- BPE

def test_bpe_round_trip(bpe):
    rng = random.Random(0)
    points = [*range(0xd800), *range(0xe000, 0x110000)]
    hard = HARD + [''.join(map(chr, rng.choices(points, k=200))) for _ in range(20)] + TEXTS
    for text in hard:
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text and bpe.decode_bytes(ids) == text.encode('utf-8')
        assert sum(bpe.token_bytes[i] for i in ids) == len(text.encode('utf-8'))
    assert len(bpe.encode(TEXTS[0])) < 0.6 * len(TEXTS[0])  # the merges are used


def test_bpe_bytes_and_specials(bpe):
    assert bpe.vocab_size == 665 and len(bpe.token_bytes) == 665
    assert [bpe.decode_bytes([byte]) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert bpe.decode([0xe2, 0x82]) == '\ufffd' and bpe.decode([0xe2, 0x82, 0xac]) == '\u20ac'
    assert [bpe.special(name) for name in SPECIAL_TOKENS] == list(range(656, 665)) and bpe.bos == 656
    assert bpe.token_bytes[656:] == [0] * 9 and min(bpe.token_bytes[:656]) == 1
    assert bpe.decode([656, *bpe.encode('hi'), 664]) == '<|bos|>hi<|output_end|>'
    assert max(bpe.encode('<|bos|>hi<|output_end|>')) < 656
    refuses("'<|eot|>'".replace('|', r'\|'), bpe.special, '<|eot|>')
    refuses('token id 665', bpe.decode, [665])
    refuses('token id -1', bpe.decode_bytes, [-1])

    plain = train_bpe(TEXTS, 300, special_tokens=())
    assert plain.bos is None and plain.vocab_size == 300 and plain.decode(plain.encode(TEXTS[1])) == TEXTS[1]
    refuses('no special token', plain.render_chat, [{'role': 'user', 'content': 'hi'}])


def test_bpe_long_white_space(bpe):
    for text in ('x' + ' ' * 499_999 + 'x' * 500_000, '\n' * 400_000 + ' ' * 90_000 + 'x' * 600_000):
        assert bpe.decode(bpe.encode(text)) == text
    refuses('character 1 ', bpe.encode, 'x' + ' ' * 1_100_000)


def test_bpe_refuses_bad_tables():
    ranks = {bytes([byte]): byte for byte in range(256)}
    assert BPETokenizer(ranks, special_tokens=()).encode('hi') == [104, 105]
    refuses('257 BPE tokens', BPETokenizer, {**ranks, b'ab': 255})
    no_sign = {b'aa' if token == b'\xef' else token: i for token, i in ranks.items()}
    refuses(r'1 single bytes .* 239.* U\+FFFD', BPETokenizer, no_sign)
    refuses('twice', BPETokenizer, ranks, PATTERN, ['<|bos|>', '<|bos|>'])
    refuses('parenthesis', BPETokenizer, ranks, '(')


# ----- The trainer

@pytest.mark.parametrize('text, n', [
    (TEXTS[0][:6000], 120),
    ('zyxw vuts abcd hgfe ' * 3, 14),  # nothing but ties
    ('aaaaaaa aaa aaaa baaab aaaaa', 6),  # nothing but runs
    ('\u4f60\u597d\u4f60 \u597d\u4f60' * 9, 8),
    (''.join(random.Random(0).choices('ACGT', k=2000)), 60),  # one long piece
])
def test_training_and_encoding_equal_the_definition(text, n):
    merges, tokens = naive_merges(text, n), [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    tok = train_bpe([text], 256 + n + 9)
    assert [tok.decode_bytes([i]) for i in range(256 + n)] == tokens
    for sample in [text, *HARD, TEXTS[1][:20_000], 'aaaa' * 9 + 'baa']:
        expected = []
        for piece in regex.findall(PATTERN, sample):
            word = list(piece.encode('utf-8'))
            for i, pair in enumerate(merges):
                word = merge(word, pair, 256 + i)
            expected += word
        assert tok.encode(sample) == expected


def test_training_depends_on_the_text_alone(bpe):
    assert fingerprint(train_bpe(reversed(TEXTS), bpe.vocab_size)) == fingerprint(bpe)
    script = ('import argparse, difflib, inspect, textwrap; from data.tokenizer import fingerprint, train_bpe;'
              'print(fingerprint(train_bpe(map(inspect.getsource, (textwrap, difflib, argparse)), 665)))')
    for seed in ('1', '2'):  # of str hashes, and so of the order of sets
        assert python('-c', script, PYTHONHASHSEED=seed).out.strip() == fingerprint(bpe)


def test_training_errors():
    message = refuses('only 5 merges', train_bpe, ['low lower'], 4096)  # lo, low, and three more to ' lower'
    assert 'vocab_size=270' in message
    assert train_bpe(['low lower'], 270).vocab_size == 270
    refuses(r'\(264\) must be at least 265', train_bpe, ['low'], 264)
    refuses('one string', train_bpe, 'low lower', 300)
    assert train_bpe(['ab ab'], 266, pattern=r'(a)(b)|[\s\S]').decode([256]) == 'ab'  # groups in a pattern do not cut


# ----- To and from files

def test_meta_round_trip(bpe):
    own = train_bpe(TEXTS, 300, pattern=r'\S+|\s+', special_tokens=['<|end|>', '<|bos|>'])
    for tok in (bpe, own, CharTokenizer(TEXTS[0] + ''.join(HARD))):
        stored = json.loads(json.dumps({**tok.meta(), 'source': 'x', 'train_tokens': 3}))
        again = from_meta(stored)
        assert type(again) is type(tok) and again.meta() == tok.meta() and fingerprint(again) == fingerprint(tok)
        assert (again.vocab_size, again.bos, again.token_bytes) == (tok.vocab_size, tok.bos, tok.token_bytes)
        assert again.encode(TEXTS[0]) == tok.encode(TEXTS[0])
        # and as quantize.py's files have it, in which older versions wrote a list
        assert spread(json.loads(json.dumps(compact(stored), ensure_ascii=False))) == spread(stored) == stored
    assert from_meta({**bpe.meta(), 'kind': 'chat'}).meta() == bpe.meta()


def test_fingerprint_tells_tokenizers_apart(bpe):
    ranks = {token.encode('latin-1'): i for i, token in enumerate(bpe.meta()['ranks'])}
    others = [bpe, CharTokenizer('abc'), CharTokenizer('abd'), BPETokenizer(ranks, special_tokens=SPECIAL_TOKENS[::-1]),
              BPETokenizer(ranks, pattern=PATTERN.replace('{1,2}', '{1,3}')), train_bpe(TEXTS, 664)]
    assert len({fingerprint(tok) for tok in others}) == len(others)
    assert fingerprint(BPETokenizer(ranks)) == fingerprint(bpe)


CHATML = BPETokenizer({bytes([byte]): byte for byte in range(256)}, special_ids=[0, 1, 2, 3],
                      special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<repo_name>'])


@pytest.mark.parametrize('change, match', [
    ({'kind': 'word'}, "'word'"), ({'kind': None}, 'None'), ({'kind': 'char'}, 'needs chars'),
    ({'kind': 'char', 'chars': 'ba'}, 'sorted'), ({'special_tokens': None}, 'needs special_tokens'),
    ({'ranks': [*map(chr, range(256)), 'a']}, 'missing or repeated'),
    ({'ranks': [*map(chr, range(240, 256))]}, 'no BPE token'),
    # it contradicts itself
    ({'special_ids': [0, 1, 2]}, '4 special tokens must have as many ids'), ({'special_ids': [3, 1, 2, 0]}, 'rising'),
    ({'special_ids': [0, 1, 2, 9999]}, 'below 260'), ({'special_ids': [0, 1, 2, True]}, 'not '),
    ({'special_ids': 3}, 'special_ids of a tokenizer is 3'), ({'bos': 7}, 'bos of a tokenizer'),
    ({'bos': '<|bos|>'}, r"no special token '<\|bos\|>'"), ({'chat': 'alpaca'}, "chat is 'alpaca'"),
    ({'chat': 'nanochat'}, 'with its special tokens'), ({'normalizer': 'NFKC'}, "form 'NFKC', and only NFC"),
    # JSON can spell it
    ({'special_tokens': ['\ud800']}, 'half a surrogate pair'), ({'pattern': '\udfff|.'}, 'half a surrogate pair'),
    ({'kind': 'char', 'chars': 'a\ud800'}, 'half a surrogate pair'),
    # tiktoken would have panicked, a page of Rust
    *(({'pattern': pattern}, 'the pattern of this tokenizer, .* matches where there is nothing')
      for pattern in ('', '(?=x)', '(?i)', 'x*'))])
def test_a_meta_that_is_none(change, match, capfd):
    """None: the key is not there."""
    meta = {key: value for key, value in (CHATML.meta() | change).items() if value is not None}
    refuses(match, from_meta, meta)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('pattern, text, match', [
    (r'\p{L}+|\s+', None, 'leaves out some of a text'),  # at once, before it is used
    ('(', None, 'is none .*: use another'), ('a|' * 10**4 + '.', None, 'has 20,001 characters'),
    (r'[^\u9999]', 'a\u9999b', 'leaves out some of a text'),
    (r'(?:(?=x)x+)+y|[\s\S]', 'x' * 50, 'takes too long')])
def test_a_pattern_must_be_up_to_a_text(pattern, text, match, capfd):
    ranks = {bytes([byte]): byte for byte in range(256)}
    if text:
        tokenizer = from_meta({'kind': 'bpe', 'ranks': [*map(chr, range(256))], 'pattern': pattern,
                               'special_tokens': []})
        refuses(f'the pattern of this tokenizer, .*{match}', tokenizer.encode, text)
        refuses(match, tokenizer.encode_batch, ['abc', text])
    else:
        refuses(match, BPETokenizer, ranks, pattern)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('change', [{'kind': ['bpe']}, {'ranks': 3}, {'ranks': [1] * 256}, {'pattern': None},
                                    {'special_tokens': 'ab'}, {'special_tokens': [[]]}, {'special_tokens': 3},
                                    {'ranks': [*map(chr, range(255)), '\u0100']}])
def test_a_meta_of_other_types_is_refused(bpe, change):
    for read in (from_meta, vocab_size_of):
        refuses('prepare.py again', read, bpe.meta() | change)


def test_nanochat_pickle(bpe, tmp_path):
    path = tmp_path / 'tokenizer.pkl'
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(bpe._encoding, protocol))
        assert fingerprint(load_nanochat_tokenizer(path)) == fingerprint(bpe)
    assert fingerprint(load_nanochat_tokenizer(str(tmp_path))) == fingerprint(bpe)
    with pytest.raises(FileNotFoundError):
        load_nanochat_tokenizer(tmp_path / 'nothing.pkl')

    ranks = {bytes([byte]): byte for byte in range(256)}
    holes = tiktoken.Encoding('holes', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={'<|bos|>': 300})
    path.write_bytes(pickle.dumps(holes))
    refuses('last ids', load_nanochat_tokenizer, path)


def encoding_pickle(state):
    """b'...' of: make a tiktoken.core.Encoding, give it this state."""
    inner = pickle.dumps(state, 3)[2:-1]  # without its own protocol and stop
    return b'\x80\x03ctiktoken.core\nEncoding\n)\x81' + inner + b'b.'


def test_nanochat_pickle_runs_nothing(bpe, tmp_path, monkeypatch):
    path, folder = tmp_path / 'tokenizer.pkl', str(tmp_path / 'made by the pickle')
    state = bpe._encoding.__getstate__()
    path.write_bytes(encoding_pickle(state))
    # encoding_pickle writes what the loader reads
    assert fingerprint(load_nanochat_tokenizer(path)) == fingerprint(bpe)

    # a state that is a name asks for a download
    monkeypatch.setattr(tiktoken.registry, 'get_encoding', lambda name: os.mkdir(folder))
    attacks = {
        'a call': (pickle.dumps(Evil(folder)), 'mkdir'),
        'a call inside the state': (encoding_pickle({**state, 'name': Evil(folder)}), 'mkdir'),
        'eval': (b'cbuiltins\neval\n(V__import__("os").mkdir("%s")\ntR.' % folder.encode(), 'eval'),
        'a dotted name': (b'\x80\x04\x8c\x0dtiktoken.core\x8c\x10Encoding.__new__\x93.', 'Encoding.__new__'),
        'a neighbour': (b'ctiktoken.core\nos\n.', 'tiktoken.core'),
        'a download': (encoding_pickle('gpt2'), 'no table'),
        'half a state': (encoding_pickle({'pat_str': PATTERN}), 'mergeable_ranks'),
        'cut short': (pickle.dumps(bpe._encoding)[:2000], 'tokenizer.pkl'),
        'memory': (b'\x80\x04N' + b'r\xff\xff\xff\x7f' + b'.', 'no table'),  # entry 2^31 of a table: 16 GiB, in C
        'a giant': (b'\x80\x04' + b'N0' * 2**25 + b'N.', 'more than 67,108,864 bytes')}
    for name, (content, match) in attacks.items():
        path.write_bytes(content)
        message = refuses(match, load_nanochat_tokenizer, path)
        assert str(path) in message, name
        assert not os.path.exists(folder), name


# ----- Chat

SYSTEM = {'role': 'system', 'content': 'Be brief.'}
USER = {'role': 'user', 'content': 'Why?\n'}
BOT = {'role': 'assistant', 'content': ' 42 <|bos|>'}


def test_render_chat(bpe):
    bos, u0, u1, a0, a1 = map(bpe.special, SPECIAL_TOKENS[:5])
    user, bot = bpe.encode('Why?\n'), bpe.encode(' 42 <|bos|>')
    exchange, learn = [u0, *user, u1, a0, *bot, a1], [0] * (len(user) + 3) + [1] * (len(bot) + 1)

    ids, mask = bpe.render_chat([USER, BOT, USER, BOT])
    assert ids == [bos, *exchange, *exchange] and mask == [0, *learn, *learn]
    assert bpe.render_chat({'messages': [USER, BOT, USER, BOT], 'id': 7}) == (ids, mask)
    assert prompt_of(bpe, [USER, BOT, USER]) == [bos, *exchange, u0, *user, u1, a0]
    assert bpe.render_chat([USER]) == ([bos, u0, *user, u1], [0] * (len(user) + 3))

    conversation = [SYSTEM, USER, BOT]
    ids, mask = bpe.render_chat(conversation)
    merged = bpe.encode('Be brief.\n\nWhy?\n')
    assert ids == [bos, u0, *merged, u1, a0, *bot, a1] and mask == [0] * (len(merged) + 4) + [1] * (len(bot) + 1)
    assert conversation == [SYSTEM, USER, BOT] and USER['content'] == 'Why?\n'  # the input is left alone
    assert prompt_of(bpe, [SYSTEM, USER]) == ids[:len(merged) + 4]


@pytest.mark.parametrize('conversation, match', [
    ([], 'at least one user'), ([SYSTEM], 'at least one user'), ({'messages': []}, 'at least one user'),
    ('hello', 'not str'), ({'turns': [USER]}, 'not NoneType'), (None, 'not NoneType'),
    (['hello'], 'message 0 must be'), ([{**USER, 'content': [1]}], 'message 0 must be'),
    ([USER, {'role': 'assistant'}], 'message 1 must be'),
    ([BOT], "message 0 has role 'assistant', expected 'user'"),
    ([SYSTEM, SYSTEM, USER], "message 1 has role 'system'"), ([{**USER, 'role': 'human'}], "'human'"),
])
def test_render_chat_errors(bpe, conversation, match):
    refuses(match, bpe.render_chat, conversation)
