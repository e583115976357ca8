"""On a GPU: the CPU's results, CUDA graphs with the eager text, and the scripts. Skipped where there is none."""
import copy
import os

import pytest
import torch
from torch._inductor.cudagraph_trees import get_manager

import data.rounding as R
from conftest import CHAR, make_dataset, result_of, run, train, with_heads
from data.layouts import for_decoding
from data.sampling import first_difference
from engine import Engine, Sampling, Speculation
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')


@pytest.fixture(autouse=True)
def float32_is_float32():
    torch.set_float32_matmul_precision('highest')  # train.py, in this process, lowers it


def on_gpu(model):
    return copy.deepcopy(model).to('cuda')


def nearly(model, prompt, plain, other):
    """Whether other is plain, or differs first where one activation, rounded to the next integer, can make it so."""
    found = first_difference(model, prompt, plain, other, temperature=0.8, seed=9)
    return found is None or found[1] < 0.1


@pytest.mark.parametrize('K', [64, 1100, 36])  # 36 is no multiple of 8: products in float32
@pytest.mark.parametrize('M', [1, 5, 17, 40])
def test_products_of_integers_are_exact(M, K):
    g = torch.Generator().manual_seed(M + K)
    x, w = (torch.randint(-127, 128, (n, K), generator=g) for n in (M, 96))
    got = R.int_matmul(x.float().cuda(), w.to(torch.int8).cuda())
    assert torch.equal(got.cpu().long(), x @ w.T)


@pytest.mark.parametrize('bits', [0, 8, 4])
@pytest.mark.parametrize('kv', [4, 2, 1])
def test_logits_are_the_cpus(kv, bits):
    model = with_heads(CHAR, kv)
    model = R.convert(model, bits) if bits else model
    ids = torch.randint(96, (3, 90))
    with torch.no_grad():
        mine, its = model(ids), on_gpu(model)(ids.cuda()).cpu()
    # an activation at the edge between two integers may be rounded to the other one
    assert (mine - its).abs().mean() < 1e-4 * (1 + 10 * bits)
    assert (mine - its).abs().max() < (0.3 if bits else 1e-3)


@pytest.mark.parametrize('drafter', ['head', 'mtp', 'ngram', 'random'])
def test_speculation_never_changes_the_text(drafter):
    engine = Engine(on_gpu(for_decoding(R.convert(with_heads(CHAR, 1)))))
    prompts, sampling = [CHAR.encode('To be'), CHAR.encode('or not to be'), [3]], Sampling(0.8, seed=5)
    plain = engine.complete(prompts, 100, sampling)
    assert engine.complete(prompts, 100, sampling, Speculation(drafter, 4)) == plain


@pytest.mark.parametrize('drafter, dtype', [
    ('none', torch.float32), ('head', torch.float32), ('mtp', torch.float32), ('head', torch.int8)])
def test_compiled_rounds_are_cuda_graphs_with_nearly_the_same_text(drafter, dtype):
    skips = torch._dynamo.utils.counters['inductor']
    before = skips['cudagraph_skips']
    model = on_gpu(R.convert(with_heads(CHAR, 1, block_size=96)))
    sampling, speculation = Sampling(0.8, seed=9), Speculation(drafter, 4)
    compiled, plain = (Engine(model, compile=how, cache_dtype=dtype) for how in (True, False))

    def check(prompt, n, expected, **how):
        got, = compiled.complete([prompt], n, sampling, speculation, **how)
        assert nearly(model, prompt, expected, got)
    for p in [CHAR.encode('To be'), CHAR.encode('x')] * 2:
        expected, = plain.complete([p], 80, sampling)
        check(p, 80, expected)
        check(p, 60, expected[:60], reuse=True)
        again = list(compiled.held_text)  # the conversation goes on from what the cache holds
        check(again, 20, plain.complete([again], 20, sampling)[0], reuse=True)
        assert compiled.stats['reused'] > len(p)
    assert len(compiled.steps) == 1
    assert skips['cudagraph_skips'] == before
    assert any(get_manager(0, create_if_none_exists=False).roots.values())  # graphs were recorded


def test_training_and_resuming(tmp_path):
    data = make_dataset(tmp_path / 'data')
    cpu, gpu = (train(tmp_path / name, data, f'--device={name}') for name in ('cpu', 'cuda:0'))
    assert abs(cpu['val_loss'] - gpu['val_loss']) < 1e-3
    train(tmp_path / 'half', data, '--device=cuda', '--max_iters=4', '--decay_frac=0', '--muon_steps=3')
    whole = train(tmp_path / 'whole', data, '--device=cuda', '--decay_frac=0', '--muon_steps=3')
    resumed = train(tmp_path / 'half', data, '--device=cuda', '--decay_frac=0', '--muon_steps=3', '--init_from=resume')
    assert abs(resumed['val_loss'] - whole['val_loss']) < 1e-4


def test_the_scripts_run_there(tmp_path):
    data, out = make_dataset(tmp_path / 'data'), f'--out_dir={tmp_path}/out'
    got = train(tmp_path / 'out', data, '--device=cuda', '--compile=True', '--dtype=bfloat16', '--quant_bits=8',
                '--draft_n=2', '--multi_token_n=1', '--batch_size=auto', '--total_batch_size=256')
    assert got['batch_size'] == 16
    for script, *knobs in (('quantize.py',), ('quantize.py', '--bits=4', '--method=gptq'),
                           ('prune.py', '--neuron_prune_ratio=0.5', '--importance=obs')):
        done = run(script, out, '--device=cuda', *knobs)
        assert done.status == 0 and result_of(done), done.err
    said = [run('sample.py', out, '--device=cuda', '--start=the', '--weights=int8', '--max_new_tokens=10',
                f'--compile={how}', '--drafter=head') for how in (False, True)]
    assert all(len(got.out) > 3 and got.status == 0 for got in said), said[1].err
    labels = run('distill.py', f'--teacher={tmp_path}/out', f'--out_dir={tmp_path}/labels', '--device=cuda')
    assert labels.status == 0 and os.path.exists(tmp_path / 'labels' / 'labels.bin'), labels.err
    student = train(tmp_path / 'student', data, '--device=cuda', f'--teacher={tmp_path}/labels', '--n_embd=8')
    beside = train(tmp_path / 'beside', data, '--device=cuda', f'--teacher={tmp_path}/out', '--n_embd=8',
                   '--dtype=bfloat16')
    assert student['val_loss'] < 2 and beside['val_loss'] < 2  # it begins at ln 13


def test_a_step_compiled_in_few_large_chunks_is_the_eager_one():
    from distill import Distiller
    from data.compiling import compile_step
    shape = dict(block_size=512, vocab_size=8192, n_layer=1, n_head=2, n_embd=64)
    torch.manual_seed(0)
    student, teacher = (GPT(GPTConfig(**shape, draft_n=n)).cuda() for n in (2, 0))
    for m in (student, teacher):
        torch.nn.init.normal_(m.lm_head.weight, std=0.1)
    ids, step = torch.randint(8192, (40, 512), device='cuda'), Distiller(student, [teacher])
    grads = []
    for f in (step, compile_step(step, ids.numel(), 8192)):
        losses = f(ids, ids)
        sum(losses.values()).backward()
        grads.append((losses, [p.grad for p in student.parameters()]))
        student.zero_grad()
    for (a, b) in zip(*(losses.values() for losses, _ in grads)):
        assert abs(a - b) < 1e-4
    for a, b in zip(grads[0][1], grads[1][1]):
        assert torch.allclose(a, b, atol=1e-3 * a.abs().max())
