"""Starts, attaches to and stops the LMCache stack: Redis, coordinator and server.

``python -m kvttl.stack.commands up|down|status`` does the same from a shell (`make up`).
"""

import atexit
import os
import shutil
import tempfile
import time
from operator import attrgetter
from pathlib import Path

from kvttl.lmcache.client import get_json, server_settings
from kvttl.stack import services
from kvttl.stack.config import PORT_FIELDS, StackConfig, engine_kwargs, load_config
from kvttl.stack.process import Child, StackError, load_state, save_state, signals_deferred, spawn
from kvttl.stack.services import PORTS_OF, SERVICES, PortTakenError

__all__ = ["LMCacheStack", "PortTakenError", "StackConfig", "StackError", "load_config"]

FREE_PORT_TRIES = 4  # another program may take a port between our pick and the bind


class LMCacheStack:
    """Coordinator, LMCache server and Redis for the duration of a `with` block.

    What already runs on the configured ports is used and left running; only what is
    missing is started, and exactly that is stopped at the end.

    Parameters
    ----------
    config : StackConfig, optional
        Settings; default ``load_config()``.
    free_ports : bool
        Start a stack of its own on free ports, attach to nothing but `redis_url`.
    detached : bool
        Leave the services running when this process ends (`make up`).
    attach : bool
        False: what already runs on the configured ports is an error.
    coordinator_of : LMCacheStack, optional
        A running stack: start only a server (and its Redis) on free ports, under that one's
        coordinator. It needs an ``instance_id``, a ``disk_path`` and a Redis of its own.

    Raises
    ------
    StackError
        A port is in use, a tier cannot be written, read, listed or deleted from, or a service
        died or was not ready in time.
    """

    def __init__(
        self,
        config: StackConfig | None = None,
        free_ports: bool = False,
        detached: bool = False,
        attach: bool = True,
        coordinator_of: "LMCacheStack | None" = None,
    ) -> None:
        self.config = config or load_config()
        self.instance_id = self.config.instance_id
        self._settings = self.config
        self._free_ports = free_ports or coordinator_of is not None
        self._detached, self._attach = detached, attach and not self._free_ports
        self._first = coordinator_of
        self._children: dict[str, Child] = {}
        self._recorded: dict[str, Child] = {}  # of an earlier `up`: kept in the state file
        self._scratch: Path | None = None
        self._owner_pid = os.getpid()

    host = property(attrgetter("config.host"), doc="Loopback address of all services.")
    port = property(attrgetter("config.coordinator_port"), doc="Port of the coordinator.")
    server_port = property(attrgetter("config.server_port"), doc="Port of vLLM's connector (ZMQ).")
    coordinator_url = property(attrgetter("config.coordinator_url"), doc="The coordinator's URL.")
    server_http_url = property(attrgetter("config.server_http_url"), doc="The server's HTTP API.")

    @property
    def redis_url(self) -> str:
        """URL of the Redis in use, credentials included: do not log it."""
        return self.config.redis_url or f"redis://{self.host}:{self.config.redis_port}"

    @property
    def started(self) -> list[str]:
        """Names of the services that this object started (and will stop)."""
        return [name for name in SERVICES if name in self._children]

    # ---- life cycle ---------------------------------------------------------

    def __enter__(self) -> "LMCacheStack":
        return self.start()

    def __exit__(self, exc_type, *exc_info) -> None:
        self.stop(keep_logs=exc_type is not None)  # the logs may explain the failure

    def start(self) -> "LMCacheStack":
        """Start what is missing; return when all is ready, or raise `StackError` with log lines."""
        if self._children:
            return self
        for left in reversed(range(FREE_PORT_TRIES if self._free_ports else 1)):
            if not self._detached:
                atexit.register(self.stop)  # for callers without a `with` block
            try:
                self.choose_ports()
                self._bring_up()
                return self
            except BaseException as error:  # also Ctrl-C: leave nothing behind
                is_last = not left or not isinstance(error, PortTakenError)
                self.stop(keep_logs=is_last)
                if is_last:
                    raise

    def stop(self, keep_logs: bool = False) -> None:
        """Stop exactly what this object started; a second call does nothing."""
        if os.getpid() != self._owner_pid:
            return  # a forked copy of this object (vLLM forks) owns nothing
        started = self.started
        with signals_deferred():  # a second Ctrl-C must not leave half of them running
            for name in reversed(started):
                self._children[name].stop(self.config.stop_timeout_s)
                del self._children[name]
            if self._detached and started:
                self._save_state()
        if self._scratch and not keep_logs:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        atexit.unregister(self.stop)

    def kill(self, name: str) -> None:
        """SIGKILL one service that this object started, as a crash would."""
        self._own(name).kill()

    def start_one(self, name: str) -> None:
        """Start one service again on its old ports and wait until it is ready."""
        if self._own(name).alive():
            raise StackError(f"{name} is still running; stop or kill it first")
        self._spawn(name)
        server = self._children.get("server")
        # A running server signs up again by itself at a coordinator that is new.
        also = ["server"] if name == "coordinator" and server and server.alive() else []
        self._wait_ready([name, *also])

    def restart(self, name: str) -> None:
        """Stop one service politely and start it again on the same ports."""
        self._own(name).stop(self.config.stop_timeout_s)
        self.start_one(name)

    def logs(self, name: str, lines: int = 20) -> str:
        """The last `lines` lines that a service wrote."""
        child = self._children.get(name) or self._recorded.get(name)
        if child is None:
            return f"({name} was not started here, so its log is elsewhere)"
        return "\n".join(child.last_lines(lines))

    def health(self) -> dict[str, dict]:
        """Per service: whether it is ready, whether we started it, its pid and address."""
        addresses = {"redis": "redis://{}:{}".format(*self.config.redis_address)}
        addresses |= {"coordinator": self.coordinator_url, "server": self.server_http_url}
        pids = {name: child.pid for name, child in (self._recorded | self._children).items()}
        health = {}
        for name, address in addresses.items():
            health[name] = {"ready": self._ready(name), "started_here": name in self._children}
            health[name] |= {"pid": pids.get(name), "address": address}
        return health

    # ---- for vLLM -----------------------------------------------------------

    def engine_kwargs(self, model: str, **overrides) -> dict:
        """Arguments for ``vllm.LLM(**...)`` on CPU; also sets `ENGINE_ENV` where unset."""
        return engine_kwargs(self.config, model, **overrides)

    # ---- starting -----------------------------------------------------------

    def choose_ports(self) -> None:
        """Take up the ports of a stack that an earlier `up` started, or pick free ones."""
        self._recorded, record = load_state(self._state_path)
        if self._recorded and not self._free_ports and not self._attach:
            raise StackError("`make up` runs the stack of these settings: attach, or `make down`")
        if not self._free_ports:
            # `up --free-ports` may have put the stack elsewhere.
            ports = record.get("ports", {}) if self._recorded else {}
            self.config = self._settings.replaced(**ports)
            return
        if self._detached and self._recorded:
            raise StackError("a stack from an earlier `up` is running; run `make down` first")
        picked = services.pick_ports(self.host, len(PORT_FIELDS))
        ports = dict(zip(PORT_FIELDS, picked, strict=True))
        if self._first:
            ports["coordinator_port"] = self._first.port
        self.config = self._settings.replaced(run_dir=self._new_run_dir(), **ports)

    def _new_run_dir(self) -> str:
        run_dir = Path(self._settings.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if self._detached:
            return str(run_dir)
        self._scratch = Path(tempfile.mkdtemp(prefix="free-", dir=run_dir))
        return str(self._scratch)

    @property
    def _state_path(self) -> Path:
        return Path(self._settings.run_dir) / "stack.json"

    def _save_state(self) -> None:
        ports = {name: getattr(self.config, name) for name in PORT_FIELDS}
        save_state(self._state_path, {**self._recorded, **self._children}, ports=ports)

    def _bring_up(self) -> None:
        services.check_folders(self.config)
        present = services.running_services(self.config) if self._attach else []
        if self._first:
            present.append("coordinator")
        if self.config.redis_url:
            present.append("redis")
        missing = [name for name in SERVICES if name not in present]
        for name in missing:
            services.check_ports_free(self.config, name)
        for name in ("coordinator", "redis"):  # both at once; they do not need each other
            if name in missing:
                self._spawn(name)
        if "redis" in missing:
            self._wait_ready(["redis"])  # the server connects while it starts
        services.check_redis(self.config)
        if "server" in missing:
            services.check_shares_nothing(self.config)
            self._spawn("server")
        self._wait_ready(list(SERVICES))

    def _spawn(self, name: str) -> None:
        run_dir = Path(self.config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        log_path = run_dir / f"{name}.log"
        arguments, env = services.arguments_of(name, self.config), services.child_env(self.config)
        with signals_deferred():  # nothing runs that is not written down
            self._children[name] = spawn(name, arguments, log_path, env, self._detached)
            if self._detached:
                self._save_state()

    def _wait_ready(self, names: list[str]) -> None:
        pending, deadline = names, time.monotonic() + self.config.start_timeout_s
        while pending := [name for name in pending if not self._ready(name)]:
            self._raise_if_dead(names)
            if time.monotonic() > deadline:
                within = f"{self.config.start_timeout_s:g} s (start_timeout_s)"
                tail = self._log_tail(pending[0])
                raise StackError(f"{pending[0]} was not ready after {within}.{tail}")
            time.sleep(0.1)

    def _ready(self, name: str) -> bool:
        child = self._children.get(name)
        # Our own socket, not that of a stranger who took the port first.
        if child and not all(child.listens_on(getattr(self.config, p)) for p in PORTS_OF[name]):
            return False
        if name == "server":
            return bool(server_settings(self.server_http_url)) and self._registered(child)
        check = services.redis_answers if name == "redis" else services.is_coordinator
        return check(self.config)

    def _registered(self, child: Child | None) -> bool:
        """Whether the coordinator lists the server, and not just one that died earlier."""
        since = child.created_s - 1.0 if child else 0.0
        ours = {"instance_id": self.instance_id, "http_port": self.config.server_http_port}
        entries = get_json(self.coordinator_url, "/instances").get("instances", [])
        since_then = [entry for entry in entries if entry.get("registration_time", 0) >= since]
        return any(ours.items() <= entry.items() for entry in since_then)

    def _raise_if_dead(self, names: list[str]) -> None:
        for name in names:
            child = self._children.get(name)
            if child is None or child.alive():
                continue
            tail = self._log_tail(name)
            for line in child.last_lines(100):
                if "address already in use" in line.lower():
                    named = [p for p in PORTS_OF[name] if str(getattr(self.config, p)) in line]
                    advice = services.port_advice(self.config, (named or PORTS_OF[name])[0])
                    raise PortTakenError(f"{name} found its port taken: {advice}.{tail}")
            code = child.popen.returncode
            raise StackError(f"{name} ended at start with exit code {code}.{tail}")

    def _log_tail(self, name: str) -> str:
        child = self._children.get(name)
        if child is None:
            return ""
        return "\n  ".join([f" Last lines of {child.log_path}:", *child.last_lines(15)])

    def _own(self, name: str) -> Child:
        if name not in SERVICES:
            raise ValueError(f"unknown service {name!r}; known: {', '.join(SERVICES)}")
        if name not in self._children:
            raise StackError(f"{name} was not started by this stack, so it is left alone")
        return self._children[name]
