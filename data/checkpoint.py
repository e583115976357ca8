"""
Our own files: checkpoints (torch.save) and integer checkpoints (in safetensors' layout). They are written whole or not
at all, checked when they are read, and hold only tensors and plain types: loading one can never run code.

    from data.checkpoint import load_model, save_checkpoint
    save_checkpoint('out/best.pt', model, tokenizer.meta(), step=100, dataset='stdlib_char')
    model, state = load_model('out/best.pt')    # state: {'config', 'tokenizer', 'step', 'dataset', ...}

A checkpoint is a dict {'picochat': 1, 'config': the GPTConfig, 'tokenizer': its meta, 'model': the weights} with more
entries as given. Damaged and foreign files are refused with a ValueError that names what was expected.
"""
import hashlib
import json
import math
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from torch.overrides import TorchFunctionMode

from data.checks import (check_archive, check_contents, check_old_file, check_size, check_tensors, check_training,
                         check_what_it_says, damage, is_archive, tensors_in)
from data.files import atomic_write
from data.machine import in_large_pages, whole
from data.tokenizer import fingerprint, from_meta
from model import GPT, GPTConfig, NEW_HEADS, rope_tables

# -----------------------------------------------------------------------------
# writing

def save_checkpoint(path, model, tokenizer_meta, **extra):
    """
    Writes model, config, tokenizer and extra entries (plain types and tensors) to path. If there are several processes,
    all must call it, since sharded tensors are gathered; the first one writes. The file does not depend on how many
    there are.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

    def gather(x):
        """
        x with whole tensors, gathered one by one on the CPU, since all together need not fit on the device. detach()
        gives plain tensors, without attributes that a compiler may have left on them.
        """
        if isinstance(x, (list, tuple)):
            return [gather(v) for v in x]
        if isinstance(x, dict):
            return {k: gather(v) for k, v in x.items()}
        if not hasattr(x, 'full_tensor'):
            return x.detach() if torch.is_tensor(x) else x
        x = whole(x)
        return x.cpu() if first else None

    state = gather({'picochat': 1, 'config': asdict(model.config), 'tokenizer': tokenizer_meta,
                    'model': model.state_dict(), **extra})
    if model.config.tie_weights:                # gathered twice, written once
        state['model']['lm_head.weight'] = state['model']['transformer.wte.weight']
    if first:
        atomic_write(path, lambda f: torch.save(state, f))

# -----------------------------------------------------------------------------
# reading

LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # files of torch before 1.6, which are no zip archives, begin so


def load_tensors(path, device='cpu'):
    """A file of torch.save -> its tensors and plain types. ValueError if it is damaged, or holds anything else."""
    with open(path, 'rb') as f:
        legacy = f.read(len(LEGACY)) == LEGACY
    if not legacy and not is_archive(path):
        raise ValueError(f"{path} is not a whole checkpoint: expected a zip archive, as torch.save writes it, "
                         f"found {os.path.getsize(path):,} bytes that are truncated or of another kind: "
                         "use another copy")
    try:
        (check_old_file if legacy else check_archive)(path)
        with ThreadPoolExecutor(1) as pool:
            # torch.load does not check the checksums in the file: another thread does, at the same time
            sums = pool.submit(lambda: None if legacy else damage(path))
            state = torch.load(path, map_location=device, weights_only=True)
        damaged = sums.result()
        if not damaged:
            check_contents(state, os.path.getsize(path))
    except Exception as e:      # damaged zips and refused pickles raise a dozen types; all mean: do not use this file
        why = str(e) if type(e) is ValueError else type(e).__name__
        raise ValueError(f"{path} was refused ({why}): "
                         "a checkpoint holds tensors and plain types only; use another copy") from e
    if damaged:
        raise ValueError(f"{path} is damaged: expected the checksum that was saved with {damaged}, "
                         "found another: use another copy")
    return state


def plain_names(state):
    """
    A state dict without the prefixes that wrappers add to names (torch.compile: _orig_mod., DDP and DataParallel:
    module.). ValueError if it is no state dict.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"expected tensors by their names, found {type(state).__name__}")
    plain = {re.sub(r'(?<![^.])(?:_orig_mod|module)\.', '', name): t for name, t in state.items()}
    if len(plain) < len(state):
        raise ValueError("some tensors are there twice, with and without a wrapper's prefix")
    return plain


def config_from(shape, source):
    """A GPTConfig as a dict, and the file it is from -> GPTConfig. ValueError for unknown or impossible fields."""
    fields = GPTConfig.__dataclass_fields__
    if not isinstance(shape, dict):
        raise ValueError(f"{source} does not say its shape, but {shape!r:.40}: use another copy")
    unknown = set(shape) - set(fields)
    if unknown:
        raise ValueError(f"{source} was written by another version: its shape has {sorted(unknown)}, "
                         "which this model does not know: use the version that wrote it")
    for name, value in shape.items():
        kind = (int, float) if fields[name].type is float else fields[name].type
        is_number = isinstance(value, (int, float))
        is_odd = isinstance(value, bool) and fields[name].type is not bool      # in Python, True is an int
        if not isinstance(value, kind) or is_odd or is_number and not 0 <= value < 2**53:
            raise ValueError(f"{source} says that {name} is {value!r:.40}: use another copy")
    return GPTConfig(**shape)


def load_checkpoint(path, device='cpu'):
    """
    path -> the saved dict, whose weights fit its config. ValueError for a file that is missing, damaged, foreign or
    unsafe.
    """
    if os.path.isdir(path):
        raise ValueError(f"no checkpoint at {path}: it is a folder, name the file in it, {path}/best.pt")
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: train one first (python train.py ...), "
                         "or name its folder with --out_dir=")
    state = load_tensors(path, device)
    if not isinstance(state, dict) or not {'picochat', 'config', 'tokenizer', 'model'} <= state.keys():
        found = sorted(map(str, state))[:6] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} is not a picochat checkpoint: "
                         f"expected the keys picochat, config, tokenizer and model, found {found}")
    check_what_it_says(state, path)
    config = config_from(state['config'], path)
    state['model'] = plain_names(state['model'])
    check_size(config, dict(tensors_in(state['model'])), path)
    check_tensors(without_memory(GPT, config).state_dict(), state['model'], path)
    return state


class NotDrawn(TorchFunctionMode):
    """
    Speeds up models on the device meta: torch.nn.init does nothing, and tables of positions are computed on the CPU. On
    meta tensors PyTorch would do both in Python, and import its compiler first, which takes a second.
    """
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, '__module__', '') == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        if func is torch.arange:
            kwargs['device'] = 'cpu'
        return func(*args, **kwargs)


def without_memory(kind, config):
    """kind(config), a model whose weights take no memory (meta tensors)."""
    with torch.device('meta'), NotDrawn():
        return kind(config)


def load_model(path, device='cpu'):
    """path -> model on device, in eval mode, and the checkpoint's other entries, a dict."""
    state = load_checkpoint(path, device)
    weights = state.pop('model')                # so that only the model keeps them in memory
    return with_weights(GPTConfig(**state['config']), {name: t.float() for name, t in weights.items()}, device), state


def with_weights(config, weights, device='cpu'):
    """A GPT with this config that holds these very tensors, which are on device already; a tied lm_head is wte's."""
    model = without_memory(GPT, config)         # so no weights are in memory twice
    if config.tie_weights:
        weights = weights | {'lm_head.weight': weights['transformer.wte.weight']}
    model.load_state_dict(weights, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    with torch.device(device):                  # created there, since meta tensors, as bench.py has, cannot be moved
        model.cos, model.sin = rope_tables(config)
    return model.eval()

# -----------------------------------------------------------------------------
# starting a training from a checkpoint

HOW_TRAINED = ('hold_out', 'train_only', 'dataset', 'quant_bits', 'quant_group', 'tables_bits', 'qat_start')


def starting_point(init_from, ckpt_path, knobs, tokenizer, data_dir, loader):
    """
    What a training starts from, by its knob init_from: 'scratch' -> {}; 'resume' -> the checkpoint at ckpt_path, which
    must have been trained with the same knobs; a path -> that checkpoint, for its weights. loader: the training split
    of data_dir. ValueError says what does not fit.
    """
    if init_from == 'scratch':
        return {}
    path = ckpt_path if init_from == 'resume' else init_from
    state = load_checkpoint(path)               # on the CPU, as the model on the device may be sharded
    if init_from == 'resume':
        check_resumable(state, path, knobs, data_dir, loader.meta['sha256']['train.bin'])
    if knobs['hold_out'] and state.get('knobs', {}).get('hold_out') != knobs['hold_out']:
        raise ValueError(f"{init_from} was not trained with hold_out={knobs['hold_out']}: "
                         "it has seen that part of the text; start from scratch")
    if fingerprint(from_meta(state['tokenizer'])) != fingerprint(tokenizer):
        known = state.get('dataset')            # None for a model from elsewhere
        on, remedy = (f", on {known},", 'that dataset, or ') if known else ('', '')
        raise ValueError(f"{path} was trained with another tokenizer{on} than {data_dir} has: give {remedy}one "
                         f"that was prepared with --tokenizer={shlex.quote(str(path))}")
    return state


def check_resumable(state, path, knobs, data_dir, data_hash):
    """state: of the checkpoint at path. ValueError if it was trained in another way, or on another text."""
    start_anew = f"start from it with --init_from={shlex.quote(str(path))}"
    if not {'optimizers', 'knobs'} <= state.keys():
        raise ValueError(f"{path} holds weights alone and cannot be resumed: {start_anew}")
    check_training(state, path)
    before = state['knobs']
    shape = [key for key in GPTConfig.__dataclass_fields__ if key != 'dropout']
    differ = [f'{key} is {before[key]!r} there and {knobs[key]!r} here'
              for key in (*shape, *HOW_TRAINED) if key in before and key in knobs and before[key] != knobs[key]]
    if differ:
        raise ValueError(f"{path} was trained in another way: {'; '.join(differ)}: resume with the same knobs")
    if state.get('data', data_hash) != data_hash:
        raise ValueError(f"{data_dir} has been prepared anew since {path} was saved, from another text: "
                         f"{start_anew} and another --out_dir, or anew")


def will_replace(paths, reads, out_dir, quiet=False):
    """Prints which of the paths exist and will be replaced. ValueError if one of them is among the files read."""
    there = [path for path in paths if os.path.exists(path)]
    read = {os.path.realpath(path) for path in reads}
    for path in there:
        if os.path.realpath(path) in read:
            raise ValueError(f"out_dir ({out_dir}) would replace {path}, which this run learns from: "
                             "give another --out_dir")
    if there and not quiet:
        resumable = any(path.endswith('ckpt.pt') for path in there)
        print(f"note: {' and '.join(there)} will be replaced"
              + ' (--init_from=resume would go on)' * resumable, flush=True)


def shape_of_student(config, source):
    """
    The GPTConfig of a model that starts from the weights of a checkpoint. config: what the knobs ask for; source: the
    checkpoint's dict. The checkpoint's config is used, with some fields of the knobs': block_size and dropout, which no
    weight depends on; how often the draft cell is applied, and what it chooses from; and heads that the checkpoint does
    not have, which are added.
    """
    theirs = source['config']
    shape = theirs | {'block_size': config.block_size, 'dropout': config.dropout,
                      'draft_n': config.draft_n or theirs['draft_n'],
                      'draft_vocab': config.draft_vocab or theirs.get('draft_vocab', 0)}
    for head in NEW_HEADS:
        if not theirs[f'{head}_n']:
            shape |= {k: v for k, v in vars(config).items() if k.startswith(head)}
    return GPTConfig(**shape)


def load_weights(model, source):
    """Loads the checkpoint's weights into model. Heads that it lacks stay fresh; everything else must be there."""
    fresh = {name: p for name, p in model.state_dict().items() if name.startswith(NEW_HEADS)}
    model.load_state_dict(fresh | source['model'])

# -----------------------------------------------------------------------------
# the container of integer checkpoints: 8 bytes of length, a JSON header, the tensors (safetensors' layout)

HEADER = 2**23              # the most bytes of a header; a vocabulary of 49,152 tokens takes 0.5 MB
DTYPES = {torch.int8: 'I8', torch.uint8: 'U8', torch.float32: 'F32'}


def checksum(header, *data):
    """sha256 of the header, as sorted JSON, and of the data."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def write_safetensors(path, tensors, metadata):
    """
    Writes tensors, {name: int8, uint8 or float32 tensor}, and metadata, {name: str}, with a checksum of all of it, to
    path -> the bytes of the file.
    """
    header, arrays, end = {}, [], 0
    # Tensors of 4-byte numbers come first, so that they are aligned; then steps, then weights, so that those which are
    # joined for decoding lie one after the other, see layouts.end_to_end.
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0].endswith('.weight'))):
        arrays.append(t.cpu().contiguous().numpy())             # a view if possible
        header[name] = {'dtype': DTYPES[t.dtype], 'shape': list(t.shape), 'data_offsets': [end, end + t.nbytes]}
        end += t.nbytes
    header['__metadata__'] = dict(metadata)
    header['__metadata__']['sha256'] = checksum(header, *arrays)
    head = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode(errors='surrogatepass')
    head += b' ' * (-len(head) % 8)
    if len(head) > HEADER:
        raise ValueError(f"{path}: a header of {len(head):,} bytes is more than the {HEADER:,} that a file may have: "
                         "use a smaller vocabulary")
    atomic_write(path, lambda f: f.writelines([len(head).to_bytes(8, 'little'), head, *arrays]))
    return os.path.getsize(path)


def read_safetensors(path, format, device='cpu'):
    """
    A file of write_safetensors whose metadata name this format -> {name: tensor on device}, metadata. On a CPU all
    tensors are views of the block of memory that the file was read into. ValueError for a damaged or foreign file. (The
    checksum detects damage, not tampering.)
    """
    with open(path, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        head = f.read(size) if size <= HEADER else b''
        data = in_large_pages(torch.empty(os.fstat(f.fileno()).st_size - f.tell(), dtype=torch.uint8))
        f.readinto(data.numpy())
    try:
        header = json.loads(head, object_pairs_hook=names_once)
        metadata = header['__metadata__']
        found = metadata['format']
    except (ValueError, TypeError, KeyError, RecursionError):
        found = None
    if found != format:
        raise ValueError(f"{path} is not a whole integer checkpoint of picochat: "
                         f"expected a safetensors header of format {format}, found {head[:20]!r}: "
                         "use another copy, or run quantize.py again")
    written = metadata.pop('sha256', None)
    if checksum(header, data.numpy()) != written:
        raise ValueError(f"{path} is damaged: its {len(data)} bytes of weights and its header "
                         "do not have the checksum written there: use another copy, or run quantize.py again")
    del header['__metadata__']
    tensors, end = {}, 0
    for name, dtype, shape, start in entries(header, path):
        n = math.prod(shape) * dtype.itemsize
        if start != end or n > len(data) - start or start % dtype.itemsize:
            raise ValueError(f"{path} was refused: {name} is not where the tensor before it ends, or ends beyond the "
                             "file: use another copy, or run quantize.py again")
        end = start + n
        tensors[name] = data[start:end].view(dtype).view(shape).to(device)
    if end != len(data):
        raise ValueError(f"{path} was refused: {len(data) - end:,} bytes behind its tensors belong to none: "
                         "use another copy, or run quantize.py again")
    return tensors, metadata


def names_once(pairs):
    """A JSON object as a dict. ValueError if a name is there twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError('a name is there twice')
    return dict(pairs)


def entries(header, path):
    """The header's tensors in the order of their bytes -> a list of name, dtype, shape and first byte. ValueError."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    found = []
    for name, t in header.items():
        try:
            shape, (start, end) = t['shape'], t['data_offsets']
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
            dtype = dtypes[t['dtype']] if whole else None
        except (ValueError, TypeError, KeyError):
            dtype = None
        if dtype is None or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} was refused: what its header says of {name} is no tensor of "
                             f"{', '.join(dtypes)}: use another copy, or run quantize.py again")
        found.append((name, dtype, shape, start))
    return sorted(found, key=lambda entry: entry[3])
