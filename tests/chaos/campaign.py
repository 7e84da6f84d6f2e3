"""One part of a campaign: a seed, a deck of faults, and after each the same questions."""

from __future__ import annotations

import functools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from caching_heuristics import HeuristicConfig
from chaos.faults import ALL_DOORS, KINDS, Kind, Scene
from chaos.machine import LIMIT_S, MAX_TOKENS, Door, Ended, Key, LogReader, Machine, comes
from kvttl.lmcache.salts import chunk_key
from kvttl.manager.generation import prompt_digest

HOT = {"perplexity": 12.0, "time_variance": 0.0}
WARM = {"perplexity": 35.0, "time_variance": 0.1}
COLD = {"perplexity": 80.0, "time_variance": 0.0}
TENANTS = ("", "", "tenant-a", "tenant-b")
AUDIT_EVERY = 20  # faults
MARGIN = 0.2  # of each token over the next best: a different order of sums changes no text
POOL_PROMPTS, SYSTEMS, PROBES_A_FAULT = 48, 6, 3
HERE_S = 80.0  # what was stored a minute ago the module takes for its request's, by the real time
EXTRA_FILES = 40  # open files that a process may have more than at its start
_STANDSTILL_S = 20.0  # without any progress: what is there then stays
_LOCKED_S = 310.0
LADDER_TOP_S = 60 * 86_400.0  # beyond the longest TTL on all rungs
_WORDS = (
    "cache tensor prefix token block chunk tier model agent server queue worker river stone "
    "window garden letter bridge market winter summer doctor engine signal paper silver copper "
    "planet forest island harbor castle violin painter teacher kitchen pepper orange lemon sugar"
).split()


# ---- prompts and their texts ----------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt, its tenant, and its text without any cache."""

    text: str
    salt: str
    expected: str
    tokens: tuple[int, ...]

    @property
    def request(self) -> dict[str, str]:
        """It, as vLLM and the gateway take it."""
        return {"prompt": self.text} | ({"cache_salt": self.salt} if self.salt else {})

    @property
    def digest(self) -> str:
        """Its name in records."""
        return prompt_digest(self.tokens, self.salt)


def candidates(seed: int, count: int) -> list[str]:
    """Return texts: the first share long beginnings, as agents' system prompts do.

    Each ends in a phrase of its own, said several times and broken off: the model goes on
    with it, so that the text depends on the KV cache of the whole prompt.
    """
    rng = random.Random(f"prompts {seed}")
    systems = [_prose(rng, rng.randrange(40, 90)) for _ in range(SYSTEMS)]
    shared = [f"{rng.choice(systems)}\n{_phrases(rng, 4)}" for _ in range(3 * POOL_PROMPTS)]
    return shared + [f"# {rng.getrandbits(64):x}\n{_phrases(rng, 4)}" for _ in range(count)]


def _prose(rng, words):
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _phrases(rng, times):
    words = rng.sample(_WORDS, 9)
    return " ".join(words * times + words[: rng.randrange(2, 7)])


def texts(machine: Machine, seed: int, faults: int) -> list[dict]:
    """Return prompts with the texts of an engine without LMCache, the doubtful ones left out."""
    prompts = candidates(seed, 2 * (20 + faults * PROBES_A_FAULT))
    source, answers = machine.folder / "prompts.json", machine.folder / "answers.json"
    source.write_text(json.dumps(prompts))
    pid = machine.nursery.start(
        machine.spec("reference", prompts=str(source), answers=str(answers))
    )
    if not comes(lambda: pid in machine.nursery.codes, 10 * LIMIT_S) or not answers.exists():
        raise RuntimeError("the reference engine failed; see out/ in the folder of the part")
    rows = json.loads(answers.read_text())
    rows = [{"prompt": prompt, **row} for prompt, row in zip(prompts, rows)]
    return [row for row in rows if row["margin"] >= MARGIN]


# ---- what is seen ---------------------------------------------------------------------------


@dataclass
class Step:
    """One fault and what came of it."""

    number: int
    kind: str
    door: str
    calls: int = 0
    failed: int = 0  # with an error, where that is allowed
    recover_s: float | None = None
    took_s: float = 0.0
    violations: list[str] = field(default_factory=list)


class Traffic:
    """Calls that go on while a fault comes and goes; each answer is compared."""

    def __init__(self, door: Door, step: Step, kind: Kind, choose) -> None:
        self._door, self._step, self._kind, self._choose = door, step, kind, choose
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self.spans: list[tuple] = []  # of answered calls: from, to (monotonic seconds), prompts
        count = 1 if door.role == "library" else 2
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(2 * LIMIT_S)
            if thread.is_alive():
                self._step.violations.append("a call never came back")

    def _run(self):
        while not self._ending.is_set():
            with self._lock:
                prompts, metadata = self._choose()
            begun_s = time.monotonic()
            if self.call(prompts, metadata):
                self.spans.append((begun_s, time.monotonic(), len(prompts)))
            elif self._kind.deadly:
                return

    def call(self, prompts: Sequence[Prompt], metadata: Sequence[dict]) -> bool:
        """Make one call and judge it; say whether it was answered."""
        self._step.calls += 1
        try:
            answers = self._door.generate([p.request for p in prompts], list(metadata))
        except (Ended, OSError, EOFError, TimeoutError) as error:
            self._judge(error)
            return False
        if self._kind.name == "sabotage_text":
            answers = [f"{answer}?" for answer in answers]
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer != prompt.expected:
                self._step.violations.append(
                    f"wrong text {answer!r}, expected {prompt.expected!r} (tenant {prompt.salt!r})"
                )
        return True

    def _judge(self, error):
        interrupted = self._kind.interrupts and "KeyboardInterrupt" in str(error)
        if isinstance(error, TimeoutError) or not (self._kind.deadly or interrupted):
            self._step.violations.append(f"a call failed: {type(error).__name__}: {error}")
        self._step.failed += 1


# ---- the part -------------------------------------------------------------------------------


def deck(
    seed: int, count: int, kinds: Iterable[str] | None = None, inside: bool = False
) -> list[tuple[str, str]]:
    """Return (door, kind) of each fault: every kind as often as every other, in seeded order.

    One door after the other, as engines are dear: the second takes up what the first has logged.
    """
    rng = random.Random(f"deck {seed}")
    dealt = [n for n, kind in KINDS.items() if not kind.sabotage and (inside or not kind.inside)]
    chosen = sorted(kinds or dealt)
    dealt = (chosen * (count // len(chosen) + 1))[: count // len(chosen) * len(chosen)]
    rest = [name for name in chosen if not KINDS[name].dear] or chosen
    dealt += [rng.choice(rest) for _ in range(count - len(dealt))]
    rng.shuffle(dealt)
    by_door: dict[str, list[str]] = {door: [] for door in ALL_DOORS}
    for name in dealt:
        by_door[rng.choice(KINDS[name].doors)].append(name)
    return [(door, name) for door in ALL_DOORS for name in by_door[door]]


class Part:
    """A stack, a manager and a deck of faults.

    Parameters
    ----------
    folder : Path
        Scratch.
    seed : int
        Of all that is random.
    tenants : bool
        Whether prompts have salts.
    say : callable
        Gets one line about each fault.
    inside : bool
        The LMCache server decides, by its module.
    """

    def __init__(
        self, folder: Path, seed: int, tenants: bool = True, say=print, inside: bool = False
    ) -> None:
        self.seed, self._say, self._tenants, self.inside = seed, say, tenants, inside
        self.machine, self.door = Machine(folder, inside), None
        self.steps: list[Step] = []
        self._rng = random.Random(f"part {seed}")
        self._baseline: dict[str, int] = {}
        self._log = LogReader(folder / "log")

    def run(self, cards: Sequence[tuple[str, str]], known: list[dict] | None = None) -> list[Step]:
        """Start everything, go through the deck, and end everything."""
        try:
            self.machine.start()
            self.door = Door(self.machine, cards[0][0])
            self.door.begin()
            self.known = known or texts(self.machine, 0, len(cards))
            self.door.wait()
            self._share_out(self.known)
            try:
                self._go_through(cards)
            except (Ended, RuntimeError, OSError) as error:
                self._blame(f"the part cannot go on: {type(error).__name__}: {error}")
        finally:
            self.machine.close()
        return self.steps

    def _go_through(self, cards):
        for number, (role, name) in enumerate(cards, start=1):
            self._through(role)
            self._step(number, KINDS[name], next_role=cards[min(number, len(cards) - 1)][0])
            if number % AUDIT_EVERY == 0:
                self._audit(number)
        self._audit(len(cards), drop_all=True)
        self._end_door()

    def _share_out(self, rows):
        """Give each prompt a tenant; some are traffic's, the others are used once, as probes."""
        salts = TENANTS if self._tenants else ("",)
        prompts = [
            Prompt(row["prompt"], self._rng.choice(salts), row["text"], tuple(row["tokens"]))
            for row in rows
        ]
        self.pool = [p for p in prompts if not p.text.startswith("#")][:POOL_PROMPTS]
        self._probes = [p for p in prompts if p.text.startswith("#")]
        self._say(f"{len(self.pool)} prompts, {len(self._probes)} probes")

    def _through(self, role):
        if self.door is not None and self.door.role == role:
            return
        self._end_door()
        self.door = Door(self.machine, role)
        self.door.start()

    def _end_door(self):
        if self.door is None:
            return
        pids = self.door.family()
        if not self.door.stop():
            self._blame(f"the {self.door.role} ended with {self.door.code}: {self.door.output(3)}")
        if left := self._outliving(pids):
            self._blame(f"processes {left} outlive the {self.door.role}")
        self.door = None

    def _blame(self, what):
        if self.steps:
            self.steps[-1].violations.append(what)
        self._say(f"  ! {what}")

    def _outliving(self, pids):
        """Return the names of those processes that still live half a minute later, by pid."""

        def living():
            return {pid: name for pid, name in self.machine.processes().items() if pid in pids}

        return comes_empty(living, 30.0)

    # ---- one fault ---------------------------------------------------------------------------

    def _step(self, number, kind, next_role):
        rng = random.Random(f"fault {self.seed} {number}")
        step = Step(number, kind.name, self.door.role)
        self.steps.append(step)
        started_s, family = time.monotonic(), self.door.family()
        copies = self.machine.copies()
        self._ended()  # from here on
        failures = self._failures()
        scene = Scene(self.machine, self.door, rng, self._wanted(copies), copies)
        scene.damaged |= self.machine.still_damaged()  # by earlier faults
        logged = self._logged()
        with Traffic(self.door, step, kind, lambda: self._choice(rng)) as traffic:
            time.sleep(rng.uniform(0.0, 0.4))
            running = kind.run(scene)
            next(running)
            away_s = time.monotonic()
            time.sleep(rng.uniform(*kind.hold_s))
            back_s = time.monotonic()
            next(running, None)
            healed_s = time.monotonic()
        step.violations += scene.said
        self._restart(step, kind, family, next_role)
        self._visit(step, kind, scene)
        step.recover_s = self._recover(step, kind, healed_s)
        if not kind.deadly:
            self._check_records(step, kind, traffic, logged, (away_s, back_s))
        if self.inside:
            self._check_module(step, kind, scene, failures)
        self._check_copies(step, kind, scene)
        if kind.silent and (gone := comes_empty(self.machine.shown_but_gone, 30.0)):
            step.violations.append(f"{len(gone)} lost copies are still shown: {gone[0][0][:12]}")
        self._check_leftovers(step, 2.0 if kind.sabotage else 20.0)
        step.took_s = time.monotonic() - started_s
        said = "".join(f"\n  ! {text}" for text in step.violations)
        self._say(
            f"{number:4d} {self.door.role:7} {kind.name:22} {step.calls:3d} calls"
            f" recovered {step.recover_s or -1:5.1f} s, took {step.took_s:5.1f} s{said}"
        )

    def _choice(self, rng):
        """Return the prompts of one call, and what the caller knows about them."""
        count = rng.choice((1, 1, 2, 3))
        return rng.sample(self.pool, count), [rng.choice((HOT, WARM, COLD)) for _ in range(count)]

    def _wanted(self, copies):
        if not copies:
            return {}
        if self.inside:
            return self.machine.module.wanted(copies, self.machine.now_s)
        return self.door.ask("wanted", list(copies))

    def _ended(self):
        """Return a function that says if a chunk had no claim for a moment; a new list begins."""
        if not self.inside:
            names = self.door.ask("ended")
            return lambda key: chunk_key(*key) in names
        self._take_records()
        endings, self._log.endings = self._log.endings, self._log.endings.go_on()
        return endings.excuses

    def _take_records(self):
        self._log.update()
        for row in self.machine.module.records():
            self._log.endings.take(row)

    def _failures(self):
        return Counter(self.machine.module.status()["failures"]) if self.inside else Counter()

    def _restart(self, step, kind, family, next_role):
        """Start the manager again after a fault that ends it; nothing of the old one may stay.

        It is the next card's already: an engine's start is dear.
        """
        if not kind.deadly:
            if not self.door.alive():
                step.violations.append(f"the {self.door.role} ended: {self.door.output(3)}")
                self.door.start()
            return
        comes(lambda: not self.door.alive())
        if left := self._outliving(family):
            step.violations.append(f"processes {left} outlive the {self.door.role}")
            for pid in left:
                with suppress(psutil.Error):
                    psutil.Process(pid).kill()
        if self.door.role != next_role:
            self.door = Door(self.machine, next_role)
        self.door.start()

    def _visit(self, step, kind, scene):
        """Ask for the prompts whose chunks were damaged."""
        if scene.visit:
            calls = Traffic(self.door, step, kind, None)
            names = {chunk_key(*key) for key in scene.visit}
            for prompt in self.pool:
                if names.intersection(self._log.chunks_of.get(prompt.digest, ())):
                    calls.call([prompt], [WARM])

    # ---- the questions -----------------------------------------------------------------------

    def _recover(self, step, kind, since_s):
        """Return after how long new KV is generated, decided, placed and recorded again."""
        calls = Traffic(self.door, step, kind, None)
        limit_s = 3 * LIMIT_S if kind.deadly else LIMIT_S  # an engine's start is part of it
        until_s = max(since_s + limit_s, time.monotonic() + 1.0)  # visits may have taken all of it
        while time.monotonic() < until_s:
            wishes = [WARM, COLD] if self.inside else [WARM]
            probes = [self._probe() for _ in wishes]
            known = self._logged()
            if not calls.call(probes, wishes):
                time.sleep(0.2)
                continue
            if comes(functools.partial(self._are_placed, probes), 2.0):
                took_s = time.monotonic() - since_s
                if all(self._recorded(probe, known) for probe in probes):
                    return took_s
            self._say(f"     not yet: {self._placed(probes)} {self._log.rows[-1]['error']}")
        step.violations.append(f"not managed again within {limit_s:g} s")
        return None

    def _are_placed(self, probes):
        """Say whether prompts are where they are wanted, and nowhere else.

        Outside LMCache writes everything to disk and Redis; inside what is wanted there.
        """
        below = ({"disk"}, {"remote"}) if self.inside else ({"disk", "remote"},)
        placed = self._placed(probes)
        return all(each and all(t == tiers for t in each) for each, tiers in zip(placed, below))

    def _placed(self, probes):
        try:
            if not self.inside:
                return [self.machine.placed(list(p.tokens), p.salt) for p in probes]
            self._log.update()
            copies = {chunk_key(*key): tiers for key, tiers in self.machine.copies().items()}
            named = [self._log.chunks_of.get(probe.digest, ()) for probe in probes]
            return [[copies.get(name, set()) for name in names] for names in named]
        except (OSError, ValueError, KeyError):
            return [[]]

    def _probe(self):
        return self._probes.pop() if self._probes else self._rng.choice(self.pool)

    def _recorded(self, probe, known):
        def clean():
            rows = self._log.update()[known:]
            return any(r["prompt_digest"] == probe.digest and not r["error"] for r in rows)

        return comes(clean, 2.0)

    def _logged(self):
        return len(self._log.update())

    def _check_records(self, step, kind, traffic, logged, away):
        """Every call has its record, and each failure its reason."""
        if not self.door.ask("flush", LIMIT_S):
            step.violations.append("decisions are not made")
        answered = sum(prompts for *_, prompts in traffic.spans)
        rows = self._log.update()[logged:]
        if len(rows) < answered and not kind.unlogged:
            step.violations.append(f"{answered} prompts were answered, {len(rows)} are recorded")
        for row in rows:
            mute = [
                m for m in row["moves"] if m["status"] not in ("done", "noop") and not m["reason"]
            ]
            if mute or (row["kind"] == "shed" and not row["error"]):
                step.violations.append(f"a failure without a reason: {mute or row}")
        inside = [span for span in traffic.spans if away[0] <= span[0] and span[1] <= away[1]]
        where = "inside" if self.inside else "outside"
        if where in kind.shows and inside and not any(row["error"] for row in rows):
            step.violations.append(f"{len(inside)} calls while LMCache was away, and no error")

    def _check_copies(self, step, kind, scene):
        """No chunk that a live claim wants has lost its last copy."""

        def lost():
            copies = self.machine.copies()
            return [key for key in due if not copies.get(key)]

        due = [
            key
            for key, tiers in scene.copies.items()
            if key not in scene.damaged
            and scene.wanted.get(key)
            and tiers - set(kind.loses.split())
            and not tiers & set(kind.silent.split())
        ]
        gone = comes_empty(lost, 3.0) if due and lost() else []
        if gone:
            wanted, ended = self._wanted(gone), self._ended()
            live = [key for key in gone if wanted.get(key)]
            # A call was under way when the last claim ended: the delete may have come before
            # the new claim, and the next call stores the chunk anew.
            if excused := [key for key in live if ended(key)]:
                self._say(f"     {len(excused)} chunks were gone before they were claimed again")
            live = [key for key in live if key not in excused]
            for key in live[:3]:
                step.violations.append(
                    f"last copy of {key[0][:12]} lost: was in {sorted(scene.copies[key])}, "
                    f"wanted in {wanted[key]} ({len(live)} of {len(due)} chunks)"
                )

    def _check_module(self, step, kind, scene, failures):
        """No claim is lost, also by a server that was killed; the module is well and writes."""
        say, module = step.violations.append, self.machine.module
        self._take_records()
        before = [key for key, tier in scene.wanted.items() if tier]
        lost = [key for key, tier in self._wanted(before).items() if not tier]
        if lost := [key for key in lost if not self._log.endings.excuses(key)]:
            say(f"{len(lost)} of {len(before)} chunks have lost their claims: {lost[0][0][:12]}")
        failed = self._failures() - (failures if "gpu" not in kind.loses else Counter())
        if failed and not kind.hook:
            say(f"hooks of the module failed: {dict(failed)}: {self.machine.last_traceback()}")
        if comes_empty(lambda: module.status()["journal"]["errors"], 30.0):
            say(f"the journal is not written: {module.status()['journal']}")
        if comes_empty(lambda: module.status()["tier_errors"], 30.0):
            say(f"tiers still fail: {module.status()['tier_errors']}")
        if off := module.status()["switched_off"]:
            say(f"switched off: {off}")

    def _check_leftovers(self, step, patience_s):
        """No process too many, and none too few; the manager's threads are those of its start."""

        def others():
            expected = self.machine.services() | self.door.family()
            return {p: n for p, n in self.machine.processes().items() if p not in expected}

        if left := comes_empty(others, patience_s):
            step.violations.append(f"processes left over: {left}")
            for pid in left:
                with suppress(psutil.Error):
                    psutil.Process(pid).kill()

        def threads():
            now = Counter(self.door.ask("status")["threads"])
            return now - Counter(self.door.baseline["threads"])

        if left := comes_empty(lambda: unexpected(threads()), 30):
            step.violations.append(f"threads left over: {dict(left)}")

    def _audit(self, number, drop_all=False):
        """Once the dust has settled: claims end, KV goes, nothing is locked or piles up."""
        say = self._blame
        base_s = HeuristicConfig().base_ttl
        self.door.ask("flush", LIMIT_S)

        self._account(base_s)
        if self.inside and comes_empty(self._unclaimed, HERE_S, every_s=1.0):
            self._account(base_s)

        def locked():
            state = json.dumps(self.machine.server_status())
            return [n for n in ("read_locked_count", "write_locked_count") if count_of(state, n)]

        # For 300 s LMCache keeps what a killed engine has locked, or a look-up that was given up.
        ruined = any(KINDS[step.kind].sabotage for step in self.steps)
        patience_s = 3.0 if ruined else _LOCKED_S if locked() else _STANDSTILL_S
        if drop_all:
            if not ruined and (names := comes_empty(locked, _LOCKED_S, every_s=0.5)):
                say(f"locks left in the LMCache server: {names}")
            self._jump(LADDER_TOP_S)

        left = self._left if drop_all else self._unclaimed
        if orphans := comes_empty_or_stays(left, patience_s):
            some = [f"{key[0][:12]}{key[1]} in {sorted(t)}" for key, t in list(orphans.items())[:3]]
            what = "stay after all TTLs" if drop_all else "have no claim"
            say(f"{len(orphans)} chunks {what}: {', '.join(some)}")
            self._sweep_up(orphans)

        strangers = [p.name for p in self.machine.disk.iterdir() if not p.name.endswith(".data")]
        if strangers:
            say(f"files left in the disk tier: {strangers[:3]}")
        for name, count in self._open_files().items():
            if count > self._baseline.setdefault(name, count) + EXTRA_FILES:
                say(f"{name} has {count} open files, {self._baseline[name]} at its start")
        self._say(f"     audit after {number}: {self.door.ask('status')['claims']} claims live")

    def _account(self, base_s):
        """Let KV get a claim that has none at two looks, half a `base_ttl` apart."""
        for _ in range(4):
            self._jump(base_s / 2)
            comes(lambda: self.door.ask("not_looked_for_s") < base_s / 4, 30.0)

    def _unclaimed(self):
        copies = self.machine.copies()
        wanted = self._wanted(copies)
        return {key: tiers for key, tiers in copies.items() if not wanted[key]}

    def _left(self):
        """Return what is anywhere; of gpu the server with a module is asked, too."""
        left = dict(self.machine.copies())
        if self.inside and not left and (used := self.machine.module.status()["gpu_bytes"][0]):
            left["bytes nobody shows", str(used)] = {"gpu"}
        return left

    def _sweep_up(self, orphans):
        """Take orphans away, so that the next audit speaks of the next faults."""
        files, values = self.machine.files(), self.machine.values()
        for key in orphans:
            for file in files.get(key, ()):
                file.unlink(missing_ok=True)
            if key in values:
                self.machine.redis.admin.delete(*values[key])

    def _jump(self, seconds):
        self.machine.offset_s += seconds
        self.door.ask("jump", self.machine.offset_s)

    def _open_files(self):
        pids = {"manager": self.door.pid}
        pids |= {name: child.pid for name, child in self.machine.stack._children.items()}
        return {f"{name} {pid}": psutil.Process(pid).num_fds() for name, pid in pids.items()}

    def as_dict(self) -> dict:
        """Return the part for a report."""
        load = round(os.getloadavg()[-1] / os.cpu_count(), 1)
        about = {"seed": self.seed, "inside": self.inside, "load": load}
        done = [step for step in self.steps if step.took_s or step.violations]  # one is cut short
        return about | {"steps": [asdict(step) for step in done]}


def comes_empty_or_stays(look, standstill_s):
    """Return what is still there once nothing has gone for `standstill_s`."""
    found = look()
    while found:
        fewer = functools.partial(lambda least: len(look()) < least, len(found))
        if not comes(fewer, standstill_s, 0.5):
            return look()
        found = look()
    return found


def comes_empty(look, limit_s, every_s=0.1):
    """Return what is still there after `limit_s`; empty as soon as nothing is."""
    found = {"it": None}

    def empty():
        found["it"] = look()
        return not found["it"]

    comes(empty, limit_s, every_s)
    return found["it"]


def unexpected(threads: Counter) -> dict:
    """Leave out pools that grow to a bound and stay."""
    bounded = ("asyncio_", "ThreadPoolExecutor", "AnyIO worker")
    return {name: n for name, n in threads.items() if not name.startswith(bounded)}


def count_of(state: str, name: str) -> int:
    """Return the sum of a number's values in a JSON text."""
    import re

    return sum(map(int, re.findall(rf'"{name}": (\d+)', state)))


__all__ = ["MAX_TOKENS", "Key", "Part", "Step", "deck", "texts"]
