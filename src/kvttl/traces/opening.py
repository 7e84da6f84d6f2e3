"""Opens a trace's bytes: known by their content, never by a name; in pieces of bounded size."""

import bz2
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
import zstandard

LINE_LIMIT = 64 << 20  # bytes
SESSION_LIMIT = 256 << 20  # bytes of an agentic session, decompressed
_BAR_LINES = 64
HEAD = 256 << 10  # bytes that tell formats apart
# Of a file that cannot be read to its end.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_PACKED = "compressed with {}: unpack it first ({})"
_ARCHIVE = "an archive ({}): unpack it first, a file or a folder of files is read"
_UTF16 = "text in UTF-16: save it as UTF-8 first (iconv -f UTF-16 -t UTF-8)"
_FIRST_BYTES = {  # of what is read by nobody here -> what it is, and what to do
    b"\x04\x22\x4d\x18": _PACKED.format("lz4", "lz4 -d"),
    b"\x1f\x8b": _PACKED.format("gzip twice", "gunzip"),
    b"PK": _ARCHIVE.format("zip"),
    b"7z\xbc\xaf": _ARCHIVE.format("7z"),
    b"Rar!": _ARCHIVE.format("rar"),
    b"version https://git-lfs": "a Git LFS pointer, not the data: fetch it (git lfs pull)",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}


class _Pieces(io.RawIOBase):
    """A stream of the bytes that an iterator yields."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self):
        return True

    def readinto(self, into):
        while not self._left and (piece := next(self._pieces, None)) is not None:
            self._left = memoryview(piece)
        count = min(len(into), len(self._left))
        into[:count], self._left = self._left[:count], self._left[count:]
        return count


def _zstd(raw):
    """Yield a zstd file's content; so little at once that no bomb fills the memory."""
    unpacker = None
    while piece := raw.read(1024):
        while piece:
            unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
            yield unpacker.decompress(piece)
            piece = unpacker.unused_data
            unpacker = None if unpacker.eof else unpacker
    if unpacker:
        raise EOFError("ended before the end of a frame")


def _parquet(raw):
    """Yield a Parquet file's rows as JSON lines; what is null is left out."""
    from pyarrow import parquet

    for batch in parquet.ParquetFile(raw.name).iter_batches(1024):
        rows = ({k: v for k, v in row.items() if v is not None} for row in batch.to_pylist())
        yield b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


_UNPACK = {  # first bytes -> file to stream
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"\xfd7zXZ": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
    b"\x28\xb5\x2f\xfd": lambda raw: io.BufferedReader(_Pieces(_zstd(raw))),
    b"PAR1": lambda raw: io.BufferedReader(_Pieces(_parquet(raw))),
}


@contextmanager
def open_bytes(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file of text, packed or not (by its first bytes), behind its byte order mark.

    Gives its content and the file itself, whose ``tell`` says how much of it was read.

    Raises
    ------
    ValueError
        Says what the file is where it is no such text.
    """
    with open(path, "rb") as raw:
        start = raw.peek(8)[:8]
        unpack = next((way for mark, way in _UNPACK.items() if start.startswith(mark)), None)
        with unpack(raw) if unpack else raw as stream:
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
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not the content's fault
        raise ValueError(f"{path}, line 1: damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from error
    return [line for line in start.splitlines() if line.strip()], len(start) <= HEAD


def text_lines(path: Path, source, bar=lambda size: None, limit: int = 0) -> Iterator[tuple]:
    """Yield (line number, line) of a file, without blank lines; `bar` gets the bytes read.

    It gets them every `_BAR_LINES` lines, and at the end.

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
            if not line or number % _BAR_LINES == 0:
                bar(raw.tell() - seen)
                seen = raw.tell()
            if not line:
                return
            if len(line) > limit and not line.endswith(b"\n"):
                with source.place(f"{path}, line {number}"):
                    raise ValueError(f"line longer than {limit >> 20} MiB")
                while line and not line.endswith(b"\n"):
                    line = _line(file, limit, path, number)
            elif not line.isspace():
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
