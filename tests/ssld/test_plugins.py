from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from ssld import plugins
from ssld.errors import DataError, PluginError, RecipeError, SsldError


class Site:
    """A folder on sys.path that distributions are installed into, as pip would."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(str(root))

    def install(self, name: str, version: str, entries: str, **modules: str) -> None:
        info = self.root / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(dedent(entries))
        for module, source in modules.items():
            self.monkeypatch.delitem(sys.modules, module, raising=False)
            (self.root / f"{module}.py").write_text(dedent(source))

    def teacher(self, source: str) -> None:
        """Install the teacher `acme`, a function or class `make` in the source."""
        self.install("acme-teachers", "0.3", "[ssld.teachers]\nacme = acme_module:make\n", acme_module=source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def acme(options: dict[str, Any], supplied: dict[str, Any] | None = None) -> Any:
    return plugins.call("teachers", "acme", options, supplied)


def test_find_imports_nothing_and_sorts(site: Site) -> None:
    site.install("zeta", "1.0", "[ssld.teachers]\nzz = never_there:x\n")
    site.install("acme", "2.0", "[ssld.teachers]\nzz = never_there:x\naa = never_there:x\n[ssld.losses]\nl = n:x\n")
    found = [plugin for plugin in plugins.find("teachers") if plugin.distribution in ("zeta", "acme")]
    assert [(plugin.name, plugin.distribution, plugin.version) for plugin in found] == [
        ("aa", "acme", "2.0"),
        ("zz", "acme", "2.0"),
        ("zz", "zeta", "1.0"),
    ]
    assert "never_there" not in sys.modules


def test_built_ins_come_in_by_the_same_door() -> None:
    assert {"distill", "finetune", "fixres"} <= {found.name for found in plugins.find("stages")}
    assert plugins.origin("stages", "distill").startswith("ssld ")


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="stages, teachers, students, losses, got 'pools'"):
        plugins.find("pools")


def test_distribution_found_twice_counts_once(site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    site.teacher("make = 1")
    other = Site(tmp_path_factory.mktemp("again"), site.monkeypatch)
    other.teacher("make = 2")
    assert [found.name for found in plugins.find("teachers")].count("acme") == 1
    assert plugins.load("teachers", "acme") == 2


def test_unknown_name_gives_the_nearest_and_all(site: Site) -> None:
    site.install("acme", "1", "[ssld.teachers]\nclip-b16 = m:x\nzebra = m:x\n")
    with pytest.raises(RecipeError, match=r"unknown teacher 'CLIP-b-16', did you mean clip-b16\? known: .*zebra"):
        plugins.load("teachers", "CLIP-b-16")


def test_two_distributions_with_one_name_are_both_named(site: Site) -> None:
    for name, version in (("acme", "1.0"), ("bolt", "2.1")):
        site.install(name, version, "[ssld.teachers]\nvit = m:x\n")
    with pytest.raises(PluginError, match=r"teacher 'vit': acme 1\.0 and bolt 2\.1; uninstall"):
        plugins.load("teachers", "vit")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def make(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("other = 1", "AttributeError"),
    ],
)
def test_failed_import_names_the_package_and_the_cause(site: Site, source: str, reason: str) -> None:
    site.teacher(source)
    wanted = f"^teacher 'acme' of package acme-teachers 0.3 failed to load: {reason}"
    with pytest.raises(PluginError, match=wanted) as caught:
        plugins.load("teachers", "acme")
    assert type(caught.value.__cause__).__name__ == reason.partition(":")[0]


def test_stage_kind_must_be_one(site: Site) -> None:
    site.install("acme", "1", "[ssld.stages]\nodd = acme_stage:stage\n", acme_stage="stage = 3")
    with pytest.raises(PluginError, match=r"stage kind 'odd' of package acme 1: expected an .*StageKind, got int"):
        plugins.stage_kind("odd")


TYPED = """
    from __future__ import annotations
    from pathlib import Path
    from typing import TYPE_CHECKING, Literal
    if TYPE_CHECKING:
        from nowhere import Teacher, Device

    def make(size: int, *, scale: float = 1.0, weights: Path | None = None, mean: tuple[float, ...] = (),
             mode: Literal["fast", "exact"] = "fast", flip: bool = False, free=None,
             device: Device = None) -> Teacher:
        return dict(size=size, scale=scale, weights=weights, mean=mean, mode=mode, flip=flip, free=free)
"""


@pytest.mark.parametrize(
    ("key", "given", "received"),
    [
        ("size", 8, 8),
        ("scale", 2, 2.0),
        ("weights", "a/b", Path("a/b")),
        ("weights", None, None),
        ("mean", [1, 0.5], (1.0, 0.5)),
        ("mode", "exact", "exact"),
        ("flip", True, True),
        ("free", {"any": ["thing"]}, {"any": ["thing"]}),
    ],
)
def test_options_arrive_as_the_types_declared(site: Site, key: str, given: Any, received: Any) -> None:
    site.teacher(TYPED)
    value = acme({"size": 1, key: given})[key]
    assert value == received
    assert type(value) is type(received)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("size", "abc", "size: expected a whole number, got 'abc'"),
        ("size", "64", "size: expected a whole number, got '64'"),
        ("size", True, "size: expected a whole number, got true"),
        ("size", 1.5, "size: expected a whole number, got 1.5"),
        ("scale", "1", "scale: expected a number, got '1'"),
        ("scale", float("inf"), "scale: expected a number, got inf"),
        ("mean", [1, "x"], "mean[1]: expected a number, got 'x'"),
        ("mode", "slow", "mode: expected fast or exact, got 'slow'"),
        ("flip", 1, "flip: expected true or false, got 1"),
        ("wieghts", "a", "wieghts: unknown option, did you mean weights? (got 'a')"),
    ],
)
def test_wrong_option_is_a_recipe_error(site: Site, key: str, given: Any, message: str) -> None:
    site.teacher(TYPED)
    with pytest.raises(RecipeError) as caught:
        acme({"size": 1, key: given})
    assert str(caught.value) == f"teacher 'acme' of package acme-teachers 0.3: {message}"


def test_all_faults_come_at_once(site: Site) -> None:
    site.teacher(TYPED)
    with pytest.raises(RecipeError, match=r"scale: .*; flap: unknown option.*; size: required option is missing"):
        acme({"scale": "x", "flap": 1})


def test_supplied_values_fill_only_open_named_parameters(site: Site) -> None:
    site.teacher("def make(classes, resolution=7, **rest): return classes, resolution, rest")
    offered = {"classes": ("a", "b"), "resolution": 32, "device": "cpu"}
    assert acme({}, offered) == (("a", "b"), 32, {})
    assert acme({"resolution": 5, "extra": 1}, offered) == (("a", "b"), 5, {"extra": 1})


def test_annotation_of_further_options_is_checked(site: Site) -> None:
    site.teacher("def make(**rest: int): return rest")
    assert acme({"any": 3}) == {"any": 3}
    with pytest.raises(RecipeError, match="any: expected a whole number, got 'x'"):
        acme({"any": "x"})


@pytest.mark.parametrize(
    "source",
    [
        "class make:\n def __init__(self, size: 'int'): self.size = size",
        "from functools import partial\ndef f(kind, size: 'int'): return size\nmake = partial(f, 'x')",
        "class F:\n def __call__(self, size: 'int'): return size\nmake = F()",
    ],
)
def test_any_callable_is_a_factory(site: Site, source: str) -> None:
    site.teacher(source)
    made = acme({"size": 3})
    assert getattr(made, "size", made) == 3
    with pytest.raises(RecipeError, match="size: expected a whole number"):
        acme({"size": "3"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("make = 3", "expected a callable"),
        ("def make(size: 'Nowhere'): ...", "the type of an option cannot be evaluated: name 'Nowhere'"),
        ("class Odd: ...\ndef make(size: Odd): ...", "option size has a type that no recipe can give"),
        ("def make(size): raise KeyError('k')", "raised KeyError: 'k'"),
    ],
)
def test_broken_factory_is_a_plugin_error_with_its_cause(site: Site, source: str, message: str) -> None:
    site.teacher(source)
    with pytest.raises(PluginError, match=f"teacher 'acme' of package acme-teachers 0.3:? {message}") as caught:
        acme({"size": 1})
    assert caught.value.__cause__ is not None


def test_own_errors_pass_through(site: Site) -> None:
    site.teacher("from ssld.errors import DataError\ndef make(): raise DataError('no such file')")
    with pytest.raises(SsldError) as caught:
        acme({})
    assert type(caught.value) is DataError
