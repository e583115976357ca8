"""
By which command a model or its labels were made, and what that cost: FOLDER/made.json, an entry for each product.

    document = already('out/best.pt', reads=['out-teacher/best.pt'])    # still as a ladder wants it?
    ...                                                                 # if that is None, make it, then
    record('out/best.pt', document, reads=['out-teacher/best.pt'])

bench.py --mode=ladder runs commands with PICOCHAT_LADDER set. Under it a script makes again only what is missing, was
made by another command, or is older than what it is made from; and it replaces nothing that a ladder has not made.
"""
import ast
import hashlib
import json
import os
import sys
import time

from data.files import check_types, finite, hold, in_repo, json_line, read_json, remove, write_text

LABELS = ('labels.bin', 'meta.json', 'begun.json', 'labels.bin.part')      # what distill.py writes
BEGUN = 'was begun and not finished'
MADE = {'document': dict, 'cost': dict, 'times': dict}                     # what an entry says when it was finished
COST = {'train_tokens': float, 'train_seconds': float, 'train_flops': float, 'labels': dict}


def already(product, reads=()):
    """
    product: the path of a model or of labels.bin; reads: the files that it is made from. -> in a ladder the document
    that was recorded for it, if this very command made it and nothing it reads is newer; else None, and it is to be
    made now. ValueError if that would replace what no ladder has made.
    """
    if 'PICOCHAT_LADDER' not in os.environ:
        return None
    entry = made(product)
    why = stale(product, entry, reads)
    if not why:
        print(f"{product} is there: this command made it on {entry['date']}", file=sys.stderr)
        return entry['document']
    for name, changed in times(product).items():
        untouched = 'document' not in entry or entry['times'].get(name) == changed
        if not entry.get('ladder') or not untouched:
            raise ValueError(f'the ladder would replace {os.path.join(os.path.dirname(product), name)}, which is not '
                             'as a ladder made it: move that away, or give the rung another folder')
    print(f'{product} {why}: it is made now', file=sys.stderr)
    if product.endswith('labels.bin') and why != BEGUN:                    # labels that were begun are gone on with
        remove(*(os.path.join(os.path.dirname(product), name) for name in LABELS))
    write(product, {'found': times(product)})
    return None


def end_if_made(products, reads=()):
    """In a ladder, ends a script whose products this very command has made already, with the first one's document."""
    documents = [already(product, reads) for product in products]
    if None not in documents:
        print(json_line(documents[0]))
        sys.exit()


def stopped_on_the_way(product, reads=()):
    """
    Whether in a ladder this very command began to train the product and was stopped, but has saved a checkpoint since,
    and nothing it reads is newer than that: then it goes on from there.
    """
    entry, saved = made(product), os.path.join(os.path.dirname(product), 'ckpt.pt')
    if 'PICOCHAT_LADDER' not in os.environ or not os.path.exists(saved) or 'found' not in entry:
        return False
    newest = max((os.path.getmtime(path) for path in reads if os.path.exists(path)), default=0)
    changed = os.path.getmtime(saved)
    ours = entry['command'] == command() and entry['found'].get('ckpt.pt') != changed and newest <= changed
    if ours:
        print(f'{product} {BEGUN}: it goes on from {saved}', file=sys.stderr)
    return ours


def record(product, document, reads=(), starts_from=None, labels=None):
    """
    The product is made. document: the JSON document that the script ends with; starts_from: the model whose weights it
    began with; labels: the folder of labels that it learnt from. What those two cost is added to its own cost.
    """
    cost = made(starts_from).get('cost') if starts_from else None
    cost = cost or {'train_tokens': 0, 'train_seconds': 0, 'train_flops': 0, 'labels': {}}
    if 'iters' in document:                                                # labels and pruning train on no tokens
        cost['train_tokens'] += document['tokens']
    cost['train_seconds'] += document.get('seconds') or 0
    cost['train_flops'] += document.get('flops') or 0
    if labels:                                      # by folder: they are written once, whoever learns from them again
        written = made(os.path.join(labels, 'labels.bin')).get('cost', {})
        cost['labels'][labels] = written.get('train_flops', 0)
    write(product, {'document': document, 'reads': list(reads), 'cost': cost, 'times': times(product)})


def made(product):
    """-> what is recorded of a product; {} if nothing is."""
    return read(os.path.dirname(product)).get(os.path.basename(product), {})

# -----------------------------------------------------------------------------

def stale(product, entry, reads):
    """Why a product is not as this command would make it now, or None."""
    if not os.path.exists(product) and 'document' in entry:
        return 'is gone'
    if not entry:
        return 'has no record' if os.path.exists(product) else 'is missing'
    if entry['command'] != command():
        return 'was made by another command'
    if 'document' not in entry:
        return BEGUN
    if entry['times'].get(os.path.basename(product)) != os.path.getmtime(product):
        return 'has changed since it was made'
    for path in reads:
        if os.path.exists(path) and os.path.getmtime(path) > os.path.getmtime(product):
            return f'is older than {path}'
    return None


def command():
    """-> the words of this process's command, and what its config files say, comments apart: they change nothing."""
    configs = {}
    for word in sys.argv[1:]:
        path = word if os.path.isfile(word) else in_repo(word)          # as configurator.py finds it
        if word.endswith('.py') and os.path.isfile(path):
            with open(path, 'rb') as f:
                configs[word] = hashlib.sha256(ast.dump(ast.parse(f.read())).encode()).hexdigest()
    return {'words': [str(word) for word in sys.argv], 'configs': configs}


def times(product):
    """-> {name: time of its last change} of the files that making the product again would replace."""
    folder, name = os.path.split(product)
    names = ('best.pt', 'ckpt.pt') if name == 'best.pt' else (name,)
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: os.path.getmtime(path) for name, path in paths.items() if os.path.exists(path)}


def read(folder):
    """FOLDER/made.json -> {product: what is recorded of it}. ValueError if it is not as write has written it."""
    path, remedy = os.path.join(folder, 'made.json'), 'remove it, and no ladder will take what is beside it for its own'
    if not os.path.exists(path):
        return {}
    entries = read_json(path, remedy)
    check_types(entries, path, remedy, dict.fromkeys(entries, dict))
    for entry in entries.values():
        check_types(entry, path, remedy, {'command': dict, 'date': str} | (MADE if MADE.keys() & entry.keys() else {}))
        if 'cost' in entry:
            labels = check_types(entry['cost'], path, remedy, COST)['labels']
            check_types(labels, path, remedy, dict.fromkeys(labels, float))
    return entries


def write(product, result):
    """The entry of this command. result: what came of it, or, when it begins, the files that it found there."""
    folder, name = os.path.split(product)
    entry = {'command': command(), 'ladder': os.environ.get('PICOCHAT_LADDER'),
             'date': time.strftime('%Y-%m-%d %H:%M:%S')} | result
    with hold(folder, 'made.json', wait=True):      # a training and quantize.py may write in one folder
        entries = finite(read(folder) | {name: entry})
        write_text(os.path.join(folder, 'made.json'), json.dumps(entries, indent=1))
