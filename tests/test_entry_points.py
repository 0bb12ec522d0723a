"""What setup.cfg offers is what is installed, and each offer is what its group promises."""

from __future__ import annotations

import configparser
import inspect
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

import pytest

from ssld.contracts import StageKind
from ssld.settings import StageSettings

ROOT = Path(__file__).parents[1]


def declared() -> dict[tuple[str, str], str]:
    """{(group, name): target} as setup.cfg says it."""
    config = configparser.ConfigParser(delimiters=("=",))
    config.read(ROOT / "setup.cfg", "utf-8")
    lines = [
        (group, *line.split("=", 1))
        for group, text in config["options.entry_points"].items()
        for line in text.strip().splitlines()
    ]
    return {(group, name.strip()): target.strip() for group, name, target in lines}


def entry_points(group: str) -> list[object]:
    found = [(name, target) for (its_group, name), target in declared().items() if its_group == group]
    return [pytest.param(EntryPoint(name, target, group), id=name) for name, target in found]


def test_the_installed_metadata_are_those_of_setup_cfg() -> None:
    found = {(entry.group, entry.name): entry.value for entry in distribution("ssld").entry_points}
    assert found == declared(), (
        'the installed entry points are older than setup.cfg: run pip install -e ".[test]" again'
    )


def test_no_group_is_misspelt_or_empty() -> None:
    assert {group for group, _ in declared()} == {
        "console_scripts",
        "ssld.stages",
        "ssld.teachers",
        "ssld.students",
        "ssld.losses",
    }


@pytest.mark.parametrize("entry_point", entry_points("console_scripts"))
def test_a_command_is_callable_without_arguments(entry_point: EntryPoint) -> None:
    inspect.signature(entry_point.load()).bind()


@pytest.mark.parametrize("entry_point", entry_points("ssld.stages"))
def test_a_stage_is_a_stage_kind_whose_settings_name_it(entry_point: EntryPoint) -> None:
    kind = entry_point.load()
    assert isinstance(kind, StageKind)
    assert issubclass(kind.settings, StageSettings)
    assert kind.settings.model_json_schema()["properties"]["kind"]["const"] == entry_point.name
    inspect.signature(kind.run).bind("task")


@pytest.mark.parametrize("entry_point", entry_points("ssld.students"))
def test_a_student_is_built_from_its_number_of_classes(entry_point: EntryPoint) -> None:
    factory = entry_point.load()
    inspect.signature(factory).bind(num_classes=10)
    # the name is what checkpoints and PaddleClas call the network
    assert factory.__name__ == entry_point.name


@pytest.mark.parametrize("entry_point", entry_points("ssld.teachers"))
def test_a_teacher_takes_its_recipe_keys_by_name(entry_point: EntryPoint) -> None:
    parameters = inspect.signature(entry_point.load()).parameters.values()
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert parameters
    assert all(parameter.kind in by_name for parameter in parameters)


@pytest.mark.parametrize("entry_point", entry_points("ssld.losses"))
def test_a_loss_needs_no_more_than_both_logits(entry_point: EntryPoint) -> None:
    inspect.signature(entry_point.load()).bind("student", "teacher")
