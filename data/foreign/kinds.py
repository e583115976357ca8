"""
Other people's models: the kinds in --teacher=KIND:PATH, and the functions that read them, each in a file of its own.

    from data.foreign.kinds import KINDS
    model, tokenizer = KINDS['gguf']('SmolLM2.gguf', 'cpu')         # llama.py: a Llama, which is our block
    model, tokenizer = KINDS['hf']('models/SmolLM2', 'cpu')         # that, or any other folder of Hugging Face's
    model, tokenizer = KINDS['nanochat']('teachers/d32', 'cpu')     # nanochat.py: a folder of nanochat, d20 to d34
    model, tokenizer = KINDS['gpt2']('ckpt.pt', 'cpu')              # gpt2.py: nanoGPT's file, or the hub's gpt2 folder
    model, tokenizer = KINDS['py']('my_teacher.py', 'cpu')          # causal_lm.py: whatever that file loads
    model, tokenizer = KINDS['random']('d32', 'cpu')                # that nanochat's shape, to measure with

Every model has what a teacher needs: config.vocab_size, config.block_size, trunk(idx) -> states, logits(states) ->
float32, flops_per_token(). tokenizer is None if there is none beside the model. ValueError names a file that is
missing, damaged, hostile or of another kind.

To add a kind, write a function (path, device) -> (model, tokenizer or None), and name it in KINDS. If it reads files,
name a function that finds them in FILES: scripts call it before they do anything that takes long.
"""
from data.foreign.causal_lm import find_py, load_causal_lm, load_py
from data.foreign.gpt2 import find_gpt2, load_gpt2
from data.foreign.llama import find_gguf, load_gguf, load_llama, refuse, what_is_odd
from data.foreign.nanochat import find_nanochat, load_hf_nanochat, load_nanochat, random_teacher
from data.foreign.weights import hf_file, read_config


def load_hf(folder, device='cpu'):
    """
    A folder of Hugging Face's -> our GPT if it is a plain Llama or a NanoChat, otherwise a model of transformers, which
    can teach; and its tokenizer, or None.
    """
    c = read_config(folder)
    if c['model_type'] == 'nanochat':
        return load_hf_nanochat(folder, device)
    return (load_causal_lm if what_is_odd(c) else load_llama)(folder, device)


def refuse_other_blocks(name):
    """ValueError if the model of 'hf:FOLDER' is not our block, with the differences, before it is loaded in vain."""
    kind, _, folder = name.partition(':')
    if kind == 'hf' and read_config(folder)['model_type'] != 'nanochat':
        refuse(folder, what_is_odd(read_config(folder)))


KINDS = {'nanochat': load_nanochat, 'gpt2': load_gpt2, 'random': random_teacher, 'gguf': load_gguf, 'hf': load_hf,
         'py': load_py}
FILES = {'nanochat': find_nanochat, 'gpt2': find_gpt2, 'gguf': find_gguf, 'hf': hf_file, 'py': find_py}
