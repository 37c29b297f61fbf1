"""What is installed, what hardware is there, and which backend serves each op."""

import importlib.metadata
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from speckv import kernels, models
from speckv.demo import PROMPTS
from speckv.files import cache_folder
from speckv.kernels.ops import SCHEMAS, TRITON_OPS
from speckv.names import EMBEDDED
from speckv.policies import parse_policy
from speckv.profile_decode import Profile, profile, table
from speckv.terminal import encode_prompt

PACKAGES = ("speckv", "torch", "transformers", "safetensors", "triton", "bitsandbytes", "accelerate", "gguf",
            models.EMBEDDED_PACKAGE)


def report() -> None:
    """Print the three tables."""
    console = Console()
    console.print(_versions())
    console.print(_devices())
    console.print(_backends())


def profile_decode(compression: str, draft: str, policy: str, max_new_tokens: int, fast: bool) -> Profile:
    """Decode once with the embedded target, greedily and past the end of the answer, and print where the time went."""
    chosen = parse_policy(policy)
    target, tokenizer = models.load_target(EMBEDDED, compression)
    drafter = models.load_drafter(draft, target) if chosen.name != "off" else None
    ids = encode_prompt(tokenizer, PROMPTS["code"]).to(target.device)
    settings = {"policy": chosen, "eos_token_id": [], "fast": fast}
    profile(target, drafter, ids, max_new_tokens=8, **settings)  # what is made once, and cold caches
    profiled = profile(target, drafter, ids, max_new_tokens=max_new_tokens, **settings)
    console = Console()
    console.print(f"{EMBEDDED} at {compression}, {chosen.name}{' --fast' if fast else ''}, "
                  f"{torch.get_num_threads()} threads", highlight=False)
    console.print(table(profiled))
    return profiled


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _table(title, *columns):
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _versions():
    table = _table("versions", "package", "version")
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _version(package))
    return table


def _devices():
    table = _table("machine", "what", "found")
    table.add_row("CPU", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
                         f"{torch.backends.cpu.get_cpu_capability()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPU", ", ".join(gpus) or "none")
    table.add_row("cache folder", str(cache_folder()))
    table.add_row("embedded model", "converted" if models.is_converted() else "not converted: the first use does it")
    return table


def _backends():
    table = _table("backends", "op", "CPU tensors", "GPU tensors")
    for op in SCHEMAS:
        table.add_row(op, *(_backend(op, *kernels.serving()[device]) for device in ("cpu", "cuda")))
    return table


def _backend(op, backend, why):
    if backend == "triton" and op not in TRITON_OPS:
        return "reference: this op has no Triton kernel"
    return f"{backend}: {why}"
