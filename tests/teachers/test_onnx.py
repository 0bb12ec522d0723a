"""An ONNX file as a teacher: a small network written by hand from a paddle layer's weights, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime
import paddle
import pytest
from onnx import TensorProto, helper, numpy_helper
from paddle import nn

from ssld import plugins
from ssld.errors import CheckpointError, PluginError, RecipeError, TeacherError

SIZE, CLASSES = 12, 5
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def layer():
    """Convolution, batch norm with statistics of its own, activation, pooling, classifier."""
    paddle.seed(0)
    layer = nn.Sequential(
        nn.Conv2D(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2D(8),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2D(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    layer[1]._mean.set_value(paddle.randn([8]) / 4)
    layer[1]._variance.set_value(paddle.rand([8]) + 0.5)
    layer.eval()
    return layer


def model(layer, shape=("batch", 3, SIZE, SIZE), kind=TensorProto.FLOAT, metadata=None):
    """The same network in ONNX: its logits, then their softmax and the pooled features as further outputs."""
    weights = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    norm = ["1.weight", "1.bias", "1._mean", "1._variance"]
    nodes = [
        helper.make_node("Conv", ["images", "0.weight", "0.bias"], ["conv"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", *norm], ["norm"], epsilon=1e-5),
        helper.make_node("HardSwish", ["norm"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "5.weight", "5.bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["shares"]),
    ]
    outputs = {"logits": [shape[0], CLASSES], "shares": [shape[0], CLASSES], "pooled": [shape[0], 8, 1, 1]}
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, its_shape) for name, its_shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(made, metadata or {})
    return made


@pytest.fixture
def save(layer, tmp_path):
    """save(outputs, name, **options of `model`): the network, with these of its outputs, in a file."""

    def save(outputs=("logits",), name="teacher.onnx", **options):
        made = model(layer, **options)
        kept = [output for output in made.graph.output if output.name in outputs]
        del made.graph.output[:]
        made.graph.output.extend(kept)
        onnx.save(made, tmp_path / name)
        return tmp_path / name

    return save


def teacher(file, device="cpu", **options):
    """As a run makes it of a recipe's keys."""
    supplied = {"resolution": 16, "device": device, "classes": ("a", "b"), "precision": "float32"}
    return plugins.call("teachers", "onnx", {"onnx": str(file), **options}, supplied)


def images(count, size=SIZE):
    return np.random.default_rng(count).normal(size=(count, 3, size, size)).astype(np.float32)


def expected(layer, batch):
    with paddle.no_grad():
        return layer(paddle.to_tensor(batch)).numpy()


@pytest.mark.parametrize("batch", ["batch", 1, 4], ids=["any batch", "batch of 1", "batch of 4"])
@pytest.mark.parametrize("count", [1, 4, 6])
def test_it_answers_as_the_network_does(layer, save, batch, count):
    answer = teacher(save(shape=(batch, 3, SIZE, SIZE))).predict(images(count))
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, expected(layer, images(count)), atol=1e-4)


@pytest.mark.parametrize("batch", ["batch", 4])
def test_the_bits_of_a_sample_do_not_depend_on_its_batch(save, batch):
    made, together = teacher(save(shape=(batch, 3, SIZE, SIZE))), images(8)
    alone = [made.predict(image[None]) for image in together]
    np.testing.assert_array_equal(np.concatenate(alone), made.predict(together))


def test_one_thread_computes(save):
    assert teacher(save()).session.get_session_options().intra_op_num_threads == 1


def test_the_size_is_the_files_own_else_the_recipes_else_the_runs(layer, save):
    fixed, free = save(), save(name="free.onnx", shape=("batch", 3, "height", "width"))
    assert [teacher(fixed).spec.size, teacher(fixed, size=SIZE).spec.size] == [SIZE, SIZE]
    assert [teacher(free).spec.size, teacher(free, size=20).spec.size] == [16, 20]
    np.testing.assert_allclose(teacher(free, size=20).predict(images(2, 20)), expected(layer, images(2, 20)), atol=1e-4)
    with pytest.raises(RecipeError, match=r"size: expected 12, which .*teacher\.onnx fixes, got 20; leave size out"):
        teacher(fixed, size=20)


def test_the_spec_says_what_computes_and_names_no_classes(save):
    spec = teacher(save(), resize_short=14).spec
    assert (spec.classes, spec.resize_short, spec.precision) == (None, 14, "float32")
    assert spec.engine == f"onnxruntime {onnxruntime.__version__}, float32"


@pytest.mark.parametrize(
    ("metadata", "options", "mean", "std"),
    [
        ({}, {}, *IMAGENET),
        ({"mean": "[0.1, 0.2, 0.3]", "std": "0.4,0.5,0.6"}, {}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ({"mean": "[0.1, 0.2, 0.3]"}, {"mean": [0.0, 0.0, 0.0]}, (0.0, 0.0, 0.0), IMAGENET[1]),
    ],
    ids=["neither", "the file", "the recipe before the file"],
)
def test_mean_and_std_are_the_recipes_else_the_files_else_imagenets(save, metadata, options, mean, std):
    spec = teacher(save(metadata=metadata), **options).spec
    assert (spec.mean, spec.std) == (mean, std)


@pytest.mark.parametrize("text", ["0.5", "a, b, c", "0.1, 0.2, nan", ""])
def test_metadata_that_are_no_three_numbers_are_named(save, text):
    with pytest.raises(CheckpointError, match=r"three .*numbers as the metadata 'std', got"):
        teacher(save(metadata={"std": text}))


def test_the_output_is_chosen_by_name_where_there_are_several(layer, save):
    file = save(outputs=("logits", "shares"))
    listed = r"2 outputs: logits tensor\(float\) \[batch, 5\], shares tensor\(float\) \[batch, 5\]; .* output: NAME"
    with pytest.raises(RecipeError, match=listed):
        teacher(file)
    with pytest.raises(RecipeError, match=r"output: expected an output of .*, got 'logit'; did you mean logits\?"):
        teacher(file, output="logit")
    answer = teacher(file, output="logits").predict(images(2))
    np.testing.assert_allclose(answer, expected(layer, images(2)), atol=1e-4)


def test_of_probabilities_the_logarithm_is_taken(layer, save):
    made = teacher(save(outputs=("shares",)), probabilities=True)
    answer, logits = made.predict(images(3)), expected(layer, images(3)).astype(np.float64)
    np.testing.assert_allclose(answer, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), atol=1e-4)


def test_probabilities_are_not_taken_for_logits(save):
    with pytest.raises(TeacherError, match=r"expected logits of shares, got .*; .* add probabilities: true"):
        teacher(save(outputs=("shares",))).predict(images(3))


def test_a_probability_of_zero_has_a_finite_logarithm(save):
    made = teacher(save(outputs=("shares",)), probabilities=True)
    answer = made.predict(1e4 * images(3))
    assert np.isfinite(answer).all()
    assert answer.min() < -80


def test_the_fingerprint_is_that_of_the_content_and_of_what_is_read_of_it(save, tmp_path):
    file = save(outputs=("logits", "shares"))
    elsewhere = tmp_path / "moved.onnx"
    elsewhere.write_bytes(file.read_bytes())
    other = save(outputs=("logits", "shares"), name="other.onnx", metadata={"made": "later"})
    choices = [
        (file, {"output": "logits"}),
        (other, {"output": "logits"}),
        (file, {"output": "shares"}),
        (file, {"output": "shares", "probabilities": True}),
    ]
    prints = [teacher(path, **options).spec.fingerprint for path, options in choices]
    assert len(set(prints)) == 4
    assert teacher(elsewhere, output="logits").spec.fingerprint == prints[0]


def test_tensors_that_lie_beside_the_file_count(layer, save, tmp_path):
    made = model(layer)
    del made.graph.output[1:]
    onnx.save(made, tmp_path / "big.onnx", save_as_external_data=True, location="big.bin", size_threshold=0)
    before = teacher(tmp_path / "big.onnx")
    np.testing.assert_allclose(before.predict(images(2)), expected(layer, images(2)), atol=1e-4)
    beside = bytearray((tmp_path / "big.bin").read_bytes())
    beside[:4] = np.float32(7).tobytes()
    (tmp_path / "big.bin").write_bytes(beside)
    after = teacher(tmp_path / "big.onnx")
    assert not np.allclose(after.predict(images(2)), before.predict(images(2)), atol=1e-3)
    assert after.spec.fingerprint != before.spec.fingerprint


@pytest.mark.parametrize("content", [b"", b"no model", None], ids=["empty", "text", "missing"])
def test_what_is_no_onnx_file_is_refused(tmp_path, content):
    file = tmp_path / "bad.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"expected an .*, got .*bad\.onnx: "):
        teacher(file)


def test_a_file_that_is_cut_off_is_refused(save):
    file = save()
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"expected an ONNX classifier, got .*teacher\.onnx"):
        teacher(file)


@pytest.mark.parametrize(
    ("shape", "kind", "got"),
    [
        (("batch", SIZE, SIZE, 3), TensorProto.FLOAT, r"images tensor\(float\) \[batch, 12, 12, 3\]"),
        (("batch", 3, SIZE, SIZE + 4), TensorProto.FLOAT, r"images tensor\(float\) \[batch, 3, 12, 16\]"),
        (("batch", 3, SIZE, SIZE), TensorProto.UINT8, r"images tensor\(uint8\) \[batch, 3, 12, 12\]"),
        (("batch", 3), TensorProto.FLOAT, r"images tensor\(float\) \[batch, 3\]"),
    ],
    ids=["channels last", "not square", "uint8", "two dimensions"],
)
def test_another_input_is_refused(tmp_path, shape, kind, got):
    write(tmp_path / "other.onnx", [("images", kind, shape)])
    with pytest.raises(CheckpointError, match=rf"one input, float32 \[batch, 3, height, width\] and square, got {got}"):
        teacher(tmp_path / "other.onnx")


def test_a_second_input_is_refused(tmp_path):
    inputs = [("images", TensorProto.FLOAT, ("batch", 3, SIZE, SIZE)), ("mask", TensorProto.FLOAT, ("batch", 1))]
    write(tmp_path / "two.onnx", inputs)
    with pytest.raises(CheckpointError, match=r"expected one input, .*, got images .*, mask "):
        teacher(tmp_path / "two.onnx")


def write(file, inputs):
    """A model with these inputs that hands the first one on."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    name, kind, shape = inputs[0]
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], ["same"])],
        "identity",
        values,
        [helper.make_tensor_value_info("same", kind, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


def test_an_output_that_is_no_row_of_logits_is_refused(save):
    with pytest.raises(CheckpointError, match=r"expected logits \[batch, classes\], got pooled .* \[batch, 8, 1, 1\]"):
        teacher(save(outputs=("pooled",)))


def test_a_missing_onnxruntime_is_told_with_what_to_install(save, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PluginError, match=r'expected onnxruntime .*; pip install "ssld\[onnx\]"'):
        teacher(save())


def test_a_gpu_needs_its_provider(save, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RecipeError, match=r"--device gpu: expected an onnxruntime with CUDAExecutionProvider"):
        teacher(save(), device="gpu")
