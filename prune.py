"""
Structured pruning: makes a smaller model from a trained one by removing attention heads, key/value heads, neurons,
channels, layers or tokens. What is left keeps its weights.

    python prune.py --out_dir=out-quickstart --neuron_prune_ratio=0.5       # -> out-quickstart-pruned/best.pt
    python prune.py --out_dir=out-quickstart --keep_params=0.5              # splits the cut by what each kind costs
    python train.py config/quickstart.py --init_from=out-quickstart-pruned/best.pt --out_dir=out-quickstart-recovered

You will see the loss, the size and the speed before and after, then one line of JSON. This file decides which parts to
keep; data/slicing.py makes the new state dict and shape.

Three things make a cut cheap before any retraining:
- refit: the weights that are left are refitted by least squares, to give what the whole matrix gave.
- rotate: before channels are removed, the residual stream is turned onto its principal axes. That by itself changes
  nothing, since a norm without weights commutes with a rotation (SliceGPT, arXiv 2401.15024).
- elimination_order: neurons are removed in an order that takes the refit into account.
"""
import math
import os
import re
import shlex
from dataclasses import asdict

import numpy as np
import torch

from data.checkpoint import load_model, save_checkpoint, will_replace
from data.files import hold, in_repo, json_line
from data.loader import Loader, data_of, dataset_of, load_meta, progress, validation, without_text
from data.machine import autocast, keep_memory, pick_device, pick_dtype
from data.record import end_if_made, record
from data.slicing import (MERGE, build, damped, keep_channels, keep_heads, keep_layers, keep_neurons, keep_vocab,
                          merge_kv_heads, over_channels, rotate_channels)
from data.tokenizer import from_meta
from data.vocabulary import cut_tokenizer, recode
from data.writer import write_dataset
from engine import Engine, Sampling
from model import evaluate

IMPORTANCE = ('obs', 'taylor', 'activation', 'l1', 'random')
BY_WEIGHTS = ('l1', 'random')           # these need no text to measure on
# what shrink cuts -> the field of GPTConfig with its number
KINDS = {'layers': 'n_layer', 'neurons': 'n_hidden', 'heads': 'n_head', 'channels': 'n_embd'}

# -----------------------------------------------------------------------------
# which parts matter, measured on calibration batches

def measure(model, batches, importance='taylor', seed=0, kinds=('neurons', 'heads')):
    """
    -> scores {'neurons': (n_layer, n_hidden), 'heads': (n_layer, n_head), 'channels': (n_embd,), 'layers': (n_layer,)},
    and moments {site: (K, K)}, the mean of x x^T over the calibration tokens, where x is what a matrix of the trunk or
    lm_head reads.

    'obs': neurons and heads (those in kinds) are scored by elimination_order, which takes the refit into account, all
    else by 'activation'. With the other importances a part's score is a sum over all weights that would be removed with
    it: of |w| ('l1'), of |w| times the rms of its input ('activation', as Wanda, arXiv 2306.11695; only of the trunk's
    and lm_head's weights), of |w * its gradient| over batches ('taylor', arXiv 1906.10771), or of noise ('random', the
    control).
    """
    state = model.state_dict(keep_vars=True)
    moments, taylor = calibrate(model, batches, importance == 'taylor')

    def times_rms(site, w):
        if site == 'transformer.c_out':         # its columns were multiplied when read was applied to it
            return w.detach().abs()
        return w.detach().abs() * (moments[site].diagonal().sqrt() if site in moments else 0.0)

    if importance == 'taylor':
        table = taylor
    elif importance == 'l1':
        table = {name: w.detach().abs() for name, w in state.items()}
    elif importance == 'random':
        noise = torch.Generator().manual_seed(seed)
        table = {name: torch.rand(w.shape, generator=noise).to(w.device) for name, w in state.items()}
    else:
        table = over_channels(state, model.config, times_rms, times_rms)
    scores = sums_over_parts(table, model.config)
    if importance == 'obs':
        for kind, part, size in (('neurons', 'mlp', 1), ('heads', 'attn', model.config.head_dim)):
            if kind not in kinds:
                continue
            sites = [f'transformer.h.{i}.{part}.c_proj' for i in range(model.config.n_layer)]
            orders = [elimination_order(state[f'{site}.weight'], moments[site], size)
                      for site in progress(sites, len(sites), f'layers whose {kind} have been scored')]
            scores[kind] = torch.stack(orders).to(scores[kind].device)
    return scores, moments


def calibrate(model, batches, gradients=False):
    """
    Runs the model over batches -> moments, as measure gives them; and with gradients=True {name of a weight: sum of
    |w * its gradient| over batches}.
    """
    sums, seen = {}, 0
    state = model.state_dict(keep_vars=True)
    taylor = {name: torch.zeros_like(w) for name, w in state.items()} if gradients else None

    def add(site, x):
        x = x.detach().flatten(0, -2).float()
        sums[site] = sums.get(site, 0) + x.T @ x

    hooks = [module.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0]))
             for name, module in model.named_modules()
             if name.startswith('transformer.h.') and name.endswith(('c_q', 'c_fc', 'c_proj'))]
    for x, y in progress(batches, len(batches), 'calibration batches'):
        with torch.set_grad_enabled(gradients):
            states = model.trunk(x)
            add('lm_head', states)
            seen += x.numel()
            if gradients:
                model.zero_grad()
                model.cross_entropy(states, y).backward()
                for name, w in state.items():
                    if w.grad is not None:          # the extra heads get no gradient from this loss
                        taylor[name] += (w.grad * w).detach().abs()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return {site: m / seen for site, m in sums.items()}, taylor


def sums_over_parts(table, config):
    """table {name of a weight: a score for each of its numbers} -> scores of parts, as measure gives them."""
    neurons, heads, layers, channels = [], [], [], []
    g = config.n_head // config.n_kv_head
    for i in range(config.n_layer):
        names = ('attn.c_q', 'attn.c_k', 'attn.c_v', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')
        q, k, v, attn, fc, mlp = parts = [table[f'transformer.h.{i}.{name}.weight'] for name in names]
        gate = table.get(f'transformer.h.{i}.mlp.c_gate.weight')
        if gate is not None:
            fc = fc + gate
            parts.append(gate)
        # the score of a key/value head is shared out among the query heads that it serves
        shared = (k + v).view(config.n_kv_head, -1).sum(dim=1).repeat_interleave(g) / g
        heads.append((q + attn.T).view(config.n_head, -1).sum(dim=1) + shared)
        neurons.append((fc + mlp.T).sum(dim=1))
        layers.append(sum(w.sum() for w in parts))

    def sums_over(dim):
        def add(site, w):
            channels.append(w.sum(dim=dim))
            return w
        return add

    over_channels(table, config, sums_over(0), sums_over(1))
    return {'neurons': torch.stack(neurons), 'heads': torch.stack(heads), 'layers': torch.stack(layers),
            'channels': sum(channels)}


def elimination_order(w, moment, size=1):
    """
    The optimal brain surgeon's order (ZipLM, arXiv 2302.04089): repeatedly removes the group of columns that the
    others, refitted, can best make up for. w (rows, K), whose columns form groups of `size`; moment (K, K): the second
    moment of what w reads. -> a score for each group, (K / size,), higher for those removed later. If there are many
    groups, a sixty-fourth of them is removed at a time.
    """
    w, inverse = w.detach().cpu().double(), torch.linalg.inv(damped(moment.cpu().double()))
    groups = torch.arange(w.size(1)).view(-1, size)                             # (K / size, size)
    order, left = torch.zeros(len(groups)), torch.arange(len(groups))
    while len(left):
        at = groups[left]                                                       # (left, size)
        blocks = inverse[at[:, :, None], at[:, None, :]]                        # (left, size, size)
        parts = w[:, at].permute(1, 2, 0)                                       # (left, size, rows)
        # a division for single columns: LAPACK takes up to thirty times as long over so many tiny systems
        changes = parts / blocks if size == 1 else torch.linalg.solve(blocks, parts)
        ranked = (parts * changes).sum(dim=(1, 2)).argsort()
        n = max(1, len(groups) // 64)
        order[left[ranked[:n]]] = len(groups) - len(left) + torch.arange(len(ranked[:n])).float()
        gone = at[ranked[:n]].flatten()
        rest = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])        # (gone, K): how the others change
        w, inverse = w - w[:, gone] @ rest, inverse - inverse[:, gone] @ rest
        left = left[ranked[n:]].sort().values
    return order


def leave_one_out(model, batches):
    """
    The loss without each layer in turn, (n_layer,) nats: the simplest importance of layers, which costs a pass over
    batches for each. In bfloat16 if the device multiplies that faster.
    """
    blocks, losses = model.transformer.h, []
    for skipped in progress(blocks, len(blocks), 'layers left out in turn'):
        model.transformer.h = torch.nn.ModuleList(block for block in blocks if block is not skipped)
        with autocast(model.cos.device, pick_dtype('auto', model.cos.device)):
            losses.append(evaluate(model, batches)['loss'])
    model.transformer.h = blocks
    return torch.tensor(losses)


def pick_heads(scores, config, keep):
    """
    scores (n_layer, n_head), how many query heads to keep -> the argument of keep_heads. All key/value heads must serve
    equally many query heads, so there may be fewer than keep.
    """
    kv = min(config.n_kv_head, keep)                # key/value heads are removed only if there are too few query heads
    g = keep // kv
    out = []
    for s in scores.view(config.n_layer, config.n_kv_head, -1):
        best, within = s.sort(dim=1, descending=True, stable=True)
        groups = best[:, :g].sum(dim=1).topk(kv).indices.sort().values
        members = [n * s.size(1) + within[n, :g] for n in groups]
        out.append([sorted(heads.tolist()) for heads in members])
    return out


def to_principal_axes(model, moments):
    """
    The same model with its residual stream turned onto its principal axes: the channels that its matrices read become
    uncorrelated, on average over the matrices.
    """
    sites = [m for site, m in moments.items() if not site.endswith('c_proj')]
    q = torch.linalg.eigh(sum(sites).cpu().double())[1].to(sites[0])
    return build(*rotate_channels(model.state_dict(), model.config, q))


def shrink(model, kind, keep, batches, importance='obs', refit=True, rotate=True, seed=0, measured=None):
    """
    The model with only the `keep` most important of its layers, neurons, heads (or fewer, see pick_heads) or channels.
    batches: a list of (x, y) to measure on; importance: see measure, and 'loss' for layers (leave_one_out); measured:
    what measure returned, if it was called already.
    """
    have = getattr(model.config, KINDS[kind])
    if not 1 <= keep <= have:
        raise ValueError(f"{kind} to keep ({keep}): must be at least 1 and at most the {have} that there are")
    if keep == have:
        return model
    if kind == 'layers' and importance == 'loss':
        scores, moments = {'layers': leave_one_out(model, batches)}, None
    else:
        scores, moments = measured or measure(model, batches, importance, seed, [kind])
    if kind == 'channels' and rotate:
        model = to_principal_axes(model, moments)
        scores, moments = measure(model, batches, importance, seed, [kind])
    state, config, fit = model.state_dict(), model.config, moments if refit else None

    def top(s):
        return s.topk(keep).indices.sort().values.tolist()
    if kind == 'layers':
        return build(*keep_layers(state, config, top(scores['layers'])))
    if kind == 'neurons':
        return build(*keep_neurons(state, config, [top(s) for s in scores['neurons']], fit))
    if kind == 'heads':
        return build(*keep_heads(state, config, pick_heads(scores['heads'], config, keep), fit))
    return build(*keep_channels(state, config, top(scores['channels']), moments, refit))


def cut_to(model, target, batches, importance='obs', seed=0, **how):
    """
    Cuts until at most target parameters are left. Each time it tries to remove an eighth of the neurons, an eighth of
    the channels, a head of each group, or a layer, and keeps the cut that costs least loss on batches per parameter
    saved (counting only parameters that still have to go). how: more arguments of shrink. Yields (kind, how many of it
    are left, the loss, the model) after each cut; nothing if the model is small enough.
    """
    loss = evaluate(model, batches)['loss']
    while (n := model.params()['total']) > target:
        measured, options = measure(model, batches, importance, seed), []
        for kind in KINDS:
            smaller = a_little_smaller(model, kind, target, batches, seed=seed, measured=measured,
                                       importance='loss' if kind == 'layers' else importance, **how)
            if smaller is not None:
                after = evaluate(smaller, batches)['loss']
                saved = min(n - smaller.params()['total'], n - target)
                options.append(((after - loss) / saved, kind, after, smaller))
        if not options:
            raise ValueError(f"keep_params: the smallest shape with this vocabulary has {n:,} parameters, more than "
                             f"the {int(target):,} to keep: keep more, or cut the vocabulary too")
        _, kind, loss, model = min(options, key=lambda option: option[0])
        yield kind, getattr(model.config, KINDS[kind]), loss, model


def a_little_smaller(model, kind, target, batches, **how):
    """
    The model without an eighth of its neurons or channels, a layer, or a head of each group; None if nothing is left.
    """
    have, kv = getattr(model.config, KINDS[kind]), model.config.n_kv_head
    step = max(1, have // 8)
    if kind == 'layers':
        step = 1
    elif kind == 'heads':
        step = kv if have > kv else 1
    if have == step:
        return None
    smaller = shrink(model, kind, have - step, batches, **how)
    # do not overshoot: parameters are linear in both of these numbers
    n, left = model.params()['total'], smaller.params()['total']
    if kind in ('neurons', 'channels') and left < target:
        needed = math.ceil(step * (n - target) / (n - left))
        smaller = shrink(model, kind, have - needed, batches, **how)
    return smaller

# -----------------------------------------------------------------------------
# the script, whose functions read its knobs, and source, the checkpoint to prune

def cut_vocabulary(model, tokenizer, keep, data_dir):
    """
    The model with only its `keep` most frequent tokens, and their tokenizer. Writes the dataset at data_dir again in
    these tokens, to data_dir_vKEEP.
    """
    if load_meta(data_dir)['kind'] == 'chat':
        raise ValueError(f"vocab_keep ({keep}): {data_dir} is a chat dataset, whose masks belong to its "
                         "tokens: cut the vocabulary before chat fine-tuning")
    train, val = (Loader(data_dir, split, 1, 1) for split in ('train', 'val'))
    counts = np.bincount(train.tokens, minlength=tokenizer.vocab_size)
    ids, smaller = cut_tokenizer(tokenizer, counts, keep)
    texts = [recode(split.tokens, tokenizer, smaller) for split in (train, val)]
    write_dataset(f'{data_dir}_v{keep}', smaller, *texts, source=train.meta['source'])
    print(f"in {data_dir} it was {train.n_tokens:,} and {val.n_tokens:,} tokens"
          + ('; characters that have no token any more are left out' if tokenizer.kind == 'char' else ''))
    return build(*keep_vocab(model.state_dict(), model.config, ids)), smaller


def cut_layers(model, layers, batches):
    """layers: '0,1,3', which layers to keep, or how many, to be chosen by layer_importance."""
    if ',' in str(layers):
        which = [int(i) for i in layers.strip(',').split(',')]
        return build(*keep_layers(model.state_dict(), model.config, which))
    return shrink(model, 'layers', int(layers), batches, layer_importance, seed=seed)


def go_without_text(gone):
    """Prints that nothing is measured. ValueError names the knobs that need a text."""
    by_score = channel_prune_ratio or neuron_prune_ratio or head_prune_ratio
    some_layers = layers is not None and ',' not in str(layers)
    asked = [(vocab_keep, f'vocab_keep ({vocab_keep})'),
             (keep_params < 1, f'keep_params ({keep_params})'),
             (some_layers and layer_importance not in BY_WEIGHTS, f'layer_importance ({layer_importance})'),
             (by_score and importance not in BY_WEIGHTS, f'importance ({importance})'),
             (by_score and refit, 'refit (True)'),
             (channel_prune_ratio and rotate, 'rotate (True)')]
    need = [what for is_asked, what in asked if is_asked]
    if need:
        raise ValueError(f"{gone}, and there is no {', '.join(need)} without a text: give --dataset= with another text "
                         "in the same tokens, or go by the weights alone, --importance=l1 --layer_importance=l1 "
                         "--refit=False --rotate=False")
    print(f'note: {gone}: what is left is not measured; --dataset= with another text in the same tokens would '
          'measure it')


def file_to_make():
    """-> the path of the pruned model, whose folder is locked from here on."""
    path = os.path.join(save_dir or out_dir.rstrip('/') + '-pruned', 'best.pt')
    if os.path.realpath(source) == os.path.realpath(path):
        raise ValueError(f"save_dir ({save_dir}) would replace {source}, which is pruned here: give another folder")
    hold(os.path.dirname(path))
    return path


def calibration_text(model, data_dir, fold):
    """Batches of the training split to measure importance on, a list of (x, y); fold: the part to leave out."""
    if not data_dir:
        return []
    loader = Loader(data_dir, 'train', 16, model.config.block_size, seed, device=device, hold_out=fold)
    return [loader.batch(step) for step in range(calibration_batches)]


def cut(model, batches, target):
    """Makes all the cuts that the knobs ask for, in their order. target: how many parameters may be left."""
    how = dict(importance=importance, refit=refit, rotate=rotate, seed=seed)
    if layers is not None:
        model = cut_layers(model, layers, batches)
    for kind, ratio in (('channels', channel_prune_ratio), ('neurons', neuron_prune_ratio),
                        ('heads', head_prune_ratio)):
        have = getattr(model.config, KINDS[kind])
        model = shrink(model, kind, max(1, round(have * (1 - ratio))), batches, **how)
    if kv_heads:
        moments = measure(model, batches, 'l1')[1]
        model = build(*merge_kv_heads(model.state_dict(), model.config, kv_heads, moments or None, kv_merge))
    if keep_params < 1:
        for kind, left, loss, model in cut_to(model, target, batches, **how):
            print(f"{left} {kind} left: {model.params()['total']:,} parameters, "
                  f"loss on the calibration batches {loss:.4f}", flush=True)
    return model


def measure_speeds(models):
    """tokens/s of one sequence, for each model. They take turns, and the fastest of three rounds counts."""
    best = [0.0] * len(models)
    for turn in progress(range(3), 3, 'rounds of decoding'):
        for i, model in enumerate(models):
            engine, n = Engine(model), min(100, model.config.block_size)
            engine.complete([[0]], n, Sampling(temperature=0.8, seed=seed))
            best[i] = max(best[i], n / engine.stats['seconds'])
    return best


def measure_side(when, model, file, data_dir, tokenizer, speed):
    """Measures the model 'before' or 'after' -> its part of the JSON document."""
    measured = {'loss': None, 'bpb': None}
    if data_dir:
        batches = validation(data_dir, model.config.block_size, device).eval_batches()
        measured = evaluate(model, batches, tokenizer.token_bytes)
    shape = [f'{name} {getattr(model.config, name)}'
             for name in ('n_layer', 'n_embd', 'n_head', 'n_kv_head', 'n_hidden', 'vocab_size')]
    print(f'{when}:'.ljust(7), ', '.join(shape))
    return {f'val_loss_{when}': measured['loss'], f'bpb_{when}': measured['bpb'],
            f'params_{when}': model.params()['total'], f'bytes_{when}': os.path.getsize(file),
            f'kv_bytes_per_token_{when}': model.kv_bytes_per_token(), f'tok_s_{when}': speed}


def print_table(result):
    print(f"{'':36}{'before':>14}{'after':>14}")
    for key, label, digits in (('val_loss', 'loss, nats a token', 4), ('bpb', 'bits per byte', 4),
                               ('params', 'parameters', 0), ('bytes', 'bytes of file', 0),
                               ('kv_bytes_per_token', 'bytes of cache a token (float32)', 0),
                               ('tok_s', 'tokens/s, one sequence', 0)):
        before, after = result[f'{key}_before'], result[f'{key}_after']
        if before is not None and after is not None:
            print(f"{label:36}{before:14,.{digits}f}{after:14,.{digits}f}")


def print_next_command(result, knobs, dataset, block_size, fold):
    """Prints the command that trains what is left. knobs: those that the whole model was trained with."""
    # after large cuts the usual rates recover more, after small ones a fifth of them; the limit of 0.2 nats is a guess
    before, after = result['val_loss_before'], result['val_loss_after']
    little = after is not None and after - before < 0.2 and knobs.get('init_from') == 'scratch'
    path = result['file']
    words = ['python', 'train.py', f'--init_from={path}', f'--out_dir={os.path.dirname(path)}-recovered',
             f"--dataset={dataset or 'NAME'}", f'--block_size={block_size}']
    for rate in ('muon_lr', 'adam_lr'):
        if isinstance(knobs.get(rate), float):
            words.append(f'--{rate}={knobs[rate] / (5 if little else 1):g}')
    if fold:
        words.append(f'--hold_out={fold}')
    elif not vocab_keep:
        teacher = out_dir if weights == 'best.pt' else os.path.join(out_dir, weights)
        words.append(f'--teacher={teacher}')
    print(f"go on with {'a fifth of ' if little else ''}the rates that it was trained with: {shlex.join(words)}"
          + ', NAME being a text in the same tokens' * (not dataset))
    if vocab_keep:
        print('the whole model cannot teach this one, which has other tokens: distil first, then cut the vocabulary')


if __name__ == '__main__':
    # -------------------------------------------------------------------------
    out_dir = 'out-quickstart'      # where train.py left best.pt
    weights = 'best.pt'             # the float checkpoint in out_dir
    save_dir = ''                   # empty: out_dir with -pruned behind it
    dataset = ''                    # a folder under data/ to measure on; empty: the one the model was trained on
    # what goes; the order is this one
    vocab_keep = 0                  # frequent tokens to keep; 0: all. Writes the dataset again in them, data/NAME_vN
    layers = None                   # how many to keep, or which: 0,1,3
    channel_prune_ratio = 0.0       # share of the residual stream, n_embd
    neuron_prune_ratio = 0.0        # share of each MLP's hidden units
    head_prune_ratio = 0.0          # share of query heads; where each has its own key/value head, that goes too
    kv_heads = 0                    # key/value heads to merge down to: 1 is MQA; 0: leave them
    keep_params = 1.0               # go on until this share of the parameters is left, cutting whatever costs least
    # how
    importance = 'obs'              # obs, taylor, activation, l1, random
    kv_merge = 'aligned'            # how kv_heads merges: aligned; to compare, plain (as they are), first (of a group)
    layer_importance = 'loss'       # for layers=N: as above, or loss: leave each out in turn, as keep_params does
    refit = True                    # fit what is left by least squares to what the whole gave
    rotate = True                   # principal axes before channels are cut
    calibration_batches = 8         # of 16 windows from the training split
    report = True                   # loss and speed before and after; False: in a chain whose end is measured
    seed = 1337
    device = 'auto'
    limits = {
        'channel_prune_ratio neuron_prune_ratio head_prune_ratio': (0.0, 0.99),
        'keep_params': (0.01, 1.0),
        'vocab_keep kv_heads': (0, None),
        'calibration_batches': (1, None),
        'seed': (0, 2**63 - 1),
        'importance': [*IMPORTANCE],
        'kv_merge': [*MERGE],
        'layer_importance': ['loss', *IMPORTANCE],
    }
    exec(open(in_repo('configurator.py')).read())
    # -------------------------------------------------------------------------
    device = pick_device(device)
    keep_memory()
    assert layers is None or re.fullmatch(r'\d+(,\d+)*,?', str(layers)), \
        f"layers ({layers}) must be how many to keep, like 2, or which, like 0,2,3"
    source = os.path.join(out_dir, weights)
    path = file_to_make()
    end_if_made([path], [source])           # by a ladder (bench.py) that has run this very command before

    # the model and its text; with a smaller vocabulary both are others
    whole, state = load_model(source, device)
    old, old_dir = from_meta(state['tokenizer']), None
    gone = without_text(state, source, dataset)
    if gone:
        go_without_text(gone)
    else:
        old_dir, _ = data_of(state, out_dir, dataset)
    will_replace([path], [source], save_dir)
    model, data_name, data_dir, tokenizer = whole, dataset or state.get('dataset'), old_dir, old
    if vocab_keep:
        if not dataset:
            dataset_of(state, source, to_write=True)
        model, tokenizer = cut_vocabulary(whole, old, vocab_keep, old_dir)
        data_name, data_dir = f'{data_name}_v{vocab_keep}', f'{data_dir}_v{vocab_keep}'

    # what the model was trained to leave out, it must not see here, either
    knobs = state.get('knobs', {})
    fold = knobs.get('hold_out', '') if data_name == state.get('dataset') else ''
    model = cut(model, calibration_text(model, data_dir, fold), keep_params * whole.params()['total'])
    # quant_bits 0: what is left, refitted, was not trained through the rounding
    save_checkpoint(path, model, tokenizer.meta(), step=0, dataset=data_name,
                    knobs=knobs | {'quant_bits': 0, 'hold_out': fold})

    # before and after: measured is the file
    model = load_model(path, device)[0]
    before = after = None
    if report:
        before, after = measure_speeds([whole, model])
    else:
        old_dir = data_dir = None
    result = {'file': path,
              **measure_side('before', whole, source, old_dir, old, before),
              **measure_side('after', model, path, data_dir, tokenizer, after)}
    result |= {'bytes': result['bytes_after'], 'shape': asdict(model.config)}
    print_table(result)
    print_next_command(result, knobs, data_name, model.config.block_size, fold)
    record(path, result, [source], starts_from=source)
    print(json_line(result))
