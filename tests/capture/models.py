"""Small modules, each with one habit that capture has to follow or to refuse."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Habit(nn.Module):
    """One linear layer; ``x`` is ``[2, 5, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)


def example() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Plain(Habit):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Branches(Habit):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if x.sum() > 0:
            return x
        return -x


class LoopsByValue(Habit):
    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        for _ in range(int(times)):
            x = self.linear(x)
        return x


class CountsInBuffer(Habit):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x) + self.count


class CountsInPython(Habit):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class WritesItsInput(Habit):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.linear(x)


class WritesInPlace(Habit):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.relu_()
        y[:, 0] = 0
        y += 1
        return y


class DrawsNoise(Habit):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand_like(x)


class DropsAlways(Habit):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), 0.5)


class DropsInTraining(Habit):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), 0.5, training=self.training)


class FailsItself(Habit):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ x


class FixesItsLength(Habit):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(2, 5, 8)


class TakesAnotherPathWhenLong(Habit):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 6:
            x = x * 2
        return self.linear(x)


class TakesAnotherPathAtOne(Habit):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            x = x * 2
        return self.linear(x)


class HasPositions(Habit):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.positions(torch.arange(x.shape[1]))


class Pair(NamedTuple):
    """A named tuple of outputs."""

    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Record:
    """A dataclass of outputs."""

    first: Tensor
    rest: tuple[Tensor, ...]


class ReturnsMuch(Habit):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {"logits": y, "hidden": (y, None, [y + 1]), "cache": None, "pair": Pair(y * 2, y * 3)}


class ReturnsRecord(Habit):
    def forward(self, x: Tensor) -> Record:
        return Record(self.linear(x), (self.linear(x) + 1,))


class ReturnsOddNames(Habit):
    def forward(self, x: Tensor) -> dict[Any, Any]:
        y = self.linear(x)
        return {"a_b": y, "a": {"b": y + 1}, "scores/last layer": y + 2, 0: y + 3}


class ReturnsOneTwice(Habit):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        return y, y, x


class ReturnsNumber(Habit):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.linear(x), 3


class TakesMuch(Habit):
    def forward(self, batch: dict[str, Any], *more: Tensor, scale: Tensor, **rest: Tensor) -> Tensor:
        return self.linear(batch["x"]) * scale + batch["pair"][1] + more[0] + rest["bias"]


# factories, as a user writes them


def plain() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    return Plain(), (example(),), {}


def with_examples() -> nn.Module:
    module = Plain()
    module.example_inputs = {"x": example()}
    module.dynamic = ["x:0=batch:1..4"]
    return module


def branches() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Branches(), (example(),)


def without_examples() -> nn.Module:
    return Plain()


def number() -> int:
    return 3


def raises() -> nn.Module:
    raise ValueError("no weights here")


def leaves() -> nn.Module:
    raise SystemExit(0)


def broken_weights() -> tuple[nn.Module, tuple[Tensor, ...]]:
    module = Plain()
    with torch.no_grad():
        module.linear.weight[0, 0] = float("nan")
    return module, (example(),)
