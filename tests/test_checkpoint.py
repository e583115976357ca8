"""data/checkpoint.py: what is saved is what is loaded; what is damaged, foreign, hostile or no number is refused."""
import copy
import json
import math
import os
import resource
import zipfile

import pytest
import torch

from conftest import SMALL, TINY, Evil, altered, content, ran, randomise, refused, refuses, run, train
from data.checkpoint import (checksum, load_checkpoint, load_model, read_safetensors, save_checkpoint,
                             write_safetensors)
from model import GPT, GPTConfig, LossTotal


def test_checkpoint_round_trip(tmp_path):
    model = randomise(GPT(GPTConfig(**SMALL, n_kv_head=2, tie_weights=True)))
    save_checkpoint(f'{tmp_path}/a/ckpt.pt', model, {'kind': 'char', 'chars': 'ab'}, step=7)
    again, state = load_model(f'{tmp_path}/a/ckpt.pt')
    x = torch.randint(50, (1, 9))
    assert (torch.equal(again(x), model(x)) and state['step'] == 7 and state['tokenizer']['chars'] == 'ab'
            and again.config == model.config)


def saved(folder):
    path = f'{folder}/best.pt'
    save_checkpoint(path, GPT(GPTConfig(**SMALL)), {})
    return path


def test_bad_checkpoints_are_refused(tmp_path):
    path = saved(tmp_path)
    good = open(path, 'rb').read()
    torch.save({'model': {}, 'iter_num': 3}, f'{tmp_path}/foreign.pt')
    torch.save({'picochat': Evil(f'{tmp_path}/made')}, f'{tmp_path}/evil.pt')
    middle = len(good) // 2
    cases = {'missing.pt': (None, 'train one first'), 'foreign.pt': (None, 'iter_num'), 'evil.pt': (None, 'refused'),
             'short.pt': (good[:middle], 'not a whole'), 'empty.pt': (b'', 'not a whole'),
             'flipped.pt': (good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:], 'expected the checksum')}
    for name, (written, expected) in cases.items():
        if written is not None:
            open(f'{tmp_path}/{name}', 'wb').write(written)
        with pytest.raises(ValueError, match=expected) as e:
            load_checkpoint(f'{tmp_path}/{name}')
        assert '\n' not in str(e.value)
    assert not os.path.exists(f'{tmp_path}/made')
    whole, refusals = load_checkpoint(path), 0
    # a flipped bit anywhere is refused, or was in none of the data; the last 98 bytes say where all others are
    for at in (*range(0, len(good) - 98, len(good) // 40), *range(len(good) - 98, len(good))):
        open(f'{tmp_path}/flip.pt', 'wb').write(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        try:
            state = load_checkpoint(f'{tmp_path}/flip.pt')
            assert all(torch.equal(state['model'][name], t) for name, t in whole['model'].items())
        except ValueError:
            refusals += 1
    assert refusals > 60


def test_the_container_of_integers(tmp_path):
    path = f'{tmp_path}/x.safetensors'
    tensors = {'a': torch.arange(-5, 6, dtype=torch.int8).view(1, 11), 'b': torch.randn(3),
               'c': torch.tensor([7]).byte()}
    assert write_safetensors(path, tensors, {'format': 'ours', 'note': '{}'}) == os.path.getsize(path)
    again, metadata = read_safetensors(path, 'ours')
    assert metadata == {'format': 'ours', 'note': '{}'}
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)
    refuses('of format theirs', read_safetensors, path, 'theirs')
    whole = open(path, 'rb').read()
    for damaged in (whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-9],
                    whole[:50], b'', b'PK' + whole):
        open(path, 'wb').write(damaged)
        refuses('damaged|not a whole', read_safetensors, path, 'ours')


@pytest.mark.parametrize('prefix, how', [
    ('module.', {}), ('_orig_mod.', {}), ('module._orig_mod.', {}),
    ('', dict(_use_new_zipfile_serialization=False))])
def test_other_ways_to_save(tmp_path, prefix, how):
    """DDP's and torch.compile's names, and the files of torch before 1.6, which are no zip archives."""
    path, model = f'{tmp_path}/best.pt', randomise(GPT(GPTConfig(**SMALL)))
    save_checkpoint(path, model, {})
    state = torch.load(path, weights_only=True)
    state['model'] = {prefix + name: t for name, t in state['model'].items()}
    torch.save(state, path, **how)
    x = torch.randint(50, (1, 9))
    assert torch.equal(load_model(path)[0](x), model(x))


def test_a_compressed_archive_is_refused(tmp_path):
    path, small = saved(tmp_path), f'{tmp_path}/small.pt'
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(small, 'w', zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    refuses('was refused .it is compressed', load_model, small)


class Asks:
    """Unpickled by torch.load, weights_only or not, it takes as much memory as it is told to."""
    def __reduce__(self):
        return bytearray, (1_000_000,)


def in_pairs(depth):
    """A tuple of two tuples of two tuples ..., each there once: to hash it is to hash 2 ** depth values."""
    t = 1
    for _ in range(depth):
        t = (t, t)
    return t


def again_and_again():
    x = [1]
    for _ in range(60):
        x = [x, x]
    return x


shape = lambda **change: lambda state: state['config'].update(change)
weight = lambda t: lambda state: state['model'].update({'lm_head.weight': t})
more = lambda value: lambda state: state.update(more=value)


@pytest.mark.parametrize('change, match', [
    # refused before a model of that shape is made
    (shape(block_size=2_000_000), r'its block_size \* head_dim is 16,000,000'),
    (shape(block_size=10**12), 'its block_size'),
    (shape(n_layer=2000), 'its n_layer is 2,000, .* at most 2'),
    (shape(n_embd=10**12), 'its n_embd is'),
    (shape(n_hidden=129), r'c_fc.weight is \(128, 32\) instead of \(129, 32\)'),
    (shape(draft_hidden_mult=math.inf), 'draft_hidden_mult is inf'),
    (shape(n_layer='2'), "n_layer is '2'"),
    (lambda s: s.update(config=[2, 4]), 'does not say its shape'),
    # other tensors than those of the shape, or no numbers
    (lambda s: s['model'].pop('lm_head.weight'), 'lm_head.weight is missing'),
    (lambda s: s['model'].update(more=torch.ones(1)), 'more is unknown'),
    (weight(torch.ones(50, 32).int()), 'is torch.int32 instead of'),
    (weight(torch.ones(1, 1).expand(50, 32)), 'fewer are there'),
    (weight(torch.full((50, 32), math.nan)), '1,600 of the 1,600 numbers of lm_head.weight are NaN or infinite'),
    (weight(torch.ones(50, 32).index_fill(0, torch.tensor([3]), -math.inf)), '32 of the 1,600 numbers of lm_head'),
    (lambda s: s.update(model={1: torch.ones(1)}), 'expected tensors by their names'),
    (lambda s: s.update(model=torch.ones(1)), 'found Tensor'),
    (lambda s: s.pop('config'), r"expected the keys .* found \['model'"),
    (lambda s: s.update({1: s.pop('model')}), r"expected the keys .* found \['1', 'config'"),
    # more than a checkpoint holds
    (more({in_pairs(14): 1}), 'it has a tuple of more than 10,000 values'),  # with 40, torch.load never comes back
    (more([{(1, 2): 3}]), 'a key in it is a tuple'),
    (more(Asks()), 'it names __builtin__.bytearray'),
    (more(torch.eye(3).to_sparse()), 'it names torch._utils._rebuild_sparse_tensor'),
    (more(again_and_again()), 'the same values again and again'),
    (more([torch.ones(300, 300).expand(90, 300, 300)]), '0 says that it has 8,100,000 numbers, and fewer are there'),
    (more([*torch.ones(300, 300).expand(9, 300, 300)]), 'its tensors have 3,.* bytes, and the file has')])
@pytest.mark.parametrize('zipped', [True, False])
def test_what_no_checkpoint_holds(tmp_path, change, match, zipped):
    path = saved(tmp_path)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(match, load_model, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8000  # kB


@pytest.mark.parametrize('pickled, match', [
    # as the key of a dict, a tuple of a million levels took all of the processor's stack
    (b'}K\x01' + b'\x85' * 20_000 + b'K\x01s.', 'it has a tuple of more than 10,000 values'),
    (b']' * 3000 + b'a' * 2999 + b'.', 'RecursionError'),
    (b'ccollections\nOrderedDict\n)R}U\x05itemsK\x01sb.', 'a dict in it is more than that'),
    (b'cposix\nsystem\n.', 'it names posix.system'),
    (b'}', 'it has the instruction')])
def test_pickles_that_torch_does_not_write(tmp_path, pickled, match):
    with zipfile.ZipFile(tmp_path / 'best.pt', 'w') as z:
        z.writestr('best/data.pkl', b'\x80\x02' + pickled)
        z.writestr('best/version', '3\n')
    refuses(f'best.pt was refused .*{match}', load_checkpoint, tmp_path / 'best.pt')


@pytest.mark.parametrize('how', ['one header', 'one name'])
def test_members_of_an_archive_share_nothing(tmp_path, how):
    path, odd = saved(tmp_path), f'{tmp_path}/odd.pt'
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(odd, 'w') as z:
        for name in whole.namelist():
            z.writestr(name, whole.read(name))
        for i in range(100 if how == 'one header' else 0):  # a small file of many large members
            again = copy.copy(z.getinfo('archive/data/1'))
            again.filename = f'archive/data/{100 + i}'
            z.filelist.append(again)
        if how == 'one name':
            z.writestr('Archive/Data.pkl', whole.read('archive/data.pkl'))
    refuses('was refused .*(its members share their bytes|have the same name)', load_checkpoint, odd)


def test_large_numbers_are_numbers(tmp_path):
    """Whose sum is infinite, and none of them is."""
    path = saved(tmp_path)
    state = torch.load(path, weights_only=True)
    for dtype, number in ((torch.float32, 3e38), (torch.float16, 6e4), (torch.bfloat16, -3e38), (torch.float64, 1e300)):
        state['model']['lm_head.weight'] = torch.full((50, 32), number, dtype=dtype)
        torch.save(state, path)
        assert load_checkpoint(path)['model']['lm_head.weight'][0, 0] == torch.tensor(number, dtype=dtype)


def header(tensors, metadata=None, data=b'\0' * 12):
    whole = tensors | {'__metadata__': metadata or {'format': 'ours'}}
    whole['__metadata__']['sha256'] = checksum(whole, data)
    head = json.dumps(whole).encode()
    return len(head).to_bytes(8, 'little') + head + data


def entry(start, end, shape, dtype='I8'):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}


@pytest.mark.parametrize('tensors, match', [
    ({'a': entry(0, 12, [12]), 'b': entry(0, 12, [12])}, 'b is not where'),         # they share their bytes
    ({'a': entry(0, 4, [4]), 'b': entry(8, 12, [4])}, 'b is not where'),            # between them lies what none reads
    ({'a': entry(0, 8, [8])}, '4 bytes behind its tensors'),
    ({'a': entry(0, 1, [1]), 'b': entry(1, 9, [2], 'F32'), 'c': entry(9, 12, [3])}, 'b is not where'),  # no float begins there
    ({'a': entry(0, 16, [16])}, 'a is not where'),
    ({'a': entry(0, 12, [-12])}, 'says of a is no tensor'),
    ({'a': entry(0, 12, [3], 'F64')}, 'says of a is no tensor'),
    ({'a': entry(0, 12, [3.0], 'F32')}, 'says of a is no tensor')])
def test_tensors_tile_the_container(tmp_path, tensors, match):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(header(tensors))
    refuses(match, read_safetensors, path, 'ours')


def test_a_container_of_nothing_but_header_is_refused(tmp_path):
    path = tmp_path / 'x.safetensors'
    right = header({'a': entry(0, 12, [12])})
    path.write_bytes(right)
    assert read_safetensors(path, 'ours')[0]['a'].tolist() == [0] * 12
    twice = right.replace(b'{"a":', b'{"a":{},"a":', 1)
    path.write_bytes((len(twice) - 20).to_bytes(8, 'little') + twice[8:])
    refuses('not a whole', read_safetensors, path, 'ours')
    path.write_bytes(header({}, {'format': 'ours', 'x': 'y' * 9_000_000}, b''))
    refuses('not a whole', read_safetensors, path, 'ours')


# ----- the scripts

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
    nothing = {'loss': math.nan, 'bpb': math.inf, 'tokens': 9}
    monkeypatch.setattr(LossTotal, 'result', lambda self: nothing)
    args = [arg.format(out=out, new=tmp_path) for arg in SCRIPTS[script]]
    got = ran(script, toy, *args)
    document = json.loads(got.out.splitlines()[-1], parse_constant=pytest.fail)
    assert sum(value is None for value in document.values()) >= 2
    if script != 'train.py':  # which has no best.pt of such losses
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


@pytest.mark.parametrize('what', LOADERS)
def test_every_script_refuses_weights_that_are_no_numbers(what, out, toy, tmp_path):
    model = torch.load(out / 'best.pt', weights_only=True)['model']
    model['transformer.h.0.mlp.c_fc.weight'][0, 0] = math.nan
    altered(out / 'best.pt', tmp_path, model=model)
    before = content(tmp_path)
    script, args = what.split()[0], [arg.format(tmp_path) for arg in LOADERS[what]]
    got = run(script, *args, *[toy] * (script == 'train.py'))
    refused(got, 'best.pt is of no use: 1 of the 1,024 numbers of transformer.h.0.mlp.c_fc.weight are NaN or infinite')
    after = {path: was for path, was in content(tmp_path).items() if was is not None and not path.endswith('.lock')}
    assert after == before and got.out == ''
