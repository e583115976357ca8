"""
Drafters: they guess the next tokens for speculative decoding, which keeps those that the model would have drawn itself
(engine.py). A wrong guess costs time and never changes the text. To add your own: write a function like these and give
it to engine.Speculation, or name it in DRAFTERS.

    (model, x, last, texts, noise, pick) -> up to k tokens for every row, (B, k) int64, that may come next

last (B, 1) is the newest token of each row, x (B, 1, n_embd) the trunk's state from which it was drawn, texts the rows'
token lists. noise (B, k, V) is what the model itself will draw with at those positions, so that a drafter which knows
the distribution guesses the very sample; pick(logits, noise) draws.
"""
import torch


def draft_head(model, x, last, texts, noise, pick):
    """The draft cell, fed its own draws."""
    out = [last]
    for n in range(noise.size(1)):
        x = model.draft_state(x, out[-1])
        logits = model.logits(x, model.draft_lm_head)
        out.append(pick(logits, noise[:, n:n + 1, :logits.size(-1)]))       # (B, 1)
    return torch.cat(out[1:], dim=1)


def draft_multi_token(model, x, last, texts, noise, pick):
    """The multi-token heads, all from one state: the first predicts what follows the last token, and so on."""
    states = [model.multi_token_state(x, i) for i in range(noise.size(1))]
    return pick(model.logits(torch.cat(states, dim=1)), noise)


def draft_ngram(model, x, last, texts, noise, pick):
    """What followed the latest earlier occurrence of the text's last tokens, the more of them the better."""
    return torch.tensor([look_up(text, noise.size(1)) for text in texts], device=noise.device)


def look_up(text, k, longest=8):
    """k tokens that may follow text (a token list): prompt lookup."""
    repeated = text[-1:] * k
    for n in range(min(longest, len(text) - 1), 0, -1):
        tail = text[-n:]
        for at in range(len(text) - n - 1, -1, -1):
            if text[at:at + n] == tail:
                return (text[at + n:at + n + k] + repeated)[:k]
    return repeated


def draft_random(model, x, last, texts, noise, pick):
    """Nonsense: the adversary that must not change the text either."""
    k, vocab_size = noise.shape[1:]
    guesses = [[(7919 * len(text) + 104729 * n + text[-1]) % vocab_size for n in range(k)] for text in texts]
    return torch.tensor(guesses, device=noise.device)


DRAFTERS = {'none': None, 'head': draft_head, 'mtp': draft_multi_token, 'ngram': draft_ngram, 'random': draft_random}
HEADS = {'head': 'draft', 'mtp': 'multi_token'}         # drafters that need a head -> the model's name for it


class Depth:
    """
    How many tokens to draft: the k that promises most tokens a second. A chain of k drafts of which each is kept with
    probability a gives (1 - a^(k+1)) / (1 - a) tokens; what a round of k costs is a line through the rounds timed so
    far. It decides speed, never the text.
    """
    def __init__(self, most):
        self.most = most
        self.kept, self.offered = 1.0, 2.0          # a starts at 1/2
        self.idle = 0                               # rounds in a row without drafts
        self.sums = [0.0] * 5                       # of 1, k, k*k, t, k*t over rounds, older ones counting less

    def choose(self):
        n, k, kk, t, kt = self.sums
        spread = n * kk - k * k
        if spread <= 1e-3 * n * n:                  # all rounds were alike, which makes no line: alternate
            return self.most // (1 + int(n + 0.5) % 2)
        slope = max(0.0, (n * kt - k * t) / spread)             # seconds for each draft
        base = max(1e-9, (t - slope * k) / n)                   # seconds for a round without
        a = min(0.99, self.kept / self.offered)

        def tokens_per_second(k):
            return (1 - a ** (k + 1)) / (1 - a) / (base + slope * k)
        best = max(range(self.most + 1), key=tokens_per_second)
        self.idle = 0 if best else self.idle + 1
        # without drafts for long: the text may have become easier, so try again now and then
        return best if self.idle % 16 < 15 else max(1, self.most // 2)

    def saw(self, k, kept, seconds):
        """A round of k drafts took seconds; kept says how many each row kept."""
        # a draft behind one that was wrong had no chance: it was not offered
        offered = sum(min(n + 1, k) for n in kept)
        self.kept = 0.98 * self.kept + sum(kept)
        self.offered = 0.98 * self.offered + offered
        self.sums = [0.95 * s + x for s, x in zip(self.sums, (1, k, k * k, seconds, k * seconds))]
