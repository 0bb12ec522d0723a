"""Recipe to plan: the order of the stages, their derived numbers, and the fingerprint each result will carry."""

from __future__ import annotations

import graphlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssld import needs, plugins
from ssld.checkpoint import FORMAT
from ssld.contracts import Model, StageKind
from ssld.data.transforms import Pipeline
from ssld.datasets import Datasets, open_datasets
from ssld.errors import RecipeError
from ssld.recipe import Recipe
from ssld.settings import Context, TeacherSetting, TrainingSettings
from ssld.teaching.onnx_files import files_beside
from ssld.wording import got, near

# these change what is kept on disk or when, never a weight
STORAGE_KEYS: Mapping[str, Any] = {"keep_last": True, "save_steps": True, "save_interval": True, "labels": {"store"}}
# paths in a teacher's settings: what they hold counts, not where
TEACHER_FILES = ("weights", "onnx")
# what a plug-in that comes with ssld is made of is told by its kind's revision; a release changes no weight by itself
OWN = "ssld"


@dataclass(frozen=True)
class Node:
    """One stage of a plan.

    number: as SSLD counts, 0 for what makes the teacher; settings: resolved; basis: all that its weights depend on;
    fingerprint: a hash of the basis; samples, steps: of its training.
    """

    number: int
    name: str
    kind: StageKind[Any]
    settings: TrainingSettings
    basis: Mapping[str, Any]
    fingerprint: str
    samples: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """What a run does, in order."""

    recipe: Recipe
    nodes: tuple[Node, ...]
    data: Datasets

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def find(self, stage: str) -> Node:
        """The stage of that number or name. Raises RecipeError with the stages that exist."""
        for node in self.nodes:
            if stage in (node.name, str(node.number)):
                return node
        known = ", ".join(f"{node.number} {node.name}" for node in self.nodes)
        raise RecipeError(
            f"{self.recipe.name}: expected a stage of this recipe, got {got(stage)}; its stages are {known}"
        )


def make_plan(recipe: Recipe, *, limit: int | None = None, cache: Path | None = None) -> Plan:
    """Index the data (writing only the index cache) and resolve every stage. Raises RecipeError and DataError."""
    order = ordered(recipe)
    data = open_datasets(recipe, limit, cache)
    nodes: dict[str, Node] = {}
    for number, name in zip(numbers(recipe, order), order, strict=True):
        nodes[name] = resolve(recipe, name, number, data, nodes)
    return Plan(recipe, tuple(nodes.values()), data)


def ordered(recipe: Recipe) -> list[str]:
    """Stage names so that each comes after what it reads, else in the order of the recipe."""
    for name, settings in recipe.stages.items():
        for wanted in settings.inputs:
            if wanted not in recipe.stages:
                raise RecipeError(
                    f"{recipe.place(('stages', name))}: expected a stage of this recipe or a .safetensors file, got "
                    f"{got(wanted)}; {near(wanted, recipe.stages)}"
                )
    done: list[str] = []
    sorter = graphlib.TopologicalSorter({name: settings.inputs for name, settings in recipe.stages.items()})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = " → ".join(reversed(error.args[1]))
        place = recipe.place(("stages", error.args[1][0]))
        raise RecipeError(
            f"{place}: the stages wait for each other: {cycle}; take one of them out of the circle"
        ) from error
    position = list(recipe.stages).index
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=position)
        done.append(ready.pop(0))
        sorter.done(done[-1])
    return done


def numbers(recipe: Recipe, order: list[str]) -> list[int]:
    """0 for every stage before the first that has a teacher, which is 1; then in order. Else 0, 1, 2, …"""
    taught = [index for index, name in enumerate(order) if recipe.stages[name].taught_by]
    first = taught[0] if taught else 1
    return [max(0, index - first + 1) for index in range(len(order))]


def resolve(recipe: Recipe, name: str, number: int, data: Datasets, earlier: Mapping[str, Node]) -> Node:
    """Fill in what the recipe leaves open, and fix the fingerprint."""
    settings = recipe.stages[name]
    kind = plugins.stage_kind(settings.kind)
    parent = earlier.get(settings.start or "")
    samples = len(data.named(settings.data))
    context = Context(
        resolution=parent.settings.resolution if parent else recipe.images.resolution,
        samples=samples,
        classes=len(data.classes),
        parent=parent.settings if parent else None,
    )
    settings = with_network(recipe, name, settings.resolved(context), parent)
    plugged = origins(recipe, name, settings)
    try:
        settings.check(context)
        needs.check(settings, context.classes)
    except ValueError as error:
        raise RecipeError(f"{recipe.place(('stages', name))}: {error}") from error
    pipelines = {part: pipeline(recipe, part, settings.resolution) for part in ("train", "eval")}
    expect_one_normalization(recipe, pipelines)
    basis = {
        "format": FORMAT,
        "name": name,
        "kind": f"{settings.kind} revision {kind.revision} of {owner('stages', settings.kind)}",
        "seed": recipe.seed,
        "settings": without_paths(settings),
        "images": {part: made.to_json() for part, made in pipelines.items()},
        "classes": list(data.classes),
        "data": {source: data.sources[source].identity for source in settings.data},
        "validation": data.validation.identity,
        "inputs": {stage: earlier[stage].fingerprint for stage in settings.inputs},
        "plug-ins": plugged,
        "files": {
            key: file_identity(path, recipe.place(("stages", name, key.partition(" ")[0])))
            for key, path in weight_files(settings).items()
        },
    }
    fingerprint = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
    return Node(number, name, kind, settings, basis, fingerprint, samples, settings.total_steps(samples))


def with_network(recipe: Recipe, name: str, settings: TrainingSettings, parent: Node | None) -> TrainingSettings:
    """Settings that name the network: the recipe's own, which must be the one of the stage it starts from, or that."""
    place = recipe.place(("stages", name))
    if settings.student is None and parent is None:
        raise RecipeError(f"{place}: expected student: NETWORK, since the stage starts from no other stage, got none")
    if parent is None:
        return settings
    if settings.student not in (None, parent.settings.student):
        raise RecipeError(
            f"{place}: expected the student of {parent.name}, {parent.settings.student.name}, got "
            f"{settings.student.name}; leave student out, or start from another stage"
        )
    return settings.model_copy(update={"student": parent.settings.student})


def owner(kind: str, name: str) -> str:
    """Distribution and version of a plug-in; of what comes with ssld, the distribution alone."""
    origin = plugins.origin(kind, name)
    return OWN if origin.partition(" ")[0] == OWN else origin


def origins(recipe: Recipe, name: str, settings: TrainingSettings) -> dict[str, str]:
    """Distribution and version of every plug-in that the stage names. Raises RecipeError for one that is not there."""
    wanted = {"student": ("students", settings.student.name)}
    for number, loss in enumerate(settings.losses):
        wanted |= {f"loss {number}" if number else "loss": ("losses", loss.name)}
    for number, teacher in enumerate(settings.taught_by):
        wanted |= {f"teacher {number}": ("teachers", teacher.plugin)} if teacher.plugin else {}
        wanted |= {f"teacher {number}": ("students", teacher.network)} if teacher.network else {}
    found = {}
    for key, (kind, plugin) in wanted.items():
        try:
            found[key] = owner(kind, plugin)
        except RecipeError as error:
            raise RecipeError(f"{place_of(recipe, name, key.partition(' ')[0])}: {error}") from error
    return found


def place_of(recipe: Recipe, stage: str, field: str) -> str:
    """Where the recipe has a field of a stage's settings, which it may write by another name."""
    written = type(recipe.stages[stage]).model_fields[field].alias or field
    return recipe.place(("stages", stage, written))


def pipeline(recipe: Recipe, part: str, resolution: int) -> Pipeline:
    """The recipe's `train` or `eval` operators at a stage's resolution."""
    operators = recipe.images.train if part == "train" else recipe.images.eval
    made = Pipeline(operators, recipe.images.resolution, recipe.images.resolution).at(resolution)
    try:
        made.check()
        if part == "eval" and (drawing := [type(step).__name__ for step in made.steps if step.draws]):
            raise ValueError(
                f"expected operators that draw nothing, so that each image is always the same, got "
                f"{', '.join(drawing)}; they belong to images.train"
            )
    except ValueError as error:
        raise RecipeError(f"{recipe.place(('images', part))}: {error}") from error
    return made


def expect_one_normalization(recipe: Recipe, pipelines: Mapping[str, Pipeline]) -> None:
    """Raise RecipeError where a student would learn from other numbers than it is judged by."""
    train, evaluation = (
        f"mean {shown(made.mean)} and std {shown(made.std)}" for made in (pipelines["train"], pipelines["eval"])
    )
    if train != evaluation:
        raise RecipeError(
            f"{recipe.place(('images', 'eval'))}: expected the normalization of images.train, {train}, got "
            f"{evaluation}; give both the same NormalizeImage"
        )


def shown(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"


def model(plan: Plan, node: Node) -> Model:
    """What a stage trains, at the stage's resolution."""
    student, shown = node.settings.student, pipeline(plan.recipe, "eval", node.settings.resolution)
    return Model(student.name, student.options, plan.data.classes, shown)


def without_paths(settings: TrainingSettings) -> dict[str, Any]:
    """The settings as JSON, less what changes no weight; outside weights count by content, wherever they lie."""
    plain = settings.model_dump(mode="json", by_alias=True, exclude=STORAGE_KEYS)
    if "from" in weight_files(settings):
        plain["from"] = None
    for teacher in plain.get("teacher") or ():
        # a plug-in's own keys are its own affair
        teacher |= {key: None for key in TEACHER_FILES if teacher.get(key) and not teacher["plugin"]}
        teacher["class_map"] = None
    return plain


def weight_files(settings: TrainingSettings) -> dict[str, Path]:
    """Files outside the run that a stage's weights depend on."""
    files = {"from": settings.start} if settings.start and settings.start.endswith(".safetensors") else {}
    for number, teacher in enumerate(settings.taught_by):
        files |= {f"teacher {number}": teacher.file} if teacher.file else {}
        files |= {f"teacher {number} beside {i}": str(path) for i, path in enumerate(tensors_of(teacher))}
        files |= {f"teacher {number} class_map": teacher.class_map} if teacher.class_map else {}
    return {key: Path(path).expanduser() for key, path in files.items()}


def tensors_of(teacher: TeacherSetting) -> list[Path]:
    """The files in which an .onnx file keeps tensors."""
    file = Path(teacher.onnx or "").expanduser()
    return files_beside(file, file.read_bytes()) if teacher.onnx and file.is_file() else []


def file_identity(path: Path, place: str) -> str:
    """sha256 of a file that a teacher or a stage is made of."""
    if path.exists() and not path.is_file():
        # a device or a named pipe would be read for ever
        raise RecipeError(f"{place}: expected a file, got {path}, which is none; check the path")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{place}: expected a file, got {path}: {error.strerror}; check the path") from error
