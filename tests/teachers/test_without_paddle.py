"""`ssld plan` makes teachers to learn their specs; paddle is loaded when one of its own is first asked."""

from __future__ import annotations

import subprocess
import sys

import onnx
import safetensors.numpy
from onnx import TensorProto, helper

from ssld.train import networks

NAME = "MobileNetV3_small_x0_35"
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from ssld.checkpoint import read_weights
from ssld.contracts import Model
from ssld.data.transforms import Pipeline
from ssld.teachers.network import network
from ssld.teachers.onnx import onnx
from ssld.teachers.stage import stage

name, images = {name!r}, np.zeros((2, 3, 16, 16), np.float32)
supplied = dict(resolution=16, device="cpu")
model = Model(name, {{}}, ("a", "b"), Pipeline.read(["ResizeImage", "CropImage", "NormalizeImage"], 16))
made = [
    onnx(Path("teacher.onnx"), **supplied),
    network(name, Path("teacher.safetensors"), classes=("a", "b"), **supplied),
    stage("teach", model=model, weights=read_weights(Path("teacher.safetensors")), device="cpu"),
]
print([teacher.spec.size for teacher in made], "paddle" in sys.modules)
for teacher in made[:2]:
    print(len(teacher.predict(images)), "paddle" in sys.modules)
"""


def test_no_teacher_loads_paddle_before_it_is_asked_and_an_onnx_file_never(tmp_path):
    weights = networks.arrays(networks.build(NAME, {}, 2))
    safetensors.numpy.save_file(weights, tmp_path / "teacher.safetensors")
    sides = ["batch", 3, 16, 16]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", sides), ("logits", ["batch", 768]))
    ]
    nodes = [helper.make_node("Flatten", ["images"], ["logits"])]
    graph = helper.make_graph(nodes, "flat", values[:1], values[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, tmp_path / "teacher.onnx")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=NAME)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[16, 16, 16] False", "2 False", "2 True"]
