"""Tasks that are small enough for unit tests: a real student at 16 px on drawn shapes of four classes."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from ssld import plugins
from ssld.contracts import Model, Task, Teacher
from ssld.data.samples import Samples
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline
from ssld.journal import Journal
from ssld.settings import Context
from ssld.teaching.asking import Member, OnlineLabels

# a shell that starts the suite in the background makes it ignore Ctrl-C, and so everything that it tests
signal.signal(signal.SIGINT, signal.default_int_handler)

RESOLUTION = 16
CLASSES = ("circle", "square", "triangle", "cross")
TRAIN = Pipeline.read([{"RandCropImage": {"scale": [0.5, 1.0]}}, "RandFlipImage", "NormalizeImage"], RESOLUTION)
EVAL = Pipeline.read([{"ResizeImage": {"resize_short": 18}}, "CropImage", "NormalizeImage"], RESOLUTION)


def open_shapes(count: int, *, seed: int = 0, labeled: bool = True) -> Samples:
    return open_source(f"builtin:shapes?count={count}&size=20&classes=4&seed={seed}", labeled=labeled)


@pytest.fixture
def shapes() -> Callable[..., Samples]:
    """shapes(count, seed=0, labeled=True): drawn images of four classes, 20 px each."""
    return open_shapes


@pytest.fixture
def make_task(tmp_path) -> Callable[..., Task]:
    """make_task(kind, settings, **fields of Task): a task of that stage kind; 22 images, 2 epochs, batches of 8.

    teacher: one that is asked in every step, in place of the field `soft`.
    """
    journal = Journal(tmp_path, Console(file=io.StringIO()))

    def make(
        kind: str = "pretrain", settings: dict[str, Any] | None = None, teacher: Teacher | None = None, **fields: Any
    ) -> Task:
        common = {"kind": kind, "data": "labeled", "epochs": 2, "batch_size": 8, "learning_rate": 0.05}
        student = {"student": "MobileNetV3_small_x0_35"}
        model = plugins.stage_kind(kind).settings
        data = fields.setdefault("data", open_shapes(22))
        chosen = model.model_validate({**common, **student, **(settings or {})})
        resolved = chosen.resolved(Context(resolution=RESOLUTION, samples=len(data), classes=len(CLASSES)))
        members = (Member("the teacher of stage", teacher, 1.0),) if teacher else ()
        defaults = {
            "name": "stage",
            "model": Model(resolved.student.name, resolved.student.options, CLASSES, EVAL.at(resolved.resolution)),
            "settings": resolved,
            "seed": 1,
            "device": "cpu",
            "validation": open_shapes(12, seed=1),
            "train": TRAIN.at(resolved.resolution),
            "initial": None,
            "soft": OnlineLabels(members, data, len(CLASSES)) if members else None,
            "reference": None,
            "resume": None,
            "damage_budget": 0,
            "save": lambda state: None,
            "stop": lambda: None,
            "journal": journal,
        }
        return Task(**{**defaults, **fields})

    yield make
    journal.close()


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations cost nothing and answer 0.25; each disturbs paddle's generator, on which nothing may depend."""
    import paddle

    from ssld.train import loop

    def evaluate(*_: object) -> dict[str, float]:
        paddle.rand([3])
        return {"top1": 0.25, "top5": 1.0}

    monkeypatch.setattr(loop, "Evaluator", lambda *_: evaluate)
