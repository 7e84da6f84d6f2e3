"""Calls of a `vllm.LLM`, each of which returns its own prompts' answers or fails.

`vllm.LLM.generate` that is interrupted (Ctrl-C, a notebook's stop button, a time-out by a
signal, an error about one request) leaves its requests in the engine, and the next call
returns their answers (vLLM issue 17738). An interrupt in the middle of vLLM's code can also
cut a message to the engine in two. So that code runs on a thread here, which no interrupt
reaches: who waits for it can be interrupted at any moment, and the thread then aborts what is
under way. Answers are taken by their request ids.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

logger = logging.getLogger(__name__)

_LOOK_S = 0.1  # an interrupt, or a dead engine, is noticed within this time
_ABORT_S = 5.0  # so long an interrupted caller waits for the abort, which then goes on without it


class EngineDied(RuntimeError):
    """The engine's process has ended; says how, and what to do.

    Parameters
    ----------
    engine_core : object
        vLLM's client of that process.
    """

    def __init__(self, engine_core: Any) -> None:
        manager = getattr(getattr(engine_core, "resources", None), "engine_manager", None)
        codes = [process.exitcode for process in getattr(manager, "processes", ())]
        code = next(filter(None, codes), None)  # None or 0 tell nothing
        how = f" (exit code {code}; -9 = killed)" if code else ""
        super().__init__(
            f"vLLM's engine has died{how}; its log says why. Start a new one: a manager takes it "
            "by set_llm(llm) and keeps its claims"
        )


def is_vllm(llm: Any) -> bool:
    """Say whether this is a `vllm.LLM`, and not a stand-in for one."""
    return hasattr(getattr(llm, "llm_engine", None), "output_processor")


class EngineCalls:
    """Calls one `vllm.LLM`; calls of several threads and managers wait for each other.

    Parameters
    ----------
    llm : vllm.LLM
        Nobody else should call it at the same time: vLLM does not allow that. What an
        interrupted call of somebody else has left in it is aborted.
    options : mapping
        For its ``generate``, which is called where it is not vLLM's own.
    """

    def __init__(self, llm: Any, options: Mapping[str, Any]) -> None:
        self._llm, self._options, self._engine = llm, options, llm.llm_engine
        # One for all who call this engine.
        self._lock = vars(self._engine).setdefault("_kvttl_calling", threading.Lock())

    def generate(
        self, prompts: Any, sampling_params: Any, **options: Any
    ) -> tuple[Sequence[Any], float]:
        """Return vLLM's outputs in the order of the prompts, and the seconds they took.

        `options` are further arguments of vLLM's ``generate``.

        Raises
        ------
        EngineDied
            The engine's process has ended.
        ValueError
            An adapter cannot be loaded. Nothing else of what vLLM raises is changed.
        """
        given_up, answer = threading.Event(), Future()
        job = (prompts, sampling_params, options, given_up, answer)
        try:
            self._start(job)
            while not answer.done():  # in slices: an exception for this thread waits for their end
                wait([answer], _LOOK_S)
            return answer.result()
        except BaseException as error:
            given_up.set()
            wait([answer], _ABORT_S)
            if type(error).__name__ == "EngineDeadError":
                raise EngineDied(self._engine.engine_core) from error
            raise

    def _start(self, job):
        try:
            threading.Thread(target=self._serve, args=job, name="kv-engine", daemon=True).start()
        except RuntimeError:  # no more threads: an answer matters more than an interrupt
            self._serve(*job)

    def _serve(self, prompts, sampling_params, options, given_up, answer):
        try:
            with self._lock:
                self._abort_unfinished("somebody else's interrupted call has left")
                start_s = time.perf_counter()
                try:
                    self._load(options.get("lora_request"))
                    outputs = self._outputs(prompts, sampling_params, options, given_up)
                finally:
                    self._abort_unfinished("an interrupted call has left")
                answer.set_result((outputs, time.perf_counter() - start_s))
        except BaseException as error:
            answer.set_exception(error)

    def _load(self, lora_requests):
        """Load adapters now: at its first request one that cannot be loaded ends the engine."""
        several = isinstance(lora_requests, (list, tuple))
        for lora in filter(None, lora_requests if several else [lora_requests]):
            try:
                self._engine.add_lora(lora)
            except Exception as error:  # vLLM raises a plain Exception, whatever it was
                if type(error).__name__ == "EngineDeadError":
                    raise
                raise ValueError(f"lora_request {lora.lora_name!r}: {error}") from error

    def _outputs(self, prompts, sampling_params, options, given_up):
        if not getattr(self._llm.generate, "__module__", "").startswith("vllm."):
            return self._llm.generate(prompts, sampling_params, **self._options, **options)
        sent = self._llm.enqueue(prompts, sampling_params, use_tqdm=False, **options)
        names = [each.partition("-")[0] for each in sent]  # vLLM appends a random part
        answers: dict[str, Any] = {}
        while not (given_up.is_set() or answers.keys() >= set(names)):
            if not self._engine.has_unfinished_requests():
                raise RuntimeError(
                    f"{len(sent)} prompts have {len(answers)} answers: somebody else has called "
                    "this vllm.LLM meanwhile, which one thread at a time may do"
                )
            if self._has_news():
                answers |= {made.request_id: made for made in self._engine.step() if made.finished}
        return [answers.get(name) for name in names]

    def _has_news(self):
        """Wait a moment for the engine's process; its client would wait for a dead one for ever."""
        core = self._engine.engine_core
        queue = getattr(core, "outputs_queue", None)
        if queue is None:  # the engine runs in this process
            return True
        with queue.not_empty:
            if queue.not_empty.wait_for(lambda: queue.queue, _LOOK_S):
                return True
        core.ensure_alive()
        return False

    def _abort_unfinished(self, whose):
        processor = self._engine.output_processor
        # Two calls: vLLM trips over a sequence that it is told to abort beside its own request.
        for requests in (processor.request_states, processor.parent_requests):
            if left := list(requests):
                logger.warning("aborting %d requests that %s in the engine", len(left), whose)
                self._engine.abort_request(left, internal=True)
