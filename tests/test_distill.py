"""distill.py: gradients of the plain formulas, labels that are unbiased, and the whole path."""
import copy
import json
import math
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, altered, largest_difference, refused, refuses, result_of, run, train, write_nanogpt

import model as model_file
from data.checkpoint import load_checkpoint, shape_of_student
from data.foreign.gpt2 import GPT2, GPT2Config
from data.judge import check_reading, loss_on_text
from data.labels import Labels, Recipe, choose_labels, fit_temperature, write_labels
from data.loader import Loader, held_out
from data.teachers import Teacher, in_bfloat16, load_teacher, load_teachers
from data.tokenizer import from_meta
from distill import DIVERGENCES, Distiller
from model import GPT, GPTConfig

SHAPE = dict(block_size=16, vocab_size=23, n_layer=2, n_head=2, n_embd=16, n_hidden=24)


def random_model(seed=0, **more):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **more}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch(B=3, T=16, seed=1):
    text = torch.randint(23, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    targets = text[:, 1:].clone()
    targets[0, 3:7] = -1
    return text[:, :-1], targets


def taught(model, ids, steps=40):
    torch.manual_seed(0)
    optimizer, ids = torch.optim.Adam(model.parameters(), 0.01), torch.as_tensor(ids)
    for _ in range(steps):
        rows = ids[torch.randint(len(ids) - 17, (16, 1)) + torch.arange(17)]
        logits = model.logits(model.trunk(rows[:, :-1]))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    return model.eval()


def close(a, b, rtol=1e-5, atol=0):
    return torch.allclose(a, b, rtol=rtol, atol=atol)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(model_file, 'LOSS_CHUNK_BYTES', 4 * 23 * 5)  # five tokens at a time


# ----- losses

@pytest.mark.parametrize('kind', DIVERGENCES)
@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_losses_and_gradients_are_those_of_the_plain_formulas(kind, temperature, small_chunks):
    student = random_model(multi_token_n=2, draft_n=2).double()
    teachers = [random_model(s, n_layer=s).double().requires_grad_(False) for s in (1, 3)]
    idx, y = batch()
    losses = Distiller(student, teachers, kind, temperature)(idx, y)
    sum(losses.values()).backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    assert all(g.abs().sum() > 0 for g in got.values())
    assert all(p.grad is None for t in teachers for p in t.parameters())

    student.zero_grad()
    p = sum((t(idx) / temperature).softmax(-1) for t in teachers) / 2
    q = (student(idx) / temperature).softmax(-1)
    m = (p + q) / 2
    kl = lambda a, b: F.kl_div(b.log(), a, reduction='none').sum(-1)
    apart = {'forward_kl': kl(p, q), 'reverse_kl': kl(q, p), 'jsd': (kl(p, m) + kl(q, m)) / 2}[kind]
    plain = student.head_losses(student.trunk(idx), y, idx)
    plain['kl'] = temperature ** 2 * apart[y >= 0].mean()
    plain['ce'] = F.cross_entropy(student(idx)[y >= 0], y[y >= 0])
    sum(plain.values()).backward()
    assert losses.keys() == plain.keys() and losses['kl'] > 1e-3
    for name in losses:
        assert close(losses[name], plain[name], rtol=1e-12), name
    for name, p in student.named_parameters():
        assert close(got[name], p.grad, rtol=1e-9, atol=1e-12), name


def test_labels_that_say_all_teach_what_the_teacher_teaches(small_chunks):
    student, teacher = random_model(draft_n=2).double(), random_model(1).double()
    idx, y = batch()
    log_p = (teacher(idx).detach() / 1.5).log_softmax(-1)
    labels = torch.arange(23).expand(3, 16, 23), log_p.exp(), -(log_p.exp() * log_p).sum(-1)
    got = []
    for distiller, soft in ((Distiller(student, [teacher], temperature=1.5), ()),
                            (Distiller(student, temperature=1.5), labels)):
        student.zero_grad()
        losses = distiller(idx, y, *soft)
        sum(losses.values()).backward()
        got.append([*losses.values(), *(p.grad.clone() for p in student.parameters())])
    beside, labelled = got
    assert len(beside) == len(labelled)
    assert all(close(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(beside, labelled))


@pytest.mark.parametrize('tied', [False, True, 'GPT-2'])
def test_a_teacher_whose_matrices_are_in_bfloat16_teaches_the_same(tied):
    student = random_model()
    teacher = random_model(1, tie_weights=tied is True)
    if tied == 'GPT-2':
        teacher = GPT2(GPT2Config(gelu='tanh', **SHAPE))
        teacher.lm_head.weight = teacher.transformer.wte.weight
    idx, _ = batch()
    with torch.autocast('cpu', torch.bfloat16):
        before = Distiller(student, [teacher])(idx, idx)['kl'].item()
        after = Distiller(student, [in_bfloat16(teacher)])(idx, idx)['kl'].item()
    assert before == after > 0
    assert teacher.lm_head.weight.dtype == torch.bfloat16
    assert teacher.transformer.wte.weight.dtype == torch.float32


# ----- labels

def test_sampled_labels_are_unbiased_and_top_k_is_not():
    """The gradient on labels, averaged over many draws of 4, against the full KL's, within five standard errors."""
    torch.manual_seed(0)
    s, log_p = torch.randn(9), (2 * torch.randn(9)).log_softmax(-1)
    full = s.softmax(-1) - log_p.exp()  # d KL / d logits
    n = 50000
    generator = torch.Generator().manual_seed(3)
    gradient = {}
    for method in ('sample', 'topk'):
        ids, p = choose_labels(log_p.expand(n, 9), method, 4, generator)
        p = torch.full(ids.shape, 0.25) if p is None else p
        gradient[method] = s.softmax(-1) - torch.zeros(n, 9).scatter_add_(1, ids, p)  # (n, 9)
    error = 5 * gradient['sample'].std(dim=0) / math.sqrt(n)
    off = {method: (g.mean(0) - full).abs() for method, g in gradient.items()}
    assert (error > 0).all() and (off['sample'] < error).all()
    assert off['topk'].max() > 10 * error.max()


@pytest.fixture(scope='module')
def data(toy):
    return toy.removeprefix('--dataset=')


@pytest.fixture
def loader(data):
    loader = Loader(data, 'train', 4, 16)
    loader.tokens, loader.n_tokens = loader.tokens[:1600], 1600
    return loader


@pytest.fixture
def teachers(loader):
    return [Teacher('', random_model(s, vocab_size=len(loader.meta['chars']))) for s in (1, 2)]


def all_of_it(teachers, **how):
    """Labels of the whole vocabulary: nothing is drawn or left out."""
    return Recipe('topk', teachers[0].model.config.vocab_size, **how)


@pytest.mark.parametrize('row', [None, 16])
def test_labels_of_the_whole_vocabulary_are_the_teacher(loader, teachers, tmp_path, row):
    loader.row = row
    write_labels(tmp_path, teachers, loader, all_of_it(teachers, temperature=1.5))
    student = random_model(5, vocab_size=teachers[0].model.config.vocab_size)
    labels = Labels(tmp_path, loader)
    for start in (0, 48, 66):
        x, y = loader.rows([start])
        # the first quarter of a later window lies in the one before, too: its labels have seen more than x shows
        y[:, :4] = -1 if start and not row else y[:, :4]
        start_of_window = start % (row or 12) == 0
        cached = Distiller(student, temperature=1.5)(x, y, *labels.batch([start], 16))['kl']
        online = Distiller(student, [t.model for t in teachers], temperature=1.5)(x, y)['kl']
        assert (abs(cached - online) < 2e-3 * online) == start_of_window, (start, cached, online)
    assert len(labels.table) == loader.n_tokens
    assert (labels.table['p'].astype(float).sum(-1) > 0.99).all()


def test_teachers_label_only_what_they_have_not_seen(loader, teachers, tmp_path):
    one, two = teachers
    recipe, n = all_of_it(teachers), loader.n_tokens
    first = held_out('1/2', np.arange(n), n)  # one's half
    fold_one, fold_two = Teacher('', one.model, hold_out='1/2'), Teacher('', two.model, hold_out='2/2')
    with pytest.raises(ValueError, match=f'nobody can label token {first.argmin():,} of {n:,}.*hold_out'):
        write_labels(tmp_path / 'x', [fold_one], loader, recipe)
    at = {}
    for name, who in (('halves', [fold_two, fold_one]), ('one', [one]), ('two', [two]), ('both', [one, two]),
                      ('more', [one, fold_two])):
        write_labels(tmp_path / name, who, loader, recipe)
        at[name] = Labels(tmp_path / name, loader).table
    ones = np.append(first[1:], first[-1])  # record i is of token i + 1
    assert (at['halves'][ones] == at['one'][ones]).all() and (at['halves'][~ones] == at['two'][~ones]).all()
    assert (at['more'][ones] == at['one'][ones]).all() and (at['more'][~ones] == at['both'][~ones]).all()
    assert (at['one'] != at['two']).mean() > 0.99


def test_calibration_finds_how_sure_a_teacher_may_be(loader, tmp_path):
    n_ids = len(loader.meta['chars'])
    p = torch.bincount(torch.from_numpy(loader.tokens.astype('int64')), minlength=n_ids) / loader.n_tokens
    teachers = [Teacher('', random_model(vocab_size=n_ids), hold_out=fold) for fold in ('1/2', '2/2')]
    for teacher in teachers:
        teacher.model.logits = lambda x: 1.4 * p.clamp(min=1e-6).log().expand(len(x), n_ids)
    calibration = fit_temperature(teachers, loader, batches=10**6)
    assert calibration == pytest.approx(1.4)
    meta = write_labels(tmp_path, teachers, loader, all_of_it(teachers, calibration=calibration))
    assert meta['calibration'] == calibration
    record = Labels(tmp_path, loader).table[7]
    assert close(torch.from_numpy(record['p'].astype('float32')), p[record['ids'].astype('int64')], atol=1e-3)
    loader.mask = loader.tokens == p.argmax().item()  # of chats what is not learnt does not count
    assert fit_temperature(teachers, loader, batches=10**6) == 0.8


@pytest.mark.parametrize('method', ['sample', 'topk'])
@pytest.mark.parametrize('stop', [0, 1, 30, 'labels.bin', 'meta.json'])
def test_labels_go_on_where_they_stopped(method, stop, loader, teachers, tmp_path, monkeypatch):
    folder, whole, recipe = tmp_path / 'labels', tmp_path / 'whole', Recipe(method, 3)
    write_labels(whole, teachers, loader, recipe)
    rows, replace, seen = loader.rows, os.replace, []

    def stopped(starts):
        seen.append(starts)
        if len(seen) == stop + 1:
            raise KeyboardInterrupt
        return rows(starts)

    def killed(old, new):
        if str(new).endswith(stop):
            raise KeyboardInterrupt
        replace(old, new)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(*(loader, 'rows', stopped) if isinstance(stop, int) else (os, 'replace', killed))
        write_labels(folder, teachers, loader, recipe)
    part, made = folder / 'labels.bin.part', None
    if stop == 'meta.json':
        made = os.stat(folder / 'labels.bin')
    if stop == 1:
        part.write_bytes(part.read_bytes() + b'a torn record')
    if stop == 30:  # the last records of a batch did not reach the disk
        part.write_bytes(part.read_bytes()[:-20])
    refuses('of another kind', write_labels, folder, teachers, loader, Recipe(method, 4))
    write_labels(folder, teachers, loader, recipe)
    assert (folder / 'labels.bin').read_bytes() == (whole / 'labels.bin').read_bytes()
    assert sorted(os.listdir(folder)) == ['labels.bin', 'meta.json']
    again = os.stat(folder / 'labels.bin')
    assert not made or (made.st_ino, made.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)


# ----- the whole path

@pytest.fixture(scope='module')
def teacher(toy, tmp_path_factory):
    out_dir = str(tmp_path_factory.mktemp('teacher'))
    train(out_dir, toy, '--n_embd=32', '--max_iters=60', '--eval_interval=60', '--muon_lr=0.02', '--log_interval=40')
    return out_dir


@pytest.fixture(scope='module')
def folds(toy, tmp_path_factory):
    folders = [str(tmp_path_factory.mktemp(f'fold{i}')) for i in (1, 2)]
    for i, folder in enumerate(folders):
        train(folder, toy, f'--hold_out={i + 1}/2', '--max_iters=30', '--eval_interval=30')
    return folders


def script(*args):
    got = run('distill.py', '--compile=False', *args)
    assert not got.err
    return result_of(got)


def test_teacher_labels_student(toy, data, teacher, tmp_path):
    n_ids = len(Loader(data, 'val', 4, 16).meta['chars'])
    labels = tmp_path / 'labels'
    written = script(f'--teacher={teacher}+{teacher}', f'--out_dir={labels}', toy, '--method=topk', f'--k={n_ids}')
    assert written['bytes'] == os.path.getsize(labels / 'labels.bin') == written['tokens'] * (2 + 4 * n_ids)
    how = toy, '--alpha=0.9', '--max_iters=40', '--eval_interval=40', '--log_interval=40'
    beside = train(tmp_path / 'beside', f'--teacher={teacher}', *how)
    labelled = train(tmp_path / 'labelled', f'--teacher={labels}', *how)
    control = train(tmp_path / 'control', *how)
    assert abs(beside['val_loss'] - labelled['val_loss']) < 0.05 and beside['val_loss'] != control['val_loss']
    forward = load_teacher(teacher).model.flops_per_token(training=False)
    assert labelled['flops'] == control['flops'] == beside['flops'] - beside['tokens'] * forward
    refused(run('distill.py', f'--teacher={teacher}', f'--out_dir={labels}', toy), 'already holds labels')
    refused(run('train.py', *TINY, f'--teacher={labels}', f'--out_dir={tmp_path}/x', toy, '--temperature=2'),
            'are for forward_kl at temperature 1.0')


def test_a_student_learns_through_the_rounding(toy, data, teacher, tmp_path, interrupt):
    script(f'--teacher={teacher}', f'--out_dir={tmp_path}/labels', '--k=4')
    n = Loader(data, 'train', 4, 16).n_windows // 4 + 3
    how = (toy, f'--teacher={tmp_path}/labels', '--quant_bits=8', f'--max_iters={n}', f'--eval_interval={n}',
           '--save_interval=0')
    once = train(tmp_path / 'once', *how)
    interrupt(n - 2, signal.SIGTERM)
    assert train(tmp_path / 'twice', *how)['iters'] == n - 1
    interrupt(n + 9, signal.SIGTERM)
    twice = train(tmp_path / 'twice', *how, '--init_from=resume')
    assert twice['val_loss'] == once['val_loss']
    got = run('quantize.py', f'--out_dir={tmp_path}/once')
    assert result_of(got)['val_loss_quant'] == pytest.approx(once['val_loss'], abs=1e-5), got.err


def test_folds_go_the_whole_way(toy, folds, tmp_path):
    both = '+'.join(folds)
    written = script(f'--teacher={both}', f'--out_dir={tmp_path}/labels')
    # each teacher labels half of the text, and windows overlap by a quarter
    forward = load_teacher(folds[0]).model.flops_per_token(training=False)
    assert written['flops'] == pytest.approx(4 / 3 * written['tokens'] * forward, rel=1e-6)
    train(tmp_path / 'student', toy, f'--teacher={tmp_path}/labels', '--max_iters=4', '--eval_interval=4')
    script(f'--teacher={both}', f'--out_dir={tmp_path}/calibrated', '--calibrate=True')
    refused(run('train.py', *TINY, toy, f'--teacher={tmp_path}/labels', '--hold_out=1/2', f'--out_dir={tmp_path}/x'),
            'were written for other tokens')


def test_a_copy_of_a_fold_is_a_fold(folds, tmp_path):
    script(f'--teacher={folds[0]}', f'--to_picochat={tmp_path}/copy')
    assert load_teacher(f'{tmp_path}/copy').hold_out == '1/2'
    refused(run('distill.py', f'--teacher={folds[1]}', f'--to_picochat={tmp_path}/copy'), 'already holds a best.pt')


@pytest.mark.parametrize('command, pattern', [
    # a fold of this very dataset, however it is spelled
    ('distill.py --teacher={1} {toy}/ --out_dir={x}', 'nobody can label token 0'),
    ('distill.py --teacher={1} --calibrate=True --out_dir={x}', 'nobody can label token 0'),
    ('distill.py --teacher={x}+{1} --out_dir={x}/y', 'prepared anew'),
    ('train.py {tiny} {toy} --teacher={0}+{1} --out_dir={x}', 'was trained with hold_out: write labels'),
    ('train.py {tiny} {toy} --init_from={0}/best.pt --hold_out=2/2 --out_dir={x}', 'it has seen that part'),
    ('train.py {tiny} {toy} --init_from=resume --out_dir={0}', "hold_out is '1/2' there and '' here")])
def test_nobody_is_taught_by_who_has_seen_the_text(command, pattern, toy, folds, tmp_path):
    altered(f'{folds[0]}/best.pt', tmp_path, data='of another text')
    refused(run(*command.format(*folds, toy=toy, x=tmp_path, tiny=' '.join(TINY)).split()), pattern)
    assert os.listdir(tmp_path) == ['best.pt']


def test_labels_that_are_not_as_they_should_be(loader, teachers, tmp_path):
    folder = tmp_path / 'a b;c'
    write_labels(folder, teachers, loader, Recipe('topk', 2))
    meta, table = (folder / 'meta.json').read_text(), (folder / 'labels.bin').read_bytes()
    again = r'.*write them again, python distill.py --teacher=... --out_dir=.[^ ]*/a b;c.$'  # in quotes
    for change, match in (
            ({'vocab_size': 10**4}, 'are of 10,000 tokens, and this dataset has'),
            ({'method': 'none'}, "method 'none'"), ({'k': 10**12}, 'are 1000000000000 of'), ({'k': 0}, 'are 0 of'),
            ({'k': '2'}, "says that k is '2', not int"), ({'data': None}, 'says that data is None'),
            ({'temperature': []}, 'says that temperature is')):
        (folder / 'meta.json').write_text(json.dumps(json.loads(meta) | change))
        refuses(match + again, Labels, folder, loader)
    for text in ('{"k": ', '[' * 10**5, '[]'):
        (folder / 'meta.json').write_text(text)
        refuses('meta.json is damaged.*write them again', Labels, folder, loader)
    (folder / 'meta.json').write_text(meta)
    for name, value in (('entropy', math.nan), ('entropy', -1), ('p', math.nan), ('ids', 10**4)):
        records = np.frombuffer(table, Labels(folder, loader).table.dtype).copy()
        records[name][7] = value
        (folder / 'labels.bin').write_bytes(records.tobytes())
        refuses(f'labels.bin has {name} that cannot be' + again, Labels, folder, loader)
        (folder / 'labels.bin').write_bytes(table)
    (folder / 'labels.bin').write_bytes(table + b'more')
    refuses('labels.bin has .* bytes, expected', Labels, folder, loader)


@pytest.mark.parametrize('head', ['draft', 'multi_token'])
def test_a_head_is_trained_on_a_frozen_trunk(head, toy, teacher, tmp_path, interrupt):
    how = (*TINY, toy, f'--train_only={head}', f'--{head}_n=2', '--own_samples=0.5',
           '--quant_bits=8', '--muon_lr=0.05', '--max_iters=30', '--eval_interval=15')
    start = f'--init_from={teacher}/best.pt'
    how += ('--draft_vocab=8',)  # the most frequent ones only
    got = run('train.py', *how, f'--out_dir={tmp_path}/once', start)
    losses = [float(loss) for loss in re.findall(rf'\+ {head} ([\d.]+)', got.out)]
    assert got.status == 0 and len(losses) == 30 and losses[-1] < 0.9 * losses[0], (got.err, losses)
    before, after = (load_checkpoint(path)['model'] for path in (f'{teacher}/best.pt', tmp_path / 'once' / 'best.pt'))
    assert all(torch.equal(before[k], after[k]) for k in before)
    new = after.keys() - before.keys()
    assert len(new) == (2 if head == 'draft' else 4) and all(after[k].abs().sum() > 0 for k in new)
    interrupt(19, signal.SIGTERM)
    assert 'stopped at step 20' in run('train.py', *how, f'--out_dir={tmp_path}/twice', start).out
    interrupt(99, signal.SIGTERM)
    assert run('train.py', *how, f'--out_dir={tmp_path}/twice', '--init_from=resume').status == 0
    once, twice = (load_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('once', 'twice'))
    assert largest_difference(*({k: c[k] for k in ('model', 'optimizers')} for c in (once, twice))) == 0
    # no weight depends on what it chooses from, nor on how far it is unrolled: the knobs decide
    wider = shape_of_student(GPTConfig(**once['config'] | {'draft_n': 1, 'draft_vocab': 9}), once)
    assert wider.draft_vocab == 9 and (head == 'multi_token' or wider.draft_n == 1)


# ----- teachers that know the text, and those that do not

@pytest.fixture(scope='module')
def nanogpts(data, tmp_path_factory):
    """nanoGPT files: right has learnt this text, wrong another alphabet of the size, padded is right with 64 rows."""
    root, loader = tmp_path_factory.mktemp('nanogpts'), Loader(data, 'train', 4, 16)
    n, ids = len(loader.meta['chars']), torch.from_numpy(loader.tokens.astype('int64'))
    shape = dict(block_size=16, n_layer=2, n_head=2, n_embd=16, bias=False)
    for name, size, text in (('right', n, ids), ('wrong', n, n - 1 - ids), ('padded', 64, ids)):
        model = taught(GPT2(GPT2Config(vocab_size=size, n_hidden=64, **shape)), text, 80)
        write_nanogpt(root / f'{name}.pt', model.state_dict(), vocab_size=size, **shape)
    return root


def test_a_learnt_teacher_of_another_alphabet_is_refused(toy, nanogpts, tmp_path):
    line = r'teacher gpt2:.*: loss ([\d.]+) nats a token on ([\d,]+) tokens of the text, where guessing .* ([\d.]+)\n'
    for script, args in (('train.py', TINY), ('distill.py', ['--compile=False'])):
        for name in ('right', 'padded'):
            got = run(script, *args, toy, f'--teacher=gpt2:{nanogpts}/{name}.pt', f'--out_dir={tmp_path}/{script}-{name}')
            loss, n, guess = re.search(line, got.out).groups()
            assert got.status == 0 and float(loss) < float(guess) - 0.3 and 1000 < int(n.replace(',', '')) <= 8192
        got = run(script, *args, toy, f'--teacher=gpt2:{nanogpts}/wrong.pt', f'--out_dir={tmp_path}/{script}-wrong')
        refused(got, r'wrong.pt is no better on this text \([\d.]+ nats a token\) than guessing .*its own|own, or take')
        assert not list(tmp_path.glob(f'{script}-wrong/*.pt')) + list(tmp_path.glob(f'{script}-wrong/labels*'))


@pytest.mark.parametrize('fold', ['', '2/3'])
def test_a_teachers_loss_on_the_text(data, teachers, fold):
    loader = Loader(data, 'train', 3, 16)
    teacher = replace(teachers[0], hold_out=fold)
    n_windows, n_ids = loader.n_tokens // 16, len(loader.meta['chars'])
    x, y = loader.rows([16 * i for i in range(n_windows)])
    may = torch.ones_like(y, dtype=torch.bool)
    if fold:
        may = held_out(fold, 16 * torch.arange(n_windows)[:, None] + torch.arange(1, 17), loader.n_tokens)
        may &= held_out(fold, 16 * torch.arange(n_windows) + 8, loader.n_tokens)[:, None]
    may &= y >= 0
    share = torch.from_numpy(np.bincount(loader.tokens, minlength=n_ids) + 1.0)
    loss, guess, n = loss_on_text(teacher, loader)
    with torch.no_grad():
        assert loss == pytest.approx(F.cross_entropy(teacher.model(x)[may], y[may]).item(), rel=1e-5)
    assert guess == pytest.approx(-(share / share.sum()).log()[y[may]].mean().item(), rel=1e-6)
    assert n == may.sum() and (n < loader.n_tokens / 2 if fold else n > loader.n_tokens - 17)
    assert loss_on_text(teacher, loader, most=100)[2] <= 96
    loader.mask = np.zeros(loader.n_tokens, 'uint8')
    assert loss_on_text(teacher, loader)[2] == 0


def test_looking_at_a_teacher_changes_nothing(data, teacher):
    """No random number is drawn: what is trained after it is trained as without it."""
    loader = Loader(data, 'train', 4, 16)
    found, = load_teachers(teacher, from_meta(loader.meta), 16)
    state, weights = torch.get_rng_state(), copy.deepcopy(found.model.state_dict())
    check_reading([found], loader)
    assert torch.equal(torch.get_rng_state(), state) and loader.batch_size == 4 and not found.model.training
    assert all(torch.equal(t, weights[name]) for name, t in found.model.state_dict().items())
