"""
Teachers that are not our block: any causal language model that transformers loads, or a user's own Python file. What
does not teach says why in a line.

With `pip install transformers safetensors` everything runs.
"""
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (HF_LLAMA, TOK, V, far, logits_of, our_llama, randomise, refuses, train, write_gpt2_tokenizer,
                      write_llama)

from data.foreign.causal_lm import InOne, load_py
from data.foreign.kinds import KINDS
from data.foreign.llama import LLAMA
from data.labels import Recipe, write_labels
from data.loader import Loader
from data.teachers import Teacher, check_teachers, load_teacher
from distill import Distiller
from model import GPT, GPTConfig

IDX = torch.arange(80).view(2, 40) * 3 % V


def test_a_kind_that_was_forgotten(tmp_path):
    folder = write_llama(tmp_path)
    for kind, name in (('hf', folder), ('py', write_py(tmp_path)), ('gguf', f'{tmp_path}/a.gguf')):
        refuses(f'name it as {kind}:{name}', load_teacher, name)


PY = """
import torch
from types import SimpleNamespace
torch.manual_seed(0)
table = torch.randn(64, {V})

class Model:
    config = SimpleNamespace(vocab_size={V}, block_size=32)
    def __call__(self, idx):
        # this token and those before it
        return table[idx % 64].cumsum(dim=1)

def load(device):
    return Model(), None
"""


def write_py(folder, text=PY, **change):
    text = text.replace('{V}', str(V))
    for old, new in change.get('change', []):
        assert old in text
        text = text.replace(old, new)
    (folder / 'teacher.py').write_text(text)
    return f'{folder}/teacher.py'


def test_a_python_file_teaches(tmp_path):
    model, tokenizer = load_py(write_py(tmp_path))
    assert tokenizer is None and (model.config.vocab_size, model.config.block_size) == (V, 32)
    torch.manual_seed(0)
    expected = torch.randn(64, V)[IDX % 64].cumsum(dim=1)
    assert torch.equal(logits_of(model, IDX), expected)
    # in any pieces
    states = model.trunk(IDX).flatten(0, 1)
    assert torch.equal(torch.cat([model.logits(s) for s in states.split(7)]), expected.flatten(0, 1))
    assert torch.equal(model.logits(states[[70, 3, 44]]), expected.flatten(0, 1)[[70, 3, 44]])


@pytest.mark.parametrize('change, match', [
    ([('def load', 'def lead')], 'no function load'), ([('import torch\n', 'import torch.no\n')], 'could not be run'),
    ([('return Model(), None', '1 / 0')], "load.'cpu'. of .* failed .ZeroDivisionError"),
    ([('return Model(), None', 'raise SystemExit(3)')], "failed .SystemExit: 3"),
    ([('return Model(), None', 'return Model()')], r'must return .model, tokenizer or None., not a Model'),
    ([('block_size=32', 'context=32')], r'config.block_size, whole numbers, not .300, None'),
    ([('cumsum', 'softmix')], 'cannot teach .AttributeError'), ([('table[', '0 / 0 * table[')], 'cannot teach'),
    ([('vocab_size=300', 'vocab_size=301')], r'gave .1, 8, 300. logits for 8 tokens of a vocabulary of 301'),
    ([('.cumsum(dim=1)', '.flip(1)')], 'looks ahead'), ([('Model(), None', 'Model(), 7')], 'must be one of ours')])
def test_python_files_that_do_not_teach(tmp_path, change, match):
    refuses(match, load_py, write_py(tmp_path, change=change))
    refuses('no Python file at', check_teachers, f'py:{tmp_path}/nothing.py')
    (tmp_path / 'teacher.txt').write_text(PY)
    refuses('no Python file at .*teacher.txt: py: takes one, like', check_teachers, f'py:{tmp_path}/teacher.txt')


def wrapped(model):
    """Our own model, as one of which nothing is known."""
    return InOne(model, model, model.config.vocab_size, model.config.block_size)


@pytest.mark.parametrize('chunk', [2**27, 4 * V * 5])
def test_a_model_in_one_teaches_what_it_teaches_in_two(monkeypatch, chunk):
    """Losses and gradients, whether or not they come in chunks that end within a row."""
    monkeypatch.setattr('model.LOSS_CHUNK_BYTES', chunk)
    teacher, found = our_llama(n_kv_head=2), []
    for teachers in ([teacher], [wrapped(teacher)], [teacher, wrapped(teacher)]):
        student = our_llama()
        losses = Distiller(student, teachers)(IDX[:, :16], IDX[:, 1:17])
        losses['kl'].backward()
        found.append((losses['kl'].item(), student.lm_head.weight.grad))
    for kl, grad in found[1:]:
        assert kl == pytest.approx(found[0][0], rel=1e-5) and torch.allclose(grad, found[0][1], atol=1e-6)


def test_labels_of_a_model_in_one_are_its_labels_in_two(tmp_path, toy):
    loader = Loader(toy.removeprefix('--dataset='), 'train', 4, 16)
    size = len(loader.meta['chars'])
    model = randomise(GPT(GPTConfig(block_size=16, vocab_size=size, n_layer=1, n_head=2, n_embd=16, **LLAMA)))
    for name, teacher in (('two', model), ('one', wrapped(model))):
        write_labels(f'{tmp_path}/{name}', [Teacher(name, teacher)], loader, Recipe(k=3))
    a, b = (np.fromfile(f'{tmp_path}/{name}/labels.bin', np.uint8) for name in ('one', 'two'))
    assert len(a) == len(b) and (a != b).mean() < 0.001     # a draw may turn on the last bit of a logit


def test_a_python_file_beside_a_student(tmp_path, toy):
    """By its flag, from the beginning to the end."""
    code = f'''
import sys; sys.path.append({os.getcwd()!r})
from data.checkpoint import load_model
def load(device):
    return load_model({str(tmp_path)!r} + '/teacher/best.pt', device)[0], None
'''
    train(f'{tmp_path}/teacher', toy, '--max_iters=30', '--muon_lr=0.05')
    done = train(f'{tmp_path}/out', toy, f'--teacher=py:{write_py(tmp_path, code)}', '--max_iters=3')
    assert done['flops'] > 0


@pytest.mark.parametrize('kind, more, parts', [
    ('qwen2', {}, True), ('qwen3', dict(head_dim=8), True),
    ('gemma2', dict(head_dim=8, final_logit_softcapping=3.0), False)])
def test_any_model_of_transformers_teaches(tmp_path, kind, more, parts):
    transformers = pytest.importorskip('transformers')
    shape = {key: HF_LLAMA[key] for key in HF_LLAMA if key not in ('model_type', 'hidden_act', 'rope_theta')}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape | more))
    randomise(theirs, 0.3).save_pretrained(tmp_path)
    write_gpt2_tokenizer(tmp_path, TOK)
    teacher = load_teacher(f'hf:{tmp_path}')
    with torch.no_grad():
        expected = theirs(IDX).logits
    assert far(logits_of(teacher.model, IDX), expected) < 1e-5 and teacher.tokenizer.meta() == TOK.meta()
    assert isinstance(teacher.model, InOne) != parts and teacher.model.config.block_size == 40
    weights = sum(p.numel() for p in theirs.parameters())
    assert weights < teacher.model.flops_per_token(training=False) < 3 * weights


def test_what_transformers_does_not_load(tmp_path):
    transformers = pytest.importorskip('transformers')
    folder = write_llama(tmp_path, model_type='qwen2')      # whose biases are not there
    refuses('are missing', KINDS['hf'], folder)
    refuses('does not load', KINDS['hf'], write_llama(tmp_path, model_type='nosuchthing'))
    shutil.rmtree(tmp_path)
    bert = transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    randomise(bert, 0.3).save_pretrained(tmp_path)
    refuses('cannot teach .*looks ahead', KINDS['hf'], str(tmp_path))
