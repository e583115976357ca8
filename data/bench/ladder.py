"""
A ladder of models: the commands that build its rungs, and its record, a JSON document from which tables and pictures
are made. A library for bench.py --mode=ladder and --mode=table; without torch.

    for name, seed, command in read_rungs(text, '1337'): ...    # "name | python train.py config/quickstart.py && ..."
    row = build_rung('out-ladder/ladder.json', name, seed, command)
    write_record('config/ladder_quick.json', rows, machine)
    for line in summary(read_record('config/ladder_quick.json')['rows']): ...

A ladder is a list of commands, which run as if you had typed them. A script does nothing, and says so, if its product
exists, was made by the same command, and is no older than what it was made from (data/record.py).
"""
import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from statistics import mean, median, stdev, variance

from data.files import atomic_write, check_types, finite, in_repo, read_json, write_text
from data.record import made
from data.signals import passed_on

FIRST = 'build a ladder first, python bench.py --mode=ladder config/ladder_quick.py'

# -----------------------------------------------------------------------------
# building

def read_rungs(rungs, seeds):
    """Lines "name | command" -> [(name, seed or None, command)], a line with {seed} once for each of seeds."""
    assert re.fullmatch(r'\d+(,\d+)*', seeds), f'seeds ({seeds}) must be numbers, like 1337,1338,1339'
    out = []
    for line in filter(None, map(str.strip, rungs.splitlines())):
        name, bar, command = (part.strip() for part in line.partition('|'))
        assert bar and all(part.split()[:1] == ['python'] for part in command.split('&&')), \
            f'rungs: a line is "name | python SCRIPT ... && python SCRIPT ...", and {line!r} is not'
        if '{seed}' in command:
            out += [(name, int(s), command.replace('{seed}', s)) for s in seeds.split(',')]
        else:
            out.append((name, None, command))
    assert any(name for name, *_ in out), f'rungs: none are given: {FIRST}'
    return out


def tell(text):
    """Prints to stderr, whether or not its terminal is still there."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def run_command(ladder, command, log):
    """
    Runs one command of a ladder. Its output goes to the file log, and its newest line every ten seconds and at the end
    to stderr. Signals to stop are passed on to the command, which saves and ends; then the ladder ends. -> the JSON
    document that ends its output, {} if there is none (a prepare.py); its exit status; its last line of text.
    """
    last, document, shown = 'no word', '{}', time.time()
    environment = os.environ | {'PICOCHAT_LADDER': ladder, 'PYTHONUNBUFFERED': '1'}
    script, *words = shlex.split(command)[1:]
    child = subprocess.Popen([sys.executable, in_repo(script), *words], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    with passed_on(child) as asked:
        for line in child.stdout:
            print(line, end='', file=log, flush=True)
            if line.startswith('{'):
                document = line
            elif line.strip():
                last = line.strip()
            if time.time() - shown > 10:
                shown = time.time()
                tell(f'    {last}')
        status = child.wait()
        tell(f'    {last}')
        if asked:
            tell(f'stopped by signal {asked[0]}; the same command goes on with this rung')
    return json.loads(document) if status == 0 else {}, status, last


def build_rung(ladder, name, seed, command):
    """
    Runs the commands of a rung, whose output goes to a file beside the ladder's record. -> its row: the file of the
    model and what it cost, with all that it was made from; None if the rung has no name.
    """
    called = f"{name or command.split('&&')[0].removeprefix('python ')} {seed or ''}".strip()[-60:]
    path, file = os.path.join(os.path.dirname(ladder), re.sub(r'\W+', '-', called) + '.log'), None
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, 'a') as log:
        for part in map(str.strip, command.split('&&')):
            print(f'[{called}] {part} > {path}', file=sys.stderr, flush=True)
            print(f'$ {part}', file=log, flush=True)
            document, status, last = run_command(ladder, part, log)
            if status:
                raise ValueError(f'rung {name!r}: {part!r} ended with status {status}: '
                                 f"{last.removeprefix('error: ')}; what it printed is in {path}")
            if 'out_dir' in document:
                file = os.path.join(document['out_dir'], 'best.pt')
            file = document.get('file', file)
            if file and os.path.isdir(file):
                file = os.path.join(file, 'best.pt')
    if not name:
        return None
    assert file, f'rung {name!r}: its command names no model file; a line that only prepares has no name'
    nothing = {'train_tokens': 0, 'train_seconds': 0, 'train_flops': 0, 'labels': {}}
    return {'name': name, 'seed': seed, 'command': command, 'file': file, 'made': made(file).get('date'),
            **made(file).get('cost', nothing)}


# -----------------------------------------------------------------------------
# records

def write_record(path, rows, machine):
    document = {'mode': 'ladder', 'machine': machine, 'date': time.strftime('%Y-%m-%d'), 'rows': rows}
    write_text(path, json.dumps(finite(document), indent=1) + '\n')


def read_record(path, remedy=FIRST):
    """Reads a ladder's record -> a dict; rows of older records that are no rungs are dropped."""
    if not os.path.isfile(path):
        raise ValueError(f'{path} is not there: {remedy}')
    document = read_json(path, remedy, {'rows': list})
    document['rows'] = [row for row in document['rows'] if isinstance(row, dict) and row.get('name')]
    if not document['rows']:
        raise ValueError(f'{path} records no rung: {remedy}')
    numbers = {key: float for _, key, *shown_as in columns_of(document['rows']) if shown_as}
    for row in document['rows']:
        known = {key: value for key, value in row.items() if value is not None}
        # the one number that may be below 0: less is answered rightly than chance would
        if isinstance(known.get('tasks_centred'), (int, float)):
            known['tasks_centred'] = abs(known['tasks_centred'])
        check_types(known, path, remedy, {'name': str}, numbers | {'labels': dict, 'seed': int, 'file': str})
        check_types(row.get('labels') or {}, path, remedy, {}, dict.fromkeys(row.get('labels') or {}, float))
    return document


def untimed(row):
    """A row without its timings, which cannot be compared with those of another run."""
    return {k: v for k, v in row.items() if not k.startswith(('tok', 'same', 'spec', 'memory'))}


def compare_records(before, now):
    """-> lines that say what has changed: bytes and losses, and speeds beyond noise"""
    noise = {'bytes': 0, 'val_loss': 1e-4, 'tokens_per_verify': 0.1, 'tok_s': 0.3, 'tok_s_speculative': 0.3}
    changes = []
    for old, new in zip(before, now):
        name = new['name'] if new.get('seed') is None else f"{new['name']} {new['seed']}"
        for key, most in (noise | {key: 1e-4 for key in old if key.startswith('bpb_')}).items():
            if old.get(key) and new.get(key) and abs(new[key] / old[key] - 1) > most:
                changes.append(f'{name}: {key} was {old[key]:.6g} and is {new[key]:.6g}')
    return changes


# -----------------------------------------------------------------------------
# tables and pictures

# a ladder's table: heading, key, format, divisor
COLUMNS = [('rung', 'name'), ('parameters', 'params', ',d'), ('bytes', 'bytes', ',d'), ('x less', 'smaller', '.1f'),
           ('KV B/token', 'kv_bytes_per_token', ',.0f'), ('nats', 'val_loss', '.4f'), ('+-', 'deviation', '.4f'),
           ('bits/byte', 'val_bpb', '.4f'), ('p', 'p', '.1g'),
           ('tasks', 'tasks_centred', '.3f'), ('+-', 'tasks_error', '.3f'),
           ('tok/s', 'tok_s', ',.0f'), ('x', 'x_tok_s', '.2f'),
           ('drafting', 'tok_s_speculative', ',.0f'), ('x', 'x_tok_s_speculative', '.2f'),
           ('compiled', 'tok_s_compiled', ',.0f'), ('drafting', 'tok_s_speculative_compiled', ',.0f'),
           ('tok/verify', 'tokens_per_verify', '.2f'), ('MiB', 'memory_bytes', ',.1f', 2**20),
           ('Mtokens', 'train_tokens', ',.1f', 1e6), ('seconds', 'train_seconds', ',.0f'),
           ('PFLOPs', 'train_flops', ',.2f', 1e15)]


def columns_of(rows):
    """COLUMNS, with columns for the bits per byte of further texts, if rows have them."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith('bpb_'))
    place = 1 + [key for _, key, *_ in COLUMNS].index('val_bpb')
    return COLUMNS[:place] + [(key.removeprefix('bpb_'), key, '.4f') for key in names] + COLUMNS[place:]


def with_labels(row):
    """The row, with the FLOPs of the labels that it learnt from added to its own."""
    labels = sum(row.get('labels', {}).values())
    return row | {'train_flops': row['train_flops'] + labels} if row.get('train_flops') else row


def by_name(rows):
    """-> {name: its rows, one for each seed}"""
    names = {}
    for row in rows:
        names.setdefault(row['name'], []).append(row)
    return names


def welch(a, b):
    """Two lists of losses -> p of Welch's two-sided t-test; None if one of them has a single value."""
    if min(len(a), len(b)) < 2:
        return None
    va, vb = variance(a) / len(a), variance(b) / len(b)
    if not va + vb:
        return float(mean(a) == mean(b))
    t = (mean(a) - mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1))
    # The density of Student's t, summed up after the substitution t = sqrt(df) * tan(angle): both ends are finite.

    def area(end):
        return end * sum(math.cos(end * (i + 0.5) / 10000) ** (df - 1) for i in range(10000))
    return 1 - area(math.atan(abs(t) / math.sqrt(df))) / area(math.pi / 2)


def mean_of(rows, key):
    """The mean of those values that are not None; None if there are none."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return mean(values) if values else None


def summary(rows):
    """
    -> a line for each rung: means of losses and tasks over its seeds; the deviation of losses, and Welch's p against
    the first control; bytes, speed and cost of the first seed.
    """
    names, lines, first = by_name(rows), [], rows[0]
    losses = {name: [row['val_loss'] for row in same if row.get('val_loss')] for name, same in names.items()}
    control = next((name for name in names if 'control' in name), None)
    for name, same in names.items():
        line = with_labels(same[0])
        if losses[name]:
            line |= {'val_loss': mean(losses[name]), 'val_bpb': mean_of(same, 'val_bpb'),
                     'deviation': stdev(losses[name]) if len(same) > 1 else None,
                     'p': welch(losses[name], losses[control]) if control not in (None, name) else None}
        for key in line:                            # what it knows beside its own text, see data/bench/tasks.py
            if key.startswith('bpb_') or key in ('tasks_centred', 'tasks_error'):
                line[key] = mean_of(same, key)
        if line.get('bytes') and first.get('bytes'):
            line['smaller'] = first['bytes'] / line['bytes']
        for key in ('tok_s', 'tok_s_speculative'):
            if line.get(key) and first.get('tok_s'):
                line[f'x_{key}'] = line[key] / first['tok_s']
        lines.append(line)
    return lines


def draw(lines, path):
    """
    Draws bytes against bits per byte, with a number at each point, and the names in a legend. Controls are crosses,
    rungs with llama.cpp in their name squares; a rung that is far worse than the others is a triangle at the upper
    edge.
    """
    import matplotlib.figure
    figure = matplotlib.figure.Figure(figsize=(8, 4))
    axes = figure.subplots()
    points = [line for line in lines if line.get('bytes') and line.get('val_bpb')]
    if not points:
        raise ValueError(f'no picture {path}: no rung has both bytes and bits per byte')
    best, usual = min(line['val_bpb'] for line in points), median(line['val_bpb'] for line in points)
    top = min(max(line['val_bpb'] for line in points), best + 3 * (usual - best) + 0.05)
    step, placed = (top - best) / 16, []        # placed: where numbers are, so that no two are on one another
    for number, line in enumerate(points, 1):
        x, y = line['bytes'] / 1e6, min(line['val_bpb'], top)
        marker, color = 'o', 'C0'
        if 'control' in line['name']:
            marker, color = 'x', 'gray'
        elif 'llama.cpp' in line['name']:
            marker, color = 's', 'C1'
        if line['val_bpb'] > top:
            marker = '^'
        name = line['name'].replace('$', r'\$')  # what stands between two would be a formula
        axes.scatter(x, y, marker=marker, color=color, zorder=2,
                     label=f"{number}  {name}: {line['val_bpb']:.3f}, {x:.2f} MB")
        while any(abs(math.log(x / other_x)) < 0.1 and abs(y - other_y) < step for other_x, other_y in placed):
            y += step / 4
        placed.append((x, y))
        axes.annotate(str(number), (x, y), xytext=(6, -3), textcoords='offset points')
    ticks = [tick for power in range(-2, 5) for tick in (10**power, 2 * 10**power, 5 * 10**power)]
    axes.set(xscale='log', xlabel='megabytes of the file', ylabel='bits per byte of validation text')
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(x for x, _ in placed) / 1.3, max(x for x, _ in placed) * 1.3)
    axes.grid(alpha=0.3)
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    atomic_write(path, lambda f: figure.savefig(f, dpi=100, format='png', bbox_inches='tight'))
    print(f'drawn: {path}', file=sys.stderr)
