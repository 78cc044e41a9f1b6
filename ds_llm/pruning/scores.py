"""Chooses the weights of a matrix to keep: by magnitude, by Wanda's score, or by SparseGPT, which updates them too.

A matrix is [R, C], C the inputs. All functions compute in float32 on the weight's device; of equal scores the weight of
the lower index is pruned first, so results do not vary between runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_llm.errors import ConfigError, UserError

DENSITIES = (0.05, 0.9)
SCOPES = ("layer", "row")
BLOCK = 128  # columns that SparseGPT chooses and updates at a time


@dataclass(frozen=True)
class Pattern:
    """How many weights to keep, and within which groups to compare them.

    `density` is the share kept. `n` of each `m` consecutive inputs of a row are kept where given; else the best of each
    row (scope "row") or of the whole matrix ("layer"), `round(density * C)` or `round(density * R * C)` of them.
    """

    density: float
    scope: str = "layer"
    n: int | None = None
    m: int | None = None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else "unstructured"

    @classmethod
    def parse(cls, density: float | None, pattern: str | None, scope: str) -> Pattern:
        """From options: a density, or a pattern such as "2:4", and the scope. Raises `ConfigError`."""
        if scope not in SCOPES:
            raise ConfigError(f"scope '{scope}': must be {' or '.join(SCOPES)}")
        if pattern is None:
            if density is None:
                raise ConfigError(
                    "give a density (the share of weights kept, for example 0.5) or a pattern such as 2:4"
                )
            if not DENSITIES[0] <= density <= DENSITIES[1]:
                raise ConfigError(
                    f"density {density:g}: must be from {DENSITIES[0]} to {DENSITIES[1]}; the share of weights left"
                )
            return cls(density, scope)
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        n, m = (int(x) for x in found.groups()) if found else (0, 0)
        if not 0 < n < m <= BLOCK:
            raise ConfigError(f"pattern '{pattern}': must be N:M, N of each M weights kept, for example 2:4 or 4:8")
        if density is not None and abs(density - n / m) > 1e-9:
            raise ConfigError(f"density {density:g}: a {pattern} pattern keeps {n / m:g}; leave the density out")
        return cls(n / m, "row", n, m)

    def check(self, name: str, columns: int) -> None:
        """Raise `UserError` where the matrix `name` cannot have this pattern."""
        if self.m and columns % self.m:
            raise UserError(f"{name}: its {columns:,} inputs are not a multiple of {self.m}, so it cannot be {self}")


def keep_largest(scores: Tensor, kept: int) -> Tensor:
    """Bool [R, C], True for the `kept` largest scores of each row; of equal ones those of higher index."""
    dropped = scores.shape[1] - kept
    if not dropped:
        return torch.ones_like(scores, dtype=torch.bool)
    last = scores.kthvalue(dropped, dim=1, keepdim=True).values
    below, ties = scores < last, scores == last
    spare = dropped - below.sum(1, keepdim=True)
    return ~(below | (ties & (ties.cumsum(1, dtype=torch.int32) <= spare)))


def select(scores: Tensor, pattern: Pattern) -> Tensor:
    """Bool [R, C], the weights that `pattern` keeps by their scores [R, C]."""
    if pattern.m:
        return keep_largest(scores.reshape(-1, pattern.m), pattern.n).view_as(scores)
    if pattern.scope == "row":
        return keep_largest(scores, round(pattern.density * scores.shape[1]))
    return keep_largest(scores.reshape(1, -1), round(pattern.density * scores.numel())).view_as(scores)


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W|."""
    return weight.abs()


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2 (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695, equation 1); squares [C] are the sums of the squared inputs."""
    return weight.abs() * squares.sqrt()


@dataclass(frozen=True)
class Curvature:
    """What SparseGPT needs of a layer's inputs.

    `factor` [C, C]: upper triangular U with U^T U the inverse of the damped Hessian. `dead` [C] bool: always 0.
    """

    factor: Tensor
    dead: Tensor


def curvature(gram: Tensor, damping: float, name: str) -> Curvature:
    """From the sum of x x^T over the calibration tokens, [C, C], which is overwritten.

    The Hessian's diagonal is raised by `damping` times its mean over inputs that are not dead; a dead input gets that
    mean. Its scale does not matter. Raises `UserError` when it is singular all the same, or not finite.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    if not torch.isfinite(mean):
        raise UserError(f"{name}: the calibration text gives inputs that are not finite; try --dtype fp32")
    diagonal[dead] = mean if mean > 0 else 1.0
    diagonal += damping * mean
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise UserError(
            f"{name}: the Hessian of its inputs is singular; give more calibration text or a larger damping"
        )
    return Curvature(upper, dead)


def sparsegpt(weight: Tensor, inputs: Curvature, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The pruned weight [R, C] and its mask (Frantar & Alistarh, "SparseGPT", arXiv:2301.00774, algorithm 1).

    Columns are visited in order, in blocks of 128: a block's weights with the least w^2 / U_jj^2 are set to 0, and the
    error of each is made up for by the later columns of all rows, those of later blocks in one product per block. The
    quota of a block is such that the numbers kept up to its end are exact for the whole matrix (or each row).
    """
    weight, upper = weight.clone(), inputs.factor
    rows, columns = weight.shape
    mask = torch.ones_like(weight, dtype=torch.bool)
    width = BLOCK // pattern.m * pattern.m if pattern.m else BLOCK
    for start in range(0, columns, width):
        end = min(start + width, columns)
        block, kept, factor = weight[:, start:end], mask[:, start:end], upper[start:end, start:end]
        scale, dead = factor.diagonal(), inputs.dead[start:end]
        errors = torch.zeros_like(block)
        if not pattern.m:
            scores = _scores(block, scale, dead)
            if pattern.scope == "row":
                quota = round(pattern.density * end) - round(pattern.density * start)
                kept.copy_(keep_largest(scores, quota))
            else:
                quota = round(pattern.density * rows * end) - round(pattern.density * rows * start)
                kept.copy_(keep_largest(scores.reshape(1, -1), quota).view_as(scores))
        for j in range(end - start):
            if pattern.m and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                kept[:, group] = keep_largest(_scores(block[:, group], scale[group], dead[group]), pattern.n)
            # what the column loses, in units of its own diagonal
            errors[:, j] = block[:, j].masked_fill(kept[:, j], 0) / scale[j]
            block[:, j:] -= errors[:, j, None] * factor[j, j:]
        block.masked_fill_(~kept, 0)
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight, mask


def _scores(block: Tensor, scale: Tensor, dead: Tensor) -> Tensor:
    """A weight on a dead input costs nothing to prune."""
    return (block / scale).square().masked_fill_(dead, 0)
