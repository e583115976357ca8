"""data/balance.py: the float network stays what it is, and its integers are nearer to it."""
import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import LLAMA, SMALL, batches, make_dataset, outputs, randomise

from data import calibration
from data.balance import balance, peaks
from data.foreign.export import own_tensors
from data.loader import load_meta
from data.slicing import build
from data.tokenizer import from_meta
from model import GPT, GPTConfig
from quantize import convert, gptq

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
    assert (outputs(equal) - outputs(model)).abs().max() < 1e-4
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    for name, w in equal.state_dict().items():
        if 'c_proj' in name or 'c_v' in name or 'wte' in name:
            assert (w - before[name]).abs().max() > 0.01, name


@torch.no_grad()
def uneven(shape):
    """A model in which a channel and some neurons are much larger than the others, as in trained ones."""
    model = make(n_embd=64, **shape)
    for name, w in model.named_parameters():
        w.mul_(0.3)
        if 'transformer' in name and name.endswith('c_proj.weight'):
            w[3] *= 30
        if name.endswith('mlp.c_fc.weight'):
            w[::16] *= 8
    return model


def peak_to_rms(model):
    """{name: how much the largest number of a row stands out} of what the trunk's matrices read, the mean over rows."""
    found = {}

    def look(name):
        def watch(module, args):
            x = args[0].flatten(0, -2)
            found[name] = (x.abs().amax(dim=1) / x.square().mean(dim=1).sqrt()).mean().item()
        return watch
    hooks = [module.register_forward_pre_hook(look(name)) for name, module in model.named_modules()
             if name.endswith(('c_q', 'c_fc', 'c_proj')) and 'transformer' in name]
    outputs(model)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize('shape', [dict(n_kv_head=2), LLAMA | dict(n_kv_head=2)])
def test_what_stood_out_does_not_any_more(shape):
    model = uneven(shape)
    before, after = peak_to_rms(model), peak_to_rms(balance(model, batches()))
    for name in before:
        if name.endswith(('1.attn.c_q', 'mlp.c_fc', 'mlp.c_proj')):
            assert after[name] < 0.75 * before[name], name


def test_its_integers_are_nearer():
    model, data = uneven(dict(n_kv_head=2)), batches()
    exact = outputs(model)

    def error(other):
        return (outputs(other) - exact).square().mean()
    assert error(convert(balance(model, data), 8)) < 0.5 * error(convert(copy.deepcopy(model), 8))
    assert error(gptq(balance(model, data), data, 4)) < error(gptq(model, data, 4))


@pytest.mark.parametrize('shape', [dict(n_kv_head=2), LLAMA | dict(out_proj=False, tie_weights=False)])
def test_others_read_hidden_units_as_they_are(shape):
    """What is written for other projects knows of no Hadamard turn, and computes the same."""
    model = make(**shape)
    equal = balance(model, batches())
    plain = build(own_tensors(equal), replace(equal.config, hadamard=0))
    assert equal.config.hadamard and (outputs(plain) - outputs(model)).abs().max() < 1e-4


def test_packed_rows_are_calibrated_with_whole(tmp_path, monkeypatch):
    """Chats are packed in rows of their own length, whatever the longest row of a text to calibrate with is."""
    make_dataset(tmp_path / 'chat')
    meta = json.loads((tmp_path / 'chat' / 'meta.json').read_text())
    (tmp_path / 'chat' / 'meta.json').write_text(json.dumps(meta | {'row': 32}))
    monkeypatch.setattr(calibration, 'LONGEST', 8)
    x, y = calibration.from_dataset(str(tmp_path / 'chat'), make(), 1)[0]
    assert x.shape == y.shape == (16, 32)


def test_a_seed_chooses_the_rows(tmp_path):
    """Of a dataset, or of what the model writes; each seed has rows of its own, and the same ones again."""
    make_dataset(tmp_path)
    model = make()
    tokenizer = from_meta(load_meta(tmp_path))
    for rows in (lambda seed: calibration.from_dataset(str(tmp_path), model, 2, seed=seed),
                 lambda seed: calibration.from_itself(model, tokenizer, 2, seed)):
        first, again, other = (torch.cat([x for x, _ in rows(seed)]) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not {tuple(row) for row in first.tolist()} & {tuple(row) for row in other.tolist()}


def test_what_never_fires_stays_as_it_is():
    model = make(**LLAMA)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[7] = 0
    assert peaks(model, batches())['transformer.h.0.mlp.c_proj'][7] == 0
    assert outputs(balance(model, batches())).isfinite().all()
