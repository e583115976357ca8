"""
Peak memory of a distillation step's losses in chunks, eager and compiled, against whole tensors of logits
(tests/README.md).

    python tests/memory.py                  # 4 x 1,024 tokens, a vocabulary of 65,536: a minute; the last line is JSON
"""
import json
import os
import resource
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))  # the repo
import torch
import torch.nn.functional as F

from data.compiling import compile_step
from data.files import in_repo
from distill import Distiller
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
batch_size = 4
block_size = 1024
vocab_size = 65536
n_embd = 64                 # small: what is measured are the logits
how = ''                    # private: naive, chunked or compiled, in a process of its own
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


if how:
    torch.manual_seed(0)
    student, teacher = (GPT(GPTConfig(block_size, vocab_size, 1, 1, n_embd=n_embd)) for _ in range(2))
    for model in (student, teacher):
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    idx = torch.randint(vocab_size, (batch_size, block_size + 1))
    idx, targets = idx[:, :-1], idx[:, 1:]
    before = peak()
    if how != 'naive':
        step = Distiller(student, [teacher])
        losses = (compile_step(step, idx.numel(), vocab_size) if how == 'compiled' else step)(idx, targets)
    else:
        logits = student(idx).flatten(0, 1)
        with torch.no_grad():
            log_p = teacher(idx).flatten(0, 1).log_softmax(-1)
        losses = {'ce': F.cross_entropy(logits, targets.flatten()),
                  'kl': F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction='batchmean')}
    sum(losses.values()).backward()
    print(json.dumps({'bytes': peak() - before, **{k: v.item() for k, v in losses.items()}}))
else:
    flags = [f'--{k}={config[k]}' for k in ('batch_size', 'block_size', 'vocab_size', 'n_embd')]
    rows = {h: json.loads(subprocess.run([sys.executable, __file__, *flags, f'--how={h}'],
                                         capture_output=True, text=True, check=True).stdout)
            for h in ('naive', 'chunked', 'compiled')}
    for h, row in rows.items():
        print(f"{h}: {row['bytes'] / 2**20:,.0f} MiB, ce {row['ce']:.6f} + kl {row['kl']:.6f}")
    print(json.dumps(rows | {'ratio': {h: rows['naive']['bytes'] / rows[h]['bytes'] for h in ('chunked', 'compiled')}}))
