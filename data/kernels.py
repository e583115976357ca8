"""
The few tokens of a decoding step through all blocks of a model of integers, in one call of C++ (kernels.cpp) instead of
some seventy of PyTorch for every block. for_decoding (layouts.py) puts it in where there is a C++ compiler. A prompt's
products are PyTorch's as ever; how it attends is kernels.cpp's, as is attention with a cache of integers.

The compiler takes a second, once: its result is kept for other processes, and serves all shapes. Products are the same
integers as everywhere. Norms, softmaxes and silu are floats in an order of their own: they differ from PyTorch's in the
last digits, where an activation between two integers may fall to the other one. But a token's result is the same bits
however many rows, drafts or tokens are read with it.
"""
import ctypes
import functools
import hashlib
import os
import platform
import subprocess

import torch
import torch.nn as nn

from data.cache import FEW
from data.compiling import cpp_compiler
from data.files import in_repo, private_folder
from data.rounding import BITS, GROUPS, int_matmul
from data.sampling import COLD
from model import Block

AS_IT_IS, NORM, RELU2, SWIGLU = range(4)    # what a matrix reads of x, see kernels.cpp
ROWS = 16               # products of more rows than so many are PyTorch's, which is the faster one there
EPS = torch.finfo(torch.float32).eps    # what model.norm adds where norm_eps is 0

# -----------------------------------------------------------------------------
# the library

# no sum and product in one rounding, where a compiler sees fit: the bits would depend on how it arranges a loop
FLAGS = ['-O3', '-march=native', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math', '-fopenmp', '-shared',
         '-fPIC']
POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES = {'round_rows': [POINTER] * 3 + [INT] * 4 + [FLOAT], 'unpack': [POINTER] * 3 + [INT] * 3,
              'int_linear': [POINTER] * 4 + [INT] * 3 + [FLOAT], 'scale_sums': [POINTER] * 5 + [INT] * 2,
              'keep_and_attend': [POINTER] * 5, 'run_blocks': [POINTER] * 2 + [INT] + [POINTER] * 3 + [INT] * 2,
              'norm_rows': [POINTER] * 2 + [INT] * 2 + [FLOAT], 'cap_all': [POINTER, LONG, FLOAT],
              'run_round': ([POINTER] * 2 + [INT] + [POINTER] * 3 + [LONG] + [INT] * 2 + [POINTER] * 2 + [FLOAT]
                            + [INT] * 2 + [POINTER] * 2)}


def struct(**fields):
    """A struct of kernels.cpp, its fields in the same order."""
    return type('Struct', (ctypes.Structure,), {'_fields_': list(fields.items())})


Matrix = struct(weights=POINTER, step=POINTER, sums=POINTER, scale=POINTER, rows=INT, cols=INT, group=INT)
Layer = struct(c_qkv=Matrix, attn_c_proj=Matrix, c_fc=Matrix, mlp_c_proj=Matrix)
Tokens = struct(cos=POINTER, sin=POINTER, starts=POINTER, B=INT, T=INT, ragged=INT)
Heads = struct(H=INT, KV=INT, D=INT, size=INT, normed=INT, eps=FLOAT)
Store = struct(keys=POINTER, values=POINTER, key_scales=POINTER, value_scales=POINTER)
Ends = struct(wte=Matrix, c_out=Matrix, lm_head=Matrix, embed_norm=INT, softcap=FLOAT)


@functools.lru_cache(maxsize=None)
def library():
    """-> kernels.cpp, compiled for this CPU, or None where that is not possible."""
    compiler, why = cpp_compiler()
    if why or platform.system() == 'Windows':
        return None
    source, header = in_repo('data/kernels.cpp'), in_repo('data/products.h')
    # another source, machine or compiler is another file
    about = [open(source).read(), open(header).read(), *FLAGS, compiler, platform.node(), cpu_flags()]
    try:
        folder = private_folder('picochat-kernels')
    except OSError:                             # there is no temporary folder
        return None
    path = os.path.join(folder, hashlib.sha256('\n'.join(about).encode()).hexdigest()[:24])
    if not os.path.exists(path):
        got = subprocess.run([compiler, *FLAGS, source, '-o', f'{path}.{os.getpid()}'], capture_output=True)
        if got.returncode:
            return None
        os.replace(f'{path}.{os.getpid()}', path)
    try:
        lib = ctypes.CDLL(path)
    except OSError:                             # the folder forbids programs, say
        return None
    for name, arguments in SIGNATURES.items():
        getattr(lib, name).argtypes, getattr(lib, name).restype = arguments, None
    return lib


def cpu_flags():
    """What this processor can do, in words (Linux), or ''."""
    if not os.path.exists('/proc/cpuinfo'):
        return ''
    return next((line for line in open('/proc/cpuinfo') if line.startswith(('flags', 'Features'))), '')


def pointer(t):
    return None if t is None else t.data_ptr()

# -----------------------------------------------------------------------------
# a matrix

class KernelLinear(nn.Module):
    """An IntLinear on a CPU, of 8 or 4 bits; both stay what they are in memory."""
    def __init__(self, linear):
        super().__init__()
        self.linear, self.rows = linear, len(linear.scale)
        self.group = 0 if linear.step is None else linear.group
        # of each row, as a product, since torch.sum would make int32 of the whole matrix first
        self.register_buffer('sums', int_matmul(torch.ones(1, linear.cols), linear.integers())[0])
        self.matrix = Matrix(linear.weight.data_ptr(), pointer(linear.step), self.sums.data_ptr(),
                             linear.scale.data_ptr(), self.rows, linear.cols, self.group)

    @staticmethod
    def fits(linear):
        """Whether the kernels take this matrix: groups of 4 bits must divide both halves of a row."""
        if linear.weight.device.type != 'cpu' or library() is None:
            return False
        if linear.step is None:
            return True
        if linear.bits != 4 or linear.group not in GROUPS or linear.cols % 64 or linear.cols % linear.group:
            return False
        # kernels.cpp looks up what a step makes in a table, where a file's step of another size would miss it
        return -BITS[4].steps <= linear.step.min() and linear.step.max() <= BITS[4].steps

    def forward(self, x):
        return self.read(x.float().contiguous())

    def read(self, x, what=AS_IT_IS, eps=0.0, rest=None, turned=0):
        """what of x (..., K), or (..., 2 K) for SWIGLU, float32 -> its product (..., N), with rest (..., N) added."""
        K = self.linear.cols
        M = x.numel() // (2 * K if what == SWIGLU else K)
        if M > ROWS:
            return self.read_many(x, M, what, eps, rest, turned)
        y = x.new_empty(*x.shape[:-1], self.rows)
        library().int_linear(ctypes.byref(self.matrix), x.data_ptr(), pointer(rest), y.data_ptr(), M, what, turned, eps)
        return y

    def read_many(self, x, M, what, eps, rest, turned):
        """read for many rows: the same bits, by PyTorch's product of integers."""
        linear, N, K = self.linear, self.rows, self.linear.cols
        xq, xs = torch.empty(M, K, dtype=torch.int8), torch.empty(M, 1)
        library().round_rows(x.data_ptr(), xq.data_ptr(), xs.data_ptr(), M, K, what, turned, eps)
        w = linear.weight
        if self.group:
            w = torch.empty(N, K, dtype=torch.int8)
            library().unpack(linear.weight.data_ptr(), linear.step.data_ptr(), w.data_ptr(), N, K, self.group)
        sums, y = int_matmul(xq, w), x.new_empty(*x.shape[:-1], N)              # (M, N) int32
        library().scale_sums(sums.data_ptr(), linear.scale.data_ptr(), xs.data_ptr(), pointer(rest), y.data_ptr(), M, N)
        return y

# -----------------------------------------------------------------------------
# the blocks

class KernelBlock(Block):
    """
    A Block whose matrices are KernelLinears, those that read the same input joined (layouts.for_decoding). With a cache
    a token's result is the same bits, however many are read with it: those of run_blocks.
    """
    def __init__(self, block):
        nn.Module.__init__(self)
        self.attn, self.mlp, self.dropout, self.eps = block.attn, block.mlp, block.dropout, block.eps
        self.reader, self.what = self.read_by(block.mlp)

    @staticmethod
    def read_by(mlp):
        """-> the matrix of an MLP that reads the stream, and what is done to what it gives."""
        return (mlp.c_gate_fc, SWIGLU) if hasattr(mlp, 'c_gate_fc') else (mlp.c_fc, RELU2)

    @staticmethod
    def fits(block):
        """Whether all four matrices are the kernels'."""
        attn, mlp = block.attn, block.mlp
        reader, _ = KernelBlock.read_by(mlp)
        return all(isinstance(m, KernelLinear) for m in (attn.c_qkv, attn.c_proj, reader, mlp.c_proj))

    def forward(self, x, cos, sin, cache):
        """As Block.forward, x (B, T, n_embd)."""
        if cache is None:
            return super().forward(x, cos, sin, cache)
        x, attn, eps = x.contiguous(), self.attn, self.eps or EPS
        y = x.new_empty(*x.shape[:2], attn.n_head * attn.head_dim)
        tokens = tokens_of(x, cos, sin, cache)
        qkv = attn.c_qkv.read(x, NORM, eps)                                 # (B, T, all heads * head_dim)
        heads, store = heads_of(self, cache.size), store_of(cache, attn.layer)
        library().keep_and_attend(ctypes.byref(heads), ctypes.byref(tokens), qkv.data_ptr(), ctypes.byref(store),
                                  y.data_ptr())
        x = attn.c_proj.read(y, rest=x)
        hidden = self.reader.read(x, NORM, eps)
        return self.mlp.c_proj.read(hidden, self.what, rest=x, turned=self.mlp.turned)

    def layer(self):
        """What kernels.cpp knows of a block."""
        return Layer(*(m.matrix for m in (self.attn.c_qkv, self.attn.c_proj, self.reader, self.mlp.c_proj)))


class KernelBlocks(nn.Module):
    """All blocks of a model, in the place of its first one."""
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.layers = (Layer * len(blocks))(*(block.layer() for block in blocks))

    def forward(self, x, cos, sin, cache):
        """As Block.forward. With a cache the few tokens of a step go through all blocks in one call."""
        if cache is None or x.size(1) > FEW:
            for block in self.blocks:
                x = block(x, cos, sin, cache)
            return x
        x, block = x.clone(memory_format=torch.contiguous_format), self.blocks[0]       # x is changed in place
        tokens = tokens_of(x, cos, sin, cache)
        library().run_blocks(*self.at_work(cache), ctypes.byref(tokens), x.data_ptr(), block.what, block.mlp.turned)
        return x

    def weights(self):
        matrices = [getattr(layer, name) for layer in self.layers for name, _ in Layer._fields_]
        return sum(m.rows * m.cols for m in matrices)

    def at_work(self, cache):
        """The first arguments of run_blocks and run_round: the layers, and where their keys and values lie."""
        stores = (Store * len(self.blocks))(*(store_of(cache, i) for i in range(len(self.blocks))))
        return self.layers, stores, len(self.blocks), ctypes.byref(heads_of(self.blocks[0], cache.size))


def heads_of(block, size):
    """A block's Heads. size: for how many tokens there is room where its keys lie, which come in fours."""
    assert size % 4 == 0
    attn = block.attn
    return Heads(attn.n_head, attn.n_kv_head, attn.head_dim, size, attn.qk_norm, block.eps or EPS)


def store_of(cache, layer):
    """The Store of a layer's keys and values."""
    return Store(*(cache.store[name][layer].data_ptr() if name in cache.store else None
                   for name in ('k', 'v', 'k_scale', 'v_scale')))


def tokens_of(x, cos, sin, cache):
    """Where the tokens x (B, T, n_embd) stand that a cache was advanced for."""
    assert cache.store['k'][0].dtype in (torch.float32, torch.int8), \
        f"a cache of {cache.store['k'][0].dtype} is none for kernels.cpp: float32 or int8"
    B, T, _ = x.shape
    return Tokens(cos.data_ptr(), sin.data_ptr(), cache.starts.data_ptr(), B, T, cos.dim() == 4)

# -----------------------------------------------------------------------------
# before the blocks and behind them: what run_round does for one token, for any number of them

def norm(x, eps=0.0):
    """model.norm."""
    x = x.contiguous()
    y = torch.empty_like(x)
    library().norm_rows(x.data_ptr(), y.data_ptr(), x.numel() // x.size(-1), x.size(-1), eps or EPS)
    return y


def softcap(y, cap):
    """model.softcap, in place."""
    if cap:
        library().cap_all(y.data_ptr(), y.numel(), cap)
    return y


class KernelRound:
    """
    Some tokens of one text, drawn one after the other in one call: the tokens and states of engine.step_plain, the same
    bits. A small model takes less time for a token than Python takes to ask for it.
    """
    MOST = 50_000_000       # weights; in larger models asking costs little, and what is drawn beyond a text's end a lot

    def __init__(self, model, sampling):
        c, self.model, self.sampling = model.config, model, sampling
        table, self.blocks = model.transformer.wte, model.transformer.h[0]
        # no product reads the table, so its rows' sums are missing
        wte = Matrix(table.weight.data_ptr(), pointer(table.step), None, table.scale.data_ptr(), c.vocab_size, c.n_embd,
                     model.lm_head.group)
        c_out = model.transformer.c_out.matrix if c.out_proj else Matrix()
        self.ends = Ends(wte, c_out, model.lm_head.matrix, c.embed_norm, c.softcap)

    @staticmethod
    def pays(model, sampling):
        """Whether model is arranged for kernels.cpp and small, and kernels.cpp knows all filters of the draw."""
        blocks, table = model.transformer.h[0], model.transformer.wte
        if not isinstance(blocks, KernelBlocks) or (sampling.top_p, sampling.min_p) != (None, None):
            return False
        if table.step is not None and not model.lm_head.group:          # 4 bits that KernelLinear.fits refused
            return False
        return blocks.weights() < KernelRound.MOST

    def __call__(self, cache, last, noise):
        """last (1, 1), noise (1, n, V) -> tokens read (1, n), tokens drawn (1, n), states (1, n, n_embd)"""
        start, n, block = cache.lengths[0], noise.size(1), self.blocks.blocks[0]
        cache.advance(n)
        tokens, states = torch.empty(1, n + 1, dtype=torch.long), torch.empty(1, n, self.model.config.n_embd)
        tokens[:, 0] = last[:, 0]
        cold = self.sampling.temperature < COLD
        noise = noise if cold else noise.contiguous()
        library().run_round(
            *self.blocks.at_work(cache), self.model.cos.data_ptr(), self.model.sin.data_ptr(), start, block.what,
            block.mlp.turned, ctypes.byref(self.ends), None if cold else noise.data_ptr(), self.sampling.temperature,
            self.sampling.top_k or 0, n, tokens.data_ptr(), states.data_ptr())
        return tokens[:, :-1], tokens[:, 1:], states
