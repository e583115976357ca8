"""
Files: read a text, write one so that a crash leaves the old or the new, keep other writers out, download. A library,
without torch.

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
import shutil
import stat
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

try:
    import fcntl
except ImportError:  # Windows, where two writers are not kept apart
    fcntl = None

# requests is imported by download alone: nothing else here needs it


def in_repo(path):
    """
    A file of ours, like 'data/stdlib_char', as seen from where the user stands. Code and datasets lie here, beside this
    file, and are taken from nowhere else; every other path is the user's own and begins where the user is.
    """
    repo = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # in the repo itself it is the short path: what is printed and recorded names no machine's folders
    return path if os.path.realpath(repo) == os.path.realpath('.') else os.path.join(repo, path)


def read_text(path):
    """
    A UTF-8 file -> str, with \\n for every line end; a byte order mark is left out.
    ValueError if it is not UTF-8, OSError if it cannot be read.
    """
    with open(path, encoding='utf-8-sig') as f:
        try:
            return f.read()
        except UnicodeDecodeError as e:
            raise ValueError(f'{path} is not UTF-8 text (byte {e.start:,}): convert it, or leave it out') from None


def visible_files(folder, endings, below=True):
    """
    The files in a folder, and in folders below it, whose names end so -> list of paths, sorted. What begins with a dot,
    or is in a folder that does, is skipped, and said: editors and file managers leave copies there that nobody means.
    So are links to what lies elsewhere, since who gives a folder means what is in it, and what is no file, like a pipe,
    which nobody may ever write to.
    """
    paths, n_hidden, n_links, n_odd, home = [], 0, 0, 0, os.path.realpath(folder)
    for at, folders, names in os.walk(folder):
        hidden = any(part.startswith('.') for part in os.path.relpath(at, folder).split(os.sep) if part != '.')
        n_links += sum(os.path.islink(os.path.join(at, name)) for name in folders)  # where walk does not go
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
    A file with a JSON object -> a dict. needs: {key: type} of what it must have. ValueError for all else, in a line
    that ends with the remedy.
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
    """ValueError if lists and objects are in one another so deep that who walks through them comes to no end."""
    if not most:
        raise ValueError('brackets in brackets in brackets')
    for value in values:
        if isinstance(value, (dict, list)):
            check_depth(value.values() if isinstance(value, dict) else value, most - 1)


def check_types(document, path, remedy, needs, may={}):
    """
    A dict of that file -> itself. ValueError unless it has each key of needs, with a value of that type, and those of
    may, if it has them; numbers are at least 0.
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
    A text as it may go to a terminal: control characters but new lines and tabs are seen, as \\x1b, and not obeyed. (So
    are those that were not meant to be, but the two by which sample.py makes a prompt grey and plain again.)
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
    check() reads all of the file at path and raises if it is not right. Of a large file that is done once, and again
    when it has changed or the question is another one (plain values): what is known stands in data/.checked.json of
    this repo, by size and times. The time of its last change of any kind, ctime, comes with no archive or copy.
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
        with contextlib.suppress(ValueError):  # a repo that cannot be written to: checked each time
            atomic_write(MEMORY, lambda f: f.write(json.dumps(known).encode()))


def private_folder(name):
    """
    A folder in the shared temporary one that nobody else can write to or read -> its path, the same in every process of
    this user. If somebody else has made it first, a new one, for this process alone.
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
    return json.dumps(finite(document), allow_nan=False)


# -----------------------------------------------------------------------------
# Writing: a crash at any moment leaves the old file or the new one

def atomic_write(path, write):
    """
    write(file) into a temporary file beside path, fsync, rename: there is the old file or the new one, never half of
    one. ValueError if it cannot be written (a full disk, say); the file that was there is then untouched.
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


@contextlib.contextmanager
def saving(path):
    """What fails while path is being saved is a ValueError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save reports a failed write as a RuntimeError
        kept = 'the file that was there is kept' if os.path.isfile(path) else 'nothing was written'
        raise ValueError(f'could not save {path}: {str(e).splitlines()[0]}; {kept}: '
                         'free some disk space, or name another folder') from e


def write_temporary(path, write):
    """
    write(file) into a new file beside path, fsync -> its name, which is no other process's: to be renamed to path.
    If that fails, the new file is removed again.
    """
    for old in glob.glob(f'{glob.escape(path)}.*.tmp'):
        with contextlib.suppress(FileNotFoundError):  # its process has just put it in its place
            if time.time() - os.path.getmtime(old) > 3600:  # a process that was killed has left it
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
    """A rename reaches the disk with its folder. Shares of networks and of virtual machines refuse that: so be it."""
    if os.name == 'posix':
        handle = os.open(folder or '.', os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            pass
        finally:
            os.close(handle)


# -----------------------------------------------------------------------------
# One writer at a time

LOCKS = {}  # path of a lock -> the open file by which this process holds it, and whether the folder was made for it


def hold(folder, name='', wait=False):
    """
    From now on this process alone writes in folder, or, if a name is given, that one file in it: until it ends, or to
    the end of a with block. A process may ask again for what it holds already. The folder is made, and goes again if
    nothing has been written in it.

    What is held is an open file, FOLDER/.lock, and the system lets go of it however the process ends: the lock of one
    that was killed is in nobody's way. Where the file system knows no locks, nothing is held.
    ValueError names the process that holds it; with wait=True we wait for it to let go.
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
    """-> the open file at path, locked, with this process's number in it; None if there can be no file."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:  # another process has just removed the folder, which was empty
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return _lock(path, what, wait)
    except OSError:  # what cannot be written is told when it is
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # its holder writes its number right after it has got the lock
        holder = os.read(handle, 20).decode() or '(unknown)'
        os.close(handle)
        raise ValueError(f'{what} is being written by process {holder}: wait for it, or give another folder') from None
    except OSError:  # no locks here
        return handle
    if not os.fstat(handle).st_nlink:  # its holder has just removed it: others would lock another
        os.close(handle)
        return _lock(path, what, wait)
    with contextlib.suppress(OSError):  # a full disk: then it has no number
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
    return handle


def release(path):
    """Lets go of a lock, and removes its file first, so that none is left."""
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


# -----------------------------------------------------------------------------
# Downloads

UNANNOUNCED = 2**30  # bytes that a file may have if its server does not say how many
SLOWEST = 10_000  # bytes a second on average
PATIENCE = 120  # seconds besides, for the answer and all else
ALTERED = 'altered'


class DownloadError(ValueError):
    """A download that did not work. reason: the HTTP status as an int, or 'unreachable', 'cut short', 'altered'."""

    def __init__(self, message, reason):
        super().__init__(message)
        self.reason = reason


def download(url, path, sha256=None, size=None, pause=0.0):
    """
    Fetches url into the file at path, by way of path + '.part', and returns path.
    Nothing is fetched if the file is there and right.

    sha256: hex digits, size: bytes; both are checked if given. Without a sha256 the one is checked that Hugging Face
    tells of large files. pause: seconds to wait before asking, out of politeness.
    DownloadError: unreachable, an HTTP error, cut short (the .part stays and the next call goes on from there, if it is
    still the same file), or altered, that is, not of that sha256 or size, or not sent as it was asked for (the .part is
    removed). What was at path before is replaced by a right file or not at all.
    """
    path = os.fspath(path)
    part = path + '.part'
    if os.path.exists(path) and not _mismatch(path, sha256, size):
        return path
    with hold(os.path.dirname(path)):  # two processes must not add to one .part
        time.sleep(pause)
        try:
            told = _receive(url, path, sha256, size)
            mismatch = _mismatch(part, sha256 or told, size)
            if mismatch:
                raise DownloadError(f'{url} is not the file that was expected: {mismatch}; it was refused, '
                                    f'{path} is as it was', ALTERED)
        except DownloadError as e:
            if e.reason == ALTERED:
                _remove(part, _version_path(path))
            raise
        os.replace(part, path)
        _remove(_version_path(path))
    return path


def _receive(url, path, sha256, size):
    """
    What is missing of path + '.part', from url -> the sha256 that the server tells, or None. DownloadError, too, if it
    takes longer than PATIENCE seconds and one more for every SLOWEST bytes. A server can send what stands before a body
    and between its chunks byte by byte, and requests waits for it. So another thread asks, and may be left behind.
    """
    transfer, result, began = SimpleNamespace(answered=False, bytes=0, late=False), [], time.monotonic()

    def ask():
        try:
            result.append(_fetch(url, path, sha256, size, transfer))
        except BaseException as e:  # it is raised where it is waited for
            result.append(e)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if time.monotonic() - began > PATIENCE + transfer.bytes / SLOWEST and not result:
            transfer.late = True
            if transfer.answered:
                raise _cut_short(url, path, sha256, size, f'slower than {SLOWEST:,} bytes/s')
            raise _unreachable(url, path, f'no answer in {PATIENCE} seconds')
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _fetch(url, path, sha256, size, transfer):
    """The same, for as long as it takes. transfer: what it tells of its progress, and whether nobody waits for it."""
    import requests
    part = path + '.part'
    have, version, headers = _range(path, sha256)
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=60)
    except (OSError, UnicodeError) as e:  # the errors of requests are OSErrors as well
        raise _unreachable(url, path, _short(e)) from None
    transfer.answered, cause, total = True, None, None
    with response as r:
        if 'Range' in headers and r.status_code in (206, 416):
            # bytes 5-99/100 with a 206; bytes */100 with a 416, which says that nothing comes after what we have
            sent = re.fullmatch(r'bytes (?:(\d+)-\d+|\*)/(\d+)', r.headers.get('Content-Range', ''))
            changed = version and _version(r) and _version(r) != version
            # another range or file, or our part is longer than their file: from the start
            if changed or not sent or int(sent[1] or sent[2]) != have:
                os.remove(part)
                return _fetch(url, path, sha256, size, transfer)
            total = int(sent[2])
        elif r.status_code == 200:  # the whole file, also where a range was asked for: many servers know none
            have, version = 0, _version(r)
            length = r.headers.get('Content-Length', '')
            total = int(length) if re.fullmatch(r'\d{1,20}', length) else None
        else:
            raise DownloadError(f'{url} answered {r.status_code} {r.reason}', r.status_code)
        _check_announced(r, path, total, have, size)
        total = size if total is None else total
        if r.status_code != 416:
            try:
                with open(part, 'ab' if have else 'wb') as f:
                    if not have:
                        _keep_version(path, version)
                    _read_body(r, f, total, transfer)
            except (OSError, requests.packages.urllib3.exceptions.HTTPError) as e:  # what arrived is in the .part
                cause = e
        # what Hugging Face says of a large file, where it sends us on to the server that has it
        tags = [h.headers.get('X-Linked-Etag', '').strip('"') for h in (*r.history, r)]
    if cause or _size_of(part) < (total or 0):
        raise _cut_short(url, path, sha256, total, cause and _short(cause))
    return next((tag for tag in tags if re.fullmatch('[0-9a-f]{64}', tag)), None)


def _range(path, sha256):
    """How many bytes there are already, of which version of the file, and the headers that ask for the rest of it."""
    have, version = _size_of(path + '.part'), None
    if os.path.exists(_version_path(path)):
        version = read_text(_version_path(path))
    # identity: if the server compressed it, what arrives would be neither the bytes that Content-Length counts nor
    # those of the range
    headers = {'User-Agent': 'picochat/1.0 (a small educational language model)', 'Accept-Encoding': 'identity'}
    if have and (version or sha256):  # else nobody would notice if it had become another file
        headers['Range'] = f'bytes={have}-'
        if version:
            headers['If-Range'] = version
    return have, version, headers


def _unreachable(url, path, why):
    return DownloadError(f'cannot reach {url} ({why}): try again later, or put the file at {path} yourself',
                         'unreachable')


def _cut_short(url, path, sha256, total, why):
    on = ' to go on from there' if sha256 or os.path.exists(_version_path(path)) else ''
    return DownloadError(f"{url} was cut short{f' ({why})' if why else ''}: {_size_of(path + '.part'):,} of "
                         f"{total or 'unknown'} bytes are kept in {path}.part, run the same command again{on}",
                         'cut short')


def _size_of(path):
    """Bytes of a file; 0 if it is not there."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def _check_announced(response, path, total, have, size):
    """What its headers say about a file of so many bytes (None: nothing). DownloadError if it is not what we want."""
    encoding = response.headers.get('Content-Encoding', 'identity')
    free = shutil.disk_usage(os.path.dirname(path) or '.').free
    for wrong, what in (
            (encoding != 'identity', f'it comes compressed ({encoding}), though it was asked for as it is'),
            (size is not None and total not in (None, size), f'{total or 0:,} bytes instead of {size or 0:,}'),
            ((total or 0) - have > free, f'{total or 0:,} bytes, and there is room for {free:,} more')):
        if wrong:
            raise DownloadError(f'{response.url} is not the file that was expected: {what}; it was refused, '
                                f'{path} is as it was', ALTERED)


def _read_body(response, f, total, transfer):
    """What comes, into the open file f, until it has total bytes, and no more."""
    most = UNANNOUNCED if total is None else total
    # as much as is there, so that nothing of it is lost when the line goes dead
    read = getattr(response.raw, 'read1', response.raw.read)
    while (chunk := read(1 << 16)) and not transfer.late:
        if f.tell() + len(chunk) > most:
            raise DownloadError(f'{response.url} is not the file that was expected: it goes on after {most:,} bytes; '
                                'it was refused', ALTERED)
        f.write(chunk)
        f.flush()
        transfer.bytes += len(chunk)


def _version(response):
    """By what the server would know this very file again: its ETag, unless that is a weak one, or its date; or None."""
    tag = response.headers.get('ETag', 'W/')
    return response.headers.get('Last-Modified') if tag.startswith('W/') else tag


def _version_path(path):
    return path + '.version.part'


def _keep_version(path, version):
    """Beside the .part stands of which version of the file it is a part."""
    _remove(_version_path(path))
    if version:
        atomic_write(_version_path(path), lambda f: f.write(version.encode()))


def _remove(*paths):
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def _short(error):
    """Only the name of an error, or its short text: those of requests run over many lines."""
    return getattr(error, 'strerror', None) or type(error).__name__


def _mismatch(path, sha256, size):
    """What differs between the file and what it should be, in words; '' if nothing does."""
    if size is not None and os.path.getsize(path) != size:
        return f'{os.path.getsize(path):,} bytes instead of {size:,}'
    if sha256 is not None and sha256_of(path) != sha256.lower():
        return f'sha256 {sha256_of(path)} instead of {sha256.lower()}'
    return ''
