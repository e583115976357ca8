"""
Checks against damaged, foreign and hostile files of weights, in the order in which load_checkpoint calls them. Each
raises a ValueError, to which data/checkpoint.py adds the file's name.

    is_archive, check_archive, check_old_file   the file is as torch.save writes it, no larger in memory than on disk
    check_pickle                                its pickle names nothing but what dicts and tensors are made of
    damage                                      its bytes have the checksums that were saved with them
    check_contents                              what was loaded is plain, of finite size, and has all its bytes
    check_what_it_says                          what it says about its training has the right types
    check_size                                  its config is no larger than its tensors, before a model is made
    check_tensors, check_finite                 its tensors are those of its config, and their numbers are finite
    check_training                              a training can resume from it
"""
import io
import math
import os
import re
import zipfile

import torch

from data.files import check_types

# -----------------------------------------------------------------------------
# the file and its pickle

def is_archive(path):
    """Whether a file is a zip archive, by its end, for which zipfile may raise if that is damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def damage(path):
    """The first member of a zip archive that does not have its checksum, or None."""
    with zipfile.ZipFile(path) as z:
        return z.testzip()


def check_archive(path):
    """ValueError unless a zip archive is as torch.save writes it, and no larger in memory than on disk."""
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


# All that the pickle of a checkpoint may name: what dicts and tensors are made of. torch.load allows more, among it
# functions that would take as much memory as a file of a few bytes asks for.
NAMES = re.compile(r'collections\.OrderedDict|torch\.(Size|device|bool|(b?float|u?int)\d+)'
                   r'|torch\.(cuda\.|storage\.)?\w+Storage|torch\._utils\._rebuild_(tensor(_v[23])?|parameter)')
# The instructions that it may use, each a byte, with the number of bytes of the argument, or of its length.
CONSTANTS = {b'K': 1, b'M': 2, b'J': 4, b'G': 8, b'N': 0, b'\x88': 0, b'\x89': 0, b')': 0, b']': 0, b'}': 0, b'\x80': 1}
TEXTS = {b'X': 4, b'U': 1, b'\x8a': 1}
PUTS, GETS = {b'q': 1, b'r': 4}, {b'h': 1, b'j': 4}                 # store a value under a number, and get it again
TUPLES = {b'\x85': 1, b'\x86': 2, b'\x87': 3}                      # here: the number of values in the tuple
DROPS = {b'R': 1, b'\x81': 1, b'Q': 0, b'a': 1, b's': 2, b'b': 1}   # here: how many values leave the stack
LARGEST = 10_000


def check_pickle(f):
    """
    Reads the instructions of a pickle from the open file f without executing them. ValueError for instructions that a
    checkpoint does not need, for names other than NAMES, and for nested tuples of more than LARGEST values: such a
    tuple as the key of a dict would be hashed value by value, which may take for ever, or overflow the stack.
    """
    stack, marks, memo = [], [], {}             # of each entry on the stack only its number of values is kept
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
        elif op in (b'e', b'u'):                # everything since the mark goes into a list or dict
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
    """ValueError unless the contents of a file of size bytes are plain, and take no more memory than the file."""
    if n_values(state, {}) > 2 * size:
        raise ValueError('it has the same values again and again')
    total = 0
    for name, t in tensors_in(state):
        if t.untyped_storage().nbytes() < t.nbytes:
            raise ValueError(f'{name} says that it has {t.numel():,} numbers, and fewer are there')
        total += t.nbytes
    if total > 2 * size:                        # tied tables count twice
        raise ValueError(f'its tensors have {total:,} bytes, and the file has {size:,}')


def n_values(x, known):
    """
    The number of values in nested dicts, lists and tuples; one that is reached several times counts each time. known:
    what has been counted so far, by id. ValueError for keys that are neither str nor int.
    """
    if not isinstance(x, (dict, list, tuple)):
        return 1
    if id(x) not in known:
        known[id(x)] = math.inf                 # for what contains itself
        if getattr(x, '__dict__', {}).keys() - {'_metadata'}:
            raise ValueError('a dict in it is more than that')
        odd = [key for key in x if type(key) not in (str, int)] if isinstance(x, dict) else []
        if odd:
            raise ValueError(f'a key in it is a {type(odd[0]).__name__}')
        values = x.values() if isinstance(x, dict) else x
        known[id(x)] = 1 + sum(n_values(value, known) for value in values)
    return known[id(x)]

# -----------------------------------------------------------------------------
# what it says, and its tensors

# optional entries of a checkpoint, and the knobs of its training that are used again
SAYS = {'step': int, 'seconds': float, 'total_batch_size': int, 'val_loss_before': float, 'data': str, 'best': dict,
        'knobs': dict, 'optimizers': list, 'ema': dict, 'grid': dict}
KNOBS = {'hold_out': str, 'init_from': str, 'quant_bits': int, 'quant_group': int, 'tables_bits': int,
         'qat_start': float, 'max_iters': int}


def check_what_it_says(state, path):
    """ValueError unless a checkpoint's entries about its training have the types that train.py writes."""
    may_be_none = ('val_loss_before', 'data')
    known = {key: value for key, value in state.items() if not (value is None and key in may_be_none)}
    check_types(known, path, 'use another copy', {}, SAYS)
    if 'best' in known:
        check_types(known['best'], path, 'use another copy', {'loss': float}, {'step': int})
    check_types(known.get('knobs', {}), path, 'use another copy', {}, KNOBS)
    for key, value in known.get('knobs', {}).items():
        if not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"{path} says that the knob {key} was {value!r:.40}: use another copy")


def check_size(config, tensors, path):
    """
    ValueError if the config describes a larger model than the file holds. It is called before a model of that config is
    made, so that a small file cannot take much memory or time.
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
            # tables of positions are in no file: they may take 32 MiB, or more if the weights do
            ('block_size * head_dim', c.block_size * c.head_dim, 2**22 + 2 * held)):
        if asked > most:
            raise ValueError(f"{path} does not hold the model that it describes: its {name} is {asked:,}, "
                             f"and its {len(tensors):,} tensors are those of at most {most:,}: use another copy")


def check_tensors(own, state, path):
    """
    own: the state dict of a model, which may be on the device meta; state: the tensors of the file at path. ValueError
    unless names, shapes and kinds of dtypes are the same and all numbers are finite.
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
    for name, t in state.items():
        if name.endswith('.step') and not t.all():
            raise ValueError(f"{path} was refused: {name}, of which numbers are multiples, is 0: use another copy")


def check_finite(state, path):
    """ValueError names the first tensor in nested dicts and lists that has NaN or infinite numbers."""
    for name, t in tensors_in(state):
        # the sum is NaN or infinite if any number is; or if numbers are very large, so then each is looked at
        if not t.is_floating_point() or t.is_meta or t.sum(dtype=torch.float32).isfinite():
            continue
        n = (~t.double().isfinite()).sum().item()
        if n:
            raise ValueError(f"{path} is of no use: {n:,} of the {t.numel():,} numbers of {name} are NaN or infinite: "
                             "use another copy, or train again with lower learning rates")


def tensors_in(x, name=''):
    """Yields name, tensor for every tensor in nested dicts and lists; the name says where it is."""
    if torch.is_tensor(x):
        yield name, x
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    for key, value in items:
        if isinstance(value, (dict, list, tuple, torch.Tensor)):
            yield from tensors_in(value, f'{name}/{key}' if name else str(key))


def check_training(state, path):
    """ValueError unless training can resume with a checkpoint's optimizers and moving averages."""
    check_types(state, path, 'use another copy', {'step': int, 'total_batch_size': int})
    check_types(state['knobs'], path, 'use another copy', {'init_from': str})
    if not isinstance(state.get('fast_bf16'), (bool, type(None))):
        raise ValueError(f"{path} says {str(state['fast_bf16']):.40} of bfloat16, neither True nor False: "
                         "use another copy")
    for saved in state['optimizers']:
        parts = saved.get('state') if isinstance(saved, dict) else None
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError(f"{path} holds no whole state of its optimizers: use another copy")
    for name, average in state.get('ema', {}).items():
        like = state['model'].get(name)
        if not torch.is_tensor(average) or not torch.is_tensor(like) or average.shape != like.shape:
            raise ValueError(f"{path} has a moving average of {name} that is not of its shape: use another copy")
    check_finite({part: state.get(part) for part in ('optimizers', 'ema')}, path)
