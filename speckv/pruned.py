"""A drafter made of the target's first layers: embedding, position encoding and output head are the target's own.

Only the layers and the final norm belong to the drafter, so only they are trained and stored; with the rest shared
the pair takes hardly more memory than the target.
"""

import copy

import torch
from torch import nn

from speckv.cache import check_rollback
from speckv.errors import ModelError

KIND = "pruned"


def decoder_layers(model) -> tuple:
    """The name and ModuleList of the decoder layers inside model.base_model; raises ModelError where there is none."""
    for name, child in model.base_model.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == model.config.get_text_config().num_hidden_layers:
            return name, child
    raise ModelError(f"{type(model).__name__} has no plain list of decoder layers: it cannot be pruned to a drafter")


def _is_norm(module):
    """A final norm is the one other child whose parameters are all vectors."""
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.dim() == 1 for parameter in parameters)


def prune(target, num_layers: int):
    """A causal language model of the target's class with its first num_layers layers.

    The layers and the final norm are new, uninitialised modules on the meta device; everything else is shared with
    the target. The result is a transformers model like any other.
    """
    check_rollback(target, "target")
    name, layers = decoder_layers(target)
    if type(num_layers) is not int or not 1 <= num_layers < len(layers):
        raise ModelError(f"num_layers is {num_layers}: choose 1 to {len(layers) - 1}, the target has {len(layers)}")
    config = copy.deepcopy(target.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text_config = config.get_text_config()
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = text_config.layer_types[:num_layers]
    with torch.device("meta"):
        # eval() now: later it would reach the modules shared with the target.
        drafter = type(target)(config).eval()
    for child_name, child in target.base_model.named_children():
        if child_name != name and not _is_norm(child):
            setattr(drafter.base_model, child_name, child)
    drafter.set_output_embeddings(target.get_output_embeddings())
    # Buffers that are computed rather than stored (causal masks, frequencies) would otherwise stay without data.
    own_layers = decoder_layers(drafter)[1]
    computed = dict(layers.named_buffers())
    for key, buffer in list(own_layers.named_buffers()):
        if buffer.is_meta and key in computed:
            path, _, buffer_name = key.rpartition(".")
            setattr(own_layers.get_submodule(path), buffer_name, computed[key])
    drafter.generation_config = copy.deepcopy(target.generation_config)
    drafter.name_or_path = f"{target.name_or_path}[:{num_layers}]"
    return drafter


def own_state(drafter) -> dict:
    """The tensors that belong to the drafter alone, by their names in base_model."""
    name, _ = decoder_layers(drafter)
    own = [name, *(child for child, module in drafter.base_model.named_children() if _is_norm(module))]
    return {key: tensor for key, tensor in drafter.base_model.state_dict().items() if key.split(".")[0] in own}


def stored_layers(target, tensors: dict) -> int:
    """How many decoder layers there are tensors of, named as in own_state."""
    name, _ = decoder_layers(target)
    return len({key.split(".")[1] for key in tensors if key.startswith(f"{name}.")})


def fill(drafter, tensors: dict, dtype, device) -> None:
    """Give the drafter its own tensors; raises ModelError unless names and shapes are exactly those it wants."""
    wanted = own_state(drafter)
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise ModelError(f"the drafter's weights do not fit this target: {odd[0]} and {len(odd) - 1} more differ")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            raise ModelError(f"the drafter's weights do not fit this target: {key} is {list(tensor.shape)}, "
                             f"wanted {list(wanted[key].shape)}; make one with 'speckv distill'")
    converted = {key: tensor.to(device, dtype) for key, tensor in tensors.items()}
    drafter.base_model.load_state_dict(converted, strict=False, assign=True)
    for key, parameter in drafter.base_model.named_parameters():
        if key in wanted:
            parameter.requires_grad_(False)


def first_layers(target, num_layers: int) -> dict:
    """A copy of the target's own first layers and final norm, to start training from; the target must be dense."""
    wanted = own_state(prune(target, num_layers))
    state = target.base_model.state_dict()
    if any(state[key].shape != tensor.shape for key, tensor in wanted.items()):
        raise ModelError("the target's layers are quantized: distill from the dense model, then use the drafter "
                         "with any compression of it")
    return {key: state[key].detach().clone() for key in wanted}


def load(target, tensors: dict, num_layers: int):
    """The drafter of these tensors, joined to the target; raises ModelError where they do not fit it."""
    drafter = prune(target, num_layers)
    embedding = target.get_input_embeddings().weight
    fill(drafter, tensors, embedding.dtype, embedding.device)
    return drafter
