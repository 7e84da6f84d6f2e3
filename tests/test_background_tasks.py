"""The bounded queue and the repeater: nothing is lost, nothing waits, nothing dies of an error."""

from __future__ import annotations

import threading
import time

import pytest

from kvttl.background import JobQueue, Repeater


@pytest.fixture
def gate():
    """An event that lets jobs pass; opened at the end whatever happens."""
    event = threading.Event()
    yield event
    event.set()


def wait_until(condition, limit_s=10.0):
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.001)


def blocked_queue(gate, max_jobs, shed=None):
    """Return a queue whose worker holds job 0 until the gate opens, and what it has done."""
    done, started = [], threading.Event()

    def work(job):
        started.set()
        gate.wait(10)
        done.append(job)

    queue = JobQueue(work, [].append if shed is None else shed.append, max_jobs)
    queue.put(0)
    assert started.wait(10)
    return queue, done


def test_jobs_are_done_in_order_on_another_thread():
    seen = []
    queue = JobQueue(lambda job: seen.append((job, threading.get_ident())), print, 1000)
    assert all(queue.put(number) for number in range(500))
    assert queue.flush(10)
    assert [job for job, _ in seen] == list(range(500))
    assert {thread for _, thread in seen}.isdisjoint({threading.get_ident()})
    assert queue.close(10)


def test_put_does_not_wait_for_a_busy_worker(gate):
    queue, done = blocked_queue(gate, max_jobs=10)
    for number in range(1, 6):
        assert queue.put(number)
    assert (len(queue), done) == (5, [])
    gate.set()
    assert queue.flush(10) and done == list(range(6))


def test_flush_waits_for_the_job_under_way(gate):
    queue, done = blocked_queue(gate, max_jobs=10)
    assert len(queue) == 0  # taken, not done
    assert queue.flush(0.02) is False
    gate.set()
    assert queue.flush(10) is True and done == [0]


def test_flush_and_close_of_a_queue_that_never_had_a_job():
    queue = JobQueue(print, print, 1)
    assert queue.flush(0) and queue.close(0)


def test_a_full_queue_sheds_its_oldest_on_the_putting_thread(gate):
    shed = []
    queue, done = blocked_queue(gate, 2, shed)
    for number in range(1, 7):
        assert queue.put(number)
    assert shed == [1, 2, 3, 4]
    gate.set()
    assert queue.close(10) and done == [0, 5, 6]


def test_close_finishes_what_waits_and_takes_no_more(gate):
    queue, done = blocked_queue(gate, max_jobs=10)
    queue.put(1)
    assert queue.close(0.02) is False  # not enough time: nothing is thrown away
    assert queue.put(2) is False
    gate.set()
    assert queue.close(10) and done == [0, 1]
    assert queue.close(10) and queue.flush(10)  # again does no harm


def test_a_failing_job_does_not_stop_the_next(caplog):
    done = []
    queue = JobQueue(lambda job: done.append(1 / job), print, 10)
    for job in (1, 0, 2):
        queue.put(job)
    assert queue.close(10) and done == [1.0, 0.5]
    assert "ZeroDivisionError" in caplog.text


def test_sixteen_threads_every_job_is_done_or_shed_once():
    done, shed = [], []
    queue = JobQueue(done.append, shed.append, 3)
    start = threading.Barrier(16)

    def work(name):
        start.wait()
        for number in range(200):
            assert queue.put((name, number))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.close(10)
    assert sorted(done + shed) == [(n, m) for n in range(16) for m in range(200)]
    for name in range(16):  # what is done of one thread keeps its order
        mine = [number for who, number in done if who == name]
        assert mine == sorted(mine)


@pytest.mark.parametrize("max_jobs", [0, -1, 1.0, True, None, "3"])
def test_a_bound_that_is_none(max_jobs):
    with pytest.raises(ValueError, match="max_jobs must be a whole number >= 1, got"):
        JobQueue(print, print, max_jobs)


def test_the_repeater_repeats_until_closed_and_survives_errors(caplog):
    times = []

    def task():
        times.append(time.monotonic())
        if len(times) == 2:
            raise ZeroDivisionError

    repeater = Repeater(task, 0.005)
    assert not times  # not before start
    repeater.start()
    wait_until(lambda: len(times) >= 4)
    repeater.close()
    count = len(times)
    time.sleep(0.03)
    assert len(times) == count
    assert "ZeroDivisionError" in caplog.text
    repeater.start()  # closed is closed
    repeater.close()
    assert len(times) == count


def test_close_waits_for_the_call_under_way(gate):
    started, ended = threading.Event(), []

    def task():
        started.set()
        gate.wait(10)
        ended.append(True)

    repeater = Repeater(task, 0.001)
    repeater.start()
    assert started.wait(10)
    threading.Timer(0.03, gate.set).start()
    repeater.close()
    assert ended


def test_a_late_repeater_does_not_hurry_after_missed_turns():
    times = []

    def task():
        times.append(time.monotonic())
        time.sleep(0.2 if len(times) == 1 else 0)

    repeater = Repeater(task, 0.05)
    repeater.start()
    wait_until(lambda: len(times) >= 4)
    repeater.close()
    assert min(later - time_s for time_s, later in zip(times[1:], times[2:])) > 0.01


def test_sixteen_starts_at_once_are_one_thread(monkeypatch):
    started, start = [], threading.Barrier(16)

    class Slow(threading.Thread):
        def __init__(self, **options):
            time.sleep(0.01)
            super().__init__(**options)

        def start(self):
            started.append(self)
            super().start()

    repeater = Repeater(lambda: None, 60.0)
    callers = [threading.Thread(target=lambda: (start.wait(), repeater.start())) for _ in range(16)]
    with monkeypatch.context() as patch:
        patch.setattr("kvttl.background.threading.Thread", Slow)
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    repeater.close()
    assert len(started) == 1 and not started[0].is_alive()


@pytest.mark.parametrize("every_s", [0, -1, float("nan"), True, None, "1"])
def test_an_interval_that_is_none(every_s):
    with pytest.raises(ValueError, match="every_s must be > 0"):
        Repeater(print, every_s)


def test_flush_waits_only_for_what_was_put_before_it():
    """Under steady traffic the queue is never empty."""
    queue_holder, done = [], []

    def work(job):
        done.append(job)
        queue_holder[0].put(job + 1)  # there is always another one

    queue = JobQueue(work, print, 1000)
    queue_holder.append(queue)
    queue.put(0)
    assert queue.flush(10) and 0 in done
    queue.close(0)


def test_shed_jobs_are_not_waited_for(gate):
    shed = []
    queue, done = blocked_queue(gate, 1, shed)
    for number in range(1, 4):
        queue.put(number)
    gate.set()
    assert queue.flush(10) and (shed, done) == ([1, 2], [0, 3])


def test_bytes_are_bounded_and_the_newest_may_always_wait(gate):
    started, done, shed = threading.Event(), [], []

    def work(job):
        started.set()
        gate.wait(10)
        done.append(job)

    queue = JobQueue(work, shed.append, 100, max_bytes=10, size_bytes=len)
    queue.put("under way")
    assert started.wait(10)
    for job in ("1234", "12345", "12", "123456789012"):
        queue.put(job)
    assert shed == ["1234", "12345", "12"] and len(queue) == 1
    gate.set()
    assert queue.close(10) and done == ["under way", "123456789012"]


def test_workers_work_at_the_same_time():
    meet, done = threading.Barrier(3), []  # passes only if three are inside at once

    def work(job):
        meet.wait(10)
        done.append(job)

    queue = JobQueue(work, print, 100, workers=3)
    for number in range(6):
        queue.put(number)
    assert queue.close(20) and sorted(done) == list(range(6))
