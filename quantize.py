"""
Weights as integers: one rounding rule, used by training (fake-quant), by the file and by the modules that run.

    python quantize.py --out_dir=out-quickstart             # best.pt -> int8.safetensors, loss before and after
    python quantize.py --out_dir=out-quickstart --bits=4    # -> int4.safetensors: the tables at 8 bits, the rest at 4

    from quantize import prepare, convert, gptq, export, load
    prepare(model, bits)            # trains through the rounding (straight-through, arXiv 1308.3432)
    convert(model, bits)            # integer modules: nothing is dequantised, at load or later
    model = gptq(model, batches)    # the same for a model that was trained in float, with its errors fed back
    export(path, model, tokenizer_meta);  model, state = load(path)

Weights are integers v from -127 to 127 times one scale per output row (embedding: per token). With 8 bits v is any of
them. With 4, every group of 32 (64, 128) columns has a step from 1 to 18, and v is -7, ..., 7 times the step: the file
and the modules hold two weights in a byte and a byte per step, and what is multiplied is the same kind of integers (a
scale in two levels: VS-Quant, arXiv 2102.04503).
Activations: int8, one scale per token row, found as they come. Products are summed as integers, which is exact in any
order: the result for one token cannot depend on its neighbours.
The file is in safetensors layout (8 bytes of length, a JSON header, the tensors), with shape, rounding and tokenizer
in its metadata.
"""
import copy
import hashlib
import json
import math
import os
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (GPT, atomic_write, check_device, check_knobs, evaluate, load_model, make_config,
                   rope_tables)

GROUP = 32              # columns that share a step at 4 bits: 0.53 bytes a weight; 0.52 with 64, 0.51 with 128
TABLES = ('transformer.wte', 'lm_head')

# -----------------------------------------------------------------------------
# the rule

def round_weight(w, bits=8, group=GROUP, search=True):
    """
    w (rows, cols) float -> v (rows, cols) int8, scale (rows,) float32, step (rows, groups) int8, None with 8 bits;
    groups = ceil(cols / group). w is about v * scale. Rounds to nearest, ties to even; a row of zeros has scale 1.
    The largest weight of a row lies at the edge of its integers; search=False (4 bits) puts that of a group at the
    edge of the group's as well, instead of choosing its step.
    """
    top = {8: 127, 4: 7 * 18}[bits]                          # 18 is the most that 7 can be multiplied by in an int8
    rows, cols = w.shape
    w = w.float()
    peak = w.abs().amax(dim=1, keepdim=True)
    scale = torch.where(peak > 0, peak / top, 1.0)
    x = w / scale
    if bits == 8:
        return x.round().clamp(-top, top).to(torch.int8), scale.squeeze(1), None
    # whole groups, and the columns that are left, apart: padded with zeros, inductor of torch 2.11 and 2.13 gets the last
    # group wrong
    whole = cols - cols % group
    parts = [part for part in (x[:, :whole].unflatten(1, (-1, group)), x[:, None, whole:]) if part.numel()]
    steps = [choose_step(part, search) for part in parts]                        # (rows, groups, 1), (rows, 1, 1)
    v = torch.cat([round_to(part, step).flatten(1) for part, step in zip(parts, steps)], dim=1)
    return v.to(torch.int8), scale.squeeze(1), torch.cat(steps, dim=1).squeeze(2).to(torch.int8)


def round_to(x, step):
    """The nearest of -7, ..., 7 times step."""
    return (x / step).round().clamp(-7, 7) * step


def choose_step(x, search=True):
    """
    x (..., group) in units of its row's scale -> step (..., 1): of the four largest steps that make sense the one with
    the least squared error. Smaller ones clip the largest weights so that the others are met more closely.
    """
    least = x.abs().amax(dim=-1, keepdim=True) / 7                               # below this something is clipped
    if not search:
        return least.round().clamp(1, 18)
    best = error = None
    for less in range(4):
        step = (least.ceil() - less).clamp(1, 18)
        e = (round_to(x, step) - x).square().sum(dim=-1, keepdim=True)
        best, error = (step, e) if best is None else (torch.where(e < error, step, best), torch.minimum(e, error))
    return best


def pack(v, step, group):
    """
    v (rows, cols), multiples of step (rows, groups) -> (rows, ceil(cols / 2)) uint8: the left half of the columns in
    the low 4 bits, the right half in the high ones; 8 stands for zero.
    """
    cols = v.size(1)
    q = (v // step.repeat_interleave(group, dim=1)[:, :cols] + 8).to(torch.uint8)
    left, right = F.pad(q, (0, cols % 2)).chunk(2, dim=1)
    return left | right << 4


def unpack(packed, step, group, cols):
    """packed (..., ceil(cols / 2)) and step (..., groups) -> v (..., cols) int8."""
    q = torch.cat((packed & 15, packed >> 4), dim=-1)[..., :cols].to(torch.int8) - 8
    return q * step.repeat_interleave(group, dim=-1)[..., :cols]


def round_rows(x):
    """
    Activations x (..., K) -> xq (..., K), integers in [-127, 127] kept as float, and xs (..., 1):
    x is about xq * xs.
    """
    peak = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    return (x * (127 / peak)).round_(), peak / 127


def fake_weight(w, bits=8, group=GROUP):
    """w as it will be after export, with the gradient of w itself (straight-through)."""
    with torch.no_grad():
        v, scale, _ = round_weight(w, bits, group)
    # what is added is zero; the value of w + (rounded - w) might be off in its last bit
    return v * scale[:, None] + (w - w.detach())

# -----------------------------------------------------------------------------
# training through the rounding

class FakeLinear(nn.Linear):
    def forward(self, x):
        xq, xs = round_rows(x.detach().float())
        return F.linear(xq * xs + (x - x.detach()), fake_weight(self.weight, self.bits, self.group))


class FakeEmbedding(nn.Embedding):
    def forward(self, idx):
        return F.embedding(idx, fake_weight(self.weight, self.bits, self.group))


def prepare(model, bits=8, group=GROUP, tables_bits=8):
    """
    Makes every Linear and Embedding of model round as it will after export, in place; weights and their names stay.
    In float32 the results are those of the integers. Under bfloat16 autocast, which only training uses, a product takes
    the rounded values in bfloat16, and so rounds them once more.
    """
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):       # only the forward differs, so only the class changes
            module.__class__ = FakeLinear if type(module) is nn.Linear else FakeEmbedding
            module.bits, module.group = tables_bits if name in TABLES else bits, group
    return model

# -----------------------------------------------------------------------------
# running on the integers

def int_matmul(xq, w):
    """
    xq (M, K) and w (N, K), integers in [-127, 127], w int8 -> their exact product xq @ w.T (M, N),
    int32 or float32.
    """
    if xq.device.type == 'cpu':
        return torch._int_mm(xq.to(torch.int8), w.t())      # int32: what it is multiplied with makes it float
    if xq.device.type == 'cuda' and w.size(0) % 8 == 0 and w.size(1) % 8 == 0:
        M = xq.size(0)                                       # cuBLAS wants at least 17 rows
        return torch._int_mm(F.pad(xq.to(torch.int8), (0, 0, 0, max(0, 17 - M))), w.t())[:M].float()
    return float_matmul(xq, w)


def float_matmul(xq, w):
    """
    int_matmul where the device has no integer kernel: a float32 holds every integer up to 2^24,
    so sums over at most 1,040 products are exact.
    """
    parts = zip(xq.float().split(1040, dim=1), w.split(1040, dim=1))
    return sum((a @ b.float().t()).to(torch.int32) for a, b in parts).float()


def hold(module, v, scale, step, group):
    """
    Gives module its buffers: weight (rows, cols) int8 or, with steps, (rows, ceil(cols / 2)) uint8;
    scale (rows,) float32; step (rows, groups) int8 or None.
    """
    module.cols, module.group = v.size(1), group
    module.register_buffer('weight', v if step is None else pack(v, step, group))
    module.register_buffer('scale', scale)
    module.register_buffer('step', step)


class IntLinear(nn.Module):
    """
    x (..., K) -> (..., N) float32, from v (N, K), scale and step as round_weight gives them. PyTorch has no exact
    product of 4-bit integers on CPUs or GPUs: a call at 4 bits unpacks the matrix to int8, which takes ten times as
    long as the product. for_decoding has faster ways.
    """
    def __init__(self, v, scale, step=None, group=None):
        super().__init__()
        hold(self, v, scale, step, group)

    def integers(self):
        """v (N, K) int8."""
        return self.weight if self.step is None else unpack(self.weight, self.step, self.group, self.cols)

    def forward(self, x):
        xq, xs = round_rows(x.float())
        y = int_matmul(xq.flatten(0, -2), self.integers()).view(*x.shape[:-1], -1)
        return y * self.scale * xs


class IntEmbedding(nn.Module):
    """idx (...) -> (..., n_embd) float32."""
    def __init__(self, v, scale, step=None, group=None):
        super().__init__()
        hold(self, v, scale, step, group)

    def forward(self, idx):
        v = self.weight[idx] if self.step is None else unpack(self.weight[idx], self.step[idx], self.group, self.cols)
        return v.float() * self.scale[idx].unsqueeze(-1)


# Where this file is both run and imported, it must not register the operator a second time: those who have the first
# one would be left with a dead operator.
if not hasattr(torch.ops.picochat, 'packed_int8'):
    @torch.library.custom_op('picochat::packed_int8', mutates_args=())
    def packed_int8(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """
        Rows x (M, K), integers in [-127, 127] as float, times oneDNN's packed weights, times scale (N,)
        -> (M, N) float32. x travels as x + 128 in uint8.
        """
        return torch.ops.onednn.qlinear_pointwise(
            (x + 128).to(torch.uint8), 1.0, 128, packed, scale, torch.zeros(len(scale), dtype=torch.int32), None,
            1.0, 0, torch.float32, 'none', [], '')

    @packed_int8.register_fake
    def _(x, packed, scale):
        return x.new_empty(x.size(0), scale.size(0))


class PackedInt8Linear(nn.Module):
    """
    An 8-bit IntLinear in oneDNN's own layout, for matrices with so many rows (vocabularies) that a pass over several
    tokens must not read them slowly: five tokens cost little more than one there, and twice as much in _int_mm. The
    results are the same bits.
    """
    ROWS = 8192             # from here on it pays; in smaller ones the call itself costs more than it saves

    def __init__(self, linear):
        super().__init__()
        self.scale, self.packed = linear.scale, torch.ops.onednn.qlinear_prepack(linear.weight, None)

    def forward(self, x):
        xq, xs = round_rows(x.float())
        return torch.ops.picochat.packed_int8(xq.flatten(0, -2), self.packed, self.scale).view(*x.shape[:-1], -1) * xs

    @staticmethod
    def pays(linear):
        """
        Whether linear should be packed: it is tall, it is on a CPU whose oneDNN has the kernel,
        and the kernel does not saturate there (without VNNI it may).
        """
        if (linear.weight.device.type != 'cpu' or linear.weight.size(0) < PackedInt8Linear.ROWS
                or not torch.backends.mkldnn.is_available()):
            return False
        edge = torch.full((2, linear.weight.size(1)), 127.0)
        few = IntLinear(edge.repeat(8, 1).to(torch.int8), torch.ones(16))
        return torch.equal(PackedInt8Linear(few)(edge), few(edge))


class PackedInt4Linear(nn.Module):
    """
    A 4-bit IntLinear in the layout of a kernel (CPUs only) that keeps 4 bits in memory, makes bfloat16 of a tile of
    them in registers, and adds up in float32. It is given integers, activations and steps, which bfloat16 holds
    exactly, as float32 does their sums: rows stay independent. But what it returns is rounded to bfloat16, off by up
    to 1/512: this is not quite the network that the rule defines, and so never the default.
    """
    def __init__(self, linear):
        super().__init__()
        self.group, self.scale = linear.group, linear.scale
        step = linear.step.t()                                                   # (groups, N)
        self.steps = torch.stack((step, torch.zeros_like(step)), dim=-1).bfloat16()    # and zero points
        q = linear.integers() // linear.step.repeat_interleave(linear.group, dim=1)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)

    def forward(self, x):
        xq, xs = round_rows(x.float())
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            xq.flatten(0, -2).bfloat16(), self.packed, self.group, self.steps)
        return y.float().view(*x.shape[:-1], -1) * self.scale * xs

    @staticmethod
    def fits(linear):
        """Whether the kernel takes this shape and its sums cannot leave the integers that float32 holds."""
        if linear.weight.device.type != 'cpu' or len(linear.scale) % 16 or linear.cols % linear.group:
            return False
        return 127 * linear.integers().int().abs().sum(dim=1).max() < 2**24


def convert(model, bits=8, group=GROUP, tables_bits=8, search=True):
    """
    Replaces every Linear and Embedding of model by its integer form, in place; vocabularies have tables_bits, all else
    has bits. A tied lm_head keeps sharing the embedding's integers. search: see round_weight.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            kind = IntLinear if isinstance(module, nn.Linear) else IntEmbedding
            rounded = round_weight(module.weight.detach(), tables_bits if name in TABLES else bits, group, search)
            model.set_submodule(name, kind(*rounded, group))
    if model.config.tie_weights:
        for buffer in ('weight', 'scale', 'step'):
            setattr(model.lm_head, buffer, getattr(model.transformer.wte, buffer))
    model.rounding = {'bits': bits, 'group': group, 'tables_bits': tables_bits}
    return model.eval()


class PackedLinear(nn.Module):
    """
    A float Linear, its weights in float32, bfloat16 or float16. On a CPU the first two are in oneDNN's own layout, which
    is read faster when several tokens pass at once; float16 is as it is, for which F.linear has a kernel that is fast
    for one token, and slow for several. On a GPU all are as they are.
    """
    def __init__(self, weight, dtype):
        super().__init__()
        self.dtype, self.packed = dtype, weight.detach().to(dtype)
        self.mkldnn = (weight.device.type == 'cpu' and dtype != torch.float16 and torch.backends.mkldnn.is_available())
        if self.mkldnn:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.packed, 1)

    def forward(self, x):
        x = x.to(self.dtype)
        y = (torch.ops.mkldnn._linear_pointwise(x, self.packed, None, 'none', [], '') if self.mkldnn
             else F.linear(x, self.packed))
        return y.float()


def for_decoding(model, pack=None, draft_vocab=0):
    """
    Arranges a model for running, in place; it can no longer be trained or saved. The products that read the same
    input, c_q, c_k and c_v, become one: fewer, larger calls. 4 bits become the int8 matrices that they stand for:
    a byte a weight in memory, the same bits in every result. An int8 vocabulary is packed. pack packs the other
    matrices, whose results then differ a little. Of a float model: torch.bfloat16 pays where there is arithmetic for it,
    torch.float32 where most passes verify drafts. Of a 4-bit one: torch.bfloat16 leaves half a
    byte a weight in memory, see PackedInt4Linear. draft_vocab: the draft head chooses among so many first tokens only
    (a BPE learns the most frequent first), and reads only their rows of a large vocabulary; 0: all.
    """
    # README, "How fast it is", has d12 on an EPYC with bfloat16 arithmetic. On a Xeon without it (AVX-512, VNNI), in
    # tokens/s: f32 47.6, f32-packed 40.7, bf16-packed 54.5, int8 89.0, int8-packed 94.9, int8-compiled 163.4
    if draft_vocab and hasattr(model, 'draft'):
        head, n = model.lm_head, draft_vocab
        if isinstance(head, IntLinear):
            model.draft_lm_head = IntLinear(head.integers()[:n].clone(), head.scale[:n])
        else:
            model.draft_lm_head = nn.Linear(head.in_features, n, bias=False, device='meta')
            model.draft_lm_head.weight = nn.Parameter(head.weight.detach()[:n], requires_grad=False)
    for block in model.transformer.h:
        a = block.attn
        cat = lambda get: torch.cat([get(part).detach() for part in (a.c_q, a.c_k, a.c_v)])
        if isinstance(a.c_q, IntLinear):
            step = None if a.c_q.step is None else cat(lambda part: part.step)
            a.c_qkv = IntLinear(cat(IntLinear.integers), cat(lambda part: part.scale), step, a.c_q.group)
        else:
            weight = cat(lambda part: part.weight)
            a.c_qkv = nn.Linear(*weight.T.shape, bias=False, device='meta')
            a.c_qkv.weight = nn.Parameter(weight, requires_grad=False)
        a.c_q = a.c_k = a.c_v = None
    for name, module in list(model.named_modules()):
        if (isinstance(module, IntLinear) and module.step is not None
                and pack == torch.bfloat16 and PackedInt4Linear.fits(module)):
            model.set_submodule(name, PackedInt4Linear(module))
        elif isinstance(module, IntLinear):
            module = IntLinear(module.integers(), module.scale)
            model.set_submodule(name, PackedInt8Linear(module) if PackedInt8Linear.pays(module) else module)
        elif isinstance(module, nn.Linear) and pack:
            model.set_submodule(name, PackedLinear(module.weight, pack))
    return model

# -----------------------------------------------------------------------------
# rounding after training, with the errors fed back

def gptq_weight(w, hessian, bits=4, group=GROUP, damping=0.01):
    """
    round_weight for w (rows, cols), but for the least change of its products with inputs x of which hessian
    (cols, cols) is the sum of x x^T (GPTQ, arXiv 2210.17323, algorithm 1): column after column is rounded, and the
    columns still to come make up for the error as well as they can. A group's step is chosen when its turn comes,
    from its columns as they are by then.
    """
    if w.device.type == 'mps':                  # which has no float64
        return tuple(t if t is None else t.to(w.device)
                     for t in gptq_weight(w.cpu(), hessian.cpu(), bits, group, damping))
    _, scale, step = round_weight(w, bits, group)
    x, v, hessian = (w / scale[:, None]).double(), torch.empty_like(w, dtype=torch.int8), hessian.double()
    # without the damping, inputs that are always zero would stop the Cholesky decomposition
    hessian = hessian + (damping * hessian.diagonal().mean() + 1e-12) * torch.eye(w.size(1), device=w.device)
    # row j of U: how later columns answer an error in column j
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, w.size(1), group):
        block, upper = x[:, start:start + group], U[start:start + group, start:start + group]
        errors = torch.zeros_like(block)
        if bits == 4:
            s = choose_step(block.float())
            step[:, start // group] = s.squeeze(1)
        for j in range(block.size(1)):
            column = block[:, j:j + 1]                                           # (rows, 1)
            rounded = round_to(column, s) if bits == 4 else column.round().clamp(-127, 127)
            v[:, start + j:start + j + 1] = rounded
            errors[:, j:j + 1] = (column - rounded) / upper[j, j]
            block[:, j + 1:] -= errors[:, j:j + 1] * upper[j, j + 1:]
        # the columns of later groups, in one product
        x[:, start + group:] -= errors @ U[start:start + group, start + group:]
    return v, scale, step


@torch.no_grad()
def gptq(model, batches, bits=4, group=GROUP, tables_bits=8):
    """
    A float model -> a converted copy, its matrices rounded by gptq_weight for what they read in batches, a list of
    (x, y). Layer by layer: the inputs come from the layers that are rounded already, and are rounded as they will be.
    Tables are rounded as by convert.
    """
    fitted = convert(copy.deepcopy(model), bits, group, tables_bits)

    def fit(names, run):
        """Rounds the matrices with these names for what they read while run() runs."""
        sums = dict.fromkeys(names, 0.0)
        for name in names:
            def add(module, args, name=name):
                xq, xs = round_rows(args[0].float())
                x = (xq * xs).flatten(0, -2)                                     # (tokens, cols)
                sums[name] = sums[name] + x.T @ x
            fitted.get_submodule(name).register_forward_pre_hook(add)            # goes when its module is replaced
        run()
        for name in names:
            fitted.set_submodule(name, IntLinear(
                *gptq_weight(model.get_submodule(name).weight, sums[name], bits, group), group))

    states = [fitted.embed(x) for x, _ in batches]                               # (B, T, n_embd) each
    for i, block in enumerate(fitted.transformer.h):
        run = lambda: [block(x, fitted.cos[:x.size(1), None], fitted.sin[:x.size(1), None], None) for x in states]
        for names in (('attn.c_q', 'attn.c_k', 'attn.c_v'), ('attn.c_proj',), ('mlp.c_fc',), ('mlp.c_proj',)):
            fit([f'transformer.h.{i}.{name}' for name in names], run)
        states = run()
    heads = [name.removesuffix('.c_fc') for name, _ in fitted.named_modules()
             if name.endswith('.c_fc') and 'transformer' not in name]
    for part in ('c_fc', 'c_proj') if heads else ():
        fit([f'{head}.{part}' for head in heads], lambda: [fitted(x, y) for x, y in batches])
    return fitted

# -----------------------------------------------------------------------------
# the file

FORMAT = 'picochat-int'
DTYPES = {torch.int8: 'I8', torch.uint8: 'U8', torch.float32: 'F32'}


def int_share(model):
    """Share of the numbers in the model's file that are integers (the rest are scales)."""
    state = file_state(model).values()
    integers = sum(t.numel() * (2 if t.dtype == torch.uint8 else 1) for t in state if not t.is_floating_point())
    return integers / (integers + sum(t.numel() for t in state if t.is_floating_point()))


def bytes_by_group(model):
    """
    {'embedding', 'trunk', 'head', ...: bytes of its integers, 'scales': bytes of all scales and steps};
    the file has a header besides.
    """
    group = {}
    for name, t in file_state(model).items():
        key = ('scales' if name.endswith(('scale', 'step')) else 'embedding' if 'wte' in name
               else 'head' if 'lm_head' in name else 'trunk' if '.h.' in name else name.split('.')[0])
        group[key] = group.get(key, 0) + t.nbytes
    return group


def file_state(model):
    """What a converted model's file holds: its state dict, a tied head left out."""
    return {k: v for k, v in model.state_dict().items() if not (model.config.tie_weights and k.startswith('lm_head.'))}


def export(path, model, tokenizer_meta, dataset=None):
    """Writes a converted model with shape, tokenizer and the name of its dataset to path; returns the file's bytes."""
    header, data = {}, bytearray()
    # 4-byte tensors first keeps all of them aligned
    for name, t in sorted(file_state(model).items(), key=lambda kv: -kv[1].element_size()):
        start = len(data)
        data += t.cpu().numpy().tobytes()
        header[name] = {'dtype': DTYPES[t.dtype], 'shape': list(t.shape), 'data_offsets': [start, len(data)]}
    header['__metadata__'] = {
        'format': FORMAT, 'config': json.dumps(asdict(model.config)), 'rounding': json.dumps(model.rounding),
        'tokenizer': json.dumps(tokenizer_meta), 'dataset': json.dumps(dataset)}
    header['__metadata__']['sha256'] = checksum(header, data)
    head = json.dumps(header, separators=(',', ':')).encode()
    head += b' ' * (-len(head) % 8)
    atomic_write(path, lambda f: f.write(len(head).to_bytes(8, 'little') + head + data))
    return os.path.getsize(path)


def checksum(header, data):
    """Of everything but itself; the header as sorted JSON."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data).hexdigest()


def load(path, device='cpu'):
    """
    path -> the integer model on device, in eval mode, and {'config', 'tokenizer', 'dataset'}; of a .pt what load_model
    gives. One line names what is wrong with a damaged or foreign file.
    """
    if path.endswith('.pt'):
        return load_model(path, device)
    if not os.path.isfile(path):
        raise SystemExit(f"error: no quantised model at {path}: make one with python quantize.py "
                         f"--out_dir={os.path.dirname(path) or '.'}{' --bits=4' * path.endswith('int4.safetensors')}")
    with open(path, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        head = f.read(size) if size < 2**30 else b''
        data = f.read()
    try:
        header = json.loads(head)
        meta = header['__metadata__']
        assert meta['format'] == FORMAT
    except (ValueError, TypeError, KeyError, AssertionError):
        raise SystemExit(f"error: {path} is not a whole picochat file of integers: "
                         f"expected a safetensors header of format {FORMAT}, found {head[:20]!r}: "
                         "use another copy, or run quantize.py again")
    written = meta.pop('sha256', None)
    if checksum(header, data) != written:
        raise SystemExit(f"error: {path} is damaged: its {len(data)} bytes of weights and its header "
                         "do not have the checksum written there: use another copy, or run quantize.py again")
    del header['__metadata__']
    kinds = {name: dtype for dtype, name in DTYPES.items()}
    state = {}
    for name, t in header.items():
        start, end = t['data_offsets']
        state[name] = torch.frombuffer(bytearray(data[start:end]), dtype=kinds[t['dtype']]).view(t['shape']).to(device)
    config = make_config(json.loads(meta['config']), path)
    with torch.device('meta'):                               # the float model never takes any memory
        model = convert(GPT(config), **json.loads(meta['rounding']))
    if config.tie_weights:
        state |= {name.replace('transformer.wte', 'lm_head'): t for name, t in state.items() if 'wte' in name}
    model.load_state_dict(state, assign=True)
    model.cos, model.sin = (t.to(device) for t in rope_tables(config))
    return model.eval(), {'config': config, 'tokenizer': json.loads(meta['tokenizer']),
                          'dataset': json.loads(meta.get('dataset', 'null'))}

# -----------------------------------------------------------------------------
# the script

@torch.no_grad()
def compare(model, quantised, batches):
    """
    Over all unmasked positions: {'mean_kl', 'max_kl'} of KL(float || quantised) in nats,
    'top1_flips' as a share of positions.
    """
    kl_sum = kl_max = flips = n = 0
    chunk = max(1, 2**25 // (model.config.block_size * model.config.vocab_size))     # rows whose logits take 128 MiB
    for x, y in (part for whole in batches for part in zip(*(t.split(chunk) for t in whole))):
        keep = (y >= 0).flatten()
        a = F.log_softmax(model(x).flatten(0, 1)[keep], dim=-1)
        b = F.log_softmax(quantised(x).flatten(0, 1)[keep], dim=-1)
        kl = (a.exp() * (a - b)).sum(dim=-1)
        kl_sum, kl_max = kl_sum + kl.cpu().double().sum().item(), max([kl_max] + kl.tolist())
        flips, n = flips + (a.argmax(-1) != b.argmax(-1)).sum().item(), n + len(kl)
    return {'mean_kl': kl_sum / n, 'max_kl': kl_max, 'top1_flips': flips / n}


if __name__ == '__main__':
    from data.loader import Loader, data_of
    # -------------------------------------------------------------------------
    out_dir = 'out-quickstart'      # where train.py left best.pt
    weights = 'best.pt'             # the float checkpoint in out_dir
    save_dir = ''                   # where the file goes; empty: into out_dir
    bits = 8                        # 8 or 4
    method = 'auto'                 # rtn: to nearest; clip: with steps searched, of which 8 bits have none; gptq: fitted to calibration data; qat: as the weights were trained
                                    # auto: qat if they were trained with quant_bits=bits; else gptq at 4 bits,
                                    # and rtn at 8, where nothing is left to gain
    group = 0                       # 4 bits: columns that share a step, 32, 64 or 128; 0: as trained, or 32
    tables_bits = 0                 # of the vocabularies, 8 or 4; 0: as trained, or 8
    calib_batches = 16              # gptq: so many times 16 rows of the training split
    dataset = ''                    # a folder under data/; empty: the one the model was trained on
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    exec(open('configurator.py').read())
    # -------------------------------------------------------------------------
    check_knobs(config, ('bits', (8, 4)), ('group', (0, 32, 64, 128)), ('tables_bits', (0, 8, 4)),
                ('method', ('auto', 'rtn', 'clip', 'gptq', 'qat')), ('calib_batches', int, 1, math.inf))
    check_device(device)
    model, state = load_model(os.path.join(out_dir, weights), device)
    trained = ({'quant_bits': 0, 'quant_group': GROUP, 'tables_bits': 8, 'qat_start': 0.0, 'max_iters': 0}
               | state.get('knobs', {}))
    # saved before its rounding had begun
    if trained['qat_start'] and state['step'] <= math.ceil(trained['qat_start'] * trained['max_iters']):
        trained['quant_bits'] = 0
    group, tables_bits = group or trained['quant_group'], tables_bits or trained['tables_bits']
    how = {'quant_bits': bits, 'quant_group': group, 'tables_bits': tables_bits}
    as_trained = all(trained[k] == how[k] for k in how if k != 'quant_group' or 4 in (bits, tables_bits))
    if method == 'auto':
        method = 'qat' if as_trained else {8: 'rtn', 4: 'gptq'}[bits]
    if method == 'qat' and not as_trained:
        raise SystemExit(f"error: method (qat) needs weights trained with {how}, "
                         f"and {out_dir}'s were with { {k: trained[k] for k in how} }: "
                         "train again, or use another method")
    data_dir, tokenizer = data_of(state, out_dir, dataset)
    loader = Loader(data_dir, 'val', 16, model.config.block_size, device=device)
    if method == 'gptq':
        calibration = Loader(data_dir, 'train', 16, model.config.block_size, device=device)
        quantised = gptq(model, [calibration.batch(step) for step in range(calib_batches)], bits, group, tables_bits)
    else:
        quantised = convert(copy.deepcopy(model), bits, group, tables_bits, search=method != 'rtn')
    path = os.path.join(save_dir or out_dir, f'int{bits}.safetensors')
    size = export(path, quantised, state['tokenizer'], dataset or state['dataset'])
    quantised = load(path, device)[0]                        # what is measured is the file
    before = evaluate(model, loader.eval_batches(), tokenizer.token_bytes)
    after = evaluate(quantised, loader.eval_batches(), tokenizer.token_bytes)
    n, parts = model.params()['total'], bytes_by_group(quantised)
    result = {'file': path, 'bytes': size, 'bits': bits, 'method': method,
              'group': group if 4 in (bits, tables_bits) else None, 'tables_bits': tables_bits,
              'compression': 4 * n / size, 'params': n, 'int_share': int_share(quantised), 'bytes_by_group': parts,
              'val_loss_float': before['loss'], 'val_loss_quant': after['loss'],
              'bpb_float': before['bpb'], 'bpb_quant': after['bpb'],
              **compare(model, quantised, loader.eval_batches())}
    print(f"{path}: {size:,} bytes, {result['compression']:.2f}x smaller than the {n:,} weights in float32; "
          f"{100 * result['int_share']:.1f} % of its numbers are integers")
    print(f"bytes: {', '.join(f'{k} {v:,}' for k, v in (parts | {'header': size - sum(parts.values())}).items())}")
    print("loss on the whole validation split: "
          f"float {before['loss']:.4f} nats ({before['bpb']:.4f} bits per byte), "
          f"int{bits} by {method} {after['loss']:.4f} ({after['bpb']:.4f})")
    print(json.dumps(result))
