"""How good a checkpoint is on a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ssld import checkpoint
from ssld.checkpoint import Checkpoint
from ssld.data.samples import Samples, same_classes
from ssld.data.sources import open_source
from ssld.errors import CheckpointError
from ssld.inputs import Inputs
from ssld.rundir import result_of
from ssld.train.evaluation import Evaluator
from ssld.train.networks import restored, use_device


def score(path: Path, data: str, device: str = "cpu") -> tuple[int, dict[str, float]]:
    """The number of images in `data`, and top-1 and top-5 in [0, 1] of the checkpoint, or stage's latest, at `path`.

    Raises DataError when the classes of the data are not the checkpoint's.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint or a stage directory of a run, got none; check the path")
    if (path / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path}: expected a stage of the run, got the run itself; name one, as in {path}/finetune"
        )
    steps = checkpoint.steps(path)
    found = checkpoint.load(checkpoint.directory(path, steps[-1]) if steps else path)
    classes = result_of(found)[0].classes
    samples = open_source(data, labeled=True)
    if samples.classes is not None:
        same_classes(classes, samples.classes, str(path), data)
    return len(samples), score_checkpoint(found, samples, device)


def score_last(inputs: Inputs, go_on: Callable[[], None]) -> None:
    """Measure the last stage of a run on the test set, and record it; go_on(): may raise to end it."""
    members, journal = inputs.members, inputs.journal
    last, test = members.plan.nodes[-1], members.plan.data.test
    assert test is not None, "it is asked for where there is one"
    metrics = score_checkpoint(members.finished(last.name), test, members.options.device, go_on)
    members.run.keep_tested(last, test.identity, metrics)
    journal.record("test", stage=last.name, **metrics)
    numbers = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    journal.note(f"[{last.number} {last.name}] test {numbers}")


def score_checkpoint(
    found: Checkpoint, samples: Samples, device: str, go_on: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Top-1 and top-5, in [0, 1], of a checkpoint's student on samples of its classes."""
    use_device(device)
    model, weights = result_of(found)
    return Evaluator(restored(model, weights, str(found.path)), model.pipeline, device, go_on)(samples)
