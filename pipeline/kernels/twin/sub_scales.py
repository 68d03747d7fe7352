"""Sub-scales of one group in plain PyTorch, on any device.

The contract is in `pipeline.kernels.sub_scales`.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from pipeline.kernels.twin.common import nearest_index
from pipeline.kernels.twin.descent import LEAST_GAIN

_State = tuple[Tensor, Tensor, Tensor, Tensor]
"""Sub-scales, sub-offsets, level indices and objective of every row."""


def fit_sub_scales(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    d: Tensor,
    dmin: Tensor,
    sc: Tensor,
    mn: Tensor,
    indices: Tensor,
    given: bool,
    levels: Tensor,
    scale_range: tuple[int, int],
    offset_range: tuple[int, int],
    reach: int,
    sweeps: int,
) -> _State:
    """See `pipeline.kernels.fit_sub_scales`."""
    problem = _Problem(metric, linear, d, dmin, levels, scale_range, offset_range)
    sideways = reach if offset_range[1] > offset_range[0] else 0
    tries = []
    for ds in range(-reach, reach + 1):
        for dm in range(-sideways, sideways + 1):
            s, m = (sc + ds).clamp(*scale_range), (mn + dm).clamp(*offset_range)
            tries.append(problem.evaluate(s, m, problem.rounded(weights, s, m)))
    best = problem.polish(reduce(_lower, tries), sweeps)
    if given:
        best = _lower(problem.polish(problem.evaluate(sc, mn, indices), sweeps), best)
    return best


def _lower(first: _State, second: _State) -> _State:
    """The second where it is lower by more than rounding."""
    better = second[3] < first[3] - LEAST_GAIN * first[3].abs()
    s, m, e = (torch.where(better, second[n], first[n]) for n in (0, 1, 3))
    return s, m, torch.where(better[:, None], second[2], first[2]), e


class _Problem:
    def __init__(
        self,
        metric: Tensor,
        linear: Tensor,
        d: Tensor,
        dmin: Tensor,
        levels: Tensor,
        scale_range: tuple[int, int],
        offset_range: tuple[int, int],
    ) -> None:
        self.metric, self.linear, self.levels = metric, linear, levels
        self.d, self.dmin = d, dmin
        self.scale_range, self.offset_range = scale_range, offset_range

    def rounded(self, weights: Tensor, sc: Tensor, mn: Tensor) -> Tensor:
        """Nearest level indices."""
        scale, offset = (self.d * sc)[:, None], (-self.dmin * mn)[:, None]
        ratio = (weights - offset) / torch.where(scale == 0, 1.0, scale)
        return nearest_index(torch.where(scale == 0, 0.0, ratio), self.levels)

    def values(self, sc: Tensor, mn: Tensor, indices: Tensor) -> Tensor:
        """v, [rows, group]."""
        return (self.d * sc)[:, None] * self.levels[indices] - (self.dmin * mn)[:, None]

    def evaluate(self, sc: Tensor, mn: Tensor, indices: Tensor) -> _State:
        """The state with its objective."""
        v = self.values(sc, mn, indices)
        return sc, mn, indices, ((v @ self.metric - 2 * self.linear) * v).sum(1)

    def polish(self, state: _State, sweeps: int) -> _State:
        """Alternate codes and pair until neither helps."""
        for _ in range(sweeps):
            before = state[3]
            state = _lower(state, self.evaluate(*self.descended(*state[:3])))
            state = _lower(state, self.evaluate(*self.best_pair(state[2], *state[:2]), state[2]))
            if not (state[3] < before).any():
                break
        return state

    def descended(self, sc: Tensor, mn: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of coordinate descent on the codes."""
        scale, indices = self.d * sc, indices.clone()
        safe = torch.where(scale == 0, 1.0, scale)
        gradient = self.linear - self.values(sc, mn, indices) @ self.metric
        for i in range(indices.shape[1]):
            curvature = self.metric[i, i]
            old = self.levels[indices[:, i]]
            found = nearest_index(old + gradient[:, i] / curvature / safe, self.levels)
            step = scale * (self.levels[found] - old)
            moves = step * (step * curvature - 2 * gradient[:, i]) < 0
            indices[:, i] = torch.where(moves, found, indices[:, i])
            gradient = gradient - torch.where(moves, step, 0.0)[:, None] * self.metric[i]
        return sc, mn, indices

    def best_pair(self, indices: Tensor, sc: Tensor, mn: Tensor) -> tuple[Tensor, Tensor]:
        """The best of all pairs for fixed codes."""
        q = self.levels[indices]
        product = q @ self.metric
        qq, q1 = (q * product).sum(1, keepdim=True), product.sum(1, keepdim=True)
        qc, one_c = (q * self.linear).sum(1, keepdim=True), self.linear.sum(1, keepdim=True)
        total = self.metric.sum()
        all_scales = torch.arange(self.scale_range[0], self.scale_range[1] + 1, device=q.device)
        s = self.d[:, None] * all_scales
        low, high = self.offset_range
        step = self.dmin[:, None]
        vertex = (s * q1 - one_c) / total / torch.where(step == 0, 1.0, step)
        wanted = torch.round(vertex).clamp(low, high)
        m = torch.where(step == 0, mn[:, None].to(s), wanted)
        o = -step * m
        value = s * (s * qq + 2 * o * q1 - 2 * qc) + o * (o * total - 2 * one_c)
        at = value.argmin(1, keepdim=True)
        return all_scales[at[:, 0]], m.gather(1, at)[:, 0].long()
