"""Kernels launched again: what Triton compiled is found at once, by what the call looks like.

Triton's own way in binds every argument by name, asks each what it is and makes a text of the answers, at every launch:
several times what torch takes for a product. Here a launch is known by its shapes, strides, dtypes and alignments as
they are. Only one that is new goes Triton's way; under its interpreter, which compiles nothing, all do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_MOST = 1024  # launches that are kept of one kernel

P = ParamSpec("P")
R = TypeVar("R")
Grid = tuple[int, int, int]


class Launcher:
    """A kernel, called with its arguments in order: tensors, ints, floats; then its constants by name, in order.

    Which device it runs on is the first tensor's matter. Constants and options such as ``num_warps`` must come in the
    same order at every call.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._known: dict[tuple[Any, ...], tuple[Callable[..., object], tuple[Any, ...]]] = {}

    def __call__(
        self, grid: Grid, tensors: Sequence[Tensor], ints: Sequence[Any] = (), floats: Sequence[Any] = (),
        args: Sequence[Any] | None = None, **constants: Any,
    ) -> None:  # fmt: skip
        """Launch it.

        Args:
            grid: programs.
            tensors: all that it reads and writes, of one device.
            ints: numbers for which Triton may compile anew, as it does for 1 and for multiples of 16.
            floats: numbers for which it does not.
            args: those three as the kernel takes them, where it takes tuples of them.
            constants: of the kernel, and options of the launch.
        """
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, tensors, ints, floats, args, **constants)
            return
        if args is None:
            args = (*tensors, *ints, *map(float, floats))
        looks = (
            device, grid, *ints, *constants.values(),
            *[t.dtype for t in tensors], *[t.data_ptr() % 16 for t in tensors],
        )  # fmt: skip
        known = self._known.get(looks)
        if known is not None:
            known[0](*args, *known[1])
            return
        compiled = self.kernel[grid](*args, **constants)
        if compiled is not None:
            if len(self._known) >= _MOST:
                self._known.clear()
            names = self.kernel.arg_names[len(args) :]
            self._known[looks] = compiled[grid], tuple(constants[name] for name in names)


def unrecorded(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.no_grad()``, which costs nothing where nothing is recorded anyway: in a node's forward and backward."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run
