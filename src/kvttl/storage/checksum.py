"""The checksum at the end of every chunk on disk and in Redis: it finds damage, not forgery."""

import xxhash

_MARK = b"kvttlsum"  # tells such a copy from one of LMCache alone, which ends with its last value
CHECKSUM_BYTES = len(_MARK) + 16


def checksum(name: str, payload: object) -> bytes:
    """Return what stands behind a payload (bytes-like) that is stored under `name`.

    The name is part of it: a copy in another one's place is damaged, too. XXH3 with 128 bits takes
    0.03 ms a MB; CRC-32 takes ten times as long.

    Examples
    --------
    >>> checksum("a", b"chunk") == checksum("b", b"chunk")
    False
    """
    seed = xxhash.xxh3_64_intdigest(name.encode())
    return _MARK + xxhash.xxh3_128_digest(payload, seed=seed)


def has_checksum(end: bytes) -> bool:
    """Say whether a copy whose last `CHECKSUM_BYTES` are `end` has a checksum, right or wrong."""
    return end.startswith(_MARK)
