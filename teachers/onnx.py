"""An ONNX file: a teacher from any framework, run by onnxruntime."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ssld.contracts import Teacher, TeacherSpec
from ssld.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Triple
from ssld.errors import CheckpointError, PluginError, RecipeError, TeacherError
from ssld.teaching.onnx_files import files_beside
from ssld.wording import near

_SMALLEST = np.finfo(np.float32).tiny


def onnx(
    onnx: Path,
    *,
    resolution: int,
    device: str,
    size: int | None = None,
    output: str | None = None,
    probabilities: bool = False,
    mean: Triple | None = None,
    std: Triple | None = None,
    resize_short: int | None = None,
) -> Teacher:
    """The classifier in an .onnx file, whose input is one float32 [batch, 3, height, width].

    size: side of that input in pixels where the file leaves it open, the run's resolution when left out.
    output: the one that holds the logits [batch, classes], where there are several; probabilities: whether it holds
    probabilities in their place.
    mean, std: per channel, for pixels in [0, 1]; when left out, the file's metadata of that name, else ImageNet's.
    The fingerprint covers the file, the files beside it that hold its tensors, `output` and `probabilities`.
    The session is made here, since nothing else reads the shape of the input. Raises PluginError without onnxruntime,
    CheckpointError for a file that is no such classifier, RecipeError for an option that does not fit it.
    """
    content = _content(onnx)
    session = _session(onnx, device)
    source, target = _input(session, onnx), _output(session, onnx, output)
    metadata = session.get_modelmeta().custom_metadata_map
    spec = TeacherSpec(
        _size(source.shape, size, onnx) or size or resolution,
        _fingerprint(onnx, content, f"{target} {probabilities}"),
        resize_short=resize_short,
        mean=mean or _triple(metadata, "mean", onnx) or IMAGENET_MEAN,
        std=std or _triple(metadata, "std", onnx) or IMAGENET_STD,
        engine=_engine(device),
    )
    batch = source.shape[0] if isinstance(source.shape[0], int) else None
    return OnnxTeacher(spec, session, source.name, target, batch, probabilities)


@dataclass(frozen=True, eq=False)
class OnnxTeacher:
    """A session with what it is fed. batch: how many images it takes at a time, None for any number."""

    spec: TeacherSpec
    session: Any
    source: str
    target: str
    batch: int | None
    probabilities: bool

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, classes], for float32 [B, 3, size, size]; a short batch is filled up and cut again."""
        step = self.batch or len(images)
        answers = np.concatenate([self._run(images[first : first + step]) for first in range(0, len(images), step)])
        if self.probabilities:
            return np.log(np.maximum(answers, _SMALLEST))
        if (answers >= 0).all() and np.allclose(answers.sum(axis=-1), 1, atol=1e-3):
            # as logits they would give labels that are almost the same for all classes
            raise TeacherError(
                f"expected logits of {self.target}, got what is ≥ 0 and adds up to 1 in every row; if these are "
                f"probabilities, add probabilities: true"
            )
        return answers

    def _run(self, images: np.ndarray) -> np.ndarray:
        missing = (self.batch or len(images)) - len(images)
        filled = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
        [answers] = self.session.run([self.target], {self.source: filled})
        return answers[: len(images)]


def _session(file: Path, device: str) -> Any:
    if find_spec("onnxruntime") is None:
        raise PluginError('expected onnxruntime for an .onnx teacher, got none; pip install "ssld[onnx]"')
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        raise RecipeError(
            f"--device {device}: expected an onnxruntime with {provider}, got one without; pip install "
            f"onnxruntime-gpu in its place, or leave --device out"
        )
    options = onnxruntime.SessionOptions()
    # one: with more, sums are taken in another order
    options.intra_op_num_threads = 1
    # errors only; they are raised as well
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(file, options, providers=[provider])
    except Exception as error:
        raise CheckpointError(f"expected an ONNX classifier, got {file}: {error}") from error


def _engine(device: str) -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}, float32" + ("" if device == "cpu" else f", on {device}")


def _input(session: Any, file: Path) -> Any:
    """The one input; its shape holds a number, or else a name or None, for each of four dimensions."""
    inputs = session.get_inputs()
    if len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == 4:
        _, channels, height, width = inputs[0].shape
        square = not (isinstance(height, int) and isinstance(width, int) and height != width)
        if (channels == 3 or not isinstance(channels, int)) and square:
            return inputs[0]
    raise CheckpointError(
        f"{file}: expected one input, float32 [batch, 3, height, width] and square, got {_listed(inputs)}; export the "
        f"classifier alone"
    )


def _output(session: Any, file: Path, wanted: str | None) -> str:
    outputs = {output.name: output for output in session.get_outputs()}
    if wanted is not None and wanted not in outputs:
        raise RecipeError(f"output: expected an output of {file}, got {wanted!r}; {near(wanted, outputs)}")
    if wanted is None and len(outputs) > 1:
        raise RecipeError(f"{file} has {len(outputs)} outputs: {_listed(outputs.values())}; name one with output: NAME")
    name = wanted or next(iter(outputs))
    if outputs[name].shape and len(outputs[name].shape) != 2:
        raise CheckpointError(f"{file}: expected logits [batch, classes], got {_listed([outputs[name]])}")
    return name


def _listed(values: Any) -> str:
    return ", ".join(
        f"{value.name} {value.type} [{', '.join(str(side or '?') for side in value.shape)}]" for value in values
    )


def _size(shape: list[Any], wanted: int | None, file: Path) -> int | None:
    """The side that the file fixes, if it does."""
    fixed = next((side for side in shape[2:] if isinstance(side, int)), None)
    if None not in (fixed, wanted) and fixed != wanted:
        raise RecipeError(f"size: expected {fixed}, which {file} fixes, got {wanted}; leave size out")
    return fixed


def _triple(metadata: dict[str, str], name: str, file: Path) -> Triple | None:
    """Three numbers of the file's metadata, "0.5, 0.5, 0.5" with or without brackets."""
    text = metadata.get(name)
    if text is None:
        return None
    try:
        red, green, blue = (float(number) for number in text.strip().strip("[]()").split(","))
    except ValueError as error:
        raise CheckpointError(f"{file}: expected three numbers as the metadata {name!r}, got {text!r}") from error
    if not all(map(math.isfinite, (red, green, blue))):
        raise CheckpointError(f"{file}: expected three finite numbers as the metadata {name!r}, got {text!r}")
    return red, green, blue


def _fingerprint(file: Path, content: bytes, choice: str) -> str:
    digest = hashlib.sha256(content)
    for path in files_beside(file, content):
        with path.open("rb") as beside:
            digest.update(hashlib.file_digest(beside, "sha256").digest())
    digest.update(choice.encode())
    return digest.hexdigest()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"expected an .onnx file, got {file}: {error.strerror}") from error
