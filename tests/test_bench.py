"""
bench.py on the smallest of runs: the document it ends with, the text it watches over, its peers, and one line for what cannot work.
Nothing here asks how long anything took.

$ python -m pytest tests/test_bench.py        some fifteen seconds
"""
import importlib.util
import json
import os
import stat
import struct

import pytest
import torch

from data.loader import Loader
from data.tokenizer import CharTokenizer
from engine import Engine
from model import GPT, GPTConfig, evaluate, save_checkpoint
from quantize import convert, export
from test_train import make_dataset, refused, run

SHORT = ['--device=cpu', '--rounds=1', '--prompt_tokens=6', '--new_tokens=12', '--memory=False']
ROW = {'decoder', 'shape', 'format', 'drafter', 'batch', 'tok_s', 'tok_s_rounds', 'ratio_plain_f32', 'ratio_recompute', 'first_token_ms', 'gb_s', 'share_of_bandwidth',
       'rows_cost', 'tokens_per_verify', 'accepted', 'kv_bytes_per_token', 'weight_bytes', 'params', 'memory_bytes', 'file_bytes', 'cache_bytes', 'memory_ratio'}


def bench(*args):
    """A run that must succeed -> its document, and the names it ended with."""
    got = run('bench.py', *SHORT, *args)
    assert got.status == 0, got.err
    return json.loads(got.out.splitlines()[-1]), got.names


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    """What training would leave: a model with a draft head and no multi-token heads, weights that never were trained."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=7, block_size=32, draft_n=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp('out')
    save_checkpoint(f'{folder}/best.pt', model, CharTokenizer('\nabcdef').meta())
    return str(folder)


def test_the_document_and_the_text():
    document, names = bench('--formats=f32,int8,int8-packed,bf16-packed', '--drafters=random,ngram', '--batches=2,1')
    assert set(document) == {'mode', 'machine', 'bandwidth_gb_s', 'rows'} and {'cpu', 'threads', 'torch'} <= set(document['machine'])
    rows = document['rows']
    assert [(r['decoder'], r['format'], r['drafter'], r['batch']) for r in rows] == [
        ('picochat', f, d, b) for f in ('f32', 'int8', 'int8-packed', 'bf16-packed') for d in ('none', 'random', 'ngram') for b in (1, 2)] + [('no cache', 'f32', 'none', 1)]
    assert all(set(r) == ROW for r in rows) and rows[0]['ratio_plain_f32'] == 1.0 and rows[-1]['ratio_recompute'] == 1.0
    assert set(rows[0]['rows_cost']) == {'2', '4', '5', '8'} and all(r['tok_s'] > 0 for r in rows)
    assert all(r['tokens_per_verify'] == 1 if r['drafter'] == 'none' else sum(r['accepted']) > 0 for r in rows[:-1])
    # weights a pass: 3 layers of 4 * 192^2 + 2 * 192 * 384, and 65 rows of 192; and a row of 192 of the embedding
    assert [rows[i]['weight_bytes'] for i in (0, 6, 12, 18)] == [4 * 897216 + 4 * 192, *[897216 + 4 * (3 * (5 * 192 + 384) + 65) + 192 + 4] * 2, 2 * 897216 + 4 * 192]
    assert names['parted'] == [] and [len(t) for f in ('f32', 'int8') for t in names['texts'][f]] == [12] * 4

    engine = Engine(GPT(GPTConfig(**names['SHAPES']['tiny'])))               # the same random weights, here
    noise = torch.Generator().manual_seed(names['seed'])
    for p in engine.model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=noise)
    assert names['texts']['f32'] == engine.complete(names['prompts'], 12, temperature=0)


def test_another_text_is_an_error_with_the_numbers(monkeypatch, tmp_path):
    honest = Engine.complete
    save_checkpoint(f'{tmp_path}/best.pt', GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=65, block_size=32)), CharTokenizer(map(chr, range(65))).meta())

    def cheat(self, prompts, n, drafter='none', **how):
        rows = honest(self, prompts, n, drafter=drafter, **how)
        return [[(row[0] + 1) % 65] + row[1:] for row in rows] if drafter == 'random' else rows
    monkeypatch.setattr(Engine, 'complete', cheat)
    got = run('bench.py', *SHORT, '--formats=f32', '--drafters=none,ngram,random')
    assert got.status == 1 and 'error: another text than the plain row: format f32, drafter random, batch 1, sequence 0: token 0 is' in got.err and 'ngram' not in got.err
    assert len(json.loads(got.out.splitlines()[-1])['rows']) == 4
    bench(f'--shape={tmp_path}', '--temperature=0', '--formats=f32', '--drafters=random')        # zeros, as all weights begin: any two tokens tie


def test_a_trained_model(out_dir):
    document, names = bench(f'--shape={out_dir}', '--drafters=head', '--formats=int8', '--batches=2')
    assert [(r['format'], r['drafter'], r['batch']) for r in document['rows']] == [('f32', 'none', 1), ('int8', 'none', 2), ('int8', 'head', 2), ('f32', 'none', 1)]
    assert names['temperature'] == 0.8 and all(len(p) == 6 and p[0] == 0 for p in names['prompts']) and names['prompts'][0] != names['prompts'][1]
    model = convert(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=7, block_size=32)))
    export(f'{out_dir}/int8.safetensors', model, CharTokenizer('\nabcdef').meta())       # newer, and all of its logits are 0
    _, after = bench(f'--shape={out_dir}', '--formats=f32,int8', '--temperature=0', '--recompute=False')
    os.remove(f'{out_dir}/int8.safetensors')
    assert after['texts']['int8'] == [[0] * 12] != after['texts']['f32']


def test_peers(tmp_path):
    """Binaries that only keep what they were given: the files must be as long as llama2.c's own reading of their headers says."""
    for name in ('run', 'runq'):
        path = tmp_path / name
        path.write_text('#!/bin/sh\nhead -c 64 "$1" > "$0.head"\nwc -c < "$1" > "$0.size"\nwc -c < "$3" > "$0.tokenizer"\necho "$@" > "$0.args"\necho "achieved tok/s: 1234.5" >&2\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    got = run('bench.py', *SHORT, '--formats=f32', '--peers=True', f'--llama2c={tmp_path}')
    assert got.status == 0 and ('pip install transformers' in got.err) == (importlib.util.find_spec('transformers') is None), got.err
    rows = {(r['decoder'], r['format']): r for r in json.loads(got.out.splitlines()[-1])['rows'] if r['decoder'] != 'transformers'}
    ours, theirs = rows['picochat alone', 'f32'], rows['llama2.c', 'int8']
    assert list(rows)[2:] == [('picochat alone', 'f32'), ('llama2.c', 'f32'), ('llama2.c', 'int8')] and theirs['tok_s'] == 1234.5
    assert abs(theirs['params'] / ours['params'] - 1) < 0.02 and theirs['ratio_plain_f32'] == pytest.approx(1234.5 / ours['tok_s_rounds'][-1], rel=1e-3)

    head = {name: (tmp_path / f'{name}.head').read_bytes() for name in ('run', 'runq')}
    dim, hidden, layers, heads, kv, vocab, places = header = struct.unpack('<7i', head['run'][:28])
    assert header == (192, 256, 3, 4, 4, -65, 256)                                       # a negative vocabulary: its classifier is not its embedding
    assert struct.unpack('<2I7iBi', head['runq'][:41]) == (0x616b3432, 2, *header[:5], 65, places, 0, 64)
    matrices = layers * (2 * dim * dim + 2 * dim * dim * kv // heads + 3 * dim * hidden) - 2 * vocab * dim
    norms = (2 * layers + 1) * dim
    assert int((tmp_path / 'run.size').read_text()) == 28 + 4 * (matrices + norms + places * dim // heads)
    assert int((tmp_path / 'runq.size').read_text()) == 256 + 4 * norms + matrices + 4 * matrices // 64
    assert matrices + norms == theirs['params'] and int((tmp_path / 'run.tokenizer').read_text()) == 4 + 9 * 65
    assert (tmp_path / 'runq.args').read_text().split()[-4:] == ['-t', '0', '-n', '18']


def test_quality(tmp_path):
    """Through a float32 cache the loss is that of the whole forward; through an int8 one it is another, close by, at little more than a quarter of the bytes."""
    dataset = make_dataset(tmp_path / 'toy').partition('=')[2]
    loader = Loader(dataset, 'val', 16, 32)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=len(loader.meta['chars']), block_size=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_checkpoint(f'{tmp_path}/best.pt', model, loader.meta, dataset=dataset)
    expected = evaluate(model, loader.eval_batches(), CharTokenizer(loader.meta['chars']).token_bytes)
    document, _ = bench('--mode=quality', f'--shape={tmp_path}', '--formats=f32,int8')
    rows = {(r['format'], r['cache']): r for r in document['rows']}
    assert list(rows) == [(f, cache) for f in ('f32', 'int8') for cache in ('float32', 'int8')]
    assert all(rows['f32', 'float32'][f'val_{k}'] == pytest.approx(expected[k], rel=1e-6) for k in ('loss', 'bpb'))
    for f in ('f32', 'int8'):
        assert 0 < abs(rows[f, 'int8']['val_loss'] - rows[f, 'float32']['val_loss']) < 0.01
    assert [rows['int8', cache]['kv_bytes_per_token'] for cache in ('float32', 'int8')] == [4 * 2 * 2 * 32, 2 * 2 * (32 + 2 * 4)]
    refused(run('bench.py', '--mode=quality'), r'shape \(tiny\) has random weights')


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='Linux alone says what a process takes')
def test_memory(out_dir):
    document, _ = bench(f'--shape={out_dir}', '--formats=f32', '--recompute=False', '--memory=True')
    row = document['rows'][-1]
    assert row['file_bytes'] > 4 * 7 + row['params'] and row['cache_bytes'] == 4 * 2 * 16 * 64          # places come in 64s
    assert row['memory_bytes'] % 4096 == 0 and row['memory_ratio'] == pytest.approx(row['memory_bytes'] / (row['file_bytes'] + row['cache_bytes']), rel=1e-5)


@pytest.mark.parametrize('flags, pattern', [
    ('--mode=decoed', r"mode \(decoed\) must be decode"),
    ('--shape=d13', r"shape \(d13\) must be tiny, d12, or the out_dir of a trained model"),
    ('--shape=data', 'no checkpoint at data/best.pt'),
    ('--formats=f32,int3', r"formats \(f32,int3\) must be of f32, .*'int3' is not"),
    ('--formats=', 'formats'),
    ('--drafters=none,luck', r"drafters .* none, head, mtp, ngram, random; 'luck' is not"),
    ('--shape={} --drafters=head,mtp', r'drafter \(mtp\) needs a model with a multi_token head, which .* has not'),
    ('--batches=1,0', r'batches \(1,0\)'),
    ('--new_tokens=0', r'new_tokens \(0\) must be an int of at least 1'),
    ('--new_tokens=400', r'prompt_tokens \(6\) \+ new_tokens \(400\) do not fit the context of 256'),
    ('--temperature=-1', r'temperature \(-1\)'),
    ('--device=nowhere', r'device \(nowhere\) cannot be used here'),
    ('--llama2c=data', 'measured with --peers=True'),
    ('--peers=True --llama2c=data', r'llama2c \(data\) has no run: .*gcc'),
    ('--bacthes=1', 'unknown key')])
def test_bad_knobs(out_dir, flags, pattern):
    got = run('bench.py', *SHORT, *flags.replace('{}', out_dir).split())
    got.err = ''.join(line for line in got.err.splitlines(keepends=True) if 'pip install' not in line)
    assert not got.out
    refused(got, pattern)
