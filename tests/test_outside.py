"""
What the scripts share about files that are not as they should be: weights that are no numbers are refused by all that
load them, and a document is JSON that every reader takes, whatever was measured.
"""
import json
import math

import pytest
import torch
from conftest import TINY, content, refused, run, train

import model as model_file
from data.files import json_line


def test_json_has_no_nan():
    document = {'a': math.nan, 'b': [1, 2.5, -math.inf, {'c': (math.inf, None, True, 'NaN')}], 3: 'x'}
    line = json_line(document)
    assert json.loads(line, parse_constant=pytest.fail) == {
        'a': None, 'b': [1, 2.5, None, {'c': [None, None, True, 'NaN']}], '3': 'x'}
    assert '\n' not in line and json_line({'a': 0.1, 'b': 'é'}) == json.dumps({'a': 0.1, 'b': 'é'})


@pytest.fixture(scope='module')
def out(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp('out')
    train(folder, toy, '--max_iters=30', '--eval_interval=0')
    return folder


SCRIPTS = {
    'train.py': [*TINY, '--eval_interval=1', '--max_iters=2', '--out_dir={new}'],
    'quantize.py': ['--out_dir={out}', '--save_dir={new}'],
    'prune.py': ['--out_dir={out}', '--save_dir={new}', '--neuron_prune_ratio=0.5', '--calibration_batches=1']}


@pytest.mark.parametrize('script', SCRIPTS)
def test_what_could_not_be_measured_is_null(script, out, toy, tmp_path, monkeypatch):
    """Weights whose loss is no number, though they are: every document says null, and so does what is recorded of it."""
    nothing = {'loss': math.nan, 'bpb': math.inf, 'tokens': 9}
    monkeypatch.setattr(model_file.LossTotal, 'result', lambda self: nothing)
    args = [arg.format(out=out, new=tmp_path) for arg in SCRIPTS[script]]
    got = run(script, toy, *args)
    assert got.status == 0, got.err
    document = json.loads(got.out.splitlines()[-1], parse_constant=pytest.fail)
    assert sum(value is None for value in document.values()) >= 2
    if script != 'train.py':                    # which has no best.pt of such losses
        recorded = json.loads((tmp_path / 'made.json').read_text(), parse_constant=pytest.fail)
        assert document in [entry['document'] for entry in recorded.values()]


LOADERS = {
    'sample.py': ['--out_dir={}', '--start=the', '--max_new_tokens=5'],
    'quantize.py': ['--out_dir={}'],
    'quantize.py --bits=4': ['--out_dir={}', '--bits=4'],
    'prune.py': ['--out_dir={}', '--save_dir={}/new', '--neuron_prune_ratio=0.5'],
    'distill.py': ['--teacher={}', '--out_dir={}/new', '--compile=False'],
    'distill.py --to_picochat': ['--teacher={}', '--to_picochat={}/new'],
    'train.py --teacher': [*TINY, '--teacher={}', '--out_dir={}/new'],
    'train.py --init_from': [*TINY, '--init_from={}/best.pt', '--out_dir={}/new']}


@pytest.mark.parametrize('number', [math.nan, math.inf])
@pytest.mark.parametrize('what', LOADERS)
def test_weights_that_are_no_numbers_are_refused(what, number, out, toy, tmp_path):
    state = torch.load(out / 'best.pt', weights_only=True)
    state['model']['transformer.h.0.mlp.c_fc.weight'][0, 0] = number
    torch.save(state, tmp_path / 'best.pt')
    before = content(tmp_path)
    script, args = what.split()[0], [arg.format(tmp_path) for arg in LOADERS[what]]
    got = run(script, *args, *[toy] * (script == 'train.py'))
    refused(got, 'best.pt is of no use: 1 of the 1,024 numbers of transformer.h.0.mlp.c_fc.weight are NaN or infinite')
    after = {path: was for path, was in content(tmp_path).items() if was is not None and not path.endswith('.lock')}
    assert after == before and got.out == ''
