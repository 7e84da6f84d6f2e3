"""The LMCache server's module (`kvttl.server`), asked as anybody may ask it, and its records."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import requests

from kvttl.lmcache.salts import chunk_key
from kvttl.manager.claims import owner_of

Key = tuple[str, str]  # hash of a chunk, tenant's salt


class Module:
    """A module's routes.

    Parameters
    ----------
    url : str
        Of the server's HTTP port, without anything between.
    model : str
        Whose KV cache is meant.
    """

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model, self._since_s = f"{url}/kvttl", model, 0.0

    def status(self) -> dict[str, Any]:
        return requests.get(f"{self._url}/status", timeout=10).json()

    def wanted(self, keys: Iterable[Key], now_s: float) -> dict[Key, str | None]:
        """Return the tier that live claims want each chunk in."""
        keys = list(keys)
        body = {"keys": [chunk_key(*key) for key in keys], "now_s": now_s}
        return dict(zip(keys, self._ask("claims", body)["wanted"]))

    def shown(self) -> dict[Key, set[str]]:
        """Return where the module takes chunks to be."""
        answer = self._ask("layout", {})
        keys = [tuple(key.partition("@")[::2]) for key in answer["keys"]]
        return {key: set(tiers) for key, tiers in zip(keys, answer["tiers"])}

    def change(self, **settings: Any) -> int:
        """Change settings; returns the answer's HTTP status."""
        return requests.patch(f"{self._url}/config", json=settings, timeout=30).status_code

    def records(self) -> list[dict]:
        """Return the records since the last call; those that it made before it died are gone."""
        rows, more = [], True
        with suppress(requests.RequestException):
            while more:
                query = f"since={self._since_s!r}&limit=1000"
                page = requests.get(f"{self._url}/decisions?{query}", timeout=10).json()
                self._since_s, more = page["next"], page["more"]
                rows += page["records"]
        return rows

    def _ask(self, name, body):
        answer = requests.post(
            f"{self._url}/{name}", json={"model": self._model} | body, timeout=30
        )
        answer.raise_for_status()
        return answer.json()


class Endings:
    """Says by records which chunks had no claim for a moment: these may be gone.

    Parameters
    ----------
    held : dict, optional
        Owner -> the chunks that it claims, and until when.
    """

    def __init__(self, held: dict[str, tuple[set[str], float]] | None = None) -> None:
        self._held = held or {}
        self._ended: set[str] = set()
        self._dropped: set[str] = set()  # owners

    def take(self, row: dict) -> None:
        """Take one more record, of the server or of a log; the same one twice does no harm."""
        owner, keys = row["prompt_digest"], set(row["chunk_keys"])
        if row["kind"] in ("generation", "claim") and row["ttl_s"] and row["wanted_tier"] and keys:
            self._held[owner] = keys, row["time_s"] + row["ttl_s"]
        elif row["kind"] in ("expiry", "settled") and row["wanted_tier"] is None:
            self._dropped.add(owner)
            mine, until_s = self._held.get(owner, (set(), 0.0))
            others = (held for name, (held, _) in self._held.items() if name != owner)
            self._ended |= mine.difference(*others)
            if until_s <= row["time_s"]:  # else it was claimed again meanwhile
                self._held.pop(owner, None)

    def excuses(self, key: Key) -> bool:
        """Say whether a chunk's last claim has ended, an adopted one's too."""
        name = chunk_key(*key)
        return name in self._ended or owner_of(name) in self._dropped

    def go_on(self) -> Endings:
        """Return one that knows what this one does, and starts anew."""
        return Endings(self._held)
