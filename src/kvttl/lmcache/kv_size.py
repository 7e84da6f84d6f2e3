"""Bytes that a token's KV cache takes in LMCache, from a model's Hugging Face ``config.json``."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvttl import user_path

# What `vllm serve --kv-cache-dtype` may say -> bits a value; "auto" is 16 in vLLM, also where
# weights are float32, or 8 where the checkpoint says so. Types with scales beside the values are
# not here.
KV_BITS = {"auto": 16, "float16": 16, "bfloat16": 16, "fp8": 8, "fp8_e4m3": 8, "fp8_e5m2": 8}
_HEADS = "num_key_value_heads num_kv_heads n_head_kv multi_query_group_num num_attention_heads"
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention")
# How fields begin that tell of more than keys and values of one size in each layer: recurrent
# states, indexers, cross attention, heads that differ by layer.
_OTHER = "mamba ssm_ linear_ conv_ rwkv lru_ state_size hybrid_ layers_block_type block_configs "
_OTHER += "index_topk compress_ratios is_encoder_decoder is_heterogeneous global_head_dim"


def kv_bytes_per_token(model: str | Path | Mapping[str, Any], kv_dtype: str = "auto") -> int:
    """Return the bytes of a token's KV cache, of all layers and all ranks together.

    Layers with a sliding window count in full: LMCache keeps every token of every layer
    (``--disable-hybrid-kv-cache-manager``). Heads that several ranks hold count once.

    Parameters
    ----------
    model : str, Path or mapping
        A ``config.json``, its folder, or its content. Nothing is downloaded.
    kv_dtype : str
        Of `KV_BITS`.

    Raises
    ------
    ValueError
        Names the field, its value and what is allowed; also where a model keeps something else
        than keys and values (linear attention, Mamba), which would be counted wrong.

    Examples
    --------
    >>> llama = {"model_type": "llama", "num_hidden_layers": 32, "num_key_value_heads": 8}
    >>> kv_bytes_per_token(llama | {"num_attention_heads": 32, "hidden_size": 4096})
    131072
    """
    if kv_dtype not in KV_BITS:
        raise ValueError(f"kv_dtype must be one of {', '.join(KV_BITS)}, got {kv_dtype!r}")
    whole = model if isinstance(model, Mapping) else _read(model)
    text = whole.get("text_config") or whole
    known = _known(text)
    for name in ("is_heterogeneous", *vars(known)):
        value = getattr(known, name, None)
        odd = set(value or ()) - {*_ATTENTION} if name == "layer_types" else value
        if odd and name.startswith(("layer_types", *_OTHER.split())):
            allowed = "attention in every layer, with a window or not, and heads of one size"
            raise ValueError(f"model must have {allowed}, got {name} = {odd!r:.80}")
    layers = _count(text, known, "num_hidden_layers") - getattr(known, "num_kv_shared_layers", 0)
    bits = 8 if kv_dtype == "auto" and _says_8_bits(whole) else KV_BITS[kv_dtype]
    return layers * _values(text, known) * bits // 8


def _values(text, known):
    """Return how many numbers a layer keeps of a token."""
    if getattr(known, "kv_lora_rank", None) and known.model_type != "minicpm3":  # which unfolds it
        return _count(text, known, "kv_lora_rank") + _count(text, known, "qk_rope_head_dim")
    one = getattr(known, "multi_query", False) and not getattr(known, "new_decoder_architecture", 0)
    heads = 1 if one else _count(text, known, _HEADS)
    if getattr(known, "head_dim", None):
        return 2 * heads * _count(text, known, "head_dim")
    width = _count(text, known, "hidden_size") // _count(text, known, "num_attention_heads")
    return 2 * heads * width


def _read(model):
    path = user_path(model)
    try:
        config = json.loads((path / "config.json" if path.is_dir() else path).read_bytes())
        return dict(config)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"MODEL must be a config.json or its folder: {error}") from error


def _known(text):
    """Return a config with what transformers knows of its model type, itself for others."""
    from transformers import CONFIG_MAPPING

    kind = text.get("model_type")
    if kind not in CONFIG_MAPPING:
        return SimpleNamespace(**{"model_type": kind, **text})
    try:
        return CONFIG_MAPPING[kind](**{k: v for k, v in text.items() if k != "model_type"})
    except Exception as error:  # each class has checks, and exceptions, of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json must be one of {kind!r}: {reason:.200}") from error


def _says_8_bits(config):
    said = config.get("quantization_config") or {}
    scheme = said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo") or {}
    return scheme.get("num_bits") == 8 if isinstance(scheme, dict) else scheme.lower() == "fp8"


def _count(text, known, names):
    """Return the first of some fields that is there; as the file has it, not transformers."""
    for name in names.split():
        if (value := text.get(name, getattr(known, name, None))) is not None:
            break
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} of config.json must be a whole number >= 1, got {value!r}")
    return value
