"""The doors to the file system: `open_inside` for every read that a file's content names, `atomic_*` for every write.

Containment is decided on the resolved path at the moment of opening, never on the spelling of a name. A name must be a plain
file name; its real target must lie in the directory itself, or in the blobs of the same Hugging Face cache entry (whose
snapshots are made of symbolic links); and it must be a regular file, so that a FIFO or a device can neither block nor feed
us for ever.

Outputs appear whole or not at all. A directory is built beside its target as `.NAME.partial-PID` and renamed when it is
complete and synced; replacing an old one swaps the two names in one step where the kernel can. What a killed run leaves
behind is removed by the next one. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from trtllm_thoughtx.errors import ThoughtxError, counted, shown
from trtllm_thoughtx.strictjson import parse_json

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
RENAME_EXCHANGE = 2
AT_FDCWD = -100


class Advances(Protocol):
    """What a progress stage offers: `advance(n)` after each `n` units of work."""

    def advance(self, n: int) -> object: ...


def human_bytes(num_bytes: float) -> str:
    """`3.3 GiB`, `96 bytes`."""
    value = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


# --- reading ---------------------------------------------------------------------------------------------------------


def open_inside(root: Path, name: str) -> BinaryIO:
    """Open `root/name` for reading, unbuffered. E104 when `name` leads out of `root` or to no regular file, E101 when missing."""
    where = shown(os.path.join(os.fspath(root), str(name)), 400)
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        _refuse_name(where, f"{shown(name)!r} is not a plain file name")
    try:
        base = os.path.realpath(root, strict=True)
        real = os.path.realpath(os.path.join(base, name), strict=True)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise _missing(Path(root) / name) from None
    except OSError as error:
        _refuse_name(where, f"its symbolic links cannot be followed: {os.strerror(error.errno or 0)}")
    if not any(os.path.commonpath((real, door)) == door for door in _doors(base)):
        _refuse_name(where, "it is a symbolic link to a file outside its directory")
    return _open_regular(real, where, os.O_NOFOLLOW)


def open_named(path: Path) -> BinaryIO:
    """Open a file that the user named on the command line: links are followed, but it must be a regular file."""
    try:
        return _open_regular(os.fspath(path), shown(str(path), 400), 0)
    except (FileNotFoundError, ValueError):
        raise _missing(path) from None


def read_inside(root: Path, name: str, limit: int, *, code: str = "E102") -> bytes:
    """All of `root/name`, which may be at most `limit` bytes (else `code`)."""
    with open_inside(root, name) as handle:
        return _read_all(handle, limit, shown(str(Path(root) / name), 400), code)


def read_named(path: Path, limit: int, *, code: str = "E101") -> bytes:
    """All of a file that the user named, at most `limit` bytes (else `code`)."""
    with open_named(path) as handle:
        return _read_all(handle, limit, shown(str(path), 400), code)


def read_json(root: Path, name: str, *, limit: int = 16 << 20, code: str = "E102") -> Any:
    """`root/name` as strict JSON; E101 when missing, E104 by `open_inside`, else `code`."""
    return parse_json(read_inside(root, name, limit, code=code), shown(str(Path(root) / name), 400), code)


def sha256_of(path: Path, progress: Advances | None = None) -> str:
    """Hex digest of a regular file; `progress.advance(num_bytes)` as it goes."""
    digest = hashlib.sha256()
    with open_named(path) as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            if progress is not None:
                progress.advance(len(block))
    return digest.hexdigest()


def _doors(base: str) -> tuple[str, ...]:
    """The directories that may hold the real files of `base` (a real path)."""
    snapshots = Path(base).parent
    is_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return (base, str(snapshots.parent / "blobs")) if is_cache else (base,)


def _open_regular(path: str, where: str, flags: int) -> BinaryIO:
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # before the open too: opening some devices has side effects
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return os.fdopen(fd, "rb", buffering=0)
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ThoughtxError(
            "E104" if error.errno == errno.ELOOP else "E206",
            f"cannot open the file: {os.strerror(error.errno or 0)}",
            where=where,
            why="the operating system refused",
            fix="check the permissions of the file and of its directories",
        ) from None
    _refuse_name(where, "it is not a regular file (a directory, FIFO or device)")


def _read_all(handle: BinaryIO, limit: int, where: str, code: str) -> bytes:
    size = os.fstat(handle.fileno()).st_size
    data = bytearray()
    while size <= limit and len(data) <= limit and (block := handle.read(min(1 << 20, limit + 1 - len(data)))):
        data += block
    if size > limit or len(data) > limit:
        raise ThoughtxError(
            code,
            f"the file is too large: {human_bytes(max(size, len(data)))}",
            where=where,
            why=f"at most {human_bytes(limit)} are read of such a file",
            fix="check that it is the right file",
        )
    return bytes(data)


def _refuse_name(where: str, what: str) -> NoReturn:
    raise ThoughtxError(
        "E104",
        f"a file of the input cannot be opened: {what}",
        where=where,
        why="files are read only from the directory that was given, so that a checkpoint cannot reach other files",
        fix="put the file itself into the directory, under a plain name",
    )


def _missing(path: Path) -> ThoughtxError:
    return ThoughtxError(
        "E101",
        f"there is no file {shown(path.name)!r}",
        where=shown(str(path), 400),
        why="the file is missing, or a symbolic link to it is broken",
        fix="check the path, or download the file again",
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def check_output(target: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """E130 unless `target` may become a new directory: before any work, so that nothing is computed in vain."""

    def refuse(what: str, why: str, fix: str) -> NoReturn:
        raise ThoughtxError("E130", what, where=shown(str(target), 400), why=why, fix=fix)

    elsewhere = "choose another output path"
    real = Path(os.path.realpath(target))
    if os.path.islink(target):
        refuse("the output path is a symbolic link", "outputs are never written through links", "remove the link, or name its target")
    for given in inputs:
        source = Path(os.path.realpath(given))
        if real == source or real in source.parents or source in real.parents:
            why = f"the input is {shown(str(given), 400)}; an output may neither be, hold, nor lie inside an input"
            refuse("the output path overlaps an input", why, elsewhere)
    parent = real.parent
    if not parent.is_dir():
        refuse("the directory that shall hold the output does not exist", f"no directory {shown(str(parent), 400)}", "create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        refuse("the directory that shall hold the output cannot be written", "no permission, or a read-only file system", elsewhere)
    if not os.path.lexists(real):
        return
    if not real.is_dir():
        refuse("the output path is a file", "a directory is written here", elsewhere)
    if not (held := {entry.name for entry in os.scandir(real)}):
        return
    is_ours = "manifest.json" in held and not any(real in (place, *place.parents) for place in (Path.cwd(), Path.home()))
    if not force:
        elsewhere = "remove it, or pass --force to replace it" if is_ours else elsewhere
        refuse("the output directory exists and is not empty", f"it holds {counted(len(held), 'file')}", elsewhere)
    if not is_ours:
        why = "--force replaces only what this tool wrote: a directory with a manifest.json, and not where you stand or your home"
        refuse("the output directory is not replaced", why, elsewhere)


@contextlib.contextmanager
def atomic_dir(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends well, and vanishes otherwise.

    At every moment `target` is the old directory (or absent) or the complete new one. Mode 0777 less the umask.
    """
    real = Path(os.path.realpath(target))
    try:
        _clear(real)
        check_output(target, force=force)
        partial = _partial(real)
        os.mkdir(partial, 0o777)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            _sync_tree(partial)
            _put(partial, real, force=force)
            _sync(real.parent)
        finally:
            os.close(lock)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        _refused(error, real)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends well, and vanishes otherwise. Mode 0666 less the umask."""
    if os.path.islink(path) or path.is_dir():
        raise ThoughtxError(
            "E130",
            "the output path is a symbolic link or a directory",
            where=shown(str(path), 400),
            why="a file is written here, and never through a link",
            fix="choose another output path",
        )
    path = Path(os.path.realpath(path))
    try:
        _clear(path)
        partial = _partial(path)
        with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb") as handle:
            try:
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
                os.replace(partial, path)
                _sync(path.parent)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        _refused(error, path)


def require_space(where: Path, num_bytes: int) -> None:
    """E203 unless the file system that will hold `where` has `num_bytes` free."""
    place = next(p for p in (where, *where.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ThoughtxError(
            "E203",
            f"not enough disk space: {human_bytes(num_bytes)} needed, {human_bytes(free)} free",
            where=shown(str(place), 400),
            why=f"the output takes {num_bytes:,} bytes and the file system has {free:,} left",
            fix="free some space, or choose an output path on another disk",
        )


def _clear(target: Path) -> None:
    """Remove what dead runs left of `target`; put back what one had moved aside and not yet replaced."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*-*")):
        found = re.fullmatch(r"(partial|old)-(\d{1,9})", left.name[len(target.name) + 2 :])
        if not found or not _is_abandoned(left, int(found[2])):
            continue
        if found[1] == "old" and not os.path.lexists(target):
            os.rename(left, target)  # the fallback of `_put` was killed between its two renames
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _partial(target: Path) -> Path:
    """Where this process builds `target`."""
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    if os.path.lexists(partial):
        raise ThoughtxError(
            "E130",
            "another run is writing this output",
            where=shown(str(partial), 400),
            why="its partial output is there and in use",
            fix="wait for it, or choose another output path",
        )
    return partial


def _is_abandoned(path: Path, pid: int) -> bool:
    """No process `pid` here, and no lock: a run in another container may hold the path under a pid unknown to us."""
    if pid != os.getpid():
        try:
            os.kill(pid, 0)
            return False
        except ProcessLookupError:
            pass
        except OSError:
            return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _put(partial: Path, target: Path, *, force: bool) -> None:
    """Move `partial` to `target`; afterwards `partial` is absent, or is what `target` was."""
    if not force or not os.path.lexists(target):
        try:
            os.rename(partial, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if not force:
            raise ThoughtxError(
                "E130",
                "the output path was taken while this run was working",
                where=shown(str(target), 400),
                why="another run, or someone, wrote there",
                fix="look at what is there; then run again, with --force to replace it",
            )
    if exchange(partial, target):
        return
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    try:
        os.rename(target, old)
        os.rename(partial, target)
    finally:
        if not os.path.lexists(target):
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2); False where the kernel or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                _sync(Path(folder, name))
        _sync(Path(folder))


def _refused(error: OSError, target: Path) -> NoReturn:
    if error.errno is None:
        raise error
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    raise ThoughtxError(
        "E203" if is_full else "E206",
        "the disk is full" if is_full else f"the file system refused an operation: {os.strerror(error.errno)}",
        where=shown(str(error.filename or target), 400),
        why="nothing was left at the output path; what was there before is unchanged",
        fix="free some space" if is_full else "check permissions and the health of the disk",
    ) from error
