"""The controller: what is written is what is read, in both layouts; what is no controller is refused by name."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from speckv import InputError, ModelError
from speckv.controller import RELEASED_NAMES, Controller, fold_standardisation, from_arrays, load_controller
from speckv.controller import save_controller as save
from speckv.kernels import plan_gamma

GAMMAS = torch.tensor([2, 4, 6, 8])


def some_controller(signals=5, hidden=16, seed=0, **about):
    random = np.random.default_rng(seed)
    return from_arrays(random.normal(size=(signals + 1, hidden)) / 4, random.normal(size=hidden) / 4,
                       random.normal(size=(hidden, 1)) / 4, np.array([0.5]), about)


def some_signals(rows, signals=5, seed=1):
    return torch.rand(rows, signals, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("name", ["controller.safetensors", "controller.npz"])
@pytest.mark.parametrize("signals, hidden", [(5, 16), (6, 16), (5, 1), (9, 33)])
def test_what_is_written_is_what_is_read(name, signals, hidden, tmp_path):
    written = some_controller(signals, hidden, fitted_on="5,112 steps")
    save(written, tmp_path / name)
    read = load_controller(tmp_path / name)
    for one, other in zip(read.tensors().values(), written.tensors().values(), strict=True):
        assert torch.equal(one, other)
    assert read.about == ({} if name.endswith("npz") else {"fitted_on": "5,112 steps"})
    rows = some_signals(50, signals)
    assert torch.equal(read.plan(rows, GAMMAS)[0], written.plan(rows, GAMMAS)[0])


def test_the_released_layout_has_its_names_and_shapes(tmp_path):
    save(some_controller(), tmp_path / "released.npz")
    with np.load(tmp_path / "released.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {"W1": (6, 16), "b1": (16,), "W2": (16, 1), "b2": (1,)}


def test_a_name_must_say_the_layout(tmp_path):
    with pytest.raises(InputError, match=r"end it in \.safetensors"):
        save(some_controller(), tmp_path / "controller.pkl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds, different_choices", [(None, 1), (torch.tensor([0.05, 0.09, 0.12, 0.17]), 2)],
                         ids=["tokens a step", "tokens a second"])
def test_it_chooses_as_plan_gamma_and_as_the_formula(seconds, different_choices):
    controller, signals = some_controller(), some_signals(200)
    gamma, acceptance = controller.plan(signals, GAMMAS, seconds)
    seconds = torch.ones(4) if seconds is None else seconds
    w1, b1, w2, b2 = controller.tensors().values()
    expected_gamma, expected_acceptance = plan_gamma(signals, w1, b1, w2, b2, GAMMAS, seconds)
    assert torch.equal(gamma, expected_gamma) and torch.equal(acceptance, expected_acceptance)

    inputs = torch.cat([signals.repeat_interleave(4, dim=0), GAMMAS.repeat(200).unsqueeze(1)], dim=1).double()
    formula = (torch.relu(inputs @ w1.double() + b1.double()) @ w2.double() + b2.double()).reshape(200, 4)
    best = ((formula.clamp(0, 1) * GAMMAS + 1) / seconds).argmax(dim=1)
    assert torch.equal(gamma, GAMMAS[best]) and len(gamma.unique()) >= different_choices


def test_standardisation_folds_into_the_first_layer():
    random = np.random.default_rng(0)
    inputs, w1, b1 = random.normal(3, 2, size=(20, 6)), random.normal(size=(6, 4)), random.normal(size=4)
    mean, scale = inputs.mean(0), inputs.std(0)
    folded_w1, folded_b1 = fold_standardisation(w1, b1, mean, scale)
    np.testing.assert_allclose(inputs @ folded_w1 + folded_b1, (inputs - mean) / scale @ w1 + b1, atol=1e-12)


@pytest.mark.parametrize("change, words", [
    ({"w1": torch.zeros(5, 16)}, "[F+1, H]"),
    ({"w1": torch.zeros(16)}, "[F+1, H]"),
    ({"b1": torch.zeros(1, 16)}, "[F+1, H]"),
    ({"w2": torch.zeros(15, 1)}, "[F+1, H]"),
    ({"b2": torch.zeros(2)}, "[F+1, H]"),
    ({"w1": torch.zeros(6, 16, dtype=torch.float64)}, "w1 is torch.float64"),
    ({"w2": torch.full((16, 1), float("nan"))}, "w2 holds a NaN"),
    ({"b2": torch.tensor([float("inf")])}, "b2 holds a NaN or an infinity"),
], ids=["four signals", "w1 flat", "b1 a row", "w2 short", "two outputs", "fp64", "nan", "inf"])
def test_tensors_that_make_no_controller_are_refused(change, words):
    with pytest.raises(ModelError, match=words.replace("[", r"\[").replace("+", r"\+")):
        Controller(**(some_controller().tensors() | change))


class Malicious:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def released_arrays(**change):
    controller = some_controller().tensors()
    return dict(zip(RELEASED_NAMES, (tensor.numpy() for tensor in controller.values()), strict=True)) | change


def an_npz_with_a_pickle(file):
    np.savez(file, **released_arrays(b1=np.array([Malicious(file.with_name("harm"))], dtype=object)))


def a_pickle(file):
    file.write_bytes(pickle.dumps(Malicious(file.with_name("harm"))))


def a_torch_pickle(file):
    torch.save({"w1": Malicious(file.with_name("harm"))}, file)


def a_zip_bomb(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W1.npy", bytes(1 << 26))


def a_header_that_claims_terabytes(file):
    with zipfile.ZipFile(file, "w") as archive:
        for name in RELEASED_NAMES:
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array_header_1_0(
                    stream, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})


def an_npz_cut_short(file):
    save(some_controller(), file)
    file.write_bytes(file.read_bytes()[:-30])


def an_npz_with_a_flipped_bit(file):
    save(some_controller(), file)
    flip(file, file.read_bytes().index(b"\x93NUMPY") + 200)


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def save_as_safetensors(controller, file):
    save(controller, file.with_suffix(".safetensors"))
    file.with_suffix(".safetensors").rename(file)


def a_safetensors_with_a_flipped_bit(file):
    save_as_safetensors(some_controller(), file)
    flip(file, -5)


def a_safetensors_with_other_words(file):
    save_as_safetensors(some_controller(fitted_on="4,089 steps"), file)
    file.write_bytes(file.read_bytes().replace(b"4,089 steps", b"9,999 steps"))


def a_safetensors_cut_short(file):
    save_as_safetensors(some_controller(), file)
    file.write_bytes(file.read_bytes()[:-1])


REFUSED = [
    (lambda file: None, "is no file"),
    (lambda file: file.mkdir(), "is no file"),
    (lambda file: file.write_bytes(b""), "neither safetensors nor npz"),
    (lambda file: file.write_bytes(bytes(1 << 21)), "too large"),
    (lambda file: file.write_bytes(b"\xff" * 64), "neither safetensors nor npz"),
    (a_pickle, "neither safetensors nor npz"),
    (a_torch_pickle, "only none"),
    (an_npz_with_a_pickle, "not an npz of plain arrays"),
    (a_zip_bomb, "unpacks to 67,108,864 bytes"),
    (a_header_that_claims_terabytes, "not an npz of plain arrays"),
    (an_npz_cut_short, "neither safetensors nor npz"),
    (an_npz_with_a_flipped_bit, "not an npz of plain arrays"),
    (lambda file: np.savez(file, W1=np.zeros((6, 16))), "only W1"),
    (lambda file: np.savez(file, **released_arrays(b2=np.array([1]))), "not floating point"),
    (lambda file: np.savez(file, **released_arrays(b2=np.array([1e300]))), "b2 holds a NaN or an infinity"),
    (lambda file: np.savez(file, **released_arrays(b2=np.zeros((1, 1)))), "they must be"),
    (a_safetensors_with_a_flipped_bit, "corrupt"),
    (a_safetensors_with_other_words, "corrupt"),
    (a_safetensors_cut_short, "neither safetensors nor npz"),
    (lambda file: save_file({"w1": torch.zeros(6, 16)}, file), "its kind is None"),
    (lambda file: save_file({"w1": torch.zeros(6, 16)}, file, {"kind": "speckv-controller"}), "its tensors are w1"),
    (lambda file: save_file(some_controller().tensors(), file, {"kind": "speckv-controller"}), "corrupt"),
]


@pytest.mark.parametrize("make, words", REFUSED, ids=[
    "missing", "folder", "empty", "large", "noise", "pickle", "torch pickle", "npz with a pickle", "zip bomb",
    "terabytes claimed", "npz cut short", "npz bit flipped", "one array", "integers", "beyond fp32", "wrong shape",
    "bit flipped", "words changed", "cut short", "no kind", "one tensor", "no hash"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_is_no_controller_is_refused_by_name(make, words, tmp_path):
    file = tmp_path / "controller.npz"
    make(file)
    with pytest.raises(ModelError, match=words) as refused:
        load_controller(file)
    assert str(file) in str(refused.value) and "speckv paper" in str(refused.value)
    assert not (tmp_path / "harm").exists()
