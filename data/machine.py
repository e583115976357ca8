"""
What this machine can do, and how several processes share a training. A library below model.py.

    device = pick_device('auto')                    # 'cuda', 'mps' or 'cpu'
    dtype = pick_dtype('auto', device)              # 'bfloat16' where it is faster, which is measured
    rank, world_size, device = join_processes(device)       # the processes that torchrun started
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
    """The data sheet's FLOP/s of this device, by its name; None for other devices."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else ''
    return next((peak for known, peak in PEAK_FLOPS.items()
                 if re.search(rf'\b{known}\b(?! (Ti|D)\b)(?!.*(PCIe|NVL|Laptop))', name)), None)


def pick_device(device):
    """'auto' -> 'cuda', 'mps' or 'cpu', the first that is there; other names stay. ValueError if it cannot be used."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device ({device}) cannot be used here: {str(e).splitlines()[0]}") from e
    return device


def keep_memory():
    """
    Tells glibc to keep freed memory for the next tensor instead of giving it back to the system. Tensors of megabytes
    come and go with every layer; each time, the system would have to find and clear pages for them, which can take a
    third of the time of training on a CPU. Without glibc this does nothing.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc, threshold, trim = ctypes.CDLL(None), -3, -1       # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(threshold, 2**30) or libc.mallopt(threshold, 2**25)    # before glibc 2.35, 32 MiB are the most
        libc.mallopt(trim, -1)                                              # never


def give_back_memory():
    """Gives freed memory back to the system. glibc by itself gives back only what lies at the end of its heap."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def in_large_pages(t):
    """
    Asks Linux to keep t, a large tensor that nothing has been written to yet, in pages of 2 MiB instead of 4 KiB:
    memory that is read from end to end, as weights are for every token, is then read a fifth faster. Returns t.
    """
    advice, page = getattr(mmap, 'MADV_HUGEPAGE', None), 2**21
    start = -(-t.data_ptr() // page) * page                 # only the pages that lie within t
    size = (t.data_ptr() + t.nbytes - start) // page * page
    if advice is not None and size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    return t


def describe_machine(device):
    """-> a dict that says where something was measured: CPU, GPU, threads, version of torch"""
    cpuinfo = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    named = re.findall(r'model name\s*: (.*)', cpuinfo)
    gpu = {'gpu': torch.cuda.get_device_name(device)} if device.startswith('cuda') else {}
    return {'cpu': named[0] if named else platform.processor() or platform.machine(), **gpu,
            'threads': torch.get_num_threads(), 'torch': torch.__version__}


MEASURED = {}           # 'cpu' -> the answer of fast_bf16; a resumed run takes its checkpoint's


def fast_bf16(device):
    """
    Whether this device multiplies bfloat16 faster than float32. On CPUs no flag tells: of two that have avx512_bf16 one
    is three times as fast, the other half as fast. So it is measured, once, in some milliseconds. If there are several
    processes, all must ask, and the answer is yes only if it is for each of them.
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
    """fast_bf16, measured: the fastest of six products of each kind, in turns."""
    seconds = {torch.float32: [], torch.bfloat16: []}
    with _disable_current_modes():              # bench.py may be running on tensors that have no memory
        for _ in range(6):
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
    device: 'cuda', 'mps', 'cpu', or one of several like 'cuda:1' -> this process's rank, the number of processes, and
    this process's device. torchrun sets environment variables; without them there is one process. ValueError if they
    make no sense.
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
        hook = sys.excepthook                   # torch replaces it, and errors would no longer be one plain line
        # gloo is needed beside nccl because evaluate adds up its totals on the CPU
        torch.distributed.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
        waiting.cancel()
        sys.excepthook = hook
    if device.startswith('cuda'):
        torch.cuda.set_device(device if ':' in device else 0)       # synchronize() waits for the current device
        torch.set_float32_matmul_precision('high')
    return rank, world_size, device


def least(x):
    """The minimum of x over all processes; x itself if there is only one."""
    if not torch.distributed.is_initialized():
        return x
    x = torch.tensor(x, dtype=torch.float64)
    torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MIN)
    return x.item()

# -----------------------------------------------------------------------------
# one model sharded over the processes by FSDP2 (arXiv 2304.11277): its tensors become DTensors, of which each process
# holds some of the rows

def shard(model, device_type):
    """
    Shards model in place: this process keeps its rows of every weight, on its device. A Block gathers the other rows
    when it runs, and drops them afterwards. Tables and heads, which logits need to the end of a step, stay gathered
    until backward has ended (in a teacher, which has no backward, for good).
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = torch.distributed.init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, 'trunk')  # evaluation, decoding and distillation call trunk, not forward
    # This first pass allocates the buffers to gather in. Allocated while decoding, in inference mode, training could
    # not write to them.
    with torch.no_grad():
        model.trunk(torch.zeros(1, 1, dtype=torch.long, device=model.cos.device))
    model.reshard()
    return model


def whole(x):
    """A sharded tensor -> all of its rows; all processes must call this. Other tensors are returned as they are."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def share(x, like):
    """
    This process's shard of the whole tensor x, cut as like is; x itself if like is not sharded or has another shape.
    """
    if not hasattr(like, 'full_tensor') or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor
    # a copy, since a view would keep all of x in memory
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).clone()
