"""A recipe file to a Recipe: find it, build on what it extends, override, validate; all faults in one message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from ssld import wording
from ssld.errors import RecipeError
from ssld.recipe.checking import check
from ssld.recipe.model import Keyed, Recipe
from ssld.recipe.text import MAX_BYTES, decode, parse, render
from ssld.recipe.tree import Fault, Place, Tree, merge, refuse
from ssld.wording import KeyPath


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name; a file wins where both exist.

    overrides: `key.path=value`, the value in YAML, applied in order before anything is checked.
    Raises RecipeError with all faults, each with its place; PluginError when a stage kind cannot be loaded.
    """
    tree = _extended(_locate(str(source), Path()), ())
    for override in overrides:
        tree = _overridden(tree, override)
    return check(tree, str(source))


def known_recipes() -> dict[str, str]:
    """The shipped recipes: name, as `read_recipe` takes it, and the first line of the lab note."""
    return {name: _title(file) for name, file in _shipped().items()}


def dump(recipe: Recipe) -> str:
    """The recipe as one YAML text, with `extends` and overrides applied, which reads to an equal recipe."""
    return render(recipe.tree.value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two plain mappings, a line per key: "stages.distill.epochs: 30 → 60"."""
    return list(_differences(old, new, ()))


def _differences(old: Any, new: Any, path: KeyPath) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            inner = (*path, str(key))
            if key not in new:
                yield f"{wording.dotted(inner)}: removed, was {_shown(old[key])}"
            elif key not in old:
                yield f"{wording.dotted(inner)}: added, {_shown(new[key])}"
            else:
                yield from _differences(old[key], new[key], inner)
    elif _shown(old) != _shown(new):
        yield f"{wording.dotted(path)}: {_shown(old)} → {_shown(new)}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str, sort_keys=True)


def _shipped() -> dict[str, Path]:
    root = Path(str(resources.files("ssld.recipes")))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}


def _title(file: Path) -> str:
    lines = (line.lstrip("# ").rstrip() for line in file.read_text("utf-8").splitlines() if line.startswith("#"))
    # the first comment may be the line that tells an editor where the schema is
    return next((line for line in lines if line and not line.startswith("yaml-language-server")), "")


def _locate(name: str, folder: Path) -> Path:
    """The file of that path, seen from the folder, or else the shipped recipe of that name."""
    try:
        if (folder / name).is_file():
            return folder / name
    except OSError as error:
        raise RecipeError(f"expected a recipe file, got {wording.got(name)}: {error.strerror}") from error
    shipped = _shipped()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    hint = wording.near(name.removesuffix(".yaml"), shipped)
    raise RecipeError(f"expected a recipe file or the name of a shipped recipe, got {wording.got(name)}; {hint}")


def _read(file: Path) -> Tree:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{file}: expected a recipe that can be read, got: {error.strerror}") from error
    tree = parse(decode(data, str(file)), str(file))
    if not isinstance(tree.value, dict):
        refuse([*tree.with_fault((), f"expected a mapping of keys, got {wording.got(tree.value)}").faults], str(file))
    return tree


def _extended(file: Path, above: tuple[Path, ...]) -> Tree:
    """The file's values over those of the recipe that it extends. above: the files that led here."""
    tree = _read(file)
    if "extends" not in tree.value:
        return tree
    own = replace(tree, value={key: value for key, value in tree.value.items() if key != "extends"})
    name, chain = tree.value["extends"], (*above, file.resolve())
    try:
        if not isinstance(name, str):
            raise RecipeError(f"expected a recipe file, got {wording.got(name)}")
        base = _locate(name, file.parent)
        if base.resolve() in chain:
            raise RecipeError(f"expected a recipe that does not build on this one, got {wording.got(name)}: a cycle")
    except RecipeError as error:
        refuse(tree.with_fault(("extends",), str(error)).faults, str(file))
        raise
    return merge(_extended(base, chain), own)


def _overridden(tree: Tree, override: str) -> Tree:
    """The tree with one `key.path=value` applied, or with a fault more."""
    place = Place(f"-o {override}")
    name, equals, text = override.partition("=")
    path = tuple(name.strip().split("."))
    problem = _unreachable(tree.value, path) if equals and all(path) else "expected key.path=value"
    if problem:
        return replace(tree, faults=(*tree.faults, Fault(place, path if equals else (), problem)))
    try:
        given = parse(text, place.file, path)
    except RecipeError:
        unread = Fault(place, path, f"expected a YAML value, got {wording.got(text)}")
        return replace(tree, faults=(*tree.faults, unread))
    places = {**tree.places, **dict.fromkeys(given.places, place)}
    faults = [fault._replace(place=place) for fault in given.faults]
    return Tree(_replaced(tree.value, path, given.value), places, (*tree.faults, *faults))


def _unreachable(value: Any, path: tuple[str, ...]) -> str | None:
    """Why no key can be set at the path; None where one can. Keys that a section may have need not be there yet."""
    for depth, key in enumerate(path):
        if not isinstance(value, dict):
            where = wording.dotted(path[:depth])
            return f"expected a mapping of keys at {where}, got {wording.got(value)}; override {where} as a whole"
        known = list(Keyed.model_fields) if depth == 0 else list(value)
        if key not in known and (depth == 0 or path[:depth] == ("stages",)):
            return f"unknown key {wording.got(key)}, {wording.near(key, known)}"
        value = value.get(key, {})
    return None


def _replaced(value: dict[str, Any], path: tuple[str, ...], new: Any) -> dict[str, Any]:
    key, rest = path[0], path[1:]
    return {**value, key: _replaced(value.get(key, {}), rest, new) if rest else new}
