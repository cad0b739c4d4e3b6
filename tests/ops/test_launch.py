"""Launches that Triton has compiled before do not ask it again; what it would compile anew does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankshift.ops import launch
from rankshift.ops.launch import Launcher, unrecorded


class Kernel:
    """What Triton's JIT is to a launch: each compilation is noted, and each launch of what was compiled."""

    arg_names: tuple[str, ...] = ("x", "y", "n", "scale", "R", "EVEN")

    def __init__(self, compiles: bool = True):
        self.compiles, self.asked = compiles, 0
        self.ran: list[Any] = []

    def run(self, grid: tuple[int, int, int], args: list[Any]) -> None:
        self.ran.append((grid, args))

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def jit(*args: Any, **constants: Any) -> Any:
            self.asked += 1
            order = [*args, *(constants[name] for name in self.arg_names[len(args) :])]
            self.run(grid, order)
            return Compiled(self, constants) if self.compiles else None

        return jit


class Compiled:
    def __init__(self, kernel: Kernel, constants: dict[str, Any]):
        self.kernel, self.constants = kernel, constants

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.kernel.run(grid, list(args))


def call(
    launcher: Launcher, x: Tensor, grid: int = 3, n: int = 5, scale: float = 1, R: int = 4, warps: int = 4
) -> None:
    launcher((grid, 1, 1), (x, x), (n,), (scale,), EVEN=True, R=R, num_warps=warps)


def same(a: Any, b: Any) -> bool:
    return a[0] == b[0] and all(x is y or (type(x) is type(y) and x == y) for x, y in zip(a[1], b[1], strict=True))


def test_what_is_known_is_launched_as_it_was() -> None:
    kernel, x, y = Kernel(), torch.zeros(32), torch.zeros(32)
    launcher = Launcher(kernel)
    call(launcher, x)
    call(launcher, x)
    call(launcher, y, scale=0.25)  # another place, as well aligned; another factor
    assert kernel.asked == 1
    assert same(kernel.ran[1], kernel.ran[0])
    assert same(kernel.ran[0], ((3, 1, 1), [x, x, 5, 1.0, 4, True]))
    assert same(kernel.ran[2], ((3, 1, 1), [y, y, 5, 0.25, 4, True]))


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(32, dtype=torch.float64)}, {"x": torch.zeros(32)[1:]},
        {"n": 16}, {"n": 1}, {"grid": 2}, {"R": 8}, {"warps": 8},
    ],
    ids=["dtype", "alignment", "a multiple of 16", "one", "grid", "constant", "option"],
)  # fmt: skip
def test_what_differs_is_compiled(other: dict[str, Any]) -> None:
    kernel, x = Kernel(), torch.zeros(32)
    launcher = Launcher(kernel)
    for _ in range(2):
        call(launcher, x)
        call(launcher, **{"x": x, **other})
    assert kernel.asked == 2
    assert same(kernel.ran[0], kernel.ran[2])
    assert same(kernel.ran[1], kernel.ran[3])


def test_tuples() -> None:
    kernel, x = Kernel(), torch.zeros(32)
    kernel.arg_names = ("tensors", "scales", "strides", "SIZE")
    launcher = Launcher(kernel)
    for stride in (1, 1, 2):
        args = ((x, x), (0.5, stride / 3), ((stride, 1), (1, 1)))
        launcher((1, 1, 1), (x, x), args[2:], args=args, SIZE=2)
        assert same(kernel.ran[-1], ((1, 1, 1), [*args, 2]))
    assert kernel.asked == 2


def test_the_interpreter_compiles_nothing() -> None:
    kernel, x = Kernel(compiles=False), torch.zeros(32)
    launcher = Launcher(kernel)
    call(launcher, x)
    call(launcher, x)
    assert kernel.asked == 2


def test_it_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST", 3)
    launcher = Launcher(Kernel())
    for n in range(10):
        call(launcher, torch.zeros(32), n=n)
        assert len(launcher._known) <= 3


def test_another_device_than_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is compiled and launched where its tensors are."""
    current, seen = [0], []

    class On:
        def __init__(self, index: int):
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    class There(torch.Tensor):
        def get_device(self) -> int:
            return 1

    class Seen(Kernel):
        def run(self, grid: tuple[int, int, int], args: list[Any]) -> None:
            seen.append(current[0])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", On)
    kernel = Seen()
    launcher = Launcher(kernel)
    for _ in range(2):
        call(launcher, torch.zeros(32).as_subclass(There))
    assert (kernel.asked, seen, current) == (1, [1, 1], [0])


@pytest.mark.parametrize("records", [True, False])
def test_unrecorded(records: bool) -> None:
    @unrecorded
    def twice(x: Tensor, *, more: int = 0) -> Tensor:
        assert not torch.is_grad_enabled()
        return 2 * x + more

    with torch.set_grad_enabled(records):
        y = twice(torch.ones(1, requires_grad=True), more=1)
        assert torch.is_grad_enabled() == records
    assert not y.requires_grad
    assert y.item() == 3
