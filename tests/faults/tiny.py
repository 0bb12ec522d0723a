"""The smallest ladder that has everything in it, and a student of a thousand weights: `write(folder)`.

Four stages, labels that are kept, two kinds of convolution, batch norms, dropout, a checkpoint after every step.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

STUDENT = '''\
"""A convolution, a depthwise one, dropout, a classifier."""
import paddle
from paddle import nn

from ssld.train.convolution import Conv2D
from ssld.train.linear import Linear
from ssld.train.normalization import BatchNorm

class Tiny(nn.Layer):
    head, features = "fc", "pool"

    def __init__(self, num_classes: int):
        super().__init__()
        self.mix = nn.Sequential(Conv2D(3, 8, 3, 2, padding=1, bias_attr=False), BatchNorm(8), nn.ReLU())
        self.filter = nn.Sequential(Conv2D(8, 8, 3, padding=1, groups=8, bias_attr=False), BatchNorm(8), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2D(1), nn.Flatten())
        self.drop = nn.Dropout(0.2)
        self.fc = Linear(8, num_classes)

    def forward(self, images):
        return self.fc(self.drop(self.pool(self.filter(self.mix(images)))))
'''
COMMON = "batch_size: 8, learning_rate: 0.1, save_steps: 1"
RECIPE = f"""\
# Learns next to nothing.
name: tiny
seed: 3
images:
  resolution: 8
  train: [RandCropImage: {{scale: [0.7, 1.0]}}, RandFlipImage, NormalizeImage]
  eval: [ResizeImage: {{resize_short: 8}}, CropImage, NormalizeImage]
data:
  unlabeled: "pool/shard-{{000000..000002}}.tar"
  labeled: builtin:shapes?count=24&size=12&classes=4&seed=2
  validation: builtin:shapes?count=12&size=12&classes=4&seed=3
stages:
  teach: {{kind: pretrain, network: Tiny, data: labeled, epochs: 3, eval_interval: 3, {COMMON}}}
  distill:
    {{kind: distill, teacher: {{stage: teach}}, student: Tiny, data: unlabeled, epochs: 2, save_interval: 1, {COMMON},
     labels: {{views: 2, top_k: 2}}}}
  finetune:
    {{kind: finetune, from: distill, teacher: {{stage: teach}}, hard: 0.5, data: labeled, epochs: 3, eval_interval: 3,
     keep_last: 1, {COMMON}}}
  fixres: {{kind: fixres, from: finetune, data: labeled, epochs: 3, eval_interval: 2, adapt_bn: true, {COMMON}}}
"""
STAGES = ("teach", "distill", "finetune", "fixres")
SHARDS, PER_SHARD = 3, 16


def write(folder: Path) -> Path:
    """Put the recipe tiny.yaml, its pool, and the student's package into the folder; return where the package is."""
    (folder / "tiny.yaml").write_text(RECIPE)
    write_pool(folder / "pool")
    site = folder / "site"
    about = site / "tiny_student-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-student\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ssld.students]\nTiny = tiny_student:Tiny\n")
    (site / "tiny_student.py").write_text(STUDENT)
    return site


def write_pool(pool: Path) -> None:
    """Three shards of PNG images."""
    from PIL import Image

    from ssld.data.sources import open_source

    pool.mkdir()
    samples = open_source(f"builtin:shapes?count={SHARDS * PER_SHARD}&size=12&classes=4&seed=1", labeled=False)
    for shard in range(SHARDS):
        file = pool / f"shard-{shard:06d}.tar"
        with tarfile.open(file, "w") as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                buffer = io.BytesIO()
                Image.fromarray(samples.read(number)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{number:06d}.png")
                member.size = len(buffer.getvalue())
                buffer.seek(0)
                tar.addfile(member, buffer)
        # what is held out of a shard depends on it
        os.utime(file, (1e9, 1e9))
