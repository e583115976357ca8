"""configurator.py, as its users meet it: a small script with a knob of every kind is run with a command line."""
import ast
import functools
import glob
import itertools
import json
import os
import re
import runpy

import conftest
import pytest
from conftest import start

SCRIPT = '''"""
Trains a toy.
"""
import json
from os import path
SEED = 1337             # a constant, not a knob
_private = 3
n_layer = 6             # how deep
batch_size = 12         # rows, or 'auto'
total = 48
top_k = 200
learning_rate = 1e-3    # lower it when the loss jumps
dropout = 0.1
compile = True          # hides a builtin
input = ''              # hides another
out_dir = 'out'
start = '\\n'
stop = None             # text that ends a sample
width = 4
share = 0.5
mode = 'a'
limits = {'width': (1, None, 'auto'), 'share': (0, 1), 'mode': ['a', 'b']}
def fit(): return 'the script\\'s own fit'
def _read(): return 'the script\\'s own _read'
_before = [*globals()]
exec(open('configurator.py').read())
assert [k for k in globals() if k not in _before and k[:2] != '__'] == ['_before', 'config']
assert config == {k: globals()[k] for k in config}
assert __doc__.strip() == 'Trains a toy.' and __name__ == '__main__'
assert fit() == 'the script\\'s own fit' and _read() == 'the script\\'s own _read' and SEED == 1337 and _private == 3
print(json.dumps(config))
'''
DEFAULTS = dict(n_layer=6, batch_size=12, total=48, top_k=200, learning_rate=1e-3, dropout=0.1, compile=True, input='',
                out_dir='out', start='\n', stop=None, width=4, share=0.5, mode='a')

FILES = {
    'a.py': 'n_layer = 2\ndropout = 0\nout_dir = "a"\n',
    'b.py': 'n_layer = 3\nbatch_size = "auto"\ntop_k = None\ncompile = False\n',
    'expr.py': 'import math as _math\n_n = 5\ndef _twice(x): return 2 * x\nn_layer = _twice(_n) + int(_math.sqrt(9))\n'
               'batch_size = 8\ntotal = batch_size * n_layer\nlearning_rate = learning_rate / 2\n',
    'more.py': 'total = n_layer * 10\n',
    'stop.py': 'stop = "END"\n',
    'typo.py': 'n_layr = 3\n',
    'imports.py': 'import math\nn_layer = math.ceil(2.5)\n',
    'wrong.py': 'n_layer = 1.5\n',
    'wrong_str.py': 'out_dir = None\n',
    'syntax.py': 'n_layer = 3\nn_layer = = 4\n',
    'raises.py': 'n_layer = 3\ndef _f():\n    return 1 / 0\n\ntotal = _f()\n',
    'notes.txt': 'n_layer = 3\n',
    'says.py': 'print("ran")\n'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('configurator')
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / 'script.py').write_text(SCRIPT)
    return folder


def run(folder, args, script='script.py'):
    """args: a list, in which '@x' stands for the path of file x in the test's folder -> (status, stdout, stderr)"""
    got = conftest.run(folder / script, *[folder / arg[1:] if arg.startswith('@') else arg for arg in args])
    return got.status, got.out, got.err


@pytest.mark.parametrize('args', [['--start=two\nlines é'], ['--n_layer=two\nlines'], ['--help']])
def test_a_process_says_the_same(folder, args):
    p = start(folder / 'script.py', *args, env=os.environ | {'PYTHONPATH': os.getcwd()})
    assert (p.wait(), p.stdout.read(), p.stderr.read()) == run(folder, args)


@pytest.mark.parametrize('args, changed', [
    ([], {}),
    # files, flags, and their order
    (['@a.py'], dict(n_layer=2, dropout=0.0, out_dir='a')),
    (['--n_layer=9', '@a.py'], dict(n_layer=9, dropout=0.0, out_dir='a')),
    (['@a.py', '@b.py'], dict(n_layer=3, dropout=0.0, out_dir='a', batch_size='auto', top_k=None, compile=False)),
    # the default's type holds whatever a file has set
    (['@b.py', '--top_k=5', '--batch_size=4'], dict(n_layer=3, batch_size=4, top_k=5, compile=False)),
    (['@stop.py', '--stop=7'], dict(stop=7)),
    (['@expr.py'], dict(n_layer=13, batch_size=8, total=104, learning_rate=5e-4)),
    (['@expr.py', '@more.py'], dict(n_layer=13, batch_size=8, total=130, learning_rate=5e-4)),
    (['@more.py', '--n_layer=1'], dict(n_layer=1, total=60)),  # a file sees no flag
    (['--n_layer=1_000'], dict(n_layer=1000)),
    (['--batch_size=auto'], dict(batch_size='auto')),
    (['--learning_rate=1'], dict(learning_rate=1.0)),
    (['--compile=False', '--compile=tRUE'], dict(compile=True)),
    # str: the text, literally
    (['--out_dir=123'], dict(out_dir='123')),
    (['--start=a=b'], dict(start='a=b')),
    # None: what the text spells
    (['--stop=none'], dict(stop=None)),
    (['--stop=0.5'], dict(stop=0.5))])
def test_config(folder, args, changed):
    status, out, err = run(folder, args)
    assert (status, err) == (0, '')
    want = {**DEFAULTS, **changed}
    assert json.loads(out) == want
    assert out == json.dumps(want) + '\n'  # also tells 1 from 1.0 and from True, and the order of the knobs


@pytest.mark.parametrize('args, parts', [
    (['--n_layr=3'], ['unknown key', "'n_layr'", '--n_layer=3']),
    (['--zzzz=3'], ['unknown key', "'zzzz'", '--help']),
    (['--_private=4'], ['unknown key']),
    (['@typo.py'], ['typo.py', 'unknown key', "'n_layr'", 'n_layer?']),
    (['@imports.py'], ['imports.py', 'unknown key', "'math'", 'import math as _math']),
    # spellings, each answered by the right one
    (['--n_layer', '3'], ["'--n_layer'", '--n_layer=3']),
    (['--n-layer=3'], ['--n_layer=3']),
    (['--n_layer'], ['--n_layer=VALUE']),
    (['--learning_rate', '-1'], ['--learning_rate=-1']),
    (['--compile'], ['--compile=True']),
    (['--start', 'two words'], ["'--start=two words'"]),
    # types: the value, what is expected, and where
    (['--n_layer=1.5'], ['--n_layer=1.5', 'an int', '1.5']),
    (['--n_layer=true'], ['an int', 'True']),
    (['--learning_rate=fast'], ['--learning_rate=fast', 'a float', "'fast'"]),
    (['--compile=1'], ['--compile=1', 'a bool', '1']),
    (['--n_layer=two\nlines'], ['an int', "'two\\nlines'"]),
    (['@wrong.py'], ['wrong.py', 'n_layer', 'an int', '1.5']),
    (['@wrong_str.py'], ['wrong_str.py', 'out_dir', 'a str', 'None']),
    (['@wrong.py', '--n_layer=3'], ['wrong.py', 'an int']),  # a flag does not hide what is wrong in a file
    (['--width=0'], ['width (0) must be an int of at least 1, or auto']),
    (['--width=none'], ['width (None)']),
    (['--share=2'], ['share (2.0) must be a number of at least 0 and at most 1']),
    (['--mode=c'], ['mode (c) must be one of a, b']),
    # files
    (['config/missing.py'], ["'config/missing.py'", 'no config file']),
    (['@notes.txt'], ['notes.txt', '.py']),
    (['@syntax.py'], ['syntax.py, line 2', 'SyntaxError']),
    (['@raises.py'], ['raises.py, line 3', 'ZeroDivisionError']),
    # nothing else happens: no file runs when a later word is wrong
    (['@says.py', '--n_layr=3'], ['n_layr'])])
def test_error(folder, args, parts):
    status, out, err = run(folder, args)
    assert (status, out) == (1, '')
    assert err.startswith('error: ') and err.endswith('\n') and err.count('\n') == 1, err
    for part in parts:
        assert part in err


@pytest.mark.parametrize('args', [['--help'], ['-h'], ['@says.py', '--n_layr=3', '--help']])
def test_help(folder, args):
    status, out, err = run(folder, args)
    assert (status, err) == (0, '')
    lines = [' '.join(line.split()) for line in out.splitlines()]
    assert lines[0] == 'Trains a toy.'
    knobs = lines[lines.index('') + 2:]
    assert [line.split(' = ')[0] for line in knobs] == list(DEFAULTS)
    assert 'n_layer = 6 how deep' in knobs
    assert 'learning_rate = 0.001 lower it when the loss jumps' in knobs
    assert "start = '\\n'" in knobs
    assert 'stop = None text that ends a sample' in knobs


# ----- commands that are told: in the READMEs, in docstrings and comments, and in the lines of ladders

FILE = r'(?:\w+/)*\w+\.py'
VALUE = r'(?:"[^"]*"|\$\([^)]*\)+|[^\s"`])*'  # of a knob: words, text in quotes, $(another command)
COMMAND = re.compile(rf'(?:python3? |torchrun [^\n`]*?|`(?=\w+\.py --))({FILE})((?: +(?:{FILE}|--\w+={VALUE}))*)')


def runs_configurator(line):
    return isinstance(line, ast.Expr) and ast.unparse(line) == "exec(open(in_repo('configurator.py')).read())"


def knobs_of(script):
    """The names that a script, or its main block, sets before the line that runs configurator.py."""
    names = set()
    for block in ast.walk(ast.parse(open(script).read())):
        lines = block.body if isinstance(block, (ast.Module, ast.If)) else []
        if any(map(runs_configurator, lines)):
            for line in itertools.takewhile(lambda line: not runs_configurator(line), lines):
                names |= {node.id for node in ast.walk(line) if isinstance(line, ast.Assign)
                          and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names - {'limits'}


def commands_in(text):
    """-> [(script, what follows it)]. A command may go on behind a backslash, or on a second line of prose."""
    text = re.sub(r'\\\n[ #]*', ' ', text)
    text = re.sub(r'`[^`\n]+\n[^`\n]+`', lambda quoted: re.sub(r'\s+', ' ', quoted[0]), text)
    return [command.groups() for command in COMMAND.finditer(text)]


def not_there(script, words, knobs):
    """The files and knobs that a command names and that do not exist. knobs: {script: names}"""
    files, keys = [script], []
    for key, value, file in re.findall(rf' --(\w+)=({VALUE})| ({FILE})', words):
        files += [file] if file else []
        keys += [key] if key else []
    known = knobs.get(script, keys)  # what is not in knobs takes other words
    if script == 'bench.py' and re.search('--mode=(train|memory)', words):
        known = known | knobs['train.py']
    return [file for file in files if not os.path.exists(file)] + [key for key in keys if key not in known]


@functools.cache
def all_knobs():
    scripts = [*glob.glob('*.py'), *glob.glob('data/*/prepare.py'), *glob.glob('tests/[!t]*.py')]
    return {script: names for script in scripts if (names := knobs_of(script))}


def test_commands_that_are_told_can_be_given():
    knobs = all_knobs()
    paths = ['README.md', 'config/README.md', 'tests/README.md', *glob.glob('[!c]*.py'), *glob.glob('config/*.py'),
             *glob.glob('data/**/*.py', recursive=True), *glob.glob('tests/[!t]*.py')]
    texts = {path: open(path).read() for path in paths}
    for path in glob.glob('config/*.py'):
        texts[path] += runpy.run_path(path).get('rungs', '')  # as they are run, {_names} filled in
    told = [(path, *command) for path, text in texts.items() for command in commands_in(text)]
    assert [(*command, gone) for command in told if (gone := not_there(*command[1:], knobs))] == []
    assert len(told) > 300


@pytest.mark.parametrize('path', sorted(glob.glob('config/*.py')))
def test_a_config_sets_knobs_of_a_script_and_stands_in_the_notebook(path):
    names = {name for name in runpy.run_path(path) if name[0] != '_'}
    assert any(names <= its for its in all_knobs().values())
    assert os.path.basename(path) in open('config/README.md').read()


def test_words_in_backticks_are_there():
    names = set().union(*all_knobs().values())
    for path in ('README.md', 'config/README.md', 'tests/README.md'):
        text = open(path).read()
        assert set(re.findall(r'`--(\w+)=', text)) - names <= {'key'}, path
        for file in re.findall(r'(?<![\w/])(?:config|data|tests)/(?:\w+/)*\w+\.\w+', text):
            assert os.path.exists(file), (path, file)
