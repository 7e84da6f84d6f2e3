"""Two small threads: a bounded queue whose oldest jobs give way, and a task that repeats."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class JobQueue:
    """Hands jobs to one worker thread in order; a full queue sheds its oldest job.

    Parameters
    ----------
    work : callable
        Called with each job on the worker. An exception is logged, and the next job comes.
    shed : callable
        Called with each job that had to give way, on the thread of the newer job.
    max_jobs : int
        Jobs that may wait, >= 1.

    Examples
    --------
    >>> done = []
    >>> queue = JobQueue(done.append, shed=print, max_jobs=10)
    >>> [queue.put(number) for number in range(3)], queue.close(), done
    ([True, True, True], True, [0, 1, 2])
    """

    def __init__(
        self, work: Callable[[Any], Any], shed: Callable[[Any], Any], max_jobs: int
    ) -> None:
        if not isinstance(max_jobs, int) or isinstance(max_jobs, bool) or max_jobs < 1:
            raise ValueError(f"max_jobs must be a whole number >= 1, got {max_jobs!r}")
        self._work, self._shed, self._max_jobs = work, shed, max_jobs
        self._jobs: deque = deque()
        self._current: Any = None
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None  # starts with the first job

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Any) -> bool:
        """Add a job without waiting; False if the queue is closed."""
        shed = []
        with self._changed:
            if self._closed:
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="kv-decisions", daemon=True)
                thread.start()  # may fail: then there is no thread to wait for
                self._thread = thread
            while len(self._jobs) >= self._max_jobs:
                shed.append(self._jobs.popleft())
            self._jobs.append(job)
            self._changed.notify_all()
        for old in shed:
            self._shed(old)
        return True

    def oldest(self) -> Any:
        """Return the job that is being done, else the first that waits; None if there is none."""
        with self._changed:
            return self._current if self._busy else (self._jobs[0] if self._jobs else None)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every job put so far is done; False if `timeout_s` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more jobs, and finish those that wait; False if the time was not enough."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        done = self.flush(timeout_s)
        if done and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        return done

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, self._busy = self._jobs.popleft(), True
                self._current = job
            try:
                self._work(job)
            except Exception:
                logger.exception("a background job failed")
            finally:
                with self._changed:
                    self._busy, self._current = False, None
                    self._changed.notify_all()


class Repeater:
    """Calls a function again and again on a thread of its own, until it is closed.

    Parameters
    ----------
    task : callable
        An exception is logged, and the next turn comes.
    every_s : float
        Seconds between two calls, > 0.
    """

    def __init__(self, task: Callable[[], Any], every_s: float) -> None:
        if isinstance(every_s, bool) or not isinstance(every_s, (int, float)) or not every_s > 0:
            raise ValueError(f"every_s must be > 0 (seconds), got {every_s!r}")
        self._task, self._every_s = task, every_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def must_stop(self) -> bool:
        """Whether the calling task runs on this thread, and `close` waits for it."""
        return self._ended.is_set() and self._thread is threading.current_thread()

    def start(self) -> None:
        """Start, if it has not been started or closed yet."""
        with self._starting:  # or two callers would start two threads
            if self._thread is None and not self._ended.is_set():
                thread = threading.Thread(target=self._run, name="kv-expiry", daemon=True)
                thread.start()  # may fail: then there is no thread to wait for
                self._thread = thread

    def close(self) -> None:
        """Stop after the call that is under way."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self):
        due_s = time.monotonic() + self._every_s
        while not self._ended.wait(max(due_s - time.monotonic(), 0.0)):
            try:
                self._task()
            except Exception:
                logger.exception("a repeated task failed")
            due_s = max(due_s, time.monotonic()) + self._every_s
