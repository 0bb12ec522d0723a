"""Importing the bench imports paddle without a word and without a trace in logging."""

import os
import subprocess
import sys

# a residual sum is what makes an export write its line, a batch norm in training mode what makes paddle warn
PROGRAM = """
import logging, warnings
import numpy as np
warnings.simplefilter("error")
from ssld.train.frozen import Frozen
import paddle
assert logging.getLogger().handlers == [], logging.getLogger().handlers
assert logging.getLogger().level == logging.WARNING, logging.getLogger().level

class Residual(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv = paddle.nn.Conv2D(3, 3, 1)
        self.norm = paddle.nn.BatchNorm2D(3)

    def forward(self, x):
        return (x + self.norm(self.conv(x))).flatten(1)

layer = Residual()
layer(paddle.zeros([2, 3, 8, 8]))
Frozen(layer, 8)(np.zeros((1, 3, 8, 8), np.float32))
"""


def test_import_training_and_export_write_nothing(tmp_path):
    program = tmp_path / "program.py"  # a file, since an export reads the source of forward
    program.write_text(PROGRAM)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("GLOG_minloglevel", "OMP_NUM_THREADS")
    }
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
