"""TTL and tier decisions for KV caches: the rooms behind the three modules beside this package.

`caching_heuristics`, `cache_controller` and `tiered_caching` are the doors; the README's
"Where things are" says what each wing of this package is for and what it may import.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PROJECT = Path(__file__).resolve().parents[2]  # the checkout: `data/` and `config.yaml` lie there


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file, its folder made if need be, that no reader ever sees half written.

    An error inside the block leaves what was there before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
