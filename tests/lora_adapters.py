"""Small LoRA adapters with random weights for the demo model."""

from __future__ import annotations

import json

from kvttl.session.demo_model import model_path


def make_adapter(folder, seed, rank=4):
    """Write an adapter that changes queries and values of every layer; returns its folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config, draw = AutoConfig.from_pretrained(model_path()), torch.Generator().manual_seed(seed)
    heads = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, count in heads.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(rank, config.hidden_size, generator=draw)
            up = torch.randn(count * config.head_dim, rank, generator=draw)
            weights |= {f"{at}.lora_A.weight": 0.2 * down, f"{at}.lora_B.weight": 0.2 * up}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": rank}
    settings |= {"lora_alpha": 2 * rank, "target_modules": list(heads)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)
