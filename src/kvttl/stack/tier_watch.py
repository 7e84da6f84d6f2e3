"""In LMCache's server process: tries disk and Redis again and again, and says over HTTP what fails.

LMCache reports a store that failed to nobody but its log.
"""

import os

from kvttl.background import Repeater
from kvttl.lmcache.client import TIERS_PATH
from kvttl.lmcache.tiers import addresses
from kvttl.stack.reconcile import server_options
from kvttl.storage.probes import TierError, hold_folder, probe_folder, probe_redis
from kvttl.storage.redis_client import connect_as_server

LOOK_EVERY_S = 5.0  # or more often, as redis_verify_s is
FAILING: dict[str, str] = {}  # of this process's server: why a tier takes no writes


def _try_redis(host, port):
    with connect_as_server(host, port) as client:
        probe_redis(client)


# What tries a tier, by the tier's address; a tier without one counts as healthy.
TRY_OF = {"disk": probe_folder, "remote": _try_redis}


def watch_tiers(server_arguments: list[str]) -> None:
    """Watch the tiers of ``lmcache server <arguments>`` from its process, and add `TIERS_PATH`.

    Raises
    ------
    TierError
        Another server uses the disk tier's folder.
    """
    from lmcache.v1.internal_api_server.common import env_api  # one of the routers it takes up

    places = addresses(server_options(server_arguments).l2_adapter)
    if "disk" in places:
        hold_folder(*places["disk"])  # never closed

    def look():
        for tier in TRY_OF.keys() & places.keys():
            try:
                TRY_OF[tier](*places[tier])
                FAILING.pop(tier, None)
            except (TierError, ValueError) as error:  # ValueError: a certificate's file is gone
                FAILING[tier] = str(error)

    env_api.router.add_api_route(TIERS_PATH, lambda: dict(FAILING))
    every_s = min(LOOK_EVERY_S, float(os.environ.get("KV_REDIS_VERIFY_S", LOOK_EVERY_S)))
    Repeater(look, every_s).start()
