"""
A smaller shape from a trained model: attention heads, key/value heads, neurons, channels, layers and tokens go; what
stays keeps its weights.

    python prune.py --out_dir=out-quickstart --neuron_prune_ratio=0.5       # -> out-quickstart-pruned/best.pt
    python prune.py --out_dir=out-quickstart --keep_params=0.5              # splits the cut by what each kind costs
    python train.py config/quickstart.py --init_from=out-quickstart-pruned/best.pt --out_dir=out-quickstart-recovered

You will see the loss, the size and the speed before and after, then one line of JSON. The functions turn indices into
a new state dict and GPTConfig, and change nothing in place:

    state, config = keep_neurons(model.state_dict(), model.config, [[0, 2], [1, 3]])    # of each layer, which to keep
    model = build(state, config)

Three things make a cut cheap before any retraining. What is left is fitted anew by least squares to give what the whole
gave (refit), and the residual stream is turned onto its principal axes before channels go (rotate): a norm without
weights does not notice a rotation, so that changes nothing by itself (SliceGPT, arXiv 2401.15024).
And neurons go in an order that knows of the refit (elimination_order).
"""
import json
import math
import os
import re
from dataclasses import asdict, replace

import numpy as np
import torch

from model import GPT, check_device, check_knobs, evaluate, load_model, save_checkpoint

IMPORTANCE = ('obs', 'taylor', 'activation', 'l1', 'random')
# what shrink cuts -> how the shape calls its number
KINDS = {'layers': 'n_layer', 'neurons': 'n_hidden', 'heads': 'n_head', 'channels': 'n_embd'}


def build(state, config):
    """A state dict and its GPTConfig -> the model, in eval mode, on the state's device."""
    model = GPT(config)
    model.load_state_dict(state)
    return model.to(state['lm_head.weight'].device).eval()

# -----------------------------------------------------------------------------
# indices -> a new state dict and shape

def columns(w, keep, moment=None):
    """
    w (rows, K) -> (rows, len(keep)): those columns. With the second moment (K, K) of its inputs x, the columns are also
    fitted by least squares to give on x[keep] what w gave on x, as far as what is kept can tell what is cut.
    """
    if moment is None or len(keep) == w.size(1):
        return w[:, keep]
    m, keep = moment.cpu().double(), torch.as_tensor(keep)
    return torch.linalg.solve(damped(m[keep][:, keep]), m[keep] @ w.cpu().double().T).T.to(w)


def damped(moment):
    """With a little on the diagonal: inputs that never fire must not blow up."""
    return moment + 1e-4 * moment.diagonal().mean().clamp(min=1e-30) * torch.eye(len(moment))


def same_length(what, lists, n):
    """Every layer must keep equally many: one number stands for all of them in the shape."""
    if len(lists) != n or len(set(map(len, lists))) != 1 or not len(lists[0]):
        raise ValueError(f"{what} to keep, {[len(keep) for keep in lists]} a layer: "
                         f"give as many, and at least one, for each of the {n} layers")


def keep_neurons(state, config, neurons, moments=None):
    """
    neurons: for each layer the hidden units of its MLP to keep, equally many. With moments (measure) c_proj is fitted
    anew.
    """
    same_length('neurons', neurons, config.n_layer)
    state = dict(state)
    for i, keep in enumerate(neurons):
        fc, proj = (f'transformer.h.{i}.mlp.{name}' for name in ('c_fc', 'c_proj'))
        state[f'{fc}.weight'] = state[f'{fc}.weight'][keep]
        state[f'{proj}.weight'] = columns(state[f'{proj}.weight'], keep, moments and moments[proj])
    return state, replace(config, n_hidden=len(neurons[0]))


def keep_heads(state, config, heads, moments=None):
    """
    heads: for each layer a list of groups, each a list of query heads of one key/value head; all groups are equally
    long. A key/value head stays if a group of it does: in MHA it goes with its only query head, in MQA it always stays.
    With moments c_proj is fitted anew.
    """
    same_length('groups of heads', heads, config.n_layer)
    g, D = config.n_head // config.n_kv_head, config.head_dim
    if (len({len(group) for groups in heads for group in groups}) != 1
            or any(len({q // g for q in group}) != 1 for groups in heads for group in groups)):
        raise ValueError(f"heads to keep, {heads}: every group must be as long as the others, "
                         f"and its heads of one key/value head ({g} query heads each)")
    state = dict(state)
    rows = lambda heads: [h * D + d for h in heads for d in range(D)]
    for i, groups in enumerate(heads):
        a, q, kv = f'transformer.h.{i}.attn', rows(sum(groups, [])), rows([group[0] // g for group in groups])
        for name, keep in (('c_q', q), ('c_k', kv), ('c_v', kv)):
            state[f'{a}.{name}.weight'] = state[f'{a}.{name}.weight'][keep]
        state[f'{a}.c_proj.weight'] = columns(state[f'{a}.c_proj.weight'], q, moments and moments[f'{a}.c_proj'])
    return state, replace(config, n_head=len(heads[0]) * len(heads[0][0]), n_kv_head=len(heads[0]))


def procrustes(x):
    """
    x (groups, members, ..., d, E), real or complex -> the unitary u (groups, members, ..., d, d) that turn a group's
    members onto their mean.
    """
    mean = x[:, :1]                     # towards the first, then towards the mean, which moves along
    for _ in range(20):
        left, _, right = torch.linalg.svd(mean @ x.mH)
        u = left @ right
        mean = (u @ x).mean(dim=1, keepdim=True)
    return u


MERGE = ('aligned', 'plain', 'first')


def merge_kv_heads(state, config, n_kv_head, moments=None, how='aligned'):
    """
    Averages neighbouring key/value heads until n_kv_head are left (1: MQA), after turning them onto each other
    (arXiv 2412.20677): values by any orthogonal map, undone in c_proj; keys by a rotation inside each of RoPE's planes,
    done to their queries too. Only these commute with RoPE (and all orthogonal maps do with the norm after it), so the
    turn alone changes nothing: heads that are turned copies of one another merge without loss.
    moments: heads are compared by what they give on data instead of by their weights.
    how: aligned; the controls are plain, which averages heads as they are, and first, which lets the first head of a
    group serve all of it.
    """
    n, D, E = config.n_kv_head, config.head_dim, config.n_embd
    if n_kv_head < 1 or n % n_kv_head:
        raise ValueError(f"kv_heads ({n_kv_head}) must divide the {n} key/value heads that there are: "
                         f"try {[k for k in range(1, n + 1) if n % k == 0]}")
    if n_kv_head == n:
        return state, config
    # shape: merged heads, and how many go into each
    state, shape, g = dict(state), (n_kv_head, n // n_kv_head), config.n_head // n
    # (..., D, E) -> (..., D/2, 1, E) complex, since d and d + D/2 are a plane; and back
    plane = lambda x: torch.complex(*x.unflatten(-2, (2, D // 2)).unbind(-3)).unsqueeze(-2)
    real = lambda z: torch.cat((z.real, z.imag), dim=-3).squeeze(-2)
    for i in range(config.n_layer):
        a = f'transformer.h.{i}.attn'
        q, k, v, proj = (state[f'{a}.{name}.weight'].cpu().double() for name in ('c_q', 'c_k', 'c_v', 'c_proj'))
        q, k, v, proj = q.view(*shape, g, D, E), k.view(*shape, D, E), v.view(*shape, D, E), proj.view(E, *shape, g, D)
        if how == 'aligned':
            values, vectors = (torch.linalg.eigh(moments[f'{a}.c_q'].to(q)) if moments
                               else (torch.ones(E).to(q), torch.eye(E).to(q)))
            root = vectors * values.clamp(min=0).sqrt()     # root root^T: the second moment of what the heads read
            # the scale of a head means nothing to keys, which are normed, and can move from values to c_proj: each
            # takes its group's
            size = lambda x: (x @ root).square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=1e-30)
            k_scale, v_scale = (size(x).mean(dim=1, keepdim=True) / size(x) for x in (k, v))
            k, v, proj = k * k_scale, v * v_scale, proj / v_scale
            # turn (n_kv_head, merged, D/2, 1, 1) complex: angles; u (n_kv_head, merged, D, D)
            turn, u = procrustes(plane(k @ root)), procrustes(v @ root)
            q, k, v, proj = real(turn.unsqueeze(2) @ plane(q)), real(turn @ plane(k)), u @ v, proj @ u.mT
        k, v = (x[:, 0] if how == 'first' else x.mean(dim=1) for x in (k, v))       # (n_kv_head, D, E)
        for name, w in (('c_q', q), ('c_k', k), ('c_v', v), ('c_proj', proj)):
            state[f'{a}.{name}.weight'] = w.reshape(E, -1).float() if name == 'c_proj' else w.reshape(-1, E).float()
    return state, replace(config, n_kv_head=n_kv_head)


def over_channels(state, config, read, write):
    """
    A new state dict: write(site, w) in place of every w (n_embd, K) that adds to the residual stream, read(site, w) in
    place of every w (K, n_embd) that reads it or is read into it. site names what w reads, as moments do;
    'transformer.wte' is the table itself.
    """
    # reads embeddings and nothing else, as the second half of the draft cell's c_fc does
    block = 'transformer.h.0.attn.c_q'
    out = {}
    for name, w in state.items():
        site = name.removesuffix('.weight')
        if site.endswith('c_proj'):
            out[name] = write(site, w)
        elif site == 'draft.c_fc':
            state_half, token_half = w.split(config.n_embd, dim=1)
            out[name] = torch.cat((read('lm_head', state_half), read(block, token_half)), dim=1)
        else:
            out[name] = read('lm_head' if site.startswith('multi_token') else
                             site[:-3] + 'c_q' if site.endswith(('c_k', 'c_v')) else site, w)
    return out


def rotate_channels(state, config, q):
    """
    The same network with its residual stream turned by q (n_embd, n_embd), orthogonal: channel j becomes the direction
    q[:, j].
    """
    return over_channels(state, config, lambda site, w: w @ q, lambda site, w: q.T @ w), config


def keep_channels(state, config, channels, moments=None, refit=True):
    """
    channels: the coordinates of the residual stream to keep, for everything that reads or writes it. RMSNorm then
    divides by the rms of what is left: with moments, its measured ratio to the whole's is folded into the matrices that
    read the normed stream, and they are fitted anew if refit. The embedding enters the stream through a norm: its ratio
    goes into all that is added to it, as only proportions count.
    """
    if not len(channels):
        raise ValueError("channels to keep, []: give at least one")
    keep = list(channels)

    def ratio(site):
        power = moments[site].diagonal().contiguous() if moments else torch.ones(config.n_embd)
        return (power[keep].mean() / power.mean()).sqrt().item()

    def read(site, w):
        if site == 'transformer.wte':
            return w[:, keep]
        return columns(w, keep, moments[site] if moments and refit else None) * ratio(site)

    first, last = ratio('transformer.h.0.attn.c_q'), ratio('lm_head')
    out = over_channels(state, config, read,
                        lambda site, w: w[keep] / (first if site.startswith('transformer') else last))
    # the table is normed where it is read as embedding: there the head's factor does no harm
    if config.tie_weights:
        out['transformer.wte.weight'] = out['lm_head.weight'] = state['lm_head.weight'][:, keep] * last
    hidden = {name: round(getattr(config, name) * config.n_embd) / len(keep)
              for name in ('multi_token_hidden_mult', 'draft_hidden_mult')}
    return out, replace(config, n_embd=len(keep), **hidden)


def keep_layers(state, config, layers):
    """layers: the blocks to keep, in this order."""
    if not len(layers) or not set(layers) <= set(range(config.n_layer)):
        raise ValueError(f"layers to keep, {list(layers)}: give some of 0..{config.n_layer - 1}")
    at = 'transformer.h.'
    out = {name: w for name, w in state.items() if not name.startswith(at)}
    for new, old in enumerate(layers):
        out |= {f'{at}{new}.' + name.removeprefix(f'{at}{old}.'): w
                for name, w in state.items() if name.startswith(f'{at}{old}.')}
    return out, replace(config, n_layer=len(layers))


def keep_vocab(state, config, ids):
    """ids: the rows of wte and lm_head to keep; cut_tokenizer chooses them, with the tokenizer that goes with them."""
    names = ('transformer.wte.weight', 'lm_head.weight')
    return state | {name: state[name][ids] for name in names}, replace(config, vocab_size=len(ids))

# -----------------------------------------------------------------------------
# which parts matter, measured on calibration batches

def measure(model, batches, importance='taylor', seed=0):
    """
    -> scores {'neurons': (n_layer, n_hidden), 'heads': (n_layer, n_head), 'channels': (n_embd,), 'layers': (n_layer,)},
    and moments {site: (K, K)}, the mean of x x^T over the calibration tokens, x being what the trunk's matrices and
    lm_head read.

    With 'obs' neurons and heads are scored by elimination_order, which knows that what is left will be fitted anew, and
    everything else by activation. Otherwise a part's score is the sum over all weights that go with it: of |w| ('l1'),
    of |w| times the rms of the input it meets ('activation', as Wanda, arXiv 2306.11695; the trunk's and lm_head's), of
    |w * its gradient| over batches ('taylor', arXiv 1906.10771), or of noise ('random', the control).
    """
    state, config = model.state_dict(keep_vars=True), model.config
    sums, seen, table = {}, 0, {name: torch.zeros_like(w) for name, w in state.items()}

    def add(site, x):
        x = x.detach().flatten(0, -2).float()
        sums[site] = sums.get(site, 0) + x.T @ x

    hooks = [module.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0]))
             for name, module in model.named_modules()
             if name.startswith('transformer.h.') and name.endswith(('c_q', 'c_fc', 'c_proj'))]
    for x, y in batches:
        with torch.set_grad_enabled(importance == 'taylor'):
            states = model.trunk(x)
            add('lm_head', states)
            seen += x.numel()
            if importance == 'taylor':
                model.zero_grad()
                model.cross_entropy(states, y).backward()
                for name, w in state.items():
                    if w.grad is not None:          # this loss does not reach the extra heads
                        table[name] += (w.grad * w).detach().abs()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    moments = {site: m / seen for site, m in sums.items()}
    if importance == 'l1':
        table = {name: w.detach().abs() for name, w in state.items()}
    elif importance == 'random':
        noise = torch.Generator().manual_seed(seed)
        table = {name: torch.rand(w.shape, generator=noise).to(w.device) for name, w in state.items()}
    elif importance in ('activation', 'obs'):
        weigh = lambda site, w: w.detach().abs() * (moments[site].diagonal().sqrt() if site in moments else 0.0)
        table = over_channels(state, config, weigh, weigh)
    scores = {'neurons': [], 'heads': [], 'layers': []}
    for i in range(config.n_layer):
        q, k, v, attn, fc, mlp = (
            table[f'transformer.h.{i}.{name}.weight']
            for name in ('attn.c_q', 'attn.c_k', 'attn.c_v', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'))
        g = config.n_head // config.n_kv_head
        # a key/value head counts for those it serves
        shared = (k + v).view(config.n_kv_head, -1).sum(dim=1).repeat_interleave(g) / g
        scores['heads'].append((q + attn.T).view(config.n_head, -1).sum(dim=1) + shared)
        scores['neurons'].append((fc + mlp.T).sum(dim=1))
        scores['layers'].append(sum(w.sum() for w in (q, k, v, attn, fc, mlp)))
        if importance == 'obs':
            for kind, site, size in (('neurons', 'mlp.c_proj', 1), ('heads', 'attn.c_proj', config.head_dim)):
                site = f'transformer.h.{i}.{site}'
                scores[kind][-1] = elimination_order(state[f'{site}.weight'], moments[site], size).to(fc.device)
    channels = []
    over_channels(table, config,
                  lambda site, w: channels.append(w.sum(dim=0)) or w,
                  lambda site, w: channels.append(w.sum(dim=1)) or w)
    return {kind: torch.stack(s) for kind, s in scores.items()} | {'channels': sum(channels)}, moments


def elimination_order(w, moment, size=1):
    """
    The optimal brain surgeon's order (ZipLM, arXiv 2302.04089). Of the columns of w (rows, K), in groups of size, that
    group goes first without which the others, fitted anew, come nearest to w's output; and so on. moment (K, K): the
    second moment of what w reads. -> (K / size,), the later a group goes the higher. Where there are many, a
    sixty-fourth of them goes at a time.
    """
    w, inverse = w.detach().cpu().double(), torch.linalg.inv(damped(moment.cpu().double()))
    groups = torch.arange(w.size(1)).view(-1, size)                             # (K / size, size)
    order, left = torch.zeros(len(groups)), torch.arange(len(groups))
    while len(left):
        at = groups[left]                                                       # (left, size)
        blocks = inverse[at[:, :, None], at[:, None, :]]                        # (left, size, size)
        parts = w[:, at].permute(1, 2, 0)                                       # (left, size, rows)
        ranked = (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2)).argsort()
        n = max(1, len(groups) // 64)
        order[left[ranked[:n]]] = len(groups) - len(left) + torch.arange(len(ranked[:n])).float()
        gone = at[ranked[:n]].flatten()
        rest = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])        # (gone, K): what makes up for them
        w, inverse = w - w[:, gone] @ rest, inverse - inverse[:, gone] @ rest
        left = left[ranked[n:]].sort().values
    return order


def leave_one_out(model, batches):
    """
    The loss without each layer in turn, (n_layer,) nats: the importance of layers that costs a pass for each and needs
    no theory.
    """
    blocks, losses = model.transformer.h, []
    for skipped in blocks:
        model.transformer.h = torch.nn.ModuleList(block for block in blocks if block is not skipped)
        losses.append(evaluate(model, batches)['loss'])
    model.transformer.h = blocks
    return torch.tensor(losses)


def pick_heads(scores, config, keep):
    """
    scores (n_layer, n_head), keep query heads -> keep_heads' argument: groups stay equal, so it keeps keep heads, or as
    few less as that takes.
    """
    kv = min(config.n_kv_head, keep)                # as long as every key/value head can keep a query head, it stays
    g = keep // kv
    out = []
    for s in scores.view(config.n_layer, config.n_kv_head, -1):
        best, within = s.sort(dim=1, descending=True, stable=True)
        groups = best[:, :g].sum(dim=1).topk(kv).indices.sort().values
        out.append([sorted((n * s.size(1) + within[n, :g]).tolist()) for n in groups])
    return out


def to_principal_axes(model, moments):
    """
    The same model with its residual stream turned so that the channels that its matrices read are uncorrelated, on
    average over sites.
    """
    sites = [m for site, m in moments.items() if not site.endswith('c_proj')]
    q = torch.linalg.eigh(sum(sites).cpu().double())[1].to(sites[0])
    return build(*rotate_channels(model.state_dict(), model.config, q))


def shrink(model, kind, keep, batches, importance='obs', refit=True, rotate=True, seed=0, measured=None):
    """
    The model with only the keep most important of its layers, neurons, heads or channels (of heads maybe fewer:
    pick_heads). batches: a list of (x, y) to measure on. importance as in measure, or for layers 'loss'
    (leave_one_out). measured: what measure gave, if known.
    """
    have = getattr(model.config, KINDS[kind])
    if not 1 <= keep <= have:
        raise ValueError(f"{kind} to keep ({keep}): must be at least 1 and at most the {have} that there are")
    if keep == have:
        return model
    if kind == 'layers' and importance == 'loss':
        scores, moments = {'layers': leave_one_out(model, batches)}, None
    else:
        scores, moments = measured or measure(model, batches, importance, seed)
    if kind == 'channels' and rotate:
        model = to_principal_axes(model, moments)
        scores, moments = measure(model, batches, importance, seed)
    state, config, fit = model.state_dict(), model.config, moments if refit else None
    top = lambda s: s.topk(keep).indices.sort().values.tolist()
    if kind == 'layers':
        return build(*keep_layers(state, config, top(scores['layers'])))
    if kind == 'neurons':
        return build(*keep_neurons(state, config, [top(s) for s in scores['neurons']], fit))
    if kind == 'heads':
        return build(*keep_heads(state, config, pick_heads(scores['heads'], config, keep), fit))
    return build(*keep_channels(state, config, top(scores['channels']), moments, refit))


def cut_to(model, target, batches, importance='obs', seed=0, **how):
    """
    Cuts until at most target parameters are left. Again and again an eighth of the neurons, an eighth of the channels,
    a head of each group or a layer goes: whichever costs the least loss on batches for a parameter that is still in the
    way. how: shrink's further arguments. Yields (kind, how many of it are left, the loss now, the model) after each
    cut; nothing if the model is small enough.
    """
    loss = evaluate(model, batches)['loss']
    while (n := model.params()['total']) > target:
        measured, options = measure(model, batches, importance, seed), []
        for kind, field in KINDS.items():
            have, kv = getattr(model.config, field), model.config.n_kv_head
            step = {'layers': 1, 'heads': kv if have > kv else 1}.get(kind, max(1, have // 8))
            if have == step:
                continue
            ours = how | {'seed': seed} | ({'importance': 'loss'} if kind == 'layers' else
                                           {'importance': importance, 'measured': measured})
            smaller = shrink(model, kind, have - step, batches, **ours)
            # the parameters are linear in both of these: cut no more than is needed
            if kind in ('neurons', 'channels') and smaller.params()['total'] < target:
                needed = math.ceil(step * (n - target) / (n - smaller.params()['total']))
                smaller = shrink(model, kind, have - needed, batches, **ours)
            after = evaluate(smaller, batches)['loss']
            options.append(((after - loss) / min(n - smaller.params()['total'], n - target), kind, after, smaller))
        if not options:
            raise ValueError(f"keep_params: the smallest shape with this vocabulary has {n:,} parameters, more than "
                             f"the {int(target):,} to keep: keep more, or cut the vocabulary too")
        _, kind, loss, model = min(options, key=lambda option: option[0])
        yield kind, getattr(model.config, KINDS[kind]), loss, model

# -----------------------------------------------------------------------------
# the script

if __name__ == '__main__':
    from data.loader import Loader, data_of, load_meta, write_dataset
    from data.tokenizer import cut_tokenizer, recode
    from engine import Engine
    # -------------------------------------------------------------------------
    out_dir = 'out-quickstart'      # where train.py left best.pt
    weights = 'best.pt'             # the float checkpoint in out_dir
    save_dir = ''                   # empty: out_dir with -pruned behind it
    dataset = ''                    # a folder under data/ to measure on; empty: the one the model was trained on
    # what goes; the order is this one
    vocab_keep = 0                  # tokens to keep, the most frequent ones; 0: all. Writes the dataset again in them, data/NAME_vN
    layers = None                   # how many to keep, or which: 0,1,3
    channel_prune_ratio = 0.0       # share of the residual stream, n_embd
    neuron_prune_ratio = 0.0        # share of each MLP's hidden units
    head_prune_ratio = 0.0          # share of query heads; where each has its own key/value head, that goes too
    kv_heads = 0                    # key/value heads to merge down to: 1 is MQA; 0: leave them
    keep_params = 1.0               # go on until this share of the parameters is left, cutting whatever costs least
    # how
    importance = 'obs'              # obs, taylor, activation, l1, random
    kv_merge = 'aligned'            # how kv_heads merges: aligned; to compare, plain (averaged as they are) or first (a group's first head serves it)
    layer_importance = 'loss'       # as above, or loss: leave each layer out in turn
    refit = True                    # fit what is left by least squares to what the whole gave
    rotate = True                   # principal axes before channels are cut
    calibration_batches = 8         # of 16 windows from the training split
    seed = 1337
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    exec(open('configurator.py').read())
    # -------------------------------------------------------------------------
    check_knobs(config, ('neuron_prune_ratio head_prune_ratio channel_prune_ratio', float, 0, 0.99),
                ('keep_params', float, 0.01, 1), ('vocab_keep kv_heads', int, 0, math.inf), ('seed', int, 0, 2**63 - 1),
                ('calibration_batches', int, 1, math.inf), ('importance', IMPORTANCE), ('kv_merge', MERGE),
                ('layer_importance', ('loss', *IMPORTANCE)))
    if layers is not None and not re.fullmatch(r'\d+(,\d+)*,?', str(layers)):
        raise SystemExit(f"error: layers ({layers}) must be how many to keep, like 2, or which, like 0,2,3")
    source, path = os.path.join(out_dir, weights), os.path.join(save_dir or out_dir.rstrip('/') + '-pruned', 'best.pt')
    if os.path.realpath(source) == os.path.realpath(path):
        raise SystemExit(f"error: save_dir ({save_dir}) would replace {source}, which is pruned here: "
                         "give another folder")
    check_device(device)
    model, state = load_model(source, device)
    data_name = dataset or state['dataset']
    data_dir, tokenizer = data_of(state, out_dir, dataset)

    whole, old, old_dir, knobs = model, tokenizer, data_dir, state.get('knobs', {})
    how = dict(importance=importance, refit=refit, rotate=rotate, seed=seed)
    try:
        if vocab_keep:
            if load_meta(data_dir)['kind'] == 'chat':
                raise ValueError(f"vocab_keep ({vocab_keep}): {data_dir} is a chat dataset, whose masks belong to its "
                                 "tokens: cut the vocabulary before chat fine-tuning")
            train, val = (Loader(data_dir, split, 1, 1) for split in ('train', 'val'))
            ids, tokenizer = cut_tokenizer(
                tokenizer, np.bincount(train.tokens, minlength=tokenizer.vocab_size), vocab_keep)
            data_name, data_dir = (f'{name}_v{vocab_keep}' for name in (data_name, data_dir))
            write_dataset(data_dir, tokenizer, *(recode(split.tokens, old, tokenizer) for split in (train, val)),
                          source=train.meta['source'])
            model = build(*keep_vocab(model.state_dict(), model.config, ids))
            print(f"in {old_dir} it was {train.n_tokens:,} and {val.n_tokens:,} tokens"
                  + ('; characters that have no token any more are left out' if old.kind == 'char' else ''))
        # what the model was trained to leave out, it must not see here, either
        fold = knobs.get('hold_out', '') if data_name == state['dataset'] else ''
        loader = Loader(data_dir, 'train', 16, model.config.block_size, seed, device=device, hold_out=fold)
        batches = [loader.batch(step) for step in range(calibration_batches)]
        if ',' in str(layers):
            model = build(*keep_layers(model.state_dict(), model.config,
                                       [int(i) for i in layers.strip(',').split(',')]))
        elif layers is not None:
            model = shrink(model, 'layers', int(layers), batches, layer_importance, seed=seed)
        for kind, ratio in (('channels', channel_prune_ratio), ('neurons', neuron_prune_ratio),
                            ('heads', head_prune_ratio)):
            have = getattr(model.config, KINDS[kind])
            model = shrink(model, kind, max(1, round(have * (1 - ratio))), batches, **how)
        if kv_heads:
            moments = measure(model, batches, 'l1')[1]
            model = build(*merge_kv_heads(model.state_dict(), model.config, kv_heads, moments, kv_merge))
        for kind, left, loss, model in cut_to(model, keep_params * whole.params()['total'], batches, **how):
            print(f"{left} {kind} left: {model.params()['total']:,} parameters, "
                  f"loss on the calibration batches {loss:.4f}", flush=True)
    except ValueError as e:
        raise SystemExit(f'error: {e}')
    # quant_bits 0: what is left, refitted, was not trained through the rounding
    save_checkpoint(path, model, tokenizer.meta(), step=0, dataset=data_name,
                    knobs=knobs | {'quant_bits': 0, 'hold_out': fold})
    model = load_model(path, device)[0]     # what is measured is the file
    sides = (whole, source, old_dir, old), (model, path, data_dir, tokenizer)
    speeds, result = ([], []), {'file': path}
    for turn in range(3):                   # interleaved; the fastest of each counts: neighbours can only slow it down
        for (side, *_), seen in zip(sides, speeds):
            engine, n = Engine(side), min(100, side.config.block_size)
            engine.complete([[0]], n, temperature=0.8, seed=seed)
            seen.append(n / engine.stats['seconds'])
    for when, (side, file, folder, tokens), seen in zip(('before', 'after'), sides, speeds):
        validation = Loader(folder, 'val', 16, side.config.block_size, device=device).eval_batches()
        measured = evaluate(side, validation, tokens.token_bytes)
        result |= {f'val_loss_{when}': measured['loss'], f'bpb_{when}': measured['bpb'],
                   f'params_{when}': side.params()['total'], f'bytes_{when}': os.path.getsize(file),
                   f'kv_bytes_per_token_{when}': side.kv_bytes_per_token(), f'tok_s_{when}': max(seen)}
        print(f'{when}:'.ljust(7), ', '.join(f'{name} {getattr(side.config, name)}' for name in (
            'n_layer', 'n_embd', 'n_head', 'n_kv_head', 'n_hidden', 'vocab_size')))
    print(f"{'':36}{'before':>14}{'after':>14}")
    for key, label, digits in (('val_loss', 'loss, nats a token', 4), ('bpb', 'bits per byte', 4),
                               ('params', 'parameters', 0), ('bytes', 'bytes of file', 0),
                               ('kv_bytes_per_token', 'bytes of cache a token (float32)', 0),
                               ('tok_s', 'tokens/s, one sequence', 0)):
        print(f"{label:36}{result[f'{key}_before']:14,.{digits}f}{result[f'{key}_after']:14,.{digits}f}")
    # half a teacher recovered more at the usual rates (README); that 0.2 nats are little is a guess
    little = result['val_loss_after'] - result['val_loss_before'] < 0.2 and knobs.get('init_from') == 'scratch'
    rates = ''.join(f' --{rate}={knobs[rate] / (5 if little else 1):g}'
                    for rate in ('muon_lr', 'adam_lr') if rate in knobs)
    print(f"go on with {'a fifth of ' if little else ''}the rates that it was trained with: "
          f"python train.py --init_from={path} --out_dir={os.path.dirname(path)}-recovered --dataset={data_name} "
          f"--block_size={model.config.block_size}{rates}"
          + (f' --hold_out={fold}' if fold else '' if vocab_keep else f' --teacher={out_dir}'))
    if vocab_keep:
        print('the whole model cannot teach this one, which has other tokens: distil first, then cut the vocabulary')
    print(json.dumps(result | {'bytes': result['bytes_after'], 'shape': asdict(model.config)}))
