"""What was decided about one prompt, and what came of it: one record, one line of JSON."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np

KINDS = ("generation", "claim", "expiry", "settled", "shed")
SOURCES = ("caller", "history", "generation", "prompt", "remembered", "absent")
_MAX_DEPTH = 8  # levels of nesting that a line of the log shows; deeper values become text

Kind = Annotated[str, msgspec.Meta(pattern=f"^({'|'.join(KINDS)})$")]
Number = Annotated[float, msgspec.Meta(gt=-1e300, lt=1e300)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """What was decided about one prompt, what came of it, and what it cost.

    Parameters
    ----------
    time_s : float
        Unix time of the decision.
    prompt_digest : str
        Names the prompt without showing it; equal tokens under one salt give equal digests.
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
    tier_errors : mapping
        Tier -> why it took no writes at that time.
    cache_salt : str
        What keeps this KV apart from others' of the same text: the tenant's own, and after
        ``~`` a digest of the LoRA adapter, embeddings or images. Empty = nothing.
    finish_reason, output_tokens : str, int
        How the generation ended, and the tokens of its answer.
    policy : str
        The policy that decided as it goes; empty = the heuristics. `ttl_s` and `wanted_tier` are
        those of the prompt's last chunk then.
    decided : tuple of mapping
        What that policy said of the prompt's parts: ``chunks`` up to which it holds, ``tier``,
        ``ttl_s``, ``value`` and the tier's ``price``.
    policy_error : str
        Why it said nothing: the heuristics decided.
    hints : mapping
        What became of each hint that the request gave about its KV cache.
    session : str
        What the request says which conversation it is of; empty = nothing.
    wanted_again : mapping
        Tokens that were computed although this manager had kept them before, by why they were
        gone: ``"ttl"`` (no claim wanted them any more), ``"room"`` (one did, and no tier had
        them), ``"tier_error"`` (the tier that was to have them takes no writes).
    """

    time_s: Number
    prompt_digest: str
    prompt_tokens: Count = 0
    chunks: Count = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    ttl_s: Number | None = None
    wanted_tier: str | None = None
    hit_tokens: Mapping[str, Count] = field(default_factory=dict)
    tier_before: Mapping[str, Count] = field(default_factory=dict)
    tier_after: Mapping[str, Count] = field(default_factory=dict)
    moves: tuple[Mapping[str, Any], ...] = ()
    generate_s: Number = 0.0
    manage_s: Number = 0.0
    error: str = ""
    kind: Kind = "generation"
    prompt: str | None = None
    chunk_keys: tuple[str, ...] = ()
    metadata_sources: Mapping[str, str] = field(default_factory=dict)
    from_tier: str | None = None
    tier_errors: Mapping[str, str] = field(default_factory=dict)
    cache_salt: str = ""
    finish_reason: str | None = None
    output_tokens: Count = 0
    policy: str = ""
    decided: tuple[Mapping[str, Any], ...] = ()
    policy_error: str = ""
    hints: Mapping[str, str] = field(default_factory=dict)
    session: str = ""
    wanted_again: Mapping[str, Count] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as one line of strict JSON.

        NumPy scalars become numbers, NaN and infinity null. What JSON cannot
        hold becomes text: no value that a caller gave costs the record.

        Examples
        --------
        >>> line = DecisionRecord(0.0, "a", metadata={"perplexity": float("nan")}).to_json()
        >>> json.loads(line)["metadata"]
        {'perplexity': None}
        """
        try:
            return _encode(self).decode()
        except (ValueError, TypeError, RecursionError):  # half a surrogate pair, a circle
            return _encode(_shown({name: getattr(self, name) for name in self.__slots__})).decode()


def _plain(value):
    """Return what JSON can show of a value that it does not know."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.floating):  # a long double too
        return float(value)
    return value.item() if isinstance(value, np.generic) else _text(value)


_encode = msgspec.json.Encoder(enc_hook=_plain).encode


def _text(value):
    try:
        return str(value).encode(errors="backslashreplace").decode()
    except Exception:  # `str` of a caller's object may raise anything
        return f"<{type(value).__name__}>"


def _shown(value, depth=0):
    """Return a copy in which everything that cannot be encoded is text."""
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        return {_text(k): _shown(v, depth + 1) for k, v in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
        return [_shown(v, depth + 1) for v in value]
    try:
        _encode(value)
        return value
    except (ValueError, TypeError, RecursionError):
        return _text(value)


_Move = TypedDict(
    "_Move", {"from": str, "to": str, "status": str, "moved_chunks": Count}, total=False
)


class _Moves(TypedDict, total=False):  # apart from the record: a move keeps its other keys
    moves: list[_Move]


def parse_record(line: str | bytes) -> DecisionRecord:
    """Return a line's record; what is null or missing has its default, unknown fields are left.

    Raises
    ------
    ValueError, TypeError
        If the line is no record; names the field, its value and what is allowed.

    Examples
    --------
    >>> parse_record('{"time_s": 1, "prompt_digest": "a", "chunks": -1}')
    Traceback (most recent call last):
    ValueError: Expected `int` >= 0 - at `$.chunks`, got -1
    """
    values = json.loads(line)
    if not isinstance(values, dict):
        raise TypeError(f"a JSON object was expected, got {type(values).__name__}")
    values = {name: value for name, value in values.items() if value is not None}
    try:
        msgspec.convert(values, _Moves)
        return msgspec.convert(values, DecisionRecord)
    except msgspec.ValidationError as error:
        name = re.search(r"\$\.(\w+)", f"{error}")
        value = f", got {values[name[1]]!r:.80}" if name else ""
        raise ValueError(f"{error}{value}") from error
