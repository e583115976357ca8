"""
Integer models on a CPU: one call of C++ (kernels.cpp) takes the few tokens of a decoding step through all blocks,
instead of some seventy calls of PyTorch for each block. for_decoding (layouts.py) uses it if there is a C++ compiler.
The products of a prompt are PyTorch's (if it multiplies integers exactly here); its attention is kernels.cpp's.

Compiling takes a second, once: the library is kept for other processes, and serves all shapes. Products are the same
integers as everywhere. Norms, softmax and silu are floats, summed in another order than PyTorch's, so their last digits
differ, and an activation that lies between two integers may be rounded to the other one. But the result for a token is
the same bits however many rows, drafts or tokens are read with it.
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
from data.rounding import BITS, GROUPS, INT_MM_IS_EXACT, int_matmul
from data.sampling import COLD
from model import Block

AS_IT_IS, NORM, RELU2, SWIGLU = range(4)    # what is applied to x before a matrix reads it, see products.h
ROWS = 16               # products with more rows of activations than this are PyTorch's, which is faster there, but for
                        # CPUs on which it would have to multiply floats (rounding.INT_MM_IS_EXACT)
EPS = torch.finfo(torch.float32).eps    # what model.norm adds where norm_eps is 0

# -----------------------------------------------------------------------------
# the library

# -ffp-contract=off: no fused multiply-add where the compiler sees fit, since bits would depend on how it arranges loops
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
    """A struct of kernels.cpp, with its fields in the same order."""
    return type('Struct', (ctypes.Structure,), {'_fields_': list(fields.items())})


Matrix = struct(weights=POINTER, step=POINTER, sums=POINTER, scale=POINTER, rows=INT, cols=INT, group=INT)
Layer = struct(c_qkv=Matrix, attn_c_proj=Matrix, c_fc=Matrix, mlp_c_proj=Matrix)
Tokens = struct(cos=POINTER, sin=POINTER, starts=POINTER, B=INT, T=INT, ragged=INT)
Heads = struct(H=INT, KV=INT, D=INT, size=INT, normed=INT, eps=FLOAT)
Store = struct(keys=POINTER, values=POINTER, key_scales=POINTER, value_scales=POINTER)
Ends = struct(wte=Matrix, c_out=Matrix, lm_head=Matrix, embed_norm=INT, softcap=FLOAT)


@functools.lru_cache(maxsize=None)
def library():
    """-> kernels.cpp, compiled for this CPU and loaded; None if that is not possible."""
    compiler, why = cpp_compiler()
    if why or platform.system() == 'Windows':
        return None
    source, header = in_repo('data/kernels.cpp'), in_repo('data/products.h')
    # the file's name is a hash of the source, the flags, the compiler and the machine
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
    """The line of /proc/cpuinfo that names this processor's instruction sets (Linux), or ''."""
    if not os.path.exists('/proc/cpuinfo'):
        return ''
    return next((line for line in open('/proc/cpuinfo') if line.startswith(('flags', 'Features'))), '')


def pointer(t):
    return None if t is None else t.data_ptr()

# -----------------------------------------------------------------------------
# a matrix

class KernelLinear(nn.Module):
    """An IntLinear of 8 or 4 bits on a CPU, on the same memory."""
    def __init__(self, linear):
        super().__init__()
        self.linear, self.rows = linear, len(linear.scale)
        self.group = 0 if linear.step is None else linear.group
        # the sum of each row, as a product with ones: torch.sum would first convert the whole matrix to int32
        self.register_buffer('sums', int_matmul(torch.ones(1, linear.cols), linear.integers())[0])
        self.matrix = Matrix(linear.weight.data_ptr(), pointer(linear.step), self.sums.data_ptr(),
                             linear.scale.data_ptr(), self.rows, linear.cols, self.group)

    @staticmethod
    def fits(linear):
        """Whether the kernels take this matrix. At 4 bits, groups must divide both halves of a row."""
        if linear.weight.device.type != 'cpu' or library() is None:
            return False
        if linear.step is None:
            return True
        if linear.bits != 4 or linear.group not in GROUPS or linear.cols % 64 or linear.cols % linear.group:
            return False
        # products.h looks up the multiples of a step in a table, which has these steps only
        return -BITS[4].steps <= linear.step.min() and linear.step.max() <= BITS[4].steps

    def forward(self, x):
        return self.read(x.float().contiguous())

    def read(self, x, what=AS_IT_IS, eps=0.0, rest=None, turned=0):
        """
        The product with `what` of x, float32: x (..., K), or (..., 2 K) for SWIGLU -> (..., N). rest (..., N) is added.
        """
        K = self.linear.cols
        M = x.numel() // (2 * K if what == SWIGLU else K)
        if M > ROWS and INT_MM_IS_EXACT:
            return self.read_many(x, M, what, eps, rest, turned)
        y = x.new_empty(*x.shape[:-1], self.rows)
        library().int_linear(ctypes.byref(self.matrix), x.data_ptr(), pointer(rest), y.data_ptr(), M, what, turned, eps)
        return y

    def read_many(self, x, M, what, eps, rest, turned):
        """read for many rows, by PyTorch's integer product: the same bits."""
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
    A Block whose matrices are KernelLinears, joined where they read the same input (layouts.for_decoding). With a cache
    the result for a token is that of run_blocks, bit for bit, however many tokens are read with it.
    """
    def __init__(self, block):
        nn.Module.__init__(self)
        self.attn, self.mlp, self.dropout, self.eps = block.attn, block.mlp, block.dropout, block.eps
        self.reader, self.what = self.read_by(block.mlp)

    @staticmethod
    def read_by(mlp):
        """-> the matrix of an MLP that reads the residual stream, and the activation function that follows it."""
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
        """This block as a struct of kernels.cpp."""
        return Layer(*(m.matrix for m in (self.attn.c_qkv, self.attn.c_proj, self.reader, self.mlp.c_proj)))


class KernelBlocks(nn.Module):
    """All blocks of a model as one module, which takes the place of the first."""
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.layers = (Layer * len(blocks))(*(block.layer() for block in blocks))

    def forward(self, x, cos, sin, cache):
        """As Block.forward. With a cache, the few tokens of a decoding step go through all blocks in one call."""
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
        """The first arguments of run_blocks and run_round: the layers, and their keys and values."""
        stores = (Store * len(self.blocks))(*(store_of(cache, i) for i in range(len(self.blocks))))
        return self.layers, stores, len(self.blocks), ctypes.byref(heads_of(self.blocks[0], cache.size))


def heads_of(block, size):
    """A block's Heads. size: how many tokens the cache has room for, a multiple of 4."""
    assert size % 4 == 0
    attn = block.attn
    return Heads(attn.n_head, attn.n_kv_head, attn.head_dim, size, attn.qk_norm, block.eps or EPS)


def store_of(cache, layer):
    """The Store of a layer's keys and values."""
    return Store(*(cache.store[name][layer].data_ptr() if name in cache.store else None
                   for name in ('k', 'v', 'k_scale', 'v_scale')))


def tokens_of(x, cos, sin, cache):
    """The positions of the tokens x (B, T, n_embd), for which the cache has been advanced."""
    assert cache.store['k'][0].dtype in (torch.float32, torch.int8), \
        f"a cache of {cache.store['k'][0].dtype} is none for kernels.cpp: float32 or int8"
    B, T, _ = x.shape
    return Tokens(cos.data_ptr(), sin.data_ptr(), cache.starts.data_ptr(), B, T, cos.dim() == 4)

# -----------------------------------------------------------------------------
# before and after the blocks: norm and softcap as run_round computes them, for any number of tokens

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
    Decodes some tokens of one text, one after the other, in one call: the tokens and states are those of
    engine.step_plain, bit for bit. A small model takes less time for a token than Python takes to ask for it.
    """
    MOST = 50_000_000       # weights. In larger models the calls cost little, and tokens drawn after a text's end a lot

    def __init__(self, model, sampling):
        c, self.model, self.sampling = model.config, model, sampling
        table, self.blocks = model.transformer.wte, model.transformer.h[0]
        # sums=None: only products need the sums of rows, and the table is only looked up
        wte = Matrix(table.weight.data_ptr(), pointer(table.step), None, table.scale.data_ptr(), c.vocab_size, c.n_embd,
                     model.lm_head.group)
        c_out = model.transformer.c_out.matrix if c.out_proj else Matrix()
        self.ends = Ends(wte, c_out, model.lm_head.matrix, c.embed_norm, c.softcap)

    @staticmethod
    def pays(model, sampling):
        """Whether model is small and arranged for kernels.cpp, which must know all filters of the draw."""
        blocks, table = model.transformer.h[0], model.transformer.wte
        if not isinstance(blocks, KernelBlocks) or (sampling.top_p, sampling.min_p) != (None, None):
            return False
        if table.step is not None and not model.lm_head.group:          # a 4-bit table that KernelLinear.fits refused
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
