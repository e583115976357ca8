"""
Cuts and turns models: functions from a state dict and its GPTConfig to a new state dict and config, and build, which
makes a model of them. A library: prune.py decides what to keep, data/balance.py turns models before they are rounded.

    state, config = keep_neurons(model.state_dict(), model.config, [[0, 2], [1, 3]])    # of each layer, which to keep
    model = build(state, config)
"""
from dataclasses import replace

import torch

from data.checkpoint import with_weights

FIRST = 'transformer.h.0.attn.c_q'      # reads normed embeddings and nothing else
# names that over_channels has for what no moments are measured of: the tables, and readers of embeddings without a norm
TABLE, EMBEDDING = 'transformer.wte', 'embedding'
C_OUT = 'transformer.c_out.weight'
MERGE = ('aligned', 'plain', 'first')   # how merge_kv_heads averages


def build(state, config):
    """
    A state dict and its GPTConfig -> the model, in eval mode, on the state's device, with weights of its own. Empties
    the dict as it goes, so that tensors which nobody else holds are never in memory twice.
    """
    if config.tie_weights:
        del state['lm_head.weight']
    weights = {name: state.pop(name).detach().clone() for name in [*state]}
    return with_weights(config, weights, weights['transformer.wte.weight'].device)

# -----------------------------------------------------------------------------
# indices -> a new state dict and shape

def columns(w, keep, moment=None):
    """
    w (rows, K) -> its columns keep, (rows, len(keep)). With the second moment (K, K) of w's inputs these are refitted
    by least squares, so that they give from the remaining inputs what w gave from all, as nearly as possible.
    """
    if moment is None or len(keep) == w.size(1):
        return w[:, keep]
    moment, keep = moment.cpu().double(), torch.as_tensor(keep)
    wanted = moment[keep] @ w.cpu().double().T                                  # (len(keep), rows)
    return torch.linalg.solve(damped(moment[keep][:, keep]), wanted).T.to(w)


def damped(moment):
    """moment with a little added to its diagonal, so that inputs which are always zero do not make it singular."""
    little = 1e-4 * moment.diagonal().mean().clamp(min=1e-30)
    return moment + little * torch.eye(len(moment))


def same_length(what, lists, n):
    """ValueError unless all layers keep equally many: GPTConfig has one number for all of them."""
    lengths = [len(keep) for keep in lists]
    if len(lengths) != n or len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"{what} to keep, {lengths} a layer: "
                         f"give as many, and at least one, for each of the {n} layers")


def keep_neurons(state, config, neurons, moments=None):
    """
    neurons: for each layer the hidden units of its MLP to keep, equally many. With moments (prune.measure) c_proj is
    refitted.
    """
    same_length('neurons', neurons, config.n_layer)
    if config.hadamard:
        raise ValueError(f"neurons are turned together (hadamard={config.hadamard}), and none can go by itself: "
                         "cut the model as it was before it was balanced")
    state = dict(state)
    for i, keep in enumerate(neurons):
        proj = f'transformer.h.{i}.mlp.c_proj'
        for name in ('c_gate', 'c_fc'):
            fc = f'transformer.h.{i}.mlp.{name}.weight'
            if fc in state:                     # c_gate is a SwiGLU's
                state[fc] = state[fc][keep]
        state[f'{proj}.weight'] = columns(state[f'{proj}.weight'], keep, moments and moments[proj])
    return state, replace(config, n_hidden=len(neurons[0]))


def keep_heads(state, config, heads, moments=None):
    """
    heads: for each layer a list of groups; a group is a list of query heads that share a key/value head, and all groups
    are equally long. A key/value head stays if a group of it does: in MHA it goes with its only query head, in MQA it
    always stays. With moments c_proj is refitted.
    """
    same_length('groups of heads', heads, config.n_layer)
    g, D = config.n_head // config.n_kv_head, config.head_dim
    all_groups = [group for groups in heads for group in groups]
    one_length = len({len(group) for group in all_groups}) == 1
    if not one_length or any(len({q // g for q in group}) != 1 for group in all_groups):
        raise ValueError(f"heads to keep, {heads}: every group must be as long as the others, "
                         f"and its heads of one key/value head ({g} query heads each)")
    state = dict(state)
    for i, groups in enumerate(heads):
        q = [h * D + d for group in groups for h in group for d in range(D)]    # the rows of these query heads
        kv = [group[0] // g * D + d for group in groups for d in range(D)]      # and of their key/value heads
        for name, keep in (('c_q', q), ('c_k', kv), ('c_v', kv)):
            w = f'transformer.h.{i}.attn.{name}.weight'
            state[w] = state[w][keep]
        proj = f'transformer.h.{i}.attn.c_proj'
        state[f'{proj}.weight'] = columns(state[f'{proj}.weight'], q, moments and moments[proj])
    return state, replace(config, n_head=len(heads[0]) * len(heads[0][0]), n_kv_head=len(heads[0]))


def merge_kv_heads(state, config, n_kv_head, moments=None, how='aligned'):
    """
    Averages neighbouring key/value heads until n_kv_head are left (1: MQA), after they have been turned onto each other
    (align, arXiv 2412.20677). With moments, heads are compared by their outputs on data instead of by their weights.
    how: 'aligned'. Controls: 'plain' averages heads without turning them; 'first' keeps the first head of each group.
    """
    n, D, E = config.n_kv_head, config.head_dim, config.n_embd
    if n_kv_head < 1 or n % n_kv_head:
        raise ValueError(f"kv_heads ({n_kv_head}) must divide the {n} key/value heads that there are: "
                         f"try {[k for k in range(1, n + 1) if n % k == 0]}")
    if n_kv_head == n:
        return state, config
    state = dict(state)
    groups, members, g = n_kv_head, n // n_kv_head, config.n_head // n
    for i in range(config.n_layer):
        at = f'transformer.h.{i}.attn.'
        q, k, v, proj = (state[f'{at}{name}.weight'].cpu().double() for name in ('c_q', 'c_k', 'c_v', 'c_proj'))
        q = q.view(groups, members, g, D, E)
        k = k.view(groups, members, D, E)
        v = v.view(groups, members, D, E)
        proj = proj.view(E, groups, members, g, D)
        if how == 'aligned':
            moment = moments and moments[f'{at}c_q'].to(q)
            q, k, v, proj = align(q, k, v, proj, moment, config.qk_norm)
        if how == 'first':
            k, v = k[:, 0], v[:, 0]
        else:
            k, v = k.mean(dim=1), v.mean(dim=1)                                 # (groups, D, E)
        for name, w in (('c_q', q), ('c_k', k), ('c_v', v)):
            state[f'{at}{name}.weight'] = w.reshape(-1, E).float()
        state[f'{at}c_proj.weight'] = proj.reshape(E, -1).float()
    return state, replace(config, n_kv_head=n_kv_head)


def align(q, k, v, proj, moment, qk_norm=True):
    """
    Turns the key/value heads of a group onto each other without changing what attention computes: values by any
    orthogonal map, which is undone in c_proj; keys by a rotation inside each of RoPE's planes, which their queries get,
    too (only such rotations commute with RoPE; all orthogonal maps commute with the norm after it). Heads that are
    turned copies of one another then merge without loss.
    q (groups, members, g, D, E), k and v (groups, members, D, E), proj (E, groups, members, g, D), all float64;
    moment (E, E), the second moment of what the heads read, or None: all directions count alike.
    """
    root = torch.eye(q.size(-1)).to(q)                                          # root root^T is the moment
    if moment is not None:
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * values.clamp(min=0).sqrt()

    def size(x):
        return (x @ root).square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=1e-30)
    # Heads of a group also get one size. Keys that are normed have none; that of other keys moves to their queries, and
    # that of values to c_proj.
    k_scale = size(k).mean(dim=1, keepdim=True) / size(k)                       # (groups, members, 1, 1)
    v_scale = size(v).mean(dim=1, keepdim=True) / size(v)
    k, v, proj = k * k_scale, v * v_scale, proj / v_scale
    if not qk_norm:
        q = q / k_scale.unsqueeze(2)
    turn = procrustes(planes(k @ root))                                         # (groups, members, D/2, 1, 1) complex
    u = procrustes(v @ root)                                                    # (groups, members, D, D)
    q = from_planes(turn.unsqueeze(2) @ planes(q))
    k = from_planes(turn @ planes(k))
    return q, k, u @ v, proj @ u.mT


def planes(x):
    """(..., D, E) -> (..., D/2, 1, E) complex: RoPE turns the plane of d and d + D/2."""
    first, second = x.unflatten(-2, (2, x.size(-2) // 2)).unbind(-3)
    return torch.complex(first, second).unsqueeze(-2)


def from_planes(z):
    return torch.cat((z.real, z.imag), dim=-3).squeeze(-2)


def procrustes(x):
    """
    x (groups, members, ..., d, E), real or complex -> unitary u (groups, members, ..., d, d) that turn the members of
    each group onto their mean (the orthogonal Procrustes problem).
    """
    mean = x[:, :1]                     # first onto the first member, then onto the mean of the turned ones
    for _ in range(20):
        left, _, right = torch.linalg.svd(mean @ x.mH)
        u = left @ right
        mean = (u @ x).mean(dim=1, keepdim=True)
    return u


def over_channels(state, config, read, write):
    """
    A new state dict, in which every matrix w (n_embd, K) that adds to the residual stream is replaced by write(site, w)
    and every w (K, n_embd) that reads the stream, or is a table of embeddings, by read(site, w). site says what w
    reads, by the names that moments have.
    """
    out = {}
    for name, w in state.items():
        site = name.removesuffix('.weight')
        if site.endswith('c_proj'):
            out[name] = write(site, w)
        elif site == 'transformer.c_out':       # the table reads what c_out writes
            out[name] = write(site, read('lm_head', w))
        elif site == 'lm_head' and config.out_proj:
            out[name] = read(TABLE, w)
        elif site == 'draft.c_fc':      # the state that lm_head reads, and an embedding as the first block reads it
            state_half, token_half = w.split(config.n_embd, dim=1)
            token_half = read(FIRST if config.embed_norm else EMBEDDING, token_half)
            out[name] = torch.cat((read('lm_head', state_half), token_half), dim=1)
        elif site.startswith('multi_token'):
            out[name] = read('lm_head', w)
        elif site.endswith(('c_k', 'c_v')):
            out[name] = read(site[:-3] + 'c_q', w)
        elif site.endswith('c_gate'):
            out[name] = read(site[:-6] + 'c_fc', w)
        else:
            out[name] = read(site, w)
    return out


def rotate_channels(state, config, q):
    """
    The same network with its residual stream turned by an orthogonal q (n_embd, n_embd): the new channel j is the old
    direction q[:, j].
    """
    return over_channels(state, config, lambda site, w: w @ q, lambda site, w: q.T @ w), config


def keep_channels(state, config, channels, moments=None, refit=True):
    """
    channels: the channels of the residual stream to keep, in everything that reads or writes it. RMSNorm then divides
    by the rms of the remaining channels. With moments, the measured ratio of that rms to the old one is folded into the
    matrices that read the normed stream, and with refit they are refitted. If embeddings are normed before they enter
    the stream, the ratio of that norm goes into all that is added later, as only proportions matter.
    """
    if not len(channels):
        raise ValueError("channels to keep, []: give at least one")
    keep = list(channels)
    if keep == list(range(config.n_embd)):
        return state, config
    if config.out_proj:                         # lm_head reads x + c_out(x): cut the matrix of both, 1 + c_out
        state = state | {C_OUT: state[C_OUT] + torch.eye(config.n_embd).to(state[C_OUT])}

    def ratio(site):
        power = moments[site].diagonal().contiguous() if moments else torch.ones(config.n_embd)
        return (power[keep].mean() / power.mean()).sqrt().item()

    def read(site, w):
        if site == TABLE:
            return w[:, keep]
        if site == EMBEDDING:
            return columns(w, keep, moments[FIRST] if moments and refit else None) / table
        return columns(w, keep, moments[site] if moments and refit else None) * ratio(site)

    def write(site, w):
        if site == 'transformer.c_out':
            return fit_to_table(w, state['lm_head.weight'], keep) if refit else w[keep]
        return w[keep] * stream if site.startswith('transformer') else w[keep] / last

    first, last = ratio(FIRST), ratio('lm_head')
    # A tied table gets lm_head's factor. As the embedding it may have any factor if embeddings are normed; if not, all
    # that is added to the stream must get the same one.
    table = last if config.tie_weights and not config.out_proj else 1.0
    stream = 1 / first if config.embed_norm else table
    out = over_channels(state, config, read, write)
    if config.out_proj:
        out[C_OUT] = out[C_OUT] - torch.eye(len(keep)).to(out[C_OUT])
    if config.tie_weights:
        out['transformer.wte.weight'] = out['lm_head.weight'] = state['lm_head.weight'][:, keep] * table
    hidden = {name: round(getattr(config, name) * config.n_embd) / len(keep)
              for name in ('multi_token_hidden_mult', 'draft_hidden_mult')}
    # fewer channels hold nearly all of the stream's power, so their mean square is larger, and eps must grow with it
    eps = config.norm_eps * config.n_embd / len(keep) * stream ** 2
    return out, replace(config, n_embd=len(keep), norm_eps=eps, **hidden)


def fit_to_table(c_out, table, keep):
    """
    c_out (n_embd, left), table (vocab_size, n_embd) -> c_out for the columns of the table that are kept, (left, left):
    their product is, by least squares, that of the whole table and the whole c_out.
    """
    left = table[:, keep].double()
    return torch.linalg.solve(damped(left.T @ left), left.T @ (table.double() @ c_out.double())).to(c_out)


def keep_layers(state, config, layers):
    """layers: the blocks to keep, in this order."""
    if not len(layers) or not set(layers) <= set(range(config.n_layer)):
        raise ValueError(f"layers to keep, {list(layers)}: give some of 0..{config.n_layer - 1}")
    at = 'transformer.h.'
    out = {name: w for name, w in state.items() if not name.startswith(at)}
    for new, old in enumerate(layers):
        for name, w in state.items():
            if name.startswith(f'{at}{old}.'):
                out[f'{at}{new}.' + name.removeprefix(f'{at}{old}.')] = w
    return out, replace(config, n_layer=len(layers))


def keep_vocab(state, config, ids):
    """ids: the rows of wte and lm_head to keep. vocabulary.cut_tokenizer chooses them and makes the tokenizer."""
    names = ('transformer.wte.weight', 'lm_head.weight')
    # a draft head then chooses among those of its tokens that are kept
    few = sum(i < config.draft_vocab for i in ids)
    assert few or not config.draft_vocab, (
        f"none of the {len(ids)} tokens is among the first {config.draft_vocab}, which the draft head knows: keep more")
    return state | {name: state[name][ids] for name in names}, replace(config, vocab_size=len(ids), draft_vocab=few)
