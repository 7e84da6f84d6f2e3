"""The model of `make bench`: random weights, much computing for each byte of KV cache.

The demo model computes 1,800 tokens as fast as LMCache loads them; in the field a miss costs 10 to
50 times a hit. This one has one KV head for sixteen heads and a wide MLP. vLLM makes its weights at
the start (``load_format="dummy"``): nothing is downloaded, and its answers mean nothing.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvttl.session.demo_model import DEMO_MODEL

BENCH_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 6144,
    "num_hidden_layers": 3,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@contextmanager
def bench_model() -> Iterator[str]:
    """Yield a folder with the model's config and the demo model's tokenizer, while the block runs.

    Examples
    --------
    >>> from kvttl.lmcache.kv_size import kv_bytes_per_token
    >>> with bench_model() as folder:
    ...     kv_bytes_per_token(folder)
    768
    """
    with tempfile.TemporaryDirectory(prefix="kv-bench-model-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(BENCH_MODEL))
        for name in _TOKENIZER:
            shutil.copy(DEMO_MODEL / name, folder)
        yield folder
