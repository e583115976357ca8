"""
Layouts for fast decoding: the same weights, arranged for the fastest kernels of this machine.

    from data.layouts import for_decoding
    for_decoding(model)                         # float or integers: one product for q, k and v, packed vocabularies
    for_decoding(model, torch.bfloat16)         # packs the other matrices, too
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import data.kernels
from data.kernels import KernelBlock, KernelBlocks, KernelLinear
from data.rounding import IntLinear, Rounded, round_rows, rounding_of
from model import norm, softcap


def for_decoding(model, pack=None, draft_vocab=0, kernels=True):
    """
    Arranges a model for decoding, in place; it can no longer be trained or saved. Matrices that read the same input
    (c_q, c_k and c_v; c_gate and c_fc) are joined: fewer, larger products.
    kernels=True: on a CPU with a C++ compiler an integer model decodes by kernels.py, in which 4 bits stay 4 bits in
    memory. Norms and attention are then summed in another order, so that logits differ from PyTorch's in the last
    digits. Without kernels 4-bit matrices are unpacked to int8, a byte a weight, with the same results, and an int8
    vocabulary is packed.
    pack: also packs the other matrices, whose results then differ a little. For a float model torch.bfloat16 pays on
    CPUs with bfloat16 arithmetic, torch.float32 if most passes verify drafts. For a 4-bit model torch.bfloat16 keeps
    half a byte a weight in memory, see PackedInt4Linear.
    draft_vocab: the draft head chooses only among so many first tokens (a BPE learns the most frequent ones first), and
    reads only their rows of a large vocabulary. 0: those that it was trained for, GPTConfig.draft_vocab.
    """
    # The lab notebook has d12 on an EPYC with bfloat16 arithmetic. On a Xeon without it (AVX-512, VNNI), in tokens/s:
    # f32 47.6, f32-packed 40.7, bf16-packed 54.5, int8 89.0, int8-packed 94.9, int8-compiled 163.4
    draft_vocab = draft_vocab or model.config.draft_vocab
    if draft_vocab and hasattr(model, 'draft'):
        model.draft_lm_head = first_rows(model.lm_head, draft_vocab)
    for block in model.transformer.h:
        attn = block.attn
        attn.c_qkv = joined([attn.c_q, attn.c_k, attn.c_v])
        attn.c_q = attn.c_k = attn.c_v = None
        if model.config.mlp == 'swiglu':
            mlp = block.mlp
            mlp.c_gate_fc = joined([mlp.c_gate, mlp.c_fc])
            mlp.c_gate = mlp.c_fc = None
    for name, module in list(model.named_modules()):
        if isinstance(module, IntLinear):
            model.set_submodule(name, packed_integers(module, pack, kernels))
        elif isinstance(module, nn.Linear) and pack:
            model.set_submodule(name, PackedLinear(module.weight, pack))
    blocks = list(model.transformer.h)
    if all(map(KernelBlock.fits, blocks)):
        model.transformer.h = nn.ModuleList([KernelBlocks([KernelBlock(block) for block in blocks])])
        model.norm, model.softcap = data.kernels.norm, data.kernels.softcap
    if not any(isinstance(module, KernelLinear) for module in model.modules()):    # these hold addresses of weights
        leave_file(model)
    return model.eval()         # new modules start in training mode


def for_measuring(model):
    """Arranges an integer model so that it reads texts faster, with the same results. Float models stay as they are."""
    if rounding_of(model):
        for_decoding(model)
        model.norm, model.softcap = norm, softcap       # PyTorch's: the kernels' differ in the last digits
    return model


def leave_file(model):
    """
    Copies what is left of a file's tensors into memory of their own. They are views of one block of memory (checkpoint.
    read_safetensors), which cannot be freed while any of them is in use, though most have been replaced.
    """
    own = {}                                    # so that a tied lm_head still shares the embedding's tensors
    for module in model.modules():
        for name, t in module._buffers.items():
            if t is not None and t.untyped_storage().nbytes() > 2 * t.nbytes:
                module._buffers[name] = own.setdefault((t.data_ptr(), t.shape), t.clone())


def step_of(model):
    """What computes a decoding step of this model, in words."""
    return 'kernels' if isinstance(model.transformer.h[0], KernelBlocks) else 'PyTorch'


def float_linear(weight):
    """A Linear that holds weight as it is, without a copy."""
    linear = nn.Linear(*weight.T.shape, bias=False, device='meta')
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def first_rows(linear, n):
    """The first n outputs of a Linear or an IntLinear."""
    if isinstance(linear, IntLinear):
        return IntLinear.holding(Rounded(linear.integers()[:n].clone(), linear.scale[:n]))
    return float_linear(linear.weight[:n])


def joined(parts):
    """Joins Linears or IntLinears that read the same input: the outputs are concatenated."""
    first, weight = parts[0], end_to_end([part.weight for part in parts])
    if not isinstance(first, IntLinear):
        return float_linear(weight)
    scale = end_to_end([part.scale for part in parts])
    step = None if first.step is None else end_to_end([part.step for part in parts])
    return IntLinear(weight, scale, step, first.bits, first.group, first.cols)


def end_to_end(tensors):
    """
    torch.cat along the rows, without a copy if the tensors lie one after the other in the memory of one file, as in
    ours.
    """
    first, ends = tensors[0], [t.data_ptr() + t.nbytes for t in tensors]
    one_file = len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    one_file = one_file and all(t.is_contiguous() for t in tensors)
    if one_file and [t.data_ptr() for t in tensors[1:]] == ends[:-1]:
        rows = sum(len(t) for t in tensors)
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    return torch.cat(tensors)


def packed_integers(linear, pack, kernels=True):
    """An IntLinear -> the module with the layout that is fastest here."""
    if kernels and pack is None and KernelLinear.fits(linear):
        return KernelLinear(linear)
    if linear.step is not None and pack == torch.bfloat16 and PackedInt4Linear.fits(linear):
        return PackedInt4Linear(linear)
    linear = IntLinear.holding(Rounded(linear.integers(), linear.scale))            # 8 bits, whatever they were
    if kernels and pack is None and KernelLinear.fits(linear):
        return KernelLinear(linear)
    return PackedInt8Linear(linear) if PackedInt8Linear.pays(linear) else linear


class PackedLinear(nn.Module):
    """
    A float Linear with weights in float32, bfloat16 or float16. On a CPU the first two are kept in oneDNN's own layout,
    which is faster when several tokens pass at once. float16 is not repacked: F.linear has a kernel for it that is fast
    for one token, and slow for several. On a GPU nothing is repacked.
    """
    def __init__(self, weight, dtype):
        super().__init__()
        self.dtype, self.packed = dtype, weight.detach().to(dtype)
        self.mkldnn = weight.device.type == 'cpu' and dtype != torch.float16 and torch.backends.mkldnn.is_available()
        if dtype == torch.bfloat16 and self.mkldnn:     # not on a CPU with AVX2 alone
            self.mkldnn = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.mkldnn:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.packed, 1)

    def forward(self, x):
        x = x.to(self.dtype)
        if self.mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, 'none', [], '').float()
        return F.linear(x, self.packed).float()


@torch.library.custom_op('picochat::packed_int8', mutates_args=())
def packed_int8(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    Rows x (M, K), integers in [-127, 127] as float, times oneDNN's packed weights, times scale (N,) -> (M, N) float32.
    The kernel takes x + 128 as uint8.
    """
    return torch.ops.onednn.qlinear_pointwise(
        (x + 128).to(torch.uint8), 1.0, 128, packed, scale, torch.zeros(len(scale), dtype=torch.int32), None,
        1.0, 0, torch.float32, 'none', [], '')


@packed_int8.register_fake
def _(x, packed, scale):
    return x.new_empty(x.size(0), scale.size(0))


class PackedInt8Linear(nn.Module):
    """
    An 8-bit IntLinear in oneDNN's own layout, for vocabularies, which have many rows: in this layout a pass over five
    tokens costs little more than one over a single token, in _int_mm twice as much. The results are the same bits.
    """
    ROWS = 8192             # it pays from so many rows on; for smaller matrices the call costs more than it saves

    def __init__(self, linear):
        super().__init__()
        self.scale, self.packed = linear.scale, torch.ops.onednn.qlinear_prepack(linear.weight, None)

    def forward(self, x):
        xq, xs = round_rows(x.float())
        return packed_int8(xq.flatten(0, -2), self.packed, self.scale).view(*x.shape[:-1], -1) * xs

    @staticmethod
    def pays(linear):
        """
        Whether linear should be packed: it has many rows, and is on a CPU whose oneDNN has the kernel and does not
        saturate (without VNNI it may).
        """
        rows, cols = linear.weight.shape
        if linear.weight.device.type != 'cpu' or not torch.backends.mkldnn.is_available():
            return False
        if rows < PackedInt8Linear.ROWS:
            return False
        edge = torch.full((2, cols), 127.0)
        few = IntLinear.holding(Rounded(edge.repeat(8, 1).to(torch.int8), torch.ones(16)))
        return torch.equal(PackedInt8Linear(few)(edge), few(edge))


class PackedInt4Linear(nn.Module):
    """
    A 4-bit IntLinear in the layout of a PyTorch kernel (CPUs only) that keeps 4 bits in memory, converts tiles of them
    to bfloat16 in registers, and sums in float32. bfloat16 holds the integer activations, weights and steps exactly,
    and float32 their sums. But the kernel rounds its result to bfloat16, an error of up to 1/512: this is not quite the
    network that the rule defines, and so never the default.
    """
    def __init__(self, linear):
        super().__init__()
        self.group, self.scale = linear.group, linear.scale
        step = linear.step.t()                                                          # (groups, N)
        self.steps = torch.stack((step, torch.zeros_like(step)), dim=-1).bfloat16()     # and zero points
        q = linear.integers() // linear.step.repeat_interleave(linear.group, dim=1)     # -7, ..., 7
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)

    def forward(self, x):
        xq, xs = round_rows(x.float())
        xq = xq.flatten(0, -2).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(xq, self.packed, self.group, self.steps)
        return y.float().view(*x.shape[:-1], -1) * self.scale * xs

    @staticmethod
    def fits(linear):
        """Whether the kernel takes this shape, and no sum can exceed the integers that float32 holds."""
        if linear.weight.device.type != 'cpu' or len(linear.scale) % 16 or linear.cols % linear.group:
            return False
        return 127 * linear.integers().int().abs().sum(dim=1).max() < 2**24
