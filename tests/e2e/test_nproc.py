"""Two processes train one ladder: whatever ends one of them, the run goes on to the same bytes, and none is left.

A command takes seconds to start, so one run is broken by all that is to be tried, once by each.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssld.data.sources import open_source

# The cheapest teacher there is; it writes down who was asked about how many images.
TEACHER = '''\
import os
import numpy as np
from ssld.contracts import TeacherSpec

class Quarters:
    """Logits for four classes from the mean brightness of the four quarters of an image."""

    spec = TeacherSpec(8, "quarters", mean=None, std=None)

    def predict(self, images):
        with open("asked.log", "a") as log:
            log.write(f"{os.getpid()} {len(images)}\\n")
        return (images.reshape(len(images), 2, 4, 2, 4, 3).mean(axis=(2, 4, 5)).reshape(-1, 4) / 32).astype(np.float32)
'''
RECIPE = """\
# A student learns from labels that are kept, then from labels of people.
name: shared
seed: 3
images:
  resolution: 32
  train: [RandCropImage: {scale: [0.7, 1.0]}, RandFlipImage, NormalizeImage]
  eval: [ResizeImage: {resize_short: 32}, CropImage, NormalizeImage]
data:
  unlabeled: "pool/shard-{000000..000003}.tar"
  labeled: builtin:shapes?count=30&size=32&classes=4&seed=2
  validation: builtin:shapes?count=24&size=32&classes=4&seed=3
stages:
  distill:
    {kind: distill, teacher: {plugin: quarters}, student: MobileNetV3_small_x0_35, data: unlabeled, epochs: 4,
     batch_size: 9, learning_rate: 0.05, eval_interval: 3, save_steps: 4, labels: {views: 2, top_k: 3}}
  finetune:
    {kind: finetune, from: distill, hard: 1, data: labeled, epochs: 3, batch_size: 9, learning_rate: 0.02,
     eval_interval: 3, save_steps: 3}
"""
SHARDS, PER_SHARD = 4, 24
DAMAGED = PER_SHARD + 5
RUN = ("run", "shared.yaml", "--trust-teacher", "--nproc", 2)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is to Python what an installed package with this teacher is."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "quarters.py").write_text(TEACHER)
    about = folder / "quarters-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: quarters\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ssld.teachers]\nquarters = quarters:Quarters\n")
    return folder


def write_shards(folder: Path, *damaged: int) -> Path:
    """A pool of four shards in the folder; the images of these numbers are cut off."""
    samples = open_source(f"builtin:shapes?count={SHARDS * PER_SHARD}&size=32&classes=4&seed=1", labeled=False)
    for shard in range(SHARDS):
        file = folder / f"shard-{shard:06d}.tar"
        with tarfile.open(file, "w") as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                buffer = io.BytesIO()
                Image.fromarray(samples.read(number)).save(buffer, "PNG")
                data = buffer.getvalue()[: 60 if number in damaged else None]
                member = tarfile.TarInfo(f"{number:06d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        # what is held out of a shard depends on it
        os.utime(file, (1e9, 1e9))
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("pool"))


def prepare(ssld, site: Path, pool: Path) -> None:
    """Install the teacher, and put the recipe and the pool into the folder."""
    ssld.extra["PYTHONPATH"] = str(site)
    (ssld.folder / "shared.yaml").write_text(RECIPE)
    (ssld.folder / "pool").symlink_to(pool)


@pytest.fixture(scope="module")
def started(command, site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Path], Any]]:
    """started(name, pool): the command in a folder with the recipe, where nothing has run."""
    commands = []

    def prepared(name: str, pool: Path) -> Any:
        commands.append(command(tmp_path_factory.mktemp(name)))
        prepare(commands[-1], site, pool)
        return commands[-1]

    yield prepared
    for ssld in commands:
        ssld.clean_up()


@pytest.fixture(scope="module")
def unbroken(started, pool) -> Path:
    """The folder of a run that nothing interrupted."""
    ssld = started("unbroken", pool)
    process = ssld.start(*RUN)
    ssld.wait(process)
    assert not left(process)
    return ssld.folder


@dataclass(frozen=True)
class Ended:
    """A command that has ended: what it printed, None of one that was killed, and who lived on for long."""

    result: Any
    left: list[tuple[int, str]]
    weights: dict[str, str]
    follower: int


@pytest.fixture(scope="module")
def broken(started, pool) -> dict[str, Ended]:
    """By what has ended it: each command that was needed to bring one run to its end."""
    ssld, found = started("broken", pool), {}

    def ended(process: subprocess.Popen, code: int | None, follower: int) -> Ended:
        result = ssld.wait(process, code) if code is not None else None
        process.wait()
        return Ended(result, left(process), weights(ssld.folder), follower)

    process = ssld.start(*RUN)
    in_the_middle(ssld, process, "distill")
    (follower,) = followers(process)
    process.kill()
    found["kill of rank 0"] = ended(process, None, follower)

    process = ssld.start("resume")
    in_the_middle(ssld, process, "distill")
    (follower,) = followers(process)
    os.kill(follower, signal.SIGKILL)
    found["kill of rank 1"] = ended(process, 71, follower)

    process = ssld.start("resume")
    in_the_middle(ssld, process, "finetune")
    (follower,) = followers(process)
    process.terminate()
    found["SIGTERM"] = ended(process, 143, follower)

    process = ssld.start(program=("sh", "-c", found["SIGTERM"].result.continuation))
    found["its end"] = ended(process, 0, follower)
    return found


@pytest.fixture(scope="module")
def interrupted(started, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of Ctrl-C, while the other rank starts and in a step; the second shard has a damaged image."""
    ssld = started("interrupted", write_shards(tmp_path_factory.mktemp("damaged"), DAMAGED))
    found = {}

    process = ssld.start(*RUN)
    ssld.until(lambda: followers(process), process)
    ssld.stop(process, signal.SIGINT)
    found["at the start"] = Ended(ssld.wait(process, 130), left(process), weights(ssld.folder), 0)

    process = ssld.start("resume")
    in_the_middle(ssld, process, "distill")
    ssld.stop(process, signal.SIGINT)
    found["in a step"] = Ended(ssld.wait(process, 130), left(process), weights(ssld.folder), 0)

    found["its end, by one process"] = ssld("resume", "--nproc", 1)
    found["run"] = ssld.folder / "runs" / "shared"
    return found


def weights(folder: Path) -> dict[str, str]:
    """sha256 of each stage's last student, by the name of the stage."""
    found = sorted(folder.glob("runs/shared/*/latest/student.safetensors"))
    return {file.parts[-3]: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def group(process: subprocess.Popen) -> list[tuple[int, str]]:
    """Process id and command line of all that live in the group of a started command."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in listing.stdout.splitlines()]
    return [(int(pid), words) for pid, of, state, words in rows if int(of) == process.pid and state[0] != "Z"]


def followers(process: subprocess.Popen) -> list[int]:
    return [pid for pid, words in group(process) if "ssld.follower" in words]


def left(process: subprocess.Popen, seconds: float = 10) -> list[tuple[int, str]]:
    """Who lives on after these seconds at most."""
    end = time.monotonic() + seconds
    while (alive := group(process)) and time.monotonic() < end:
        time.sleep(0.1)
    return alive


def in_the_middle(ssld, process: subprocess.Popen, stage: str) -> None:
    """Wait until this process has saved the stage for the first time, which is long before its end."""
    place = ssld.folder / "runs" / "shared" / stage
    before = set(place.glob("step-*/manifest.json"))
    ssld.until(lambda: set(place.glob("step-*/manifest.json")) - before, process)


def test_both_ranks_label_and_the_run_says_how_many_they_are(unbroken):
    asked = [line.split() for line in (unbroken / "asked.log").read_text().splitlines()]
    pool = [(pid, int(count)) for pid, count in asked if int(count) >= PER_SHARD]
    assert len({pid for pid, _ in pool}) == 2
    run = unbroken / "runs" / "shared"
    assert json.loads((run / "run.json").read_text())["nproc"] == 2
    assert set(weights(unbroken)) == {"distill", "finetune"}
    state = json.loads((run / "distill" / "latest" / "state.json").read_text())
    assert state["state"]["environment"]["ranks"] == "2"


@pytest.mark.parametrize("how", ["kill of rank 0", "kill of rank 1", "SIGTERM", "its end"])
def test_whatever_ends_one_process_ends_all(broken, how):
    assert not broken[how].left


def test_a_run_that_was_broken_by_all_of_it_has_the_same_weights(broken, unbroken):
    assert broken["its end"].weights == weights(unbroken)
    assert set(weights(unbroken)) == {"distill", "finetune"}


@pytest.mark.parametrize(
    ("how", "stage"), [("kill of rank 1", "distill"), ("SIGTERM", "distill"), ("its end", "finetune")]
)
def test_as_many_ranks_go_on_where_the_run_stopped(broken, how, stage):
    (begun,) = re.findall(rf"^\[\d {stage}\] {stage} .*$", broken[how].result.err, re.MULTILINE)
    assert "on 2 ranks, going on after step" in begun
    assert "not promised" not in broken[how].result.err


def test_a_killed_follower_is_named(broken):
    killed = broken["kill of rank 1"]
    (message,) = re.findall(r"^Error: .*$", killed.result.err, re.MULTILINE)
    assert f"rank 1 (pid {killed.follower})" in message
    assert "signal 9" in message
    assert killed.result.continuation == "ssld resume --out runs/shared"
    assert killed.weights.keys() == {"distill"}


def test_a_terminated_run_saves(broken):
    assert "Error: finetune: stopped by SIGTERM after step " in broken["SIGTERM"].result.err


def test_ctrl_c_while_the_others_start_is_no_fault_of_theirs(interrupted):
    stopped = interrupted["at the start"]
    assert not stopped.left
    assert re.search(r"^Error: .*stopped", stopped.result.err, re.MULTILINE)
    assert "rank 1" not in stopped.result.err
    assert not stopped.weights


def test_ctrl_c_for_all_saves_and_one_process_may_finish(interrupted):
    stopped, done = interrupted["in a step"], interrupted["its end, by one process"]
    assert not stopped.left
    assert "Error: distill: stopped by SIGINT after step " in stopped.result.err
    assert stopped.result.continuation == "ssld resume --out runs/shared"
    assert 'warning: the same weights as in an unbroken run are not promised, since ranks: "2" → "1"' in done.err
    assert [row["state"] for row in done.table()] == ["finished", "finished"]
    assert json.loads((interrupted["run"] / "run.json").read_text())["nproc"] == 1


def test_an_image_that_only_a_follower_finds_damaged_is_named_with_its_rank(interrupted):
    """The second shard is labelled by rank 1."""
    log = (interrupted["run"] / "train.log").read_text()
    line = next(line for line in log.splitlines() if line.endswith("(rank 1)"))
    assert "skipped, damaged: " in line
    assert f"shard-000001.tar: {DAMAGED:06d}.png" in line
    assert "(1 of at most 1)" in line
