"""Weights in large pages: where they lie changes, and nothing else."""

import copy
import gc
import weakref

import pytest
import torch
from tiny_models import prompt_ids, tiny_model
from torch import nn

from speckv import placement
from speckv.placement import LARGE_PAGE, LINE, use_large_pages

has_large_pages = pytest.mark.skipif(not placement._has_large_pages(), reason="this system has no large pages")


class Model(nn.Module):
    """Two tied tables, a transposed one, one of integers and a small one; 4 MiB and more."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(512, 1024))
        self.tied = self.first
        self.same_memory = nn.Parameter(self.first.data)
        self.turned = nn.Parameter(torch.randn(512, 1024).T)
        self.numbers = nn.Parameter(torch.arange(1024), requires_grad=False)
        self.small = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.last = nn.Parameter(torch.randn(700, 1024))


@has_large_pages
def test_values_and_ties_stay_and_weights_begin_on_a_cache_line():
    model = Model()
    before, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    untouched = model.turned.data_ptr(), model.numbers.data_ptr()
    assert use_large_pages(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert model.tied is model.first and model.same_memory.data_ptr() == model.first.data_ptr()
    assert (model.turned.data_ptr(), model.numbers.data_ptr()) == untouched
    assert all(parameter.data_ptr() % LINE == 0 for parameter in (model.first, model.small, model.last))
    assert model.first.data_ptr() % LARGE_PAGE == 0
    assert model.last.data_ptr() - model.first.data_ptr() < 4 << 20, "one behind the other"


@has_large_pages
def test_a_weight_outlives_its_model():
    model = Model()
    use_large_pages(model)
    last, gone = model.last.data, weakref.ref(model.first)
    expected = last.clone()
    del model
    gc.collect()
    assert gone() is None and torch.equal(last, expected)
    with torch.no_grad():
        last.fill_(1.0)


@pytest.mark.parametrize("switch", ["always madvise [never]", None])
def test_without_large_pages_nothing_is_moved(switch, tmp_path, monkeypatch):
    file = tmp_path / "enabled"
    if switch is not None:
        file.write_text(switch)
    monkeypatch.setattr(placement, "SWITCH", file)
    model = Model()
    before = model.first.data_ptr()
    assert not use_large_pages(model) and model.first.data_ptr() == before


def test_a_model_that_is_smaller_than_a_page_is_left_alone():
    model = tiny_model()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    assert not use_large_pages(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@has_large_pages
def test_a_model_computes_the_same(monkeypatch):
    monkeypatch.setattr(placement, "LARGE_PAGE", 4096)
    model, ids = tiny_model(), prompt_ids(9)
    expected = model(ids).logits
    assert use_large_pages(model)
    assert torch.equal(model(ids).logits, expected)
