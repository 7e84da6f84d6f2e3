"""The tuned settings on disk: `HeuristicConfig` as a small commented YAML file."""

import os
from pathlib import Path

import yaml

from caching_heuristics import SETTINGS, HeuristicConfig, unknown_name
from kvttl import PROJECT, parse_yaml, user_path, whole_file

FILE_NAME = "heuristics.yaml"
PATH_VARIABLE = "KV_HEURISTICS_FILE"


def default_path() -> Path:
    """Return where the settings lie: ``KV_HEURISTICS_FILE``, else in a ``data/``.

    That of this folder, of the one above it, or the kit's: the first that has the file, or is
    there to get it.
    """
    if named := os.environ.get(PATH_VARIABLE):
        return user_path(named)
    folders = (Path("data"), Path("..", "data"), PROJECT / "data")
    files = [folder / FILE_NAME for folder in folders]
    there = [file for file in files if file.is_file()] or [f for f in files if f.parent.is_dir()]
    return next(iter(there), files[0])


def load_settings(path: str | Path | None = None) -> HeuristicConfig:
    """Return the saved settings; the defaults where there is no file.

    Parameters
    ----------
    path : str or Path, optional
        A YAML file; default `default_path()`. Fields it leaves out have their defaults.

    Raises
    ------
    ValueError
        Names the file and the field, its value and the allowed range.

    Examples
    --------
    >>> load_settings("no/such/file.yaml") == HeuristicConfig()
    True
    """
    path = default_path() if path is None else user_path(path)
    try:
        values = parse_yaml(path)
        if not isinstance(values, (dict, type(None))):  # None: an empty file
            raise ValueError(f"must hold `name: number` lines, got {f'{values}'.strip()[:60]!r}")
        return settings_from(values or {})
    except FileNotFoundError:
        return HeuristicConfig()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def settings_from(values: dict[str, object]) -> HeuristicConfig:
    """Return the settings that a mapping holds; a wrong name is answered with the nearest one.

    Examples
    --------
    >>> settings_from({"alpha": 0.5}).alpha
    0.5
    >>> settings_from({"alhpa": 0.5})
    Traceback (most recent call last):
        ...
    ValueError: unknown setting 'alhpa': did you mean 'alpha'?
    """
    for name in values:
        if name not in SETTINGS:
            raise ValueError(unknown_name("setting", name, SETTINGS))
    return HeuristicConfig(**{name: _number(value) for name, value in values.items()})


def save_settings(config: HeuristicConfig, path: str | Path | None = None) -> Path:
    """Write the settings, atomically, so that a reader never sees half a file; returns the path.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_settings(HeuristicConfig(alpha=0.5), Path(folder, "new", "mine.yaml"))
    ...     load_settings(path) == HeuristicConfig(alpha=0.5)
    True
    """
    path = default_path() if path is None else user_path(path)
    with whole_file(path) as file:
        file.write(to_yaml(config).encode())
    return path


def to_yaml(config: HeuristicConfig) -> str:
    """Return the settings as YAML, a comment beside each.

    Examples
    --------
    >>> print(to_yaml(HeuristicConfig()).splitlines()[1])
    base_ttl: 3600.0  # s, before all factors
    """
    lines = ["# Settings of the two decisions (HeuristicConfig); absent ones have their defaults."]
    for name, value in config.to_dict().items():
        number = yaml.safe_dump(value).splitlines()[0]  # as YAML spells numbers
        comment = ", ".join(filter(None, (SETTINGS[name].unit, SETTINGS[name].text)))
        lines.append(f"{name}: {number}  # {comment}")
    return "\n".join(lines) + "\n"


def _number(value):
    """Return what YAML 1.1 takes for text but means a number, such as 1e6."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
