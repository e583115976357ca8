"""model.py: counts, the forward and the losses against plain formulas; attention and optimizers."""
import math

import pytest
from conftest import LLAMA, SMALL, needs_compiler, randomise, reference_forward, refuses
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as M
from data import attention
from data import optimizers as O
from data.optimizers import Muon, make_optimizers
from model import GPT, GPTConfig, evaluate


@pytest.mark.parametrize('shape, groups', [
    (dict(vocab_size=65, n_layer=3, n_head=4, n_embd=192, n_hidden=384),
     dict(embedding=12480, trunk=884736, head=12480, total=909_696)),
    (dict(vocab_size=24576, n_layer=4, n_head=8, n_embd=512, head_dim=64), dict(total=37_748_736)),
    (dict(vocab_size=65536, n_layer=12, n_head=6, n_embd=768, use_mqa=True),
     dict(embedding=50_331_648, trunk=73_138_176, head=50_331_648, total=173_801_472)),
    (dict(vocab_size=65536, n_layer=12, n_head=6, n_embd=768, use_mqa=True, tie_weights=True),
     dict(head=0, total=173_801_472 - 50_331_648)),
    (dict(vocab_size=65536, n_layer=32, n_head=16, n_embd=2048), dict(total=1_879_048_192)),  # nanochat d32
])
def test_parameter_counts(shape, groups):
    with torch.device('meta'):
        counted = GPT(GPTConfig(**shape)).params()
    assert counted == counted | groups | dict(multi_token=0, draft=0)


@pytest.mark.parametrize('shape', [{}, LLAMA, LLAMA | dict(out_proj=False, tie_weights=False)])
def test_flops_are_those_that_torch_counts(shape):
    model = randomise(GPT(GPTConfig(**SMALL, **shape)))
    x = torch.randint(50, (3, 32))  # as many as the context has room for
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:  # of others it does not know
        logits = model(x)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    counted = [forward.get_total_flops(), backward.get_total_flops()]
    assert counted[0] == x.numel() * model.flops_per_token(training=False)
    assert sum(counted) == x.numel() * model.flops_per_token()


@pytest.mark.parametrize('kv', [4, 2, 1])
def test_forward_equals_the_formulas(kv):
    model = randomise(GPT(GPTConfig(**SMALL, n_kv_head=kv, head_dim=6, n_hidden=50)))
    idx = torch.randint(50, (1, 20))
    expected = reference_forward(model.config, model.state_dict(), idx[0])
    assert torch.allclose(model(idx)[0].double(), expected, atol=2e-5)


def test_first_loss_is_ln_v_and_shapes_are_refused():
    model = GPT(GPTConfig(**SMALL))
    x = torch.randint(50, (2, 32))
    assert abs(model(x, x)['ce'].item() - math.log(50)) < 1e-6
    for bad, word in ((dict(n_embd=30), 'n_head'), (dict(n_kv_head=3), 'n_kv_head'), (dict(head_dim=5), 'even'),
                      (dict(n_layer=0), 'n_layer'), (dict(use_mqa=True, n_kv_head=2), 'use_mqa')):
        refuses(word, GPTConfig, **(SMALL | bad))
    refuses('block_size', model, torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize('draft_vocab', [0, 20])
def test_every_head_learns_from_the_right_targets(draft_vocab):
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SMALL, multi_token_n=2, draft_n=3, draft_vocab=draft_vocab)))
    x = torch.randint(50, (2, 12))
    idx, targets = x[:, :-1], x[:, 1:].clone()
    targets[0, 5] = -1
    losses = model(idx, targets)
    loss, logits, heads = model(idx, targets, return_multi_token=True)
    assert set(heads) == {'head_2', 'head_3'} and torch.equal(loss, losses['ce']) and torch.equal(logits, model(idx))
    # by hand: head_j at position t is scored on the token j further on, where there is one and it is not masked
    by_hand = 0
    for j in (2, 3):
        pairs = [(heads[f'head_{j}'][b, t], targets[b, t + j - 1])
                 for b in range(2) for t in range(11 - (j - 1)) if targets[b, t + j - 1] >= 0]
        by_hand += F.cross_entropy(torch.stack([p for p, _ in pairs]), torch.stack([y for _, y in pairs])) / 2
    assert torch.allclose(losses['multi_token'], by_hand, atol=1e-5)
    # the draft cell, one position at a time: fed the true next tokens, those too that are masked as targets, compared
    # with the model's own distribution once it has read them, both among the tokens that the cell chooses from
    n = draft_vocab or 50
    state, own, total = model.trunk(idx), model(idx)[..., :n].log_softmax(-1), {1: [], 2: [], 3: []}
    for b in range(2):
        for t in range(11):
            s = state[b:b + 1, t:t + 1]
            for j in (1, 2, 3):
                if t + j < 11:
                    s = model.draft_state(s, x[b:b + 1, t + j:t + j + 1])
                    if targets[b, t + j] >= 0:
                        cell = model.logits(s)[0, 0, :n].log_softmax(-1)
                        total[j].append((own[b, t + j].exp() * (own[b, t + j] - cell)).sum())
    assert torch.allclose(losses['draft'], sum(torch.stack(v).mean() for v in total.values()) / 3, atol=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_chunked_loss_equals_plain(monkeypatch):
    model = randomise(GPT(GPTConfig(**SMALL))).double()
    x, y = torch.randint(50, (3, 20)), torch.randint(50, (3, 20))
    y[1, :7] = -1
    grads = []
    for limit in (2**20, 50 * 4 * 7):  # all at once, then 7 rows at a time
        monkeypatch.setattr(M, 'LOSS_CHUNK_BYTES', limit)
        model.zero_grad()
        loss = model(x, y)['ce']
        loss.backward()
        grads.append((loss.detach(), *[p.grad.clone() for p in model.parameters()]))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*grads))
    plain = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    assert torch.allclose(grads[0][0].float(), plain.float(), atol=1e-6)


def test_evaluate_counts_each_target_and_its_bytes():
    model = randomise(GPT(GPTConfig(**SMALL)))
    x, y = torch.randint(50, (4, 16)), torch.randint(50, (4, 16))
    y[3] = -1
    size = [0] + [1, 2] * 24 + [3]
    got = evaluate(model, [(x[:2], y[:2]), (x[2:], y[2:])], size)
    nats = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1, reduction='none')
    b = torch.tensor(size)[y.clamp(min=0).flatten()] * (y.flatten() >= 0)
    assert got['tokens'] == 48 and math.isclose(got['loss'], nats.sum().item() / 48, rel_tol=1e-5)
    assert math.isclose(got['bpb'], nats[b > 0].sum().item() / math.log(2) / b.sum().item(), rel_tol=1e-5)


# ----- optimizers

def test_every_parameter_in_exactly_one_group():
    model = GPT(GPTConfig(**SMALL, multi_token_n=2, draft_n=2))
    listed = [p for o in make_optimizers(model) for g in o.param_groups for p in g['params']]
    assert len(listed) == len(set(map(id, listed))) == len(list(model.parameters()))
    adam, muon = make_optimizers(model)
    assert ({id(p) for p in adam.param_groups[0]['params']}
            == {id(model.transformer.wte.weight), id(model.lm_head.weight)})
    model.transformer.requires_grad_(False)
    listed = [p for o in make_optimizers(model) for g in o.param_groups for p in g['params']]
    assert all(p.requires_grad for p in listed) and len(listed) == 1 + 4 + 2


# a stack of 1: one matrix at a time
@pytest.mark.parametrize('shape, stack', [((32, 32), O.MUON_STACK), ((64, 32), O.MUON_STACK), ((32, 64), 1)])
def test_muon_equals_torch(shape, stack, monkeypatch):
    monkeypatch.setattr(O, 'MUON_STACK', stack)
    # torch's own multiplies in bfloat16, always
    monkeypatch.setattr(O, 'fast_bf16', lambda device: True)
    torch.manual_seed(1)
    start = torch.randn(2, *shape)
    ours, theirs = ([s.clone().requires_grad_() for s in start] for _ in range(2))
    optimizers = Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.95)
    for step in range(4):
        for i in range(2):
            ours[i].grad = torch.randn(shape)
            theirs[i].grad = ours[i].grad.clone()
        for o in optimizers:
            o.step()
    for a, b, s in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - s).norm()  # bfloat16 sums in another order


@pytest.mark.parametrize('steps, least, most', [(3, 0.729, 1.271), (5, 0.681, 1.135)])
def test_muon_makes_singular_values_one(steps, least, most, monkeypatch):
    """From a hundredth of the norm up they end where MUON_STEPS says, and singular vectors stay."""
    monkeypatch.setattr(O, 'fast_bf16', lambda device: False)
    torch.manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(2, n, 24, dtype=torch.float64))[0] for n in (24, 40))
    s = torch.logspace(-1.6, 0, 24, dtype=torch.float64)
    assert 0.01 < s.min() / s.norm() < 0.014
    x = O.orthogonalize(u * s @ v.mT, steps)
    ends = u.mT @ x @ v
    assert (ends - torch.diag_embed(ends.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9
    s = ends.diagonal(dim1=-2, dim2=-1)
    assert least < s.min() and s.max() < most, (s.min(), s.max())


@pytest.mark.parametrize('heads, kv_heads, T', [(4, 4, 64), (4, 4, 128), (6, 2, 200), (5, 1, 300)])
def test_attention_with_a_faster_way_back(heads, kv_heads, T, monkeypatch):
    torch.manual_seed(3)
    q, k, v, g = (torch.randn(2, h, T, 16, dtype=torch.float64) for h in (heads, kv_heads, kv_heads, heads))
    results = []
    for ours in (True, False):
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: ours)
        leaves = [t.to(torch.bfloat16 if ours else torch.float64, copy=True).requires_grad_() for t in (q, k, v)]
        assert attention.is_faster(leaves[2]) == ours
        y = M.causal_attention(*leaves)
        y.backward(g.to(y.dtype))
        results.append([y.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*results):
        assert a.dtype == torch.bfloat16 and a.shape == b.shape and (a - b).norm() < 0.015 * b.norm()


@needs_compiler
@pytest.mark.parametrize('heads, kv_heads, head_dim, T', [(4, 2, 48, 200), (3, 1, 80, 64)])
def test_attention_compiled(heads, kv_heads, head_dim, T):
    """Gradients in bfloat16 against eager ones: of heads that are no whole number of 32s they have come out as NaN."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(T, 97, 1, heads, kv_heads, 192, head_dim=head_dim, n_hidden=64))
    randomise(model, 0.02)
    ids, grads = torch.randint(97, (3, T + 1)), []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            forward(ids[:, :-1], ids[:, 1:])['ce'].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for eager, compiled in zip(*grads):
        assert (eager - compiled).norm() < 0.02 * eager.norm()
