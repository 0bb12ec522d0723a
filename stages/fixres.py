"""Resolution fixing: the classifier alone is trained at a higher resolution, on images prepared as at test time.

Source: Touvron et al. 2019, "Fixing the train-test resolution discrepancy" (classifier and the statistics of the last
norm adapt); PaddleClas's Fix models train the classifier alone, with the preprocessing of prediction.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ssld.contracts import Outcome, StageKind, Task
from ssld.settings import Context, TrainingSettings, Words


class Fixres(TrainingSettings):
    """Train the classifier of a finished student at a higher resolution."""

    kind: Literal["fixres"]
    start: Annotated[Words, Field(alias="from")]
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    adapt_bn: bool = False
    """Let the statistics of the last batch norm adapt too, as the FixRes paper does."""

    # FixRes trains with 0.001 * 8 * batch / 512 (facebookresearch/FixRes, imnet_finetune): 0.004 per 256 images
    base_rate: ClassVar[float] = 0.004

    def derived(self, context: Context) -> dict[str, Any]:
        # SSLD's Fix models go from 224 to 320; the same ratio, in multiples of 8 pixels
        higher = max(round(context.resolution * 320 / 224 / 8) * 8, context.resolution + 8)
        return {**super().derived(context), "resolution": higher, "warmup_epochs": 0.0}

    def check(self, context: Context) -> None:
        super().check(context)
        if self.resolution <= context.resolution:
            raise ValueError(
                f"expected a resolution above the {context.resolution} px at which the student was trained, got "
                f"{self.resolution}; raise it, or leave it out"
            )


def run(task: Task[Fixres]) -> Outcome:
    """Minimize the cross-entropy with the labels over the classifier's weights."""
    from ssld.train import loop, losses, networks

    network = networks.student(task)
    prepare = networks.freeze_all_but_head(network, adapt_bn=task.settings.adapt_bn)
    return loop.fit(
        task,
        network,
        lambda logits, target: losses.hard_ce(logits, target.labels),
        prepare=prepare,
        pipeline=task.model.pipeline,
    )


stage = StageKind(Fixres, run)
