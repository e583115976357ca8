"""quantize.py: one rule everywhere, integers that multiply exactly, a file that comes back as it was."""
import json

import pytest
import torch
import torch.nn.functional as F

import quantize as Q
from engine import Engine
from model import GPT, GPTConfig
from test_model import SMALL, randomise


@pytest.mark.parametrize('bits, group', [(8, None), (8, 16), (4, 32), (4, 8), (4, None)])
@pytest.mark.parametrize('shape', [(7, 32), (5, 45), (3, 8)])
def test_round_weight(bits, group, shape):
    torch.manual_seed(0)
    w = torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None]
    w[1] = 0
    q, scale = Q.round_weight(w, bits, group)
    top = 2 ** (bits - 1) - 1
    assert q.dtype == torch.int8 and q.shape == shape and q.abs().max() <= top
    assert scale.shape == (shape[0], -(-shape[1] // (group or shape[1])))
    back = Q.dequantize(q, scale, group)
    assert torch.equal(back, Q.fake_weight(w, bits, group))                         # training rounds as export does, bit for bit
    assert torch.equal(back[1], torch.zeros(shape[1]))
    step = scale.repeat_interleave(group or shape[1], 1)[:, :shape[1]]
    inside = w.abs() <= step * top
    assert ((back - w).abs() <= 0.5001 * step)[inside].all()                        # to the nearest, wherever nothing is clipped
    assert bits == 4 or inside.float().mean() > 0.9


def test_clip_search_never_does_worse_than_no_clip(monkeypatch):
    torch.manual_seed(0)
    w = torch.randn(64, 128)
    error = lambda: (Q.dequantize(*Q.round_weight(w, 4, 32), 32) - w).square().mean().item()
    searched = error()
    monkeypatch.setitem(Q.CLIPS, 4, (1.0,))
    assert searched < 0.95 * error()


def test_straight_through_gradient():
    w = torch.randn(4, 8, requires_grad=True)
    Q.fake_weight(w).mul(torch.arange(32.).view(4, 8)).sum().backward()
    assert torch.equal(w.grad, torch.arange(32.).view(4, 8))


@pytest.mark.parametrize('N, K', [(65, 192), (192, 384), (33, 47), (64, 3072), (1, 8)])
def test_int_matmul_is_exact(N, K):
    """Every path, against int64; with all values at the edge of the range, where 16-bit accumulation would saturate."""
    torch.manual_seed(0)
    for x, w in ((torch.randint(-127, 128, (5, K)), torch.randint(-127, 128, (N, K))), (torch.full((5, K), 127), torch.full((N, K), 127)), (torch.full((5, K), -127), torch.full((N, K), 127))):
        exact = (x @ w.T).float()
        assert torch.equal(Q.int_matmul(x.float(), w.to(torch.int8)), exact)
        assert torch.equal(Q.float_matmul(x.float(), w.to(torch.int8)), exact)


def test_int8_rows_do_not_depend_on_their_neighbours():
    q, scale = Q.round_weight(torch.randn(96, 64))
    layer = Q.Int8Linear(q, scale.squeeze(1))
    x = torch.randn(16, 64) * torch.logspace(-3, 3, 16)[:, None]
    alone = torch.cat([layer(x[i:i + 1]) for i in range(16)])
    for n in (2, 5, 8, 16):
        assert torch.equal(layer(x[:n]), alone[:n])


def test_packed_is_bit_for_bit_the_plain_one():
    q, scale = Q.round_weight(torch.randn(9000, 48))
    layer = Q.Int8Linear(q, scale.squeeze(1))
    if not Q.PackedInt8Linear.pays(layer):
        pytest.skip('this CPU has no exact packed kernel; the plain one is used')
    packed = Q.PackedInt8Linear(layer)
    x = torch.randn(16, 48) * torch.logspace(-3, 3, 16)[:, None]
    for n in (1, 2, 5, 16):
        assert torch.equal(packed(x[:n]), layer(x[:n]))
    assert torch.equal(packed(x.view(2, 8, 48)), layer(x).view(2, 8, -1))


@pytest.mark.parametrize('tie', [False, True])
def test_fake_quant_equals_the_integers(tie):
    """The prepared float model and the exported integer one are the same network; only the order of float sums differs."""
    model = randomise(GPT(GPTConfig(**SMALL, n_kv_head=2, tie_weights=tie)))
    x = torch.randint(50, (2, 30))
    fake = Q.prepare(GPT(model.config).eval())
    fake.load_state_dict(model.state_dict())
    integer = GPT(model.config)
    integer.load_state_dict(model.state_dict())
    Q.convert(integer)
    names = [n for n, m in integer.named_modules() if isinstance(m, (Q.Int8Linear, Q.Int8Embedding))]
    assert len(names) == 2 + 2 * 6 and not list(integer.parameters())               # everything is integers now
    for name in names:
        ours, theirs = integer.get_submodule(name), fake.get_submodule(name)
        assert torch.equal(Q.dequantize(ours.weight, ours.scale[:, None]), Q.fake_weight(theirs.weight.detach()))
        if isinstance(ours, Q.Int8Linear):
            h = torch.randn(9, ours.weight.size(1))
            assert torch.allclose(ours(h), theirs(h), rtol=1e-4, atol=1e-4)
    assert (integer(x) - fake(x)).abs().mean() < 0.02


@pytest.mark.parametrize('tie', [False, True])
def test_file_round_trip(tie, tmp_path):
    model = Q.convert(randomise(GPT(GPTConfig(**SMALL, tie_weights=tie, multi_token_n=1, draft_n=2))))
    path = f'{tmp_path}/int8.safetensors'
    size = Q.export(path, model, {'kind': 'char', 'chars': 'é'})
    again, state = Q.load(path)
    x = torch.randint(50, (2, 30))
    assert torch.equal(again(x), model(x)) and state['tokenizer']['chars'] == 'é' and again.config == model.config
    assert not list(again.parameters()) and Q.int_share(again) > 0.95
    ints = sum(b.numel() for b in again.buffers() if b.dtype == torch.int8) - (again.lm_head.weight.numel() if tie else 0)
    assert ints < size < 1.3 * ints + 8000
    engine = Engine(again)
    assert engine.complete([[1, 2, 3]], 10, seed=1) == Engine(model).complete([[1, 2, 3]], 10, seed=1)


def test_the_file_is_safetensors(tmp_path):
    model = Q.convert(randomise(GPT(GPTConfig(**SMALL))))
    Q.export(f'{tmp_path}/m.safetensors', model, {})
    theirs = pytest.importorskip('safetensors.torch').load_file(f'{tmp_path}/m.safetensors')
    assert set(theirs) == set(model.state_dict()) and all(torch.equal(theirs[k], v) for k, v in model.state_dict().items())


def test_bad_files_are_refused_in_one_line(tmp_path):
    model = Q.convert(randomise(GPT(GPTConfig(**SMALL))))
    path = f'{tmp_path}/m.safetensors'
    Q.export(path, model, {})
    good = open(path, 'rb').read()
    for content, expected in ((None, 'quantize.py'), (good[:-100], 'damaged'), (good[:50], 'not a whole'), (b'', 'not a whole'), (b'PK' + good, 'not a whole'), (good[:-9] + bytes([good[-9] ^ 4]) + good[-8:], 'damaged')):
        if content is None:
            bad = f'{tmp_path}/missing'
        else:
            bad = f'{tmp_path}/bad'
            open(bad, 'wb').write(content)
        with pytest.raises(SystemExit, match=expected) as e:
            Q.load(bad)
        assert '\n' not in str(e.value)
