"""
Files: reading texts, writing so that a crash leaves either the old file or the new one, and keeping other writers out.
A library, without torch.

>>> from data.files import atomic_write, read_text
>>> atomic_write('/tmp/picochat/hello.txt', lambda f: f.write(b'hello'))
>>> read_text('/tmp/picochat/hello.txt')
'hello'
"""

import atexit
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import secrets
import stat
import sys
import tempfile
import time

try:
    import fcntl
except ImportError:  # Windows: two writers are not kept apart there
    fcntl = None


def in_repo(path):
    """
    The path of one of the repo's own files, like 'data/stdlib_char', from the user's working directory. Code and
    datasets are always those of this repo; every other path is the user's own, relative to the working directory.
    """
    repo = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # in the repo itself the path stays short, so that what is printed and recorded names no folder of this machine
    return path if os.path.realpath(repo) == os.path.realpath('.') else os.path.join(repo, path)


def read_text(path):
    """
    A UTF-8 file -> str, with \\n for every line end and without a byte order mark.
    ValueError if it is not UTF-8, OSError if it cannot be read.
    """
    with open(path, encoding='utf-8-sig') as f:
        try:
            return f.read()
        except UnicodeDecodeError as e:
            raise ValueError(f'{path} is not UTF-8 text (byte {e.start:,}): convert it, or leave it out') from None


def visible_files(folder, endings, below=True):
    """
    The files in a folder, and in folders below it, whose names have one of these endings -> list of paths, sorted.
    Three kinds are skipped, and how many is printed: hidden files (a name, or a folder's name, begins with a dot),
    which editors and file managers leave there; links out of the folder; and what is not a regular file, like a pipe,
    from which a read might never return.
    """
    paths, n_hidden, n_links, n_odd, home = [], 0, 0, 0, os.path.realpath(folder)
    for at, folders, names in os.walk(folder):
        hidden = any(part.startswith('.') for part in os.path.relpath(at, folder).split(os.sep) if part != '.')
        n_links += sum(os.path.islink(os.path.join(at, name)) for name in folders)  # os.walk does not follow these
        for name in names:
            path = os.path.join(at, name)
            if not name.lower().endswith(endings):
                continue
            if hidden or name.startswith('.'):
                n_hidden += 1
            elif os.path.commonpath([home, os.path.realpath(path)]) != home:
                n_links += 1
            elif not os.path.isfile(path):
                n_odd += 1
            else:
                paths.append(path)
        if not below:
            folders.clear()
    if n_hidden:
        print(f'{n_hidden:,} hidden files skipped')
    if n_links:
        print(f'{n_links:,} links that lead out of {folder} skipped: copy what they lead to, if it is meant')
    if n_odd:
        print(f'{n_odd:,} that are no files skipped')
    return sorted(paths)


def read_json(path, remedy, needs={}):
    """
    A file with a JSON object -> a dict. needs: {key: type} that it must have. ValueError for anything else, in one line
    that names the remedy.
    """
    try:
        document = json.loads(read_text(path))
        check_depth([document])
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path} is damaged, it is not JSON: {remedy} ({" ".join(str(e).split())[:80]})') from None
    if not isinstance(document, dict):
        raise ValueError(f'{path} is damaged, expected an object with names and values: {remedy}')
    return check_types(document, path, remedy, needs)


def check_depth(values, most=100):
    """ValueError if lists and objects are nested so deeply that recursion over them would fail."""
    if not most:
        raise ValueError('brackets in brackets in brackets')
    for value in values:
        if isinstance(value, (dict, list)):
            check_depth(value.values() if isinstance(value, dict) else value, most - 1)


def check_types(document, path, remedy, needs, may={}):
    """
    document, a dict that was read from path -> document. ValueError unless it has every key of needs with a value of
    that type; keys of may are checked if they are there. Numbers must be at least 0.
    """
    for key, kind in (needs | {key: may[key] for key in may if key in document}).items():
        value = document.get(key)
        right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        most = {int: 2**53, float: 1e300}.get(kind)
        if not right or most and not (0 <= value < most or value == math.inf):
            raise ValueError(f'{path} is damaged, it says that {key} is {value!r:.40}, not {kind.__name__}: {remedy}')
    return document


def shown(text):
    """
    A text made safe for a terminal: control characters except new lines and tabs are shown, like \\x1b, and not obeyed.
    (The two sequences by which sample.py turns a prompt grey and back stay.)
    """
    return re.sub(r'(?!\x1b\[(?:90|0)m)[\x00-\x08\x0b-\x1f\x7f-\x9f]', lambda c: f'\\x{ord(c[0]):02x}', text)


def sha256_of(path):
    """The sha256 of a file's bytes, as hex digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


MEMORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), '.checked.json')
LARGE = 1 << 22  # bytes; smaller files are read again each time, in a few milliseconds


def check_once(path, question, check):
    """
    check() reads the whole file at path and raises if something is wrong. A large file is checked once, and again only
    when the file or the question (a list of plain values) has changed. data/.checked.json in this repo remembers what
    was checked, by size and times; among them ctime, which no archive or copy can bring along.
    """
    known, about = {}, os.stat(path)
    if about.st_size < LARGE:
        return check()
    with contextlib.suppress(OSError, ValueError):
        known = read_json(MEMORY, '')
    place, now = os.path.abspath(path), [about.st_size, about.st_mtime_ns, about.st_ctime_ns, question]
    if known.get(place) != now:
        check()
        known = {other: what for other, what in known.items() if os.path.exists(other)} | {place: now}
        with contextlib.suppress(ValueError):  # where the repo is read-only, files are checked every time
            write_text(MEMORY, json.dumps(known))


def private_folder(name):
    """
    A folder in the system's temporary one that only this user can read and write -> its path, the same in every process
    of this user. If somebody else has already made a folder of that name: a new one, for this process alone.
    """
    if not hasattr(os, 'getuid'):  # Windows, where each user has a temporary folder
        return os.path.join(tempfile.gettempdir(), name)
    path = os.path.join(tempfile.gettempdir(), f'{name}-{os.getuid()}')
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    about = os.lstat(path)
    if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077:
        return path
    own = tempfile.mkdtemp(prefix=f'{name}-')
    print(f'note: {path} is not ours alone: {own} is used instead', file=sys.stderr)
    return own


def finite(document):
    """Nested dicts and lists of plain values -> the same, with None for numbers that are NaN or infinite."""
    if isinstance(document, dict):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [finite(value) for value in document]
    if isinstance(document, float) and not math.isfinite(document):
        return None
    return document


def json_line(document):
    """A document as one line of JSON that every reader takes, which knows no NaN and no Infinity: they are null."""
    return json.dumps(finite(document))


# -----------------------------------------------------------------------------
# Writing: a crash at any moment leaves the old file or the new one

def atomic_write(path, write):
    """
    write(file) into a temporary file beside path, fsync, rename: at every moment path is the old file or the new one,
    never half of one. ValueError if it cannot be written (a full disk, say); the old file is then untouched.
    """
    path = os.fspath(path)
    with saving(path):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        temporary = write_temporary(path, write)
        try:
            os.replace(temporary, path)
        except OSError:
            os.remove(temporary)
            raise
        sync_folder(os.path.dirname(path))


def write_text(path, text):
    """atomic_write of a text, in UTF-8."""
    atomic_write(path, lambda f: f.write(text.encode()))


@contextlib.contextmanager
def saving(path):
    """Turns a failure while path is being saved into a ValueError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save reports a failed write as a RuntimeError
        kept = 'the file that was there is kept' if os.path.isfile(path) else 'nothing was written'
        raise ValueError(f'could not save {path}: {str(e).splitlines()[0]}; {kept}: '
                         'free some disk space, or name another folder') from e


def write_temporary(path, write):
    """
    write(file) into a new file beside path, fsync -> the new file's name, which no other process uses. If that fails,
    the new file is removed again.
    """
    for old in glob.glob(f'{glob.escape(path)}.*.tmp'):
        with contextlib.suppress(FileNotFoundError):  # its process has just renamed it
            if time.time() - os.path.getmtime(old) > 3600:  # left behind by a process that was killed
                os.remove(old)
    temporary = f'{path}.{secrets.token_hex(4)}.tmp'
    with open(temporary, 'xb') as f:
        try:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        except BaseException:
            os.remove(temporary)
            raise
    return temporary


def sync_folder(folder):
    """Makes renames in a folder reach the disk. Network and virtual machine shares refuse that, which is ignored."""
    if os.name == 'posix':
        handle = os.open(folder or '.', os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(handle)
        os.close(handle)


def remove(*paths):
    """Removes the files that exist among these."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


# -----------------------------------------------------------------------------
# One writer at a time

LOCKS = {}  # path of a lock -> the open file by which this process holds it, and whether the folder was made for it


def hold(folder, name='', wait=False):
    """
    Makes this process the only one that writes in folder, or, if a name is given, that one file in it: until the
    process ends, or to the end of a with block. Asking again for what is already held is fine. The folder is created,
    and removed again if nothing has been written in it.

    The lock is an open file, FOLDER/.lock, which the system releases however the process ends, so a killed process
    leaves no lock behind. On file systems without locks nothing is held.
    ValueError names the process that holds the lock; with wait=True we wait until it is free.
    """
    free = contextlib.ExitStack()
    made = not os.path.isdir(folder or '.')
    try:
        os.makedirs(folder or '.', exist_ok=True)
    except OSError as e:
        raise ValueError(f'cannot make the folder {folder}: {e.strerror}; give another') from e
    if fcntl is None:
        return free
    path = os.path.join(os.path.realpath(folder), f'.{name}.lock' if name else '.lock')
    if path not in LOCKS:
        LOCKS[path] = _lock(path, os.path.join(folder, name) if name else folder, wait), made
        free.callback(release, path)
    return free


def _lock(path, what, wait):
    """-> the open file at path, locked, with this process's number in it; None if it cannot be created."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:  # another process has just removed the folder, which was empty
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return _lock(path, what, wait)
    except OSError:  # a folder that cannot be written to: the error comes when something is written
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # the holder writes its number right after taking the lock
        holder = os.read(handle, 20).decode() or '(unknown)'
        os.close(handle)
        raise ValueError(f'{what} is being written by process {holder}: wait for it, or give another folder') from None
    except OSError:  # a file system without locks
        return handle
    if not os.fstat(handle).st_nlink:  # the holder has just removed this file, and others would lock a new one
        os.close(handle)
        return _lock(path, what, wait)
    with contextlib.suppress(OSError):  # on a full disk the lock stays without a number
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
    return handle


def release(path):
    """Releases a lock; its file is removed before, so that none is left."""
    handle, made = LOCKS.pop(path)
    with contextlib.suppress(OSError):
        if handle is not None:
            os.remove(path)
        if made:
            os.rmdir(os.path.dirname(path))  # if it is empty
    if handle is not None:
        os.close(handle)


def release_all():
    for path in [*LOCKS]:
        release(path)


atexit.register(release_all)
