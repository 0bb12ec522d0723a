"""The teacher recognizes what it was shown."""

import numpy as np
from template_teacher import templates

from ssld.data.sources import open_source


def test_it_answers_its_own_images_with_their_labels():
    samples = open_source("builtin:digits?part=labeled", labeled=True)
    teacher = templates("builtin:digits?part=labeled")
    images = np.stack([samples.read(i) for i in range(50)])
    assert (teacher.predict(images).argmax(1) == samples.labels[:50]).all()
