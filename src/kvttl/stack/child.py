"""What runs in a child process: it watches its owner and becomes one of the services.

``lmcache coordinator``, ``lmcache server`` or the embedded Redis.
"""

import os
import runpy
import signal
import sys
import threading
import time
from importlib.metadata import version

LMCACHE_VERSION = "0.5.6"  # whose private parts the adapters and `_drop_env_route` use
WATCH_INTERVAL_S = 0.5  # a dead owner is noticed within this time
WATCH_GRACE_S = 4.0  # after that an orphan that ignores SIGTERM is killed


def _watch_owner(owner: int) -> None:
    """End this process group once its owner is gone, however the owner died.

    A poll of the parent id, because the kernel's parent-death signal fires when the
    starting *thread* ends, and a pipe stays open in children the owner forked.
    """
    while os.getppid() == owner:
        time.sleep(WATCH_INTERVAL_S)
    os.killpg(0, signal.SIGTERM)
    time.sleep(WATCH_GRACE_S)
    os.killpg(0, signal.SIGKILL)


def _run_redis(arguments: list[str]) -> None:
    from fakeredis import TcpFakeServer

    server = TcpFakeServer((arguments[0], int(arguments[1])))
    server.daemon_threads = True  # an open client must not keep a stopped Redis alive
    server.serve_forever()


def _run_lmcache(arguments: list[str]) -> None:
    from uvicorn.config import LOGGING_CONFIG

    # One access line per heartbeat and event batch would fill the disk.
    LOGGING_CONFIG["loggers"]["uvicorn.access"].update(handlers=[], propagate=False)
    if arguments[0] == "server":
        from kvttl.stack.reconcile import reconcile_for
        from kvttl.stack.tier_watch import watch_tiers

        install_adapters(own_redis_client=os.environ.get("KV_REDIS_CLIENT") != "lmcache")
        _drop_env_route()
        watch_tiers(arguments)
        reconcile_for(arguments)
    sys.argv = ["lmcache", *arguments]
    # As ``python -m`` does; the launcher of this kit also knows its policies by name.
    is_inside = any('"kvttl.server"' in argument for argument in arguments)
    runpy.run_module("kvttl.server" if is_inside else "lmcache.cli.main", run_name="__main__")


def install_adapters(own_redis_client: bool) -> None:
    """Put this kit's adapters for disk and Redis, which check what they load, in LMCache's place.

    Raises
    ------
    RuntimeError
        Another LMCache is installed than the one whose internals the adapters know.
    """
    if (installed := version("lmcache")) != LMCACHE_VERSION:
        if not own_redis_client:
            print(f"damaged files are not found with LMCache {installed}", flush=True)
            return
        raise RuntimeError(
            f"this kit's adapters replace parts of LMCache {LMCACHE_VERSION}, but {installed} "
            f"is installed: install lmcache=={LMCACHE_VERSION}, or set redis_client: lmcache"
        )
    from kvttl.stack.disk_adapter import install_disk_adapter
    from kvttl.stack.redis_adapter import install_redis_adapter

    install_disk_adapter()
    if own_redis_client:
        install_redis_adapter()


def _drop_env_route() -> None:
    """Take GET /env off the server: it shows every variable, our Redis password too."""
    from lmcache.v1.internal_api_server.common import env_api

    env_api.router.routes.clear()


def _child_main(owner: int, name: str, arguments: list[str]) -> None:
    if owner:
        threading.Thread(target=_watch_owner, args=(owner,), daemon=True).start()
    if name == "redis":
        _run_redis(arguments)
    else:
        _run_lmcache([name, *arguments])


if __name__ == "__main__":
    _child_main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
