"""Error kinds, litter and the lock; power cuts and a fault at every operation are in tests/faults."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssld import files, lock
from ssld.errors import BusyError, CheckpointError, OutputError, SsldError, StorageError

HOLD = """
import sys
from pathlib import Path
from ssld.errors import BusyError
from ssld.lock import RunLock
try:
    with RunLock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except BusyError as error:
    print(error)
    sys.exit(error.exit_code)
"""
HOLD_WITH_ORPHAN = """
import os, sys, time
from pathlib import Path
from ssld.lock import RunLock
with RunLock(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


def fail(monkeypatch: pytest.MonkeyPatch, method: str, code: int) -> None:
    """Make one method of the disk raise an OSError from now on."""

    disk = files.Disk()
    setattr(disk, method, fail_with(code))
    monkeypatch.setattr(files, "disk", disk)


def fail_with(code: int) -> Callable[..., None]:
    def failing(*arguments: object) -> None:
        raise OSError(code, os.strerror(code), str(arguments[0]))

    return failing


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def process(script: str, run: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", script, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            yield holder
        finally:
            holder.kill()


def line(holder: subprocess.Popen[str]) -> str:
    assert holder.stdout is not None
    return holder.stdout.readline().strip()


def test_write_atomic_creates_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "facts.json"
    for content in (b"old", b"", b"new" * 1000):
        files.write_atomic(path, content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["facts.json"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_mode_is_0644_less_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        files.write_atomic(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_write_that_takes_a_part_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole(descriptor, bytes(data)[:7]))
    files.write_atomic(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


@pytest.mark.parametrize("method", ["write", "fsync", "replace", "fsync_directory"])
@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, StorageError), (errno.EIO, StorageError), (errno.EROFS, OutputError), (errno.EACCES, OutputError)],
)
def test_a_failed_write_is_reported_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, code: int, kind: type[SsldError]
) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")
    fail(monkeypatch, method, code)
    with pytest.raises(kind, match=os.strerror(code)) as caught:
        files.write_atomic(path, b"new")
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == (b"new" if method == "fsync_directory" else b"old")
    assert names(tmp_path) == ["file"]


def test_a_full_disk_says_how_much_is_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "write", errno.ENOSPC)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 4321))
    with pytest.raises(StorageError, match=r"123,456 bytes are needed and 4,321 are free.*start again"):
        files.write_atomic(tmp_path / "deep" / "file", bytes(123_456))


def test_file_systems_that_cannot_sync_a_directory_are_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "fsync_directory", errno.EINVAL)
    files.write_atomic(tmp_path / "new" / "file", b"x")
    assert (tmp_path / "new" / "file").read_bytes() == b"x"


def test_link_atomic_moves_the_link(tmp_path: Path) -> None:
    for target in ("one", "two"):
        files.link_atomic(tmp_path / "latest", target)
        assert os.readlink(tmp_path / "latest") == target
    assert names(tmp_path) == ["latest"]


def test_of_two_exclusive_commits_the_first_wins(tmp_path: Path) -> None:
    path = tmp_path / "store" / "labels"
    assert [files.commit_exclusive(path, data) for data in (b"first", b"second")] == [True, False]
    assert path.read_bytes() == b"first"
    assert names(path.parent) == ["labels"]


@pytest.mark.parametrize("linkless", [False, True])
def test_an_exclusive_commit_touches_nothing_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linkless: bool
) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    if linkless:
        fail(monkeypatch, "link", errno.EPERM)
    assert not any(files.commit_exclusive(tmp_path / name, b"new") for name in names(tmp_path))
    assert names(tmp_path) == ["dangling", "directory"]
    assert os.readlink(tmp_path / "dangling") == "nowhere"


def test_of_many_writers_at_once_one_is_told_that_it_won(tmp_path: Path) -> None:
    for attempt in range(20):
        path, start = tmp_path / str(attempt), threading.Barrier(8)

        def commit(content: bytes, path: Path = path, start: threading.Barrier = start) -> tuple[bool, bytes]:
            start.wait()
            return files.commit_exclusive(path, content), content

        with ThreadPoolExecutor(8) as pool:
            winners = [content for won, content in pool.map(commit, [b"%d" % i * 1000 for i in range(8)]) if won]
        assert winners == [path.read_bytes()]
    assert len(names(tmp_path)) == 20


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_an_exclusive_commit_works_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fail(monkeypatch, "link", code)
    assert [files.commit_exclusive(tmp_path / "labels", data) for data in (b"first", b"second")] == [True, False]
    assert (tmp_path / "labels").read_bytes() == b"first"
    assert names(tmp_path) == ["labels"]


@pytest.mark.parametrize("method", ["write", "fsync", "link", "remove", "fsync_directory"])
@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, StorageError), (errno.EACCES, OutputError)])
def test_a_failed_exclusive_commit_is_reported_and_leaves_nothing_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, code: int, kind: type[SsldError]
) -> None:
    path = tmp_path / "labels"
    fail(monkeypatch, method, code)
    with pytest.raises(kind, match=os.strerror(code)):
        files.commit_exclusive(path, b"first")
    committed = method in ("remove", "fsync_directory")
    assert path.exists() == committed
    assert len(names(tmp_path)) == committed + (method == "remove")
    monkeypatch.setattr(files, "disk", files.Disk())
    assert files.commit_exclusive(path, b"second") != committed
    assert path.read_bytes() == (b"first" if committed else b"second")


def test_an_exclusive_commit_says_what_the_caller_still_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "write", errno.ENOSPC)
    with pytest.raises(StorageError, match=r"; 5 bytes are needed"):
        files.commit_exclusive(tmp_path / "labels", b"first")
    with pytest.raises(StorageError, match=r"; 123,456 bytes are needed"):
        files.commit_exclusive(tmp_path / "labels", b"first", needed=123_456)


def test_commit_directory_gives_back_what_verify_reads(tmp_path: Path) -> None:
    content = {"a.bin": bytes(range(256)), "empty": b""}
    committed = files.commit_directory(tmp_path / "x" / "final", content)
    assert files.verify(tmp_path / "x" / "final") == committed
    assert {name: committed.read(name) for name in committed.entries} == content
    assert names(tmp_path / "x") == ["final"]
    with pytest.raises(CheckpointError, match=r"expected other in .* got only a\.bin, empty"):
        committed.read("other")


def test_discard_removes_a_directory_and_the_one_that_waits_for_its_name(tmp_path: Path) -> None:
    for name in ("old", ".new-old", "kept"):
        files.commit_directory(tmp_path / name, {"a": name.encode()})
    files.discard(tmp_path / "old")
    assert names(tmp_path) == ["kept"]


def test_verify_prefers_the_directory_that_waits(tmp_path: Path) -> None:
    files.commit_directory(tmp_path / "final", {"a": b"old"})
    files.commit_directory(tmp_path / ".new-final", {"a": b"new"})
    assert files.verify(tmp_path / "final").read("a") == b"new"


@pytest.mark.parametrize("before", [(".new-final",), ("final", ".new-final")])
def test_a_commit_replaces_the_directory_that_waits(tmp_path: Path, before: tuple[str, ...]) -> None:
    for name in before:
        files.commit_directory(tmp_path / name, {"a": b"old"})
    files.commit_directory(tmp_path / "final", {"a": b"new"})
    assert files.verify(tmp_path / "final").read("a") == b"new"
    assert names(tmp_path) == ["final"]


def test_sweep_old_removes_what_is_being_written_no_longer(tmp_path: Path) -> None:
    for name, age in {".tmp-dead": 7200, ".tmp-alive": 60, "labels": 7200, ".del-other": 7200}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert files.sweep_old(tmp_path, 3600) == [tmp_path / ".tmp-dead"]
    assert names(tmp_path) == [".del-other", ".tmp-alive", "labels"]
    assert files.sweep_old(tmp_path / "missing", 3600) == []


def test_sweep_old_leaves_other_names_and_other_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".tmp-a", ".tmp-b"):
        (tmp_path / name).touch()
    assert files.sweep_old(tmp_path, -1, ".tmp-b*") == [tmp_path / ".tmp-b"]
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / ".tmp-a").stat().st_uid + 1)
    assert files.sweep_old(tmp_path, -1) == []
    assert names(tmp_path) == [".tmp-a"]


def test_scratch_is_gone_afterwards_and_with_it_what_a_killed_process_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with files.scratch() as folder:
        (folder / "weights").touch()
    assert names(tmp_path) == []
    for name, age in {"ssld-scratch-alive": 60, "ssld-scratch-dead": 7200, "ssld-data": 7200}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with files.scratch():
        assert not (tmp_path / "ssld-scratch-dead").exists()
    assert names(tmp_path) == ["ssld-data", "ssld-scratch-alive"]


def test_sweep_old_takes_no_notice_of_who_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".tmp-done").touch()
    fail(monkeypatch, "remove", errno.ENOENT)
    assert files.sweep_old(tmp_path, -1) == []
    fail(monkeypatch, "remove", errno.EIO)
    with pytest.raises(StorageError, match=os.strerror(errno.EIO)):
        files.sweep_old(tmp_path, -1)


def test_sweep_removes_litter_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    for place in (run / "distill", outside):
        files.commit_directory(place / "step", {"a": b"kept"})
        (place / ".tmp-step-1" / ".tmp-inner").mkdir(parents=True)
        (place / ".del-step-2").mkdir()
        (place / ".tmp-journal-3").write_bytes(b"half")
    (run / "link").symlink_to(outside)
    removed = files.sweep(run, depth=9)
    assert sorted(removed) == [run / "distill" / name for name in (".del-step-2", ".tmp-journal-3", ".tmp-step-1")]
    assert names(run / "distill") == ["step"]
    assert len(names(outside)) == 4


@pytest.mark.parametrize("old_is_there", [True, False])
def test_sweep_gives_a_waiting_directory_its_name(tmp_path: Path, old_is_there: bool) -> None:
    if old_is_there:
        files.commit_directory(tmp_path / "step", {"a": b"old"})
    files.commit_directory(tmp_path / ".new-step", {"a": b"new"})
    files.sweep(tmp_path, depth=9)
    assert names(tmp_path) == ["step"]
    assert files.verify(tmp_path / "step").read("a") == b"new"


def test_writable_creates_the_directory_and_leaves_nothing(tmp_path: Path) -> None:
    files.writable(tmp_path / "runs" / "first")
    files.writable(tmp_path / "runs" / "first")
    assert names(tmp_path / "runs" / "first") == []


@pytest.mark.parametrize("path", ["file", "file/run", "file/deep/run"])
def test_writable_refuses_a_file_in_the_way(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"a file is where a directory is needed .*--out") as caught:
        files.writable(tmp_path / path)
    assert str(tmp_path / path) in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.parametrize("method", ["mkdir", "write", "fsync"])
@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EROFS, OutputError), (errno.EACCES, OutputError), (errno.ENOSPC, StorageError)]
)
def test_writable_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, code: int, kind: type[SsldError]
) -> None:
    fail(monkeypatch, method, code)
    with pytest.raises(kind, match=os.strerror(code)):
        files.writable(tmp_path / "run")
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_writable_notices_real_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        files.writable(tmp_path / "run")


def test_the_lock_names_its_holder_and_is_free_after_kill(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as holder:
        assert line(holder) == "held"
        descriptors = len(os.listdir("/dev/fd"))
        for _ in range(2):
            with (
                pytest.raises(BusyError, match=f"in use by pid {holder.pid} on host {socket.gethostname()} since 20"),
                lock.RunLock(tmp_path),
            ):
                pytest.fail("two holders")
        assert len(os.listdir("/dev/fd")) == descriptors
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock.RunLock(tmp_path):
            assert (tmp_path / "run.lock").read_text().startswith(f"pid {os.getpid()} ")
    assert names(tmp_path) == ["run.lock"]


def test_who_holds_the_lock_can_be_asked_without_taking_or_dropping_it(tmp_path: Path) -> None:
    assert lock.holder(tmp_path) is None
    with process(HOLD, tmp_path) as other:
        assert line(other) == "held"
        for _ in range(2):
            assert str(lock.holder(tmp_path)).startswith(f"pid {other.pid} on host ")
        with pytest.raises(BusyError), lock.RunLock(tmp_path):
            pytest.fail("two holders")
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert lock.holder(tmp_path) is None
    with lock.RunLock(tmp_path):
        assert lock.holder(tmp_path) == f"pid {os.getpid()}, which is this process"
        with process(HOLD, tmp_path) as other:
            assert "is in use by" in line(other)


def test_the_lock_is_released_at_the_end_of_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with lock.RunLock(tmp_path):
            pass
    with process(HOLD, tmp_path) as other:
        assert line(other) == "held"


@pytest.mark.parametrize("spelling", [lambda run: run, lambda run: run / ".." / run.name])
def test_a_second_attempt_in_the_same_process_does_not_drop_the_lock(
    tmp_path: Path, spelling: Callable[[Path], Path]
) -> None:
    with lock.RunLock(tmp_path):
        with (
            pytest.raises(BusyError, match=f"pid {os.getpid()}, which is this process"),
            lock.RunLock(spelling(tmp_path)),
        ):
            pytest.fail("two holders")
        with process(HOLD, tmp_path) as other:
            assert f"in use by pid {os.getpid()} " in line(other)
            assert other.wait() == BusyError.exit_code


def test_an_orphaned_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    with process(HOLD_WITH_ORPHAN, tmp_path) as holder:
        orphan = int(line(holder))
        try:
            holder.kill()
            holder.wait()
            os.kill(orphan, 0)
            with lock.RunLock(tmp_path):
                pass
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_the_lock_needs_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file is where a directory is needed"), lock.RunLock(tmp_path / "file"):
        pytest.fail("locked a file")
