"""The stack is started, attached to, broken and stopped for real; nothing here is simulated."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import redis
from redis_fixtures import redis_server
from waiting import take_ctrl_c

from cache_controller import LMCacheController
from kvttl.stack import services
from kvttl.stack.lifecycle import LMCacheStack, PortTakenError, StackConfig, StackError, load_config
from kvttl.stack.process import CHILD_MODULE, load_state
from kvttl.stack.services import pick_ports

ROOT = Path(__file__).resolve().parent.parent
MODEL = "org/some-model"
ON_DISK, IN_REDIS = "11" * 32, "22" * 32  # chunk hashes


def settings(folder: Path, **overrides) -> StackConfig:
    """A small stack whose files all lie in `folder`."""
    values = {
        "l1_size_gb": 0.05,
        "disk_path": str(folder / "disk"),
        "run_dir": str(folder / "run"),
        "registration_heartbeat_s": 0.5,
        "redis_verify_s": 0.5,
        **overrides,
    }
    return load_config(ROOT / "config.yaml", **values)


def own_ports() -> dict:
    """Four free ports as settings, for stacks that must be found again."""
    names = ("coordinator_port", "server_port", "server_http_port", "redis_port")
    return dict(zip(names, pick_ports("127.0.0.1", 4), strict=True))


def listening(stack_config: StackConfig) -> list[int]:
    """Ports of the stack on which something still listens."""
    ports = [
        stack_config.coordinator_port,
        stack_config.server_port,
        stack_config.server_http_port,
        stack_config.redis_port,
    ]
    busy = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return [port for port in ports if port in busy]


def running_in(folder: Path) -> list[psutil.Process]:
    """Service processes whose command line names `folder` (our settings are unique)."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and CHILD_MODULE in line and process.info["status"] != "zombie":
            found.append(process)
    return found


@contextlib.contextmanager
def squatting():
    """A program that holds a port and never answers."""
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        yield squatter


def wait_until(condition, timeout_s: float = 20.0) -> None:
    """Wait for `condition()`; the assertion fails if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def chunk_file(folder: Path, chunk_hash: str, size_bytes: int = 64) -> Path:
    """A chunk as LMCache's fs adapter names it."""
    file = folder / "disk" / f"{MODEL.replace('/', '-SEP-')}@0x01000100@0@{chunk_hash}.data"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size_bytes)
    return file


def placements(stack: LMCacheStack) -> dict[tuple[str, str], int]:
    """What the coordinator's directory says: (chunk hash, backend) -> size, bytes."""
    with urllib.request.urlopen(f"{stack.coordinator_url}/directory/keys", timeout=5) as answer:
        rows = json.load(answer)["keys"]
    return {
        (row["key"]["chunk_hash_hex"], p["backend"]): p["size_bytes"]
        for row in rows
        for p in row["placements"]
    }


def delete_from_redis(stack: LMCacheStack, chunk_hash: str) -> None:
    """Let LMCache itself delete a chunk from its remote tier."""
    key = {"chunk_hash_hex": chunk_hash, "model_name": MODEL, "kv_rank": 0x01000100}
    body = json.dumps({"keys": [key], "tier": "l2", "adapter": "resp"}).encode()
    request = urllib.request.Request(
        f"{stack.server_http_url}/cache/objects",
        body,
        method="DELETE",
        headers={"content-type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def stack(folder):
    """One stack for the tests that leave it whole, with a chunk of an earlier run on disk.

    Another program takes one of the ports it picks first, so it has to pick again.
    """
    chunk_file(folder, ON_DISK)
    (folder / "disk" / "notes.txt").write_text("not a chunk")
    picks = []

    def pick(host, count):
        picks.append(pick_ports(host, count))
        if len(picks) == 1:
            picks[0][0] = squatter.getsockname()[1]
        return picks[-1]

    with squatting() as squatter, pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "pick_ports", pick)
        one = LMCacheStack(settings(folder), free_ports=True).start()
    with one:
        assert len(picks) == 2
        yield one
    assert not running_in(folder), "stop() left a process behind"
    assert listening(one.config) == [], "stop() left a listening port behind"
    assert not any((folder / "run").iterdir()), "a clean stop keeps no logs"


# ---- a running stack --------------------------------------------------------


def test_all_services_are_ready_on_free_ports(stack):
    health = stack.health()
    assert list(health) == ["redis", "coordinator", "server"]
    assert all(state["ready"] and state["started_here"] for state in health.values())
    assert redis.Redis.from_url(stack.redis_url).ping()
    assert len(listening(stack.config)) == 4
    assert f":{stack.port}" in stack.coordinator_url and stack.port != 9000


def test_every_socket_is_on_loopback(stack):
    pids = {
        p.pid
        for state in stack.health().values()
        for p in [
            psutil.Process(state["pid"]),
            *psutil.Process(state["pid"]).children(recursive=True),
        ]
    }
    hosts = {
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.pid in pids and c.status == psutil.CONN_LISTEN
    }
    assert hosts == {"127.0.0.1"}


@pytest.mark.parametrize("path, body", [("/env", None), ("/run_script", b"script=1")])
def test_risky_routes_are_closed(stack, path, body):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(stack.server_http_url + path, body, timeout=5)
    assert caught.value.code == 404


def test_services_report_nothing_outside(stack):
    env = psutil.Process(stack.health()["server"]["pid"]).environ()
    assert (env["LMCACHE_TRACK_USAGE"], env["DO_NOT_TRACK"]) == ("false", "1")


def test_files_of_an_earlier_run_are_in_the_directory(stack):
    assert placements(stack) == {(ON_DISK, "fs"): 64}


def test_engine_arguments_point_at_this_stack(stack):
    kwargs = stack.engine_kwargs("m", max_model_len=64)
    assert kwargs["kv_transfer_config"].kv_connector_module_path == "kvttl.stack.engine_connector"
    extra = kwargs["kv_transfer_config"].kv_connector_extra_config
    assert extra["lmcache.mp.port"] == stack.server_port
    assert (kwargs["block_size"], kwargs["max_model_len"]) == (stack.config.block_size_tokens, 64)
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"]


def test_attaching_uses_the_stack_and_does_not_stop_it(stack):
    with LMCacheStack(stack.config) as second:
        assert second.started == []
        assert "not started here" in second.logs("server")
        with pytest.raises(StackError, match="left alone"):
            second.kill("server")
    assert all(state["ready"] for state in stack.health().values())


def test_attaching_with_other_settings_is_refused(stack):
    other = load_config(ROOT / "config.yaml", **{**vars(stack.config), "chunk_size_tokens": 64})
    with pytest.raises(StackError, match="chunk_size_tokens = 32, but 64"):
        LMCacheStack(other).start()


def test_a_running_stack_is_an_error_for_who_does_not_attach(stack):
    with pytest.raises(PortTakenError, match="is in use by .*ATTACH=1.*set stack"):
        LMCacheStack(stack.config, attach=False).start()
    assert all(state["ready"] for state in stack.health().values())


def test_a_tier_that_takes_no_writes_is_said_while_it_does(stack, folder):
    controller = LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)
    wait_until(lambda: controller.tier_errors() == {}, 120)
    disk = folder / "disk"
    disk.rename(folder / "elsewhere")
    disk.touch()
    wait_until(lambda: controller.tier_errors() == {"disk": "it is a file, not a folder"}, 120)
    disk.unlink()
    (folder / "elsewhere").rename(disk)
    wait_until(lambda: controller.tier_errors() == {}, 120)
    controller.close()


def test_unknown_service_is_a_value_error(stack):
    with pytest.raises(ValueError, match="unknown service 'disk'"):
        stack.kill("disk")
    with pytest.raises(StackError, match="still running"):
        stack.start_one("redis")


def test_directory_survives_a_killed_coordinator(stack):
    before = placements(stack)
    stack.kill("coordinator")
    assert not stack.health()["coordinator"]["ready"]
    stack.start_one("coordinator")
    assert placements(stack) == before != {}
    assert stack.health()["server"]["ready"], "the server has signed up again"


def test_killed_server_comes_back_with_a_correct_directory(stack, folder):
    port = stack.server_port
    key = f"{MODEL}@01000100@0@{IN_REDIS}"
    redis.Redis.from_url(stack.redis_url).set(key, b"y" * 32)
    stack.kill("server")
    chunk_file(folder, ON_DISK).unlink()
    stack.start_one("server")
    assert stack.server_port == port
    assert placements(stack) == {(IN_REDIS, "resp"): 32}
    assert "directory corrected: {'disk': 1, 'remote': 1}" in stack.logs("server", 200)


# ---- errors at start --------------------------------------------------------


@pytest.mark.parametrize(
    "field, service",
    [
        ("coordinator_port", "coordinator"),
        ("redis_port", "redis"),
        ("server_http_port", "server"),
        ("server_port", "server"),
    ],
)
def test_port_in_use_names_port_and_remedy(tmp_path, field, service):
    with squatting() as squatter:
        ports = {**own_ports(), field: squatter.getsockname()[1]}
        with pytest.raises(PortTakenError) as caught:
            LMCacheStack(settings(tmp_path, **ports)).start()
    message = str(caught.value)
    assert all(
        part in message for part in (str(ports[field]), field, service, "make down", "free ports")
    )
    assert not running_in(tmp_path)


def test_port_taken_between_check_and_bind(tmp_path, monkeypatch):
    """The child finds out itself: still the same clear error, with its log."""
    monkeypatch.setattr(services, "check_ports_free", lambda *_: None)
    monkeypatch.setattr(services, "running_services", lambda *_: [])
    with squatting() as squatter:
        port = squatter.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"(?s)port {port} \(redis_port\).*Errno 98"):
            LMCacheStack(settings(tmp_path, **{**own_ports(), "redis_port": port})).start()
    assert not running_in(tmp_path)


def test_child_that_dies_is_one_error_with_its_log(tmp_path, monkeypatch):
    def wrong_folder(config):  # the checks at the start see nothing: it is spoilt afterwards
        (tmp_path / "disk").rmdir()
        (tmp_path / "disk").write_text("a file where LMCache wants a folder")

    monkeypatch.setattr(services, "check_shares_nothing", wrong_folder)
    with pytest.raises(StackError, match=r"server ended at start with exit code \d+") as caught:
        LMCacheStack(settings(tmp_path), free_ports=True).start()
    assert "NotADirectoryError" in str(caught.value) and "server.log" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 16
    assert not running_in(tmp_path)


def test_too_short_a_timeout_says_so(tmp_path):
    with pytest.raises(StackError, match=r"was not ready after 1 s \(start_timeout_s\)"):
        LMCacheStack(settings(tmp_path, start_timeout_s=1), free_ports=True).start()
    assert not running_in(tmp_path)


def test_missing_redis_is_one_error(tmp_path):
    dead = pick_ports("127.0.0.1", 1)[0]
    with pytest.raises(StackError, match=f"Redis at 127.0.0.1:{dead} cannot be used: no Redis"):
        LMCacheStack(
            settings(tmp_path, redis_url=f"redis://127.0.0.1:{dead}"), free_ports=True
        ).start()
    assert not running_in(tmp_path)


# ---- a real Redis -----------------------------------------------------------


def test_redis_with_password_by_url(tmp_path):
    with redis_server(password="s3cretword") as url:
        wrong = settings(tmp_path, redis_url=url.replace("s3cretword", "wr0ngword"))
        with pytest.raises(
            StackError, match="refused the user or password; see redis_url"
        ) as caught:
            LMCacheStack(wrong, free_ports=True).start()
        assert "wr0ngword" not in str(caught.value)
        client = redis.Redis.from_url(url)
        client.set(f"{MODEL}@01000100@0@{IN_REDIS}", b"y" * 32)
        with LMCacheStack(settings(tmp_path, redis_url=url), free_ports=True) as one:
            assert one.started == ["coordinator", "server"]
            assert one.redis_url == url
            assert placements(one) == {(IN_REDIS, "resp"): 32}
            delete_from_redis(one, IN_REDIS)
            assert client.keys() == [], "LMCache got past the password"
            server = psutil.Process(one.health()["server"]["pid"])
            shown = [
                " ".join(server.cmdline()),
                repr(one.config),
                json.dumps(one.health()),
                one.logs("server", 1000),
                one.logs("coordinator", 1000),
            ]
            shown.append(
                urllib.request.urlopen(f"{one.server_http_url}/config", timeout=5).read().decode()
            )
            assert not any("s3cretword" in text for text in shown)
        assert client.ping(), "an attached Redis is not stopped"


# ---- owners that die --------------------------------------------------------

OWNER = """
import sys, time
from kvttl.stack.lifecycle import LMCacheStack, load_config
folder = sys.argv[1]
config = load_config(disk_path=folder + "/disk", run_dir=folder + "/run", l1_size_gb=0.05)
with LMCacheStack(config, free_ports=True) as stack:
    print("ready", flush=True)
    time.sleep(120)
"""


def owner(folder: Path) -> subprocess.Popen:
    """A Python process of its own that runs a stack."""
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "src"},
        preexec_fn=take_ctrl_c,
    )


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """Two owners that start at the same time, each on its own free ports."""
    folders = [tmp_path_factory.mktemp("owner") for _ in range(2)]
    processes = [owner(one) for one in folders]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    yield list(zip(processes, folders, strict=True))
    for process in processes:
        process.kill()
        process.wait()


def test_children_die_with_a_killed_owner(owners):
    process, folder = owners[0]
    assert len(running_in(folder)) == 2  # Redis' command line names no folder
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(c.is_running() and c.status() != "zombie" for c in children), 8)


def test_ctrl_c_stops_everything(owners):
    process, folder = owners[1]
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert not any(c.is_running() and c.status() != "zombie" for c in children)
    assert not running_in(folder)


def test_child_of_a_dead_owner_ends_at_once(tmp_path):
    """Even an owner that died while the child was still starting is noticed."""
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    port = str(pick_ports("127.0.0.1", 1)[0])
    orphan = subprocess.Popen(
        [sys.executable, "-m", CHILD_MODULE, gone.stdout.strip(), "redis", "127.0.0.1", port],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert orphan.wait(timeout=120) == -signal.SIGTERM


# ---- command line -----------------------------------------------------------


def command(file: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run ``python -m kvttl.stack.commands`` as `make up` does."""
    return subprocess.run(
        [sys.executable, "-m", "kvttl.stack.commands", *arguments, "--config", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        env={**os.environ, "PYTHONPATH": "src"},
    )


def test_up_status_partial_start_and_down(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("stack: {l1_size_gb: 0.05}")
    state = tmp_path / "run_lmcache" / "stack.json"
    try:
        up = command(file, "up", "--free-ports")
        assert up.returncode == 0 and up.stdout.startswith("started redis, coordinator, server"), (
            up.stderr
        )
        children, record = load_state(state)
        config = load_config(file).replaced(**record["ports"])
        assert command(file, "up").stdout.startswith("already running")
        refused = command(file, "up", "--free-ports")
        assert refused.returncode == 1 and "make down" in refused.stderr
        assert command(file, "status").returncode == 0
        os.killpg(children["server"].pid, signal.SIGKILL)
        wait_until(lambda: len(listening(config)) == 2)
        status = command(file, "status")
        assert status.returncode == 1 and "not running" in status.stdout
        with LMCacheStack(load_config(file)) as partial:  # finds the others, starts the missing one
            assert partial.started == ["server"]
            assert len(listening(config)) == 4
        assert len(listening(config)) == 2
    finally:
        down = command(file, "down")
    assert (down.returncode, down.stdout) == (0, "stopped redis, coordinator\n")
    assert listening(config) == [] and not running_in(tmp_path) and not state.exists()
    again = command(file, "down")
    assert again.returncode == 0 and "nothing is running" in again.stdout


# Each sends itself a signal at one moment of `up`, and otherwise does what `make up` does.
INTERRUPTED_UP = """
import os, signal, sys
from kvttl.stack import commands, lifecycle

def then_signal(owner, name, when=lambda *_: True):
    original = getattr(owner, name)
    def act(*arguments):
        if name == "sigpending":  # signals are blocked: it has come, and waits
            os.kill(os.getpid(), {number})
        result = original(*arguments)
        if when(*arguments) and name != "sigpending":
            os.kill(os.getpid(), {number})
        return result
    setattr(owner, name, act)

spawn = lifecycle.spawn
def tell(*arguments):
    child = spawn(*arguments)
    print(child.pid, flush=True)
    return child
lifecycle.spawn = tell

if {moment!r} == "spawned":
    then_signal(lifecycle, "spawn", lambda name, *_: name == "server")
elif {moment!r} == "ready":
    then_signal(commands, "_print_health")
else:
    then_signal(signal, "sigpending")
sys.exit(commands.main(["up", "--free-ports", "--config", {file!r}]))
"""


@pytest.mark.parametrize(
    "number, moment, code",
    [
        (signal.SIGINT, "spawned", 130),
        (signal.SIGINT, "ready", 130),
        (signal.SIGTERM, "ready", 143),
        (signal.SIGHUP, "last", 129),
        (signal.SIGINT, "last", 130),
    ],
)
def test_interrupted_up_leaves_nothing(tmp_path, number, moment, code):
    file = tmp_path / "config.yaml"
    file.write_text("stack: {l1_size_gb: 0.05}")
    script = INTERRUPTED_UP.format(number=int(number), moment=moment, file=str(file))
    up = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": "src"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=take_ctrl_c,
    )
    assert up.returncode == code, up.stderr
    assert not (tmp_path / "run_lmcache" / "stack.json").exists()
    services = [int(line) for line in up.stdout.splitlines() if line.isdigit()]
    assert len(services) == 3 and not any(psutil.pid_exists(pid) for pid in services)


def test_cli_errors_are_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text("stack: {coordinator_port: 0}")
    result = command(tmp_path / "c.yaml", "up")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "error: coordinator_port = 0 is not allowed: an integer from 1 to 65535"
    ]
