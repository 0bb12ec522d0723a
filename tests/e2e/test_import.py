"""Weights of PaddleClas, from the file as it is downloaded to a teacher and a start that a recipe names."""

from __future__ import annotations

import pickle

import numpy as np
import safetensors.numpy

NETWORK = "MobileNetV3_small_x0_35"


def test_weights_of_paddleclas_teach_and_are_a_start(ssld, reference):
    """A finished teacher, put into the form of a published file, is the same teacher after its import."""
    own = safetensors.numpy.load_file(reference.directory / "teach" / "latest" / "student.safetensors")
    published = {**own, "StructuredToParameterName@@": {name: f"parameter_{i}" for i, name in enumerate(own)}}
    (ssld.folder / "net.pdparams").write_bytes(pickle.dumps(published, 2))
    done = ssld("import", "net.pdparams", "--network", NETWORK)
    row = {"weights": "net.safetensors", "tensors": str(len(own)), "network": f"{NETWORK} (8 classes)"}
    assert done.table() == [row]
    found = safetensors.numpy.load_file(ssld.folder / "net.safetensors")
    assert found.keys() == own.keys()
    assert all(np.array_equal(found[name], own[name]) for name in own)
    teacher = f"stages.distill.teacher={{network: {NETWORK}, weights: net.safetensors}}"
    ssld("import", "net.pdparams", "--network", NETWORK, "--head-mismatch", "--out", "start.safetensors")
    words = ("-o", teacher, "-o", "stages.distill.from=start.safetensors", "--limit", 8, "--trust-teacher")
    run = ssld("run", ssld.recipe("distill"), *words)
    assert "start.safetensors (MobileNetV3_small_x0_35), which distill starts from, was imported without its" in run.err
    assert run.table()[0]["state"] == "finished"
