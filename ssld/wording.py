"""Faults in plain words: what was wanted, what came instead, and the nearest known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]
Schema = Mapping[str, Any]

_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping of keys",
    "null": "null",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


_TAG = re.compile(r"\(\w+\)")
"""How the models here mark the branches of a union."""

LISTED = 60
"""Known names that a message has room for."""


def near(name: str, known: Iterable[str]) -> str:
    """The known names that resemble `name`, as a question; all of them where none does.

    >>> near("batchsize", ["batch_size", "epochs"])
    'did you mean batch_size?'
    >>> near("x", ["batch_size", "epochs"])
    'known: batch_size, epochs'
    """
    by_lower = {other.lower(): other for other in known}
    matches = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower)]
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    names = list(by_lower.values())
    return f"known: {', '.join(names[:LISTED]) or 'none'}{', …' if len(names) > LISTED else ''}"


def got(value: object) -> str:
    """A value as the user would write it, cut to one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping of keys" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return cut(value)


def cut(value: object) -> str:
    """A value as Python writes it, so that lists keep their items, cut to one short line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def size(count: float) -> str:
    """A number of bytes in the unit that suits it: 512 bytes, 1.5 kB, 3.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def dotted(path: KeyPath) -> str:
    """A key's path as one word; what is no plain word stays quoted.

    >>> dotted(("images", "train", 1, "a b"))
    "images.train[1].'a b'"
    """
    parts = (f"[{part}]" if isinstance(part, int) else f".{_quoted(part)}" for part in path)
    return "".join(parts).removeprefix(".")


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,60}", key) else got(key)


def faults(error: ValidationError, schema: Schema) -> list[tuple[KeyPath, str]]:
    """Path and message of each fault that pydantic found, without its internal tags and without repetition.

    schema: the JSON schema of what was validated; it knows what was wanted.
    """
    found = dict.fromkeys(_fault(details, schema) for details in error.errors(include_url=False))
    paths = [path for path, _ in found]
    # every branch of a union complains; the branch that got furthest is the one that was meant
    return [(path, text) for path, text in found if not any(_inside(other, path) for other in paths)]


def _inside(path: KeyPath, parent: KeyPath) -> bool:
    return len(path) > len(parent) and path[: len(parent)] == parent


def _fault(details: ErrorDetails, root: Schema) -> tuple[KeyPath, str]:
    kind, loc, value = details["type"], details["loc"], details["input"]
    if kind == "extra_forbidden":
        path, schemas = _walk(loc[:-1], root)
        known = [key for schema in schemas for key in schema.get("properties", ())]
        return (*path, loc[-1]), f"unknown key, {near(str(loc[-1]), known)} (got {got(value)})"
    path, schemas = _walk(loc, root)
    if kind in ("value_error", "assertion_error"):
        return path, str(details["ctx"]["error"])
    wanted = _wanted(schemas, root)
    if kind == "missing":
        return path, f"required key is missing, expected {wanted}"
    return path, f"expected {wanted}, got {got(value)}"


def _walk(loc: KeyPath, root: Schema) -> tuple[KeyPath, list[Schema]]:
    """The part of `loc` that names keys and items, without the tags of unions, and what the schema says there."""
    path: list[str | int] = []
    schemas = _branches(root, root)
    for part in loc:
        if isinstance(part, str) and _TAG.fullmatch(part):
            continue
        inner = [branch for schema in schemas for below in _below(schema, part) for branch in _branches(below, root)]
        if inner:
            path.append(part)
            schemas = inner
    return tuple(path), schemas


def _branches(schema: Schema, root: Schema) -> list[Schema]:
    """The alternatives that a schema allows, references followed."""
    if "$ref" in schema:
        return _branches(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return [branch for inner in alternatives for branch in _branches(inner, root)] or [schema]


def _below(schema: Schema, part: str | int) -> list[Schema]:
    if isinstance(part, str):
        inner = schema.get("properties", {}).get(part, schema.get("additionalProperties"))
    else:
        fixed = schema.get("prefixItems", [])
        inner = fixed[part] if part < len(fixed) else schema.get("items")
    return [inner if isinstance(inner, Mapping) else {}] if inner or inner == {} else []


def _wanted(schemas: list[Schema], root: Schema) -> str:
    wanted = dict.fromkeys(_described(schema) for schema in schemas if schema.get("type") != "null")
    return " or ".join(wanted) or "null"


def _described(schema: Schema) -> str:
    if "const" in schema or "enum" in schema:
        return " or ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    text = " and ".join(bounds)
    if "minItems" in schema:
        text = f"of at least {schema['minItems']}"
    if "pattern" in schema:
        text = f"of the form {schema['pattern']}"
    return f"{_TYPES.get(schema.get('type', ''), 'another value')} {text}".rstrip()
