"""
Curves of losses, from the log.csv of trainings. A library for bench.py --mode=plot; without torch.

    rows = draw_curves(['out-a/log.csv', 'out-b/log.csv'], 'losses.png')
"""
import csv
import os

from data.files import atomic_write


def read_log(path):
    """
    A log.csv of train.py -> points (tokens, loss) of training and of validation, and the last step and tokens.
    ValueError for any other file.
    """
    try:
        with open(path, newline='') as f:
            read = list(csv.DictReader(f))
        training, validation = ([(int(float(r['tokens'])), float(r[key])) for r in read if r[key]]
                                for key in ('train_loss', 'val_loss'))
        return training, validation, int(read[-1]['step']), training[-1][0]
    except (ValueError, ArithmeticError, TypeError, LookupError, csv.Error) as e:
        raise ValueError(f'{path} has no line yet, or is no log.csv of train.py, with steps, tokens and losses '
                         f'({type(e).__name__}: {str(e)[:80]}): give another') from None


def draw_curves(paths, png):
    """Draws the training and validation losses of all logs at paths -> a row for each, with its last values."""
    import matplotlib.figure
    figure, rows = matplotlib.figure.Figure(figsize=(8, 5)), []
    axes = figure.subplots()
    for path in paths:
        training, validation, steps, tokens = read_log(path)
        curve, = axes.plot(*zip(*training), alpha=0.4, linewidth=1)
        if validation:
            axes.plot(*zip(*validation), color=curve.get_color(), marker='o', markersize=3,
                      label=os.path.dirname(path) or path)
        rows.append({'log': path, 'steps': steps, 'tokens': tokens,
                     'train_loss': training[-1][1], 'best_val_loss': min((y for _, y in validation), default=None)})
    axes.set(xlabel='tokens', ylabel='nats a token')
    axes.legend(title='validation; thin: training')
    atomic_write(png, lambda f: figure.savefig(f, dpi=150, format='png'))
    return rows
