"""``python -m kvttl.server server ...``: ``lmcache server`` with this kit's policies by name."""

from __future__ import annotations

import sys

from kvttl.server.compat import NAME, register


def with_policies(arguments: list[str]) -> list[str]:
    """Return LMCache's arguments with this kit's policies where they name none.

    Examples
    --------
    >>> with_policies(["server", "--l2-store-policy=default"])[2:]
    ['--l2-prefetch-policy', 'kvttl']
    """
    given = {argument.partition("=")[0] for argument in arguments}
    missing = [o for o in ("--l2-store-policy", "--l2-prefetch-policy") if o not in given]
    return [*arguments, *(part for option in missing for part in (option, NAME))]


if __name__ == "__main__":
    register()
    from lmcache.cli.main import main

    main(with_policies(sys.argv[1:]))
