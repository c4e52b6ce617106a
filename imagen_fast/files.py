"""Writing results so that a file under its final name is always whole.

Everything is written beside its destination under a temporary name and moved there in one step, so that a full disk
or an interrupted run leaves either the old file or none, never half of the new one.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import OutputError

# What writers raise when the disk is full or the directory is gone.
_WRITE_ERRORS = (OSError, SafetensorError)


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Raise `OutputError` now if `path` could not be written later; return it as a `Path`.

    The parent directory is created if it is missing. Call this before work that would be lost.
    """
    path = Path(path)
    _refuse_special(path)
    _make_directory(path.parent)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return path


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the name `path`, on failure it is removed.

    Raises:
        OutputError: the file cannot be created, written (a full disk) or moved into place.
    """
    path = Path(path)
    _refuse_special(path)
    _make_directory(path.parent)
    # The suffix stays: writers such as PIL choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except _WRITE_ERRORS as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`; on success it replaces `path`, on failure it is removed.

    A process killed between the two renames leaves the old directory aside: `recover_directory` brings it back.

    Raises:
        OutputError: the directory cannot be created, filled (a full disk) or moved into place, or `path` is a file.
    """
    path = Path(path)
    if path.is_symlink() or not path.name:  # a link stays one; "." has no name to put others beside
        path = path.resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot write {path}: it is a file, not a directory")
    _make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    retired = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors writes files that their owner alone may read
                _flush_to_disk(file)
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
    except _WRITE_ERRORS as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        if retired.exists() and not path.exists():
            os.replace(retired, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def recover_directory(path: str | os.PathLike[str]) -> None:
    """Give back the old directory if `atomic_directory` was killed between moving it away and moving the new one in."""
    path = Path(path)
    if path.exists() or not path.parent.is_dir():
        return
    retired = sorted(path.parent.glob(f".{glob.escape(path.name)}.*.old"), key=lambda old: old.stat().st_mtime)
    if retired:
        os.replace(retired[-1], path)


def _refuse_special(path: Path) -> None:
    """A directory cannot be replaced by a file, and a device such as /dev/null must not be."""
    # os.path, unlike pathlib, takes a name that is too long for one that does not exist; opening it says why.
    if os.path.isdir(path):
        raise OutputError(f"cannot write {path}: it is a directory")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"cannot write {path}: it is not a regular file")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, OSError):  # numpy: "1000 requested and 500 written"
        return f"{error} (is the disk full?)"
    return str(error)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create directory {path}: {error.strerror}") from error


def _flush_to_disk(path: Path) -> None:
    """Some file systems report a full disk only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
