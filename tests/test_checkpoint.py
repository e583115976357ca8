"""
data/checkpoint.py: what is saved is what is loaded; what is damaged, foreign or hostile is refused; a full disk loses
nothing.
"""
import os
import resource
import signal

import pytest
import torch

from conftest import SMALL, randomise
from data.checkpoint import load_checkpoint, load_model, read_safetensors, save_checkpoint, write_safetensors
from model import GPT, GPTConfig


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


def test_bad_checkpoints_are_refused(tmp_path):
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
        with pytest.raises(ValueError, match=expected) as e:
            load_checkpoint(f'{tmp_path}/{name}')
        assert '\n' not in str(e.value)
    assert not os.path.exists(f'{tmp_path}/made')
    whole, refusals = load_checkpoint(path), 0
    for at in range(0, len(good), len(good) // 40):     # a flipped bit anywhere is refused, or was in none of the data
        open(f'{tmp_path}/flip.pt', 'wb').write(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        try:
            state = load_checkpoint(f'{tmp_path}/flip.pt')
            assert all(torch.equal(state['model'][name], t) for name, t in whole['model'].items())
        except ValueError:
            refusals += 1
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
        with pytest.raises(ValueError, match='kept'):
            save_checkpoint(path, model, {}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert load_checkpoint(path)['step'] == 1 and os.listdir(tmp_path) == ['ckpt.pt']


def test_the_container_of_integers(tmp_path):
    """The safetensors layout: the package reads it, if it is there; so do we; a flipped bit is refused."""
    path = f'{tmp_path}/x.safetensors'
    tensors = {'a': torch.arange(-5, 6, dtype=torch.int8).view(1, 11), 'b': torch.randn(3), 'c': torch.tensor([7]).byte()}
    assert write_safetensors(path, tensors, {'format': 'ours', 'note': '{}'}) == os.path.getsize(path)
    again, metadata = read_safetensors(path, 'ours')
    assert metadata == {'format': 'ours', 'note': '{}'}
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)
    with pytest.raises(ValueError, match='of format theirs'):
        read_safetensors(path, 'theirs')
    whole = open(path, 'rb').read()
    for at in (20, len(whole) - 1):
        open(path, 'wb').write(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ValueError, match='damaged|not a whole'):
            read_safetensors(path, 'ours')
