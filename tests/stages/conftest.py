from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ssld.contracts import TeacherSpec


class Prototypes:
    """A teacher that compares every image with a fixed random one of each class."""

    spec = TeacherSpec(16, "prototypes")

    def predict(self, images: np.ndarray) -> np.ndarray:
        prototypes = np.random.default_rng(0).normal(size=(3 * 16 * 16, 4)).astype(np.float32)
        return images.reshape(len(images), -1) @ prototypes / 10


@pytest.fixture
def teacher() -> Prototypes:
    return Prototypes()


@pytest.fixture
def objective_of(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """objective_of(stage, task): what the stage minimizes, taken from its call of the loop."""
    from ssld.train import loop

    def objective_of(stage, task):
        taken = []
        with monkeypatch.context() as patch:
            patch.setattr(loop, "fit", lambda task, network, objective, **_: taken.append(objective))
            stage.run(task)
        return taken[0]

    return objective_of
