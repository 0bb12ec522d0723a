"""`ssld import`: the same numbers as paddle.load, names of today, and every hostile or damaged file one line."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from ssld import checkpoint, files, plugins
from ssld.cli import main
from ssld.contracts import Headless
from ssld.errors import CheckpointError, OutputError
from ssld.importing import conversion, paddleclas, torchlike
from ssld.signals import UNTAKEN
from ssld.train import networks
from ssld.train.shapes import Outline, outline

KEYS = Path(__file__).parents[1] / "students" / "paddleclas_keys.json.gz"
SMALL = "MobileNetV3_small_x0_35"
FOUND = plugins.find("students")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(main, ["import", *map(str, words)])


def refused(result: Result, *parts: str, code: int = 65) -> None:
    """One message on standard error with these parts, and no file but those that were there."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    missing = [part for part in parts if part not in result.stderr]
    assert not missing, f"{missing} not in: {result.stderr}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stderr)


# What paddle.save writes ---------------------------------------------------------------------------------------------


def tensors() -> dict[str, paddle.Tensor]:
    rng = np.random.default_rng(0)
    kinds = ("float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64")
    found = {kind: paddle.to_tensor(rng.normal(0, 50, (2, 3, 1)).astype(kind)) for kind in kinds}
    turned = paddle.arange(6, dtype="float32").reshape([2, 3]).transpose([1, 0])
    return {**found, "bool": paddle.to_tensor([True, False]), "scalar": paddle.to_tensor(2.5), "turned": turned}


def saved(content: object, protocol: int) -> bytes:
    buffer = io.BytesIO()
    paddle.save(content, buffer, protocol=protocol)
    return buffer.getvalue()


def same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("numpy", [1, 2])
def test_tensors_are_those_of_paddle_load(tmp_path: Path, protocol: int, numpy: int) -> None:
    data = saved(tensors(), protocol)
    if numpy == 1:
        # a pickle may do without the frame that protocol 4 announces, whose length would change
        data = data if protocol < 4 else data[:2] + data[11:]
        data = data.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
        data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        assert b"_core" not in data
    file = tmp_path / "net.pdparams"
    file.write_bytes(data)
    wanted = paddle.load(io.BytesIO(saved(tensors(), protocol)), return_numpy=True)
    assert any(array.flags.f_contiguous and array.ndim == 2 and array.size > 3 for array in wanted.values())
    same(paddleclas.read(file), wanted)


def test_bfloat16_is_widened_to_the_same_values(tmp_path: Path) -> None:
    tensor = paddle.to_tensor([1.0, -0.3, 3e38]).astype("bfloat16")
    (tmp_path / "net.pdparams").write_bytes(saved({"w": tensor}, 4))
    same(paddleclas.read(tmp_path / "net.pdparams"), {"w": tensor.astype("float32").numpy()})


@pytest.mark.parametrize(
    "content",
    [
        OrderedDict(w=np.arange(3.0)),
        # what paddle 2.1 makes of a tensor where a dict holds something else beside it
        {"w": ("linear_0.w_0", np.arange(3.0))},
    ],
    ids=["ordered", "named"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_forms_that_paddle_load_takes(tmp_path: Path, content: dict[str, Any], protocol: int) -> None:
    (tmp_path / "net.pdparams").write_bytes(pickle.dumps(content, protocol))
    same(paddleclas.read(tmp_path / "net.pdparams"), {"w": np.arange(3.0)})


def test_a_file_of_python_2_whose_bytes_are_text(tmp_path: Path) -> None:
    data = b"".join(
        [
            b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89U\x08" + np.array([-1.5, 7], "<f4").tobytes() + b"tbs.",
        ]
    )
    (tmp_path / "net.pdparams").write_bytes(data)
    same(paddleclas.read(tmp_path / "net.pdparams"), {"w": np.array([-1.5, 7], np.float32)})


# Names ---------------------------------------------------------------------------------------------------------------

DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 12, 48, 3),
}


def resnet_before(name: str, depths: tuple[int, ...]) -> str:
    """What PaddleClas 2.0 called a tensor of a ResNet_vd: block i of stage s is bb_s_i, the stem conv1_1 to conv1_3."""
    places = [f"bb_{stage}_{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    words = name.replace(".conv.", "._conv.").replace(".bn.", "._batch_norm.").split(".")
    if words[0] == "blocks":
        return ".".join([places[int(words[1])], *words[2:]])
    return ".".join([f"conv1_{int(words[1]) + 1}", *words[2:]] if words[0] == "stem" else ["out", *words[1:]])


def mobilenet_before(name: str) -> str:
    """What PaddleClas 2.0 called a tensor of a MobileNetV3: the stem is conv1, and the blocks follow from conv2 on."""
    words = name.split(".")
    if words[0] == "blocks":
        return ".".join([f"conv{int(words[1]) + 2}", *words[2:]])
    return ".".join([{"conv": "conv1", "fc": "out"}.get(words[0], words[0]), *words[1:]])


def known() -> dict[str, list[str]]:
    """Today's names in the networks that had others."""
    listed = json.loads(gzip.decompress(KEYS.read_bytes())).items()
    return {name: list(keys) for name, keys in listed if re.fullmatch(r"ResNet\d+_vd|MobileNetV3_.+", name)}


@pytest.mark.parametrize("network", known())
def test_names_of_before_2_2_become_those_of_today(network: str) -> None:
    today = known()[network]
    if network.startswith("ResNet"):
        depths = DEPTHS[int(network.removeprefix("ResNet").removesuffix("_vd"))]
        before = [resnet_before(name, depths) for name in today]
    else:
        before = [mobilenet_before(name) for name in today]
    assert len(set(before) - set(today)) > len(today) * 0.9
    # in any order, since a dictionary may come in any
    mixed = random.Random(0).sample(range(len(today)), len(today))
    found = paddleclas.of_today({before[i]: np.array(i) for i in mixed})
    assert {name: int(array) for name, array in found.items()} == {name: i for i, name in enumerate(today)}


@pytest.mark.parametrize("network", [SMALL, "ResNet18_vd", "PPLCNet_x0_25", "ResNeXt101_32x8d_wsl"])
def test_names_of_today_stay(network: str) -> None:
    with paddle.LazyGuard():
        names = networks.build(network, {}, 10).state_dict().keys()
    assert paddleclas.of_today({name: np.zeros(1) for name in names}).keys() == names


@pytest.mark.parametrize(
    "names",
    [
        ["bb_0_0.conv0._conv.weight", "bb_00_0.conv0._conv.weight"],
        ["conv1_1._conv.weight", "stranger.weight"],
        ["conv1.conv.weight", "conv2.conv.weight"],
        ["conv1.expand_conv.conv.weight"],
    ],
)
def test_names_of_nobody_stay(names: list[str]) -> None:
    assert list(paddleclas.of_today({name: np.zeros(1) for name in names})) == names


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> dict[str, paddle.Tensor]:
    return networks.build(SMALL, {}, 3).state_dict()


def test_the_network_is_found_and_the_file_is_one_that_a_recipe_reads(call, small) -> None:
    Path("net.pdparams").write_bytes(saved(small, 4))
    result = call("net.pdparams")
    assert result.exit_code == 0, result.output
    header, row = (re.split(" {2,}", line) for line in result.stdout.splitlines())
    assert header == ["weights", "tensors", "network"]
    assert row == ["net.safetensors", str(len(small)), f"{SMALL} (3 classes)"]
    assert result.stderr == ""
    weights = checkpoint.read_weights(Path("net.safetensors"))
    same(weights, {name: tensor.numpy() for name, tensor in small.items()})
    other = networks.build(SMALL, {}, 3, seed=1)
    networks.load(other, weights, "the weights")
    same(networks.arrays(other), weights)


def test_names_of_before_2_2_are_found_too(call, small) -> None:
    Path("old.pdparams").write_bytes(saved({mobilenet_before(name): tensor for name, tensor in small.items()}, 2))
    result = call("old.pdparams", "--network", SMALL, "--out", "new/name.safetensors")
    assert result.exit_code == 0, result.output
    assert checkpoint.read_weights(Path("new/name.safetensors")).keys() == small.keys()


def test_a_network_that_does_not_fit_shows_both_sides_and_nothing_is_written(call, small) -> None:
    changed = {name.replace("last_conv", "final"): tensor for name, tensor in small.items()}
    changed["conv.conv.weight"] = paddle.ones([8, 4, 3, 3])
    Path("net.pdparams").write_bytes(saved(changed, 4))
    refused(
        call("net.pdparams", "--network", SMALL),
        f"net.pdparams for {SMALL}: expected the {len(small)} tensors of the network",
        "  - last_conv.weight [1280, 200, 1, 1]",
        "  + final.weight [1280, 200, 1, 1]",
        "  ~ conv.conv.weight [8, 3, 3, 3] in the network, [8, 4, 3, 3] in the file",
    )
    assert not Path("net.safetensors").exists()


def test_weights_of_a_network_that_is_not_here_are_imported_with_the_nearest_one_named(call, small) -> None:
    Path("net.pdparams").write_bytes(saved({**small, "more.weight": paddle.ones([2])}, 4))
    result = call("net.pdparams")
    assert (result.exit_code, result.stdout.splitlines()[1].split()[1:]) == (0, [str(len(small) + 1), "none"])
    assert f"the nearest, {SMALL}, has {len(small)} of them: --network {SMALL} shows" in result.stderr
    assert "more.weight" in checkpoint.read_weights(Path("net.safetensors"))


def file_as_it_is(path: Path) -> tuple[int, ...]:
    """All that a write would change; the time of the last access is not: to compare a file is to read it."""
    found = path.stat()
    return found.st_ino, found.st_mode, found.st_size, found.st_nlink, found.st_mtime_ns, found.st_ctime_ns


def test_a_file_that_is_there_is_kept_unless_it_is_the_same(call, small) -> None:
    Path("net.pdparams").write_bytes(saved(small, 4))
    assert call("net.pdparams", "--network", SMALL).exit_code == 0
    written = file_as_it_is(Path("net.safetensors"))
    assert call("net.pdparams", "--network", SMALL).exit_code == 0
    assert file_as_it_is(Path("net.safetensors")) == written
    Path("net.safetensors").write_bytes(b"something else")
    refused(call("net.pdparams", "--network", SMALL), "cannot write net.safetensors: another file", code=73)
    assert Path("net.safetensors").read_bytes() == b"something else"
    assert sorted(path.name for path in Path().iterdir()) == ["net.pdparams", "net.safetensors"]


@pytest.mark.parametrize(
    ("obstruct", "what"),
    [
        (Path.mkdir, "a directory"),
        (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
        (lambda path: path.symlink_to("there"), "a directory"),
        (os.mkfifo, "another file"),
    ],
)
def test_what_is_no_file_is_in_the_way_too(tmp_path: Path, obstruct: Callable[[Path], None], what: str) -> None:
    (tmp_path / "there").mkdir()
    path = tmp_path / "net.safetensors"
    obstruct(path)
    with pytest.raises(OutputError, match=f"^cannot write {path}: {what} has this name; give another one, or remove"):
        checkpoint.write_weights(path, {"a": np.zeros(1)})
    assert sorted(found.name for found in tmp_path.iterdir()) == ["net.safetensors", "there"]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["gone.pdparams"], 65, "got gone.pdparams: No such file or directory"),
        (["."], 65, "which is no file"),
        (["a.pdparams", "--out", "a.pdparams"], 2, "--out: expected a name that ends in .safetensors"),
        (["a.pdparams", "--network", "ResNet50_vdd"], 2, "unknown student 'ResNet50_vdd', did you mean ResNet50_vd"),
    ],
)
def test_wrong_words(call, words: list[str], code: int, part: str) -> None:
    Path("a.pdparams").write_bytes(saved({"a": paddle.ones([2])}, 4))
    refused(call(*words), part, code=code)


def test_the_advice_to_a_recipe_that_names_a_pickle_is_a_command_that_works(call, small) -> None:
    path = Path("it's $HOME.pdparams")
    path.write_bytes(saved(small, 4))
    with pytest.raises(CheckpointError, match="which can run code when it is opened") as caught:
        checkpoint.read_weights(path)
    program, command, *words = shlex.split(str(caught.value).rpartition(": ")[2])
    assert (program, command) == ("ssld", "import")
    assert call(*words).exit_code == 0
    assert checkpoint.read_weights(path.with_suffix(".safetensors")).keys() == small.keys()


# Weights of torch -----------------------------------------------------------------------------------------------------


def torch_norm(layer: str) -> list[str]:
    return [f"{layer}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def torchvision_names(depths: tuple[int, ...]) -> list[str]:
    """The state_dict of a residual network of bottlenecks, in the order in which torchvision makes its layers."""
    names = ["conv1.weight", *torch_norm("bn1")]
    for stage, depth in enumerate(depths, 1):
        for block in (f"layer{stage}.{index}" for index in range(depth)):
            for number in (1, 2, 3):
                names += [f"{block}.conv{number}.weight", *torch_norm(f"{block}.bn{number}")]
            if block.endswith(".0"):
                names += [f"{block}.downsample.0.weight", *torch_norm(f"{block}.downsample.1")]
    return [*names, "fc.weight", "fc.bias"]


def as_torch(weights: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """Weights of ours, with torch's words and matrices."""
    found = {}
    for name, array in weights.items():
        renamed = name.replace("._mean", ".running_mean").replace("._variance", ".running_var")
        found[prefix + renamed] = np.ascontiguousarray(array.T if array.ndim == 2 else array)
        if renamed.endswith("running_var"):
            found[prefix + renamed.replace("running_var", "num_batches_tracked")] = np.array(7)
    return found


def numbered(network: str, classes: int) -> dict[str, np.ndarray]:
    """The tensors of a network, the i-th filled with i."""
    shapes = outline(network, classes).shapes
    return {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(
    ("network", "depths", "prefix"),
    [("ResNet50", (3, 4, 6, 3), ""), ("ResNeXt101_32x8d_wsl", (3, 4, 23, 3), "module.model.")],
)
def test_names_of_torchvision_are_those_of_the_same_layers_here(
    network: str, depths: tuple[int, ...], prefix: str
) -> None:
    """Both make the same layers in the same order, so the i-th name there is the i-th here."""
    shapes = outline(network, 7).shapes
    counted = [name for name in torchvision_names(depths) if not name.endswith("num_batches_tracked")]
    assert len(counted) == len(shapes)
    theirs = {}
    for i, (name, shape) in enumerate(zip(counted, shapes.values(), strict=True)):
        # no memory is taken for the numbers
        theirs[prefix + name] = np.broadcast_to(np.int16(i), shape[::-1] if name == "fc.weight" else shape)
    theirs[f"{prefix}bn1.num_batches_tracked"] = np.array(7)
    mixed = dict(random.Random(0).sample(sorted(theirs.items()), len(theirs)))
    ours = torchlike.of_torch(mixed).suited(outline(network).shapes)
    assert {name: (int(array.flat[0]), array.shape) for name, array in ours.items()} == {
        name: (i, shape) for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize(("prefix", "classes"), [("", 3), ("module.", 1280)], ids=["wide", "square"])
def test_weights_of_torch_become_ours(call, prefix: str, classes: int) -> None:
    wanted = numbered(SMALL, classes)
    wanted["fc.weight"] = np.arange(1280 * classes, dtype=np.float32).reshape(1280, classes)
    Path("net.safetensors").write_bytes(safetensors.numpy.save(as_torch(wanted, prefix)))
    result = call("net.safetensors", "--network", SMALL, "--out", "ours.safetensors")
    assert result.exit_code == 0, result.output
    assert re.split(" {2,}", result.stdout.splitlines()[1])[1:] == [str(len(wanted)), f"{SMALL} ({classes} classes)"]
    same(checkpoint.read_weights(Path("ours.safetensors")), wanted)


def test_weights_of_ours_stay_as_they_are_though_square(call) -> None:
    wanted = numbered(SMALL, 1280)
    wanted["fc.weight"] = np.arange(1280 * 1280, dtype=np.float32).reshape(1280, 1280)
    Path("net.safetensors").write_bytes(safetensors.numpy.save(wanted))
    assert call("net.safetensors", "--network", SMALL, "--out", "ours.safetensors").exit_code == 0
    same(checkpoint.read_weights(Path("ours.safetensors")), wanted)


def test_a_square_matrix_of_nobody_is_refused_and_another_is_turned_to_fit(
    call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(name: str, classes: int = 1000) -> Outline:
        return Outline({"fc.weight": (4, classes), "fc.bias": (classes,)}, "fc", classes)

    monkeypatch.setattr(conversion, "outline", plain)
    for classes in (3, 4):
        weights = {"fc.weight": np.arange(4.0 * classes).reshape(classes, 4), "fc.bias": np.zeros(classes)}
        Path(f"{classes}.safetensors").write_bytes(safetensors.numpy.save(weights))
    assert call("3.safetensors", "--network", "plain", "--out", "ours.safetensors").exit_code == 0
    assert checkpoint.read_weights(Path("ours.safetensors"))["fc.weight"].tolist() == [
        [0, 4, 8],
        [1, 5, 9],
        [2, 6, 10],
        [3, 7, 11],
    ]
    refused(
        call("4.safetensors", "--network", "plain", "--out", "4.ours.safetensors"),
        "4.safetensors for plain: expected a matrix whose shape says how it lies, got fc.weight [4, 4]",
        "[in, out]",
        "[out, in]",
    )
    assert not Path("4.ours.safetensors").exists()


def test_weights_of_torch_that_do_not_fit_show_both_sides(call) -> None:
    found = as_torch(numbered(SMALL, 3), "model.")
    found["model.final.weight"] = found.pop("model.last_conv.weight")
    found["model.fc.weight"] = np.zeros((3, 1281), np.float32)
    Path("net.safetensors").write_bytes(safetensors.numpy.save(found))
    refused(
        call("net.safetensors", "--network", SMALL, "--out", "ours.safetensors"),
        f"net.safetensors for {SMALL}: expected the 214 tensors of the network",
        "  - last_conv.weight [1280, 200, 1, 1]",
        "  + final.weight [1280, 200, 1, 1]",
        "  ~ fc.weight [1280, 3] in the network, [3, 1281] in the file",
    )
    refused(call("net.safetensors", "--network", SMALL), "--out: expected a name", code=2)
    assert [path.name for path in Path().iterdir()] == ["net.safetensors"]


def test_weights_of_torch_for_no_network_here_are_refused_with_the_nearest_one_named(
    call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        conversion.plugins, "find", lambda kind: [found for found in FOUND if found.name in (SMALL, "ResNet18")]
    )
    found = as_torch(numbered(SMALL, 3), "module.")
    Path("net.safetensors").write_bytes(safetensors.numpy.save({**found, "module.more": np.zeros(2)}))
    words = ("net.safetensors", "--out", "ours.safetensors")
    refused(call(*words), f"the nearest, {SMALL}, has 214 of them: --network {SMALL} shows the difference")
    Path("net.safetensors").write_bytes(safetensors.numpy.save(found))
    assert call(*words).stdout.splitlines()[1].endswith(f"{SMALL} (3 classes)")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"bn.num_batches_tracked": np.array(3)}, "expected 1 to 20,000 tensors, got 0"),
        ({"a.running_mean": np.zeros(2), "a._mean": np.ones(2)}, "got both running_mean and _mean"),
        ({"\x1b[31ma": np.zeros(2)}, r"expected names of tensors, got '\\x1b[31ma'"),
        ({"a": np.array([np.inf, 1])}, "got 1 others among the 2 of a"),
    ],
)
def test_a_safetensors_file_that_is_no_weights_of_a_network_is_refused(
    call, content: dict[str, np.ndarray], part: str
) -> None:
    Path("net.safetensors").write_bytes(safetensors.numpy.save(content))
    refused(call("net.safetensors", "--network", SMALL, "--out", "ours.safetensors"), "net.safetensors: ", part)


# Without the classifier ----------------------------------------------------------------------------------------------


def test_a_stage_with_other_classes_starts_from_a_file_without_the_classifier_and_says_so(
    call, make_task: Callable[..., Any], tmp_path: Path
) -> None:
    wanted = numbered(SMALL, 3)
    Path("net.pdparams").write_bytes(pickle.dumps(wanted, 4))
    result = call("net.pdparams", "--network", SMALL, "--head-mismatch")
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith("with classes of its own: fc.bias [3], fc.weight [1280, 3]\n")
    assert re.split(" {2,}", result.stdout.splitlines()[1])[1:] == ["212", f"{SMALL} (without its classifier)"]
    start = checkpoint.read_weights(Path("net.safetensors"))
    same(start, {name: array for name, array in wanted.items() if not name.startswith("fc.")})
    task = make_task(settings={"from": "net.safetensors"}, initial=start)
    new, begun = (networks.arrays(networks.student(each)) for each in (make_task(), task))
    assert np.ptp(new["fc.weight"]) > 0
    same(begun, {**start, "fc.weight": new["fc.weight"], "fc.bias": new["fc.bias"]})
    assert (
        "net.safetensors (MobileNetV3_small_x0_35), which stage starts from, was imported without its classifier"
        in (tmp_path / "train.log").read_text()
    )


def test_only_a_classifier_may_be_missing_and_only_where_the_file_says_so(make_task: Callable[..., Any]) -> None:
    whole = numbered(SMALL, 4)
    headless = {name: array for name, array in whole.items() if not name.startswith("fc.")}
    less = {name: array for name, array in headless.items() if name != "last_conv.weight"}
    for initial, missing in ((headless, "- fc.weight [1280, 4]"), (Headless(less), "- last_conv.weight")):
        with pytest.raises(CheckpointError, match=re.escape(missing)):
            networks.student(make_task(settings={"from": "net.safetensors"}, initial=initial))


def test_no_classifier_is_left_out_where_no_network_says_which_it_is(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion.plugins, "find", lambda kind: [found for found in FOUND if found.name == SMALL])
    Path("net.pdparams").write_bytes(pickle.dumps({**numbered(SMALL, 3), "more": np.zeros(1)}, 4))
    result = call("net.pdparams", "--head-mismatch")
    assert (result.exit_code, result.stdout) == (65, "")
    assert (
        "Error: net.pdparams: expected weights of a network here, whose classifier is to be left out" in result.stderr
    )
    assert [path.name for path in Path().iterdir()] == ["net.pdparams"]


# Files that are refused ----------------------------------------------------------------------------------------------

GOOD = pickle.dumps({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, 4)


class State:
    """An array whose pickled state is anything."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments, _ = np.zeros(1).__reduce__()
        return function, arguments, self.state


def array(shape: Any = (2,), dtype: Any = "f4", data: Any = bytes(8)) -> bytes:
    return pickle.dumps({"a": State(1, shape, np.dtype(dtype) if isinstance(dtype, str) else dtype, False, data)}, 4)


def keys(*names: Any) -> bytes:
    return pickle.dumps(dict.fromkeys(names, np.zeros(1)), 4)


MALFORMED = {
    "nothing": (b"", "EOFError"),
    "a page": (b"<html><body>404</body></html>", "invalid load key"),
    "cut": (GOOD[:-20], "truncated"),
    "longer": (GOOD + b"\0", "nothing after it"),
    "a list": (pickle.dumps([np.zeros(1)]), "got a list"),
    "no tensors": (pickle.dumps({}), "got 0"),
    "too many": (keys(*map(str, range(20_001))), "got 20,001"),
    "a number beside": (pickle.dumps({"epoch": 3}), "got a int as epoch"),
    "nested": (pickle.dumps({"model": {"a": np.zeros(1)}}), "got a dict as model"),
    "in parts": (pickle.dumps({"UnpackBigParamInfor@@": {}}), "protocol=4"),
    "by parameter": (keys("conv2d_0.w_0", "linear_0.b_0"), "names of parameters such as "),
    "by parameter of before": (keys("conv1_1_weights", "bn1_1_scale"), "names of parameters such as conv1_1_weights"),
    "no name": (keys(3), "names of tensors"),
    "an empty name": (keys(""), "names of tensors"),
    "a long name": (keys("a" * 257), "names of tensors"),
    "a coloured name": (keys("\x1b[31ma"), r"names of tensors, got '\\x1b[31ma'"),
    "the name of metadata": (keys("__metadata__"), "names of tensors"),
    "objects": (pickle.dumps({"a": np.array([{}], object)}), "dtype O8"),
    "text": (pickle.dumps({"a": np.array(["x"])}), "dtype U1"),
    "complex": (pickle.dumps({"a": np.zeros(2, complex)}), "dtype c16"),
    "records": (pickle.dumps({"a": np.zeros(2, [("x", "f4")])}), "dtype V4"),
    "big-endian": (pickle.dumps({"a": np.zeros(2, ">f4")}), "little-endian"),
    "no dtype": (array(dtype=4), "got int"),
    "no bytes": (array(data=[1, 2]), "as bytes, got list"),
    "a shape too large": (array((2**40, 2**40)), "got 8 bytes of F32"),
    "a negative shape": (array((-1, -2)), "shape [-1, -2], got 8 bytes"),
    "an empty shape": (array((0, 2**62), data=b""), "got 0 bytes"),
    "many dimensions": (array((1,) * 70 + (2,)), "at most 8 dimensions"),
    "a shape of text": (array(("2",)), "at most 8 dimensions"),
    "true for a side": (array((True, 2)), "at most 8 dimensions"),
    "no shape": (array(2), "TypeError"),
    "NaN": (pickle.dumps({"a": np.array([np.nan, 1, np.inf])}), "got 2 others among the 3 of a"),
    "a state that is short": (pickle.dumps({"a": State(1)}), "ValueError"),
    "an array without a state": (b"\x80\x02}U\x01acnumpy\nndarray\n)Rs.", "got a Array as a"),
    "a changed name": (b"\x80\x02cnumpy\nndarray\n}U\x04datacnumpy\nndarray\nsb.", "changes what it calls"),
    "an object of a name": (b"\x80\x02cnumpy\nndarray\n)\x81.", "UnpicklingError"),
    "an extension": (b"\x80\x02\x82\x01.", "extension code"),
    "a persistent id": (b"\x80\x02U\x01aQ.", "persistent"),
    "another encoding": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00idna1\x86R.", "as idna1"),
    "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", "refused global numpy.ndarray.__class__"),
}


def refused_in_one_line(call, data: bytes, parts: str, beginning: str) -> None:
    """parts: what the line may say, with a bar between; nothing is written."""
    Path("net.pdparams").write_bytes(data)
    result = call("net.pdparams")
    refused(result, beginning)
    assert any(part in result.stderr for part in parts.split("|")), result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["net.pdparams"]


@pytest.mark.parametrize("case", MALFORMED)
def test_a_file_that_is_no_weights_of_a_network_is_refused(call, case: str) -> None:
    refused_in_one_line(call, *MALFORMED[case], "net.pdparams: ")


def collisions(count: int) -> bytes:
    """A dictionary of whole numbers that all have the same hash."""
    numbers = (((2**61 - 1) * (number + 1)).to_bytes(12, "little") for number in range(count))
    return b"\x80\x04}(" + b"".join(b"\x8a\x0c" + number + b"N" for number in numbers) + b"u."


BOMBS = {
    "a memo of 16 GB": (b"\x80\x04}r" + struct.pack("<I", 2**31 - 1) + b".", "bytes of memory"),
    "a frame of 1 TB": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.", "bytes of memory"),
    "bytes of 1 TB": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"}.", "bytes of memory"),
    "bytes of 4 EB": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"}.", "bytes of memory"),
    "a number of 2 GB": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"}.", "bytes of memory"),
    "lists in lists": (b"\x80\x04" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", "got a list|bytes of memory"),
    "tuples in tuples": (b"\x80\x04})" + b"\x85" * 3 * 10**5 + b"K\x01s.", "SIGSEGV|RecursionError|bytes of memory"),
    "the same bytes 5,000 times": (
        pickle.dumps(
            {str(i): State(1, (512,), np.dtype("f4"), False, data) for data in [bytes(2048)] for i in range(5000)}
        ),
        "in its tensors, got 10,240,000",
    ),
    "equal hashes": (collisions(40_000), "more than 1 seconds"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_ends_in_one_line_within_its_limits(call, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(paddleclas, "SECONDS", (1, 10**7))
    refused_in_one_line(call, *BOMBS[case], "net.pdparams: expected ")


FUZZ = """
import collections, io, random, sys
from ssld.importing import pickles
whole = open(sys.argv[1], "rb").read()
pickles.limit(2**26, 60)
rng = random.Random(0)
def changed():
    at = rng.randrange(len(whole))
    return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
ends = collections.Counter()
for data in [*(whole[:length] for length in range(len(whole))), *(changed() for _ in range(5000))]:
    try:
        found = pickles.read(io.BytesIO(data))
    except Exception as error:
        assert "\\n" not in pickles.reason(error, 0)
        ends["refused"] += 1
    else:
        assert [len(array.data) for array in found.values()] == [48, 12], data
        ends["read"] += 1
print(ends["refused"], ends["read"])
"""


def test_a_cut_is_refused_and_a_changed_bit_gives_tensors_of_the_same_size_or_is(tmp_path: Path) -> None:
    """A pickle has no checksum, so that a changed number can pass."""
    file = tmp_path / "net.pdparams"
    file.write_bytes(saved({"fc.weight": paddle.ones([4, 3]), "fc.bias": paddle.ones([3])}, 4))
    done = subprocess.run([sys.executable, "-c", FUZZ, file], capture_output=True, text=True, check=True)
    refusals, passed = map(int, done.stdout.split())
    assert passed > 1000
    assert refusals > 1000


# An end that comes from outside --------------------------------------------------------------------------------------


@pytest.fixture
def untaken() -> Iterator[None]:
    """The handlers of a process of its own; those of the tests come back."""
    before = {number: signal.signal(number, handler) for number, handler in UNTAKEN.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("untaken")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_the_file_is_read_ends_both_processes(
    call, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    started = []

    def stopped(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*words, **options))
        started[0].send_signal(signal.SIGSTOP)
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        return started[0]

    start = paddleclas.start
    monkeypatch.setattr(paddleclas, "start", stopped)
    Path("net.pdparams").write_bytes(GOOD)
    result = call("net.pdparams")
    refused(result, f"Error: stopped by {number.name}", code=code)
    assert result.stderr.count("\n") == 1
    assert started[0].poll() == -signal.SIGKILL
    assert [path.name for path in Path().iterdir()] == ["net.pdparams"]


class Signalling(files.Disk):
    """Is asked to end while it writes."""

    def write(self, path: Path, data: bytes) -> None:
        super().write(path, data[:1000])
        os.kill(os.getpid(), signal.SIGTERM)
        with path.open("ab") as file:
            file.write(data[1000:])


@pytest.mark.usefixtures("untaken")
def test_a_signal_while_the_weights_are_written_waits_for_their_end(
    call, small, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("net.pdparams").write_bytes(saved(small, 4))
    monkeypatch.setattr(files, "disk", Signalling())
    result = call("net.pdparams", "--network", SMALL)
    refused(result, "stopped by SIGTERM after net.safetensors was written", code=143)
    assert sorted(path.name for path in Path().iterdir()) == ["net.pdparams", "net.safetensors"]
    assert checkpoint.read_weights(Path("net.safetensors")).keys() == small.keys()


@pytest.mark.usefixtures("untaken")
def test_a_signal_while_networks_are_compared_is_no_fault_of_one_of_them(
    call, small, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def outline(name: str, *classes: int) -> Any:
        if not asked:
            os.kill(os.getpid(), signal.SIGINT)
        asked.append(name)
        return real(name, *classes)

    real = conversion.outline
    monkeypatch.setattr(conversion, "outline", outline)
    Path("net.pdparams").write_bytes(saved(small, 4))
    refused(call("net.pdparams"), "Error: stopped by SIGINT before anything was written", code=130)
    assert len(set(asked)) == 1
    assert [path.name for path in Path().iterdir()] == ["net.pdparams"]


def test_what_a_killed_import_left_of_this_file_is_removed_later(call, small) -> None:
    Path("n[e]t.pdparams").write_bytes(saved(small, 4))
    stale, fresh, other, alike = (
        ".tmp-n[e]t.safetensors-0",
        ".tmp-n[e]t.safetensors-1",
        ".tmp-a",
        ".tmp-net.safetensors-0",
    )
    for name in (stale, fresh, other, alike):
        Path(name).write_bytes(b"a part")
        age = files.ABANDONED + (-60 if name == fresh else 60)
        os.utime(name, (time.time() - age,) * 2)
    assert call("n[e]t.pdparams", "--network", SMALL).exit_code == 0
    assert {path.name for path in Path().iterdir()} == {
        fresh,
        other,
        alike,
        "n[e]t.pdparams",
        "n[e]t.safetensors",
    }


READ = """
import os, signal, sys
from pathlib import Path
from ssld.importing import paddleclas, reading
real = paddleclas.start
def start(*words, **options):
    process = real(*words, **options)
    print(process.pid, flush=True)
    if sys.argv[1] == "stopped":
        process.send_signal(signal.SIGSTOP)
    return process
paddleclas.start, paddleclas.SECONDS, reading.WAIT = start, (600, 10**7), float(sys.argv[2])
paddleclas.read(Path("net.pdparams"))
"""


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start a process that reads net.pdparams by another one, and return it with the pid of that.

    Both have one standard error, so that it ends when both have.
    """
    started: list[tuple[subprocess.Popen[str], int]] = []

    def begin(*words: str) -> tuple[subprocess.Popen[str], int]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", READ, *words], cwd=tmp_path, text=True, **pipes)
        assert process.stdout is not None
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield begin
    for process, other in started:
        process.kill()
        # it holds the pipe open as long as it is there, and then nobody else has its number
        if process.stderr is not None and not process.stderr.closed:
            os.kill(other, signal.SIGKILL)
            process.communicate()


def test_a_disk_that_does_not_answer_ends_it_with_a_word(tmp_path: Path, reading) -> None:
    (tmp_path / "net.pdparams").write_bytes(GOOD)
    process, _ = reading("stopped", "0.4")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 69
    assert said.startswith("Error: expected net.pdparams to be read within 0.4 s, got only a part or nothing; see why ")
    assert said.count("\n") == 1


def test_what_reads_a_file_ends_with_the_process_that_wants_it_though_it_never_leaves_its_unpickler(
    tmp_path: Path, reading
) -> None:
    (tmp_path / "net.pdparams").write_bytes(collisions(500_000))
    process, other = reading("running", "600")
    began = time.monotonic()
    while cpu_seconds(other) < 1:
        assert time.monotonic() < began + 240
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=240)


def test_it_ends_too_on_a_system_that_sends_no_signal() -> None:
    program = (
        "import fcntl, time; from ssld.importing import pickles\n"
        "fcntl.fcntl = lambda *words: 0\n"
        "pickles.follow(0); time.sleep(240)"
    )
    assert subprocess.run([sys.executable, "-c", program], input=b"", timeout=120).returncode == 0


def cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
