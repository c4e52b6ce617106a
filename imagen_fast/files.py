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

    The working directory and a mount point must stay the directories that they are: there the new files are made
    inside, and take the places of the old ones one after the other. A process killed meanwhile leaves the old ones in
    a folder `.….old` there.

    Raises:
        OutputError: the directory cannot be created, filled (a full disk) or moved into place, or `path` is a file, or
            the working directory is somewhere below it.
    """
    path = Path(path)
    if path.is_symlink() or path.name in ("", ".."):  # a link stays one; "." has no name to put others beside
        path = path.resolve()
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot write {path}: it is a file, not a directory")
    stays = _must_stay(path)
    _make_directory(path.parent)
    beside = path if stays else path.parent
    temporary = beside / f".{path.name}.{os.getpid()}.partial"
    retired = beside / f".{path.name}.{os.getpid()}.old"
    replace = _replace_content if stays else _replace_directory
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors writes files that their owner alone may read
                _flush_to_disk(file)
        replace(path, temporary, retired)
    except _WRITE_ERRORS as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _must_stay(path: Path) -> bool:
    """Whether a directory cannot be replaced by another one, but its content can."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # somebody has deleted it
        return os.path.ismount(path)
    whole = path.resolve()
    if whole in here.parents:
        raise OutputError(f"cannot write {path}: the working directory, {here}, is inside of it")
    return whole == here or os.path.ismount(path)


def _replace_directory(path: Path, temporary: Path, retired: Path) -> None:
    """Put `temporary` in the place of `path`, or leave everything as it was."""
    try:
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
    finally:
        if retired.exists() and not path.exists():
            os.replace(retired, path)
        shutil.rmtree(retired, ignore_errors=True)


def _replace_content(path: Path, temporary: Path, retired: Path) -> None:
    """Put what is in `temporary` in the place of everything else in `path`, or leave everything as it was."""
    moves = [(file, retired / file.name) for file in path.iterdir() if file != temporary]
    moves += [(file, path / file.name) for file in temporary.iterdir()]
    try:
        retired.mkdir()
        for source, target in moves:
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        with contextlib.suppress(OSError):
            retired.rmdir()
        raise
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
