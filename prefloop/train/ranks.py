"""Processes that train together: which one this is, and how their numbers become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_BUCKET = 2**25
"""Elements of gradients that are summed in one message (128 MiB in float32)."""


@dataclass(frozen=True)
class Ranks:
    """This process, number `number` of `count`. Alone, every method gives back what it got."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.number == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, for everybody. All must call."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def means(self, sums: dict[str, float], count: int) -> dict[str, float]:
        """Means over `count` examples from everybody's sums; a rank without examples has none. All must call."""
        everybody = [theirs for theirs in self.gather(sums) if theirs]
        return {name: sum(theirs[name] for theirs in everybody) / count for name in everybody[0]}

    def add(self, tensor: Tensor) -> None:
        """Make `tensor` the sum over the ranks, the same bits on each. All must call."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the ranks; a weight that no rank has one for keeps none. All must call."""
        if self.count == 1:
            return
        weights = list(parameters)
        having = torch.tensor([weight.grad is not None for weight in weights]).int()
        having = having.to(weights[0].device)
        self.add(having)
        bucket: list[Tensor] = []
        for weight, anywhere in zip(weights, having.tolist(), strict=True):
            if not anywhere:
                continue
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            full = bucket and sum(map(torch.numel, bucket)) + weight.numel() > _BUCKET
            if full or (bucket and bucket[0].dtype != weight.grad.dtype):
                self._add_together(bucket)
                bucket = []
            bucket.append(weight.grad)
        if bucket:
            self._add_together(bucket)

    def _add_together(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        self.add(flat)
        totals = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, total in zip(bucket, totals, strict=True):
            gradient.copy_(total.view_as(gradient))
