"""An earlier stage of the run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ssld.contracts import Arrays, Model, Teacher, TeacherSpec
from ssld.teaching.asking import Deferred, fingerprint

# the room imports itself by dots; ruff takes that for the name of its folder
from .network import Precision, engine  # noqa: TID251


def stage(stage: str, *, model: Model, weights: Arrays, device: str, precision: Precision = "float32") -> Teacher:
    """The network that the stage of that name has finished; its model and weights are handed over by the run."""
    pipeline = model.pipeline
    spec = TeacherSpec(
        pipeline.resolution,
        fingerprint(weights),
        model.classes,
        mean=pipeline.mean,
        std=pipeline.std,
        precision=precision,
        engine=engine(device, precision),
    )

    def load() -> Callable[[np.ndarray], np.ndarray]:
        from ssld.train import networks
        from ssld.train.frozen import Frozen

        layer = networks.restored(model, weights, f"stage {stage}")
        return Frozen(layer, pipeline.resolution, device=device, precision=precision)

    return Deferred(spec, load)
