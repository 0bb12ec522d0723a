"""The import law: who may import whom, read from the sources, and what stays unloaded when the command starts.

A check takes sources, {path in the checkout: text}, and returns one line for each breach; the tests at the end feed
each check a breach.
"""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("stages", "teachers", "students")
PRODUCT = ("ssld", *ROOMS, "recipes")

OWNERS = {
    "click": ("ssld/cli.py",),
    "faiss": ("ssld/retrieval/*",),
    "numba": ("ssld/train/compiling.py",),
    "onnxruntime": ("teachers/onnx.py",),
    "paddle": ("ssld/train/*", "ssld/doctor.py", "students/*"),
    "safetensors": ("ssld/checkpoint.py", "ssld/labels/*"),
    "webdataset": ("ssld/data/*",),
    "yaml": ("ssld/recipe/*",),
}
"""Who may import a library, at any depth."""

DOORS = {
    ("ssld/__init__.py", "__getattr__"): "a plug-in, and `ssld --help`, import ssld without the engine",
    ("ssld/cli.py", "*"): "a command imports what it does, so that `ssld --help` is immediate",
    ("ssld/engine.py", "Runner._work"): "paddle loads when a run has work to do, not for plan and status",
    ("ssld/engine.py", "label"): "paddle loads when labels are made, not for plan and status",
    ("stages/*.py", "run"): "plan, schema and editors read a kind's settings without paddle",
    ("teachers/*.py", "*.load"): "plan knows a teacher by its spec, without paddle; it loads when it is first asked",
}
"""Functions that may import from ssld, and why: everywhere else an import stands at the top of its file."""

WITH_PADDLE = (
    "ssld.train",
    "ssld.preflight",
    "ssld.preview.probe",
    "ssld.crew",
    "ssld.follower",
    "ssld.doctor",
    "ssld.importing.conversion",
    "ssld.score",
    "ssld.students",
    "ssld.__main__",
)
"""What loads paddle when it is imported; __main__ is here because to import it is to run the command."""

CARRIED = {"pydantic_core": "pydantic"}
"""Import names whose distribution is pinned exactly by one that setup.cfg names."""

Sources = Mapping[str, str]


@dataclass(frozen=True)
class Import:
    """One imported module. module: absolute; relative: how many dots; function: the one it stands in, or ""."""

    path: str
    line: int
    module: str
    relative: int
    function: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def module_name(path: str) -> str:
    """The name under which a file of the checkout is installed; a file outside of ssld keeps its own."""
    parts = Path(path).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] not in PRODUCT[1:] else ("ssld", *parts))


def imports(path: str, text: str, modules: Collection[str]) -> Iterator[Import]:
    """Every import of a file, wherever it stands. modules: those that `from package import name` may mean by name."""
    package = module_name(path) if path.endswith("__init__.py") else module_name(path).rpartition(".")[0]
    for node, function in walk(ast.parse(text), ""):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, 0, function)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in dict.fromkeys(alias.name for alias in node.names):
                inner = f"{base}.{name}"
                yield Import(path, node.lineno, inner if inner in modules else base, node.level, function)


def walk(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
    """All nodes below, with the dotted name of the function that each stands in; "" at module level."""
    for child in ast.iter_child_nodes(node):
        yield child, function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from walk(child, f"{qualifier(node, function)}{child.name}")
        else:
            yield from walk(child, function)


def qualifier(parent: ast.AST, function: str) -> str:
    outer = f"{function}." if function else ""
    return f"{outer}{parent.name}." if isinstance(parent, ast.ClassDef) else outer


def all_imports(sources: Sources) -> list[Import]:
    modules = {module_name(path) for path in sources}
    return [found for path, text in sources.items() for found in imports(path, text, modules)]


def room_of(path: str) -> str | None:
    return next((room for room in ROOMS if path.startswith(f"{room}/")), None)


# The checks ----------------------------------------------------------------------------------------------------------


def breaches_between_rooms(sources: Sources) -> list[str]:
    """The engine imports no room; a room imports no other room, the engine by its name and itself by dots."""
    lines = []
    for found in all_imports(sources):
        target = next((room for room in ROOMS if f"{found.module}.".startswith(f"ssld.{room}.")), None)
        own = room_of(found.path)
        if target and own is None:
            lines.append(f"{found}: the engine reaches rooms through entry points only")
        elif target and target != own:
            lines.append(f"{found}: a room imports no other room; move what they share into the engine")
        elif target and not found.relative:
            lines.append(f"{found}: a room imports itself relatively")
        elif found.relative and not (own and target):
            lines.append(f"{found}: the engine is imported by its full name")
    return lines


def breaches_of_entry_points(sources: Sources) -> list[str]:
    """No product file imports by a name it computes; ssld/plugins.py loads entry points, and that is the one way."""
    lines = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            if name in ("import_module", "__import__"):
                lines.append(f"{path}:{node.lineno} uses {name}: plug-ins are loaded by ssld/plugins.py only")
    return lines


def breaches_of_ownership(sources: Sources) -> list[str]:
    """Each library of OWNERS is imported by its owners only."""
    return [
        f"{found}: {found.top} belongs to {', '.join(OWNERS[found.top])}"
        for found in all_imports(sources)
        if found.top in OWNERS and not any(fnmatch(found.path, owner) for owner in OWNERS[found.top])
    ]


def breaches_of_doors(sources: Sources) -> list[str]:
    """An import of ssld inside a function stands at a door, and every door of DOORS is used."""
    nested = [found for found in all_imports(sources) if found.function and found.top == "ssld"]
    used: set[tuple[str, str]] = set()
    lines = []
    for found in nested:
        doors = {door for door in DOORS if fnmatch(found.path, door[0]) and fnmatch(found.function, door[1])}
        used |= doors
        if not doors:
            lines.append(f"{found} inside {found.function}: move it to the top of the file")
    return lines + [
        f"{path} {function}: no longer a door; take it off the list" for path, function in DOORS.keys() - used
    ]


def cycle(sources: Sources) -> list[str]:
    """A circle of imports, if there is one: those in functions and for type checkers count as well."""
    graph: dict[str, set[str]] = {module_name(path): set() for path in sources}
    for found in all_imports(sources):
        if found.module in graph:
            graph[module_name(found.path)].add(found.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def breaches_of_names(sources: Sources) -> list[str]:
    """No file, tests included, imports a room by the name of its folder: that would be a second copy of it."""
    return [f"{found}: import it as ssld.{found.top}" for found in all_imports(sources) if found.top in PRODUCT[1:]]


def breaches_of_packages(sources: Sources, setup: str) -> list[str]:
    """setup.cfg lists every folder with an __init__.py, and no other, and says where it lies."""
    options = read_setup(setup)["options"]
    listed = set(options["packages"].split())
    places = dict(re.findall(r"(\S+)\s*=\s*(\S+)", options["package_dir"]))
    there = {module_name(path): path for path in sources if path.endswith("__init__.py")}
    lines = [f"{there[name]}: {name} is not in setup.cfg's packages" for name in sorted(there.keys() - listed)]
    lines += [f"setup.cfg lists {name}, which has no __init__.py" for name in sorted(listed - there.keys())]
    for name in sorted(listed & there.keys()):
        base = next((known for known in sorted(places, reverse=True) if f"{name}.".startswith(f"{known}.")), "")
        place = "/".join([places.get(base, base), *name.removeprefix(base).strip(".").split(".")]).rstrip("/")
        if place != str(Path(there[name]).parent):
            lines.append(f"setup.cfg's package_dir puts {name} into {place}, it lies in {Path(there[name]).parent}")
    return lines


def breaches_of_requirements(sources: Sources, setup: str, distributions: Mapping[str, list[str]]) -> list[str]:
    """What the product imports is what setup.cfg requires, not what happens to come with it.

    distributions: those that hold each import name. An extra counts too: what it brings is imported behind a message.
    """
    config = read_setup(setup)
    wanted = "\n".join([config["options"]["install_requires"], *config["options.extras_require"].values()])
    required = {canonical(name) for name in re.findall(r"^\s*([\w.-]+)", wanted, re.MULTILINE)}
    lines = []
    for found in all_imports(sources):
        if found.top in ("ssld", "__future__") or found.top in sys.stdlib_module_names:
            continue
        names = [CARRIED[found.top]] if found.top in CARRIED else distributions.get(found.top, [found.top])
        offers = sorted({canonical(name) for name in names})
        if not required.intersection(offers):
            lines.append(f"{found}: expected {' or '.join(offers)} in setup.cfg's install_requires")
    return lines


def read_setup(text: str) -> configparser.ConfigParser:
    config = configparser.ConfigParser(delimiters=("=",))
    config.read_string(text)
    return config


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


# The checkout --------------------------------------------------------------------------------------------------------


def read(*folders: str) -> dict[str, str]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files}


@pytest.fixture(scope="module")
def product() -> dict[str, str]:
    return read(*PRODUCT)


@pytest.fixture(scope="module")
def setup() -> str:
    return (ROOT / "setup.cfg").read_text("utf-8")


@pytest.mark.parametrize(
    "check",
    [
        breaches_between_rooms,
        breaches_of_entry_points,
        breaches_of_ownership,
        breaches_of_doors,
        cycle,
        breaches_of_names,
    ],
)
def test_the_product_keeps_the_law(check: Callable[[Sources], list[str]], product: dict[str, str]) -> None:
    assert len(product) > 30
    assert check(product) == []


def test_no_file_of_the_checkout_imports_a_room_by_its_folder() -> None:
    assert breaches_of_names(read(*PRODUCT, "tests", "benchmarks", "examples")) == []


def test_every_package_is_installed(setup: str) -> None:
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."]
    generated = {"build", "dist", "runs"}
    assert breaches_of_packages(read(*(set(folders) - generated)), setup) == []


def test_every_import_is_required(product: dict[str, str], setup: str) -> None:
    assert breaches_of_requirements(product, setup, packages_distributions()) == []


# What is loaded ------------------------------------------------------------------------------------------------------

TINY = """
name: tiny
images:
  resolution: 16
  train: [RandCropImage, NormalizeImage]
  eval: [ResizeImage: {resize_short: 16}, CropImage, NormalizeImage]
data:
  labeled: builtin:shapes?count=16&size=16&classes=2
  validation: builtin:shapes?count=16&size=16&classes=2&seed=1
stages:
  teach: {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 1, batch_size: 8}
  distill: {kind: distill, teacher: {stage: teach}, student: MobileNetV3_small_x0_35, data: labeled, epochs: 1}
"""
COMMAND = "from ssld.cli import main\nmain({arguments!r}, standalone_mode=False)"


def loaded(program: str, folder: Path) -> set[str]:
    """The modules that a fresh interpreter holds after a program; it works in `folder` and sees the checkout."""
    (folder / "tiny.yaml").write_text(TINY)
    script = f"{program}\nimport sys\nprint('\\nloaded:', *sys.modules)\n"
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


@pytest.mark.parametrize(
    "program",
    [
        "import ssld",
        COMMAND.format(arguments=["--help"]),
        "import ssld.engine",
        COMMAND.format(arguments=["plan", "tiny.yaml"]),
    ],
    ids=["import ssld", "ssld --help", "import ssld.engine", "ssld plan"],
)
def test_neither_paddle_nor_faiss_is_loaded(program: str, tmp_path: Path) -> None:
    modules = loaded(program, tmp_path)
    assert "ssld" in modules
    assert not {"paddle", "faiss"} & modules


def test_import_ssld_and_help_load_neither_pydantic_nor_numpy(tmp_path: Path) -> None:
    """What the two cost is what a shell completion and a plug-in's own import cost."""
    modules = loaded("import ssld\n" + COMMAND.format(arguments=["--help"]), tmp_path)
    assert not {"numpy", "pydantic", "yaml", "PIL"} & modules


def test_all_that_needs_no_paddle_loads_without_it(product: dict[str, str], tmp_path: Path) -> None:
    names = [name for path in product if not (name := module_name(path)).startswith(WITH_PADDLE)]
    assert {"ssld.engine", "ssld.cli", "ssld.stages.distill", "ssld.teachers.network"} <= set(names)
    modules = loaded("\n".join(f"import {name}" for name in names), tmp_path)
    assert set(names) <= modules
    assert not {"paddle", "faiss"} & modules


def test_a_run_imports_no_room_by_its_folder(tmp_path: Path) -> None:
    # with the checkout on sys.path, as in a shell that stands in it, a bare room can be found
    program = f"import sys\nsys.path.append({str(ROOT)!r})\n"
    modules = loaded(program + COMMAND.format(arguments=["run", "tiny.yaml", "--trust-teacher"]), tmp_path)
    assert {"paddle", "ssld.stages.distill", "ssld.students.mobilenet_v3", "ssld.teachers.stage"} <= modules
    assert not {name for name in modules if name.partition(".")[0] in PRODUCT[1:]}


# The checks see what they are for ------------------------------------------------------------------------------------

LAWFUL = {
    "ssld/__init__.py": "def __getattr__(name):\n    from ssld import engine\n",
    "ssld/cli.py": "import click\nimport ssld\ndef run():\n    from ssld.engine import run\n",
    "ssld/engine.py": (
        "class Runner:\n    def _work(self):\n        from ssld.score import score_checkpoint\n"
        "def label():\n    from ssld.train.networks import use_device\n"
    ),
    "ssld/score.py": "from ssld.train import networks\n",
    "ssld/train/__init__.py": "import paddle\n",
    "ssld/train/networks.py": "from ssld.errors import SsldError\n",
    "ssld/errors.py": "",
    "stages/__init__.py": "",
    "stages/distill.py": "from ssld.errors import SsldError\ndef run(task):\n    from ssld.train import networks\n",
    "teachers/__init__.py": "",
    "teachers/network.py": "def network():\n    def load():\n        from ssld.train import networks\n",
    "students/__init__.py": "",
    "students/mobilenet_v3.py": "import paddle.nn\nfrom .blocks import Block\nfrom . import blocks\n",
    "students/blocks.py": "import paddle\n",
}


@pytest.mark.parametrize(
    "check",
    [breaches_between_rooms, breaches_of_entry_points, breaches_of_ownership, breaches_of_doors, cycle],
)
def test_a_lawful_tree_passes(check: Callable[[Sources], list[str]]) -> None:
    assert check(LAWFUL) == []


@pytest.mark.parametrize(
    ("check", "path", "source", "message"),
    [
        (breaches_between_rooms, "ssld/graph.py", "from ssld.stages import distill", "entry points only"),
        (breaches_between_rooms, "ssld/graph.py", "from ssld import stages", "entry points only"),
        (breaches_between_rooms, "ssld/graph.py", "def f():\n    import ssld.students.resnet_vd", "entry points only"),
        (breaches_between_rooms, "ssld/graph.py", "from .errors import SsldError", "by its full name"),
        (breaches_between_rooms, "stages/mine.py", "from ssld.students.blocks import Block", "no other room"),
        (breaches_between_rooms, "stages/mine.py", "from ..students import blocks", "no other room"),
        (breaches_between_rooms, "stages/mine.py", "from ..errors import SsldError", "by its full name"),
        (breaches_between_rooms, "students/mine.py", "from ssld.students.blocks import Block", "itself relatively"),
        (breaches_of_entry_points, "ssld/graph.py", "import importlib\nimportlib.import_module('x')", "import_module"),
        (breaches_of_entry_points, "stages/mine.py", "__import__('ssld.students')", "__import__"),
        (breaches_of_ownership, "ssld/graph.py", "import yaml", "yaml belongs to ssld/recipe/*"),
        (breaches_of_ownership, "ssld/graph.py", "from paddle.nn import Layer", "paddle belongs to"),
        (breaches_of_ownership, "stages/mine.py", "def run(task):\n    import paddle", "paddle belongs to"),
        (breaches_of_ownership, "teachers/mine.py", "def load():\n    import paddle", "paddle belongs to"),
        (breaches_of_ownership, "ssld/train/mine.py", "if TYPE_CHECKING:\n    import click", "click belongs to"),
        (breaches_of_ownership, "ssld/data/mine.py", "import safetensors.numpy", "safetensors belongs to"),
        (breaches_of_doors, "ssld/graph.py", "def plan():\n    from ssld import errors", "ssld.errors inside plan"),
        (breaches_of_doors, "stages/mine.py", "def helper():\n    import ssld.train", "inside helper"),
        (breaches_of_doors, "teachers/mine.py", "def mine():\n    from ssld.train import networks", "inside mine"),
        (breaches_of_doors, "stages/mine.py", "class A:\n    def run(self):\n        import ssld", "inside A.run"),
        (cycle, "ssld/errors.py", "from ssld.train import networks", "ssld.errors imports ssld.train.networks"),
        (cycle, "ssld/errors.py", "if TYPE_CHECKING:\n    import ssld.cli", "ssld.cli imports ssld"),
        (breaches_of_names, "tests/mine.py", "from stages.distill import stage", "ssld.stages"),
        (breaches_of_names, "benchmarks/mine.py", "def f():\n    import students", "ssld.students"),
    ],
)
def test_a_breach_is_seen(check: Callable[[Sources], list[str]], path: str, source: str, message: str) -> None:
    [breach] = check({**LAWFUL, path: source})
    assert message in breach


def test_a_door_that_is_gone_is_seen() -> None:
    gone = {**LAWFUL, "ssld/engine.py": LAWFUL["ssld/engine.py"].replace("_work", "_play")}
    breaches = breaches_of_doors(gone)
    assert any("Runner._work: no longer a door" in breach for breach in breaches)
    assert any("inside Runner._play" in breach for breach in breaches)


SETUP = """
[options]
packages =
    ssld
    ssld.train
    ssld.stages
    ssld.students
    ssld.teachers
package_dir =
    ssld = ssld
    ssld.stages = stages
    ssld.students = students
    ssld.teachers = teachers
install_requires =
    click >=8
    PaddlePaddle
[options.extras_require]
demo =
    scikit-learn
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    ssld.train\n", "", "ssld.train is not in setup.cfg's packages"),
        ("    ssld.train\n", "    ssld.train\n    ssld.gone\n", "lists ssld.gone"),
        ("ssld.stages = stages", "ssld.stages = rooms", "puts ssld.stages into rooms, it lies in stages"),
    ],
)
def test_a_package_that_is_not_installed_is_seen(old: str, new: str, message: str) -> None:
    assert breaches_of_packages(LAWFUL, SETUP) == []
    [breach] = breaches_of_packages(LAWFUL, SETUP.replace(old, new))
    assert message in breach


def test_an_import_that_is_not_required_is_seen() -> None:
    distributions = {"click": ["click"], "paddle": ["paddlepaddle"], "sklearn": ["scikit-learn"], "PIL": ["pillow"]}
    source = dedent("""
        import json, sklearn
        import PIL.Image
    """)
    [breach] = breaches_of_requirements({**LAWFUL, "ssld/graph.py": source}, SETUP, distributions)
    assert breach == "ssld/graph.py:3 imports PIL.Image: expected pillow in setup.cfg's install_requires"
