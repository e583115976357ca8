"""bench.py: the document it ends with, the text it watches over, its peers, what it counts of a training."""
import contextlib
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import data.bench.estimate
import model as M
from conftest import LLAMA, TEXTS, TOK, V, make_dataset, randomise, refused, result_of, run
from data.bench.decoding import quality
from data.bench.estimate import Training, training_bytes
from data.checkpoint import config_from, load_model, save_checkpoint
from data.foreign.export import export_gguf, export_hf
from data.loader import Loader
from data.machine import autocast
from data.rounding import convert
from data.tokenizer import CharTokenizer, from_meta
from data.writer import write_texts
from engine import Engine, Sampling
from model import GPT, GPTConfig, evaluate
from quantize import export

pytestmark = pytest.mark.usefixtures('in_process')

SHORT = ['--device=cpu', '--rounds=1', '--prompt_tokens=6', '--new_tokens=12', '--memory=False']
ROW = {'decoder', 'shape', 'format', 'drafter', 'batch', 'tok_s', 'tok_s_rounds', 'ratio_plain_f32', 'ratio_recompute',
       'ratio_no_drafts', 'first_token_ms', 'gb_s', 'share_of_bandwidth', 'rows_cost', 'tokens_per_verify', 'accepted',
       'kv_bytes_per_token', 'weight_bytes', 'params', 'memory_bytes', 'file_bytes', 'cache_bytes', 'memory_ratio'}


def bench(*args):
    """A run that must succeed -> its document."""
    return result_of(run('bench.py', *SHORT, *args))


@pytest.fixture
def texts(monkeypatch):
    """A list that grows by (prompts, texts) whenever an engine completes something."""
    honest, seen = Engine.complete, []

    def complete(self, prompts, *args, **how):
        rows = honest(self, prompts, *args, **how)
        seen.append((prompts, rows))
        return rows
    monkeypatch.setattr(Engine, 'complete', complete)
    return seen


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    model = randomise(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=7, block_size=32, draft_n=2)), 0.3)
    folder = tmp_path_factory.mktemp('out')
    save_checkpoint(f'{folder}/best.pt', model, CharTokenizer('\nabcdef').meta())
    return str(folder)

# ----- decode and quality

def test_the_document_and_the_text(texts):
    document = bench('--formats=f32,int8,int8-packed,bf16-packed', '--drafters=random,ngram', '--batches=2,1')
    rows = document['rows']
    assert set(document) == {'mode', 'machine', 'bandwidth_gb_s', 'rows'}
    assert {'cpu', 'threads', 'torch'} <= set(document['machine'])
    assert [(r['format'], r['drafter'], r['batch']) for r in rows if r['decoder'] == 'picochat'] == [
        (f, d, b) for f in ('f32', 'int8', 'int8-packed', 'bf16-packed')
        for d in ('none', 'random', 'ngram') for b in (1, 2)]
    assert rows[-1]['decoder'] == 'no cache' and rows[-1]['ratio_recompute'] == 1.0
    assert all(set(r) == ROW for r in rows) and rows[0]['ratio_plain_f32'] == 1.0
    assert set(rows[0]['rows_cost']) == {'2', '4', '5', '8'} and all(r['tok_s'] > 0 for r in rows)
    assert all(r['tokens_per_verify'] == 1 if r['drafter'] == 'none' else sum(r['accepted']) > 0 for r in rows[:-1])
    # weights a pass: 3 layers of 4 * 192^2 + 2 * 192 * 384, and 65 rows of 192; and a row of 192 of the embedding
    scales = 3 * (5 * 192 + 384) + 65  # kernels read a sum of each row, too
    assert [rows[i]['weight_bytes'] for i in (0, 6, 12, 18)] == [
        4 * 897216 + 4 * 192, 897216 + 4 * scales + 192 + 4, 897216 + 8 * scales + 192 + 4, 2 * 897216 + 4 * 192]

    shapes = dict(n_layer=3, n_head=4, n_embd=192, n_hidden=384, vocab_size=65, block_size=256)
    engine, noise = Engine(GPT(GPTConfig(**shapes))), torch.Generator().manual_seed(1337)  # the same weights, here
    for p in engine.model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=noise)
    prompts, plain = texts[0]
    assert len(plain[0]) == 12 and plain == engine.complete(prompts, 12, Sampling(temperature=0))


def test_prompts_from_a_text(out_dir, texts, tmp_path):
    (tmp_path / 'text').write_text('abcdef' * 5)
    how = f'--shape={out_dir}', f'--texts=mine={tmp_path}/text', '--formats=f32', '--recompute=False'
    document = bench(*how, '--drafters=ngram', '--rounds=2')
    plain, drafted = document['rows']
    assert drafted['ratio_no_drafts'] > 0 and plain['ratio_no_drafts'] is None
    ids = [1, 2, 3, 4, 5, 6] * 5
    places = [0, 8, 16]  # of 24 that there are
    assert [prompts for prompts, _ in texts] == [[ids[at:at + 6]] for at in places for _ in range(2)]
    got = run('bench.py', *SHORT, *how, '--text_bytes=7')
    assert got.status == 1 and 'have 7 tokens, too few for 2 prompts of 6' in got.err


def test_another_text_is_an_error_with_the_numbers(monkeypatch, tmp_path):
    honest = Engine.complete
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=65, block_size=32))
    save_checkpoint(f'{tmp_path}/best.pt', model, CharTokenizer(map(chr, range(65))).meta())

    def cheat(self, prompts, n, sampling, speculation=None, **how):
        rows = honest(self, prompts, n, sampling, speculation, **how)
        return [[(row[0] + 1) % 65] + row[1:] for row in rows] if speculation.drafter == 'random' else rows
    with monkeypatch.context() as m:
        m.setattr(Engine, 'complete', cheat)
        got = run('bench.py', *SHORT, '--formats=f32', '--drafters=none,ngram,random')
    assert got.status == 1
    assert ('error: another text than the plain row: format f32, drafter random, batch 1, sequence 0: token 0 is'
            in got.err)
    assert 'ngram' not in got.err and len(json.loads(got.out.splitlines()[-1])['rows']) == 4
    # zeros, as all weights begin: any two tokens tie
    bench(f'--shape={tmp_path}', '--temperature=0', '--formats=f32', '--drafters=random')


def test_a_trained_model(out_dir, texts):
    document = bench(f'--shape={out_dir}', '--drafters=head', '--formats=int8', '--batches=2')
    assert [(r['format'], r['drafter'], r['batch']) for r in document['rows']] == [
        ('f32', 'none', 1), ('int8', 'none', 2), ('int8', 'head', 2), ('f32', 'none', 1)]
    prompts = next(prompts for prompts, _ in texts if len(prompts) == 2)  # it has written them itself
    assert all(len(p) == 6 and p[0] == 0 for p in prompts) and prompts[0] != prompts[1]
    model = convert(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=7, block_size=32)))
    path = f'{out_dir}/int8.safetensors'
    export(path, model, CharTokenizer('\nabcdef').meta())  # newer, and all of its logits are 0
    bench(f'--shape={out_dir}', '--formats=f32,int8', '--temperature=0', '--recompute=False')
    assert texts[-1][1] == [[0] * 12] != texts[-2][1]
    os.utime(path, (1, 1))
    got = run('bench.py', *SHORT, f'--shape={out_dir}', '--formats=f32,int8', '--temperature=0', '--recompute=False')
    os.remove(path)
    assert 'int8.safetensors is older than' in got.err and texts[-1][1] != [[0] * 12]


def test_quality(tmp_path):
    dataset = make_dataset(tmp_path / 'toy').partition('=')[2]
    loader = Loader(dataset, 'val', 16, 32)
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=len(loader.meta['chars']), block_size=32)
    model = randomise(GPT(shape), 0.3)
    save_checkpoint(f'{tmp_path}/best.pt', model, loader.meta, dataset=dataset)
    expected = evaluate(model, loader.eval_batches(), CharTokenizer(loader.meta['chars']).token_bytes)
    document = bench('--mode=quality', f'--shape={tmp_path}', '--formats=f32,int8')
    cached = quality(model, dataset, CharTokenizer(loader.meta['chars']), torch.float32)
    assert cached['val_loss'] == pytest.approx(expected['loss'], rel=1e-6)
    rows = {(r['format'], r['cache']): r for r in document['rows']}
    assert list(rows) == [(f, cache) for f in ('f32', 'int8') for cache in ('float32', 'int8')]
    assert all(rows['f32', 'float32'][f'val_{k}'] == pytest.approx(expected[k], rel=1e-6) for k in ('loss', 'bpb'))
    for f in ('f32', 'int8'):
        assert 0 < abs(rows[f, 'int8']['val_loss'] - rows[f, 'float32']['val_loss']) < 0.01
    assert [rows['int8', cache]['kv_bytes_per_token'] for cache in ('float32', 'int8')] == [
        4 * 2 * 2 * 32, 2 * 2 * (32 + 2 * 4)]


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='Linux alone says what a process takes')
def test_memory(out_dir, monkeypatch):
    monkeypatch.undo()  # what a process takes is measured in a fresh one
    document = bench(f'--shape={out_dir}', '--formats=f32', '--recompute=False', '--memory=True')
    row = document['rows'][-1]
    assert row['file_bytes'] > 4 * 7 + row['params'] and row['cache_bytes'] == 4 * 2 * 16 * 64  # places come in 64s
    assert row['memory_bytes'] % 4096 == 0
    least = row['file_bytes'] + row['cache_bytes']
    assert row['memory_ratio'] == pytest.approx(row['memory_bytes'] / least, rel=1e-5)

# ----- other programs

def test_transformers_as_a_peer():
    pytest.importorskip('transformers')
    rows = result_of(run('tests/peers.py', '--prompt_tokens=8', '--new_tokens=6', '--rounds=1'))['rows']
    assert [(r['decoder'], r['format']) for r in rows] == [('transformers', 'f32'), ('transformers', 'bf16')]


@pytest.fixture(scope='module')
def llama_dir(tmp_path_factory):
    shape = LLAMA | dict(out_proj=False, n_layer=2, n_head=2, n_embd=32, n_hidden=64, vocab_size=V, block_size=64)
    model, folder = randomise(GPT(GPTConfig(**shape)), 0.4), tmp_path_factory.mktemp('llama')
    for i in range(V):
        if i in TOK.special_ids or not all(32 <= byte < 127 for byte in TOK.decode_bytes([i])):
            model.transformer.wte.weight.data[i] = 0
    save_checkpoint(f'{folder}/best.pt', model, TOK.meta())
    return str(folder)


def test_what_formats_cost_beside_llama_cpps(llama_dir, tmp_path):
    pytest.importorskip('gguf')
    model, state = load_model(f'{llama_dir}/best.pt')
    with contextlib.redirect_stdout(None):
        meta = write_texts(f'{tmp_path}/toy', TEXTS, TEXTS, 'bpe', 'toy', tokenizer=from_meta(state['tokenizer']))
    os.makedirs(tmp_path / 'out')
    save_checkpoint(f'{tmp_path}/out/best.pt', model, meta, dataset=f'{tmp_path}/toy')
    file = f'{tmp_path}/int4.safetensors'  # as another program or training may have made it
    size = export(file, convert(load_model(f'{llama_dir}/best.pt')[0], 4), meta)
    how = '--mode=quality', f'--shape={tmp_path}/out', '--caches=float32'
    rows = bench(*how, f'--formats=f32,int8,int4,{file},q8_0,q4_1,q4_0')['rows']
    assert {row['cache'] for row in rows} == {'float32'}
    rows = {row['format']: row for row in rows}
    assert list(rows) == ['f32', 'int8', 'int4', file, 'q8_0', 'q4_1', 'q4_0'] and rows['f32']['mean_kl'] == 0
    assert rows[file] == rows['int4'] | {'format': file, 'bytes': size}
    export(file, convert(load_model(f'{llama_dir}/best.pt')[0], 4), {'kind': 'char', 'chars': 'ab'})
    refused(run('bench.py', *how, f'--formats=f32,{file}'), 'has another tokenizer than')
    assert 0 < rows['q8_0']['mean_kl'] < rows['q4_1']['mean_kl'] < rows['q4_0']['mean_kl']
    assert rows['q8_0']['bytes'] > rows['q4_1']['bytes'] > rows['q4_0']['bytes']
    assert 0 < rows['int8']['mean_kl'] < rows['q4_0']['mean_kl']


def test_others_write_the_same_text_with_the_same_weights(llama_dir, tmp_path):
    for package in ('gguf', 'safetensors', 'transformers', 'xllamacpp'):
        pytest.importorskip(package)
    model, state = load_model(f'{llama_dir}/best.pt')
    tokenizer, prompt = from_meta(state['tokenizer']), [5, 17, 40, 99, 120]
    expected, = Engine(model).complete([prompt], 12, Sampling(temperature=0))
    for program in (('picochat', 'f32', ''), ('transformers', 'f32', export_hf(model, tokenizer, f'{tmp_path}/hf')),
                    ('llama.cpp', 'f16', export_gguf(model, tokenizer, f'{tmp_path}/f16.gguf', 'f16'))):
        got = run('tests/same_weights.py', f'--shape={llama_dir}', '--threads=1', f'--program={json.dumps(program)}',
                  stdin=json.dumps({'prompt': prompt, 'n': 12, 'text': True}))
        answer = result_of(got)
        assert answer['text'] == expected, program
        assert answer['tok_s'] > 0 and answer['first_seconds'] > 0
    assert len(set(expected)) > 3


def test_train_mode(tmp_path):
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
    document = bench('--mode=train', config, '--vocab_size=300', '--compile=False', '--steps=2', '--dtype=float32',
                     f'--nanogpt={tmp_path}')
    rows = document['rows']
    assert [(r['run'], r['way']) for r in rows] == [('steps', 'eager'), ('train.py', 'eager'), ('nanoGPT', 'eager')]
    assert document['tokens_per_step'] == 384 and rows[0]['ratio'] == 1
    assert set(rows[0]['ms']) == {'data', 'forward', 'backward', 'optimizer'} and min(rows[0]['ms'].values()) > 0
    assert rows[0]['utilisation'] == pytest.approx(
        document['flops_per_token'] * rows[0]['tok_s'] / document['gemm_tflops'] / 1e12, rel=1e-5)
    assert rows[2]['tok_s'] == 384 / 0.5 and rows[2]['ratio'] == pytest.approx(rows[1]['tok_s'] / 768, rel=1e-5)

# ----- what a training takes

TOY = ['--n_layer=1', '--n_head=1', '--n_embd=64', '--block_size=64', '--batch_size=4', '--vocab_size=1000',
       '--compile=False', '--device=cpu', '--dtype=float32']


@pytest.mark.parametrize('changed', [
    dict(dtype='bfloat16'), dict(n_kv_head=1, n_head=4, tie_weights=True, ema=0.9),
    dict(dropout=0.1, dtype='bfloat16', quant_bits=8), dict(multi_token_n=2, draft_n=2, total_batch_size=512),
    dict(teacher='labels-absent'), dict(chunks=3),
    LLAMA | dict(n_kv_head=1, n_head=2, quant_bits=4)])
def test_training_bytes_are_those_of_the_tensors(changed, monkeypatch):
    vocab_size = 1000
    if changed.pop('chunks', 0):
        monkeypatch.setattr(M, 'LOSS_CHUNK_BYTES', 2**20)
        vocab_size = 3000
    knobs = json.loads(run('train.py', *TOY[:5], *TOY[6:], '--knobs').out) | changed
    shape = {key: value for key, value in knobs.items() if key in GPTConfig.__dataclass_fields__}
    t, c = SimpleNamespace(**knobs), config_from(shape | {'vocab_size': vocab_size}, 'the test')
    got = training_bytes(t, c, 4)
    assert got == training_bytes(t, c, 4, fake=False)
    training = Training(t, c, 4)
    training.step(training.trained, c.block_size, 1)
    own = [*training.model.parameters(), *training.model.buffers()]
    states = [state for o in training.optimizers for state in o.state.values()]
    assert got['weights'] == sum(x.nbytes for x in own)
    assert got['optimizer'] == sum(x.nbytes for state in states for x in state.values())
    known, kept = {x.untyped_storage().data_ptr() for x in own}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    if not t.teacher:
        idx = torch.zeros(4, c.block_size, dtype=torch.long)
        with autocast('cpu', t.dtype), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses = sum(training.trained(idx, idx.clone()).values())
        assert losses.isfinite()
        assert got['activations'] == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.05)
    more = training_bytes(t, c, 8)
    least = got['weights'] + got['optimizer'] + got['averages'] + got['activations']
    assert more['weights'] == got['weights'] and more['peak'] > got['peak'] > least


def test_plan(monkeypatch):
    for module in (M, data.bench.estimate):  # one chunk is simulated sooner than many
        monkeypatch.setattr(module, 'LOSS_CHUNK_BYTES', 2**34)
    with monkeypatch.context() as m:  # and few rows sooner than those that fit 40 GB
        m.setitem(data.bench.estimate.GPUS, 'a100-40', ('A100', 40e7))
        document = bench('--mode=memory', '--plan=True', *TOY, '--max_iters=100', '--total_batch_size=512',
                         '--gpu=a100-40', '--utilisation=0.5', '--price=2')
    assert document['params']['total'] == 12 * 64**2 + 2 * 1000 * 64
    assert document['flops_per_token'] == 3 * (2 * (49152 + 64000) + 4 * 64 * 64) == 728064
    assert document['tokens'] == 51200 and document['assumed'] is False
    assert document['tok_s'] == pytest.approx(156e12 / 728064, rel=1e-6)
    assert document['hours'] == pytest.approx(51200 * 728064 / 156e12 / 3600, rel=1e-6)
    assert document['dollars'] == pytest.approx(2 * document['hours'], rel=1e-6)
    rows = {r['batch']: r for r in document['rows']}
    assert max(rows) // 2 <= document['largest_batch'] < max(rows)
    assert [r['fits'] for r in rows.values()] == [True] * (len(rows) - 1) + [False]
    assert [r['peak'] <= 0.9 * 40e7 for r in rows.values()] == [r['fits'] for r in rows.values()]
    assert rows[4]['optimizer'] == 4 * 49152 + 8 * 128000 + 8 and rows[4]['cache'] == 4 * 64 * 2 * 64 * 4


def test_proposed_shapes():
    document = bench('--mode=memory', '--target_params=38M', '--vocab_size=24576', '--block_size=1024',
                     '--batch_size=64', '--gpu=rtx4090')  # that it is a plan goes without saying
    rows = {(r['n_layer'], r['n_embd'], r['n_head']): r for r in document['rows']}
    row = rows[4, 512, 8]  # config/train_38m.py
    assert (row['params'], row['tokens'], row['steps']) == (37748736, 20 * 37748736, 11520)
    assert (row['shards'], row['download_bytes'], row['disk_bytes']) == (14, 14 * 10**8, 14 * 55 * 10**6 * 2)
    assert all(abs(r['params'] / 38e6 - 1) < 0.2 and r['n_embd'] == 64 * r['n_head'] for r in rows.values())


def test_plot(tmp_path, monkeypatch):
    logs = tmp_path / 'log.csv'
    logs.write_text('step,tokens,seconds,train_loss,val_loss,val_bpb,lr_factor,tok_s\n'
                    '10,640,1,2.5,,,1,640\n20,1280,2,2.25,2.125,3,1,640\n30,1920,3,2,2.25,3,1,640\n')
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'matplotlib', None)
        refused(run('bench.py', '--mode=plot', f'--logs={logs}'), 'pip install matplotlib')
    refused(run('bench.py', '--mode=plot', '--logs=nowhere/*.csv'), r'logs \(nowhere/\*.csv\) match no file')
    pytest.importorskip('matplotlib')
    head, torn = 'step,tokens,train_loss,val_loss', tmp_path / 'torn.csv'
    for text in ('', head, f'{head}\n1', f'{head}\n1,x,2,', f'{head}\n{"9" * 400},{"9" * 400},2,', f'{head}\n1,2,"',
                 'tokens,train_loss,val_loss\n1,2,3', '\xff', f'{head}\n"{"x" * 200_000}"'):
        torn.write_text(text, encoding='latin-1')
        refused(run('bench.py', '--mode=plot', f'--logs={torn}'), 'torn.csv has no line yet, or is no log.csv')
    shutil.copy(logs, tmp_path / 'again.csv')  # a shell has spelt out --mode=plot out-*/log.csv
    assert len(bench('--mode=plot', logs, tmp_path / 'again.csv', f'--png={tmp_path}/losses.png')['rows']) == 2
    document = bench('--mode=plot', f'--logs={tmp_path}/log.*', f'--png={tmp_path}/losses.png')
    assert document['rows'] == [
        {'log': str(logs), 'steps': 30, 'tokens': 1920, 'train_loss': 2, 'best_val_loss': 2.125}]
    assert document['file'] == f'{tmp_path}/losses.png' and (tmp_path / 'losses.png').read_bytes()[:4] == b'\x89PNG'
