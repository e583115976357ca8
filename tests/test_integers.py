"""data/balance.py: the same float network, with integers that are nearer to it. And training on from integers."""
import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import (LLAMA, SMALL, TINY, batches, make_dataset, needs_compiler, outputs, randomise, refused, result_of,
                      run, train)

from data.balance import balance, peaks
from data.checkpoint import load_checkpoint, save_checkpoint
from data.foreign.export import own_tensors
from data.gptq import gptq
from data.loader import Loader
from data.rounding import (BITS, IntLinear, behind, convert, grid_of, prepare, round_to_grid, round_weight, steps_of,
                           weights_behind)
from data.slicing import build
from data.tokenizer import from_meta
from model import GPT, GPTConfig
from quantize import load

SHAPES = [dict(multi_token_n=2, draft_n=2), dict(n_kv_head=1, tie_weights=True), LLAMA | dict(n_kv_head=2, draft_n=2),
          LLAMA, LLAMA | dict(multi_token_n=2), LLAMA | dict(tie_weights=False),
          LLAMA | dict(out_proj=False, tie_weights=False)]


def make(**shape):
    return randomise(GPT(GPTConfig(**SMALL | shape)), std=0.3)


@pytest.mark.parametrize('data', [batches(), []])
@pytest.mark.parametrize('shape', SHAPES)
def test_the_float_network_is_the_same(shape, data):
    model = make(**shape)
    before = copy.deepcopy(model.state_dict())
    equal = balance(model, data, seed=3)
    assert (outputs(equal) - outputs(model)).abs().max() < 2e-5 * outputs(model).abs().max()
    x = batches()[0][0]
    assert (equal(x) - model(x)).abs().max() < 1e-4
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    for name, w in equal.state_dict().items():
        if 'c_proj' in name or 'c_v' in name or 'wte' in name:
            assert (w - before[name]).abs().max() > 0.01, name


@torch.no_grad()
def test_its_integers_are_nearer():
    model, data = make(n_embd=64, n_kv_head=2), batches()
    for name, w in model.named_parameters():  # a channel and some neurons are large, as in trained models
        w.mul_(0.3)
        if 'transformer' in name and name.endswith('c_proj.weight'):
            w[3] *= 30
        if name.endswith('mlp.c_fc.weight'):
            w[::16] *= 8
    exact = outputs(model)
    error = lambda other: (outputs(other) - exact).square().mean()
    assert error(convert(balance(model, data), 8)) < 0.5 * error(convert(copy.deepcopy(model), 8))
    assert error(gptq(balance(model, data), data, 4)) < error(gptq(model, data, 4))


@pytest.mark.parametrize('shape', [dict(n_kv_head=2), LLAMA | dict(out_proj=False, tie_weights=False)])
def test_others_read_hidden_units_as_they_are(shape):
    model = make(**shape)
    equal = balance(model, batches())
    plain = build(own_tensors(equal), replace(equal.config, hadamard=0))
    assert equal.config.hadamard and (outputs(plain) - outputs(model)).abs().max() < 1e-4


def test_what_never_fires_stays_as_it_is():
    model = make(**LLAMA)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[7] = 0
    assert peaks(model, batches())['transformer.h.0.mlp.c_proj'][7] == 0
    assert outputs(balance(model, batches())).isfinite().all()


# ----- training on from integers that GPTQ chose (quantize.py --for_training=True)

@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('shape', [LLAMA, dict(draft_n=2, multi_token_n=2)])
def test_training_starts_from_the_integers(shape, bits):
    model = balance(randomise(GPT(GPTConfig(**SMALL | shape))), batches())
    fitted = gptq(model, batches(), bits, tables_bits=8, keep_before=True)
    start, grid = behind(model, fitted), grid_of(fitted)
    again = convert(behind(model, fitted), bits, grid=grid).state_dict()
    assert all(torch.equal(again[name], t) for name, t in fitted.state_dict().items())
    # they lie all over their cells: at the edges the first step of a training would round many to another integer
    module, w = fitted.transformer.h[0].mlp.c_fc, start.transformer.h[0].mlp.c_fc.weight
    size = module.scale[:, None] * steps_of(module.step, 32, w.size(1))
    place = (w / size - (module.integers() * module.scale[:, None] / size).round()).abs()
    assert 0.2 < place.mean() < 0.3 and (place > 0.45).float().mean() < 0.2
    x = batches()[0][0]
    before = fitted(x)
    fake = prepare(start, bits, grid=grid)
    # in another order of sums, an activation is now and then rounded to the next integer
    near = (fake(x) - before).abs().mean()
    assert near < 0.02
    if bits < 8:  # at 8 bits the nearest integers are mostly GPTQ's
        assert near < 0.2 * (prepare(behind(model, fitted), bits)(x) - before).abs().mean()
    assert all(module.grid for module in fake.modules() if hasattr(module, 'grid'))


@pytest.mark.parametrize('bits', BITS)
def test_weights_behind(bits):
    """What a weight is already nearest to it keeps; others move into the cell of their integer, and no further."""
    torch.manual_seed(0)
    w = torch.randn(8, 77)
    rounded = round_weight(w, bits)
    size = rounded.scale[:, None] * steps_of(rounded.step, 32, 77)
    near = (rounded.float() - w).abs() < 0.49 * size
    assert near.float().mean() > 0.9 and torch.allclose(weights_behind(w, rounded)[near], w[near], atol=1e-6)
    other = w + 0.3 * torch.randn_like(w)
    moved = weights_behind(other, rounded)
    assert torch.equal(round_to_grid(moved, rounded.scale, rounded.step, bits, 32).v, rounded.v)
    assert ((moved - other).abs() <= (rounded.float() - other).abs() + 1e-6).all()


@pytest.mark.parametrize('bits', BITS)
def test_weights_that_grow_stay_at_the_edge(bits):
    """The largest step has fewer multiples that an int8 holds; none of them may come out with the other sign."""
    w = torch.linspace(-1, 1, 32).repeat(3, 1)
    rounded = round_weight(w, bits)
    grown = round_to_grid(3 * w, rounded.scale, rounded.step, bits, 32)
    assert (grown.v * w.sign() >= 0).all() and (grown.v.abs() >= rounded.v.abs()).all()
    assert torch.equal(IntLinear.holding(grown).integers(), grown.v)


def test_a_new_head_is_on_no_grid(start, tmp_path):
    folder, _ = start
    head = train(tmp_path, *on(folder, '--draft_n=2', '--train_only=draft'))
    got = run('quantize.py', f'--out_dir={tmp_path}', '--bits=4')
    assert head['iters'] == 4 and got.status == 0, got.err
    written, before = load(f'{tmp_path}/int4.safetensors')[0].state_dict(), load(f'{folder}/int4.safetensors')[0]
    assert all(torch.equal(written[name], t) for name, t in before.state_dict().items())


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp('grid')
    data = str(folder / 'data')
    make_dataset(data, val=1500)
    tokenizer = from_meta(Loader(data, 'train', 16, 32).meta)
    model = randomise(GPT(GPTConfig(**SMALL | {'vocab_size': tokenizer.vocab_size})))
    save_checkpoint(f'{folder}/best.pt', model, tokenizer.meta(), dataset=data, knobs={}, step=4)
    got = run('quantize.py', f'--out_dir={folder}', '--bits=4', '--for_training=True', '--calib_batches=2')
    return folder, result_of(got)


def on(start, *flags):
    how = [f'--dataset={start}/data', f'--init_from={start}/int4.pt', '--quant_bits=4', '--batch_size=4',
           f'--block_size={SMALL["block_size"]}', '--muon_lr=0.01', '--max_iters=4']
    return [*how, *flags]


def test_train_and_quantize(start, tmp_path):
    folder, document = start
    result = train(tmp_path, *on(folder, '--eval_interval=4'))
    assert result['val_loss_before'] == pytest.approx(document['val_loss_quant'], abs=2e-3)
    assert result['val_loss'] != result['val_loss_before']
    after = json.loads(run('quantize.py', f'--out_dir={tmp_path}', '--bits=4').out.splitlines()[-1])
    assert after['method'] == 'qat' and after['val_loss_quant'] == pytest.approx(result['best_val_loss'], abs=2e-3)
    before, trained = load(f'{folder}/int4.safetensors')[0], load(f'{tmp_path}/int4.safetensors')[0]
    grids = [grid_of(model) for model in (before, trained)]
    assert all(torch.equal(t, grids[1][name]) for name, t in grids[0].items())
    weights = [model.transformer.h[0].mlp.c_fc.integers() for model in (before, trained)]
    assert 0 < (weights[0] != weights[1]).float().mean() < 0.9


def test_resumed_is_uninterrupted(start, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    train(whole, *on(start[0], '--max_iters=6', '--decay_frac=0'))
    train(parts, *on(start[0], '--max_iters=3', '--decay_frac=0'))
    train(parts, *on(start[0], '--max_iters=6', '--decay_frac=0', '--init_from=resume'))
    a, b = (load_checkpoint(f'{folder}/ckpt.pt') for folder in (whole, parts))
    assert all(torch.equal(t, b['model'][name]) for name, t in a['model'].items())
    assert a['grid'] and all(torch.equal(t, b['grid'][name]) for name, t in a['grid'].items())


def test_what_does_not_fit_is_refused(start, tmp_path):
    go = lambda name, *flags: run('train.py', *TINY, f'--out_dir={tmp_path}/{name}', *on(start[0], *flags))
    refused(go('a', '--tables_bits=4'), "has scales and steps of.*'tables_bits': 8.*give the same")
    state = torch.load(start[0] / 'int4.pt', weights_only=True)
    state['grid'].pop('lm_head.scale')
    (tmp_path / 'bad').mkdir()
    torch.save(state, tmp_path / 'bad' / 'int4.pt')
    refused(go('b', f'--init_from={tmp_path}/bad/int4.pt'), 'lm_head.scale is missing')
    got = run('quantize.py', f'--out_dir={start[0]}', '--weights=int4.pt', '--bits=4', '--for_training=True')
    refused(got, 'for_training would replace .*int4.pt')
    # without rounding they are weights like any other
    assert go('c', '--quant_bits=0').status == 0 and not load_checkpoint(tmp_path / 'c' / 'best.pt')['grid']


@needs_compiler
def test_compiled_steps_are_the_steps():
    """Where groups do not divide the columns, what inductor made of this read beyond the steps, and losses were NaN."""
    step = torch.randint(1, 18, (64, 2), generator=torch.Generator().manual_seed(0)).to(torch.int8)

    def sizes(step):
        return 0.01 * steps_of(step, 128, 192)
    assert torch.equal(torch.compile(sizes)(step), sizes(step))
