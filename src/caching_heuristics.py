"""How long should a KV cache live, and in which tier? Pure decisions: no I/O, no clock.

``compute_ttl`` and ``select_backend`` take one request's metadata (scalars) or
a whole trace's (NumPy arrays) and run the same lines of code on both, so a
replay of a trace decides bit for bit as the live manager does.

The TTL formula is the requirements document's; its two open constants are
fixed by its worked example: perplexity 15 must give a factor of 1.08 and
variance 0.05 one of 0.95, hence 3600 s x 1.08 x 0.95 = 3693.6 s.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

TIERS = ("gpu", "disk", "remote")  # hottest first; an index here is a tier's code
TIER_CODES = {tier: code for code, tier in enumerate(TIERS)}

TINY = 5e-324  # the smallest positive float: turns ">= 0" into "> -TINY"

_LARGEST = 2.0**53  # of the fast path: beyond it integers are not exact as floats
_PLAIN = (float, int)  # by exact type: bool is not one

# Metadata field -> (lowest, highest, the range as an error shows it). Lowest
# perplexity is the smallest positive float, so that one closed comparison serves all.
_RANGES = {
    "perplexity": (TINY, sys.float_info.max, "> 0 and finite"),
    "time_variance": (0.0, 1.0, "0..1"),
    "access_count": (0.0, sys.float_info.max, ">= 0 and finite"),
    "seconds_since_access": (0.0, sys.float_info.max, ">= 0 and finite"),
}
_TTL_FIELDS = ("perplexity", "time_variance", "access_count")
_TTL_DEFAULTS = (30.0, 0.0, 0.0)  # the values at which each factor is 1
_TIER_FIELDS = ("perplexity", "time_variance", "seconds_since_access")

# Arrays are processed in blocks that stay in the L2 cache (8 B x 16,384 =
# 128 KiB an operand); on whole arrays every temporary would go to memory.
_BLOCK = 16_384


@dataclass(frozen=True)
class HeuristicConfig:
    """All settings of the two decisions, checked when made.

    Parameters
    ----------
    base_ttl, min_ttl, max_ttl : float
        Seconds. ``0 < min_ttl <= max_ttl``; ``base_ttl > 0``.
    alpha : float
        Weight of the access count, >= 0.
    gamma : float
        Weight of the time variance, 0..1.
    hot_threshold, cold_threshold : float
        Perplexities, ``0 < hot_threshold <= cold_threshold``.
    recent_seconds : float
        Seconds since the last access that still count as recent, >= 0.
    variance_threshold : float
        Time variance from which on a prompt is warm, 0..1.
    disk_ttl_factor, remote_ttl_factor : float
        A KV cache whose TTL has passed goes one tier down and gets this many
        times its `compute_ttl` there, > 0.

    Raises
    ------
    ValueError
        Names the field, the value and the allowed range.

    Examples
    --------
    >>> HeuristicConfig(base_ttl=300).ttl({"perplexity": 15, "time_variance": 0.05})
    307.8
    >>> HeuristicConfig(hot_threshold=60)
    Traceback (most recent call last):
        ...
    ValueError: hot_threshold must be > 0 and <= cold_threshold (50.0), got 60
    """

    base_ttl: float = 3600.0
    min_ttl: float = 30.0
    max_ttl: float = 604_800.0
    alpha: float = 0.25
    gamma: float = 1.0
    hot_threshold: float = 20.0
    cold_threshold: float = 50.0
    recent_seconds: float = 3600.0
    variance_threshold: float = 0.5
    disk_ttl_factor: float = 4.0
    remote_ttl_factor: float = 24.0

    def __post_init__(self) -> None:
        _check_ttl_settings.__wrapped__(
            self.base_ttl, self.min_ttl, self.max_ttl, self.alpha, self.gamma
        )
        _check_tier_settings.__wrapped__(
            self.hot_threshold, self.recent_seconds, self.cold_threshold, self.variance_threshold
        )
        for name in ("disk_ttl_factor", "remote_ttl_factor"):
            _check_setting(name, getattr(self, name), 0, math.inf, "> 0 and finite")

    @property
    def ladder(self) -> dict[str, float]:
        """Tier -> what `compute_ttl` is multiplied by when KV cache comes down to it."""
        return {"gpu": 1.0, "disk": self.disk_ttl_factor, "remote": self.remote_ttl_factor}

    def ttl(self, metadata: Mapping[str, Any]) -> float | np.ndarray:
        """Apply `compute_ttl` with these settings."""
        return compute_ttl(
            metadata, self.base_ttl, self.min_ttl, self.max_ttl, self.alpha, self.gamma
        )

    def tier(self, metadata: Mapping[str, Any]) -> str | np.ndarray:
        """Apply `select_backend` with these settings."""
        return select_backend(
            metadata,
            self.hot_threshold,
            self.recent_seconds,
            self.cold_threshold,
            self.variance_threshold,
        )

    def to_dict(self) -> dict[str, float]:
        """Return the settings as a plain dictionary (JSON and YAML friendly)."""
        return {name: float(value) for name, value in asdict(self).items()}


def compute_ttl(
    metadata: Mapping[str, Any],
    base_ttl: float = 3600,
    min_ttl: float = 30,
    max_ttl: float = 604800,
    alpha: float = 0.25,
    gamma: float = 1.0,
) -> float | np.ndarray:
    """Return how long a KV cache stays in its tier after an access, in seconds.

    ``base_ttl * (1 + alpha*ln(1 + access_count)) * (1 + perplexity_factor)
    * (1 - gamma*time_variance)``, clamped to ``[min_ttl, max_ttl]``.

    Parameters
    ----------
    metadata : mapping
        ``perplexity`` (> 0; absent = neutral), ``time_variance`` (0..1; absent
        = 0), ``access_count`` (>= 0; absent = 0). Scalars, or arrays that
        broadcast against each other, shape (n,). Other keys are ignored.
    base_ttl, min_ttl, max_ttl, alpha, gamma : float
        See `HeuristicConfig`.

    Returns
    -------
    float or numpy.ndarray
        Seconds; an array, shape (n,), as soon as one field is an array.

    Raises
    ------
    ValueError
        A field or setting that is not a number, NaN or outside its range;
        the message names it, its value and the range.

    Examples
    --------
    >>> compute_ttl({"perplexity": 15, "time_variance": 0.05})
    3693.6000000000004
    >>> compute_ttl({"access_count": np.array([0, 1, 10])}).round(1)
    array([3600. , 4223.8, 5758.1])
    """
    try:  # equal settings are checked once: that costs more than the decision itself
        settings = _check_ttl_settings(base_ttl, min_ttl, max_ttl, alpha, gamma)
    except TypeError:  # unhashable, such as a list: let the check name it
        settings = _check_ttl_settings.__wrapped__(base_ttl, min_ttl, max_ttl, alpha, gamma)
    base_ttl, min_ttl, max_ttl, alpha, gamma = settings
    values = _read_fields(metadata, _TTL_FIELDS, _TTL_DEFAULTS)
    # The formula is NaN where a factor of 0 meets an overflow: there the TTL is min_ttl.
    if type(values) is tuple:  # scalars
        return min(max(min_ttl, _ttl(*values, base_ttl, alpha, gamma)), max_ttl)
    return _by_blocks(
        values,
        lambda p, v, n: np.fmin(np.fmax(_ttl(p, v, n, base_ttl, alpha, gamma), min_ttl), max_ttl),
        np.float64,
    )


def perplexity_factor(perplexity: float | np.ndarray) -> float | np.ndarray:
    """Return the TTL's share for predictability: within +-0.24, falling, zero at 30.

    Examples
    --------
    >>> perplexity_factor(30.0), round(perplexity_factor(15.0), 12)
    (0.0, 0.08)
    """
    return 0.24 * ((30.0 - perplexity) / (30.0 + perplexity))


def select_backend(
    metadata: Mapping[str, Any],
    hot_threshold: float = 20.0,
    recent_seconds: float = 3600,
    cold_threshold: float = 50.0,
    variance_threshold: float = 0.5,
) -> str | np.ndarray:
    """Return the tier that a KV cache belongs in: ``"gpu"``, ``"disk"`` or ``"remote"``.

    In this order: perplexity > `cold_threshold` is ``"remote"``; time variance
    >= `variance_threshold` is ``"disk"``; perplexity <= `hot_threshold` with
    the last access within `recent_seconds` is ``"gpu"``; all else ``"disk"``.

    Parameters
    ----------
    metadata : mapping
        ``perplexity`` (> 0; absent = neutral: only recency and variance
        decide), ``time_variance`` (0..1; absent = 0), ``seconds_since_access``
        (>= 0; absent = just used). Scalars, or arrays that broadcast, shape (n,).
    hot_threshold, recent_seconds, cold_threshold, variance_threshold : float
        See `HeuristicConfig`.

    Returns
    -------
    str or numpy.ndarray
        A tier's name; an array of names, shape (n,), dtype ``<U6``, as soon as
        one field is an array.

    Raises
    ------
    ValueError
        As for `compute_ttl`.

    Examples
    --------
    >>> select_backend({"perplexity": 12.5, "time_variance": 0.08})
    'gpu'
    >>> select_backend({"perplexity": np.array([12.5, 35.0, 80.0])}).tolist()
    ['gpu', 'disk', 'remote']
    """
    limits = (hot_threshold, recent_seconds, cold_threshold, variance_threshold)
    try:
        limits = _check_tier_settings(*limits)
    except TypeError:  # as above
        limits = _check_tier_settings.__wrapped__(*limits)
    defaults = (limits[0], 0.0, 0.0)  # this perplexity is neither too high nor cold
    values = _read_fields(metadata, _TIER_FIELDS, defaults)
    if type(values) is tuple:  # scalars
        return TIERS[_tier_code(*values, *limits)]
    codes = _by_blocks(values, lambda *v: _tier_code(*v, *limits, np.int8(1)), np.int8)
    return _TIER_NAMES[codes]


_TIER_NAMES = np.array(TIERS)  # shape (3,), dtype <U6
_LOG1P = np.log1p(np.arange(1024.0)).tolist()  # looking up is 10 times faster than the call


def _ttl(perplexity, time_variance, access_count, base_ttl, alpha, gamma):
    """The formula, before the clamp; floats and arrays alike, in seconds."""
    # np.log1p for floats too: math.log1p differs from it in the last bit.
    if type(access_count) is not float:
        log_count = np.log1p(access_count)
    elif access_count < len(_LOG1P) and access_count.is_integer():
        log_count = _LOG1P[int(access_count)]
    else:
        log_count = float(np.log1p(access_count))
    predictability = 1.0 + perplexity_factor(perplexity)
    return base_ttl * (1.0 + alpha * log_count) * predictability * (1.0 - gamma * time_variance)


def _tier_code(perplexity, variance, since_s, hot, recent_s, cold, variance_threshold, one=1):
    """0, 1 or 2 (an index into TIERS), without branches, so that arrays fit too."""
    is_hot = (perplexity <= hot) & (variance < variance_threshold) & (since_s <= recent_s)
    return one + (perplexity > cold) - is_hot  # hot <= cold, so never both


def _read_fields(metadata, names, defaults):
    """Return the fields' values, checked: a tuple of floats, or a list of arrays."""
    if type(metadata) is dict:
        # The common case first and in one go: three plain numbers inside their ranges.
        perplexity = metadata.get("perplexity", defaults[0])
        variance = metadata.get("time_variance", 0.0)
        other = metadata.get(names[2], 0.0)  # a count or seconds: both have the same range
        if (
            type(perplexity) in _PLAIN
            and type(variance) in _PLAIN
            and type(other) in _PLAIN
            and TINY <= perplexity <= _LARGEST
            and 0.0 <= variance <= 1.0
            and 0.0 <= other <= _LARGEST
        ):
            return float(perplexity), float(variance), float(other)
    elif not isinstance(metadata, Mapping):
        raise ValueError(f"metadata must be a mapping of field names to numbers, got {metadata!r}")
    return _read_arrays(metadata, names, defaults)


def _read_arrays(metadata, names, defaults):
    """Return the fields as float-like arrays of one shape, or as floats if all are scalars."""
    arrays = [
        _as_numbers(name, metadata.get(name, default)) for name, default in zip(names, defaults)
    ]
    for name, array in zip(names, arrays):
        _check_range(name, array)
    if all(array.ndim == 0 for array in arrays):
        return tuple(float(array) for array in arrays)
    try:
        return list(np.broadcast_arrays(*arrays))
    except ValueError as error:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(names, arrays))
        raise ValueError(f"metadata arrays must broadcast to one shape, got {shapes}") from error


def _as_numbers(name, value):
    """Return `value` as an array of real numbers; text, None, bool, complex are errors."""
    try:
        array = np.asarray(float(value) if type(value) is int else value)
    except (ValueError, OverflowError):  # ragged lists; integers beyond a float
        array = None
    if array is None or array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be a number ({_RANGES[name][2]}), got {value!r}")
    return array


def _check_range(name, array):
    """Raise for the first value outside the field's range (NaN is outside every range)."""
    low, high, allowed = _RANGES[name]
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        # In double precision: TINY is 0 in any smaller one.
        block = flat[start : start + _BLOCK].astype(np.float64, copy=False)
        # min and max both carry NaN on, and NaN fails each comparison.
        if low <= block.min() and block.max() <= high:
            continue
        at = start + int(np.argmin((block >= low) & (block <= high)))
        where = f" at index {at}" if array.ndim else ""
        raise ValueError(f"{name} must be {allowed}, got {flat[at].item()!r}{where}")


def _by_blocks(arrays, decide, dtype):
    """Apply `decide` block by block; arrays of one shape (n,) -> array (n,) of `dtype`."""
    flat = [array.reshape(-1) for array in arrays]
    out = np.empty(flat[0].size, dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # as silent as Python's floats
        for start in range(0, out.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            out[part] = decide(*(a[part].astype(np.float64, copy=False) for a in flat))
    return out.reshape(arrays[0].shape)


@functools.lru_cache(maxsize=128, typed=True)  # typed: 1 is not True
def _check_ttl_settings(base_ttl, min_ttl, max_ttl, alpha, gamma):
    """Return the settings as floats, or name the first one out of range in a ValueError."""
    base_ttl = _check_setting("base_ttl", base_ttl, 0, math.inf, "> 0 and finite (seconds)")
    max_ttl = _check_setting("max_ttl", max_ttl, 0, math.inf, "> 0 and finite (seconds)")
    allowed = f"> 0 and <= max_ttl ({max_ttl} s)"
    min_ttl = _check_setting("min_ttl", min_ttl, 0, math.nextafter(max_ttl, math.inf), allowed)
    alpha = _check_setting("alpha", alpha, -TINY, math.inf, ">= 0 and finite")
    gamma = _check_setting("gamma", gamma, -TINY, math.nextafter(1, 2), "0..1")
    return base_ttl, min_ttl, max_ttl, alpha, gamma


@functools.lru_cache(maxsize=128, typed=True)  # typed: 1 is not True
def _check_tier_settings(hot_threshold, recent_seconds, cold_threshold, variance_threshold):
    """Return the settings as floats, or name the first one out of range in a ValueError."""
    cold = _check_setting("cold_threshold", cold_threshold, 0, math.inf, "> 0 and finite")
    allowed = f"> 0 and <= cold_threshold ({cold})"
    hot = _check_setting("hot_threshold", hot_threshold, 0, math.nextafter(cold, math.inf), allowed)
    recent_s = _check_setting("recent_seconds", recent_seconds, -TINY, math.inf, ">= 0 and finite")
    variance = _check_setting(
        "variance_threshold", variance_threshold, -TINY, math.nextafter(1, 2), "0..1"
    )
    return hot, recent_s, cold, variance


def _check_setting(name, value, above, below, allowed):
    """Return `value` as a float if it is a real number (bool is not) in ]above, below[."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number ({allowed}), got {value!r}")
    try:
        number = float(value)  # a float32 would compare and compute in its own precision
    except OverflowError:
        number = math.inf
    if not above < number < below:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number
