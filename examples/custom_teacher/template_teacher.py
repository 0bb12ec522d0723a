"""A teacher without a network: it compares an image with every labeled one and lets the nearest vote."""

import hashlib

import numpy as np

from ssld.contracts import TeacherSpec
from ssld.data.images import decode
from ssld.data.sources import open_source
from ssld.data.transforms import center, view

SIZE = 8


class Templates:
    """Logits from the distances to the nearest labeled image of each class."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], sharpness: float) -> None:
        self.images, self.labels, self.sharpness = images.reshape(len(images), -1), labels, sharpness
        fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        self.spec = TeacherSpec(SIZE, fingerprint, classes=classes, mean=None, std=None)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, classes], for uint8 [B, 8, 8, 3]."""
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        squares = (pixels**2).sum(1)[:, None] + (self.images**2).sum(1) - 2 * pixels @ self.images.T
        nearest = [squares[:, self.labels == label].min(axis=1) for label in range(len(self.spec.classes))]
        return (-self.sharpness * np.stack(nearest, axis=1)).astype(np.float32)


def templates(source: str, sharpness: float = 1.0) -> Templates:
    """The recipe's keys: `source`, a labeled set to compare with, and `sharpness`, how much a distance counts."""
    samples, pipeline = open_source(source, labeled=True), center(SIZE, SIZE, None, None)
    images = np.stack([view(decode(samples.read(i)), pipeline, 0) for i in range(len(samples))])
    return Templates(images.astype(np.float32) / 255, samples.labels, samples.classes, sharpness)
