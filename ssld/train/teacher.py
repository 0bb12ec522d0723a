"""A paddle network that teaches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ssld.contracts import Arrays, TeacherSpec
from ssld.train.frozen import Frozen


def fingerprint(weights: Arrays) -> str:
    """sha256 over the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class NetworkTeacher:
    """A frozen network with what it declares of its input."""

    spec: TeacherSpec
    frozen: Frozen

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, classes], for float32 [B, 3, size, size]."""
        return self.frozen(images)
