"""Staged semi-supervised label distillation on PaddlePaddle.

>>> import ssld  # doctest: +SKIP
>>> result = ssld.run("mobilenetv3_ssld")  # doctest: +SKIP
>>> result.table()  # doctest: +SKIP
"""

from ssld.engine import plan, resume, run, status
from ssld.errors import SsldError
from ssld.overview import Overview

__version__ = "0.1.0"
__all__ = ["Overview", "SsldError", "plan", "resume", "run", "status"]
