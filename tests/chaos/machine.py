"""The machine under test: services, disk, Redis and the doors to a manager, seen from outside."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import psutil
import redis
import requests
import yaml
from redis_fixtures import free_port, stop_redis

from chaos.child import TROUBLE
from chaos.module import Endings, Key, Module
from chaos.proxy import Proxy
from kvttl.lmcache.tiers import parse_key
from kvttl.session.demo_model import model_path
from kvttl.stack import process as stack_process
from kvttl.stack.lifecycle import LMCacheStack, load_config
from kvttl.storage.checksum import CHECKSUM_BYTES, checksum

MARK = "KV_CHAOS_RUN"  # in the environment of all that a campaign starts
LIMIT_S = 120.0  # of whatever must come by itself
_FILE_SYSTEMS_MB = {"disk": 192, "log": 32, "disk.kvttl": 16}
MAX_TOKENS = 6
# Shorter waits than the defaults: a campaign meets each of them some hundred times.
SETTINGS = {
    "l1_size_gb": 0.25,
    "redis_timeout_s": 1.0,
    "redis_connect_timeout_s": 1.0,
    "redis_verify_s": 2.0,
    "mq_timeout_s": 1.0,
    "engine_heartbeat_s": 0.5,
    "registration_heartbeat_s": 0.5,
    "event_flush_interval_s": 0.01,
    "start_timeout_s": 250,
}

_DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


class Ended(RuntimeError):
    """A worker ended while it was asked."""


def comes(condition: Callable[[], Any], limit_s: float = LIMIT_S, every_s: float = 0.03) -> Any:
    """Return what a condition returns once that is true, or what it is after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while not (result := condition()) and time.monotonic() < deadline_s:
        time.sleep(every_s)
    return result


class Nursery:
    """The process that forks workers; see `worker`."""

    def __init__(self, environment: dict[str, str], output: Path) -> None:
        self.codes: dict[int, int] = {}  # pid -> exit status, of those that ended
        self._answers: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output.open("wb"),
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        threading.Thread(target=self._read, daemon=True, name="nursery").start()

    def _read(self):
        for line in self._process.stdout:
            with suppress(ValueError):  # what an import has printed
                said = json.loads(line)
                if "ended" in said:
                    self.codes[said["ended"]] = said["code"]
                elif "pid" in said:
                    self._answers.append(said["pid"])

    def start(self, spec: dict[str, Any]) -> int:
        """Return the pid of a new worker."""
        known = len(self._answers)
        self._process.stdin.write(json.dumps(spec) + "\n")
        self._process.stdin.flush()
        if not comes(lambda: len(self._answers) > known, 2 * LIMIT_S):
            raise Ended("the nursery does not answer")
        return self._answers[known]

    def close(self) -> None:
        """End it; workers are ended by who started them."""
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()


class Redis:
    """A redis-server, and the hands of whoever runs it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self.port = free_port()
        self.start()

    def start(self) -> None:
        """Start it on its port; what `SAVE` wrote is there again."""
        options = "--bind 127.0.0.1 --appendonly no --enable-debug-command yes --save".split()
        command = [*_DIES_WITH_US, "redis-server", "--port", str(self.port), *options, ""]
        with (self._folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--dir", str(self._folder)],
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        self.admin = redis.Redis(port=self.port, socket_timeout=LIMIT_S)
        if not comes(self._answers):
            raise RuntimeError("redis-server did not start")

    def _answers(self):
        try:
            return self.admin.ping()
        except redis.RedisError:
            return False

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it by a signal, and wait."""
        self.process.send_signal(number)
        self.process.wait()

    def limit(self, size_bytes: int, policy: str = "noeviction") -> None:
        """Set how much it may hold (0 = any), and what goes then."""
        self.admin.config_set("maxmemory-policy", policy)
        self.admin.config_set("maxmemory", size_bytes)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        stop_redis(self.process)


class Machine:
    """Everything but the manager.

    Parameters
    ----------
    folder : Path
        Scratch; the disk tier is a small file system of its own in it where that is allowed.
    inside : bool
        The LMCache server decides by its module, which `trouble` can make fail.
    """

    def __init__(self, folder: Path, inside: bool = False) -> None:
        self.folder, self.run_id, self.inside = folder, secrets.token_hex(8), inside
        self._usual_child = stack_process.CHILD_MODULE
        for name in ("redis", "tmp", "out", *_FILE_SYSTEMS_MB):
            (folder / name).mkdir(parents=True)
        self.sockets = Path(tempfile.mkdtemp(prefix="kvc-"))  # a path of a socket must be short
        mounted = [_mount(folder / name, size) for name, size in _FILE_SYSTEMS_MB.items()]
        self.has_own_disk = all(mounted)  # both or none
        os.environ[MARK] = self.run_id
        os.environ["VLLM_LOGGING_LEVEL"] = os.environ["LMCACHE_LOG_LEVEL"] = "WARNING"
        compiled = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", compiled)  # or each part compiles anew
        os.environ["TMPDIR"] = str(folder / "tmp")
        self.trouble("")
        os.environ[TROUBLE] = str(self._trouble)
        self.environment = dict(os.environ)
        self.redis = Redis(folder / "redis", self.environment)
        self.nursery = Nursery(self.environment, folder / "out" / "nursery.txt")
        config = load_config(
            **SETTINGS,
            redis_url=f"redis://127.0.0.1:{self.redis.port}",
            disk_path=str(folder / "disk"),
            run_dir=str(folder / "run"),
            inside=inside,
        )
        self.stack = LMCacheStack(config, free_ports=True)
        self.model = model_path()
        self.offset_s, self._lives = 0.0, 0
        self.damaged: set[Key] = set()  # chunks with a copy that a fault has harmed

    def start(self) -> None:
        """Start coordinator and server, and the proxies before them."""
        if self.inside:
            stack_process.CHILD_MODULE = "chaos.child"
        self.stack.start()
        config = self.stack.config
        self.module = Module(config.server_http_url, self.model) if self.inside else None
        self.server_proxy = Proxy(config.server_http_port)
        ports = {f'"http_port":{config.server_http_port}': f'"http_port":{self.server_proxy.port}'}
        self.coordinator_proxy = Proxy(config.coordinator_port, ports)
        self.config_file = self.folder / "config.yaml"
        settings = {name: value for name, value in dict(config).items() if value is not None}
        self.config_file.write_text(yaml.safe_dump({"stack": settings}))

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def journal(self) -> Path:
        """Where the server's module writes down its claims."""
        return self.folder / "disk.kvttl"

    @property
    def now_s(self) -> float:
        """The managers' clock."""
        return time.time() + self.offset_s

    @property
    def _trouble(self):
        return self.folder / "trouble"

    def trouble(self, what: str) -> None:
        """Have one of the module's hooks raise (its name) or hang (``... hangs``), or none."""
        fresh = self._trouble.with_suffix(".new")
        fresh.write_text(what)
        fresh.replace(self._trouble)

    def last_traceback(self) -> str:
        """Return the last one in the server's log."""
        return self.stack.logs("server", 500).rpartition("Traceback")[2][-1500:]

    def spec(self, role: str, **more: Any) -> dict[str, Any]:
        """Return what a worker needs to know."""
        self._lives += 1
        life = f"{self._lives}-{role}"
        return {
            "role": role,
            "model": self.model,
            "config": str(self.config_file),
            "output": str(self.folder / "out" / f"{life}.txt"),
            "address": str(self.sockets / life),
            "log": str(self.folder / "log"),
            "offset_s": self.offset_s,
            "sweep_every_s": 0.25,
            "max_tokens": MAX_TOKENS,
            **more,
        }

    # ---- what is where, seen from outside ------------------------------------------------

    def files(self) -> dict[Key, list[Path]]:
        """Return the chunk files of the disk tier."""
        found: dict[Key, list[Path]] = {}
        for entry in os.scandir(self.disk):
            key = (
                parse_key(entry.name.removesuffix(".data")) if entry.name[-5:] == ".data" else None
            )
            if key:
                found.setdefault((key.chunk_hash_hex, key.cache_salt), []).append(Path(entry.path))
        return found

    def values(self) -> dict[Key, list[bytes]]:
        """Return the names of the chunks in Redis."""
        found: dict[Key, list[bytes]] = {}
        for name in self.redis.admin.scan_iter(match="*@*@*@*", count=1000):
            if key := parse_key(name.decode()):
                found.setdefault((key.chunk_hash_hex, key.cache_salt), []).append(name)
        return found

    def still_damaged(self) -> set[Key]:
        """Return those of `damaged` whose harmed copy is neither gone nor stored anew by now.

        Until it is loaded LMCache takes it for a copy, and a better one may go.
        """
        files, values = self.files(), self.values()
        copies = [(k, f.name, f.read_bytes()) for k in self.damaged for f in files.get(k, ())]
        copies += [
            (k, n.decode(), self.redis.admin.get(n) or b"")
            for k in self.damaged
            for n in values.get(k, ())
        ]
        self.damaged = {k for k, name, data in copies if not _is_whole(name, data)}
        return set(self.damaged)

    def shown_but_gone(self) -> list[Key]:
        """Return the chunks shown on disk or in Redis, by whom it may be, that are not there."""
        there = {"disk": self.files(), "remote": self.values()}
        shown = {"disk": self.listed("l2", "fs"), "remote": self.listed("l2", "resp")}
        for key, tiers in self.module.shown().items() if self.module else ():
            for tier in tiers.intersection(there):
                shown[tier].add(key)
        return [key for tier in there for key in shown[tier] if key not in there[tier]]

    def listed(self, tier: str, backend: str = "") -> set[Key]:
        """Return the chunks that the directory shows in a tier of LMCache's (``l1``, ``l2``)."""
        rows, found = None, set()
        tier += f"&backend={backend}" if backend else ""
        base = f"{self.stack.coordinator_url}/directory/keys?tier={tier}&limit=10000"
        while rows is None or rows:
            answer = requests.get(f"{base}&offset={len(found)}", timeout=10).json()
            rows = [row["key"] for row in answer["keys"]]
            found |= {(key["chunk_hash_hex"], key["cache_salt"]) for key in rows}
            if len(found) >= answer["total"]:
                break
        return found

    def copies(self) -> dict[Key, set[str]]:
        """Return in which tiers each chunk really is; of gpu the directory must be believed."""
        found: dict[Key, set[str]] = {}
        seen = {"disk": self.files(), "remote": self.values(), "gpu": self.listed("l1")}
        for tier, keys in seen.items():
            for key in keys:
                found.setdefault(key, set()).add(tier)
        return found

    def placed(self, tokens: list[int], salt: str) -> list[set[str]]:
        """Return where the directory shows each complete chunk of a prompt."""
        body = {"token_ids": tokens, "model_name": self.model, "world_size": 1, "cache_salt": salt}
        answer = requests.post(
            f"{self.stack.coordinator_url}/directory/lookup", json=body, timeout=10
        ).json()
        tiers = {"l1": "gpu", "fs": "disk", "resp": "remote"}
        return [
            {tiers[p["tier"] if p["tier"] == "l1" else p["backend"]] for p in row["placements"]}
            for row in answer["results"]
        ]

    def server_status(self) -> dict[str, Any]:
        """Return what the LMCache server says of itself."""
        return requests.get(f"{self.stack.server_http_url}/status", timeout=10).json()

    def processes(self) -> dict[int, str]:
        """Return every living process of this campaign but the campaign's own: pid -> name."""
        found = {}
        for process in psutil.process_iter(["pid", "status"]):
            with suppress(psutil.Error, OSError):
                if process.info["status"] == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                    continue
                environment = Path(f"/proc/{process.pid}/environ").read_bytes()
                if f"{MARK}={self.run_id}".encode() in environment.split(b"\0"):
                    found[process.pid] = process.name()
        return found

    def services(self) -> set[int]:
        """Return the processes that belong here whatever the manager does."""
        pids = {self.redis.process.pid, self.nursery.pid}
        pids |= {child.pid for child in self.stack._children.values()}
        for pid in list(pids - {self.nursery.pid}):
            with suppress(psutil.Error):
                pids |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
        return pids

    def close(self) -> None:
        """End everything that this campaign has started, whatever happened to it."""
        for proxy in (
            getattr(self, "server_proxy", None),
            getattr(self, "coordinator_proxy", None),
        ):
            if proxy:
                proxy.close()
        with suppress(Exception):
            self.stack.stop()
        stack_process.CHILD_MODULE = self._usual_child
        self.redis.close()
        self.nursery.close()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in _FILE_SYSTEMS_MB if self.has_own_disk else ():
            if name != "disk":  # `--keep` comes after this
                shutil.copytree(self.folder / name, self.folder / "out" / name)
            subprocess.run(["umount", "-l", str(self.folder / name)], check=False)
        shutil.rmtree(self.sockets, ignore_errors=True)


def _is_whole(name: str, data: bytes) -> bool:
    payload, end = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    return end == checksum(name, payload)


def _mount(folder: Path, size_mb: int) -> bool:
    """Put a small file system on a folder, where this process may (see `__main__`)."""
    if shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Door:
    """The way to a manager: a worker of one kind, asked over its socket.

    Parameters
    ----------
    machine : Machine
        Where it lives.
    role : str
        ``library`` or ``gateway``.
    """

    def __init__(self, machine: Machine, role: str) -> None:
        self._machine, self.role, self.pid = machine, role, 0
        self.http_port = free_port()

    def start(self) -> None:
        """Start a manager, which takes up the claims in the log, and wait until it is there."""
        self.begin()
        self.wait()

    def begin(self) -> None:
        """Start a manager."""
        port = self._machine.coordinator_proxy.port
        self._spec = self._machine.spec(self.role, port=port, http_port=self.http_port)
        self.pid = self._machine.nursery.start(self._spec)

    def wait(self) -> None:
        """Wait until it takes requests."""
        if not comes(lambda: self._is_ready() or not self.alive(), 3 * LIMIT_S) or not self.alive():
            raise Ended(f"the {self.role} did not start: {self.output()}")
        for _ in range(2):  # so that all threads that come with use are there
            self.generate([{"prompt": "first words"}] * 2, [None] * 2)
            self.ask("flush", LIMIT_S)
        self.baseline = self.ask("status")

    def _is_ready(self):
        try:
            ready = self.ask("ready", limit_s=5)
        except (OSError, Ended):
            return False
        return ready and (self.role == "library" or self._listens())

    def _listens(self):
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/healthz", timeout=5).status_code == 200
        return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def code(self) -> int | None:
        """The exit status of the last life."""
        return self._machine.nursery.codes.get(self.pid)

    def alive(self) -> bool:
        return self.pid != 0 and self.code is None

    def family(self) -> set[int]:
        """Return the manager's process and its engine's."""
        if not self.alive():
            return set()
        with suppress(psutil.Error):
            children = psutil.Process(self.pid).children(recursive=True)
            return {self.pid, *(child.pid for child in children)}
        return set()

    def engine(self) -> list[psutil.Process]:
        """Return the processes of the engine."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child for child in children if child.name().startswith("VLLM::")]

    def ask(self, *question: Any, limit_s: float = LIMIT_S) -> Any:
        """Return the worker's answer.

        Raises
        ------
        Ended
            It ended meanwhile, refused, or gave no answer in `limit_s` seconds.
        """
        with Client(self._spec["address"], "AF_UNIX") as connection:
            connection.send(question)
            deadline_s = time.monotonic() + limit_s
            while not connection.poll(0.5):
                if not self.alive():
                    raise Ended("the worker ended")
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{question[0]} took longer than {limit_s:g} s")
            try:
                how, answer = connection.recv()
            except (EOFError, OSError) as error:
                raise Ended("the worker ended") from error
        if how == "failed":
            raise Ended(answer)
        return answer

    def generate(self, prompts: list[dict], metadata: list[dict]) -> list[str]:
        """Return the texts of one call."""
        if self.role == "library":
            return [text for text, _cached in self.ask("generate", prompts, metadata)]
        return [
            self._complete(p, m).json()["choices"][0]["text"] for p, m in zip(prompts, metadata)
        ]

    def _complete(self, prompt, metadata):
        body = {"model": Path(self._machine.model).name, **prompt, "max_tokens": MAX_TOKENS}
        body |= {"temperature": 0.0} | ({"kv": metadata} if metadata else {})
        try:
            answer = requests.post(f"{self.url}/v1/completions", json=body, timeout=LIMIT_S)
        except requests.Timeout as error:
            raise TimeoutError(f"no completion in {LIMIT_S:g} s") from error
        except requests.RequestException as error:
            raise Ended(f"{type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise Ended(f"{answer.status_code}: {answer.text[:300]}")
        return answer

    def leave(self, prompt: dict, after_s: float) -> None:
        """Ask for a stream and go away."""
        with socket.create_connection(("127.0.0.1", self.http_port), 10) as client:
            name = Path(self._machine.model).name
            body = json.dumps({"model": name, **prompt, "max_tokens": 64, "stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            time.sleep(after_s)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the manager's process a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def stop(self, limit_s: float = LIMIT_S) -> bool:
        """Stop politely; say whether it ended by itself and well."""
        if self.role == "library":
            with suppress(OSError, Ended):
                self.ask("close", limit_s=10)
        else:
            self.kill(signal.SIGTERM)
        comes(lambda: not self.alive(), limit_s)
        return self.code == 0

    def output(self, lines: int = 15) -> str:
        """The last lines that the worker wrote."""
        try:
            return "\n".join(Path(self._spec["output"]).read_text().splitlines()[-lines:])
        except OSError:
            return ""


class LogReader:
    """Reads what is new in a decision log: whole lines that are JSON, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._read_bytes, self.endings = folder, {}, Endings()
        self.rows: list[dict] = []  # of generations, and of those that were given up
        self.chunks_of: dict[str, list[str]] = {}  # prompt's digest -> hashes

    def update(self) -> list[dict]:
        """Return all records of generations so far."""
        for path in sorted(self._folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read_bytes.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read_bytes[path] = self._read_bytes.get(path, 0) + len(whole)
            for line in whole.splitlines():
                with suppress(ValueError):
                    self._take(json.loads(line))
        return self.rows

    def _take(self, row):
        self.endings.take(row)
        if row["chunk_keys"]:
            self.chunks_of[row["prompt_digest"]] = row["chunk_keys"]
        if row["kind"] in ("generation", "shed"):
            self.rows.append(row)
