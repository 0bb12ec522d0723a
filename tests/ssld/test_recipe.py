from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssld import plugins
from ssld.errors import RecipeError
from ssld.recipe import Split, differences, dump, known_recipes, read_recipe, schema
from ssld.recipe.text import MAX_BYTES, parse, render

GOOD = """\
# A small ladder.
name: small
seed: 3
images: {resolution: 32, train: [RandCropImage: {scale: [0.5, 1]}, NormalizeImage]}
data:
  unlabeled: pool
  labeled: {list: train.txt, root: images}
  validation: {split: 0.1}
stages:
  teach: {kind: pretrain, student: ResNet18_vd, data: labeled, epochs: 2}
  distill:
    kind: distill
    teacher: {stage: teach}
    student: MobileNetV3_small_x1_0
    data: [unlabeled, labeled]
    epochs: 9
    learning_rate: 1e-1
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    file = folder / name
    file.write_text(text, "utf-8")
    return file


def lines(file: Path, *overrides: str) -> list[str]:
    """The message of the RecipeError, by lines, with the file's name alone in the places."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(file, overrides)
    return str(caught.value).replace(f"{file.parent}/", "").splitlines()


def changed(tmp_path: Path, old: str, new: str) -> list[str]:
    assert GOOD.count(old) == 1
    return lines(write(tmp_path, GOOD.replace(old, new)))


def test_good_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    assert (recipe.name, recipe.seed, recipe.images.resolution) == ("small", 3, 32)
    assert [type(operator).__name__ for operator in recipe.images.train] == ["RandCropImage", "NormalizeImage"]
    assert [type(operator).__name__ for operator in recipe.images.eval] == [
        "ResizeImage",
        "CropImage",
        "NormalizeImage",
    ]
    assert recipe.data.unlabeled == "pool"
    assert recipe.data.labeled == {"list": "train.txt", "root": "images"}
    assert recipe.data.validation == Split(split=0.1)
    assert recipe.data.test is None
    assert list(recipe.stages) == ["teach", "distill"]
    for name, stage in recipe.stages.items():
        assert type(stage) is plugins.stage_kind(stage.kind).settings, name
    assert recipe.stages["distill"].model_dump()["learning_rate"] == 0.1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 9", "epochs: ten", "16:5: stages.distill.epochs: expected a whole number ≥ 1, got 'ten'"),
        ("epochs: 9", "epochs: 0", "16:5: stages.distill.epochs: expected a whole number ≥ 1, got 0"),
        ("epochs: 9", 'epochs: "9"', "16:5: stages.distill.epochs: expected a whole number ≥ 1, got '9'"),
        ("epochs: 9", "epochs: true", "16:5: stages.distill.epochs: expected a whole number ≥ 1, got true"),
        ("epochs: 9", "epochs: 9.5", "16:5: stages.distill.epochs: expected a whole number ≥ 1, got 9.5"),
        ("epochs: 9", "epochs:", "16:5: stages.distill.epochs: expected a whole number ≥ 1, got null"),
        ("    epochs: 9\n", "", "11:3: stages.distill.epochs: required key is missing, expected a whole number ≥ 1"),
        ("1e-1", "-1e-1", "17:5: stages.distill.learning_rate: expected a number > 0, got -0.1"),
        ("1e-1", ".inf", "17:5: stages.distill.learning_rate: expected a number > 0, got inf"),
        ("epochs: 9", "epochs: 9\n    batchsize: 64", "17:5: stages.distill.batchsize: unknown key, did you mean"),
        ("seed", "sead", "3:1: sead: unknown key, did you mean seed? (got 3)"),
        ("seed: 3", "seed: -1", f"3:1: seed: expected a whole number ≥ 0 and < {2**63}, got -1"),
        ("name: small", "name: a/b", "2:1: name: expected text of the form ^[a-z0-9_-]+$, got 'a/b'"),
        ("name: small\n", "", "1:1: name: required key is missing, expected text of the form ^[a-z0-9_-]+$"),
        ("resolution: 32", "resolution: 4", "4:10: images.resolution: expected a whole number ≥ 8 and ≤ 4096, got 4"),
        ("0.1}", "1}", "8:16: data.validation.split: expected a number > 0 and < 1, got 1"),
        ("list: train", "lists: train", "7:13: data.labeled.lists: unknown key, did you mean list? (got 'train.txt')"),
        ("list: train", "folder: train", "7:3: data.labeled: expected root only beside list, got it beside folder"),
        (", root", ", folder", "7:3: data.labeled: expected exactly one of folder, list, shards and builtin, got"),
        ("pool", "[pool]", "6:3: data.unlabeled: expected text or a mapping of keys, got a list"),
        ("pool", "{split: 0.1}", "6:15: data.unlabeled.split: unknown key, did you mean list? (got 0.1)"),
        ("teach:", "Teach 1:", "10:3: stages.'Teach 1': expected a stage name of a-z, 0-9, _ and -"),
        ("kind: pretrain, ", "", "10:3: stages.teach.kind: required key is missing, expected distill or"),
        ("kind: pretrain", "kind: 3", "10:11: stages.teach.kind: expected distill or"),
        ("kind: pretrain", "kind: pertrain", "10:11: stages.teach.kind: unknown stage kind 'pertrain', did you mean"),
        ("[unlabeled, labeled]", "pool2", "15:5: stages.distill.data: expected unlabeled or labeled, got 'pool2'"),
        ("[unlabeled, labeled]", "[]", "15:5: stages.distill.data: expected text or a list, got an empty list"),
        ("data: labeled", "data: unlabeled", "10:49: stages.teach.data: expected labeled, got unlabeled; this kind"),
        ("  unlabeled: pool\n", "", "14:5: stages.distill.data: expected a source of the recipe, got unlabeled, which"),
        ("epochs: 9", "epochs: 9\n    epochs: 8", "17:5: stages.distill.epochs: given twice, first at line 16"),
        ("epochs: 9", "epochs: !!int 9", "16:13: stages.distill.epochs: tags are not read, write the plain value"),
        ("epochs: 9", "epochs: &e 9", "16:13: stages.distill.epochs: anchors are not read, write the plain value"),
        ("pool", '"\\ud800"', "6:14: data.unlabeled: expected Unicode text, got half of a surrogate pair"),
        ("seed: 3", "seed: 3\n? [a]\n: 1", "4:3: '?': expected a plain word as key"),
        ("seed: 3", "seed: 3\n'': 1", "4:1: '': unknown key, known: name, seed"),
        ("pool", "''", "6:3: data.unlabeled: expected text or a mapping of keys, got ''"),
        ("list: train.txt", "list: ''", "7:13: data.labeled.list: expected text, got ''"),
        ("seed: 3", "seed: [3", "4:7: not YAML: expected ',' or ']', but got ':' while parsing a flow"),
    ],
)  # fmt: skip
def test_one_fault(tmp_path: Path, old: str, new: str, message: str) -> None:
    found = changed(tmp_path, old, new)
    assert len(found) == 1, found
    assert found[0].startswith(f"recipe.yaml:{message}")


def test_unknown_operator_is_placed(tmp_path: Path) -> None:
    (line,) = changed(tmp_path, "RandCropImage", "RandCropImag")
    assert line.startswith("recipe.yaml:4:26: images.train: ")
    assert "RandCropImage" in line


def test_all_faults_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("seed: 3", "seed: x").replace("pool", "{folder: 3}").replace("epochs: 2", "epochs: 2, lr: 1")
    text += "    epochs: 1\n  broken: 7\nseed: 1\n"
    header, *rest = lines(write(tmp_path, text))
    assert header == "recipe.yaml: 5 faults"
    assert [line.split(": ")[1] for line in rest] == [
        "data.unlabeled.folder",
        "stages.teach.lr",
        "stages.distill.epochs",
        "stages.broken",
        "seed",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "recipe.yaml:1:1: expected a mapping of keys, got null"),
        (b"- a", "recipe.yaml:1:1: expected a mapping of keys, got a list"),
        (b"name: a\nseed: \xff", "recipe.yaml:2: expected UTF-8 text, got the byte 0xff"),
        (b"a: 1\n---\nb: 2\n", "recipe.yaml:2:1: expected one document"),
        (b'b: 1\na: "\\UFFFFFFFF"', "recipe.yaml:2:7: not YAML: "),
        (b"b: 1\na: \x07", "recipe.yaml:2:4: not YAML: expected text, got the character U+0007"),
        (b"a: *b", "recipe.yaml:1:4: a: aliases are not read, write the value of *b again"),
        (b"a: " + b"[" * 100_000, "recipe.yaml:1:54: expected at most 50 levels of nesting, got more"),
        (b"- " * 3000, "recipe.yaml:1:103: expected at most 50 levels of nesting, got more"),
        (b"? " * 3000, "recipe.yaml:1:103: expected at most 50 levels of nesting, got more"),
        (b"#" * (MAX_BYTES + 1), "recipe.yaml: expected a recipe of at most 256 KiB, got more"),
    ],
)
def test_unreadable_text(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(data)
    assert any(line.startswith(message) for line in lines(file))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5), ("-1_000", "-1_000"), ("010", 10), ("0o17", 15), ("0x1F", 31),
        ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("'1'", "1"), ('"true"', "true"), ("-.inf", float("-inf")),
        ("[a, {b: 1}]", ["a", {"b": 1}]), ("{on: 1, 2: 3}", {"on": 1, "2": 3}), ("1e", "1e"), ("٣", "٣"),
        ("9" * 5000, float("inf")), ("|\n  a\n  b\n", "a\nb\n"),
    ],
)  # fmt: skip
def test_scalars_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse(text, "-").value
    assert read == value
    assert type(read) is type(value)


plain_text = st.text(st.characters(exclude_categories=["Cs"])) | st.from_regex(r"[-+0-9.eoxE_:~]{1,6}", fullmatch=True)
scalars = st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | plain_text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3)
)


@settings(deadline=None, database=None, max_examples=100)
@given(st.dictionaries(plain_text, values, max_size=4))
def test_rendered_values_read_as_they_were(value: dict[str, Any]) -> None:
    read = parse(render(value), "-")
    assert read.value == value
    assert not read.faults


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "extends: ../base.yaml\nname: middle\nstages: {distill: {data: unlabeled}}", "middle.yaml")
    top = write(
        tmp_path, "extends: sub/middle.yaml\ndata: {labeled: {classes: x, root: }}\nstages: {teach: {epochs: 5}}"
    )
    recipe = read_recipe(top)
    assert (recipe.name, recipe.seed) == ("middle", 3)
    assert recipe.stages["distill"].data == ("unlabeled",)
    assert recipe.stages["teach"].model_dump()["epochs"] == 5
    assert recipe.place(("stages", "teach", "epochs")) == f"{top}:3:18: stages.teach.epochs"
    assert recipe.place(("stages", "teach", "kind")).endswith("base.yaml:10:11: stages.teach.kind")
    assert recipe.tree.value["data"]["labeled"] == {"list": "train.txt", "root": None, "classes": "x"}


def test_place_of_a_key_that_is_not_written(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    assert recipe.place(("stages", "distill", "loss", "name")).endswith("recipe.yaml:11:3: stages.distill.loss.name")
    assert recipe.place(("nowhere",)).endswith("recipe.yaml:1:1: nowhere")


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("recipe.yaml", "expected a recipe that does not build on this one, got 'recipe.yaml': a cycle"),
        ("nowhere.yaml", "expected a recipe file or the name of a shipped recipe, got 'nowhere.yaml'; "),
        ("3", "expected a recipe file, got 3"),
        ("x" * 5000, "expected a recipe file, got 'x"),
        (".", "expected a recipe file or the name of a shipped recipe, got '.'; "),
    ],
)
def test_extends_what_cannot_be_read(tmp_path: Path, extends: str, message: str) -> None:
    (line,) = lines(write(tmp_path, f"name: a\nextends: {extends}\n"))
    assert line.startswith(f"recipe.yaml:2:1: extends: {message}")


def test_longer_cycle(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml", "a.yaml")
    write(tmp_path, "extends: recipe.yaml", "b.yaml")
    assert lines(write(tmp_path, "extends: a.yaml"))[0].startswith("b.yaml:1:1: extends: expected a recipe that")


def test_overrides_come_before_validation(tmp_path: Path) -> None:
    overrides = (
        *("stages.distill.epochs=4", "images.eval=[NormalizeImage]", "data.unlabeled=a=b", "data.test={folder: t}"),
        *("stages.distill.loss.name=kl", "stages.distill.epochs=5"),
    )
    recipe = read_recipe(write(tmp_path, GOOD), overrides)
    assert recipe.stages["distill"].model_dump()["epochs"] == 5
    assert recipe.stages["distill"].model_dump()["loss"]["name"] == "kl"
    assert len(recipe.images.eval) == 1
    assert (recipe.data.unlabeled, recipe.data.test) == ("a=b", {"folder": "t"})
    assert recipe.place(("stages", "distill", "epochs")) == "-o stages.distill.epochs=5: stages.distill.epochs"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.distill.epochs=x", "stages.distill.epochs: expected a whole number ≥ 1, got 'x'"),
        ("stages.distill.epoch=4", "stages.distill.epoch: unknown key, did you mean epochs? (got 4)"),
        ("stages.distil.epochs=4", "stages.distil.epochs: unknown key 'distil', did you mean distill?"),
        ("stage.distill.epochs=4", "stage.distill.epochs: unknown key 'stage', did you mean stages?"),
        ("images.train.0=x", "images.train.0: expected a mapping of keys at images.train, got a list; override"),
        ("name.a=x", "name.a: expected a mapping of keys at name, got 'small'; override name as a whole"),
        ("name=[1", "name: expected a YAML value, got '[1'"),
        ("name=*a", "name: aliases are not read"),
        ("name", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("images..train=3", "expected key.path=value"),
        ("images." + "a." * 3000 + "a=1", "expected a YAML value, got '1'"),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, message: str) -> None:
    (line,) = lines(write(tmp_path, GOOD), override)
    assert line.startswith(f"-o {override}: ")
    assert message in line


def test_missing_file_names_the_near_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean mobilenetv3_ssld or imagenet/" in lines(Path("mobilenetv3_sld.yaml"))[0]


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe("mobilenetv3_ssld").name == "mobilenetv3_ssld"
    write(tmp_path, GOOD, "mobilenetv3_ssld")
    assert read_recipe("mobilenetv3_ssld").name == "small"


def test_dump_reads_to_an_equal_recipe(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    top = write(tmp_path, "extends: base.yaml\nname: '010'\n")
    recipe = read_recipe(top, ["stages.teach.epochs=7", "data.unlabeled='1e-3'"])
    text = dump(recipe)
    assert read_recipe(write(tmp_path, text, "again.yaml")) == recipe
    assert "extends" not in text
    assert "momentum" not in text, "defaults are not filled in"


@pytest.mark.parametrize("name", ["mobilenetv3_ssld", "imagenet/mobilenetv3_large_ssld"])
def test_known_recipes_can_be_read_and_have_a_title(name: str) -> None:
    title = known_recipes()[name]
    assert title
    assert not title.startswith("#")
    assert read_recipe(name).name == name.rpartition("/")[2]


def test_differences() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": "x", "gone": {"k": 1}}, "same": (1, 2), "e": True}
    new = {"a": 2, "b": {"c": [1, 3], "d": None, "new": "ü"}, "same": [1, 2], "e": 1}
    assert differences(old, new) == [
        "a: 1 → 2",
        "b.c: [1, 2] → [1, 3]",
        'b.d: "x" → null',
        'b.gone: removed, was {"k": 1}',
        'b.new: added, "ü"',
        "e: true → 1",
    ]
    assert differences(new, copy.deepcopy(new)) == []


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["$ref"]] if "$ref" in value else []
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _references(inner)


def test_schema_is_json_and_complete() -> None:
    whole = json.loads(json.dumps(schema()))
    for reference in _references(whole):
        assert reference.removeprefix("#/$defs/") in whole["$defs"]
    stages = whole["properties"]["stages"]["additionalProperties"]
    assert stages["properties"]["kind"]["enum"] == sorted(found.name for found in plugins.find("stages"))
    by_kind = {choice["if"]["properties"]["kind"]["const"]: choice["then"]["$ref"] for choice in stages["allOf"]}
    for name in known_recipes():
        value = read_recipe(name).tree.value
        assert set(value) <= set(whole["properties"])
        for stage in value["stages"].values():
            assert set(stage) <= set(whole["$defs"][by_kind[stage["kind"]].rpartition("/")[2]]["properties"])


TOKENS = [
    *" \n:-{}[],!|>'\"?\t#~\\\0é٣\u2028",
    *("", "  ", "- ", "&a ", "*a", "!!x ", "%YAML 9", "---", "...", "<<: ", "1e999", "9" * 400, "true", "null", "1/0"),
    *("kind: distill", "extends: recipe.yaml", "[[[[", "a: {b: c}", "${x}", "-1", "\ud7ff", '"\\ud800"'),
]
edits = st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(TOKENS))


@settings(deadline=None, database=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(edits, min_size=1, max_size=4))
def test_whatever_is_written_only_a_recipe_error_comes(tmp_path: Path, changes: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for start, length, token in changes:
        text = text[:start] + token + text[start + length :]
    file = write(tmp_path, text)
    try:
        recipe = read_recipe(file)
    except RecipeError as error:
        message = str(error)
    else:
        assert read_recipe(write(tmp_path, dump(recipe), "again.yaml")) == recipe
        return
    assert message.strip()
    assert "Traceback" not in message
