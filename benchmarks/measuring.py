"""What the benchmarks share: rows of one table, figures that take turns, and processes of their own."""

import inspect
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from ssld.environment import environment, installed
from ssld.threads import cores

TURNS = 5


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ratio: to what `to` names, both measured in one run; asked: of the ratio where there is one, else of the figure.
    """

    name: str
    figure: float
    unit: str
    ratio: float | None = None
    to: str = ""
    asked: str = ""
    how: str = ""

    def cells(self) -> list[str]:
        ratio = "" if self.ratio is None else f"{self.ratio:.3f} × {self.to}"
        return [self.name, f"{shortened(self.figure)} {self.unit}", ratio, self.asked, self.how]


Rows = Callable[[bool], Iterable[Row]]
"""What a benchmark offers; with True everything is tiny and measured once, which shows only that it runs."""


@dataclass(frozen=True)
class Turns:
    """The figures of some measures, by name, in each turn."""

    found: Sequence[Mapping[str, float]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.found[0])

    def median(self, name: str) -> float:
        return statistics.median(turn[name] for turn in self.found)

    def ratio(self, name: str, to: str) -> float:
        """The median of the turns' ratios."""
        return statistics.median(turn[name] / turn[to] for turn in self.found)


def interleaved(measures: Mapping[str, Callable[[], float]], quick: bool) -> Turns:
    """Take the measures in turns, so that whatever else the machine does meets each of them."""
    return Turns([{name: measure() for name, measure in measures.items()} for _ in range(1 if quick else TURNS)])


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rate(work: Callable[[], object], items: int, seconds: float) -> float:
    """Items per second, over at least so many seconds and one call."""
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < seconds:
        work()
        calls += 1
    return calls * items / (time.perf_counter() - began)


def shortened(figure: float) -> str:
    """Three digits, or all before the point.

    >>> shortened(0.12345), shortened(12345.6)
    ('0.123', '12,346')
    """
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"


def in_child(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a function of a benchmark returns in a process of its own, and the peak of that one's memory in MiB."""
    module = Path(str(inspect.getsourcefile(function))).stem
    command = [sys.executable, __file__, module, function.__name__, json.dumps(arguments)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    returned, memory = json.loads(lines[-1])
    return returned, memory


def peak(process: int | str = "self") -> float:
    """The most memory that a living process has had at once, in MiB; read where Linux keeps it.

    What getrusage tells of a child begins with the size of the process that started it.
    """
    return memory("VmHWM", process)


def memory(key: str, process: int | str = "self") -> float:
    """A line of /proc/PID/status, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def show(table: Iterable[Sequence[str]]) -> None:
    """Print a table as Markdown, its head first and a line as soon as it is known."""
    lines = iter(table)
    head = next(lines)
    for cells in ([], head, ["---"] * len(head)):
        click.echo(f"| {' | '.join(cells)} |" if cells else "")
    for cells in lines:
        click.echo(f"| {' | '.join(cells)} |")


def table(rows: Iterable[Row]) -> Iterable[Sequence[str]]:
    yield ["measured", "figure", "ratio", "asked", "how"]
    for row in rows:
        yield row.cells()


def conditions() -> str:
    """Date, commit, machine and versions, in a line."""
    git = ["git", "-C", str(Path(__file__).parent)]
    described = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True)
    here = environment()
    versions = [f"{name} {here[name]}" for name in ("python", "paddlepaddle", "numpy", "pillow")]
    parts = [time.strftime("%Y-%m-%d"), f"commit {described.stdout.strip() or 'unknown'}", here["cpu"]]
    return ", ".join([*parts, f"{cores()} cores", *versions, f"numba {installed('numba') or 'none'}"])


def alone(rows: Rows) -> None:
    """The command of one benchmark."""

    @click.command()
    @click.option("--quick", is_flag=True, help="Tiny sizes, one turn: to see that it runs.")
    def command(quick: bool) -> None:
        """Print the rows of this benchmark."""
        show(table(rows(quick)))

    command()


def child() -> None:
    """The other side of `in_child`."""
    module, function, arguments = sys.argv[1:]
    returned = getattr(import_module(module), function)(*json.loads(arguments))
    click.echo(json.dumps([returned, peak()]))


if __name__ == "__main__":
    child()
