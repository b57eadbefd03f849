"""Files that replace others: whole, with nothing planted, nothing lost, and nobody else's file touched."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Script

from llc_fast.support import files
from llc_fast.support.files import (
    NotAFileError,
    atomic_write,
    make_durable,
    output_path,
    partial_name,
    remove_partial,
)


def _write(path: Path, content: bytes = b"new") -> None:
    with atomic_write(path) as file:
        file.write(content)


def test_nobody_can_plant_the_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link or a file that lies at the very name is neither followed nor used; another name is taken."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter([f".llc_fast-{k}.partial" for k in (0, 1, 2)])
    monkeypatch.setattr(files, "partial_name", lambda target, token=None: next(names))
    (tmp_path / ".llc_fast-0.partial").symlink_to(victim)
    (tmp_path / ".llc_fast-1.partial").write_text("precious too")
    monkeypatch.setattr(files, "remove_partial", lambda *_: None)
    _write(tmp_path / "file")
    assert victim.read_text() == "precious" and (tmp_path / ".llc_fast-1.partial").read_text() == "precious too"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / ".llc_fast-2.partial").exists()


def test_names_are_random(tmp_path: Path) -> None:
    """No two are alike, whatever the process and the path; none is too long for the folder."""
    assert len({partial_name(tmp_path / "file") for _ in range(1000)}) == 1000
    assert len(partial_name(tmp_path / ("λ" * 120))) < 80
    _write(tmp_path / ("x" * 255))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_are_as_the_umask_has_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        _write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_permissions_are_kept(tmp_path: Path, mode: int) -> None:
    """Those of the file that is replaced; what is private is private while it is written too."""
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    with atomic_write(path) as file:
        file.write(b"new")
        (partial,) = tmp_path.glob(".llc_fast-*")
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    os.chown(tmp_path / "file", 1234, 2345)
    _write(tmp_path / "file")
    found = (tmp_path / "file").stat()
    assert (found.st_uid, found.st_gid) == (1234, 2345)


def test_links_stay(tmp_path: Path) -> None:
    """The file at the end of all links is replaced, beside itself; one that is not there yet is made there."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("old")
    (tmp_path / "middle").symlink_to("a/file")
    (tmp_path / "link").symlink_to(tmp_path / "middle")
    (tmp_path / "dangling").symlink_to("a/later")
    (tmp_path / "folder").symlink_to("a")
    _write(tmp_path / "link")
    _write(tmp_path / "dangling")
    _write(tmp_path / "folder" / "third")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "middle").is_symlink()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["file", "later", "third"]
    assert all(p.read_bytes() == b"new" for p in (tmp_path / "a").iterdir())


_OTHERS: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "a folder": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", _OTHERS)
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    """At once, without waiting for a reader of the pipe; it is still there, and nothing else is."""
    path = tmp_path / "it"
    _OTHERS[kind](path)
    before = path.lstat()
    for error in (OSError, ValueError, NotAFileError):
        with pytest.raises(error, match=kind):
            _write(path)
    with pytest.raises(ValueError, match=f"^save='.*it' is {kind}: give the name of a file"):
        output_path("save", path)
    assert path.lstat().st_mode == before.st_mode and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/new"])
def test_devices_are_refused(path: str) -> None:
    """Where standard output leads to a file, too: it is not to be replaced behind the shell's back."""
    with pytest.raises(ValueError, match=r"is a device|is a named pipe"):
        output_path("json", path)
    with pytest.raises(NotAFileError):
        _write(Path(path))


def test_what_comes_while_it_is_written_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(NotAFileError), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        os.mkfifo(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").is_fifo()


def test_many_writers(tmp_path: Path) -> None:
    """Eight threads write to one path: nobody fails, the file is always that of one of them, and nothing is left."""
    path, errors = tmp_path / "file", list[BaseException]()
    _write(path, b"0" * 10000)

    def work(k: int) -> None:
        try:
            for _ in range(30):
                _write(path, b"%d" % k * 10000)
                content = path.read_bytes()
                assert len(content) == 10000 and len(set(content)) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyError
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


_KILLED = """
from pathlib import Path
from llc_fast.support.files import atomic_write
with atomic_write(Path("file")) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """But not while it lives, and nothing of other files' writers."""
    (tmp_path / "file").write_text("old")
    other = tmp_path / partial_name(tmp_path / "another file")
    other.write_text("half")
    script = Script(_KILLED, tmp_path)
    script.wait_for("writing")
    (left,) = set(tmp_path.glob(".llc_fast-*")) - {other}
    remove_partial(tmp_path / "file")
    assert left.exists()
    script.kill()
    assert script.finish()[0] == -signal.SIGKILL
    assert left.read_bytes() == b"half" and (tmp_path / "file").read_text() == "old"
    _write(tmp_path / "file")
    assert not left.exists() and other.read_text() == "half"


def test_links_and_pipes_with_such_names_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    link, pipe = (tmp_path / partial_name(tmp_path / "file") for _ in range(2))
    link.symlink_to("victim")
    os.mkfifo(pipe)
    remove_partial(tmp_path / "file")
    assert link.is_symlink() and pipe.is_fifo() and (tmp_path / "victim").read_text() == "precious"


def test_a_path_is_tried_and_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute path comes back; a file that is there keeps content and time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("old")
    before = (tmp_path / "old").stat()
    assert output_path("save", "old") == tmp_path / "old" and output_path("save", "new") == tmp_path / "new"
    assert (tmp_path / "old").stat().st_mtime_ns == before.st_mtime_ns
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    for wrong, error in ((3, TypeError), (None, TypeError), ("no/such", ValueError), ("old/x", ValueError)):
        with pytest.raises(error, match=r"^save"):
            output_path("save", wrong)  # type: ignore[arg-type]
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "old")
    with pytest.raises(PermissionError, match="read-only"):
        output_path("save", "old")
    for wrong in ("new\0", "x" * 256):
        with pytest.raises(ValueError, match=r"^save="):
            output_path("save", wrong)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_links_of_others_in_a_folder_for_all_are_the_kernels_to_refuse(tmp_path: Path) -> None:
    """Where the kernel protects links (fs.protected_symlinks), these functions do not go around it."""
    protects = Path("/proc/sys/fs/protected_symlinks")
    if not protects.exists() or protects.read_text().strip() != "1":
        pytest.skip("the kernel does not protect links")
    tmp_path.chmod(0o1777)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    os.lchown(tmp_path / "link", 1234, 1234)
    with pytest.raises(PermissionError):
        _write(tmp_path / "link")
    assert (tmp_path / "victim").read_text() == "precious"


def test_many_files_are_made_durable_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that did not wait for the disk when they were written; each of them, and each folder once."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    paths = [tmp_path / name for name in ("a", "b", "gone")]
    for path in paths:
        with atomic_write(path, durable=False) as file:
            file.write(b"new")
    assert synced == [] and [path.read_bytes() for path in paths] == [b"new"] * 3
    paths[2].unlink()
    make_durable(paths)
    assert synced == [str(paths[0]), str(paths[1]), str(tmp_path)]
    _write(paths[0])
    assert len(synced) == 5
