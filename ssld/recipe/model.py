"""What a recipe may say: its keys and their types, the frozen Recipe, and the JSON schema for editors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic.json_schema import models_json_schema

from ssld import plugins
from ssld.data.transforms import Operator, read_operators
from ssld.recipe.tree import Tree
from ssld.settings import Frozen, TrainingSettings, Words
from ssld.wording import KeyPath, dotted

NAME = r"^[a-z0-9_-]+$"
"""Names of recipes and stages; both become names of directories."""

Operators = Annotated[
    tuple[Operator, ...], BeforeValidator(read_operators, json_schema_input_type=list[str | dict[str, Any]])
]


class Images(Frozen):
    """How images are prepared; the defaults are PaddleClas's for ImageNet."""

    resolution: Annotated[int, Field(ge=8, le=4096)] = 224
    """Side of the student's input in pixels."""
    train: Operators = Field(default=["RandCropImage", "RandFlipImage", "NormalizeImage"], validate_default=True)
    """Operators of a training view, in order."""
    eval: Operators = Field(default=["ResizeImage", "CropImage", "NormalizeImage"], validate_default=True)
    """Operators at test time, in order."""


class Keys(Frozen):
    """A source as a mapping: exactly one of folder, list, shards and builtin, and what goes with it."""

    folder: Words | None = None
    """A folder of images, with one sub-folder per class where labels are read."""
    list: Words | None = None
    """A text file of PaddleClas, one `path label` per line."""
    shards: Words | None = None
    """Webdataset shards: pool-{000000..000499}.tar."""
    builtin: Words | None = None
    """Embedded images: digits?part=pool."""
    root: Words | None = None
    """The folder that the paths of `list` start from; the list's own when left out."""
    classes: Words | None = None
    """A text file of the class names of `list` or `shards`, one per line, in label order."""

    @model_validator(mode="after")
    def _one_way(self) -> Keys:
        ways = [way for way in ("folder", "list", "shards", "builtin") if getattr(self, way) is not None]
        if len(ways) != 1:
            found = ", ".join(ways) or "none of them"
            raise ValueError(f"expected exactly one of folder, list, shards and builtin, got {found}")
        if self.root is not None and self.list is None:
            raise ValueError(f"expected root only beside list, got it beside {ways[0]}")
        if self.classes is not None and self.list is None and self.shards is None:
            raise ValueError(f"expected classes only beside list or shards, got it beside {ways[0]}")
        return self


class Split(Frozen):
    """The validation set as a part of the labeled one."""

    split: Annotated[float, Field(gt=0, lt=1)]
    """Share of the labeled images, per class, that is held out."""


def _text_or_keys(value: object) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(keys)" if isinstance(value, dict) else None


def _or_split(value: object) -> str | None:
    return "(split)" if isinstance(value, dict) and "split" in value else _text_or_keys(value)


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if isinstance(value, Keys) else value


_Text = Annotated[Words, Tag("(text)")]
_Keys = Annotated[Keys, Tag("(keys)")]
Source = Annotated[Annotated[_Text | _Keys, Discriminator(_text_or_keys)], AfterValidator(_plain)]
SourceOrSplit = Annotated[
    Annotated[_Text | _Keys | Annotated[Split, Tag("(split)")], Discriminator(_or_split)], AfterValidator(_plain)
]


class Data(Frozen):
    """The sources, as text or as a plain mapping of the keys given."""

    unlabeled: Source | None = None
    """The pool; labels are never read."""
    labeled: Source | None = None
    """The labeled training images."""
    validation: SourceOrSplit | None = None
    """What every choice is made on; {split: 0.1} takes it out of the labeled images."""
    test: Source | None = None
    """Looked at once, at the end; never used to choose anything."""


class Keyed(Frozen):
    """A recipe's keys; the stages are still plain, since each kind has a model of its own."""

    name: Annotated[str, Field(pattern=NAME)]
    """Name of the recipe, and of its runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    images: Images = Field(default_factory=Images)
    data: Data = Field(default_factory=Data)
    stages: Annotated[dict[str, Any], Field(min_length=1)]
    """The stages by name, in the order in which they are listed."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and found without fault.

    stages: in the recipe's order, each an instance of its kind's own settings model.
    tree: the merged plain values as they were written, and the place of each key.
    """

    name: str
    seed: int
    images: Images
    data: Data
    stages: Mapping[str, TrainingSettings]
    tree: Tree = field(compare=False, repr=False)

    def place(self, path: KeyPath) -> str:
        """Where a key is written, as in "recipe.yaml:6:5: stages.distill.epochs"."""
        return f"{self.tree.place(path)}: {dotted(path)}"


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, for editors, with all installed stage kinds."""
    kinds = {
        name: plugins.stage_kind(name).settings for name in sorted({found.name for found in plugins.find("stages")})
    }
    models: list[type[BaseModel]] = [Keyed, *dict.fromkeys(kinds.values())]
    references, definitions = models_json_schema([(model, "validation") for model in models])
    by_model = {model: references[model, "validation"] for model in models}
    whole = definitions["$defs"].pop(by_model[Keyed]["$ref"].removeprefix("#/$defs/"))
    whole["properties"]["stages"] |= {
        "propertyNames": {"pattern": NAME},
        "additionalProperties": _stage_schema({name: by_model[model] for name, model in kinds.items()}),
    }
    whole["properties"]["extends"] = {"type": "string", "description": "The recipe that this one builds on."}
    # a recipe that extends another may leave out what the other holds
    whole["anyOf"] = [{"required": whole.pop("required")}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, **definitions}


def _stage_schema(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a stage, which depend on its kind."""
    choices = [
        {"if": {"properties": {"kind": {"const": name}}, "required": ["kind"]}, "then": reference}
        for name, reference in kinds.items()
    ]
    return {"type": "object", "properties": {"kind": {"enum": list(kinds)}}, "allOf": choices}
