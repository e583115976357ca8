"""Questions answered by likelihood, and bits per byte of further texts: as whole forwards over each text give them."""
import contextlib
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

from conftest import BPE, CHAR, build, make_dataset, ran, randomise, refused, refuses, result_of, run, toy_text
from data.bench.tasks import (answer, answer_all, asked, bits_per_byte, by_group, cut_left, draw_examples, measure,
                              p_by_chance, read_rows, read_tasks, read_texts, scored_tokens, sorts_of)
from data.cache import KVCache
from data.checkpoint import save_checkpoint
from data.loader import Loader
from data.rounding import convert
from data.tokenizer import from_meta
from data.writer import write_texts
from model import GPT, GPTConfig, evaluate
from quantize import export

WORDS = 'the cat then other bathe a these north'.split()


def questions(n=40):
    rng = random.Random(0)
    some = lambda most: ' '.join(rng.choices(WORDS, k=rng.randint(1, most)))
    out = []
    for i in range(n):
        out += [{'query': some(9), 'choices': [some(4) for _ in range(2 + i % 3)], 'gold': i % 2, 'kind': 'a',
                 'heldout': i % 4 == 0},
                {'context_options': ['cat ' + some(4), 'then ' + some(4)], 'continuation': some(4), 'gold': i % 2,
                 'kind': 'b'},
                {'context': some(6) + ' ', 'continuation': rng.choice(WORDS)}]
    return out


def plainly(model, tokenizer, item, examples=(), delimiter=' '):
    """What CORE says: each text by itself through the whole model, the mean loss of the tokens that tell them apart."""
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    shot = lambda e: (e['query'] + delimiter + e['choices'][e['gold']] if 'query' in e else
                      e['context_options'][e['gold']] + delimiter + e['continuation'] if 'context_options' in e else
                      e['context'].strip() + delimiter + e['continuation'])
    before = ''.join(shot(e) + '\n\n' for e in examples)
    if 'context' in item:
        texts = [before + shot(item)]
    elif 'query' in item:
        texts = [before + item['query'] + delimiter + choice for choice in item['choices']]
    else:
        texts = [before + context + delimiter + item['continuation'] for context in item['context_options']]
    rows = [bos + tokenizer.encode(text) for text in texts]
    nats, right = [], None
    for row in rows:
        logits = model(torch.tensor([row]))[0]  # (T, V)
        losses = [0.0] + F.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction='none').tolist()
        if 'query' in item:
            start = next((i for i in range(min(map(len, rows))) if len({r[i] for r in rows}) > 1), min(map(len, rows)))
        elif 'context_options' in item:
            same = next(i for i in range(1, 99) if len({r[-i] for r in rows}) > 1 or i == min(map(len, rows))) - 1
            start = len(row) - same
        else:
            start = len(bos + tokenizer.encode((before + item['context'].strip() + delimiter).rstrip()))
            right = logits.argmax(dim=-1)[start - 1:-1].tolist() == row[start:]
        scored = losses[max(1, min(start, len(row) - 1)):]
        nats.append(sum(scored) / len(scored))
    return nats, right if right is not None else nats.index(min(nats)) == item['gold']


@pytest.mark.parametrize('tokenizer', [BPE, CHAR], ids=['bpe', 'char'])
@pytest.mark.parametrize('shots', [0, 2])
def test_answers_are_those_of_whole_forwards(tokenizer, shots):
    model, items = build(tokenizer, kv=2, block_size=400), questions(10)
    # choices that are the same, or of which one begins the other: something is scored of each
    items += [items[0] | {'choices': choices, 'gold': 0} for choices in (['the', 'the'], ['cat', 'cat cat cat'])]
    drawn = lambda i: [items[j] for j in draw_examples(sorts_of(items), i, shots)]
    n = 0
    for i, item in enumerate(items):
        examples = drawn(i)
        assert len(examples) == shots and item not in examples and all(e.keys() == item.keys() for e in examples)
        nats, right = plainly(model, tokenizer, item, examples)
        states, targets = read_rows(model, *scored_tokens(item, examples, tokenizer, ' '))
        own = model.cross_entropy(states, targets, 'none').view(targets.shape)
        assert (own.sum(1) / (targets >= 0).sum(1)).tolist() == pytest.approx(nats, rel=1e-4)
        assert answer(model, tokenizer, item, examples) == right
        n += right
    assert 0 < n < len(items)
    assert answer_all(model, tokenizer, items, num_fewshot=shots, questions=7) == [
        plainly(model, tokenizer, item, drawn(i))[1] for i, item in enumerate(items[:7])]


def test_long_questions_are_cut_at_the_left():
    model, long = build(BPE, block_size=24), 'north cat ' * 20
    item = {'query': long + 'the other', 'choices': ['cat', 'these a', 'bathe the cat'], 'gold': 2}
    rows, places = cut_left(*scored_tokens(item, (), BPE, ' '), BPE.bos, 24)
    assert max(map(len, rows)) == 24 and all(row[0] == BPE.bos for row in rows)
    whole, _ = scored_tokens(item, (), BPE, ' ')
    over = max(map(len, whole)) - 24
    assert [row[1:] for row in rows] == [row[1 + over:] for row in whole]
    assert [BPE.decode(row[place:]) for row, place in zip(rows, places)] == [' cat', ' these a', ' bathe the cat']
    answer(model, BPE, item)
    with pytest.raises(ValueError, match='answers of .* tokens do not fit the context of 24'):
        answer(model, BPE, item | {'choices': ['cat', 'these ' * 30], 'gold': 0})


def test_what_guessing_gives():
    assert p_by_chance(0, [0.25] * 9) == 1 and p_by_chance(3, [0.5] * 3) == pytest.approx(1 / 8)
    n, k = 40, 17
    exact = sum(math.comb(n, i) * 0.25 ** i * 0.75 ** (n - i) for i in range(k, n + 1))
    assert p_by_chance(k, [0.25] * n) == pytest.approx(exact, rel=1e-9)
    assert p_by_chance(1, [0.5, 0.25]) == pytest.approx(1 - 0.5 * 0.75)  # not all have as many choices


def test_groups_add_up():
    items = questions(10)
    right = [i % 3 == 0 for i in range(len(items))][:27]
    rows = by_group(items, right)
    assert [(row['kind'], row.get('heldout')) for row in rows] == [
        ('all', None), ('a', None), ('a', False), ('a', True), ('b', None)]
    whole, a, a_seen, a_new, b = rows
    assert whole['questions'] == 27 and whole['accuracy'] == 9 / 27 and a['questions'] == 9 == b['questions']
    assert a_seen['questions'] + a_new['questions'] == 9
    assert a['accuracy'] == 1 and a['error'] == 0 and a['centred'] == 1 and b['accuracy'] == 0
    assert a['chance'] == pytest.approx((3 / 2 + 3 / 3 + 3 / 4) / 9) and b['centred'] == -1
    assert whole['error'] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 27))
    assert whole['centred_error'] == pytest.approx(whole['error'] / (1 - whole['chance']))


GOOD = {'query': 'a', 'choices': ['b', 'c'], 'gold': 1}


@pytest.mark.parametrize('line', [
    '{"query": "a"', '[]', '7', '{}', '[' * 99999, json.dumps(GOOD | {'gold': 2}), json.dumps(GOOD | {'gold': -1}),
    json.dumps(GOOD | {'gold': True}), json.dumps(GOOD | {'gold': '1'}), json.dumps(GOOD | {'choices': ['b']}),
    json.dumps(GOOD | {'choices': ['b', 3]}), json.dumps(GOOD | {'choices': 'bc'}), json.dumps(GOOD | {'query': None}),
    json.dumps({'context': 'a', 'continuation': ' '}), json.dumps({'context_options': ['a', 'b'], 'gold': 0})])
def test_lines_that_are_no_questions(tmp_path, line):
    (tmp_path / 'a.jsonl').write_text(json.dumps(GOOD) + '\n\n' + line + '\n')
    refuses('a.jsonl, line 3: expected an object', read_tasks, f'{tmp_path}/a.jsonl')


def test_files_are_read_in_an_order_drawn_by_the_seed(tmp_path):
    lines = [json.dumps(item) for item in questions(9)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines) + '\n')
    drawn = [json.dumps(item) for item in read_tasks(f'{tmp_path}/a.jsonl')]
    assert drawn != lines and sorted(drawn) == sorted(lines)
    random.Random(1337).shuffle(lines)  # as nanochat shuffles
    assert drawn == lines
    refuses('must be a .jsonl file', read_tasks, f'{tmp_path}/b.jsonl')
    (tmp_path / 'b.jsonl').write_text('\n')
    refuses('has no question', read_tasks, f'{tmp_path}/b.jsonl')


@pytest.mark.parametrize('level', ['char', 'bpe'])
def test_bits_per_byte_are_those_of_a_dataset_made_of_the_text(tmp_path, level):
    text = toy_text(12)
    dataset = make_dataset(tmp_path / 'toy', text, len(text), level, 275).split('=')[1]
    loader = Loader(dataset, 'val', 3, 32)
    tokenizer = from_meta(loader.meta)
    model = build(tokenizer, kv=2, block_size=32)
    expected = evaluate(model, loader.eval_batches(), tokenizer.token_bytes)['bpb']
    assert bits_per_byte(model, tokenizer, text) == pytest.approx(expected, rel=1e-6)
    make_cache = lambda n: KVCache(model.config, n, dtype=torch.int8)
    expected = evaluate(model, loader.eval_batches(), tokenizer.token_bytes, make_cache)['bpb']
    assert bits_per_byte(model, tokenizer, text, torch.int8) == pytest.approx(expected, rel=1e-6)
    assert bits_per_byte(model, tokenizer, text[:20]) > 0  # shorter than the context


def test_texts_are_read_by_bytes(tmp_path):
    (tmp_path / 'a').write_text('naïve text')
    assert read_texts(f'x={tmp_path}/a, y={tmp_path}/a') == {'x': 'naïve text', 'y': 'naïve text'}
    assert not read_texts('')
    assert read_texts(f'x={tmp_path}/a', 4) == {'x': 'naï'} and read_texts(f'x={tmp_path}/a', 3) == {'x': 'na'}
    for spec, error, pattern in ((f'{tmp_path}/a', AssertionError, 'must be like'),
                                 (f'x={tmp_path}', ValueError, 'not there, or is a folder')):
        with pytest.raises(error, match=pattern):
            read_texts(spec)
    said = asked(f'x={tmp_path}/a', 9, f'{tmp_path}/a', num_fewshot=2)
    assert str(tmp_path) not in said and said.startswith('x ') and '9 bytes' in said and "'num_fewshot': 2" in said
    (tmp_path / 'a').write_text('another')
    assert asked(f'x={tmp_path}/a', 9, f'{tmp_path}/a', num_fewshot=2) != said and asked() == ''


@pytest.fixture
def trained(tmp_path):
    model = randomise(GPT(GPTConfig(block_size=200, vocab_size=BPE.vocab_size, n_layer=1, n_head=1, n_embd=16)))
    save_checkpoint(f'{tmp_path}/best.pt', model, BPE.meta())
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, questions(9))))
    return tmp_path, model


def test_mode_tasks(trained):
    folder, model = trained
    export(f'{folder}/int8.safetensors', convert(model, 8), BPE.meta())
    for file in ('', '/int8.safetensors'):
        got = run('bench.py', '--mode=tasks', f'--tasks={folder}/a.jsonl', f'--shape={folder}{file}', '--device=cpu',
                  '--num_fewshot=1', '--questions=9', r'--delimiter=:\n')
        document = result_of(got)
        if not file:
            items = read_tasks(f'{folder}/a.jsonl')
            rows = by_group(items, answer_all(model, BPE, items, 9, 1, ':\n'))
            assert document['rows'] == json.loads(json.dumps(rows)) and document['rows'][0]['questions'] == 9
            assert document['num_fewshot'] == 1 and 'held out' in got.out
    row = measure(model, BPE, tasks=f'{folder}/a.jsonl', texts=f'x={folder}/a.jsonl', text_bytes=300)
    assert row['tasks_centred'] == row['tasks'][0]['centred'] and row['bpb_x'] > 0


def test_mode_quality_measures_other_texts(trained):
    folder, model = trained
    text = (folder / 'a.jsonl').read_text()[:900]
    (folder / 'text').write_text(text)
    flags = '--mode=quality', f'--shape={folder}', f'--texts=x={folder}/text', '--device=cpu', '--formats=f32'
    for has_dataset in (False, True):
        if has_dataset:
            with contextlib.redirect_stdout(None):
                meta = write_texts(f'{folder}/toy', [text], [text], 'bpe', 'toy', tokenizer=BPE)
            save_checkpoint(f'{folder}/best.pt', model, meta, dataset=f'{folder}/toy')
        for row in result_of(run('bench.py', *flags))['rows']:
            dtype = getattr(torch, row['cache'])
            assert row['bpb_x'] == pytest.approx(bits_per_byte(model, BPE, text, dtype), rel=1e-6)
            assert not has_dataset or row['val_bpb'] == pytest.approx(row['bpb_x'], rel=1e-5)


def test_mode_tasks_refuses(trained):
    folder, _ = trained
    for flags, pattern in ((f'--shape={folder}', r'tasks \(\) must be a .jsonl file'),
                           (f'--shape={folder} --tasks={folder}/a.jsonl --num_fewshot=99', r'\(99\) must be at most 8'),
                           (f'--shape={folder} --tasks={folder}/a.jsonl --questions=-1', r'questions \(-1\)')):
        refused(run('bench.py', '--mode=tasks', '--device=cpu', *flags.split()), pattern)


SEEN, HELD = ('aa', 'bb', 'cc', 'dd', 'ee'), ('getpass', 'hmac', 'mailbox', 'optparse')


def test_questions_about_a_library(tmp_path):
    (tmp_path / 'lib').mkdir()
    for module in (*SEEN, *HELD, '_hidden'):
        text = ''.join(f'def {module.strip("_")}_{i}(self, a=1):\n    """Do what {module} does, number {i}. More."""\n'
                       for i in range(5)) + 'def common():\n    pass\n'
        (tmp_path / 'lib' / f'{module}.py').write_text(text + '# aa_0 is mentioned here\n' * (module == 'bb'))
    (tmp_path / 'lib' / 'broken.py').write_text('def (')
    ran('data/pydoc_chat/prepare.py', f'--root={tmp_path}/lib', f'--tasks={tmp_path}/t.jsonl')
    items = read_tasks(f'{tmp_path}/t.jsonl')
    imports, docstrings = ([item for item in items if item['kind'] == kind] for kind in ('module', 'docstring'))
    assert sorted(item['continuation'] for item in imports) == sorted(
        f'{module}_{i}' for module in SEEN + HELD for i in range(5))
    for item in imports:
        module = item['continuation'][:-2]
        assert item['context_options'][item['gold']] == f'from {module} import'
        assert len(set(item['context_options'])) == 4 and 'from _hidden import' not in item['context_options']
        assert item['continuation'] != 'aa_0' or 'from bb import' not in item['context_options']  # it is in there
        assert item['heldout'] == (module in HELD)
        assert all((option.split()[1] in HELD) == item['heldout'] for option in item['context_options'])
    assert len(docstrings) == 50
    for item in docstrings:
        module, i = item['query'][4:].partition('(')[0].rsplit('_', 1)
        assert item['query'] == f'def {module}_{i}(self, a=1):\n    """\n   '
        right = item['choices'][item['gold']]
        assert right in (f'Do what {module} does, number {i}.', f'Do what _{module} does, number {i}.')
        assert all(choice[:-2] == right[:-2] for choice in item['choices'])  # of the same module
    assert len({item['gold'] for item in items}) == 4
