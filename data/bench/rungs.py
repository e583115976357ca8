"""
Builds the rungs of a ladder and measures them, all in one run, beside their controls: bytes, losses, tasks, then
decoding speed in turns. A library for bench.py --mode=ladder; ladder.py beside it has commands and records.

    rows = build_ladder(k, read_rungs(k.rungs, k.seeds), machine)       # k: bench.py's knobs, resolved, as a namespace
    time_rungs(k, rows)                                                 # adds tokens/s to them
    check_decoding(rows)
"""
import json
import os
import sys
from statistics import mean, median

import torch

from data.bench.decoding import check_context, decode, memory_alone, open_model, quality
from data.bench.ladder import build_rung, read_record, untimed, write_record
from data.bench.tasks import asked, measure
from data.bench.timing import in_rounds, resident
from data.checkpoint import without_memory
from data.compiling import can_compile
from data.files import hold
from data.layouts import for_decoding, for_measuring
from data.loader import Loader
from data.machine import keep_memory
from data.sampling import first_difference
from engine import HEADS, Engine
from model import GPT

# -----------------------------------------------------------------------------
# building, and what a model is and knows

def words_of(text):
    """'a, b c' -> ['a', 'b c']: names may hold spaces."""
    return list(dict.fromkeys(word.strip() for word in text.split(',')))


def how_to_answer(k):
    """The knobs about questions, as arguments of data/bench/tasks.measure."""
    return {'tasks': k.tasks, 'questions': k.questions, 'num_fewshot': k.num_fewshot, 'seed': k.seed,
            'delimiter': k.delimiter.replace('\\n', '\n')}


def measure_rung(k, file, int8):
    """
    -> a rung's parameters, bytes and loss, on its integers if it has them, with an int8 cache if it is to have one; and
    its results on other texts and tasks.
    """
    print(f'    measuring {file}', file=sys.stderr, flush=True)
    if k.timed == 'none':                       # else it would be another decoding that is timed
        keep_memory()
    model, data, tokenizer = open_model(k, file)
    params = without_memory(GPT, model.config).params()
    dtype, model = torch.int8 if int8 else None, for_measuring(model)
    return {'params': params['total'], 'params_by_group': params, 'bytes': os.path.getsize(file), 'int8_cache': int8,
            **quality(model, data, tokenizer, dtype),
            **measure(model, tokenizer, dtype, k.texts, k.text_bytes, **how_to_answer(k))}


def build_ladder(k, wanted, machine):
    """-> the rows of all rungs, measured; measurements of the last run are reused for files that have not changed"""
    hold(os.path.dirname(k.ladder), os.path.basename(k.ladder))     # rungs are held by the scripts that make them
    same = lambda row: json.dumps([row.get(key) for key in ('command', 'file', 'made', 'int8_cache', 'beside')])
    known = {}
    if os.path.exists(k.ladder):
        known = {same(row): row for row in read_record(k.ladder, 'move it away')['rows']}
    rows = []
    for name, seed, command in wanted:
        row = build_rung(k.ladder, name, seed, command)
        if row:
            row['int8_cache'] = name in words_of(k.with_int8_cache)
            row['beside'] = asked(k.texts, k.text_bytes, **how_to_answer(k)) or None
            before = known.get(same(row)) if row['made'] else None
            measured_now = untimed(before) if before else measure_rung(k, row['file'], row['int8_cache'])
            rows.append(measured_now | row)
            write_record(k.ladder, rows, machine)
    return rows


def measure_again(k, recorded):
    """-> the rows of the recorded rungs, measured again"""
    rows = []
    for row in recorded:
        if not os.path.exists(str(row.get('file'))):
            raise ValueError(f"rung {row['name']!r}: {row.get('file')} is not there any more: build the ladder again")
        rows.append(untimed(row) | measure_rung(k, row['file'], row.get('int8_cache', False)))
    return rows

# -----------------------------------------------------------------------------
# decoding, in turns

def timed_runs(k, rows):
    """-> the runs to time: (row, key of its tokens/s, engine, text, drafter, a list for the results)"""
    runs = []
    for row in rows:
        model, data, _ = open_model(k, row['file'])
        check_context(k, model.config, row['name'])
        text = Loader(data, 'val', 1, model.config.block_size)
        drafters = {'tok_s': 'none'}
        for drafter, head in HEADS.items():
            if hasattr(model, head):
                drafters.setdefault('tok_s_speculative', drafter)
        compiles = row['name'] in words_of(k.compiled) and can_compile(k.device)
        for how in ('', '_compiled') if compiles else ('',):
            model = for_decoding(open_model(k, row['file'])[0], kernels=not how)
            engine = Engine(model, bool(how), torch.int8 if row['int8_cache'] else torch.float32)
            runs += [(row, key + how, engine, text, drafter, []) for key, drafter in drafters.items()]
    return runs


def run_in_turns(k, runs):
    """Lets each of timed_runs decode another piece of text in every round, as sample.py would; stores the results."""
    usual = torch.get_num_threads()
    for r in in_rounds(k.rounds, 'timing, '):
        for row, _, engine, text, drafter, seen in runs:
            torch.set_num_threads(k.threads or (1 if row['params'] < 4e6 else usual))
            start_at = 1024 * r % max(1, text.n_tokens - k.prompt_tokens)
            prompt = text.rows([start_at])[0][0, :k.prompt_tokens].tolist()
            (own,), stats = decode(k, engine, [prompt], k.seed + r, drafter)
            seen.append((prompt, own, stats, k.seed + r))
    torch.set_num_threads(usual)


def time_rungs(k, rows):
    """
    Adds to rows their tokens/s, plain and with drafts, eager and perhaps compiled; whether drafts and compiling left
    the texts the same; and the memory that a process takes.
    """
    runs = timed_runs(k, rows)
    run_in_turns(k, runs)
    for row, key, engine, _, _, seen in runs:
        row[key] = median(stats['tok_s'] for _, _, stats, _ in seen[1:])
        if key == 'tok_s':                      # a row's plain run comes first
            plain = [own for _, own, _, _ in seen]
        elif key == 'tok_s_speculative':
            accepted = sum(sum(stats['accepted']) for _, _, stats, _ in seen)
            row['tokens_per_verify'] = sum(stats['tokens'] for _, _, stats, _ in seen) / accepted
            row['speculation_exact'] = plain == [own for _, own, _, _ in seen]
        else:       # compiled, what is float has its sums in another order, and at a tie a text may part from the plain
            parts = [first_difference(engine.model, prompt, expected, own, k.temperature, 0, drawn)
                     for expected, (prompt, own, _, drawn) in zip(plain, seen)]
            row[key.replace('tok_s', 'same_texts')] = mean(part is None for part in parts)
            gaps = [part[1] for part in parts if part]
            row['same_texts_gap'] = max([row.get('same_texts_gap', 0), *gaps])
    if k.memory and k.device == 'cpu' and resident():
        for row in rows:
            row['memory_bytes'] = memory_alone(k, row['file'], row['int8_cache'])['memory_bytes']


def check_decoding(rows):
    """ValueError if drafts or compiling changed a text where they must not."""
    for row in rows:
        if row['file'].endswith('.safetensors') and row.get('speculation_exact') is False:
            raise ValueError(f"{row['name']}: another text with drafts than without, on integers")
        if row.get('same_texts_gap', 0) > 1:
            raise ValueError(f"{row['name']}: another text compiled, by scores {row['same_texts_gap']:.2g} apart")
