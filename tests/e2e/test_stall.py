"""What does not answer ends a run in time, with its name; the run goes on where it was once it answers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PLUGIN = '''
"""Answers by the mean colour, and not at all while a file says that it hangs, everywhere or in other ranks alone."""
import os
import sys
import time

import numpy as np

from ssld.contracts import TeacherSpec

class Moody:
    spec = TeacherSpec(8, "mean colour")

    def predict(self, images):
        while os.path.exists("hang") or (os.path.exists("hang of others") and "-m" in sys.orig_argv):
            time.sleep(0.05)
        return np.ascontiguousarray(images.mean(axis=(2, 3)), np.float32)
'''
RECIPE = """\
name: moody
images:
  resolution: 32
  train: [RandCropImage: {scale: [0.7, 1.0]}, NormalizeImage]
  eval: [ResizeImage: {resize_short: 32}, CropImage, NormalizeImage]
data:
  unlabeled: {folder: pool}
  validation: {folder: validation}
stages:
  distill:
    kind: distill
    teacher: {plugin: moody}
    student: MobileNetV3_small_x0_35
    data: unlabeled
    batch_size: 8
    epochs: 400
    save_steps: 1
"""
PATIENCE = 2
RUN = ("run", "moody.yaml", "--trust-teacher", "--stall-timeout", PATIENCE)


def photographs(folder: Path, count: int) -> None:
    for number in range(count):
        place = folder / "rgb"[number % 3] if folder.name == "validation" else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")


@pytest.fixture
def moody(ssld: Any) -> Any:
    """The command in a folder with a recipe whose teacher answers or not."""
    site = ssld.folder / "site"
    about = site / "moody-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: moody\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ssld.teachers]\nmoody = moody_teacher:Moody\n")
    (site / "moody_teacher.py").write_text(PLUGIN)
    ssld.extra["PYTHONPATH"] = str(site)
    photographs(ssld.folder / "pool", 32)
    photographs(ssld.folder / "validation", 9)
    (ssld.folder / "moody.yaml").write_text(RECIPE)
    return ssld


def in_the_middle(ssld: Any, process: Any) -> None:
    """Wait until some steps of training are saved."""
    latest = ssld.folder / "runs" / "moody" / "distill" / "latest"
    ssld.until(lambda: latest.exists() and int(latest.resolve().name.removeprefix("step-")) > 2, process)


def ended(ssld: Any, process: Any, began: float) -> str:
    """What was said by a command that ended in time; whatever it was, the same resume goes on."""
    result = ssld.wait(process, 69)
    # the time, two looks of the watch, and what a loaded machine adds
    assert PATIENCE <= time.monotonic() - began < PATIENCE + 15
    assert result.continuation == "ssld resume --out runs/moody"
    (said,) = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert f"within {PATIENCE} s, got nothing" in said
    assert said in (ssld.folder / "runs" / "moody" / "train.log").read_text()
    return said


def goes_on(ssld: Any) -> None:
    """Resume past the step that was reached, with the same patience, and stop."""
    latest = ssld.folder / "runs" / "moody" / "distill" / "latest"
    reached = int(latest.resolve().name.removeprefix("step-"))
    process = ssld.start("resume")
    ssld.until(lambda: int(latest.resolve().name.removeprefix("step-")) > reached + 2, process)
    process.send_signal(signal.SIGTERM)
    assert f"going on after step {reached}" in ssld.wait(process, 143).err


def followers(process: Any) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"ssld.follower" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def runs(number: int) -> bool:
    """Whether a process is there, and not only waits for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_teacher_that_does_not_answer_is_named_with_the_images(moody):
    process = moody.start(*RUN)
    in_the_middle(moody, process)
    (moody.folder / "hang").touch()
    said = ended(moody, process, time.monotonic())
    assert "an answer of" in said
    assert "moody" in said
    assert ".png" in said
    (moody.folder / "hang").unlink()
    goes_on(moody)


def test_an_image_that_does_not_come_is_named(moody):
    process = moody.start(*RUN)
    in_the_middle(moody, process)
    # as a file of a server that is gone: to open it takes for ever
    image = moody.folder / "pool" / "005.png"
    content, times = image.read_bytes(), image.stat()
    image.unlink()
    os.mkfifo(image)
    said = ended(moody, process, time.monotonic())
    assert "005.png to be read" in said
    image.unlink()
    image.write_bytes(content)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    goes_on(moody)


def test_a_rank_that_stands_still_ends_the_run(moody):
    process = moody.start(*RUN, "--nproc", 2)
    in_the_middle(moody, process)
    [other] = followers(process)
    os.kill(other, signal.SIGSTOP)
    said = ended(moody, process, time.monotonic())
    assert "the other ranks" in said
    # it is killed, and to give its memory back takes a moment
    end = time.monotonic() + 10
    while runs(other):
        assert time.monotonic() < end
        time.sleep(0.02)
    goes_on(moody)


@pytest.mark.parametrize("how", ["stands still", "its teacher hangs"])
def test_a_rank_that_labels_no_more_ends_the_run(moody, how):
    recipe = moody.folder / "moody.yaml"
    # two shards, one for each rank
    photographs(moody.folder / "pool", 1100)
    recipe.write_text(recipe.read_text() + "    labels: {views: 1, top_k: 3}\n")
    (moody.folder / "hang of others").touch()
    process = moody.start(*RUN, "--nproc", 2)
    if how == "stands still":
        other: list[int] = []
        moody.until(lambda: other or other.extend(followers(process)), process)
        os.kill(other[0], signal.SIGSTOP)
    result = moody.wait(process, 69)
    assert result.continuation == "ssld resume --out runs/moody"
    assert ("rank 1 to go on" if how == "stands still" else "rank 1: expected an answer of") in result.err


def test_a_teacher_that_does_not_answer_ends_a_labelling(moody):
    recipe = moody.folder / "moody.yaml"
    recipe.write_text(recipe.read_text() + "    labels: {views: 1, top_k: 3}\n")
    (moody.folder / "hang").touch()
    result = moody.wait(moody.start("label", "moody.yaml", "--trust-teacher", "--stall-timeout", PATIENCE), 69)
    assert "expected an answer of" in result.err
    assert result.continuation == "the same ssld label again"
