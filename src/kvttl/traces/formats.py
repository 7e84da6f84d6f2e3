"""The formats of traces by name, and how a file's is found from its content.

A bad line raises a ValueError that names file, line and reason, or is skipped
and counted; see `kvttl.traces.reading.read_trace`.
"""

from pathlib import Path

from kvttl.traces.opening import head
from kvttl.traces.readers.copilot import COPILOT
from kvttl.traces.readers.decision_log import DECISIONS
from kvttl.traces.readers.dynamo import DYNAMO
from kvttl.traces.readers.kvcache_simulator import KVCACHE_SIMULATOR
from kvttl.traces.readers.lmct import LMCT, MAGIC
from kvttl.traces.readers.lookups import LOOKUPS
from kvttl.traces.readers.mooncake import MOONCAKE
from kvttl.traces.readers.mooncake_sessions import MOONCAKE_SESSIONS
from kvttl.traces.readers.qwen import QWEN
from kvttl.traces.readers.servegen import SERVEGEN
from kvttl.traces.readers.tracelab import TRACELAB
from kvttl.traces.readers.weka import WEKA
from kvttl.traces.source import parsed

FORMATS = {
    "qwen": QWEN,
    "mooncake_sessions": MOONCAKE_SESSIONS,
    "servegen": SERVEGEN,
    "kvcache_simulator": KVCACHE_SIMULATOR,
    "mooncake": MOONCAKE,
    "lmcache": LOOKUPS,
    "decisions": DECISIONS,
    "tracelab": TRACELAB,
    "copilot": COPILOT,
    "dynamo": DYNAMO,
    "lmct": LMCT,
    "weka": WEKA,
}
ENDS = ("", ".gz", ".zst", ".xz", ".bz2")  # of names of packed files


def files_of(name: str, path: Path) -> list[Path]:
    """Return the file, or a folder's files of a format, by name."""
    if not path.is_dir():
        return [path]
    pattern = FORMATS[name].files
    found = in_folder(path, pattern)
    if not found and pattern == "*.jsonl":
        found = in_folder(path, "*.json") or in_folder(path, "*.parquet")
    if name == "weka":  # sessions one a line are no *.json
        found += [file for file in in_folder(path, "*.jsonl") if format_of(file) == name]
    return found


def in_folder(path: Path, pattern: str) -> list[Path]:
    """Return a folder's files, packed or not, by name."""
    return sorted(file for end in ENDS for file in path.glob(f"{pattern}{end}"))


def format_of(path: Path) -> str | None:
    """Return the name in `FORMATS` that fits what a file begins with.

    Raises
    ------
    ValueError
        Says what the file is where it is no text.
    """
    with open(path, "rb") as file:
        if MAGIC in file.read(64):  # which a frame's length stands before
            return "lmct"
    lines, _ = head(path)
    for line in lines:
        try:
            record = parsed(line)
        except (ValueError, RecursionError):
            continue
        if name := next((name for name, f in FORMATS.items() if f.can_read(record)), None):
            return name
    text = b"".join(lines)  # a session over many lines, lines that are long or cut
    marks = sorted(FORMATS.items(), key=lambda item: item[0] != "weka")
    marked = (name for name, format in marks if f'"{format.mark}"'.encode() in text)
    return next(marked, None) if text.startswith(b"{") else None
