"""
Downloads that go on where they stopped, and leave either a right file or the old one. A library, without torch.

    download('https://.../input.txt', 'data/x/input.txt', sha256='86c4e6...')       # -> the path, if the file is right
"""
import os
import re
import shutil
import threading
import time
from types import SimpleNamespace

from data.files import hold, read_text, remove, sha256_of, write_text

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
                remove(part, _version_path(path))
            raise
        os.replace(part, path)
        remove(_version_path(path))
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
    remove(_version_path(path))
    if version:
        write_text(_version_path(path), version)


def _short(error):
    """Only the name of an error, or its short text: those of requests run over many lines."""
    return getattr(error, 'strerror', None) or type(error).__name__


def _mismatch(path, sha256, size):
    """What differs between the file and what it should be, in words; '' if nothing does."""
    if size is not None and os.path.getsize(path) != size:
        return f'{os.path.getsize(path):,} bytes instead of {size:,}'
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        return f'sha256 {found} instead of {sha256.lower()}'
    return ''
