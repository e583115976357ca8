"""
Python that no model of 2024 has read: files that torch 2.13 (2026) brought along and torch 2.6 (January 2025) did not
have, under no name and in few of their lines. The standard library is in every model's training text; this is what a
score on it is compared with. It is a text to measure on, not to train on:

$ python data/newcode/prepare.py
$ python bench.py --mode=quality --shape=out-smollm --texts=newcode=data/newcode/text.txt

You see the files that were found, the version of torch they are from, and the bytes and sha256 of the text.
"""

import hashlib
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.files import hold, in_repo, read_text, write_text

# -----------------------------------------------------------------------------
out_dir = in_repo('data/newcode')
# at most an eighth of their longer lines stand anywhere in torch 2.6; ordinary Python rather than kernels for GPUs
files = '''
_dynamo/bytecode_debugger.py
_functorch/_activation_checkpointing/knapsack_evaluator.py
_inductor/cache.py
_inductor/codegen/segmented_tree.py
_inductor/runtime/caching/config.py
_inductor/runtime/caching/interfaces.py
_inductor/runtime/caching/locks.py
distributed/_mesh_layout.py
distributed/_tools/fake_collectives.py
distributed/checkpoint/_consolidate_hf_safetensors.py
distributed/checkpoint/_experimental/builder.py
distributed/debug/_debug_handlers.py
distributed/pipelining/_schedule_visualizer.py
export/pt2_archive/_package_weights.py
numa/binding.py
profiler/_chrome_trace_export.py
profiler/_trace_validator.py
'''
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())

hold(out_dir)
folder = os.path.dirname(torch.__file__)
names = files.split()
found = [name for name in names if os.path.isfile(os.path.join(folder, name))]
if not found:
    raise ValueError(f'torch {torch.__version__} has none of the {len(names)} files that torch 2.13 has: install that')
for name in names:
    print(f"torch/{name}{'' if name in found else ': is not in this torch, left out'}")
text = '\n'.join(read_text(os.path.join(folder, name)) for name in found)
path = os.path.join(out_dir, 'text.txt')
write_text(path, text)
print(f'{path}: {len(found)} files of torch {torch.__version__}, {len(text.encode()):,} bytes, '
      f'sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}')
