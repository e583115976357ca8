"""
Calibration text: what a model reads while balance.py and gptq.py collect statistics of its activations. A library; each
function gives a list of batches (x, y) of token ids, (rows, T) int64 both, y shifted by one token.

    batches = from_dataset('data/stdlib_char', model, 16)
    batches = from_file('notes.txt', model, tokenizer, 16)
    batches = from_itself(model, tokenizer, 16)
"""
import torch

from data.files import read_text
from data.loader import Loader, load_meta, progress
from engine import Engine, Sampling

ROWS, LONGEST = 16, 512         # rows of a batch, tokens of a row at most
AT_ONCE = 2                     # rows that are read together; more would only take more memory


def length_of(model):
    return min(model.config.block_size, LONGEST)


def in_parts(batches):
    """The same rows in smaller batches."""
    return [part for x, y in batches for part in zip(x.split(AT_ONCE), y.split(AT_ONCE))]


def from_dataset(folder, model, n, hold_out='', seed=0):
    """n batches of a dataset's training split, less what is held out. Chats are packed into rows: these stay whole."""
    length = load_meta(folder).get('row') or length_of(model)
    loader = Loader(folder, 'train', ROWS, length, seed, device=model.cos.device, hold_out=hold_out)
    return [loader.batch(step) for step in range(n)]


def from_file(path, model, tokenizer, n):
    """n batches of rows spread over a text file, fewer if it is short. ValueError if it is shorter than one row."""
    T = length_of(model)
    ids = torch.tensor(tokenizer.encode(read_text(path)), dtype=torch.int64)
    if len(ids) <= T:
        raise ValueError(f"{path} has {len(ids):,} tokens, and a row of text to calibrate with has {T:,} and one more: "
                         "give a longer text")
    rows = min(n * ROWS, (len(ids) - 1) // T)
    starts = torch.linspace(0, len(ids) - T - 1, rows).long()
    text = torch.stack([ids[start:start + T + 1] for start in starts.tolist()]).to(model.cos.device)
    return [(part[:, :-1], part[:, 1:]) for part in text.split(ROWS)]


def from_itself(model, tokenizer, n, seed=0):
    """n batches that the model itself writes, for when no text is at hand."""
    T, bos = length_of(model), tokenizer.bos
    batches = []
    for batch in progress(range(n), n, 'batches that the model writes'):
        # a row begins as documents do; if the tokenizer has no token for that, with a random one
        own = seed * n + batch
        random = torch.Generator().manual_seed(own)
        first = [bos] * ROWS if bos is not None else torch.randint(model.config.vocab_size, (ROWS,),
                                                                   generator=random).tolist()
        rows = Engine(model).complete([[token] for token in first], T, Sampling(seed=own))
        ids = torch.tensor([[token, *row] for token, row in zip(first, rows)], device=model.cos.device)
        batches.append((ids[:, :-1], ids[:, 1:]))
    return batches
