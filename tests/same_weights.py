"""
llama.cpp and transformers beside picochat, on the same weights and prompts, in turn. How: tests/README.md.

    pip install gguf safetensors transformers xllamacpp
    python tests/same_weights.py --shape=out-smollm --formats=int8-packed,int4-packed
    python tests/same_weights.py --shape=out-smollm --gguf=FILE         # and a GGUF file of yours, of whatever model
    python tests/same_weights.py --shape=out-smollm --llamacpp=FOLDER   # and a llama.cpp of yours: its llama-bench

The last line is JSON. Each row has the rates of every round, and by how much each of our formats is faster in the same
round: ours_over_it of decoding, prompt_ours_over_it of prompts; same: so many tokens are those of our float32 row.
memory: what the process took once it read the model (Linux; where it is rounded here, the float model, too).
"""
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))  # the repo
from data.bench.timing import TokenClock, in_rounds, resident, speed
from data.files import in_repo
from data.signals import interrupt_on_stop

# -----------------------------------------------------------------------------
shape = ''                  # the out_dir of a trained model, or a shape of bench.py's, if only a gguf is beside it
formats = 'int8-packed'     # ours, as in bench.py; f32 is always measured
prompt_tokens = 64          # read before new_tokens are decoded
new_tokens = 128
rounds = 5
gguf = ''                   # a file that llama.cpp decodes with, too
llamacpp = ''               # folder of a built llama.cpp's llama-bench
seed = 1337
device = 'cpu'              # or cuda, where llama.cpp is left out
threads = 0                 # CPU threads; 0: PyTorch's own choice
program = ''                # private: what a child process decodes with
limits = {'prompt_tokens rounds': (1, None), 'new_tokens': (2, None), 'threads': (0, None)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())

LONG_PROMPT = 512           # tokens
k = SimpleNamespace(**config, drafters='', texts='')

# -----------------------------------------------------------------------------
# the programs, each in a process of its own: it loads a model -> decode, and the bytes of memory that it had before.
# decode(prompt, n, text) -> seconds to the first token, tokens/s after it, and, if they are asked for, the tokens

def picochat(format, path):
    import torch
    from data.bench.decoding import build
    from data.machine import keep_memory
    from engine import Sampling
    torch.set_num_threads(threads)
    keep_memory()  # as sample.py does
    before = resident()
    engine = build(k, format)

    def decode(prompt, n, text):
        tokens, = engine.complete([prompt], n, Sampling(temperature=0))
        return {'first_seconds': engine.stats['first_seconds'], 'tok_s': engine.stats['tok_s'], 'text': tokens}
    return decode, before


def transformers(format, folder):
    import torch
    from transformers import LlamaForCausalLM
    torch.set_num_threads(threads)
    before = resident()
    dtype = torch.bfloat16 if format == 'bf16' else torch.float32
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None  # nothing ends a text early

    def decode(prompt, n, text):
        ids, clock, began = torch.tensor([prompt], device=device), TokenClock(), time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
                             pad_token_id=0, streamer=clock)
        first, last = clock.times[1], clock.times[-1]
        return {'first_seconds': first - began, 'tok_s': (n - 1) / max(1e-9, last - first),
                'text': out[0, len(prompt):].tolist()}
    return decode, before


def llama_cpp(format, path):
    import xllamacpp
    before = resident()
    p = xllamacpp.CommonParams()
    p.model.path, p.n_parallel, p.verbosity = path, 1, -1
    p.n_ctx = LONG_PROMPT + prompt_tokens + new_tokens
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    p.cache_ram_mib = 0  # it would keep old prompts
    server = xllamacpp.Server(p)

    def decode(prompt, n, text):
        got = server.handle_completions({'prompt': prompt, 'n_predict': n, 'temperature': 0, 'ignore_eos': True,
                                         'cache_prompt': False} | ({'logprobs': 1} if text else {}))
        if 'error' in got:
            raise ValueError(f"llama.cpp, {path}: {got['error']['message']}")
        times, told = got['timings'], got['choices'][0].get('logprobs') or {'content': []}
        return {'first_seconds': times['prompt_ms'] / 1000, 'tok_s': times['predicted_per_second'],
                'text': [token['id'] for token in told['content']]}
    return decode, before


def serve(decoder, format, path):
    """Answers requests, a line of JSON each, until there are no more."""
    decode, before = {'picochat': picochat, 'transformers': transformers, 'llama.cpp': llama_cpp}[decoder](format, path)
    for line in sys.stdin:
        answer = decode(**json.loads(line))
        memory = resident() - before if before else None
        print(json.dumps(answer | {'memory_bytes': memory}), flush=True)


if program:
    serve(*json.loads(program))
    sys.exit()

import torch  # no earlier, as llama.cpp's processes need none of it
if threads:
    torch.set_num_threads(threads)
threads = torch.get_num_threads()
interrupt_on_stop()  # so that the files that were written for others go away

# -----------------------------------------------------------------------------
# what will run

def installed(program, *packages):
    """Whether the packages that a program needs are there; says in a line which one is not."""
    absent = [name for name in packages if not importlib.util.find_spec(name)]
    if absent:
        print(f'{program} is left out, {absent[0]} is not installed: pip install {absent[0]}', file=sys.stderr)
    return not absent


def write_for_others(folder):
    """The model as others read it -> [(decoder, format, path)]; parameters, context; a prompt that it has written"""
    from data.checkpoint import load_checkpoint
    from data.bench.decoding import SHAPES, build, check_context, make_prompts
    from data.foreign.export import export_gguf, export_hf, is_block
    from data.tokenizer import from_meta
    engine, programs = build(k, 'f32'), []
    check_context(k, engine.config, shape)
    prompt, = make_prompts(k, engine, 1)
    if shape not in SHAPES and is_block(engine.config, 'llama'):
        tokenizer = from_meta(load_checkpoint(os.path.join(shape, 'best.pt'))['tokenizer'])
        if installed('transformers', 'transformers', 'safetensors'):
            export_hf(engine.model, tokenizer, f'{folder}/hf')
            programs += [('transformers', format, f'{folder}/hf') for format in ('f32', 'bf16')]
        if device == 'cpu' and installed('llama.cpp', 'gguf'):
            programs += [('llama.cpp', kind, export_gguf(engine.model, tokenizer, f'{folder}/{kind}.gguf', kind))
                         for kind in ('f16', 'q8_0', 'q4_0')]
    return programs, engine.model.params()['total'], engine.config.block_size, prompt


def all_programs(folder):
    """-> [(decoder, format, file or folder)], ours first; parameters, context and prompt of the model"""
    programs, *about = write_for_others(folder)
    if gguf:
        programs.append(('llama.cpp', os.path.basename(gguf).removesuffix('.gguf'), gguf))
    files = [('llama-bench', *others) for decoder, *others in programs if decoder == 'llama.cpp']
    if files and not installed('llama.cpp from pip', 'xllamacpp'):
        programs = [program for program in programs if program[0] != 'llama.cpp']
    ours = [('picochat', format, '') for format in dict.fromkeys(['f32', *formats.split(',')])]
    return ours + programs + (files if llamacpp else []), *about

# -----------------------------------------------------------------------------
# the rounds

class Child:
    """A program in a process of its own, which ends with the block."""
    def __init__(self, block, *program):
        self.name = ' '.join(program[:2])
        knobs = config | {'program': json.dumps(program), 'threads': threads}
        self.told = block.enter_context(tempfile.TemporaryFile('w+'))
        command = [sys.executable, in_repo('tests/same_weights.py'), *(f'--{key}={v}' for key, v in knobs.items())]
        self.process = block.enter_context(subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE,
                                                            stdout=subprocess.PIPE, stderr=self.told))

    def decode(self, prompt, n, text=False):
        request = json.dumps({'prompt': prompt, 'n': n, 'text': text}) + '\n'
        with contextlib.suppress(BrokenPipeError):  # it has ended: its last line says why
            self.process.stdin.write(request.encode())
        for line in self.process.stdout:
            if line.startswith(b'{'):  # whatever else it may say
                return json.loads(line)
        self.told.seek(0)
        raise ValueError(f"{self.name}: {(self.told.read().splitlines() or ['no word'])[-1].removeprefix('error: ')}")

    def turn(self, prompt, long):
        """-> tokens/s of prompts and of decoding, and bytes of memory"""
        first = self.decode(long, 1)
        then = self.decode(prompt, new_tokens)
        return len(long) / first['first_seconds'], then['tok_s'], then['memory_bytes']


class LlamaBench:
    """llama.cpp's own measuring tool, a fresh process each turn."""
    def __init__(self, file):
        self.command = [os.path.join(llamacpp, 'llama-bench'), '-m', file, '-n', new_tokens, '-t', threads,
                        '-r', 1, '-o', 'json', '-p']

    def decode(self, prompt, n, text=False):
        return {'text': None}  # it shows none

    def turn(self, prompt, long):
        with tempfile.TemporaryFile('w+') as told:
            process = subprocess.Popen([*map(str, self.command), str(len(long))], text=True, stdout=subprocess.PIPE,
                                       stderr=told)
            said = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)  # which says how much memory it took
            process.returncode = os.waitstatus_to_exitcode(status)
            told.seek(0)
            if process.returncode:
                raise ValueError(f'{self.command[0]} failed: {told.read().strip()[-200:]}')
        tests = json.loads(said)
        rates = [next(test['avg_ts'] for test in tests if bool(test['n_gen']) == decodes) for decodes in (False, True)]
        return *rates, 1024 * usage.ru_maxrss


def measured(programs, context, prompt):
    """-> {program: [(tokens/s of prompts, of decoding, bytes of memory) a round]}, {program: the text}"""
    long = (prompt * LONG_PROMPT)[:min(LONG_PROMPT, context - 1)]
    with contextlib.ExitStack() as block:
        children = {program: LlamaBench(program[2]) if program[0] == 'llama-bench' else Child(block, *program)
                    for program in programs}
        texts = {program: child.decode(prompt, new_tokens, text=True)['text'] for program, child in children.items()}
        seen = {program: [] for program in programs}
        for _ in in_rounds(rounds, 'peers, '):
            for program, child in children.items():
                seen[program].append(child.turn(prompt, long))
    return {program: turns[1:] for program, turns in seen.items()}, texts


def row_of(program, turns, ours, text, expected, params):
    """ours: {format: turns} -> a row"""
    decoder, format, path = program
    prompts, rates, memory = zip(*turns)

    def over_it(of):
        return {f: median(a[of] / b[of] for a, b in zip(its, turns)) for f, its in ours.items()}
    return {'decoder': 'picochat alone' if decoder == 'picochat' else decoder, 'format': format,
            'params': None if path == gguf != '' else params, **speed(rates),
            'prompt_tok_s': median(prompts), 'prompt_tok_s_rounds': prompts,
            'ours_over_it': over_it(1), 'prompt_ours_over_it': over_it(0), 'memory_bytes': memory[-1],
            'same': text and next((i for i, (a, b) in enumerate(zip(text, expected)) if a != b), len(text))}


assert shape, 'shape () must be the out_dir of a trained model'
assert not llamacpp or os.access(os.path.join(llamacpp, 'llama-bench'), os.X_OK), \
    f'llamacpp ({llamacpp}) has no llama-bench: in a copy of llama.cpp, cmake -B build && cmake --build build'
assert not gguf or os.path.isfile(gguf), f'no GGUF file at {gguf}'
assert device == 'cpu' or not (gguf or llamacpp), f'llama.cpp is measured with --device=cpu, not on {device}'
with tempfile.TemporaryDirectory() as folder:
    programs, params, context, prompt = all_programs(folder)
    seen, texts = measured(programs, context, prompt)
ours = {format: seen[decoder, format, path] for decoder, format, path in programs if decoder == 'picochat'}
rows = [row_of(program, turns, ours, texts[program], texts[programs[0]], params) for program, turns in seen.items()]
for row in rows:
    x = ', '.join(f'{f} {row["ours_over_it"][f]:.2f} ({row["prompt_ours_over_it"][f]:.2f})' for f in ours)
    print(f"{row['decoder']} {row['format']}: {row['tok_s']:,.1f} tokens/s, prompt {row['prompt_tok_s']:,.0f}, "
          f"{(row['memory_bytes'] or 0) / 2**20:,.0f} MiB, same {row['same']}; ours over it (prompt): {x}")
print(json.dumps({'rows': rows}))
