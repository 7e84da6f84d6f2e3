"""What can happen to a stack: each fault is a function that does it, yields, and undoes it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chaos.machine import Door, Key, Machine, comes
from kvttl.stack.services import checkpoint_path

ALL_DOORS = ("library", "gateway")


@dataclass
class Scene:
    """What a fault finds, and what it says of itself.

    Attributes
    ----------
    damaged : set of Key
        Chunks that the fault itself has harmed: they may be lost.
    visit : set of Key
        Chunks whose prompts are to be asked for again at once.
    said : list of str
        What went against the rules while it was done or undone.
    """

    machine: Machine
    door: Door
    rng: random.Random
    wanted: dict[Key, str | None]
    copies: dict[Key, set[str]]
    damaged: set[Key] = field(default_factory=set)
    visit: set[Key] = field(default_factory=set)
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Parameters
    ----------
    run : callable
        Does it to a scene up to the ``yield``, undoes it after that.
    hold_s : tuple
        How long it lasts under traffic: least and most seconds.
    doors : tuple
        Which managers it can happen to.
    loses : str
        Tiers whose copies are lost by the fault itself, with spaces between.
    silent : str
        Tiers of whose losses LMCache is not told: a demotion may trust a copy that is gone.
    deadly : bool
        Ends the engine: calls may fail, and the manager is started again.
    interrupts : bool
        Calls may end with KeyboardInterrupt.
    shows : str
        Where decisions that were made meanwhile must say that LMCache was away: ``outside``, or
        also ``inside``.
    dear : bool
        Takes tens of seconds.
    unlogged : bool
        Records cannot be written meanwhile.
    sabotage : bool
        Breaks a rule on purpose.
    inside : bool
        Only of a server with a module.
    hook : bool
        The module may count failures of its own.
    """

    name: str
    run: Callable[[Scene], Iterator[None]]
    hold_s: tuple[float, float] = (0.3, 1.5)
    doors: tuple[str, ...] = ALL_DOORS
    loses: str = ""
    silent: str = ""
    deadly: bool = False
    interrupts: bool = False
    shows: str = ""
    dear: bool = False
    unlogged: bool = False
    sabotage: bool = False
    inside: bool = False
    hook: bool = False


KINDS: dict[str, Kind] = {}


def fault(**properties):
    """Register a generator function as a kind of fault."""

    def register(run):
        KINDS[run.__name__] = Kind(run.__name__, run, **properties)
        return run

    return register


# ---- services --------------------------------------------------------------------------------


@fault(hold_s=(1.0, 2.0), shows="outside")
def coordinator_killed(scene):
    scene.machine.stack.kill("coordinator")
    yield
    scene.machine.stack.start_one("coordinator")


@fault()
def coordinator_stopped(scene):
    with stopped(group_of(scene, "coordinator"), group=True):
        yield


@fault()
def coordinator_restarted(scene):
    scene.machine.stack.restart("coordinator")
    yield


@fault(loses="gpu")
def coordinator_forgot(scene):
    scene.machine.stack.kill("coordinator")
    checkpoint_path(scene.machine.stack.config).unlink(missing_ok=True)
    yield
    scene.machine.stack.start_one("coordinator")


@fault(loses="gpu")
def server_killed(scene):
    scene.machine.stack.kill("server")
    yield
    scene.machine.stack.start_one("server")


@fault(hold_s=(0.3, 3.0))
def server_stopped(scene):
    with stopped(group_of(scene, "server"), group=True):
        yield


@fault(loses="gpu")
def server_restarted(scene):
    scene.machine.stack.restart("server")
    yield


def group_of(scene, name):
    return scene.machine.stack._children[name].pid


class stopped:
    """SIGSTOP while the block runs, SIGCONT after it."""

    def __init__(self, pid, group=False):
        self._send, self._pid = (os.killpg if group else os.kill), pid

    def __enter__(self):
        self._send(self._pid, signal.SIGSTOP)

    def __exit__(self, *_exc):
        self._send(self._pid, signal.SIGCONT)


# ---- Redis -----------------------------------------------------------------------------------


@fault(loses="remote", silent="remote")
def redis_killed(scene):
    scene.machine.redis.stop()
    yield
    scene.machine.redis.start()


@fault(silent="remote")
def redis_restarted(scene):
    scene.machine.redis.admin.save()
    scene.machine.redis.stop(signal.SIGTERM)
    yield
    scene.machine.redis.start()


@fault(loses="remote", silent="remote")
def redis_flushed(scene):
    scene.machine.redis.admin.flushall()
    yield


@fault(hold_s=(0.3, 2.5))
def redis_stopped(scene):
    with stopped(scene.machine.redis.process.pid):
        yield


@fault(hold_s=(0.0, 0.1))
def redis_slow(scene):
    """Keep clients waiting; the end cannot be asked for: that would have to wait, too."""
    mode, pause_s = scene.rng.choice(("ALL", "WRITE")), scene.rng.uniform(0.3, 2.5)
    scene.machine.redis.admin.execute_command("CLIENT", "PAUSE", int(1000 * pause_s), mode)
    time.sleep(pause_s)
    yield


@fault(hold_s=(0.1, 0.3))
def redis_asleep(scene):
    seconds = scene.rng.uniform(0.3, 2.0)
    scene.machine.redis.admin.execute_command("DEBUG", "SLEEP", f"{seconds:.2f}")
    yield


@fault()
def redis_full(scene):
    scene.machine.redis.limit(1)
    yield
    scene.machine.redis.limit(0)


@fault()
def redis_read_only(scene):
    scene.machine.redis.admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    yield
    scene.machine.redis.admin.execute_command("REPLICAOF", "NO", "ONE")


@fault(silent="remote")
def redis_evicting(scene):
    used = scene.machine.redis.admin.info("memory")["used_memory"]
    share = scene.rng.uniform(0.6, 0.95)
    scene.machine.redis.limit(int(used * share), "allkeys-random")
    yield
    scene.machine.redis.limit(0)


# ---- disk ------------------------------------------------------------------------------------


@fault(hold_s=(0.5, 1.5))
def disk_full(scene):
    yield from filled(scene, scene.machine.disk, group_of(scene, "server"))


@fault(hold_s=(0.5, 1.5), unlogged=True)
def log_full(scene):
    yield from filled(scene, scene.machine.folder / "log", scene.door.pid)


def filled(scene, folder, writer):
    """Fill a file system to its last byte; where it is not our own, refuse its writer's files."""
    if not scene.machine.has_own_disk:
        yield from _files_refused(writer)
        return
    filler = folder / "filler"
    for size in (2**18, 2**9):
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(size))
    yield
    filler.unlink()


def _files_refused(pid):
    process = psutil.Process(pid)
    soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (1024, hard))
    yield
    process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))


@fault(loses="disk", silent="disk")
def disk_emptied(scene):
    for files in scene.machine.files().values():
        for file in files:
            file.unlink(missing_ok=True)
    yield


# ---- damage ----------------------------------------------------------------------------------


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def emptied(_data, _rng):
    return b""


def flipped(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def scrambled(data, rng):
    half = rng.randrange(len(data) // 2)
    return data[:half] + rng.randbytes(len(data) - half)


def victims(scene, tier, count):
    """Return chunks that a hit would load from a tier, mostly."""
    held = [key for key, tiers in scene.copies.items() if tier in tiers]
    best = [key for key in held if scene.copies[key] == {tier}] or held
    best = best if scene.rng.random() < 0.8 else held
    chosen = scene.rng.sample(sorted(best), min(count, len(best)))
    scene.damaged.update(chosen)
    scene.machine.damaged.update(chosen)
    scene.visit.update(chosen)
    return chosen


def damage_files(scene, change):
    files = scene.machine.files()
    for key in victims(scene, "disk", scene.rng.randrange(1, 6)):
        for file in files.get(key, ()):
            with suppress(FileNotFoundError):
                file.write_bytes(change(file.read_bytes(), scene.rng))


def damage_values(scene, change):
    values, admin = scene.machine.values(), scene.machine.redis.admin
    for key in victims(scene, "remote", scene.rng.randrange(1, 6)):
        for name in values.get(key, ()):
            if data := admin.get(name):
                admin.set(name, change(data, scene.rng))


def damaging(damage, change, name):
    """Register a fault that changes some chunks' bytes."""

    def run(scene):
        damage(scene, change)
        yield

    KINDS[name] = Kind(name, run, hold_s=(0.0, 0.1))


for _change in (truncated, emptied, flipped, scrambled):
    damaging(damage_files, _change, f"files_{_change.__name__}")
    damaging(damage_values, _change, f"values_{_change.__name__}")


@fault(hold_s=(0.0, 0.1))
def files_swapped(scene):
    files = scene.machine.files()
    chosen = victims(scene, "disk", 6)
    for one, other in zip(chosen[::2], chosen[1::2]):
        with suppress(FileNotFoundError, KeyError):  # moved away meanwhile
            first, second = files[one][0], files[other][0]
            data = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(data)
    yield


@fault(hold_s=(0.0, 0.1))
def values_swapped(scene):
    values, admin = scene.machine.values(), scene.machine.redis.admin
    chosen = victims(scene, "remote", 6)
    for one, other in zip(chosen[::2], chosen[1::2]):
        with suppress(KeyError):
            first, second = values[one][0], values[other][0]
            datas = admin.mget(first, second)
            if all(datas):
                admin.mset({first: datas[1], second: datas[0]})
    yield


# ---- clock -----------------------------------------------------------------------------------


def jump(scene, seconds):
    scene.machine.offset_s += seconds
    scene.door.ask("jump", scene.machine.offset_s)


@fault()
def clock_forward(scene):
    jump(scene, scene.rng.uniform(600, 8 * 3600))
    yield


@fault()
def clock_back(scene):
    jump(scene, -scene.rng.uniform(60, 3600))
    yield


@fault()
def clock_broken(scene):
    scene.door.ask("break_clock")
    yield
    scene.door.ask("jump", scene.machine.offset_s)


# ---- HTTP between the manager and LMCache ----------------------------------------------------


def troubled(scene, kind, share, delay_s=0.0):
    proxies = (scene.machine.coordinator_proxy, scene.machine.server_proxy)
    for proxy in proxies:
        proxy.make_trouble(kind, share, delay_s, scene.rng.getrandbits(32))
    yield
    for proxy in proxies:
        proxy.trouble = ""


@fault(hold_s=(1.0, 2.0), shows="outside inside")
def http_dropped(scene):
    yield from troubled(scene, "drop", 1.0)


@fault()
def http_dropped_at_times(scene):
    yield from troubled(scene, "drop", scene.rng.uniform(0.2, 0.7))


@fault()
def http_answers_lost(scene):
    yield from troubled(scene, "lose", scene.rng.uniform(0.2, 1.0))


@fault()
def http_cut(scene):
    yield from troubled(scene, "cut", scene.rng.uniform(0.2, 1.0))


@fault(hold_s=(0.5, 2.5))
def http_delayed(scene):
    yield from troubled(scene, "delay", scene.rng.uniform(0.3, 1.0), scene.rng.uniform(0.1, 3.0))


# ---- the manager -----------------------------------------------------------------------------


@fault()
def manager_stopped(scene):
    with stopped(scene.door.pid):
        yield


@fault()
def engine_stopped(scene):
    pids = [process.pid for process in scene.door.engine()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@fault(deadly=True, dear=True, hold_s=(0.0, 0.2))
def manager_killed(scene):
    scene.door.kill()
    yield


@fault(deadly=True, dear=True, hold_s=(0.0, 0.2))
def manager_restarted(scene):
    if not scene.door.stop():
        scene.said.append(f"the {scene.door.role} ended with {scene.door.code}")
    yield


@fault(deadly=True, dear=True, hold_s=(0.0, 0.2))
def log_torn(scene):
    scene.door.kill()
    comes(lambda: not scene.door.alive())
    files = sorted((scene.machine.folder / "log").glob("*.jsonl"), key=os.path.getmtime)
    if files:
        tear(files[-1], scene.rng)
    yield


def tear(file, rng):
    """Break a file's last line off, and put something else there."""
    data = file.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    if last < len(data) - 2:
        cut = rng.randrange(last + 1, len(data) - 1)
        file.write_bytes(data[:cut] + rng.choice((b"", b"\0\xff\xfe", b"{")))


@fault(deadly=True, dear=True, hold_s=(0.5, 1.0))
def engine_killed(scene):
    """For the gateway: it must end by itself, so that a supervisor starts it again."""
    engine = scene.rng.choice(scene.door.engine())
    engine.kill()
    yield
    if scene.door.role == "gateway":
        if comes(lambda: not scene.door.alive(), 60) is False or scene.door.code == 0:
            scene.said.append(
                f"the gateway's engine died, and its exit status is {scene.door.code}"
            )
        return
    try:
        scene.door.generate([{"prompt": "who is there?"}], [None])
        scene.said.append("a call on a dead engine was answered")
    except Exception as error:
        if "ngine" not in str(error):
            scene.said.append(f"a call on a dead engine says: {error}")
    scene.door.kill()


@fault(loses="gpu remote", silent="remote")
def all_services_killed(scene):
    for name in ("coordinator", "server"):
        scene.machine.stack.kill(name)
    scene.machine.redis.stop()
    yield
    bring_back(scene)


@fault(loses="gpu remote", silent="remote", deadly=True, dear=True, hold_s=(0.0, 0.2))
def machine_rebooted(scene):
    scene.door.kill()
    for name in ("coordinator", "server"):
        scene.machine.stack.kill(name)
    scene.machine.redis.stop()
    yield
    bring_back(scene)


def bring_back(scene):
    scene.machine.redis.start()
    for name in ("coordinator", "server"):
        scene.machine.stack.start_one(name)


@fault(doors=("library",), interrupts=True, hold_s=(0.3, 0.8))
def calls_interrupted(scene):
    for _ in range(scene.rng.randrange(1, 5)):
        time.sleep(scene.rng.uniform(0.0, 0.2))
        scene.door.kill(signal.SIGINT)
    yield


@fault(doors=("gateway",))
def clients_gone(scene):
    prompts = [{"prompt": f"{scene.rng.getrandbits(64):x} " * 60} for _ in range(6)]
    threads = [
        threading.Thread(target=scene.door.leave, args=(prompt, scene.rng.uniform(0, 0.3)))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield


# ---- the server's module -----------------------------------------------------------------------

HOOKS = (
    "look-up|room for a store|store|end of a session|targets|retained|written|deletes|pass|journal"
    "|disk: copies came|disk: copies went|remote: copies came|remote: copies went"
).split("|")


@fault(inside=True, hook=True, hold_s=(0.5, 1.5))
def hook_raises(scene):
    scene.machine.trouble(scene.rng.choice(HOOKS))
    yield
    scene.machine.trouble("")


@fault(inside=True, hold_s=(0.0, 0.1))
def thread_hangs(scene):
    """Its watchdog puts another in its place."""
    name, module = scene.rng.choice(("pass", "journal")), scene.machine.module
    known = module.status()["threads"][name]["restarts"]
    scene.machine.trouble(f"{name} hangs")
    if not comes(lambda: module.status()["threads"][name]["restarts"] > known, 60):
        scene.said.append(f"the thread {name} hangs, and nobody takes its place")
    yield
    scene.machine.trouble("")


@fault(inside=True, hold_s=(0.2, 1.0))
def settings_patched(scene):
    """Other settings, some of them wrong, again and again; the first ones at the end."""
    module, rng = scene.machine.module, scene.rng
    before = module.status()["settings"]
    for _ in range(8):
        low = rng.uniform(0.1, 0.6)
        given = {"low": low, "high": low + 0.2, "save": rng.choice(("end", "demotion"))}
        given |= {"birth": rng.choice(("none", "all")), "budgets": {"tenant-a": rng.random()}}
        wrong = rng.choice(
            ({"low": 2.0}, {"workers": 3}, {"budgets": {"tenant-a": "much"}}, {"x": 1})
        )
        codes = module.change(**given), module.change(**{**given, **wrong})
        if codes != (200, 400):
            scene.said.append(f"settings {given}, and with {wrong}, were answered {codes}")
        if {**module.status()["settings"], **given} != module.status()["settings"]:
            scene.said.append(f"settings {given} are not in force")
    yield
    names = ("low", "high", "save", "birth")
    module.change(budgets={"tenant-a": None}, **{name: before[name] for name in names})
    if module.status()["settings"] != before:
        scene.said.append("the settings are not the first ones again")


@fault(inside=True, hold_s=(0.5, 1.5))
def journal_full(scene):
    yield from filled(scene, scene.machine.journal, group_of(scene, "server"))


@fault(inside=True, hold_s=(0.5, 1.5))
def journal_read_only(scene):
    """Its file is gone, and where it was nothing can be written."""
    journal = scene.machine.journal
    for file in journal.glob("*/*.jsonl"):
        file.unlink()
    if not scene.machine.has_own_disk:
        journal.rename(journal.with_suffix(".away"))
        journal.write_bytes(b"")
        yield
        journal.unlink()
        journal.with_suffix(".away").rename(journal)
        return
    empty = ["-t", "tmpfs", "-o", "ro", "tmpfs"]  # at once: nobody can open a file in between
    subprocess.run(["mount", *empty, str(journal)], check=True)
    yield
    subprocess.run(["umount", "-l", str(journal)], check=True)


@fault(inside=True, loses="gpu")
def journal_torn(scene):
    """Killed while it wrote the last line."""
    scene.machine.stack.kill("server")
    for file in scene.machine.journal.glob("*/*.jsonl"):
        tear(file, scene.rng)
    yield
    scene.machine.stack.start_one("server")


# ---- sabotage: what the campaign must notice, never dealt --------------------------------------


@fault(sabotage=True)
def sabotage_text(scene):
    """Get other texts than the engine gave: `Traffic` does that at this name."""
    yield


@fault(sabotage=True)
def sabotage_copies(scene):
    """Lose every copy of live chunks without a word."""
    yield
    files, values = scene.machine.files(), scene.machine.values()
    for key in [key for key, tier in scene.wanted.items() if tier]:
        for file in files.get(key, ()):
            Path(file).unlink(missing_ok=True)
        if key in values:
            scene.machine.redis.admin.delete(*values[key])
    scene.machine.stack.restart("server")


@fault(sabotage=True)
def sabotage_orphan(scene):
    """Leave a chunk that nobody claims, and that LMCache does not know."""
    name = next(iter(scene.machine.files().values()))[0].name
    model, rank, group, *_ = name.removesuffix(".data").split("@")
    (scene.machine.disk / f"{model}@{rank}@{group}@{'ab' * 32}.data").write_bytes(b"x")
    yield


@fault(sabotage=True)
def sabotage_process(scene):
    """Leave a process behind."""
    subprocess.Popen(["sleep", "600"], env=scene.machine.environment, start_new_session=True)
    yield
