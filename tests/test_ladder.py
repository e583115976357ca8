"""
Ladders: what a folder knows of how it was made, rungs, their record, and bench.py that measures them. A script copies
checkpoints for rungs and says what a training would say: nothing is trained.
"""
import glob
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import Here, make_dataset, randomise, refused, refuses, result_of, run, start, toy_text
from data.bench.ladder import compare_records, read_rungs, summary, welch
from data.bench.tasks import bits_per_byte
from data.cache import KVCache
from data.checkpoint import load_model, save_checkpoint
from data.loader import Loader
from data.record import already, made, record, stopped_on_the_way
from data.tokenizer import from_meta
from model import GPT, GPTConfig, evaluate
from quantize import load

# ----- data/record.py

@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(words, ladder=True): from here on this process is that command, in a ladder or not."""
    def f(words, ladder=True):
        monkeypatch.setattr(sys, 'argv', words.split())
        monkeypatch.setenv('PICOCHAT_LADDER', 'ladder.json')
        if not ladder:
            monkeypatch.delenv('PICOCHAT_LADDER')
    return f


def make(path, text='weights', **how):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as f:
        f.write(text)
    record(path, {'iters': 1, 'tokens': 5, 'seconds': 2, 'flops': 7}, **how)


def test_what_this_command_made_is_not_made_again(command, tmp_path, capsys):
    path, config = f'{tmp_path}/out/best.pt', tmp_path / 'config.py'
    config.write_text('n_layer = 2\n')
    command(f'train.py {config} --seed=1')
    assert already(path) is None and 'best.pt is missing' in capsys.readouterr().err
    assert already(path) is None and 'was begun and not finished' in capsys.readouterr().err
    make(path)
    assert already(path)['tokens'] == 5 and 'is there: this command made it' in capsys.readouterr().err
    config.write_text('# a comment\nn_layer = 2      # changes nothing\n')
    assert already(path)
    config.write_text('n_layer = 3\n')
    assert already(path) is None and 'made by another command' in capsys.readouterr().err
    command(f'train.py {config} --seed=1', ladder=False)
    make(path)
    assert already(path) is None and not capsys.readouterr().err  # asked by nobody
    command(f'train.py {config} --seed=1')
    assert already(path)  # by hand or by a ladder: the same command


@pytest.mark.parametrize('file', ['best.pt', 'ckpt.pt', 'int4.safetensors', 'labels.bin'])
def test_what_no_ladder_made_is_not_replaced(command, tmp_path, file):
    path = os.path.join(tmp_path, 'best.pt' if file == 'ckpt.pt' else file)
    (tmp_path / file).write_text('mine')
    command('train.py')
    for _ in range(2):
        refuses(f'would replace .*{file}, which is not as a ladder made it', already, path)
    assert (tmp_path / file).read_text() == 'mine'


def test_only_a_checkpoint_that_the_stopped_run_saved_is_gone_on_with(command, tmp_path):
    path, saved = f'{tmp_path}/out/best.pt', tmp_path / 'out' / 'ckpt.pt'
    command('train.py --seed=1')
    already(path)
    assert not stopped_on_the_way(path)
    saved.write_text('of seed 1')
    assert stopped_on_the_way(path)
    make(path)
    assert not stopped_on_the_way(path)                 # it was finished
    command('train.py --seed=2')
    already(path)
    assert not stopped_on_the_way(path)                 # begun, but nothing saved yet
    os.utime(saved, (time.time() + 9, time.time() + 9))
    assert stopped_on_the_way(path)
    command('train.py --seed=2', ladder=False)
    assert not stopped_on_the_way(path)                 # by hand one says --init_from=resume


def test_stale_labels_leave_by_name(command, tmp_path):
    """Labels that were begun stay: distill.py goes on with them."""
    command('distill.py --teacher=a')
    path = f'{tmp_path}/labels/labels.bin'
    already(path)
    (tmp_path / 'labels' / 'begun.json').write_text('{}')
    already(path)
    assert (tmp_path / 'labels' / 'begun.json').exists()
    make(path)
    for name in ('meta.json', 'mine'):
        (tmp_path / 'labels' / name).write_text('')
    command('distill.py --teacher=b')
    already(path)
    assert sorted(os.listdir(tmp_path / 'labels')) == ['made.json', 'mine']


def test_what_a_product_cost(command, tmp_path):
    """With what it started from; labels once, by their folder; pruning trains on no tokens."""
    command('x.py')
    make(f'{tmp_path}/a/best.pt')
    make(f'{tmp_path}/labels/labels.bin')
    make(f'{tmp_path}/b/best.pt', starts_from=f'{tmp_path}/a/best.pt', labels=f'{tmp_path}/labels')
    make(f'{tmp_path}/c/best.pt', starts_from=f'{tmp_path}/b/best.pt', labels=f'{tmp_path}/labels')
    record(f'{tmp_path}/c/best.pt', {'seconds': 3}, starts_from=f'{tmp_path}/c/best.pt')
    assert made(f'{tmp_path}/c/best.pt')['cost'] == {
        'train_tokens': 15, 'train_seconds': 9, 'train_flops': 21, 'labels': {f'{tmp_path}/labels': 7}}


# ----- a ladder

MAKE = '''
import json, os, shutil, sys
sys.path.insert(0, '.')
from data.record import already, record
source, folder, tokens, *rest = sys.argv[1:]
product, starts_from = f'{folder}/best.pt', rest[0] if rest else None
document = already(product, [source])
if not document:
    shutil.copy(source, folder) if os.path.isdir(folder) else shutil.copytree(os.path.dirname(source), folder)
    open('calls', 'a').write(os.path.basename(folder) + ' ')
    print('step 1')
    document = {'out_dir': folder, 'iters': 1, 'tokens': int(tokens), 'seconds': 2.5, 'flops': 10 * int(tokens)}
    record(product, document, [source], starts_from)
print(json.dumps(document))
'''
CONFIG = """
mode = 'ladder'
ladder = 'T/out/ladder.json'
record = 'T/kept.json'
seeds = '1,2'
rungs = '''
wide        | python T/make.py T/wide/best.pt T/w 100
a control   | python T/make.py T/narrow/best.pt T/c{seed} 30
narrow      | python T/make.py T/narrow/best.pt T/n 30 && python T/make.py T/n/best.pt T/m 7 T/n/best.pt
in 4 bits   | python quantize.py --out_dir=T/w --bits=4 --method=rtn --save_dir=T/w4 --device=cpu
'''
"""


@pytest.fixture
def climb(tmp_path, in_process):
    """climb(*flags, old='', new='') -> a run of CONFIG, old replaced; climb.calls() says what was made."""
    data = make_dataset(tmp_path / 'toy').split('=')[1]
    meta = json.load(open(f'{data}/meta.json'))
    for name, width, draft_n in (('wide', 16, 0), ('narrow', 8, 2)):
        model = randomise(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=width, vocab_size=len(meta['chars']), block_size=32,
                                        draft_n=draft_n)), 0.3)
        save_checkpoint(f'{tmp_path}/{name}/best.pt', model, {'kind': 'char', 'chars': meta['chars']}, dataset=data)
    (tmp_path / 'make.py').write_text(MAKE.replace('calls', f'{tmp_path}/calls'))

    def f(*flags, old='', new=''):
        (tmp_path / 'ladder.py').write_text(CONFIG.replace(old, new).replace('T/', f'{tmp_path}/'))
        got = run('bench.py', f'{tmp_path}/ladder.py', '--device=cpu', '--rounds=1', '--prompt_tokens=6',
                  '--new_tokens=12', '--memory=False', '--timed=none', *flags)
        got.err = got.err[got.err.rfind('error: '):] if got.status else got.err  # without what it said on the way
        return got
    f.folder, f.calls = tmp_path, lambda: (tmp_path / 'calls').read_text().split()
    return f


def rows_of(got):
    return result_of(got)['rows']


def test_a_ladder_is_built_once_measured_and_checked(climb, monkeypatch):
    at = climb.folder
    rows = rows_of(climb('--timed=all'))
    assert [(r['name'], r['seed']) for r in rows] == [
        ('wide', None), ('a control', 1), ('a control', 2), ('narrow', None), ('in 4 bits', None)]
    assert climb.calls() == ['w', 'c1', 'c2', 'n', 'm']
    assert (at / 'out' / 'narrow.log').read_text().count('step 1') == 2  # of both its commands
    assert json.load(open(at / 'kept.json'))['rows'] == json.load(open(at / 'out' / 'ladder.json'))['rows']
    assert [r['train_tokens'] for r in rows[:4]] == [100, 30, 30, 37] and rows[3]['train_flops'] == 370
    wide, narrow = (load_model(f'{at}/{name}/best.pt')[0] for name in ('wide', 'narrow'))
    for row, model in zip(rows, (wide, narrow, narrow, narrow, load(f'{at}/w4/int4.safetensors')[0])):
        batches = Loader(f'{at}/toy', 'val', 16, 32).eval_batches()
        assert row['val_loss'] == pytest.approx(evaluate(model, batches)['loss'], rel=1e-6)
        assert row['bytes'] == os.path.getsize(row['file']) and row['kv_bytes_per_token'] == model.kv_bytes_per_token()
    assert [r['params'] for r in rows] == [m.params()['total'] for m in (wide, narrow, narrow, narrow, wide)]
    assert rows[0]['tok_s'] > 0 and 'tok_s_speculative' not in rows[0]
    assert rows[3]['tok_s_speculative'] > 0 and rows[3]['tokens_per_verify'] >= 1 and 'speculation_exact' in rows[3]
    assert 'tok_s' not in rows[2]  # of several seeds the first is timed

    # with another cache it is another loss; nothing is built twice
    again = rows_of(climb('--with_int8_cache=in 4 bits'))
    model = load(f'{at}/w4/int4.safetensors')[0]
    batches = Loader(f'{at}/toy', 'val', 16, 32).eval_batches()
    loss = evaluate(model, batches, make_cache=lambda n: KVCache(model.config, n, dtype=torch.int8))['loss']
    assert again[4]['kv_bytes_per_token'] == model.kv_bytes_per_token(int8=True)
    assert again[4]['val_loss'] == pytest.approx(loss, rel=1e-6) and again[4]['val_loss'] != rows[4]['val_loss']
    assert len(climb.calls()) == 5

    check = f'--check={at}/out/ladder.json'  # as it was recorded, with that cache
    got = climb(check)
    assert got.status == 0 and 'nothing changed' in got.out, got.err
    shutil.copy(f'{at}/wide/best.pt', rows[3]['file'])  # somebody else trains there
    assert 'narrow: val_loss was' in climb(check).out
    refused(climb(), "rung 'narrow'.* would replace .*/m/best.pt, which is not as a ladder made it")
    os.remove(f'{at}/w/best.pt')
    refused(climb(check), 'build the ladder again')


def test_rungs_read_other_texts_and_answer_questions(climb):
    at, tokenizer = climb.folder, from_meta(json.load(open(climb.folder / 'toy' / 'meta.json')))
    (at / 'other.txt').write_text(toy_text(9)[::-1])
    (at / 't.jsonl').write_text('\n'.join(json.dumps(
        {'query': 'the cat', 'choices': ['sat on', 'a mat'], 'gold': i % 3 // 2}) for i in range(30)))
    flags = (f'--rungs=wide | python {at}/make.py {at}/wide/best.pt {at}/w 1', f'--texts=other={at}/other.txt',
             '--text_bytes=99', f'--tasks={at}/t.jsonl', '--questions=20')
    got = climb(*flags)
    row, = rows_of(got)
    assert 'bits/byte other' in ' '.join(got.out.split()) and ' tasks ' in got.out
    expected = bits_per_byte(load(row['file'])[0], tokenizer, toy_text(9)[::-1][:99])
    assert row['bpb_other'] == pytest.approx(expected, rel=1e-6) and row['tasks'][0]['questions'] == 20
    assert row['tasks_centred'] == row['tasks'][0]['centred'] and row['tasks_error'] > 0
    assert json.load(open(at / 'kept.json'))['rows'] == [row]
    (at / 'other.txt').write_text(toy_text(9))  # another text is measured again
    assert rows_of(climb(*flags))[0]['bpb_other'] != row['bpb_other']
    table = run('bench.py', '--mode=table', f'{at}/kept.json', '--columns=name,bpb_other,tasks_centred,tasks_error')
    assert table.status == 0 and table.out.splitlines()[0].split() == '| rung | other | tasks | +- |'.split()
    refused(climb('--texts=other'), r'texts \(other\) must be like')


def test_what_is_made_from_a_rung_is_made_again_with_it(climb):
    climb()
    before = [row['made'] for row in json.load(open(f'{climb.folder}/out/ladder.json'))['rows']]
    os.remove(f'{climb.folder}/w/best.pt')
    time.sleep(1)  # a record's dates are whole seconds
    rows = rows_of(climb())
    assert climb.calls()[5:] == ['w']
    assert [row['name'] for row, date in zip(rows, before) if row['made'] != date] == ['wide', 'in 4 bits']


def test_a_ladder_that_is_stopped_goes_on(climb, monkeypatch):
    slow = climb.folder / 'slow.py'
    slow.write_text('import signal, sys, time\n'
                    'def leave(*args):\n    print("saved"); sys.exit(0)\n'
                    'signal.signal(signal.SIGTERM, leave)\nprint("begun")\ntime.sleep(60)\n')
    (climb.folder / 'ladder.py').write_text(
        CONFIG.replace('narrow      |', f'narrow | python {slow} &&').replace('T/', f'{climb.folder}/'))
    with monkeypatch.context() as m:
        m.setattr(subprocess, 'Popen', Here.popen)
        process = start('bench.py', f'{climb.folder}/ladder.py', '--device=cpu', '--timed=none')
    for line in process.stderr:
        if '/slow.py >' in line:
            break
    log = climb.folder / 'out' / 'narrow.log'
    while 'begun' not in log.read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and 'goes on with this rung' in err
    assert 'saved' in log.read_text() and climb.calls() == ['w', 'c1', 'c2']
    rows = json.load(open(f'{climb.folder}/out/ladder.json'))['rows']
    assert [row['name'] for row in rows] == ['wide', 'a control', 'a control']
    rows_of(climb())
    assert climb.calls() == ['w', 'c1', 'c2', 'n', 'm']


def test_ladders_that_cannot_stand(climb):
    at = climb.folder
    refused(climb(old='narrow/best.pt T/c', new='nowhere.pt T/c'), "rung 'a control'.*nowhere.pt.*a-control-1.log")
    assert [r['name'] for r in json.load(open(f'{at}/out/ladder.json'))['rows']] == ['wide']  # what was built stays
    refused(climb(old='| python T/make.py T/wide', new='| ruby T/make.py T/wide'), 'is not')
    nameless = climb(old='narrow      |', new='data | python -c pass\nnarrow |')
    refused(nameless, "'data': its command names no model file")
    (at / 'empty.json').write_text('{"rows": []}')
    (at / 'odd.json').write_text('{"rows": [{"name": "x"}, 3]}')
    (at / 'torn.json').write_text('{"rows": [{"na')
    for flags, pattern in (('--rungs=', 'none are given'), (f'--check={at}/empty.json', 'records no rung'),
                           (f'--check={at}/odd.json', 'None is not there any more'),
                           (f'--check={at}/torn.json', 'torn.json is damaged'),
                           ('--timed=wide,thin', "timed.*'thin' is not")):
        refused(climb(flags), pattern)
    whole = (at / 'out' / 'ladder.json').read_text()
    (at / 'out' / 'ladder.json').write_text('{"rows": [{"name": "wide", "file": ["x"]}]}')
    refused(climb(), 'ladder.json is damaged, it says that file is .*: move it away')
    (at / 'out' / 'ladder.json').write_text(whole)
    meta = json.load(open(f'{at}/toy/meta.json'))
    (at / 'toy' / 'meta.json').write_text(json.dumps(meta | {'chars': meta['chars'][:-1] + 'z'}))
    refused(climb(f'--check={at}/out/ladder.json'), 'has another tokenizer than .*w/best.pt was trained with')


def test_ladders_share_rungs_by_the_same_words():
    folders = {}
    for path in sorted(glob.glob('config/ladder_*.py')):
        knobs = runpy.run_path(path)
        assert knobs['record'] == path.replace('.py', '.json')
        for name, seed, command in read_rungs(knobs['rungs'], knobs.get('seeds', '1337')):
            train, *_ = whole = command.split('&&')
            folder = re.findall(r'--(?:save_dir|out_dir)=(\S+)', train)
            if 'quantize.py' not in train and folder:
                assert folders.setdefault(folder[-1], whole) == whole, path
    assert len(folders) > 50

# ----- records

def test_tables_and_pictures_are_made_from_records(tmp_path):
    for path in glob.glob('config/ladder_*.json'):
        rows = json.load(open(path))['rows']
        got = run('bench.py', '--mode=table', path, '--columns=name,bytes,val_bpb')
        assert got.status == 0 and got.out.splitlines()[0].startswith('| rung')
        assert len(got.out.splitlines()) == 2 + len({row['name'] for row in rows}) + 1
    refused(run('bench.py', '--mode=table', path, '--columns=name,beauty'), "'beauty' is not")
    pytest.importorskip('matplotlib')
    assert run('bench.py', '--mode=table', 'config/ladder_stdlib.json', f'--png={tmp_path}/a.png').status == 0
    (tmp_path / 'r.json').write_text('{"rows": [{"name": "a"}]}')
    refused(run('bench.py', '--mode=table', f'--record={tmp_path}/r.json', f'--png={tmp_path}/b.png'), 'no picture')
    (tmp_path / 'r.json').write_text('{"rows": [{"name": "$\\\\x$", "bytes": 1, "val_bpb": 1}]}')
    assert run('bench.py', '--mode=table', f'--record={tmp_path}/r.json', f'--png={tmp_path}/b.png').status == 0
    assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG' and os.path.getsize(tmp_path / 'a.png') < 100_000


def test_a_summary_has_a_line_for_each_rung():
    rows = [{'name': name, 'seed': seed, 'bytes': size, 'val_loss': loss, 'val_bpb': loss / 2, 'train_flops': 1,
             'labels': {'labels-a': 5}, 'tok_s': 10 * size}
            for name, seed, size, loss in (('teacher', None, 8, 1.0), ('control', 1, 4, 2.0), ('control', 2, 4, 4.0),
                                           ('student', 1, 2, 1.0), ('student', 2, 2, 3.0))]
    teacher, control, student = summary(rows)
    assert teacher['train_flops'] == 6 and teacher['p'] is None and teacher['deviation'] is None
    assert (control['val_loss'], control['val_bpb'], control['p']) == (3.0, 1.5, None)
    assert student['smaller'] == 4 and student['x_tok_s'] == 0.25 and student['deviation'] == pytest.approx(2 ** 0.5)
    assert student['p'] == welch([1.0, 3.0], [2.0, 4.0])
    beside = [row | {'bpb_new': row['val_loss'], 'tasks_centred': row['val_loss'], 'tasks_error': 0.1} for row in rows]
    assert [(line['bpb_new'], line['tasks_centred']) for line in summary(beside)] == [(1, 1), (3, 3), (2, 2)]
    beside[0]['bpb_new'] = beside[1]['bpb_new'] = beside[1]['val_bpb'] = None  # what could not be measured
    assert [(line['bpb_new'], line['val_bpb']) for line in summary(beside)] == [(None, 0.5), (4, 2), (2, 1)]


def test_what_has_changed_between_two_records():
    before = {'name': 'a', 'seed': 7, 'bytes': 100, 'val_loss': 2.0, 'tok_s': 100}
    assert compare_records([before], [before | {'val_loss': 2.0001, 'tok_s': 125}]) == []
    assert compare_records([before], [before | {'val_loss': 2.001, 'tok_s': 140, 'bytes': 101}]) == [
        'a 7: bytes was 100 and is 101', 'a 7: val_loss was 2 and is 2.001', 'a 7: tok_s was 100 and is 140']


def test_welch():
    """Of Student's table: with four degrees of freedom 2.776 is exceeded with probability 0.05, 4.604 with 0.01."""
    for t, p in ((2.776, 0.05), (4.604, 0.01)):
        a = [0.0, 1.0, 2.0]  # of variance 1: two such means differ with deviation (2/3)^0.5
        assert welch(a, [x + t * (2 / 3) ** 0.5 for x in a]) == pytest.approx(p, rel=2e-3)
    assert welch([1.0], [1.0, 2.0]) is None and welch([1.0, 1.0], [1.0, 1.0]) == 1.0
