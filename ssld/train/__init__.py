"""The bench: what several stages share. Paddle lives from here on, and is imported quietly.

What paddle 3.3.1 does at import is undone: it puts a handler on the root logger and lowers its level to INFO, so that
every library's INFO lines reach the terminal, it takes SIGTERM, to print a trace of its own and die, and it warns that
ccache is missing, which matters only to those who compile operators.
"""

import logging
import os
import warnings

from ssld.signals import importing


def _import_paddle() -> None:
    # C++ warnings, such as the one that every export writes, stay off unless the user asks; creating a predictor
    # raises the level of the whole process to this same value
    os.environ.setdefault("GLOG_minloglevel", "2")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with importing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paddle  # noqa: F401
    root.handlers[:] = handlers
    root.setLevel(level)
    # said by every batch norm in every training step
    warnings.filterwarnings("ignore", message="When training, we now always track global mean and variance")


_import_paddle()
