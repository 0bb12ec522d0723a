"""Names of many shards in one: pool-{000000..000499}.tar."""

from __future__ import annotations

import re

from braceexpand import braceexpand

from ssld.errors import RecipeError

_BRACES = re.compile(r"\\.|\{(?P<first>-?\d+)\.\.(?P<last>-?\d+)(\.\.-?\d+)?\}|[{},]")
_DEEPEST, _MOST = 20, 1_000_000


def expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for, in its order; raises RecipeError for braces that are none."""
    try:
        _check_count(pattern)
        return list(braceexpand(pattern))
    except ValueError as error:
        raise RecipeError(f"{pattern}: expected braces in pairs, as in pool-{{000000..000499}}.tar") from error


def _check_count(pattern: str) -> None:
    """Refuse braces that stand for more than any disk holds, which to write out would fill the memory.

    Raises ValueError for a range whose ends are no numbers to Python.
    """
    # for every open brace: the names of the alternatives before this one, and of this one
    counts = [[0, 1]]
    for token in _BRACES.finditer(pattern):
        if token["first"]:
            counts[-1][1] *= abs(int(token["last"]) - int(token["first"])) + 1
        elif token[0] == "{":
            counts.append([0, 1])
        elif token[0] == "," and len(counts) > 1:
            counts[-1] = [sum(counts[-1]), 1]
        elif token[0] == "}" and len(counts) > 1:
            inner = sum(counts.pop())
            counts[-1][1] *= inner
        if len(counts) > _DEEPEST or counts[-1][1] > _MOST:
            raise RecipeError(
                f"{pattern}: expected braces at most {_DEEPEST - 1} deep that name at most {_MOST:,} shards, got more; "
                "correct the range"
            )
