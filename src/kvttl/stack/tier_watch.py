"""In LMCache's server process: tries disk and Redis again and again, and says over HTTP what fails.

LMCache reports a store that failed to nobody but its log.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from kvttl.background import Repeater
from kvttl.lmcache.client import TIERS_PATH
from kvttl.lmcache.tiers import addresses
from kvttl.stack.reconcile import server_options
from kvttl.storage.probes import TierError, probe_folder, probe_redis
from kvttl.storage.redis_client import connect_as_server

LOOK_EVERY_S = 5.0  # or more often, as redis_verify_s is


def _try_redis(host, port):
    with connect_as_server(host, port) as client:
        probe_redis(client)


# What tries a tier, by the tier's address; a tier without one counts as healthy.
TRY_OF: dict[str, Callable[..., None]] = {"disk": probe_folder, "remote": _try_redis}


class TierWatch:
    """Knows which tiers took a write the last time, and why the others did not.

    Parameters
    ----------
    places : mapping
        Tier -> its address.
    """

    def __init__(self, places: Mapping[str, tuple]) -> None:
        self._places = {tier: place for tier, place in places.items() if tier in TRY_OF}
        self._errors: dict[str, str] = {}

    def look(self) -> None:
        """Try every tier once."""
        for tier, place in self._places.items():
            try:
                TRY_OF[tier](*place)
                self._errors.pop(tier, None)
            except (TierError, ValueError) as error:  # ValueError: a certificate's file is gone
                self._errors[tier] = str(error)

    def errors(self) -> dict[str, str]:
        """Return why tiers take no writes, by tier."""
        return dict(self._errors)


def watch_tiers(server_arguments: list[str]) -> None:
    """Watch the tiers of ``lmcache server <arguments>`` from its process, and add `TIERS_PATH`."""
    from lmcache.v1.internal_api_server.common import env_api  # one of the routers it takes up

    watch = TierWatch(addresses(server_options(server_arguments).l2_adapter))
    every_s = min(LOOK_EVERY_S, float(os.environ.get("KV_REDIS_VERIFY_S", LOOK_EVERY_S)))
    env_api.router.add_api_route(TIERS_PATH, watch.errors)
    Repeater(watch.look, every_s).start()
