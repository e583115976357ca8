# Poor man's configurator, after nanoGPT: exec'd by every script, in that script's globals, right after its knobs.
#
#     n_layer = 6            # a knob: a lowercase global that is a bool, an int, a float, a str or None
#     learning_rate = 1e-3   # its default says which type it takes
#     limits = {'n_layer': (1, None), 'learning_rate': (0, 1)}      # what they may be, see check in data/knobs.py
#     exec(open(in_repo('configurator.py')).read())              # in_repo: data/files.py, wherever the user stands
#     print(config)          # every knob with its final value; n_layer and the others are set as well
#
# $ python train.py --help                                  the script's docstring, every knob and its default
# $ python train.py config/tiny.py --n_layer=4              what the file says, then what the flags say
# $ python train.py --dropout=0 config/a.py config/b.py     flags win wherever they stand; files apply in order
# $ python train.py config/tiny.py --knobs                  every knob's final value as a line of JSON, for other tools
#
# A config file is plain Python that sets knobs and can compute with them: max_iters = 2 * 1000, total = 4 * batch_size.
# (There batch_size is the script's or an earlier file's: flags come after all files.) A name of its own starts with _.
#
# How a script ends when something is wrong. Everywhere in this repo a check is an assert, or, where it guards against
# files and downloads from outside, a ValueError, and its message names the value and the remedy. Only data/knobs.py
# makes one line on stderr of it, "error: message", and status 1. PICOCHAT_TRACE=1 shows the whole traceback instead.
# (python -O takes asserts out: it is not supported. What guards against the outside stays even then.)
#
# This text is a comment because exec would store a docstring as the script's own __doc__. The work is data/knobs.py's.

from data.knobs import configure as _configure
config = _configure(globals())
del _configure
