"""
A training in numbers: times and losses of its steps, and log.csv, their record. A library for train.py.

    meter = Meter(step=0, seconds=0.0, step_tokens=4096, device='cpu')
    meter.add(0, losses)                        # after each forward: {'ce': a tensor, ...}
    means = meter.read_losses('start again')    # now and then: {'ce': their mean, ...}
    meter.tick(10)                              # ... and brings meter.seconds, .typical and .rate up to step 10
    Log('out/log.csv').write({'step': 10, 'train_loss': means['ce']})
"""
import csv
import math
import os
import time

import torch

from data.files import write_text
from data.machine import least

COLUMNS = ['step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'val_bpb', 'lr_factor', 'tok_s']


class Meter:
    """
    Times the steps and collects their losses. Both are read only now and then, so that a GPU need not wait. seconds: of
    training so far; typical: seconds of a recent step, the median; rate: tokens/s.
    """
    def __init__(self, step, seconds, step_tokens, device):
        self.timed, self.seconds, self.step_tokens, self.device = step, seconds, step_tokens, device
        self.typical, self.rate, self.recent, self.losses = 0.0, 0.0, [], []
        self.restart()

    def restart(self):
        """Starts the clock: time since the last tick does not count as training."""
        self.clock = time.perf_counter()

    def tick(self, step):
        """Stops the clock after this step, and shares the time out among the steps since the last tick."""
        if self.device.split(':')[0] != 'cpu':
            torch.accelerator.synchronize()
        took = time.perf_counter() - self.clock
        self.seconds += took
        self.recent = self.recent[-20:] + [took / (step - self.timed)]
        self.typical = sorted(self.recent)[(len(self.recent) - 1) // 2]
        self.rate, self.timed = self.step_tokens / self.typical, step

    def add(self, step, losses):
        """Collects the losses of one forward pass, {name: tensor}."""
        self.losses.append((step, {name: value.detach() for name, value in losses.items()}))

    def read_losses(self, remedy, model=None):
        """
        -> the mean of each loss since the last call. ValueError with the remedy, in every process, if a loss or a
        weight of the model became infinite or NaN.
        """
        read = [(step, {name: value.item() for name, value in parts.items()}) for step, parts in self.losses]
        self.losses = []
        wrong = [(step, f'the loss became {parts}') for step, parts in read
                 if not all(map(math.isfinite, parts.values()))]
        # no loss shows yet what the last update did
        if model is not None and not all(p.isfinite().all() for p in model.parameters()):
            wrong.append((read[-1][0], 'weights became infinite or NaN'))
        first = least(min((at for at, _ in wrong), default=math.inf))
        if first < math.inf:
            what = wrong[0][1] if wrong else 'the loss of another process became infinite or NaN'
            raise ValueError(f'{what} at step {first:.0f}; {remedy}')
        return {name: sum(parts[name] for _, parts in read) / len(read) for name in read[0][1]}


class Log:
    """log.csv, a row a line. until: the step from which a resumed run goes on; None: the log is new."""
    def __init__(self, path, until=None):
        lines = []
        if until is not None and os.path.exists(path):
            lines = open(path, errors='replace').read().splitlines()[1:]
        # a power cut may have left the last line half written, and the run may have gone on behind its checkpoint
        whole = [line for line in lines if line.count(',') == len(COLUMNS) - 1 and line.split(',')[0].isdigit()]
        kept = [','.join(COLUMNS)] + [line for line in whole if int(line.split(',')[0]) <= until]
        write_text(path, '\n'.join(kept + ['']))
        self.path = path
        self.rows = csv.DictWriter(open(path, 'a', buffering=1, newline=''), COLUMNS, lineterminator='\n')

    def write(self, row):
        try:
            self.rows.writerow(row)
        except OSError as e:
            raise ValueError(f"could not write {self.path}: {e.strerror}; the checkpoints there are kept: "
                             "free some disk space and resume") from e
