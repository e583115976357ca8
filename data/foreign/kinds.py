"""
Other people's models: what may stand before the colon of --teacher=KIND:PATH, and who reads it. Each kind has its file.

    from data.foreign.kinds import KINDS
    model, tokenizer = KINDS['gguf']('SmolLM2.gguf', 'cpu')         # llama.py: a Llama, which is our block
    model, tokenizer = KINDS['hf']('models/SmolLM2', 'cpu')         # that, or any other folder of Hugging Face's
    model, tokenizer = KINDS['nanochat']('teachers/d32', 'cpu')     # nanochat.py: a folder of nanochat, d20 to d34
    model, tokenizer = KINDS['gpt2']('ckpt.pt', 'cpu')              # gpt2.py: nanoGPT's file, or the hub's gpt2 folder
    model, tokenizer = KINDS['py']('my_teacher.py', 'cpu')          # causal_lm.py: whatever that file loads
    model, tokenizer = KINDS['random']('d32', 'cpu')                # that nanochat's shape, to measure with

Whoever made it, a model offers what a teacher needs: config.vocab_size, config.block_size, trunk(idx) -> states,
logits(states) -> float32, flops_per_token(). tokenizer is None where none lies beside the model. A file that is
missing, damaged, hostile or of another kind is a ValueError that names it.

To add a kind, write a function (path, device) -> (model, tokenizer or None), and name it in KINDS. If it reads files,
name in FILES a function that finds them, which a script asks for before it does anything long.
"""
from data.foreign.causal_lm import find_py, load_causal_lm, load_py
from data.foreign.gpt2 import find_gpt2, load_gpt2
from data.foreign.llama import find_gguf, load_gguf, load_llama, refuse, what_is_odd
from data.foreign.nanochat import find_nanochat, load_hf_nanochat, load_nanochat, random_teacher
from data.foreign.weights import hf_file, read_config


def load_hf(folder, device='cpu'):
    """
    A folder of Hugging Face's -> our GPT if it is a plain Llama or of NanoChat's kind, else whatever transformers makes
    of it, which can teach; and its tokenizer, or None.
    """
    c = read_config(folder)
    if c['model_type'] == 'nanochat':
        return load_hf_nanochat(folder, device)
    return (load_causal_lm if what_is_odd(c) else load_llama)(folder, device)


def refuse_other_blocks(name):
    """ValueError says what a teacher's 'hf:FOLDER' has that our block has not, before it is loaded to no end."""
    kind, _, folder = name.partition(':')
    if kind == 'hf' and read_config(folder)['model_type'] != 'nanochat':
        refuse(folder, what_is_odd(read_config(folder)))


KINDS = {'nanochat': load_nanochat, 'gpt2': load_gpt2, 'random': random_teacher, 'gguf': load_gguf, 'hf': load_hf,
         'py': load_py}
FILES = {'nanochat': find_nanochat, 'gpt2': find_gpt2, 'gguf': find_gguf, 'hf': hf_file, 'py': find_py}
