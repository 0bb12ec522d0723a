"""What a run tells: train.log and metrics.jsonl in its directory, a live display or plain lines on the screen."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ssld.terminal import Screen, plain

LINE_EVERY_SECONDS = 5.0


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3:07, 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def screen() -> Console:
    """The screen: standard error, and no error where it cannot be written."""
    return Console(file=cast(IO[str], Screen()), highlight=False)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of a command that counts: yields a function of (done, total). A bar on a terminal, else a few lines."""
    console = screen()
    with bar(console) as progress:
        task = progress.add_task(plain(what), detail="") if progress else None
        last = time.monotonic()

        def advance(done: int, total: int) -> None:
            nonlocal last
            if progress is not None and task is not None:
                progress.update(task, completed=done, total=total, detail=f"{done}/{total}")
            elif time.monotonic() - last > LINE_EVERY_SECONDS:
                last = time.monotonic()
                console.out(plain(f"{what}: {done} of {total}"))

        yield advance


def bar(console: Console) -> AbstractContextManager[Progress | None]:
    """A live bar on a terminal; nothing elsewhere, so that no control characters reach a file."""
    if not console.is_terminal:
        return nullcontext()
    # names may hold what rich takes for markup
    what, detail = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[detail]"))
    return Progress(what, BarColumn(bar_width=10), detail, console=console, transient=True)


class Journal:
    """Writes events; everything that is shown on the screen is in train.log as well, names as plain text.

    directory: where train.log and metrics.jsonl are appended to, None for nowhere. console: the screen, stderr
    when left out.
    """

    def __init__(self, directory: Path | None, console: Console | None = None) -> None:
        self.console = console or screen()
        self.place = ""
        self.lost = False
        log, metrics = (directory / name if directory else Path(os.devnull) for name in ("train.log", "metrics.jsonl"))
        self.log, self.metrics = self._open(log), self._open(metrics)

    def close(self) -> None:
        for file in (self.log, self.metrics):
            with self._kept(file.name):
                file.close()

    def _open(self, path: Path) -> IO[str]:
        with self._kept(str(path)):
            return path.open("a", encoding="utf-8")
        return open(os.devnull, "a", encoding="utf-8")

    @contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        """A log that cannot be written costs no weights: it is said once, and the next checkpoint finds a full disk."""
        try:
            yield
        except OSError as error:
            if not self.lost:
                self.console.out(plain(f"warning: {name}: lines are lost: {error.strerror}"))
            self.lost = True

    def _append(self, file: IO[str], line: str) -> None:
        with self._kept(file.name):
            file.write(line + "\n")
            file.flush()

    def detail(self, text: str) -> None:
        """Lines for people who look into train.log."""
        self._append(self.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {plain(text)}")

    def note(self, text: str) -> None:
        """One line for people."""
        self.detail(text)
        self.console.out(plain(text))

    def met(self, text: str) -> None:
        """A note of what any rank may meet, such as a damaged image."""
        self.note(text)

    def record(self, event: str, **fields: Any) -> None:
        """One line for programs."""
        self._append(self.metrics, json.dumps({"time": round(time.time(), 3), "event": event, **fields}))

    def measured(
        self, stage: str, step: int, epoch: int, metrics: Mapping[str, float], lines: Mapping[str, float]
    ) -> None:
        """Results at the end of an epoch; lines: what they are to be seen beside, such as the teacher's accuracy."""
        self.record("evaluation", stage=stage, step=step, epoch=epoch, **metrics, **lines)
        numbers, beside = (" ".join(f"{name} {value:.4f}" for name, value in part.items()) for part in (metrics, lines))
        self.note(f"[{self.place}] epoch {epoch} step {step} validation {numbers}{f' ({beside})' if beside else ''}")

    @contextmanager
    def labelling(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Progress of a teacher's labelling: yields a function of (views done, views in all)."""
        last, shown, first = time.monotonic(), -1, (0.0, 0)
        with bar(self.console) as progress:
            task = progress.add_task(plain(self.place or what), detail="") if progress else None

            def advance(done: int, total: int) -> None:
                nonlocal last, shown, first
                now = time.monotonic()
                # counted from the first answer on: before it, the teacher was loaded
                first = first if first[1] else (now, done)
                rate = (done - first[1]) / (now - first[0]) if now > first[0] else 0.0
                left = f"eta {duration((total - done) / rate)}" if rate else ""
                if progress is not None and task is not None:
                    detail = f"labelling {done}/{total} {left}".rstrip()
                    progress.update(task, completed=done, total=total, detail=detail)
                if now - last > LINE_EVERY_SECONDS or (done == total != shown):
                    last, shown = now, done
                    measured = {"views_per_second": round(rate, 1)} if rate else {}
                    self.record("labelling", what=what, done=done, total=total, **measured)
                    where = f"[{self.place}] " if self.place else ""
                    speed = f", {rate:.0f} views/s, {left}" if rate else ""
                    self.note(f"{where}{what}: {done} of {total} views{speed}")

            yield advance

    @contextmanager
    def stage(self, name: str, total: int, samples: int, batch: int, start: int) -> Iterator[StageLog]:
        """Progress of one stage over `total` steps of `batch` images, from step `start`."""
        with bar(self.console) as progress:
            task = progress.add_task(plain(self.place), total=total, completed=start, detail="") if progress else None
            yield StageLog(self, name, total, samples, batch, start, progress, task)


@dataclass
class StageLog:
    """Turns steps into the display, and into a line every few seconds and at the end of the stage."""

    journal: Journal
    name: str
    total: int
    samples: int
    batch: int
    start: int
    progress: Progress | None
    task: TaskID | None
    began: float = field(default_factory=time.monotonic)
    line_at: float = field(default_factory=time.monotonic)
    line_step: int = -1
    waited: float = 0.0

    def step(self, step: int, loss: float, rate: float, waited: float) -> None:
        """After each step: the loss of its batch, its learning rate, and the seconds it waited for data."""
        self.waited += waited
        self.line_step = self.start if self.line_step < 0 else self.line_step
        now = time.monotonic()
        if now - self.line_at < LINE_EVERY_SECONDS and step < self.total:
            self._show(self._text(step, loss, rate, now), step)
            return
        text = self._text(step, loss, rate, now)
        self._show(text, step)
        self.journal.record("step", stage=self.name, **self._numbers(step, loss, rate, now))
        self.journal.note(f"[{self.journal.place}] {text}")
        self.line_at, self.line_step, self.waited = now, step, 0.0

    def _numbers(self, step: int, loss: float, rate: float, now: float) -> dict[str, Any]:
        taken = max(now - self.line_at, 1e-9)
        left = (self.total - step) * (now - self.began) / max(step - self.start, 1)
        return {
            "step": step,
            "epoch": round(step * self.batch / self.samples, 3),
            "lr": rate,
            "loss": loss,
            "images_per_second": round((step - self.line_step) * self.batch / taken, 1),
            "data_wait": round(self.waited / taken, 3),
            "eta_seconds": round(left),
        }

    def _text(self, step: int, loss: float, rate: float, now: float) -> str:
        n = self._numbers(step, loss, rate, now)
        return (
            f"epoch {n['epoch']:.2f} step {step}/{self.total} eta {duration(n['eta_seconds'])} loss {loss:.4f} "
            f"lr {rate:.3g} {n['images_per_second']:.0f} img/s data wait {n['data_wait']:.0%}"
        )

    def _show(self, text: str, step: int) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=step, detail=text)
