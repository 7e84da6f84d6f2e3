"""LMCache's two policies: what it writes down, and what a hit from below leaves in gpu."""

from __future__ import annotations

from typing import Any

from lmcache.v1.distributed.storage_controllers import prefetch_policy, store_policy

NAME = "kvttl"


class _Asks:
    """Asks the module of this process; LMCache makes its policies without arguments."""

    module: Any = None  # none yet: as LMCache comes
    made = 0  # by LMCache: then they need not be put in the place of others

    def __init__(self) -> None:
        _Asks.made += 1


class KvttlStorePolicy(_Asks, store_policy.DefaultStorePolicy):
    """Writes down what the module has ordered."""

    def select_store_targets(self, keys: list, adapters: list) -> dict[int, list]:
        """Return which objects go to which adapter."""
        plan = None if self.module is None else self.module.targets(keys, adapters)
        return super().select_store_targets(keys, adapters) if plan is None else plan

    def select_l1_deletions(self, keys: list) -> list:
        """Hear of copies that were made; none is deleted here."""
        if self.module is not None:
            self.module.written(keys)
        return []


class KvttlPrefetchPolicy(_Asks, prefetch_policy.DefaultPrefetchPolicy):
    """Loads as LMCache does, and keeps in gpu what is wanted there."""

    def plan_l1_retention(self, keys: list, l1_manager_desc: Any, l2_adapter_desc: Any) -> list:
        """Return for each object whether it stays in gpu."""
        plan = None if self.module is None else self.module.retained(keys)
        return [False] * len(keys) if plan is None else plan


def register() -> None:
    """Make both known by `NAME`, for LMCache's command line."""
    if NAME not in store_policy.get_registered_store_policies():
        store_policy.register_store_policy(NAME, KvttlStorePolicy)
    if NAME not in prefetch_policy.get_registered_prefetch_policies():
        prefetch_policy.register_prefetch_policy(NAME, KvttlPrefetchPolicy)


def are_in_use() -> bool:
    """Say whether LMCache has made them, by their name."""
    return _Asks.made > 0


def serve(module: Any) -> None:
    """Let both ask this module from now on."""
    _Asks.module = module
