"""sample.py on a model that train.py and quantize.py have just made: texts, files, stops, a conversation, a chat."""
import json
import os
import random
import shutil
import signal

import pytest
import torch

import engine
from conftest import TINY, make_dataset, ran, refused, run, toy_text
from data.kernels import KernelRound, library
from data.tokenizer import from_meta, train_bpe
from data.writer import write_chats, write_texts
from engine import Engine, Sampling
from quantize import load

FILES = {'float': 'best.pt', 'int8': 'int8.safetensors'}
GREEDY = ['--temperature=0', '--max_new_tokens=30', '--start=the cat', '--device=cpu']


@pytest.fixture(scope='module', params=['char', 'bpe'])
def out_dir(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    data = make_dataset(root / 'data', level=request.param, vocab_size=275, val=2000)
    for script, args in (('train.py', [*TINY, data, '--n_embd=64', '--block_size=64', '--max_iters=60',
                                       '--eval_interval=60', '--quant_bits=8', '--device=cpu']),
                         ('quantize.py', ['--device=cpu'])):
        ran(script, *args, f'--out_dir={root}/out')
    (root / 'elsewhere').mkdir()
    shutil.copytree(root / 'out', root / 'elsewhere' / 'model')
    shutil.rmtree(root / 'out')
    shutil.rmtree(root / 'data')
    return str(root / 'elsewhere' / 'model')


def sample(out_dir, *args, stdin=''):
    got = ran('sample.py', f'--out_dir={out_dir}', *args, stdin=stdin)
    return got.out


def expected(out_dir, weights, prompt, n, sampling, cache=torch.float32, **how):
    model, state = load(f'{out_dir}/{FILES[weights]}')
    tokenizer = from_meta(state['tokenizer'])
    ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(prompt)
    rows = Engine(model, cache_dtype=cache).complete([ids], n, sampling, stop=[tokenizer.bos], **how)
    return [prompt + tokenizer.decode([token for token in row if token != tokenizer.bos]) for row in rows]


@pytest.mark.parametrize('flags, weights, how', [
    ('--weights=float', 'float', {}), ('--weights=int8', 'int8', {}), ('--num_samples=3', 'int8', dict(num_samples=3)),
    ('--int8_cache=True --slide=True --max_new_tokens=200', 'int8', dict(n=200, cache=torch.int8, slide=True))])
def test_the_text_is_the_engines(out_dir, flags, weights, how):
    got = run('sample.py', f'--out_dir={out_dir}', '--start=the cat', '--seed=4', '--temperature=1',
              '--max_new_tokens=30', '--show_stats=True', *flags.split())
    texts = expected(out_dir, weights, 'the cat', sampling=Sampling(seed=4), **{'n': 30} | how)
    assert got.out == ''.join(text + ('\n' if len(texts) == 1 else '\n---------------\n') for text in texts)
    assert len(set(texts)) == len(texts)
    assert any(word in texts[0] for word in toy_text().split())  # it has learnt words
    stats, c = json.loads(got.err.splitlines()[-1]), load(f'{out_dir}/{FILES[weights]}')[0].config
    assert stats.keys() >= {'tokens', 'tok_s', 'tokens_per_verify', 'drafter', 'bytes', 'int_share'}
    assert stats['tokens'] == how.get('n', 30) * len(texts)
    assert stats['weights'] == weights and stats['bytes'] == os.path.getsize(f'{out_dir}/{FILES[weights]}')
    assert stats['int_share'] == 0 if weights == 'float' else stats['int_share'] > 0.9
    assert 'cache' not in how or stats['kv_bytes_per_token'] == 2 * c.n_layer * c.n_kv_head * (c.head_dim + 4)


def test_the_newest_weights_are_taken(out_dir, tmp_path):
    how = ['--start=the', '--seed=3', '--max_new_tokens=40', '--top_k=9', '--top_p=0.9', '--min_p=0.01',
           '--show_stats=True']
    said, *_, stats = run('sample.py', f'--out_dir={out_dir}', *how).err.splitlines()
    assert said.startswith('weights=auto: ') and 'int8.safetensors, the newest of float, int8' in said
    assert json.loads(stats)['weights'] == 'int8'
    shutil.copy(f'{out_dir}/best.pt', tmp_path)
    got = run('sample.py', f'--out_dir={tmp_path}', *how)
    assert 'weights=auto' not in got.err
    assert json.loads(got.err.splitlines()[-1])['weights'] == 'float'
    assert got.out == sample(out_dir, *how, '--weights=float')


def test_a_stop_string_ends_the_text(out_dir):
    free = sample(out_dir, *GREEDY)
    stop = free[12:15]
    cut = free[:free.index(stop, len('the cat'))]
    assert sample(out_dir, *GREEDY, f'--stop={stop}') == cut + '\n'
    assert sample(out_dir, *GREEDY, f'--stop={stop}', '--num_samples=2') == f'{cut}\n---------------\n' * 2


def test_prompts_from_files_and_typed_lines(out_dir, tmp_path):
    how = ['--temperature=0', '--max_new_tokens=30']
    (tmp_path / 'prompt.txt').write_text('the cat\nsat on')
    (tmp_path / 'windows.txt').write_bytes(b'\xef\xbb\xbfthe cat\r\nsat on\r\n')  # one line end is the editor's
    lines = sample(out_dir, *how, '--start=the cat\nsat on')
    for start in (f'FILE:{tmp_path}/prompt.txt', f'FILE:{tmp_path}/windows.txt', r'the cat\nsat on'):
        assert sample(out_dir, *how, f'--start={start}') == lines
    assert run('sample.py', f'--out_dir={out_dir}', *how, r'--stop=\n').names['stops'] == ['\n']
    assert sample(out_dir, *how, '--start=the', '--max_new_tokens=0') == 'the\n'


def test_a_prompt_longer_than_the_context(out_dir):
    text = toy_text().replace('\n', ' ')[:200]
    how = ['--temperature=0', '--max_new_tokens=9', '--slide=True', f'--start={text}']
    got = run('sample.py', f'--out_dir={out_dir}', *how)
    assert got.status == 0 and 'the context holds the last 64' in got.err
    assert got.out.startswith(text) and len(got.out) > len(text) + 8
    model, state = load(f'{out_dir}/int8.safetensors')
    tokenizer = from_meta(state['tokenizer'])
    row, = Engine(model).complete([tokenizer.encode(text)[-64:]], 9, Sampling(temperature=0), slide=True)
    assert got.out == text + tokenizer.decode(row) + '\n'


def test_the_default_length_fits(out_dir):
    stats = lambda *args: json.loads(run('sample.py', f'--out_dir={out_dir}', '--show_stats=True', '--start=the cat',
                                         '--run_on=True', *args).err.splitlines()[-1])
    ids = from_meta(load(f'{out_dir}/int8.safetensors')[1]['tokenizer'])
    n = len(ids.encode('the cat')) + (ids.bos is not None)
    assert stats()['tokens'] == 65 - n
    assert stats('--slide=True')['tokens'] == 200
    refused(run('sample.py', f'--out_dir={out_dir}', '--weights=int8', '--start=the cat', '--max_new_tokens=200'),
            'do not fit')


def test_a_document_ends(tmp_path):
    document = 'the cat sat on a mat\n'
    write_texts(str(tmp_path / 'data'), [document] * 400, [document] * 40, 'bpe', 'toy', 275)
    got = run('train.py', *TINY, f'--dataset={tmp_path}/data', '--n_embd=64', '--block_size=32', '--max_iters=80',
              '--eval_interval=80', '--sample_interval=80', f'--out_dir={tmp_path}/out')
    assert got.status == 0 and '<|' not in got.out
    shown = got.out.split('----- sample at step 80 -----\n')[1].split('\n-----')[0]
    assert shown == document
    how = ['--start=the cat', '--temperature=0', '--max_new_tokens=25']
    out = tmp_path / 'out'
    assert sample(out, *how) == document + '\n'
    assert sample(out, *how, '--num_samples=2') == f'{document}\n---------------\n' * 2
    on = sample(out, *how, '--run_on=True')
    assert on.startswith(document + 'the cat') and '<|' not in on
    assert sample(out, *how, '--run_on=True', '--num_samples=2') == (on[:-1] + '\n---------------\n') * 2


def test_a_conversation(out_dir):
    how = ['--interactive=True', '--max_new_tokens=20', '--seed=7', '--temperature=1', '--weights=int8']
    too_long = 'the ' * 100
    got = run('sample.py', f'--out_dir={out_dir}', *how,
              stdin=f'the cat\nsat on\n###\n{too_long}\n###\r\na mat\r\n###\nno\nend')
    texts = [expected(out_dir, 'int8', prompt, 20, Sampling(seed=seed))[0]
             for prompt, seed in (('the cat\nsat on', 7), ('a mat', 8), ('no\nend', 9))]
    assert got.status == 0
    assert got.out == ''.join(f'{text}\n' for text in texts)
    asked, refusal = got.err.splitlines()
    assert '###' in asked
    assert refusal.startswith('error: the prompt')
    got = ran('sample.py', f'--out_dir={out_dir}', '--interactive=True', '--show_stats=True')
    assert got.out == ''
    assert json.loads(got.err.splitlines()[-1])['tokens'] == 0


# ----- chat

@pytest.fixture(scope='module')
def chat_dir(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('chat'), random.Random(0)
    tokenizer = train_bpe([toy_text()], 275)
    say = lambda n: ' '.join(rng.choices('the cat sat on a mat and ran'.split(), k=rng.randint(1, n)))
    turns = lambda: [{'role': role, 'content': say(n)}
                     for _ in range(rng.randint(1, 3)) for role, n in (('user', 3), ('assistant', 6))]
    train, val = ([tokenizer.render_chat(turns()) for _ in range(n)] for n in (150, 10))
    write_chats(root / 'data', tokenizer, train, val, 64, 'toy')
    for script, args in (('train.py', [*TINY, f'--dataset={root}/data', '--n_embd=64', '--block_size=64',
                                       '--max_iters=40', '--eval_interval=40', '--sample_interval=40', '--draft_n=2',
                                       '--multi_token_n=2']),
                         ('quantize.py', [])):
        got = run(script, *args, f'--out_dir={root}/out')
        # the sample that train.py shows is an answer to a question
        assert got.status == 0 and ('----- sample' in got.out) == ('<|user_start|>' in got.out), got.err
    return f'{root}/out'


def chat(out_dir, *lines, **knobs):
    knobs = [f'--{k}={v}' for k, v in knobs.items()]
    got = ran('sample.py', '--chat=True', f'--out_dir={out_dir}', '--weights=int8', *knobs,
              stdin=''.join(f'{line}\n' for line in lines))
    return got.out, got.err.splitlines()[1:]  # the first says how it is used


def reference(out_dir, weights, lines, seed=1337, temperature=0.8, cut={}):
    """What a chat of 20 tokens an answer must say, from whole conversations; cut: how many tokens are said."""
    model, state = load(f'{out_dir}/{FILES[weights]}')
    t, exchanges, out = from_meta(state['tokenizer']), [], []
    bos, u0, u1, a0, a1 = map(t.special, t.special_tokens[:5])
    for line in lines:
        if line == '/undo':
            exchanges = exchanges[:-1]
            continue
        if line == '/reset':
            exchanges = []
            continue
        line = line.lstrip()  # a space marks what is no command
        question = [u0, *t.encode(line), u1, a0]
        room = 64 - 16  # a quarter of the context is the answer's
        if 1 + len(question) > room:
            seed += 1  # a question that is refused takes a seed, too
            continue
        while 1 + sum(map(len, exchanges)) + len(question) > room:
            exchanges = exchanges[1:]
        prompt = [bos, *sum(exchanges, []), *question]
        new, = Engine(model).complete([prompt], min(20, 65 - len(prompt)), Sampling(temperature, seed=seed + len(out)),
                                      stop=range(u0 - 1, t.vocab_size))
        answer = [token for token in new if token < bos][:cut.get(len(out))]
        exchanges = [*exchanges, question + answer + [a1]]
        out.append(t.decode(answer))
    return ''.join(f'{text}\n' for text in out)


LINES = ['the cat', 'sat on', '/undo', 'a mat and', 'ran', '/reset', '/undo', 'the cat', 'a']


@pytest.mark.parametrize('temperature', [0, 1])
def test_a_chat_is_decoded_from_scratch_with_any_drafter(chat_dir, temperature):
    how = dict(temperature=temperature, max_new_tokens=20)
    said, notes = plain = chat(chat_dir, *LINES, **how)
    assert said == reference(chat_dir, 'int8', LINES, temperature=temperature)
    if temperature:
        assert not notes and len(set(said.splitlines())) > 3
        assert min(map(len, said.splitlines())) < 15  # not everything was cut by max_new_tokens
    stopped = chat(chat_dir, *LINES, **how, stop='n')
    assert stopped != plain
    assert 'n' not in stopped[0]
    for drafter in ('head', 'mtp', 'ngram', 'random'):
        assert chat(chat_dir, *LINES, **how, drafter=drafter, draft_n=5) == plain, drafter
        assert chat(chat_dir, *LINES, **how, drafter=drafter, draft_n=5, stop='n') == stopped, drafter


@pytest.mark.parametrize('place, nth, said_by_then', [((engine, 'draw'), 3, 3), ((KernelRound, '__call__'), 1, 5)])
def test_ctrl_c_stops_the_answer(chat_dir, monkeypatch, place, nth, said_by_then):
    """
    In the middle of a pass, or of a round of kernels.cpp: what was said until then stays, and the conversation goes on
    from it with the cache it has.
    """
    if place[0] is engine:
        monkeypatch.setattr(KernelRound, 'pays', staticmethod(lambda *args: False))
    elif library() is None:
        pytest.skip('no C++ compiler')
    # in the background a shell has it ignored: here it must arrive
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = next(seed for seed in range(100) if len(reference(chat_dir, 'int8', ['the cat'], seed=seed)) > 12)
    usual, count = getattr(*place), iter(range(1000))

    def with_signal(*args, **how):
        if next(count) == nth:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(*args, **how)
    monkeypatch.setattr(*place, with_signal)
    lines = ['the cat', 'sat on', 'a']
    said, _ = chat(chat_dir, *lines, max_new_tokens=20, seed=seed)
    monkeypatch.undo()
    signal.signal(signal.SIGINT, before)
    assert said == reference(chat_dir, 'int8', lines, seed=seed, cut={0: said_by_then})
    assert len(said.splitlines()) == 3
    assert said.splitlines()[0] != reference(chat_dir, 'int8', lines[:1], seed=seed)[:-1]


def test_a_full_context_forgets_the_oldest(chat_dir):
    asked = ['the cat sat', 'on a mat', 'the cat sat on a mat ' * 5, 'and ran', 'the mat', 'a cat ran']
    said, notes = chat(chat_dir, *asked, '/quit', 'never asked', max_new_tokens=20)
    assert said == reference(chat_dir, 'int8', asked) and len(said.splitlines()) == 5
    assert any('are forgotten' in note for note in notes)
    assert sum('do not fit the context of 64 with an answer of 16' in note for note in notes) == 1


def test_what_is_a_command(chat_dir):
    """Exact words only; a space or // sends a line as it is; several lines stand between quotes."""
    def asks(*lines):
        said, notes = chat(chat_dir, *lines, max_new_tokens=20)
        assert not notes
        return said
    assert asks('/bye', '/etc/hosts?') == reference(chat_dir, 'int8', ['/bye', '/etc/hosts?'])
    assert asks('the cat', '//undo', ' /quit', 'a') == reference(chat_dir, 'int8', ['the cat', ' /undo', '/quit', 'a'])
    assert (asks('"""', 'the cat', '', '/quit', '"""', 'a mat\r', '/quit\r', 'never')
            == reference(chat_dir, 'int8', ['the cat\n\n/quit', 'a mat']))
    assert asks('"""', 'the cat', '//sat') == reference(chat_dir, 'int8', ['the cat\n//sat'])


def test_the_vocabulary_of_a_chat_is_not_cut(chat_dir, tmp_path):
    got = run('prune.py', f'--out_dir={chat_dir}', f'--save_dir={tmp_path}', '--vocab_keep=270',
              f'--dataset={chat_dir}/../data')
    refused(got, 'is a chat dataset')
