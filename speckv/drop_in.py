"""Speculation inside transformers' own call: model.generate(..., custom_generate=speckv.custom_generate).

transformers reads the generation_config, makes logits processors and stopping criteria of it and hands them over; here
they become arguments of speckv.generate, or are refused in words that name the setting.
"""

import inspect
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    MinPLogitsWarper,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from speckv.arguments import checked_seed
from speckv.batch import generate_batch
from speckv.cache import vocabulary_size
from speckv.drafters import as_drafter
from speckv.errors import InputError
from speckv.models import load_drafter
from speckv.policies import parse_policy
from speckv.processors import process

# Settings that arrive as logits processors and stopping criteria, and those that are read here.
HONOURED = frozenset("""
    max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample temperature top_k top_p min_p
    top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    watermarking_config num_return_sequences output_scores output_logits return_dict_in_generate pad_token_id
    bos_token_id eos_token_id token_healing
""".split())
# Settings that change nothing about what sampling or greedy decoding of one text writes: those of beams alone, of an
# assistant alone, of caches and compilation.
WITHOUT_EFFECT = frozenset("""
    early_stopping length_penalty low_memory use_cache max_cache_len num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type compile_config disable_compile continuous_batching_config
    decoder_start_token_id transformers_version
""".split())
_BEAMS = "speculation writes one text at a time, it cannot compare beams: leave it out"
_OTHER_DRAFT = "speckv drafts in another way: leave it out and give draft_model="
_OWN_CACHE = "speckv keeps its own cache, which it can roll back: leave it out"
_ONE_POSITION = "several tokens are read in a pass, and transformers gives these a token: leave it out"
REFUSED = {  # name: the values that ask for nothing, and why no other will do
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0.0,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "penalty_alpha": ((0.0,), "contrastive search compares hidden states of candidates: leave it out"),
    "dola_layers": ((), "DoLa contrasts the logits of layers, of which the last alone are read: leave it out"),
    "guidance_scale": ((1, 1.0), "classifier-free guidance runs the model a second time in a processor that keeps a "
                                 "cache, and cannot go back where a draft is rejected: leave it out"),
    "prompt_lookup_num_tokens": ((), 'speckv looks up by itself: leave it out and give draft_model="lookup"'),
    "assistant_early_exit": ((), _OTHER_DRAFT),
    "use_mtp": ((False,), _OTHER_DRAFT),
    "is_assistant": ((False,), "the model that drafts is given to the target's generate as draft_model="),
    "cache_implementation": (("dynamic",), _OWN_CACHE),
    "cache_config": ((), _OWN_CACHE),
    "prefill_chunk_size": ((), "prompts are read in one pass: leave it out"),
    "output_attentions": ((False,), _ONE_POSITION),
    "output_hidden_states": ((False,), _ONE_POSITION),
}
STATEFUL = {  # processors that are not functions of ids and scores
    UnbatchedClassifierFreeGuidanceLogitsProcessor: REFUSED["guidance_scale"][1],
    SynthIDTextWatermarkLogitsProcessor: "it counts its calls, those for rejected draft tokens too; a "
                                         "WatermarkingConfig works",
}
# What the ops do themselves, in transformers' order: the attribute of the warper, and the argument it becomes.
FUSED = ((TemperatureLogitsWarper, "temperature"), (TopKLogitsWarper, "top_k"), (TopPLogitsWarper, "top_p"),
         (MinPLogitsWarper, "min_p"))
CACHES = ("cache", "past_key_values")  # its name in transformers from 5.24 on, and before
# What model.generate always passes on and what means nothing to a loop that feeds the model itself.
MODEL_ARGUMENTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "output_attentions",
                   "output_hidden_states", *CACHES)


def custom_generate(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None,
                    draft_model=None, policy="adaptive", fast=False, seed=None, on_step=None, **model_kwargs):
    """For transformers' generate: model.generate(**inputs, custom_generate=speckv.custom_generate, draft_model=...).

    draft_model is what speckv.load_drafter returns, any model with the target's tokenizer, a Drafter, or a name for
    load_drafter, which is then loaded at every call; None with policy "off". policy, fast and on_step are those of
    speckv.generate. seed makes a sampled text repeatable whatever drafts, as speckv.generate's does; where it is None,
    torch.manual_seed does so for policies that do not go by measured time, as "adaptive" does.

    All other arguments are those of model.generate and mean what they mean there: sampling, penalties, processors and
    criteria of your own, streamer, return_dict_in_generate. Greedy texts are those of model.generate (in fp32; see
    docs/transformers.md), sampled ones have its distribution. Processors must be functions of (ids, scores), see
    speckv.processors. stop_strings is the one setting that transformers itself does not let through: give
    stopping_criteria=[StopStringCriteria(tokenizer, strings)].

    Rows of a batch, which is padded on the left, are decoded by speckv.generate_batch: a row's text does not depend on
    its neighbours, and is followed by pad_token_id where theirs are longer. scores and logits are 0 behind a row's end.

    Returns what model.generate returns: sequences [B, L] i64, or a GenerateDecoderOnlyOutput without attentions,
    hidden states and cache. Raises InputError for what cannot be honoured, and what speckv.generate raises.
    """
    call = _call_of_generate()
    streamer = call.get("streamer") if streamer is None else streamer
    _check(generation_config, logits_processor, call, model_kwargs)
    padding = _left_padding(input_ids, model_kwargs)
    drafter = _drafter(draft_model, parse_policy(policy), model)
    batch, prompt_length = input_ids.shape
    max_new_tokens, eos_ids, criteria = _split_criteria(stopping_criteria, prompt_length)
    if batch > 1:
        _check_batch(streamer, criteria, generation_config)

    wants = {name for name in ("scores", "logits")
             if generation_config.return_dict_in_generate and getattr(generation_config, f"output_{name}")}
    if not generation_config.do_sample:
        processors, sampling, seeds = list(logits_processor), {"temperature": 0.0}, [None] * batch
    else:
        # Scores are what is sampled from: where they are asked for, the ops are left nothing to do.
        processors, sampling = (list(logits_processor), {}) if wants else _split_warpers(logits_processor)
        sampling, seeds = {"temperature": 1.0} | sampling, _seeds(seed, batch)
    rows = [_Row(i, input_ids, padding[i], processors, criteria, wants) for i in range(batch)]
    requests = [{"input_ids": row.prompt, "seed": row_seed,
                 "logits_processor": [row.process] if processors or wants else [],
                 "stopping_criteria": [row.ends] if criteria else []}
                for row, row_seed in zip(rows, seeds, strict=True)]
    outputs = generate_batch(model, drafter, requests, policy, fast, _listener(streamer, on_step),
                             max_new_tokens=max_new_tokens, eos_token_id=eos_ids, **sampling)
    texts = [output.sequences[0, output.prompt_length:] for output in outputs]
    if streamer is not None:
        streamer.end()

    longest = max(len(text) for text in texts)
    pad = generation_config._pad_token_tensor
    sequences = torch.full((batch, prompt_length + longest), 0 if pad is None else pad.item(), dtype=torch.int64,
                           device=input_ids.device)
    sequences[:, :prompt_length] = input_ids
    for sequence, text in zip(sequences, texts, strict=True):
        sequence[prompt_length:prompt_length + len(text)] = text
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{
        name: tuple(torch.cat([row.step(name, i, len(text)) for row, text in zip(rows, texts, strict=True)])
                    for i in range(longest)) for name in wants})


class _Row:
    """A row of the batch, alone: what the processors and criteria of the whole batch say of it.

    They are shown the row with the padding before it, as in transformers, and in its place among as many copies of it
    as the batch has rows, since some tell the rows apart (the repetition penalty: how long each one's padding is).
    """

    def __init__(self, index, input_ids, padding, processors, criteria, wants):
        self._index, self._batch = index, input_ids.shape[0]
        self._padding = input_ids[index:index + 1, :padding].long()
        self.prompt = input_ids[index:index + 1, padding:]
        self._processors, self._criteria, self._wants = processors, criteria, wants
        # [1, V] each, by the length of the text before the token. What is left of a draft is overwritten by what was
        # verified in its place.
        self._kept = {name: {} for name in wants}

    def process(self, ids, scores):
        """For speckv.generate: the processed scores [1, V] behind ids [1, n]."""
        device, scores = scores.device, scores.to(self._padding.device)  # where transformers has made the processors
        kept = {"logits": scores}
        scores = process(self._processors, self._shown(ids), scores.repeat(self._batch, 1))
        kept["scores"] = scores = scores[self._index:self._index + 1]
        for name in self._wants:
            self._kept[name][ids.shape[1]] = kept[name]
        return scores.to(device)

    def ends(self, ids, _):
        """For speckv.generate: whether one of the criteria ends the text ids [1, n]."""
        scores, count = None, ids.shape[1] - self.prompt.shape[1]
        if "scores" in self._wants:
            scores = tuple(self.step("scores", i, count).repeat(self._batch, 1) for i in range(count))
        answers = [torch.as_tensor(criterion(self._shown(ids), scores)) for criterion in self._criteria]
        return any(answer[self._index] if answer.numel() > 1 else answer for answer in answers)

    def step(self, name, i, length):
        """The scores or logits [1, V] of new token i of `length`; 0 behind them."""
        kept, start = self._kept[name], self.prompt.shape[1]
        return kept[start + i] if i < length else torch.zeros_like(kept[start])

    def _shown(self, ids):
        return torch.cat([self._padding, ids.to(self._padding.device)], dim=1).repeat(self._batch, 1)


def _call_of_generate() -> dict:
    """Arguments of the model.generate that is at work.

    Some it keeps from a custom_generate: the streamer, into which it has put the prompt, and an assistant_model. To do
    nothing about them would leave a reader of the streamer waiting forever.
    """
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, inspect.currentframe()
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("custom_generate") is not None):
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)


def _check(config, processors, call, model_kwargs):
    """Raise InputError for what cannot be honoured."""
    defaults = GenerationConfig._get_default_generation_params()
    for name in vars(GenerationConfig()):
        value = getattr(config, name)
        if name.startswith("_") or name in HONOURED or name in WITHOUT_EFFECT or value is None:
            continue
        neutral, reason = REFUSED.get(name, ((defaults.get(name),), "this version of speckv does not know it: leave it "
                                                                    "out"))
        if value not in neutral:
            raise InputError(f"{name}={value!r} is refused: {reason}")
    for processor in processors:
        if type(processor) in STATEFUL:
            raise InputError(f"{type(processor).__name__} is refused: {STATEFUL[type(processor)]}")
    if call.get("assistant_model") is not None:
        raise InputError("assistant_model is refused: speckv's loop takes its place; give it as draft_model=")
    if call.get("synced_gpus"):
        raise InputError("synced_gpus is refused: a model split among processes needs as many passes in each, and the "
                         "number of passes depends on the text; use transformers' generate")
    for name, value in model_kwargs.items():
        if value is not None and name not in MODEL_ARGUMENTS:
            raise InputError(f"{name} is refused: the models are fed token ids and nothing else; leave it out, or use "
                             "transformers' generate")
    for name in CACHES:
        cache = model_kwargs.get(name)
        if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0):
            raise InputError(f"{name} is refused: {_OWN_CACHE}")


def _left_padding(input_ids, model_kwargs) -> list:
    """How much padding stands before each row; raises InputError for padding elsewhere."""
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    padding = (mask != 0).int().argmax(dim=1)
    places = torch.arange(input_ids.shape[1], device=input_ids.device) - padding.unsqueeze(1)
    if not torch.equal(mask != 0, places >= 0):
        raise InputError("attention_mask hides tokens behind the first that it shows: padding must be on the left, as "
                         'with tokenizer.padding_side = "left"')
    positions = model_kwargs.get("position_ids")
    if positions is not None and ((positions != places) & (places >= 0)).any():
        raise InputError("position_ids is refused: tokens stand where their number in the text says; leave it out")
    return padding.tolist()


def _drafter(draft_model, policy, model):
    """The drafter that was given in one form or another, or None."""
    if draft_model is None:
        if policy.name != "off":
            raise InputError(f"policy {policy.name} drafts tokens and draft_model is None: give a drafter "
                             '("lookup" needs no model), or policy="off"')
        return None
    if isinstance(draft_model, str | Path):
        draft_model = load_drafter(draft_model, model)
    return as_drafter(draft_model, vocabulary_size(model))


def _split_criteria(criteria, prompt_length):
    """How many tokens to write, the ids that end a text, and the criteria that remain to be asked.

    A text of speckv.generate has at least the token behind which transformers first looks at the length.
    """
    most = min(criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria)
    eos_ids = [token for criterion in criteria if type(criterion) is EosTokenCriteria
               for token in criterion.eos_token_id.flatten().tolist()]
    others = [criterion for criterion in criteria if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria)]
    return max(1, most - prompt_length), eos_ids, others


def _check_batch(streamer, criteria, config):
    """Raise InputError for what rows that come on at different speeds cannot do."""
    if streamer is not None:
        raise InputError("streamer is refused for several sequences, which come on at different speeds: give one "
                         "prompt, and num_return_sequences=1")
    if criteria and config._pad_token_tensor is None:
        raise InputError("the stopping criteria may end one sequence before another, and there is nothing to fill it "
                         "up with: give pad_token_id")


def _split_warpers(processors):
    """The processors that have to be run, and as arguments of speckv.generate those at the end that the ops fuse."""
    rest, fused, later = list(processors), {}, len(FUSED)
    while rest:
        place = next((i for i, (warper, _) in enumerate(FUSED[:later]) if type(rest[-1]) is warper), None)
        if place is None or getattr(rest[-1], "filter_value", -torch.inf) != -torch.inf or (
                getattr(rest[-1], "min_tokens_to_keep", 1) != 1):
            break
        name = FUSED[place][1]
        fused[name], later = getattr(rest.pop(), name), place
    return rest, fused


def _seeds(seed, count) -> list:
    """A seed for each row, or None for each, which leaves the numbers to torch's own generator."""
    if checked_seed(seed) is None:
        return [None] * count
    return torch.randint(2 ** 63 - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _listener(streamer, on_step):
    """What speckv.generate_batch calls after a step."""
    def listen(index, tokens, record):
        for token in tokens if streamer is not None else ():
            streamer.put(torch.tensor([token]))  # one at a time, as from transformers
        if on_step is not None:
            on_step(tokens, record)
    return listen
