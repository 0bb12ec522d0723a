"""What a recipe may say of a stage: the keys that all kinds, and all kinds that train, have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    WithJsonSchema,
    WrapSerializer,
    model_validator,
)
from pydantic_core import CoreSchema

from ssld.wording import got

# A key that the recipe may leave open. Its type is what it holds once `resolved` has filled it in, which is before
# any stage, or anything else but the plan, sees it.
OPEN: Any = None


Words = Annotated[str, Field(min_length=1)]
"""What names something; "" would name the folder that one is in, or nothing at all."""


class Exact:
    """Marks a type whose numbers are taken as they stand: neither "64" nor true is a whole number, inf is no number.

    pydantic's own strict mode goes further and refuses what YAML cannot write, such as tuples and paths.
    """

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _exact(handler(source))


def _exact(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(_exact(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    exact = {key: item if key in ("default", "metadata") else _exact(item) for key, item in schema.items()}
    if exact.get("type") in ("int", "float", "bool"):
        exact["strict"] = True
    if exact.get("type") == "float":
        exact["allow_inf_nan"] = False
    return exact


class Frozen(BaseModel):
    """A value from a recipe: unknown keys are refused, numbers are exact, nothing changes after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _exact(handler(source))


class Named(Frozen):
    """A plug-in with arguments of its own: `NAME`, or `{name: NAME, key: value, …}`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments for the plug-in."""
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    """`NAME` is `{name: NAME}`."""
    return {"name": value} if isinstance(value, str) else value


Plugin = Annotated[Named, BeforeValidator(_named, json_schema_input_type=str | Named)]


class Term(Named):
    """A loss, and its weight in a sum: `NAME`, or `{name: NAME, weight: 2, …its own keys}`."""

    weight: Annotated[float, Field(gt=0, exclude_if=lambda weight: weight == 1)] = 1.0
    """What it is multiplied by; the weights may have any sum, which the learning rate then feels."""


_Term = Annotated[Term, BeforeValidator(_named, json_schema_input_type=str | Term)]
Losses = Annotated[
    Annotated[_Term, Tag("(keys)")] | Annotated[tuple[_Term, ...], Field(min_length=1), Tag("(list)")],
    Discriminator(lambda value: "(list)" if isinstance(value, list | tuple) else "(keys)"),
    AfterValidator(lambda value: (value,) if isinstance(value, Term) else value),
    # as it is written: one loss is no list
    WrapSerializer(lambda terms, dump: dump(terms if len(terms) > 1 else terms[0])),
]
"""One loss, or the weighted sum of several."""


class TeacherSetting(Frozen):
    """`{stage: NAME}`, `{network: NAME, weights: FILE}`, `{onnx: FILE}` or `{plugin: NAME, …its own keys}`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    stage: Words | None = None
    """An earlier stage of this run; its last weights teach."""
    network: Annotated[
        Words | None, WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, Named.model_json_schema()]})
    ] = None
    """A network by name, or {name: NAME, …options}, with `weights`, a .safetensors file."""
    onnx: Words | None = None
    """An .onnx file, with size, mean and std where the file does not tell them."""
    plugin: Words | None = None
    """An entry point of the group ssld.teachers; the other keys are its arguments."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic of a paddle network; bfloat16 is about twice as fast on a CPU that has it."""
    class_map: Words | None = None
    """A file of `teacher class<TAB>student class` lines, for a teacher that knows other classes than the data."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share in the mean of several teachers' probabilities, relative to the others'."""

    @model_validator(mode="before")
    @classmethod
    def _network_with_options(cls, value: Any) -> Any:
        """`network: {name: NAME, …}`, as a student is written, is `network: NAME` with `options`."""
        network = value.get("network") if isinstance(value, dict) else None
        if not isinstance(network, dict) or "name" not in network or "options" in value:
            return value
        options = {key: item for key, item in network.items() if key != "name"}
        return {**value, "network": network["name"], "options": options}

    @property
    def way(self) -> str:
        """The key that says how the teacher is got."""
        return next(way for way in WAYS if getattr(self, way) is not None)

    @property
    def name(self) -> str:
        """The teacher for messages: "stage teach", "network ResNet50_vd"."""
        return f"{self.way} {getattr(self, self.way)}"

    @model_validator(mode="after")
    def _one_way(self) -> TeacherSetting:
        ways = [way for way in WAYS if getattr(self, way) is not None]
        if len(ways) != 1:
            raise ValueError(
                f"expected exactly one of stage, network, onnx or plugin, got {', '.join(ways) or 'none of them'}"
            )
        if self.precision != "float32" and self.way not in ("stage", "network"):
            raise ValueError(f"expected precision beside stage or network only, got it beside {self.way}")
        weights = self.options.get("weights")
        if self.network is not None and (not isinstance(weights, str) or weights == ""):
            found = "none" if weights is None else got(weights)
            raise ValueError(f"expected a weights file beside network, got {found}; add weights: FILE.safetensors")
        if self.stage is not None and self.options:
            raise ValueError(f"expected no other key beside stage, got {', '.join(self.options)}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The plug-in's own keys."""
        return dict(self.model_extra or {})

    @property
    def file(self) -> str | None:
        """The file outside the run that holds its weights."""
        return self.onnx or (self.options["weights"] if self.network else None)


WAYS = ("stage", "network", "onnx", "plugin")
Teachers = Annotated[
    Annotated[TeacherSetting, Tag("(keys)")]
    | Annotated[tuple[TeacherSetting, ...], Field(min_length=1), Tag("(list)")],
    Discriminator(lambda value: "(keys)" if isinstance(value, dict | TeacherSetting) else "(list)"),
    AfterValidator(lambda value: (value,) if isinstance(value, TeacherSetting) else value),
]
"""One teacher, or several, whose probabilities are averaged."""


class Stored(Frozen):
    """Soft labels that are kept: the teacher sees `views` views of every image once, whatever the number of epochs."""

    views: Annotated[int, Field(ge=1, le=10000)]
    """Views of each image that get labels; epoch e trains on view e mod views."""
    top_k: Annotated[int, Field(ge=1)] = 10
    """Classes whose probabilities are kept, the most probable ones; of the others only their sum."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the teacher's softmax; a loss of another temperature needs all classes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """What the views are drawn by; recipes of other seeds share the labels."""
    store: Words | None = None
    """The directory that keeps label files, to be shared by runs; labels.store in the run when left out."""


def _labels_kind(value: object) -> str:
    return "(keys)" if isinstance(value, dict | Stored) else "(text)"


Labels = Annotated[
    Annotated[Literal["online"], Tag("(text)")] | Annotated[Stored, Tag("(keys)")], Discriminator(_labels_kind)
]


class Context(Frozen):
    """What the derived numbers of a stage depend on, known once the recipe's data are indexed."""

    resolution: int
    samples: int
    classes: int
    parent: TrainingSettings | None = None
    """The resolved settings of the stage that `from` names."""


class StageSettings(Frozen):
    """The keys of every stage."""

    kind: str
    data: Annotated[
        tuple[str, ...],
        Field(min_length=1),
        BeforeValidator(
            lambda value: (value,) if isinstance(value, str) else value, json_schema_input_type=str | tuple[str, ...]
        ),
    ]
    """The source, or the list of sources, that the stage reads: unlabeled, labeled."""
    needs_labels: ClassVar[bool] = True
    """Whether the labels of `data` are read."""


Smoothing = Annotated[float, Field(ge=0, lt=1, exclude_if=lambda share: share == 0)]
"""Share of each true label that is spread evenly over all classes. At 0 it is no part of what a result is made of."""


class TrainingSettings(StageSettings):
    """The keys of every stage that trains a network."""

    student: Plugin = OPEN
    """The network that learns; with `from` a stage, its network when left out."""
    start: Annotated[Words | None, Field(alias="from")] = None
    """A stage whose last weights to start from, or a .safetensors file; from scratch when left out."""
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per step."""
    learning_rate: Annotated[float, Field(gt=0)] = OPEN
    """Peak learning rate; derived: base_rate per 256 images of batch size."""
    warmup_epochs: Annotated[float, Field(ge=0)] = OPEN
    """Epochs in which the learning rate rises linearly from 0; derived: 5, at most a tenth of all."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    """L2 coefficient, added to the gradient of every parameter that its network does not exempt."""
    clip_norm: Annotated[float | None, Field(gt=0)] = None
    """Gradients are scaled down to this global norm; off when left out."""
    resolution: Annotated[int, Field(ge=8, le=4096)] = OPEN
    """Side of the student's input in pixels; the recipe's when left out."""
    eval_interval: Annotated[int, Field(ge=1)] = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    save_interval: Annotated[int, Field(ge=0)] = 0
    """Every so many epochs a checkpoint is kept for good; 0 for never."""
    save_steps: Annotated[int | None, Field(ge=1)] = None
    """Steps between two checkpoints inside an epoch; every three minutes when left out."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """So many of the latest checkpoints stay."""

    base_rate: ClassVar[float] = 0.1
    """Peak learning rate per 256 images; 0.1 is what PaddleClas publishes for SSLD's ResNet50_vd (0.4 at 1,024)."""

    @property
    def taught_by(self) -> tuple[TeacherSetting, ...]:
        """The teachers, in the kinds that have some."""
        return getattr(self, "teacher", None) or ()

    @property
    def losses(self) -> tuple[Term, ...]:
        """The distances to the teacher that are added up, in the kinds that have some."""
        return getattr(self, "loss", None) or ()

    @property
    def stored(self) -> Stored | None:
        """How soft labels are kept; None where there are none, or the teacher is asked in every step."""
        labels = getattr(self, "labels", None)
        return labels if isinstance(labels, Stored) else None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose results this one reads."""
        start = self.start if self.start and not self.start.endswith(".safetensors") else None
        return tuple(dict.fromkeys(name for name in (start, *self.teacher_stages) if name))

    @property
    def teacher_stages(self) -> tuple[str, ...]:
        """Names of the stages that teach this one."""
        return tuple(teacher.stage for teacher in self.taught_by if teacher.stage)

    def derived(self, context: Context) -> dict[str, Any]:
        """Values for the keys that the recipe leaves open."""
        return {
            "learning_rate": self.base_rate * self.batch_size / 256,
            "warmup_epochs": min(5.0, self.epochs / 10),
            "resolution": context.resolution,
        }

    def check(self, context: Context) -> None:
        """Raise ValueError where resolved settings contradict each other or what they build on."""
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"expected a warm-up within the {self.epochs} epochs of the stage, got warmup_epochs: "
                f"{self.warmup_epochs:g}; lower it, or raise epochs"
            )

    def resolved(self, context: Context) -> Self:
        """The same settings with every open key filled in."""
        filled = {key: value for key, value in self.derived(context).items() if getattr(self, key) is None}
        return self.model_copy(update=filled)

    def total_steps(self, samples: int) -> int:
        """Steps of the whole stage: epochs * samples / batch size, rounded up, so that every batch is full."""
        return -(-self.epochs * samples // self.batch_size)


class TaughtSettings(TrainingSettings):
    """The keys of every stage that can learn from a teacher; a kind adds `teacher` itself, required or not."""

    loss: Losses = (Term(name="js"),)
    """Distance of the student's classes to the teacher's: js, {name: kl, temperature: 4}, or a list to sum."""
    labels: Labels = "online"
    """`online` asks the teacher in every step; {views: 8, top_k: 10} asks it once and keeps its soft labels."""

    def resolved(self, context: Context) -> Self:
        made = super().resolved(context)
        if made.stored is None:
            return made
        kept = made.stored.model_copy(update={"top_k": min(made.stored.top_k, context.classes)})
        return made.model_copy(update={"labels": kept})
