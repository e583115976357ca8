"""
Whether torch.compile works here, and what it compiles: a step of training, or the blocks of a deep model. kernels.py
asks here for the C++ compiler, too. A library above model.py.

    compile = compile and can_compile(device)       # says in a line why not
    forward = compile_step(model, tokens, vocab_size) if compile else model
    with eager(): ...                               # nothing runs compiled
"""
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

import torch

from data.files import private_folder
from model import GPT, rows_in_a_chunk

# -----------------------------------------------------------------------------
# whether it works

def can_compile(device):
    """Whether torch.compile can work here; says in a line why not."""
    why = what_fails(torch.device(device).type)
    if why:
        print(f"compile: off, {why}; going on in eager mode, slower", file=sys.stderr)
    return why is None


def what_fails(kind):
    """kind of device -> why torch.compile cannot work, or None. On a CPU it needs a C++ compiler and Python.h."""
    if kind == 'mps' or platform.system() == 'Windows':
        return 'not supported here'
    why = private_cache()
    if why:
        return why
    if kind == 'cpu':
        compiler, why = cpp_compiler()
        if why:
            return why
        if not os.path.exists(os.path.join(sysconfig.get_paths()['include'], 'Python.h')):
            return 'no Python.h was found (apt-get install g++ python3-dev)'
        if compiler != os.environ.get('CXX', compiler):
            # torch takes all of CXX for the name of a program: what follows it, like the -O1 of "g++ -O1", is left out
            from torch._inductor import config
            config.cpp.cxx = (None, compiler)
    return small_compilation(kind)


def cpp_compiler():
    """-> the C++ compiler's name, and why it cannot be used, or None."""
    compiler = os.environ.get('CXX', 'clang++' if platform.system() == 'Darwin' else 'g++')
    words = shlex.split(compiler)
    if not shutil.which(compiler) and words:
        compiler = words[0]
    if not shutil.which(compiler):
        return compiler, 'no C++ compiler was found (apt-get install g++ python3-dev)'
    # asked directly, as torch would not call a compiler whose result it has kept
    got = subprocess.run([compiler, '-x', 'c++', '-S', '-o', '-', '-'], input='int f() { return 1; }',
                         capture_output=True, text=True)
    if got.returncode:
        return compiler, f"{compiler} does not work ({(got.stderr.splitlines() or [f'status {got.returncode}'])[0]})"
    return compiler, None


@functools.lru_cache(maxsize=None)
def small_compilation(kind):
    """
    Compiles next to nothing for such a device, as everything may be there and not work -> what went wrong, or None. It
    takes some seconds, which the first real compilation would spend otherwise: most go into importing the compiler.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=kind))
    except Exception as e:                          # of torch, of the compiler, of the file system
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        errors = [line for line in lines if 'error:' in line]
        return f'a first small compilation failed: {(errors or lines or [type(e).__name__])[0]}'


def private_cache():
    """
    torch.compile runs what it finds in its cache, a folder of the shared temporary one: not of somebody else's. Where a
    cache that is named cannot be written, torch gets ours, too, as it needs one even for what is not compiled.
    -> why there is none that can be written, or not the one that is named; or None.
    """
    named, why = os.environ.get('TORCHINDUCTOR_CACHE_DIR'), None
    try:
        if named:
            os.makedirs(named, exist_ok=True)
            tempfile.TemporaryFile(dir=named).close()
            return None
    except OSError as e:
        why = f'TORCHINDUCTOR_CACHE_DIR ({named}) cannot be written: {e.strerror}'
    try:
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = private_folder('picochat-inductor')
    except OSError as e:
        why = f'no folder for what is compiled can be made ({e.strerror}): name one, TORCHINDUCTOR_CACHE_DIR=...'
    return why

# -----------------------------------------------------------------------------
# what is compiled

def compile_step(module, tokens, vocab_size, **how):
    """
    torch.compile for a module that ends in losses over so many tokens, a GPT or a Distiller. Where those come in
    chunks, inductor must not join one chunk's kernels with the next one's (it would: they read the same scalars), or
    the logits of all chunks exist at once. Of a deep model, and of its teachers, one block is compiled for all of them:
    see compile_blocks.
    """
    model = getattr(module, 'student', module)
    if model.config.n_layer >= DEEP:
        teachers = [teacher for teacher in getattr(module, 'teachers', ()) if isinstance(teacher, GPT)]
        for deep in (model, *teachers):
            compile_blocks(deep, **how)
        return module
    apart = tokens > rows_in_a_chunk(vocab_size, 1 + model.config.draft_n)
    return torch.compile(module, options={'cpp.max_horizontal_fusion_size': 1} if apart else None, **how)


DEEP = 8        # layers


def compile_blocks(model, **how):
    """
    Compiles the blocks of a model, in place. They share their code, so that one compilation does at any depth, in half
    a minute where the whole step of 30 layers takes many. Within eager() the same blocks run as they are written.
    """
    for block in model.transformer.h:
        block.compile(**how)


def eager():
    """A context in which nothing runs compiled: lengths that change with every call would each be compiled anew."""
    return torch.compiler.set_stance('force_eager')
