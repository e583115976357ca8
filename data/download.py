"""
Downloads that resume where they stopped, and leave either a verified file or the old one. A library, without torch.

    download('https://.../input.txt', 'data/x/input.txt', sha256='86c4e6...')       # -> the path
"""
import os
import re
import shutil
import threading
import time
from types import SimpleNamespace

from data.files import hold, read_text, remove, sha256_of, write_text

UNANNOUNCED = 2**30  # the most bytes of a file whose size the server does not tell
SLOWEST = 10_000  # bytes per second, on average
PATIENCE = 120  # seconds in addition, for the server to answer
ALTERED = 'altered'


class DownloadError(ValueError):
    """A download that failed. reason: the HTTP status as an int, or 'unreachable', 'cut short', 'altered'."""

    def __init__(self, message, reason):
        super().__init__(message)
        self.reason = reason


def download(url, path, sha256=None, size=None, pause=0.0):
    """
    Fetches url into the file at path, by way of path + '.part', and returns path. Does nothing if the file is there and
    has the right sha256 and size.

    sha256: hex digits; size: bytes; both are checked if given. Without a sha256, the one that Hugging Face sends for
    large files is checked. pause: seconds to wait before asking, out of politeness.
    DownloadError: 'unreachable'; an HTTP error; 'cut short' (the .part is kept, and the next call continues it if the
    server still has the same file); or 'altered': another sha256 or size than expected, or not sent as it was asked for
    (the .part is removed). An older file at path is replaced by a verified one or not at all.
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
                remove(part, _version_path(path))
            raise
        os.replace(part, path)
        remove(_version_path(path))
    return path


def _receive(url, path, sha256, size):
    """
    Fetches what is missing of path + '.part' -> the sha256 that the server tells, or None. DownloadError, also if it
    takes longer than PATIENCE seconds plus one for every SLOWEST bytes. requests has no timeout for a server that sends
    headers byte by byte, so the request runs in a thread of its own, which is abandoned when it is too slow.
    """
    transfer, result, began = SimpleNamespace(answered=False, bytes=0, late=False), [], time.monotonic()

    def ask():
        try:
            result.append(_fetch(url, path, sha256, size, transfer))
        except BaseException as e:  # raised again in the thread that waits
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
    """_receive without a time limit. transfer: reports progress, and tells whether anybody still waits."""
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
            # "bytes 5-99/100" with a 206; "bytes */100" with a 416, which means that we already have all of it
            sent = re.fullmatch(r'bytes (?:(\d+)-\d+|\*)/(\d+)', r.headers.get('Content-Range', ''))
            changed = version and _version(r) and _version(r) != version
            # another range, another file, or our part is longer than the file: start from the beginning
            if changed or not sent or int(sent[1] or sent[2]) != have:
                os.remove(part)
                return _fetch(url, path, sha256, size, transfer)
            total = int(sent[2])
        elif r.status_code == 200:  # the whole file: many servers ignore ranges
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
        # Hugging Face sends the sha256 of a large file with the redirect to the server that holds it
        tags = [h.headers.get('X-Linked-Etag', '').strip('"') for h in (*r.history, r)]
    if cause or _size_of(part) < (total or 0):
        raise _cut_short(url, path, sha256, total, cause and _short(cause))
    return next((tag for tag in tags if re.fullmatch('[0-9a-f]{64}', tag)), None)


def _range(path, sha256):
    """-> how many bytes we have already, of which version of the file, and the headers that ask for the rest."""
    have, version = _size_of(path + '.part'), None
    if os.path.exists(_version_path(path)):
        version = read_text(_version_path(path))
    # identity: with compression, Content-Length and ranges would not count the bytes of the file
    headers = {'User-Agent': 'picochat/1.0 (a small educational language model)', 'Accept-Encoding': 'identity'}
    if have and (version or sha256):  # without either nobody would notice that the file has changed meanwhile
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
    """Bytes of a file; 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def _check_announced(response, path, total, have, size):
    """DownloadError if the headers of a response announce another file than we want, or one too large for the disk."""
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
    """Copies the body of a response into the open file f, which may get total bytes and no more."""
    most = UNANNOUNCED if total is None else total
    # read1 returns what has arrived, so that nothing of it is lost if the connection breaks
    read = getattr(response.raw, 'read1', response.raw.read)
    while (chunk := read(1 << 16)) and not transfer.late:
        if f.tell() + len(chunk) > most:
            raise DownloadError(f'{response.url} is not the file that was expected: it goes on after {most:,} bytes; '
                                'it was refused', ALTERED)
        f.write(chunk)
        f.flush()
        transfer.bytes += len(chunk)


def _version(response):
    """What identifies this version of the file: its ETag, unless that is a weak one, or its date; or None."""
    tag = response.headers.get('ETag', 'W/')
    return response.headers.get('Last-Modified') if tag.startswith('W/') else tag


def _version_path(path):
    return path + '.version.part'


def _keep_version(path, version):
    """Writes beside the .part which version of the file it is a part of."""
    remove(_version_path(path))
    if version:
        write_text(_version_path(path), version)


def _short(error):
    """An error's short text or its name: the messages of requests run over many lines."""
    return getattr(error, 'strerror', None) or type(error).__name__


def _mismatch(path, sha256, size):
    """What differs between the file and what it should be, in words; '' if nothing does."""
    if size is not None and os.path.getsize(path) != size:
        return f'{os.path.getsize(path):,} bytes instead of {size:,}'
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        return f'sha256 {found} instead of {sha256.lower()}'
    return ''
