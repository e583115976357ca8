"""
What configurator.py does for every script: it reads knobs from the command line and config files and checks them, and
decides how the script ends if something is wrong. A library.

    config = configure(globals())       # sets the script's knobs -> {knob: value}
"""
import ast
import atexit
import difflib
import json
import os
import re
import shlex
import sys
import traceback

from data.files import shown

KINDS = (type(None), bool, int, float, str)     # what a knob may be
OPTIONAL = ('gguf', 'matplotlib', 'pyarrow', 'requests', 'safetensors', 'transformers', 'wandb')
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", 'DefaultCPUAllocator: not enough memory', 'std::bad_alloc')

# -----------------------------------------------------------------------------
# how a script ends

def ran_out_of_memory(error):
    """Whether memory ran out. For GPUs PyTorch has an exception; on a CPU only the text of a RuntimeError tells."""
    name = type(error).__name__
    return (isinstance(error, MemoryError) or name == 'OutOfMemoryError'
            or name == 'RuntimeError' and any(text in str(error) for text in NO_MEMORY))


def tell(kind, error, trace):
    """The hook for exceptions that nobody caught: prints one line. -> True if it did, or had nothing to print."""
    if isinstance(error, BrokenPipeError):      # whoever read our output has left
        return True
    message = ' '.join(str(error).split())
    if len(message) > 2000:                     # a name from outside may have any length
        message = f'{message[:1000]} ... {message[-1000:]}'
    status = 1
    if ran_out_of_memory(error):
        message = f'memory ran out ({message[:200]}): use a smaller batch_size, or a smaller model'
        status = 3                              # tells batch_size=auto that a batch was too large
    elif isinstance(error, ModuleNotFoundError) and (error.name or '').split('.')[0] in OPTIONAL:
        message = f"{error.name.split('.')[0]} is not installed: pip install {error.name.split('.')[0]}"
    elif not isinstance(error, (AssertionError, ValueError, OSError)) or not message:
        return sys.__excepthook__(kind, error, trace)       # a bug of ours: show the traceback
    if os.environ.get('PICOCHAT_TRACE'):
        sys.__excepthook__(kind, error, trace)
    else:
        print(f'error: {shown(message)}', file=sys.stderr)
    if status != 1:
        sys.exit(status)
    return True


def flush():
    """Flushes stdout, quietly if its reader has left: text often reaches a pipe only here, at the very end."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_in_one_line():
    """Sets up how the script ends and prints: errors in one line, closed pipes quietly, odd characters made safe."""
    sys.excepthook = tell
    atexit.register(flush)
    for stream in (sys.stdout, sys.stderr):         # characters that the terminal cannot show become question marks
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')
        if stream and stream.isatty():              # text of a model or a file must not control the terminal
            stream.write = lambda text, write=stream.write: write(shown(text))
            os.environ['PYTHON_COLORS'] = '0'       # or the colours of Python's tracebacks would show as \x1b

# -----------------------------------------------------------------------------
# knobs

def configure(script):
    """
    script: a script's globals, with its knobs -> {knob: value}; sets the knobs there, too. ValueError if a value is not
    allowed.
    """
    end_in_one_line()
    defaults = {key: value for key, value in script.items()
                if type(value) in KINDS and key[0] != '_' and not key.isupper()}
    args = [arg for arg in sys.argv[1:] if arg != '--knobs']
    if '-h' in args or '--help' in args:
        print_help(script, defaults)
        sys.exit(0)

    # Flags are read before any file runs, so that a typo stops the script first, and applied after all of them.
    files, flags = read_arguments(args, defaults, os.path.dirname(script['__file__']))
    knobs = dict(defaults)
    for file in files:
        knobs |= run_file(file, knobs, defaults)
    knobs |= flags
    for keys, allowed in script.get('limits', {}).items():
        for key in keys.split():
            check(key, knobs[key], defaults[key], allowed)
    if '--knobs' in sys.argv[1:]:
        print(json.dumps(knobs))
        sys.exit(0)
    script.update(knobs)
    return knobs


def print_help(script, defaults):
    """Prints the script's docstring, and every knob with its default and its comment."""
    source = open(script['__file__'], encoding='utf-8').read().rpartition('exec(open(')[0]
    beside = dict(re.findall(r'^ *(\w+) *=.*?(?: # *(.*))?$', source, re.M))    # a knob's comment; the last line wins
    print((script.get('__doc__') or '').strip() + '\n\nknobs, set by --key=value or in a config file:')
    for key, value in defaults.items():
        print(f"{f'  {key} = {value!r}':36} {beside.get(key, '')}".rstrip())


def read_arguments(args, defaults, home):
    """The words of a command line -> the config files, found here or in home, and {knob: value} of the flags."""
    files, flags = [], {}
    for i, arg in enumerate(args):
        key, equals, text = arg.lstrip('-').partition('=')
        if key in defaults and arg.startswith(f'--{key}='):
            flags[key] = fit(text if type(defaults[key]) is str else read(text), key, defaults[key], arg)
        elif arg.startswith('-') or (equals and not arg.endswith('.py')):
            raise ValueError(what_was_meant(arg, args[i + 1:i + 2], defaults))
        elif not arg.endswith('.py'):
            raise ValueError(f'{arg!r} is not a config file, whose name ends in .py, nor a flag --key=value')
        else:
            beside = os.path.join(home, arg)        # config/ lies beside the scripts
            if not os.path.isfile(arg) and not os.path.isfile(beside):
                raise ValueError(f'no config file {arg!r} in {os.getcwd()}')
            files.append(arg if os.path.isfile(arg) else beside)
    return files, flags


def what_was_meant(arg, following, defaults):
    """A message for --n_layer 3, --n-layer=3, n_layer=3 or a typo. following: a list with the next word of the line."""
    key, equals, text = arg.lstrip('-').partition('=')
    problem = f'{arg!r} is not --key=value' if key in defaults else f'unknown key {key!r} in {arg!r}'
    known = key if key in defaults else nearest(key, defaults)
    if not known:
        return f'{problem}, --help lists the knobs'
    if not equals:                                  # suggest the next word as the value, if it looks like one
        text = 'True' if type(defaults[known]) is bool else 'VALUE'
        text = ([word for word in following if word[:2] != '--' and word[-3:] != '.py'] or [text])[0]
    return f"{problem}, did you mean {shlex.quote(f'--{known}={text}')}?"


def run_file(file, knobs, defaults):
    """Runs a config file, which can read the knobs so far -> {knob: value} after it."""
    names = dict(knobs, __file__=file)              # globals of its own: it cannot replace a function of the script
    try:
        exec(compile(open(file, 'rb').read(), file, 'exec'), names)
    except Exception as e:
        lines = [line for frame, line in traceback.walk_tb(e.__traceback__) if frame.f_code.co_filename == file]
        line = lines[-1] if lines else getattr(e, 'lineno', None)   # a syntax error comes before any line has run
        raise ValueError(f"{file}, line {line}: {type(e).__name__}: {getattr(e, 'msg', e)}")
    fitted = {key: fit(names[key], key, default, file) for key, default in defaults.items() if key in names}
    unknown = [key for key in names if key not in defaults and key[0] != '_']
    if unknown:
        near = nearest(unknown[0], defaults)
        raise ValueError(f'{file}: unknown key {unknown[0]!r}' + (f', did you mean {near}?' if near else '')
                         + ' (a name that is no knob starts with _, as in: import math as _math)')
    return fitted


def nearest(key, defaults):
    """The knob that is spelt most like key, or None."""
    return (difflib.get_close_matches(key.lower().replace('-', '_'), defaults, n=1) or [None])[0]


def read(text):
    """The None, bool, int or float that a flag's text spells, else the text itself."""
    words = {'none': None, 'true': True, 'false': False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except Exception:  # one of five types, by its documentation, which all mean that text is no Python literal
        return text
    return value if type(value) in (int, float) else text


def fit(value, key, default, where):
    """
    The value as this knob holds it: of the type of the script's default, whatever files have set since. where: the flag
    or file that gives the value, for the error.
    """
    kind, home = type(default), os.path.expanduser('~')
    if type(value) is str:
        # ~/ is the home folder where a path can begin: at the start of a text, after a kind of path (FILE:~/x,
        # gpt2:~/x) and after a + (several teachers). Any other ~ is a plain character.
        value = re.sub(r'(^|\+)(\w+:)?~(?=/)', lambda found: (found[1] + (found[2] or '') + home), value)
    if kind is float and type(value) is int:
        return float(value)
    off = value is None and kind in (int, float)                  # numbers can be turned off: --top_k=none
    auto = kind is int and type(value) is str and value == 'auto'  # ints can be left to the script: --batch_size=auto
    if type(value) is kind or off or auto or (default is None and type(value) in KINDS):
        return value
    takes = {bool: 'a bool: True or False', int: "an int, None or 'auto'", float: 'a float or None', str: 'a str'}
    raise ValueError(f"{where}: {key} takes {takes.get(kind, 'None, a bool, an int, a float or a str')}, got {value!r}")


def check(key, value, default, allowed):
    """
    ValueError unless the knob may have this value. allowed: a list of all values, or (least, most, further words) with
    None for no bound. A knob that is None by default may stay None; the type of its bounds tells whether it takes only
    ints.
    """
    if value is None and default is None:
        return
    if isinstance(allowed, list):
        if value not in allowed:
            named = ', '.join(str(a) if a != '' else 'nothing' for a in allowed)
            raise ValueError(f'{key} ({value}) must be one of {named}')
        return
    least, most, *words = allowed
    if value in words:
        return
    bound = least if least is not None else most
    whole = type(default) is int or default is None and type(bound) is int
    is_number = type(value) is int or type(value) is float and not whole
    if not (is_number and (least is None or value >= least) and (most is None or value <= most)):
        bounds = [f'at least {least}'] * (least is not None) + [f'at most {most}'] * (most is not None)
        raise ValueError(f"{key} ({value}) must be {'an int' if whole else 'a number'}"
                         + f"{' of ' * bool(bounds)}{' and '.join(bounds)}"
                         + ''.join(f', or {word}' for word in words))
