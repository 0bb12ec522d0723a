"""An earlier stage of the run."""

from __future__ import annotations

from ssld.contracts import Arrays, Model, Teacher, TeacherSpec
from ssld.train.frozen import Frozen
from ssld.train.networks import restored
from ssld.train.teacher import NetworkTeacher, fingerprint


def stage(stage: str, *, model: Model, weights: Arrays, device: str) -> Teacher:
    """The network that the stage of that name has finished; its model and weights are handed over by the run."""
    pipeline = model.pipeline
    spec = TeacherSpec(
        pipeline.resolution, fingerprint(weights), classes=model.classes, mean=pipeline.mean, std=pipeline.std
    )
    layer = restored(model, weights, f"stage {stage}")
    return NetworkTeacher(spec, Frozen(layer, pipeline.resolution, device=device))
