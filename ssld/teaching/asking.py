"""A teacher's predictions: what it is shown, what its answer is checked for, and whether it is worth learning from."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ssld.contracts import Arrays, Soft, Teacher, TeacherSpec
from ssld.data.loader import Batch, Replay
from ssld.data.samples import Samples
from ssld.data.transforms import Pipeline, center, normalize
from ssld.errors import SsldError, TeacherError
from ssld.metrics import best_class, wilson
from ssld.teaching.ensemble import average
from ssld.watch import watch


@dataclass(frozen=True)
class Member:
    """One teacher of a stage: who it is in words, and its weight among the teachers.

    identity: a hash of its fingerprint and of what else makes it answer as it does: its network, its options.
    """

    who: str
    teacher: Teacher
    weight: float
    identity: str = ""

    @property
    def spec(self) -> TeacherSpec:
        """The teacher's own, with the identity, where there is one, for a fingerprint."""
        return replace(self.teacher.spec, fingerprint=self.identity or self.teacher.spec.fingerprint)


def together(members: Sequence[Member]) -> str:
    """A hash of several teachers and their weights."""
    parts = [f"{member.spec.fingerprint} {member.spec.precision} {member.weight}" for member in members]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class OnlineLabels:
    """Soft labels from teachers that are asked in every step.

    samples: the set, for messages; classes: how many; temperature: at which several teachers are averaged.
    """

    members: tuple[Member, ...]
    samples: Samples
    classes: int
    temperature: float = 1.0

    @property
    def fingerprint(self) -> str:
        return together(self.members)

    @property
    def files(self) -> str:
        """No label file is read."""
        return ""

    @property
    def replay(self) -> Replay | None:
        """Every view can be had."""
        return None

    def pipelines(self, student: Pipeline) -> tuple[Pipeline, ...]:
        """The student's view at each teacher's size."""
        return tuple(student.at(member.teacher.spec.size) for member in self.members)

    def of(self, batch: Batch) -> Soft:
        """What the teachers say of a batch, on average."""
        names = [self.samples.where(int(index)) for index in batch.indices]
        answers = [
            (Soft(None, ask(member.teacher, images, self.classes, member.who, names), self.temperature), member.weight)
            for member, images in zip(self.members, batch.images[1:], strict=True)
        ]
        return average(answers, self.classes)


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
    load: Callable[[], Callable[[np.ndarray], np.ndarray]] | None
    _loaded: Callable[[np.ndarray], np.ndarray] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, classes]."""
        with self._lock:
            if self.load is not None:
                # what loads holds the weights, which the loaded network has a copy of
                self._loaded, self.load = self.load(), None
        assert self._loaded is not None, "it was loaded by the first question"
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


def ask(teacher: Teacher, images: np.ndarray, classes: int, who: str, names: Sequence[str]) -> np.ndarray:
    """The teacher's logits, float32 [B, classes], for rendered pixels, uint8 [B, H, W, 3].

    names: of the images. Raises TeacherError unless the logits are finite floats of that shape, or when the teacher
    itself raises.
    """
    try:
        with watch.awaiting(lambda: f"an answer of {who} about {len(images)} images from {names[0]} on"):
            logits = teacher.predict(prepare(images, teacher.spec))
    except SsldError:
        raise
    except Exception as error:
        raise TeacherError(
            f"{who} raised {type(error).__name__} on a batch of {len(images)} images from {names[0]} on: {error}"
        ) from error
    wanted = (len(images), classes)
    if not isinstance(logits, np.ndarray) or logits.dtype.kind != "f" or logits.shape != wanted:
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise TeacherError(
            f"{who}: expected float32 logits {list(wanted)} ([images, classes of the data]), got {got} for the batch "
            f"from {names[0]} on"
        )
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32, copy=False)
    if not np.isfinite(logits).all():
        bad = int(np.argmax(~np.isfinite(logits).all(axis=1)))
        raise TeacherError(f"{who}: expected finite logits, got {logits[bad].tolist()[:5]} for {names[bad]}")
    return logits


def at_test_time(evaluate: Pipeline, spec: TeacherSpec) -> Pipeline:
    """How a teacher is shown an image at test time: as its spec says, else as the student, at the teacher's size."""
    if spec.resize_short:
        return center(spec.size, spec.resize_short, spec.mean, spec.std)
    return evaluate.at(spec.size)


def quality(soft: Soft, labels: np.ndarray) -> Quality:
    """How good a teacher is on labeled images, int64 [N], by its soft labels of them."""
    correct = int((best_class(soft) == labels).sum())
    low, high = wilson(correct, len(labels))
    return Quality(correct / len(labels), low, high, float(np.bincount(labels).max() / len(labels)), len(labels))


def expect_better_than_chance(quality: Quality, who: str) -> None:
    """Raise TeacherError when the teacher cannot be told from one that always gives the same answer."""
    if quality.low <= quality.chance:
        raise TeacherError(
            f"{who}: expected better than chance, got {quality}; check its weights, class order, mean and std, or the "
            f"epochs and learning rate of its stage, or accept it by ssld run with the same recipe and --out, and "
            f"--trust-teacher"
        )
