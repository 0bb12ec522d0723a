"""The installed command, run as a user runs it, and one small ladder that was never interrupted to compare with."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssld.data.sources import open_source

COMMAND = Path(sys.executable).with_name("ssld")
VALIDATION = "builtin:shapes?count=48&size=32&seed=3"
STAGES = {
    "teach": (
        "{kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 2, batch_size: 8,"
        " learning_rate: 0.05, eval_interval: 2, save_steps: 3}"
    ),
    "distill": (
        "{kind: distill, teacher: {stage: teach}, student: MobileNetV3_small_x0_35, data: unlabeled, epochs: 2,"
        " batch_size: 8, learning_rate: 0.05, eval_interval: 2, save_steps: 3}"
    ),
    "finetune": (
        "{kind: finetune, from: distill, teacher: {stage: teach}, data: labeled, epochs: 2, batch_size: 8,"
        " learning_rate: 0.02, hard: 0.5, eval_interval: 2, save_steps: 3}"
    ),
    "fixres": "{kind: fixres, from: finetune, data: labeled, epochs: 1, batch_size: 8, save_steps: 2}",
}
HEAD = f"""\
# The smallest ladder that has all four stages; it learns next to nothing, in seconds.
name: tiny
seed: 3
images:
  resolution: 32
  train: [RandCropImage: {{scale: [0.7, 1.0]}}, RandFlipImage, NormalizeImage]
  eval: [ResizeImage: {{resize_short: 32}}, CropImage, NormalizeImage]
data:
  unlabeled: builtin:shapes?count=64&size=32&seed=1
  labeled: builtin:shapes?count=48&size=32&seed=2
  validation: {VALIDATION}
stages:
"""


@dataclass(frozen=True)
class Result:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def continuation(self) -> str:
        """The command that goes on, as printed."""
        (line,) = re.findall(r"^continue: (.*)$", self.err, re.MULTILINE)
        return line

    def table(self) -> list[dict[str, str]]:
        """The rows of the table on standard output, by the words of its header."""
        header, *rows = self.out.splitlines()
        columns = [(found[0], found.start()) for found in re.finditer(r"\S+(?: \S+)*", header)]
        ends = [start for _, start in columns[1:]] + [None]
        return [
            {name: row[start:end].rstrip() for (name, start), end in zip(columns, ends, strict=True)} for row in rows
        ]


@dataclass
class Command:
    """`ssld` in a folder of its own, with a home and a cache of its own."""

    folder: Path
    extra: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return {
            "PATH": f"{COMMAND.parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
            **self.extra,
        }

    def __call__(self, *words: object, code: int = 0) -> Result:
        """Run to the end. Whatever the outcome: no traceback and no control characters."""
        return self.wait(self.start(*words), code)

    def start(self, *words: object, program: tuple[str, ...] = (str(COMMAND),), **streams: Any) -> subprocess.Popen:
        """Start in a process group of its own."""
        process = subprocess.Popen(
            [*program, *map(str, words)],
            cwd=self.folder,
            env=self.environment,
            text=True,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        )
        self.started.append(process)
        return process

    def wait(self, process: subprocess.Popen, code: int = 0) -> Result:
        out, err = process.communicate(timeout=200)
        result = Result(process.returncode, out, err)
        assert result.code == code, f"expected exit code {code}, got {result.code}\n{out}\n{err}"
        assert "Traceback" not in err
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out + err), repr(out + err)
        return result

    def stop(self, process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole group."""
        os.killpg(process.pid, number)

    def recipe(self, *stages: str, name: str = "tiny.yaml") -> str:
        """Write a recipe of these stages, of all four where none is named, and return its name."""
        text = HEAD + "".join(f"  {stage}: {STAGES[stage]}\n" for stage in stages or STAGES)
        (self.folder / name).write_text(text)
        return name

    def until(self, condition: Callable[[], Any], process: subprocess.Popen, seconds: float = 90) -> None:
        """Wait for the condition; fail when the process ends before it, or the time is over."""
        end = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)

    def until_in(self, stage: str, run: Path, process: subprocess.Popen) -> None:
        """Wait until this process has begun the stage, as the log of the run says."""
        log = run / "train.log"
        before = log.read_text() if log.is_file() else ""
        begun = re.compile(rf" {stage}\] .* of \d+ stages\), ")
        self.until(lambda: log.is_file() and begun.search(log.read_text()[len(before) :]), process)

    @staticmethod
    def weights(run: Path) -> dict[str, str]:
        """sha256 of each stage's last student, by the name of the stage."""
        found = sorted(run.glob("*/latest/student.safetensors"))
        return {file.parts[-3]: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}

    @staticmethod
    def snapshot(root: Path) -> dict[str, tuple[int, int, str]]:
        """Inode, time of change and content of every file below the root but the lock, which names its last holder."""
        return {
            str(file.relative_to(root)): (
                file.stat().st_ino,
                file.stat().st_mtime_ns,
                hashlib.sha256(file.read_bytes()).hexdigest(),
            )
            for file in sorted(root.rglob("*"))
            if file.is_file() and file.suffix != ".lock"
        }

    def clean_up(self) -> None:
        for process in self.started:
            if process.poll() is None:
                self.stop(process)
            process.communicate()


@dataclass(frozen=True)
class Reference:
    """A finished ladder, what it printed, and the sha256 of each stage's weights."""

    directory: Path
    result: Result
    weights: dict[str, str]


@pytest.fixture
def ssld(tmp_path: Path) -> Iterator[Command]:
    """The command, in the test's own folder, where tiny.yaml lies."""
    command = Command(tmp_path)
    command.recipe()
    yield command
    command.clean_up()


@pytest.fixture(scope="session")
def command() -> type[Command]:
    """For fixtures that outlive a test: the command in a folder that they name."""
    return Command


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    command = Command(folder)
    result = command("run", command.recipe(), "--trust-teacher")
    run = folder / "runs" / "tiny"
    return Reference(run, result, command.weights(run))


@pytest.fixture
def finished(reference: Reference, tmp_path: Path) -> Path:
    """A copy of the finished run at runs/tiny."""
    return shutil.copytree(reference.directory, tmp_path / "runs" / "tiny", symlinks=True)


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Write a built-in source as image files, `{name}` below the test's folder, and return where they are."""

    def write(name: str, source: str, suffix: str = "png", layout: str = "{label}/{number:03d}") -> Path:
        samples = open_source(source, labeled=True)
        for number in range(len(samples)):
            label = samples.classes[samples.labels[number]]
            file = tmp_path / name / f"{layout.format(label=label, number=number, third=number % 3)}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(samples.read(number)).save(file)
        return tmp_path / name

    return write


@pytest.fixture
def listed(photos: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """Write a built-in source as images in one folder with a list file and class names; return the mapping for -o."""

    def write(name: str, source: str) -> str:
        root = photos(name, source, layout="{number:03d}")
        samples = open_source(source, labeled=True)
        lines = [f"{number:03d}.png {label}\n" for number, label in enumerate(samples.labels)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
        (tmp_path / f"{name}-classes.txt").write_text("".join(f"{label}\n" for label in samples.classes))
        return f"{{list: {name}.txt, root: {root.name}, classes: {name}-classes.txt}}"

    return write


@pytest.fixture(scope="session")
def mounting() -> None:
    """For tests that mount a file system in a name space of their own."""
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs none /mnt"]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can only be mounted where user name spaces are on")
