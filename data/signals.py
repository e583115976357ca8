"""
Signals to stop: Ctrl+C (SIGINT), SIGTERM, and SIGHUP, which comes when a terminal is closed. A library, without torch.

    on_stop(lambda signum, frame: stopping.append(signum))      # calls this function
    with passed_on(child):                                      # sends them to a child process, which ends first
        child.wait()
"""

import contextlib
import signal
import subprocess


def on_stop(handler):
    """
    Calls handler(signum, frame) when one of the signals comes. Signals that are ignored stay so: under nohup a closed
    terminal ends nothing. -> {signum: the previous handler}
    """
    before = {}
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum and signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, handler)
    return before


def interrupt_on_stop():
    """Makes all of these signals raise a KeyboardInterrupt, as Ctrl+C does, with the signal's number in its args."""
    def interrupt(signum, frame):
        raise KeyboardInterrupt(signum)
    on_stop(interrupt)


@contextlib.contextmanager
def passed_on(child):
    """
    Within the block signals are sent on to child, a process that we have started; leave the block when the child has
    ended. Gives the list of the signals that came. If there is one, this process ends after the block with status 128 +
    its number. If the block raises, the child is terminated, and waited for.
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
