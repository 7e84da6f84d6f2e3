"""What this kit uses of LMCache that is private, or whose behaviour nobody promises: all of it.

`missing` says at the start what an LMCache lacks; only what needs it is switched off.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

from lmcache.v1.multiprocess.request_handler import iter_request_handlers

LATE_WRITES, POLICIES, REQUESTS = "late writes", "policies", "requests"
WRAPPED = ("lookup", "prepare_store", "commit_store", "store")  # requests that are looked at


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
