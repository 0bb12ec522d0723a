"""Plug-ins: found by entry-point name without being imported, loaded when a recipe names them, called with its keys.

Built-in stages, teachers, students and losses come in by the same door as a stranger's; there is no other registry.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError

from ssld import wording
from ssld.contracts import StageKind
from ssld.errors import PluginError, RecipeError, SsldError
from ssld.settings import Exact
from ssld.watch import watch

KINDS = {"stages": "stage kind", "teachers": "teacher", "students": "student", "losses": "loss"}


@dataclass(frozen=True)
class Found:
    """An installed plug-in, not imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint


def find(kind: str) -> tuple[Found, ...]:
    """The installed plug-ins of a kind (a key of KINDS), sorted by name, then distribution."""
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}, got {kind!r}")
    # a distribution counts once, however often sys.path leads to it
    found = {(plugin.name, plugin.distribution): plugin for plugin in map(_found, entry_points(group=f"ssld.{kind}"))}
    return tuple(found[key] for key in sorted(found))


def _found(entry_point: EntryPoint) -> Found:
    assert entry_point.dist is not None  # entry_points() sets it; only one built by hand has none
    metadata = entry_point.dist.metadata
    return Found(entry_point.name, metadata["Name"] or "unnamed", metadata["Version"] or "?", entry_point)


def _named(kind: str, name: str) -> Found:
    installed = find(kind)
    matches = [plugin for plugin in installed if plugin.name == name]
    if not matches:
        known = sorted({plugin.name for plugin in installed})
        hint = wording.near(name, known)
        listing = "" if hint.startswith("known") else f" known: {', '.join(known)}"
        raise RecipeError(f"unknown {KINDS[kind]} {wording.got(name)}, {hint}{listing}")
    if len(matches) > 1:
        owners = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in matches)
        raise PluginError(f"two packages offer the {KINDS[kind]} {name!r}: {owners}; uninstall all but one")
    return matches[0]


def origin(kind: str, name: str) -> str:
    """Distribution and version of a plug-in, as in "acme-teachers 0.3"."""
    found = _named(kind, name)
    return f"{found.distribution} {found.version}"


def _who(kind: str, name: str) -> str:
    return f"{KINDS[kind]} {name!r} of package {origin(kind, name)}"


def load(kind: str, name: str) -> Any:
    """Import the plug-in of that name and return what its entry point names.

    Raises RecipeError for an unknown name; PluginError when two distributions offer it, or when its import fails.
    """
    found, who = _named(kind, name), _who(kind, name)
    try:
        with watch.awaiting(lambda: f"the {who} to load"):
            return found.entry_point.load()
    except Exception as error:
        raise PluginError(
            f"{who} failed to load: {type(error).__name__}: {error}; install what it needs, or repair or remove it"
        ) from error


def stage_kind(name: str) -> StageKind[Any]:
    """Load a stage kind. Raises like `load`, and PluginError for anything but a StageKind."""
    kind = load("stages", name)
    if not isinstance(kind, StageKind):
        raise PluginError(f"{_who('stages', name)}: expected an ssld.contracts.StageKind, got {type(kind).__name__}")
    return kind


def call(kind: str, name: str, options: Mapping[str, Any], supplied: Mapping[str, Any] | None = None) -> Any:
    """Load a plug-in and call it with the recipe's options, checked by the types that it declares.

    supplied: what the run offers (number of classes, resolution, …); passed where the plug-in has a parameter of that
    name and the recipe leaves it open.
    Raises RecipeError with all faults of the options; PluginError when the plug-in itself raises.
    """
    factory, who = load(kind, name), _who(kind, name)
    values = _arguments(factory, who, options, supplied or {})
    try:
        with watch.awaiting(lambda: f"the {who} to be made"):
            return factory(**values)
    except SsldError:
        raise
    except Exception as error:
        raise PluginError(f"{who} raised {type(error).__name__}: {error}; correct its options, or repair it") from error


def _arguments(factory: Any, who: str, options: Mapping[str, Any], supplied: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the factory: the options, checked and converted, and what it takes of the supplied."""
    named, rest = _parameters(factory, who)
    annotations = _annotations(factory, who, {key: named.get(key, rest) for key in options})
    values = {key: value for key, value in supplied.items() if key in named}
    faults = []
    for key, value in options.items():
        if key not in named and rest is None:
            faults.append(f"{key}: unknown option, {wording.near(key, named)} (got {wording.got(value)})")
            continue
        values[key], wrong = _checked(annotations.get(key, Any), key, value, who)
        faults += wrong
    needed = (key for key, parameter in named.items() if parameter.default is parameter.empty)
    faults += [f"{key}: required option is missing" for key in needed if key not in values and key not in options]
    if faults:
        raise RecipeError(f"{who}: " + "; ".join(faults))
    return values


def _parameters(factory: Any, who: str) -> tuple[dict[str, inspect.Parameter], inspect.Parameter | None]:
    """The parameters that can be given by name, and the one that takes all other names, if there is one."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:
        raise PluginError(f"{who}: expected a callable with named parameters, got {factory!r}") from error
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {parameter.name: parameter for parameter in parameters if parameter.kind in by_name}
    rest = (parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD)
    return named, next(rest, None)


def _annotations(factory: Any, who: str, parameters: Mapping[str, inspect.Parameter | None]) -> dict[str, Any]:
    """The declared types of these parameters; those of others may name what only type checkers import."""
    declared = {
        key: parameter.annotation
        for key, parameter in parameters.items()
        if parameter is not None and parameter.annotation is not inspect.Parameter.empty
    }
    holder = _Annotated(declared)
    try:
        return get_type_hints(holder, globalns=_globals(factory), include_extras=True)
    except Exception as error:
        raise PluginError(f"{who}: the type of an option cannot be evaluated: {error}") from error


class _Annotated:
    def __init__(self, annotations: dict[str, Any]) -> None:
        self.__annotations__ = annotations


def _globals(factory: Any) -> dict[str, Any]:
    target: Callable[..., Any] = inspect.unwrap(factory)
    while isinstance(target, partial):
        target = inspect.unwrap(target.func)
    return vars(sys.modules[target.__module__])


def _checked(annotation: Any, key: str, value: Any, who: str) -> tuple[Any, list[str]]:
    """The value as the annotation wants it, and what is wrong with it."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[annotation, Exact])
        return adapter.validate_python(value), []
    except ValidationError as error:
        faults = wording.faults(error, _schema(adapter))
        return None, [f"{wording.dotted((key, *path))}: {text}" for path, text in faults]
    except PydanticUserError as error:
        raise PluginError(f"{who}: option {key} has a type that no recipe can give: {annotation!r}") from error


def _schema(adapter: TypeAdapter[Any]) -> wording.Schema:
    """JSON schema of a type; empty for a type that JSON cannot describe."""
    try:
        return adapter.json_schema()
    except PydanticInvalidForJsonSchema:
        return {}
