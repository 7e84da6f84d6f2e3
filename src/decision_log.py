"""One record per decision: in memory, as JSON lines, as a pandas DataFrame."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MAPPINGS = ("metadata", "hit_tokens", "tier_before", "tier_after")


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """What was decided about one prompt, what came of it, and what it cost.

    Parameters
    ----------
    time_s : float
        Unix time of the decision.
    prompt_digest : str
        Names the prompt without showing it; equal tokens give equal digests.
    prompt_tokens, chunks : int
        Length of the prompt, and its complete LMCache chunks.
    metadata : mapping
        What the heuristics were given.
    ttl_s, wanted_tier : float, str
        The decision (None where the metadata was refused).
    hit_tokens : mapping
        Tokens that the engine did not compute, by the tier that served them.
    tier_before, tier_after : mapping
        Chunks by hottest tier before and after the moves; ``"none"`` = not seen.
    moves : tuple of mapping
        The controller's status of each move.
    generate_s, manage_s : float
        Seconds in the engine, and in everything this kit added.
    error : str
        Why the prompt could not be managed; empty if it could.
    """

    time_s: float
    prompt_digest: str
    prompt_tokens: int = 0
    chunks: int = 0
    metadata: Mapping[str, float] = field(default_factory=dict)
    ttl_s: float | None = None
    wanted_tier: str | None = None
    hit_tokens: Mapping[str, int] = field(default_factory=dict)
    tier_before: Mapping[str, int] = field(default_factory=dict)
    tier_after: Mapping[str, int] = field(default_factory=dict)
    moves: tuple[Mapping[str, Any], ...] = ()
    generate_s: float = 0.0
    manage_s: float = 0.0
    error: str = ""

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(asdict(self), default=str)


def write_records(path: str | Path, records: Iterable[DecisionRecord]) -> int:
    """Append records to a JSON-lines file, on lines of their own; returns how many."""
    count = 0
    with open(path, "a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        torn = file.read(1) not in (b"", b"\n")  # a writer before us died in mid-line
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn)
        for record in records:
            file.write(record.to_json() + "\n")
            count += 1
    return count


def read_records(path: str | Path) -> Iterator[DecisionRecord]:
    """Yield the records of a JSON-lines file; a line that is not one is reported and skipped."""
    names = {f.name for f in fields(DecisionRecord)}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
                values = {k: v for k, v in values.items() if k in names}
                record = DecisionRecord(**values | {"moves": tuple(values.get("moves", ()))})
            except (ValueError, TypeError, AttributeError) as error:
                logger.warning("%s line %d is not a decision record: %s", path, number, error)
            else:
                yield record


def to_frame(records: Iterable[DecisionRecord]):
    """Return records as a DataFrame, one row each; hits and tiers get a column a tier."""
    import pandas as pd

    rows = []
    for record in records:
        row = {**asdict(record), "moves": len(record.moves)}
        for name in _MAPPINGS:
            prefix = "" if name == "metadata" else f"{name}_"
            row |= {f"{prefix}{key}": value for key, value in row.pop(name).items()}
        row["moved"] = ", ".join(
            f"{move['from']}→{move['to']}" for move in record.moves if move["moved_chunks"]
        )
        rows.append(row)
    names = [f.name for f in fields(DecisionRecord) if f.name not in _MAPPINGS] + ["moved"]
    frame = pd.DataFrame(rows, columns=None if rows else names).astype({"ttl_s": float})
    frame["time_s"] = pd.to_datetime(frame["time_s"], unit="s", utc=True)
    return frame.rename(columns={"time_s": "time"})
