"""One trace of requests as flat arrays: what every replay engine and baseline reads.

Block ids are dense and prefix-chained: equal ids are equal blocks after equal
prefixes, so one id always has one parent and one depth. Readers chain what is not.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numba import njit

from kvttl import whole_file
from kvttl.traces.source import LATEST_S

CACHE_VERSION = 3  # of the file that `save_trace` writes
# Array of `Trace` -> dtype, in the order of its fields.
COLUMNS = {"block_ids": np.int32, "offsets": np.int64, "arrival_s": np.float64}
COLUMNS |= dict.fromkeys(("prompt_tokens", "output_tokens", "sessions"), np.int32)
COLUMNS |= {"generation_s": np.float32, "finish": np.int8}
# What few files say; names are indices into `Trace.names`.
DETAILS = {"turn_kind": np.int8, "tool": np.int32, "tool_s": np.float32, "think_s": np.float32}
NAMED = ("tool", "model", "tenant", "request_type")
DETAILS |= dict.fromkeys(NAMED[1:], np.int32)
COLUMNS |= DETAILS
OF_REQUESTS = tuple(COLUMNS)[2:]
FINISH = ("unknown", "tool call pending", "end of turn")
REASONS = (None, "tool_calls", "stop")  # each of `FINISH` as an engine says it
FINISH_CODES = dict.fromkeys(("tool_calls", "tool_use", "function_call"), 1)  # -> into `FINISH`
FINISH_CODES |= dict.fromkeys(("stop", "end_turn", "stop_sequence"), 2)
TURN_KINDS = ("unknown", "a person's message", "a tool's result")


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival, their blocks flattened in prefix order.

    Parameters
    ----------
    block_ids : numpy.ndarray
        Shape (accesses,), int32: dense ids 0..unique_blocks-1.
    offsets : numpy.ndarray
        Shape (requests + 1,), int64: request r's blocks are
        ``block_ids[offsets[r]:offsets[r + 1]]``.
    arrival_s : numpy.ndarray
        Shape (requests,), seconds from the first request, ascending.
    prompt_tokens, output_tokens, sessions : numpy.ndarray
        Shape (requests,), int32.
    generation_s : numpy.ndarray
        Shape (requests,), float32: seconds from arrival to end, 0 where unknown.
    finish : numpy.ndarray
        Shape (requests,), int8: how it ended, an index into `FINISH`.
    turn_kind : numpy.ndarray
        Shape (requests,), int8: what it answers, an index into `TURN_KINDS`.
    tool_s, think_s : numpy.ndarray
        Shape (requests,), float32: seconds that the tools took which it called, and that
        passed before it was sent without a tool; NaN where unknown.
    tool, model, tenant, request_type : numpy.ndarray
        Shape (requests,), int32: indices into `names`, -1 where unknown; ``tool`` is the tools
        that it called, in order of names, joined by ``+``.
    names : numpy.ndarray
        Shape (n,), text.
    block_tokens : int
        Tokens in a complete block; a request's last block may hold fewer.
    unique_blocks : int
        Distinct block ids.
    name : str
        Where it came from.
    skipped_lines : int
        Lines that the reader could not use.
    timed : bool
        False where only the order of requests is known: they are a second apart.

    Examples
    --------
    >>> from kvttl.traces.builder import make_trace
    >>> trace = make_trace([[0, 1, 2], [0, 1, 3]], arrival_s=[0, 5], block_tokens=16)
    >>> trace
    Trace(2 requests, 6 accesses, 4 unique blocks of 16 tokens, 5 s)
    >>> trace.request(1).tolist()
    [0, 1, 3]
    """

    block_ids: np.ndarray
    offsets: np.ndarray
    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    sessions: np.ndarray
    generation_s: np.ndarray
    finish: np.ndarray
    turn_kind: np.ndarray
    tool: np.ndarray
    tool_s: np.ndarray
    think_s: np.ndarray
    model: np.ndarray
    tenant: np.ndarray
    request_type: np.ndarray
    names: np.ndarray
    block_tokens: int
    unique_blocks: int
    name: str = ""
    skipped_lines: int = 0
    timed: bool = True

    requests = property(lambda self: len(self.arrival_s), doc="Number of requests.")
    accesses = property(lambda self: len(self.block_ids), doc="Number of block accesses.")
    blocks = property(lambda self: np.diff(self.offsets), doc="Blocks of each request.")

    @property
    def span_s(self) -> float:
        """Seconds from the first request to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0]) if self.requests else 0.0

    def request(self, index: int) -> np.ndarray:
        """Return the block ids of one request, a view."""
        return self.block_ids[self.offsets[index] : self.offsets[index + 1]]

    def tail_tokens(self) -> np.ndarray:
        """Return the tokens in each request's last block, shape (requests,), 0 if it has none."""
        after = self.prompt_tokens - (self.blocks - 1) * self.block_tokens
        return np.where(self.blocks > 0, np.clip(after, 0, self.block_tokens), 0)

    def without_tails(self, renumber: bool = True) -> "Trace":
        """Return the trace without the incomplete last blocks of prompts: they are not kept.

        The prompts' tokens stay, so token hit ratios can be compared. Block ids stay dense,
        unless they are not to be numbered anew.
        """
        cut = (self.tail_tokens() < self.block_tokens) & (self.blocks > 0)
        keep = np.ones(self.accesses, bool)
        keep[self.offsets[1:][cut] - 1] = False
        offsets = np.concatenate([[0], np.cumsum(self.blocks - cut)])
        ids = self.block_ids[keep]
        columns = dense(ids) if renumber else {"block_ids": ids}
        return replace(self, **columns, offsets=offsets)

    def head(self, requests: int) -> "Trace":
        """Return the first requests as a trace of their own."""
        if requests < 0:
            raise ValueError(f"requests must be >= 0, got {requests}")
        end = self.offsets[min(requests, self.requests)]
        columns = {name: getattr(self, name)[:requests] for name in OF_REQUESTS}
        columns |= dense(self.block_ids[:end])
        return replace(self, offsets=self.offsets[: requests + 1], **columns)

    def __repr__(self) -> str:
        return (
            f"Trace({self.requests} requests, {self.accesses} accesses, {self.unique_blocks}"
            f" unique blocks of {self.block_tokens} tokens, {self.span_s:.0f} s)"
        )


def dense(ids: np.ndarray) -> dict[str, object]:
    """Return ids numbered anew without gaps, in their order, and how many there are."""
    unique, numbers = np.unique(ids, return_inverse=True)
    return {"block_ids": numbers.astype(np.int32), "unique_blocks": len(unique)}


@njit(cache=True)
def reordered(ids, offsets, order):
    """Return some of the ragged rows, in the order given, and their offsets."""
    ends = np.zeros(len(order) + 1, np.int64)
    for new, old in enumerate(order):
        ends[new + 1] = ends[new] + offsets[old + 1] - offsets[old]
    out = np.empty(ends[-1], ids.dtype)
    for new, old in enumerate(order):
        for at in range(ends[new + 1] - ends[new]):  # a slice would take seconds to compile
            out[ends[new] + at] = ids[offsets[old] + at]
    return out, ends


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace to one uncompressed ``.npz`` file, whole or not at all."""
    plain = {f.name: getattr(trace, f.name) for f in fields(Trace)}
    with whole_file(path) as file:
        np.savez(file, version=CACHE_VERSION, **plain)


def load_trace(path: str | Path) -> Trace:
    """Read what `save_trace` wrote.

    Raises
    ------
    ValueError
        The file is not a trace, or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["version"]) != CACHE_VERSION:
                raise ValueError(f"version {file['version']}, wanted {CACHE_VERSION}")
            _check_sizes(file.zip)
            values = {f.name: file[f.name] for f in fields(Trace)}
            _check_columns(values)
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy raises a dozen kinds at files that it did not write
        raise ValueError(f"{path} is not a trace file of this kit: {error!s:.300}") from error
    plain = {name: value if value.ndim else value.item() for name, value in values.items()}
    return Trace(**plain)


def _check_sizes(archive):
    """Raise where an array takes more memory than the file says it holds."""
    for entry in archive.infolist():
        with archive.open(entry) as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        stored = not entry.compress_type and math.prod(shape) * dtype.itemsize <= entry.file_size
        _want(stored, f"{entry.filename} must be stored whole, and not compressed")


_INTEGERS = ("block_tokens", "unique_blocks", "skipped_lines")
_KINDS = {"U": "text", "b": "truth value", "i": "integer"}


def _check_columns(values):
    """Raise where arrays are not those of a trace: engines index with them unchecked."""
    for name, dtype in COLUMNS.items():
        right = values[name].dtype == dtype and values[name].ndim == 1
        _want(right, f"{name} must be {np.dtype(dtype)}, shape (n,)")
    kinds = {"name": "U", "timed": "b", **dict.fromkeys(_INTEGERS, "i")}
    for name, kind in kinds.items():
        right = values[name].dtype.kind == kind and values[name].ndim == 0
        _want(right, f"{name} must be one {_KINDS[kind]}")
    _want(values["names"].dtype.kind == "U" and values["names"].ndim == 1, "names must be text")
    ids, offsets, arrival_s = (values[name] for name in ("block_ids", "offsets", "arrival_s"))
    unique, requests = int(values["unique_blocks"]), len(arrival_s)
    _want(len(offsets) == requests + 1, "offsets must be one more than requests")
    for name in OF_REQUESTS:
        _want(len(values[name]) == requests, f"{name} must be one a request")
    ends = offsets[0] == 0 and offsets[-1] == len(ids)
    _want(ends and np.all(offsets[1:] >= offsets[:-1]), "offsets must ascend over block_ids")
    ascending = np.all(abs(arrival_s) <= LATEST_S) and np.all(arrival_s[1:] >= arrival_s[:-1])
    _want(ascending, f"arrival_s must ascend within {LATEST_S:g} s")
    lasting = np.all(values["generation_s"] >= 0) and np.all(values["generation_s"] <= LATEST_S)
    _want(lasting, f"generation_s must be 0..{LATEST_S:g}")
    limits = {"finish": (0, len(FINISH)), "turn_kind": (0, len(TURN_KINDS))}
    for name, (low, end) in (limits | dict.fromkeys(NAMED, (-1, len(values["names"])))).items():
        codes = np.all((values[name] >= low) & (values[name] < end))
        _want(codes, f"{name} must be {low}..{end - 1}")
    _want(0 <= unique <= len(ids), "unique_blocks must be <= the length of block_ids")
    inside = not len(ids) or 0 <= ids.min() <= ids.max() < unique
    _want(inside, f"block_ids must be 0..{unique - 1}")
    counts = [values["block_tokens"] - 1, values["skipped_lines"]]
    counts += [values[name].min(initial=0) for name in ("prompt_tokens", "output_tokens")]
    _want(min(counts) >= 0, "block_tokens must be >= 1, tokens and skipped_lines >= 0")
    _want(max(counts[:2]) < 2**31, "block_tokens and skipped_lines must be < 2147483648")


def _want(right, reason):
    if not right:
        raise ValueError(reason)
