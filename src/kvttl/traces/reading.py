"""Reads traces in the formats that users have (`kvttl.traces.formats`) into one `Trace`.

A trace is a file, or a folder of rotated ones. Gzip, zstd, xz, bzip2 and Parquet are known by
their content, whatever their names say.
"""

import hashlib
import os
import warnings
from pathlib import Path

from kvttl import PROJECT, user_path
from kvttl.traces.formats import FORMATS, files_of, format_of, in_folder
from kvttl.traces.opening import head
from kvttl.traces.source import ORDER, Source, parsed
from kvttl.traces.trace import CACHE_VERSION, Trace, load_trace, save_trace

_SESSIONS = ("weka", "tracelab", "copilot", "dynamo")
READER_VERSION = 4  # of what readers refuse: a copy made by an older one is not used


def read_trace(
    path: str | Path,
    format: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    **options: object,
) -> Trace:
    """Read a trace file or folder.

    Parameters
    ----------
    path : path
        A file or folder; ``.gz`` files are read as they are.
    format : str, optional
        One of `FORMATS`; by default found from the content.
    cache_dir : path, optional
        Folder of compact copies: the second read of an unchanged trace takes
        milliseconds. None keeps none.
    skip_bad : bool
        Skip and count lines that cannot be used instead of raising. A damaged
        ``.gz`` of lines is an error all the same: nothing after it can be read.
    progress : bool
        Show a bar on stderr once reading takes more than a second.
    seed, sessions_per_hour, max_sessions
        Agentic sessions only: they are overlaid with exponential gaps between
        their starts, in an order drawn with `seed`, at this rate; at most so many.
    block_tokens : int, optional
        Tokens a block where the file does not say: Mooncake 512, Qwen-Bailian and ServeGen 16,
        TraceLab and Copilot (which have no block ids) 64, decision log: found from its counts.
    time_unit : str, optional
        ``s``, ``ms``, ``us`` or ``ns`` where neither file nor format says (Mooncake: ms,
        others: s); ``order``: there are no times, only policies that go by order can run.
    subagent_times : str, optional
        ``absolute`` or ``relative`` (to the marker); by default found from all sessions.
    output_rate : float, optional
        Tokens of output in a second, where lines wait for the end of others; inf: at once.

    Raises
    ------
    ValueError
        Names the file, the line and the reason; also where no request is left.

    Examples
    --------
    >>> import tempfile
    >>> line = '{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "trace.jsonl"
    ...     _ = file.write_text(line)
    ...     read_trace(file)
    Trace(1 requests, 2 accesses, 2 unique blocks of 512 tokens, 0 s)
    """
    return _read(user_path(path), format, Source(**options), cache_dir)


def _read(path, format, source, cache_dir):
    if not path.exists():
        raise FileNotFoundError(f"there is no trace at {path}")
    if path.suffix == ".npz":
        trace = load_trace(path)
        source.agreed("block_tokens", trace.block_tokens, source.block_tokens, None)
        return trace
    name = format or detect_format(path)
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    if name in _SESSIONS and source.time_unit == ORDER:
        raise ValueError("time_unit must be a unit for agentic sessions, got 'order'")
    files = files_of(name, path)
    if not files:
        pattern = FORMATS[name].files
        raise ValueError(f"{path}: no {pattern} or {pattern}.gz file in this folder")
    cached = cache_dir and user_path(cache_dir) / _cache_name(path, name, files, source)
    if cached and cached.exists():
        try:
            return load_trace(cached)
        except ValueError as error:
            warnings.warn(f"{error}; {path} is read anew", stacklevel=3)
    built = FORMATS[name].read(files, source)
    trace = built.finish(path.name, source.skipped, source.time_unit != ORDER)
    if not trace.requests:
        skipped = f": {source.skipped} bad lines skipped, the first: {source.first_bad}"
        nothing = "the file is empty" if path.is_file() and _is_empty(path) else "no request in it"
        raise ValueError(f"{path}: {nothing}{skipped if source.skipped else ''}")
    if cached:
        save_trace(trace, cached)
    return trace


def detect_format(path: str | Path) -> str:
    """Return the name in `FORMATS` that fits a file or folder, from its first record."""
    path = user_path(path)
    kinds = "*.jsonl", "*.json", "*.parquet", "*.lct"
    found = (in_folder(path, kind) for kind in kinds) if path.is_dir() else ([path],)
    files = next(filter(None, found), [])
    for file in files:
        if name := format_of(file):
            return name
        if not _is_empty(file):
            break
    if path.is_dir() and in_folder(path, "*.json"):
        return "weka"
    what = _what_it_is(file) if files else "no *.jsonl or *.json file in this folder"
    raise ValueError(f"{path}, line 1: no format of {', '.join(FORMATS)} fits: {what}")


def _is_empty(file):
    return head(file) == ([], True)


_NO_IDS = "no block ids in it, so no hits can be counted"


def _what_it_is(file):
    """Say what a file of text is that no format fits, and what is missing."""
    lines, _ = head(file)
    if not lines:
        return "the file is empty"
    shown = f"{lines[0].decode(errors='replace')[:80]!r}"
    if lines[0].lstrip().startswith(b"["):
        return "a JSON array; JSON lines are wanted, one object a line (jq -c '.[]')"
    try:
        keys = parsed(lines[0]).keys()
    except (ValueError, RecursionError):
        csv = b"," in lines[0] and not lines[0].lstrip().startswith(b"{")
        return f"CSV, {_NO_IDS}: {shown}" if csv else shown
    if {"ts", "events"} <= keys:
        return "KV events of vLLM (what was stored and removed), not requests"
    return f"{_NO_IDS}; its fields: {', '.join(keys)}"[:200]


def _cache_name(path, name, files, source):
    """Name a trace's compact copy after what its content depends on, and nothing else."""
    parts = [CACHE_VERSION, READER_VERSION, str(path.resolve()), name]
    parts += [getattr(source, option) for option in FORMATS[name].options]
    parts += [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{path.name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.npz"


_DATA = PROJECT / "data"


def traces_at_hand(sessions: int = 40, cache_dir: str | Path | None = None) -> dict[str, Trace]:
    """Return traces by name: real ones under ``KV_TRACE_DIR``, and the sample of this kit.

    Parameters
    ----------
    sessions : int
        Agentic sessions that are overlaid, at 30 an hour.
    cache_dir : path, optional
        Of compact copies; default ``data/trace_cache``.
    """
    folder, found = os.environ.get("KV_TRACE_DIR"), {}
    options, home = {"cache_dir": cache_dir or _DATA / "trace_cache"}, user_path(folder or "")
    if folder and (conversation := home / "mooncake" / "conversation_trace.jsonl").exists():
        found["conversation"] = read_trace(conversation, **options)
    if folder and (agentic := home / "weka-agentic").is_dir():
        found["agentic"] = read_trace(agentic, max_sessions=sessions, **options)
    return found | {"sample": read_trace(_DATA / "sample_trace.jsonl.gz")}
