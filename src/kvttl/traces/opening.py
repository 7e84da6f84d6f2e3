"""Opens a trace's bytes: known by their content, never by a name; in pieces of bounded size."""

import gzip
import itertools
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

LINE_LIMIT = 64 << 20  # bytes
SESSION_LIMIT = 256 << 20  # bytes of an agentic session, decompressed
HEAD = 256 << 10  # bytes that tell formats apart
DAMAGE = (EOFError, OSError, zlib.error)  # of a file that cannot be read to its end
_PACKED = "compressed with {}: unpack it first ({})"
_ARCHIVE = "an archive ({}): unpack it first, a file or a folder of files is read"
_UTF16 = "text in UTF-16: save it as UTF-8 first (iconv -f UTF-16 -t UTF-8)"
_FIRST_BYTES = {  # of what is read by nobody here -> what it is, and what to do
    b"\x28\xb5\x2f\xfd": _PACKED.format("zstd", "zstd -d"),
    b"\xfd7zXZ": _PACKED.format("xz", "xz -d"),
    b"BZh": _PACKED.format("bzip2", "bzip2 -d"),
    b"\x04\x22\x4d\x18": _PACKED.format("lz4", "lz4 -d"),
    b"\x1f\x8b": _PACKED.format("gzip twice", "gunzip"),
    b"PK": _ARCHIVE.format("zip"),
    b"7z\xbc\xaf": _ARCHIVE.format("7z"),
    b"Rar!": _ARCHIVE.format("rar"),
    b"PAR1": "a Parquet file: write its rows as JSON lines first",
    b"LMCT": "LMCache's trace of events, not of requests: lookup-hash logs are read",
    b"version https://git-lfs": "a Git LFS pointer, not the data: fetch it (git lfs pull)",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}


@contextmanager
def open_bytes(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file of text, gzipped or not (by its first bytes), behind its byte order mark.

    Gives its content and the file itself, whose ``tell`` says how much of it was read.

    Raises
    ------
    ValueError
        Says what the file is where it is no such text.
    """
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if zipped else raw as stream:
            try:
                start = stream.peek(512)[:512]
            except DAMAGE as error:
                raise ValueError(f"damaged: {error}") from error
            if problem := _no_text(start):
                raise ValueError(problem)
            if start.startswith(b"\xef\xbb\xbf"):
                stream.read(3)
            yield stream, raw


def _no_text(start):
    """Return what a file is, and what to do with it, if it is no text of UTF-8."""
    known = (text for mark, text in _FIRST_BYTES.items() if start.startswith(mark))
    if start[257:262] == b"ustar":
        return _ARCHIVE.format("tar")
    return next(known, _UTF16 + ", or no text at all" if b"\0" in start else None)


def head(path: str | Path) -> tuple[list[bytes], bool]:
    """Return the lines, without blank ones, that a file begins with, and whether these are all."""
    try:
        with open_bytes(path) as (file, _):
            start = file.read(HEAD + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, line 1: damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from error
    return [line for line in start.splitlines() if line.strip()], len(start) <= HEAD


def text_lines(path: Path, source, bar=lambda size: None, limit: int = 0) -> Iterator[tuple]:
    """Yield (line number, line) of a file, without blank lines; `bar` gets the bytes read.

    A line that is too long is a bad line. What is damaged is an error, also
    where bad lines are skipped: nothing after it can be read.
    """
    seen, limit = 0, limit or LINE_LIMIT
    with ExitStack() as stack:
        try:
            file, raw = stack.enter_context(open_bytes(path))
        except ValueError as error:
            raise ValueError(f"{path}, line 1: {error}") from error
        for number in itertools.count(1):
            line = _line(file, limit + 1, path, number)
            if not line:
                return
            bar(raw.tell() - seen)
            seen = raw.tell()
            if len(line) > limit and not line.endswith(b"\n"):
                with source.place(f"{path}, line {number}"):
                    raise ValueError(f"line longer than {limit >> 20} MiB")
                while line and not line.endswith(b"\n"):
                    line = _line(file, limit, path, number)
            elif line.strip():
                yield number, line


def session_lines(path: Path, source) -> Iterator[tuple[int, bytes]]:
    """Return the `text_lines` of agentic sessions, which are longer."""
    return text_lines(path, source, limit=SESSION_LIMIT)


def _line(file, limit, path, number):
    try:
        return file.readline(limit)
    except DAMAGE as error:
        raise ValueError(f"{path}, line {number}: damaged: {error}") from error


def whole(path: str | Path) -> bytearray:
    """Return a file's content, decompressed; read in pieces, as its size is not known."""
    content = bytearray()
    with open_bytes(path) as (stream, _):
        while piece := stream.read(1 << 20):
            content += piece
            if len(content) > SESSION_LIMIT:
                raise ValueError(f"session larger than {SESSION_LIMIT >> 20} MiB decompressed")
    return content
