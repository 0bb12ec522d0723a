"""How good a checkpoint is on a data set."""

from __future__ import annotations

from pathlib import Path

from ssld import checkpoint
from ssld.data.samples import same_classes
from ssld.data.sources import open_source
from ssld.errors import CheckpointError
from ssld.rundir import result_of
from ssld.train.evaluation import evaluate
from ssld.train.networks import restored


def score(path: Path, data: str, device: str = "cpu") -> tuple[int, dict[str, float]]:
    """The number of images in `data`, and top-1 and top-5 in [0, 1] of the checkpoint, or stage's latest, at `path`.

    Raises DataError when the classes of the data are not the checkpoint's.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint or a stage directory of a run, got none; check the path")
    steps = checkpoint.steps(path)
    model, weights = result_of(checkpoint.load(path / "latest" if steps else path))
    samples = open_source(data, labeled=True)
    if samples.classes is not None:
        same_classes(model.classes, samples.classes, str(path), data)
    network = restored(model, weights, str(path))
    return len(samples), evaluate(network, samples, model.pipeline, device)
