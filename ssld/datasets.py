"""A recipe's data: every source opened, and the classes on which all of them agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssld.data.samples import Samples, concatenate, same_classes
from ssld.data.sources import open_source
from ssld.errors import DataError, RecipeError
from ssld.recipe import Data, Recipe, Split
from ssld.wording import got

# a pool of millions loses a few images; more than one in a thousand is a broken source
POOL_DAMAGE = 1000
# what is left of the pool, and what is held out of it
POOL = ("unlabeled", "held out")
# images on which a teacher is measured, and compared with its student: enough for an interval of about ± 3 points,
# little enough to be done before the user has noticed; about so many of a pool are held out
COMPARED = 1000
LARGEST_SHARE = 1 / 32
# one split for all seeds of a recipe, so that they are measured on the same images
SPLIT_SEED = 0


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

    @property
    def held_out(self) -> Samples:
        """What no stage trains on: a part of the pool, or else the validation set."""
        return self.sources.get("held out", self.validation)

    @cached_property
    def checked(self) -> Samples:
        """What a teacher is measured on, in virtual shards."""
        return self.validation.limited(COMPARED).regrouped()

    @cached_property
    def compared(self) -> Samples:
        """What student and teacher are compared on, in virtual shards: a few images of each would be many of them."""
        return self.held_out.limited(COMPARED).regrouped()

    def named(self, names: tuple[str, ...]) -> Samples:
        """What a stage reads: one source, or several as one set."""
        parts = [self.sources[name] for name in names]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def damage_budget(self, names: tuple[str, ...]) -> int:
        """So many images of these sources may be unreadable: none that is labeled, one in a thousand of the pool."""
        return sum(
            -(-len(self.sources[name]) // POOL_DAMAGE) for name in POOL if name in names and name in self.sources
        )


def open_datasets(recipe: Recipe, limit: int | None, cache: Path | None) -> Datasets:
    """Index every source that the recipe names and agree on the classes. limit: so many images of each at most."""
    specs = {name: getattr(recipe.data, name) for name in Data.model_fields}
    sources = {
        name: opened(recipe, name, spec, cache)
        for name, spec in specs.items()
        if spec is not None and not isinstance(spec, Split)
    }
    if isinstance(recipe.data.validation, Split) and "labeled" in sources:
        rest, held_out = sources["labeled"].split(recipe.data.validation.split, SPLIT_SEED)
        sources |= {"labeled": rest, "validation": held_out}
    if "validation" not in sources:
        raise RecipeError(
            f"{recipe.place(('data',))}: expected a labeled validation set, got none; add data.validation: SOURCE, or "
            f"{{split: 0.1}} to hold back a tenth of the labeled set"
        )
    classes = class_names(sources)
    if limit is not None:
        sources = {name: samples.limited(limit) for name, samples in sources.items()}
    if "unlabeled" in sources and any(stage.taught_by for stage in recipe.stages.values()):
        rest, held_out = sources["unlabeled"].hold_out(held_out_share(len(sources["unlabeled"])))
        sources |= {"unlabeled": rest, "held out": held_out} if len(held_out) else {}
    return Datasets(sources, classes)


def opened(recipe: Recipe, name: str, spec: str | Mapping[str, Any], cache: Path | None) -> Samples:
    """Index one source. What is wrong with it is raised with the place where the recipe has it."""
    place = recipe.place(("data", name))
    try:
        return open_source(spec, labeled=name != "unlabeled", cache=cache)
    except RecipeError as error:
        source, _, fault = str(error).partition(": expected ")
        raise RecipeError(f"{place}: {got(source)}: expected {fault}") from error
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def held_out_share(images: int) -> float:
    """A power of two, so that it changes, and with it the choice, only when a pool has doubled.

    >>> held_out_share(1_000), held_out_share(1_000_000)
    (0.03125, 0.0009765625)
    """
    share = LARGEST_SHARE
    while share * images > COMPARED:
        share /= 2
    return share


def numbered_classes(sources: Mapping[str, Samples], labels: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """0, 1, 2, … where no source names its classes. Raises DataError for a number that no image has: a slip, mostly."""
    name = max(labels, key=lambda name: int(labels[name].max()))
    seen = np.unique(np.concatenate(list(labels.values())))
    gaps = np.flatnonzero(seen != np.arange(len(seen)))
    if len(gaps):
        raise DataError(
            f"data.{name}: expected labels without gaps, got {seen[-1]} for "
            f"{sources[name].where(int(labels[name].argmax()))} and none for {gaps[0]}; correct the label, or name "
            f"the classes of the sources by classes: FILE"
        )
    return tuple(str(label) for label in range(len(seen)))


def class_names(sources: Mapping[str, Samples]) -> tuple[str, ...]:
    """The class names on which all labeled sources agree; numbers as text where no source names them."""
    labels = {name: samples.labels for name, samples in sources.items() if samples.labels is not None}
    named = {name: classes for name in labels if (classes := sources[name].classes) is not None}
    if named:
        first, classes = next(iter(named.items()))
        for name, other in named.items():
            same_classes(classes, other, f"data.{first}", f"data.{name}")
    else:
        classes = numbered_classes(sources, labels)
    for name, column in labels.items():
        beyond = np.flatnonzero(column >= len(classes))
        if len(beyond):
            raise DataError(
                f"data.{name}: expected labels from 0 to {len(classes) - 1}, got {column[beyond[0]]} for "
                f"{sources[name].where(int(beyond[0]))}; correct the label, or name the classes of all sources"
            )
    return classes
