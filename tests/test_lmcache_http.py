"""Faults of a service that a real LMCache cannot be made to show, and the circuit breaker.

The server below plays only those faults; everything that LMCache really does
is tested against a real one in the other files.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvttl.lmcache.client import CircuitBreaker, LMCacheError, LMCacheHTTP, LMCacheUnavailable

FOUND = {"results": [{"key": "k"}]}
READ_TIMEOUT_S = 0.3
RETRY_AFTER_S = 0.15


class FaultyService(ThreadingHTTPServer):
    """Answers each request as the next of `plan` says, and as its last from then on."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address=("127.0.0.1", 0)):
        super().__init__(address, _Handler)
        self.plan = ["ok"]
        self.delay_s = 0.0
        self.body = json.dumps(FOUND).encode()
        self.seen = []  # (method, path) of every request that arrived
        self.connections = set()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_fault(self):
        return self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]

    def handle_error(self, request, client_address):
        """Clients that hung up are the point here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open between calls

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path))
        self.server.connections.add(self.client_address)
        getattr(self, "play_" + self.server.next_fault())()

    do_GET = do_DELETE = do_POST

    def log_message(self, *args):
        """Quiet."""

    def answer(self, status=200, body=None, length=None):
        body = self.server.body if body is None else body
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def play_ok(self):
        time.sleep(self.server.delay_s)
        self.answer()

    def play_refuse(self):
        self.answer(500, b"disk on fire" + b"!" * 1000)

    def play_hang(self):
        self.server.released.wait(10)
        self.close_connection = True

    def play_stall(self):
        """Half an answer, then nothing."""
        self.answer(body=b'{"res', length=100)
        self.play_hang()

    def play_hang_up(self):
        """Close without a word."""
        self.close_connection = True

    def play_hang_up_midway(self):
        """Half an answer, then close."""
        self.answer(body=b'{"res', length=100)
        self.close_connection = True

    def play_then_close(self):
        """A whole answer; then close the connection that was promised to stay."""
        self.answer()
        self.close_connection = True


@pytest.fixture
def service():
    with FaultyService() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def client(service):
    with_limits = LMCacheHTTP(
        service.url, read_timeout_s=READ_TIMEOUT_S, retry_after_s=RETRY_AFTER_S
    )
    yield with_limits
    with_limits.close()


def lookup(client):
    return client.lookup({"token_ids": [1, 2, 3]})


def time_of(call, *args):
    """Seconds until `call` gives up."""
    start_s = time.perf_counter()
    with pytest.raises(LMCacheUnavailable):
        call(*args)
    return time.perf_counter() - start_s


# --- the circuit breaker ------------------------------------------------------------------


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def breaker(now):
    return CircuitBreaker(retry_after_s=1.0, timer=lambda: now[0])


def admit(breaker):
    """What becomes of a call: it is made, or at most a trial."""
    trials = []
    try:
        breaker.check("it", ConnectionError, lambda: trials.append("trial"))
    except ConnectionError:
        return next(iter(trials), None)
    return "call"


def test_a_closed_breaker_admits_every_call(breaker):
    assert [admit(breaker) for _ in range(5)] == ["call"] * 5


def test_an_open_breaker_admits_one_trial_a_period(breaker, now):
    breaker.failed("refused")
    assert breaker.reason == "refused"
    admitted = []
    for _ in range(40):  # ten seconds in quarters
        admitted.append(admit(breaker))
        now[0] += 0.25
    assert set(admitted) == {None, "trial"}
    assert [at for at, kind in enumerate(admitted) if kind] == list(range(4, 40, 4))


def test_a_failed_trial_waits_a_whole_period_again(breaker, now):
    breaker.failed("refused")
    now[0] += 1.0
    assert admit(breaker) == "trial"
    now[0] += 0.5  # the trial took that long
    breaker.failed("no answer in time")
    assert breaker.reason == "no answer in time"
    now[0] += 0.99
    assert admit(breaker) is None
    now[0] += 0.01
    assert admit(breaker) == "trial"


def test_success_closes_at_once(breaker, now):
    breaker.failed("refused")
    now[0] += 1.0
    assert admit(breaker) == "trial"
    breaker.succeeded()
    assert [admit(breaker) for _ in range(3)] == ["call"] * 3


def test_of_many_threads_one_makes_the_trial(breaker, now):
    breaker.failed("refused")
    now[0] += 1.0
    start, admitted = threading.Barrier(16), []

    def ask():
        start.wait()
        admitted.append(admit(breaker))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(admitted, key=str) == [None] * 15 + ["trial"]


# --- answers that make no sense -----------------------------------------------------------


def test_a_good_answer_takes_one_request(service, client):
    assert lookup(client) == FOUND["results"]
    assert service.seen == [("POST", "/directory/lookup")]


def test_a_refusal_is_not_retried_and_says_the_services_words(service, client):
    service.plan = ["refuse"]
    with pytest.raises(LMCacheError, match="answered 500: disk on fire") as error:
        lookup(client)
    assert f"POST {service.url}/directory/lookup" in str(error.value)
    assert len(str(error.value)) < 500
    assert len(service.seen) == 1


def test_a_refusal_does_not_open_the_breaker(service, client):
    service.plan = ["refuse", "ok"]
    with pytest.raises(LMCacheError):
        lookup(client)
    assert lookup(client) == FOUND["results"]


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", "no JSON object"),
        (b"<html>Bad Gateway</html>", "no JSON object: <html>Bad Gateway"),
        (b'{"results": [', "no JSON object"),
        (b"\xff\xfe\x00", "no JSON object"),
        (b"null", "no JSON object: null"),
        (b"7", "no JSON object: 7"),
        (b"[1, 2]", "no JSON object"),
        (b"{}", "without 'results'"),
        (b'{"error": "what?"}', "without 'results'"),
    ],
)
def test_a_senseless_answer_is_an_error_that_names_the_url(service, client, body, words):
    service.body = body
    with pytest.raises(LMCacheError, match=words) as error:
        lookup(client)
    assert f"{service.url}/directory/lookup" in str(error.value)
    assert len(service.seen) == 1
    service.body = json.dumps(FOUND).encode()
    assert lookup(client) == FOUND["results"]  # it is not away: the breaker stayed closed


# --- connections --------------------------------------------------------------------------


def test_calls_share_one_connection(service, client):
    for _ in range(3):
        lookup(client)
    assert len(service.seen) == 3 and len(service.connections) == 1


def test_a_connection_closed_between_calls_is_replaced(service, client):
    service.plan = ["then_close", "then_close", "ok"]
    for _ in range(3):
        assert lookup(client) == FOUND["results"]
        time.sleep(0.05)  # until the close has arrived
    assert len(service.seen) == 3 and len(service.connections) == 3


@pytest.mark.parametrize("failures", [1, 2])
def test_a_closed_connection_is_retried(service, client, failures):
    service.plan = ["hang_up"] * failures + ["ok"]
    assert lookup(client) == FOUND["results"]
    assert len(service.seen) == failures + 1


def test_retries_of_a_closed_connection_are_bounded(service, client):
    service.plan = ["hang_up"]
    with pytest.raises(LMCacheUnavailable, match=f"{service.url} is away: "):
        lookup(client)
    assert len(service.seen) == 3


def test_an_answer_cut_short_is_unavailable(service, client):
    service.plan = ["hang_up_midway"]
    with pytest.raises(LMCacheUnavailable, match="is away"):
        lookup(client)
    assert 1 <= len(service.seen) <= 3


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_a_hanging_service_costs_one_time_limit_once(service, client, fault):
    service.plan = [fault]
    assert READ_TIMEOUT_S <= time_of(lookup, client) < READ_TIMEOUT_S + 1
    assert len(service.seen) == 1  # a time limit is not retried
    with pytest.raises(LMCacheUnavailable, match="no answer in time"):
        lookup(client)
    assert len(service.seen) == 1  # and the breaker is open now


def test_a_refused_connection_says_so():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        client = LMCacheHTTP(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(LMCacheUnavailable, match="Connection refused"):
            lookup(client)


# --- while a service is away --------------------------------------------------------------


def test_an_open_breaker_asks_nobody(service, client):
    service.plan = ["hang"]
    time_of(lookup, client)
    asked = len(service.seen)
    for _ in range(50):
        time_of(lookup, client)
    assert len(service.seen) == asked


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_looking_for_a_hanging_service_costs_its_callers_nothing(service, fault):
    service.plan = [fault]
    limit_s = 4.0  # a look in the caller's own thread would take as long
    client = LMCacheHTTP(service.url, read_timeout_s=limit_s, retry_after_s=RETRY_AFTER_S)
    assert time_of(lookup, client) >= limit_s
    time.sleep(RETRY_AFTER_S)
    assert time_of(lookup, client) < limit_s / 2
    deadline_s = time.monotonic() + 10
    while len(service.seen) < 2:  # the look that this call has begun
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    client.close()


def test_a_trial_is_not_retried(service, client):
    service.plan = ["hang_up"]
    time_of(lookup, client)
    time.sleep(RETRY_AFTER_S)
    asked = len(service.seen)
    time_of(lookup, client)
    time.sleep(RETRY_AFTER_S / 2)
    assert len(service.seen) == asked + 1


def test_a_slow_service_is_found_again(service, client):
    """It answers later than a generation could wait, but it does answer."""
    service.plan = ["hang_up"] * 3 + ["ok"]
    time_of(lookup, client)
    service.delay_s = 0.06
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        try:
            assert lookup(client) == FOUND["results"]
            return
        except LMCacheUnavailable:
            time.sleep(0.02)
    raise AssertionError("never found again")


def test_managing_resumes_by_itself(service, client):
    service.plan = ["hang", "ok"]
    time_of(lookup, client)
    failed_s = time.monotonic()
    while True:
        try:
            answer = lookup(client)
            break
        except LMCacheUnavailable:
            time.sleep(0.005)
            assert time.monotonic() < failed_s + 20 * RETRY_AFTER_S
    assert answer == FOUND["results"]
    assert time.monotonic() - failed_s >= RETRY_AFTER_S * 0.9
    assert lookup(client) == FOUND["results"]


def test_one_service_away_leaves_the_others_alone(service, client):
    with FaultyService() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        entry = {"instance_id": "i", "ip": "127.0.0.1", "http_port": server.server_port}
        service.body = json.dumps({"instances": [entry], **FOUND}).encode()
        server.plan = ["hang"]
        time_of(client.ping, "i")
        assert lookup(client) == FOUND["results"]
        server.released.set()
        server.shutdown()


def test_a_server_unknown_to_the_coordinator_is_named(service, client):
    entry = {"instance_id": "other", "ip": "127.0.0.1", "http_port": 1}
    service.body = json.dumps({"instances": [entry]}).encode()
    with pytest.raises(LMCacheUnavailable, match=r"no LMCache server 'mine' .*known: other"):
        client.ping("mine")
