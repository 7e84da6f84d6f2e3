"""The two decisions: the worked example, the rules one by one, and every bad input named."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import caching_heuristics as ch
from caching_heuristics import (
    METADATA_FIELDS,
    TIER_CODES,
    TIERS,
    HeuristicConfig,
    KVMetadata,
    check_metadata,
    compute_ttl,
    perplexity_factor,
    select_backend,
)

ROUNDING = 1e-12  # relative; a few units in the last place, no more
HUGE = 10**400  # an integer beyond every float

perplexities = st.floats(0, exclude_min=True, allow_infinity=False)
variances = st.floats(0, 1)
counts = st.floats(0, allow_infinity=False) | st.integers(0, 10**30)
ages_s = st.floats(0, allow_infinity=False) | st.integers(0, 10**9)
metadata = st.fixed_dictionaries(
    {},
    optional={
        "perplexity": perplexities,
        "time_variance": variances,
        "access_count": counts,
        "seconds_since_access": ages_s,
    },
)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
ttl_settings = st.builds(
    lambda base, ends, alpha, gamma: {
        "base_ttl": base,
        "min_ttl": min(ends),
        "max_ttl": max(ends),
        "alpha": alpha,
        "gamma": gamma,
    },
    positive,
    st.tuples(positive, positive),
    st.floats(0, allow_infinity=False),
    variances,
)
tier_settings = st.builds(
    lambda ends, recent_s, variance: {
        "hot_threshold": min(ends),
        "cold_threshold": max(ends),
        "recent_seconds": recent_s,
        "variance_threshold": variance,
    },
    st.tuples(positive, positive),
    ages_s,
    variances,
)


# --- compute_ttl: the formula -------------------------------------------------------------


def test_worked_example_is_pinned():
    ttl_s = compute_ttl({"perplexity": 15, "time_variance": 0.05, "access_count": 0})
    assert ttl_s == pytest.approx(3693.6, rel=1e-9)
    assert type(ttl_s) is float


@pytest.mark.parametrize(
    "given_metadata, settings, expected_s",
    [
        ({}, {}, 3600.0),
        ({"perplexity": 30}, {}, 3600.0),
        ({"perplexity": 15}, {}, 3600 * 1.08),
        ({"time_variance": 0.05}, {}, 3600 * 0.95),
        ({"access_count": 10}, {}, 3600 * (1 + 0.25 * math.log(11))),
        ({"time_variance": 0.5}, {"gamma": 0.4}, 3600 * 0.8),
        ({"access_count": 4}, {"alpha": 0}, 3600.0),
        ({"time_variance": 1}, {}, 30.0),  # 0 s, clamped
        ({"access_count": 1e6}, {"max_ttl": 3600}, 3600.0),
        ({}, {"base_ttl": 7, "min_ttl": 7, "max_ttl": 7}, 7.0),
        ({"seconds_since_access": 1e9, "colour": "red"}, {}, 3600.0),  # not its fields
    ],
)
def test_ttl_by_hand(given_metadata, settings, expected_s):
    assert compute_ttl(given_metadata, **settings) == pytest.approx(expected_s, rel=1e-12)


def test_perplexity_factor_is_bounded_falling_and_zero_at_30():
    factors = perplexity_factor(np.array([1e-300, 1.0, 15.0, 30.0, 50.0, 1e300]))
    assert (np.diff(factors) < 0).all()
    assert np.abs(factors).max() <= 0.24
    assert factors[2] == pytest.approx(0.08)
    assert factors[3] == 0.0


@given(metadata, ttl_settings)
def test_ttl_stays_within_its_limits(values, settings):
    assert settings["min_ttl"] <= compute_ttl(values, **settings) <= settings["max_ttl"]


def test_a_factor_of_zero_wins_over_an_overflow():
    values = {"time_variance": 1.0, "access_count": 9.0}
    assert compute_ttl(values, base_ttl=1.7e308) == 30.0
    assert compute_ttl({**values, "access_count": [9.0]}, base_ttl=1.7e308).tolist() == [30.0]


@given(metadata, ttl_settings, st.tuples(counts, counts))
def test_ttl_never_falls_with_the_access_count(values, settings, pair):
    few, many = (compute_ttl({**values, "access_count": n}, **settings) for n in sorted(pair))
    assert few <= many * (1 + ROUNDING)


@given(metadata, ttl_settings, st.tuples(perplexities, perplexities))
def test_ttl_never_rises_with_perplexity(values, settings, pair):
    low, high = (compute_ttl({**values, "perplexity": p}, **settings) for p in sorted(pair))
    assert high <= low * (1 + ROUNDING)


@given(metadata, ttl_settings, st.tuples(variances, variances))
def test_ttl_never_rises_with_variance(values, settings, pair):
    low, high = (compute_ttl({**values, "time_variance": v}, **settings) for v in sorted(pair))
    assert high <= low


@given(st.integers(1, 200), st.integers(0, 90), st.integers(0, 1000), st.floats(0.01, 2), st.data())
def test_ttl_moves_strictly_between_its_limits(perplexity, percent, count, alpha, data):
    """Without this, a constant TTL would pass every "never" above."""
    base = {"perplexity": perplexity, "time_variance": percent / 100, "access_count": count}
    name = data.draw(st.sampled_from(["perplexity", "time_variance", "access_count"]))
    step = 0.01 if name == "time_variance" else 1
    before, after = (
        compute_ttl({**base, name: base[name] + d}, min_ttl=1e-9, max_ttl=1e9, alpha=alpha)
        for d in (0, step)
    )
    assert after > before if name == "access_count" else after < before


# --- select_backend: the rules ------------------------------------------------------------


@pytest.mark.parametrize(
    "perplexity, variance, since_s, tier",
    [
        # Rule 1: above the cold threshold is remote, whatever else holds.
        (50.1, 0.0, 0, "remote"),
        (math.nextafter(50, 51), 0.0, 0, "remote"),
        (80, 0.9, 0, "remote"),  # before rule 2
        (80, 0.9, 1e6, "remote"),
        (50, 0.0, 0, "disk"),  # exactly at the threshold is not above it
        # Rule 2: variance from the threshold on is disk, even if predictable and recent.
        (5, 0.5, 0, "disk"),  # exactly at the threshold counts
        (5, math.nextafter(0.5, 0), 0, "gpu"),
        (5, 1.0, 0, "disk"),
        (50, 0.5, 0, "disk"),
        # Rule 3: predictable and recent is gpu, both ends included.
        (20, 0.0, 3600, "gpu"),
        (math.nextafter(20, 21), 0.0, 0, "disk"),
        (5, 0.0, math.nextafter(3600, 3601), "disk"),
        (5, 0.0, 0, "gpu"),
        # Rule 4: all else.
        (35, 0.0, 0, "disk"),
        (35, 0.2, 1e6, "disk"),
        # Absent fields.
        (None, None, None, "gpu"),
        (None, 0.0, 3600, "gpu"),
        (None, 0.0, 3601, "disk"),
        (None, 0.5, 0, "disk"),
        (12.5, 0.08, None, "gpu"),
        (12.5, None, 10, "gpu"),
    ],
)
def test_tier_rules_one_by_one(perplexity, variance, since_s, tier):
    names = ("perplexity", "time_variance", "seconds_since_access")
    given_metadata = {
        name: v for name, v in zip(names, (perplexity, variance, since_s)) if v is not None
    }
    assert select_backend(given_metadata) == tier
    in_arrays = {name: np.array([v] * 3) for name, v in given_metadata.items()}
    if in_arrays:
        assert select_backend(in_arrays).tolist() == [tier] * 3


@pytest.mark.parametrize(
    "settings, tier",
    [
        ({"hot_threshold": 24}, "disk"),
        ({"hot_threshold": 25}, "gpu"),
        ({"hot_threshold": 25, "cold_threshold": 25}, "gpu"),
        ({"hot_threshold": 24, "cold_threshold": 24}, "remote"),
        ({"hot_threshold": 25, "recent_seconds": 99}, "disk"),
        ({"hot_threshold": 25, "recent_seconds": 100}, "gpu"),
        ({"hot_threshold": 25, "variance_threshold": 0.25}, "disk"),
        ({"hot_threshold": 25, "variance_threshold": 0}, "disk"),
    ],
)
def test_each_setting_moves_its_rule(settings, tier):
    values = {"perplexity": 25, "time_variance": 0.25, "seconds_since_access": 100}
    assert select_backend(values, **settings) == tier


def naive_tier(
    values, hot_threshold=20, recent_seconds=3600, cold_threshold=50, variance_threshold=0.5
):
    """The requirements' four sentences, as they stand."""
    perplexity = values.get("perplexity")
    if perplexity is not None and perplexity > cold_threshold:
        return "remote"
    if values.get("time_variance", 0) >= variance_threshold:
        return "disk"
    predictable = perplexity is None or perplexity <= hot_threshold
    if predictable and values.get("seconds_since_access", 0) <= recent_seconds:
        return "gpu"
    return "disk"


@given(metadata, tier_settings)
def test_tier_equals_the_naive_rules(values, settings):
    assert select_backend(values, **settings) == naive_tier(values, **settings)


@given(metadata, tier_settings, st.tuples(perplexities, perplexities))
def test_tier_never_gets_hotter_when_perplexity_rises(values, settings, pair):
    low, high = (select_backend({**values, "perplexity": p}, **settings) for p in sorted(pair))
    assert TIER_CODES[low] <= TIER_CODES[high]


def test_tiers_are_ordered_hottest_first():
    assert TIERS == ("gpu", "disk", "remote")
    assert TIER_CODES == {"gpu": 0, "disk": 1, "remote": 2}


# --- scalar == array, bit for bit ---------------------------------------------------------

BOTH = pytest.mark.parametrize("decide", [compute_ttl, select_backend])


def random_trace(n, seed=0):
    """Metadata of n requests, shape (n,) each, with values on every threshold among them."""
    rng = np.random.default_rng(seed)
    return {
        "perplexity": rng.choice([rng.uniform(0.1, 90, n), np.full(n, 20.0), np.full(n, 50.0)]),
        "time_variance": np.where(rng.random(n) < 0.1, 0.5, rng.random(n)),
        "access_count": rng.integers(0, 1000, n),
        "seconds_since_access": np.where(rng.random(n) < 0.1, 3600.0, rng.exponential(3600, n)),
    }


dtypes = {compute_ttl: "f8", select_backend: "<U6"}


def one_by_one(decide, trace, **settings):
    """Each request of a trace by itself, as Python numbers."""
    columns = {name: np.asarray(column).tolist() for name, column in trace.items()}
    rows = (dict(zip(columns, row)) for row in zip(*columns.values()))
    return np.array([decide(row, **settings) for row in rows], dtypes[decide])


def assert_same_bits(actual, expected):
    assert isinstance(actual, np.ndarray)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


@given(st.lists(st.tuples(perplexities, variances, counts, ages_s), min_size=1, max_size=40))
def test_any_trace_decides_as_its_requests(rows):
    names = ("perplexity", "time_variance", "access_count", "seconds_since_access")
    trace = {name: np.array(column, float) for name, column in zip(names, zip(*rows))}
    for decide in (compute_ttl, select_backend):
        assert_same_bits(decide(trace), one_by_one(decide, trace))


@given(metadata, ttl_settings, tier_settings)
def test_any_settings_decide_alike_in_an_array(values, for_ttl, for_tier):
    arrays = {name: np.full(3, value, float) for name, value in values.items()}
    if arrays.keys() & {"perplexity", "time_variance", "access_count"}:
        assert compute_ttl(arrays, **for_ttl).tolist() == [compute_ttl(values, **for_ttl)] * 3
    if arrays.keys() & {"perplexity", "time_variance", "seconds_since_access"}:
        expected = [select_backend(values, **for_tier)] * 3
        assert select_backend(arrays, **for_tier).tolist() == expected


@BOTH
@pytest.mark.parametrize("extra", [-1, 0, 1, ch._BLOCK // 3])
def test_arrays_longer_than_several_blocks(decide, extra):
    trace = random_trace(2 * ch._BLOCK + extra)
    everything = decide(trace)
    assert len(everything) == 2 * ch._BLOCK + extra
    edges = np.r_[0:50, ch._BLOCK - 25 : ch._BLOCK + 25, len(everything) - 50 : len(everything)]
    part = {name: column[edges] for name, column in trace.items()}
    assert_same_bits(everything[edges], one_by_one(decide, part))
    halves = [{name: c[at] for name, c in trace.items()} for at in (slice(777), slice(777, None))]
    assert_same_bits(everything, np.concatenate([decide(half) for half in halves]))


@BOTH
@pytest.mark.parametrize(
    "as_container",
    [
        list,
        tuple,
        pd.Series,
        lambda a: pd.Series(a, index=range(len(a), 0, -1)),  # by position, not by label
        lambda a: np.repeat(a, 3)[::3],
        lambda a: a[::-1].copy()[::-1],
        lambda a: a.astype(">f8"),
        lambda a: a.astype(object).astype(float),
    ],
    ids="list tuple Series relabelled a[::3] reversed big-endian copied".split(),
)
def test_every_container_decides_alike(decide, as_container):
    trace = random_trace(200)
    expected = one_by_one(decide, trace)
    assert_same_bits(
        decide({name: as_container(column) for name, column in trace.items()}), expected
    )


@BOTH
@pytest.mark.parametrize(
    "as_scalar",
    [int, float, np.float64, np.float32, np.float16, np.int8, np.uint64, np.longdouble, np.array],
)
def test_every_scalar_decides_alike(decide, as_scalar):
    plain = {"perplexity": 35, "time_variance": 0, "access_count": 3, "seconds_since_access": 90}
    result = decide({name: as_scalar(value) for name, value in plain.items()})
    assert result == decide(plain)
    assert type(result) in (float, str)


@BOTH
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int16, np.uint8])
def test_narrow_arrays_compute_in_double_precision(decide, dtype):
    perplexity = np.array([1, 15.5, 20, 50, 51, 90]).astype(dtype)
    assert_same_bits(
        decide({"perplexity": perplexity}), one_by_one(decide, {"perplexity": perplexity})
    )


@pytest.mark.parametrize("number", [np.float16, np.float32, np.longdouble, np.int32, int])
def test_settings_of_any_precision_decide_alike(number):
    base, ends = number(3601), {"min_ttl": number(5), "max_ttl": number(5)}
    scalar = compute_ttl({"perplexity": 17.3}, base)
    assert scalar == compute_ttl({"perplexity": 17.3}, float(base))
    assert compute_ttl({"perplexity": [17.3]}, base).tolist() == [scalar]
    assert compute_ttl({}, alpha=number(0), gamma=number(0), **ends) == 5.0
    values = {"perplexity": 20 + 1e-12}
    assert select_backend(values, hot_threshold=number(20)) == "disk"
    assert select_backend({"perplexity": [20 + 1e-12]}, number(20)).tolist() == ["disk"]


@BOTH
def test_arrays_broadcast(decide):
    perplexity = np.array([[5.0], [30.0], [80.0]])  # (3, 1)
    variance = np.array([0.0, 0.2, 0.5, 0.9])  # (4,)
    grid = decide({"perplexity": perplexity, "time_variance": variance, "access_count": 2})
    assert grid.shape == (3, 4)
    for (row, column), result in np.ndenumerate(grid):
        one = {"perplexity": perplexity[row, 0].item(), "time_variance": variance[column].item()}
        assert result == decide({**one, "access_count": 2})


@BOTH
def test_an_empty_trace_has_no_decisions(decide):
    assert decide({"perplexity": np.empty((0,))}).shape == (0,)
    assert decide({"perplexity": np.empty((0, 3))}).shape == (0, 3)


@BOTH
def test_arrays_that_do_not_broadcast_are_named(decide):
    with pytest.raises(ValueError, match=r"perplexity \(2,\), time_variance \(3,\)"):
        decide({"perplexity": [1.0, 2.0], "time_variance": [0.0, 0.1, 0.2]})


@BOTH
def test_inputs_are_not_changed(decide):
    trace = random_trace(100)
    before = {name: column.copy() for name, column in trace.items()}
    decide(trace)
    for name, column in trace.items():
        np.testing.assert_array_equal(column, before[name])


def test_an_integer_beyond_64_bits_is_a_number():
    assert compute_ttl({"access_count": 10**30}) == compute_ttl({"access_count": 1e30})


# --- bad metadata is named ----------------------------------------------------------------

USERS = {
    "perplexity": (compute_ttl, select_backend),
    "time_variance": (compute_ttl, select_backend),
    "access_count": (compute_ttl,),
    "seconds_since_access": (select_backend,),
}
ALLOWED = {
    "perplexity": "> 0 and finite",
    "time_variance": "0..1",
    "access_count": ">= 0 and finite",
    "seconds_since_access": ">= 0 and finite",
}
GOOD = {"perplexity": 9.0, "time_variance": 0.5, "access_count": 2.0, "seconds_since_access": 7.0}
OUT_OF_RANGE = [math.inf, -math.inf, -1, -1.0, -5e-324, -HUGE, HUGE, -(10**30)]
OUT_OF_ONE_RANGE = {"perplexity": [0, 0.0, -0.0], "time_variance": [1.1, 2, 1 + 2**-52]}
NOT_NUMBERS = [
    "15",
    "",
    b"15",
    True,
    False,
    np.True_,
    1j,
    1 + 0j,
    np.complex64(1),
    [[1.0], [1.0, 0.5]],
    [np.zeros((2, 3)), np.zeros((2, 4))],
    [HUGE],
    [HUGE, 0.5],
    [None, "a"],
    [0.5, "a"],
    [True, False],
    {},
    {"a": 1},
    object(),
    np.datetime64("2026-01-01"),
    pd.Timedelta("1s"),
]


def shown(value):
    """Return a value as the same text in every process."""
    return "object()" if type(value) is object else repr(value)


FIELD_AND_USER = [(name, user) for name, users in USERS.items() for user in users]


def message_of(call, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("name, decide", FIELD_AND_USER)
def test_a_number_out_of_range_names_field_value_and_range(name, decide):
    for value in OUT_OF_RANGE + OUT_OF_ONE_RANGE.get(name, []):
        message = message_of(decide, {**GOOD, name: value})
        assert message.startswith(name + " must be ") and ALLOWED[name] in message, message
        shown = (repr(value)[:80], repr(float(value)) if abs(value) < HUGE else "")
        assert message.endswith(shown), message


@pytest.mark.parametrize("name, decide", FIELD_AND_USER)
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: shown(value)[:24])
def test_what_is_not_a_number_names_field_value_and_range(name, decide, value):
    message = message_of(decide, {**GOOD, name: value})
    assert message == f"{name} must be a number ({ALLOWED[name]}), got {value!r:.80}"


@pytest.mark.parametrize("name, decide", FIELD_AND_USER)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.longdouble])
def test_one_bad_element_is_named_by_index_and_value(name, decide, dtype):
    for value in [math.inf, -1.0] + OUT_OF_ONE_RANGE.get(name, [])[:2]:
        column = np.full(11, 0.5, dtype)
        column[7] = value
        message = message_of(decide, {**GOOD, name: column})
        shown = column[7].item()
        assert message == f"{name} must be {ALLOWED[name]}, got {shown!r} at index 7"


@pytest.mark.parametrize("name, decide", FIELD_AND_USER)
def test_the_first_bad_element_is_found_in_a_later_block(name, decide):
    column = np.full(3 * ch._BLOCK, 0.5)
    at = 2 * ch._BLOCK + 5
    column[[5, at, at + 1]] = math.nan, -2.0, -3.0  # what is unknown is no error
    assert message_of(decide, {**GOOD, name: column}).endswith(f"got -2.0 at index {at}")


@pytest.mark.parametrize("name, decide", FIELD_AND_USER)
def test_scalars_of_narrow_types_are_checked_too(name, decide):
    bad = [np.float32(math.inf), np.int8(-1), np.array(-1.0)]
    bad += [np.float32(0), np.float16(0)] if name == "perplexity" else []
    for value in bad:
        message = message_of(decide, {**GOOD, name: value})
        assert message == f"{name} must be {ALLOWED[name]}, got {value.item()!r}"


@BOTH
@pytest.mark.parametrize("bad", [None, [], [("perplexity", 3)], "perplexity", 3, {1}])
def test_metadata_must_be_a_mapping(decide, bad):
    message = message_of(decide, bad)
    assert message.startswith("metadata must be a mapping") and message.endswith(repr(bad))


# --- None and NaN: unknown ----------------------------------------------------------------


def without_unknown(values):
    return {name: value for name, value in values.items() if value == value is not None}


unknown = st.sampled_from([None, math.nan])
partly_known = st.fixed_dictionaries(
    {
        "perplexity": perplexities | unknown,
        "time_variance": variances | unknown,
        "access_count": counts | unknown,
        "seconds_since_access": ages_s | unknown,
    }
)


@given(partly_known, ttl_settings, tier_settings)
def test_unknown_is_absent(values, for_ttl, for_tier):
    known = without_unknown(values)
    assert compute_ttl(values, **for_ttl) == compute_ttl(known, **for_ttl)
    assert select_backend(values, **for_tier) == select_backend(known, **for_tier)
    assert check_metadata(values) == {name: float(value) for name, value in known.items()}


@given(st.lists(partly_known, min_size=1, max_size=20), ttl_settings, tier_settings)
def test_unknown_in_an_array_is_absent_too(rows, for_ttl, for_tier):
    rows = [{n: None if v is None else float(v) for n, v in row.items()} for row in rows]
    columns = {name: [row[name] for row in rows] for name in METADATA_FIELDS}
    arrays = {name: np.array(column, float) for name, column in columns.items()}
    for trace in (columns, arrays):  # None in a list, NaN in an array
        ttl_s, tiers = compute_ttl(trace, **for_ttl), select_backend(trace, **for_tier)
        for index, row in enumerate(map(without_unknown, rows)):
            assert ttl_s[index] == compute_ttl(row, **for_ttl)
            assert tiers[index] == select_backend(row, **for_tier)


@BOTH
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_unknown_in_narrow_arrays_of_several_blocks(decide, dtype):
    """A threshold that the dtype cannot hold must not be rounded to it."""
    column = np.full(2 * ch._BLOCK + 3, 40.0, dtype)
    column[[0, ch._BLOCK, -1]] = math.nan
    settings = {"hot_threshold": 20.01} if decide is select_backend else {}
    for name in ("perplexity", "access_count", "seconds_since_access"):
        result = np.broadcast_to(decide({name: column}, **settings), column.shape)
        assert (result[np.isnan(column)] == decide({}, **settings)).all()
        assert (result[~np.isnan(column)] == decide({name: 40.0}, **settings)).all()


@BOTH
@pytest.mark.parametrize(
    "unknown_one", [None, math.nan, np.float16("nan"), np.array(math.nan), np.array(None)]
)
def test_an_unknown_scalar_of_any_kind(decide, unknown_one):
    for name in METADATA_FIELDS:
        known = {other: value for other, value in GOOD.items() if other != name}
        assert decide({**GOOD, name: unknown_one}) == decide(known)


@BOTH
def test_a_missing_value_in_a_series_is_unknown(decide):
    for name in METADATA_FIELDS:
        known = {other: value for other, value in GOOD.items() if other != name}
        for dtype in ("float64", "Float64", "object"):
            column = pd.Series([0.5, None], dtype=dtype)
            result = np.broadcast_to(decide({**GOOD, name: column}), 2)
            assert result.tolist() == [decide({**GOOD, name: 0.5}), decide(known)]


# --- one request's metadata ---------------------------------------------------------------


def test_the_table_of_fields_is_the_type_of_metadata():
    assert set(METADATA_FIELDS) == set(KVMetadata.__annotations__) == set(ALLOWED)
    assert {name: field.allowed for name, field in METADATA_FIELDS.items()} == ALLOWED
    neutral = {name: field.neutral for name, field in METADATA_FIELDS.items()}
    assert compute_ttl(neutral) == compute_ttl({}) == 3600.0


@pytest.mark.parametrize("name", METADATA_FIELDS)
@pytest.mark.parametrize(
    "value", [[12.0], [1.0, 2.0], [], np.array([1.0]), np.array(1.0), *NOT_NUMBERS], ids=shown
)
def test_one_request_has_one_number_a_field(name, value):
    message = message_of(check_metadata, {**GOOD, name: value})
    assert message == f"{name} must be a number ({ALLOWED[name]}), got {value!r:.80}"


@pytest.mark.parametrize("name", METADATA_FIELDS)
def test_one_request_with_a_number_out_of_range(name):
    for value in OUT_OF_RANGE + OUT_OF_ONE_RANGE.get(name, []):
        message = message_of(check_metadata, {**GOOD, name: value})
        assert message == f"{name} must be {ALLOWED[name]}, got {value!r:.80}"


def test_an_unknown_field_is_answered_with_the_nearest_one():
    message = message_of(check_metadata, {"perplexty": None})
    assert message == "unknown metadata field 'perplexty': did you mean 'perplexity'?"
    message = message_of(check_metadata, {"tenant": 1})
    assert message == f"unknown metadata field 'tenant': known are {', '.join(METADATA_FIELDS)}"
    assert len(message_of(check_metadata, {"x" * 10**6: 1})) < 300


def test_one_requests_metadata_is_plain_floats():
    given_metadata = {"perplexity": np.float32(2), "access_count": 3, "time_variance": np.int8(1)}
    known = check_metadata(given_metadata)
    assert known == given_metadata and {type(value) for value in known.values()} == {float}
    assert check_metadata(None) == check_metadata({}) == {}
    assert message_of(check_metadata, [1, 2]).startswith("metadata must be a mapping")


@BOTH
def test_the_limits_of_each_range_are_allowed(decide):
    lowest = {"perplexity": 5e-324, "time_variance": 0, "access_count": 0}
    most = sys.float_info.max
    highest = {"perplexity": most, "time_variance": 1, "access_count": most}
    for values, age_s in ((lowest, 0), (highest, most)):
        result = decide({**values, "seconds_since_access": age_s})
        assert result in (*TIERS, 30.0) or 30 < result <= 604_800


# --- bad settings are named ---------------------------------------------------------------

TTL_SETTINGS = {
    "base_ttl": "> 0 and finite",
    "min_ttl": "> 0 and <= max_ttl (604800.0)",
    "max_ttl": "> 0 and finite",
    "alpha": ">= 0 and finite",
    "gamma": "0..1",
}
TIER_SETTINGS = {
    "hot_threshold": "> 0 and <= cold_threshold (50.0)",
    "recent_seconds": ">= 0 and finite",
    "cold_threshold": "> 0 and finite",
    "variance_threshold": "0..1",
}
MUST_BE_POSITIVE = {"base_ttl", "min_ttl", "max_ttl", "hot_threshold", "cold_threshold"}
AT_MOST_ONE = {"gamma", "variance_threshold"}


def callers(name):
    """Both things that take this setting."""
    function = compute_ttl if name in TTL_SETTINGS else select_backend
    return (
        lambda value: function({}, **{name: value}),
        lambda value: HeuristicConfig(**{name: value}),
    )


@pytest.mark.parametrize("name, allowed", (TTL_SETTINGS | TIER_SETTINGS).items())
def test_a_setting_out_of_range_names_field_value_and_range(name, allowed):
    bad = [math.nan, math.inf, -math.inf, -1, -0.5, HUGE, -HUGE, np.float32(-1), np.int8(-1)]
    bad += [0, 0.0, -0.0] if name in MUST_BE_POSITIVE else []
    bad += [1.1, 2] if name in AT_MOST_ONE else []
    for call in callers(name):
        for value in bad:
            for _ in range(2):  # an error is never remembered as valid
                assert message_of(call, value) == f"{name} must be {allowed}, got {value!r:.80}"


@pytest.mark.parametrize("name, allowed", (TTL_SETTINGS | TIER_SETTINGS).items())
@pytest.mark.parametrize(
    "value",
    ["1", "", None, True, False, np.True_, 1j, [1.0], {"a": 1}, {1}, (), np.array([1.0])],
    ids=repr,
)
def test_a_setting_that_is_no_number_names_field_value_and_range(name, allowed, value):
    for call in callers(name):
        message = message_of(call, value)
        assert message == f"{name} must be a number ({allowed}), got {value!r}"


def test_true_is_not_taken_for_a_remembered_one():
    compute_ttl({}, alpha=1)
    assert "must be a number" in message_of(compute_ttl, {}, alpha=True)
    select_backend({}, variance_threshold=1)
    assert "must be a number" in message_of(select_backend, {}, variance_threshold=True)


def test_limits_in_the_wrong_order_are_named():
    for call in (lambda **kw: compute_ttl({}, **kw), HeuristicConfig):
        message = message_of(call, min_ttl=61, max_ttl=60)
        assert message == "min_ttl must be > 0 and <= max_ttl (60.0), got 61"
    for call in (lambda **kw: select_backend({}, **kw), HeuristicConfig):
        message = message_of(call, hot_threshold=50.5)
        assert message == "hot_threshold must be > 0 and <= cold_threshold (50.0), got 50.5"


# --- HeuristicConfig ----------------------------------------------------------------------

configs = st.builds(lambda a, b: HeuristicConfig(**a, **b), ttl_settings, tier_settings)


@given(configs, metadata)
def test_config_equals_the_functions(config, values):
    settings = config.to_dict()
    assert config.ttl(values) == compute_ttl(values, **{k: settings[k] for k in TTL_SETTINGS})
    assert config.tier(values) == select_backend(values, **{k: settings[k] for k in TIER_SETTINGS})


def test_default_config_equals_the_default_functions():
    trace = random_trace(500)
    assert_same_bits(HeuristicConfig().ttl(trace), compute_ttl(trace))
    assert_same_bits(HeuristicConfig().tier(trace), select_backend(trace))


@given(configs)
def test_config_round_trips_through_json(config):
    assert HeuristicConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_config_of_numpy_numbers_is_plain_in_a_file():
    config = HeuristicConfig(base_ttl=np.float32(300), recent_seconds=np.int64(60))
    assert json.loads(json.dumps(config.to_dict()))["recent_seconds"] == 60
    factors = {"disk_ttl_factor", "remote_ttl_factor"}
    assert set(config.to_dict()) == set(TTL_SETTINGS | TIER_SETTINGS) | factors


def test_config_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        HeuristicConfig().base_ttl = -1


def test_the_ladder_starts_at_one_and_its_factors_are_checked():
    config = HeuristicConfig(disk_ttl_factor=2, remote_ttl_factor=0.5)
    assert config.ladder == {"gpu": 1.0, "disk": 2, "remote": 0.5}
    assert HeuristicConfig().ladder == {"gpu": 1.0, "disk": 4.0, "remote": 24.0}
    for name in ("disk_ttl_factor", "remote_ttl_factor"):
        for value in (0, -1, math.nan, math.inf, "4", True):
            with pytest.raises(ValueError, match=f"{name} must be"):
                HeuristicConfig(**{name: value})
