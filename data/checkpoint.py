"""
Our own files: checkpoints (torch.save) and the safetensors container of integer checkpoints, written whole or not at
all, and checked when they are read. Tensors and plain types only: loading one can never run code.

    from data.checkpoint import load_model, save_checkpoint
    save_checkpoint('out/best.pt', model, tokenizer.meta(), step=100, dataset='stdlib_char')
    model, state = load_model('out/best.pt')    # state: {'config', 'tokenizer', 'model', 'step', 'dataset', ...}

A checkpoint is the dict {'picochat': 1, 'config': the shape, 'tokenizer': its meta, 'model': the weights} and whatever
else was given. What guards against damaged and foreign files raises a ValueError that names what was expected.
"""
import hashlib
import io
import json
import math
import os
import re
import shlex
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from torch.overrides import TorchFunctionMode

from data.files import atomic_write
from data.machine import whole
from data.tokenizer import fingerprint, from_meta
from model import GPT, GPTConfig, rope_tables

# -----------------------------------------------------------------------------
# writing

def save_checkpoint(path, model, tokenizer_meta, **extra):
    """
    Writes model, shape, tokenizer and whatever else (plain types and tensors) to path. Of several processes all must
    call it, since what is sharded is put together, and the first writes: the file is the same whatever wrote it.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

    def gather(x):
        """x with whole tensors, on the CPU and one by one: all of them together need not fit the device."""
        if isinstance(x, (list, tuple)):
            return [gather(v) for v in x]
        if isinstance(x, dict):
            return {k: gather(v) for k, v in x.items()}
        if not hasattr(x, 'full_tensor'):
            return x
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

LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'      # how files of torch before 1.6 begin, which are no zip archives


def load_tensors(path, device='cpu'):
    """A file of torch.save -> its tensors and plain types. ValueError for a file that is damaged, or holds more."""
    with open(path, 'rb') as f:
        legacy = f.read(len(LEGACY)) == LEGACY
    if not legacy and not is_archive(path):
        raise ValueError(f"{path} is not a whole checkpoint: expected a zip archive, as torch.save writes it, "
                         f"found {os.path.getsize(path):,} bytes that are truncated or of another kind: "
                         "use another copy")
    try:
        (check_old_file if legacy else check_archive)(path)
        with ThreadPoolExecutor(1) as pool:
            # torch.load does not check the sums that torch.save writes: another thread does, at the same time
            damaged = None if legacy else pool.submit(damage, path)
            state = torch.load(path, map_location=device, weights_only=True)
        damaged = damaged and damaged.result()
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


def is_archive(path):
    """Whether a file ends as a zip archive does. Of one whose end is damaged, zipfile itself may raise."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def damage(path):
    """The first member of a zip archive that is not what was written, or None."""
    with zipfile.ZipFile(path) as z:
        return z.testzip()


def check_archive(path):
    """ValueError unless a zip archive is such as torch.save writes, and no larger in memory than on the disk."""
    with zipfile.ZipFile(path) as z:
        members = z.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError('it is compressed')
        if len({member.filename.casefold() for member in members}) < len(members):
            raise ValueError('two of its members have the same name')
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError('its members share their bytes')
        for member in members:
            if member.filename.casefold().endswith('.pkl'):
                check_pickle(io.BytesIO(z.read(member)))


def check_old_file(path):
    """The same for a file of torch before 1.6: five pickles, and the tensors' bytes."""
    with open(path, 'rb') as f:
        for _ in range(5):
            check_pickle(f)


# All that the pickle of a checkpoint needs to name: what dicts and tensors are made of. torch.load knows more, some of
# which takes as much memory as a file of a few bytes asks for.
NAMES = re.compile(r'collections\.OrderedDict|torch\.(Size|device|bool|(b?float|u?int)\d+)'
                   r'|torch\.(cuda\.|storage\.)?\w+Storage|torch\._utils\._rebuild_(tensor(_v[23])?|parameter)')
# And its instructions, each a byte, with how many bytes of argument, or of its length, follow.
CONSTANTS = {b'K': 1, b'M': 2, b'J': 4, b'G': 8, b'N': 0, b'\x88': 0, b'\x89': 0, b')': 0, b']': 0, b'}': 0, b'\x80': 1}
TEXTS = {b'X': 4, b'U': 1, b'\x8a': 1}
PUTS, GETS = {b'q': 1, b'r': 4}, {b'h': 1, b'j': 4}                 # what is kept under a number, to be used again
TUPLES = {b'\x85': 1, b'\x86': 2, b'\x87': 3}                      # here: of so many values
DROPS = {b'R': 1, b'\x81': 1, b'Q': 0, b'a': 1, b's': 2, b'b': 1}   # and here: so many fewer are on the stack
LARGEST = 10_000


def check_pickle(f):
    """
    Reads the instructions of a pickle from the open file f, and obeys none. ValueError for those that a checkpoint has
    no need of, for names besides NAMES, and for a tuple in a tuple in a tuple ... that holds more than LARGEST values:
    as the key of a dict it would be hashed value by value, which may take for ever, or all of the processor's stack.
    """
    stack, marks, memo = [], [], {}             # the stack holds of how many values each of its entries consists
    read, number = f.read, int.from_bytes
    while (op := read(1)) != b'.':
        if op in TEXTS:
            read(number(read(TEXTS[op]), 'little'))
            stack.append(1)
        elif op in PUTS:
            memo[number(read(PUTS[op]), 'little')] = stack[-1]
        elif op in GETS:
            stack.append(memo[number(read(GETS[op]), 'little')])
        elif op in CONSTANTS:
            read(CONSTANTS[op])
            stack.append(1)
        elif op == b'(':
            marks.append(len(stack))
        elif op in (b'e', b'u'):                # all since the mark goes into a list or a dict
            del stack[marks.pop():]
        elif op == b't' or op in TUPLES:
            start = marks.pop() if op == b't' else len(stack) - TUPLES[op]
            stack[start:] = [1 + sum(stack[start:])]
            if stack[-1] > LARGEST:
                raise ValueError(f'it has a tuple of more than {LARGEST:,} values')
        elif op in DROPS:
            del stack[len(stack) - DROPS[op]:]
        elif op == b'c':
            name = b'.'.join(f.readline(100).rstrip(b'\n') for _ in range(2)).decode()
            if not NAMES.fullmatch(name):
                raise ValueError(f'it names {name}')
            stack.append(1)
        else:
            raise ValueError(f'it has the instruction {op}')


def check_contents(state, size):
    """ValueError unless what a file of so many bytes has become is plain, and takes no more memory than the file."""
    if n_values(state, {}) > 2 * size:
        raise ValueError('it has the same values again and again')
    total = 0
    for name, t in tensors_in(state):
        if t.untyped_storage().nbytes() < t.nbytes:
            raise ValueError(f'{name} says that it has {t.numel():,} numbers, and fewer are there')
        total += t.nbytes
    if total > 2 * size:                        # tied tables are there twice
        raise ValueError(f'its tensors have {total:,} bytes, and the file has {size:,}')


def n_values(x, known):
    """
    Of how many values nested dicts, lists and tuples consist: each counts as often as it is reached. known: what has
    been counted, by id. ValueError for keys that are neither texts nor whole numbers.
    """
    if not isinstance(x, (dict, list, tuple)):
        return 1
    if id(x) not in known:
        known[id(x)] = math.inf                 # if it is met again within itself, it has no end
        if getattr(x, '__dict__', {}).keys() - {'_metadata'}:
            raise ValueError('a dict in it is more than that')
        odd = [key for key in x if type(key) not in (str, int)] if isinstance(x, dict) else []
        if odd:
            raise ValueError(f'a key in it is a {type(odd[0]).__name__}')
        values = x.values() if isinstance(x, dict) else x
        known[id(x)] = 1 + sum(n_values(value, known) for value in values)
    return known[id(x)]


def tensors_in(x, name=''):
    """Yields name, tensor for every tensor in nested dicts and lists; the name says where it is."""
    if torch.is_tensor(x):
        yield name, x
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    for key, value in items:
        if isinstance(value, (dict, list, tuple, torch.Tensor)):
            yield from tensors_in(value, f'{name}/{key}' if name else str(key))


def plain_names(state):
    """
    A state dict without what wrappers put into its names: torch.compile _orig_mod., DDP and DataParallel module.
    ValueError for what is no state dict.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"expected tensors by their names, found {type(state).__name__}")
    plain = {re.sub(r'(?<![^.])(?:_orig_mod|module)\.', '', name): t for name, t in state.items()}
    if len(plain) < len(state):
        raise ValueError("some tensors are there twice, with and without a wrapper's prefix")
    return plain


def config_from(shape, source):
    """A shape as a dict, and where it is from -> GPTConfig. ValueError for what this version does not know."""
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
        if not isinstance(value, kind) or is_number and not 0 <= value < math.inf:
            raise ValueError(f"{source} says that {name} is {value!r:.40}: use another copy")
    return GPTConfig(**shape)


def check_size(config, tensors, path):
    """
    ValueError if the shape is larger than what the file holds. It comes before a model of that shape is made: a small
    file must not take much memory, or time.
    """
    widest = 2 * max((max(t.shape, default=1) for t in tensors.values()), default=0)    # a byte may hold two numbers
    held = sum(t.numel() for t in tensors.values())
    layers = {name.split('.')[2] for name in tensors if name.startswith('transformer.h.')}
    c = config
    for name, asked, most in (
            ('n_layer', c.n_layer, len(layers)),
            ('multi_token_n', c.multi_token_n, len(tensors)),
            ('vocab_size', c.vocab_size, widest),
            ('n_embd', c.n_embd, widest),
            ('n_hidden', c.n_hidden, widest),
            ('n_head * head_dim', c.n_head * c.head_dim, widest),
            ('multi_token_hidden_mult', c.multi_token_hidden_mult * c.n_embd, widest),
            ('draft_hidden_mult', c.draft_hidden_mult * c.n_embd, widest),
            # the tables of positions are in no file: 8 MiB, or more where the weights take more
            ('block_size * head_dim', c.block_size * c.head_dim, 2**21 + 16 * held)):
        if asked > most:
            raise ValueError(f"{path} does not hold the model that it describes: its {name} is {asked:,}, "
                             f"and its {len(tensors):,} tensors are those of at most {most:,}: use another copy")


def check_tensors(own, state, path):
    """
    own: the state dict that a model has, which needs no memory; state: what the file at path holds for it. ValueError
    unless names, shapes and kinds are the same and all numbers are finite.
    """
    wrong = []
    for name in {**own, **state}:
        if name not in state:
            wrong.append(f'{name} is missing')
        elif name not in own:
            wrong.append(f'{name} is unknown')
        elif not torch.is_tensor(state[name]):
            wrong.append(f'{name} is no tensor')
        elif state[name].shape != own[name].shape:
            wrong.append(f'{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}')
        elif state[name].dtype != own[name].dtype and not (
                state[name].is_floating_point() and own[name].is_floating_point()):
            wrong.append(f'{name} is {state[name].dtype} instead of {own[name].dtype}')
    if wrong:
        raise ValueError(f"{path} does not have the tensors of its own settings: {', '.join(wrong[:3])}"
                         f"{', ...' if wrong[3:] else ''}: use another copy")
    check_finite(state, path)


def check_finite(state, path):
    """ValueError names the first tensor of nested dicts and lists that has a number that is NaN or infinite."""
    for name, t in tensors_in(state):
        # A sum is NaN or infinite if any of its numbers is; or if they are very large, for which all are looked at.
        if not t.is_floating_point() or t.is_meta or t.sum(dtype=torch.float32).isfinite():
            continue
        n = (~t.double().isfinite()).sum().item()
        if n:
            raise ValueError(f"{path} is of no use: {n:,} of the {t.numel():,} numbers of {name} are NaN or infinite: "
                             "use another copy, or train again with lower learning rates")


def load_checkpoint(path, device='cpu'):
    """
    path -> the saved dict, whose weights are those of its config. ValueError for a file that is missing, damaged,
    foreign or unsafe.
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
    if not isinstance(state.get('knobs', {}), dict):
        raise ValueError(f"{path} does not say how it was trained, but {state['knobs']!r:.40}: use another copy")
    config = config_from(state['config'], path)
    state['model'] = plain_names(state['model'])
    check_size(config, dict(tensors_in(state['model'])), path)
    check_tensors(without_memory(GPT, config).state_dict(), state['model'], path)
    return state


class NotDrawn(TorchFunctionMode):
    """
    For the device meta: torch.nn.init does nothing, and tables of positions are on the CPU. PyTorch would do both in
    Python there, and import its compiler first, which takes a second.
    """
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, '__module__', '') == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        if func is torch.arange:
            kwargs['device'] = 'cpu'
        return func(*args, **kwargs)


def without_memory(kind, config):
    """kind(config), a model whose weights are shapes alone."""
    with torch.device('meta'), NotDrawn():
        return kind(config)


def load_model(path, device='cpu'):
    """path -> model on device, in eval mode, and the checkpoint's dict."""
    state = load_checkpoint(path, device)
    config = GPTConfig(**state['config'])
    model = without_memory(GPT, config)         # so no weights are in memory twice
    model.load_state_dict({name: t.float() for name, t in state['model'].items()}, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    with torch.device(device):                  # made there: tensors without memory, as bench.py has, cannot move
        model.cos, model.sin = rope_tables(config)
    return model.eval(), state

# -----------------------------------------------------------------------------
# going on with a training

HOW_TRAINED = ('hold_out', 'train_only', 'dataset', 'quant_bits', 'quant_group', 'tables_bits', 'qat_start')


def starting_point(init_from, ckpt_path, knobs, tokenizer, data_dir, loader):
    """
    What a training begins with, by its knob init_from: 'scratch' -> {}; 'resume' -> the checkpoint at ckpt_path, which
    must be gone on with in the same way; a path -> that checkpoint, for its weights. loader: the training split of
    data_dir. ValueError says what does not belong together.
    """
    if init_from == 'scratch':
        return {}
    path = ckpt_path if init_from == 'resume' else init_from
    state = load_checkpoint(path)               # into the CPU's memory: the model that takes it may be sharded
    if init_from == 'resume':
        check_resumable(state, path, knobs, data_dir, loader.meta['sha256']['train.bin'])
    if knobs['hold_out'] and state.get('knobs', {}).get('hold_out') != knobs['hold_out']:
        raise ValueError(f"{init_from} was not trained with hold_out={knobs['hold_out']}: "
                         "it has seen that part of the text; start from scratch")
    if fingerprint(from_meta(state['tokenizer'])) != fingerprint(tokenizer):
        raise ValueError(f"{path} was trained with another tokenizer, on {state.get('dataset')}, than {data_dir} has: "
                         "give that dataset, or prepare this one with the same tokenizer")
    return state


def check_resumable(state, path, knobs, data_dir, data_hash):
    """state: of the checkpoint at path. ValueError if it was trained in another way, or on another text."""
    start_anew = f"start from it with --init_from={shlex.quote(str(path))}"
    if not {'optimizers', 'knobs'} <= state.keys():
        raise ValueError(f"{path} holds weights alone and cannot be resumed: {start_anew}")
    check_finite({part: state.get(part) for part in ('optimizers', 'ema')}, path)
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
    """Says which of the paths are there and will be replaced. ValueError if one of them is among the files read."""
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
    The shape of a model that starts from the weights of a checkpoint. config: what the knobs ask for; source: the
    checkpoint's dict. The checkpoint decides, but for block_size and dropout, on which no weight depends, for how often
    the draft cell is applied, and for heads that it does not have: they may be added.
    """
    theirs = source['config']
    shape = theirs | {'block_size': config.block_size, 'dropout': config.dropout,
                      'draft_n': config.draft_n or theirs['draft_n']}
    for head in ('multi_token', 'draft'):
        if not theirs[f'{head}_n']:
            shape |= {k: v for k, v in vars(config).items() if k.startswith(head)}
    return GPTConfig(**shape)


def load_weights(model, source):
    """The checkpoint's weights into model; heads that it does not have keep their fresh ones, all else must be there."""
    fresh = {name: p for name, p in model.state_dict().items() if name.startswith(('multi_token', 'draft'))}
    model.load_state_dict(fresh | source['model'])

# -----------------------------------------------------------------------------
# the container of integer checkpoints: 8 bytes of length, a JSON header, the tensors (safetensors' layout)

HEADER = 2**23              # bytes that a header may have; a vocabulary of 65,536 tokens takes 2 MB
DTYPES = {torch.int8: 'I8', torch.uint8: 'U8', torch.float32: 'F32'}


def checksum(header, data):
    """sha256 of everything but itself; the header as sorted JSON."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data).hexdigest()


def write_safetensors(path, tensors, metadata):
    """
    tensors: {name: int8, uint8 or float32 tensor}, metadata: {name: str} -> the bytes of the file at path. The checksum
    of all of it goes into the metadata.
    """
    header, data = {}, bytearray()
    # tensors of 4-byte numbers come first: so all of them stay aligned
    for name, t in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        start = len(data)
        data += t.cpu().numpy().tobytes()
        header[name] = {'dtype': DTYPES[t.dtype], 'shape': list(t.shape), 'data_offsets': [start, len(data)]}
    header['__metadata__'] = dict(metadata)
    header['__metadata__']['sha256'] = checksum(header, data)
    head = json.dumps(header, separators=(',', ':')).encode()
    head += b' ' * (-len(head) % 8)
    if len(head) > HEADER:
        raise ValueError(f"{path}: a header of {len(head):,} bytes is more than the {HEADER:,} that a file may have: "
                         "use a smaller vocabulary")
    atomic_write(path, lambda f: f.write(len(head).to_bytes(8, 'little') + head + data))
    return os.path.getsize(path)


def read_safetensors(path, format, device='cpu'):
    """
    A file of write_safetensors whose metadata say this format -> {name: tensor on device}, metadata. ValueError for a
    damaged or foreign file. (The checksum finds damage; who changes a file on purpose can write another one.)
    """
    with open(path, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        head = f.read(size) if size <= HEADER else b''
        data = f.read()
    try:
        header = json.loads(head, object_pairs_hook=names_once)
        metadata = header['__metadata__']
        found = metadata['format']
    except (ValueError, TypeError, KeyError, RecursionError):
        found = None
    if found != format:
        raise ValueError(f"{path} is not a whole picochat file of integers: "
                         f"expected a safetensors header of format {format}, found {head[:20]!r}: "
                         "use another copy, or run quantize.py again")
    written = metadata.pop('sha256', None)
    if checksum(header, data) != written:
        raise ValueError(f"{path} is damaged: its {len(data)} bytes of weights and its header "
                         "do not have the checksum written there: use another copy, or run quantize.py again")
    del header['__metadata__']
    tensors, end = {}, 0
    for name, dtype, shape, start in entries(header, path):
        n = math.prod(shape) * dtype.itemsize
        if start != end or n > len(data) - start:
            raise ValueError(f"{path} was refused: {name} is not where the tensor before it ends, or ends beyond the "
                             "file: use another copy, or run quantize.py again")
        end = start + n
        flat = torch.frombuffer(bytearray(data[start:end]), dtype=dtype) if n else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(shape).to(device)
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
