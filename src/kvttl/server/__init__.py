"""TTL and tier decisions inside an LMCache server, by its own ``--server-module``."""

from __future__ import annotations

from typing import Any


def build_server_modules(build_context: Any) -> Any:
    """Return what LMCache loads before it serves; wrong settings stop its start with a sentence."""
    from kvttl.server.module import build

    return build(build_context)
