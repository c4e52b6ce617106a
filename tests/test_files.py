"""A file under its final name is whole: after an exception, a kill or a full disk there is the old one or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imagen_fast.errors import OutputError
from imagen_fast.files import atomic_directory, atomic_file, check_writable, recover_directory


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


# ---- check_writable


def test_check_writable_creates_the_directory_and_nothing_in_it(tmp_path):
    assert check_writable(tmp_path / "a" / "b" / "cat.png") == tmp_path / "a" / "b" / "cat.png"
    assert names(tmp_path / "a" / "b") == []


def test_check_writable_leaves_an_existing_file_alone(tmp_path):
    write(tmp_path / "cat.png", "old")
    check_writable(tmp_path / "cat.png")
    assert (tmp_path / "cat.png").read_text() == "old"
    assert names(tmp_path) == ["cat.png"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param(".", "it is a directory", id="directory"),
        pytest.param("file/cat.png", "cannot create directory", id="parent-is-a-file"),
        pytest.param("pipe", "it is not a regular file", id="pipe"),
        pytest.param("x" * 300, "File name too long", id="name-too-long"),
    ],
)
def test_check_writable_says_why_not(tmp_path, name, reason):
    write(tmp_path / "file", "")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=reason):
        check_writable(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_writable_refuses_a_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "cat.png")


# ---- atomic_file


def test_atomic_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "cat.png"
    with atomic_file(path) as temporary:
        write(temporary, "whole")
        assert temporary.suffix == ".png", "writers choose the format by the suffix"
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(path.parent) == ["cat.png"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_file_keeps_the_old_file_when_the_block_raises(tmp_path, error):
    path = tmp_path / "cat.png"
    write(path, "old")
    with pytest.raises(error), atomic_file(path) as temporary:
        write(temporary, "half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["cat.png"]


def test_atomic_file_does_not_replace_a_device_or_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"), atomic_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_atomic_file_reports_a_directory_that_went_away(tmp_path):
    path = tmp_path / "gone" / "cat.png"
    with pytest.raises(OutputError, match=r"cannot write .*cat.png: No such file"), atomic_file(path) as temporary:
        temporary.parent.rmdir()
        write(temporary, "whole")


KILLED = """
import os, sys
from imagen_fast.files import atomic_directory, atomic_file
kind = atomic_file if sys.argv[1] == "file" else atomic_directory
with kind(sys.argv[2]) as temporary:
    (temporary if kind is atomic_file else temporary / "part").write_text("half")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("old", [True, False], ids=["old-one-there", "nothing-there"])
def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path, kind, old):
    path = tmp_path / "result"
    if old and kind == "directory":
        path.mkdir()
    inside = path / "part" if kind == "directory" else path
    if old:
        write(inside, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, kind, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert path.exists() == old
    assert not old or inside.read_text() == "old"


# ---- A full disk: a limit on the size of files raises in the same place, and needs no privileges

FULL = """
import resource, sys
import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from imagen_fast.errors import OutputError
from imagen_fast.files import atomic_directory, atomic_file

noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
writers = {
    "bytes": lambda path: path.write_bytes(noise.tobytes()),
    "numpy": lambda path: np.save(path, noise),
    "picture": lambda path: Image.fromarray(noise).save(path, "png"),
    "safetensors": lambda path: save_file({"noise": noise}, path),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    if sys.argv[2] == "file":
        with atomic_file(sys.argv[3]) as temporary:
            writers[sys.argv[1]](temporary)
    else:
        with atomic_directory(sys.argv[3]) as temporary:
            writers[sys.argv[1]](temporary / "part.npy")
except OutputError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("writer", ["bytes", "numpy", "picture", "safetensors"])
def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path, writer, kind):
    path = tmp_path / "result.npy"
    done = subprocess.run([sys.executable, "-c", FULL, writer, kind, str(path)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"cannot write {path}: "), done.stderr
    assert names(tmp_path) == []


# ---- atomic_directory


def test_atomic_directory_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "model"
    with atomic_directory(path) as temporary:
        write(temporary / "old", "")
    with atomic_directory(path) as temporary:
        write(temporary / "new", "")
        assert names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


def test_atomic_directory_may_be_read_by_those_who_may_read_the_directory(tmp_path):
    with atomic_directory(tmp_path / "model") as temporary:
        write(temporary / "weights", "")
        (temporary / "weights").chmod(0o600)
    directory = (tmp_path / "model").stat().st_mode
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == directory & 0o666


def test_atomic_directory_keeps_the_old_one_when_the_block_raises(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    write(path / "old", "")
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:
        write(temporary / "new", "")
        raise RuntimeError
    assert names(path) == ["old"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_atomic_directory_puts_the_old_one_back_when_the_swap_fails(tmp_path, monkeypatch, error):
    path = tmp_path / "model"
    path.mkdir()
    write(path / "old", "")
    replace = os.replace
    calls = []

    def second_call_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_call_fails)
    with pytest.raises((OutputError, KeyboardInterrupt)), atomic_directory(path) as temporary:
        write(temporary / "new", "")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["model"]


SWAPPING = """
import os, sys
from imagen_fast.files import atomic_directory
replace = os.replace
def replace_and_die(source, target):
    replace(source, target)
    os.kill(os.getpid(), 9)
with atomic_directory(sys.argv[1]) as temporary:
    (temporary / "new").write_text("")
    os.replace = replace_and_die
"""


def test_a_process_killed_between_the_renames_loses_nothing(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    write(path / "old", "")
    done = subprocess.run([sys.executable, "-c", SWAPPING, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    recover_directory(path)
    assert names(path) == ["old"]
    recover_directory(path)  # nothing to do
    assert names(path) == ["old"]


def test_recovering_what_never_was_does_nothing(tmp_path):
    recover_directory(tmp_path / "model")
    recover_directory(tmp_path / "nowhere" / "model")
    assert names(tmp_path) == []


@pytest.fixture(params=["working-directory", "mount-point"])
def staying(request, tmp_path, monkeypatch):
    """A directory that cannot be replaced by another one, with old files in it."""
    path = tmp_path / "model"
    (path / "sub").mkdir(parents=True)
    write(path / "both", "old")
    write(path / "sub" / "old", "")
    if request.param == "working-directory":
        monkeypatch.chdir(path)
    else:
        monkeypatch.setattr(os.path, "ismount", lambda other: Path(other) == path)
    return path


def test_atomic_directory_keeps_a_directory_that_must_stay(staying):
    before = staying.stat().st_ino
    with atomic_directory(staying) as temporary:
        write(temporary / "both", "new")
        (temporary / "inside").mkdir()
    assert staying.stat().st_ino == before, "the working directory of a process would be a deleted one"
    assert names(staying) == ["both", "inside"]
    assert (staying / "both").read_text() == "new"
    assert names(staying.parent) == ["model"]


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_atomic_directory_puts_old_files_back_when_an_exchange_fails(staying, monkeypatch, error, failing):
    replace, calls = os.replace, []

    def fails(source, target):
        calls.append(source)
        if len(calls) == failing + 1:
            if isinstance(error, KeyboardInterrupt):
                replace(source, target)  # it comes after the move as well as before
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises((OutputError, KeyboardInterrupt)), atomic_directory(staying) as temporary:
        write(temporary / "both", "new")
        write(temporary / "new", "")
    assert names(staying) == ["both", "sub"]
    assert (staying / "both").read_text() == "old"
    assert names(staying / "sub") == ["old"]


def test_atomic_directory_does_not_delete_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "sub")
    for path in (tmp_path / "model", ".."):
        with pytest.raises(OutputError, match=r"the working directory, .*sub, is inside of it"), atomic_directory(path):
            pass
    assert names(tmp_path / "model") == ["sub"]


@pytest.mark.parametrize("name", ["link", "."])
def test_atomic_directory_writes_where_a_name_leads(tmp_path, monkeypatch, name):
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    monkeypatch.chdir(target)
    with atomic_directory(tmp_path / "link" if name == "link" else ".") as temporary:
        write(temporary / "new", "")
    assert names(target) == ["new"]
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "target"]


def test_atomic_directory_does_not_replace_a_file(tmp_path):
    write(tmp_path / "model", "old")
    with pytest.raises(OutputError, match="it is a file"), atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "old"
