"""The fully connected layer of students: paddle's, which trains by numpy's matrix products on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from ssld.train import compiling
from ssld.train.compiling import empty, view


class Product(PyLayer):
    """x [B, features] @ weight [features, classes] + bias [classes] as one operation of paddle's autograd."""

    @staticmethod
    @np.errstate(all="ignore")
    def forward(ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
        ctx.kept = left, right = view(x), view(weight)
        ctx.wanted = [not tensor.stop_gradient for tensor in (x, weight, bias) if tensor is not None]
        out = empty([len(left), right.shape[1]])
        np.matmul(left, right, out=view(out))
        if bias is not None:
            memory = view(out)
            memory += view(bias)
        return out

    @staticmethod
    @np.errstate(all="ignore")
    def backward(ctx: Any, *args: Any) -> Any:
        """Gradients of x, weight and bias; None for those that want none."""
        (x, weight), gradient = ctx.kept, view(args[0])
        want_x, want_weight, *want_bias = ctx.wanted
        to_x = empty(x.shape) if want_x else None
        to_weight = empty(weight.shape) if want_weight else None
        if to_x is not None:
            np.matmul(gradient, weight.T, out=view(to_x))
        if to_weight is not None:
            np.matmul(x.T, gradient, out=view(to_weight))
        found = [to_x, to_weight]
        if want_bias:
            to_bias = empty(gradient.shape[1:])
            view(to_bias)[:] = gradient.sum(0, np.float64)
            found.append(to_bias if want_bias[0] else None)
        return tuple(found)


class Linear(nn.Linear):
    """paddle's Linear: the same parameters, by the same names, with the same first values.

    In training on a CPU the BLAS of numpy computes it where our kernels are wanted: 1,280 features and 1,000 classes
    in less than half of the time that paddle takes on an AMD EPYC. Everything else, and every export, is paddle's own.
    """

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not (self.training and compiling.wanted() and self._takes(x)):
            return super().forward(x)
        apply: Callable[..., paddle.Tensor] = Product.apply
        return apply(x, self.weight, self.bias)

    def _takes(self, x: paddle.Tensor) -> bool:
        """Whether x is a batch of numbers that the product knows, and a gradient will be asked for."""
        fits = x.ndim == 2 and x.shape[0] > 0 and x.shape[1] == self.weight.shape[0]
        return fits and compiling.learns(x, self.weight, self.bias)
