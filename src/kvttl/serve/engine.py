"""An asynchronous vLLM engine whose every generation is managed: servers are built on it."""

import copy
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import msgspec

from kvttl.serve.vllm_parts import vllm_parts
from tiered_caching import MultiTierCache

# What the caller of the current request knows about its prompt; see `compute_ttl`.
KV_METADATA: ContextVar[Mapping[str, float] | None] = ContextVar("kv_metadata", default=None)


class ManagedEngine:
    """Passes everything on to vLLM's `AsyncLLM`, and each generation to the manager.

    Parameters
    ----------
    engine : vllm.v1.engine.async_llm.AsyncLLM
        Connected to LMCache; see `LMCacheStack.engine_kwargs`.
    cache : MultiTierCache
        In background mode, or the event loop waits for every decision. Its engine is set.

    Notes
    -----
    A generation that its client gives up is managed too: its prompt was used, and
    the KV cache of what was computed is in LMCache.
    """

    def __init__(self, engine: Any, cache: MultiTierCache) -> None:
        self.unmanaged, self._cache = engine, cache
        cache.set_llm(engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unmanaged, name)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        """Return vLLM's outputs of a request, which is managed when they end.

        The request's `KV_METADATA` is what it is at this call.

        Raises
        ------
        ValueError
            For what would end the engine, or leave KV cache that nobody can manage.
        """
        prompt, salt = self._cache.admit(prompt, sampling_params, **options)
        metadata = KV_METADATA.get()
        is_unknown = "perplexity" not in (metadata or ())  # else there is nothing to measure
        sampling_params = self._cache.measurable(sampling_params, is_unknown)
        try:  # vLLM would fail later, without a word
            msgspec.msgpack.encode(sampling_params, enc_hook=repr)
        except OverflowError:
            raise ValueError("a whole number has more than 64 bits: too large for vLLM") from None
        outputs = self.unmanaged.generate(prompt, sampling_params, request_id, **options)
        return self._managed(outputs, prompt, sampling_params, metadata, salt)

    async def _managed(self, outputs, prompt, sampling_params, metadata, salt):
        start_s, answer = time.perf_counter(), None
        kind = getattr(sampling_params, "output_kind", None)
        in_parts = getattr(kind, "name", "") == "DELTA"
        vllm, refused = vllm_parts(), False
        try:
            async with aclosing(outputs):  # whoever closes this one ends the request at once
                async for output in outputs:
                    own = _own(output, in_parts)
                    if answer is None:
                        answer = own
                    else:
                        answer.add(own, aggregate=in_parts)
                        answer.num_cached_tokens = output.num_cached_tokens
                    yield output
        except (vllm.VLLMClientError, vllm.GracefulHTTPError):
            refused = True  # the engine did not take it: there is no KV cache of it
            raise
        finally:
            if not refused:
                if answer is not None:  # of several sequences the first one counts
                    answer.outputs.sort(key=attrgetter("index"))
                took_s = time.perf_counter() - start_s
                self._cache.manage(prompt, answer, metadata, took_s, salt)


def _own(output, in_parts):
    """Return an output that may be added to: the client's own does not grow."""
    own = copy.copy(output)
    own.outputs = [copy.copy(sequence) for sequence in output.outputs]
    for sequence in own.outputs if in_parts else ():
        sequence.token_ids = list(sequence.token_ids)
        if sequence.logprobs is not None:
            sequence.logprobs = sequence.logprobs[:]
    return own
