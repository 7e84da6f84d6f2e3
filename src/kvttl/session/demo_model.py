"""Which language model the kit serves, and the perplexity of a prompt under it.

The model is ``google/gemma-3-270m-it`` where its weights are on the machine, and otherwise the
small Gemma-3 model under ``data/demo_model`` (see ``data/README.md``).  Nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvttl import PROJECT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GEMMA_ID = "google/gemma-3-270m-it"
DEMO_MODEL = PROJECT / "data" / "demo_model"
MODEL_DIR_VARIABLE = "KV_MODEL_DIR"  # names a local folder, as `prefer` does
MAX_TOKENS = 2048  # the longest context that the demo model was trained on
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


# ---- choosing the model --------------------------------------------------------------------


def model_path(prefer: str | None = None) -> str:
    """Return the folder of the model to serve; nothing is downloaded.

    The first of these that applies: `prefer`, the environment variable ``KV_MODEL_DIR``,
    ``google/gemma-3-270m-it`` from the local Hugging Face cache, the repository's own model.

    Parameters
    ----------
    prefer : str, optional
        A local folder with ``config.json`` and weights, or the id of a model in the local cache.

    Returns
    -------
    str
        An absolute path.

    Raises
    ------
    ValueError
        If `prefer` or ``KV_MODEL_DIR`` names a model that is not on this machine.
    FileNotFoundError
        If the repository's own model is needed and missing.
    """
    wanted = prefer or os.environ.get(MODEL_DIR_VARIABLE)
    if wanted:
        return _named_model(wanted)
    found = cached_snapshot(GEMMA_ID) or DEMO_MODEL
    if not has_weights(found):
        raise FileNotFoundError(f"no model in {found}: `make demo-model` makes one")
    return str(found)


def _named_model(name: str) -> str:
    """Return the folder of a model that the user named, or raise ValueError."""
    folder = Path(name).expanduser()
    found = folder.resolve() if has_weights(folder) else cached_snapshot(name)
    if found is None:
        raise ValueError(
            f"model {name!r} is not on this machine and nothing is downloaded: name a local "
            f"folder that holds config.json and its weights ({', '.join(WEIGHT_PATTERNS)}), "
            "or the id of a model whose weights are in the local Hugging Face cache"
        )
    return str(found)


def has_weights(folder: Path) -> bool:
    """Say whether `folder` holds ``config.json`` and all its weight files, none of them empty."""
    if not (folder / "config.json").is_file():
        return False
    files = {path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)}
    for index in folder.glob("*.index.json"):  # weights in several files: it names each
        files |= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    # is_file() follows links: a cache entry whose blob was deleted does not count.
    return bool(files) and all(path.is_file() and path.stat().st_size for path in files)


def cached_snapshot(hub_id: str, cache_dir: str | None = None) -> Path | None:
    """Return the folder of a model in the local Hugging Face cache, or None.

    Parameters
    ----------
    hub_id : str
        "owner/name"; a string that cannot be an id gives None.
    cache_dir : str, optional
        The cache to look in; by default the user's.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, cache_dir=cache_dir, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return folder if has_weights(folder) else None


# ---- perplexity ----------------------------------------------------------------------------


def _offline() -> None:
    """Keep transformers from asking the hub; must run before its first import."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@lru_cache(maxsize=4)
def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the folder `path` (cached)."""
    _offline()
    from transformers import AutoTokenizer  # seconds to import: only those who need it wait

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


@lru_cache(maxsize=2)
def load_model(path: str) -> PreTrainedModel:
    """Return the model in the folder `path`, in float32 on the CPU, ready to evaluate (cached)."""
    _offline()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # this takes a moment, and others' bars stand there
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval()


def prompt_perplexity(
    text_or_token_ids: str | list[int], path: str | None = None, max_tokens: int = MAX_TOKENS
) -> float:
    """Return the perplexity of a prompt: exp of the mean negative log-likelihood in nats.

    Each token but the first is scored given all before it.  A text is tokenized as the model
    wants it, so that its first token is ``<bos>``; token ids are taken as they are.

    Parameters
    ----------
    text_or_token_ids : str or list[int]
    path : str, optional
        The model's folder; by default ``model_path()``.
    max_tokens : int
        Only the first `max_tokens` tokens are scored.

    Returns
    -------
    float
        Dimensionless, at least 1: the number of equally likely next tokens that would be
        as hard to guess.

    Raises
    ------
    ValueError
        If there are fewer than 2 tokens.
    """
    path = path or model_path()
    ids = text_or_token_ids
    if isinstance(ids, str):
        ids = load_tokenizer(path)(ids, verbose=False)["input_ids"]
    ids = list(ids)[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(ids)}")
    import torch

    model = load_model(path)  # outside: weights made in inference mode know no gradients
    with torch.inference_mode():
        return math.exp(next_token_loss(model, torch.tensor([ids])).item())


def next_token_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats of ids, shape (batch, tokens), each given those before it."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=ids, use_cache=False).logits  # (batch, tokens, vocab)
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
