"""The cache folder, hashes, and writing files and folders so that nothing half-written is ever found."""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from speckv.errors import InputError


def cache_folder() -> Path:
    """SPECKV_CACHE if set, else the platform's cache folder for speckv."""
    if chosen := os.environ.get("SPECKV_CACHE"):
        return Path(chosen).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError:
        raise InputError("speckv needs a cache folder: set SPECKV_CACHE, or pip install platformdirs") from None
    return user_cache_path("speckv", appauthor=False)


def sha256(file: Path) -> str:
    """Hex digest of a file's contents."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream):  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_file(file: Path):
    """Yield a temporary path beside `file`; it takes the file's place when the block ends well, else it is removed."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path):
    """Yield an empty temporary folder that becomes `folder` when the block ends well; an older one is replaced."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if folder.exists():
            # A folder cannot be renamed over one that is not empty.
            os.replace(folder, temporary.with_name(temporary.name + ".old"))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_name(temporary.name + ".old"), ignore_errors=True)


@contextmanager
def locked(folder: Path, doing: str, wait: bool):
    """Hold the lock of a folder; another process that holds it is waited for, or is an InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=-1 if wait else 0):
            yield
    except Timeout:
        raise InputError(f"another process is {doing} in {folder}: wait for it, or choose another folder") from None


@contextmanager
def claimed(file: Path):
    """Try to hold a lock file, and yield whether this process does; one that dies lets go of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a killed process left of an atomic_file `name` (a pattern); nobody may be writing it."""
    for temporary in Path(folder).glob(f".{name}.????????"):
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise InputError unless files can be written in `folder`, which is made if need be."""
    try:
        with atomic_file(Path(folder) / ".probe") as temporary:
            temporary.write_bytes(b"x")
        (Path(folder) / ".probe").unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error}): choose another folder") from error


def write_json(file: Path, content) -> None:
    """Write `content` as JSON, atomically."""
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
