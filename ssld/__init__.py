"""Staged semi-supervised label distillation on PaddlePaddle.

The command line in three lines of Python:

    import ssld
    result = ssld.run("mobilenetv3_ssld")
    header, rows = result.table()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssld.errors import SsldError

if TYPE_CHECKING:
    from ssld.engine import plan, resume, run, status
    from ssld.overview import Overview

__version__ = "0.1.0"
__all__ = ["Overview", "SsldError", "plan", "resume", "run", "status"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # the engine reads recipes and indexes data; `ssld --help` and plug-ins need none of it
    if name not in __all__:
        raise AttributeError(f"module 'ssld' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from ssld.signals import importing

    # half an import cannot be mended, and C code that meets a signal in it says something else
    with importing():
        from ssld import engine

    return getattr(engine, name)
