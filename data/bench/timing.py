"""
Measuring by the clock, in turns, in this process and in others. A library for bench.py and its peers, without torch.

    for r in in_rounds(5): ...                          # 0, a round that only warms up, then 1 to 5
    row = speed(rates, ratio_plain_f32=yardstick)       # medians; ratios are those of the same round
    document = start('bench.py', mode='decode')         # a script in a process of its own
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from statistics import median

from data.files import in_repo
from data.signals import passed_on


def timed_call(f):
    """-> seconds"""
    clock = time.perf_counter()
    f()
    return time.perf_counter() - clock


def in_rounds(rounds, of=''):
    """Yields 0, for a round that only warms up, then 1 to rounds; prints to stderr when a round is over."""
    for r in range(rounds + 1):
        yield r
        print(of + (f'round {r} of {rounds}' if r else 'warm'), file=sys.stderr, flush=True)


def speed(rates, **others):
    """tokens/s by round -> a row's tok_s and tok_s_rounds, and key=others: the ratio to theirs in the same round."""
    row = {'tok_s': median(rates), 'tok_s_rounds': rates}
    for key, theirs in others.items():
        if theirs:
            row[key] = median(a / b for a, b in zip(rates, theirs))
    return row


class TokenClock:
    """The streamer of transformers' generate(), which calls put with the prompt, then with every token."""
    def __init__(self):
        self.times = []

    def put(self, ids):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def resident(key='VmRSS'):
    """Bytes of memory that this process has, or (VmHWM) had at most; None without /proc (not Linux)."""
    if os.path.exists('/proc/self/status'):
        return 1024 * int(re.search(rf'{key}:\s+(\d+)', open('/proc/self/status').read())[1])


def start(script, *words, **knobs):
    """
    Runs a script in a process of its own -> the JSON document that ends its output. Its errors end this script, too.
    """
    said = f'no word from {script}'
    with tempfile.TemporaryFile('w+') as out:
        command = [sys.executable, in_repo(script), *words, *(f'--{key}={value}' for key, value in knobs.items())]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        with passed_on(process):
            for line in process.stderr:
                said = line.strip() or said
                if not said.startswith('error: '):
                    print(line, end='', file=sys.stderr, flush=True)
            process.wait()
        if process.returncode:
            raise ValueError(f"{script}: {said.removeprefix('error: ')}")
        out.seek(0)
        return json.loads(out.read().splitlines()[-1])
