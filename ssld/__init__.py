"""Staged semi-supervised label distillation on PaddlePaddle."""

__version__ = "0.1.0"
