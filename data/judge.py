"""
Whether a teacher may teach a text. If it was trained with hold_out, it labels only what it has not seen; and it must
know these tokens. A library of distill.py; Teacher is defined in data/teachers.py.

    check_reading(teachers, loader)     # prints one line per teacher; ValueError if it only guesses
"""
import numpy as np
import torch
import torch.nn.functional as F

from data.loader import held_out

# -----------------------------------------------------------------------------
# who may label what: a teacher that was trained with hold_out labels only what it has not seen

def may_label(teacher, tokens, loader):
    """tokens: (N,) places in the text -> (N,) bool, whether the teacher may label them."""
    if not teacher.hold_out:
        return torch.ones_like(tokens, dtype=torch.bool)
    return held_out(teacher.hold_out, tokens, loader.n_tokens, loader.row)


def tokens_each_may_label(teachers, loader):
    """How many of the loader's tokens each teacher may label. ValueError if some token may be labelled by none."""
    folds = [teacher for teacher in teachers if teacher.hold_out]
    if not folds:
        return [loader.n_tokens] * len(teachers)
    for teacher in folds:
        if teacher.data not in (None, loader.meta['sha256']['train.bin']):
            raise ValueError(f"a teacher held out {teacher.hold_out} of a text that has been prepared anew since, and "
                             "has other tokens now: train it again")
    tokens = torch.arange(loader.n_tokens)
    may = torch.stack([may_label(teacher, tokens, loader) for teacher in teachers])     # (teachers, n_tokens)
    nobody = ~may.any(dim=0)
    if nobody.any():
        raise ValueError(f"nobody can label token {nobody.int().argmax().item():,} of {loader.n_tokens:,}: every "
                         "teacher has seen it; add one that was trained with --hold_out= of that part")
    return may.sum(dim=1).tolist()

# -----------------------------------------------------------------------------
# does a teacher know these tokens? a model that came without a tokenizer may use other ids, and would teach nonsense

def check_reading(teachers, loader):
    """
    Prints each teacher's loss on some of the loader's text. ValueError if it is no better than guessing by the tokens'
    frequencies, which ignores context. random:d32 and the like, which serve measurements, are not checked.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for teacher in teachers:
        if teacher.name.startswith('random:'):
            continue
        loss, guess, n = loss_on_text(teacher, loader)
        if not n:                               # this text has no token that it may label and a student learns
            continue
        if first:
            print(f"teacher {teacher.name}: loss {loss:.4f} nats a token on {n:,} tokens of the text, "
                  f"where guessing by frequencies gives {guess:.4f}", flush=True)
        if not loss < guess:
            raise ValueError(f"the teacher {teacher.name} is no better on this text ({loss:.4f} nats a token) than "
                             f"guessing by the tokens' frequencies ({guess:.4f}): it has not learnt, or it was trained "
                             "with another tokenizer; prepare the data with the teacher's own, or take another teacher")


@torch.no_grad()
def loss_on_text(teacher, loader, most=8192):
    """
    -> the teacher's loss in nats per token, that of guessing by frequencies, and over how many tokens both are means:
    about `most` tokens, spread over the part of the text that the teacher may label, less those not to be learnt.
    """
    T, model = loader.block_size, teacher.model
    rows, n_windows = max(1, most // T), max(1, loader.n_tokens // T)
    windows = torch.linspace(0, n_windows - 1, min(n_windows, 100 * rows), dtype=torch.float64).long()
    windows = windows[may_label(teacher, windows * T + T // 2, loader)]
    windows = windows[torch.linspace(0, len(windows) - 1, min(len(windows), rows)).long()]
    log_p = torch.from_numpy(log_frequencies(loader, model.config.vocab_size))
    sums = torch.zeros(3, dtype=torch.float64)
    for starts in (windows * T).split(loader.batch_size):
        x, y = loader.rows(starts.tolist())     # (B, T)
        may = may_label(teacher, starts[:, None] + torch.arange(1, T + 1), loader)
        y = torch.where(may.to(y.device), y, -1).flatten()
        states = model.trunk(x).flatten(0, 1)                                   # (B * T, n_embd)
        chunk = max(1, 2**25 // model.config.vocab_size)
        for s, targets in zip(states.split(chunk), y.split(chunk)):
            nats = F.cross_entropy(model.logits(s), targets, ignore_index=-1, reduction='sum').item()
            learnt = targets[targets >= 0].cpu()
            sums += torch.tensor([nats, -log_p[learnt].sum(), len(learnt)], dtype=torch.float64)
    nats, guess, n = sums.tolist()
    return nats / max(n, 1), guess / max(n, 1), int(n)


def log_frequencies(loader, vocab_size):
    """log of each token's frequency (vocab_size,) among the tokens to be learnt, by a million spread over the text."""
    counts, size = np.ones(vocab_size), 2**16   # starting at 1, so that no token is impossible
    for start in range(0, loader.n_tokens, max(size, loader.n_tokens // 16)):
        part = loader.tokens[start:start + size]
        if loader.mask is not None:
            part = part[loader.mask[start:start + size] != 0]
        counts += np.bincount(part, minlength=vocab_size)[:vocab_size]
    return np.log(counts / counts.sum())
