"""On a CPU vLLM 0.30 gives requests without an adapter, beside one with, the last adapter.

In the index of a token's adapter -1 means none, and PyTorch takes -1 for the last row (vLLM pull
request 48421). The texts are wrong, and so is the KV that goes to LMCache under no salt.
"""

import functools


def spare_tokens_without_adapter() -> None:
    """Let adapters add nothing to tokens that have none; in the process that runs the model."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_expand", "bgmv_expand_slice"):  # what adds to the model's own output
        spared = _spared(getattr(lora_ops, name))
        for module in (lora_ops, punica_cpu):
            setattr(module, name, spared)


def _spared(expand):
    @functools.wraps(expand)
    def spared(inputs, weights, output, indices, *rest, **options):
        inputs = inputs.masked_fill((indices < 0).unsqueeze(1), 0)
        return expand(inputs, weights, output, indices, *rest, **options)

    return spared
