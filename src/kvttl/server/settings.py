"""What ``--server-module`` may say, and what of it can be changed while the server runs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from caching_heuristics import SETTINGS, HeuristicConfig, check_number, unknown_name
from kvttl.background import check_whole
from kvttl.lmcache.tiers import LMCACHE_TIERS
from kvttl.manager.policy import POLICY_NAMES
from kvttl.replay.costs import TierCosts

LIVE = ("heuristics", "birth", "save", "high", "low", "max_pin_s", "budgets")  # can be changed
_KINDS = {Mapping: "a mapping", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class ServerSettings:
    """``config`` of ``--server-module``.

    Raises
    ------
    ValueError
        Names the setting, the value and what is allowed.
    """

    heuristics: Mapping[str, float] = field(default_factory=dict)  # of `HeuristicConfig`
    birth: str = "none"  # what is written down when it is stored: "none", or "all" as LMCache does
    save: str = "end"  # what is wanted in gpu is written down at its request's "end", or "demotion"
    high: float = 0.85  # gpu's share from which on it is relieved, down to `low`
    low: float = 0.75
    pass_s: float = 0.1  # how often that is looked at
    sweep_s: float = 0.2  # how often TTLs are looked at
    workers: int = 2  # decisions at the same time
    max_pin_s: float = 3600.0
    handover_s: float = 10.0  # how long a manager outside may be silent, and its decision take
    budgets: Mapping[str, float] = field(default_factory=dict)  # `cache_salt` -> share of gpu
    log: str = ""  # folder of decision logs
    journal: str = ""  # folder from which a restart goes on; "": beside the disk tier's; "off"
    adopt: bool = True  # claim what disk and remote hold without a claim; not if others share them
    meter: bool = True  # count what other policies would have hit
    policy: str = "formula"  # who decides: one of `POLICY_NAMES`
    costs: Mapping[str, Any] = field(default_factory=dict)  # of `TierCosts`, for "adaptive"
    stuck_s: float = 60.0  # in one call, after which a thread is given up for a new one
    adapters: Mapping[str, str] = field(
        default_factory=lambda: {t: row.adapter for t, row in LMCACHE_TIERS.items() if row.adapter}
    )

    def __post_init__(self) -> None:
        choices = {"birth": ("none", "all"), "save": ("end", "demotion"), "policy": POLICY_NAMES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                one = " or ".join(allowed)
                raise ValueError(f"{name} must be {one}, got {getattr(self, name)!r:.80}")
        check_number("high", self.high, 0.0, 1.0, open_low=True)
        check_number("low", self.low, 0.0, self.high, open_low=True, high_name="high")
        for name in ("pass_s", "sweep_s", "max_pin_s", "handover_s", "stuck_s"):
            check_number(name, getattr(self, name), 0.0, 604_800.0, open_low=True)
        check_whole("workers", self.workers)
        kinds = dict.fromkeys(("heuristics", "budgets", "adapters", "costs"), Mapping)
        kinds |= {"log": str, "journal": str, "adopt": bool, "meter": bool}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                problem = f"must be {_KINDS[kind]}, got {getattr(self, name)!r:.80}"
                raise ValueError(f"{name} {problem}")
        check_names("setting of heuristics", self.heuristics, SETTINGS)
        check_names("setting of costs", self.costs, [each.name for each in fields(TierCosts)])
        for salt, share in self.budgets.items():
            check_number(f"budgets[{salt!r:.80}]", share, 0.0, 1.0, open_low=True)
        _ = self.formula, TierCosts(**self.costs)

    @functools.cached_property
    def formula(self) -> HeuristicConfig:
        """What decides."""
        return HeuristicConfig(**self.heuristics)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ServerSettings:
        """Return the settings in a mapping; unknown ones are a ValueError."""
        check_names("setting of kvttl.server", config, [each.name for each in fields(cls)])
        return cls(**config)

    def changed(self, changes: Mapping[str, Any]) -> ServerSettings:
        """Return other settings: of a mapping's names only those in `changes`, without null ones.

        Raises
        ------
        ValueError
            A setting is unknown, wrong, or cannot be changed while the server runs.
        """
        settings = asdict(self)
        for name in changes:
            if name in settings and name not in LIVE:
                problem = f"cannot be changed while the server runs, got {changes[name]!r:.80}"
                raise ValueError(f"{name} {problem}: it must be one of {', '.join(LIVE)}")
        settings = merged(settings, changes)
        for name, known in (("heuristics", SETTINGS), ("budgets", settings["budgets"])):
            if isinstance(settings[name], dict):
                check_names(f"setting of {name}", settings[name], known)
                settings[name] = {n: v for n, v in settings[name].items() if v is not None}
        return self.of(settings)


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes; of a mapping's names only those that are changed.

    Examples
    --------
    >>> merged({"high": 0.9, "budgets": {"a": 0.5}}, {"budgets": {"b": 0.25}})
    {'high': 0.9, 'budgets': {'a': 0.5, 'b': 0.25}}
    """
    parts = {n: each for n, each in changes.items() if isinstance(each, dict)}
    both = {n: {**settings[n], **parts[n]} for n in parts if isinstance(settings.get(n), dict)}
    return {**settings, **changes, **both}


def check_names(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError that names the first unknown one of some names."""
    for name in given:
        if name not in known:
            raise ValueError(unknown_name(kind, name, known))
