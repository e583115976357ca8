"""prune.py: cutting nothing, or what does nothing, changes nothing; whatever is left does all that a model does."""
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import LLAMA, SMALL, altered, batches, outputs, ran, randomise, refuses, result_of, run

import prune as P
from data.checkpoint import load_model, save_checkpoint
from data.loader import Loader, load_meta
from data.slicing import columns
from data.tokenizer import CharTokenizer, from_meta, train_bpe
from data.vocabulary import bpe_parts, cut_tokenizer, recode
from data.writer import write_texts
from model import GPT, GPTConfig, evaluate

UNTIED = dict(out_proj=False, tie_weights=False)
SHAPES = [dict(n_kv_head=4), dict(n_kv_head=2, tie_weights=True), dict(n_kv_head=1),
          LLAMA | dict(n_kv_head=2), LLAMA | UNTIED, LLAMA | dict(out_proj=False)]
HEADS = dict(multi_token_n=2, draft_n=3)


def make(**shape):
    return randomise(GPT(GPTConfig(**(SMALL | dict(n_hidden=24, head_dim=6) | HEADS | shape))))


def cut(model, how, *args):
    return P.build(*how(model.state_dict(), model.config, *args))


@pytest.mark.parametrize('shape', SHAPES)
def test_zero_per_cent_is_the_identity(shape):
    model = make(**shape)
    c, moments = model.config, P.measure(model, batches())[1]
    g = c.n_head // c.n_kv_head
    heads = [[[kv * g + q for q in range(g)] for kv in range(c.n_kv_head)]] * c.n_layer
    for how, keep, fits in ((P.keep_neurons, [list(range(c.n_hidden))] * c.n_layer, True),
                            (P.keep_heads, heads, True), (P.merge_kv_heads, c.n_kv_head, True),
                            (P.keep_channels, list(range(c.n_embd)), True),
                            (P.keep_layers, list(range(c.n_layer)), False),
                            (P.keep_vocab, list(range(c.vocab_size)), False)):
        for fit in [(), (moments,)] if fits else [()]:
            same = cut(model, how, keep, *fit)
            assert same.config == c
            assert all(torch.equal(same.state_dict()[k], v) for k, v in model.state_dict().items())
    for kind, field in P.KINDS.items():
        assert P.shrink(model, kind, getattr(model.config, field), batches()) is model
    assert list(P.cut_to(model, model.params()['total'], batches(), importance='l1', seed=0)) == []


@torch.no_grad()
def silence(model, kind, parts):
    """Sets to zero the weights of these parts; of neurons and heads it is their neighbours in the second layer."""
    c = model.config
    if kind == 'layers':
        for i in parts:
            for p in model.transformer.h[i].parameters():
                p.zero_()
    elif kind == 'channels':
        state = P.over_channels(model.state_dict(), c, lambda site, w: w.index_fill(1, parts, 0),
                                lambda site, w: w.index_fill(0, parts, 0))
        model.load_state_dict(state)
    else:
        for i, block in enumerate(model.transformer.h):
            these = parts ^ i
            if kind == 'neurons':
                for name in {'c_fc', 'c_gate'} & block.mlp._modules.keys():
                    block.mlp.get_submodule(name).weight[these] = 0
                block.mlp.c_proj.weight[:, these] = 0
            else:
                block.attn.c_q.weight.view(c.n_head, -1)[these] = 0
                block.attn.c_proj.weight.view(c.n_embd, c.n_head, -1)[:, these] = 0
    return model


@pytest.mark.parametrize('importance', ['obs', 'taylor', 'activation', 'l1'])
@pytest.mark.parametrize('shape', SHAPES)
def test_parts_of_zeros_are_the_first_to_go_and_are_not_missed(shape, importance):
    for kind, silent in (('neurons', [1, 5, 6, 23]), ('heads', [0, 3]), ('channels', [0, 7, 8, 30]), ('layers', [0])):
        model = silence(make(**shape), kind, torch.tensor(silent))
        have = getattr(model.config, P.KINDS[kind])
        # the fit is damped: where data is as scarce as here, that shows
        for refit, tolerance in ((False, 2e-5), (True, 2e-2)):
            smaller = P.shrink(model, kind, have - len(silent), batches(), importance, refit=refit, rotate=False)
            assert getattr(smaller.config, P.KINDS[kind]) == have - len(silent)
            assert smaller.params()['total'] < model.params()['total']
            assert torch.allclose(outputs(smaller), outputs(model), atol=tolerance), (kind, refit)
        # what is not zero is missed
        if kind != 'layers':
            smaller = P.shrink(model, kind, have - len(silent) - 1, batches(), importance, rotate=False)
            assert (outputs(smaller) - outputs(model)).abs().max() > 0.01


def test_scores_by_hand():
    model, data = make(n_kv_head=2), batches()
    scores = {how: P.measure(model, data, how)[0] for how in P.IMPORTANCE}
    for s in scores.values():
        assert {kind: tuple(v.shape) for kind, v in s.items()} == {
            'neurons': (2, 24), 'heads': (2, 4), 'layers': (2,), 'channels': (32,)}
    mlp, attn = model.transformer.h[1].mlp, model.transformer.h[1].attn
    assert torch.allclose(scores['l1']['neurons'][1, 7],
                          mlp.c_fc.weight[7].abs().sum() + mlp.c_proj.weight[:, 7].abs().sum())
    of_head_1 = [attn.c_q.weight[6:12], attn.c_proj.weight[:, 6:12], attn.c_k.weight[:6] / 2, attn.c_v.weight[:6] / 2]
    assert torch.allclose(scores['l1']['heads'][1, 1], sum(w.abs().sum() for w in of_head_1))
    channel = sum(p[5].abs().sum() if name.endswith('c_proj.weight') else p[:, 5].abs().sum()
                  for name, p in model.named_parameters()) + model.draft.c_fc.weight[:, 37].abs().sum()
    assert torch.allclose(scores['l1']['channels'][5], channel)
    taylor, inputs = 0, []
    hook = mlp.c_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for x, y in data:
        model.zero_grad()
        model(x, y)['ce'].backward()
        taylor = (taylor + (mlp.c_fc.weight * mlp.c_fc.weight.grad)[7].abs().sum()
                  + (mlp.c_proj.weight * mlp.c_proj.weight.grad)[:, 7].abs().sum())
    hook.remove()
    assert torch.allclose(scores['taylor']['neurons'][1, 7], taylor)
    rms = torch.cat(inputs).flatten(0, 1)[:, 7].square().mean().sqrt()
    moments = P.measure(model, data, 'activation')[1]
    assert torch.allclose(moments['transformer.h.1.mlp.c_proj'].diagonal()[7].sqrt(), rms)
    own = (mlp.c_fc.weight[7].abs() @ moments['transformer.h.1.mlp.c_fc'].diagonal().sqrt()
           + mlp.c_proj.weight[:, 7].abs().sum() * rms)
    assert torch.allclose(scores['activation']['neurons'][1, 7], own)
    assert not torch.equal(scores['random']['neurons'], P.measure(model, data, 'random', seed=1)[0]['neurons'])
    assert torch.equal(scores['random']['neurons'], P.measure(model, data, 'random')[0]['neurons'])


@pytest.mark.parametrize('size', [1, 2])
def test_elimination_order_is_that_of_least_squares(size):
    torch.manual_seed(size)
    x, w = torch.randn(500, 12) @ torch.randn(12, 12), torch.randn(5, 12)
    moment = x.T @ x / len(x)

    def error(groups):
        keep = [n * size + i for n in groups for i in range(size)]
        return (x @ w.T - x[:, keep] @ columns(w, keep, moment).T).square().sum()

    left, gone = list(range(12 // size)), []
    while len(left) > 1:
        gone.append(min(left, key=lambda n: error([m for m in left if m != n])))
        left.remove(gone[-1])
    assert P.elimination_order(w, moment, size).argsort().tolist() == gone + left
    copies = torch.cat((x, x[:, :3]), dim=1)  # a column whose input another one repeats costs nothing
    order = P.elimination_order(torch.cat((w, w[:, :3]), dim=1), copies.T @ copies / len(x))
    assert sorted(n % 12 for n in order.argsort()[:3].tolist()) == [0, 1, 2]


@pytest.mark.parametrize('dtype, most', [('float32', 1e-6), ('bfloat16', 0.02)])
def test_leave_one_out_is_the_loss_without_the_layer(dtype, most, monkeypatch):
    monkeypatch.setattr(P, 'pick_dtype', lambda *how: dtype)
    model = make(n_layer=3)
    losses = P.leave_one_out(model, batches())
    for i in range(3):
        without = cut(model, P.keep_layers, [j for j in range(3) if j != i])
        assert abs(evaluate(without, batches())['loss'] - losses[i].item()) < most
    kept = P.shrink(model, 'layers', 2, batches(), 'loss')
    best = cut(model, P.keep_layers, [j for j in range(3) if j != losses.argmin()])
    assert torch.equal(outputs(kept), outputs(best))


@pytest.mark.parametrize('shape', SHAPES)
def test_a_rotation_of_the_stream_changes_nothing(shape):
    model = make(**shape)
    q = torch.linalg.qr(torch.randn(32, 32))[0]
    turned = cut(model, P.rotate_channels, q)
    assert torch.allclose(outputs(turned), outputs(model), atol=5e-4)
    assert not torch.allclose(turned.lm_head.weight, model.lm_head.weight, atol=0.1)
    axes = P.to_principal_axes(model, P.measure(model, batches())[1])
    assert torch.allclose(outputs(axes), outputs(model), atol=5e-4)
    total = sum(m for site, m in P.measure(axes, batches())[1].items() if not site.endswith('c_proj'))
    assert (total - total.diagonal().diag()).abs().max() < 1e-3 * total.abs().max()


def test_the_norm_is_rescaled():
    """With half of the channels silent, all that reads the stream would else be sqrt(2) too loud."""
    model = silence(make(), 'channels', torch.arange(16, 32))
    moments = P.measure(model, batches())[1]
    rescaled = cut(model, P.keep_channels, range(16), moments, False)
    assert torch.allclose(outputs(rescaled), outputs(model), atol=2e-5)
    assert (outputs(cut(model, P.keep_channels, range(16))) - outputs(model)).abs().max() > 0.1


@pytest.mark.parametrize('how, name, keep, columns', [
    (P.keep_neurons, 'mlp.c_proj', list(range(0, 85, 2)), list(range(0, 85, 2))),
    (P.keep_heads, 'attn.c_proj', [[1], [2]], list(range(8, 24)))])
@torch.no_grad()
def test_refit_is_the_least_squares_solution(how, name, keep, columns):
    model = make(n_kv_head=2, n_hidden=85, head_dim=8, **LLAMA)
    x = torch.randint(50, (40, 32))
    moments = P.measure(model, [(x, x)])[1]
    fitted, plain = (cut(model, how, [keep] * 2, *fit).get_submodule(f'transformer.h.0.{name}').weight
                     for fit in ((moments,), ()))
    site, inputs = model.get_submodule(f'transformer.h.0.{name}'), []
    site.register_forward_hook(lambda module, args, out: inputs.append(args[0].flatten(0, 1)))
    model(x)
    read, whole = inputs[0], site.weight
    best = torch.linalg.lstsq(read[:, columns], read @ whole.T).solution.T
    error = lambda weight: (read[:, columns] @ weight.T - read @ whole.T).square().mean()
    assert torch.equal(plain, whole[:, columns])
    assert error(fitted) < 1.01 * error(best) < 0.9 * error(plain)


@pytest.mark.parametrize('block', [{}, LLAMA])
@pytest.mark.parametrize('n, left', [(4, 2), (4, 1), (2, 1)])
def test_heads_that_are_turned_copies_merge_without_loss(n, left, block):
    model = make(n_kv_head=n, **block)
    c = model.config
    for block in model.transformer.h:
        a = block.attn
        with torch.no_grad():
            # keys: (heads, 2, planes, n_embd)
            k, v = a.c_k.weight.view(n, 2, 3, 32), a.c_v.weight.view(n, 6, 32)
            for h in range(n):
                first, angle = h - h % (n // left), 6.3 * torch.rand(3, 1)
                if h > first:
                    k[h] = (0.5 + h) * torch.stack((k[first, 0] * angle.cos() - k[first, 1] * angle.sin(),
                                                    k[first, 0] * angle.sin() + k[first, 1] * angle.cos()))
                    v[h] = (0.5 + h) * torch.linalg.qr(torch.randn(6, 6))[0] @ v[first]
    moments = P.measure(model, batches())[1]
    for how in ((), (moments,)):
        merged = cut(model, P.merge_kv_heads, left, *how)
        assert (merged.config.n_kv_head, merged.config.n_head) == (left, c.n_head)
        assert merged.kv_bytes_per_token() * n == model.kv_bytes_per_token() * left
        assert torch.allclose(outputs(merged), outputs(model), atol=5e-4)
    plain = cut(model, P.merge_kv_heads, left, None, 'plain')
    assert (outputs(plain) - outputs(model)).abs().mean() > 0.1


def test_aligned_averaging_is_better_than_plain():
    model = make()
    moments = P.measure(model, batches())[1]
    error = lambda *how: (outputs(cut(model, P.merge_kv_heads, 1, *how)) - outputs(model)).square().mean().item()
    assert error(moments) < 0.9 * min(error(None, 'plain'), error(None, 'first'))


def test_copies_merge_without_loss_however_they_are_merged():
    model = make()
    with torch.no_grad():
        for block in model.transformer.h:
            for part in (block.attn.c_k, block.attn.c_v):
                part.weight.copy_(part.weight[:model.config.head_dim].repeat(model.config.n_kv_head, 1))
    for how in P.MERGE:
        assert torch.allclose(outputs(cut(model, P.merge_kv_heads, 1, None, how)), outputs(model), atol=5e-4)


@pytest.mark.parametrize('shape', SHAPES)
def test_every_size_down_to_the_smallest_works(shape, tmp_path):
    whole = make(**shape)
    c, measured = whole.config, P.measure(whole, batches(1))
    for kind, field in P.KINDS.items():
        have = getattr(c, field)
        for keep in sorted({*range(1, min(have, 4) + 1), *range(7, have, 6), have}):
            model = P.shrink(whole, kind, keep, batches(1), rotate=False, measured=measured)
            size = getattr(model.config, field)
            # of heads it may keep fewer than asked for: groups stay equal
            assert size == keep or kind == 'heads' and keep - c.n_kv_head < size < keep
            assert outputs(model).isfinite().all() and model.config.n_head % model.config.n_kv_head == 0
            assert model.config.n_kv_head == (min(keep, c.n_kv_head) if kind == 'heads' else c.n_kv_head)
    small = whole
    for kind, keep in (('layers', 1), ('neurons', 11), ('heads', 2), ('channels', 19)):
        small = P.shrink(small, kind, keep, batches())
    small = cut(small, P.merge_kv_heads, 1, P.measure(small, batches())[1])
    save_checkpoint(f'{tmp_path}/best.pt', small, {'kind': 'char', 'chars': 'a'})
    again = load_model(f'{tmp_path}/best.pt')[0]
    assert again.config == small.config and torch.equal(outputs(again), outputs(small))


def test_keep_params_reaches_its_target():
    model = make(n_kv_head=2)
    n = model.params()['total']
    how = dict(importance='taylor', refit=True, rotate=True, seed=0)
    for share in (0.8, 0.3):
        steps = list(P.cut_to(model, share * n, batches(1), **how))
        smaller = steps[-1][3]
        assert smaller.params()['total'] <= share * n
        assert all(m.params()['total'] > share * n for _, _, _, m in steps[:-1])
        assert abs(evaluate(smaller, batches(1))['loss'] - steps[-1][2]) < 1e-6
    assert smaller.params()['total'] > 0.25 * n
    with pytest.raises(ValueError, match='smallest shape'):
        list(P.cut_to(make(n_layer=1, n_embd=2, n_head=1, n_hidden=2, head_dim=2), 10, batches(1), **how))


TEXT = ['def low(): return lower\n',
        'the lowest of the slow, slower, slowest; the newest lower case\n' * 3,
        'a "quoted" näive text\n']


def test_cut_characters():
    old = CharTokenizer(''.join(TEXT))
    ids = np.array(old.encode(''.join(TEXT)))
    counts = np.bincount(ids, minlength=old.vocab_size)
    keep, new = cut_tokenizer(old, counts, 9)
    assert (len(keep) == new.vocab_size == 9 and keep == sorted(keep)
            and counts[keep].min() >= np.delete(counts, keep).max())
    assert [new.chars[i] for i in range(9)] == [old.chars[i] for i in keep]
    refuses('no token for', new.encode, 'ä')
    assert new.decode(recode(ids, old, new)) == ''.join(c for c in ''.join(TEXT) if c in new.chars)
    assert cut_tokenizer(old, counts, old.vocab_size)[1].meta() == old.meta()


def test_cut_bpe():
    old = train_bpe(TEXT * 4, 256 + 9 + 30)
    ids = np.array(sum(([old.bos] + old.encode(text) for text in TEXT), []))
    counts = np.bincount(ids, minlength=old.vocab_size)
    tokens = [bytes(old.decode_bytes([i])) for i in range(old.vocab_size)]
    for n in (old.vocab_size, 285, 275, 256 + 9):
        keep, new = cut_tokenizer(old, counts, n)
        assert new.vocab_size == len(keep) == n and new.special_tokens == old.special_tokens
        assert [new.decode_bytes([i]) for i in range(n)] == [tokens[i] for i in keep]  # renumbered, in the same order
        assert keep[:256] == list(range(256)) and new.bos == n - 9  # every byte, every special token
        for text in TEXT + ['naïve ünd 漢字', ' lowest' * 5, 'lo we st', '"slo" west']:
            assert new.decode(new.encode(text)) == text
            if set(old.encode(text)) <= set(keep):
                assert [keep[i] for i in new.encode(text)] == old.encode(text)  # nothing cut: encoded as before
        ranks = {tokens[i]: i for i in keep[:n - 9]}
        # every token left can still be merged from bytes
        for token in ranks:
            assert (len(token) == 1
                    or all(part in ranks for part in bpe_parts(token, ranks)) and len(bpe_parts(token, ranks)) == 2)
        assert recode(ids, old, new).tolist() == sum(([new.bos] + new.encode(text) for text in TEXT), [])
    # a cut token alone falls back to its two parts
    keep, new = cut_tokenizer(old, counts, old.vocab_size - 1)
    gone, = set(range(old.vocab_size)) - set(keep)
    assert ([new.decode_bytes([i]) for i in new.encode(tokens[gone].decode())]
            == bpe_parts(tokens[gone], {t: i for i, t in enumerate(tokens[:-9])}))
    assert not any(tokens[gone] in bpe_parts(t, {t: i for i, t in enumerate(tokens[:-9])}) for t in tokens[256:-9])


def test_kept_rows_answer_as_before():
    for shape in SHAPES:
        model, keep = make(**shape), [0, 4, 5, 17, 49]
        smaller = cut(model, P.keep_vocab, keep)
        x = torch.randint(5, (2, 20))
        assert torch.allclose(outputs(smaller, x), outputs(model, torch.tensor(keep)[x])[:, keep], atol=1e-5)
    # a draft head goes on choosing from those that it has learnt
    model = make(draft_n=1, draft_vocab=6)
    assert cut(model, P.keep_vocab, keep).config.draft_vocab == 3
    refuses('keep more', cut, model, P.keep_vocab, [6, 7])


def test_impossible_requests_are_refused_in_one_line():
    model = make(n_kv_head=2)
    bpe = train_bpe(TEXT, 275)
    for words, how, *args in (
            ('neurons', cut, model, P.keep_neurons, [[1, 2], [3]]),
            ('key/value head', cut, model, P.keep_heads, [[[0, 2]], [[0, 1]]]),
            ('group', cut, model, P.keep_heads, [[[0], [2, 3]]] * 2),
            ('kv_heads', cut, model, P.merge_kv_heads, 3),
            ('layers', cut, model, P.keep_layers, []),
            ('at most the 4', P.shrink, model, 'heads', 5, batches()),
            ('at least 1', P.shrink, model, 'layers', 0, batches()),
            ('at least 265', cut_tokenizer, bpe, [1] * 275, 264),
            ('at most', cut_tokenizer, bpe, [1] * 275, 276)):
        with pytest.raises(ValueError, match=words) as e:
            how(*args)
        assert '\n' not in str(e.value)

# ----- the script

def prune(folder, *flags):
    return run('prune.py', f'--out_dir={folder}/out', '--device=cpu', '--calibration_batches=1', *flags)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a model's")
    write_texts(f'{folder}/data', TEXT * 40, TEXT * 20, 'bpe', 'a test', 290)
    save_checkpoint(f'{folder}/out/best.pt', make(vocab_size=290, block_size=32),
                    from_meta(load_meta(f'{folder}/data')).meta(), dataset=f'{folder}/data',
                    knobs={'init_from': 'scratch', 'muon_lr': 0.02, 'adam_lr': 0.01, 'quant_bits': 8})
    return folder


def test_the_script_cuts_channels_then_neurons_then_heads(trained):
    got = prune(trained, '--channel_prune_ratio=0.5', '--neuron_prune_ratio=0.5', '--head_prune_ratio=0.5')
    assert got.status == 0, got.err
    seen = [Loader(f'{trained}/data', 'train', 16, 32, 1337).batch(0)]
    model = make(vocab_size=290, block_size=32)
    for kind, keep in (('channels', 16), ('neurons', 12), ('heads', 2)):
        model = P.shrink(model, kind, keep, seen, seed=1337)
    state = load_model(f'{trained}/out-pruned/best.pt')[0].state_dict()
    assert all(torch.allclose(state[name], w, atol=1e-5) for name, w in model.state_dict().items())


TRAIN = ['--batch_size=4', '--max_iters=2', '--compile=False', '--sample_interval=0', '--device=cpu']


def test_the_script(trained, tmp_path):
    got = prune(trained, f'--save_dir={tmp_path}', f'--dataset={trained}/data', '--vocab_keep=280', '--layers=1',
                '--neuron_prune_ratio=0.5', '--head_prune_ratio=0.5', '--kv_heads=1',
                '--channel_prune_ratio=0.25', '--keep_params=0.3')
    result = result_of(got)
    assert result.keys() >= {'file', 'bytes', 'params_before', 'params_after', 'val_loss_before', 'val_loss_after',
                             'bpb_before', 'bpb_after', 'tok_s_before', 'tok_s_after'}
    assert result['file'] == f'{tmp_path}/best.pt'
    assert result['params_before'] == make(vocab_size=290).params()['total']
    assert result['params_after'] <= 0.3 * result['params_before']
    assert '--muon_lr=0.004 --adam_lr=0.002' in got.out and '--teacher' not in got.out
    smaller, state = load_model(result['file'])
    c = smaller.config
    assert state['dataset'] == f'{trained}/data_v280'
    assert (c.n_layer, c.n_kv_head, c.vocab_size) == (1, 1, 280)
    assert c.n_hidden <= 12 and c.n_embd <= 24
    assert smaller.params()['total'] == result['params_after']

    again = result_of(run('quantize.py', f'--out_dir={tmp_path}', '--device=cpu'))
    assert again['method'] == 'gptq'  # not qat: what was refitted was not trained through the rounding
    assert abs(again['val_loss_float'] - result['val_loss_after']) < 1e-5
    document = result_of(run('train.py', f'--init_from={tmp_path}/best.pt', f'--dataset={trained}/data_v280',
                             f'--out_dir={tmp_path}/again', '--block_size=32', '--muon_lr=0', '--adam_lr=0', *TRAIN))
    assert document['val_loss'] == pytest.approx(result['val_loss_after'], abs=1e-3)
    assert load_model(f'{tmp_path}/again/best.pt')[0].config == c
    got = ran('sample.py', f'--out_dir={tmp_path}', '--weights=float', '--start=low', '--max_new_tokens=5',
              '--drafter=head', '--device=cpu')
    assert got.out.startswith('low')


def test_the_command_that_it_prints(trained):
    ran('train.py', f'--dataset={trained}/data', f'--out_dir={trained}/learnt/out', '--n_layer=2', '--n_embd=32',
                 '--n_head=4', '--block_size=32', *TRAIN, '--max_iters=60')  # or it would be refused as a teacher
    got = prune(trained / 'learnt', '--neuron_prune_ratio=0.5', f'--save_dir={trained}/half')
    command = re.search('python (train.py .*)', got.out)[1]
    ran(*shlex.split(command), *TRAIN)  # few steps, for speed
    assert load_model(f'{trained}/half-recovered/best.pt')[1]['knobs']['teacher'] == f'{trained}/learnt/out'


@pytest.fixture
def gone(trained, tmp_path):
    altered(trained / 'out' / 'best.pt', tmp_path / 'out', dataset='gone')
    return tmp_path


def test_what_needs_no_text_goes_without(trained, gone):
    how = ('--layers=1,', '--neuron_prune_ratio=0.5', '--head_prune_ratio=0.5', '--channel_prune_ratio=0.25',
           '--importance=l1', '--refit=False', '--rotate=False', '--kv_heads=1', '--kv_merge=plain')
    got = prune(gone, *how)
    assert got.status == 0 and got.out.count('is gone: what is left is not measured') == 1, got.err
    result = result_of(got)
    assert {key for key in result if result[key] is None} == {
        f'{what}_{when}' for what in ('val_loss', 'bpb') for when in ('before', 'after')}
    c = load_model(result['file'])[0].config
    assert (c.n_layer, c.n_embd, c.n_hidden, c.n_kv_head) == (1, 24, 12, 1)
    whole = prune(gone, *how, '--channel_prune_ratio=0', f'--save_dir={gone}/a')
    again = prune(gone, *how, '--channel_prune_ratio=0', f'--save_dir={gone}/b', f'--dataset={trained}/data')
    assert whole.status == again.status == 0 and result_of(again)['val_loss_after'] is not None
    a, b = (load_model(f'{gone}/{name}/best.pt')[0].state_dict() for name in 'ab')
    assert all(torch.equal(a[name], b[name]) for name in a)
