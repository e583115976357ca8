"""
Being told to stop: by Ctrl+C, by SIGTERM, or by a terminal that is closed (SIGHUP). A library, without torch.

    on_stop(lambda signum, frame: stopping.append(signum))      # what to do then
    with passed_on(child):                                      # or who is told instead, and ends first
        child.wait()
"""

import contextlib
import signal
import subprocess


def on_stop(handler):
    """
    handler(signum, frame) is called when this process is told to stop. What is ignored stays so: with nohup a closed
    terminal ends nothing. -> {signum: the handler before}
    """
    before = {}
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, handler)
    return before


def interrupt_on_stop():
    """Like Ctrl+C, the others raise a KeyboardInterrupt as well, with the signal's number in its args."""
    def interrupt(signum, frame):
        raise KeyboardInterrupt(signum)
    on_stop(interrupt)


@contextlib.contextmanager
def passed_on(child):
    """
    While a process that we have started runs, it is told in our place, and ends as it likes: leave the block when it
    has. Gives the list of the signals that came; if one did, this process ends after the block, with 128 + its number
    as its status. If the block fails, the child is told to stop, and waited for.
    """
    asked = []

    def pass_on(signum, frame):
        asked.append(signum)
        child.send_signal(signum)
    before = on_stop(pass_on)
    try:
        yield asked
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=60)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if asked:
        raise SystemExit(128 + asked[0])
