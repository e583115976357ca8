"""
Questions and answers about the running Python's own standard library, for chat fine-tuning and for measuring.
Offline; the files are read, nothing is imported.

$ python data/stdlib_bpe/prepare.py         the tokenizer, that of the model to be fine-tuned
$ python data/pydoc_chat/prepare.py
$ python data/pydoc_chat/prepare.py --tokenizer=out-smollm2 --name=pydoc_smollm2        for another model, in its format
$ python data/pydoc_chat/prepare.py --tasks=pydoc.jsonl         multiple choice, for bench.py --mode=tasks

One conversation of one to three exchanges about each public module, class, function and method with a docstring: what
it does, its signature, arguments, defaults, methods. The modules held out are those of stdlib_char and stdlib_bpe.
Takes some 5 seconds. With Python 3.11.7 you see

    6,383 conversations for training and 253 for validation, 4,653 and 188 of several exchanges;
        0 files are not Python
    6,383 and 253 conversations with 12,906 answers in 1,480 and 54 rows of 256 tokens:
        43.5 % of the tokens are learnt, 1.3 % are padding; 0 conversations are cut at a turn, 0 left out
    data/pydoc_chat: 378,880 training and 13,824 validation tokens, vocabulary of 4,096 (chat),
        sha256 27b16b43 b7fb2240

The multiple choice asks a model that has read Python, not one that chats: from which of four modules could a name be
imported, and which of four docstrings is that of a function, where the other three are of its own module. Half of the
questions, if there are so many, are about the modules held out.
"""

import ast
import json
import random
import re
import os
import sys
import warnings
from collections import Counter

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.files import in_repo, write_text
from data.writer import chat_tokenizer, dataset_dir, stdlib_files, stdlib_held_out, stdlib_source, write_chats

# -----------------------------------------------------------------------------
name = 'pydoc_chat'  # the dataset's name
tokenizer = in_repo('data/stdlib_bpe')  # the model's: the dataset it was trained on, an out_dir, gguf:FILE, hf:FOLDER
row = 256  # tokens a row, which must be the block_size of training
root = ''  # another folder of Python files to read instead
seed = 1337  # of the choice of questions
out_dir = ''  # empty: data/<name>
tasks = ''  # a .jsonl file: multiple choice is written to it, and no dataset is made
questions = 200  # of each kind, as many about modules held out as about others

limits = {'row': (8, None), 'questions': (1, None)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())

# For each kind of fact: questions that name the thing, and questions about the thing spoken of last.
QUESTIONS = {
    'module': (['What is the module {x} for?', 'What does the module {x} do?', 'Tell me about the module {x}.'],
               ['What is it for?']),
    'contents': (['What does the module {x} define?', 'Which classes and functions are in {x}?', 'What is in {x}?'],
                 ['What does it define?', 'What is in it?']),
    'class': (['What is the class {x}?', 'What is {x}?', 'What is {x} for?', 'Tell me about the class {x}.'],
              ['What is it for?', 'What is it?']),
    'bases': (['What is {x} derived from?', 'Which are the base classes of {x}?'],
              ['What is it derived from?', 'And its base classes?']),
    'methods': (['Which methods does {x} have?', 'What are the methods of {x}?', 'List the methods of {x}.'],
                ['Which methods does it have?', 'And its methods?']),
    'property': (['What is {x}?', 'What does {x} hold?', 'Tell me about {x}.'],
                 ['What does it hold?']),
    'what': (['What does {x} do?', 'What is {x} for?', 'Explain {x}.', 'Tell me about {x}.',
              'What happens when I call {x}?'],
             ['What does it do?', 'What is it for?']),
    'signature': (['How do I call {x}?', 'What is the signature of {x}?', 'Show me how to call {x}.'],
                  ['How do I call it?', 'And how is it called?', 'Show me its signature.']),
    'arguments': (['What are the arguments of {x}?', 'Which arguments does {x} take?', 'What can I pass to {x}?'],
                  ['What are its arguments?', 'Which arguments does it take?']),
    'default': (['What is the default of {argument} in {x}?', 'What is {argument} if I leave it out of {x}?'],
                ['What is the default of {argument}?', 'And if I leave {argument} out?']),
    'name': (['Which {sort} of {owner} does this: {what}', 'What is the {sort} in {owner} for this? {what}'], []),
}


def listed(names, most=8):
    """['a', 'b', 'c'] -> 'a, b and c'; of more than `most` the first ones, and how many there are."""
    if len(names) > most:
        return f'{", ".join(names[:most])} and {len(names) - most} more'
    return f'{", ".join(names[:-1])} and {names[-1]}' if len(names) > 1 else names[0]


def first_sentence(node):
    """
    The first sentence of a docstring, on one line; None if there is none of at most 300 characters. A signature or
    examples at the beginning do not count.
    """
    paragraphs = [' '.join(part.split()) for part in re.split(r'\n\s*\n', ast.get_docstring(node) or '')]
    paragraph = next((part for part in paragraphs if not re.fullmatch(r'[\w.]+\(.*\)( ?->.*)?|>>>.*', part)), '')
    sentence = re.match(r'.{7,}?[.!?](?= [A-Z]|$)|.*', paragraph)[0]
    return sentence if 8 <= len(sentence) <= 300 else None


FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def definitions(body):
    """The public functions and classes that a body defines, also under an if or a try, each name once."""
    found = {}
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            inside = definitions(node.body)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)) and (node.name[0] != '_' or node.name == '__init__'):
            inside = [node]
        else:
            inside = []
        for inner in inside:
            found.setdefault(inner.name, inner)
    return list(found.values())


def arguments(function, bound):
    """A function's arguments without annotations, and without the first if it is bound."""
    args = function.args
    for arg in ast.walk(args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    if bound and (args.posonlyargs or args.args):
        (args.posonlyargs or args.args).pop(0)
    return args


def about_call(x, args):
    """Facts about a call of x(args), and the argument whose default is asked for."""
    plain = [*args.posonlyargs, *args.args]
    names = [arg.arg for arg in plain]
    names += [f'*{args.vararg.arg}'] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    names += [f'**{args.kwarg.arg}'] if args.kwarg else []
    facts = {'signature': f'{x}({ast.unparse(args)})',
             'arguments': f'It takes {listed(names, 20)}.' if names else 'It takes no arguments.'}
    # defaults belong to the last of the plain arguments; of those that are keywords only, some have None
    with_default = [*zip(plain[::-1], args.defaults[::-1]), *zip(args.kwonlyargs, args.kw_defaults)]
    optional = [(arg, default) for arg, default in with_default if default]
    if not optional:
        return facts, None
    arg, default = optional[-1]
    return facts | {'default': f'{ast.unparse(default)}.'}, arg.arg


def things(module, tree):
    """Subjects of questions in a module: (name, facts by kind of question, what else the questions mention)."""
    defined = definitions(tree.body)
    yield (module, {'module': first_sentence(tree),
                    'contents': f'{listed([node.name for node in defined])}.' if defined else None}, {})
    for node in defined:
        x = f'{module}.{node.name}'
        if not isinstance(node, ast.ClassDef):
            yield about_function(x, node, module, 'function', False)
            continue
        members = definitions(node.body)
        methods = [m for m in members if isinstance(m, FUNCTIONS) and m.name != '__init__']
        facts, argument = {}, None
        for init in members:
            if init.name == '__init__':
                facts, argument = about_call(x, arguments(init, True))
        bases = [ast.unparse(base) for base in node.bases]
        yield (x, {'class': first_sentence(node), 'bases': f'{listed(bases)}.' if bases else None,
                   'methods': f'{listed([m.name for m in methods])}.' if methods else None, **facts},
               {'argument': argument})
        for method in methods:
            how = [ast.unparse(decorator) for decorator in method.decorator_list]
            if any('property' in decorator for decorator in how):
                yield f'{x}.{method.name}', {'property': first_sentence(method)}, {}
            else:
                yield about_function(f'{x}.{method.name}', method, x, 'method', 'staticmethod' not in how)


def about_function(x, node, owner, sort, bound):
    what = first_sentence(node)
    facts, argument = about_call(x, arguments(node, bound))
    return (x, {'what': what, 'name': what and x, **facts},
            {'argument': argument, 'what': what, 'owner': owner, 'sort': sort})


def conversation(x, facts, mentions):
    """Messages about x, which depend on x and the seed alone; None if its docstring says nothing."""
    if not next(iter(facts.values())):
        return None
    rng = random.Random(f'{seed} {x}')
    kinds = [kind for kind, answer in facts.items() if answer and len(answer) <= 300]
    rng.shuffle(kinds)
    if kinds[0] == 'name':
        kinds = [kind for kind in kinds if kind != 'what']  # the question says it
    kinds = kinds[:1] + [kind for kind in kinds[1:] if kind != 'name']
    messages = []
    for i, kind in enumerate(kinds[:rng.choice((1, 2, 2, 3))]):
        question = rng.choice(QUESTIONS[kind][min(i, 1)]).format(x=x, **mentions)
        messages += [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': facts[kind]}]
    return messages


# -----------------------------------------------------------------------------
# multiple choice, in the format of data/bench/tasks.py. What is asked is Python source, as a model has read it: a name
# behind the import that it is most likely behind, and a docstring in its place.

def import_questions(modules, rng):
    """
    'from MODULE import' and a name that only one of the library's modules defines. The other three are of other
    packages and do not mention it; all four are held out, or none is, so that having trained on a module is no hint.
    """
    names = {module: [node.name for node in definitions(tree.body)] for module, _, tree in modules}
    owners = Counter(name for mine in names.values() for name in mine)
    public = lambda module: not any(part[0] == '_' for part in module.split('.'))
    names = {module: [name for name in mine if owners[name] == 1] for module, mine in names.items() if public(module)}
    heldout = {module: stdlib_held_out(module) for module, *_ in modules}
    words = {module: {*re.findall(r'\w+', text)} for module, text, _ in modules if names.get(module)}
    for module, name in shuffled([(module, name) for module in words for name in names[module]], rng):
        others = [other for other in words if heldout[other] == heldout[module]
                  and other.split('.')[0] != module.split('.')[0] and name not in words[other]]
        if len(others) >= 3:
            choices, gold = choice_of(f'from {module} import', [f'from {other} import' for other in others], rng)
            yield module, {'context_options': choices, 'continuation': name, 'gold': gold}


def functions(body):
    """The public functions and methods that a body defines."""
    for node in definitions(body):
        if isinstance(node, ast.ClassDef):
            yield from functions(node.body)
        elif node.name != '__init__':
            yield node


def docstring_questions(modules, rng):
    """
    The head of a public function, and the first sentences of four docstrings of its module, or of others where that has
    too few. Each pair of a name and a sentence is asked for once: mailboxes of nine kinds have the same methods.
    """
    found = {}
    for module, _, tree in modules:
        for node in functions(tree.body):
            sentence = first_sentence(node)
            if sentence and len(sentence) <= 100:
                found.setdefault((node.name, sentence), (module, node))
    everything = sorted(found)
    mine = {}
    for (name, sentence), (module, _) in found.items():
        mine.setdefault(module, []).append((name, sentence))
    for (name, sentence), (module, node) in shuffled([*found.items()], rng):
        differ = lambda pairs: sorted({other for called, other in pairs if called != name and other != sentence})
        others = differ(mine[module])
        if len(others) < 3:
            others = differ(everything)
        if len(others) >= 3:
            choices, gold = choice_of(sentence, others, rng)
            head = f"{'async ' * isinstance(node, ast.AsyncFunctionDef)}def {name}({ast.unparse(node.args)}):"
            # between question and choice comes a space, which is the last one of the indentation
            yield module, {'query': f'{head}\n    """\n   ', 'choices': choices, 'gold': gold}


def shuffled(things, rng):
    return rng.sample(things, len(things))


def choice_of(right, others, rng):
    """-> the right one among three of the others, and its place"""
    gold = rng.randrange(4)
    choices = rng.sample(others, 3)
    return choices[:gold] + [right] + choices[gold:], gold


def write_tasks(path, modules):
    lines = []
    for kind, make in (('module', import_questions), ('docstring', docstring_questions)):
        sides = {True: [], False: []}
        for module, question in make(modules, random.Random(f'{seed} {kind}')):
            heldout = stdlib_held_out(module)
            if len(sides[heldout]) < questions:
                sides[heldout].append({'kind': kind, 'heldout': heldout} | question)
            if min(map(len, sides.values())) == questions:
                break
        lines += sides[True] + sides[False]
        print(f"{kind}: {len(sides[True])} questions about modules held out, {len(sides[False])} about others")
    if not lines:
        raise ValueError('there is nothing to ask about: four modules with names and docstrings of their own are '
                         f'needed; root ({root}) must be a folder with more Python files')
    write_text(path, ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines))


# -----------------------------------------------------------------------------

warnings.simplefilter('ignore')  # of the parser, about other people's escapes
modules, unread = [], 0
for module, text in stdlib_files(root):
    try:
        modules.append((module, text, ast.parse(text)))
    except (SyntaxError, ValueError):  # a template, or a test of the parser
        unread += 1
if tasks:
    write_tasks(tasks, modules)
    print(f'{tasks}: of the {stdlib_source()}, seed {seed}')
    sys.exit()

out_dir, tokenizer = dataset_dir(out_dir, name), chat_tokenizer(tokenizer)
train, val = [], []
for module, _, tree in modules:
    for x, facts, mentions in things(module, tree):
        messages = conversation(x, facts, mentions)
        if messages:
            (val if stdlib_held_out(module) else train).append(messages)
several = [sum(len(messages) > 2 for messages in side) for side in (train, val)]
print(f'{len(train):,} conversations for training and {len(val):,} for validation, '
      f'{several[0]:,} and {several[1]:,} of several exchanges; {unread} files are not Python')
train, val = ([tokenizer.render_chat(messages) for messages in side] for side in (train, val))
write_chats(out_dir, tokenizer, train, val, row, stdlib_source())
