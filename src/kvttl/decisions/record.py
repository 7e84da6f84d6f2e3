"""What was decided about one prompt, and what came of it: one record, one line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import numpy as np

KINDS = ("generation", "claim", "expiry", "settled", "shed")
SOURCES = ("caller", "history", "generation", "prompt", "remembered", "absent")
_MAX_DEPTH = 8  # levels of nesting that a line of the log shows; deeper values become text


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
    kind : str
        One of `KINDS`.
    prompt : str
        The prompt itself, only on request.
    chunk_keys : tuple of str
        LMCache's chunk hashes in prefix order; claims are rebuilt from them.
    metadata_sources : mapping
        Metadata field -> where its value came from; see `SOURCES`.
    from_tier : str
        Of an expiry: the tier whose TTL passed.
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
    kind: str = "generation"
    prompt: str | None = None
    chunk_keys: tuple[str, ...] = ()
    metadata_sources: Mapping[str, str] = field(default_factory=dict)
    from_tier: str | None = None

    def to_json(self, *, prompts: bool = True) -> str:
        """Return the record as one line of strict JSON; `prompts` = with the prompt's text.

        NumPy scalars become numbers. NaN and infinity become null, in the
        metadata (which they made unusable) text; so does all else unknown.

        Examples
        --------
        >>> line = DecisionRecord(0.0, "a", metadata={"perplexity": math.nan}).to_json()
        >>> json.loads(line)["metadata"]
        {'perplexity': 'nan'}
        """
        values = dict(zip(_NAMES, _values(self)))
        if not prompts:
            values["prompt"] = None
        try:
            return _encode(values)
        except (ValueError, TypeError, RecursionError):  # NaN, odd keys, a circle
            return _encode({k: _clean(v, as_text=k == "metadata") for k, v in values.items()})


_NAMES = tuple(f.name for f in fields(DecisionRecord))
_values = attrgetter(*_NAMES)


def _plain(value):
    """Return what JSON can show of a value that it does not know."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        plain = value.item()
        return float(plain) if isinstance(plain, np.generic) else plain  # a long double
    return _text(value)


_encode = json.JSONEncoder(allow_nan=False, default=_plain).encode


def _text(value):
    try:
        return str(value)
    except Exception:  # whatever a caller's object does must not cost the record
        return f"<{type(value).__name__}>"


def _clean(value, *, as_text, depth=0):
    """Return a copy that strict JSON can show: `as_text` = "nan" instead of null."""
    if isinstance(value, np.generic):
        value = _plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return _text(float(value)) if as_text else None
    if isinstance(value, int) and value.bit_length() > 64:
        return f"{value.bit_length()}-bit number"
    if value is None or isinstance(value, (str, int, float)):
        return value
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        pairs = ((_text(k), v) for k, v in value.items())
        return {k: _clean(v, as_text=as_text, depth=depth + 1) for k, v in pairs}
    if depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
        return [_clean(v, as_text=as_text, depth=depth + 1) for v in value]
    return _text(value)


def parse_record(line):
    """Return a line's record; what is null or missing has its default."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise TypeError(f"a JSON object was expected, got {type(values).__name__}")
    values = {k: v for k, v in values.items() if k in _CHECKS and v is not None}
    for name, value in values.items():
        if not _CHECKS[name](value):
            raise TypeError(f"{name} must not be {str(value)[:80]!r}")
    for name in values.keys() & {"moves", "chunk_keys"}:
        values[name] = tuple(values[name])
    return DecisionRecord(**values)


def _is_text(value):
    return isinstance(value, str)


def _is_number(value):
    return isinstance(value, (int, float)) and type(value) is not bool and abs(value) < 1e300


def _is_count(value):
    return type(value) is int and 0 <= value < 2**63


def _is_list(check):
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_dict(check):
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


_MOVE_CHECKS = {"from": _is_text, "to": _is_text, "status": _is_text, "moved_chunks": _is_count}


def _is_move(move):
    return isinstance(move, dict) and all(
        check(move[key]) for key, check in _MOVE_CHECKS.items() if key in move
    )


_CHECKS = {
    **dict.fromkeys(("time_s", "ttl_s", "generate_s", "manage_s"), _is_number),
    **dict.fromkeys(("prompt_tokens", "chunks"), _is_count),
    **dict.fromkeys(("prompt_digest", "wanted_tier", "error", "prompt", "from_tier"), _is_text),
    **dict.fromkeys(("hit_tokens", "tier_before", "tier_after"), _is_dict(_is_count)),
    "metadata": _is_dict(lambda value: True),
    "metadata_sources": _is_dict(_is_text),
    "kind": KINDS.__contains__,
    "chunk_keys": _is_list(_is_text),
    "moves": _is_list(_is_move),
}
