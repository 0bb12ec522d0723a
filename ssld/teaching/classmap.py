"""A teacher that knows other classes than the data: a file says which of its classes are which of the data's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ssld.contracts import Teacher, TeacherSpec
from ssld.errors import RecipeError, TeacherError
from ssld.wording import near

FORM = "`teacher class<TAB>student class`"
SHOWN = 20
_SMALLEST = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Pair:
    """One line of the file, with both classes by their numbers."""

    line: int
    teacher: int
    student: int


@dataclass(frozen=True)
class ClassMap:
    """From the T classes of a teacher to the C classes of the data; several may go to one, and some to none.

    pairs: by rising teacher class, none twice; teacher_classes: T, None where only the teacher's answer will tell.
    """

    file: Path
    pairs: tuple[Pair, ...]
    classes: tuple[str, ...]
    teacher_classes: int | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of what the map does; neither the order of its lines nor its comments count."""
        pairs = sorted((pair.teacher, pair.student) for pair in self.pairs)
        return hashlib.sha256(json.dumps([self.classes, pairs]).encode()).hexdigest()

    def logits(self, teacher_logits: np.ndarray) -> np.ndarray:
        """Log-probabilities, float32 [B, C], of the data's classes for the teacher's logits [B, T].

        The probabilities that go to a class are added, and divided by the sum of all that go to any. The smallest is
        that of a class to which nothing goes: the smallest normal float32, about exp(-87).

        >>> pairs = (Pair(1, 0, 0), Pair(2, 1, 0), Pair(3, 2, 1))
        >>> answer = ClassMap(Path("map.tsv"), pairs, ("cat", "dog")).logits(np.log([[0.3, 0.1, 0.4, 0.2]]))
        >>> np.exp(answer).round(3).tolist()
        [[0.5, 0.5]]
        """
        self._expect_known(teacher_logits)
        powers = _powers(teacher_logits[:, [pair.teacher for pair in self.pairs]])
        sums = np.zeros((len(powers), len(self.classes)))
        np.add.at(sums.T, [pair.student for pair in self.pairs], powers.T)
        shares = sums / powers.sum(axis=1, keepdims=True)
        return np.log(np.maximum(shares, _SMALLEST)).astype(np.float32)

    def unmapped(self, teacher_logits: np.ndarray) -> np.ndarray:
        """The probability in [0, 1], float64 [B], that the teacher gives to classes which go to none of the data's."""
        self._expect_known(teacher_logits)
        powers = _powers(teacher_logits)
        total = powers.sum(axis=1)
        powers[:, [pair.teacher for pair in self.pairs]] = 0
        return powers.sum(axis=1) / total

    def _expect_known(self, teacher_logits: np.ndarray) -> None:
        """Raise TeacherError for what is no [B, T], RecipeError for lines with a number that T does not reach."""
        if teacher_logits.ndim != 2 or teacher_logits.shape[1] != (self.teacher_classes or teacher_logits.shape[1]):
            raise TeacherError(
                f"expected the teacher's logits [images, {self.teacher_classes or 'classes'}] for the class map "
                f"{self.file}, got {list(teacher_logits.shape)}"
            )
        last = teacher_logits.shape[1] - 1
        beyond = sorted((pair.line, pair.teacher) for pair in self.pairs if pair.teacher > last)
        if beyond:
            faults = [f"line {line}: expected a teacher class from 0 to {last}, got {got}" for line, got in beyond]
            raise _refusal(self.file, faults)


@dataclass(frozen=True, eq=False)
class Mapped:
    """A teacher whose answers a class map has turned into answers about the data's classes."""

    teacher: Teacher
    class_map: ClassMap
    spec: TeacherSpec = field(init=False)

    def __post_init__(self) -> None:
        spec = self.teacher.spec
        both = hashlib.sha256(f"{spec.fingerprint} {self.class_map.fingerprint}".encode()).hexdigest()
        object.__setattr__(self, "spec", replace(spec, classes=self.class_map.classes, fingerprint=both))

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Log-probabilities, float32 [B, C]."""
        return self.class_map.logits(self.teacher.predict(images))


def read_class_map(file: Path, teacher_classes: Sequence[str] | None, classes: Sequence[str]) -> ClassMap:
    """Read lines of `teacher class<TAB>student class`; empty lines and those that begin with # are passed over.

    teacher_classes: their names; with None, the file has numbers from 0 in their place. classes: those of the data.
    Raises RecipeError with all faults of the file.
    """
    known = _Names("teacher class", teacher_classes), _Names("student class", classes)
    pairs: dict[int, Pair] = {}
    faults = []
    for line, text in _lines(file):
        try:
            pair = _pair(line, text, *known)
            if earlier := pairs.get(pair.teacher):
                raise ValueError(f"the same teacher class as line {earlier.line}, got {text!r}")
            pairs[pair.teacher] = pair
        except ValueError as error:
            faults.append(f"line {line}: {error}")
    if not pairs and not faults:
        faults = [f"expected at least one line {FORM}, got none"]
    if faults:
        raise _refusal(file, faults)
    count = None if teacher_classes is None else len(teacher_classes)
    # in one order, so that equal maps add in the same order
    return ClassMap(file, tuple(pairs[number] for number in sorted(pairs)), tuple(classes), count)


def _powers(logits: np.ndarray) -> np.ndarray:
    """exp(logits) up to a factor for each row; no overflow, and what is not finite stays so for the caller to see."""
    with np.errstate(invalid="ignore"):
        return np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        content = file.read_text("utf-8")
    except OSError as error:
        raise RecipeError(f"expected a class map, got {file}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: expected text in UTF-8, got another byte at {error.start}; save it so") from error
    for line, text in enumerate(content.split("\n"), start=1):
        if text.strip() and not text.startswith("#"):
            yield line, text


def _pair(line: int, text: str, teacher: _Names, student: _Names) -> Pair:
    parts = [part.strip() for part in text.split("\t")]
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"expected {FORM}, got {text!r}")
    return Pair(line, teacher.number(parts[0]), student.number(parts[1]))


class _Names:
    """The numbers of classes by their names; or, where there are no names, as they stand."""

    def __init__(self, what: str, names: Sequence[str] | None) -> None:
        self.what = what
        numbers: dict[str, list[int]] = {}
        for number, name in enumerate(names or ()):
            numbers.setdefault(name, []).append(number)
        self.numbers = None if names is None else numbers

    def number(self, text: str) -> int:
        """The number of a class. Raises ValueError for none or several."""
        if self.numbers is None:
            if not (text.isascii() and text.isdigit()):
                raise ValueError(f"expected the number of a {self.what}, which has no name, got {text!r}")
            return int(text)
        found = self.numbers.get(text, [])
        if not found:
            raise ValueError(f"unknown {self.what} {text!r}, {_hint(text, list(self.numbers))}")
        if len(found) > 1:
            raise ValueError(f"the {self.what} {text!r} is {len(found)} classes: {', '.join(map(str, found))}")
        return found[0]


def _hint(text: str, names: list[str]) -> str:
    hint = near(text, names)
    more = ", …" if len(names) > SHOWN else ""
    return hint if hint.startswith("did") else f"known: {', '.join(names[:SHOWN])}{more}"


def _refusal(file: Path, faults: list[str]) -> RecipeError:
    more = [f"… and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    head = f"{file}: {len(faults)} {'fault' if len(faults) == 1 else 'faults'}"
    return RecipeError("\n  ".join([head, *faults[:SHOWN], *more]))
