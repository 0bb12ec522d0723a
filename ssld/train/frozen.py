"""A network that only answers: exported once, then run by paddle's inference engine."""

from __future__ import annotations

import copy
import errno
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import inference, nn
from paddle.base import core
from paddle.nn import functional

from ssld.errors import DataError, RecipeError, SsldError
from ssld.files import reported, scratch
from ssld.threads import of_step, share
from ssld.train.linear import Linear

Engine = Callable[[np.ndarray], np.ndarray]

COMPARED = 8
COMPARED_AGAIN = 2
"""Of a program that has been right before, with other weights: a large network takes 0.3 s for an image, eagerly."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Share of the largest logit by which an engine may be off. Trained networks were off by 0.4 to 2.9 % in bfloat16."""


class Frozen:
    """A snapshot of a layer in evaluation mode; the layer may train on, and is never touched.

    size: side of the square input in pixels. device: "cpu" runs the exported snapshot by paddle.inference with oneDNN,
    several times as fast as the layer itself; any other device runs the snapshot eagerly. threads: of the engine on
    the CPU; when left out, all cores of this rank, also after its share of them has changed. precision: "float32", or
    "bfloat16" on a CPU with AVX-512; RecipeError elsewhere, where paddle would go on in float32 without a word.

    The first images of every snapshot are shown to it eagerly as well: SsldError when any logit of the engine is off by
    more than TOLERANCE of the largest (or of 1). The bits of an answer depend neither on its batch nor on threads.

    Threads may share a Frozen, and none of them need have made it. The engine holds Python's lock while it runs. It is
    not for use beside a training thread: a run sets the thread count of the whole process for a moment, and the bits of
    a gradient would depend on when.
    """

    def __init__(
        self,
        layer: nn.Layer,
        size: int,
        *,
        device: str = "cpu",
        threads: int | None = None,
        precision: str = "float32",
    ) -> None:
        if precision == "bfloat16":
            _expect_bfloat16(device)
        self._size = size
        self._threads = threads
        self._running = 0
        self._precision = precision
        self._lock = threading.Lock()
        self._shown = COMPARED
        self._unchecked: nn.Layer | None
        snapshot = _snapshot(layer)
        self._program = _Program(snapshot, size) if device == "cpu" else None
        self._answer_as(snapshot)

    def refresh(self, layer: nn.Layer) -> None:
        """Answer as this layer does now: the one given first, or one that is built the same. Its export is kept."""
        with self._lock:
            self._answer_as(_snapshot(layer))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [batch, classes], for float32 [batch, 3, size, size]; DataError for anything else."""
        wanted = (3, self._size, self._size)
        if images.dtype != np.float32 or images.shape[1:] != wanted or not len(images):
            raise DataError(
                f"expected images as float32 [batch, {', '.join(map(str, wanted))}] with at least one in the batch, "
                f"got {images.dtype} {list(images.shape)}"
            )
        with self._lock:
            if self._unchecked is not None:
                # one image, shown twice: a batch of one hides a program that takes another size for the batch's
                self._check(self._unchecked, np.resize(images, (min(max(len(images), 2), self._shown), *wanted)))
                self._unchecked, self._shown = None, COMPARED_AGAIN
            if self._program is not None and self._running != (self._threads or share()):
                self._engine = self._engine_of(self._program, None)
            return self._engine(np.ascontiguousarray(images))

    def _answer_as(self, snapshot: nn.Layer) -> None:
        if self._program is None:
            self._engine, self._unchecked = _eager(snapshot), None
        else:
            self._engine, self._unchecked = self._engine_of(self._program, snapshot), snapshot

    def _engine_of(self, program: _Program, snapshot: nn.Layer | None) -> Engine:
        self._running = self._threads or share()
        return program.engine(snapshot, self._running, self._precision)

    def _check(self, snapshot: nn.Layer, images: np.ndarray) -> None:
        """Let the engine answer as the snapshot does. Raises SsldError where no export does."""
        who, expected = type(snapshot).__name__, _eager(snapshot)(images)
        if not np.isfinite(expected).all():
            raise DataError(
                f"expected finite logits of {who}, got NaN or infinity: its weights have diverged; lower "
                f"learning_rate, or set clip_norm"
            )
        limit = TOLERANCE[self._precision] * max(1.0, float(np.abs(expected).max()))
        if _difference(self._engine, images, expected)[0] <= limit:
            return
        off, fault = self._answer_with_care(snapshot, images, expected)
        if not off <= limit:
            got, cure = (
                f"a difference of {off:.2g}",
                "look in its forward for Python values that an export makes constant",
            )
            if self._precision != "float32":
                cure = f"its weights want more than {self._precision}: leave precision out"
            if fault:
                got, cure = fault, "compute that part of its forward by other operations"
            raise SsldError(
                f"expected the exported {who} in {self._precision} to answer as the layer itself does, to {limit:.2g} "
                f"in every logit, got {got}; {cure}"
            )

    def _answer_with_care(self, snapshot: nn.Layer, images: np.ndarray, expected: np.ndarray) -> tuple[float, str]:
        """Export anew: the layer has changed in more than its weights, or asks the images for what only this finds."""
        try:
            self._program = _Program(snapshot, self._size, careful=True)
            self._answer_as(snapshot)
        except SsldError:
            raise
        except Exception as error:
            # of any kind, since it comes from the code of the layer, as paddle has rewritten it
            return math.inf, _words(error)
        return _difference(self._engine, images, expected)


class _Program:
    """A layer as a static program, from which engines are made that differ in nothing but the weights.

    careful: let paddle rewrite the source of every method first, so that a branch on what an image holds, or on the
    size of the batch, becomes part of the program. It takes three times as long, and few networks have one.
    """

    def __init__(self, layer: nn.Layer, size: int, *, careful: bool = False) -> None:
        images = paddle.static.InputSpec([None, 3, size, size], "float32", "images")
        self._traced = (None if careful else _as_written(layer, images)) or _traced(_Called(_snapshot(layer)), images)

    def engine(self, layer: nn.Layer | None, threads: int, precision: str) -> Engine:
        """The program with the weights of this layer; with those that it has where there is None."""
        for own, new in zip(_tensors(self._traced), _tensors(layer), strict=True) if layer is not None else ():
            own.set_value(new)
        with scratch() as folder:
            config = inference.Config(*_save(self._traced, folder))
            config.disable_glog_info()
            config.enable_mkldnn()
            if precision == "bfloat16":
                config.enable_mkldnn_bfloat16()
            config.set_cpu_math_library_num_threads(threads)
            with _own_threads():
                predictor = inference.create_predictor(config)
        source = predictor.get_input_handle(predictor.get_input_names()[0])
        target = predictor.get_output_handle(predictor.get_output_names()[0])

        def run(images: np.ndarray) -> np.ndarray:
            source.reshape(images.shape)
            source.copy_from_cpu(images)
            with _own_threads():
                predictor.run()
            logits: np.ndarray = target.copy_to_cpu()
            return logits

        return run


class _Called(nn.Layer):
    """A layer by one name of its input, whatever its own forward calls it."""

    def __init__(self, layer: nn.Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.layer(images)


class _Plain(_Called):
    """A layer whose Python is run as it stands when it is exported."""

    @paddle.jit.not_to_static
    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.layer(images)


def _as_written(layer: nn.Layer, images: paddle.static.InputSpec) -> nn.Layer | None:
    """The layer traced as it stands; None where its Python asks for what only an image can tell."""
    try:
        return _traced(_Plain(_snapshot(layer)), images)
    except Exception:
        # of any kind, since it comes from the code of the layer
        return None


def _traced(snapshot: nn.Layer, images: paddle.static.InputSpec) -> nn.Layer:
    """The snapshot, made a program."""
    traced: Any = paddle.jit.to_static(_in_one_order(snapshot), [images], full_graph=True)
    traced.eval()
    # it is traced when the program is first asked for
    assert traced.forward.concrete_program is not None
    return traced


class _Pixel(nn.Linear):
    """A fully connected layer as a convolution of one pixel.

    oneDNN cuts the sums of a fully connected layer into as many parts as there are threads for them (seen from 4 on,
    for 2048 features and 10 classes), those of a convolution never.
    """

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if x.ndim != 2:
            return super().forward(x)
        kernel = self.weight.T.unsqueeze([2, 3])
        return functional.conv2d(x.unsqueeze([2, 3]), kernel, self.bias).flatten(1)


def _in_one_order(snapshot: nn.Layer) -> nn.Layer:
    """The same layer, whose sums are taken in one order by any number of threads."""
    for part in snapshot.sublayers(include_self=True):
        if type(part) in (nn.Linear, Linear):
            part.__class__ = _Pixel
    return snapshot


def _snapshot(layer: nn.Layer) -> nn.Layer:
    snapshot = copy.deepcopy(layer)
    snapshot.eval()
    return snapshot


def _tensors(layer: nn.Layer) -> list[paddle.Tensor]:
    """What an export keeps as parameters: weights, batch-norm statistics and all other buffers."""
    return [*layer.parameters(), *layer.buffers()]


def _eager(layer: nn.Layer) -> Engine:
    def run(images: np.ndarray) -> np.ndarray:
        with paddle.no_grad():
            logits: np.ndarray = layer(paddle.to_tensor(images)).numpy()
            return logits

    return run


def _save(traced: nn.Layer, folder: Path) -> tuple[str, str]:
    """Export to the folder; returns the files of the program and of its weights. Raises StorageError."""
    program, weights = folder / "frozen.json", folder / "frozen.pdiparams"
    needed = sum(tensor.size * tensor.element_size() for tensor in _tensors(traced))
    with reported(folder, needed):
        paddle.jit.save(traced, str(folder / "frozen"))
        # paddle says nothing when it cannot write all of it
        if not program.read_bytes().endswith(b"}") or weights.stat().st_size < needed:
            raise OSError(errno.ENOSPC, "no room for all of an exported network, where TMPDIR says")
    return str(program), str(weights)


def _words(error: Exception) -> str:
    """What an error of paddle says in the end, below the trace of its own."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1].strip()}"


def _difference(engine: Engine, images: np.ndarray, expected: np.ndarray) -> tuple[float, str]:
    """The largest difference in any logit, and what is wrong with an engine that fails or answers in another shape."""
    try:
        logits = engine(images)
    except Exception as error:
        # of any kind: operators of the program may raise what they like
        return math.inf, _words(error)
    if logits.shape != expected.shape:
        return math.inf, f"logits {list(logits.shape)} for {list(expected.shape)}"
    return float(np.abs(logits - expected).max()), ""


def _expect_bfloat16(device: str) -> None:
    if device != "cpu":
        raise RecipeError(f"precision: bfloat16 is for --device cpu, got {device}; leave precision out")
    if not core.supports_bfloat16():
        raise RecipeError("precision: bfloat16 needs a CPU with AVX-512, which this one has not; leave precision out")


@contextmanager
def _own_threads() -> Iterator[None]:
    """Give the step its thread count back: a predictor sets it when it is made and leaves it at 1 after a run."""
    try:
        yield
    finally:
        core.set_num_threads(of_step())
