"""The parts of vLLM's inside that serving is built on; another vLLM may have them elsewhere."""

import functools
import pkgutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from kvttl import read_names

VLLM = "0.30.0"  # pinned in requirements.txt, and tested
PARTS = read_names(Path(__file__).with_suffix(".toml"))["parts"]


@functools.cache
def vllm_parts() -> SimpleNamespace:
    """Import all parts, by the names of `PARTS`; the first call takes seconds.

    Raises
    ------
    RuntimeError
        The vLLM that is installed has not all of them: names it, and the one that has.
    """
    import vllm

    try:
        found = {name: _first_of(*paths.split()) for name, paths in PARTS.items()}
    except (ImportError, AttributeError) as error:
        there = f"vLLM {vllm.__version__} is installed, which lacks a part of it"
        raise RuntimeError(f"serving needs vLLM {VLLM}, and {there}: {error}") from error
    return SimpleNamespace(**found)


def _first_of(*paths):
    for path in paths[:-1]:
        with suppress(ImportError, AttributeError):
            return pkgutil.resolve_name(path)
    return pkgutil.resolve_name(paths[-1])
