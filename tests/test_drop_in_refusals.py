"""speckv.custom_generate refuses by name what it cannot honour, before any work."""

import pytest
import torch
from test_drop_in import Asked, Recorder, small_pair, speculate
from tiny_models import prompt_ids, tiny_model
from transformers import DynamicCache, GenerationConfig, SynthIDTextWatermarkingConfig

from speckv import InputError, drop_in

REFUSALS = {
    "num_beams": 3, "penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "use_mtp": True,
    "is_assistant": True, "guidance_scale": 1.5, "cache_implementation": "static", "prefill_chunk_size": 4,
    "output_attentions": True, "output_hidden_states": True, "num_beam_groups": 2, "dola_layers": "high",
    "diversity_penalty": 0.5, "constraints": [1], "force_words_ids": [[3]], "cache_config": {"axis": 1}}


def test_every_setting_of_transformers_is_honoured_or_refused_or_nothing_to_the_text():
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    groups = [drop_in.HONOURED, drop_in.WITHOUT_EFFECT, set(drop_in.REFUSED)]
    assert names <= set().union(*groups)
    assert sum(map(len, groups)) == len(set().union(*groups)), "no setting is in two of them"
    assert set(REFUSALS) == set(drop_in.REFUSED)


@pytest.fixture
def idle(monkeypatch):
    """A pair whose decoding is a failure."""
    def fail(*args, **kwargs):
        raise AssertionError("work was done before the error")
    monkeypatch.setattr(drop_in, "generate_batch", fail)
    return small_pair()


@pytest.mark.parametrize("name", REFUSALS)
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(idle, name):
    with pytest.raises(InputError, match=rf"^{name}=.* is refused: .*(leave it out|give|given|as draft_model)"):
        speculate(idle, prompt_ids(), **{name: REFUSALS[name]})


def test_a_setting_of_a_later_transformers_is_refused_unless_it_has_its_default(idle, monkeypatch):
    monkeypatch.setattr(drop_in, "HONOURED", drop_in.HONOURED - {"typical_p"})
    with pytest.raises(InputError, match=r"typical_p=0\.5 is refused: this version of speckv does not know it"):
        speculate(idle, prompt_ids(), do_sample=True, typical_p=0.5)
    with pytest.raises(AssertionError):
        speculate(idle, prompt_ids(), do_sample=True)


@pytest.mark.parametrize("settings, words", [
    ({"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])},
     "SynthIDTextWatermarkLogitsProcessor is refused: it counts"),
    ({"assistant_model": tiny_model(num_hidden_layers=1)}, "assistant_model is refused.*give it as draft_model="),
    ({"synced_gpus": True}, "synced_gpus is refused"),
    ({"cache": DynamicCache()}, "cache is refused"),
    ({"position_ids": torch.arange(3, 9)[None]}, "position_ids is refused"),
    ({"inputs_embeds": torch.zeros(1, 6, 32)}, "inputs_embeds is refused"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, "padding must be on the left"),
    ({"attention_mask": torch.tensor([[0, 1, 0, 1, 1, 1]])}, "padding must be on the left"),
    ({"attention_mask": torch.tensor([[0, 0, 0, 0, 0, 0]])}, "padding must be on the left"),
    ({"policy": "sometimes"}, "unknown policy"),
    ({"seed": "one", "do_sample": True}, "seed is 'one'")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_a_call_that_cannot_be_honoured_is_refused_by_name(idle, settings, words):
    with pytest.raises(InputError, match=words):
        speculate(idle, prompt_ids(), **settings)


@pytest.mark.parametrize("settings, words", [
    ({"streamer": Recorder()}, "streamer is refused for several"),
    ({"stopping_criteria": [Asked(9)], "pad_token_id": None}, "give pad_token_id")], ids=lambda value: "")
def test_what_several_rows_cannot_do_is_refused(idle, settings, words):
    idle[0].generation_config.pad_token_id = None
    with pytest.raises(InputError, match=words):
        speculate(idle, torch.cat([prompt_ids(), prompt_ids(seed=1)]), **settings)
