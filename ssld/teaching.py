"""A teacher's predictions: what it is shown, what its answer is checked for, and whether it is worth learning from."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ssld.contracts import Arrays, Teacher, TeacherSpec
from ssld.data.loader import Damage, evaluation_batches
from ssld.data.samples import Samples, same_classes
from ssld.data.transforms import Pipeline, center, normalize
from ssld.errors import TeacherError
from ssld.metrics import wilson

# enough for an interval of about ± 3 points, little enough to be done before the user has noticed
CHECKED = 1000


@dataclass(frozen=True)
class Quality:
    """Accuracy of a teacher on part of the validation set, with its 95 % interval (Wilson 1927).

    chance: what the best constant answer reaches on the same images.
    """

    accuracy: float
    low: float
    high: float
    chance: float
    images: int

    def __str__(self) -> str:
        return (
            f"top-1 {self.accuracy:.3f} ({self.low:.3f} to {self.high:.3f}) on {self.images} validation images, "
            f"chance {self.chance:.3f}"
        )


@dataclass(eq=False)
class Deferred:
    """A teacher that is loaded when it is first asked, so that `ssld plan` may know its spec and needs no paddle.

    load: returns the function from images to logits, both as Teacher.predict has them.
    """

    spec: TeacherSpec
    load: Callable[[], Callable[[np.ndarray], np.ndarray]]
    _loaded: Callable[[np.ndarray], np.ndarray] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, classes]."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self.load()
        return self._loaded(images)


def fingerprint(weights: Arrays) -> str:
    """sha256 over the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def prepare(images: np.ndarray, spec: TeacherSpec) -> np.ndarray:
    """Rendered pixels, uint8 [B, H, W, 3], as the teacher's spec wants them."""
    if spec.mean is None or spec.std is None:
        # the student's pixels too: a teacher that writes into its input must not change them
        pixels = images.view()
        pixels.flags.writeable = False
        return pixels
    return normalize(images, spec.mean, spec.std)


def ask(teacher: Teacher, images: np.ndarray, classes: int, who: str) -> np.ndarray:
    """The teacher's logits, float32 [B, classes], for rendered pixels, uint8 [B, H, W, 3].

    Raises TeacherError unless they are finite floats of that shape, or when the teacher itself raises.
    """
    try:
        logits = teacher.predict(prepare(images, teacher.spec))
    except Exception as error:
        raise TeacherError(
            f"{who} raised {type(error).__name__} on a batch of {len(images)} images: {error}"
        ) from error
    wanted = (len(images), classes)
    if not isinstance(logits, np.ndarray) or logits.dtype.kind != "f" or logits.shape != wanted:
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise TeacherError(f"{who}: expected float32 logits {list(wanted)} ([images, classes of the data]), got {got}")
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32, copy=False)
    if not np.isfinite(logits).all():
        bad = int(np.argmax(~np.isfinite(logits).all(axis=1)))
        raise TeacherError(f"{who}: expected finite logits, got {logits[bad].tolist()[:5]} for image {bad} of a batch")
    return logits


def shown(pipeline: Pipeline, spec: TeacherSpec) -> Pipeline:
    """The student's pipeline at the teacher's size, so that both see the same view."""
    return pipeline.at(spec.size)


def check(teacher: Teacher, validation: Samples, evaluate: Pipeline, classes: tuple[str, ...], who: str) -> Quality:
    """Measure the teacher on at most a thousand validation images, prepared as its spec or else `evaluate` says.

    Raises TeacherError for an answer of the wrong form, DataError for other class names than the data have.
    """
    spec = teacher.spec
    if spec.classes is not None:
        same_classes(classes, spec.classes, "the data", who)
    samples = validation.limited(CHECKED)
    assert samples.labels is not None, "validation sets are opened with labels"
    pipeline = (
        center(spec.size, spec.resize_short, spec.mean, spec.std) if spec.resize_short else evaluate.at(spec.size)
    )
    correct = 0
    for batch in evaluation_batches(samples, pipeline, batch_size=64, damage=Damage(0)):
        correct += int((ask(teacher, batch.images[0], len(classes), who).argmax(axis=1) == batch.labels).sum())
    low, high = wilson(correct, len(samples))
    chance = float(np.bincount(samples.labels).max() / len(samples))
    return Quality(correct / len(samples), low, high, chance, len(samples))


def expect_better_than_chance(quality: Quality, who: str) -> None:
    """Raise TeacherError when the teacher cannot be told from one that always gives the same answer."""
    if quality.low <= quality.chance:
        raise TeacherError(
            f"{who}: expected better than chance, got {quality}; check its weights, class order, mean and std, or the "
            f"epochs and learning rate of its stage, or go on with ssld run --trust-teacher"
        )
