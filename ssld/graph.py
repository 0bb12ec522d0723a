"""Recipe to plan: the order of the stages, their derived numbers, and the fingerprint each result will carry."""

from __future__ import annotations

import graphlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssld import plugins
from ssld.checkpoint import FORMAT
from ssld.contracts import StageKind
from ssld.data.samples import Samples, concatenate, same_classes
from ssld.data.sources import open_source
from ssld.data.transforms import Pipeline, view
from ssld.errors import DataError, RecipeError
from ssld.recipe import Data, Recipe, Split
from ssld.settings import Context, TrainingSettings

# these change what is kept on disk or when, never a weight
STORAGE_KEYS = frozenset({"keep_last", "save_steps", "save_interval"})
# width and height of an ordinary photograph, on which operators are tried before anything is spent
PROBE = (500, 375)
# SSLD's own pools lose a few images of millions; more than one in a thousand is a broken source
POOL_DAMAGE = 1000


@dataclass(frozen=True)
class Datasets:
    """The recipe's sources, indexed: by their names in the recipe."""

    sources: Mapping[str, Samples]
    classes: tuple[str, ...]

    @property
    def validation(self) -> Samples:
        return self.sources["validation"]

    @property
    def test(self) -> Samples | None:
        return self.sources.get("test")

    def named(self, names: tuple[str, ...]) -> Samples:
        """What a stage reads: one source, or several as one set."""
        parts = [self.sources[name] for name in names]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def damage_budget(self, names: tuple[str, ...]) -> int:
        """So many images of these sources may be unreadable: none that is labeled, one in a thousand of the pool."""
        return -(-len(self.sources["unlabeled"]) // POOL_DAMAGE) if "unlabeled" in names else 0


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
        raise RecipeError(f"{self.recipe.name}: expected a stage of this recipe, got {stage!r}; its stages are {known}")


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
                near = get_close_matches(wanted, recipe.stages, 1)
                hint = f", did you mean {near[0]}?" if near else ""
                raise RecipeError(
                    f"{recipe.place(('stages', name))}: expected a stage of this recipe or a .safetensors file, got "
                    f"{wanted!r}{hint}; its stages are {', '.join(recipe.stages)}"
                )
    done: list[str] = []
    sorter = graphlib.TopologicalSorter({name: settings.inputs for name, settings in recipe.stages.items()})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = " → ".join(reversed(error.args[1]))
        place = recipe.place(("stages", error.args[1][0]))
        raise RecipeError(f"{place}: the stages wait for each other: {cycle}; break the circle") from error
    place_of = list(recipe.stages).index
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=place_of)
        done.append(ready.pop(0))
        sorter.done(done[-1])
    return done


def numbers(recipe: Recipe, order: list[str]) -> list[int]:
    """0 for every stage before the first that has a teacher, which is 1; then in order. Else 0, 1, 2, …"""
    taught = [index for index, name in enumerate(order) if recipe.stages[name].taught_by]
    first = taught[0] if taught else 1
    return [max(0, index - first + 1) for index in range(len(order))]


def open_datasets(recipe: Recipe, limit: int | None, cache: Path | None) -> Datasets:
    """Index every source that the recipe names and agree on the classes. limit: so many images of each at most."""
    specs = {name: getattr(recipe.data, name) for name in Data.model_fields}
    sources = {
        name: open_source(spec, labeled=name != "unlabeled", cache=cache)
        for name, spec in specs.items()
        if spec is not None and not isinstance(spec, Split)
    }
    if isinstance(recipe.data.validation, Split) and "labeled" in sources:
        rest, held_out = sources["labeled"].split(recipe.data.validation.split, recipe.seed)
        sources |= {"labeled": rest, "validation": held_out}
    if "validation" not in sources:
        raise RecipeError(
            f"{recipe.place(('data',))}: expected a labeled validation set, got none; add data.validation: SOURCE, or "
            f"{{split: 0.1}} to hold back a tenth of the labeled set"
        )
    classes = class_names(sources)
    if limit is not None:
        sources = {name: samples.limited(limit) for name, samples in sources.items()}
    return Datasets(sources, classes)


def class_names(sources: Mapping[str, Samples]) -> tuple[str, ...]:
    """The class names on which all labeled sources agree; numbers as text where no source names them."""
    labels = {name: samples.labels for name, samples in sources.items() if samples.labels is not None}
    named = {name: classes for name in labels if (classes := sources[name].classes) is not None}
    if named:
        first, classes = next(iter(named.items()))
        for name, other in named.items():
            same_classes(classes, other, f"data.{first}", f"data.{name}")
    else:
        highest = max(int(column.max()) for column in labels.values())
        classes = tuple(str(label) for label in range(highest + 1))
    for name, column in labels.items():
        beyond = np.flatnonzero(column >= len(classes))
        if len(beyond):
            raise DataError(
                f"data.{name}: expected labels from 0 to {len(classes) - 1}, got {column[beyond[0]]} for "
                f"{sources[name].where(int(beyond[0]))}; correct the label, or name the classes of all sources"
            )
    return classes


def resolve(recipe: Recipe, name: str, number: int, data: Datasets, earlier: Mapping[str, Node]) -> Node:
    """Fill in what the recipe leaves open, and fix the fingerprint."""
    settings = recipe.stages[name]
    kind = plugins.stage_kind(settings.kind)
    parent = earlier.get(settings.start or "")
    samples = len(data.named(settings.data))
    context = Context(
        resolution=parent.settings.resolution if parent else recipe.images.resolution,
        samples=samples,
        parent=parent.settings if parent else None,
    )
    settings = with_network(recipe, name, settings.resolved(context), parent)
    pipelines = {part: pipeline(recipe, part, settings.resolution) for part in ("train", "eval")}
    basis = {
        "format": FORMAT,
        "name": name,
        "kind": f"{settings.kind} revision {kind.revision} of {plugins.origin('stages', settings.kind)}",
        "seed": recipe.seed,
        "settings": settings.model_dump(mode="json", by_alias=True, exclude=set(STORAGE_KEYS)),
        "images": {part: made.to_json() for part, made in pipelines.items()},
        "classes": list(data.classes),
        "data": {source: data.sources[source].identity for source in settings.data},
        "validation": data.validation.identity,
        "inputs": {stage: earlier[stage].fingerprint for stage in settings.inputs},
        "plug-ins": origins(recipe, name, settings),
        "files": {
            key: file_identity(path, recipe.place(("stages", name, key)))
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


def origins(recipe: Recipe, name: str, settings: TrainingSettings) -> dict[str, str]:
    """Distribution and version of every plug-in that the stage names. Raises RecipeError for one that is not there."""
    teacher, loss = settings.taught_by, getattr(settings, "loss", None)
    wanted = {"student": ("students", settings.student.name)}
    wanted |= {"loss": ("losses", loss.name)} if loss is not None else {}
    wanted |= {"teacher": ("teachers", teacher.plugin)} if teacher and teacher.plugin else {}
    wanted |= {"teacher": ("students", teacher.network)} if teacher and teacher.network else {}
    found = {}
    for key, (kind, plugin) in wanted.items():
        try:
            found[key] = plugins.origin(kind, plugin)
        except RecipeError as error:
            raise RecipeError(f"{recipe.place(('stages', name, key))}: {error}") from error
    return found


def pipeline(recipe: Recipe, part: str, resolution: int) -> Pipeline:
    """The recipe's `train` or `eval` operators at a stage's resolution."""
    operators = recipe.images.train if part == "train" else recipe.images.eval
    made = Pipeline(operators, recipe.images.resolution, recipe.images.resolution).at(resolution)
    try:
        view(Image.new("RGB", PROBE), made, 0)
    except DataError as error:
        raise RecipeError(f"{recipe.place(('images', part))}: {error}") from error
    return made


def weight_files(settings: TrainingSettings) -> dict[str, Path]:
    """Files outside the run that a stage's weights depend on."""
    teacher = settings.taught_by
    files = {"from": settings.start} if settings.start and settings.start.endswith(".safetensors") else {}
    if teacher is not None and teacher.network is not None:
        files["teacher"] = teacher.options["weights"]
    return {key: Path(path) for key, path in files.items()}


def file_identity(path: Path, place: str) -> str:
    """sha256 of a weights file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecipeError(f"{place}: expected a weights file, got {path}: {error.strerror}; check the path") from error
