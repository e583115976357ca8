# Poor man's configurator, after nanoGPT: exec'd by every script, in that script's globals, right after its knobs.
#
#     n_layer = 6            # a knob: a lowercase global that is a bool, an int, a float, a str or None
#     learning_rate = 1e-3   # its default says which type it takes
#     limits = {'n_layer': (1, None), 'learning_rate': (0, 1)}      # what they may be, see check below
#     exec(open(in_repo('configurator.py')).read())              # in_repo: data/files.py, wherever the user stands
#     print(config)          # every knob with its final value; n_layer and the others are set as well
#
# $ python train.py --help                                  the script's docstring, every knob and its default
# $ python train.py config/tiny.py --n_layer=4              what the file says, then what the flags say
# $ python train.py --dropout=0 config/a.py config/b.py     flags win wherever they stand; files apply in order
# $ python train.py config/tiny.py --knobs                  every knob's final value as one line of JSON, for other tools
#
# A config file is plain Python that sets knobs and can compute with them: max_iters = 2 * 1000, total = 4 * batch_size.
# (There batch_size is the script's or an earlier file's: flags come after all files.) A name of its own starts with _.
#
# How a script ends when something is wrong. Everywhere in this repo a check is an assert, or, where it guards against
# files and downloads from outside, a ValueError, and its message names the value and the remedy. Here, and only here,
# that becomes one line on stderr, "error: message", and status 1. PICOCHAT_TRACE=1 shows the whole traceback instead.
# (python -O takes asserts out: it is not supported. What guards against the outside stays even then.)
#
# This text is a comment because exec would store a docstring as the script's own __doc__, and everything below is two
# functions because exec would let our helpers replace the script's of the same name.

def _end_in_one_line():
    """Sees to how the script ends and prints: errors in a line, closed pipes quietly, odd characters replaced or shown."""
    import atexit, os, sys
    from data.files import shown

    optional = ('gguf', 'matplotlib', 'pyarrow', 'requests', 'safetensors', 'transformers', 'wandb')
    no_memory = ("DefaultCPUAllocator: can't allocate memory", 'DefaultCPUAllocator: not enough memory',
                 'std::bad_alloc')

    def ran_out_of_memory(error):
        """PyTorch has an exception of its own for GPUs; on a CPU only the text of a RuntimeError tells."""
        name = type(error).__name__
        return (isinstance(error, MemoryError) or name == 'OutOfMemoryError'
                or name == 'RuntimeError' and any(text in str(error) for text in no_memory))

    def tell(kind, error, trace):
        """In the place of Python's own hook for an exception that nobody caught; True if a line said it."""
        if isinstance(error, BrokenPipeError):      # whoever read our output has left: nobody is there to be told
            return True
        message = ' '.join(str(error).split())
        if len(message) > 2000:                     # a name from outside may have any length
            message = f'{message[:1000]} ... {message[-1000:]}'
        status = 1
        if ran_out_of_memory(error):
            message = f'memory ran out ({message[:200]}): use a smaller batch_size, or a smaller model'
            status = 3                              # batch_size=auto knows by this that a batch was too large
        elif isinstance(error, ModuleNotFoundError) and (error.name or '').split('.')[0] in optional:
            message = f"{error.name.split('.')[0]} is not installed: pip install {error.name.split('.')[0]}"
        elif not isinstance(error, (AssertionError, ValueError, OSError)) or not message:
            return sys.__excepthook__(kind, error, trace)       # a mistake of ours: it must be seen whole
        if os.environ.get('PICOCHAT_TRACE'):
            sys.__excepthook__(kind, error, trace)
        else:
            print(f'error: {shown(message)}', file=sys.stderr)
        if status != 1:
            sys.exit(status)
        return True

    def flush():
        """Often the text reaches a pipe only here, at the very end, and its reader has left."""
        try:
            if sys.stdout:
                sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    sys.excepthook = tell
    atexit.register(flush)
    for stream in (sys.stdout, sys.stderr):         # a character that the terminal does not have ends nothing
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')
        if stream and stream.isatty():              # what a model or a file says is shown there, and no command to it
            stream.write = lambda text, write=stream.write: write(shown(text))
            os.environ['PYTHON_COLORS'] = '0'       # those of Python's own tracebacks would be shown, too


def _configure(script, install_hook):
    import ast, difflib, json, os, re, shlex, sys, traceback

    # The knobs leave the globals while we work: one called compile or input would hide the builtin from the code below.
    # These two lines use no builtin for the same reason; only exec, open and globals cannot be names of knobs.
    kinds = [value.__class__ for value in (None, False, 0, 0.0, '')]
    defaults = {key: script.pop(key) for key in [*script]
                if script[key].__class__ in kinds and key[0] != '_' and not key.isupper()}
    install_hook()
    args, home = sys.argv[1:], os.path.expanduser('~')

    def fail(message):
        raise ValueError(message)

    def nearest(key):
        return (difflib.get_close_matches(key.lower().replace('-', '_'), defaults, n=1) or [None])[0]

    def read(text):
        """The None, bool, int or float that a flag's text spells, else the text itself."""
        words = {'none': None, 'true': True, 'false': False}
        if text.lower() in words:
            return words[text.lower()]
        try:
            value = ast.literal_eval(text)
        except Exception:  # any of five kinds, says its documentation; they all mean: not a Python literal
            return text
        return value if type(value) in (int, float) else text

    def fit(key, value, where):
        """The value as this knob holds it. Its type is that of the script's default, whatever a file has set since."""
        kind = type(defaults[key])
        if type(value) is str:
            # ~/ is the home folder where a path may begin: at the start of a text, behind a word that says what kind of
            # path it is (FILE:~/x, gpt2:~/x) and behind a + (several teachers). Any other ~ is a plain character.
            value = re.sub(r'(^|\+)(\w+:)?~(?=/)', lambda found: (found[1] + (found[2] or '') + home), value)
        if kind is float and type(value) is int:
            return float(value)
        off = value is None and kind in (int, float)                  # a number can be turned off: --top_k=none
        auto = kind is int and type(value) is str and value == 'auto'  # or left to the script: --batch_size=auto
        if type(value) is kind or off or auto or (defaults[key] is None and type(value) in kinds):
            return value
        takes = {bool: 'a bool: True or False', int: "an int, None or 'auto'", float: 'a float or None', str: 'a str'}
        fail(f"{where}: {key} takes {takes.get(kind, 'None, a bool, an int, a float or a str')}, got {value!r}")

    def check(key, value, allowed):
        """
        allowed: [all that the knob may be], or (least, most, further words), None for no bound. What is None by default
        may stay None; whether it is an int or any number, its bounds say.
        """
        if value is None and defaults[key] is None:
            return
        if isinstance(allowed, list):
            if value not in allowed:
                fail(f"{key} ({value}) must be one of {', '.join(str(a) if a != '' else 'nothing' for a in allowed)}")
            return
        least, most, *words = allowed
        if value in words:
            return
        whole = type(defaults[key]) is int or defaults[key] is None and type(least if least is not None else most) is int
        is_number = type(value) is int or type(value) is float and not whole
        if not (is_number and (least is None or value >= least) and (most is None or value <= most)):
            bounds = [f'at least {least}'] * (least is not None) + [f'at most {most}'] * (most is not None)
            fail(f"{key} ({value}) must be {'an int' if whole else 'a number'}"
                 + f"{' of ' * bool(bounds)}{' and '.join(bounds)}" + ''.join(f', or {word}' for word in words))

    if '-h' in args or '--help' in args:
        source = open(script['__file__'], encoding='utf-8').read().rpartition('exec(open(')[0]
        beside = dict(re.findall(r'^ *(\w+) *=.*?(?: # *(.*))?$', source, re.M))  # a knob's comment; the last line wins
        print((script.get('__doc__') or '').strip() + '\n\nknobs, set by --key=value or in a config file:')
        for key, value in defaults.items():
            print(f"{f'  {key} = {value!r}':36} {beside.get(key, '')}".rstrip())
        sys.exit(0)
    show = '--knobs' in args
    args = [arg for arg in args if arg != '--knobs']

    # Flags are read before any file runs, so that a typo stops the script first, and applied after all of them.
    files, flags = [], {}
    for i, arg in enumerate(args):
        key, equals, text = arg.lstrip('-').partition('=')
        if key in defaults and arg.startswith(f'--{key}='):
            flags[key] = fit(key, text if type(defaults[key]) is str else read(text), arg)
        elif arg.startswith('-') or (equals and not arg.endswith('.py')):  # --n_layer 3, --n-layer=3, n_layer=3, a typo
            problem = f'{arg!r} is not --key=value' if key in defaults else f'unknown key {key!r} in {arg!r}'
            known = key if key in defaults else nearest(key)
            if not known:
                fail(f'{problem}, --help lists the knobs')
            if not equals:  # the value is the next word, if that looks like one
                text = 'True' if type(defaults[known]) is bool else 'VALUE'
                text = ([word for word in args[i + 1:i + 2] if word[:2] != '--' and word[-3:] != '.py'] or [text])[0]
            fail(f"{problem}, did you mean {shlex.quote(f'--{known}={text}')}?")
        elif not arg.endswith('.py'):
            fail(f'{arg!r} is not a config file, whose name ends in .py, nor a flag --key=value')
        else:
            beside = os.path.join(os.path.dirname(script['__file__']), arg)     # config/ lies beside the scripts
            if not os.path.isfile(arg) and not os.path.isfile(beside):
                fail(f'no config file {arg!r} in {os.getcwd()}')
            files.append(arg if os.path.isfile(arg) else beside)

    knobs = dict(defaults)
    for file in files:
        names = dict(knobs, __file__=file)  # the file's globals: it cannot replace a function of the script
        try:
            exec(compile(open(file, 'rb').read(), file, 'exec'), names)
        except Exception as e:
            lines = [line for frame, line in traceback.walk_tb(e.__traceback__) if frame.f_code.co_filename == file]
            line = lines[-1] if lines else getattr(e, 'lineno', None)  # a syntax error ran no line but knows its own
            fail(f"{file}, line {line}: {type(e).__name__}: {getattr(e, 'msg', e)}")
        for key, value in names.items():
            if key in defaults:
                knobs[key] = fit(key, value, file)
            elif key[0] != '_':
                near = nearest(key)
                fail(f'{file}: unknown key {key!r}' + (f', did you mean {near}?' if near else '')
                     + ' (a name that is no knob starts with _, as in: import math as _math)')
    knobs.update(flags)
    for keys, allowed in script.get('limits', {}).items():
        for key in keys.split():
            check(key, knobs[key], allowed)
    if show:
        print(json.dumps(knobs))
        sys.exit(0)
    script.update(knobs)
    return knobs

config = _configure(globals(), _end_in_one_line)
del _configure, _end_in_one_line
