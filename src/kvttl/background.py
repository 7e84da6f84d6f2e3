"""Small threads: a bounded queue whose oldest jobs give way, and a task that repeats."""

import logging
import math
import numbers
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


_MOST_STUCK = 16  # jobs that more workers take the place of; each may never end
_MOST_DOUBLED = 6  # times that a repeated task is waited for twice as long as before


class BoundedDeque(deque):
    """What was put last, bounded in number and in bytes: what was put first gives way.

    Parameters
    ----------
    max_items, max_bytes : int
        The newest one is kept whatever it takes.
    size_bytes : callable
        Item -> what it takes.

    Examples
    --------
    >>> last = BoundedDeque(10, 5, len)
    >>> last.append("123"), last.append("45"), last.append("6"), list(last)
    ([], [], ['123'], ['45', '6'])
    """

    def __init__(self, max_items: int, max_bytes: float, size_bytes: Callable[[Any], int]) -> None:
        super().__init__()
        self._max_items, self._max_bytes = max_items, max_bytes
        self._size_bytes, self._bytes = size_bytes, 0

    def append(self, item: Any) -> list[Any]:
        """Keep an item as the newest; return those that gave way."""
        self._bytes += self._size_bytes(item)
        super().append(item)
        gone = []
        while len(self) > 1 and (len(self) > self._max_items or self._bytes > self._max_bytes):
            gone.append(self.popleft())
        return gone

    def popleft(self) -> Any:
        """Take the oldest item out and return it."""
        item = super().popleft()
        self._bytes -= self._size_bytes(item)
        return item

    def clear(self) -> None:
        """Forget all items."""
        super().clear()
        self._bytes = 0


class JobQueue:
    """Hands jobs to worker threads in order; a full queue sheds its oldest jobs.

    Parameters
    ----------
    work : callable
        Called with each job on a worker. An exception is logged, and the next job comes.
    shed : callable
        Called with each job that had to give way, on the thread of the newer job.
    max_jobs : int
        Jobs that may wait, >= 1.
    workers : int
        Jobs that may be under way at the same time, >= 1.
    max_bytes : int, optional
        What the jobs that wait may take; the newest may always wait.
    size_bytes : callable
        Job -> what it takes.

    Examples
    --------
    >>> done = []
    >>> queue = JobQueue(done.append, shed=print, max_jobs=10)
    >>> [queue.put(number) for number in range(3)], queue.close(), done
    ([True, True, True], True, [0, 1, 2])
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        shed: Callable[[Any], Any],
        max_jobs: int,
        *,
        workers: int = 1,
        max_bytes: float = math.inf,
        size_bytes: Callable[[Any], int] = lambda _job: 0,
    ) -> None:
        self._work, self._shed = work, shed
        self._max_workers = check_whole("workers", workers)
        max_jobs = check_whole("max_jobs", max_jobs)
        # (number, job), by number
        self._waiting = BoundedDeque(max_jobs, max_bytes, lambda waiting: size_bytes(waiting[1]))
        self._under_way: dict[int, float] = {}  # number -> since when, `time.monotonic`
        self._last_number = 0
        self._closed = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []  # start when there is work for them
        self._workers, self.restarts = self._max_workers, 0

    @property
    def busy_s(self) -> float:
        """For how long the oldest job is under way, seconds."""
        return time.monotonic() - min(list(self._under_way.values()), default=time.monotonic())

    def revive(self, stuck_s: float) -> None:
        """Start more workers in the place of those that have one job for `stuck_s` seconds."""
        since_s = time.monotonic() - stuck_s
        with self._changed:
            stuck = sum(begun_s < since_s for begun_s in self._under_way.values())
            self._max_workers = max(self._max_workers, self._workers + min(stuck, _MOST_STUCK))
            for _ in range(self._max_workers - len(self._threads) if stuck else 0):
                before = len(self._threads)
                self._start_a_worker()  # or not, where the machine has no thread left
                self.restarts += len(self._threads) - before

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, job: Any) -> bool:
        """Add a job without waiting; False if the queue is closed."""
        with self._changed:
            if self._closed:
                return False
            self._start_a_worker()
            self._last_number += 1
            gone = self._waiting.append((self._last_number, job))
            self._changed.notify_all()
        for _, old in gone:
            self._shed(old)
        return True

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every job put before this call is done; False if `timeout_s` was short."""
        with self._changed:
            last = self._last_number
            return self._changed.wait_for(lambda: self._oldest() > last, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more jobs, and finish those that wait; False if the time was not enough."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        done = self.flush(timeout_s)
        for thread in self._threads if done else ():
            if thread is not threading.current_thread():
                thread.join()
        return done

    def _start_a_worker(self):
        if len(self._threads) < self._max_workers:
            thread = threading.Thread(target=self._run, name="kv-decisions", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads
                if not self._threads:
                    raise
            else:
                self._threads.append(thread)

    def _oldest(self):
        """Return the number of the first job that is not done."""
        waiting = self._waiting[0][0] if self._waiting else math.inf
        return min(waiting, *self._under_way, math.inf)

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                number, job = self._waiting.popleft()
                self._under_way[number] = time.monotonic()
            try:
                self._work(job)
            except BaseException:  # a SystemExit would end this thread
                logger.exception("a background job failed")
            finally:
                job = None  # else an idle worker would keep it
                with self._changed:
                    self._under_way.pop(number)
                    self._changed.notify_all()


def check_whole(name, value):
    """Return a whole number >= 1, or raise a ValueError that names it."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return int(value)


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
        self._begun_s: dict[threading.Thread, float] = {}  # calls under way
        self.restarts = 0

    @property
    def busy_s(self) -> float:
        """For how long the call under way has run, seconds."""
        return time.monotonic() - self._begun_s.get(self._thread, time.monotonic())

    def revive(self, stuck_s: float) -> None:
        """Go on with another thread if this one has died, or is in one call for `stuck_s` seconds.

        Twice as long each time: each may leave a thread that never ends.
        """
        with self._starting:
            is_well = self._thread is None or self._thread.is_alive()
            if is_well and self.busy_s <= stuck_s * 2 ** min(self.restarts, _MOST_DOUBLED):
                return
            self._thread = None
            self.restarts += 1
        self.start()

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
        with self._starting:
            me, due_s = threading.current_thread(), time.monotonic() + self._every_s
        while not self._ended.wait(max(due_s - time.monotonic(), 0.0)) and self._thread is me:
            self._begun_s[me] = time.monotonic()
            try:
                self._task()
            except BaseException:  # a SystemExit would end this thread
                logger.exception("a repeated task failed")
            self._begun_s.pop(me)
            due_s = max(due_s, time.monotonic()) + self._every_s
