"""
Paul Graham's essays as characters, from the article index of his site: a second character set, of modern prose.

$ python data/graham_char/prepare.py
    a page a second, kept in pages/ next to this file; stop it when you like, the next run asks only for what is
    missing (remove pages/articles.html to look for new essays)
$ python data/graham_char/prepare.py --input=FOLDER
    saved .html or .txt files, one essay each; a single file will do

You see how many essays there are, what was skipped and why, and the counts of tokens. Typographic quotes, dashes and
accents become ASCII, so the vocabulary stays below 100 characters; a tenth of the text, whole essays, is held out.
"""

import os
import re
import string
import sys
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import urljoin, urlparse

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))  # the repo: its code is two folders up
from data.download import DownloadError, download
from data.files import hold, in_repo, visible_files
from data.writer import split_texts, write_texts

# -----------------------------------------------------------------------------
out_dir = in_repo('data/graham_char')
input = ''  # a folder of saved pages, or one file; empty: fetch from index_url
index_url = 'https://paulgraham.com/articles.html'
pause = 1.0  # seconds before each request; it is one man's site
val_fraction = 0.1  # of the characters are held out

limits = {'val_fraction': (1e-6, 0.999), 'pause': (0, None)}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())


# -----------------------------------------------------------------------------
# HTML -> text

class Page(HTMLParser):
    """
    An HTML page -> .links [(href, text)] and .text: its title, and what a browser shows, about.

    The site dates from when pages were laid out in tables: paragraphs end in <br><br>, titles are images, the menu is
    an image map.
    """
    blocks = set('title p div center table tr td blockquote ul ol li dl dt dd pre xmp hr h1 h2 h3 h4 h5 h6'.split())

    def __init__(self, html):
        super().__init__()
        self.links, self.parts = [], []
        self.inside = Counter()  # tag -> how many of it are open
        self.link = None  # href of the <a> that is open, and where in parts it began
        self.feed(html)
        self.close()
        text = re.sub(r' *\n *', '\n', re.sub(' +', ' ', ''.join(self.parts)))
        self.text = re.sub('\n{3,}', '\n\n', text).strip('\n')

    def handle_starttag(self, tag, attrs):
        self.inside[tag] += 1
        if tag in self.blocks:
            self.parts.append('\n\n')
        elif tag == 'br':
            self.parts.append('\n')
        elif tag == 'a':
            self.link = dict(attrs).get('href'), len(self.parts)

    def handle_endtag(self, tag):
        self.inside[tag] = max(0, self.inside[tag] - 1)
        if tag in self.blocks:
            self.parts.append('\n\n')
        elif tag == 'a' and self.link:
            href, start = self.link
            self.links.append((href or '', ' '.join(''.join(self.parts[start:]).split())))
            self.link = None

    def handle_data(self, data):
        if self.inside['script'] or self.inside['style']:
            return
        if self.inside['pre'] or self.inside['xmp']:
            self.parts.append(data.replace(' ', '\xa0'))  # these spaces are to stay: programs in Lisp
        else:
            self.parts.append(re.sub(r'\s+', ' ', data))


ascii_for = str.maketrans({
    '\u2018': "'", '\u2019': "'", '\u201a': "'", '\u201b': "'", '\u2032': "'", '\u00b4': "'",
    '\u201c': '"', '\u201d': '"', '\u201e': '"', '\u2033': '"',
    '\u2010': '-', '\u2011': '-', '\u2012': '-', '\u2013': '-', '\u2212': '-', '\u2014': '--', '\u2015': '--',
    '\u2022': '*', '\u00b7': '*', '\u00d7': 'x', '\u2044': '/',
    '\u00ad': None, '\u200b': None, '\ufeff': None, '\r': None, '\t': ' '})
dropped = Counter()  # characters that have no ASCII spelling


def plain(text):
    """
    Any text -> ASCII and line ends.
    NFKD takes accents off their letters, and knows an ellipsis, ligatures and no-break spaces.
    """
    text = unicodedata.normalize('NFKD', text.translate(ascii_for)).translate(ascii_for)
    keep = set(string.printable) - set('\r\t\x0b\x0c')
    dropped.update(c for c in text if c not in keep and not unicodedata.combining(c))
    return ''.join(c for c in text if c in keep)


def decode(raw):
    """Bytes of a page -> str: UTF-8, or the encoding of the web's older pages."""
    try:
        return raw.decode('utf-8-sig')
    except UnicodeDecodeError:
        return raw.decode('cp1252', errors='replace')


def essay(path):
    """A saved essay -> its text and two blank lines; '' if there is no text in it."""
    with open(path, 'rb') as f:
        text = decode(f.read())
    if not path.lower().endswith('.txt'):
        text = Page(text).text
    text = plain(text).strip()
    return text + '\n\n\n' if text else ''


# -----------------------------------------------------------------------------
# Where the pages are from

def saved_pages(folder):
    """A folder of saved pages, or one file -> the paths of the essays."""
    if not os.path.exists(folder):
        raise ValueError(f'there is no file or folder {folder!r}: give --input=FOLDER of .html or .txt files')
    if not os.path.isdir(folder):
        return [folder]
    paths = visible_files(folder, ('.html', '.htm', '.txt'), below=False)
    return [path for path in paths if os.path.basename(path) not in (index_name, 'index.html')]


def fetched_pages():
    """Downloads essays of the index that are not there yet -> the paths of all that are there."""
    pages = os.path.join(out_dir, 'pages')
    with open(download(index_url, os.path.join(pages, index_name), pause=pause), 'rb') as f:
        urls = essay_urls(Page(decode(f.read())))
    if not urls:
        raise ValueError(f'no essays are linked from {index_url}: has the site changed? '
                         '--input=FOLDER takes saved pages')
    print(f'{index_url} lists {len(urls)} essays')
    paths, missing, failed = [], 0, 0
    for i, url in enumerate(urls):
        path = os.path.join(pages, url.rpartition('/')[2])
        reason = fetch(url, path)
        if reason is None:
            paths.append(path)
        else:
            print(f'{url}: {reason}')
            missing += reason in (404, 410)
            failed += reason not in (404, 410)
        if (i + 1) % 20 == 0:
            print(f'{i + 1} of {len(urls)}', flush=True)
    if missing:
        print(f'{missing} listed pages do not exist and are skipped')
    if failed:
        print(f'{failed} pages did not arrive whole and are skipped: run the same command again to fetch them')
    return paths


def essay_urls(index):
    """Essays are links with words to pages next to the index (a link around an image is the logo), each once."""
    here = index_url.rpartition('/')[0] + '/'
    urls = [urljoin(index_url, href).partition('#')[0] for href, text in index.links if text]
    urls = [url for url in dict.fromkeys(urls) if re.fullmatch(r'[\w-][\w.-]*\.html?', url.removeprefix(here))]
    return [url for url in urls if url not in (here + index_name, here + 'index.html')]


def fetch(url, path):
    """Downloads a page, in two attempts if needed -> None, or the reason why it failed: see DownloadError."""
    for attempt in range(2):
        try:
            download(url, path, pause=pause)
            return None
        except DownloadError as e:
            if e.reason == 'unreachable' and attempt == 1:
                raise  # nor would the other pages come
            reason = e.reason
            if reason in (404, 410):
                break
    return reason


# -----------------------------------------------------------------------------
# Essays -> dataset

index_name = os.path.basename(urlparse(index_url).path) or 'index.html'
hold(out_dir)
paths = saved_pages(input) if input else fetched_pages()
texts = {os.path.basename(path): essay(path) for path in paths}
empty = [name for name, text in texts.items() if not text]
if empty:
    print(f'{len(empty)} without text are skipped: {" ".join(empty)}')
texts = {name: text for name, text in texts.items() if text}
n_chars = sum(map(len, texts.values()))
if n_chars < 1000:
    raise ValueError(f'{n_chars:,} characters in {len(texts)} essay(s) at {input or index_url}: '
                     'at least 1,000 are needed')
if dropped:
    print(f'{sum(dropped.values())} characters without an ASCII spelling are dropped: '
          f'{ascii("".join(sorted(dropped)))[1:-1]}')
train, val = split_texts(texts, val_fraction)
print(f'{len(texts)} essays, {n_chars:,} characters')
write_texts(out_dir, train, val, 'char', os.path.basename(os.path.abspath(input)) if input else index_url)
