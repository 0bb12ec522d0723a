"""Views that other processes render: the same pixels, and no process that stays or ends unnoticed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssld.data import loader, rendering
from ssld.data.images import decode
from ssld.data.loader import Damage, Replay, training_batches, view_batches
from ssld.data.rendering import Renderer, Work, render
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline, view
from ssld.errors import DataError, ProcessError
from ssld.seeds import derive

STEPS = ["RandCropImage", "RandFlipImage", "NormalizeImage"]
PIPELINES = (Pipeline.read(STEPS, 8), Pipeline.read(STEPS, 12))


def picture(seed: int, *, whole: bool = True) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue() if whole else buffer.getvalue()[:60]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Renderer:
    """A renderer that has one process, which has come up."""
    monkeypatch.setattr(rendering, "FIRST", 0.0)
    renderer = Renderer()
    # only asks: nothing is rendered before the process is there
    renderer(PIPELINES, [])
    until(lambda: renderer._processes[0].is_up())
    return renderer


def test_a_process_sends_back_the_same_pixels(eager: Renderer) -> None:
    raw = np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)
    works = [Work(picture(3), "a", 5, (0, 2)), Work(picture(4, whole=False), "b", 5, (1,)), Work(raw, "c", 6, (1,))]
    # what this thread renders from here on would be counted
    spent = eager._spent
    found = eager(PIPELINES, works)
    assert eager._spent == spent
    assert isinstance(found[1], DataError)
    with pytest.raises(DataError) as reason:
        decode(works[1].data)
    assert str(found[1]) == str(reason.value)
    for work, views in zip((works[0], works[2]), (found[0], found[2]), strict=True):
        assert not isinstance(views, DataError)
        assert [number for number, _ in views] == list(work.numbers)
        for number, images in views:
            # the view of both is the first one's: the same steps draw the same
            for image, pipeline in zip(images, PIPELINES, strict=True):
                expected = view(decode(work.data), pipeline, derive(work.seed, work.key, number))
                np.testing.assert_array_equal(image, expected)


def test_batches_do_not_depend_on_who_renders(eager: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_source("builtin:shapes?count=40&size=20", labeled=True)

    def first(workers: int) -> list[bytes]:
        batches = training_batches(samples, PIPELINES, batch_size=8, seed=1, workers=workers, damage=Damage(0))
        with closing(batches):
            return [b"".join(images.tobytes() for images in batch.images) for batch in islice(batches, 9)]

    alone = first(0)
    monkeypatch.setattr(loader, "renderer", eager)
    assert first(3) == alone
    assert 1 <= len(eager._processes) <= 3


def test_labels_and_evaluations_are_rendered_by_processes_too(eager: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_source("builtin:shapes?count=12&size=20", labeled=False)
    monkeypatch.setattr(loader, "renderer", eager)
    monkeypatch.setattr(rendering, "render", None)
    batches = view_batches(
        samples, PIPELINES[0], Replay(0, 2), batch_size=4, indices=range(12), workers=1, damage=Damage(0)
    )
    assert sum(len(batch.indices) for batch in batches) == 24


def test_a_run_with_little_to_do_starts_no_process() -> None:
    renderer = Renderer()
    renderer(PIPELINES, [Work(picture(1), "a", 0, (0,))])
    assert not renderer._processes


def test_there_are_as_many_processes_as_calls_at_a_time(eager: Renderer) -> None:
    works = [Work(picture(n), str(n), 0, tuple(range(40))) for n in range(4)]
    expected = [render(PIPELINES, work) for work in works]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: eager(PIPELINES, works), range(24)):
            for got, wanted in zip(found, expected, strict=True):
                for (_, images), (_, originals) in zip(got, wanted, strict=True):
                    np.testing.assert_array_equal(images[1], originals[1])
    assert 2 <= len(eager._processes) <= 3


def test_what_is_raised_there_arrives_and_a_defect_with_its_traceback(eager: Renderer) -> None:
    with pytest.raises(DataError, match="expected a view of 8 x 8") as raised:
        eager((Pipeline.read(["RandFlipImage"], 8),), [Work(picture(1), "a", 0, (0,))])
    # a note would be shown under the message
    assert not hasattr(raised.value, "__notes__")
    with pytest.raises(TypeError) as defect:
        eager(PIPELINES, [Work(picture(1), "a", 0, None)])
    assert "rendering.py" in defect.value.__notes__[0]
    # and the process is there for the next
    [views] = eager(PIPELINES, [Work(picture(1), "a", 0, (0,))])
    assert not isinstance(views, DataError)


def test_a_process_that_ends_is_told_of_with_its_images(eager: Renderer) -> None:
    [process] = eager._processes
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match=r"signal 9 at one of n01\.jpg, n02\.jpg") as raised:
        eager(PIPELINES, [Work(picture(1), "n01.jpg", 0, (0,)), Work(picture(2), "n02.jpg", 0, (0,))])
    assert raised.value.exit_code == 71
    assert not eager._processes


def test_where_no_process_can_be_had_all_is_rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(rendering, "FIRST", 0.0)
    monkeypatch.setattr(rendering, "start", full)
    renderer, work = Renderer(), Work(picture(1), "a", 0, (0,))
    [[(_, images)]] = renderer(PIPELINES, [work])
    [(_, expected)] = render(PIPELINES, work)
    np.testing.assert_array_equal(images[1], expected[1])


def test_a_process_leaves_signals_to_the_one_that_started_it(eager: Renderer) -> None:
    [process] = eager._processes
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process._process.pid, number)
    time.sleep(0.1)
    assert len(eager(PIPELINES, [Work(picture(1), "a", 0, (0,))])) == 1


SCRIPT = """
import sys, time
from pathlib import Path
from ssld.data import rendering
from ssld.data.rendering import Renderer

rendering.FIRST = 0.0
renderer = Renderer()
renderer((), [])
[process] = renderer._processes
while not process.is_up():
    time.sleep(0.02)
print(process._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["its end", "kill -9"])
def test_no_process_outlives_the_one_that_started_it(how: str, tmp_path: Path) -> None:
    # in a module of its own, as a user's script is; -W error: a process that is not waited for is a warning
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "error", str(script)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as parent:
        number = int(parent.stdout.readline())
        assert Path(f"/proc/{number}").exists()
        if how == "kill -9":
            parent.kill()
        _, errors = parent.communicate(timeout=30)
    assert not errors
    until(lambda: not Path(f"/proc/{number}").exists())
