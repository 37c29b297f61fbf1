"""A training on disk: parameters, optimizer and where it stands, in one file that is replaced whole."""

import hashlib
import json
from dataclasses import asdict, dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from speckv.errors import ModelError
from speckv.files import atomic_file

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Where a training stands; with parameters and optimizer, all of a checkpoint."""

    step: int = 0
    seconds: float = 0.0  # of all sittings
    losses: list = field(default_factory=list)   # of the steps since the last evaluation
    history: list = field(default_factory=list)  # of evaluations


def save(file, own, optimizer, state, settings):
    tensors = {}
    for key, parameter in own.items():
        tensors[key] = parameter.detach()
        optimizer_state = optimizer.state.get(parameter, {})
        for name in OPTIMIZER_STATE:
            if name in optimizer_state:
                tensors[f"{name}/{key}"] = optimizer_state[name]
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata={
            "state": json.dumps(asdict(state)), "settings": json.dumps(settings.identity), "digest": _digest(tensors)})


def restore(file, own, optimizer, settings):
    """Put parameters and optimizer back as they were; returns where training stood."""
    if not file.exists():
        return State()
    metadata = read_metadata(file, settings)
    try:
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        if metadata["digest"] != _digest(tensors):
            raise ValueError("its contents are not what was written")
        state = State(**json.loads(metadata["state"]))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _damaged(file, error) from error
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])
            if f"exp_avg/{key}" in tensors:
                optimizer.state[parameter] = {
                    name: tensors[f"{name}/{key}"].to("cpu" if name == "step" else parameter.device)
                    for name in OPTIMIZER_STATE}
    return state


def read_metadata(file, settings):
    """What a checkpoint tells of itself; raises ModelError where it is damaged or another run's."""
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
        identity = _flat(json.loads(metadata["settings"]))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error
    wanted = _flat(settings.identity)
    changes = [f"{key} was {identity.get(key)}, is {wanted.get(key)}"
               for key in sorted(wanted.keys() | identity.keys()) if identity.get(key) != wanted.get(key)]
    if changes:
        raise ModelError(
            f"{file} belongs to a run with other settings ({'; '.join(changes)}): say --no-resume to train anew on the "
            "same text and what is added to it, --no-resume --start-from OLD-DRAFTER to go on from a drafter made so "
            "far, or choose another work folder")
    return metadata


def _digest(tensors):
    """A hash of named tensors, to tell a damaged checkpoint."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _flat(settings):
    """Settings with those of the corpus among them."""
    settings = dict(settings)
    corpus = settings.pop("corpus", {})
    return settings | {f"corpus.{key}": value for key, value in corpus.items()}


def _damaged(file, error):
    return ModelError(f"{file} is damaged ({error!r}): delete it to train anew on the same text")
