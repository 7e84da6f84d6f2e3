"""What this kit uses of LMCache that is private, or whose behaviour nobody promises: all of it.

`missing` says at the start what an LMCache lacks; only what needs it is switched off. Here are
also LMCache's two policies: what it writes down, and what a hit from below leaves in gpu.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil
from lmcache.v1.distributed.storage_controllers import prefetch_policy, store_policy
from lmcache.v1.multiprocess.request_handler import iter_request_handlers
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

from kvttl.stack.child import LMCACHE_VERSION
from kvttl.stack.process import comes_true

NAME = "kvttl"  # of the policies, on LMCache's command line
LATE_WRITES, POLICIES, REQUESTS = "late writes", "policies", "requests"
# Requests that are looked at, and one by which it is seen whether they are.
WRAPPED = ("lookup", "prepare_store", "commit_store", "store", "query_prefetch_status")
PROBE = "kvttl-probe"  # its request id
_REACHED_S = 60.0  # within which a started server answers itself


def missing(storage_manager: Any, modules: Iterable[Any]) -> dict[str, list[str]]:
    """Return by feature what it would need and this LMCache does not have."""
    controllers = getattr(storage_manager, "_store_controllers", None) or {}
    absent = {} if controllers else dict.fromkeys((LATE_WRITES, POLICIES), ["_store_controllers"])
    for each in controllers.values():
        listener = getattr(each, "_listener", None)
        if not hasattr(listener, "on_l1_keys_write_finished"):
            absent[LATE_WRITES] = ["StoreController._listener.on_l1_keys_write_finished"]
        if not hasattr(each, "_policy"):
            absent[POLICIES] = ["StoreController._policy"]
    if not hasattr(getattr(storage_manager, "_prefetch_controller", None), "_policy"):
        absent.setdefault(POLICIES, []).append("StorageManager._prefetch_controller._policy")
    found = {bound.operation for module in modules for bound in iter_request_handlers(module)}
    if "lookup" not in found or not found.intersection(("commit_store", "store")):
        absent[REQUESTS] = sorted(set(WRAPPED) - found)
    return absent


def warning_of(absent: Mapping[str, list[str]]) -> str:
    """Return what to warn of at the start: what is switched off, and an LMCache that is unknown."""
    version = importlib.metadata.version("lmcache")
    lacks = ", ".join(f"{name} (for want of {' and '.join(of)})" for name, of in absent.items())
    off = f"switched off: {lacks or 'nothing'}"
    if version == LMCACHE_VERSION:
        return off if absent else ""
    return f"LMCache {version} is unknown to this kit, written for {LMCACHE_VERSION}; {off}"


def reaches(config: Any, reached: threading.Event) -> bool:
    """Ask the server a harmless question, as its clients do; say whether our handler had it.

    Nobody promises that the last handler of an operation is the one that counts. Not before the
    server listens: who calls a free port of this machine may get it himself.
    """
    if not comes_true(lambda: config.port in _listened_to(), _REACHED_S):
        raise TimeoutError(f"the server does not listen to port {config.port}")
    scheme = "grpc" if config.transport == "grpc" else "tcp"
    client = RequestClientFactory.create(f"{scheme}://{config.host}:{config.port}")
    try:
        client.query_prefetch_status(PROBE).result(timeout=_REACHED_S)
    finally:
        client.close()
    return reached.is_set()


def _listened_to():
    sockets = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN}


def use_policies(storage_manager: Any, store_policy: Any, prefetch_policy: Any) -> None:
    """Give running controllers these policies, which they read anew for every batch.

    Not needed by the launcher, which registers them by public names.
    """
    for controller in storage_manager._store_controllers.values():
        controller._policy = store_policy
    storage_manager._prefetch_controller._policy = prefetch_policy


def offer(storage_manager: Any, keys: list) -> None:
    """Put resident objects before the store policy as if they had just been written."""
    for controller in storage_manager._store_controllers.values():
        controller._listener.on_l1_keys_write_finished(keys)


def http_app() -> Any:
    """Return the application on the server's HTTP port; it takes routes until it is started.

    A server that vLLM starts itself runs LMCache's HTTP frontend as ``__main__``: imported by its
    name it would be a second one, which nobody serves.
    """
    app = getattr(sys.modules["__main__"], "app", None)
    if app is None or not hasattr(app, "include_router"):
        from lmcache.v1.multiprocess.http_server import app
    return app


def http_host() -> str:
    """Return what the HTTP port is bound to; every address where LMCache does not say it."""
    configs = getattr(http_app().state, "configs", {})
    return getattr(configs.get("http"), "http_host", "0.0.0.0")  # noqa: S104 - the safe guess


def wrapped(modules: Iterable[Any], operations: Iterable[str]) -> dict[str, Callable]:
    """Return a module's methods that run ``requests.operation(built_in, *args)`` of it instead.

    LMCache takes the last handler of an operation, and external modules come last. What
    `functools.wraps` takes over passes its check of signatures and scheduling options.
    """
    return {
        bound.operation: _wrap(bound.handler, bound.operation)
        for module in modules
        for bound in iter_request_handlers(module)
        if bound.operation in operations
    }


def _wrap(built_in, operation):
    @functools.wraps(built_in.__func__)
    def handler(module, *args):
        return getattr(module.requests, operation)(built_in, *args)

    return handler


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
    """Loads as LMCache does, with room for it, and keeps in gpu what is wanted there."""

    def plan_load(self, key_groups: list, *rest: Any, **named: Any) -> prefetch_policy.PrefetchPlan:
        """Return what is loaded from where, and make room for it."""
        plan = super().plan_load(key_groups, *rest, **named)
        if self.module is not None and (loaded := plan.l2_planned_keys.merge()):
            self.module.hands.room_to_load(
                key_groups[0].keys[0], loaded.popcount() / len(key_groups)
            )
        return plan

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
