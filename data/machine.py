"""
What this machine is, and several processes that share a training. A library below model.py.

    device = pick_device('auto')                    # 'cuda', 'mps' or 'cpu'
    dtype = pick_dtype('auto', device)              # 'bfloat16' where it is faster, which is measured
    rank, world_size, device = join_processes(device)       # those that torchrun started
"""
import ctypes
import mmap
import os
import platform
import re
import sys
import threading
import time

import torch
from torch.utils._python_dispatch import _disable_current_modes

# -----------------------------------------------------------------------------
# the device

# FLOP/s in bfloat16, summed in float32, without sparsity. Recalled, not checked against the sources: NVIDIA's data
# sheets (A100, H100 SXM, H200 SXM), the GA102 whitepaper (RTX 3090) and the AD102 one (RTX 4090)
PEAK_FLOPS = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'RTX 3090': 71e12, 'RTX 4090': 165.2e12}


def peak_flops(device):
    """The data sheet's FLOP/s of this device by its name, None if it is no GPU that is known here."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else ''
    return next((peak for known, peak in PEAK_FLOPS.items()
                 if re.search(rf'\b{known}\b(?! (Ti|D)\b)(?!.*(PCIe|NVL|Laptop))', name)), None)


def pick_device(device):
    """'auto' -> 'cuda', 'mps' or 'cpu', whichever is best here; other names stay. ValueError if it cannot be used."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device ({device}) cannot be used here: {str(e).splitlines()[0]}") from e
    return device


def keep_memory():
    """
    Has freed memory kept for the next tensor instead of given back. Tensors of megabytes come and go with every layer;
    each time, the system would have to find and clear their pages, in up to a third of the time of training on a CPU.
    It is glibc that is told so; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc, threshold, trim = ctypes.CDLL(None), -3, -1       # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(threshold, 2**30) or libc.mallopt(threshold, 2**25)    # before glibc 2.35, 32 MiB are the most
        libc.mallopt(trim, -1)                                              # never


def give_back_memory():
    """Has freed memory given back to the system, which glibc does by itself only at the end of what it has."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def in_large_pages(t):
    """
    Asks Linux to keep t, a large tensor that nothing has been written to yet, in pages of 2 MiB instead of 4 KiB: what
    is read from end to end, as weights are for every token, then comes a fifth faster. Returns t.
    """
    advice, page = getattr(mmap, 'MADV_HUGEPAGE', None), 2**21
    start = -(-t.data_ptr() // page) * page                 # whole pages, which are t's alone
    size = (t.data_ptr() + t.nbytes - start) // page * page
    if advice is not None and size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    return t


def describe_machine(device):
    """-> what a document says of where it was measured"""
    cpuinfo = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    named = re.findall(r'model name\s*: (.*)', cpuinfo)
    gpu = {'gpu': torch.cuda.get_device_name(device)} if device.startswith('cuda') else {}
    return {'cpu': named[0] if named else platform.processor() or platform.machine(), **gpu,
            'threads': torch.get_num_threads(), 'torch': torch.__version__}


MEASURED = {}           # 'cpu' -> what fast_bf16 has found there; a run that is resumed brings its own


def fast_bf16(device):
    """
    Whether this device multiplies bfloat16 faster than float32. On CPUs no flag says so: where one with avx512_bf16 is
    three times as fast, another takes twice as long. So it is measured, once, in some milliseconds; of several
    processes, which must all ask, it must hold for each.
    """
    kind = torch.device(device).type
    if kind == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != 'cpu' or not torch.cpu._is_avx512_bf16_supported():
        return False
    if kind not in MEASURED:
        MEASURED[kind] = measure_bf16()
    return MEASURED[kind]


def measure_bf16():
    seconds = {torch.float32: [], torch.bfloat16: []}
    with _disable_current_modes():              # bench.py may be counting tensors that have no memory
        for _ in range(6):                      # in turn: the first product of a kind warms up, the fastest counts
            for dtype, times in seconds.items():
                x = torch.ones(512, 512, dtype=dtype)
                clock = time.perf_counter()
                x @ x
                times.append(time.perf_counter() - clock)
    # by a clear margin, so that it seldom changes from run to run
    return least(min(seconds[torch.float32]) / min(seconds[torch.bfloat16])) > 1.3


def pick_dtype(dtype, device):
    """'auto' -> 'bfloat16' where the device multiplies it faster, else 'float32'; any other name stays."""
    if dtype == 'auto':
        return 'bfloat16' if fast_bf16(device) else 'float32'
    return dtype


def autocast(device, dtype):
    """A context in which matrix products are in bfloat16, if dtype says so; weights and sums stay in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == 'bfloat16')


# -----------------------------------------------------------------------------
# several processes, started by torchrun

def join_processes(device):
    """
    device: 'cuda', 'mps', 'cpu' or one of them by number -> this process's rank, how many processes there are, and its
    own device. What torchrun tells them is in the environment; without it there is one.
    """
    names = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1'}
    names = {name: os.environ.get(name, usual) for name, usual in names.items()}
    told = all(re.fullmatch('[0-9]{1,6}', text) for text in names.values())
    rank, local_rank, world_size = map(int, names.values()) if told else (0, 0, 0)
    alone = world_size > 1 and not {'RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys()
    if not rank < world_size or alone:
        raise ValueError(f"{', '.join(f'{name}={text}' for name, text in names.items())} in the environment are not of "
                         "torchrun: unset them, or start torchrun --standalone --nproc_per_node=2 train.py ...")
    if world_size > 1:
        waiting = threading.Timer(10, print, [f"waiting for the other processes of WORLD_SIZE={world_size}: "
                                              "torchrun starts them all"], {'file': sys.stderr, 'flush': True})
        waiting.daemon = True
        waiting.start()
        device = f'cuda:{local_rank}' if device == 'cuda' else device
        # gloo is for the CPU, where evaluate adds up its totals
        hook = sys.excepthook                   # torch would put its own around it; errors stay one plain line
        torch.distributed.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
        waiting.cancel()
        sys.excepthook = hook
    if device.startswith('cuda'):
        torch.cuda.set_device(device if ':' in device else 0)       # what is waited for later is the current device
        torch.set_float32_matmul_precision('high')
    return rank, world_size, device


def least(x):
    """The least of the numbers that the processes bring; x itself if there is only one process."""
    if not torch.distributed.is_initialized():
        return x
    x = torch.tensor(x, dtype=torch.float64)
    torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MIN)
    return x.item()

# -----------------------------------------------------------------------------
# one model shared out among them: FSDP2 (arXiv 2304.11277), whose sharded tensors are DTensors: each process holds some
# of the rows

def shard(model, device_type):
    """
    Leaves this process its rows of every weight, on its device. A Block gathers the others when it runs and forgets
    them again; tables and heads, which logits read until a step has ended, stay gathered from trunk to the end of
    backward (of a teacher, which has no backward: for good).
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = torch.distributed.init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, 'trunk')  # evaluation, decoding and distillation begin there, not with forward
    # this pass makes the room to gather in; had decoding made it, in inference mode, training could not write to it
    with torch.no_grad():
        model.trunk(torch.zeros(1, 1, dtype=torch.long, device=model.cos.device))
    model.reshard()
    return model


def whole(x):
    """A sharded tensor -> all of its rows, in every process (which must all ask); any other as it is."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def share(x, like):
    """
    What this process holds of the whole tensor x, sharded as like is; x itself if like is not sharded, or of another
    shape.
    """
    if not hasattr(like, 'full_tensor') or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor
    # a copy: the split alone would keep all of x in memory
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).clone()
