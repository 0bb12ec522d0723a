"""A network that only answers: exported once, then run by paddle's inference engine."""

from __future__ import annotations

import copy
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import paddle
from paddle import inference, nn
from paddle.base import core

from ssld.errors import DataError, RecipeError, SsldError

Engine = Callable[[np.ndarray], np.ndarray]

COMPARED = 8
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Share of the largest logit by which an engine may be off. Trained networks were off by 0.4 to 2.9 % in bfloat16."""


class Frozen:
    """A snapshot of a layer in evaluation mode; the layer may train on, and is never touched.

    size: side of the square input in pixels. device: "cpu" runs the exported snapshot by paddle.inference with oneDNN,
    several times as fast as the layer itself; any other device runs the snapshot eagerly. threads: of the engine on
    the CPU, at most OMP_NUM_THREADS, which paddle sets to 1 unless the environment does. precision: "float32", or
    "bfloat16" on a CPU with AVX-512; RecipeError elsewhere, where paddle would go on in float32 without a word.

    The first images are shown to the eager snapshot as well: SsldError when any logit of the engine is off by more
    than TOLERANCE of the largest (or of 1). The bits of an answer depend neither on its batch nor on threads.

    Threads may share a Frozen, and none of them need have made it. The engine holds Python's lock while it runs. Beside
    a training thread use it with OMP_NUM_THREADS=1 only: a run sets the thread count of the whole process for a
    moment, and with another count the bits of a gradient would depend on when.
    """

    def __init__(
        self, layer: nn.Layer, size: int, *, device: str = "cpu", threads: int = 1, precision: str = "float32"
    ) -> None:
        if precision == "bfloat16":
            _expect_bfloat16(device)
        snapshot = copy.deepcopy(layer)
        snapshot.eval()
        self._size = size
        self._precision = precision
        self._lock = threading.Lock()
        self._engine = _exported(snapshot, size, threads, precision) if device == "cpu" else _eager(snapshot)
        self._unchecked = snapshot if device == "cpu" else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [batch, classes], for float32 [batch, 3, size, size]; DataError for anything else."""
        wanted = (3, self._size, self._size)
        if images.dtype != np.float32 or images.shape[1:] != wanted or not len(images):
            raise DataError(
                f"expected images as float32 [batch, {', '.join(map(str, wanted))}] with at least one in the batch, "
                f"got {images.dtype} {list(images.shape)}"
            )
        with self._lock:
            logits = self._engine(np.ascontiguousarray(images))
            if self._unchecked is not None:
                expected = _eager(self._unchecked)(images[:COMPARED])
                _compare(logits[:COMPARED], expected, type(self._unchecked).__name__, self._precision)
                self._unchecked = None
        return logits


def _eager(layer: nn.Layer) -> Engine:
    def run(images: np.ndarray) -> np.ndarray:
        with paddle.no_grad():
            logits: np.ndarray = layer(paddle.to_tensor(images)).numpy()
            return logits

    return run


def _expect_bfloat16(device: str) -> None:
    if device != "cpu":
        raise RecipeError(f"precision: bfloat16 is for --device cpu, got {device}; leave precision out")
    if not core.supports_bfloat16():
        raise RecipeError("precision: bfloat16 needs a CPU with AVX-512, which this one has not; leave precision out")


def _exported(layer: nn.Layer, size: int, threads: int, precision: str) -> Engine:
    with tempfile.TemporaryDirectory(prefix="ssld-") as folder:
        path = os.path.join(folder, "frozen")
        paddle.jit.save(layer, path, input_spec=[paddle.static.InputSpec([None, 3, size, size], "float32")])
        config = inference.Config(f"{path}.json", f"{path}.pdiparams")
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


@contextmanager
def _own_threads() -> Iterator[None]:
    """Give the process its thread count back: a predictor sets it when it is made and leaves it at 1 after a run.

    Weights trained with another number of threads have other bits.
    """
    try:
        yield
    finally:
        core.set_num_threads(int(os.environ.get("MKL_NUM_THREADS") or os.environ["OMP_NUM_THREADS"]))


def _compare(logits: np.ndarray, expected: np.ndarray, who: str, precision: str) -> None:
    if not np.isfinite(expected).all():
        raise DataError(
            f"expected finite logits of {who}, got NaN or infinity: its weights have diverged; lower learning_rate, or "
            f"set clip_norm"
        )
    off = float(np.abs(logits - expected).max())
    limit = TOLERANCE[precision] * max(1.0, float(np.abs(expected).max()))
    if not off <= limit:
        cure = (
            "look in its forward for Python values that an export makes constant"
            if precision == "float32"
            else f"its weights want more than {precision}: leave precision out"
        )
        raise SsldError(
            f"expected the exported {who} in {precision} to answer as the layer itself does, to {limit:.2g} in every "
            f"logit, got a difference of {off:.2g}; {cure}"
        )
