"""
Whether torch.compile works here, and what it compiles: a training step, or the blocks of a deep model. data/kernels.py
gets the C++ compiler from here, too. A library above model.py.

    compile = compile and can_compile(device)       # prints a line if it cannot
    forward = compile_step(model, tokens, vocab_size) if compile else model
    with eager(): ...                               # everything in here runs uncompiled
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
    """Whether torch.compile works on this device; if not, prints one line that says why."""
    why = what_fails(torch.device(device).type)
    if why:
        print(f"compile: off, {why}; going on in eager mode, slower", file=sys.stderr)
    return why is None


def what_fails(kind):
    """
    kind of device -> why torch.compile does not work there, or None. On a CPU it needs a C++ compiler and Python.h.
    """
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
            # torch takes all of CXX as the name of a program; of a CXX like "g++ -O1" it gets the first word
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
    # try the compiler itself: torch would not call it for what its cache holds already
    got = subprocess.run([compiler, '-x', 'c++', '-S', '-o', '-', '-'], input='int f() { return 1; }',
                         capture_output=True, text=True)
    if got.returncode:
        return compiler, f"{compiler} does not work ({(got.stderr.splitlines() or [f'status {got.returncode}'])[0]})"
    return compiler, None


@functools.lru_cache(maxsize=None)
def small_compilation(kind):
    """
    Compiles a tiny function for such a device -> what went wrong, or None. All parts may be there and still not work.
    This takes some seconds, most of them to import the compiler, which the first real compilation then saves.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=kind))
    except Exception as e:                          # of torch, of the compiler, of the file system
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        errors = [line for line in lines if 'error:' in line]
        return f'a first small compilation failed: {(errors or lines or [type(e).__name__])[0]}'


def private_cache():
    """
    Gives torch.compile a cache folder that only this user can write to, since it runs what it finds there and its
    default lies in the shared temporary folder. If TORCHINDUCTOR_CACHE_DIR names a folder that cannot be written to,
    ours is set, too, as torch needs one even to run uncompiled. -> what is wrong with the cache, or None.
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
    torch.compile for a module that computes losses over so many tokens, a GPT or a Distiller. If the losses are
    computed in chunks (model.chunked), inductor must not fuse the kernels of different chunks, which it would since
    they read the same scalars: the logits of all chunks would exist at once. Deep models and their teachers are
    compiled block by block, see compile_blocks.
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
    Compiles the blocks of a model, in place. All blocks share one compilation, which takes half a minute at any depth;
    compiling a whole step of 30 layers takes many. Within eager() the blocks run uncompiled.
    """
    for block in model.transformer.h:
        block.compile(**how)


def eager():
    """A context in which nothing runs compiled, for calls whose lengths change: each would be compiled anew."""
    return torch.compiler.set_stance('force_eager')
