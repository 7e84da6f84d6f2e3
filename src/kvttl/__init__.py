"""TTL and tier decisions for KV caches: the rooms behind the three modules beside this package.

`caching_heuristics`, `cache_controller` and `tiered_caching` are the doors; the README's
"Where things are" says what each wing of this package is for and what it may import.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

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


_YAML_BYTES, _YAML_DEPTH = 1 << 16, 16  # far more than settings need


def parse_yaml(path: Path) -> Any:
    """Return what a small YAML file holds: None, plain values, lists and mappings.

    Raises
    ------
    ValueError
        One line: no YAML, too long, too deep, or with aliases, which a few lines
        can make as large as they like.
    """
    import yaml  # who reads no settings does without

    with open(path, "rb") as file:
        data = file.read(_YAML_BYTES + 1)
    depth = 0
    try:
        if len(data) > _YAML_BYTES:
            raise ValueError(f"longer than {_YAML_BYTES} bytes")
        text = data.decode("utf-8-sig")
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _YAML_DEPTH or isinstance(event, yaml.AliasEvent):
                raise ValueError(
                    f"aliases, or more than {_YAML_DEPTH} levels, are not for settings"
                )
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML raises half a dozen kinds at what it does not know
        raise ValueError(f"not YAML: {' '.join(str(error).split())[:300]}") from error
