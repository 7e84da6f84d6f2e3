"""What is measured for the heuristics, against naive references and exact entropies."""

from __future__ import annotations

import gc
import math
import sys
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caching_heuristics import HeuristicConfig
from kvttl.manager.metadata import (
    MEASURE_LOGPROBS,
    Observation,
    PromptHistory,
    RequestMetadata,
    output_perplexity,
    with_logprobs,
)

FIELDS = {"access_count", "time_variance", "seconds_since_access", "perplexity"}
GIVEN = {"access_count": 7, "time_variance": 0.3, "seconds_since_access": 9.0, "perplexity": 11.0}


class NaiveHistory:
    """The same promises, kept with whole prefixes and whole lists of times."""

    def __init__(self, chunk, max_patterns):
        self.chunk, self.max_patterns = chunk, max_patterns
        self.times_s = {}  # prefix -> times of its accesses; oldest first
        self.gaps_s = {}

    def observe(self, tokens, now_s):
        """Everything in an Observation but the key."""
        ends = range(self.chunk, len(tokens) + 1, self.chunk)
        prefixes = [tuple(tokens[:end]) for end in ends]
        known = [prefix for prefix in prefixes if prefix in self.times_s]
        seen = (0, 0.0, 0.0)
        for prefix in known:
            gap_s = max(0, now_s - self.times_s[prefix][-1])
            self.gaps_s[prefix].append(gap_s)
        if known:
            gaps_s = self.gaps_s[known[-1]]
            seen = (len(self.times_s[known[-1]]), gaps_s[-1], self.variance(gaps_s))
        for prefix in reversed(prefixes):  # the shortest is the newest
            self.times_s[prefix] = [*self.times_s.pop(prefix, []), now_s]
            self.gaps_s.setdefault(prefix, [])
        for oldest in list(self.times_s)[: -self.max_patterns]:
            del self.times_s[oldest], self.gaps_s[oldest]
        return seen

    @staticmethod
    def variance(gaps_s):
        mean = sum(gaps_s) / len(gaps_s)
        if len(gaps_s) < 2 or mean == 0:
            return 0.0
        cv = float(np.std(gaps_s)) / mean
        return cv / (1 + cv)


def fields_without_key(seen):
    return (
        seen.access_count,
        seen.seconds_since_access,
        pytest.approx(seen.time_variance, abs=1e-9),
    )


def key_of(prefix, chunk):
    return PromptHistory(chunk).observe(list(prefix), 0).key


# --- the history --------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=9), st.integers(-3, 9)), max_size=40),
)
def test_history_equals_the_naive_one(chunk, max_patterns, accesses):
    history, naive, now_s = PromptHistory(chunk, max_patterns), NaiveHistory(chunk, max_patterns), 0
    for tokens, passed_s in accesses:  # the clock may go backwards
        now_s += passed_s
        assert naive.observe(tokens, now_s) == fields_without_key(history.observe(tokens, now_s))
        assert len(history) == len(naive.times_s)
    assert list(history._patterns) == [key_of(prefix, chunk) for prefix in naive.times_s]


def test_history_equals_the_naive_one_while_it_grows_and_forgets():
    rng = np.random.default_rng(3)
    history, naive = PromptHistory(2, 300), NaiveHistory(2, 300)
    for now_s in np.cumsum(rng.exponential(5.0, 1_500)):
        tokens = rng.integers(0, 3, rng.integers(0, 16)).tolist()
        assert naive.observe(tokens, now_s) == fields_without_key(history.observe(tokens, now_s))
    assert len(history) == 300


def test_a_prompt_is_counted_for_each_of_its_prefixes():
    history = PromptHistory(2)
    first = history.observe([1, 2, 3, 4, 5], 100)
    assert first == Observation(key=first.key) and len(history) == 2
    again = history.observe([1, 2, 3, 4, 6], 130)  # the incomplete chunk does not count
    assert again == Observation(1, 30.0, 0.0, first.key)
    shorter = history.observe([1, 2], 150)
    assert (shorter.access_count, shorter.seconds_since_access) == (2, 20)
    assert shorter.time_variance == pytest.approx(0.2 / 1.2)  # gaps 30 and 20 s: CV 5/25


def test_even_gaps_have_no_variance_and_a_burst_has_much():
    history = PromptHistory(1)
    for now_s in (0, 60, 120):
        seen = history.observe([5], now_s)
    assert (seen.access_count, seen.seconds_since_access, seen.time_variance) == (2, 60.0, 0.0)
    assert history.observe([5], 100_000).time_variance > 0.5


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3]])
def test_a_prompt_shorter_than_a_chunk_has_no_pattern(tokens):
    history = PromptHistory(4)
    for now_s in (0, 1):
        assert history.observe(tokens, now_s) == Observation()
    assert len(history) == 0


def test_a_clock_that_goes_backwards_gives_gaps_of_zero():
    history = PromptHistory(1)
    for now_s in (100, 50):
        seen = history.observe([1], now_s)
    assert seen.seconds_since_access == 0.0
    assert history.observe([1], 60).seconds_since_access == 10.0
    for now_s in (-5, -1e100):
        seen = history.observe([1], now_s)
        assert seen.seconds_since_access == 0.0 and 0 <= seen.time_variance <= 1
    assert 0 <= history.observe([1], 1e100).time_variance <= 1


def test_the_least_recently_seen_pattern_is_forgotten_and_its_perplexity_too():
    history = PromptHistory(1, max_patterns=2)
    keys = [history.observe([token], token).key for token in (1, 2)]
    history.note_perplexity(keys[0], 5.0)
    history.note_perplexity(keys[1], 6.0)
    history.observe([1], 3)
    history.observe([3], 4)
    assert [history.perplexity(key) for key in keys] == [5.0, None]
    history.note_perplexity(keys[1], 7.0)  # nothing is kept for a forgotten pattern
    assert history.observe([2], 5).access_count == 0 and history.perplexity(keys[1]) is None


def test_a_prompt_longer_than_the_bound_keeps_its_shortest_prefixes():
    history = PromptHistory(1, max_patterns=3)
    history.observe([1, 2, 3, 4, 5], 0)
    seen = history.observe([1, 2, 3, 4, 5], 1)
    assert len(history) == 3 and seen.access_count == 1


def test_sequences_of_any_kind_name_the_same_pattern():
    history = PromptHistory(2)
    key = history.observe([1, 2], 0).key
    for tokens in ((1, 2), np.array([1, 2]), np.array([1, 2], np.int32), range(1, 3)):
        assert history.observe(tokens, 1).key == key
    assert key == key_of([1, 2], 2) != key_of([2, 1], 2)


def test_equal_accesses_give_equal_observations():
    def replay():
        rng = np.random.default_rng(5)
        history = PromptHistory(2, 50)
        return [history.observe(rng.integers(0, 3, 9).tolist(), i * i) for i in range(300)]

    assert replay() == replay()


@pytest.mark.parametrize("patterns", [1_000, 87_382, 200_000])
def test_a_pattern_takes_at_most_1_kb(patterns):
    assert bytes_per_pattern(patterns, 200_000) <= 1_000


@pytest.mark.parametrize("bound", [1_025, 43_691])
def test_a_pattern_takes_no_more_after_many_were_forgotten(bound):
    assert bytes_per_pattern(3 * bound, bound) <= 1_000


def bytes_per_pattern(observed, max_patterns):
    gc.collect()
    tracemalloc.start()
    try:
        history = PromptHistory(1, max_patterns)
        for start in range(0, observed, 500):  # of distinct patterns
            history.observe(range(start, min(start + 500, observed)), float(start))
        assert len(history) == min(observed, max_patterns)
        return tracemalloc.get_traced_memory()[0] / len(history)
    finally:
        tracemalloc.stop()


def test_threads_lose_no_access():
    history, threads, rounds = PromptHistory(2, 64), 6, 400
    shared, interval_s = [1, 1, 2, 2], sys.getswitchinterval()

    def work(name):
        for i in range(rounds):
            history.observe(shared, i)
            key = history.observe([1, 1, 100 + name, i], i).key
            history.note_perplexity(key, 2.0)
            history.perplexity(key)

    workers = [threading.Thread(target=work, args=(name,)) for name in range(threads)]
    sys.setswitchinterval(1e-6)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert len(history) == 64
    assert history.observe([1, 1], 1e6).access_count == 2 * threads * rounds


# A call that must fail, and what the message must name.
BAD_CALLS = [
    (lambda: PromptHistory(0), "chunk_size_tokens must be a whole number >= 1, got 0"),
    (lambda: PromptHistory(2.0), "chunk_size_tokens .* got 2.0"),
    (lambda: PromptHistory(True), "chunk_size_tokens .* got True"),
    (lambda: PromptHistory(1, 0), "max_patterns must be a whole number >= 1, got 0"),
    (lambda: PromptHistory(1).observe([1], math.nan), "now_s must be .*, got nan"),
    (lambda: PromptHistory(1).observe([1], "3"), "now_s .* got '3'"),
    (lambda: PromptHistory(1).observe([1], 10**400), "now_s .* got 1000"),
    (lambda: PromptHistory(1).observe([1], None), "now_s .* got None"),
    (lambda: PromptHistory(1).observe([1.5], 0), r"tokens .* integers .* got \[1.5\]"),
    (lambda: PromptHistory(1).observe(["a"], 0), "tokens .* got"),
    (lambda: PromptHistory(1).observe([2**63], 0), "tokens .* got"),
    (lambda: PromptHistory(1).observe(b"12345678", 0), "tokens .* got"),
    (lambda: PromptHistory(1).observe(None, 0), "tokens .* got None"),
    (lambda: PromptHistory(1).note_perplexity(1, 0), "perplexity must be > 0 and finite, got 0"),
    (lambda: PromptHistory(1).note_perplexity(1, math.inf), "perplexity .* got inf"),
    (lambda: output_perplexity(None, 0), "vocab_size must be a whole number .*, got 0"),
    (lambda: RequestMetadata(PromptHistory(1), vocab_size=None), "vocab_size .* got None"),
    (lambda: RequestMetadata(PromptHistory(1), "x"), "'generation', 'prompt', 'off', got 'x'"),
    (lambda: RequestMetadata(PromptHistory(1), "prompt"), "scorer must be callable .* got None"),
    (lambda: RequestMetadata(PromptHistory(1), scorer=3), "scorer must be callable .* got 3"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- perplexity of a generation -----------------------------------------------------------


def output_of(distributions, k):
    """A RequestOutput's shape, listing the k likeliest tokens of each distribution."""
    listed = [np.argsort(-p)[:k] for p in distributions]
    logprobs = [
        {int(token): SimpleNamespace(logprob=float(np.log(p[token]))) for token in tokens}
        for p, tokens in zip(distributions, listed)
    ]
    return SimpleNamespace(outputs=[SimpleNamespace(logprobs=logprobs)])


def softmax_rows(positions, vocab, scale, seed=0):
    weights = np.exp(scale * np.random.default_rng(seed).standard_normal((positions, vocab)))
    return weights / weights.sum(axis=1, keepdims=True)


def exact_perplexity(distributions):
    return math.exp(-np.mean(np.sum(distributions * np.log(distributions), axis=1)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_perplexity_is_exact_where_the_whole_vocabulary_is_listed(scale):
    p = softmax_rows(12, 50, scale)
    measured = output_perplexity(output_of(p, 50), 50)
    assert measured == pytest.approx(exact_perplexity(p), rel=1e-9)


@pytest.mark.parametrize(("scale", "within"), [(1.0, 1.35), (2.0, 1.55), (4.0, 1.15), (6.0, 1.02)])
def test_perplexity_of_the_likeliest_tokens_is_a_close_upper_bound(scale, within):
    p = softmax_rows(64, 500, scale)
    exact = exact_perplexity(p)
    bounds = [output_perplexity(output_of(p, k), 500) for k in (1, 5, MEASURE_LOGPROBS, 100, 500)]
    assert bounds == sorted(bounds, reverse=True)  # the more are listed, the closer
    assert exact * (1 - 1e-9) <= bounds[2] <= exact * within


def test_a_vocabulary_said_to_be_larger_gives_a_larger_bound():
    output = output_of(softmax_rows(8, 500, 1.0), 20)
    assert output_perplexity(output, 500) < output_perplexity(output, 262_144)


def made(*rows):
    positions = [{i: SimpleNamespace(logprob=x) for i, x in enumerate(row)} for row in rows]
    return SimpleNamespace(outputs=[SimpleNamespace(logprobs=positions)])


def test_certain_positions_have_perplexity_one():
    assert output_perplexity(made([0.0, -math.inf], [0.0]), 100) == 1.0
    assert output_perplexity(made([1e-7]), 100) == 1.0  # rounding in the engine's float32


def test_positions_may_list_different_numbers_of_tokens():
    half, quarter = math.log(0.5), math.log(0.25)
    expected = math.exp((math.log(2) + math.log(4)) / 2)
    assert output_perplexity(made([half] * 2, [quarter] * 4), 9) == pytest.approx(expected)


ODD_OUTPUTS = [
    None,
    "text",
    SimpleNamespace(outputs=[]),
    SimpleNamespace(outputs=[SimpleNamespace(logprobs=None)]),
    SimpleNamespace(outputs=[SimpleNamespace(logprobs=[])]),
    SimpleNamespace(outputs=[SimpleNamespace(logprobs=[None, {}])]),
    SimpleNamespace(outputs=[SimpleNamespace(logprobs=[{1: None}])]),
    SimpleNamespace(outputs=[SimpleNamespace(logprobs=[3])]),
    made([math.nan]),
    made([math.inf]),
    made([12.0, 800.0]),  # logits
    made(["certain"]),
    made([None]),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("output", ODD_OUTPUTS)
def test_an_odd_output_has_no_perplexity(output):
    assert output_perplexity(output, 100) is None


def test_vllms_own_containers_are_read():
    from vllm.logprobs import FlatLogprobs, Logprob

    row = {3: Logprob(math.log(0.5), 1, "a"), 9: Logprob(math.log(0.5), 2, "b")}
    flat = FlatLogprobs()
    flat.append(row)
    for logprobs in ([row], flat):
        output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=logprobs)])
        assert output_perplexity(output, 100) == pytest.approx(2.0)


# --- asking for log-probabilities ---------------------------------------------------------


@pytest.mark.parametrize("asked", [None, 0, 5])
@pytest.mark.parametrize("skip_clone", [False, True])
def test_vllms_parameters_ask_for_more_and_the_callers_stay(asked, skip_clone):
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=6, stop=["x"], logprobs=asked, skip_clone=skip_clone
    )
    before = repr(params)
    changed = with_logprobs(params)
    assert changed.logprobs == MEASURE_LOGPROBS and type(changed) is SamplingParams
    assert repr(params) == before and params.logprobs == asked
    assert repr(changed).replace("logprobs=20", f"logprobs={asked}", 1) == before
    assert with_logprobs(changed) is changed


def test_vllms_parameters_that_mean_something_else_stay():
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    for params in (
        SamplingParams(logprobs=-1),
        SamplingParams(logprobs=20),
        SamplingParams(logprobs=30),
        SamplingParams(n=2),
        SamplingParams(logprob_token_ids=[1, 2]),
        BeamSearchParams(beam_width=2, max_tokens=3),
    ):
        assert with_logprobs(params) is params


@pytest.mark.parametrize("params", [None, 3, [SimpleNamespace(logprobs=None)], {"logprobs": None}])
def test_unknown_parameters_stay(params):
    assert with_logprobs(params) is params


def test_a_clone_that_is_the_object_itself_is_copied():
    class Params(SimpleNamespace):
        def clone(self):
            return self

    params = Params(logprobs=None, n=1, best_of=None)
    assert with_logprobs(params, limit=7).logprobs == 7 and params.logprobs is None
    params.best_of = 4
    assert with_logprobs(params) is params


# --- completing the metadata --------------------------------------------------------------


def measured(source="generation", **arguments):
    return RequestMetadata(PromptHistory(2), source, **arguments)


def test_what_the_caller_gave_is_kept_and_the_access_is_counted():
    measure = measured()
    metadata, sources = measure.complete(GIVEN, [1, 2], measure.of_answer(made([0.0])), 0)
    assert metadata == GIVEN and metadata is not GIVEN
    assert sources == dict.fromkeys(FIELDS, "caller")
    assert measure.history.observe([1, 2], 1).access_count == 1


@pytest.mark.parametrize("unknown", [{}, None, math.nan])
@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_field_that_is_missing_or_unknown_is_measured(field, unknown):
    given = {name: value for name, value in GIVEN.items() if name != field}
    if unknown != {}:
        given[field] = unknown
    measure = measured(vocab_size=100)
    for now_s in (0, 10, 40):
        metadata, sources = measure.complete(given, [1, 2], measure.of_answer(made([0.0])), now_s)
    seen = {"access_count": 2, "seconds_since_access": 30.0, "time_variance": 1 / 3}
    known = {name: value for name, value in GIVEN.items() if name != field}
    assert metadata == pytest.approx({"perplexity": 1.0, **seen, **known})
    source = "generation" if field == "perplexity" else "history"
    assert sources == {**dict.fromkeys(FIELDS, "caller"), field: source}


def test_nothing_given_is_enough_for_the_heuristics():
    measure, config = measured(), HeuristicConfig()
    metadata, sources = measure.complete(None, [1, 2, 3], None, 0)
    assert metadata == {"access_count": 0, "time_variance": 0.0, "seconds_since_access": 0.0}
    assert sources == {**dict.fromkeys(FIELDS, "history"), "perplexity": "absent"}
    assert (config.ttl(metadata), config.tier(metadata)) == (3600.0, "gpu")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (3, "metadata must be a mapping of field names to numbers, got 3"),
        ([("perplexity", 3)], "metadata must be a mapping"),
        ({"perplexity": [12.0]}, r"perplexity must be a number .* got \[12.0\]"),
        ({"perplexty": 90.0}, "did you mean 'perplexity'"),
    ],
)
def test_metadata_that_is_refused_is_counted_all_the_same(given, reason):
    measure = measured()
    with pytest.raises(ValueError, match=reason):
        measure.complete(given, [1, 2], None, 0)
    assert measure.history.observe([1, 2], 1).access_count == 1


def test_a_generations_perplexity_is_remembered_for_one_without():
    measure = measured(vocab_size=9)
    perplexity = measure.of_answer(made([math.log(0.5)] * 2))
    assert measure.complete({}, [1, 2], perplexity, 0)[0]["perplexity"] == pytest.approx(2.0)
    metadata, sources = measure.complete({}, [1, 2], None, 1)
    assert metadata["perplexity"] == pytest.approx(2.0)
    assert sources["perplexity"] == "remembered"
    assert measure.complete({}, [1, 2, 3, 4], None, 2)[1]["perplexity"] == "absent"


def test_a_short_prompt_has_a_generations_perplexity_but_no_memory_of_it():
    measure = measured()
    assert (
        measure.complete({}, [1], measure.of_answer(made([0.0])), 0)[1]["perplexity"]
        == "generation"
    )
    assert measure.complete({}, [1], None, 1)[1]["perplexity"] == "absent"


def test_each_pattern_is_scored_once():
    scored = []
    measure = measured("prompt", scorer=lambda tokens: scored.append(tokens) or 10.0 + len(tokens))
    prompts = [[1, 2], [1, 2, 9], [1, 2, 3, 4], [1, 2, 3, 4], [5]]
    results = [measure.complete({}, tokens, None, i) for i, tokens in enumerate(prompts)]
    assert scored == [[1, 2], [1, 2, 3, 4]]
    assert [m.get("perplexity") for m, _ in results] == [12.0, 12.0, 14.0, 14.0, None]
    assert [s["perplexity"] for _, s in results] == ["prompt"] * 4 + ["absent"]


def test_threads_score_a_pattern_once():
    scored, start = [], threading.Barrier(4)
    measure = measured("prompt", scorer=lambda tokens: scored.append(tokens) or 3.0)

    def work():
        start.wait()
        measure.complete({}, [1, 2], None, 0)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert scored == [[1, 2]]


@pytest.mark.parametrize("result", [RuntimeError("no weights"), math.nan, None, "3", 0, -1.0])
def test_a_scorer_that_fails_is_logged_and_never_raises(result, caplog):
    def scorer(tokens):
        if isinstance(result, Exception):
            raise result
        return result

    metadata, sources = measured("prompt", scorer=scorer).complete({}, [1, 2], None, 0)
    assert "perplexity" not in metadata and sources["perplexity"] == "absent"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "the prompt was not scored" in record.getMessage()


def test_off_measures_no_perplexity():
    measure = measured("off")
    metadata, sources = measure.complete({}, [1, 2], measure.of_answer(made([0.0])), 0)
    assert "perplexity" not in metadata and sources["perplexity"] == "absent"
