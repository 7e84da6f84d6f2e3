"""The engine, and one generation whose KV cache is to be placed."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvttl.lmcache.layout import BaseController, engine_config
from kvttl.manager.metadata import with_logprobs

logger = logging.getLogger(__name__)


class Generation(NamedTuple):
    """What the manager needs to know of a generation.

    Parameters
    ----------
    prompt, output : object
        As given to the engine, and its answer (vLLM's RequestOutput, or a text).
    metadata : object
        As the caller gave it.
    generate_s : float
        Seconds in the engine.
    time_s : float or None
        The manager's clock when the engine had answered; None = the clock failed.
    """

    prompt: Any
    output: Any
    metadata: Any
    generate_s: float
    time_s: float | None

    def tokens(self, controller: BaseController) -> list[int]:
        """Return the prompt's token ids: the engine's, else the controller's."""
        tokens = getattr(self.output, "prompt_token_ids", None)
        return list(tokens or controller.tokenize(self.prompt))


class Engine:
    """Anything with vLLM's ``generate(prompts, sampling_params)``, asked for log-probabilities.

    Parameters
    ----------
    llm : vllm.LLM
        Or a stand-in without vLLM's configuration.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        # vLLM draws a progress bar for every call unless told not to.
        takes_tqdm = "use_tqdm" in inspect.signature(llm.generate).parameters
        self._options = {"use_tqdm": False} if takes_tqdm else {}
        self._is_async = inspect.isasyncgenfunction(llm.generate)
        model = getattr(engine_config(llm), "model_config", None)
        self.vocab_size = model.get_vocab_size() if model is not None else None
        most = getattr(model, "max_logprobs", 0)
        self._max_logprobs = math.inf if most < 0 else most  # -1 = no limit

    def generate(self, prompts: Any, sampling_params: Any, logprobs: int) -> tuple[Any, float]:
        """Return the outputs and the seconds they took, with `logprobs` a token if it can."""
        if self._is_async:
            raise TypeError("an asynchronous engine: generate with it, then manage(prompt, output)")
        asked = self.asking(sampling_params, logprobs)
        start_s = time.perf_counter()
        outputs = self._llm.generate(prompts, asked, **self._options)
        return outputs, time.perf_counter() - start_s

    def asking(self, sampling_params: Any, logprobs: int) -> Any:
        """Return sampling parameters that ask for `logprobs` a token, or as many as it gives."""
        logprobs = min(logprobs, self._max_logprobs)
        if logprobs <= 0:
            return sampling_params
        try:
            if isinstance(sampling_params, (list, tuple)):
                return [with_logprobs(each, logprobs) for each in sampling_params]
            return with_logprobs(sampling_params, logprobs)
        except Exception:  # the engine judges the caller's object, not we
            logger.exception("log-probabilities cannot be asked for")
            return sampling_params


def metadata_of_each(prompts: Sequence[Any], metadata: Any) -> Sequence[Mapping | None]:
    """Return a batch's metadata, shape (n,): one for all prompts, or one each.

    Raises
    ------
    ValueError
        Not as many metadata as prompts.
    """
    each = metadata if isinstance(metadata, (list, tuple)) else [metadata] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"metadata must have {len(prompts)} items (one a prompt), got {len(each)}")
    return each


def text_of(output: Any) -> str:
    """Return the text of an engine's answer."""
    return output if isinstance(output, str) else output.outputs[0].text


def prompt_digest(tokens: Sequence[int]) -> str:
    """Name a prompt by its tokens without showing them: 16 hexadecimal digits.

    Examples
    --------
    >>> prompt_digest([1, 2, 3])
    'e2e2033ae7e19d68'
    """
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()[:16]
