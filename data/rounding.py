"""
The rounding rule, training through it, and the modules that run on its integers. A library; quantize.py is the script,
and its first lines define the integers.

    prepare(model, bits)            # trains through the rounding (straight-through, arXiv 1308.3432)
    convert(model, bits)            # integer modules: nothing is dequantised, at load or later
    round_weight(w, bits).float()   # what the integers stand for
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class IntFormat:
    """A format of integer weights."""
    edge: int           # a weight is -edge, ..., edge, times its group's step; edge * steps is at most 127
    least: int          # with steps chosen by GPTQ it may go down to here, see data/gptq.py
    steps: int          # a group of columns chooses its step from 1, ..., steps; 1: there are no groups
    tries: int          # how many steps choose_step tries, downwards from the smallest that clips nothing
    stored: int         # bits of a weight in the file and in memory


BITS = {8: IntFormat(edge=127, least=-127, steps=1, tries=1, stored=8),
        4: IntFormat(edge=7, least=-8, steps=18, tries=4, stored=4)}
GROUPS = (32, 64, 128)  # columns that share a step: at 4 bits 0.53, 0.52 or 0.51 bytes a weight
GROUP = GROUPS[0]
# the vocabulary's matrices, which have bits of their own (tables_bits), and the small one between them
TABLES = ('transformer.wte', 'lm_head', 'transformer.c_out')


def format_of(bits):
    """bits -> its IntFormat. ValueError names the bits that BITS knows."""
    if bits not in BITS:
        raise ValueError(f"bits ({bits}) must be one of {', '.join(map(str, BITS))}")
    return BITS[bits]


@dataclass
class Rounded:
    """
    A rounded matrix: v (rows, cols) int8, scale (rows,) float32, and step (rows, groups) int8, or None where the format
    has no steps; groups = ceil(cols / group). The matrix is about v * scale.
    """
    v: torch.Tensor
    scale: torch.Tensor
    step: torch.Tensor | None = None
    bits: int = 8
    group: int = GROUP

    def float(self):
        """The matrix that the integers stand for, (rows, cols) float32."""
        return self.v * self.scale[:, None]

# -----------------------------------------------------------------------------
# the rule

def round_weight(w, bits=8, group=GROUP, search=True):
    """
    w (rows, cols) float -> Rounded. Rounds to nearest, ties to even; a row of zeros gets scale 1.
    A row's scale makes its largest weight the largest integer. If the format has groups, search=True chooses the step
    of each group for the least squared error; search=False takes the step at which its largest weight just fits.
    """
    form = format_of(bits)
    w = w.float()
    peak = torch.maximum(w.amax(dim=1, keepdim=True), -w.amin(dim=1, keepdim=True))
    scale = torch.where(peak > 0, peak / (form.edge * form.steps), 1.0)          # (rows, 1)
    x = w / scale
    if form.steps == 1:
        v = x.round_().clamp_(-form.edge, form.edge)         # in place: of a table, copies would be large
        return Rounded(v.to(torch.int8), scale.squeeze(1), None, bits, group)
    # Whole groups and the columns that are left over are rounded separately. Padding the last group with zeros would be
    # simpler, but inductor of torch 2.11 and 2.13 compiles that wrongly.
    whole = w.size(1) - w.size(1) % group
    parts = [x[:, :whole].unflatten(1, (-1, group)), x[:, None, whole:]]     # (rows, groups, group), (rows, 1, rest)
    parts = [part for part in parts if part.numel()]
    steps = [choose_step(part, form, search) for part in parts]                  # (rows, groups, 1), (rows, 1, 1)
    v = torch.cat([round_to(part, step, form.edge).flatten(1) for part, step in zip(parts, steps)], dim=1)
    step = torch.cat(steps, dim=1).squeeze(2)
    return Rounded(v.to(torch.int8), scale.squeeze(1), step.to(torch.int8), bits, group)


def round_to(x, step, edge):
    """The nearest of -edge, ..., edge times step."""
    return (x / step).round().clamp(-edge, edge) * step


def round_to_grid(w, scale, step, bits, group):
    """w (rows, cols) float -> Rounded, to the nearest integers with given scales (rows,) and steps (rows, groups)."""
    form, each = format_of(bits), steps_of(step, group, w.size(1))
    q = (w.float() / (scale[:, None] * each)).round().clamp(form.least, form.edge)
    # multiples of large steps are limited to int8
    v = q * each if step is None else q.maximum(-(127 // each.abs())) * each
    return Rounded(v.to(torch.int8), scale, step, bits, group)


def weights_behind(w, rounded):
    """
    w (rows, cols) float -> the weights nearest to w that round_to_grid rounds to rounded's v. Nearly all of them are
    w's own; those of w that lie beyond the largest integer move to it.
    """
    each = steps_of(rounded.step, rounded.group, w.size(1))
    size, q = rounded.scale[:, None] * each, rounded.v / each
    return (w.float() / size).clamp(q - 0.499, q + 0.499) * size


def steps_of(step, group, cols):
    """step (rows, groups) -> the step of each column (rows, cols); 1 if the format has none."""
    # by indexing: repeat_interleave(...)[..., :cols], compiled by inductor of torch 2.13, reads beyond its end
    return 1 if step is None else step[..., torch.arange(cols, device=step.device) // group]


def choose_step(x, form, search=True):
    """
    x (..., group) in units of its row's scale -> step (..., 1), the one with the least squared error. form.tries steps
    are tried, from the smallest that clips nothing downwards: a smaller step clips the group's largest weights, and
    rounds the others more finely.
    """
    unclipped = x.abs().amax(dim=-1, keepdim=True) / form.edge           # a smaller step would clip something
    if not search:
        return unclipped.round().clamp(1, form.steps)
    best = error = None
    for less in range(form.tries):
        step = (unclipped.ceil() - less).clamp(1, form.steps)
        e = (round_to(x, step, form.edge) - x).square().sum(dim=-1, keepdim=True)
        if best is None:
            best, error = step, e
        else:
            best = torch.where(e < error, step, best)
            error = torch.minimum(e, error)
    return best


def pack(rounded):
    """
    Rounded -> its v as file and memory hold it. At 8 bits that is v itself. At 4 bits it is v / step + 8, two of them
    in a byte: the left half of the columns in the low bits, the right half in the high ones, (rows, ceil(cols / 2))
    uint8.
    """
    form, cols = format_of(rounded.bits), rounded.v.size(1)
    if form.stored == 8:
        return rounded.v
    q = (rounded.v // steps_of(rounded.step, rounded.group, cols) + form.edge + 1).to(torch.uint8)
    left, right = F.pad(q, (0, cols % 2)).chunk(2, dim=1)
    return left | right << 4


def unpack(packed, step, bits, group, cols):
    """pack's (..., bytes) and step (..., groups) -> v (..., cols) int8."""
    form = format_of(bits)
    if form.stored == 8:
        return packed
    q = torch.cat((packed & 15, packed >> 4), dim=-1)[..., :cols].to(torch.int8) - (form.edge + 1)
    return q * steps_of(step, group, cols)


def round_rows(x):
    """
    Activations x (..., K) -> xq (..., K), integers in [-127, 127] as floats, and the scale of each row, xs (..., 1);
    x is about xq * xs.
    """
    peak = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    return (x * (127 / peak)).round_(), peak / 127

# -----------------------------------------------------------------------------
# training through the rounding

def fake_weight(w, bits=8, group=GROUP, grid=None):
    """
    w rounded as export will round it, with the gradient of w itself (straight-through). grid: (scale, step), if these
    are fixed; else they are chosen for every w anew.
    """
    with torch.no_grad():
        rounded = (round_to_grid(w, *grid, bits, group) if grid else round_weight(w, bits, group)).float()
    # w - w is exactly zero and has w's gradient; the usual w + (rounded - w) might be off in its last bit
    return rounded + (w - w.detach())


class FakeLinear(nn.Linear):
    def forward(self, x):
        xq, xs = round_rows(x.detach().float())
        return F.linear(xq * xs + (x - x.detach()), fake_weight(self.weight, self.bits, self.group, self.grid))


class FakeEmbedding(nn.Embedding):
    def forward(self, idx):
        return F.embedding(idx, fake_weight(self.weight, self.bits, self.group, self.grid))


def prepare(model, bits=8, group=GROUP, tables_bits=8, grid=None):
    """
    Makes every Linear and Embedding of model round in its forward pass as export will, in place and for good. Nothing
    but the forward differs, so only the class of each module changes: weights, their names and whatever holds them
    (optimizers, FSDP) stay.
    grid: fixed scales and steps, of grid_of; without it they follow the weights, by round_weight. In float32 the
    results are those of the integers. Under bfloat16 autocast, which only training uses, products round their rounded
    inputs once more, to bfloat16.
    """
    fake = {nn.Linear: FakeLinear, nn.Embedding: FakeEmbedding}
    for name, module in model.named_modules():
        if type(module) in fake:
            module.__class__ = fake[type(module)]
            module.bits = tables_bits if name in TABLES else bits
            module.group = group
            # a head that was added since has no fixed scales
            known = grid and f'{name}.scale' in grid
            module.grid = (grid[f'{name}.scale'], grid.get(f'{name}.step')) if known else None
    return model


def behind(model, quantised):
    """
    A float model and its integer copy, both of gptq with keep_before -> a float model whose weights round_to_grid
    rounds to just these integers, so that training can go on from them: prepare it with grid_of(quantised). The model
    that is given does not change.
    """
    model = sharing(model)
    for name, module in quantised.named_modules():
        if isinstance(module, Integers):
            rounded = Rounded(module.integers(), module.scale, module.step, module.bits, module.group)
            float_module = model.get_submodule(name)
            float_module.weight = nn.Parameter(weights_behind(float_module.weight.detach(), rounded))
    if model.config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def grid_of(model):
    """A converted model -> {'lm_head.scale': (rows,), ...}: its scales and steps, for prepare and convert."""
    return {name: t for name, t in model.state_dict().items() if name.endswith(('.scale', '.step'))}

# -----------------------------------------------------------------------------
# running on the integers

def int_mm_is_exact():
    """
    Whether PyTorch multiplies integers exactly on this CPU. On CPUs without VNNI (most laptops before 2021) oneDNN adds
    products in pairs, in 16 bits, which large ones overflow: the sums are wrong, without any warning.
    """
    large = torch.full((32, 128), 127, dtype=torch.int8)
    return bool((torch._int_mm(large, large.t()) == 128 * 127 ** 2).all())


INT_MM_IS_EXACT = int_mm_is_exact()


def int_matmul(xq, w):
    """
    xq (M, K) and w (N, K), integers in [-127, 127], w int8 -> xq @ w.T (M, N): exact sums in int32; on a GPU in
    float32, in which sums beyond 2^24 are rounded once.
    """
    if xq.device.type == 'cpu':             # int32 becomes float when the caller multiplies it by the scales
        return torch._int_mm(xq.to(torch.int8), w.t()) if INT_MM_IS_EXACT else float_matmul(xq, w)
    if xq.device.type == 'cuda' and w.size(0) % 8 == 0 and w.size(1) % 8 == 0:
        M = xq.size(0)                                       # cuBLAS takes at least 17 rows
        return torch._int_mm(F.pad(xq.to(torch.int8), (0, 0, 0, max(0, 17 - M))), w.t())[:M].float()
    return float_matmul(xq, w).float()


def float_matmul(xq, w):
    """
    int_matmul for devices without an exact integer kernel, in int32. float32 holds every integer up to 2^24, so that
    sums of 1,040 products are exact.
    """
    parts = zip(xq.float().split(1040, dim=1), w.split(1040, dim=1))
    return sum((a @ b.float().t()).to(torch.int32) for a, b in parts)


class Integers(nn.Module):
    """
    A rounded matrix (rows, cols) as a module, with the buffers weight, (rows, cols) int8 or packed (rows, bytes) uint8,
    scale (rows,) float32, and step (rows, groups) int8 or None.
    """
    def __init__(self, weight, scale, step, bits, group, cols):
        super().__init__()
        self.bits, self.group, self.cols = bits, group, cols
        self.register_buffer('weight', weight)
        self.register_buffer('scale', scale)
        self.register_buffer('step', step)

    @classmethod
    def holding(cls, rounded):
        """Rounded -> a module."""
        return cls(pack(rounded), rounded.scale, rounded.step, rounded.bits, rounded.group, rounded.v.size(1))

    @classmethod
    def sharing(cls, other):
        """A module of this class on the same tensors as other, an IntLinear or IntEmbedding."""
        return cls(other.weight, other.scale, other.step, other.bits, other.group, other.cols)

    @classmethod
    def of_shape(cls, rows, cols, bits, group):
        """
        A module without memory, to be filled from a file. (Rounding meta tensors would import PyTorch's compiler.)
        """
        form = format_of(bits)
        weight = torch.empty(rows, math.ceil(cols * form.stored / 8), device='meta',
                             dtype=torch.int8 if form.stored == 8 else torch.uint8)
        step = None
        if form.steps > 1:
            step = torch.empty(rows, math.ceil(cols / group), device='meta', dtype=torch.int8)
        return cls(weight, torch.empty(rows, device='meta'), step, bits, group, cols)

    def integers(self):
        """v (rows, cols) int8."""
        return unpack(self.weight, self.step, self.bits, self.group, self.cols)


class IntLinear(Integers):
    """
    x (..., K) -> (..., N) float32, with a rounded matrix (N, K). PyTorch has no exact product of 4-bit integers: at 4
    bits every call unpacks the matrix to int8, which takes ten times as long as the product. layouts.for_decoding
    replaces this module by faster ones.
    """
    def forward(self, x):
        xq, xs = round_rows(x.float())
        y = int_matmul(xq.flatten(0, -2), self.integers()).view(*x.shape[:-1], -1)
        return y * self.scale * xs


class IntEmbedding(Integers):
    """idx (...) -> (..., n_embd) float32, from a rounded table (vocab_size, n_embd)."""
    def forward(self, idx):
        step = None if self.step is None else self.step[idx]
        v = unpack(self.weight[idx], step, self.bits, self.group, self.cols)
        return v.float() * self.scale[idx].unsqueeze(-1)


def sharing(model):
    """A copy of model with modules of its own, but model's own weights: convert can replace modules in it."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def convert(model, bits=8, group=GROUP, tables_bits=8, search=True, grid=None):
    """
    Replaces every Linear and Embedding of model by its integer form, in place: the vocabulary's tables with
    tables_bits, all others with bits. A tied lm_head still shares the embedding's integers. search: see round_weight;
    grid: see prepare.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            kind = IntLinear if isinstance(module, nn.Linear) else IntEmbedding
            its_bits = tables_bits if name in TABLES else bits
            w = module.weight.detach()
            if w.is_meta:
                integers = kind.of_shape(*w.shape, its_bits, group)
            elif grid and f'{name}.scale' in grid:
                scale, step = grid[f'{name}.scale'], grid.get(f'{name}.step')
                integers = kind.holding(round_to_grid(w, scale, step, its_bits, group))
            else:
                integers = kind.holding(round_weight(w, its_bits, group, search))
            model.set_submodule(name, integers)
    if model.config.tie_weights:
        model.lm_head = IntLinear.sharing(model.transformer.wte)
    return model.eval()


def rounding_of(model):
    """A converted model -> {'bits', 'group', 'tables_bits'}, the arguments that convert had; a float model -> None."""
    table, matrix = model.transformer.wte, model.transformer.h[0].mlp.c_fc
    if not isinstance(table, IntEmbedding):
        return None
    return {'bits': matrix.bits, 'group': matrix.group, 'tables_bits': table.bits}
