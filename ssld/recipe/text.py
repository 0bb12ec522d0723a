"""YAML text to plain values that remember their places, and back. The only file that imports yaml.

What is read is the core schema of YAML 1.2: `1e-3` is a number, `on`, `no`, `1:30` and `2024-01-01` are text. Tags,
anchors, duplicate keys, more than 50 levels and more than 256 KiB are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ssld.errors import RecipeError
from ssld.recipe.tree import Fault, Place, Tree
from ssld.wording import KeyPath

MAX_BYTES = 256 * 1024
MAX_LEVELS = 50

_INTEGER = re.compile(r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII
)
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def decode(data: bytes, file: str) -> str:
    """Bytes to text. Raises RecipeError for more than 256 KiB and for anything but UTF-8."""
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{file}: expected a recipe of at most {MAX_BYTES // 1024} KiB, got more; is it a recipe?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{file}:{line}: expected UTF-8 text, got the byte 0x{data[error.start]:02x}") from error


def parse(text: str, file: str, at: KeyPath = ()) -> Tree:
    """Read one YAML document. Faults that leave the rest readable are collected in the tree.

    file: the name that stands in messages; at: the path of the whole value in its recipe.
    Raises RecipeError where the text is no YAML, or nested too deeply.
    """
    reader = _Reader(text, file, at)
    value = reader.document()
    return Tree(value, reader.places, tuple(reader.faults))


class _Reader:
    """Builds plain values from YAML events; recursion ends at MAX_LEVELS, whatever the text says."""

    def __init__(self, text: str, file: str, at: KeyPath) -> None:
        self.file = file
        self.at = at
        self.events = self._events(text)
        self.places: dict[KeyPath, Place] = {at: Place(file, 1, 1)}
        self.faults: list[Fault] = []

    def _events(self, text: str) -> Iterator[Any]:
        """The events of yaml's pure Python parser; its C parser crashes on deep nesting."""
        reader = None
        try:
            reader = yaml.SafeLoader(text)
            while reader.check_event():
                yield reader.get_event()
        except yaml.MarkedYAMLError as error:
            mark, since = error.problem_mark or error.context_mark, error.context_mark
            place = self._at(mark) if mark else Place(self.file)
            context = f" {error.context} from line {since.line + 1}" if error.context and since else ""
            raise RecipeError(f"{place}: not YAML: {error.problem or 'expected another character'}{context}") from error
        except yaml.reader.ReaderError as error:
            lines = text[: error.position].split("\n")
            place = Place(self.file, len(lines), len(lines[-1]) + 1)
            raise RecipeError(f"{place}: not YAML: expected text, got the character U+{error.character:04X}") from error
        # escapes such as "\UFFFFFFFF", which yaml hands to chr()
        except (ValueError, OverflowError) as error:
            place = self._at(reader.get_mark()) if reader else Place(self.file)
            raise RecipeError(f"{place}: not YAML: {' '.join(str(error).split())}") from error

    def _at(self, mark: Any) -> Place:
        return Place(self.file, mark.line + 1, mark.column + 1)

    def _place(self, event: yaml.Event) -> Place:
        return self._at(event.start_mark)

    def _fault(self, event: yaml.Event, path: KeyPath, message: str) -> None:
        self.faults.append(Fault(self._place(event), path, message))

    def document(self) -> Any:
        """The value of the only document."""
        next(self.events)
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        value = self._node(next(self.events), self.at)
        next(self.events)
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            self._fault(event, self.at, "expected one document, got another one after '---'")
        return value

    def _node(self, event: Any, path: KeyPath) -> Any:
        if len(path) > MAX_LEVELS:
            raise RecipeError(f"{self._place(event)}: expected at most {MAX_LEVELS} levels of nesting, got more")
        if isinstance(event, yaml.AliasEvent):
            self._fault(event, path, f"aliases are not read, write the value of *{event.anchor} again")
            return ""  # not None, which would say that the key was left open
        if event.anchor or event.tag:
            self._fault(event, path, f"{'anchors' if event.anchor else 'tags'} are not read, write the plain value")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        return self._mapping(path) if isinstance(event, yaml.MappingStartEvent) else self._list(path)

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Any:
        if any("\ud800" <= char <= "\udfff" for char in event.value):
            self._fault(event, path, "expected Unicode text, got half of a surrogate pair")
            return ""
        return _resolve(event.value) if event.implicit[0] else event.value

    def _list(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            inner = (*path, len(items))
            self.places[inner] = self._place(event)
            items.append(self._node(event, inner))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        value: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event, path)
            inner = (*path, "?" if key is None else key)
            if key is None:
                self._node(next(self.events), inner)
                continue
            if key in value:
                self._fault(event, inner, f"given twice, first at line {self.places[inner].line}")
            else:
                self.places[inner] = self._place(event)
            value[key] = self._node(next(self.events), inner)
        return value

    def _key(self, event: Any, path: KeyPath) -> str | None:
        """Keys are text, whatever they look like: `on`, `1` and `null` name themselves. None for what is no scalar."""
        if isinstance(event, yaml.ScalarEvent) and not event.tag and not event.anchor:
            self._scalar(event, (*path, event.value))
            return event.value
        self._fault(event, (*path, "?"), "expected a plain word as key")
        self._node(event, (*path, "?"))
        return None


def _resolve(text: str) -> Any:
    """The value of a plain scalar, by the core schema of YAML 1.2 (specification, section 10.3.2)."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=[inIN])", "", text))
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_resolve` would take for a number, beside all that YAML 1.1 would."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never write anchors, which are not read."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # yaml writes these line breaks bare between single quotes, where they would be read as spaces
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{_INTEGER.pattern})$"), list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def render(value: Mapping[str, Any]) -> str:
    """YAML text that `parse` reads to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
