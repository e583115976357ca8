"""
Weights as integers: one rounding rule, used by training (fake-quant), by the file and by the modules that run.

    python quantize.py --out_dir=out-quickstart             # best.pt -> int8.safetensors, loss before and after
    python quantize.py --out_dir=out-quickstart --bits=4    # -> int4.safetensors: the tables at 8 bits, the rest at 4
    python quantize.py --out_dir=out-mine --bits=4 --for_training=True      # and int4.pt, to train on from just these:
    python train.py --init_from=out-mine/int4.pt --quant_bits=4 --teacher=out-mine --alpha=1 --out_dir=out-mine-qat ...

    from quantize import export, load
    export(path, model, tokenizer_meta)     # writes an integer model
    model, state = load(path)               # integer modules: nothing is dequantised, at load or later

The rule, and the modules that train through it or run on its integers, are in data/rounding.py. data/balance.py turns a
float network into an equal one that rounds better, and data/gptq.py rounds it with errors fed back. This file has the
integer checkpoint, and measures what rounding cost.

    8 bits:  w = v * scale[row],  v in -127, ..., 127
    4 bits:  w = q * step[row, group] * scale[row],  q in -7, ..., 7,  step in 1, ..., 18:  v = q * step is int8 again

A row is an output of a matrix, or a token of the embedding; a group is 32 (64, 128) columns of it (a scale in two
levels: VS-Quant, arXiv 2102.04503). At 4 bits, file and modules hold two q in a byte and a byte per step. GPTQ also
uses q = -8, and negative steps. The table BITS in data/rounding.py is the one definition of both formats.
Activations are int8, too, with one scale per token, computed at run time. Products are summed as integers, which is
exact in any order: the result for one token cannot depend on its neighbours.
"""
import json
import math
import os
import re
import shlex
from dataclasses import asdict

import torch
import torch.nn.functional as F

from data import calibration
from data.balance import balance as balanced
from data.checkpoint import (check_size, check_tensors, config_from, load_model, read_safetensors, save_checkpoint,
                             without_memory, write_safetensors)
from data.files import hold, in_repo, json_line
from data.gptq import gptq
from data.layouts import for_measuring
from data.loader import data_of, validation, without_text
from data.machine import give_back_memory, keep_memory, pick_device
from data.record import end_if_made, record
from data.rounding import BITS, GROUP, GROUPS, Integers, behind, convert, format_of, grid_of, rounding_of, sharing
from data.tokenizer import from_meta
from model import GPT, LossTotal, NEW_HEADS, part_of, rope_tables, rows_in_a_chunk

# -----------------------------------------------------------------------------
# the file: an integer checkpoint, its shape, rounding and tokenizer in the metadata

FORMAT = 'picochat-int'
BETWEEN = '\u0100'          # separates tokens, which are bytes written as Latin-1 and so never contain it


def compact(meta):
    """A tokenizer's meta with its tokens joined to one string, which in JSON is a third smaller than a list."""
    return meta | {'ranks': BETWEEN.join(meta['ranks'])} if 'ranks' in meta else meta


def spread(meta):
    """Undoes compact. The list of an older file stays as it is."""
    joined = isinstance(meta, dict) and isinstance(meta.get('ranks'), str)
    return meta | {'ranks': meta['ranks'].split(BETWEEN)} if joined else meta


def stored_modules(model):
    """{name: integer module} of a converted model, without a tied lm_head, which is the embedding."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, Integers) and not (model.config.tie_weights and name == 'lm_head')}


def file_state(model):
    """The tensors that the file of a converted model holds: its state dict without a tied lm_head."""
    return {f'{name}.{key}': t for name, module in stored_modules(model).items()
            for key, t in module.state_dict().items()}


def int_share(model):
    """Share of the numbers in the model's file that are integers (the rest are scales)."""
    integers = floats = 0
    for module in stored_modules(model).values():
        integers += len(module.scale) * module.cols
        integers += 0 if module.step is None else module.step.numel()
        floats += module.scale.numel()
    return integers / (integers + floats)


def bytes_by_group(model):
    """
    {'embedding', 'trunk', 'head', ...: bytes of that part's integers, 'scales': bytes of all scales and steps}. The
    file has a header besides.
    """
    count = {}
    for name, t in file_state(model).items():
        key = 'scales' if name.endswith(('scale', 'step')) else part_of(name)
        count[key] = count.get(key, 0) + t.nbytes
    return count


def export(path, model, tokenizer_meta, dataset=None):
    """Writes a converted model with shape, tokenizer and the name of its dataset to path; returns the file's bytes."""
    metadata = {'config': asdict(model.config), 'rounding': rounding_of(model), 'tokenizer': compact(tokenizer_meta),
                'dataset': dataset}
    metadata = {'format': FORMAT} | {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    return write_safetensors(path, file_state(model), metadata)


def load(path, device='cpu'):
    """
    path -> the integer model on device, in eval mode, and {'config', 'tokenizer', 'dataset', 'rounding'}; for a .pt
    what load_model returns. ValueError says in one line what is wrong with a damaged or foreign file. (Its sha256
    detects damage, not tampering.)
    """
    if path.endswith('.pt'):
        return load_model(path, device)
    if not os.path.isfile(path):
        bits = re.fullmatch(r'int(\d+)\.safetensors', os.path.basename(path))
        raise ValueError(f"no quantised model at {path}: make one with python quantize.py "
                         f"--out_dir={shlex.quote(os.path.dirname(path) or '.')}{f' --bits={bits[1]}' if bits else ''}")
    tensors, metadata = read_safetensors(path, FORMAT, device)
    state = read_metadata(metadata, path)
    state['config'] = config = config_from(state['config'], path)
    check_size(config, tensors, path)
    # the float model never takes any memory
    model = without_memory(lambda config: convert(GPT(config), **state['rounding']), config)
    if config.tie_weights:
        tensors |= {name.replace('transformer.wte', 'lm_head'): t for name, t in tensors.items() if 'wte' in name}
    check_tensors(model.state_dict(), tensors, path)
    model.load_state_dict(tensors, assign=True)
    model.cos, model.sin = (t.to(device) for t in rope_tables(config))
    return model.eval(), state


def read_metadata(metadata, path):
    """The metadata of a file -> a dict of what export wrote. ValueError if it is not export's."""
    try:
        state = {key: json.loads(metadata.get(key, 'null')) for key in ('config', 'rounding', 'tokenizer', 'dataset')}
        bits, group, tables_bits = (state['rounding'][key] for key in ('bits', 'group', 'tables_bits'))
        known = {bits, tables_bits} <= {*BITS} and len(state['rounding']) == 3
        known = known and type(group) is int and 0 < group < 2**20
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{path} does not say how its weights are rounded: use another copy, or run quantize.py again")
    return state | {'tokenizer': spread(state['tokenizer'])}


def grid_in(state, wanted, path):
    """
    The fixed scales and steps of a checkpoint that had been rounded before it was trained (int4.pt, or what was trained
    from it), as grid_of has them; {} for other checkpoints, whose scales follow the weights. state: the checkpoint at
    path; wanted: how it is to be rounded, in the words of train.py's knobs. ValueError if that is not how these scales
    and steps were made, or if their shapes do not fit.
    """
    grid, known = state.get('grid', {}), {name: state.get('knobs', {}).get(name) for name in wanted}
    if not grid:
        return {}
    if not has_groups(wanted['quant_bits'], wanted['tables_bits']):
        known['quant_group'] = wanted['quant_group']
    if known != wanted:
        raise ValueError(f"{path} has scales and steps of {known}, and is to be rounded with {wanted}: "
                         "give the same, or take the float checkpoint that it was made from")
    how = {'bits': wanted['quant_bits'], 'group': wanted['quant_group'], 'tables_bits': wanted['tables_bits']}
    model = without_memory(lambda config: convert(GPT(config), **how), config_from(state['config'], path))
    # heads that were added since have no fixed scales
    expected = {name: t for name, t in grid_of(model).items() if name in grid or not name.startswith(NEW_HEADS)}
    check_tensors(expected, grid, path)
    return grid

# -----------------------------------------------------------------------------
# what it cost

# what Difference.result gives, and the script's JSON document has
MEASURED = ('val_loss_float', 'val_loss_quant', 'bpb_float', 'bpb_quant', 'mean_kl', 'max_kl', 'top1_flips')


class Difference:
    """
    Adds up how far a quantised model's predictions are from the float ones. result: 'val_loss_float', 'val_loss_quant',
    'bpb_float', 'bpb_quant' as evaluate has them; 'mean_kl', 'max_kl' of KL(float || quantised) in nats; 'top1_flips',
    the share of positions where another token is the most probable one.
    """
    def __init__(self, token_bytes, device):
        self.before, self.after = (LossTotal(token_bytes, device) for _ in range(2))
        self.kl_sum = self.kl_max = self.flips = self.n = 0

    def add(self, nats_float, nats_quant, kl, flips, targets):
        """Adds a batch: the four results of how_far, (N,) each, and targets (N,), in the way evaluate adds losses."""
        self.before.add(nats_float, targets)
        self.after.add(nats_quant, targets)
        kl = kl[targets >= 0].cpu()
        self.kl_sum += kl.double().sum().item()
        self.kl_max = max(self.kl_max, kl.max().item()) if len(kl) else self.kl_max
        self.flips += flips[targets >= 0].sum().item()
        self.n += len(kl)

    def result(self):
        before, after = self.before.result(), self.after.result()
        return {'val_loss_float': before['loss'], 'val_loss_quant': after['loss'],
                'bpb_float': before['bpb'], 'bpb_quant': after['bpb'],
                'mean_kl': self.kl_sum / self.n, 'max_kl': self.kl_max, 'top1_flips': self.flips / self.n}


def how_far(a, b, targets):
    """
    Log-probabilities a of the float model and b of the quantised one, (N, vocab_size) both, and targets (N,) -> (4, N):
    the loss of each in nats, the KL divergence, and 1 where their most probable tokens differ.
    """
    nats = [F.nll_loss(log_p, targets, ignore_index=-1, reduction='none') for log_p in (a, b)]
    return torch.stack([*nats, (a.exp() * (a - b)).sum(dim=-1), (a.argmax(-1) != b.argmax(-1)).float()])


@torch.no_grad()
def compare(model, others, batches, token_bytes):
    """
    Runs a float model and others, its quantised versions, over batches of (x, y), y = -1 masked -> for each of the
    others Difference.result().
    """
    differences = [Difference(token_bytes, model.cos.device) for _ in others]
    rows = rows_in_a_chunk(model.config.vocab_size)                              # as evaluate has them at a time

    def log_p(m, states):
        return F.log_softmax(m.logits(states), dim=-1)                           # (rows, vocab_size)
    for x, y in batches:
        states = [m.trunk(x).flatten(0, 1).split(rows) for m in (model, *others)]    # (B * T, n_embd) each
        # allocated in one piece beforehand: small tensors that survive between large ones fragment the memory
        found = torch.empty(len(others), 4, y.numel(), device=y.device)
        for start, targets, whole, *parts in zip(range(0, y.numel(), rows), y.flatten().split(rows), *states):
            whole = log_p(model, whole)
            for values, other, part in zip(found, others, parts):
                values[:, start:start + len(targets)] = how_far(whole, log_p(other, part), targets)
        for difference, values in zip(differences, found):
            difference.add(*values, y.flatten())
    return [difference.result() for difference in differences]

# -----------------------------------------------------------------------------
# the script, whose last functions read its knobs, and source, the checkpoint to round

METHODS = ('rtn', 'clip', 'gptq', 'qat')


def has_groups(bits, tables_bits):
    return any(format_of(b).steps > 1 for b in (bits, tables_bits))


def trained_with(state):
    """
    How a checkpoint's weights were trained, in the words of train.py's knobs. quant_bits is 0 for those that were
    trained in float, or saved before their rounding had begun.
    """
    knobs = {'quant_bits': 0, 'quant_group': GROUP, 'tables_bits': 8, 'qat_start': 0.0, 'max_iters': 0}
    knobs |= state.get('knobs', {})
    began = math.ceil(knobs['qat_start'] * knobs['max_iters'])
    if knobs['qat_start'] and state['step'] <= began:
        knobs['quant_bits'] = 0
    return {name: knobs[name] for name in ('quant_bits', 'quant_group', 'tables_bits')}


def choose_method(method, wanted, trained, source):
    """'auto' -> how weights that were trained so are rounded as wanted; both are in the words of train.py's knobs."""
    compared = ['quant_bits', 'tables_bits']
    if has_groups(wanted['quant_bits'], wanted['tables_bits']):
        compared.append('quant_group')
    as_trained = all(wanted[name] == trained[name] for name in compared)
    assert method != 'qat' or as_trained, (
        f"method (qat) needs weights trained with {wanted}, and {source}'s were with {trained}: "
        "train again, or use another method")
    if method != 'auto':
        return method
    return 'qat' if as_trained else 'gptq'


def say(result):
    """Prints the result for people."""
    path, size, parts = result['file'], result['bytes'], result['bytes_by_group']
    parts = parts | {'header': size - sum(parts.values())}
    print(f"{path}: {size:,} bytes, {result['compression']:.2f}x smaller than the {result['params']:,} weights in "
          f"float32; {100 * result['int_share']:.1f} % of its numbers are integers")
    print(f"bytes: {', '.join(f'{name} {n:,}' for name, n in parts.items())}")
    if result['val_loss_quant'] is None:
        return
    print("loss on the whole validation split: "
          f"float {result['val_loss_float']:.4f} nats ({result['bpb_float']:.4f} bits per byte), "
          f"int{result['bits']} by {result['method']} {result['val_loss_quant']:.4f} ({result['bpb_quant']:.4f})")


def files_to_make():
    """-> the path of the integer checkpoint and, with for_training, of the one to train on from; locks both."""
    path = os.path.join(save_dir or out_dir, f'int{bits}.safetensors')
    start = path.removesuffix('safetensors') + 'pt'
    products = [path, start] if for_training else [path]
    assert not for_training or os.path.realpath(start) != os.path.realpath(source), (
        f'for_training would replace {start}, of which it is made: give another --save_dir')
    # only these files are locked, not the folder: a training may go on there, which replaces best.pt as a whole
    for product in products:
        hold(os.path.dirname(product), os.path.basename(product))
    return products


def calibration_batches(model, state, tokenizer, data_dir):
    """Calibration text for balance and GPTQ, a list of (x, y). data_dir: the model's dataset, None if that is gone."""
    n = calib_batches or (16 if model.params()['total'] < 20e6 else 3)
    if calibrate and calibrate != 'itself':
        batches = calibration.from_file(calibrate, model, tokenizer, n)
    elif calibrate or data_dir is None:
        batches = calibration.from_itself(model, tokenizer, n, seed)
    else:
        # what the model did not see in training (hold_out) is not shown to it here, either
        fold = state.get('knobs', {}).get('hold_out', '') if not dataset else ''
        batches = calibration.from_dataset(data_dir, model, n, fold, seed)
    return calibration.in_parts(batches)


def rounded(model, batches, state, wanted):
    """The integer model. With for_training, GPTQ also changes the weights of the float model."""
    if method == 'gptq':
        return gptq(model, batches, bits, group, tables_bits, for_training, aim)
    grid = grid_in(state, wanted, source) if method == 'qat' else {}
    return convert(sharing(model), bits, group, tables_bits, search=method != 'rtn', grid=grid)


def to_train_on(path, model, quantised, state, wanted):
    """Writes int4.pt: float weights that round to just these integers, and their fixed scales and steps."""
    knobs = wanted | {'hold_out': state.get('knobs', {}).get('hold_out', '')}
    save_checkpoint(path, behind(model, quantised), state['tokenizer'], step=0, knobs=knobs,
                    dataset=dataset or state.get('dataset'), data=state.get('data'), grid=grid_of(quantised))
    record(path, {'file': path}, [source], starts_from=source)


if __name__ == '__main__':
    # -------------------------------------------------------------------------
    out_dir = 'out-quickstart'      # where train.py left best.pt
    weights = 'best.pt'             # the float checkpoint in out_dir
    save_dir = ''                   # where the file goes; empty: into out_dir
    bits = 8                        # 8 or 4
    method = 'auto'                 # qat, if they were trained with quant_bits=bits; else gptq, fitted to a text
                                    # or rtn, to nearest; clip, with the steps of 4 bits searched for the least error
    group = 0                       # 4 bits: columns that share a step, 32, 64 or 128; 0: as trained, or 32
    tables_bits = 0                 # of the vocabularies, 8 or 4; 0: as trained, or 8
    balance = True                  # turn and scale the network into an equal one that rounds better (not for qat)
    # the text that it is balanced and fitted with
    dataset = ''                    # a folder under data/; empty: the one the model was trained on
    calibrate = ''                  # a text file instead of the training split; itself: what the model writes
    aim = False                     # gptq: aim at the float model's results: better on such text, worse on other
    for_training = False            # also int4.pt, floats that round to these integers, to train on from
    report = True                   # the loss before and after; False: the file alone, in a chain whose end is measured
    calib_batches = 0               # of 16 rows of at most 512 tokens; 0: 16, or 3 for models from 20M weights on
    seed = 0                        # of the turns, and of which rows of the dataset, or what the model writes
    device = 'auto'
    limits = {
        'bits': [*BITS],
        'tables_bits': [0, *BITS],
        'group': [0, *GROUPS],
        'method': ['auto', *METHODS],
        'calib_batches': (0, None),
        'seed': (0, 2**31),
    }
    exec(open(in_repo('configurator.py')).read())
    # -------------------------------------------------------------------------
    device = pick_device(device)
    source = os.path.join(out_dir, weights)
    path, *to_train_from = products = files_to_make()
    end_if_made(products, [source])             # by a ladder (bench.py) that has run this very command before

    # the model, how to round it, and the text to measure it on, opened now as rounding may take minutes
    model, state = load_model(source, device)
    trained = trained_with(state)
    group, tables_bits = group or trained['quant_group'], tables_bits or trained['tables_bits']
    wanted = {'quant_bits': bits, 'quant_group': group, 'tables_bits': tables_bits}
    method = choose_method(method, wanted, trained, out_dir)
    balance = balance and method != 'qat'
    tokenizer, data_dir, text = from_meta(state['tokenizer']), None, None
    gone = without_text(state, source, dataset)
    if gone:
        print(f"note: {gone}: the file is written and not measured; --dataset= with another text in the same tokens "
              "would measure it")
    else:
        data_dir, _ = data_of(state, out_dir, dataset)
        text = validation(data_dir, model.config.block_size, device)

    # balance, round, write
    batches = []
    if balance or method == 'gptq':
        batches = calibration_batches(model, state, tokenizer, data_dir)
    whole = model if report and text else None              # the float model, kept to compare with
    if balance:
        model = balanced(model, batches, seed)
        give_back_memory()
    model = sharing(model)                                  # GPTQ may replace weights: those of whole must stay
    quantised = rounded(model, batches, state, wanted)
    size = export(path, quantised, state['tokenizer'], dataset or state.get('dataset'))
    for start in to_train_from:
        to_train_on(start, model, quantised, state, wanted)

    # what it cost: the file is read again and measured
    n_params = model.params()['total']
    model = None                                            # frees the balanced model's memory
    quantised = load(path, device)[0]
    result = {'file': path, 'bytes': size, 'bits': bits, 'method': method,
              'balance': balance, 'group': group if has_groups(bits, tables_bits) else None,
              'tables_bits': tables_bits, 'seed': seed, 'aim': aim and method == 'gptq',
              'compression': 4 * n_params / size, 'params': n_params, 'int_share': int_share(quantised),
              'bytes_by_group': bytes_by_group(quantised), **dict.fromkeys(MEASURED)}
    if whole:
        keep_memory()
        result |= compare(whole, [for_measuring(quantised)], text.eval_batches(), tokenizer.token_bytes)[0]
    say(result)
    record(path, result, [source], starts_from=source)
    print(json_line(result))
