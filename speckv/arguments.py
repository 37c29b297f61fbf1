"""What speckv.generate accepts: every argument is checked here, before any work."""

import math
import numbers
import operator
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from speckv.cache import context_limit, rope_switch, vocabulary_size
from speckv.drafters import other_vocabulary
from speckv.errors import InputError, ModelError
from speckv.processors import checked_callables

# Settings of a generation_config that change what plain decoding would write. Alone, speckv.generate does not apply
# them; speckv.custom_generate does.
IGNORED_SETTINGS = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
                    "begin_suppress_tokens", "min_length", "min_new_tokens", "sequence_bias", "forced_bos_token_id",
                    "forced_eos_token_id", "exponential_decay_length_penalty")


@dataclass(frozen=True)
class Settings:
    """The arguments of one call, checked; prompt [1, n] i64 is without its padding."""

    prompt: torch.Tensor
    max_new_tokens: int
    temperature: float
    seed: int | None
    eos_ids: frozenset
    filters: dict  # those of top_k, top_p and min_p that are on
    processors: tuple  # see speckv.processors
    criteria: tuple


def checked_settings(target, drafter, policy, input_ids, attention_mask, max_new_tokens, temperature, seed,
                     eos_token_id, top_k, top_p, min_p, logits_processor, stopping_criteria) -> Settings:
    """Settings from the arguments of speckv.generate; raises InputError or ModelError, naming what is wrong."""
    prompt = _prompt(input_ids, attention_mask, vocabulary_size(target))
    max_new_tokens = _integer("max_new_tokens", max_new_tokens)
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}: it must be 0 or more")
    seed = checked_seed(seed)
    _check_pair(target, drafter, checked_gamma(policy, drafter), prompt.shape[1], max_new_tokens)
    if logits_processor is None:  # who gives a list, if an empty one, has seen to the generation_config
        _warn_of_ignored_settings(target)
    return Settings(prompt, max_new_tokens, _temperature(temperature), seed, _eos_ids(target, eos_token_id),
                    _filters(top_k, top_p, min_p), checked_callables("logits_processor", logits_processor),
                    checked_callables("stopping_criteria", stopping_criteria))


def checked_gamma(policy, drafter) -> int:
    """How many tokens the policy would draft next; raises InputError where that is no number, or nothing can draft."""
    gamma = _integer(f"the draft length of policy {getattr(policy, 'name', policy)!r}", policy.max_draft())
    if gamma < 0:
        raise InputError(f"policy {policy.name} asks for {gamma} draft tokens: it must be 0 or more")
    if gamma > 0 and drafter is None:
        raise InputError(f"policy {policy.name} drafts tokens: give a drafter, or choose policy 'off'")
    return gamma


def checked_seed(seed) -> int | None:
    """A seed that a torch.Generator takes, or None; raises InputError for anything else."""
    if seed is None:
        return None
    seed = _integer("seed", seed)
    if not -2 ** 63 <= seed < 2 ** 64:
        raise InputError(f"seed is {seed}: it must fit in 64 bits")
    return seed


def _integer(name, value) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{name} is {value!r}: it must be a whole number")


def _temperature(temperature) -> float:
    if isinstance(temperature, torch.Tensor) and temperature.numel() == 1:
        temperature = temperature.item()
    usable = isinstance(temperature, numbers.Real) and math.isfinite(temperature)
    # The kernels take it as fp32; a positive one that would become 0 or infinite there is refused too.
    if not usable or not (temperature == 0 or 1e-37 <= temperature <= torch.finfo(torch.float32).max):
        raise InputError(f"temperature is {temperature}: it must be 0 (greedy) or a positive number")
    return float(temperature)


def _filters(top_k, top_p, min_p) -> dict:
    top_k = _integer("top_k", top_k)
    if not 0 <= top_k < 2 ** 63:
        raise InputError(f"top_k is {top_k}: it must be 0 (off) or a positive number of tokens")
    for name, value, off in (("top_p", top_p, 1), ("min_p", min_p, 0)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
            raise InputError(f"{name} is {value}: it must be a number from 0 to 1, where {off} is off")
    filters = {"top_k": top_k, "top_p": float(top_p), "min_p": float(min_p)}
    return {name: value for name, value in filters.items() if value != (1.0 if name == "top_p" else 0)}


def _prompt(input_ids, attention_mask, vocabulary):
    if not isinstance(input_ids, torch.Tensor):
        raise InputError(f"input_ids is a {type(input_ids).__name__}: it must be a tensor [1, n] of token ids, as "
                         "tokenizer(text, return_tensors='pt').input_ids")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise InputError(f"input_ids has shape {list(input_ids.shape)}: it must be [1, n] with at least one token")
    if input_ids.shape[0] != 1:
        raise InputError(f"input_ids holds {input_ids.shape[0]} sequences: this version decodes one at a time")
    if input_ids.dtype.is_floating_point or input_ids.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise InputError(f"input_ids is {input_ids.dtype}: token ids are whole numbers")
    lowest, highest = input_ids.min().item(), input_ids.max().item()
    if lowest < 0 or highest >= vocabulary:
        raise InputError(f"input_ids holds {lowest if lowest < 0 else highest}: the target's ids are 0 to "
                         f"{vocabulary - 1}")
    if attention_mask is None:
        return input_ids.long()
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {list(getattr(attention_mask, 'shape', []))}, input_ids "
                         f"{list(input_ids.shape)}: they must be the same")
    visible = attention_mask[0].bool().nonzero().flatten()
    if len(visible) == 0:
        raise InputError("attention_mask hides the whole prompt: at least one token must be visible")
    first, last = visible[0].item(), visible[-1].item()
    if last - first + 1 != len(visible):
        raise InputError("attention_mask hides tokens in the middle of the prompt: only padding at its ends can be "
                         "hidden")
    # With one sequence, leaving padding out is the same as masking it, positions included.
    return input_ids[:, first:last + 1].long()


def _check_pair(target, drafter, gamma, prompt_length, max_new_tokens):
    limits, switches = [context_limit(target)], [rope_switch(target)]
    if drafter is not None:
        if drafter.vocabulary != vocabulary_size(target):
            raise ModelError(other_vocabulary(drafter.vocabulary, vocabulary_size(target)))
        if gamma > 0:
            limits.append(drafter.context)
            switches.append(drafter.rope_switch)
    needed = prompt_length + max_new_tokens
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and needed > limit:
        raise InputError(f"a prompt of {prompt_length} tokens and {max_new_tokens} new ones need {needed} positions, "
                         f"the models have {limit}: shorten the prompt or lower max_new_tokens")
    for switch in switches:
        if switch is not None and prompt_length <= switch < needed:
            raise InputError(f"the model changes its position encoding after {switch} tokens, and a pass over several "
                             f"tokens may straddle that: lower max_new_tokens to {switch - prompt_length}")


def _warn_of_ignored_settings(target):
    config = target.generation_config
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0}
    found = [name for name in IGNORED_SETTINGS
             if getattr(config, name, None) not in (None, neutral.get(name))] if config is not None else []
    if found:
        warnings.warn(f"speckv decodes from the target's logits alone and does not apply {', '.join(found)} of its "
                      "generation_config: model.generate(custom_generate=speckv.custom_generate) does", stacklevel=5)
    # Other implementations hold the same numbers, and their text is the one written.
    if getattr(config, "cache_implementation", None) == "quantized":
        warnings.warn("speckv keeps a cache of its own and does not quantize it: cache_implementation='quantized' of "
                      "the target's generation_config is ignored", stacklevel=5)


def _eos_ids(target, eos_token_id):
    if eos_token_id is None and target.generation_config is not None:
        eos_token_id = target.generation_config.eos_token_id
    if eos_token_id is None:
        return frozenset()
    if isinstance(eos_token_id, torch.Tensor):
        eos_token_id = eos_token_id.flatten().tolist()
    ids = [eos_token_id] if isinstance(eos_token_id, numbers.Integral) else eos_token_id
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InputError(f"eos_token_id is {eos_token_id!r}: it must be an id, a list of ids, or None")
    return frozenset(_integer("eos_token_id", token) for token in ids)
