"""
Weights as integers: one rounding rule, used by training (fake-quant), by the file and by the modules that run.

    python quantize.py --out_dir=out-quickstart                 # best.pt -> int8.safetensors, loss before and after

    from quantize import prepare, convert, export, load
    prepare(model)                  # trains through the rounding (straight-through, arXiv 1308.3432)
    convert(model)                  # integer modules: nothing is dequantised, at load or later
    export(path, model, tokenizer_meta);  model, state = load(path)

Weights: symmetric int8, one scale per output row (embedding: per token). Activations: int8, one scale per token row, found as they
come. Products are summed as integers, which is exact in any order: the result for one token cannot depend on its neighbours.
The file is in safetensors layout (8 bytes of length, a JSON header, the tensors), with shape and tokenizer in its metadata.
"""
import copy
import hashlib
import json
import os
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, GPTConfig, atomic_write, check_device, evaluate, load_model, rope_tables

# shares of a row's largest weight that are tried as the edge of the integer range; the one with the least squared error is taken.
# At 8 bits a step is a 127th of the largest already, and rows are short: there is nothing to search.
CLIPS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}

# -----------------------------------------------------------------------------
# the rule

def round_weight(w, bits=8, group=None):
    """
    w (rows, cols) float -> q (rows, cols) int8 in [-127, 127] (8 bits) or [-7, 7] (4 bits), scale (rows, groups) float32, groups =
    ceil(cols / group), or 1. w is about q * scale. Rounds to nearest, ties to even; a row of zeros has scale 1.
    """
    rows, cols = w.shape
    group = group or cols
    top = 2 ** (bits - 1) - 1
    x = F.pad(w.float(), (0, -cols % group)).view(rows, -1, group)               # (rows, groups, group)
    peak = x.abs().amax(dim=-1, keepdim=True)
    peak = torch.where(peak > 0, peak, float(top))
    best_q = best_scale = best_error = None
    for clip in CLIPS[bits]:
        scale = peak * clip / top
        q = (x / scale).round().clamp(-top, top)
        if len(CLIPS[bits]) > 1:
            error = (q * scale - x).square().sum(dim=-1, keepdim=True)
            if best_q is not None:
                better = error < best_error
                q, scale, error = torch.where(better, q, best_q), torch.where(better, scale, best_scale), torch.where(better, error, best_error)
            best_error = error
        best_q, best_scale = q, scale
    return best_q.view(rows, -1)[:, :cols].to(torch.int8), best_scale.squeeze(-1)


def dequantize(q, scale, group=None):
    """q (rows, cols), scale (rows, groups) -> q * scale, float32. For training and tests; running never calls it."""
    return q.float() * scale.repeat_interleave(group or q.size(1), dim=1)[:, :q.size(1)]


def round_rows(x):
    """Activations x (..., K) -> xq (..., K), integers in [-127, 127] kept as float, and xs (..., 1): x is about xq * xs."""
    peak = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    return (x * (127 / peak)).round_(), peak / 127


def fake_weight(w, bits=8, group=None):
    """w as it will be after export, with the gradient of w itself (straight-through)."""
    with torch.no_grad():
        rounded = dequantize(*round_weight(w, bits, group), group)
    return w + (rounded - w).detach()

# -----------------------------------------------------------------------------
# training through the rounding

class FakeLinear(nn.Linear):
    def forward(self, x):
        xq, xs = round_rows(x.detach().float())
        return F.linear(x + (xq * xs - x).detach(), fake_weight(self.weight))


class FakeEmbedding(nn.Embedding):
    def forward(self, idx):
        return F.embedding(idx, fake_weight(self.weight))


def prepare(model):
    """Makes every Linear and Embedding of model round as it will after export. In place; weights and their names stay."""
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Embedding):       # only the forward differs, so only the class changes
            module.__class__ = FakeLinear if type(module) is nn.Linear else FakeEmbedding
    return model

# -----------------------------------------------------------------------------
# running on the integers

def int_matmul(xq, w):
    """xq (M, K) and w (N, K), integers in [-127, 127], w int8 -> their exact product xq @ w.T (M, N), int32 or float32."""
    if xq.device.type == 'cpu':
        return torch._int_mm(xq.to(torch.int8), w.t())      # int32: what it is multiplied with makes it float
    if xq.device.type == 'cuda' and w.size(0) % 8 == 0 and w.size(1) % 8 == 0:
        M = xq.size(0)                                       # cuBLAS wants at least 17 rows
        return torch._int_mm(F.pad(xq.to(torch.int8), (0, 0, 0, max(0, 17 - M))), w.t())[:M].float()
    return float_matmul(xq, w)


def float_matmul(xq, w):
    """int_matmul where the device has no integer kernel: a float32 holds every integer up to 2^24, so sums over at most 1,040 products are exact."""
    parts = zip(xq.float().split(1040, dim=1), w.split(1040, dim=1))
    return sum((a @ b.float().t()).to(torch.int32) for a, b in parts).float()


class Int8Linear(nn.Module):
    """weight (N, K) int8, scale (N,) float32. x (..., K) -> (..., N) float32."""
    def __init__(self, weight, scale):
        super().__init__()
        self.register_buffer('weight', weight)
        self.register_buffer('scale', scale)

    def forward(self, x):
        xq, xs = round_rows(x.float())
        y = int_matmul(xq.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)
        return y * self.scale * xs


@torch.library.custom_op('picochat::packed_int8', mutates_args=())
def packed_int8(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows x (M, K), integers in [-127, 127] as float, times oneDNN's packed weights, times scale (N,) -> (M, N) float32. x travels as x + 128 in uint8."""
    return torch.ops.onednn.qlinear_pointwise((x + 128).to(torch.uint8), 1.0, 128, packed, scale, torch.zeros(len(scale), dtype=torch.int32), None, 1.0, 0, torch.float32, 'none', [], '')


@packed_int8.register_fake
def _(x, packed, scale):
    return x.new_empty(x.size(0), scale.size(0))


class PackedInt8Linear(nn.Module):
    """
    An Int8Linear in oneDNN's own layout, for matrices with so many rows (vocabularies) that a pass over several tokens must not read them
    slowly: five tokens cost little more than one there, and twice as much in _int_mm. The results are the same bits.
    """
    ROWS = 8192             # from here on it pays; in smaller ones the call itself costs more than it saves

    def __init__(self, linear):
        super().__init__()
        self.scale, self.packed = linear.scale, torch.ops.onednn.qlinear_prepack(linear.weight, None)

    def forward(self, x):
        xq, xs = round_rows(x.float())
        return packed_int8(xq.flatten(0, -2), self.packed, self.scale).view(*x.shape[:-1], -1) * xs

    @staticmethod
    def pays(linear):
        """Whether linear should be packed: it is tall, it is on a CPU whose oneDNN has the kernel, and the kernel does not saturate there (without VNNI it may)."""
        if linear.weight.device.type != 'cpu' or linear.weight.size(0) < PackedInt8Linear.ROWS or not torch.backends.mkldnn.is_available():
            return False
        edge = torch.full((2, linear.weight.size(1)), 127.0)
        few = Int8Linear(edge.repeat(8, 1).to(torch.int8), torch.ones(16))
        return torch.equal(PackedInt8Linear(few)(edge), few(edge))


class Int8Embedding(nn.Module):
    """weight (V, n_embd) int8, scale (V,) float32. idx (...) -> (..., n_embd) float32."""
    def __init__(self, weight, scale):
        super().__init__()
        self.register_buffer('weight', weight)
        self.register_buffer('scale', scale)

    def forward(self, idx):
        return self.weight[idx].float() * self.scale[idx].unsqueeze(-1)


def convert(model):
    """Replaces every Linear and Embedding of model by its integer form, in place. A tied lm_head keeps sharing the embedding's integers."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                q, scale = round_weight(module.weight.detach())
                kind = Int8Linear if isinstance(module, nn.Linear) else Int8Embedding
                setattr(parent, name, kind(q, scale.squeeze(1)))
    if model.config.tie_weights:
        model.lm_head.weight, model.lm_head.scale = model.transformer.wte.weight, model.transformer.wte.scale
    return model.eval()


class PackedLinear(nn.Module):
    """A float Linear in oneDNN's own layout, which a CPU reads faster when several tokens pass at once; dtype float32 or bfloat16."""
    def __init__(self, weight, dtype):
        super().__init__()
        self.dtype, self.packed = dtype, torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 1)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, None, 'none', [], '').float()


def for_decoding(model, pack=None):
    """
    Arranges a model for running, in place; it can no longer be trained or saved. The products that read the same input, c_q, c_k and c_v,
    become one: fewer, larger calls. An int8 vocabulary is packed. pack (torch.float32, torch.bfloat16) packs a float model's matrices
    for a CPU: bfloat16 pays where the CPU has arithmetic for it, float32 where most passes verify drafts.
    """
    # python bench.py --shape=d12 --formats=f32,f32-packed,bf16-packed,int8,int8-packed,int8-compiled, 2 cores, AVX-512 with VNNI, without bf16 arithmetic:
    #                               f32   f32-packed   bf16-packed   int8   int8-packed   int8-compiled
    #   tokens/s                   47.6         40.7          54.5   89.0          94.9           163.4
    #   cost of 5 tokens to 1      1.82         1.35          2.31   1.51          1.44
    for block in model.transformer.h:
        a = block.attn
        weight = torch.cat([part.weight.detach() for part in (a.c_q, a.c_k, a.c_v)])
        if isinstance(a.c_q, Int8Linear):
            a.c_qkv = Int8Linear(weight, torch.cat([part.scale for part in (a.c_q, a.c_k, a.c_v)]))
        else:
            a.c_qkv = nn.Linear(*weight.T.shape, bias=False, device='meta')
            a.c_qkv.weight = nn.Parameter(weight, requires_grad=False)
        a.c_q = a.c_k = a.c_v = None
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Int8Linear) and PackedInt8Linear.pays(module):
                setattr(parent, name, PackedInt8Linear(module))
            elif isinstance(module, nn.Linear) and pack and model.cos.device.type == 'cpu' and torch.backends.mkldnn.is_available():
                setattr(parent, name, PackedLinear(module.weight, pack))
    return model


def int_share(model):
    """Share of the model's stored numbers that are integers (the rest are scales)."""
    state = file_state(model)
    return sum(t.numel() for t in state.values() if t.dtype == torch.int8) / sum(t.numel() for t in state.values())

# -----------------------------------------------------------------------------
# the file

DTYPES = {torch.int8: 'I8', torch.uint8: 'U8', torch.float32: 'F32'}


def file_state(model):
    """What a converted model's file holds: its state dict, a tied head left out."""
    return {k: v for k, v in model.state_dict().items() if not (model.config.tie_weights and k.startswith('lm_head.'))}


def export(path, model, tokenizer_meta):
    """Writes a converted model with shape and tokenizer to path; returns the file's bytes."""
    tensors = {k: v.cpu().contiguous() for k, v in file_state(model).items()}
    tensors = dict(sorted(tensors.items(), key=lambda kv: -kv[1].element_size()))    # 4-byte tensors first keeps all of them aligned
    data = b''.join(t.numpy().tobytes() for t in tensors.values())
    header, end = {}, 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {'dtype': DTYPES[t.dtype], 'shape': list(t.shape), 'data_offsets': [start, end]}
    header['__metadata__'] = {'format': 'picochat-int8', 'config': json.dumps(asdict(model.config)), 'tokenizer': json.dumps(tokenizer_meta)}
    header['__metadata__']['sha256'] = checksum(header, data)
    head = json.dumps(header, separators=(',', ':')).encode()
    head += b' ' * (-len(head) % 8)
    atomic_write(path, lambda f: f.write(len(head).to_bytes(8, 'little') + head + data))
    return os.path.getsize(path)


def checksum(header, data):
    """Of everything but itself; the header as sorted JSON."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data).hexdigest()


def load(path, device='cpu'):
    """path -> the integer model on device, in eval mode, and {'config', 'tokenizer'}. One line names what is wrong with a damaged or foreign file."""
    if not os.path.isfile(path):
        raise SystemExit(f"error: no quantised model at {path}: make one with python quantize.py --out_dir={os.path.dirname(path) or '.'}")
    with open(path, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        head = f.read(size) if size < 2**30 else b''
        data = f.read()
    try:
        header = json.loads(head)
        meta = header['__metadata__']
        assert meta['format'] == 'picochat-int8'
    except (ValueError, TypeError, KeyError, AssertionError):
        raise SystemExit(f"error: {path} is not a whole picochat int8 file: expected a safetensors header of format picochat-int8, found {head[:20]!r}: use another copy, or run quantize.py again")
    written = meta.pop('sha256', None)
    if checksum(header, data) != written:
        raise SystemExit(f"error: {path} is damaged: its {len(data)} bytes of weights and its header do not have the checksum written there: use another copy, or run quantize.py again")
    del header['__metadata__']
    kinds = {name: dtype for dtype, name in DTYPES.items()}
    state = {}
    for name, t in header.items():
        start, end = t['data_offsets']
        state[name] = torch.frombuffer(bytearray(data[start:end]), dtype=kinds[t['dtype']]).view(t['shape']).to(device)
    config = GPTConfig(**json.loads(meta['config']))
    with torch.device('meta'):                               # the float model never takes any memory
        model = convert(GPT(config))
    if config.tie_weights:
        state |= {f'lm_head.{k}': state[f'transformer.wte.{k}'] for k in ('weight', 'scale')}
    model.load_state_dict(state, assign=True)
    model.cos, model.sin = (t.to(device) for t in rope_tables(config))
    return model.eval(), {'config': config, 'tokenizer': json.loads(meta['tokenizer'])}

# -----------------------------------------------------------------------------
# the script

@torch.no_grad()
def compare(model, quantised, batches):
    """Over all unmasked positions: {'mean_kl', 'max_kl'} of KL(float || quantised) in nats, 'top1_flips' as a share of positions."""
    kl_sum = kl_max = flips = n = 0
    for x, y in batches:
        keep = (y >= 0).flatten()
        a = F.log_softmax(model(x).flatten(0, 1)[keep], dim=-1)
        b = F.log_softmax(quantised(x).flatten(0, 1)[keep], dim=-1)
        kl = (a.exp() * (a - b)).sum(dim=-1)
        kl_sum, kl_max = kl_sum + kl.cpu().double().sum().item(), max([kl_max] + kl.tolist())
        flips, n = flips + (a.argmax(-1) != b.argmax(-1)).sum().item(), n + len(kl)
    return {'mean_kl': kl_sum / n, 'max_kl': kl_max, 'top1_flips': flips / n}


if __name__ == '__main__':
    from data.loader import Loader, load_meta
    from data.tokenizer import from_meta
    # -------------------------------------------------------------------------
    out_dir = 'out-quickstart'      # where train.py left best.pt
    weights = 'best.pt'             # the float checkpoint in out_dir
    bits = 8
    dataset = ''                    # a folder under data/; empty: the one the model was trained on
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    exec(open('configurator.py').read())
    # -------------------------------------------------------------------------
    if bits != 8:
        raise SystemExit(f"error: bits ({bits}) must be 8")
    check_device(device)
    model, state = load_model(os.path.join(out_dir, weights), device)
    data_dir = os.path.join('data', dataset or state['dataset'])
    loader = Loader(data_dir, 'val', 16, model.config.block_size, device=device)
    tokenizer = from_meta(state['tokenizer'])
    if from_meta(load_meta(data_dir)).meta() != tokenizer.meta():
        raise SystemExit(f"error: {data_dir} has another tokenizer than {out_dir} was trained with: give the dataset it was trained on (--dataset={state['dataset']})")
    quantised = convert(copy.deepcopy(model))
    path = os.path.join(out_dir, 'int8.safetensors')
    size = export(path, quantised, state['tokenizer'])
    quantised = load(path, device)[0]                        # what is measured is the file
    before = evaluate(model, loader.eval_batches(), tokenizer.token_bytes)
    after = evaluate(quantised, loader.eval_batches(), tokenizer.token_bytes)
    n = model.params()['total']
    result = {'file': path, 'bytes': size, 'bits': bits, 'compression': 4 * n / size, 'params': n, 'int_share': int_share(quantised),
              'val_loss_float': before['loss'], 'val_loss_quant': after['loss'], 'bpb_float': before['bpb'], 'bpb_quant': after['bpb'],
              **compare(model, quantised, loader.eval_batches())}
    print(f"{path}: {size:,} bytes, {result['compression']:.2f}x smaller than the {n:,} weights in float32; {100 * result['int_share']:.1f} % of its numbers are integers")
    print(f"loss on the whole validation split: float {before['loss']:.4f} nats ({before['bpb']:.4f} bits per byte), int8 {after['loss']:.4f} ({after['bpb']:.4f})")
    print(json.dumps(result))
