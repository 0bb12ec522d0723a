"""What crosses a border: what a plug-in must offer, and the values that pass between the engine and the rooms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from ssld.data.loader import Batch, Replay
    from ssld.data.samples import Samples
    from ssld.data.transforms import Pipeline
    from ssld.journal import Journal
    from ssld.settings import TrainingSettings
    from ssld.train.ranks import Meeting

Arrays = Mapping[str, np.ndarray]
S = TypeVar("S", bound="TrainingSettings")


class Headless(dict[str, np.ndarray]):
    """Weights of a network whose classifier was left out on purpose, for a start with other classes."""


@dataclass(frozen=True)
class TeacherSpec:
    """The input that a teacher takes, to which the engine renders every image, and the classes it answers in.

    size: side of the square input in pixels.
    fingerprint: a hash of the weights, so that the same name with other weights is another teacher; of a plug-in also
    of whatever else its answers depend on. The recipe's own keys are added to it.
    classes: the class names in the order of its logits, or None where it does not know them.
    resize_short: shorter side in pixels before the center crop; None for the recipe's own eval operators.
    mean, std: per channel (R, G, B), for pixels in [0, 1]; both None for a teacher that wants the pixels as they are.
    precision: of its arithmetic; another one gives other labels, so it counts as another teacher.
    engine: what computes, and its version, for messages and for the header of label files.
    """

    size: int
    fingerprint: str
    classes: tuple[str, ...] | None = None
    resize_short: int | None = None
    mean: tuple[float, float, float] | None = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] | None = (0.229, 0.224, 0.225)
    precision: str = "float32"
    engine: str = ""

    def __post_init__(self) -> None:
        """A list of class names becomes a tuple. Raises ValueError for what no image can be rendered to."""
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
        if self.size < 1:
            raise ValueError(f"expected a size of at least 1 pixel, got {self.size}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"expected mean and std, or neither, got mean {self.mean} and std {self.std}")


@runtime_checkable
class Teacher(Protocol):
    """A frozen classifier. It needs no paddle: an HTTP service or another framework fits as well."""

    @property
    def spec(self) -> TeacherSpec:
        """Its input and its classes."""
        ...

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, classes].

        images: float32 [B, 3, size, size], normalized by the spec's mean and std; or, where the spec has none,
        uint8 [B, size, size, 3] in [0, 255], RGB.
        """
        ...


@dataclass(frozen=True, eq=False)
class Soft:
    """Soft labels of a batch: what a teacher says of K classes of each sample, and of all others together.

    ids: int64 [B, K], K distinct classes; None where `logits` has all C classes in their order.
    logits: float32 [B, K + 1], the last column for the rest of the classes together; [B, C] where ids is None.
    The teacher's probabilities are softmax(logits / temperature).
    """

    ids: np.ndarray | None
    logits: np.ndarray
    temperature: float = 1.0


class SoftLabels(Protocol):
    """Where the soft labels of a stage come from: a teacher that is asked in every step, or a store."""

    @property
    def fingerprint(self) -> str:
        """A hash of all teachers and their weights."""
        ...

    @property
    def files(self) -> str:
        """A hash of the label files that are read, "" where there are none."""
        ...

    @property
    def replay(self) -> Replay | None:
        """The views for which there are labels; None where every view can be had."""
        ...

    def pipelines(self, student: Pipeline) -> tuple[Pipeline, ...]:
        """The renderings of the student's view that `of` needs in a batch after the student's own."""
        ...

    def of(self, batch: Batch) -> Soft:
        """The soft labels of a batch."""
        ...


@dataclass(frozen=True)
class Reference:
    """Images that the stage does not train on, and what its teacher says of them.

    soft: the labels of the samples at some indices; teacher, chance: top-1 on validation images of the teacher, and of
    the best constant answer; damage_budget: so many of the images may be unreadable.
    """

    samples: Samples
    soft: Callable[[np.ndarray], Soft]
    teacher: float
    chance: float
    damage_budget: int


@dataclass(frozen=True)
class Model:
    """A network with all that is needed to use it: kept with its weights in every checkpoint.

    network: entry-point name in `ssld.students`; options: its keyword arguments; classes: names in logit order;
    pipeline: how an image is prepared for it at test time (its size, operators, mean and std).
    """

    network: str
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    pipeline: Pipeline


@dataclass(frozen=True)
class State:
    """Everything that a stage needs to go on: what `save` is given, and what a resumed task holds.

    weights: the student, batch-norm statistics included; optimizer: by the name of the parameter it belongs to;
    facts: small JSON values of the stage; `best` ({"step": …}) and `kept` (steps) name checkpoints that must stay,
    `seconds` is the time spent so far.
    """

    step: int
    weights: Arrays
    optimizer: Arrays = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a finished stage gives back: its last state and its metrics."""

    state: State
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Ranks:
    """How many processes train a stage together, and which of them this one is: alone where nothing is said.

    Each computes its share of every step. Rank 0 leads: it alone evaluates, saves and reports.
    """

    number: int = 0
    count: int = 1
    meeting: Meeting | None = None
    """Where the ranks meet; None where there is one."""

    def part(self, rows: int) -> slice:
        """Its share of a batch: consecutive rows; the shares of two ranks differ by at most one row.

        >>> [Ranks(number, 3).part(64) for number in range(3)]
        [slice(0, 21, None), slice(21, 42, None), slice(42, 64, None)]
        """
        return slice(rows * self.number // self.count, rows * (self.number + 1) // self.count)


@dataclass(frozen=True)
class Task(Generic[S]):
    """One stage's work: resolved settings and inputs as values. A stage opens no file of the run itself.

    settings: resolved, an instance of the kind's own model; seed: already mixed with the stage's name.
    model: the network to train, with its classes and the pipeline of evaluation, at this stage's resolution.
    data: what the stage trains on; train: the pipeline of its views; validation: what every evaluation uses.
    initial: the weights that `from` names, else None; soft: the teacher's labels of `data`, None without a teacher.
    reference: on what the student is compared with its teacher at every evaluation, None without a teacher.
    damage_budget: so many images of `data` may be unreadable.
    resume: where a stopped run of this same stage was, else None.
    save(state): commits a checkpoint; `best` and `kept` in the state's facts say which earlier ones stay.
    stop(): the number of the signal that asks the run to end, or None; asked in every step and batch of an evaluation.
    ranks: the processes that run this stage at the same time; each is given the same task, and `save` does nothing on
    all but rank 0. A kind that does not train by `ssld.train.loop` takes its share of the work itself.
    """

    name: str
    model: Model
    settings: S
    seed: int
    device: str
    data: Samples
    validation: Samples
    train: Pipeline
    initial: Arrays | None
    soft: SoftLabels | None
    reference: Reference | None
    resume: State | None
    damage_budget: int
    save: Callable[[State], None]
    stop: Callable[[], int | None]
    journal: Journal
    ranks: Ranks = field(default_factory=Ranks)


@dataclass(frozen=True)
class StageKind(Generic[S]):
    """What an entry point in `ssld.stages` names: the settings a recipe may give, and the work.

    The module that holds it must be readable without paddle, so that `ssld plan` and editors need only the settings;
    `run` imports what it needs. revision goes up whenever the same settings would give other weights.
    """

    settings: type[S]
    run: Callable[[Task[S]], Outcome]
    revision: int = 1
