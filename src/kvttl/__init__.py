"""TTL and tier decisions for KV caches: the rooms behind the three modules beside this package.

`caching_heuristics`, `cache_controller` and `tiered_caching` are the doors; the README's
"Where things are" says what each wing of this package is for and what it may import.
"""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]  # the checkout: `data/` and `config.yaml` lie there
