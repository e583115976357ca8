"""
How fast a model decodes, and what it loses, in each format of its weights. A library for bench.py --mode=decode,
quality and ladder, and for tests/peers.py.

    engine = build(k, 'int8-packed')                                # k: bench.py's knobs, resolved, as a namespace
    prompts = make_prompts(k, engine, 4)
    seen = decode_in_rounds(k, {'int8-packed': engine, ...}, prompts, [('int8-packed', 'ngram', 4), ...])
    memory_row(k)                                                   # of a fresh process
"""
import os
import shlex
import subprocess
import sys
import tempfile
from statistics import median

import torch

from data.bench.tasks import read_texts
from data.bench.timing import in_rounds, resident, speed, start, timed_call
from data.cache import KVCache
from data.checkpoint import load_checkpoint
from data.foreign.export import export_gguf
from data.foreign.llama import gguf_dataset, load_gguf
from data.layouts import PackedInt8Linear, for_decoding, for_measuring
from data.loader import data_of, validation
from data.machine import keep_memory
from data.rounding import convert, rounding_of
from data.sampling import first_difference
from data.teachers import load_teacher
from data.tokenizer import fingerprint, from_meta
from engine import Engine, Sampling, Speculation
from model import GPT, GPTConfig, evaluate
from quantize import compare, export, load

SHAPES = {
    'tiny': dict(n_layer=3, n_head=4, n_embd=192, n_hidden=384, vocab_size=65, block_size=256),
    'd12': dict(n_layer=12, n_head=6, n_embd=768, use_mqa=True, vocab_size=65536, block_size=1024)}
# The formats: bits of the weights (0: float), and the dtype in which for_decoding packs matrices. Names without a dash
# run the model's own layers. int8-packed and int4-packed are what sample.py runs; -compiled is its --compile=True: one
# sequence, half a minute of compiling for each. int4-bf16 keeps 4 bits in memory.
FORMATS = {
    'f32': (0, None), 'f32-packed': (0, torch.float32), 'f32-compiled': (0, None),
    'bf16-packed': (0, torch.bfloat16), 'bf16-compiled': (0, torch.bfloat16), 'f16-packed': (0, torch.float16),
    'int8': (8, None), 'int8-packed': (8, None), 'int8-compiled': (8, None),
    'int4': (4, None), 'int4-packed': (4, None), 'int4-compiled': (4, None),
    'int4-bf16': (4, torch.bfloat16), 'int4-bf16-compiled': (4, torch.bfloat16)}
GGUF_KINDS = ('q8_0', 'q4_0', 'q4_1', 'q4_k_m')    # llama.cpp's formats, to compare their quality: see through_gguf
LENGTHS = (1, 2, 4, 5, 8)                       # tokens in a pass, for rows_cost

# -----------------------------------------------------------------------------
# the model, in a format

def random_model(k):
    """A model of k.shape with random weights, the same in every format, with the heads that k.drafters need."""
    noise = torch.Generator().manual_seed(k.seed)
    heads = dict(draft_n=4 * ('head' in k.drafters), multi_token_n=3 * ('mtp' in k.drafters))
    model = GPT(GPTConfig(**SHAPES[k.shape], **heads))
    for p in model.parameters():                # none of the usual zeros: every path must have work to do
        torch.nn.init.normal_(p, std=0.05, generator=noise)
    return model.to(k.device)


def trained_model(k, bits):
    """
    The model in the out_dir k.shape: its integer checkpoint if there is one that belongs to best.pt, else best.pt.
    """
    best, integers = os.path.join(k.shape, 'best.pt'), os.path.join(k.shape, f'int{bits}.safetensors')
    if bits and os.path.exists(integers):
        if os.path.getmtime(integers) >= os.path.getmtime(best):
            return load(integers, k.device)[0]
        print(f'{integers} is older than {best}, which is rounded instead', file=sys.stderr)
    model, state = load(best, k.device)
    if bits and state.get('grid'):
        raise ValueError(f"{best} has scales and steps of its own: run quantize.py --out_dir={shlex.quote(k.shape)} "
                         f"--bits={bits} first, whose file is measured then")
    return model


def build(k, format):
    """-> an Engine"""
    bits, pack = FORMATS[format]
    model = random_model(k) if k.shape in SHAPES else trained_model(k, bits)
    if bits and not rounding_of(model):
        model = convert(model, bits)
    compiled = format.endswith('compiled')
    return Engine(for_decoding(model, pack, kernels=not compiled) if '-' in format else model, compile=compiled)


def through_gguf(k, kind):
    """
    Writes the trained model in k.shape as a GGUF file and reads it back -> a float model of its numbers, and the bytes
    of the file. kind: one of GGUF_KINDS; the gguf package writes all but q4_k_m, which llama.cpp's own tool makes.
    """
    path = os.path.join(k.shape, 'best.pt')
    model, state = load(path, k.device)
    with tempfile.TemporaryDirectory() as folder:
        written = export_gguf(model.cpu(), from_meta(state['tokenizer']), f'{folder}/{kind}.gguf',
                              'f16' if kind == 'q4_k_m' else kind)
        if kind == 'q4_k_m':
            plain, written = written, f'{folder}/rounded.gguf'
            done = subprocess.run([os.path.join(k.llamacpp, 'llama-quantize'), plain, written, 'Q4_K_M'],
                                  capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"llama-quantize failed: {(done.stderr.splitlines() or ['without a word'])[-1]}")
        return load_teacher(f'gguf:{written}', k.device).model, os.path.getsize(written)


def price_list(k, formats, data, tokenizer):
    """
    What each format costs in quality -> for each its model, and a row: bytes of its file, losses on the whole
    validation split of data, and the distance of its predictions from the float ones. None if there is no file or data.
    A format is one of FORMATS or GGUF_KINDS, or the path of an integer checkpoint that was made of this model.
    """
    models, rows = {}, {}
    for f in formats:
        bits, file = FORMATS.get(f, (0,))[0], os.path.join(k.shape, 'best.pt')
        if f in GGUF_KINDS:
            models[f], size = through_gguf(k, f)
        elif f not in FORMATS:
            model, state = load(f, k.device)
            models[f], size = for_measuring(model), os.path.getsize(f)
            if fingerprint(from_meta(state['tokenizer'])) != fingerprint(tokenizer):
                raise ValueError(f"formats: {f} has another tokenizer than {file}: give files of the same model")
        else:
            models[f] = build(k, f).model if '-' in f else for_measuring(build(k, f).model)
            written = os.path.join(k.shape, f'int{bits}.safetensors')
            size = None if bits else os.path.getsize(file)
            if bits and os.path.exists(written) and os.path.getmtime(written) >= os.path.getmtime(file):
                size = os.path.getsize(written)
        rows[f] = {'bytes': size}
    if data:
        whole = build(k, 'f32').model
        # a checkpoint that was trained further may have a shorter context; all models read the same rows
        length = min(model.config.block_size for model in (whole, *models.values()))
        batches = validation(data, length, k.device).eval_batches()
        for f, measured in zip(formats, compare(whole, models.values(), batches, tokenizer.token_bytes)):
            rows[f] |= {'val_loss': measured['val_loss_quant'], 'val_bpb': measured['bpb_quant'],
                        **{key: measured[key] for key in ('mean_kl', 'max_kl', 'top1_flips')}}
    return models, rows


def open_model(k, file):
    """
    A checkpoint, an int8 or int4 one, or a GGUF of ours (as the floats that it stands for) -> the model, the folder of
    its data, its tokenizer.
    """
    if file.endswith('.gguf'):
        model, tokenizer = load_gguf(file, k.device)
        state = {'dataset': gguf_dataset(file), 'tokenizer': tokenizer.meta()}
        if not state['dataset']:
            raise ValueError(f"{file} does not say which dataset to measure it on: write it again by "
                             "distill.py --to_gguf= with --dataset=")
    else:
        model, state = load(file, k.device)
    return model, *data_of(state, file)


def check_context(k, config, whose):
    assert k.prompt_tokens + k.new_tokens <= config.block_size, (
        f'prompt_tokens ({k.prompt_tokens}) + new_tokens ({k.new_tokens}) do not fit the context of '
        f'{config.block_size} that {whose} has: lower them')


def make_prompts(k, plain, n):
    """
    -> n prompts: random ids, or what a trained model writes from the token that begins a text; with k.texts, n pieces
    of these for every round.
    """
    if k.shape in SHAPES:
        noise = torch.Generator().manual_seed(k.seed)
        return torch.randint(plain.config.vocab_size, (n, k.prompt_tokens), generator=noise).tolist()
    tokenizer = from_meta(load_checkpoint(os.path.join(k.shape, 'best.pt'))['tokenizer'])
    if k.texts:
        return cut_prompts(k, tokenizer, n * (k.rounds + 1))
    # without such a token it is the vocabulary's first, which is mostly a newline
    first = tokenizer.bos or 0
    texts = plain.complete([[first]], k.prompt_tokens - 1, Sampling(temperature=0.8, seed=k.seed + 1), num_samples=n)
    return [[first] + text for text in texts]


def cut_prompts(k, tokenizer, n):
    """-> n pieces of k.texts of k.prompt_tokens tokens, evenly spread"""
    ids = [token for text in read_texts(k.texts, k.text_bytes).values() for token in tokenizer.encode(text)]
    room = len(ids) - k.prompt_tokens
    if room < n:
        raise ValueError(f'texts ({k.texts}) have {len(ids):,} tokens, too few for {n} prompts of {k.prompt_tokens}: '
                         'give a longer text, or a larger --text_bytes=')
    return [ids[start:start + k.prompt_tokens] for start in range(0, room, room // n)][:n]


def quality(model, data, tokenizer, dtype):
    """-> the loss on the whole validation split, through a cache of this dtype (None: without one), and its bytes."""
    c, device = model.config, model.cos.device
    loader = validation(data, c.block_size, device)
    make_cache = dtype and (lambda batch: KVCache(c, batch, loader.block_size, dtype, device=device))
    result = evaluate(model, loader.eval_batches(), tokenizer.token_bytes, make_cache)
    return {'val_loss': result['loss'], 'val_bpb': result['bpb'],
            'kv_bytes_per_token': model.kv_bytes_per_token(dtype == torch.int8)}

# -----------------------------------------------------------------------------
# what is timed

def decode(k, engine, prompts, seed, drafter):
    """-> the texts, and the engine's stats"""
    how = Sampling(k.temperature, seed=seed), Speculation(drafter, k.draft_n)
    return engine.complete(prompts, k.new_tokens, *how), engine.stats


@torch.inference_mode()
def pass_seconds(k, engine, prompt):
    """-> {n: seconds} of a cached pass over n tokens of one sequence, argmax included."""
    m, longest = engine.model, max(LENGTHS)
    cache = KVCache(engine.config, 1, k.prompt_tokens + longest, device=k.device)
    engine.prefill(cache, [prompt[:engine.config.block_size - longest]])
    before, ids = cache.lengths, torch.tensor([prompt[:1] * longest], device=k.device)
    times = {n: [] for n in LENGTHS}
    for n in LENGTHS * 5:
        times[n].append(timed_call(lambda: m.logits(m.trunk(ids[:, :n], cache)).argmax(dim=-1).tolist()))
        cache.rewind(before)
    return {n: median(t) for n, t in times.items()}


@torch.inference_mode()
def without_cache(k, engine, prompt, text):
    """-> tokens/s without a cache: a forward over the whole text for each token, timed at up to 16 places of it."""
    ids, n, m = torch.tensor([prompt + text], device=k.device), min(16, len(text)), engine.model
    ends = [k.prompt_tokens + i * len(text) // n for i in range(n)]
    return n / timed_call(lambda: [m.logits(m.trunk(ids[:, :end])[:, -1:]).argmax(dim=-1).tolist() for end in ends])


def bandwidth(big):
    """-> bytes/s at which these threads read memory: the faster of a sum and a matrix-vector product."""
    m = big.view(-1, 8192)
    reads = (big.sum, lambda: m @ m[0])
    return big.nbytes / min(timed_call(lambda: read().amax().item()) for read in reads)    # .item() waits for a GPU


def difference(k, engine, prompt, row, expected, got):
    """
    What is wrong with a row's text, in words; None if it is the expected one, or differs from it first at a tie.
    (Compiled for a GPU, floats are summed in another order, and an activation between two integers may be rounded to
    the other one.)
    """
    found = first_difference(engine.model, prompt, expected, got, k.temperature, row, k.seed)
    if found and found[1] > (0.1 if engine.compile and k.device != 'cpu' else 1e-4):
        return (f'sequence {row}: token {found[0]} is {got[found[0]]}, not {expected[found[0]]}, '
                f'and their scores differ by {found[1]:.2g}')

# -----------------------------------------------------------------------------
# all of it, in rounds

def decode_in_rounds(k, engines, prompts, wanted):
    """
    Decodes each of wanted, (format, drafter, batch), once in every round; also times passes and memory. -> by round:
    the stats of each of wanted, {format: seconds of passes}, tokens/s without a cache, bytes/s of memory; and which
    texts are wrong.
    """
    runs, texts, wrong = {key: [] for key in wanted}, {}, []
    costs, slow, rates = {f: [] for f in engines if not f.endswith('compiled')}, [], []
    # 512 MiB that have been written to: untouched pages would all be one page of zeros, in the processor's cache
    big = torch.ones(2**27, device=k.device)
    most = max(batch for _, _, batch in wanted)
    sets = [prompts[i:i + most] for i in range(0, len(prompts), most)]          # one, or one for each round
    for i in in_rounds(k.rounds):
        which = i % len(sets)
        given = sets[which]
        for (f, drafter, batch), stats in runs.items():
            text, got = decode(k, engines[f], given[:batch], k.seed, drafter)
            known = texts.setdefault((f, which), [])    # by row; the plain runs come first
            for row, (expected, own) in enumerate(zip(known, text)):
                found = difference(k, engines[f], given[row], row, expected, own)
                if found:
                    wrong.append(f'format {f}, drafter {drafter}, batch {batch}, {found}')
            known += text[len(known):]
            stats.append(got)
        for f, cost in costs.items():
            cost.append(pass_seconds(k, engines[f], given[0]))
        if k.recompute:
            slow.append(without_cache(k, engines['f32'], given[0], texts['f32', which][0]))
        rates.append(bandwidth(big))
    for seen in (*runs.values(), *costs.values(), slow, rates):
        del seen[:1]                            # round 0
    return runs, costs, slow, rates, wrong


def bytes_per_pass(model):
    """Bytes of weights that a pass over one token reads: all of trunk and lm_head, and one row of wte."""
    def nbytes(*parts):
        modules = [module for part in parts for module in part.modules()]
        values = [v for m in modules for v in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())]
        return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))
    return nbytes(model.transformer.h, model.lm_head) + nbytes(model.transformer.wte) // model.config.vocab_size


def decoding_rows(engines, runs, costs, slow, memory):
    """The results of decode_in_rounds -> a row for each of runs, and one for decoding without a cache"""
    rates, rows = {key: [s['tok_s'] for s in run] for key, run in runs.items()}, []
    yardstick = rates['f32', 'none', 1]
    for (f, drafter, batch), run in runs.items():
        size = bytes_per_pass(engines[f].model)
        gb_s = size * median(s['tok_s'] * s['passes'] / s['tokens'] for s in run) / 1e9
        accepted = [sum(n) for n in zip(*(s['accepted'] for s in run))]
        plain = drafter == 'none'
        rows.append({
            'decoder': 'picochat', 'format': f, 'drafter': drafter, 'batch': batch,
            **speed(rates[f, drafter, batch], ratio_plain_f32=yardstick, ratio_recompute=slow,
                    ratio_no_drafts=None if plain else rates.get((f, 'none', batch))),
            'first_token_ms': 1000 * median(s['first_seconds'] for s in run),
            'gb_s': gb_s, 'share_of_bandwidth': gb_s * 1e9 / median(memory),
            'rows_cost': {str(n): median(t[n] / t[1] for t in costs[f]) for n in LENGTHS[1:]} if f in costs else None,
            'tokens_per_verify': 1.0 if plain else sum(s['tokens'] for s in run) / sum(accepted),
            'accepted': None if plain else accepted,
            'kv_bytes_per_token': engines['f32'].model.kv_bytes_per_token(), 'weight_bytes': size})
    if slow:
        rows.append({'decoder': 'no cache', 'format': 'f32'}
                    | speed(slow, ratio_plain_f32=yardstick, ratio_recompute=slow))
    return rows

# -----------------------------------------------------------------------------
# memory

def memory_taken(k, path):
    """By how many bytes this process grows when it loads the file at path and decodes; and bytes of file and cache."""
    keep_memory()                               # as sample.py does
    small = GPTConfig(block_size=64, vocab_size=PackedInt8Linear.ROWS, n_layer=1, n_head=1, n_embd=64)
    Engine(for_decoding(convert(GPT(small)))).complete([[1] * 4], 8)        # so libraries have taken their own memory
    before, dtype = resident(), getattr(torch, k.caches)
    engine = Engine(for_decoding(load(path, k.device)[0]), cache_dtype=dtype)
    for _ in engine.generate([[1] * k.prompt_tokens], k.new_tokens, Sampling(k.temperature, seed=k.seed)):
        grown = resident() - before
    size, cache = os.path.getsize(path), KVCache(engine.config, 1, k.prompt_tokens + k.new_tokens, dtype).nbytes()
    return {'memory_bytes': grown, 'file_bytes': size, 'cache_bytes': cache, 'memory_ratio': grown / (size + cache)}


def memory_alone(k, path, int8=False):
    """memory_taken in a fresh process."""
    cache = 'int8' if int8 else 'float32'
    knobs = vars(k) | dict(mode='decode', child=path, caches=cache, threads=torch.get_num_threads())
    return start('bench.py', **knobs)


def memory_row(k):
    """-> the row of an int8 file that a fresh process decodes with"""
    with tempfile.TemporaryDirectory() as folder:
        export(f'{folder}/int8.safetensors', convert(build(k, 'f32').model), {})
        return {'decoder': 'picochat alone', 'format': 'int8-packed'} | memory_alone(k, f'{folder}/int8.safetensors')
