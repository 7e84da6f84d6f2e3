"""One engine call at a time, however many threads ask; who waits shares the next batch.

``vllm.LLM.generate`` must not be called by two threads at once, and agent frameworks
call models from many.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from kvttl.decisions.log import DecisionRecord
from kvttl.manager.generation import prompt_digest
from tiered_caching import MultiTierCache


@dataclass(eq=False)
class Ask:
    """One prompt on its way through the engine, and what came of it.

    Parameters
    ----------
    prompt : list of int
        Token ids.
    sampling : vllm.SamplingParams
        Of this prompt.
    kv : mapping, optional
        What the caller knows about the prompt; see `MultiTierCache.generate_and_manage`.

    Attributes
    ----------
    text : str or None
        The answer.
    record : DecisionRecord or None
        The decision, where it was made before the answer was handed back.
    """

    prompt: list[int]
    sampling: Any
    kv: Any = None
    text: str | None = None
    error: Exception | None = None
    record: DecisionRecord | None = None
    waits: bool = False
    withdrawn: bool = False

    @property
    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self.text is not None or self.error is not None


class EngineDesk:
    """Where asks wait for the engine; `desk_of` returns the one of a manager."""

    def __init__(self) -> None:
        self._waiting: deque[Ask] = deque()
        self._engine = threading.Lock()

    def put(self, asks: Iterable[Ask]) -> None:
        """Let asks wait; the next batch takes them along."""
        for ask in asks:
            ask.waits = True
            self._waiting.append(ask)

    def answer(self, kv_cache: MultiTierCache, ask: Ask) -> Ask:
        """Return the ask once it is answered, together with whoever else waits.

        Raises
        ------
        Exception
            Whatever the engine said to this prompt; a bad prompt spoils no other's answer.
        """
        self.put([] if ask.waits else [ask])
        with self._engine:
            if not ask.done:
                self._serve(kv_cache, self._take(ask))
        if ask.error is not None:
            raise ask.error
        return ask

    def _take(self, ask):
        """Return all that wait; only who holds the engine takes."""
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        batch = [each for each in waiting if not (each.done or each.withdrawn)]
        return batch if ask in batch else [*batch, ask]  # taken by one who was interrupted

    def _serve(self, kv_cache, batch):
        records = kv_cache.records
        # A decision that is still due could be taken for that of an equal prompt here.
        settled, last = kv_cache.flush(0), records[-1] if records else None
        try:
            texts = _generate(kv_cache, batch)
        except Exception as error:
            if len(batch) > 1:  # one of them, perhaps: each by itself
                for ask in batch:
                    self._serve(kv_cache, [ask])
            else:
                batch[0].error = error
            return
        new = _newer(records, last) if settled and kv_cache.flush(0) else []
        for ask, text in zip(reversed(batch), reversed(texts)):
            ask.record = _pop_record(new, ask.prompt)
            ask.text = text


def _generate(kv_cache, batch):
    if len(batch) == 1:
        (ask,) = batch
        return [kv_cache.generate_and_manage(ask.prompt, ask.sampling, ask.kv)]
    columns = zip(*((ask.prompt, ask.sampling, ask.kv) for ask in batch))
    return kv_cache.generate_and_manage_batch(*map(list, columns))


def _newer(records, last):
    """Return the records after `last`, newest first; others may append meanwhile."""
    newer = []
    for record in reversed(list(records)):
        if record is last:
            break
        newer.append(record)
    return newer


def _pop_record(newest_first, prompt):
    """Return the newest decision about a prompt, and take it out; None if there is none."""
    digest = prompt_digest(prompt)
    for at, record in enumerate(newest_first):
        if record.kind == "generation" and record.prompt_digest == digest:
            return newest_first.pop(at)
    return None


_desks: WeakKeyDictionary[MultiTierCache, EngineDesk] = WeakKeyDictionary()
_desks_lock = threading.Lock()


def desk_of(kv_cache: MultiTierCache) -> EngineDesk:
    """Return the one desk of a manager; all models and tools over it share it."""
    with _desks_lock:
        return _desks.setdefault(kv_cache, EngineDesk())
