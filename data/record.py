"""
Which command made a model or its labels, and what that cost: FOLDER/made.json, with an entry for each product.

    document = already('out/best.pt', reads=['out-teacher/best.pt'])    # in a ladder: is it up to date?
    ...                                                                 # None: it is not. Make it, then
    record('out/best.pt', document, reads=['out-teacher/best.pt'])

A ladder (bench.py --mode=ladder) runs commands with PICOCHAT_LADDER set. A script that sees it builds its product only
if the product is missing, was made by another command, or is older than a file it was made from. It never replaces a
file that no ladder has made.
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
MADE = {'document': dict, 'cost': dict, 'times': dict}                     # what the entry of a finished product holds
COST = {'train_tokens': float, 'train_seconds': float, 'train_flops': float, 'labels': dict}


def already(product, reads=()):
    """
    product: the path of a model or of labels.bin; reads: the files it is made from. -> the document recorded for it, if
    this is a ladder, this very command made it, and nothing it reads is newer. Otherwise None: the caller must make it.
    ValueError if that would replace a file that no ladder has made.
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
    if product.endswith('labels.bin') and why != BEGUN:                    # half-written labels are continued
        remove(*(os.path.join(os.path.dirname(product), name) for name in LABELS))
    write(product, {'found': times(product)})
    return None


def end_if_made(products, reads=()):
    """In a ladder: if all products are up to date, prints the first one's document and ends the script."""
    documents = [already(product, reads) for product in products]
    if None not in documents:
        print(json_line(documents[0]))
        sys.exit()


def stopped_on_the_way(product, reads=()):
    """
    Whether training can resume, in a ladder: this very command began to train the product, was stopped after it had
    saved a checkpoint, and nothing it reads is newer than that checkpoint.
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
    Writes the entry of a finished product. document: the JSON document that its script prints last; starts_from: the
    model whose weights it started from; labels: the folder of labels it learnt from. Their cost is added to its own.
    """
    cost = made(starts_from).get('cost') if starts_from else None
    cost = cost or {'train_tokens': 0, 'train_seconds': 0, 'train_flops': 0, 'labels': {}}
    if 'iters' in document:                                                # of a training, not of labels or pruning
        cost['train_tokens'] += document['tokens']
    cost['train_seconds'] += document.get('seconds') or 0
    cost['train_flops'] += document.get('flops') or 0
    if labels:              # by folder, so that labels which several stages learn from are counted once
        written = made(os.path.join(labels, 'labels.bin')).get('cost', {})
        cost['labels'][labels] = written.get('train_flops', 0)
    write(product, {'document': document, 'reads': list(reads), 'cost': cost, 'times': times(product)})


def made(product):
    """-> the entry of a product, {} if there is none."""
    return read(os.path.dirname(product)).get(os.path.basename(product), {})

# -----------------------------------------------------------------------------

def stale(product, entry, reads):
    """Why a product is not up to date, in words; None if it is."""
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
    """-> this process's command line, and a hash of each config file on it, which comments do not change."""
    configs = {}
    for word in sys.argv[1:]:
        path = word if os.path.isfile(word) else in_repo(word)          # as configurator.py finds it
        if word.endswith('.py') and os.path.isfile(path):
            with open(path, 'rb') as f:
                configs[word] = hashlib.sha256(ast.dump(ast.parse(f.read())).encode()).hexdigest()
    return {'words': [str(word) for word in sys.argv], 'configs': configs}


def times(product):
    """-> {name: time of last change} of the files that would be replaced if the product were made again."""
    folder, name = os.path.split(product)
    names = ('best.pt', 'ckpt.pt') if name == 'best.pt' else (name,)
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: os.path.getmtime(path) for name, path in paths.items() if os.path.exists(path)}


def read(folder):
    """FOLDER/made.json -> {product: its entry}. ValueError if it is damaged."""
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
    """Writes this command's entry. result: what it made, or, at its beginning, the files that were already there."""
    folder, name = os.path.split(product)
    entry = {'command': command(), 'ladder': os.environ.get('PICOCHAT_LADDER'),
             'date': time.strftime('%Y-%m-%d %H:%M:%S')} | result
    with hold(folder, 'made.json', wait=True):      # a training and quantize.py may write in one folder
        entries = finite(read(folder) | {name: entry})
        write_text(os.path.join(folder, 'made.json'), json.dumps(entries, indent=1))
