"""What prompt tokens cost: as a provider publishes it, or on hardware of one's own."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from caching_heuristics import FINITE, check_number, unknown_name
from kvttl import data_folder, parse_yaml, user_path

_LEAST = 1e-12  # of what must be > 0
_RANGES = {"input_per_mtok": (_LEAST, FINITE), "read": (0, 1), "least_tokens": (0, FINITE)}
_RANGES |= {"attention_tokens": (1, FINITE), "bytes_per_token": (_LEAST, FINITE)}


@dataclass(frozen=True, kw_only=True)
class Tariff:
    """Prices of prompt tokens, in one currency; providers name them by the million ("mtok").

    Parameters
    ----------
    source : str
        Where the prices are published.
    read_on : datetime.date
        When they were read there.
    input_per_mtok : float
        Of tokens that are computed and not cached, > 0.
    read : float
        What a cached token costs, as a share of that, 0..1.
    writes : mapping of float to float
        TTLs on offer, seconds after the last use, and what a token that is computed and cached
        for so long costs, as a share >= 1. Empty: any TTL, at 1.
    storage_per_mtok_hour : float
        Of tokens held, >= 0; 0 where there are `writes`.
    least_tokens : float
        Shorter prompts and prefixes are not cached, >= 0.
    attention_tokens : float
        Before a token for which attention costs as much as all else, >= 1; by default none do.
    bytes_per_token : float
        KV cache of a token, > 0: what GiB are counted with.

    Raises
    ------
    ValueError
        Names the field, its value and what is allowed.

    Examples
    --------
    >>> tariff = Tariff(source="a page", read_on=date(2026, 6, 17), input_per_mtok=3.0, read=0.1)
    >>> float(tariff.computing(2_000_000))
    6.0
    """

    source: str
    read_on: date
    input_per_mtok: float
    read: float
    writes: Mapping[float, float] = field(default_factory=dict)
    storage_per_mtok_hour: float = 0.0
    least_tokens: float = 0.0
    attention_tokens: float = FINITE
    bytes_per_token: float = 131_072.0  # 32 layers, 8 KV heads of 128, 16 bits

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            check_number(name, getattr(self, name), low, high)
        if not isinstance(self.writes, Mapping):
            raise ValueError(f"writes must be shares by seconds, got {self.writes!r:.80}")
        for ttl_s, share in self.writes.items():
            check_number("a TTL of writes", ttl_s, _LEAST, FINITE)
            check_number(f"writes[{ttl_s}]", share, 1, FINITE)
        rent = "storage_per_mtok_hour" + " beside writes" * bool(self.writes)
        check_number(rent, self.storage_per_mtok_hour, 0, 0 if self.writes else FINITE)
        if not isinstance(self.source, str) or type(self.read_on) is not date:
            given = f"got {self.source!r:.80}, {self.read_on!r}"
            raise ValueError(f"source must be a text, read_on a date (2026-06-17), {given}")

    def computing(self, tokens: Any) -> np.ndarray:
        """Return the price of computing prompts of so many tokens."""
        tokens = np.asarray(tokens, float)
        return (tokens + tokens**2 / (2 * self.attention_tokens)) * self.input_per_mtok / 1e6


def on_hardware(
    *,
    source: str,
    read_on: date,
    gpu_per_hour: float,
    prefill_tokens_per_s: float,
    bytes_per_token: float,
    load_bytes_per_s: float,
    price_per_gib_hour: float,
    attention_tokens: float = FINITE,
) -> Tariff:
    """Return the tariff of one's own GPU and of the memory or disk that holds the KV cache.

    All > 0. The GPU waits while it loads ``load_bytes_per_s`` from there; ``bytes_per_token`` is
    `kvttl.lmcache.kv_size.kv_bytes_per_token`, ``attention_tokens`` as in `Tariff`.
    """
    given = {name: value for name, value in locals().items() if "per_" in name}
    for name, value in given.items():
        check_number(name, value, _LEAST, FINITE)
    load_s = bytes_per_token / load_bytes_per_s
    return Tariff(
        source=source,
        read_on=read_on,
        input_per_mtok=gpu_per_hour / 3600 / prefill_tokens_per_s * 1e6,
        read=min(1.0, load_s * prefill_tokens_per_s),  # what loads slower is computed
        storage_per_mtok_hour=price_per_gib_hour * bytes_per_token / 2**30 * 1e6,
        attention_tokens=attention_tokens,
        bytes_per_token=bytes_per_token,
    )


def load_tariffs(
    path: str | Path | None = None, bytes_per_token: float | None = None
) -> dict[str, Tariff]:
    """Return the tariffs of a YAML file, by name; what has ``gpu_per_hour`` is `on_hardware`.

    Parameters
    ----------
    path : str or Path, optional
        Default: ``data/tariffs.yaml``.
    bytes_per_token : float, optional
        Of the model; in place of what the file says.

    Raises
    ------
    ValueError
        Names the file, the tariff, the field, its value and what is allowed.
    """
    path = user_path(path or data_folder() / "tariffs.yaml")
    try:
        found = parse_yaml(path)
    except OSError as error:
        raise ValueError(f"TARIFF must be a YAML file: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} must hold tariffs by name, got {found!r:.60}")
    model = {} if bytes_per_token is None else {"bytes_per_token": bytes_per_token}
    return {f"{name}": _tariff(f"{path}, {name}", values, model) for name, values in found.items()}


def _tariff(where, values, model):
    try:
        if not isinstance(values, dict):
            raise ValueError(f"a tariff must be fields by name, got {values!r:.60}")
        make = on_hardware if "gpu_per_hour" in values else Tariff
        known = inspect.signature(make).parameters
        if unknown := [name for name in values if name not in known]:
            raise ValueError(unknown_name("field", unknown[0], known))
        values = values | model
        with suppress(KeyError, ValueError):  # as text where somebody has changed YAML's readers
            values["read_on"] = date.fromisoformat(str(values["read_on"]))
        for name, each in known.items():
            if each.default is each.empty and name not in values:
                raise ValueError(f"{name} is missing")
        return make(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
