"""No code runs from data: hostile files through the entry that reads each of them, and never a marker file.

Every payload makes a marker, a file outside of the folder that the command works in. What is asked of each is a refusal
in words, or, where a name or a member means nothing to ssld, that it stays without meaning.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from ssld import checkpoint
from ssld.cli import main
from ssld.data.images import decode
from ssld.data.index import SIDECAR, index_shard
from ssld.data.sources import open_source
from ssld.errors import DataError
from ssld.files import commit_directory
from ssld.labels.inspect import DESCRIPTION
from ssld.labels.store import SUFFIX

REFUSED = {2, 65}
RECIPE = """\
name: hostile
images: {resolution: 16}
data:
  unlabeled: builtin:shapes?count=16&size=16&seed=2
  labeled: builtin:shapes?count=16&size=16
  validation: builtin:shapes?count=8&size=16&seed=1
stages:
  teach: {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 1, batch_size: 8}
  distill:
    kind: distill
    teacher: {stage: teach}
    student: MobileNetV3_small_x0_35
    data: unlabeled
    epochs: 1
"""


TAUGHT = RECIPE.replace(RECIPE[RECIPE.index("  teach:") : RECIPE.index("  distill:")], "")
"""Its teacher comes from a file."""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder above the one that is worked in: it holds nothing else before, and nothing else after."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "hostile.yaml").write_text(RECIPE)
    (tmp_path / "inside" / "taught.yaml").write_text(TAUGHT)
    monkeypatch.chdir(tmp_path / "inside")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "inside" / "cache"))
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["inside"], "code ran, or a name of the data was a path"
    assert not Path("runs").exists()


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(*words: object, part: str = "") -> None:
    """The command ends with a message, and not with a traceback."""
    result = call(*words)
    assert result.exit_code in REFUSED, f"{words}: {result.exit_code} {result.output} {result.exception!r}"
    assert result.stderr.startswith("Error: ")
    assert part in result.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", result.output), repr(result.output)


def planned(**overrides: object) -> list[str]:
    """The words of a plan in which these keys are overridden; `__` stands for the dot of a key."""
    values = ((key.replace("__", "."), json.dumps(value)) for key, value in overrides.items())
    return ["plan", "hostile.yaml", *(word for key, value in values for word in ("-o", f"{key}={value}"))]


def taught(**teacher: object) -> list[str]:
    """The words of a check of this teacher, which reads its files."""
    return ["check", "taught.yaml", "-o", f"stages.distill.teacher={json.dumps(teacher)}"]


def png(width: int = 4, height: int = 4, *chunks: bytes) -> bytes:
    """A PNG whose header says so; with further chunks before its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes((1 + 3 * min(width, 100)) * min(height, 100)))
    parts = [header, *chunks, b"IDAT" + rows, b"IEND"]
    framed = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


# Pickles -------------------------------------------------------------------------------------------------------------


class Call:
    """What a pickle makes of it: the answer of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


RECONSTRUCT = np.zeros(1).__reduce__()[0]
PICKLES: dict[str, Callable[[str], bytes]] = {
    "protocol-4": lambda command: pickle.dumps(Call(os.system, command), 4),
    "protocol-2": lambda command: pickle.dumps(Call(os.system, command), 2),
    "protocol-5": lambda command: pickle.dumps(Call(os.system, command), 5),
    "text": lambda command: f"cposix\nsystem\n(S'{command}'\ntR.".encode(),
    "inst": lambda command: f"(S'{command}'\niposix\nsystem\n.".encode(),
    "obj": lambda command: b"(cposix\nsystem\n" + text(command) + b"o.",
    "getoutput": lambda command: pickle.dumps(Call(subprocess.getoutput, command), 4),
    "eval": lambda command: pickle.dumps(Call(eval, f"__import__('os').system({command!r})"), 4),
    "exec": lambda command: pickle.dumps(Call(exec, f"import os; os.system({command!r})"), 4),
    "getattr": lambda command: (
        b"\x80\x04cbuiltins\ngetattr\ncbuiltins\n__import__\n"
        + (text("os") + b"\x85R" + text("system") + b"\x86R" + text(command) + b"\x85R.")
    ),
    "dotted": lambda command: b"\x80\x04" + text("shutil") + text("os.system") + b"\x93" + text(command) + b"\x85R.",
    "in-a-weight": lambda command: pickle.dumps({"fc.weight": np.array([Call(os.system, command)], object)}, 4),
    "in-the-names": lambda command: pickle.dumps(
        {"fc.weight": np.zeros(2, np.float32), "StructuredToParameterName@@": {"fc.weight": Call(os.system, command)}},
        4,
    ),
    "as-a-key": lambda command: b"\x80\x04}cposix\nsystem\n" + text(command) + b"\x85RK\x01s.",
    "as-a-state": lambda command: pickle.dumps(
        Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=Call(os.system, command)), 4
    ),
    "after-numpy": lambda command: b"\x80\x02cnumpy\nndarray\n(K\x01tR0cos\nsystem\n" + text(command) + b"\x85R.",
}
"""Ways in which a pickle runs a command of the shell."""


def touch(marker: Path) -> str:
    return f"touch {marker}"


def test_every_payload_of_this_file_runs_where_nothing_stops_it(tmp_path: Path) -> None:
    """The test of the test: the same bytes make their markers where pickle, yaml and webdataset are trusted."""
    for name, make in PICKLES.items():
        (tmp_path / f"{name}.pickle").write_bytes(make(touch(tmp_path / f"{name}.marker")))
    for number, tag in enumerate(TAGS):
        (tmp_path / f"tag{number}.yaml").write_text(tag.replace("MARKER", str(tmp_path / f"tag{number}.marker")))
    program = f"""
import glob, pickle, subprocess, yaml, webdataset
for file in glob.glob("*.pickle"):
    try: pickle.load(open(file, "rb"))
    except Exception: pass
for file in glob.glob("*.yaml"):
    yaml.unsafe_load(open(file))
webdataset.gopen("pipe:touch {tmp_path}/pipe.marker").read()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True, capture_output=True)
    wanted = {*(path.stem for path in tmp_path.glob("*.pickle")), *(path.stem for path in tmp_path.glob("*.yaml"))}
    assert {path.stem for path in tmp_path.glob("*.marker")} == {*wanted, "pipe"}


@pytest.mark.parametrize("name", PICKLES)
def test_weights_that_are_a_program(outside: Path, name: str) -> None:
    Path("net.pdparams").write_bytes(PICKLES[name](touch(outside / "marker")))
    refused("import", "net.pdparams", part="refused global " if name != "in-a-weight" else "")
    assert {path.name for path in Path().iterdir()} == {"hostile.yaml", "taught.yaml", "net.pdparams"}


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors", ".onnx"])
def test_a_teacher_that_is_a_program(outside: Path, suffix: str) -> None:
    file = Path("net" + suffix)
    file.write_bytes(PICKLES["protocol-4"](touch(outside / "marker")))
    named = {"onnx": str(file)} if suffix == ".onnx" else {"network": "ResNet18_vd", "weights": str(file)}
    refused(*taught(**named), part="net")


MEMBERS = ("pkl", "pickle", "pyd", "pth", "npy", "npz", "py", "sh", "txt.gz", "jpg.py", "__key__", "json", "yaml")


def test_members_of_a_shard_that_are_programs_are_never_opened(outside: Path) -> None:
    payload = PICKLES["protocol-4"](touch(outside / "marker"))
    objects = io.BytesIO()
    np.save(objects, np.array([Call(os.system, touch(outside / "marker"))], object), allow_pickle=True)
    members = {f"a.{suffix}": objects.getvalue() if suffix[:2] == "np" else payload for suffix in MEMBERS}
    tar(Path("shards/0.tar"), {"a.png": png(), "a.cls": b"1", **members, "b.png": png(), "b.cls": payload[:8]})
    assert call(*planned(data__unlabeled="shards")).exit_code == 0
    samples = open_source("shards", labeled=False)
    assert [decode(samples.read(i)).size for i in range(len(samples))] == [(4, 4)] * 2
    refused(*planned(data__labeled="shards"), part="0.tar: b.png: expected a whole number")


def test_an_image_that_is_a_program_is_a_damaged_image(outside: Path) -> None:
    tar(Path("shards/0.tar"), {"a.png": PICKLES["protocol-4"](touch(outside / "marker"))})
    samples = open_source("shards", labeled=False)
    with pytest.raises(DataError, match="expected a whole JPEG, PNG or WebP image"):
        decode(samples.read(0))


@pytest.mark.parametrize("name", ["train.index", "index.faiss", "data.pkl", "data.npy", "data.parquet"])
def test_a_program_or_a_foreign_index_as_a_data_source(outside: Path, name: str) -> None:
    Path(name).write_bytes(b"IxFI\x04" + PICKLES["protocol-4"](touch(outside / "marker")))
    for source in (name, {"list": name}, {"shards": name}, {"folder": name}):
        refused(*planned(data__unlabeled=source), part=name)


# Recipes -------------------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[str], dict[str, object]]] = {
    "a source": lambda value: {"data__unlabeled": value},
    "a folder": lambda value: {"data__unlabeled": {"folder": value}},
    "a list": lambda value: {"data__unlabeled": {"list": value}},
    "the root of a list": lambda value: {"data__unlabeled": {"list": "list.txt", "root": value}},
    "the classes of a list": lambda value: {"data__labeled": {"list": "list.txt", "classes": value}},
    "shards": lambda value: {"data__unlabeled": {"shards": value}},
    "braces": lambda value: {"data__unlabeled": f"{{{value},a.tar}}"},
    "shards in braces": lambda value: {"data__unlabeled": {"shards": f"{{a,{value}}}.tar"}},
    "a builtin": lambda value: {"data__unlabeled": {"builtin": value}},
    "the name of a builtin": lambda value: {"data__unlabeled": f"builtin:{value}"},
    "the classes of shards": lambda value: {"data__labeled": {"shards": "0.tar", "classes": value}},
    "one of several sources": lambda value: {"stages__distill__data": ["unlabeled", value]},
    "weights": lambda value: {"stages__distill__teacher": {"network": "ResNet18_vd", "weights": value}},
    "an onnx file": lambda value: {"stages__distill__teacher": {"onnx": value}},
    "a class map": lambda value: {"stages__distill__teacher": {"onnx": "net.onnx", "class_map": value}},
    "a plug-in": lambda value: {"stages__distill__teacher": {"plugin": value}},
    "a network": lambda value: {"stages__teach__network": value},
    "a loss": lambda value: {"stages__distill__loss": value},
    "a stage kind": lambda value: {"stages__teach__kind": value},
    "what a stage starts from": lambda value: {"stages__distill__from": value},
    "what a recipe extends": lambda value: {"extends": value},
}
SCHEMES = (
    "pipe:touch {marker}",
    "pipe:touch {marker} #.tar",
    "file:///etc/passwd",
    "s3://bucket/0.tar",
    "http://127.0.0.1:9/0.tar",
    "data:,x",
    "-",
    "| touch {marker}",
    "$(touch {marker})",
    "0.tar::pipe:touch {marker}",
    "; touch {marker}",
)


@pytest.mark.parametrize("place", PLACES)
def test_no_place_of_a_recipe_takes_a_scheme_or_a_command(outside: Path, place: str) -> None:
    Path("list.txt").write_text("a.png 0\n")
    Path("a.png").write_bytes(png())
    tar(Path("0.tar"), {"a.png": png(), "a.cls": b"0"})
    for scheme in SCHEMES:
        refused(*planned(**PLACES[place](scheme.format(marker=outside / "marker"))))


@pytest.mark.parametrize(
    "name", ["../up", "/absolute", "a/b", "..", ".", "~root", "pipe:touch m", "$(touch m)", "a\nb"]
)
def test_the_name_of_a_run_or_of_a_stage_is_no_path(outside: Path, name: str) -> None:
    refused(*planned(name=name))
    refused("plan", "hostile.yaml", "-o", f"stages={{{json.dumps(name)}: {{kind: pretrain}}}}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_command_takes_a_scheme_or_a_command(outside: Path, scheme: str) -> None:
    value = scheme.format(marker=outside / "marker")
    for words in (["run"], ["plan"], ["import"], ["check"], ["pack"], ["eval"], ["labels", "info"], ["status"]):
        if words == ["import"] and value.startswith("http"):
            # the one command that asks a server
            continue
        further = {"pack": ["out"], "eval": ["builtin:shapes"]}.get(words[0], [])
        refused(*words, "--", value, *further)


TAGS = (
    "a: !!python/object/apply:os.system ['touch MARKER']\n",
    "a: !!python/object/new:os.system ['touch MARKER']\n",
    "!!python/object/apply:subprocess.getoutput ['touch MARKER']\n",
    "a: !!python/object/apply:builtins.eval [\"__import__('os').system('touch MARKER')\"]\n",
)


@pytest.mark.parametrize(
    "tag", [*TAGS, "a: !!python/name:os.system\n", "a: !!python/module:antigravity\n", "!!binary a\n"]
)
def test_a_recipe_with_a_tag(outside: Path, tag: str) -> None:
    evil = tag.replace("MARKER", str(outside / "marker"))
    Path("evil.yaml").write_text(evil)
    Path("above.yaml").write_text("extends: evil.yaml\n")
    refused("plan", "evil.yaml")
    refused("plan", "above.yaml")
    if evil.startswith("a: "):
        refused("plan", "hostile.yaml", "-o", f"stages.teach.epochs={evil.strip().removeprefix('a: ')}")
        shutil.copy("evil.yaml", "hostile.yaml")
        refused("run", "hostile.yaml")


def test_a_run_directory_of_a_stranger(outside: Path) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(TAGS[0].replace("MARKER", str(outside / "marker")))
    Path("run/run.json").write_text('{"device": "cpu"}')
    refused("resume", "--out", "run")
    refused("status", "run")


@pytest.mark.parametrize(
    "options",
    [
        "[" * 100_000,
        '{"device": "cpu", "evil": 1}',
        "[]",
        "3",
        "\x80\x04.",
    ],
)
def test_a_run_directory_of_a_stranger_with_hostile_options(outside: Path, options: str) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(RECIPE)
    Path("run/run.json").write_text(options)
    refused("resume", "--out", "run", part="run.json")


def aliases() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "recipe",
    [aliases(), "a: " + "[" * 100_000, "{" * 100_000, "- " * 100_000, "a: &a [*a]", "a: &a {<<: *a}", "a" * 300_000],
    ids=["aliases", "lists", "mappings", "dashes", "itself", "merge", "long"],
)
def test_a_recipe_that_is_a_bomb(outside: Path, recipe: str) -> None:
    Path("evil.yaml").write_text(recipe)
    refused("plan", "evil.yaml", part="evil.yaml")


# Bombs ---------------------------------------------------------------------------------------------------------------

MEMORY = 1_000_000
"""Kibibytes that the installed command may take in these tests; a plan takes about half of it."""


def bounded(*words: object) -> subprocess.CompletedProcess[str]:
    """The installed command, in little memory."""
    program = f'ulimit -v {MEMORY}; exec "$0" -m ssld "$@"'
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["sh", "-c", program, sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def gzipped() -> dict[str, object]:
    tar(Path("0.tar"), {"a.png": bytes(50_000_000)}, "w:gz")
    return {"data__unlabeled": "0.tar"}


def gzipped_by_name() -> dict[str, object]:
    tar(Path("0.tar.gz"), {"a.png": bytes(50_000_000)}, "w:gz")
    return {"data__unlabeled": "0.tar.gz"}


def declared() -> dict[str, object]:
    """A member of 10 GB, of which there is nothing."""
    info = tarfile.TarInfo("a.png")
    info.size = 10**10
    Path("0.tar").write_bytes(info.tobuf() + bytes(10_240))
    return {"data__unlabeled": "0.tar"}


def extended() -> dict[str, object]:
    """A pax header of 10 GB."""
    info = tarfile.TarInfo("a.png")
    info.size, info.type = 10**10, tarfile.XHDTYPE
    Path("0.tar").write_bytes(info.tobuf() + bytes(10_240))
    return {"data__unlabeled": "0.tar"}


def many() -> dict[str, object]:
    """A billion shards."""
    return {"data__unlabeled": "pool-{000000000..999999999}.tar"}


def sidecar() -> dict[str, object]:
    """An index beside the shards that unpacks to 4 GB."""
    tar(Path("shards/0.tar"), {"a.png": png()})
    whole = index_shard(Path("shards/0.tar")).encode()
    start = whole.index(b"PK")
    archive = io.BytesIO(whole[start:])
    with zipfile.ZipFile(archive) as old:
        members = {name: old.read(name) for name in old.namelist()}
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (4 * 10**9,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name, content in members.items():
            with new.open(name, "w", force_zip64=True) as member:
                if name == "blob.npy":
                    member.write(head.getvalue())
                    for _ in range(40):
                        member.write(bytes(10**6))
                else:
                    member.write(content)
    body = buffer.getvalue()
    magic = whole[: start - 32]
    Path("shards", SIDECAR).write_bytes(magic + hashlib.sha256(body).digest() + body)
    return {"data__unlabeled": "shards"}


@pytest.mark.parametrize("make", [gzipped, gzipped_by_name, declared, extended, many])
def test_an_archive_that_is_a_bomb_is_refused_before_it_is_unpacked(
    outside: Path, make: Callable[[], dict[str, object]]
) -> None:
    done = bounded(*planned(**make()))
    assert done.returncode in REFUSED, done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_a_label_of_a_billion_takes_no_memory(outside: Path) -> None:
    for name in "ab":
        Path(f"{name}.png").write_bytes(png())
    Path("list.txt").write_text("a.png 999999999\nb.png 0\n")
    done = bounded(*planned(data={name: "list.txt" for name in ("unlabeled", "labeled", "validation")}))
    assert done.returncode in REFUSED, done.stderr


def test_an_index_that_is_a_bomb_is_passed_over(outside: Path) -> None:
    done = bounded(*planned(**sidecar()))
    assert (done.returncode, done.stderr) == (0, "")


IMAGES = {
    "13,000 pixels square": png(13_000, 13_000),
    "2 to the 31 pixels square": png(2**31 - 1, 2**31 - 1),
    "a long strip": png(1_000_000, 1),
    "text that unpacks to 100 MB": png(4, 4, b"zTXta\0\0" + zlib.compress(bytes(100_000_000), 1)),
    "a profile that unpacks to 100 MB": png(4, 4, b"iCCPa\0\0" + zlib.compress(bytes(100_000_000), 1)),
    "a gif": b"GIF89a\xff\xff\xff\xff\0\0\0;",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch x) system\n",
    "fits": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
    "tiff": b"II*\0\x08\0\0\0",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "a webp of 16,384 pixels": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xff\x3f\0\xff\x3f\0",
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_is_a_bomb_or_of_another_kind_is_a_damaged_image(name: str) -> None:
    tracemalloc.start()
    try:
        if name.startswith(("text", "a profile")):
            # what does not describe pixels may be passed over
            with suppress(DataError):
                assert decode(IMAGES[name]).size == (4, 4)
        else:
            with pytest.raises(DataError, match="expected"):
                decode(IMAGES[name])
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


# Names ---------------------------------------------------------------------------------------------------------------


def link(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_names_in_a_shard_are_keys_and_never_paths(outside: Path) -> None:
    names = [
        "../../up.png",
        "/absolute.png",
        "~root/home.png",
        "a/../../b.png",
        "C:\\x.png",
        "$(touch x).png",
        "ü\u202e.png",
    ]
    special = {
        "link.txt": link("link.txt", tarfile.SYMTYPE, "/etc/passwd"),
        "hard.txt": link("hard.txt", tarfile.LNKTYPE, "../../up.png"),
        "device.png": link("device.png", tarfile.CHRTYPE),
        "pipe.png": link("pipe.png", tarfile.FIFOTYPE),
    }
    tar(Path("shards/0.tar"), {**{name: png() for name in names}, **special})
    samples = open_source("shards", labeled=False)
    assert sorted(samples.key(i) for i in range(len(samples))) == sorted(f"0/{name[:-4]}" for name in names)
    assert call("pack", "shards", "out", "--unlabeled").exit_code == 0
    assert {path.name for path in Path("out").iterdir()} <= {"shard-000000.tar", SIDECAR, "classes.txt"}
    with tarfile.open("out/shard-000000.tar") as packed:
        assert all(member.isreg() for member in packed)
        assert not [name for name in packed.getnames() if name.startswith(("/", "..")) or "/../" in name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_shard_is_not_followed(outside: Path, kind: bytes) -> None:
    tar(Path("shards/0.tar"), {"a.png": png(), "b.png": link("b.png", kind, str(outside / "secret.png"))})
    refused(*planned(data__unlabeled="shards"), part="b.png: expected a file, got a")


@pytest.mark.parametrize(
    "line", ["../secret.png", "{outside}/secret.png", "~root/x.png", "$HOME/x.png", "pipe:touch {outside}/m"]
)
def test_a_list_that_leads_out_of_its_folder_reads_images_and_nothing_else(outside: Path, line: str) -> None:
    """A list is its owner's own and may name any image; what is none is not shown."""
    Path("list.txt").write_text(line.format(outside=outside) + "\n")
    refused(*planned(data__unlabeled="list.txt"), part="1 of 1 missing")


DEVICES = ["a source", "a list", "the classes of a list", "shards", "what a recipe extends"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "place",
    [
        *DEVICES,
        "weights",
        "an onnx file",
    ],
)
def test_a_device_or_a_named_pipe_is_no_file(outside: Path, place: str) -> None:
    os.mkfifo("pipe")
    Path("list.txt").write_text("a.png 0\n")
    Path("a.png").write_bytes(png())
    refused(*planned(**PLACES[place]("pipe")))
    done = bounded(*planned(**PLACES[place]("/dev/zero")))
    assert done.returncode in REFUSED, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("device", ["pipe", "/dev/zero"])
def test_weights_are_read_from_files_alone(outside: Path, device: str) -> None:
    os.mkfifo("pipe")
    with pytest.raises(DataError, match="which is no file"):
        checkpoint.read_weights(Path(device))
    refused("import", device, part="which is no file")


def test_names_with_control_characters_do_not_reach_the_terminal(outside: Path) -> None:
    Path("a.png").write_bytes(png())
    Path("b\x1b[2J\x07.png").write_bytes(png())
    Path("list.txt").write_text("a.png 9\n")
    Path("classes.txt").write_text("cat\x1b]0;title\x07\x1b[31m\ndog\n")
    refused(*planned(data__labeled={"list": "list.txt", "classes": "classes.txt"}))
    Path("list.txt").write_text("c\x1b[2J\x07.png 0\n")
    refused(*planned(data__labeled={"list": "list.txt"}))
    tar(Path("0.tar"), {"b\x1b[2J\x07.png": png(), "b\x1b[2J\x07.cls": b"\x1b[31m"})
    refused(*planned(data__labeled="0.tar"))
    refused("plan", "evil\x1b[2J.yaml")
    Path("list.txt").write_text("a.png 0\n")
    Path("classes.txt").write_text("cat\x1b]0;title\x07\x1b[31m\n")
    refused(*planned(data__labeled={"list": "list.txt", "classes": "classes.txt"}, data__validation="builtin:shapes"))


STALLED = """
import sys
from pathlib import Path
from ssld import engine
from ssld.errors import StallError
from ssld.journal import Journal
engine.end(StallError(f"expected {sys.argv[1]} to be read"), Journal(Path()), f"continue: {sys.argv[1]}")
"""


def test_a_name_that_a_run_waits_for_in_vain_does_not_reach_the_terminal(outside: Path) -> None:
    name = "a\x1b[2J\udc80.png"
    done = subprocess.run([sys.executable, "-c", STALLED, name], capture_output=True, check=False)
    assert done.returncode == 69
    shown = "a\\x1b[2J\\udc80.png"
    assert done.stderr.decode() == f"Error: expected {shown} to be read\ncontinue: {shown}\n"
    assert f"Error: expected {shown} to be read\n" in Path("train.log").read_text()


# Checkpoints, labels, foreign networks -------------------------------------------------------------------------------


def hostile_checkpoint(content: bytes, state: bytes = b'{"format": 1, "step": 1, "state": {}}\n') -> Path:
    """A checkpoint whose manifest is right about what is in it."""
    return commit_directory(Path("step-00000001"), {"student.safetensors": content, "state.json": state}).directory


def header(document: object) -> bytes:
    body = json.dumps(document).encode() if not isinstance(document, bytes) else document
    return len(body).to_bytes(8, "little") + body


HEADERS = {
    "a pickle": PICKLES["protocol-4"]("false"),
    "a length of 2 to the 60": (2**60).to_bytes(8, "little") + b"{}",
    "100,000 lists": header(b"[" * 100_000),
    "seventy dimensions": header({"a": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}}) + bytes(4),
    "a shape that overflows": header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}})
    + bytes(4),
    "an empty shape of 2 to the 62": header({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}),
    "two tensors in one place": header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"})
    + bytes(4),
    "an unknown type": header({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}) + bytes(8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_checkpoint_with_a_hostile_header(outside: Path, name: str) -> None:
    directory = hostile_checkpoint(HEADERS[name])
    with pytest.raises(DataError):
        checkpoint.read_weights(directory)
    Path("net.safetensors").write_bytes(HEADERS[name])
    refused(*taught(network="ResNet18_vd", weights="net.safetensors"))


@pytest.mark.parametrize(
    "state",
    [
        b"[" * 100_000,
        b"{}",
        b"[]",
        b'{"format": 1}',
        b'{"format": 1, "step": "1", "state": {}}',
        b"\x80\x04.",
        b'{"format": 1, "step": 1, "state": {"model": 3}}',
    ],
)
def test_a_checkpoint_with_a_hostile_state(outside: Path, state: bytes) -> None:
    refused("eval", hostile_checkpoint(safetensors.numpy.save({"a": np.zeros(1)}), state), "builtin:shapes")


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a\0b"])
def test_a_manifest_that_names_a_file_elsewhere(outside: Path, name: str) -> None:
    directory = hostile_checkpoint(safetensors.numpy.save({"a": np.zeros(1)}))
    body: dict[str, Any] = {"files": {name: {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}}}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    manifest = json.dumps({**body, "sha256": own}, sort_keys=True, indent=1) + "\n"
    (directory / "manifest.json").write_text(manifest)
    refused("eval", directory, "builtin:shapes")


LABEL_FILES = {
    "a pickle": PICKLES["protocol-4"]("false"),
    "a length of 2 to the 60": (2**60).to_bytes(8, "little") + b"{}",
    "100,000 lists": header(b"[" * 100_000),
    "a shape that overflows": header({"__metadata__": {"ssld": "{}"}, "rest": {"shape": [2**40, 2**40]}}),
}


@pytest.mark.parametrize("name", LABEL_FILES)
@pytest.mark.parametrize(
    "description",
    [
        '{"format": 1}',
        "[" * 100_000,
        '{"format": 99}',
        "[]",
        "\x80\x04.",
    ],
)
def test_hostile_label_files(outside: Path, name: str, description: str) -> None:
    Path("labels").mkdir()
    Path("labels", f"0{SUFFIX}").write_bytes(LABEL_FILES[name])
    Path("labels", DESCRIPTION).write_text(description)
    for words in (["info"], ["verify"]):
        refused("labels", *words, "labels")


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "/etc/passwd",
        "a/../../secret.bin",
        "/dev/zero",
    ],
)
def test_an_onnx_file_whose_tensors_lie_elsewhere(outside: Path, location: str) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[12, 2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "96"}.items():
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 3, 2, 2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", 2])],
        [tensor],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    Path("net.onnx").write_bytes(made.SerializeToString())
    refused(*taught(onnx="net.onnx"), part="net.onnx")
