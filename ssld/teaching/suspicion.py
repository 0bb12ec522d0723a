"""A teacher that does poorly is shown the images in other ways: is its mean, its channel order or its size wrong?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ssld.contracts import Teacher, TeacherSpec
from ssld.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Triple
from ssld.teaching.asking import Quality

Norm = tuple[Triple, Triple]

NORMS: tuple[Norm, ...] = (
    (IMAGENET_MEAN, IMAGENET_STD),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
)
"""Means and deviations that networks are trained with: ImageNet's, [-1, 1], [0, 1], and pixels from 0 to 255."""
SIZES = (16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
NEAR = 2
"""Sizes are tried up to this factor away from the configured one."""


@dataclass(frozen=True)
class Way:
    """How images are shown to a teacher. reversed: the channels in the order blue, green, red."""

    norm: Norm
    size: int
    reversed: bool = False

    def differences(self, configured: Way) -> tuple[list[str], list[str]]:
        """What is not as configured, in words, and the names of what may be wrong."""
        (mean, std), what, suspects = self.norm, [], []
        if self.norm == NORMS[3] != configured.norm:
            what, suspects = ["pixels from 0 to 255"], ["mean/std"]
        elif self.norm != configured.norm:
            what, suspects = [f"mean {_numbers(mean)} and std {_numbers(std)}"], ["mean/std"]
        if self.reversed:
            what, suspects = [*what, "channels in BGR order"], [*suspects, "channel order"]
        if self.size != configured.size:
            what, suspects = [*what, f"{self.size} px"], [*suspects, "size"]
        return what, suspects


@dataclass(frozen=True)
class Trial:
    """How well a teacher did when it was shown images in another way than the recipe says."""

    way: Way
    quality: Quality


@dataclass(frozen=True, eq=False)
class Otherwise:
    """A teacher with another spec than its own, and images with the channels in the other order."""

    teacher: Teacher
    spec: TeacherSpec
    reversed: bool

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits, as the teacher's own."""
        return self.teacher.predict(np.ascontiguousarray(images[:, ::-1]) if self.reversed else images)


def way_of(spec: TeacherSpec) -> Way:
    """The way in which a teacher wants its images. It must have a mean."""
    assert spec.mean is not None, "only asked for teachers that come with ssld, which have one"
    assert spec.std is not None, "a teacher has both or neither"
    return Way((_rounded(spec.mean), _rounded(spec.std)), spec.size)


def shown(teacher: Teacher, way: Way) -> Teacher:
    """The teacher, shown its images in that way."""
    mean, std = way.norm
    return Otherwise(teacher, replace(teacher.spec, mean=mean, std=std), way.reversed)


def ways(configured: Way) -> Iterator[Way]:
    """Other normalizations, then each of them, and the configured one, with the channels in the other order."""
    for order in (False, True):
        for norm in dict.fromkeys((configured.norm, *NORMS)):
            if (norm, order) != (configured.norm, False):
                yield Way(norm, configured.size, order)


def sizes(configured: int) -> list[int]:
    """Sizes up to a factor of two from the configured one, the nearest first.

    >>> sizes(224)[:4]
    [256, 192, 288, 160]
    """
    near = [size for size in SIZES if configured / NEAR <= size <= configured * NEAR and size != configured]
    return sorted(near, key=lambda size: max(size / configured, configured / size))


def try_ways(
    configured: Way,
    found: Quality,
    quality_of: Callable[[Way], Quality],
    time_is_up: Callable[[], bool],
    resizable: bool,
) -> list[Trial]:
    """Trials until the time is up: normalizations and channel orders, then sizes with the best of these.

    found: how good the teacher is as configured, which stays the best until another way is clearly better.
    """
    trials: list[Trial] = []
    for way in ways(configured):
        if time_is_up():
            return trials
        trials.append(Trial(way, quality_of(way)))
    better = clearly_better(found, trials, configured)
    for size in sizes(configured.size) if resizable else ():
        if time_is_up():
            return trials
        way = replace(better.way if better else configured, size=size)
        trials.append(Trial(way, quality_of(way)))
    return trials


def clearly_better(found: Quality, trials: list[Trial], configured: Way) -> Trial | None:
    """The trial that explains a poor result: it beats what is configured beyond chance, with the fewest changes.

    Of trials that cannot be told from the best one, the one with fewer changes is more likely to be what is wrong.
    """
    better = [trial for trial in trials if trial.quality.low > found.high]
    if not better:
        return None
    best = max(trial.quality.accuracy for trial in better)
    equal = [trial for trial in better if trial.quality.high >= best]
    return min(equal, key=lambda trial: (len(trial.way.differences(configured)[1]), -trial.quality.accuracy))


def verdict(found: Quality, trials: list[Trial], configured: Way) -> str:
    """What the trials say, as a sentence."""
    start = f"accuracy {_percent(found.accuracy)} as configured"
    better = clearly_better(found, trials, configured)
    if better is None:
        return (
            f"{start}, and not clearly better in any of {len(trials)} other ways; check its weights and the order of "
            f"its classes, or train it longer"
        )
    what, suspects = better.way.differences(configured)
    accuracy = _percent(better.quality.accuracy)
    return f"{start}; {accuracy} with {', '.join(what)}: is the teacher's {' or '.join(suspects)} wrong?"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _numbers(values: Triple) -> str:
    return ",".join(f"{value:.3g}" for value in values)


def _rounded(values: Triple) -> Triple:
    """Without what a recipe's scale leaves behind the sixth digit, so that equal ones are seen to be equal."""
    red, green, blue = (round(value, 6) for value in values)
    return red, green, blue
