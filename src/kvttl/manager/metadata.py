"""Measures what the heuristics need: access counts, time variance, recency, perplexity.

Nothing here reads a clock, a file or a model: times, outputs and scorers are passed in.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from caching_heuristics import METADATA_FIELDS, check_metadata, check_number
from kvttl.background import check_whole

logger = logging.getLogger(__name__)

MEASURE_LOGPROBS = 20  # vLLM's default max_logprobs: an engine refuses more
PERPLEXITY_SOURCES = ("generation", "prompt", "off")


@dataclass(frozen=True, slots=True)
class Observation:
    """A prompt's longest prefix that was seen before, as it was before this access.

    `time_variance` is CV/(1+CV) of the seconds between its accesses, this one
    included; CV = population standard deviation / mean. 0.0 before there are two gaps.
    """

    access_count: int = 0  # 0 if no prefix was seen before
    seconds_since_access: float = 0.0  # 0.0 if no prefix was seen before
    time_variance: float = 0.0  # 0..1
    key: int | None = None  # of its last complete-chunk prefix, 64 bits; None where it has none


@dataclass(slots=True, eq=False)
class _Pattern:
    last_s: float
    count: int = 1
    gap_mean_s: float = 0.0
    gap_m2: float = 0.0  # sum of squared deviations from the mean, s^2 (Welford 1962)
    perplexity: float | None = None

    def access(self, now_s):
        """Count an access; return the seconds since the last one."""
        gap_s = max(0.0, now_s - self.last_s)
        deviation = gap_s - self.gap_mean_s
        self.gap_mean_s += deviation / self.count  # gaps, this one included
        self.gap_m2 += deviation * (gap_s - self.gap_mean_s)
        self.last_s = now_s
        self.count += 1
        return gap_s

    @property
    def time_variance(self):
        gaps, mean = self.count - 1, self.gap_mean_s
        if gaps < 2 or mean <= 0.0:
            return 0.0
        deviation = math.sqrt(max(0.0, self.gap_m2) / gaps)
        return deviation / (mean + deviation)


class PromptHistory:
    """Accesses of each *pattern*, a chunk-aligned token prefix, in bounded memory.

    The least recently seen are forgotten first, and of one prompt the longer
    prefix before the shorter, so a pattern's own prefixes are always known.
    Some 250 bytes a pattern. Safe for concurrent use. Patterns are told apart by
    a 64-bit hash: among 200,000, two are mixed up with probability 1e-9.

    Examples
    --------
    >>> history = PromptHistory(chunk_size_tokens=2)
    >>> history.observe([1, 2, 3, 4], now_s=0).access_count
    0
    >>> seen = history.observe([1, 2, 9, 9, 9], now_s=60)  # shares one chunk
    >>> seen.access_count, seen.seconds_since_access, len(history)
    (1, 60.0, 3)
    """

    def __init__(self, chunk_size_tokens: int, max_patterns: int = 200_000) -> None:
        self.chunk_size_tokens = check_whole("chunk_size_tokens", chunk_size_tokens)
        self.max_patterns = check_whole("max_patterns", max_patterns)
        self._lock = threading.Lock()
        self._patterns: OrderedDict[int, _Pattern] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._patterns)

    def observe(self, tokens: Sequence[int], now_s: float, cache_salt: str = "") -> Observation:
        """Count an access, at `now_s` seconds, of each complete-chunk prefix of the token ids.

        A clock that goes backwards gives a gap of 0. What is under another salt is another
        tenant's: neither counts for the other.
        """
        keys = self._pattern_keys(tokens, cache_salt)
        # Within these, squared gaps stay far from the largest float.
        now_s = check_number("now_s", now_s, -1e100, 1e100)
        if not keys:
            return Observation()
        with self._lock:
            return self._count_accesses(keys, now_s)

    def perplexity(self, key: int | None) -> float | None:
        """Return the perplexity noted for the pattern, None if there is none."""
        with self._lock:
            pattern = self._patterns.get(key)
            return None if pattern is None else pattern.perplexity

    def note_perplexity(self, key: int | None, value: float) -> None:
        """Keep a pattern's perplexity (> 0) as long as the pattern; unknown keys are ignored."""
        value = _check_perplexity(value)
        with self._lock:
            if key in self._patterns:
                self._patterns[key].perplexity = value

    def _pattern_keys(self, tokens, cache_salt):
        """Return the 64-bit keys of the prefixes of 1, 2, ... complete chunks."""
        data = memoryview(_as_int64(tokens)).cast("B")
        step = 8 * self.chunk_size_tokens  # bytes
        salt = hashlib.sha256(cache_salt.encode()).digest() if cache_salt else b""
        hasher = hashlib.blake2b(digest_size=8, key=salt)
        keys = []
        for end in range(step, len(data) + 1, step):
            hasher.update(data[end - step : end])
            keys.append(int.from_bytes(hasher.digest(), "little"))
        return keys

    def _count_accesses(self, keys, now_s):
        longest, gap_s = None, 0.0
        # Longer prefixes than these would be forgotten at once; the shortest becomes the newest.
        for key in reversed(keys[: self.max_patterns]):
            pattern = self._patterns.get(key)
            if pattern is None:
                self._patterns[key] = _Pattern(now_s)
                continue
            self._patterns.move_to_end(key)
            pattern_gap_s = pattern.access(now_s)
            if longest is None:
                longest, gap_s = pattern, pattern_gap_s
        while len(self._patterns) > self.max_patterns:
            self._patterns.popitem(last=False)
        if longest is None:
            return Observation(key=keys[-1])
        return Observation(longest.count - 1, gap_s, longest.time_variance, keys[-1])


def output_perplexity(output: Any, vocab_size: int) -> float | None:
    """Return exp of the mean predictive entropy of the generated text, >= 1.

    Entropy, not the sampled token's log-probability: greedy decoding always
    takes the likeliest token, so that says little about how predictable the
    text is; and the model's own entropy does not depend on the temperature.
    The probability that the listed tokens leave is spread evenly over the rest of
    the vocabulary: an upper bound, exact where all tokens are listed. None where
    ``output.outputs[0].logprobs`` holds no usable ones; see `with_logprobs`.

    Examples
    --------
    >>> from types import SimpleNamespace as Made
    >>> position = {token: Made(logprob=math.log(0.25)) for token in range(4)}
    >>> output_perplexity(Made(outputs=[Made(logprobs=[position])]), vocab_size=1000)
    4.0
    """
    check_whole("vocab_size", vocab_size)
    try:
        entropy = _mean_entropy(output.outputs[0].logprobs, vocab_size)
    except Exception:  # an output of any other shape: a measurement must not lose the text
        return None
    return math.exp(max(0.0, entropy)) if math.isfinite(entropy) else None


def _mean_entropy(positions, vocab_size):
    """Mean entropy in nats over the positions; NaN where they hold no probabilities."""
    rows = [[entry.logprob for entry in position.values()] for position in positions if position]
    if not rows:
        return math.nan
    listed = np.array([len(row) for row in rows])  # (positions,)
    starts = np.cumsum(listed) - listed
    logprob = np.array([value for row in rows for value in row], float)  # (sum of listed,)
    logprob = np.clip(logprob, -1e4, 1.0)  # 0 * -inf is NaN; exp of a logit may overflow
    p = np.exp(logprob)
    total = np.add.reduceat(p, starts)
    if not total.max() <= 1.01:  # NaN, or an engine set to list logits
        return math.nan
    unlisted = np.maximum(vocab_size - listed, 0)
    rest = np.where(unlisted, np.maximum(1.0 - total, 0.0), 0.0)
    # 0 ln 0 counts as 0, and so does a rest that no token is left for.
    rest_nats = rest @ np.log(np.maximum(rest, 1e-99) / np.maximum(unlisted, 1))
    return float(-(p @ logprob) - rest_nats) / len(rows)


def with_logprobs(sampling_params: Any, limit: int = MEASURE_LOGPROBS) -> Any:
    """Return sampling parameters that ask for the log-probabilities of `limit` tokens.

    A changed copy; the caller's own object where it already asks for as many,
    or where that would mean something else: several sequences, chosen
    token ids, or another kind of parameters, such as vLLM's for beam search.

    Examples
    --------
    >>> from types import SimpleNamespace as Params
    >>> asked = Params(n=1, logprobs=None)
    >>> with_logprobs(asked).logprobs, asked.logprobs
    (20, None)
    """
    asked = getattr(sampling_params, "logprobs", limit)
    fewer = asked is None or (isinstance(asked, int) and 0 <= asked < limit)
    others = ("n", "best_of", "logprob_token_ids")
    if not fewer or any(getattr(sampling_params, name, None) not in (None, 1) for name in others):
        return sampling_params
    # A copy of the clone: vLLM allows clone() to return the object itself.
    asking = copy.copy(getattr(sampling_params, "clone", lambda: sampling_params)())
    asking.logprobs = limit
    return asking


@dataclass(eq=False)
class RequestMetadata:
    """Completes a request's metadata: what the caller did not give is measured.

    Parameters
    ----------
    history : PromptHistory or None
        Where accesses are counted and perplexities kept; to be set before `complete`.
    perplexity_source : str
        ``"generation"``: `output_perplexity`. ``"prompt"``: `scorer`, once per
        pattern. ``"off"``: none.
    scorer : callable
        Token ids -> perplexity (> 0), for ``"prompt"``; called by one thread at a time.
    vocab_size : int
        For `output_perplexity`. The default is Gemma-3's: few are larger, and for
        smaller ones the result is still an upper bound.

    Examples
    --------
    >>> measure = RequestMetadata(PromptHistory(2), "prompt", scorer=lambda tokens: 12.5)
    >>> metadata, sources = measure.complete({"access_count": 3}, [1, 2], None, now_s=0)
    >>> [(metadata[name], sources[name]) for name in ("access_count", "perplexity")]
    [(3.0, 'caller'), (12.5, 'prompt')]
    """

    history: PromptHistory | None
    perplexity_source: str = "generation"
    scorer: Callable[[Sequence[int]], float] | None = None
    vocab_size: int = 262_144

    def __post_init__(self) -> None:
        source, scorer = self.perplexity_source, self.scorer
        if source not in PERPLEXITY_SOURCES:
            allowed = ", ".join(map(repr, PERPLEXITY_SOURCES))
            raise ValueError(f"perplexity_source must be {allowed}, got {source!r}")
        if not callable(scorer) and (scorer is not None or source == "prompt"):
            raise ValueError(f"scorer must be callable (token ids -> perplexity), got {scorer!r}")
        self.vocab_size = check_whole("vocab_size", self.vocab_size)
        self._scoring = threading.RLock()  # so that no pattern is scored twice at once

    @property
    def logprobs_wanted(self) -> int:
        """How many log-probabilities a generated token should come with."""
        return MEASURE_LOGPROBS if self.perplexity_source == "generation" else 0

    def of_answer(self, output: Any) -> float | None:
        """Return the perplexity of an engine's answer, None where it is not to be measured."""
        wanted = self.perplexity_source == "generation"
        return output_perplexity(output, self.vocab_size) if wanted else None

    def complete(
        self,
        given: Mapping[str, Any] | None,
        tokens: Sequence[int],
        perplexity: float | None,
        now_s: float,
        cache_salt: str = "",
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Count the access; return the metadata, and by heuristic field where it is from.

        That is ``"caller"``, ``"history"``, ``"generation"``, ``"prompt"``,
        ``"remembered"`` or ``"absent"``.

        Raises
        ------
        ValueError
            As `check_metadata` of `given`; the access is counted all the same.
        """
        seen = self.history.observe(tokens, now_s, cache_salt)
        metadata = check_metadata(given)
        sources = dict.fromkeys(METADATA_FIELDS, "caller")
        for name in METADATA_FIELDS:
            if name not in metadata and hasattr(seen, name):
                metadata[name], sources[name] = getattr(seen, name), "history"
        if "perplexity" not in metadata:
            value, sources["perplexity"] = self._perplexity(seen.key, tokens, perplexity)
            if value is not None:
                metadata["perplexity"] = value
        return metadata, sources

    def _perplexity(self, key, tokens, value):
        """Return a perplexity, None if there is none, and where it came from."""
        if self.perplexity_source == "off":
            return None, "absent"
        if self.perplexity_source == "prompt":
            value = self._score(key, tokens)
        elif value is not None:
            self.history.note_perplexity(key, value)
        if value is not None:
            return value, self.perplexity_source
        value = self.history.perplexity(key)
        return value, "absent" if value is None else "remembered"

    def _score(self, key, tokens):
        """Return the pattern's noted score, else ask the scorer and note it."""
        with self._scoring:
            value = self.history.perplexity(key)
            if value is not None or key is None:
                return value
            try:
                value = _check_perplexity(self.scorer(tokens))
                self.history.note_perplexity(key, value)
            except Exception as error:  # whatever a scorer does, the text is not lost
                logger.warning("the prompt was not scored: %s: %s", type(error).__name__, error)
            return value


def _as_int64(tokens):
    try:
        if not isinstance(tokens, (str, bytes, bytearray)):  # array() would reinterpret bytes
            return array("q", tokens)
    except (TypeError, OverflowError):
        pass
    raise ValueError(f"tokens must be a sequence of integers within int64, got {tokens!r:.80}")


def _check_perplexity(value):
    field = METADATA_FIELDS["perplexity"]
    return check_number("perplexity", value, field.low, field.high, field.open_low)
