r"""Steps for the affine layer of a guide that do not depend on the coordinates of the posterior.

The guide's samples are ``x = W h + b``, and ``g`` is the gradient of ``log q(x) − log p(x)`` in x.
With ``y = Wᵀ g``, the *relative* gradients of the Kullback–Leibler divergence are

.. math::
    M = \mathrm{E}[y\, h^\top], \qquad d = \mathrm{E}[y],
    \qquad W \leftarrow W (I - \eta M), \qquad b \leftarrow b - \eta\, W d.

Under a change of coordinates ``x → B x + c`` of the model, the iterates change in the same way, so
the condition number of the posterior does not matter. Everything here is computed from N rows of h
and y, and every change of W is ``W ← W (I + P Qᵀ)`` of low rank.

*Relative steps* (:func:`relative_step`) are these. For a Gaussian h and the posterior precision P,
``y = (N − I) h`` with ``N = Wᵀ P W``: the gradient vanishes with ``N − I``, in every sample.

*Secant steps* (:class:`Secants`) use more of it. ``u = y + h = N h`` tells N along h, exactly.
Block BFGS finds the N nearest to I that agrees, and the new W has ``Wᵀ P W = I`` along the h of
this step. There is no step size, and no stiffness for it to be too long for. Convergence takes
about ``D/N`` times as many steps for a digit, at any condition number.

*Step sizes.* With independent estimates ``M₁, M₂``, the expectation of ``⟨M₁, M₂⟩`` is the squared
length of M; that of ``‖M₁‖²`` contains the noise, too. The best step on a quadratic is proportional
to their ratio (:class:`SignalShare`). It is about ``N/(N + D)`` for a Gaussian posterior, at any
distance from it, and 0 where nothing but noise is left. Relative steps compare successive
estimates, which turn against each other where steps are too long. Secant steps remove
what one estimate has shown, so that the next one is another; they compare halves of the samples.

References:

Jean-François Cardoso, Beate Hvam Laheld. Equivariant adaptive source separation. IEEE Transactions
on Signal Processing, 1996.

Shun-ichi Amari. Natural gradient works efficiently in learning. Neural Computation, 1998.

Tom Schaul, Sixin Zhang, Yann LeCun. No more pesky learning rates. ICML 2013. [arXiv:1206.1106]

Robert Gower, Donald Goldfarb, Peter Richtárik. Stochastic block BFGS: squeezing more curvature out
of data. ICML 2016. [arXiv:1603.09649]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_snf.transfer import send

__all__ = ["Moments", "Secants", "SignalShare", "moments", "relative_step"]

# The shortest and the longest memory of the averages, in steps.
_MIN_MEMORY, _MAX_MEMORY = 10.0, 100.0

# A sample whose y has the length λ and the angle φ to h shows a direction of stiffness about λ/φ.
# Along it, W must not be shortened by more than the cosine; half of it is safe for several samples.
_MAX_SHARE_OF_COSINE = 0.5

# A scale (an eigenvalue of W's change, squared) grows by at most a factor of 4 in a secant step:
# 1/N is bounded, N from a sample may be negative where the posterior is not log-concave.
_LEAST_PRECISION = 0.25

# Of the secant, in [0, 1]. At 1, what a non-Gaussian posterior shows in one step replaces all that
# was known along its directions.
_SECANT_RATE = 0.7

# Lengths of y in secants, in units of √D, the length of h. Longer ones, of heavy tails, count so.
_MAX_SECANT_LENGTH = 4.0

# In the estimates of signal and noise, in the same units: one outlier would end all steps.
_MAX_LENGTH = 2.0


class SignalShare:
    """The share of the squared length of a noisy gradient that is not noise, a moving average.

    The memory grows while there is nothing but noise: steps become small, and then smaller.
    """

    def __init__(self) -> None:
        self.memory = _MIN_MEMORY
        self.signal = 0.0
        self.power = 0.0

    def update(self, signal: float, power: float) -> None:
        """Add an estimate.

        :param float signal: an unbiased estimate of the squared length of the expectation.
        :param float power: the squared length.
        """
        if not (math.isfinite(signal) and math.isfinite(power)):
            return
        self.signal += (signal - self.signal) / self.memory
        self.power += (power - self.power) / self.memory
        memory = self.memory * (1 - self.value) + 1
        self.memory = min(max(memory, _MIN_MEMORY), _MAX_MEMORY)

    @property
    def value(self) -> float:
        """In [0, 1]; 0 before the first estimate."""
        return min(max(self.signal / self.power, 0.0), 1.0) if self.power > 0 else 0.0


class Covariance(NamedTuple):
    """The sample covariance ``M = Yᵀ H`` of y and h, by factors."""

    left: Tensor
    """Y, shape ``(n, D)``."""
    right: Tensor
    """H, shape ``(n, D)``."""

    @property
    def trace(self) -> Tensor:
        """``tr M / D``, shape ``()``."""
        return (self.left * self.right).sum() / self.left.shape[-1]

    def inner(self, other: Covariance) -> Tensor:
        """``⟨M, M'⟩``, shape ``()``."""
        return ((self.left @ other.left.mT) * (self.right @ other.right.mT)).sum()


class Moments(NamedTuple):
    """Estimates from N samples of h and y: those that steps are made from are exact, those for
    signal and noise are of y cut to a length of 2√D, which bounds the influence of outliers."""

    h: Tensor
    """n = N − 1 contrasts of h, orthonormal combinations that contain no mean."""
    y: Tensor
    """The same combinations of y, so that ``yᵀ h / n`` is the sample covariance M."""
    mean: Tensor
    """d, the mean of y, shape ``(D,)``."""
    bounded: Covariance
    """M, of the bounded y."""
    bounded_mean: Tensor
    """d, cut to a length of √D."""


def _contrasts(rows: Tensor) -> Tensor:
    """N − 1 orthonormal combinations of N rows, each with weights that sum to 0 (Helmert)."""
    count = torch.arange(1, len(rows), dtype=rows.dtype, device=rows.device).unsqueeze(-1)
    partial_sums = rows.cumsum(0)[:-1]
    return (partial_sums - count * rows[1:]) / (count * (count + 1)).sqrt()


def _shorten(rows: Tensor, longest: float) -> Tensor:
    lengths = rows.norm(dim=-1, keepdim=True)
    return torch.where(lengths > longest, rows * (longest / lengths), rows)


def moments(h: Tensor, y: Tensor) -> Moments:
    """The moments of at least two samples, in float64.

    :param Tensor h: shape ``(N, D)``.
    :param Tensor y: shape ``(N, D)``.
    """
    h, y = h.double(), y.double()
    contrasts, mean = _contrasts(y), y.mean(0)
    root = math.sqrt(h.shape[-1])
    left = _shorten(contrasts, _MAX_LENGTH * root) / len(contrasts)
    right = _contrasts(h)
    return Moments(right, contrasts, mean, Covariance(left, right), _shorten(mean, root))


def relative_step(h: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """``I − η M`` as ``I + P Qᵀ``: a step along the relative gradient.

    :param Tensor h: contrasts, shape ``(n, D)``.
    :param Tensor y: contrasts, shape ``(n, D)``.
    :param float rate: η, in [0, 1].
    :return: ``Pᵀ`` and ``Qᵀ``, each of shape ``(n, D)``.
    """
    count, dim = h.shape
    left = y * (-rate / count)
    length, h_length = left.norm(dim=-1), h.norm(dim=-1)
    cosine = ((left * h).sum(-1) / (length * h_length)).abs().nan_to_num(0.0)
    longest = _MAX_SHARE_OF_COSINE * cosine.clamp(min=1 / math.sqrt(dim)) * min(1.0, dim / count)
    size = length * h_length
    factor = torch.where(size > longest, longest / size, 1.0)
    return left * factor.unsqueeze(-1), h


class Secants:
    """``I + P Qᵀ``, a block BFGS step: with it, ``N`` becomes I along h.

    1. Orthonormal rows V of the span of h, and the same combinations Y of y.
    2. ``U = V + η Y`` are those of ``u = h + η y``, and ``T = U Vᵀ`` is ``V N Vᵀ``: made symmetric,
       its eigenvalues bounded from below. ``U ← U + (T − U Vᵀ) V`` agrees with it.
    3. ``I + Vᵀ (T^{−1/2} V − T⁻¹ U)``. Its product with its transpose, which is the new covariance
       in the coordinates of h, maps ``U`` to ``V``.

    :param Tensor h: contrasts of a standard normal h, shape ``(n, D)``, n < D.
    :param Tensor y: contrasts, shape ``(n, D)``.
    """

    def __init__(self, h: Tensor, y: Tensor) -> None:
        y = _shorten(y, _MAX_SECANT_LENGTH * math.sqrt(h.shape[-1]))
        orthogonal, triangle = torch.linalg.qr(h.mT)
        self._basis = orthogonal.mT
        self._slopes = torch.linalg.solve_triangular(triangle.mT, y, upper=False)
        #: ``Y Vᵀ``, made symmetric, shape ``(n, n)``. :meth:`step` needs a copy on the CPU.
        product = self._slopes @ self._basis.mT
        self.product = (product + product.mT) / 2

    def step(self, rate: float, product: Tensor) -> tuple[Tensor, Tensor]:
        """The step.

        :param float rate: in [0, 1]; η is a share of it.
        :param Tensor product: a copy of :attr:`product` on the CPU.
        :return: ``Pᵀ`` and ``Qᵀ``, each of shape ``(n, D)``.
        """
        eta, basis = _SECANT_RATE * rate, self._basis
        eigenvalues, vectors = torch.linalg.eigh(product)
        eigenvalues = (1 + eta * eigenvalues).clamp(min=max(_LEAST_PRECISION, 1 - eta))
        powers = torch.stack([eigenvalues, eigenvalues.rsqrt(), 1 / eigenvalues]).unsqueeze(1)
        middle, root, inverse = send((vectors * powers) @ vectors.mT, basis)
        images = basis + eta * self._slopes
        images = images + (middle - images @ basis.mT) @ basis
        return basis, root @ basis - inverse @ images
