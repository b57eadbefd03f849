"""Files that a crash leaves whole, the old one or the new one, and values as JSON has them."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_PREFIX, _SUFFIX = ".llc_fast-", ".partial"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotAFileError(OSError, ValueError):
    """What lies at a path is no regular file, and must not be replaced by one."""

    def __str__(self) -> str:
        return f"{self.filename!r} is {self.strerror}: give the name of a file"


def output_path(argument: str, path: str | os.PathLike[str]) -> Path:
    """The absolute path of a file that can be written, found by trying; nothing that is there is touched.

    Absolute, since the program may change its folder before the file is written.

    Args:
        argument: what the user calls the path, for errors.
        path: of the file.

    Raises:
        TypeError: it is no path.
        ValueError: the folder does not exist, the name is impossible, or something that is no file has it.
        PermissionError: the file or its folder can't be written to.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument} must be the path of a file, got {type(path).__name__}")
    given, said = Path(os.fsdecode(path)).absolute(), f"{argument}={os.fspath(path)!r}"
    try:
        target = _target(given)
        folder = target.parent
        if not folder.is_dir():
            raise ValueError(f"{said}: the folder {folder} does not exist")
        # For root, and on file systems with rules of their own, `os.access` says yes too often: so both.
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{said}: no permission to write to the folder {folder}")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(f"{said}: the file is read-only; give another name, or make it writable")
        descriptor, partial = _open_partial(target)
        os.close(descriptor)
        partial.unlink()
    except NotAFileError as error:
        raise ValueError(f"{said} is {error.strerror}: give the name of a file") from None
    except PermissionError as error:
        if error.errno is None:  # one of those above
            raise
        raise PermissionError(f"{said}: no permission to write there ({error.strerror})") from None
    except OSError as error:
        raise ValueError(f"{said} can't be written: {error.strerror or error}") from None
    except ValueError as error:
        if str(error).startswith(said):
            raise
        raise ValueError(f"{said} can't be the name of a file: {error}") from None  # it has a NUL, say
    return given


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file to write to; it takes the place of `path` when the block ends without an error.

    Several threads and processes may write to one path at once: each of them succeeds, and the last one's file stays.
    The file that is replaced hands on its permissions, and its owner where that is allowed. A symbolic link stays one:
    the file that it leads to is replaced.

    Args:
        path: of the file.
        durable: wait until it is on the disk, so that a failure of power leaves it whole too; else call
            :func:`make_durable` later, for many files at once.

    Raises:
        NotAFileError: there is a folder, a device, a pipe or a socket at `path`. It is an OSError and a ValueError.
        OSError: it can't be written (no space left, say); what was at `path` before is still there.
    """
    target = _target(Path(os.fsdecode(path)).absolute())
    remove_partial(target)
    descriptor, partial = _open_partial(target)
    try:
        with os.fdopen(descriptor, "wb") as file:  # closing it ends the lock
            yield file
            file.flush()
            _hand_on(target, file.fileno())
            if durable:
                os.fsync(file.fileno())
            _refuse_other_kinds(target)  # something else may have taken the name meanwhile
            os.replace(partial, target)
        if durable:
            _sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with a column for each name in any of the rows; a crash leaves the old file or the new one.

    Raises:
        OSError: as :func:`atomic_write`.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `path` when the block ends without an error.

    A folder can't be replaced in one operation: a process that is killed between two renames leaves the old one, whole,
    under a hidden name beside `path`.

    Args:
        path: of the folder.
        may_replace: whether the folder that is at `path` may be deleted.

    Raises:
        FileExistsError: what is at `path` is no folder, or must not be replaced.
        OSError: it can't be written; what was at `path` before is still there.
    """
    target = Path(os.path.realpath(os.fsdecode(path)))

    def refuse() -> None:
        if os.path.lexists(target) and not (target.is_dir() and may_replace(target)):
            raise FileExistsError(errno.EEXIST, "Something else is there, which is not replaced", str(target))

    refuse()
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "The folder does not exist", str(target.parent))
    partial, old = (target.with_name(partial_name(target)) for _ in range(2))
    partial.mkdir()
    try:
        yield partial
        refuse()  # something else may have taken the name meanwhile
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def make_durable(paths: Iterable[Path]) -> None:
    """Wait until these files are on the disk, with their names; those that are gone are left out.

    Raises:
        OSError: the disk failed.
    """
    folders = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            folders.add(path.parent)
    for folder in sorted(folders):
        _sync_folder(folder)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can; the rename itself is atomic
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial(*paths: Path) -> None:
    """Delete what writers of these files, all of one folder, left behind when they were killed.

    That is what has a name that only :func:`atomic_write` makes, for one of these very paths, belongs to this user, and
    is not locked by a writer that lives.
    """
    folder = paths[0].parent
    try:
        found = [entry.name for entry in os.scandir(folder) if entry.name.startswith(_PREFIX)]
    except OSError:  # a folder that may be written to but not listed
        return
    for name in found:
        if not any(_is_partial_of(name, path) for path in paths):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)  # under the lock: a writer that has just made it sees that it is gone
            finally:
                os.close(descriptor)


def _target(path: Path) -> Path:
    """The file itself, at the end of all symbolic links.

    Raises:
        NotAFileError: it is no regular file.
        OSError: links in a circle; links of others in a folder for all, which the kernel refuses to follow.
    """
    folder = os.path.realpath(path.parent)
    if folder == "/dev" or folder.startswith("/proc/"):  # /dev/stdout may lead to a file, which is not to be replaced
        raise NotAFileError(errno.EINVAL, "a device", str(path))
    # Links first by the kernel, which refuses those that others have left in a folder for all.
    _refuse_other_kinds(path, os.stat)
    target = Path(os.path.realpath(path))
    _refuse_other_kinds(target)
    return target


def _refuse_other_kinds(target: Path, status: Callable[[Path], os.stat_result] = os.lstat) -> None:
    try:
        mode = status(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        raise NotAFileError(errno.EINVAL, _KINDS.get(stat.S_IFMT(mode), "no regular file"), str(target))


def _open_partial(target: Path) -> tuple[int, Path]:
    """A new file beside `target`, locked: its descriptor, and its path."""
    # Private while it is written if `target` may be private; else as the user's umask has it.
    mode = 0o600 if target.exists() else 0o666
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(100):
        partial = target.with_name(partial_name(target))
        try:
            descriptor = os.open(partial, flags, mode)
        except FileExistsError:
            continue
        except FileNotFoundError:  # with the name that the user knows
            raise FileNotFoundError(errno.ENOENT, "The folder does not exist", str(target)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(partial).st_ino == os.fstat(descriptor).st_ino:
                return descriptor, partial
        except (BlockingIOError, FileNotFoundError):
            pass  # taken for a dead writer's between these two lines: another name
        except OSError:  # a file system without locks, where nobody takes it for a dead writer's
            return descriptor, partial
        os.close(descriptor)
        with contextlib.suppress(OSError):
            partial.unlink()
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def partial_name(target: Path, token: str | None = None) -> str:
    """A name that nobody can guess, and that only this function makes: its second half follows from the first and the
    name of the target. It is not longer for a long name of the target."""
    token = secrets.token_hex(8) if token is None else token
    proof = hashlib.blake2b(f"{token} {target.name}".encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return f"{_PREFIX}{token}-{proof}{_SUFFIX}"


def _is_partial_of(name: str, target: Path) -> bool:
    if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
        return False
    return name == partial_name(target, name[len(_PREFIX) : len(_PREFIX) + 16])


def _hand_on(target: Path, descriptor: int) -> None:
    """Give the new file the owner and the permissions of the old one."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return
    new = os.fstat(descriptor)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with contextlib.suppress(OSError):  # only root may give files away
            os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def plain(value: Any) -> Any:
    """A value as JSON would give it back: lists for arrays, tensors and tuples, None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # arrays, tensors and NumPy's numbers
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
