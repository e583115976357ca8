"""
Speculation never changes the text: plain decoding against every drafter at four temperatures, with 1 to 8 drafts
(tests/README.md).

    python tests/exact.py                       # random weights: MHA, GQA, MQA, with draft and multi-token heads
    python tests/exact.py --out_dir=out-qat-shakespeare         # a trained model
    python tests/exact.py --out_dir=out-smol --formats=int8,int4 --tokens=3000 --batch=2    # a large one

The last line is JSON; the status is 1 if any text is wrong. In float a tie within 1e-4 may go another way.
"""
import json
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))  # the repo
from data.checkpoint import load_model
from data.files import in_repo
from data.layouts import for_decoding
from data.rounding import convert
from data.sampling import first_difference
from engine import Engine, HEADS, Sampling, Speculation
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
out_dir = ''                # a trained model; empty: random weights
tokens = 50000              # per format, at least
batch = 8                   # ragged rows decoded together
formats = 'float32,int8,int4'
cache = 'float32'          # or int8: what the cache holds
seed = 1
limits = {'cache': ['float32', 'int8']}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())


def random_model(kv, vocab_size):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=256, vocab_size=vocab_size, n_layer=3, n_head=4, n_kv_head=kv, n_embd=96,
                          multi_token_n=3, draft_n=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.12)
    return model


def models(kind):
    if out_dir:
        found = [(out_dir, load_model(os.path.join(out_dir, 'best.pt'))[0])]
    else:  # the last one's lm_head is packed
        found = [(f'{kv} key heads, {vocab_size} tokens', random_model(kv, vocab_size))
                 for kv, vocab_size in ((4, 97), (1, 97), (2, 8192))]
    for name, model in found:
        yield name, model if kind == 'float32' else convert(model, int(kind[3:]))


def compare(engine, temperature, run):
    """Plain texts against every drafter's -> tokens compared, and (what it was, gap) of each text that differs."""
    c, tokens_seen, differ = engine.config, 0, []
    g = torch.Generator().manual_seed(run)
    lengths = torch.randint(1, 40, (batch,), generator=g).tolist()
    prompts = [torch.randint(c.vocab_size, (n,), generator=g).tolist() for n in lengths]
    sampling, new_tokens = Sampling(temperature, seed=run), c.block_size - 40
    plain = engine.complete(prompts, new_tokens, sampling)
    for drafter in ('head', 'mtp', 'ngram', 'random'):
        if drafter in HEADS and not hasattr(engine.model, HEADS[drafter]):
            continue
        k = torch.randint(1, 9, (), generator=g).item()
        adapt = torch.rand((), generator=g).item() < 0.5
        texts = engine.complete(prompts, new_tokens, sampling, Speculation(drafter, k, adapt))
        tokens_seen += sum(map(len, texts))
        for row, (a, b) in enumerate(zip(plain, texts)):
            if a != b:
                gap = first_difference(engine.model, prompts[row], a, b, temperature, row, run)[1]
                differ.append((f'T={temperature}, {drafter} k={k}, row {row}', gap))
    return tokens_seen, differ


results = {}
for kind in formats.split(','):
    done, run, gaps = 0, 0, []
    while done < tokens:
        for name, model in models(kind):
            engine = Engine(for_decoding(model), cache_dtype=getattr(torch, cache))
            for temperature in (0, 0.7, 1, 1.3):
                run += 1
                seen, differ = compare(engine, temperature, run)
                done += seen
                for what, gap in differ:
                    gaps.append(gap)
                    print(f'{kind}, {name}, {what}: differs from the plain text')
    widest = max(gaps, default=0.0)
    results[kind] = {'tokens': done, 'differ': len(gaps), 'widest_gap': widest,
                     'wrong': int(widest > 1e-4) if kind == 'float32' else len(gaps)}
    print(f"{kind}: {done:,} tokens, {len(gaps)} texts differ from the plain one, "
          f"the widest gap of scores there {widest:.1e}", flush=True)
print(json.dumps(results))
sys.exit(any(r['wrong'] for r in results.values()))
