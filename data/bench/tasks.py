"""
Measures of knowledge besides the loss: questions that a model answers by likelihood, and texts that it has not trained
on. A library for bench.py --mode=tasks, quality and ladder.

    items = read_tasks('tasks.jsonl')
    right = answer_all(model, tokenizer, items)                         # a bool for each question
    for row in by_group(items, right): print(row['accuracy'], row['error'], row['chance'], row['p'])
    bits_per_byte(model, tokenizer, text)

A file of questions has a JSON object on each line, in one of the three forms of nanochat's eval bundle (its CORE metric
is DCLM's, arXiv 2406.11794):

    {"query": "The sky is", "choices": ["blue", "a fish"], "gold": 0}       which choice is likeliest after the query?
    {"context_options": ["Ann said that she", "Ann said that it"], "continuation": "was tired.", "gold": 0}
                                                        after which of the contexts is the continuation likeliest?
    {"context": "The capital of France is", "continuation": "Paris"}        would greedy decoding write this?

The two parts are joined by a delimiter, usually a space; a few answered examples may come first (num_fewshot).
Likelihood is measured by the mean loss of the tokens in which the choices differ, so that long answers are no worse
than short ones. A line may also have a "kind", and whether its subject was "heldout" from training: such groups are
counted separately.
"""
import json
import math
import os
import random
import re

import numpy as np
import torch
import torch.nn.functional as F

from data.cache import KVCache
from data.files import read_text, sha256_of
from data.loader import progress
from data.sampling import common_length
from engine import PREFILL_CHUNK
from model import evaluate

# -----------------------------------------------------------------------------
# reading questions

# the form of a question, by the keys that it has and the types of their values
FORMS = {
    'choice': {'query': str, 'choices': list, 'gold': int},
    'schema': {'context_options': list, 'continuation': str, 'gold': int},
    'continuation': {'context': str, 'continuation': str}}


def form_of(item):
    """A line of such a file, as a dict -> the name of its form in FORMS, or None."""
    for form, keys in FORMS.items():
        if not all(type(item.get(key)) is kind for key, kind in keys.items()):
            continue
        if form == 'continuation':
            return form if item['continuation'].strip() else None
        options = options_of(item)
        strings = all(type(option) is str for option in options)
        return form if strings and len(options) > 1 and 0 <= item['gold'] < len(options) else None
    return None


def options_of(item):
    """The options of a question, a list of str; empty for a text to be continued."""
    return item.get('choices') or item.get('context_options') or []


def check_tasks(path):
    if not os.path.isfile(path):
        raise ValueError(f'tasks ({path}) must be a .jsonl file of questions: make one, for instance, with '
                         'python data/pydoc_chat/prepare.py --tasks=FILE')


def read_tasks(path, seed=1337):
    """
    A .jsonl file -> its questions as dicts, shuffled by the seed (nanochat's is 1337), so that the first few are of all
    kinds. ValueError names a line that is no question.
    """
    check_tasks(path)
    items = []
    for number, line in enumerate(read_text(path).split('\n'), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            item = None
        if not isinstance(item, dict) or not form_of(item):
            raise ValueError(
                f'{path}, line {number}: expected an object with query, choices and gold, with context_options, '
                'continuation and gold, or with context and continuation; choices are two or more texts, and gold is '
                f'the number of the right one, from 0 on: {line:.60}')
        items.append(item)
    if not items:
        raise ValueError(f'{path} has no question: give a file with one on each line')
    random.Random(seed).shuffle(items)
    return items

# -----------------------------------------------------------------------------
# a question -> texts -> tokens, of which some are scored

def written(item, delimiter, option=None):
    """
    A question with its answer as one text; option: the answer to write, one of options_of, instead of the right one.
    """
    form = form_of(item)
    if form == 'continuation':
        return item['context'].strip() + delimiter + item['continuation']
    option = options_of(item)[item['gold']] if option is None else option
    return item['query'] + delimiter + option if form == 'choice' else option + delimiter + item['continuation']


def scored_tokens(item, examples, tokenizer, delimiter):
    """
    -> for each option of a question (for its only answer, if it is a text to be continued): the tokens of examples,
    question and answer, and the place of the first scored token: where choices begin to differ, where contexts no
    longer differ, or after the text to be continued.
    """
    before = ''.join(written(example, delimiter) + '\n\n' for example in examples)
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    encode = lambda text: start + tokenizer.encode(before + text)
    form = form_of(item)
    if form == 'continuation':
        rows = [encode(written(item, delimiter))]
        # without the space at its end, which tokenizers join with the next word
        places = [common_length([encode((item['context'].strip() + delimiter).rstrip()), *rows])]
    else:
        rows = [encode(written(item, delimiter, option)) for option in options_of(item)]
        places = [common_length(rows)] * len(rows)
        if form == 'schema':
            same = common_length([row[::-1] for row in rows])
            places = [len(row) - same for row in rows]
    if min(map(len, rows)) < 2:
        raise ValueError(f'a question needs a token before its answer: {item} has none; leave it out')
    # something must be scored, and something must stand before it
    return rows, [max(1, min(place, len(row) - 1)) for row, place in zip(rows, places)]


def cut_left(rows, places, bos, block_size):
    """
    Shortens rows of tokens from the left to fit a context, all by as many tokens as the longest must lose, so that they
    still differ only in their answers; the token that begins a text stays. ValueError if answers are too long.
    """
    over = max(map(len, rows)) - block_size
    if over <= 0:
        return rows, places
    first = 0 if bos is None else 1
    if min(places) - over < max(1, first):
        raise ValueError(f'answers of {max(map(len, rows)) - min(places):,} tokens do not fit the context of '
                         f'{block_size:,} tokens: leave that question out')
    return [row[:first] + row[first + over:] for row in rows], [place - over for place in places]

# -----------------------------------------------------------------------------
# answering

@torch.no_grad()
def read_rows(model, rows, places, dtype=torch.float32):
    """
    Rows of tokens -> the trunk's states (B, T, n_embd) from which each row's scored tokens are predicted, and these as
    targets (B, T), -1 elsewhere. The common beginning of the rows is read once; the cache then holds it for each row.
    """
    device, longest = model.cos.device, max(map(len, rows))
    cache = KVCache(model.config, 1, longest, dtype, device)
    # the token before the first scored one is left to the second pass, since its state predicts that one
    shared = max(0, min(common_length(rows), *places) - 1)
    for start in range(0, shared, PREFILL_CHUNK):
        model.trunk(torch.tensor([rows[0][start:min(start + PREFILL_CHUNK, shared)]], device=device), cache)
    cache.keep([0] * len(rows))
    idx = torch.zeros(len(rows), longest - shared, dtype=torch.long)
    targets = torch.full_like(idx, -1)
    for b, (row, place) in enumerate(zip(rows, places)):
        idx[b, :len(row) - shared] = torch.tensor(row[shared:])
        targets[b, place - 1 - shared:len(row) - 1 - shared] = torch.tensor(row[place:])
    return model.trunk(idx.to(device), cache), targets.to(device)


@torch.no_grad()
def answer(model, tokenizer, item, examples=(), delimiter=' ', dtype=torch.float32):
    """
    Whether the model answers a question rightly. examples: other questions, with their answers before it; dtype: that
    of the cache, see data.cache.KVCache.
    """
    rows, places = scored_tokens(item, examples, tokenizer, delimiter)
    rows, places = cut_left(rows, places, tokenizer.bos, model.config.block_size)
    states, targets = read_rows(model, rows, places, dtype)
    if form_of(item) == 'continuation':
        scored = targets >= 0
        return bool((model.logits(states[scored]).argmax(dim=-1) == targets[scored]).all())
    nats = model.cross_entropy(states, targets, reduction='none').view(targets.shape)      # (choices, T), 0 if masked
    return int((nats.sum(dim=1) / (targets >= 0).sum(dim=1)).argmin()) == item['gold']


def sorts_of(items):
    """The form and kind of each question: examples should be like the question."""
    return [(form_of(item), item.get('kind')) for item in items]


def draw_examples(sorts, i, n):
    """sorts_of the questions -> the indices of n others of question i's sort, always the same ones for i."""
    like = [j for j, sort in enumerate(sorts) if sort == sorts[i] and j != i]
    assert n <= len(like), (f'num_fewshot ({n}) must be at most {len(like)}: there are no more questions like '
                            f'{sorts[i][1] or sorts[i][0]!r}')
    return random.Random(1234 + i).sample(like, n)


def answer_all(model, tokenizer, items, questions=0, num_fewshot=0, delimiter=' ', dtype=torch.float32):
    """
    Whether the model answers each of the first so many questions (0: all) rightly, a list of bools; examples are drawn
    from all questions. Prints its progress every ten seconds.
    """
    n, sorts, right = min(questions or len(items), len(items)), sorts_of(items), []
    for i in progress(range(n), n, 'questions', every=10):
        examples = [items[j] for j in draw_examples(sorts, i, num_fewshot)]
        right.append(answer(model, tokenizer, items[i], examples, delimiter, dtype))
    return right

# -----------------------------------------------------------------------------
# counting

def p_by_chance(n_right, chances):
    """The exact probability that guessing gives at least as many right answers; each question has its own chance."""
    probability = np.ones(1)                    # of 0, 1, 2, ... right answers to the questions so far
    for chance in chances:
        probability = np.convolve(probability, [1 - chance, chance])
    return min(1.0, float(probability[n_right:].sum()))


def count(items, right):
    """
    Questions and whether each was answered rightly -> 'questions', 'accuracy' and its standard 'error', 'chance'
    (guessing's accuracy), 'centred' (0: guessing, 1: all right) and 'centred_error', and 'p' of guessing so well.
    """
    chances = [1 / len(options_of(item)) if options_of(item) else 0.0 for item in items]    # of answering it rightly
    n, accuracy, chance = len(items), sum(right) / len(items), sum(chances) / len(items)
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    return {'questions': n, 'accuracy': accuracy, 'error': error, 'chance': chance,
            'centred': (accuracy - chance) / (1 - chance), 'centred_error': error / (1 - chance),
            'p': p_by_chance(sum(right), chances) if chance else None}


def by_group(items, right):
    """count of all questions, of each kind, and of those with and without held-out subjects, if lines say so."""
    items = items[:len(right)]
    rows = [{'kind': 'all'} | count(items, right)]
    for kind in sorted({str(item['kind']) for item in items if 'kind' in item}):
        for heldout in (None, False, True):
            mine = [i for i, item in enumerate(items) if str(item.get('kind')) == kind
                    and heldout in (None, item.get('heldout'))]
            if mine:
                rows.append({'kind': kind, 'heldout': heldout}
                            | count([items[i] for i in mine], [right[i] for i in mine]))
    return rows

# -----------------------------------------------------------------------------
# other texts

def text_files(spec):
    """'new=FILE,general=FILE' -> {name: path}. AssertionError or ValueError for anything else."""
    files = {}
    for part in filter(None, spec.split(',')):
        name, _, path = part.strip().partition('=')
        assert re.fullmatch(r'\w+', name) and path, f'texts ({spec}) must be like new=FILE,general=FILE'
        if not os.path.isfile(path):
            raise ValueError(f'texts ({spec}): {path} is not there, or is a folder: give a text file')
        files[name] = path
    return files


def read_texts(spec, most=0):
    """
    'new=FILE,general=FILE' -> {name: the first so many bytes of the file's text (0: all)}. They are counted in bytes,
    so that models with different tokenizers are measured on the same text.
    """
    texts = {name: read_text(path).encode()[:most or None].decode(errors='ignore')
             for name, path in text_files(spec).items()}
    for name, text in texts.items():
        if len(text) < 2:
            raise ValueError(f'texts ({spec}): {name} is empty: give a longer text')
    return texts


def windows(ids, block_size, rows):
    """
    A list of ids -> batches x, y (rows or fewer, block_size), as Loader.eval_batches has them: every id but the first
    is a target once, and y is -1 beyond the end.
    """
    ids = torch.tensor(ids)
    beyond = -(len(ids) - 1) % block_size
    x = F.pad(ids[:-1], (0, beyond)).view(-1, block_size)
    y = F.pad(ids[1:], (0, beyond), value=-1).view(-1, block_size)
    return [*zip(x.split(rows), y.split(rows))]


def bits_per_byte(model, tokenizer, text, dtype=None):
    """
    The loss on a text as model.evaluate gives it, in windows of the model's context; dtype: through a cache of that
    dtype. The text begins as texts of a dataset do. ValueError for characters that the tokenizer does not have.
    """
    ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text)
    block_size = min(model.config.block_size, len(ids) - 1)
    batches = windows(ids, block_size, max(1, 4096 // block_size))
    make_cache = dtype and (lambda n: KVCache(model.config, n, block_size, dtype, model.cos.device))
    return evaluate(model, progress(batches, len(batches), 'batches measured', every=10), tokenizer.token_bytes,
                    make_cache)['bpb']

# -----------------------------------------------------------------------------
# both, for a row of a table

def asked(texts='', text_bytes=0, tasks='', **how):
    """What measure is to do, in words, with files named by the first digits of their sha256; '' for nothing."""
    said = [f'{name} {sha256_of(path)[:8]}' for name, path in text_files(texts).items()]
    if said:
        said.append(f'{text_bytes} bytes')
    if tasks:
        check_tasks(tasks)
        said.append(f'tasks {sha256_of(tasks)[:8]} {how}')
    return ', '.join(said)


def measure(model, tokenizer, dtype=None, texts='', text_bytes=0, tasks='', seed=1337, **how):
    """
    -> 'bpb_NAME', bits per byte of each of texts (read_texts), and of tasks (a file) 'tasks_centred', 'tasks_error',
    and 'tasks', the rows of by_group. dtype: of the cache, None: texts without one. how: what answer_all takes.
    """
    row = {f'bpb_{name}': bits_per_byte(model, tokenizer, text, dtype)
           for name, text in read_texts(texts, text_bytes).items()}
    if tasks:
        items = read_tasks(tasks, seed)
        groups = by_group(items, answer_all(model, tokenizer, items, **how, dtype=dtype or torch.float32))
        row |= {'tasks_centred': groups[0]['centred'], 'tasks_error': groups[0]['centred_error'], 'tasks': groups}
    return row
