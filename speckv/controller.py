"""The controller: the paper's MLP as plain tensors, read and written in safetensors and in the released layout.

It takes raw signals. The paper does not standardise its inputs; a fit that does folds its mean and scale into the first
layer (`fold_standardisation`), so that a file holds all there is to know and the kernels need no further input.
"""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from speckv.errors import InputError, ModelError
from speckv.files import atomic_file
from speckv.kernels import plan_gamma

KIND = "speckv-controller"
NAMES = ("w1", "b1", "w2", "b2")
RELEASED_NAMES = ("W1", "b1", "W2", "b2")
MOST_BYTES = 1 << 20  # the paper's takes under 1 kB; more is no controller, and is not unpacked
ADVICE = "make one with 'speckv paper --data DIR --save FILE'"


@dataclass(frozen=True, eq=False)
class Controller:
    """An MLP with one hidden layer that predicts a step's acceptance rate, as plan_gamma takes it.

    w1 [F+1, H], b1 [H], w2 [H, 1], b2 [1], all fp32 and finite, F >= 5; its inputs are F signals, the first five being
    kernels.reference.PAPER_SIGNALS, and the candidate gamma. `about` {str: str} tells where it comes from and is stored
    with it. Raises ModelError where the tensors do not fit together.
    """

    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor
    about: dict = field(default_factory=dict)

    def __post_init__(self):
        _check(self.tensors())

    def tensors(self) -> dict:
        """The four tensors by name, in the order plan_gamma takes them."""
        return {name: getattr(self, name) for name in NAMES}

    def plan(self, signals, gammas, seconds=None):
        """plan_gamma with these weights: gamma [B] i64 and acceptance [B, G] f32; seconds of None is the paper's rule.

        signals [B, F] f32; gammas [G] i64; seconds [G] f32, what a step with each gamma costs.
        """
        seconds = torch.ones(len(gammas), device=gammas.device) if seconds is None else seconds
        return plan_gamma(signals, *self.tensors().values(), gammas, seconds)


def _check(tensors):
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    inputs, hidden = shapes["w1"] if len(shapes["w1"]) == 2 else (0, 0)
    if inputs < 6 or hidden < 1 or shapes != {"w1": [inputs, hidden], "b1": [hidden], "w2": [hidden, 1], "b2": [1]}:
        raise ModelError(f"a controller's w1, b1, w2 and b2 have shapes {', '.join(map(str, shapes.values()))}: they "
                         "must be [F+1, H], [H], [H, 1] and [1] with F >= 5 signals")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ModelError(f"a controller's {name} is {tensor.dtype}: it must be torch.float32")
        if not tensor.isfinite().all():
            raise ModelError(f"a controller's {name} holds a NaN or an infinity: its training failed")


def from_arrays(w1, b1, w2, b2, about=None) -> Controller:
    """A controller from arrays of any floating type, as a fit returns them."""
    return Controller(*(torch.from_numpy(np.array(array, dtype=np.float32, order="C")) for array in (w1, b1, w2, b2)),
                      about or {})


def fold_standardisation(w1, b1, mean, scale) -> tuple:
    """w1 and b1 for raw inputs, from those of a fit on (inputs - mean) / scale; arrays or tensors in fp64 are best."""
    folded = w1 / scale[:, None]
    return folded, b1 - mean @ folded


def check_name(file: Path) -> None:
    """Raise InputError unless the name says in which of the two layouts a controller is to be written."""
    if Path(file).suffix not in (".safetensors", ".npz"):
        raise InputError(f"{file} is no name for a controller: end it in .safetensors, or in .npz for the released "
                         "layout")


def save_controller(controller: Controller, file: Path) -> None:
    """Write a controller: FILE.safetensors, with its sizes, its hash and where it comes from, or FILE.npz, the released
    layout: fp64 arrays W1, b1, W2, b2 and nothing else."""
    check_name(file)
    with atomic_file(file) as temporary:
        if Path(file).suffix == ".npz":
            _write_released(controller, temporary)
        else:
            temporary.write_bytes(_stored(controller))


def load_controller(file: Path) -> Controller:
    """Read what save_controller wrote, of either kind; nothing in a file is ever run, and pickles are refused.

    Raises ModelError where the file is missing, too large, damaged, or no controller.
    """
    file = Path(file)
    if not file.is_file():
        raise ModelError(f"{file} is no file: {ADVICE}")
    if file.stat().st_size > MOST_BYTES:
        raise ModelError(f"{file} is {file.stat().st_size:,} bytes, too large for a controller: {ADVICE}")
    try:
        return _read_released(file) if zipfile.is_zipfile(file) else _read_safetensors(file)
    except ModelError as error:
        raise ModelError(f"{file}: {error}; {ADVICE}") from error


def _stored(controller):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in controller.tensors().items()}
    metadata = {f"about.{key}": str(value) for key, value in controller.about.items()}
    metadata |= {"format": "pt", "kind": KIND, "sizes": _sizes(tensors)}
    return save(tensors, metadata | {"sha256": _digest(tensors, metadata)})


def _sizes(tensors):
    return " ".join(f"{name}:{'x'.join(map(str, tensors[name].shape))}" for name in NAMES)


def _digest(tensors, metadata):
    """Over the numbers and the words: neither can be changed without the other."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in NAMES:
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read_safetensors(file):
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"neither safetensors nor npz ({error})") from error
    if metadata.get("kind") != KIND:
        raise ModelError(f"its kind is {metadata.get('kind')!r}, not {KIND!r}")
    if set(tensors) != set(NAMES):
        raise ModelError(f"its tensors are {', '.join(sorted(tensors))}, not {', '.join(NAMES)}")
    claimed = metadata.pop("sha256", None)
    controller = Controller(**tensors, about={
        key.removeprefix("about."): value for key, value in metadata.items() if key.startswith("about.")})
    if metadata.get("sizes") != _sizes(tensors) or claimed != _digest(tensors, metadata):
        raise ModelError("corrupt: its sizes or its hash are not what it says of itself")
    return controller


def _write_released(controller, file):
    arrays = {released: getattr(controller, name).detach().cpu().double().numpy()
              for name, released in zip(NAMES, RELEASED_NAMES, strict=True)}
    with open(file, "wb") as stream:  # given a name, numpy would add a suffix to it
        np.savez(stream, **arrays)


def _read_released(file):
    """The released layout. Sizes come before unpacking: 1 MB of zip can hold 1 GB of zeros."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked <= MOST_BYTES:
                with np.load(file, allow_pickle=False) as stored:
                    arrays = {name: stored[name] for name in RELEASED_NAMES if name in stored}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError, MemoryError) as error:
        raise ModelError(f"not an npz of plain arrays ({error})") from error
    if unpacked > MOST_BYTES:
        raise ModelError(f"unpacks to {unpacked:,} bytes, too large for a controller")
    if len(arrays) < len(RELEASED_NAMES):
        raise ModelError(f"has of the released layout ({', '.join(RELEASED_NAMES)}) only {', '.join(arrays) or 'none'}")
    if any(array.dtype.kind != "f" for array in arrays.values()):
        raise ModelError("holds arrays that are not floating point")
    return from_arrays(*(arrays[name] for name in RELEASED_NAMES))


def shipped_controller(name: str = "adaptive") -> Controller:
    """A controller that comes with the package: "adaptive", or "paper" for the paper's rule on our own records."""
    return load_controller(Path(__file__).parent / "weights" / "controllers" / f"{name}.safetensors")
