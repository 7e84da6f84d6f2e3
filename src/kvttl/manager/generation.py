"""The engine, and what is known of one generation whose KV cache is to be placed."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import math
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.inside import HINTED
from kvttl.lmcache.layout import vllm_config
from kvttl.manager.engine_calls import EngineCalls, is_vllm
from kvttl.manager.metadata import with_logprobs

logger = logging.getLogger(__name__)


class ManagedOutput(NamedTuple):
    """An engine's answer, and the decision about its prompt's KV cache.

    Parameters
    ----------
    output : vllm.RequestOutput
        As the engine returned it: ids, finish reason, all sequences.
    decision : concurrent.futures.Future of DecisionRecord
        Done at once unless the manager decides in the background. It always comes to a
        record, never to an error: a failure is a record with its reason.
    """

    output: Any
    decision: Future[DecisionRecord]


class Generation(NamedTuple):
    """The facts of a generation that a decision needs; the answer itself is not kept.

    Parameters
    ----------
    tokens : array of int
        The prompt's token ids.
    cached_tokens : int
        How many of them the engine did not have to compute.
    perplexity : float or None
        Measured from the answer.
    metadata : object
        As the caller gave it.
    prompt : str or None
        Its text, where records are to show it.
    cache_salt : str
        What its KV is kept under.
    finish_reason, output_tokens : str, int
        How its first sequence ended, and that one's tokens.
    """

    tokens: array
    cached_tokens: int
    perplexity: float | None
    metadata: Any
    prompt: str | None
    cache_salt: str = ""
    finish_reason: str | None = None
    output_tokens: int = 0

    @property
    def size_bytes(self) -> int:
        """What it takes while it waits, apart from a constant."""
        return self.tokens.itemsize * len(self.tokens) + 4 * len(self.prompt or "")


class Engine:
    """Anything with vLLM's ``generate(prompts, sampling_params)``, asked for log-probabilities.

    It is not called by two threads at once: calls from several wait for each other here.
    A `vllm.LLM` is called by `EngineCalls`, which interrupts cannot confuse.

    Parameters
    ----------
    llm : vllm.LLM
        Or a stand-in without vLLM's configuration.
    hands_over : bool
        Whether requests say that an LMCache server that decides is to wait for a manager.
    """

    def __init__(self, llm: Any, hands_over: bool = False) -> None:
        self._hands_over = hands_over
        # vLLM draws a progress bar for every call unless told not to.
        takes_tqdm = "use_tqdm" in inspect.signature(llm.generate).parameters
        self._options = {"use_tqdm": False} if takes_tqdm else {}
        self._llm, self._calling = llm, threading.Lock()
        self._calls = EngineCalls(llm, self._options) if is_vllm(llm) else None
        self._is_async = inspect.isasyncgenfunction(llm.generate)
        model = getattr(vllm_config(llm), "model_config", None)
        self.vocab_size = model.get_vocab_size() if model is not None else None
        most = getattr(model, "max_logprobs", 0)
        self._max_logprobs = math.inf if most < 0 else most  # -1 = no limit

    def generate(
        self, prompts: Any, sampling_params: Any, logprobs: int, **options: Any
    ) -> tuple[Sequence[Any], float]:
        """Return the outputs and the seconds they took, with `logprobs` a token if it can.

        `options` are further arguments of the engine's ``generate``.
        """
        if self._is_async:
            raise TypeError("an asynchronous engine: generate with it, then manage(prompt, output)")
        generate = self._calls.generate if self._calls else self._call_stand_in
        outputs, seconds = generate(prompts, self.asking(sampling_params, logprobs), **options)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        expected = 1 if is_one_prompt(prompts) else len(prompts)
        if len(outputs) != expected:  # whose answers these are cannot be known
            raise RuntimeError(f"the engine gave {len(outputs)} answers to {expected} prompts")
        return outputs, seconds

    def _call_stand_in(self, prompts, sampling_params, **options):
        with self._calling:
            start_s = time.perf_counter()
            outputs = self._llm.generate(prompts, sampling_params, **self._options, **options)
            return outputs, time.perf_counter() - start_s

    def asking(self, sampling_params: Any, logprobs: int) -> Any:
        """Return sampling parameters that ask for `logprobs` a token, or as many as it gives."""
        logprobs = min(logprobs, self._max_logprobs)
        if logprobs <= 0 and not self._hands_over:
            return sampling_params
        try:
            if isinstance(sampling_params, (list, tuple)):
                return [self._asking(each, logprobs) for each in sampling_params]
            return self._asking(sampling_params, logprobs)
        except Exception:  # the engine judges the caller's object, not we
            logger.exception("log-probabilities cannot be asked for")
            return sampling_params

    def _asking(self, sampling_params, logprobs):
        if logprobs > 0:
            sampling_params = with_logprobs(sampling_params, logprobs)
        if self._hands_over and hasattr(sampling_params, "extra_args"):
            sampling_params = copy.copy(sampling_params)
            hinted = {"kv_transfer_params": dict(HINTED)}
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), **hinted}
        return sampling_params


def is_one_prompt(prompts: Any) -> bool:
    """Say whether this is one prompt: a text, token ids, or one of vLLM's mappings."""
    if isinstance(prompts, (list, tuple)):
        return bool(prompts) and all(isinstance(token, int) for token in prompts)
    return isinstance(prompts, (str, Mapping))


def one_each(name: str, value: Any, prompts: Sequence[Any]) -> Sequence[Any]:
    """Return one value a prompt, of one for all or one each, shape (n,).

    Raises
    ------
    ValueError
        Not as many values as prompts.
    """
    each = value if isinstance(value, (list, tuple)) else [value] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{name} must have {len(prompts)} items (one a prompt), got {len(each)}")
    return each


def tokens_of(prompt: Any, tokenize: Callable[[str], Sequence[int]]) -> Sequence[int]:
    """Return a prompt's token ids where the answer has none; an embedding's are 0, as in vLLM."""
    fields = prompt if isinstance(prompt, Mapping) else {}
    if fields.get("prompt_embeds") is not None:
        return [0] * fields["prompt_embeds"].shape[-2]
    prompt = fields.get("prompt_token_ids") or fields.get("prompt", prompt)
    return tokenize(prompt) if isinstance(prompt, str) else prompt


# How models write tool calls: the marks of vLLM's parsers, and plain JSON. vLLM's engine does not
# know of calls: it says "stop".
_TOOL_CALL = re.compile(
    r"<[|\w▁｜]*(?:tool|function)[|\w▁｜]*calls?|<function=|<\|python_tag\|>|\[TOOL_CALLS\]"
    r'|\{\s*"name":\s*"[^"]*",\s*"(?:arguments|parameters)":'
)


def end_of(output: Any) -> tuple[str | None, int]:
    """Return how an answer's first sequence ended, None where it does not say, and its tokens.

    Examples
    --------
    >>> from types import SimpleNamespace as Made
    >>> said = Made(finish_reason="stop", text="<tool_call> ...", token_ids=[1, 2])
    >>> end_of(Made(outputs=[said]))
    ('tool_calls', 2)
    """
    first = next(iter(getattr(output, "outputs", None) or ()), None)
    reason, text = (getattr(first, name, None) for name in ("finish_reason", "text"))
    if reason == "stop" and isinstance(text, str) and _TOOL_CALL.search(text):
        reason = "tool_calls"
    tokens = getattr(first, "token_ids", None)
    return (reason if isinstance(reason, str) else None), len(tokens if tokens is not None else ())


def text_of(output: Any) -> str:
    """Return the text of an engine's answer."""
    return output if isinstance(output, str) else output.outputs[0].text


def compact(tokens: Iterable[int]) -> array:
    """Return token ids at 4 bytes each; 8 where one is larger.

    Examples
    --------
    >>> compact([1, 2]).itemsize, compact([1, 2**40]).itemsize
    (4, 8)
    """
    try:
        return array("i", tokens)
    except OverflowError:
        return array("q", tokens)


def prompt_digest(tokens: Sequence[int], cache_salt: str = "") -> str:
    """Name a prompt by its tokens and salt without showing them: 16 hexadecimal digits.

    Examples
    --------
    >>> prompt_digest([1, 2, 3])
    'e2e2033ae7e19d68'
    """
    salt = hashlib.sha256(cache_salt.encode()).digest() if cache_salt else b""
    return hashlib.sha256(salt + array("q", tokens).tobytes()).hexdigest()[:16]
