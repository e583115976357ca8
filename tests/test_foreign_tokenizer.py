"""
Other people's tokenizers, and with tokenizers and gguf installed, what these say. Ours is made as SmolLM2's is:
special tokens have the first ids, some single bytes have no token.
"""
import doctest
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch

import data.foreign_tokenizer
import data.tokenizer
import data.vocabulary
from conftest import TEMPLATE, TEXTS, build, refuses
from data.checkpoint import save_checkpoint
from data.foreign_tokenizer import (GPT2_PATTERN, byte_characters, gguf_tokenizer, hf_folder_tokenizer,
                                    hf_tokenizer, load_tokenizer, merges_of, pre_tokenizer_of)
from data.rounding import convert
from data.tokenizer import PATTERN, BPETokenizer, CharTokenizer, fingerprint, from_meta, train_bpe, vocab_size_of
from data.vocabulary import cut_tokenizer, recode
from quantize import export

SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<repo_name>']
MISSING = {4, 29, 192, 241, 255}  # control characters, what UTF-8 has not, the first byte of U+40000 and others

# The pre-tokenizers of the hub's tokenizer.json of gpt2, SmolLM2, Llama 3 and Qwen2.
BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")


def sequence(*steps):
    return {'type': 'Sequence', 'pretokenizers': [*steps]}


def split(pattern):
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


HUB = {'gpt-2': BYTES,
       'smollm': sequence({'type': 'Digits', 'individual_digits': True}, BYTES | {'use_regex': True}),
       'llama-bpe': sequence(split(LLAMA3), BYTES | {'use_regex': False}),
       'qwen2': sequence(split(LLAMA3.replace('{1,3}', '')), BYTES | {'use_regex': False})}

HARD = ['', ' ', '\r\n\r\n a\r\n', '\t\tx\t 1\t\t22  333   4444', '0123456789' * 9, 'a1b22 c 3  d', "it's WE'LL I'D 's",
        '\u4f60\u597d\uff0c\u4e16\u754c 123\u56db', '\U0001f600\U0001f468\u200d\U0001f469 \U0001f1eb', 'e\u0301 \u00e9',
        '   \n\n \t \n x', '\u00bd \u2177 \u0660\u0661 \u00b2', 'a\x00b\x1c\x85\xa0c\u2028d\u3000e', '<|im_end|>',
        'a\x04b \x1d1 \U00040000x\U0007ffff']


@pytest.fixture(scope='module')
def table():
    """{token as text: id} of the tokens of text, and their merges as text."""
    character = byte_characters()
    text = lambda token: ''.join(character[byte] for byte in token)
    tokens = [token.encode('latin-1') for token in train_bpe(TEXTS, 320, GPT2_PATTERN, []).meta()['ranks']]
    merges = [(text(a), text(b)) for a, b in merges_of(tokens)]
    kept = [text(token) for token in tokens if token[0] not in MISSING]
    return {token: len(SPECIALS) + i for i, token in enumerate(kept)}, merges


def document(table, cutter, names=SPECIALS, **changes):
    added = [{'id': i, 'content': name, 'special': True, 'single_word': False, 'lstrip': False, 'rstrip': False,
              'normalized': False} for i, name in enumerate(names)]
    vocab = {name: i for i, name in enumerate(names)} | table[0]
    model = {'type': 'BPE', 'vocab': vocab, 'merges': [f'{a} {b}' for a, b in table[1]]} | changes.pop('model', {})
    return {'version': '1.0', 'added_tokens': added, 'normalizer': None, 'pre_tokenizer': cutter,
            'post_processor': None, 'decoder': BYTES, 'model': model} | changes


def folder(path, document, **config):
    os.makedirs(path, exist_ok=True)
    (path / 'tokenizer.json').write_text(json.dumps(document))
    (path / 'tokenizer_config.json').write_text(json.dumps(config))
    return path


@pytest.fixture
def smol(table, tmp_path):
    return hf_folder_tokenizer(folder(tmp_path / 'smol', document(table, HUB['smollm']), bos_token='<|im_start|>',
                                      chat_template=TEMPLATE))


# ----- special tokens anywhere, bytes without a token

def test_special_tokens_come_first_and_bytes_are_missing(smol):
    assert smol.special_tokens == SPECIALS and smol.special_ids == [0, 1, 2, 3] and smol.text_ids[:2] == [4, 5]
    assert smol.vocab_size == 4 + 256 - 5 + 64 and smol.token_bytes[:6] == [0, 0, 0, 0, 1, 1]
    assert (smol.bos, smol.ends, smol.chat, smol.system) == (0, {0, 2}, 'chatml', 'Be kind.')
    for text in TEXTS + HARD[:-1]:
        ids = smol.encode(text)
        assert min(ids, default=4) >= 4 and smol.decode(ids) == text
        assert sum(smol.token_bytes[i] for i in ids) == len(text.encode())
    # what has no tokens is U+FFFD, the sign for it; what only looks like it stays
    assert smol.decode(smol.encode(HARD[-1])) == 'a\ufffdb \ufffd1 \ufffdx\ufffd'
    assert smol.encode(HARD[-1]) == smol.encode('a\ufffdb \ufffd1 \ufffdx\ufffd')
    assert smol.decode(smol.encode('\x04\ud83d\ude00\ud83d')) == '\ufffd\U0001f600\ufffd'  # halves of surrogates
    assert smol.decode([1, *smol.encode('hi'), 2]) == '<|im_start|>hi<|im_end|>'


def test_a_meta_keeps_all_of_it(smol):
    meta = json.loads(json.dumps(smol.meta()))
    again = from_meta(meta | {'source': 'x', 'kind': 'chat'})
    assert again.meta() == meta and vocab_size_of(meta) == smol.vocab_size
    assert again.encode(TEXTS[0]) == smol.encode(TEXTS[0]) and again.token_bytes == smol.token_bytes
    assert (again.bos, again.ends, again.system) == (0, {0, 2}, 'Be kind.')
    # how it is used has no part in the ids; where they are and how text is cut has
    other = from_meta(meta | {'system': 'Be brief.', 'bos': '<repo_name>', 'chat': None})
    assert fingerprint(other) == fingerprint(smol)
    for change in ({'special_ids': [0, 1, 2, 4]}, {'pattern': GPT2_PATTERN}, {'normalizer': 'NFC'}):
        assert fingerprint(from_meta(meta | change)) != fingerprint(smol)


def test_our_own_metas_have_no_more_keys_than_ever():
    ranks = {bytes([byte]): byte for byte in range(256)}
    for specials, expected in (
            (None, '02445727916d353b13e8230287407714e355c68576d07b7fbade2dcfd937705e'),
            (['<|endoftext|>'], '6db9cd259c0cc29ae4a516b181622aedd6a42ea3b46d748c5080bbb2fdb2196a')):
        tok = BPETokenizer(ranks) if specials is None else BPETokenizer(ranks, special_tokens=specials)
        assert fingerprint(tok) == expected and tok.meta().keys() == {'kind', 'ranks', 'pattern', 'special_tokens'}
    assert CharTokenizer('a').chat is None and not CharTokenizer('a').ends


def test_a_vocabulary_is_cut_wherever_its_special_tokens_are(smol):
    texts = [[0] + smol.encode(text) for text in (*TEXTS, 'a\x04b')] + [[1, 3, 2]]
    ids = np.array(sum(texts, []))
    counts = np.bincount(ids, minlength=smol.vocab_size)
    least = 4 + 251
    for n in (least, least + 40, smol.vocab_size):
        keep, new = cut_tokenizer(smol, counts, n)
        assert keep == sorted(keep) and len(keep) == n == new.vocab_size
        assert new.special_ids == [0, 1, 2, 3] and (new.chat, new.system, new.bos) == ('chatml', 'Be kind.', 0)
        assert [new.decode_bytes([i]) for i in range(n)] == [smol.decode_bytes([i]) for i in keep]
        again = recode(ids, smol, new)
        assert new.decode(again) == smol.decode(ids) and list(again[-3:]) == [1, 3, 2]
    refuses(f'at least {least}', cut_tokenizer, smol, counts, least - 1)


# ----- Hugging Face's folders

@pytest.mark.parametrize('name', HUB)
def test_ids_are_those_of_tokenizers(table, tmp_path, name):
    tokenizers = pytest.importorskip('tokenizers')
    path = folder(tmp_path, document(table, HUB[name], normalizer={'type': 'NFC'} if name == 'qwen2' else None))
    ours, theirs = hf_folder_tokenizer(path), tokenizers.Tokenizer.from_file(str(path / 'tokenizer.json'))
    theirs.encode_special_tokens = True  # special tokens are not read out of text
    assert pre_tokenizer_of(ours.pattern) == name and ours.normalizer == ('NFC' if name == 'qwen2' else None)
    rng = random.Random(name)
    kinds = [range(0x20, 0x7f), range(0xa0, 0x530), range(0x4e00, 0x9fff), range(0x1f300, 0x1f650),
             range(0x2000, 0x2100), [*map(ord, ' \t\r\n\x85\xa0\u3000')], [*map(ord, "0123456789\u00b2\u00bd\u0663'")],
             [*map(ord, "'sStTlLrReEvVmMdD")]]
    fuzz = [''.join(chr(rng.choice(rng.choice(three))) for _ in range(rng.randint(1, 60)))
            for three in (rng.sample(kinds, 3) for _ in range(300))]
    for text in TEXTS + HARD + fuzz:
        readable = ''.join('\ufffd' if MISSING & set(c.encode()) else c for c in text)
        assert ours.encode(text) == theirs.encode(readable).ids, ascii(text)


def test_every_way_to_make_a_token_may_be_listed(table, tmp_path):
    vocab, merges = table
    pairs = [(token[:i], token[i:]) for token in (a + b for a, b in merges) for i in range(1, len(token))]
    pairs = [pair for pair in pairs if vocab.keys() >= {*pair}]
    assert len(pairs) > len(merges)
    one, other = (hf_folder_tokenizer(folder(tmp_path, document((vocab, listed), HUB['llama-bpe'])))
                  for listed in (merges, pairs))
    assert one.meta() == other.meta()


def test_docstring_examples():
    for module in (data.tokenizer, data.foreign_tokenizer, data.vocabulary):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


def test_other_ways_to_cut_text_are_refused_by_name(table, tmp_path):
    for cutter, match in (
            ({'type': 'Whitespace'}, 'Whitespace'), (None, 'null'), ([1], '1'), ({'type': 'Sequence'}, 'Sequence'),
            (BYTES | {'add_prefix_space': True}, 'add_prefix_space": true'),
            (sequence({'type': 'Digits', 'individual_digits': False}, BYTES), 'Digits'),
            (sequence(split(r'\s+'), BYTES | {'use_regex': False}), r's\+'),
            (sequence(split(LLAMA3) | {'behavior': 'Removed'}, BYTES | {'use_regex': False}), 'Removed'),
            (sequence(split(LLAMA3), BYTES), 'Split')):
        path = folder(tmp_path, document(table, cutter))
        refuses(f'tokenizer.json .* not known here, .*{match}.*gpt-2, smollm', hf_folder_tokenizer, path)


@pytest.mark.parametrize('change, match', [
    ({'model': {'byte_fallback': True}}, 'SentencePiece'), ({'model': {'type': 'Unigram'}}, 'SentencePiece'),
    ({'model': {'type': 'WordPiece'}}, "a 'WordPiece'"), ({'model': {'end_of_word_suffix': '</w>'}}, '</w>'),
    ({'normalizer': {'type': 'Lowercase'}}, "normalizer 'Lowercase'"), ({'added_tokens': [3]}, 'another form'),
    ({'post_processor': {'processors': 3}}, 'another form'), ({'model': {'merges': ['a b c']}}, 'expected a BPE'),
    ({'model': {'merges': [['t', 'zq']]}}, 'expected a BPE'), ({'added_tokens': [{'content': 'x', 'id': 999}]}, 'holes'),
    ({'model': {'merges': [['Ġ', 't'], ['t', 'h']]}}, 'in the order of the merges')])
def test_other_tokenizers_are_refused(table, tmp_path, change, match):
    changed = document(table, HUB['smollm'], **{key: dict(value) if key == 'model' else value
                                                for key, value in change.items()})
    refuses(f'tokenizer.json .*{match}', hf_folder_tokenizer, folder(tmp_path, changed))


def test_folders_without_a_tokenizer_json(tmp_path):
    assert hf_folder_tokenizer(tmp_path) is None
    (tmp_path / 'tokenizer.model').write_bytes(b'\n\x0e')
    refuses('tokenizer.model is a SentencePiece tokenizer, .*: take a model with', hf_folder_tokenizer, tmp_path)
    (tmp_path / 'vocab.json').write_text('{}')
    (tmp_path / 'merges.txt').write_text('')
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    refuses('a Qwen2Tokenizer without its tokenizer.json', hf_folder_tokenizer, tmp_path)


LLAMA3_BOS = {'type': 'Sequence', 'processors': [BYTES, {'type': 'TemplateProcessing', 'single': [
    {'SpecialToken': {'id': '<|begin_of_text|>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]}]}


@pytest.mark.parametrize('names, processor, config, bos, ends', [
    # SmolLM2: what its files call bos begins a message; then Qwen2, Llama 3, and some that do not exist
    ('<|endoftext|> <|im_start|> <|im_end|>', None, {'bos_token': '<|im_start|>'}, '<|endoftext|>', [0, 2]),
    ('<|im_start|> <|im_end|> <|endoftext|>', None, {'bos_token': None}, '<|endoftext|>', [1, 2]),
    ('<|begin_of_text|> <|end_of_text|> <|eot_id|>', LLAMA3_BOS, {}, '<|begin_of_text|>', [0, 1, 2]),
    ('<s> </s> <|endoftext|>', None, {'bos_token': {'content': '<s>'}, 'add_bos_token': True}, '<s>', [0, 2]),
    ('<s> </s> <pad>', None, {'bos_token': '<s>'}, '<s>', [0]),
    ('<|im_start|> <|im_end|> <pad>', None, {'bos_token': '<|im_start|>'}, None, [1])])
def test_what_stands_between_two_texts(table, tmp_path, names, processor, config, bos, ends):
    names = [*names.split(), '<unused>']
    written = document(table, HUB['smollm'], names, post_processor=processor)
    tok = hf_folder_tokenizer(folder(tmp_path, written, **config))
    assert tok.bos == (None if bos is None else names.index(bos)) and sorted(tok.ends) == ends
    again = from_meta(tok.meta())
    assert (again.bos, again.ends) == (tok.bos, tok.ends)


@pytest.mark.parametrize('template, chat, system', [
    (None, 'chatml', None), (TEMPLATE, 'chatml', 'Be kind.'), (TEMPLATE.replace('\n', r'\n'), 'chatml', 'Be kind.'),
    ("{{ '<|im_start|>system\n' + system_message + '<|im_end|>' }}", 'chatml', None),
    ([{'name': 'tools', 'template': 'x'}, {'name': 'default', 'template': TEMPLATE}], 'chatml', 'Be kind.'),
    ('[INST]{{ messages }}[/INST]', None, None)])
def test_a_template_is_known_by_what_it_says(table, tmp_path, template, chat, system):
    tok = hf_folder_tokenizer(folder(tmp_path, document(table, HUB['smollm']), chat_template=template))
    assert (tok.chat, tok.system) == (chat, system) == (from_meta(tok.meta()).chat, from_meta(tok.meta()).system)
    if isinstance(template, str):  # in a file of its own, as newer folders have it
        (tmp_path / 'tokenizer_config.json').unlink()
        (tmp_path / 'chat_template.jinja').write_text(template)
        assert hf_folder_tokenizer(tmp_path).meta() == tok.meta()


def test_out_and_in_again(smol, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(hf_tokenizer(smol)))
    assert fingerprint(hf_folder_tokenizer(tmp_path)) == fingerprint(smol)
    own = train_bpe(TEXTS, 300)
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / 'tokenizer.json').write_text(json.dumps(hf_tokenizer(own)))
    assert hf_folder_tokenizer(tmp_path / 'own').meta() == own.meta() and own.pattern == PATTERN
    tokenizers = pytest.importorskip('tokenizers')
    every = ''.join(f'a{chr(c)}b 1{chr(c)} '
                    for c in [*range(0x3000), *range(0xff00, 0xffff), *range(0x1f600, 0x1f650)])
    for tok, more in ((smol, []), (own, [HARD[-1], every])):
        theirs = tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer(tok)))
        assert theirs.get_vocab_size() == tok.vocab_size
        assert all(theirs.token_to_id(name) == tok.special(name) for name in tok.special_tokens)
        for text in TEXTS + HARD[:-1] + more:
            if '<|' not in text:
                assert theirs.encode(text).ids == tok.encode(text)
                assert theirs.decode(tok.encode(text)) == text
        ids = [tok.special_ids[1], *tok.encode('hi'), tok.special_ids[2]]
        assert theirs.encode('{1}hi{2}'.format(*tok.special_tokens)).ids == ids


def test_merges_that_do_not_make_a_token():
    refuses('xyz', merges_of, [bytes([b]) for b in range(256)] + [b'xyz'])


# ----- GGUF

def write_gguf(path, table, pre='smollm', model='gpt2', **changes):
    gguf = pytest.importorskip('gguf')
    writer = gguf.GGUFWriter(str(path), 'llama')
    tokens = [*SPECIALS, *table[0]]
    values = {'list': tokens, 'merges': [f'{a} {b}' for a, b in table[1]],
              'types': [3] * 4 + [1] * len(table[0])} | changes
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_array('tokenizer.ggml.tokens', values['list'])
    writer.add_array('tokenizer.ggml.merges', values['merges'])
    writer.add_array('tokenizer.ggml.token_type', values['types'])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor('token_embd.weight', np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_has_the_same_tokenizer(table, smol, tmp_path):
    path = write_gguf(tmp_path / 'a.gguf', table)
    assert gguf_tokenizer(path).meta() == smol.meta()
    assert load_tokenizer(path).meta() == load_tokenizer(f'gguf:{path}').meta() == smol.meta()
    assert gguf_tokenizer(write_gguf(tmp_path / 'q.gguf', table, 'qwen2')).normalizer == 'NFC'


@pytest.mark.parametrize('changes, match', [
    ({'pre': 'tekken'}, "pre-tokenizer 'tekken', .*gpt-2, smollm, llama-bpe, qwen2: take a model"),
    ({'model': 'llama'}, 'SentencePiece tokenizer, .*: take a model'), ({'model': 'bert'}, "of kind 'bert'"),
    ({'types': [1, 3]}, 'do not fit together'), ({'list': [1, 2, 3]}, 'do not fit together'),
    ({'merges': ['a']}, 'expected a BPE'), ({'list': ['a', 'a']}, 'do not fit|expected a BPE')])
def test_bad_ggufs(table, tmp_path, changes, match):
    refuses(f'a.gguf .*{match}', gguf_tokenizer, write_gguf(tmp_path / 'a.gguf', table, **changes))


def test_every_kind_of_path(smol, table, tmp_path):
    path = folder(tmp_path / 'hf', document(table, HUB['smollm']), chat_template=TEMPLATE)
    assert load_tokenizer(f'hf:{path}').meta() == load_tokenizer(str(path)).meta() == smol.meta()
    model = build(smol)
    save_checkpoint(str(tmp_path / 'out' / 'best.pt'), model, smol.meta(), step=0, dataset='gone')
    (tmp_path / 'int').mkdir()
    export(str(tmp_path / 'int' / 'int8.safetensors'), convert(build(smol)), smol.meta())
    (tmp_path / 'few').mkdir()  # integers of any number of bits
    shutil.copy(tmp_path / 'int' / 'int8.safetensors', tmp_path / 'few' / 'int3.safetensors')
    for name in ('out', 'out/best.pt', 'int', 'int/int8.safetensors', 'few'):
        assert load_tokenizer(tmp_path / name).meta() == smol.meta(), name
    (tmp_path / 'int' / 'meta.json').write_text(json.dumps(CharTokenizer('abc').meta()))
    assert load_tokenizer(tmp_path / 'int').chars == 'abc'  # a dataset comes first
    own = train_bpe(TEXTS, 300)
    (tmp_path / 'd2').mkdir()
    (tmp_path / 'd2' / 'tokenizer.pkl').write_bytes(pickle.dumps(own._encoding))
    for name in ('d2', 'd2/tokenizer.pkl'):
        assert load_tokenizer(tmp_path / name).meta() == own.meta()
    torch.save({'model': 1}, tmp_path / 'other.pt')
    refuses('not a picochat checkpoint', load_tokenizer, tmp_path / 'other.pt')
    refuses('no tokenizer in .*expected a folder with', load_tokenizer, f'hf:{tmp_path}/int')
    refuses('run python data/text/prepare.py, or expected', load_tokenizer, 'data/text')
    refuses("no tokenizer at .*none.: expected .* distill.py --fetch=d32", load_tokenizer, str(tmp_path / 'none'))
