"""
bench.py on the smallest of runs: the document it ends with, the text it watches over, its peers, and one line for what
cannot work. Nothing here asks how long anything took.

$ python -m pytest tests/test_bench.py        half a minute
"""
import glob
import importlib.util
import json
import os
import re
import runpy
import shutil
import stat
import struct
import sys

import pytest
from conftest import e0_state, make_dataset, nanogpt_state, refused, run, train, write_nanochat, write_nanogpt
import torch

import model as M
from data.loader import Loader
from data.tokenizer import CharTokenizer
from engine import Engine, KVCache
from model import GPT, GPTConfig, evaluate, load_model, save_checkpoint
from quantize import convert, export, load

SHORT = ['--device=cpu', '--rounds=1', '--prompt_tokens=6', '--new_tokens=12', '--memory=False']
ROW = {'decoder', 'shape', 'format', 'drafter', 'batch', 'tok_s', 'tok_s_rounds', 'ratio_plain_f32', 'ratio_recompute',
       'first_token_ms', 'gb_s', 'share_of_bandwidth', 'rows_cost', 'tokens_per_verify', 'accepted',
       'kv_bytes_per_token', 'weight_bytes', 'params', 'memory_bytes', 'file_bytes', 'cache_bytes', 'memory_ratio'}


def bench(*args):
    """A run that must succeed -> its document, and the names it ended with."""
    got = run('bench.py', *SHORT, *args)
    assert got.status == 0, got.err
    return json.loads(got.out.splitlines()[-1]), got.names


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    """
    What training would leave: a model with a draft head and no multi-token heads, weights that never were trained.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=7, block_size=32, draft_n=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp('out')
    save_checkpoint(f'{folder}/best.pt', model, CharTokenizer('\nabcdef').meta())
    return str(folder)


def test_the_document_and_the_text():
    document, names = bench('--formats=f32,int8,int8-packed,bf16-packed', '--drafters=random,ngram', '--batches=2,1')
    assert (set(document) == {'mode', 'machine', 'bandwidth_gb_s', 'rows'}
            and {'cpu', 'threads', 'torch'} <= set(document['machine']))
    rows = document['rows']
    assert [(r['decoder'], r['format'], r['drafter'], r['batch']) for r in rows] == [
        ('picochat', f, d, b) for f in ('f32', 'int8', 'int8-packed', 'bf16-packed')
        for d in ('none', 'random', 'ngram') for b in (1, 2)] + [('no cache', 'f32', 'none', 1)]
    assert all(set(r) == ROW for r in rows) and rows[0]['ratio_plain_f32'] == 1.0 and rows[-1]['ratio_recompute'] == 1.0
    assert set(rows[0]['rows_cost']) == {'2', '4', '5', '8'} and all(r['tok_s'] > 0 for r in rows)
    assert all(r['tokens_per_verify'] == 1 if r['drafter'] == 'none' else sum(r['accepted']) > 0 for r in rows[:-1])
    # weights a pass: 3 layers of 4 * 192^2 + 2 * 192 * 384, and 65 rows of 192; and a row of 192 of the embedding
    assert [rows[i]['weight_bytes'] for i in (0, 6, 12, 18)] == [
        4 * 897216 + 4 * 192, *[897216 + 4 * (3 * (5 * 192 + 384) + 65) + 192 + 4] * 2, 2 * 897216 + 4 * 192]
    assert names['parted'] == [] and [len(t) for f in ('f32', 'int8') for t in names['texts'][f]] == [12] * 4

    engine = Engine(GPT(GPTConfig(**names['SHAPES']['tiny'])))               # the same random weights, here
    noise = torch.Generator().manual_seed(names['seed'])
    for p in engine.model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=noise)
    assert names['texts']['f32'] == engine.complete(names['prompts'], 12, temperature=0)


def test_another_text_is_an_error_with_the_numbers(monkeypatch, tmp_path):
    honest = Engine.complete
    save_checkpoint(f'{tmp_path}/best.pt',
                    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=65, block_size=32)),
                    CharTokenizer(map(chr, range(65))).meta())

    def cheat(self, prompts, n, drafter='none', **how):
        rows = honest(self, prompts, n, drafter=drafter, **how)
        return [[(row[0] + 1) % 65] + row[1:] for row in rows] if drafter == 'random' else rows
    monkeypatch.setattr(Engine, 'complete', cheat)
    got = run('bench.py', *SHORT, '--formats=f32', '--drafters=none,ngram,random')
    assert (got.status == 1
            and 'error: another text than the plain row: '
                'format f32, drafter random, batch 1, sequence 0: token 0 is' in got.err
            and 'ngram' not in got.err)
    assert len(json.loads(got.out.splitlines()[-1])['rows']) == 4
    # zeros, as all weights begin: any two tokens tie
    bench(f'--shape={tmp_path}', '--temperature=0', '--formats=f32', '--drafters=random')


def test_a_trained_model(out_dir):
    document, names = bench(f'--shape={out_dir}', '--drafters=head', '--formats=int8', '--batches=2')
    assert [(r['format'], r['drafter'], r['batch']) for r in document['rows']] == [
        ('f32', 'none', 1), ('int8', 'none', 2), ('int8', 'head', 2), ('f32', 'none', 1)]
    assert (names['temperature'] == 0.8 and all(len(p) == 6 and p[0] == 0 for p in names['prompts'])
            and names['prompts'][0] != names['prompts'][1])
    model = convert(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=7, block_size=32)))
    export(f'{out_dir}/int8.safetensors', model, CharTokenizer('\nabcdef').meta())  # newer, and all of its logits are 0
    _, after = bench(f'--shape={out_dir}', '--formats=f32,int8', '--temperature=0', '--recompute=False')
    os.remove(f'{out_dir}/int8.safetensors')
    assert after['texts']['int8'] == [[0] * 12] != after['texts']['f32']


def test_peers(tmp_path):
    """
    Binaries that only keep what they were given: the files must be as long as llama2.c's own reading of their
    headers says.
    """
    for name in ('run', 'runq'):
        path = tmp_path / name
        path.write_text('#!/bin/sh\n'
                        'head -c 64 "$1" > "$0.head"\nwc -c < "$1" > "$0.size"\nwc -c < "$3" > "$0.tokenizer"\n'
                        'echo "$@" > "$0.args"\necho "achieved tok/s: 1234.5" >&2\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    got = run('bench.py', *SHORT, '--formats=f32', '--peers=True', f'--llama2c={tmp_path}')
    assert (got.status == 0
            and ('pip install transformers' in got.err) == (importlib.util.find_spec('transformers') is None)), got.err
    rows = {(r['decoder'], r['format']): r for r in json.loads(got.out.splitlines()[-1])['rows']
            if r['decoder'] != 'transformers'}
    ours, theirs = rows['picochat alone', 'f32'], rows['llama2.c', 'int8']
    assert (list(rows)[2:] == [('picochat alone', 'f32'), ('llama2.c', 'f32'), ('llama2.c', 'int8')]
            and theirs['tok_s'] == 1234.5)
    assert (abs(theirs['params'] / ours['params'] - 1) < 0.02
            and theirs['ratio_plain_f32'] == pytest.approx(1234.5 / ours['tok_s_rounds'][-1], rel=1e-3))

    head = {name: (tmp_path / f'{name}.head').read_bytes() for name in ('run', 'runq')}
    dim, hidden, layers, heads, kv, vocab, places = header = struct.unpack('<7i', head['run'][:28])
    assert header == (192, 256, 3, 4, 4, -65, 256)      # a negative vocabulary: its classifier is not its embedding
    assert struct.unpack('<2I7iBi', head['runq'][:41]) == (0x616b3432, 2, *header[:5], 65, places, 0, 64)
    matrices = layers * (2 * dim * dim + 2 * dim * dim * kv // heads + 3 * dim * hidden) - 2 * vocab * dim
    norms = (2 * layers + 1) * dim
    assert int((tmp_path / 'run.size').read_text()) == 28 + 4 * (matrices + norms + places * dim // heads)
    assert int((tmp_path / 'runq.size').read_text()) == 256 + 4 * norms + matrices + 4 * matrices // 64
    assert matrices + norms == theirs['params'] and int((tmp_path / 'run.tokenizer').read_text()) == 4 + 9 * 65
    assert (tmp_path / 'runq.args').read_text().split()[-4:] == ['-t', '0', '-n', '18']


def test_nanochat_as_a_peer(tmp_path):
    """A nanochat that only counts: it gets our shape and prompt, and as many tokens are asked of it."""
    (tmp_path / 'nanochat').mkdir()
    (tmp_path / 'nanochat' / 'gpt.py').write_text(
        'import torch\nclass GPTConfig:\n    def __init__(self, **shape): self.shape = shape\n'
        'class GPT(torch.nn.Module):\n    def __init__(self, c):\n        super().__init__()\n'
        '        assert c.shape == dict(\n'
        '            sequence_len=256, vocab_size=65, n_layer=3, n_head=4, n_kv_head=1, n_embd=192)\n'
        '        self.w = torch.nn.Parameter(torch.zeros(7))\n')
    (tmp_path / 'nanochat' / 'engine.py').write_text(
        'from nanochat.checkpoint_manager import load_model\nimport time\nclass Engine:\n'
        '    def __init__(self, model, tokenizer): assert tokenizer.get_bos_token_id() == -1\n'
        '    def generate(self, tokens, max_tokens, temperature):\n'
        '        assert len(tokens) == 8 and temperature == 0\n'
        '        for i in range(max_tokens):\n            yield [0], [1]\n            time.sleep(0.01)\n')
    args = ['--n_kv_head=1', '--prompt_tokens=8', '--new_tokens=6', '--rounds=1', f'--nanochat={tmp_path}']
    got = run('tests/peers.py', *args)
    assert got.status == 1 and 'n_hidden (384) 4 * n_embd (192)' in got.err.splitlines()[-1]
    got = run('tests/peers.py', *args, '--n_hidden=768')
    assert got.status == 0, got.err
    row = json.loads(got.out.splitlines()[-1])['rows'][-1]
    assert row['decoder'] == 'nanochat' and row['params'] == 7 and 0 < row['tok_s_rounds'][0] < 100


def test_quality(tmp_path):
    """
    Through a float32 cache the loss is that of the whole forward; through an int8 one it is another, close by, at
    little more than a quarter of the bytes.
    """
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
    assert [rows['int8', cache]['kv_bytes_per_token'] for cache in ('float32', 'int8')] == [
        4 * 2 * 2 * 32, 2 * 2 * (32 + 2 * 4)]
    refused(run('bench.py', '--mode=quality'), r'shape \(tiny\) has random weights')


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='Linux alone says what a process takes')
def test_memory(out_dir):
    document, _ = bench(f'--shape={out_dir}', '--formats=f32', '--recompute=False', '--memory=True')
    row = document['rows'][-1]
    # places come in 64s
    assert row['file_bytes'] > 4 * 7 + row['params'] and row['cache_bytes'] == 4 * 2 * 16 * 64
    assert row['memory_bytes'] % 4096 == 0 and row['memory_ratio'] == pytest.approx(
        row['memory_bytes'] / (row['file_bytes'] + row['cache_bytes']), rel=1e-5)


TOY = ['--n_layer=1', '--n_head=1', '--n_embd=64', '--block_size=64', '--batch_size=4', '--vocab_size=1000',
       '--compile=False', '--device=cpu', '--dtype=float32']


@pytest.fixture
def load_bench(monkeypatch):
    """bench.py's functions, with the knobs given."""
    def load(*args):
        monkeypatch.setattr(sys, 'argv', ['bench.py', '--mode=memory', '--measured=False', *args])
        return runpy.run_path('bench.py')
    return load


def test_living_counts_what_exists(load_bench):
    with load_bench(*TOY)['Living']() as living:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1                                      # a view takes nothing
        assert (living.now, living.peak) == (8000, 8000)
        del a
        assert living.now == 4000
        b = b.exp() * 2         # b, its exponential and twice that: 12,000 at most, 4,000 afterwards
        assert (living.now, living.peak) == (4000, 12000)
        b.mul_(3)
        assert (living.now, living.peak) == (4000, 12000)
    del b
    assert living.now == 0


@pytest.mark.parametrize('knobs', [
    ['--dtype=bfloat16'], ['--n_kv_head=1', '--n_head=4', '--tie_weights=True', '--ema=0.9'],
    ['--dropout=0.1', '--dtype=bfloat16', '--quant_bits=8'],
    ['--multi_token_n=2', '--draft_n=2', '--total_batch_size=512'], ['--teacher=labels-absent'], ['--vocab_size=3000']])
def test_training_bytes_are_those_of_the_tensors(knobs, load_bench, monkeypatch):
    """Counted on fake tensors it is what counting on true ones gives, and what a step leaves and autograd keeps."""
    if '--vocab_size=3000' in knobs:
        monkeypatch.setattr(M, 'LOSS_CHUNK_BYTES', 2**20)            # three chunks
    g = load_bench(*TOY, *knobs)
    c = g['shape_of_config']()
    got = g['training_bytes'](c, 4)
    assert got == g['training_bytes'](c, 4, fake=False)
    model, trained, optimizers, step = g['set_up'](c, 4)
    step(trained, c.block_size, 1)
    assert (got['weights'] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            and got['optimizer'] == sum(t.nbytes for o in optimizers for state in o.state.values()
                                        for t in state.values()))
    own, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    if not g['teacher']:
        idx = torch.zeros(4, c.block_size, dtype=torch.long)
        with (torch.autocast('cpu', torch.bfloat16, enabled=g['dtype'] == 'bfloat16'),
              torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)):
            losses = sum(trained(idx, idx.clone()).values())
        assert (got['activations'] == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.05)
                and losses.isfinite())
    more = g['training_bytes'](c, 8)
    assert (more['weights'] == got['weights']
            and more['peak'] > got['peak'] > got['weights'] + got['optimizer'] + got['averages'] + got['activations'])


def test_teachers_from_files_are_counted_as_their_tensors(load_bench, tmp_path, bpe):
    """Their files hold numbers that are looked at, which fake tensors have not."""
    gpt2 = write_nanogpt(tmp_path / 'ckpt.pt', nanogpt_state(bias=False, tied=False), bias=False)
    nanochat = write_nanochat(tmp_path / 'mine', bpe)
    for spec, vocab, params in ((f'gpt2:{gpt2}', 50, sum(t.numel() for t in nanogpt_state(False, False).values())),
                                (f'nanochat:{nanochat}', 300, sum(t.numel() for t in e0_state().values()))):
        g = load_bench(*TOY, '--block_size=24', f'--vocab_size={vocab}', f'--teacher={spec}')
        got = g['training_bytes'](g['shape_of_config'](), 4)
        assert got == g['training_bytes'](g['shape_of_config'](), 4, fake=False)
        assert got['teacher'] == 4 * params and got['peak'] > got['teacher'] + got['weights']
    document, _ = bench('--mode=memory', '--plan=True', *TOY, '--block_size=24', '--vocab_size=300',
                        f'--teacher=nanochat:{nanochat}')
    assert document['rows'][0]['teacher'] == 4 * sum(t.numel() for t in e0_state().values())


def test_plan(monkeypatch, tmp_path):
    """
    Against arithmetic by hand: 49,152 weights in the trunk and 1,000 rows of 64 that are multiplied, 64 keys for each
    of 64 channels.
    """
    document, _ = bench('--mode=memory', '--plan=True', *TOY, '--max_iters=100', '--total_batch_size=512',
                        '--gpu=a100-40', '--utilisation=0.5', '--price=2')
    assert (document['params']['total'] == 12 * 64**2 + 2 * 1000 * 64
            and document['flops_per_token'] == 3 * (2 * (49152 + 64000) + 4 * 64 * 64) == 728064)
    assert (document['tokens'] == 51200 and document['tok_s'] == pytest.approx(156e12 / 728064, rel=1e-6)
            and document['assumed'] is False)
    assert (document['hours'] == pytest.approx(51200 * 728064 / 156e12 / 3600, rel=1e-6)
            and document['dollars'] == pytest.approx(2 * document['hours'], rel=1e-6))
    rows = {r['batch']: r for r in document['rows']}
    largest = document['largest_batch']
    assert (max(rows) // 2 <= largest < max(rows)
            and [r['fits'] for r in rows.values()] == [True] * (len(rows) - 1) + [False])
    assert ([r['peak'] <= 0.9 * 40e9 for r in rows.values()] == [r['fits'] for r in rows.values()]
            and rows[4]['optimizer'] == 4 * 49152 + 8 * 128000 + 8
            and rows[4]['cache'] == 4 * 64 * 2 * 64 * 4)

    # the tokens are those of the training, though so many rows do not make a step of it
    document, _ = bench('--mode=memory', '--plan=True', *TOY, '--max_iters=100', '--total_batch_size=512',
                        '--batch_size=64')
    assert document['tokens'] == 51200

    monkeypatch.setattr(M, 'LOSS_CHUNK_BYTES', 2**34)                # one chunk is simulated sooner than many
    # with no data, and without reading the teacher's files
    os.mkdir(tmp_path / 'd2')
    document, _ = bench('--mode=memory', '--plan=True', 'config/distill_d12_mqa.py', '--n_layer=2',
                        f'--teacher=nanochat:{tmp_path}/d2', '--multi_token_n=0', '--draft_n=0', '--gpu=a100-40')
    teacher = 2 * (2 * 12 * 128**2 + 65536 * 128) + 4 * 2 * 128 * 1024
    student = 3 * (2 * (2 * (10 * 768**2 + 2 * 768 * 128) + 65536 * 768) + 4 * 2 * 768 * 1024)
    assert (document['flops_per_token'] == teacher + student
            and document['rows'][0]['teacher'] == 2 * (2 * 12 * 128**2 + 65536 * 128) + 4 * 65536 * 128
            and document['assumed'] is True and document['dollars'] is None)
    # compiled, as it will run, a step takes more than the estimate
    assert all(r['compiled'] == pytest.approx(1.9 * r['peak']) and r['fits'] == (r['compiled'] <= 0.9 * 40e9)
               for r in document['rows'])


def test_proposed_shapes():
    document, _ = bench('--mode=memory', '--plan=True', '--target_params=38M', '--vocab_size=24576',
                        '--block_size=1024', '--batch_size=64', '--gpu=rtx4090')
    rows = {(r['n_layer'], r['n_embd'], r['n_head']): r for r in document['rows']}
    row = rows[4, 512, 8]                                   # config/train_38m.py
    assert (row['params'] == 37748736 and row['tokens'] == 20 * 37748736 and row['steps'] == 11520
            and row['shards'] == 14 and row['download_bytes'] == 14 * 10**8
            and row['disk_bytes'] == 14 * 55 * 10**6 * 2)
    assert all(abs(r['params'] / 38e6 - 1) < 0.2 and r['n_embd'] == 64 * r['n_head'] for r in rows.values())
    again, _ = bench('--mode=memory', '--target_params=38M', '--vocab_size=24576', '--block_size=1024',
                     '--batch_size=64', '--gpu=rtx4090')    # that it is a plan goes without saying
    assert again == document


def test_train_mode(tmp_path):
    """Its rows, and a nanoGPT that only prints: what it is called with must be our shape and our tokens."""
    (tmp_path / 'configurator.py').write_text('')
    (tmp_path / 'train.py').write_text(
        'import pickle, sys\nknobs = dict(arg[2:].split("=") for arg in sys.argv[1:])\nopen("configurator.py")\n'
        'assert pickle.load(open("data/random/meta.pkl", "rb")) == {"vocab_size": 300}\n'
        'assert [knobs[k] for k in "n_layer n_embd block_size batch_size gradient_accumulation_steps".split()] '
        '== ["1", "64", "64", "2", "3"], knobs\n'
        'for i in range(int(knobs["max_iters"]) + 1):\n'
        '    print(f"iter {i}: loss 1.0, time {900 if i < 5 else 500}.00ms, mfu 0%")\n')
    config = tmp_path / 'toy.py'
    config.write_text('n_layer, n_head, n_embd, block_size = 1, 1, 64, 64\n'
                      'batch_size, total_batch_size, muon_lr = 2, 384, 0.01\n')
    document, _ = bench('--mode=train', config, '--vocab_size=300', '--compile=False', '--steps=2', '--dtype=float32',
                        f'--peers={tmp_path}')
    rows = document['rows']
    assert ([(r['run'], r['way']) for r in rows] == [('steps', 'eager'), ('train.py', 'eager'), ('nanoGPT', 'eager')]
            and document['tokens_per_step'] == 384)
    assert (set(rows[0]['ms']) == {'data', 'forward', 'backward', 'optimizer'}
            and all(ms > 0 for ms in rows[0]['ms'].values()) and rows[0]['ratio'] == 1)
    assert rows[0]['utilisation'] == pytest.approx(
        document['flops_per_token'] * rows[0]['tok_s'] / document['gemm_tflops'] / 1e12, rel=1e-5)
    assert rows[2]['tok_s'] == 384 / 0.5 and rows[2]['ratio'] == pytest.approx(rows[1]['tok_s'] / 768, rel=1e-5)


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='Linux alone can set the peak back')
def test_memory_mode():
    document, _ = bench('--mode=memory', *TOY, '--teacher=labels-absent', '--batch_size=2')
    half, row = document['rows']                    # of 2 rows a quarter and a half are one
    assert half['batch'] == 1 and half['peak'] < row['peak']
    assert (row['batch'] == 2 and row['eager'] % 4096 == 0 and row['compiled'] is None
            and row['ratio'] == pytest.approx(row['peak'] / row['eager'], rel=1e-5))
    assert row['cache'] == 2 * 64 * 2 * 64 * 4 and row['weights'] == 4 * (49152 + 128000) + 8 * 64 * 64


def test_memory_of_a_teacher_on_disk(tmp_path):
    teacher = GPT(GPTConfig(block_size=64, vocab_size=1000, n_layer=1, n_head=1, n_embd=32))
    save_checkpoint(f'{tmp_path}/best.pt', teacher, CharTokenizer('ab').meta(), dataset='toy')
    document, _ = bench('--mode=memory', *TOY, f'--teacher={tmp_path}', '--batches=1', '--measured=False')
    assert document['rows'][0]['teacher'] == 4 * teacher.params()['total']


def test_plot(tmp_path, monkeypatch):
    logs = tmp_path / 'log.csv'
    logs.write_text('step,tokens,seconds,train_loss,val_loss,val_bpb,lr_factor,tok_s\n'
                    '10,640,1,2.5,,,1,640\n20,1280,2,2.25,2.125,3,1,640\n30,1920,3,2,2.25,3,1,640\n')
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'matplotlib', None)
        refused(run('bench.py', '--mode=plot', f'--logs={logs}'), 'pip install matplotlib')
    refused(run('bench.py', '--mode=plot', '--logs=nowhere/*.csv'), r'logs \(nowhere/\*.csv\) match no file')
    pytest.importorskip('matplotlib')
    document, _ = bench('--mode=plot', f'--logs={tmp_path}/*.csv', f'--png={tmp_path}/losses.png')
    assert document['file'] == f'{tmp_path}/losses.png'
    shutil.copy(logs, tmp_path / 'again.csv')       # a shell has spelt out --mode=plot out-*/log.csv
    assert len(bench('--mode=plot', logs, tmp_path / 'again.csv', f'--png={tmp_path}/losses.png')[0]['rows']) == 2
    document, _ = bench('--mode=plot', f'--logs={logs}', f'--png={tmp_path}/losses.png')
    assert (document['rows'] == [{'log': str(logs), 'steps': 30, 'tokens': 1920, 'train_loss': 2,
                                  'best_val_loss': 2.125}]
            and (tmp_path / 'losses.png').read_bytes()[:4] == b'\x89PNG')


@pytest.mark.parametrize('flags, pattern', [
    ('--mode=decoed', r"mode \(decoed\) must be decode"),
    ('--shape=d13', r"shape \(d13\) must be tiny, d12, or the out_dir of a trained model"),
    ('--shape=data', 'no checkpoint at data/best.pt'),
    ('--formats=f32,int3', r"formats \(f32,int3\) must be of f32, .*'int3' is not"),
    ('--formats=', 'formats'),
    ('--drafters=none,luck', r"drafters .* none, head, mtp, ngram, random; 'luck' is not"),
    ('--shape={} --drafters=head,mtp', r'drafter \(mtp\) needs a model with a multi_token head, which .* has not'),
    ('--batches=1,0', r'batches \(1,0\)'),
    ('--draft_n=16', r'draft_n \(16\) must be an int of at least 1 and at most 15'),
    ('--seed=-1', r'seed \(-1\)'),
    ('--new_tokens=0', r'new_tokens \(0\) must be an int of at least 1'),
    ('--new_tokens=400', r'prompt_tokens \(6\) \+ new_tokens \(400\) do not fit the context of 256'),
    ('--temperature=-1', r'temperature \(-1\)'),
    ('--device=nowhere', r'device \(nowhere\) cannot be used here'),
    ('--llama2c=data', 'measured with --peers=True'),
    ('--peers=True --llama2c=data', r'llama2c \(data\) has no run: .*gcc'),
    ('--bacthes=1', 'unknown key'),
    ('--mode=train --muon_rl=1', 'unknown key .*muon_lr'),
    ('--mode=train --dataset=nowhere', 'data/nowhere is not prepared, .*--vocab_size=4096'),
    ('--mode=train --init_from=x.pt', r'init_from \(x.pt\)'),
    ('--mode=train --vocab_size=65 --n_embd=30', r'n_embd \(30\) is not a multiple of n_head \(4\)'),
    ('--mode=train --vocab_size=65 --peers=data',
     r'peers \(data\) must be the folder of a copy of github.com/karpathy/nanoGPT'),
    ('--mode=train --vocab_size=65 --teacher=random:d2', r'teacher random:d2 has a vocabulary of 65,536'),
    ('--mode=memory --plan=True --vocab_size=65 --gpu=h1', r'gpu \(h1\) must be one of a100-40'),
    ('--mode=memory --plan=True --vocab_size=65 --target_params=many', r'target_params \(many\) must be'),
    ('--mode=memory --plan=True --vocab_size=65536 --target_params=1K', r'target_params \(1K\) are too few'),
    ('--mode=memory --plan=True --vocab_size=65 --target_params=1000B', r'target_params \(1000B\) .* too many'),
    ('--mode=memory --vocab_size=65 --batches=two', r'batches \(two\)'),
    ('--mode=train --vocab_size=65 --batch_size=auto', r'batch_size \(auto\) must be an int'),
    ('--mode=train --vocab_size=65 --dtype=float16', r'dtype \(float16\) must be one of auto'),
    ('--mode=train --vocab_size=65 --muon_steps=4', r'muon_steps \(4\)'),
    ('--mode=memory --vocab_size=65 --divergence=kl', r'divergence \(kl\) must be one of forward_kl')])
def test_bad_knobs(out_dir, flags, pattern):
    got = run('bench.py', *SHORT, *flags.replace('{}', out_dir).split())
    got.err = ''.join(line for line in got.err.splitlines(keepends=True) if 'pip install' not in line)
    assert not got.out
    refused(got, pattern)

# -----------------------------------------------------------------------------
# the ladder. Its rungs are made by a script that copies a checkpoint and says what a training would say, so nothing is
# trained here

MAKE = '''
import json, os, shutil, sys
model, folder, tokens, *_ = sys.argv[1:]
folder = folder.removeprefix('--out_dir=')
os.makedirs(folder, exist_ok=True)
shutil.copy(model, folder)
open('calls', 'a').write(os.path.basename(folder) + ' ')
print('step 1')
print(json.dumps({'out_dir': folder, 'iters': 1, 'tokens': int(tokens), 'seconds': 2.5, 'flops': 10 * int(tokens)}))
'''
CONFIG = """
mode = 'ladder'
ladder = 'T/out/ladder.json'
seeds = '1,2'
rungs = '''
wide        | python T/make.py T/wide/best.pt --out_dir=T/w 100
a control   | python T/make.py T/narrow/best.pt --out_dir=T/c{seed} 30
narrow      | python T/make.py T/narrow/best.pt --out_dir=T/n 30 && python T/make.py T/n/best.pt --out_dir=T/m 7
int4        | python quantize.py --out_dir=T/w --bits=4 --method=rtn --save_dir=T/w4 --device=cpu
'''
"""


@pytest.fixture
def climb(tmp_path):
    """
    climb(*flags, old='', new='') -> a run of CONFIG with old replaced by new. climb.folder holds its two models;
    climb.calls() says what was made.
    """
    data = make_dataset(tmp_path / 'toy').split('=')[1]
    meta = json.load(open(f'{data}/meta.json'))
    for name, width, draft_n in (('wide', 16, 0), ('narrow', 8, 2)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=width, vocab_size=len(meta['chars']), block_size=32,
                              draft_n=draft_n))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        save_checkpoint(f'{tmp_path}/{name}/best.pt', model, {'kind': 'char', 'chars': meta['chars']}, dataset=data)
    (tmp_path / 'make.py').write_text(MAKE.replace('calls', f'{tmp_path}/calls'))

    def f(*flags, old='', new=''):
        (tmp_path / 'ladder.py').write_text(CONFIG.replace(old, new).replace('T/', f'{tmp_path}/'))
        got = run('bench.py', f'{tmp_path}/ladder.py', *SHORT, '--timed=none', *flags)
        got.err = got.err[got.err.rfind('error: '):] if got.status else got.err      # without what it said on the way
        return got
    f.folder, f.calls = tmp_path, lambda: (tmp_path / 'calls').read_text().split()
    return f


def test_a_ladder_is_built_once_measured_and_checked(climb, monkeypatch):
    got, at = climb('--timed=all'), climb.folder
    assert got.status == 0, got.err
    rows = json.loads(got.out.splitlines()[-1])['rows']
    assert ([(r['name'], r['seed']) for r in rows] == [('wide', None), ('a control', 1), ('a control', 2),
                                                       ('narrow', None), ('int4', None)]
            and climb.calls() == ['w', 'c1', 'c2', 'n', 'm'])
    assert (at / 'out' / 'narrow.log').read_text().count('step 1') == 2         # of both its commands
    # int4's figures are those of what it rounds
    assert ([r['train_tokens'] for r in rows] == [100, 30, 30, 37, 100] and rows[3]['train_flops'] == 370
            and rows[4]['train_seconds'] == 2.5)
    wide, narrow = (load_model(f'{at}/{name}/best.pt')[0] for name in ('wide', 'narrow'))
    for row, model in zip(rows, (wide, narrow, narrow, narrow, load(f'{at}/w4/int4.safetensors')[0])):
        assert row['val_loss'] == pytest.approx(
            evaluate(model, Loader(f'{at}/toy', 'val', 16, 32).eval_batches())['loss'], rel=1e-6)
        assert row['bytes'] == os.path.getsize(row['file']) and row['kv_bytes_per_token'] == model.kv_bytes_per_token()
    assert [r['params'] for r in rows] == [m.params()['total'] for m in (wide, narrow, narrow, narrow, wide)]
    assert (rows[0]['tok_s'] > 0 and 'tok_s_speculative' not in rows[0] and rows[3]['tok_s_speculative'] > 0
            and rows[3]['tokens_per_verify'] >= 1 and 'speculation_exact' in rows[3])
    assert 'tok_s' not in rows[2]                                                # of several seeds the first is timed

    # compiled rounds are the same function, so without a compiler their texts are the plain ones
    monkeypatch.setattr(torch, 'compile', lambda f, **how: f)
    monkeypatch.setattr(M, 'can_compile', lambda device: True)
    got = climb('--timed=narrow,int4', '--compiled=narrow,int4')
    rows = json.loads(got.out.splitlines()[-1])['rows']
    assert (rows[3]['same_texts_compiled'] == rows[4]['same_texts_compiled'] == 1
            and 0 <= rows[3]['same_texts_speculative_compiled'] <= 1 and rows[4]['tok_s_compiled'] > 0)

    # with another cache it is another loss; nothing is built twice
    got = climb('--int8_cache=int4')
    model = load(f'{at}/w4/int4.safetensors')[0]
    batches = Loader(f'{at}/toy', 'val', 16, 32).eval_batches()
    loss = evaluate(model, batches, make_cache=lambda n: KVCache(model.config, n, dtype=torch.int8))['loss']
    row = json.loads(got.out.splitlines()[-1])['rows'][4]
    assert row['kv_bytes_per_token'] == model.kv_bytes_per_token(int8=True)
    assert row['val_loss'] == pytest.approx(loss, rel=1e-6) and row['val_loss'] != rows[4]['val_loss']
    assert 'nothing changed' in climb(f'--check={at}/out/ladder.json').out       # as it was recorded, with that cache
    assert climb().status == 0 and len(climb.calls()) == 5
    check = f'--check={at}/out/ladder.json'
    got = climb(check)
    assert got.status == 0 and 'nothing changed' in got.out, got.err
    shutil.copy(f'{at}/wide/best.pt', rows[3]['file'])                           # somebody else trains there
    assert 'narrow: val_loss was' in climb(check).out
    # what somebody else trained is not lost either
    refused(climb(), "rung 'narrow' would replace what is in .*/n, and is not as a ladder made it")
    shutil.rmtree(f'{at}/n')
    refused(climb(), "rung 'narrow' would replace what is in .*/m,")
    assert len(climb.calls()) == 5
    shutil.rmtree(f'{at}/m')
    assert climb().status == 0 and climb.calls()[5:] == ['n', 'm']  # what is missing is built, and nothing else


def test_a_ladder_is_drawn(climb):
    pytest.importorskip('matplotlib')
    assert climb('--timed=all').status == 0 and (climb.folder / 'out' / 'ladder.png').read_bytes()[:4] == b'\x89PNG'


def test_what_is_made_from_a_rung_is_made_again_with_it(climb):
    climb()
    read = lambda: {(r['name'], r['seed']): r['mtime']
                    for r in json.load(open(f'{climb.folder}/out/ladder.json'))['rows']}
    before = read()
    os.remove(f'{climb.folder}/w/best.pt')
    climb()
    assert (climb.calls()[5:] == ['w']
            and {key for key, mtime in read().items() if mtime != before[key]} == {('wide', None), ('int4', None)})
    # a ladder that was stopped between the two goes on with the second
    record = f'{climb.folder}/out/ladder.json'
    document = json.load(open(record))
    wide, int4 = document['rows'][0], document['rows'][-1]
    os.utime(wide['file'])
    with open(record, 'w') as f:
        json.dump(document | {'rows': [wide | {'mtime': os.path.getmtime(wide['file'])}, *document['rows'][1:]]}, f)
    assert climb().status == 0 and read()['int4', None] > int4['mtime'] and len(climb.calls()) == 6


def test_labels_are_written_again_for_a_teacher_that_is_new(climb):
    """And only they are removed for it. What they cost is counted in what learns from them, not what is beside."""
    at = climb.folder
    (at / 'label.py').write_text('''
import json, os, sys
folder = sys.argv[1].removeprefix('--out_dir=')
os.mkdir(folder)                # as distill.py, it replaces nothing
open(folder + '/labels.bin', 'w').write('labels')
print(json.dumps({'file': folder + '/labels.bin', 'tokens': 9, 'seconds': 1.0, 'flops': 7}))
''')
    lines = '''            | python T/label.py --out_dir=T/labels --teacher=T/w
student     | python T/make.py T/narrow/best.pt --out_dir=T/n 30 --teacher=T/labels
goes on     | python T/make.py T/narrow/best.pt --out_dir=T/m 5 --init_from=T/n/best.pt --teacher=T/labels'''
    narrow = next(line for line in CONFIG.splitlines() if line.startswith('narrow'))
    rows = json.loads(climb(old=narrow, new=lines).out.splitlines()[-1])['rows']
    assert {r['name']: r['train_flops'] for r in rows if r['name']} == {
        'wide': 1000, 'a control': 300, 'student': 307, 'goes on': 357, 'int4': 1000}
    (at / 'labels' / 'mine').write_text('')
    (at / 'w' / 'mine').write_text('')
    os.remove(at / 'w' / 'best.pt')
    assert climb(old=narrow, new=lines).status == 0 and climb.calls() == ['w', 'c1', 'c2', 'n', 'm', 'w', 'n', 'm']
    assert os.listdir(at / 'labels') == ['labels.bin'] and (at / 'w' / 'mine').exists()


def test_a_ladder_keeps_what_the_scripts_would_replace(climb):
    """Where they write is known without --out_dir= and --save_dir=, too."""
    os.makedirs(f'{climb.folder}/wide-pruned')
    shutil.copy(f'{climb.folder}/narrow/best.pt', f'{climb.folder}/wide-pruned')
    line = 'a control   | python T/make.py T/narrow/best.pt --out_dir=T/c{seed} 30'
    pruned = f'pruned | python prune.py --out_dir={climb.folder}/wide --neuron_prune_ratio=0.5'
    refused(climb(old=line, new=pruned), "rung 'pruned' would replace what is in .*/wide-pruned")
    refused(climb(old=line, new='data | python -c pass'), "rung 'data': its command names no model file")


def test_a_ladder_keeps_its_own_rungs(climb, monkeypatch):
    """Those that a run does not ask for, and those that another ladder has built again."""
    record = f'{climb.folder}/out/ladder.json'
    assert climb().status == 0
    shutil.copytree(f'{climb.folder}/out', f'{climb.folder}/other')
    rows = json.loads(climb('--seeds=1').out.splitlines()[-1])['rows']
    assert [r['seed'] for r in rows] == [None, 1, None, None] and json.load(open(record))['others'][0]['seed'] == 2
    assert climb().status == 0 and json.load(open(record))['others'] == [] and len(climb.calls()) == 5
    os.remove(f'{climb.folder}/w/best.pt')
    assert climb().status == 0 and climb.calls()[5:] == ['w']
    monkeypatch.setattr(glob, 'glob', lambda pattern: [record])
    assert climb(f'--ladder={climb.folder}/other/ladder.json').status == 0 and len(climb.calls()) == 6


def test_what_a_rung_cost_does_not_hang_on_the_order_of_its_flags(climb):
    line = next(line for line in CONFIG.splitlines() if line.startswith('narrow'))
    new = 'narrow | python T/make.py T/narrow/best.pt --out_dir=T/n 30 --teacher=T/w --init_from=T/w/best.pt'
    rows = json.loads(climb(old=line, new=new).out.splitlines()[-1])['rows']
    assert [r['train_tokens'] for r in rows if r['name'] == 'narrow'] == [130]


def test_a_command_that_says_nothing_costs_nothing(climb):
    (climb.folder / 'silent.py').write_text('')
    rows = json.loads(climb(old='T/w 100', new='T/w 100 && python T/silent.py').out.splitlines()[-1])['rows']
    assert rows[0]['train_tokens'] == 100 and 'silent.py' in (climb.folder / 'out' / 'wide.log').read_text()


def test_ladders_that_cannot_stand(climb):
    record = f'{climb.folder}/out/ladder.json'
    refused(climb(old='narrow/best.pt --out_dir=T/c', new='nowhere.pt --out_dir=T/c'),
            "rung 'a control'.*nowhere.pt.*a-control-1.log")
    assert [r['name'] for r in json.load(open(record))['rows']] == ['wide']      # what was built stays
    os.makedirs(f'{climb.folder}/c1', exist_ok=True)
    shutil.copy(f'{climb.folder}/narrow/best.pt', f'{climb.folder}/c1')          # half a training, stopped
    # the ladder was not at this command, so it cannot know whose that is
    assert climb().status == 1 and climb.calls()[-1] == 'w'
    command = f'python {climb.folder}/make.py {climb.folder}/narrow/best.pt --out_dir={climb.folder}/c1 30'
    document = json.load(open(record))
    with open(record, 'w') as f:
        json.dump(document | {'building': command}, f)
    assert climb().status == 0 and climb.calls()[1:] == ['c1', 'c2', 'n', 'm']   # the one that it was at is begun again
    refused(climb(old='| python T/make.py T/wide', new='| ruby T/make.py T/wide'), 'is not')
    refused(run('bench.py', '--mode=ladder'), 'none are given')
    for check in ('nowhere.json', climb.folder):
        refused(run('bench.py', '--mode=ladder', f'--check={check}'), f'{check}')
    empty = climb.folder / 'empty.json'
    empty.write_text('{"rows": []}')
    refused(run('bench.py', '--mode=ladder', f'--check={empty}'), 'records no rung')
    for knob in ('timed', 'compiled', 'int8_cache'):
        refused(climb(f'--{knob}=wide,thin'), f"{knob}.*'thin', which is no rung")
    refused(climb('--timed='), 'timed')
    refused(climb('--seeds=one'), 'seeds')
    meta = f'{climb.folder}/toy/meta.json'
    document = json.load(open(meta))
    with open(meta, 'w') as f:
        json.dump(document | {'chars': document['chars'][:-1] + 'z'}, f)
    refused(climb(f'--check={record}'), 'has another tokenizer than .*w/best.pt was trained with')
    os.remove(f'{climb.folder}/w/best.pt')
    refused(climb(f'--check={record}'), 'build the ladder again')


def test_ladders_share_rungs_by_the_same_words():
    """A ladder knows what another one has built by its command: two that write the same folder must be equal."""
    made = {}
    for path in sorted(glob.glob('config/ladder_*.py')):
        knobs = runpy.run_path(path)
        for line in filter(str.strip, knobs['rungs'].splitlines()):
            command = line.partition('|')[2].strip()
            for seed in knobs.get('seeds', '1337').split(',') if '{seed}' in command else ['']:
                train, *_ = whole = command.replace('{seed}', seed).split('&&')
                folder = re.findall(r'--(?:save_dir|out_dir)=(\S+)', train)
                if 'quantize.py' not in train and folder:
                    assert made.setdefault(folder[-1], whole) == whole, path
    assert len(made) > 50


def test_welch(climb):
    """
    Against a table of Student's distribution: with four degrees of freedom, 2.776 is exceeded with probability 0.05
    and 4.604 with 0.01.
    """
    welch = climb().names['welch']
    for t, p in ((2.776, 0.05), (4.604, 0.01)):
        a = [0.0, 1.0, 2.0]                 # of variance 1: two such means differ with deviation (2/3)^0.5
        assert welch(a, [x + t * (2 / 3) ** 0.5 for x in a]) == pytest.approx(p, rel=2e-3)
    assert welch([1.0], [1.0, 2.0]) is None and welch([1.0, 1.0], [1.0, 1.0]) == 1.0
