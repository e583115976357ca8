"""
The optimizers, Muon for the trunk's matrices and AdamW for the rest, and moving averages of the weights. A library for
train.py and whatever else trains a GPT.

    optimizers = make_optimizers(model, muon_lr=0.02, adam_lr=0.003)
    loss.backward()
    update(model, optimizers, grad_clip=1.0)
    averages.update(step)                       # averages = Averages(model, 0.99, known={})
"""
import contextlib
import math

import torch

from data.machine import fast_bf16, share, whole

MUON_STACK = 2**26                  # weights whose updates Muon computes together: 256 MiB in float32
# Muon's steps: a, b, c of x -> a x + b x^3 + c x^5, applied one after another to bring all singular values near 1. Five
# equal steps, Jordan's, bring singular values in [0.01, 1] into [0.68, 1.13]. The three are chosen as in Polar Express
# (Amsel et al. 2025, arXiv 2505.16932): each is the polynomial nearest to 1 on the range into which the steps before it
# have brought [0.01, 1]. They end in [0.73, 1.27].
MUON_STEPS = {
    5: ((3.4445, -4.7750, 2.0315),) * 5,
    3: ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))}


class Muon(torch.optim.Optimizer):
    """
    SGD with momentum, whose update is made orthogonal by MUON_STEPS[steps] (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon); with five steps it is torch.optim.Muon's. Matrices of one shape are stacked and
    orthogonalised together, in bfloat16 where the device multiplies that faster: a small model would otherwise spend
    most of a step here, in many small products. The update needs whole matrices: if the model is sharded, every process
    gathers them, a few at a time, does the same work, and keeps its shard.
    """
    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, steps=5):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            for params in by_shape.values():
                n = max(1, MUON_STACK // params[0].numel())
                for i in range(0, len(params), n):
                    self.update(group, params[i:i + n])

    def update(self, group, params):
        """One step for matrices that have one shape or its transpose."""
        for p in params:
            if 'momentum' not in self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        buffers = [self.state[p]['momentum'] for p in params]
        tall = [p.size(0) > p.size(1) for p in params]
        m = group['momentum']                   # no _foreach_lerp: torch 2.11 has none for sharded tensors
        torch._foreach_mul_(buffers, m)
        torch._foreach_add_(buffers, grads, alpha=1 - m)
        grads = torch._foreach_mul(grads, 1 - m)                         # Nesterov
        torch._foreach_add_(grads, buffers, alpha=m)
        # transposed to be wide where they are tall, so that X @ X.mT has the size of the smaller side
        wide = torch.stack([g.mT if t else g for t, g in zip(tall, map(whole, grads))])
        updates = [share((u.mT if t else u).to(p.dtype), p)
                   for t, u, p in zip(tall, orthogonalize(wide, group['steps']), params)]
        if group['weight_decay']:
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_mul_(updates, [-group['lr'] * math.sqrt(max(1, p.size(0) / p.size(1))) for p in params])
        torch._foreach_add_(params, updates)


def orthogonalize(g, steps=5):
    """(N, rows, cols), rows <= cols -> the same shape with all singular values near 1, by MUON_STEPS[steps]."""
    x = g.bfloat16() if fast_bf16(g.device.type) else g
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in MUON_STEPS[steps]:
        y = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(y, y, y, beta=b, alpha=c), x, beta=a)     # a x + (b y + c y y) x
    return x


def make_optimizers(model, muon_lr=0.02, adam_lr=0.003, weight_decay=0.0, muon_steps=5):
    """
    [AdamW, Muon], which share out all parameters that require a gradient. The vocabulary's tables go to AdamW, as an
    orthogonal update makes no sense where each row is a token. weight_decay is Muon's.
    """
    matrices, rest, optimizers = [], [], []
    for name, p in model.named_parameters():
        is_table = 'wte' in name or 'lm_head' in name
        if p.requires_grad:
            (matrices if p.ndim == 2 and not is_table else rest).append(p)
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=adam_lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0,
                                            fused=rest[0].device.type in ('cpu', 'cuda')))
    if matrices:
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay, steps=muon_steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['peak_lr'] = group['lr']
    return optimizers


def update(model, optimizers, grad_clip=0.0):
    """Clips the gradients to a norm of grad_clip (0: not at all), steps the optimizers, and drops the gradients."""
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def load_optimizer(optimizer, state):
    """
    Loads a saved state, of whole tensors, into optimizer, whose parameters may be sharded. Learning rates and other
    settings stay those of optimizer.
    """
    params = [p for group in optimizer.param_groups for p in group['params']]
    for i, values in state['state'].items():
        shapes = [v.shape for v in values.values() if torch.is_tensor(v) and v.numel() > 1]
        assert i in range(len(params)) and all(shape == params[i].shape for shape in shapes), (
            f"the checkpoint's optimizer has for parameter {i} numbers of shape {shapes}: use another copy")
    state = {i: {k: share(v, params[i]) for k, v in values.items()} for i, values in state['state'].items()}
    optimizer.load_state_dict({'state': state, 'param_groups': optimizer.state_dict()['param_groups']})


class Averages:
    """
    Moving averages of the weights that learn, which are evaluated, sampled and saved in their place, as they fluctuate
    less. decay 0: none. known: the averages of a checkpoint; without them the averages start as the weights.
    """
    def __init__(self, model, decay, known):
        self.model, self.decay = model, decay
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.pairs = {name: (p, p.detach().clone()) for name, p in learning.items()} if decay else {}
        for name, average in known.items() if decay else ():
            self.pairs[name][1].copy_(share(average, learning[name]))

    def update(self, step):
        """Call it after step steps. The decay starts at 2/11 and grows: the first weights are soon forgotten."""
        for p, average in self.pairs.values():
            average.lerp_(p.detach(), 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def in_place(self):
        """with averages.in_place(): the model's weights are the averages."""
        self.swap()
        yield
        self.swap()

    @torch.no_grad()
    def swap(self):
        for p, average in self.pairs.values():
            kept = p.clone()
            p.copy_(average)
            average.copy_(kept)
        if self.pairs and hasattr(self.model, 'reshard'):       # a sharded model
            self.model.reshard()                # drops whole weights that were gathered before the swap

    def state(self):
        """The averages by name, for a checkpoint."""
        return {name: average for name, (_, average) in self.pairs.items()}
