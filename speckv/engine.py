"""The decoder layers of a Llama-like model on a CPU, in one call for all of them.

For one token a model in PyTorch reads its weights at a fraction of what the memory gives, and spends the rest on some
ten small operations a layer. The C++ kernels (csrc/decoder.cpp) read the weights where they lie, as fast as they come,
and every token has the same logits to the last bit however many are read with it: a text verified in drafts is that of
plain decoding, in bf16 and NF4 as in fp32.

What is computed differs from the model in PyTorch by rounding only: activations stay in fp32 between the products,
whose inputs are rounded to bf16 where the weights are bf16 or NF4.
"""

import weakref

import torch
from torch import nn
from torch.nn.functional import pad

from speckv.errors import ModelError
from speckv.int8 import Int8Linear
from speckv.kernels import serving
from speckv.pruned import decoder_layers

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not change with the length of the text
ROOM = 256  # tokens: the cache grows by at least so many
MOST_ROWS = 128  # tokens read together; twice as many are read no faster
_NO_TENSOR = torch.empty(0)


def why_not(model) -> str | None:
    """Why this model's layers cannot be computed here, or None where they can."""
    try:
        DecoderStack(model)
    except ModelError as error:
        return str(error)
    return None


def _why_unknown(model):
    """What of a model's configuration is not known here, or None."""
    if serving()["cpu"][0] != "cpu":
        return f"the C++ kernels are not in use: {serving()['cpu'][1]}"
    if model.device.type != "cpu":
        return f"the model is on {model.device}, the fast path is for CPUs"
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in MODEL_TYPES:
        return f"{type(model).__name__} is not one of {', '.join(MODEL_TYPES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()) or (
            getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None)):
        return "some of its layers attend to a sliding window"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        return f"its position encoding is {rope['rope_type']}"
    return None


class HeldMatrix:
    """A linear map for a few rows: nn.Linear (fp32, bf16), bitsandbytes' NF4, FP4 and int8, Int8Linear, or a tensor.

    Called with x [m, K] f32 it returns [m, N] f32. The weights are shared, not copied, but for 4-bit ones that
    bitsandbytes has not brought into its layout for CPUs. Raises ModelError for other modules.
    """

    def __init__(self, module):
        self.number = torch.ops.speckv.open_matrix(*_parts(module))
        weakref.finalize(self, torch.ops.speckv.close_matrix, self.number)

    def __call__(self, x):
        return torch.ops.speckv.multiply_matrix(self.number, x)


class DecoderStack:
    """The decoder layers and final norm of a model of transformers; open() starts on a sequence.

    Raises ModelError for a model with parts that are not known here.
    """

    def __init__(self, model):
        if reason := _why_unknown(model):
            raise ModelError(reason)
        config = model.config.get_text_config(decoder=True)
        rotary = model.base_model.rotary_emb
        attention = decoder_layers(model)[1][0].self_attn
        heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or heads
        self.head_size = attention.head_dim
        self.num_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.cache_dtype = model.get_input_embeddings().weight.dtype  # what the model's own cache would have
        tensors, table = [], _NO_TENSOR
        for layer in decoder_layers(model)[1]:
            norms = (layer.input_layernorm, layer.post_attention_layernorm,
                     getattr(layer.self_attn, "q_norm", None), getattr(layer.self_attn, "k_norm", None))
            tensors += [_NO_TENSOR if norm is None else norm.weight.detach().float() for norm in norms]
            for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
                           layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                *parts, own_table = _parts(module)
                tensors += parts
                if len(own_table) and len(table) and not torch.equal(own_table, table):
                    raise ModelError(f"{type(model).__name__} holds its matrices in more than one quantized format")
                table = own_table if len(own_table) else table
        self.is_quantized = len(table) > 0
        tensors = [model.base_model.norm.weight.detach().float(), rotary.inv_freq.float(), table, *tensors]
        try:
            self.number = torch.ops.speckv.open_decoder(
                tensors, heads, self.groups, self.head_size, config.rms_norm_eps, attention.scaling,
                rotary.attention_scaling)
        except RuntimeError as error:
            raise ModelError(f"{type(model).__name__}: {error}") from error
        weakref.finalize(self, torch.ops.speckv.close_decoder, self.number)

    def open(self):
        return StackSession(self)


class StackSession:
    """One sequence going through a DecoderStack; rolling back moves a counter."""

    def __init__(self, stack):
        self.length = 0  # tokens in the cache
        self.keys = self.values = torch.empty(stack.num_layers, stack.groups, 0, stack.head_size,
                                              dtype=stack.cache_dtype)

    def fill(self, cache) -> None:
        """Take over what the model in PyTorch has read of the sequence into a DynamicCache."""
        self.rollback(0)
        self.make_room(cache.get_seq_length())
        self.length = cache.get_seq_length()
        for i, layer in enumerate(cache.layers):
            self.keys[i, :, :self.length] = layer.keys[0]
            self.values[i, :, :self.length] = layer.values[0]

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def make_room(self, count):
        """For so many tokens more."""
        length, have = self.length + count, self.keys.shape[2]
        if length > have:
            self.keys, self.values = (pad(old, (0, 0, 0, max(length + ROOM, 2 * have) - have))
                                      for old in (self.keys, self.values))


def embedding_weight(model) -> torch.Tensor:
    """The rows [V, H] that a model's tokens begin as; raises ModelError where they are not those of a plain table."""
    module = model.get_input_embeddings()
    if type(module) is not nn.Embedding or module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"the fast path does not know an embedding of type {type(module).__name__} in "
                         f"{module.weight.dtype}")
    return module.weight.detach()


def _parts(module):
    """What csrc/matrices.h wants of a linear map: weight, scale, bias and table, with empty tensors for none."""
    if isinstance(module, torch.Tensor):
        return module.detach().contiguous(), _NO_TENSOR, _NO_TENSOR, _NO_TENSOR
    if not isinstance(module, Int8Linear | nn.Linear):
        raise ModelError(f"the fast path does not know a linear map of type {type(module).__name__}")
    bias = _NO_TENSOR if module.bias is None else module.bias.detach()
    if isinstance(module, Int8Linear):
        return module.weight, module.scale, bias, _NO_TENSOR
    if hasattr(module, "state") and module.weight.dtype == torch.int8:  # bitsandbytes' LLM.int8()
        return (*_eight_bit(module), bias, torch.tensor([module.state.threshold], dtype=torch.float32))
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        return (*_four_bit(module, state), bias, state.code)
    if type(module) is not nn.Linear or module.weight.dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"the fast path does not know a linear map of type {type(module).__name__} in "
                         f"{module.weight.dtype}")
    return module.weight.detach().contiguous(), _NO_TENSOR, bias, _NO_TENSOR


def _eight_bit(module):
    """Weight [N, K] i8 and scale [N] f32."""
    state = module.state
    # A first product moves them from the weight to the state.
    scale = module.weight.SCB if getattr(module.weight, "SCB", None) is not None else state.SCB
    weight = state.CB if state.CB is not None else module.weight.detach()
    if scale is None:
        raise ModelError("an int8 matrix of bitsandbytes has lost its scales")
    return weight.contiguous(), scale.float().contiguous()


def _four_bit(module, state):
    """Indices [N, K / 2] u8 and scale [K / 64, N] bf16 in bitsandbytes' layout for CPUs."""
    rows, columns = state.shape
    if rows % 32 or columns % 64 or state.blocksize != 64:
        raise ModelError(f"the fast path wants 4-bit matrices of 32 rows and 64 columns or multiples, in blocks of "
                         f"64: {rows} x {columns} in blocks of {state.blocksize}")
    if not getattr(state, "packing_format_for_cpu", False):
        # Where bitsandbytes has a kernel for it, a first product brings the weights into that layout in place.
        module(torch.zeros(1, columns, dtype=module.compute_dtype or state.dtype))
        state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return module.weight.detach().view(rows, columns // 2), state.absmax
    return _packed(module.weight.detach(), rows, columns), _scale(state, rows, columns)


def _packed(weight, rows, columns):
    nibbles = weight.view(torch.uint8).reshape(rows, columns // 2)
    pairs = torch.stack([nibbles >> 4, nibbles & 15], dim=-1)  # [rows, columns / 2, 2], the even column first
    blocks = pairs.view(rows // 32, 2, 16, columns // 2, 2).permute(1, 0, 3, 2, 4)
    return (blocks[0] | blocks[1] << 4).reshape(rows, columns // 2).contiguous()


def _scale(state, rows, columns):
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return absmax.view(rows, columns // 64).T.to(torch.bfloat16).contiguous()
