"""
Drafters guess the next tokens for speculative decoding, which keeps those that the model would have drawn itself
(engine.py). A wrong guess costs time and never changes the text. To add your own, write a function like these and give
it to engine.Speculation, or name it in DRAFTERS. A drafter that is a class is created anew for every generation.

    (model, x, last, texts, noise, pick) -> up to k tokens for every row, (B, k) int64, that may come next

last (B, 1) is the newest token of each row, x (B, 1, n_embd) the trunk's state from which it was drawn, texts the rows'
token lists. noise (B, k, V) is the noise of the model's own draws at those positions, so that a drafter which knows the
distribution guesses the very token that will be drawn; pick(logits, noise) draws.
"""
import torch


def draft_head(model, x, last, texts, noise, pick):
    """The draft head: its cell is applied again and again, each time to the token it has just drawn."""
    out = [last]
    for n in range(noise.size(1)):
        x = model.draft_state(x, out[-1])
        logits = model.draft_logits(x)
        out.append(pick(logits, noise[:, n:n + 1, :logits.size(-1)]))       # (B, 1)
    return torch.cat(out[1:], dim=1)


def draft_multi_token(model, x, last, texts, noise, pick):
    """The multi-token heads, all from one state: the first predicts what follows the last token, and so on."""
    states = [model.multi_token_state(x, i) for i in range(noise.size(1))]
    return pick(model.logits(torch.cat(states, dim=1)), noise)


class NGram:
    """
    Prompt lookup: finds the latest earlier occurrence of the text's last tokens, as many of them as possible, and
    drafts what followed there. It keeps an index of each text, and how often a match of n tokens has predicted the next
    token; it drafts only as long as a draft is likely enough to be kept.
    """
    LONGEST = 8         # the most last tokens that are looked up
    LIKELY = 0.25       # a draft must be kept with at least this probability

    def __init__(self):
        self.indices = {}
        self.accuracy = [0.3 + 0.05 * n for n in range(self.LONGEST + 1)]   # of a match of n tokens

    def __call__(self, model, x, last, texts, noise, pick):
        k = noise.size(1)
        drafts = [self.draft(self.indices.setdefault(id(text), Index(text, self.LONGEST)), k) for text in texts]
        longest = max(map(len, drafts))
        drafts = [(draft + text[-1:] * longest)[:longest] for draft, text in zip(drafts, texts)]
        return torch.tensor(drafts, dtype=torch.long, device=noise.device).view(len(texts), longest)

    def draft(self, index, k):
        """Up to k tokens that may follow a text."""
        self.learn(index)
        n, follows = index.look_up(k)
        a = self.accuracy[n]
        likely = sum(a ** (i + 1) > self.LIKELY for i in range(k)) if n else 0
        # without drafts there is no evidence: the estimate rises a little each time, until drafting is tried again
        if likely == 0:
            self.accuracy[n] += 0.02 * (0.5 - a)
        index.guess = (len(index.text), n, follows[:likely])
        return follows[:likely]

    def learn(self, index):
        """Updates accuracy by the last drafts, up to the first wrong one; those after it had no chance."""
        place, n, drafted = index.guess
        for guessed, token in zip(drafted, index.text[place:]):
            self.accuracy[n] += 0.1 * ((guessed == token) - self.accuracy[n])
            if guessed != token:
                break


class Index:
    """An index of a text, which may grow: the last place where each run of up to longest tokens occurs."""
    def __init__(self, text, longest):
        self.text, self.longest, self.ends, self.known = text, longest, {}, 0
        self.guess = (0, 0, [])

    def look_up(self, k):
        """-> how many of the last tokens occur earlier, too, and up to k tokens that followed them there"""
        text = self.text
        for end in range(self.known + 1, len(text)):                        # text[end] follows these runs
            for n in range(1, min(self.longest, end) + 1):
                self.ends[tuple(text[end - n:end])] = end
        self.known = max(self.known, len(text) - 1)
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            end = self.ends.get(tuple(text[-n:]))
            if end is not None:
                return n, text[end:end + k]
        return 0, []


def draft_random(model, x, last, texts, noise, pick):
    """Nonsense guesses, for tests: they must not change the text either."""
    k, vocab_size = noise.shape[1:]
    guesses = [[(7919 * len(text) + 104729 * n + text[-1]) % vocab_size for n in range(k)] for text in texts]
    return torch.tensor(guesses, device=noise.device)


DRAFTERS = {'none': None, 'head': draft_head, 'mtp': draft_multi_token, 'ngram': NGram, 'random': draft_random}
HEADS = {'head': 'draft', 'mtp': 'multi_token'}         # drafters that need a head -> the model's name for it


class Depth:
    """
    Chooses how many tokens to draft: the k that promises most tokens a second. If each draft is kept with probability
    a, a round of k drafts gives (1 - a^(k+1)) / (1 - a) tokens; its time is estimated by a straight line through the
    rounds timed so far. This affects speed, never the text.
    """
    def __init__(self, most):
        self.most = most
        self.kept, self.offered = 1.0, 2.0          # a starts at 1/2
        self.idle = 0                               # rounds in a row without drafts
        self.sums = [0.0] * 5                       # of 1, k, k*k, t, k*t over rounds; older rounds weigh less

    def choose(self):
        n, k, kk, t, kt = self.sums
        spread = n * kk - k * k
        if spread <= 1e-3 * n * n:                  # all rounds had the same k, which gives no line: try two in turns
            return self.most // (1 + int(n + 0.5) % 2)
        slope = max(0.0, (n * kt - k * t) / spread)             # seconds for each draft
        base = max(1e-9, (t - slope * k) / n)                   # seconds for a round without
        a = min(0.99, self.kept / self.offered)

        def tokens_per_second(k):
            return (1 - a ** (k + 1)) / (1 - a) / (base + slope * k)
        best = max(range(self.most + 1), key=tokens_per_second)
        self.idle = 0 if best else self.idle + 1
        # after many rounds without drafts the text may have become easier, so try again now and then
        return best if self.idle % 16 < 15 else max(1, self.most // 2)

    def saw(self, k, kept, seconds):
        """Learns from a round of k drafts that took so many seconds; kept: how many each row kept."""
        # drafts after a wrong one had no chance, so they do not count as offered
        offered = sum(min(n + 1, k) for n in kept)
        self.kept = 0.98 * self.kept + sum(kept)
        self.offered = 0.98 * self.offered + offered
        self.sums = [0.95 * s + x for s, x in zip(self.sums, (1, k, k * k, seconds, k * seconds))]
