"""How long should a KV cache live, and in which tier? Pure decisions: no I/O, no clock.

``compute_ttl`` and ``select_backend`` take one request's metadata (scalars) or
a whole trace's (NumPy arrays) and run the same lines of code on both, so a
replay of a trace decides bit for bit as the live manager does.

The TTL formula is the requirements document's; its two open constants are
fixed by its worked example: perplexity 15 must give a factor of 1.08 and
variance 0.05 one of 0.95, hence 3600 s x 1.08 x 0.95 = 3693.6 s.
"""

import difflib
import functools
import math
import numbers
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, NamedTuple, TypedDict, get_type_hints

import numpy as np

TIERS = ("gpu", "disk", "remote")  # hottest first; an index here is a tier's code
TIER_CODES = {tier: code for code, tier in enumerate(TIERS)}

FINITE = sys.float_info.max  # the largest float: a range up to it leaves infinity out
NEUTRAL_PERPLEXITY = 30.0  # where the TTL's perplexity factor is 0

_LARGEST = 2.0**53  # of the fast path: beyond it integers are not exact as floats
_PLAIN = (float, int)  # by exact type: bool is not one


class MetadataField(NamedTuple):
    """What one signal about a request means: its unit, its range, and its neutral value."""

    unit: str
    text: str
    high: float = FINITE
    neutral: float = 0.0  # what the TTL takes where the signal is unknown
    open_low: bool = False  # `low` itself is outside the range
    low: float = 0.0

    @property
    def allowed(self) -> str:
        """The range, as an error shows it."""
        return range_text(self.low, self.high, self.open_low)


Known = float | None  # None, as NaN, means "unknown"


class KVMetadata(TypedDict, total=False):
    """What is known about one request; all is optional, None and NaN mean "unknown"."""

    perplexity: Annotated[
        Known, MetadataField("", "how predictable the text is", FINITE, NEUTRAL_PERPLEXITY, True)
    ]
    # CV / (1 + CV) of the seconds between accesses.
    time_variance: Annotated[Known, MetadataField("", "how irregular its accesses are", high=1.0)]
    access_count: Annotated[Known, MetadataField("accesses", "how often it was used")]
    seconds_since_access: Annotated[Known, MetadataField("s", "since it was last used")]


METADATA_FIELDS: dict[str, MetadataField] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(KVMetadata, include_extras=True).items()
}

_TTL_FIELDS = ("perplexity", "time_variance", "access_count")
_TTL_NEUTRAL = tuple(METADATA_FIELDS[name].neutral for name in _TTL_FIELDS)
_TIER_FIELDS = ("perplexity", "time_variance", "seconds_since_access")

# Arrays are processed in blocks that stay in the L2 cache (8 B x 16,384 =
# 128 KiB an operand); on whole arrays every temporary would go to memory.
_BLOCK = 16_384


@dataclass(frozen=True)
class Setting:
    """What a field of `HeuristicConfig` means: its range, and how a slider shows it.

    ``slider`` are the slider's ends, on a logarithmic scale where the lower one is
    above 0; a number that is typed may be anywhere in the range, which has 0 in it where
    the slider has.
    """

    label: str
    unit: str
    slider: tuple[float, float]
    text: str
    high: float = FINITE
    at_most: str = ""  # another setting, which is the upper limit
    open_low: bool = False  # 0, the lower limit, is itself outside the range


def _setting(default: float, label: str, unit: str, slider, text: str, **limits: Any) -> Any:
    limits = {"open_low": slider[0] > 0} | limits
    setting = Setting(label, unit, slider, text, **limits)
    return field(default=default, metadata={"setting": setting})


@dataclass(frozen=True)
class HeuristicConfig:
    """All settings of the two decisions, checked when made; each one's `Setting` says more.

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

    base_ttl: float = _setting(3600.0, "base TTL", "s", (1, 604_800), "before all factors")
    min_ttl: float = _setting(30.0, "min TTL", "s", (1, 86_400), "the shortest", at_most="max_ttl")
    max_ttl: float = _setting(604_800.0, "max TTL", "s", (10, 2_592_000), "the longest")
    alpha: float = _setting(0.25, "alpha (access count)", "", (0, 2), "weight of the access count")
    gamma: float = _setting(1.0, "gamma (variance)", "", (0, 1), "weight of the variance", high=1)
    hot_threshold: float = _setting(
        20.0, "hot threshold", "perplexity", (1, 1000), "gpu up to it", at_most="cold_threshold"
    )
    cold_threshold: float = _setting(
        50.0, "cold threshold", "perplexity", (1, 1000), "remote above it"
    )
    recent_seconds: float = _setting(
        3600.0, "recent", "s", (1, 604_800), "the oldest recent access", open_low=False
    )
    variance_threshold: float = _setting(
        0.5, "variance threshold", "", (0, 1), "disk from this time variance on", high=1
    )
    disk_ttl_factor: float = _setting(
        4.0, "after gpu, on disk", "x TTL", (0.1, 1000), "once gpu's is over"
    )
    remote_ttl_factor: float = _setting(
        24.0, "after disk, in remote", "x TTL", (0.1, 1000), "once disk's is over"
    )

    def __post_init__(self) -> None:
        for name in SETTINGS:
            _check_setting(name, vars(self))

    @property
    def ladder(self) -> dict[str, float]:
        """Tier -> what `compute_ttl` is multiplied by when KV cache comes down to it."""
        return {"gpu": 1.0, "disk": self.disk_ttl_factor, "remote": self.remote_ttl_factor}

    def ttl(self, metadata: Mapping[str, Any]) -> float | np.ndarray:
        """Apply `compute_ttl` with these settings."""
        limits = self.base_ttl, self.min_ttl, self.max_ttl
        return compute_ttl(metadata, *limits, self.alpha, self.gamma)

    def tier(self, metadata: Mapping[str, Any]) -> str | np.ndarray:
        """Apply `select_backend` with these settings."""
        recent_s, variance = self.recent_seconds, self.variance_threshold
        return select_backend(metadata, self.hot_threshold, recent_s, self.cold_threshold, variance)

    def to_dict(self) -> dict[str, float]:
        """Return the settings as a plain dictionary (JSON and YAML friendly)."""
        return {name: float(value) for name, value in asdict(self).items()}


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(HeuristicConfig)}
TTL_SETTINGS = ("base_ttl", "min_ttl", "max_ttl", "alpha", "gamma")
_TIER_SETTINGS = ("hot_threshold", "recent_seconds", "cold_threshold", "variance_threshold")


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
        ``perplexity``, ``time_variance``, ``access_count``; see `METADATA_FIELDS`.
        Scalars, or arrays that broadcast against each other, shape (n,). What is
        absent, None or NaN is unknown and counts as neutral. Other keys are ignored.
    base_ttl, min_ttl, max_ttl, alpha, gamma : float
        See `HeuristicConfig`.

    Returns
    -------
    float or numpy.ndarray
        Seconds; an array, shape (n,), as soon as one field is an array.

    Raises
    ------
    ValueError
        A field or setting that is not a number or outside its range; the
        message names it, its value and the range.

    Examples
    --------
    >>> compute_ttl({"perplexity": 15, "time_variance": 0.05})
    3693.6000000000004
    >>> compute_ttl({"access_count": np.array([0, 1, 10])}).round(1)
    array([3600. , 4223.8, 5758.1])
    """
    settings = _checked(TTL_SETTINGS, base_ttl, min_ttl, max_ttl, alpha, gamma)
    base_ttl, min_ttl, max_ttl, alpha, gamma = settings
    values = _read_fields(metadata, _TTL_FIELDS, _TTL_NEUTRAL)
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
    return 0.24 * ((NEUTRAL_PERPLEXITY - perplexity) / (NEUTRAL_PERPLEXITY + perplexity))


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
        ``perplexity``, ``time_variance``, ``seconds_since_access``, as for
        `compute_ttl`. Where the perplexity is unknown, only recency and variance
        decide; an unknown variance is 0, and an unknown time means just used.
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
    limits = _checked(_TIER_SETTINGS, *limits)
    neutral = (limits[0], 0.0, 0.0)  # this perplexity is neither too high nor cold
    values = _read_fields(metadata, _TIER_FIELDS, neutral)
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


def _read_fields(metadata, names, neutral):
    """Return the fields' values, checked: a tuple of floats, or a list of arrays."""
    if type(metadata) is dict:
        # The common case first and in one go: three plain numbers inside their ranges.
        perplexity = metadata.get("perplexity", neutral[0])
        variance = metadata.get("time_variance", 0.0)
        other = metadata.get(names[2], 0.0)  # a count or seconds: both have the same range
        if (
            type(perplexity) in _PLAIN
            and type(variance) in _PLAIN
            and type(other) in _PLAIN
            and 0.0 < perplexity <= _LARGEST
            and 0.0 <= variance <= 1.0
            and 0.0 <= other <= _LARGEST
        ):
            return float(perplexity), float(variance), float(other)
    elif not isinstance(metadata, Mapping):
        raise ValueError(_NO_MAPPING.format(metadata))
    return _read_arrays(metadata, names, neutral)


_NO_MAPPING = "metadata must be a mapping of field names to numbers, got {!r:.80}"


def _read_arrays(metadata, names, neutral):
    """Return the fields as float-like arrays of one shape, or as floats if all are scalars."""
    arrays = [_read_array(name, metadata.get(name), value) for name, value in zip(names, neutral)]
    if all(array.ndim == 0 for array in arrays):
        return tuple(float(array) for array in arrays)
    try:
        return list(np.broadcast_arrays(*arrays))
    except ValueError as error:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(names, arrays))
        raise ValueError(f"metadata arrays must broadcast to one shape, got {shapes}") from error


def _read_array(name, value, neutral):
    """Return a field as an array of real numbers in its range; the unknown ones are `neutral`."""
    array = _as_array(value)
    if array is None or array.dtype.kind not in "iuf":  # text, bool, complex, dates
        raise _no_number(name, METADATA_FIELDS[name].allowed, value)
    if _has_unknown(name, array):
        # In double precision: a narrower one could round a threshold up.
        return np.where(np.isnan(array), neutral, array.astype(np.float64, copy=False))
    return array


def _as_array(value):
    """Return `value` as an array in which None is NaN; None if it is not one of equal rows."""
    try:
        array = np.asarray(float(value) if type(value) is int else value)
        if array.dtype == object:
            numbers = [math.nan if item is None else item for item in array.flat]
            array = np.array(numbers).reshape(array.shape)
    except (ValueError, OverflowError):  # ragged lists; integers beyond a float
        return None
    return array


def _has_unknown(name, array):
    """Say whether some values are NaN; raise for the first one outside the field's range."""
    field = METADATA_FIELDS[name]
    low, high, open_low = field.low, field.high, field.open_low
    flat, has_unknown = array.reshape(-1), False
    for start in range(0, flat.size, _BLOCK):
        # In double precision: the limits are out of reach of a narrower one.
        block = flat[start : start + _BLOCK].astype(np.float64, copy=False)
        # One NaN makes both NaN, which is in no range.
        if in_range(block.min(), low, high, open_low) and block.max() <= high:
            continue
        unknown = np.isnan(block)
        bad = ~(in_range(block, low, high, open_low) | unknown)
        if bad.any():
            at = start + int(np.argmax(bad))
            where = f" at index {at}" if array.ndim else ""
            raise ValueError(f"{name} must be {field.allowed}, got {flat[at].item()!r}{where}")
        has_unknown = True
    return has_unknown


def _by_blocks(arrays, decide, dtype):
    """Apply `decide` block by block; arrays of one shape (n,) -> array (n,) of `dtype`."""
    flat = [array.reshape(-1) for array in arrays]
    out = np.empty(flat[0].size, dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # as silent as Python's floats
        for start in range(0, out.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            out[part] = decide(*(a[part].astype(np.float64, copy=False) for a in flat))
    return out.reshape(arrays[0].shape)


def _check_settings(names, *values):
    """Return the settings as floats, or name the first one out of range in a ValueError."""
    given = dict(zip(names, values))
    return tuple(_check_setting(name, given) for name in names)


# Equal settings are checked once: that costs more than the decision itself. True is not a known 1.
_remembered = functools.lru_cache(maxsize=256, typed=True)(_check_settings)


def _checked(names, *values):
    try:
        return _remembered(names, *values)
    except TypeError:  # a list or another value that cannot be remembered: the check names it
        return _check_settings(names, *values)


def _check_setting(name, values):
    """Return one of the settings as a float, or name it in a ValueError."""
    setting = SETTINGS[name]
    upper = setting.at_most
    high = _check_setting(upper, values) if upper else setting.high
    return check_number(name, values[name], 0, high, setting.open_low, upper)


def check_metadata(metadata: KVMetadata | Mapping[str, Any] | None) -> dict[str, float]:
    """Return what is known about one request: one number a field, without the unknown ones.

    Parameters
    ----------
    metadata : mapping, optional
        Fields of `KVMetadata`; None and NaN mean "unknown".

    Raises
    ------
    ValueError
        Names the field, its value and the allowed range; an array is no number, and a
        field that is not in `METADATA_FIELDS` is answered with the nearest one.

    Examples
    --------
    >>> check_metadata({"perplexity": 12, "time_variance": None})
    {'perplexity': 12.0}
    >>> check_metadata({"perplexty": 12})
    Traceback (most recent call last):
        ...
    ValueError: unknown metadata field 'perplexty': did you mean 'perplexity'?
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ValueError(_NO_MAPPING.format(metadata))
    known = {}
    for name, value in metadata.items():
        if name not in METADATA_FIELDS:
            raise ValueError(unknown_name("metadata field", name, METADATA_FIELDS))
        field = METADATA_FIELDS[name]
        is_nan = isinstance(value, (float, np.floating)) and value != value
        if value is not None and not is_nan:
            known[name] = check_number(name, value, field.low, field.high, field.open_low)
    return known


def check_number(
    name: str, value: Any, low: float, high: float, open_low: bool = False, high_name: str = ""
) -> float:
    """Return `value` as a float if it is a real number within a range; see `in_range`.

    Raises
    ------
    ValueError
        Names the number, its value and the range; `high_name` is where `high` comes from.

    Examples
    --------
    >>> check_number("gamma", 2, 0, 1)
    Traceback (most recent call last):
        ...
    ValueError: gamma must be 0..1, got 2
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _no_number(name, range_text(low, high, open_low, high_name), value)
    try:
        number = float(value)  # a float32 would compare and compute in its own precision
    except OverflowError:
        number = math.inf
    if in_range(number, low, high, open_low):
        return number
    allowed = range_text(low, high, open_low, high_name)
    raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")


def _no_number(name, allowed, value):
    return ValueError(f"{name} must be a number ({allowed}), got {value!r:.80}")


def in_range(value, low: float, high: float, open_low: bool = False):
    """Say whether a number, or each one of an array, is in a range; NaN never is.

    Examples
    --------
    >>> in_range(0.0, 0.0, 1.0), in_range(0.0, 0.0, 1.0, open_low=True)
    (True, False)
    """
    return (value > low if open_low else value >= low) & (value <= high)


def range_text(low: float, high: float, open_low: bool = False, high_name: str = "") -> str:
    """Return a range as an error shows it.

    Examples
    --------
    >>> range_text(0, FINITE), range_text(0, 1), range_text(0, 60.0, True, "max_ttl")
    ('>= 0 and finite', '0..1', '> 0 and <= max_ttl (60.0)')
    """
    lowest = f"{'>' if open_low else '>='} {low:g}"
    if high_name:
        return f"{lowest} and <= {high_name} ({high})"
    return f"{lowest} and finite" if high == FINITE else f"{low:g}..{high:g}"


def unknown_name(kind: str, name: Any, known: Iterable[str]) -> str:
    """Return what is wrong with a name, and the nearest known one (or else all of them).

    Examples
    --------
    >>> unknown_name("setting", "alhpa", ["alpha", "gamma"])
    "unknown setting 'alhpa': did you mean 'alpha'?"
    >>> unknown_name("setting", "speed", ["alpha", "gamma"])
    "unknown setting 'speed': known are alpha, gamma"
    """
    known = list(known)
    near = difflib.get_close_matches(str(name)[:80], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown {kind} {name!r:.80}: {hint}"
