"""
model.py: shapes that must count exactly, the forward against plain formulas, heads, losses, optimizers, checkpoints.
"""
import math
import os
import resource
import signal

import pytest
from conftest import SMALL, content, randomise, start
import torch
import torch.nn.functional as F

import model as M
from model import (GPT, GPTConfig, Muon, evaluate, free_memory, largest_that_fits, load_checkpoint, load_model,
                   make_optimizers, memory_limit, out_of_memory, save_checkpoint)


@pytest.mark.parametrize('shape, groups', [
    (dict(vocab_size=65, n_layer=3, n_head=4, n_embd=192, n_hidden=384),
     dict(embedding=12480, trunk=884736, head=12480, total=909_696)),
    (dict(vocab_size=24576, n_layer=4, n_head=8, n_embd=512, head_dim=64), dict(total=37_748_736)),
    (dict(vocab_size=65536, n_layer=12, n_head=6, n_embd=768, use_mqa=True),
     dict(embedding=50_331_648, trunk=73_138_176, head=50_331_648, total=173_801_472)),
    (dict(vocab_size=65536, n_layer=12, n_head=6, n_embd=768, use_mqa=True, tie_weights=True),
     dict(head=0, total=173_801_472 - 50_331_648)),
    (dict(vocab_size=65536, n_layer=32, n_head=16, n_embd=2048), dict(total=1_879_048_192)),          # nanochat d32
])
def test_parameter_counts(shape, groups):
    with torch.device('meta'):
        counted = GPT(GPTConfig(**shape)).params()
    assert counted == counted | groups | dict(multi_token=0, draft=0)


def test_heads_are_small_and_counted():
    with torch.device('meta'):
        n = GPT(GPTConfig(use_mqa=True, multi_token_n=3, draft_n=4)).params()
    assert 0 < n['multi_token'] <= 0.05 * n['total'] and 0 < n['draft'] <= 0.05 * n['total']
    assert n['total'] == sum(v for k, v in n.items() if k != 'total')


def reference_forward(model, idx):
    """
    The same network written out token by token from the papers' formulas, in float64 and without any of model.py's
    functions.
    """
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    x = rms(w['transformer.wte.weight'][idx])                                      # (T, n_embd)
    for i in range(c.n_layer):
        a = {k: w[f'transformer.h.{i}.attn.{k}.weight'] for k in ('c_q', 'c_k', 'c_v', 'c_proj')}
        h = rms(x)
        out = torch.zeros(len(idx), c.n_head * c.head_dim, dtype=torch.float64)
        for head in range(c.n_head):
            kv = head // (c.n_head // c.n_kv_head)
            rows, kv_rows = (slice(head * c.head_dim, (head + 1) * c.head_dim),
                             slice(kv * c.head_dim, (kv + 1) * c.head_dim))
            q, k, v = h @ a['c_q'][rows].T, h @ a['c_k'][kv_rows].T, h @ a['c_v'][kv_rows].T
            half = c.head_dim // 2
            turn = torch.tensor([[t * c.rope_base ** (-2 * j / c.head_dim) for j in range(half)]
                                 for t in range(len(idx))], dtype=torch.float64)
            z = lambda y: torch.view_as_real(torch.complex(y[:, :half].contiguous(), y[:, half:].contiguous())
                                             * torch.polar(torch.ones_like(turn), -turn))
            q, k = (rms(torch.cat((z(y)[..., 0], z(y)[..., 1]), -1)) for y in (q, k))
            score = (q @ k.T / math.sqrt(c.head_dim)).masked_fill(
                torch.ones(len(idx), len(idx)).triu(1).bool(), -math.inf)
            out[:, rows] = score.softmax(-1) @ v
        x = x + out @ a['c_proj'].T
        x = x + ((rms(x) @ w[f'transformer.h.{i}.mlp.c_fc.weight'].T).clamp(min=0).square()
                 @ w[f'transformer.h.{i}.mlp.c_proj.weight'].T)
    return 15 * torch.tanh(rms(x) @ w['lm_head.weight'].T / 15)


@pytest.mark.parametrize('kv', [4, 2, 1])
def test_forward_equals_the_formulas(kv):
    model = randomise(GPT(GPTConfig(**SMALL, n_kv_head=kv, head_dim=6, n_hidden=50)))
    idx = torch.randint(50, (1, 20))
    assert torch.allclose(model(idx)[0].double(), reference_forward(model, idx[0]), atol=2e-5)


def test_first_loss_is_ln_v_and_shapes_are_refused():
    model = GPT(GPTConfig(**SMALL))
    x = torch.randint(50, (2, 32))
    assert abs(model(x, x)['ce'].item() - math.log(50)) < 1e-6
    for bad, word in ((dict(n_embd=30), 'n_head'), (dict(n_kv_head=3), 'n_kv_head'), (dict(head_dim=5), 'even'),
                      (dict(n_layer=0), 'n_layer'), (dict(use_mqa=True, n_kv_head=2), 'use_mqa')):
        with pytest.raises(AssertionError, match=word):
            GPTConfig(**(SMALL | bad))
    with pytest.raises(AssertionError, match='block_size'):
        model(torch.zeros(1, 33, dtype=torch.long))


@torch.no_grad()
def test_the_length_of_an_embedding_is_not_seen():
    """Which is why tables may start at any, and what init_weights chooses is but how fast they learn."""
    model = randomise(GPT(GPTConfig(**SMALL, draft_n=2)))
    x = torch.randint(50, (2, 12))
    before = model(x), model.draft_state(model.trunk(x), x)
    model.transformer.wte.weight *= torch.rand(50, 1) + 0.5
    for a, b in zip(before, (model(x), model.draft_state(model.trunk(x), x))):
        assert torch.allclose(a, b, atol=1e-4)


def test_every_head_learns_from_the_right_targets():
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SMALL, multi_token_n=2, draft_n=3)))
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
    # with the model's own distribution once it has read them
    state, own, total = model.trunk(idx), model(idx).log_softmax(-1), {1: [], 2: [], 3: []}
    for b in range(2):
        for t in range(11):
            s = state[b:b + 1, t:t + 1]
            for j in (1, 2, 3):
                if t + j < 11:
                    s = model.draft_state(s, x[b:b + 1, t + j:t + j + 1])
                    if targets[b, t + j] >= 0:
                        cell = model.logits(s)[0, 0].log_softmax(-1)
                        total[j].append((own[b, t + j].exp() * (own[b, t + j] - cell)).sum())
    assert torch.allclose(losses['draft'], sum(torch.stack(v).mean() for v in total.values()) / 3, atol=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_chunked_loss_equals_plain(monkeypatch):
    model = randomise(GPT(GPTConfig(**SMALL))).double()
    x, y = torch.randint(50, (3, 20)), torch.randint(50, (3, 20))
    y[1, :7] = -1
    grads = []
    for limit in (2**20, 50 * 4 * 7):                                               # all at once, then 7 rows at a time
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


# -----------------------------------------------------------------------------
# optimizers

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
@pytest.mark.parametrize('shape, stack', [((32, 32), M.MUON_STACK), ((64, 32), M.MUON_STACK), ((32, 64), 1)])
def test_muon_equals_torch(shape, stack, monkeypatch):
    monkeypatch.setattr(M, 'MUON_STACK', stack)
    # torch's own multiplies in bfloat16, always
    monkeypatch.setattr(M, 'fast_bf16', lambda device: True)
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
        assert (a - b).norm() < 0.02 * (b - s).norm()                               # bfloat16 sums in another order


@pytest.mark.parametrize('steps, least, most', [(3, 0.729, 1.271), (5, 0.681, 1.135)])
def test_muon_makes_singular_values_one(steps, least, most, monkeypatch):
    """From a hundredth of the norm up they end where MUON_STEPS says, and singular vectors stay."""
    monkeypatch.setattr(M, 'fast_bf16', lambda device: False)
    torch.manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(2, n, 24, dtype=torch.float64))[0] for n in (24, 40))
    s = torch.logspace(-1.6, 0, 24, dtype=torch.float64)
    assert 0.01 < s.min() / s.norm() < 0.014
    x = M.orthogonalize(u * s @ v.mT, steps)
    ends = u.mT @ x @ v
    assert (ends - torch.diag_embed(ends.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9
    s = ends.diagonal(dim1=-2, dim2=-1)
    assert least < s.min() and s.max() < most, (s.min(), s.max())


@pytest.mark.parametrize('heads, kv_heads, T', [(4, 4, 1), (4, 4, 128), (6, 2, 200), (5, 1, 300)])
def test_attention_without_the_kernel(heads, kv_heads, T, monkeypatch):
    """The products that compiled training takes on a CPU, and their gradients, against PyTorch's kernel in float64."""
    torch.manual_seed(3)
    q, k, v, g = (torch.randn(2, h, T, 16, dtype=torch.float64) for h in (heads, kv_heads, kv_heads, heads))
    q, k = M.norm(q), M.norm(k)
    results = []
    for ours in (True, False):
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: ours)
        leaves = [t.to(torch.bfloat16 if ours else torch.float64, copy=True).requires_grad_() for t in (q, k, v)]
        y = M.causal_attention(*leaves)
        y.backward(g.to(y.dtype))
        results.append([y.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*results):
        # + 0.1, since with one key alone the gradients of q and k are zero
        assert a.dtype == torch.bfloat16 and a.shape == b.shape and (a - b).norm() < 0.015 * b.norm() + 0.1


# -----------------------------------------------------------------------------
# memory

def test_largest_that_fits():
    for limit in [*range(201), *(2**k + d for k in range(8, 20) for d in (-1, 0, 1))]:
        for most in (1, 2, 3, 7, 64, 100, 200, 10**6):
            asked = []
            assert largest_that_fits(lambda n: asked.append(n) or n <= limit, most) == min(limit, most)
            assert all(1 <= n <= most for n in asked) and len(asked) == len(set(asked)) <= 2 * math.log2(most) + 2


def test_only_out_of_memory_is_out_of_memory():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert all(map(out_of_memory, (real.value, MemoryError(), torch.OutOfMemoryError('CUDA out of memory'))))
    assert not any(map(out_of_memory, (
        RuntimeError('shape mismatch'), RuntimeError('CUDA error: an illegal memory access'),
        OSError('No space left'), SystemExit('error: memory'))))


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='for Linux')
def test_memory_limit():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit('cpu', 0.5) as free:
        torch.empty(free // 2, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as e:
            torch.empty(free + free // 2, dtype=torch.uint8)
    assert (out_of_memory(e.value) and resource.getrlimit(resource.RLIMIT_AS) == before
            and torch.empty(free + free // 2, dtype=torch.uint8).numel() > free > 0)


def test_free_memory_is_the_least_that_anything_allows(tmp_path):
    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return free_memory(tmp_path)
    assert write({'proc/meminfo': 'MemTotal:     9000 kB\nMemAvailable:    8000 kB\n',
                  'proc/self/cgroup': '0::/a/b\n'}) == 8000 * 1024
    group = lambda path, most, now, cached: {
        f'{path}/memory.max': most, f'{path}/memory.current': now,
        f'{path}/memory.stat': f'anon 7\ninactive_file {cached}\n'}
    assert write(group('sys/fs/cgroup/a/b', 'max\n', '900\n', 0)) == 8000 * 1024
    assert write(group('sys/fs/cgroup/a', '5000000\n', '2000000\n', 500_000)) == 3_500_000
    assert write(group('sys/fs/cgroup/a/b', '1000\n', '4000\n', 0)) == 0
    old = 'sys/fs/cgroup/memory/c/memory.'                                              # version 1
    assert write({'proc/self/cgroup': '9:cpu:/a/b\n4:memory:/c\n', f'{old}limit_in_bytes': '3000',
                  f'{old}usage_in_bytes': '1000', f'{old}stat': 'inactive_file 5'}) == 2005


# -----------------------------------------------------------------------------
# checkpoints

def test_checkpoint_round_trip(tmp_path):
    model = randomise(GPT(GPTConfig(**SMALL, n_kv_head=2, tie_weights=True)))
    save_checkpoint(f'{tmp_path}/a/ckpt.pt', model, {'kind': 'char', 'chars': 'ab'}, step=7)
    again, state = load_model(f'{tmp_path}/a/ckpt.pt')
    x = torch.randint(50, (1, 9))
    assert (torch.equal(again(x), model(x)) and state['step'] == 7 and state['tokenizer']['chars'] == 'ab'
            and again.config == model.config)


class Evil:
    """Unpickled by an ordinary load, it makes a folder."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_bad_checkpoints_are_refused_in_one_line(tmp_path):
    path = f'{tmp_path}/ckpt.pt'
    save_checkpoint(path, GPT(GPTConfig(**SMALL)), {})
    good = open(path, 'rb').read()
    torch.save({'model': {}, 'iter_num': 3}, f'{tmp_path}/foreign.pt')
    torch.save({'picochat': Evil(f'{tmp_path}/made')}, f'{tmp_path}/evil.pt')
    middle = len(good) // 2
    cases = {'missing.pt': (None, 'train one first'), 'foreign.pt': (None, 'iter_num'), 'evil.pt': (None, 'refused'),
             'short.pt': (good[:middle], 'not a whole'), 'empty.pt': (b'', 'not a whole'),
             'flipped.pt': (good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:], 'expected the checksum')}
    for name, (content, expected) in cases.items():
        if content is not None:
            open(f'{tmp_path}/{name}', 'wb').write(content)
        with pytest.raises(SystemExit, match=expected) as e:
            load_checkpoint(f'{tmp_path}/{name}')
        assert '\n' not in str(e.value) and str(e.value).startswith('error: ')
    assert not os.path.exists(f'{tmp_path}/made')
    whole, refusals = load_checkpoint(path), 0
    for at in range(0, len(good), len(good) // 40):     # a flipped bit anywhere is refused, or was in none of the data
        open(f'{tmp_path}/flip.pt', 'wb').write(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        try:
            state = load_checkpoint(f'{tmp_path}/flip.pt')
            assert all(torch.equal(state['model'][name], t) for name, t in whole['model'].items())
        except SystemExit as e:
            refusals += str(e).startswith('error: ')
    assert refusals > 30


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    path = f'{tmp_path}/ckpt.pt'
    model = GPT(GPTConfig(**SMALL))
    save_checkpoint(path, model, {}, step=1)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # the system refuses to write more, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(SystemExit, match='kept'):
            save_checkpoint(path, model, {}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert load_checkpoint(path)['step'] == 1 and os.listdir(tmp_path) == ['ckpt.pt']
