"""Durable files: the one place that writes what must survive a kill, a full disk or a power cut.

What is being written has a name beside its final one and is renamed when it is whole, so a reader meets the old state
or the new one. The prefix says what a name is for:

    .tmp-   being written; litter once its process is gone
    .del-   being removed; litter likewise
    .new-   whole and durable, about to take the place of an older directory; counts as that directory
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ssld.errors import CheckpointError, OutputError, SsldError, StorageError, UnreadableError

MANIFEST = "manifest.json"
ABANDONED = 3600.0
"""Seconds after which nobody is still writing a file, for `sweep_old`."""
_SCRATCH = "ssld-scratch-"
_LITTER = (".tmp-", ".del-")
_WAITING = ".new-"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_OBSTRUCTED = {errno.EEXIST, errno.ENOTDIR}
_LINKLESS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, *_OBSTRUCTED}


class Disk:
    """The operating system's calls, one method each; tests put failing or recording ones in place of `disk`."""

    def write(self, path: Path, data: bytes) -> None:
        """Create the file, which must not exist, with all of the data; its mode is 0644 less the umask."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)

    def fsync(self, path: Path) -> None:
        """Wait until the file, or the directory's list of names, is on the medium."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def fsync_directory(self, path: Path) -> None:
        """Wait until the names in the directory are on the medium."""
        self.fsync(path)

    def mkdir(self, path: Path) -> None:
        """Create the directory unless it is there; its parent must exist."""
        path.mkdir(exist_ok=True)

    def symlink(self, target: str, path: Path) -> None:
        """Create a symbolic link at the path."""
        path.symlink_to(target)

    def link(self, old: Path, new: Path) -> None:
        """Give the file a second name; there must be nothing at it."""
        os.link(old, new)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or a directory; there must be nothing at the new name."""
        old.rename(new)

    def replace(self, old: Path, new: Path) -> None:
        """Rename a file or link over whatever file or link has the new name."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Remove a file, a link, or a directory with all that is in it."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


disk = Disk()


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write one file so that readers meet its old content or the new, also after a power cut where it is durable.

    durable: no for what can be made anew, and whose reader sees that it is spoiled; nothing waits for the medium then.
    Raises OutputError or StorageError; the old content is then still there.
    """
    temporary = _beside(path, ".tmp-")
    with reported(path, len(data), temporary):
        _make(path.parent)
        disk.write(temporary, data)
        if durable:
            disk.fsync(temporary)
        disk.replace(temporary, path)
        if durable:
            _sync_directory(path.parent)


def commit_exclusive(path: Path, data: bytes, needed: int | None = None) -> bool:
    """Write one file durably unless there is something at its name: of several processes, the first to end wins.

    needed: bytes, for the message of a full disk; of the data when left out. Returns False, and changes nothing, when
    another was first. On a file system without hard links, two that end at the same instant may both be told True,
    and the file of one of them stays. Raises OutputError or StorageError.
    """
    temporary = _beside(path, ".tmp-")
    with reported(path, len(data) if needed is None else needed, temporary):
        _make(path.parent)
        disk.write(temporary, data)
        disk.fsync(temporary)
        first = _claim(temporary, path)
        _sync_directory(path.parent)
    return first


def link_atomic(path: Path, target: str) -> None:
    """Point the symbolic link at the target, a name beside it; there is no instant without the link."""
    temporary = _beside(path, ".tmp-")
    with reported(path, 0, temporary):
        disk.symlink(target, temporary)
        disk.replace(temporary, path)
        _sync_directory(path.parent)


def commit_directory(final: Path, files: Mapping[str, bytes]) -> Committed:
    """Write a directory that is there with all its files, or not at all; an older one is replaced the same way.

    Raises OutputError or StorageError. What was there before is then still there, or the new directory is whole.
    """
    temporary = _beside(final, ".tmp-")
    entries = {name: Entry.of(data) for name, data in files.items()}
    contents = {**files, MANIFEST: _manifest(entries)}
    with reported(final, sum(map(len, contents.values())), temporary):
        _make(final.parent)
        disk.mkdir(temporary)
        for name, data in contents.items():
            disk.write(temporary / name, data)
            disk.fsync(temporary / name)
        _sync_directory(temporary)
        _install(temporary, final)
    return Committed(final, entries)


def discard(directory: Path) -> None:
    """Remove a committed directory; it is gone as a whole before the first of its files is."""
    with reported(directory, 0):
        for place in (directory, _waiting(directory)):
            if place.is_dir():
                doomed = _beside(directory, ".del-")
                disk.rename(place, doomed)
                _sync_directory(directory.parent)
                disk.remove(doomed)


def move(source: Path, target: Path) -> None:
    """Rename a file or a directory, durably; the target's parent is made where it is missing."""
    with reported(target, 0):
        _make(target.parent)
        disk.rename(source, target)
        _sync_directory(target.parent)
        _sync_directory(source.parent)


def sweep(root: Path, depth: int, skip: Collection[str] = ()) -> list[Path]:
    """Clear up after a killed process, and return what was removed; only the holder of the lock may.

    depth: so many levels of folders, 1 for the root's own entries alone; skip: folders in which others may be at work.
    """
    removed = []
    with reported(root, 0):
        for parent, folders, names in os.walk(root):
            if len(Path(parent).relative_to(root).parts) >= depth:
                folders.clear()
                continue
            for path in [Path(parent, name) for name in sorted(folders + names)]:
                if path.name.startswith(_LITTER):
                    disk.remove(path)
                    removed.append(path)
                elif path.name.startswith(_WAITING):
                    _settle(path.with_name(path.name.removeprefix(_WAITING)))
            folders[:] = [name for name in folders if not name.startswith((*_LITTER, _WAITING)) and name not in skip]
    return removed


def sweep_old(directory: Path, seconds: float, names: str = ".tmp-*") -> list[Path]:
    """Clear up in a directory that several processes write without a lock, and return what was removed.

    seconds: since its last change; so long that whoever writes a file is surely done, or dead; names: a pattern.
    """
    removed = []
    with reported(directory, 0):
        for path in sorted(directory.glob(names)):
            # its writer may be done, or another process sweep here too, between any two of these calls
            with contextlib.suppress(FileNotFoundError):
                facts = path.lstat()
                # what other users left is theirs to remove
                if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > seconds:
                    disk.remove(path)
                    removed.append(path)
    return removed


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for what other libraries want in files, removed in the end; after a kill, by the next one."""
    sweep_old(Path(tempfile.gettempdir()), ABANDONED, f"{_SCRATCH}*")
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder:
        yield Path(folder)


def writable(directory: Path) -> None:
    """Create the directory and prove, before anything is spent, that a file in it can be written and made durable.

    Raises OutputError that says why not; StorageError where the disk is full or failing.
    """
    probe = _beside(directory / "probe", ".tmp-")
    with reported(directory, 1, probe):
        _make(directory)
        disk.write(probe, b"\n")
        disk.fsync(probe)
        disk.remove(probe)


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a file: its size in bytes and the sha256 of its content, in hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> Entry:
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def __str__(self) -> str:
        return f"{self.size:,} bytes with sha256 {self.sha256[:16]}…"


@dataclass(frozen=True)
class Committed:
    """A directory with a manifest, and the entries of that manifest by file name."""

    directory: Path
    entries: Mapping[str, Entry]

    def read(self, name: str) -> bytes:
        """The content of one file. Raises CheckpointError unless it is what was committed."""
        path = self.directory / name
        if name not in self.entries:
            raise CheckpointError(f"expected {name} in {self.directory}, got only {', '.join(sorted(self.entries))}")
        data = _read(path)
        if (found := Entry.of(data)) != self.entries[name]:
            raise CheckpointError(
                f"{path} is damaged: expected {self.entries[name]}, got {found}; "
                f"restore it from a copy or delete {self.directory}"
            )
        return data


def verify(directory: Path) -> Committed:
    """The committed directory, after every byte of it was read and checked. Raises CheckpointError naming the file."""
    place = _waiting(directory) if _waiting(directory).is_dir() else directory
    committed = Committed(place, _entries(place / MANIFEST))
    for name in committed.entries:
        committed.read(name)
    return committed


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}-{secrets.token_hex(4)}")


def _claim(temporary: Path, final: Path) -> bool:
    """Give a file its final name unless that is taken, and say which; its temporary name is gone in either case."""
    try:
        # a rename would replace what is there
        disk.link(temporary, final)
        first = True
    except FileExistsError:
        first = False
    except OSError as error:
        if error.errno not in _LINKLESS:
            raise
        first = not os.path.lexists(final)
        if first:
            disk.rename(temporary, final)
            return True
    disk.remove(temporary)
    return first


def _waiting(final: Path) -> Path:
    return final.with_name(_WAITING + final.name)


def _make(directory: Path) -> None:
    """Create the directory and its parents; each new name is durable before something is put into it."""
    if not directory.is_dir():
        _make(directory.parent)
        disk.mkdir(directory)
        _sync_directory(directory.parent)


def _sync_directory(path: Path) -> None:
    try:
        disk.fsync_directory(path)
    except OSError as error:
        # some network file systems cannot do it; there the server keeps the order of names
        if error.errno != errno.EINVAL:
            raise


def _install(temporary: Path, final: Path) -> None:
    _settle(final)
    # rename cannot replace a directory that has files in it, so between two renames the new one counts as the old
    place = _waiting(final) if final.exists() else final
    disk.rename(temporary, place)
    _sync_directory(final.parent)
    _settle(final)


def _settle(final: Path) -> None:
    """Give a directory that waits under `.new-` its own name, and remove the one that it replaces.

    No sync is needed: should a power cut undo these renames, the directory waits again.
    """
    if not _waiting(final).is_dir():
        return
    replaced = _beside(final, ".del-") if final.exists() else None
    if replaced:
        disk.rename(final, replaced)
    disk.rename(_waiting(final), final)
    if replaced:
        disk.remove(replaced)


def _manifest(entries: Mapping[str, Entry]) -> bytes:
    body = {"files": {name: asdict(entry) for name, entry in entries.items()}}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": own}, sort_keys=True, indent=1) + "\n").encode()


def _entries(path: Path) -> dict[str, Entry]:
    """The entries of a manifest, which is whole when writing it anew gives the same bytes."""
    data = _read(path)
    try:
        files = json.loads(data)["files"]
        entries = {name: Entry(entry["size"], entry["sha256"]) for name, entry in files.items()}
        if _manifest(entries) != data:
            raise ValueError("its own sha256 does not match")
        if strange := [name for name in entries if name != Path(name).name or "\0" in name]:
            raise ValueError(f"it names {strange[0]!r}, which is no file of the directory")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it from a copy or delete {path.parent}") from error
    return entries


def _read(path: Path) -> bytes:
    with readable(path):
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise CheckpointError(
                f"expected {path}, found no such file: {path.parent} is not a whole checkpoint"
            ) from error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError of reading into one of ours, which never means that what is there is damaged."""
    try:
        yield
    except OSError as error:
        raise UnreadableError(
            f"cannot read {error.filename or path}: {error.strerror or error}; give this user the right to read it, or "
            "check the disk, then start again: nothing was changed"
        ) from error


@contextlib.contextmanager
def reported(target: Path, needed: int, temporary: Path | None = None) -> Iterator[None]:
    """Turn an OSError into one of ours, after the temporary file or directory was removed to give its space back."""
    try:
        yield
    except OSError as error:
        if temporary is not None:
            # the first failure is the one to report, and sweep removes what stays
            with contextlib.suppress(OSError):
                disk.remove(temporary)
        raise _failure(target, needed, error) from error


def _failure(target: Path, needed: int, error: OSError) -> SsldError:
    obstructed = error.errno in _OBSTRUCTED
    reason = "a file is where a directory is needed" if obstructed else error.strerror or str(error)
    if error.errno in _FULL:
        return StorageError(
            f"cannot write {target}: {reason}; {needed:,} bytes are needed and {_free(target)} are free; "
            "free space and start again, what was committed stays"
        )
    if error.errno in _REFUSED:
        at = f" ({error.filename})" if error.filename else ""
        return OutputError(
            f"cannot write {target}: {reason}{at}; choose a directory you can write (--out, labels.store)"
        )
    return StorageError(f"cannot write {target}: {reason}; check the disk, then start again, what was committed stays")


def _free(target: Path) -> str:
    existing = next(parent for parent in target.absolute().parents if parent.is_dir())
    return f"{shutil.disk_usage(existing).free:,}"
