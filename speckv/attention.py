"""The attention of a few new tokens over a long KV cache, on a CPU, as an attention of transformers.

PyTorch's own takes 0.3 ms for one bf16 query over 300 positions of SmolLM2, a fifth of a step for all its layers;
speckv.kernels.decode_attention takes a tenth of that. A model asks for it by name:
model.set_attn_implementation(attention.NAME).
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from speckv.kernels import decode_attention, serving

NAME = "speckv"
MOST_QUERIES = 32  # where PyTorch's kernels for prompts become faster


def _mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function,
          attention_mask=None, **settings):
    """None where a token sees all before it and nothing else, as in the kernel; else the mask of sdpa."""
    # A static cache has positions behind the last token, and sdpa's None there means something else.
    is_whole = type(q_offset) is int and kv_offset == 0 and q_offset + q_length == kv_length
    may_skip = is_whole and settings.pop("allow_is_causal_skip", True)
    if may_skip and mask_function is causal_mask_function and attention_mask is None and q_length <= MOST_QUERIES:
        return None
    return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                     kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
                     **(settings | {"allow_is_causal_skip": may_skip}))


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **settings):
    """As transformers calls it: query [B, H, n, D], key and value [B, G, L, D]; returns [B, n, H, D] and None."""
    tokens, positions = query.shape[2], key.shape[2]
    is_plain = attention_mask is None and dropout == 0.0 and settings.get("position_bias") is None
    is_plain = is_plain and getattr(module, "is_causal", True) and query.device.type == "cpu"
    if is_plain and tokens <= MOST_QUERIES and not (torch.is_grad_enabled() and query.requires_grad):
        return decode_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    if attention_mask is None and 1 < tokens < positions:  # sdpa would count from the first position
        attention_mask = torch.ones(tokens, positions, dtype=torch.bool, device=query.device).tril(positions - tokens)
        attention_mask = attention_mask[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                  **settings)


def use(model) -> bool:
    """Have a model attend through the kernel where it is faster and does the same; returns whether it does.

    That is on a CPU with the C++ kernels, for a model that attends through PyTorch's sdpa.
    """
    if model.device.type != "cpu" or serving()["cpu"][0] != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME
