"""`make chaos`: run parts of a campaign, one after the other, and merge them into one report."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from chaos.campaign import Part, deck
from chaos.faults import KINDS
from chaos.report import add

PART = 100  # faults of one seed: a stack and its disk live that long
_OWN = "KV_CHAOS_OWN_MOUNTS"


def main(argv: list[str] | None = None) -> int:
    """Run; returns 1 if a rule was broken."""
    options = _options(argv)
    _with_own_mounts()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely, it cleans up
    known, broken = None, 0
    for start in range(0, options.faults, PART):
        seed, count = options.seed + start // PART, min(PART, options.faults - start)
        with tempfile.TemporaryDirectory(prefix="kv-chaos-", ignore_cleanup_errors=True) as folder:
            say = functools.partial(print, flush=True)
            part = Part(Path(folder), seed, options.tenants, say, options.inside)
            cards = options.cards or deck(seed, count, options.kinds, options.inside)
            try:
                part.run(cards[: options.until], known)
            finally:  # what is known by now is worth keeping, however it ended
                made = part.as_dict() | {"chosen": bool(options.cards)}
                report = add(options.out, made)
                if options.keep:
                    _keep(Path(folder), options.keep)
            known = part.known
        broken += sum(len(step.violations) for step in part.steps)
        there = report["inside" if options.inside else "outside"]
        print(
            f"part of seed {seed}: {len(part.steps)} faults; {options.out} has "
            f"{there['faults']}, {len(there['violations'])} violations"
        )
    print(json.dumps({"faults": options.faults, "seed": options.seed, "violations": broken}))
    return 1 if broken else 0


def _keep(folder, kept):
    without = shutil.ignore_patterns("disk", "tmp", "dump.rdb")
    shutil.copytree(folder, kept, dirs_exist_ok=True, ignore=without)


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first part")
    parser.add_argument("--out", type=Path, default=Path("data/reports/chaos.json"))
    parser.add_argument("--kinds", type=lambda text: text.split(","), help=", ".join(KINDS))
    parser.add_argument("--inside", choices=("0", "1"), default="0", help="1: in LMCache's server")
    parser.add_argument("--cards", type=_cards, help="door:kind,door:kind,... instead of a deck")
    parser.add_argument("--until", type=int, help="stop after this step of a part")
    parser.add_argument("--no-tenants", dest="tenants", action="store_false")
    parser.add_argument("--keep", type=Path, help="folder for the logs of the last part")
    options = parser.parse_args(argv)
    options.inside = options.inside == "1"
    options.faults = len(options.cards or ()) or options.faults
    return options


def _cards(text):
    return [tuple(card.split(":")) for card in text.split(",")]


def _with_own_mounts() -> None:
    """Start again where a mount is this process's own: a disk that can be full, gone at the end."""
    if os.environ.get(_OWN) or shutil.which("unshare") is None:
        return
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    wrapped = ["unshare", "--mount", *user]
    if subprocess.run([*wrapped, "true"], capture_output=True, check=False).returncode == 0:
        environment = {**os.environ, _OWN: "1"}
        command = [*wrapped, sys.executable, "-m", "chaos", *sys.argv[1:]]
        os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main())
