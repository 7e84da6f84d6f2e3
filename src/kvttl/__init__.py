"""TTL and tier decisions for KV caches: the rooms behind the three modules beside this package.

`caching_heuristics`, `cache_controller` and `tiered_caching` are the doors; the README's
"Where things are" says what each wing of this package is for and what it may import.
"""

import contextlib
import os
import re
import sys
import tempfile
import tomllib
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PROJECT = Path(__file__).resolve().parents[2]  # the checkout: `data/` and `config.yaml` lie there

_SAMPLE = "sample_decisions.jsonl"  # in git, so it marks a checkout
_RESERVED = re.compile(r"(CON|PRN|AUX|NUL|CON(IN|OUT)\$|(COM|LPT)[0-9¹²³]) *(\..*)?", re.I | re.S)
_JOINERS = "\u200c\u200d"  # which some alphabets and emoji need


def data_folder() -> Path:
    """Return the ``data/`` of the checkout that we stand in, or in a folder of; else the kit's."""
    folders = (Path(*[".."] * up, "data") for up in range(5))
    return next((f for f in folders if (f / _SAMPLE).is_file()), PROJECT / "data")


def exit_status(command: Callable, interrupted: str = "stopped", status: int = 130) -> int:
    """Run a command; return its exit status, what went wrong as one line on stderr.

    `interrupted` and `status` are for a command that Ctrl-C ends.
    """
    try:
        return command() or 0
    except (ValueError, RuntimeError, OSError) as error:  # settings, StackError, a taken port
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return status


def user_path(path: str | Path) -> Path:
    """Return a path that a person gave, with ``~`` as their home.

    Raises
    ------
    ValueError
        ``~name`` of a user that this machine does not have.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the path {str(path)!r} names a user without a home here") from error


def plain_name(name: str, what: str) -> str:
    """Return a file's or folder's name, in any alphabet (NFC), that every system can open.

    Raises
    ------
    ValueError
        Says of `what` is named, and what is allowed.

    Examples
    --------
    >>> plain_name("Übung 实验1", "the run")
    'Übung 实验1'
    >>> plain_name("nul.txt", "the run")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: the run's name must be letters, ... and other than CON, NUL ... got 'nul.txt'
    """
    name = unicodedata.normalize("NFC", name)
    ends = name.startswith((".", "-")) or name.endswith(".") or not name.strip() == name > ""
    too_long = len(name) > 80 or len(name.encode(errors="replace")) > 240
    if ends or too_long or _RESERVED.fullmatch(name) or any(map(_is_no_letter, name)):
        raise ValueError(
            f"{what}'s name must be letters, digits and signs of any alphabet but "
            '/ \\ : * ? " < > | and invisible ones, with no dot, hyphen or space before and no '
            "dot or space behind them, 80 characters and 240 bytes at most, and other than "
            f"CON, NUL and what else Windows reserves, got {name!r}"
        )
    return name


def _is_no_letter(sign):
    """Say whether a character separates folders, is not for names on Windows, or is unseen."""
    unseen = unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return sign in '/\\:*?"<>|' or (unseen and sign not in _JOINERS)


@contextlib.contextmanager
def whole_file(
    path: str | Path, mode: int = 0o644, moving: contextlib.AbstractContextManager | None = None
) -> Iterator[BinaryIO]:
    """Write a file, its folder made if need be, that no reader ever sees half written.

    An error inside the block leaves what was there before. `moving` is entered while the new
    file takes the old one's place.
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on no data
        os.chmod(scratch, mode)
        with moving or contextlib.nullcontext():
            os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def read_names(path: Path) -> dict[str, Any]:
    """Return what a TOML file of this package holds, each text at its top as a set of words."""
    values = tomllib.loads(path.read_text("utf-8")).items()
    return {name: frozenset(v.split()) if isinstance(v, str) else v for name, v in values}


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
                too_much = f"aliases, or more than {_YAML_DEPTH} levels"
                raise ValueError(f"{too_much}, are not for settings")
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML raises half a dozen kinds at what it does not know
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())[:300]}") from error
