"""
How fast a model decodes, in the formats in which its weights may lie. A library for bench.py --mode=decode, quality and
ladder, and for its peers.

    engine = build(k, 'int8-packed')            # k: bench.py's knobs, resolved, as a namespace
    prompts = make_prompts(k, engine, 4)
"""
import os
import sys

import torch

from data.checkpoint import load_checkpoint
from data.layouts import for_decoding
from data.tokenizer import from_meta
from engine import Engine, Sampling
from model import GPT, GPTConfig
from quantize import convert, load, rounding_of

SHAPES = {
    'tiny': dict(n_layer=3, n_head=4, n_embd=192, n_hidden=384, vocab_size=65, block_size=256),
    'd12': dict(n_layer=12, n_head=6, n_embd=768, use_mqa=True, vocab_size=65536, block_size=1024)}
# What is decoded: the bits of the weights (0: float), and the dtype in which for_decoding packs matrices. Without a
# dash the model's own layers run. int8-packed and int4-packed are what sample.py runs, -compiled is with its
# --compile=True: one sequence, a minute of compiling for each. int4-bf16 leaves 4 bits in memory.
FORMATS = {
    'f32': (0, None), 'f32-packed': (0, torch.float32), 'f32-compiled': (0, None),
    'bf16-packed': (0, torch.bfloat16), 'bf16-compiled': (0, torch.bfloat16), 'f16-packed': (0, torch.float16),
    'int8': (8, None), 'int8-packed': (8, None), 'int8-compiled': (8, None),
    'int4': (4, None), 'int4-packed': (4, None), 'int4-compiled': (4, None),
    'int4-bf16': (4, torch.bfloat16), 'int4-bf16-compiled': (4, torch.bfloat16)}

# -----------------------------------------------------------------------------
# the model, in a format

def random_model(k):
    """The shape with random weights, the same in every format; heads are there that the drafters need."""
    noise = torch.Generator().manual_seed(k.seed)
    heads = dict(draft_n=4 * ('head' in k.drafters), multi_token_n=3 * ('mtp' in k.drafters))
    model = GPT(GPTConfig(**SHAPES[k.shape], **heads))
    for p in model.parameters():                # none of the usual zeros: every path must have work to do
        torch.nn.init.normal_(p, std=0.05, generator=noise)
    return model.to(k.device)


def trained_model(k, bits):
    """The model in the out_dir k.shape: its integers if they are there and belong to best.pt, else best.pt."""
    best, integers = os.path.join(k.shape, 'best.pt'), os.path.join(k.shape, f'int{bits}.safetensors')
    if bits and os.path.exists(integers):
        if os.path.getmtime(integers) >= os.path.getmtime(best):
            return load(integers, k.device)[0]
        print(f'{integers} is older than {best}, which is rounded instead', file=sys.stderr)
    return load(best, k.device)[0]


def build(k, format):
    """-> an Engine"""
    bits, pack = FORMATS[format]
    model = random_model(k) if k.shape in SHAPES else trained_model(k, bits)
    if bits and not rounding_of(model):
        model = convert(model, bits)
    compiled = format.endswith('compiled')
    return Engine(for_decoding(model, pack, kernels=not compiled) if '-' in format else model, compile=compiled)


def make_prompts(k, plain, n):
    """-> n prompts: random ids, or what a trained model writes from the token that stands before any text."""
    if k.shape in SHAPES:
        noise = torch.Generator().manual_seed(k.seed)
        return torch.randint(plain.config.vocab_size, (n, k.prompt_tokens), generator=noise).tolist()
    # without such a token it is the vocabulary's first, which is mostly a newline
    first = from_meta(load_checkpoint(os.path.join(k.shape, 'best.pt'))['tokenizer']).bos or 0
    texts = plain.complete([[first]], k.prompt_tokens - 1, Sampling(temperature=0.8, seed=k.seed + 1), num_samples=n)
    return [[first] + text for text in texts]


def check_context(k, config, whose):
    assert k.prompt_tokens + k.new_tokens <= config.block_size, (
        f'prompt_tokens ({k.prompt_tokens}) + new_tokens ({k.new_tokens}) do not fit the context of '
        f'{config.block_size} that {whose} has: lower them')
