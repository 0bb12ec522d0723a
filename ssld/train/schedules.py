"""Learning rates: pure functions of the step."""

import math

from ssld.errors import RecipeError, SsldError


def cosine_warmup(step: int, total: int, warmup: int, peak: float) -> float:
    """Learning rate of one step: linear from 0 to the peak, then half a cosine towards 0.

    With n steps in total and w of them for the warm-up, step s, counted from 0, has

        peak * s / w                                     for s < w,
        peak * (1 + cos(pi * (s - w) / (n - w))) / 2     for w <= s < n.

    So the first step of a warm-up has rate 0, step w has the peak, and 0 would be reached at step n. Raises
    RecipeError when the warm-up is longer than the stage, SsldError for a step outside it.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts; the warm-up as in PaddleClas, per
    step (CosineWarmup of ppcls/optimizer/learning_rate.py, release 2.0).

    >>> [cosine_warmup(step, total=6, warmup=2, peak=0.5) for step in (0, 1, 2, 4)]
    [0.0, 0.25, 0.5, 0.25]
    """
    if not 0 <= warmup <= total:
        raise RecipeError(
            f"expected a warm-up within the stage's {total} steps, got {warmup}; lower warmup_epochs or raise epochs"
        )
    if not 0 <= step < total:
        raise SsldError(f"expected a step from 0 to {total - 1}, got {step}; a stage of {total} steps ends there")
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
