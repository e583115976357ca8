"""data/files.py and data/download.py: files are written whole or not at all; a server that misbehaves."""
import contextlib
import errno
import hashlib
import os
import re
import socket
import threading
import time

import pytest
from conftest import CHAR, Handler, build, python, refuses

import data.download
import data.files
from data.download import DownloadError, download
from data.checkpoint import save_checkpoint
from data.files import atomic_write, visible_files
from data.rounding import convert
from quantize import export

BODY = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()


def test_a_folder_of_texts_is_its_files(tmp_path, capsys):
    """A pipe would keep its reader for ever."""
    (tmp_path / 'a.txt').touch()
    (tmp_path / 'b.txt').mkdir()
    (tmp_path / 'gone.txt').symlink_to('no.txt')
    os.mkfifo(tmp_path / 'pipe.txt')
    assert visible_files(tmp_path, '.txt') == [f'{tmp_path}/a.txt']
    assert '2 that are no files skipped' in capsys.readouterr().out


@pytest.mark.parametrize('code, module', [
    ('import data.writer, data.foreign_tokenizer', 'torch'),
    # PyTorch imports its compiler for what is computed without memory; it takes as much as a small model
    ('import data.checkpoint; data.checkpoint.load_model("AT/best.pt")', 'torch._dynamo'),
    ('import quantize; quantize.load("AT/int8.safetensors")', 'sympy')])
def test_imports_that_take_a_second_are_not_needed(tmp_path, code, module):
    model = build()
    save_checkpoint(f'{tmp_path}/best.pt', model, CHAR.meta())
    export(f'{tmp_path}/int8.safetensors', convert(model), CHAR.meta())
    got = python('-c', f'import sys; {code.replace("AT", str(tmp_path))}; sys.exit({module!r} in sys.modules)')
    assert got.status == 0, got.err


# ----- writing

@pytest.mark.parametrize('kept, message', [(True, 'the file that was there is kept'), (False, 'nothing was written')])
@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('No space\nleft'),
                                   KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, kept, message, error):
    path = tmp_path / 'f'
    if kept:
        path.write_bytes(b'old')

    def write(f):
        f.write(b'half of the n')
        raise error
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            atomic_write(path, write)
    else:
        refuses(f'^could not save {path}: .*No space.*; {message}: free some disk space', atomic_write, path, write)
    assert os.listdir(tmp_path) == ['f'] * kept
    assert not kept or path.read_bytes() == b'old'


def test_two_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / 'f'

    def write(f):
        f.write(b'first, ')
        atomic_write(path, lambda g: g.write(b'second'))
        assert path.read_bytes() == b'second'
        f.write(b'as a whole')
    atomic_write(path, write)
    assert path.read_bytes() == b'first, as a whole' and os.listdir(tmp_path) == ['f']


def test_a_link_that_is_laid_under_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(data.files.secrets, 'token_hex', lambda n: '0000')
    (tmp_path / 'precious').write_text('text')
    (tmp_path / 'f.0000.tmp').symlink_to('precious')
    refuses('could not save .*/f: .*File exists', atomic_write, tmp_path / 'f', lambda f: f.write(b'whole'))
    assert (tmp_path / 'precious').read_text() == 'text' and not (tmp_path / 'f').exists()


def test_what_a_killed_process_left_is_removed_later(tmp_path):
    for name, age in (('f.0000.tmp', 7200), ('f.1111.tmp', 0), ('g.0000.tmp', 7200)):
        (tmp_path / name).write_bytes(b'half')
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    atomic_write(tmp_path / 'f', lambda f: f.write(b'whole'))
    assert sorted(os.listdir(tmp_path)) == ['f', 'f.1111.tmp', 'g.0000.tmp']


def test_the_sync_of_a_file_is_needed_and_that_of_a_folder_is_not(tmp_path, monkeypatch):
    def no_sync(handle):
        if os.path.isdir(f'/proc/self/fd/{handle}') == folder:
            raise OSError(errno.EINVAL, 'Invalid argument')
    monkeypatch.setattr(os, 'fsync', no_sync)
    folder = True
    atomic_write(tmp_path / 'f', lambda f: f.write(b'whole'))
    folder = False
    refuses('could not save .*Invalid argument', atomic_write, tmp_path / 'f', lambda f: f.write(b'other'))
    assert os.listdir(tmp_path) == ['f'] and (tmp_path / 'f').read_bytes() == b'whole'


# ----- downloads

def test_download(server, tmp_path):
    server.pages |= {'/f': {'body': BODY}, '/moved': {'location': '/f'}}
    path = tmp_path / 'new' / 'f'
    assert download(server.url + '/f', path, DIGEST, len(BODY)) == str(path)
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ['f']
    download(server.url + '/f', path, DIGEST, len(BODY))
    download(server.url + '/f', path)
    assert len(server.asked) == 1  # what is there and right is not fetched again
    path.write_bytes(BODY[:-1])
    download(server.url + '/moved', path, DIGEST)
    assert path.read_bytes() == BODY and len(server.asked) == 3


@pytest.mark.parametrize('part, ranges, asked', [
    (BODY[:70_000], True, ['bytes=70000-']), (BODY[:70_000], False, ['bytes=70000-']), (BODY, True, ['bytes=256000-']),
    (BODY + b'and more', True, ['bytes=256008-', None])])
def test_download_goes_on_from_a_part(server, tmp_path, part, ranges, asked):
    server.pages['/f'] = {'body': BODY, 'ranges': ranges}
    (tmp_path / 'f.part').write_bytes(part)
    download(server.url + '/f', tmp_path / 'f', DIGEST)
    assert (tmp_path / 'f').read_bytes() == BODY and os.listdir(tmp_path) == ['f']
    assert [wanted for _, wanted in server.asked] == asked


def test_download_checks_what_hugging_face_says(server, tmp_path):
    server.pages['/cdn'] = {'body': BODY, 'cuts': [1000]}
    server.pages['/f'] = {'location': '/cdn', 'headers': {'X-Linked-Etag': f'"{DIGEST}"'}}
    refuses('cut short', download, server.url + '/f', tmp_path / 'f')
    server.pages['/cdn']['body'] = altered = BODY[:-1] + b'!'
    refuses('is not the file that was expected: sha256', download, server.url + '/f', tmp_path / 'f')
    assert os.listdir(tmp_path) == []
    server.pages['/f']['headers'] = {'X-Linked-Etag': '"a git hash, of a small file"'}
    download(server.url + '/f', tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == altered


@pytest.mark.parametrize('page, expected', [
    ({}, {'sha256': DIGEST}), ({}, {}),
    ({'length': False}, {'size': len(BODY)}),  # then only the size shows it
    ({'headers': {'ETag': 'W/"weak"', 'Last-Modified': 'Sun, 01 Nov 2026 00:00:00 GMT'}}, {})])
def test_download_cut_short_and_resumed(server, tmp_path, page, expected):
    server.pages['/f'] = {'body': BODY, 'cuts': [100_000], 'headers': {'ETag': '"1"'}} | page
    with pytest.raises(DownloadError, match=r'cut short.*: [\d,]+ of 256000 bytes are kept in .*f.part') as e:
        download(server.url + '/f', tmp_path / 'f', **expected)
    assert e.value.reason == 'cut short' and '\n' not in str(e.value)
    part = (tmp_path / 'f.part').read_bytes()
    assert sorted(os.listdir(tmp_path)) == ['f.part', 'f.version.part']
    assert BODY.startswith(part) and 90_000 < len(part) <= 100_000
    download(server.url + '/f', tmp_path / 'f', **expected)
    assert (tmp_path / 'f').read_bytes() == BODY and os.listdir(tmp_path) == ['f']
    assert server.asked[1:] == [('/f', f'bytes={len(part)}-')]


@pytest.mark.parametrize('version, obeys, asked', [
    ({'ETag': '"1"'}, True, 2), ({'ETag': '"1"'}, False, 3), ({}, True, 2)])
def test_a_part_of_an_older_file_is_not_gone_on_with(server, tmp_path, monkeypatch, version, obeys, asked):
    monkeypatch.setattr(Handler, 'knows_if_range', obeys)
    server.pages['/f'] = {'body': BODY, 'cuts': [100_000], 'headers': version}
    refuses('cut short', download, server.url + '/f', tmp_path / 'f')
    server.pages['/f'] = {'body': BODY[::-1], 'headers': {'ETag': '"2"'} if version else {}}
    download(server.url + '/f', tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == BODY[::-1] and len(server.asked) == asked


@pytest.fixture
def dripping():
    """dripping(start) -> the address of a server that sends start, and then a byte now and then for ever."""
    listener, ended = socket.create_server(('127.0.0.1', 0)), threading.Event()

    def serve(start):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(start)
            while not ended.wait(0.02):
                connection.sendall(b'a')

    def begin(start):
        threading.Thread(target=serve, args=(start,), daemon=True).start()
        return f'http://127.0.0.1:{listener.getsockname()[1]}/f'
    yield begin
    ended.set()
    listener.close()


@pytest.mark.parametrize('start, reason', [
    (b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 256000\r\n\r\n', 'cut short'),
    (b'HTTP/1.1 2', 'unreachable'),
    (b'HTTP/1.1 200 OK\r\nX-What: a', 'unreachable'),
    (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n5;a', 'cut short')])
def test_a_byte_now_and_then_does_not_keep_us(server, dripping, tmp_path, monkeypatch, start, reason):
    monkeypatch.setattr(data.download, 'PATIENCE', 0.5)
    began = time.monotonic()
    with pytest.raises(DownloadError, match='no answer in 0.5 seconds|slower than 10,000 bytes/s') as e:
        download(dripping(start), tmp_path / 'f')
    assert time.monotonic() - began < 10 and e.value.reason == reason and not (tmp_path / 'f').exists()
    assert (tmp_path / 'f.part').exists() or b'ETag' not in start


WHOLE = {'sha256': DIGEST}


@pytest.mark.parametrize('page, part, how, reason, match', [
    # more than was said, or something else: what has come of it goes
    ({'body': BODY[:-1] + b'?'}, None, WHOLE, 'altered', 'sha256 .* instead of'),
    ({}, b'something else', WHOLE, 'altered', 'sha256'),
    ({}, None, {'size': len(BODY) - 1}, 'altered', '256,000 bytes'),
    ({'length': False}, None, WHOLE, 'altered', 'it goes on after 2,000 bytes'),
    ({'length': False}, None, WHOLE | {'size': 1999}, 'altered', 'it goes on after 1,999 bytes'),
    ({'more': b'more'}, BODY[:500], WHOLE, 'altered', 'it goes on after 256,000 bytes'),
    ({'headers': {'Content-Encoding': 'gzip'}}, None, WHOLE, 'altered',
     r'it comes compressed \(gzip\), though it was asked for as it is'),
    ({'headers': {'Content-Length': str(10**15)}}, None, WHOLE, 'altered',
     '1,000,000,000,000,000 bytes, and there is room for .* more'),
    # not all of it, or nothing: what has come stays
    ({'cuts': [1000]}, None, WHOLE, 'cut short', 'cut short'),
    ({'status': 404}, b'kept', WHOLE, 404, 'answered 404'),
    (None, b'kept', WHOLE, 'unreachable', 'cannot reach .*ConnectionError.*put the file at .*f yourself')])
def test_download_errors_leave_the_old_file(server, tmp_path, monkeypatch, page, part, how, reason, match):
    monkeypatch.setattr(data.download, 'UNANNOUNCED', 2000)
    server.pages['/f'] = {'body': BODY} | (page or {})
    (tmp_path / 'f').write_bytes(b'an old one')
    if part:
        (tmp_path / 'f.part').write_bytes(part)
    with pytest.raises(DownloadError, match=match) as e:
        download('http://127.0.0.1:1/f' if page is None else server.url + '/f', tmp_path / 'f', **how)
    assert e.value.reason == reason and not re.search('\n|^error', str(e.value))
    assert ('not the file that was expected' in str(e.value)) == (reason == 'altered')
    assert (tmp_path / 'f').read_bytes() == b'an old one'
    assert sorted(os.listdir(tmp_path)) == (['f'] if reason == 'altered' else ['f', 'f.part'])
    assert part != b'kept' or (tmp_path / 'f.part').read_bytes() == part
