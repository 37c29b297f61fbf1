"""A drafter on disk: its own tensors in safetensors, and a card that says what they are, how large, and their hash.

The weights file is named after its contents and the card names it, so that replacing the card is the one moment in
which a new drafter takes the old one's place.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speckv import files
from speckv.errors import ModelError
from speckv.files import atomic_file, sha256, write_json

CARD_FILE = "drafter.json"
SCRATCH = ".drafter-"
WEIGHTS_NAME = re.compile(r"drafter-[0-9a-f]{12}\.safetensors")
ADVICE = "fetch it again, or make one with 'speckv distill'"


def write(folder: Path, kind: str, tensors: dict, card: dict) -> None:
    """Write tensors (floating ones in bf16) and a card with their kind, size and hash and what `card` tells of them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {key: _storable(tensor) for key, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        made = Path(scratch) / "weights"
        save_file(stored, made, metadata={"format": "pt"})
        digest, size = sha256(made), made.stat().st_size
        file = folder / f"drafter-{digest[:12]}.safetensors"
        with atomic_file(file) as temporary:
            made.replace(temporary)
    write_json(folder / CARD_FILE, {"kind": kind, "file": file.name, "bytes": size, "sha256": digest} | card)
    for other in folder.iterdir():
        if WEIGHTS_NAME.fullmatch(other.name) and other != file:
            other.unlink()


def _storable(tensor):
    tensor = tensor.detach().cpu().contiguous()
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written; nobody may be writing there."""
    for entry in Path(folder).glob(f"{SCRATCH}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
    files.remove_leftovers(folder, "drafter*")


def is_drafter(folder: Path) -> bool:
    """Whether the folder holds a drafter's card."""
    try:
        return (Path(folder) / CARD_FILE).is_file()
    except OSError:  # a name too long to be a path
        return False


def read(folder: Path, kinds: tuple) -> tuple:
    """The card and the tensors of a drafter of one of these kinds; size and hash are checked before anything is loaded.

    Raises ModelError where something is missing, damaged, of another kind, or not what the card says.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD_FILE).read_text())
        found, name, size, digest = card["kind"], card["file"], card["bytes"], card["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{folder} is not a drafter folder: {CARD_FILE} cannot be read ({error!r}); {ADVICE}") from error
    if found not in kinds:
        raise ModelError(f"{folder} holds a drafter of kind {found!r}: this version knows {', '.join(kinds)}")
    if not isinstance(name, str) or not WEIGHTS_NAME.fullmatch(name):
        raise ModelError(f"{folder}: {CARD_FILE} names {name!r} as its weights, which is no such file; {ADVICE}")
    file = folder / name
    if not file.is_file():
        raise ModelError(f"{file} is missing: {ADVICE}")
    if file.stat().st_size != size or sha256(file) != digest:
        raise ModelError(f"{file} is corrupt: its size or hash is not what {CARD_FILE} says; {ADVICE}")
    try:
        return card, load_file(file)
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{file} is corrupt ({error}): {ADVICE}") from error


def publish(source: Path, folder: Path, kind: str) -> None:
    """Make `folder` hold the drafter that `source` holds."""
    card, tensors = read(source, (kind,))
    write(folder, kind, tensors, {key: value for key, value in card.items()
                                  if key not in ("kind", "file", "bytes", "sha256")})
