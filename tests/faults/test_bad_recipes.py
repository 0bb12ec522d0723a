"""Whatever is wrong with a recipe: exit 2, one message that names file, line and key, no traceback, nothing written.

Every recipe here is made from a good one by one change that is known to be wrong from how it was made, never from what
the product says of it. Where each key stands is read from the text by PyYAML's own nodes.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from ssld import engine
from ssld.cli import main
from ssld.data.pack import pack
from ssld.data.sources import open_source
from ssld.recipe import schema

SHIPPED = Path(__file__).parents[2] / "recipes"
NORMAL, LONG = 600, 10_000
SECONDS = 5.0
"""Of processor time that one recipe may take; the usual is a hundredth of it."""
LONGEST = 2_500
"""Characters of one line of a message; the list of all networks is the longest."""

KeyPath = tuple[str | int, ...]

EVERY_KEY = """\
name: every_key
seed: 7
images:
  resolution: 32
  train:
    - RandCropImage: {size: 32, scale: [0.5, 1.0], ratio: [0.8, 1.25], interpolation: bicubic}
    - RandFlipImage: {flip_code: 1}
    - NormalizeImage: {scale: 1.0/255.0, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}
  eval:
    - ResizeImage: {resize_short: 36, interpolation: lanczos}
    - CropImage: {size: [32, 32]}
    - NormalizeImage: {scale: 0.00392156862745098, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}
data:
  unlabeled: {shards: "shards/shard-{000000..000001}.tar", classes: classes.txt}
  labeled: {list: list.txt, root: photos, classes: classes.txt}
  validation: {split: 0.25}
  test: {folder: photos}
stages:
  teach: {kind: pretrain, network: {name: ResNet18_vd, stem_stride: 1}, data: labeled, epochs: 2, resolution: 32}
  distill:
    kind: distill
    student: {name: MobileNetV3_small_x0_35, stem_stride: 1}
    data: [unlabeled, labeled]
    teacher:
      - {stage: teach, precision: bfloat16, weight: 2.0}
      - {network: {name: ResNet18_vd, stem_stride: 1}, weights: net.safetensors, class_map: map.txt}
      - {onnx: net.onnx, size: 32}
      - {plugin: onnx, file: net.onnx}
    loss: {name: kl, weight: 0.5, temperature: 2.0}
    labels: {views: 4, top_k: 2, temperature: 2.0, seed: 5, store: kept}
    epochs: 4
    batch_size: 8
    learning_rate: 0.1
    warmup_epochs: 1.5
    momentum: 0.8
    weight_decay: 0.0001
    clip_norm: 5.0
    resolution: 32
    eval_interval: 2
    save_interval: 1
    save_steps: 3
    keep_last: 3
  finetune: {kind: finetune, from: distill, teacher: {stage: teach}, data: labeled, epochs: 2, hard: 0.5}
  alone: {kind: finetune, from: distill, data: labeled, epochs: 2, hard: 1.0, smoothing: 0.1, labels: online}
  fixres: {kind: fixres, from: finetune, data: labeled, epochs: 1, resolution: 48, adapt_bn: true}
  more: {kind: pretrain, network: ResNet18_vd, from: net.safetensors, data: labeled, epochs: 1}
"""


class Mutant(NamedTuple):
    """A recipe that is wrong.

    paths: the keys that the message may name, any of them; lines: where it may stand, where no key can be named; none
    of both: the file alone.
    """

    text: str
    paths: tuple[KeyPath, ...] = ()
    lines: tuple[int, ...] = ()


Mutation = Callable[[np.random.Generator, dict[str, Any]], Mutant | None]
"""From a good recipe to a wrong one; None where it cannot be made wrong in this way."""


# What is good ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory, with all that the recipes name."""
    here = tmp_path_factory.mktemp("recipes")
    for name, label in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "two")):
        (here / "photos" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "teal").save(here / "photos" / label / f"{name}.png")
    (here / "list.txt").write_text("one/a.png 0\none/b.png 0\ntwo/c.png 1\ntwo/d.png 1\n")
    (here / "classes.txt").write_text("one\ntwo\n")
    (here / "map.txt").write_text("one\tone\ntwo\ttwo\n")
    for name in ("net.safetensors", "net.onnx"):
        (here / name).write_bytes(b"not read by a plan")
    pack(open_source(str(here / "photos"), labeled=False), here / "shards", shard_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield here


def bases() -> dict[str, dict[str, Any]]:
    """Good recipes by name: every shipped one that stands by itself, on data and weights that are at hand, and one
    that uses every key.
    """
    shipped = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(SHIPPED.rglob("*.yaml"))}
    found = {name: recipe for name, recipe in shipped.items() if "extends" not in recipe}
    for recipe in found.values():
        for number, source in enumerate(recipe["data"]):
            if not str(recipe["data"][source]).startswith("builtin:"):
                recipe["data"][source] = f"builtin:shapes?count=40&size=16&seed={number}"
        for stage in recipe["stages"].values():
            if "weights" in stage.get("teacher", {}):
                stage["teacher"]["weights"] = "net.safetensors"
    return found | {"every_key": yaml.safe_load(EVERY_KEY)}


BASES = bases()


def dump(tree: Any, rng: np.random.Generator) -> str:
    """The tree as text, in one of several layouts, so that a key stands now here, now there."""
    head = "# a comment\n" * int(rng.integers(3))
    flow = (None, False, True)[int(rng.integers(3))]
    width, indent = int(rng.integers(40, 200)), int(rng.integers(2, 5))
    return head + yaml.safe_dump(tree, sort_keys=False, default_flow_style=flow, width=width, indent=indent)


# What the product must do ---------------------------------------------------------------------------------------------


class Accepted(Exception):
    """The run would have begun."""


class Answer(NamedTuple):
    """What `ssld run` ended with; raised: what nobody caught."""

    code: int
    out: str
    err: str
    raised: BaseException | None = None


Ask = Callable[[bytes], Answer]
"""Give a recipe, as r.yaml in the folder, to `ssld run`."""


@pytest.fixture
def ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """In this process; it ends where the work would begin."""

    def begin(*_: object, **__: object) -> None:
        raise Accepted

    monkeypatch.setattr(engine.Runner, "run", begin)
    return lambda text: asked(folder, text)


def asked(folder: Path, text: bytes) -> Answer:
    (folder / "r.yaml").write_bytes(text)
    result = CliRunner().invoke(main, ["run", "r.yaml"])
    raised = None if isinstance(result.exception, SystemExit) else result.exception
    return Answer(result.exit_code, result.stdout, result.stderr, raised)


def written(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def dotted(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def places(text: str) -> dict[KeyPath, tuple[int, int]]:
    """Line and column of every key and item, as PyYAML's nodes have them."""
    found: dict[KeyPath, tuple[int, int]] = {(): (1, 1)}

    def note(path: KeyPath, node: yaml.Node) -> None:
        found.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))

    def walk(node: yaml.Node, path: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                note((*path, key.value), key)
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                note((*path, number), item)
                walk(item, (*path, number))

    walk(yaml.compose(text, yaml.SafeLoader), ())
    return found


LINE = re.compile(r"r\.yaml(?::(?P<line>\d+)(?::(?P<column>\d+))?)?: (?P<rest>.+)")
SAID = re.compile(
    r"expected .+, got|expected .+|unknown key|unknown \w+|required key is missing|given twice, first at line|"
    r"(aliases|anchors|tags) are not read|not YAML: |wait for each other"
)


def complaints(answer: Answer, mutant: Mutant) -> list[str]:
    """In what the answer falls short of the promise; empty where it keeps it."""
    if isinstance(answer.raised, Accepted):
        return ["it was accepted"]
    if answer.code != 2 or answer.raised is not None:
        return [f"exit code {answer.code}, {answer.raised!r}"]
    if answer.out or "Traceback" in answer.err or not answer.err.startswith("Error: "):
        return [f"expected one message alone, got {answer.out!r} and {answer.err[:300]!r}"]
    header, *more = answer.err.removeprefix("Error: ").removesuffix("\n").split("\n")
    counted = re.fullmatch(r"r\.yaml: (\d+) faults", header)
    lines = more if counted else [header, *more]
    problems = [] if len(lines) == (int(counted[1]) if counted else 1) else [f"{len(lines)} lines after {header!r}"]
    for line in lines:
        if not (LINE.match(line) and SAID.search(line) and line.isprintable() and len(line) <= LONGEST):
            problems.append(f"a line of {len(line)} characters that is no fault: {line[:300]!r}")
    return problems or misplaced(lines, mutant)


def misplaced(lines: list[str], mutant: Mutant) -> list[str]:
    """Whether a line names a key that is wrong, at the place where it stands."""
    if mutant.paths:
        where = places(mutant.text)
        heads = set()
        for path in mutant.paths:
            nearest = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in where)
            heads.add("r.yaml:{}:{}: ".format(*where[nearest]) + f"{dotted(path)}: ")
        return [] if any(line.startswith(tuple(heads)) for line in lines) else [f"expected one of {sorted(heads)}"]
    if mutant.lines:
        found = {int(match["line"] or 0) for line in lines if (match := LINE.match(line))}
        return [] if found & set(mutant.lines) else [f"expected line {mutant.lines}, got {sorted(found)}"]
    return []


# Values ---------------------------------------------------------------------------------------------------------------

TEXT = "some text"


class Key(NamedTuple):
    """What a key may hold.

    wrong: values of the wrong type; outside: values of the right type that are out of range.
    """

    wrong: tuple[Any, ...]
    outside: tuple[Any, ...] = ()


NAN, INF = float("nan"), float("inf")
HUGE = 10**400
NO_NUMBER = (TEXT, "3", True, [3], {"a": 3}, NAN, INF, -INF, HUGE)


def whole(low: int, high: int | None = None) -> Key:
    outside = (low - 1, -(10**30), *(() if high is None else (high + 1, 10**30)))
    return Key((*NO_NUMBER, 2.5), outside)


def number(*outside: float) -> Key:
    return Key(NO_NUMBER, (*outside, -1e300))


WORD = Key((3, 2.5, True, [TEXT], {"a": 3}, NAN))
FLAG = Key((0, 1, "yes", "true", [True], {"a": True}, NAN))
KEYS: dict[tuple[str | int, ...], Key] = {
    ("seed",): whole(0, 2**63 - 1),
    ("name",): Key((3, True, [TEXT], None, NAN), ("", "Big", "a b", "a/b", "..", "é", "a" * 5000 + "!")),
    ("images", "resolution"): whole(8, 4096),
    ("data", "*", "folder"): WORD,
    ("data", "*", "list"): WORD,
    ("data", "*", "shards"): WORD,
    ("data", "*", "root"): WORD,
    ("data", "*", "classes"): WORD,
    ("data", "validation", "split"): number(0, 1, 1.5),
    ("stages", "*", "kind"): Key((3, True, [TEXT], None, NAN), ("", "Distill", "train", "a" * 5000)),
    ("stages", "*", "epochs"): whole(1),
    ("stages", "*", "batch_size"): whole(2),
    ("stages", "*", "learning_rate"): number(0),
    ("stages", "*", "warmup_epochs"): number(-0.1),
    ("stages", "*", "momentum"): number(-0.1, 1, 2),
    ("stages", "*", "weight_decay"): number(-1e-9),
    ("stages", "*", "clip_norm"): number(0),
    ("stages", "*", "resolution"): whole(8, 4096),
    ("stages", "*", "eval_interval"): whole(1),
    ("stages", "*", "save_interval"): whole(0),
    ("stages", "*", "save_steps"): whole(1),
    ("stages", "*", "keep_last"): whole(1),
    ("stages", "*", "hard"): number(-0.1, 1.1),
    ("stages", "*", "smoothing"): number(-0.1, 1),
    ("stages", "*", "adapt_bn"): FLAG,
    ("stages", "*", "from"): WORD,
    ("stages", "*", "labels"): Key((3, True, ["online"], NAN), ("offline", "")),
    ("stages", "*", "labels", "views"): whole(1, 10_000),
    ("stages", "*", "labels", "top_k"): whole(1),
    ("stages", "*", "labels", "temperature"): number(0),
    ("stages", "*", "labels", "seed"): whole(0, 2**63 - 1),
    ("stages", "*", "labels", "store"): WORD,
    ("stages", "*", "student", "name"): WORD,
    ("stages", "*", "network", "name"): WORD,
    ("stages", "*", "loss", "name"): WORD,
    ("stages", "*", "loss", "weight"): number(0),
    ("stages", "*", "teacher", "*", "weight"): number(0),
    ("stages", "*", "teacher", "*", "precision"): Key((16, True, ["float32"], NAN), ("float16", "")),
    ("stages", "*", "teacher", "*", "class_map"): WORD,
    ("stages", "*", "teacher", "*", "stage"): WORD,
    ("stages", "*", "teacher", "*", "onnx"): WORD,
    ("stages", "*", "teacher", "*", "plugin"): WORD,
    ("stages", "*", "teacher", "stage"): WORD,
}


def leaves(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every key and item, from the outside to the inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from leaves(item, (*path, key))


def known(path: KeyPath) -> Key | None:
    fits = (len(p) == len(path) and all(a in ("*", b) for a, b in zip(p, path, strict=True)) for p in KEYS)
    return next((key for key, fit in zip(KEYS.values(), fits, strict=True) if fit), None)


def at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def with_value(tree: Any, path: KeyPath, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    at(tree, path[:-1])[path[-1]] = value
    return tree


def pick(rng: np.random.Generator, items: Any) -> Any:
    """One of the items, None where there is none."""
    items = list(items)
    return items[int(rng.integers(len(items)))] if items else None


def typed(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    path = pick(rng, filter(known, leaves(tree)))
    return Mutant(dump(with_value(tree, path, pick(rng, known(path).wrong)), rng), (path,))


def ranged(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    path = pick(rng, (path for path in leaves(tree) if (key := known(path)) and key.outside))
    return Mutant(dump(with_value(tree, path, pick(rng, known(path).outside)), rng), (path,))


# Keys and nesting -----------------------------------------------------------------------------------------------------

OPEN = {"student", "network", "loss", "teacher", "train", "eval"}
"""Below these, a plug-in or an operator says what it takes."""
REQUIRED = {"pretrain": {"network"}, "distill": {"teacher"}, "finetune": {"from"}, "fixres": {"from"}}
STRANGE = ("epoch", "lr", "batchsize", "Name", "sead", "2", "on", "x", "labels_", "adapt-bn", "a" * 60)


def closed(tree: dict[str, Any]) -> list[KeyPath]:
    """The mappings whose keys are all fixed; `stages` itself takes any name."""
    paths = [(), *(path for path in leaves(tree) if isinstance(at(tree, path), dict) and path != ("stages",))]
    return [path for path in paths if not OPEN & set(path)]


def misspelt(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    """One letter more, less, or changed: no key of a recipe is so near another."""
    path = pick(rng, closed(tree))
    key = pick(rng, at(tree, path))
    place = int(rng.integers(len(key)))
    new = pick(
        rng, (key[:place] + key[place + 1 :], key[:place] + "q" + key[place:], key[:place] + "Q" + key[place + 1 :])
    )
    if new in at(tree, path) or not new or (path == () and key == "stages"):
        return None
    renamed = {new if other == key else other: value for other, value in at(tree, path).items()}
    made = with_value(tree, path, renamed) if path else renamed
    return Mutant(dump(made, rng), ((*path, new), (*path, key), path))


def added(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    path, key = pick(rng, closed(tree)), pick(rng, STRANGE)
    made = with_value(tree, (*path, key), pick(rng, (3, None, TEXT, [1], {"a": 1})))
    # of a source, that it has two kinds or none comes first
    return Mutant(dump(made, rng), ((*path, key),))


def foreign(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    """A key that another kind of stage has."""
    stage = pick(rng, tree["stages"])
    kind = tree["stages"][stage]["kind"]
    keys = {"hard": "finetune", "adapt_bn": "fixres", "network": "pretrain"}
    key = pick(rng, (key for key, owner in keys.items() if owner != kind))
    value = {"hard": 0.5, "adapt_bn": True, "network": "ResNet18_vd"}[key]
    path = ("stages", stage, key)
    return Mutant(dump(with_value(tree, path, value), rng), (path,))


def missing(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    needed: list[KeyPath] = [("name",), ("stages",)]
    for name, stage in tree["stages"].items():
        needed += [("stages", name, key) for key in ("kind", "data", "epochs", *REQUIRED[stage["kind"]])]
    path = pick(rng, needed)
    made = copy.deepcopy(tree)
    del at(made, path[:-1])[path[-1]]
    return Mutant(dump(made, rng), (path, path[:-1]) if path[:-1] else (path,))


def sectioned(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """A section that is no section."""
    stage = pick(rng, tree["stages"])
    path = pick(rng, [(), ("images",), ("data",), ("stages",), ("stages", stage)])
    value = pick(rng, (3, TEXT, True, [], [{"a": 1}], NAN))
    if not path:
        return Mutant(yaml.safe_dump(value), lines=(1,))
    return Mutant(dump(with_value(tree, path, value), rng), (path,))


def nested(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """A value one level too deep."""
    path = pick(rng, (p for p in leaves(tree) if known(p) and known(p) is not KEYS["stages", "*", "labels"]))
    value = at(tree, path)
    return Mutant(dump(with_value(tree, path, pick(rng, ([value], {"value": value}, {path[-1]: value}))), rng), (path,))


def unnested(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """The keys of a stage one level too high: each is taken for a stage."""
    stage = pick(rng, tree["stages"])
    made = copy.deepcopy(tree)
    inner = made["stages"].pop(stage)
    made["stages"] |= inner
    return Mutant(dump(made, rng), (("stages", "kind"),))


def named(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """A stage whose name can be no directory; the text stays plain, so that its line is where it is looked for."""
    stage = pick(rng, tree["stages"])
    new = pick(rng, ("Teach", "a b", "a/b", "..", "é", "a.b", "#"))
    made = copy.deepcopy(tree)
    made["stages"] = {new if name == stage else name: value for name, value in made["stages"].items()}
    text = dump(made, rng)
    return Mutant(text, lines=(places(text)["stages", new][0],))


# What refers to something ---------------------------------------------------------------------------------------------


def stage_of(rng: np.random.Generator, tree: dict[str, Any], *kinds: str) -> str | None:
    return pick(rng, (name for name, stage in tree["stages"].items() if not kinds or stage["kind"] in kinds))


def referring(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    """A stage that is not there, is the stage itself, or comes after it."""
    stage = stage_of(rng, tree, "distill", "finetune", "fixres")
    if stage is None:
        return None
    key = pick(rng, [key for key in ("from", "teacher") if key in tree["stages"][stage]] or ["from"])
    follower = pick(rng, (name for name, other in tree["stages"].items() if other.get("from") == stage))
    to = pick(rng, ("nowhere", "Teach", "a b", stage, follower or "nowhere"))
    made = with_value(tree, ("stages", stage, key), {"stage": to} if key == "teacher" else to)
    return Mutant(dump(made, rng), (("stages", stage), *([("stages", follower)] if follower else [])))


def referring_far(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    """To a stage with a name of 3,000 characters."""
    stage = stage_of(rng, tree, "finetune", "fixres")
    if stage is None:
        return None
    return Mutant(dump(with_value(tree, ("stages", stage, "from"), "a" * 3000), rng), (("stages", stage),))


def emptied(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """Text that says nothing where a source is to be named."""
    ends = {"folder", "list", "shards", "builtin", "root", "classes"}
    paths = [
        path for path in leaves(tree) if path[0] == "data" and (path[-1] in ends or isinstance(at(tree, path), str))
    ]
    path = pick(rng, paths)
    return Mutant(dump(with_value(tree, path, ""), rng), (path,))


def unnamed(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    """Text that says nothing where a stage, a file or a plug-in is to be named."""
    ends = {"from", "stage", "onnx", "weights", "class_map", "plugin", "store"}
    path = pick(rng, (path for path in leaves(tree) if path[-1] in ends and path[0] == "stages"))
    return Mutant(dump(with_value(tree, path, ""), rng), (path, path[:-1], path[:2]))


def unsourced(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    """Sources that are not there, or not for training, or without the labels that the stage reads."""
    stage = pick(rng, tree["stages"])
    kind = tree["stages"][stage]["kind"]
    choices: list[Any] = ["nowhere", "validation", "test", "", ["labeled", "pool"], [], [["labeled"]], [3], 3, None, {}]
    value = pick(rng, choices if kind == "distill" else [*choices, "unlabeled", ["labeled", "unlabeled"]])
    path = ("stages", stage, "data")
    return Mutant(dump(with_value(tree, path, value), rng), (path, (*path, 0)))


def lacking(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """A source that stages read is taken away."""
    source = pick(rng, (source for source in ("unlabeled", "labeled", "validation") if source in tree["data"]))
    made = copy.deepcopy(tree)
    del made["data"][source]
    readers = [name for name, stage in tree["stages"].items() if source in stage["data"]]
    split = [("data", "validation")] if source == "labeled" else []
    whole_set = [("data",)] if source == "validation" else []
    return Mutant(dump(made, rng), (*(("stages", name, "data") for name in readers), *split, *whole_set))


BAD_TEACHERS: tuple[Any, ...] = (
    {}, [], 3, "teach", True, {"network": "ResNet18_vd"}, {"network": "ResNet18_vd", "weights": 3}, {"weight": 1}, [{}],
    {"stage": "teach", "network": "ResNet18_vd", "weights": "net.safetensors"}, {"stage": "teach", "size": 3},
    {"onnx": "net.onnx", "precision": "bfloat16"}, {"onnx": "a", "plugin": "b"}, {"stage": None}, {"plugin": "oracle"},
    {"network": "ResNet18_vd", "weights": "nowhere.safetensors"}, {"onnx": "nowhere.onnx"}, ["teach"],
    {"network": "ResNet", "weights": "net.safetensors"}, {"onnx": "net.onnx", "class_map": "nowhere.txt"},
)  # fmt: skip


def untaught(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    stage = stage_of(rng, tree, "distill")
    if stage is None:
        return None
    value = pick(rng, BAD_TEACHERS)
    path = ("stages", stage, "teacher")
    return Mutant(dump(with_value(tree, path, value), rng), (path, (*path, 0), (*path, "weights"), path[:-1]))


def contradicting(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    """Keys that are good alone and not together, in one stage."""
    stage = pick(rng, tree["stages"])
    kind = tree["stages"][stage]["kind"]
    epochs = tree["stages"][stage]["epochs"]
    choices: list[dict[str, Any]] = [{"warmup_epochs": epochs + 0.5}]
    if kind == "finetune":
        choices += [{"hard": 1.0, "teacher": {"onnx": "net.onnx"}}, {"hard": 0.5, "teacher": None}]
    if kind == "fixres":
        choices += [{"resolution": 8}]
    if kind in ("finetune", "fixres"):
        choices += [{"student": "ResNet34_vd"}]
    if kind == "distill":
        choices += [{"loss": {"name": "kl", "temperature": 9}, "labels": {"views": 1, "top_k": 1}}, {"student": None}]
    made = copy.deepcopy(tree)
    made["stages"][stage] |= pick(rng, choices)
    return Mutant(dump(made, rng), (("stages", stage), ("stages", stage, "student")))


def unplugged(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """A plug-in that is not installed."""
    stage = pick(rng, tree["stages"])
    kind = tree["stages"][stage]["kind"]
    keys = (
        {"kind"}
        | ({"network"} if kind == "pretrain" else set())
        | ({"loss", "student"} if kind == "distill" else set())
    )
    key = pick(rng, sorted(keys))
    path = ("stages", stage, key)
    return Mutant(
        dump(with_value(tree, path, pick(rng, ("jss", "ResNet", "", "a" * 4000, "a:b", "../x"))), rng), (path,)
    )


# Operators ------------------------------------------------------------------------------------------------------------

BAD_OPERATORS: tuple[Any, ...] = (
    3, "CropImage", {"CropImage": {}}, None, [3], [None], [[]], [""], ["Crop"], ["cropimage"], ["MixupOperator"],
    ["CutMix"], [{}], [{"CropImage": 3}], [{"CropImage": ["size"]}], [{"CropImage": {}, "RandFlipImage": {}}],
    [{"CropImage": {"sise": 32}}, "NormalizeImage"], [{"CropImage": {"size": 0}}], [{"CropImage": {"size": "32"}}],
    [{"CropImage": {"size": [32]}}], [{"CropImage": {"size": True}}], [{"CropImage": {"size": 2.5}}],
    [{"ResizeImage": {"size": 32, "resize_short": 32}}], [{"ResizeImage": {"interpolation": "cubic"}}, "CropImage"],
    [{"ResizeImage": {"resize_short": -1}}, "CropImage"], [{"ResizeImage": {"resize_short": NAN}}, "CropImage"],
    [{"RandCropImage": {"scale": [1.0, 0.5]}}], [{"RandCropImage": {"scale": [0, 1]}}],
    [{"RandCropImage": {"scale": 0.5}}], [{"RandCropImage": {"scale": [0.5, 1.5]}}],
    [{"RandCropImage": {"ratio": [0.5]}}], [{"RandCropImage": {"ratio": [-1, 1]}}], [{"RandCropImage": {"ratio": [1,
    INF]}}], ["RandCropImage", {"RandFlipImage": {"flip_code": 2}}], ["RandCropImage",
    {"RandFlipImage": {"flip_code": "1"}}], ["RandCropImage", {"NormalizeImage": {"scale": "1/0"}}], ["RandCropImage",
    {"NormalizeImage": {"scale": 0}}], ["RandCropImage", {"NormalizeImage": {"std": [0, 1, 1]}}], ["RandCropImage",
    {"NormalizeImage": {"mean": [0.5]}}], ["RandCropImage", {"NormalizeImage": {"mean": [NAN, 0, 0]}}],
    ["NormalizeImage", "RandCropImage"], ["RandCropImage", "NormalizeImage", "NormalizeImage"], ["CropImage",
    "RandCropImage"], ["RandCropImage", "RandCropImage"], ["ResizeImage"], ["RandFlipImage"], [],
    [{"CropImage": {"size": 9}}], [{"ResizeImage": {"resize_short": 9}}, "CropImage"], ["NormalizeImage"],
)  # fmt: skip
"""Of another form, name, argument, range or order; or they end at another size than any resolution here."""


IMMENSE: tuple[Any, ...] = (
    [{"CropImage": {"size": 2**31}}], [{"CropImage": {"size": 10**39}}], [{"RandCropImage": {"size": [2**63, 1]}}],
    [{"ResizeImage": {"resize_short": 10**10}}, "CropImage"], [{"ResizeImage": {"size": [2**31, 2**31]}}, "CropImage"],
)  # fmt: skip
"""Sizes of images that no memory holds, and that fail before they try to."""


def immense(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    return operators(rng, tree, IMMENSE)


def operators(rng: np.random.Generator, tree: dict[str, Any], choices: tuple[Any, ...] = BAD_OPERATORS) -> Mutant:
    part = pick(rng, ("train", "eval"))
    made = copy.deepcopy(tree)
    made.setdefault("images", {})[part] = pick(rng, choices)
    return Mutant(dump(made, rng), (("images", part),))


# Sources --------------------------------------------------------------------------------------------------------------

BAD_SOURCES: tuple[Any, ...] = (
    3, True, [], ["photos"], {}, {"root": "photos"}, {"folder": "photos", "list": "list.txt"}, {"folder": "photos",
    "rot": "x"}, {"folder": "photos", "root": "x"}, {"builtin": "digits?part=pool", "classes": "classes.txt"},
    {"folder": ["photos"]}, {"shards": 3}, {"list": None}, {"folder": "photos", "classes": "classes.txt"},
    {"lists": "list.txt"}, NAN,
)  # fmt: skip
BAD_PLACES = (
    "http://host/x.tar", "https://host/{000..009}.tar", "s3://bucket/train", "gs://b/x", "hdfs:x", "pipe:cat x",
    "file:///x", "hf://datasets/x", "builtin:", "builtin:shape", "builtin:digits", "builtin:digits?part=all",
    "builtin:digits?prt=pool", "builtin:digits?part", "builtin:shapes?count=x", "builtin:shapes?count=0",
    "builtin:shapes?size=-1", "a{b.tar", "{000001..000003.tar",
    "builtin:shapes?count=" + "9" * 5000, "{0..999999999}.tar", "{0..99}" * 9 + ".tar", "{a,b,c,d}" * 20 + ".tar",
    "{a," * 50 + "}" * 50 + ".tar", "pipe:" + "x" * 3000, "x" * 3000 + ":", "{0.." + "9" * 5000 + "}.tar",
)  # fmt: skip
"""Text that names no source that this version can read, whatever lies on the disk."""


def sources(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    path = ("data", pick(rng, tree["data"]))
    value = pick(rng, BAD_SOURCES)
    inner = [(*path, key) for key in value] if isinstance(value, dict) else []
    return Mutant(dump(with_value(tree, path, value), rng), (path, *inner))


def unreachable(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    path = ("data", pick(rng, tree["data"]))
    place = pick(rng, BAD_PLACES)
    kind = "builtin" if place.startswith("builtin:") else "shards"
    value = {kind: place.removeprefix("builtin:")} if rng.integers(2) else place
    return Mutant(dump(with_value(tree, path, value), rng), (path, (*path, kind)))


# Text -----------------------------------------------------------------------------------------------------------------


def lines_of(tree: dict[str, Any]) -> list[str]:
    """In block style, a key to a line."""
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=False, width=10_000).splitlines()


def put(lines: list[str], number: int, *new: str) -> str:
    return "\n".join([*lines[:number], *new, *lines[number:]]) + "\n"


def keyed(rng: np.random.Generator, lines: list[str]) -> int:
    """A line `key: value`, all of it on the line."""
    return pick(rng, (n for n, line in enumerate(lines) if re.fullmatch(r" *[a-z_]+: [\w.?=&]+", line)))


def twice(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    lines = lines_of(tree)
    number = keyed(rng, lines)
    return Mutant(put(lines, number + 1, lines[number]), lines=(number + 2,))


def tabbed(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """YAML forbids tabs as indentation (specification, section 6.1)."""
    lines = lines_of(tree)
    number = pick(rng, (n for n, line in enumerate(lines) if line.startswith(" ")))
    return Mutant(put(lines, number, f"\t{lines[number].strip()}"), lines=(number + 1, number + 2))


def controlled(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """Characters that YAML forbids everywhere (specification, section 5.1)."""
    lines = lines_of(tree)
    number = int(rng.integers(len(lines)))
    column = int(rng.integers(len(lines[number]) + 1))
    char = pick(rng, "\0\x01\x07\x08\x0b\x0c\x1b\x7f\x80\ufffe\uffff")
    lines[number] = lines[number][:column] + char + lines[number][column:]
    return Mutant("\n".join(lines) + "\n", lines=(number + 1,))


TAGS = ("!!int", "!!str", "!!python/object/apply:os.system", "!!python/name:os.system", "!x", "!", "!!binary", "!!map")
TAGS += ("&a", "*a", "&a !!str")


def tagged(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    lines = lines_of(tree)
    number = keyed(rng, lines)
    tag = pick(rng, TAGS)
    key, _, value = lines[number].partition(": ")
    lines[number] = f"{key}: {tag}" if tag == "*a" else f"{key}: {tag} {value}"
    return Mutant("\n".join(lines) + "\n", lines=(number + 1,))


def laughing(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """Lists of lists of aliases: a thousand million leaves in 400 bytes."""
    lines = lines_of(tree)
    more = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    more += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return Mutant(put(lines, len(lines), *more), lines=(len(lines) + 1,))


def deep(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """Nested beyond all sense, up to 200,000 levels."""
    lines = lines_of(tree)
    unit = pick(rng, ("[", "{a: ", "- ", "? ", "[[", "{[", "? - "))
    times = pick(rng, (60, 1_000, 100_000 // len(unit), 200_000 // len(unit)))
    close = "]" * times if set(unit) == {"["} and times * len(unit) <= 100_000 and rng.integers(2) else ""
    return Mutant(put(lines, len(lines), "x: " + unit * times + close), lines=(len(lines) + 1, len(lines) + 2))


def torn(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant | None:
    """A quote, a bracket or half an escape that nothing closes, kept where PyYAML itself finds no document."""
    lines = lines_of(tree)
    number = keyed(rng, lines)
    lines[number] += pick(rng, ("", " ")) + pick(
        rng, ("'", '"', "[", "{", ": [", "}", "]", ": x: y", "- a", " - b: c", "@")
    )
    text = "\n".join(lines) + "\n"
    try:
        yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        # where the text no longer fits may be far below
        return Mutant(text, lines=tuple(range(number + 1, len(lines) + 2)))
    return None


def escaped(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """Escapes of what is no character."""
    lines = lines_of(tree)
    number = keyed(rng, lines)
    escape = pick(rng, (r"\UFFFFFFFF", r"\UFFFFFFF0 x", r"\ud800", r"\uDFFFa", r"\q", r"\x4", r"\u12"))
    lines[number] = lines[number].partition(":")[0] + f': "{escape}"'
    return Mutant("\n".join(lines) + "\n", lines=(number + 1,))


def documents(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    lines = lines_of(tree)
    number = pick(rng, [n for n, line in enumerate(lines) if n and not line.startswith((" ", "-"))] + [len(lines)])
    if number == len(lines):
        return Mutant(put(lines, number, "---", "a: 1"), lines=(number + 1,))
    return Mutant(put(lines, number, "---"), lines=(number + 1, *range(1, len(lines) + 2)))


def complex_key(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    lines = lines_of(tree)
    key = pick(rng, ("? [a]\n: 1", "? {a: b}\n: 1", "<<: {a: 1}", "'': 1", "? |\n  long\n: 1", "null: 1", "[a, b]: 1"))
    return Mutant(put(lines, len(lines), key), lines=(len(lines) + 1,))


def marked(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """A byte order mark inside of the text is part of a key."""
    lines = lines_of(tree)
    number = pick(rng, (n for n, line in enumerate(lines) if n and re.match("[a-z]", line)))
    lines[number] = "\ufeff" + lines[number]
    return Mutant("\n".join(lines) + "\n", lines=(1, number + 1))


def oversized(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    lines = lines_of(tree)
    fill = pick(rng, ("# " + "x" * 300_000, f"x: {'y' * 300_000}", "\n" * 300_000, f"{'k' * 300_000}: 1"))
    return Mutant(put(lines, len(lines), fill))


def long_key(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    """A key or value of 100,000 characters."""
    lines = lines_of(tree)
    new = pick(rng, (f"{'k' * 100_000}: 1", f"x: {'v' * 100_000}", f"seed: {'9' * 100_000}", f"'{'k ' * 50_000}': 1",
                     f"? {'k' * 100_000}\n: 1"))  # fmt: skip
    return Mutant(put([line for line in lines if not line.startswith("seed:")], 0, new), lines=(1,))


def extending(rng: np.random.Generator, tree: dict[str, Any]) -> Mutant:
    base = pick(
        rng,
        ("nowhere", "r.yaml", "./r.yaml", 3, None, ["a"], ".", "photos", "mobilenetv3_sld", "x" * 5000, "/", "a\0b"),
    )
    return Mutant(dump({"extends": base, **tree}, rng), (("extends",),))


MUTATIONS: tuple[Mutation, ...] = (
    typed, typed, typed, ranged, ranged, ranged, misspelt, misspelt, added, foreign, missing, sectioned, nested,
    unnested, named, referring, referring, referring_far, emptied, unnamed, unsourced, lacking, untaught, contradicting,
    unplugged, operators, operators, immense, sources, sources, unreachable, twice, tabbed, controlled, tagged,
    laughing, deep, torn, escaped, documents, complex_key, marked, oversized, long_key, extending,
)  # fmt: skip


# The campaign ---------------------------------------------------------------------------------------------------------


def mutants(count: int, mutations: tuple[Mutation, ...] = MUTATIONS) -> Iterator[tuple[str, Mutant]]:
    """`count` wrong recipes, each a function of its number, with a name that says how to make it again."""
    for number in range(count):
        rng = np.random.default_rng([4, number])
        made = None
        while made is None:
            base, mutation = pick(rng, BASES), pick(rng, mutations)
            made = mutation(rng, copy.deepcopy(BASES[base]))
        yield f"number {number}: {base} {mutation.__name__}", made


def campaign(count: int, folder: Path, ask: Ask) -> None:
    ask(b"name: x")  # r.yaml is there, and all is imported
    before, failures, slowest = written(folder), Counter[str](), 0.0
    shown = []
    for name, mutant in mutants(count):
        began = time.process_time()
        answer = ask(encoded(mutant))
        slowest = max(slowest, time.process_time() - began)
        if found := complaints(answer, mutant):
            failures[name.rpartition(" ")[2]] += 1
            shown.append(f"{name}: {found}\n{answer.err[:600]}\n{mutant.text[:1500]}")
    assert not failures, f"{failures.total()} of {count}: {failures}\n\n" + "\n\n".join(shown[:8])
    assert slowest < SECONDS
    assert written(folder) == before


def encoded(mutant: Mutant) -> bytes:
    return mutant.text.encode("utf-8", "surrogatepass")


def test_the_good_recipes_are_accepted_in_every_layout(ask: Ask) -> None:
    """So what is refused below is refused for what was changed."""
    for name, tree in BASES.items():
        layouts = [dump(tree, np.random.default_rng(seed)) for seed in range(4)]
        for text in (*layouts, put(lines_of(tree), 0)):
            answer = ask(text.encode())
            assert isinstance(answer.raised, Accepted), f"{name}: {answer}"


def test_one_recipe_uses_every_key() -> None:
    used = {part for path in leaves(BASES["every_key"]) for part in path}
    whole_schema = schema()
    models = [whole_schema, *whole_schema["$defs"].values()]
    assert {key for model in models for key in model.get("properties", {})} - {"extends", "builtin"} <= used
    assert any("builtin:" in str(base["data"]) for base in BASES.values())


GOOD_WORDS = "expected a whole number ≥ 0, got -1"


@pytest.mark.parametrize(
    "answer",
    [
        Answer(0, "", "", Accepted()),
        Answer(1, "", "", ValueError("x")),
        Answer(65, "", f"Error: r.yaml:2:1: seed: {GOOD_WORDS}\n"),
        Answer(2, "", f"Traceback (most recent call last):\nError: r.yaml:2:1: seed: {GOOD_WORDS}\n"),
        Answer(2, "a table", f"Error: r.yaml:2:1: seed: {GOOD_WORDS}\n"),
        Answer(2, "", f"Error: r.yaml:1:1: seed: {GOOD_WORDS}\n"),
        Answer(2, "", f"Error: r.yaml:2:1: name: {GOOD_WORDS}\n"),
        Answer(2, "", f"Error: seed: {GOOD_WORDS}\n"),
        Answer(2, "", "Error: r.yaml:2:1: seed: wrong\n"),
        Answer(2, "", f"Error: r.yaml:2:1: seed: \x1b[1m{GOOD_WORDS}\n"),
        Answer(2, "", f"Error: r.yaml:2:1: seed: {GOOD_WORDS} {'x' * LONGEST}\n"),
        Answer(2, "", f"Error: r.yaml: 3 faults\nr.yaml:2:1: seed: {GOOD_WORDS}\nr.yaml:3:1: a: unknown key\n"),
    ],
)
def test_of_the_test_an_answer_that_breaks_the_promise_is_found(answer: Answer) -> None:
    mutant = Mutant("name: x\nseed: -1\na: 1\n", (("seed",),))
    assert complaints(answer, mutant)
    assert not complaints(Answer(2, "", f"Error: r.yaml:2:1: seed: {GOOD_WORDS}\n"), mutant)


def test_hundreds_of_bad_recipes(folder: Path, ask: Ask) -> None:
    campaign(NORMAL, folder, ask)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_ten_thousand_bad_recipes(folder: Path, ask: Ask) -> None:
    campaign(LONG, folder, ask)


@pytest.mark.parametrize(
    "mutation", [typed, tabbed, controlled, deep, referring], ids=lambda mutation: mutation.__name__
)
def test_the_command_answers_as_in_this_process(mutation: Mutation, folder: Path, ask: Ask) -> None:
    [(_, mutant)] = mutants(1, (mutation,))
    here = ask(encoded(mutant))
    before = written(folder)
    done = subprocess.run([sys.executable, "-m", "ssld", "run", "r.yaml"], capture_output=True, text=True, check=False)
    assert Answer(done.returncode, done.stdout, done.stderr) == here
    assert not complaints(here, mutant)
    assert written(folder) == before


@pytest.mark.parametrize("key", ["stages.teach.network", "stages.distill.student", "stages.distill.loss"])
def test_a_wrong_option_of_a_plug_in_is_placed(key: str, folder: Path) -> None:
    """A plug-in says what it takes only when it is loaded, which a plan does not do; a run does, before all work."""
    path = tuple(key.split("."))
    name = {"loss": "js"}.get(path[-1], "MobileNetV3_small_x0_35")
    tree = with_value(BASES["mobilenetv3_ssld"], path, {"name": name, "colour": 1})
    text = dump(tree, np.random.default_rng(0))
    answer = asked(folder, text.encode())
    assert not complaints(answer, Mutant(text, (path,)))
