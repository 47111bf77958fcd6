"""A table of weighted draws: one row for each scalar element of each site."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["COLUMNS", "Summary", "summarize"]

_QUANTILES = (0.05, 0.5, 0.95)

COLUMNS = ("mean", "sd", "5%", "median", "95%", "mcse_mean")
"""The columns of a :class:`Summary`."""


class Summary(dict[str, dict[str, float]]):
    """Rows by the names of scalar elements, ``theta[0,1]`` for instance; prints as a table.

    Each row is a dictionary with the keys of :data:`COLUMNS`.
    """

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        # Four digits, by %g: elements have units of their own.
        lines = [["", *COLUMNS]]
        lines += [[name, *(f"{row[key]:.4g}" for key in COLUMNS)] for name, row in self.items()]
        return "\n".join(
            f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells) for name, *cells in lines
        )

    __repr__ = __str__


def summarize(samples: Mapping[str, Tensor], weights: Tensor) -> Summary:
    r"""Means, standard deviations, quantiles, and the Monte Carlo standard errors of the means.

    The quantile at p is the smallest draw up to which the weights sum to at least p. The error of
    a mean is :math:`\sqrt{\sum_i w_i^2 (z_i - \bar z)^2}` (Owen, 2013, section 9.2).

    :param samples: the draws of each site, shape ``(S, *shape)``.
    :param Tensor weights: of the draws, with the sum 1, shape ``(S,)``.

    References:

    Art B. Owen. Monte Carlo theory, methods and examples. 2013, chapter 9.
    [https://artowen.su.domains/mc/]
    """
    weights = weights.cpu().double()
    summary = Summary()
    for name, values in samples.items():
        draws = values.cpu().double().reshape(len(values), values[0].numel())
        mean = weights @ draws
        deviations = (draws - mean).square()
        ordered, order = draws.sort(0)
        cumulative = weights[order].cumsum(0)
        columns = [mean, (weights @ deviations).sqrt()]
        for probability in _QUANTILES:
            # Of the last sum, which rounding may leave below 1.
            rank = (cumulative < probability * cumulative[-1]).sum(0, keepdim=True)
            columns.append(ordered.gather(0, rank).squeeze(0))
        columns.append((weights.square() @ deviations).sqrt())
        rows = torch.stack(columns, -1).tolist()
        indices = itertools.product(*map(range, values.shape[1:]))
        for index, row in zip(indices, rows, strict=True):
            label = f"[{','.join(map(str, index))}]" if index else ""
            summary[name + label] = dict(zip(COLUMNS, row, strict=True))
    return summary
