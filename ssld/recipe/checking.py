"""A tree of plain values to a Recipe: every key by its model, every source that a stage names; all faults at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ssld import plugins, wording
from ssld.errors import PluginError, RecipeError
from ssld.recipe.model import NAME, Data, Keyed, Recipe
from ssld.recipe.tree import Fault, Tree, refuse
from ssld.settings import TrainingSettings
from ssld.wording import KeyPath

TRAINABLE = ("unlabeled", "labeled")
"""The sources that a stage may train on."""

_Model = TypeVar("_Model", bound=BaseModel)
_Faults = list[tuple[KeyPath, str]]


def check(tree: Tree, file: str) -> Recipe:
    """The recipe that the tree holds. file: the name that stands above a list of faults.

    Raises RecipeError with all faults, those of the text too; PluginError when a stage kind cannot be loaded.
    """
    keyed, faults = _model(Keyed, tree.value, ())
    sources = _sources(tree.value)
    faults += _no_split(sources)
    stages = {}
    plain = tree.value.get("stages")
    for name, value in plain.items() if isinstance(plain, dict) else ():
        stages[name], wrong = _stage(name, value, sources)
        faults += wrong
    unread = {fault.path for fault in tree.faults}
    placed = [Fault(tree.place(path), path, message) for path, message in faults if not _under(path, unread)]
    refuse([*tree.faults, *placed], file)
    settings = {name: stage for name, stage in stages.items() if stage is not None}
    assert keyed is not None  # it is None only beside a fault
    return Recipe(keyed.name, keyed.seed, keyed.images, keyed.data, settings, tree)


def _under(path: KeyPath, unread: set[KeyPath]) -> bool:
    """Whether the text of the key, or of one above it, could not be read, so that its value says nothing."""
    return any(path[:end] in unread for end in range(1, len(path) + 1))


def _model(model: type[_Model], value: Any, path: KeyPath) -> tuple[_Model | None, _Faults]:
    try:
        return model.model_validate(value), []
    except ValidationError as error:
        found = wording.faults(error, model.model_json_schema())
        return None, [((*path, *below), message) for below, message in found]


def _stage(name: str, value: Any, sources: Mapping[str, Any]) -> tuple[TrainingSettings | None, _Faults]:
    """The stage's settings by the model of its kind, and what is wrong with them."""
    path = ("stages", name)
    if not re.fullmatch(NAME, name):
        return None, [(path, "expected a stage name of a-z, 0-9, _ and -")]
    if not isinstance(value, dict):
        return None, [(path, f"expected a mapping of keys, got {wording.got(value)}")]
    kind = value.get("kind")
    try:
        model = plugins.stage_kind(kind).settings if isinstance(kind, str) else None
    except RecipeError as error:
        return None, [((*path, "kind"), str(error))]
    if model is None:
        return None, [((*path, "kind"), _no_kind(value))]
    settings, faults = _settings(model, value, path)
    return settings, faults + _unmet(path, settings.data if settings else value.get("data"), model, sources)


def _no_kind(value: Mapping[str, Any]) -> str:
    known = " or ".join(sorted({found.name for found in plugins.find("stages")}))
    if "kind" in value:
        return f"expected {known}, got {wording.got(value['kind'])}"
    return f"required key is missing, expected {known}"


def _settings(model: type[_Model], value: Mapping[str, Any], path: KeyPath) -> tuple[_Model | None, _Faults]:
    try:
        return _model(model, value, path)
    except Exception as error:
        who = f"the settings of stage kind {value['kind']!r} of package {plugins.origin('stages', value['kind'])}"
        raise PluginError(f"{who} raised {type(error).__name__}: {error}") from error


def _sources(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sources that the recipe gives, whether they are right or wrong."""
    data = values.get("data")
    return {key: data[key] for key in Data.model_fields if data.get(key) is not None} if isinstance(data, dict) else {}


def _unmet(path: KeyPath, names: Any, model: type[TrainingSettings], sources: Mapping[str, Any]) -> _Faults:
    """What is wrong with the sources that a stage names: unknown, not given, or without the labels that it reads."""
    faults = []
    names = names if isinstance(names, list | tuple) else [names]
    for name in filter(lambda name: isinstance(name, str), names):
        if name not in TRAINABLE:
            problem = f"expected {' or '.join(TRAINABLE)}, got {wording.got(name)}"
        elif name not in sources:
            problem = f"expected a source of the recipe, got {name}, which it lacks; add data.{name}"
        elif model.needs_labels and name == "unlabeled":
            problem = "expected labeled, got unlabeled; this kind of stage reads the labels"
        else:
            continue
        faults.append(((*path, "data"), problem))
    return faults


def _no_split(sources: Mapping[str, Any]) -> _Faults:
    validation = sources.get("validation")
    if isinstance(validation, dict) and "split" in validation and "labeled" not in sources:
        return [(("data", "validation"), "expected data.labeled to split, got none; add it or name a validation set")]
    return []
