"""The interface of linear maps, which layers and log-determinant methods use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_snf.surrogate import Solver, Surrogate

__all__ = ["ControlVariate", "Factors", "LinearMap", "scale_and_shift"]


class LinearMap(ABC):
    """A linear map A of events, given by a parameter θ in which it is linear; A = I at θ = 0.

    It keeps no state: θ is an argument of every method, and gradients are those in θ unless it
    says otherwise. A map of θ also serves as an approximate inverse of another one, with a
    parameter of its own. To write a map:

    1. Define the weight a that A consists of, a matrix or a kernel (:meth:`weight`,
       :meth:`theta_scale`), and the products (:meth:`multiply`, :meth:`multiply_transposed`,
       :meth:`apply_weight`, :meth:`norm_bound`).
    2. Define the gradients of a product (:meth:`gradient`) and of a trace (:meth:`trace_gradient`).
    3. Define what is exact: :meth:`factorize`, :meth:`inverse_weight`, and two functions that
       ``torch.jit`` can trace, :meth:`exact_log_abs_det` and :meth:`exact_solve`.

    Optional: :meth:`affine`, where scale and bias are cheaper together with A; :meth:`matrix_of`,
    where A consists of copies of one small matrix; :meth:`control_variate`,
    :meth:`is_cheap_to_factorize`, :meth:`num_factor_entries` and :meth:`iterative_solver`, where
    factors can be too large; :meth:`inverse_shape`, where an approximate inverse has another shape
    than A; :meth:`refinement_pays`, where few events are solved faster without factors.
    """

    #: The number of dimensions of an event.
    event_dim: ClassVar[int]

    @abstractmethod
    def weight(self, theta: Tensor) -> Tensor:
        """``a = identity + scale · θ``, of θ's shape."""

    @abstractmethod
    def theta_scale(self, theta: Tensor) -> float:
        """``∂a/∂θ``."""

    def theta_of(self, weight: Tensor) -> Tensor:
        """The parameter θ with this weight."""
        identity = self.weight(torch.zeros_like(weight))
        return (weight - identity) / self.theta_scale(weight)

    @abstractmethod
    def multiply(self, theta: Tensor, x: Tensor) -> Tensor:
        """``A x`` for every event, shape ``(B, *event)``."""

    @abstractmethod
    def multiply_transposed(self, theta: Tensor, x: Tensor) -> Tensor:
        """``Aᵀ x`` for every event, shape ``(B, *event)``."""

    @abstractmethod
    def apply_weight(self, weight: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
        """``A x`` (or ``Aᵀ x``) by the weight a, which may be of another size than θ."""

    @abstractmethod
    def norm_bound(self, theta: Tensor) -> Tensor:
        """An upper bound of ``‖A‖₂``, shape ``()``."""

    @abstractmethod
    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        """The weight of the best approximate inverse of the size of :meth:`inverse_shape`.

        For a matrix it is the exact one.
        """

    @abstractmethod
    def gradient(self, theta: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
        """``Σ ∂⟨v, A x⟩/∂θ`` over a batch of events x and cotangents v, of θ's shape.

        Differentiable in x and v. Of θ, only the shape matters.
        """

    @abstractmethod
    def trace_gradient(self, theta: Tensor, other: Tensor, event_shape: torch.Size) -> Tensor:
        """``∂ tr(N A)/∂θ``, N being the map of the parameter ``other``; of θ's shape.

        :param event_shape: of the events that the trace is over.
        """

    @abstractmethod
    def factorize(self, theta: Tensor, event_shape: torch.Size) -> Factors:
        """The factors of A on events of one shape, computed when they are first needed."""

    def log_abs_det(self, factors: Factors) -> Surrogate:
        """``log|det A|`` with all its derivatives in θ.

        :param Factors factors: of A.
        """
        return Surrogate(
            factors.log_abs_det,
            lambda: factors.gradient,
            self.theta_scale(factors.weight),
            derivative=lambda theta: factors.differentiable_gradient(self.weight(theta)),
        )

    @abstractmethod
    def exact_log_abs_det(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        """``log|det A|``, shape ``()``, in operations that ``torch.jit`` can trace. Slow."""

    @abstractmethod
    def exact_solve(self, theta: Tensor, right_side: Tensor) -> Tensor:
        """``A⁻¹ h`` for every h, in operations that ``torch.jit`` can trace. Slow."""

    def affine(self, theta: Tensor, log_scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """``diag(e^s) A x + b`` for every event, shape ``(B, *event)``.

        :param Tensor log_scale: s, one number for each channel of an event (for each feature).
        :param bias: b, likewise, or None.
        """
        return self.scale_and_shift(self.multiply(theta, x), log_scale, bias)

    def scale_and_shift(self, h: Tensor, log_scale: Tensor, bias: Tensor | None) -> Tensor:
        """``diag(e^s) h + b`` for every event h."""
        shifted = None if bias is None else self.per_channel(bias)
        return scale_and_shift(h, self.per_channel(log_scale.exp()), shifted)

    def per_channel(self, numbers: Tensor) -> Tensor:
        """One number for each channel, shape ``(C,)``, so that it broadcasts with events."""
        return numbers if self.event_dim == 1 else numbers.view(-1, *[1] * (self.event_dim - 1))

    def scale_rows(self, weight: Tensor, factors: Tensor) -> Tensor:
        """``diag(f) a``, the weight of the map that A is followed by one factor for each channel.

        :param Tensor factors: f, shape ``(C,)``.
        """
        return factors.view(-1, *[1] * (weight.dim() - 1)) * weight

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the parameter of an approximate inverse, from that of θ."""
        return shape

    def matrix_of(self, theta: Tensor) -> Tensor | None:
        """The parameter of the dense matrix that A is block diagonal of, shape ``(C, C)``.

        There are as many copies of it as an event has numbers for each of the C channels. None
        where A is of another form.
        """
        return None

    def control_variate(
        self, theta: Tensor, event_shape: torch.Size, num_probes: int
    ) -> ControlVariate:
        """A map near A whose inverse and log-determinant are known: by default A itself.

        :param int num_probes: of a training step. The cost of the factors is compared with theirs.
        """
        factors = self.factorize(theta, event_shape)
        return ControlVariate(factors, factors.gradient, is_exact=True)

    def refinement_pays(self, num_events: int, event_shape: torch.Size) -> bool:
        """Whether refining some solutions from an approximate inverse is cheaper than factors."""
        return False

    def is_cheap_to_factorize(self, theta: Tensor, event_shape: torch.Size) -> bool:
        """Whether the factors take some seconds at most, and fit into memory."""
        return True

    def num_factor_entries(self, theta: Tensor, event_shape: torch.Size) -> int:
        """About how many numbers the factors consist of."""
        return theta.numel()

    def iterative_solver(self, theta: Tensor, event_shape: torch.Size) -> Solver:
        """A solver to rounding without the factors, where these are not cheap.

        It keeps what it needs of θ: a backward pass solves with the A of its forward pass.
        """
        return self.factorize(theta, event_shape).solve


class Factors(ABC):
    """The factors of one A, computed when they are first needed, and kept. They have no gradient.

    All members raise ``torch.linalg.LinAlgError`` if A is not finite, or singular at the
    precision of its type. Half-precision weights count as float32.

    :param Tensor weight: a, a constant; not to be written to afterwards.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()

    @property
    @abstractmethod
    def log_abs_det(self) -> Tensor:
        """``log|det A|``, shape ``()``."""

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """``∂ log|det A|/∂a``, of a's shape."""

    @property
    @abstractmethod
    def condition(self) -> float:
        """An estimate of ``‖A‖₂ ‖A⁻¹‖₂``, of the right order of magnitude."""

    @abstractmethod
    def solve(self, right_side: Tensor, transposed: bool = False) -> Tensor:
        """``A⁻¹ h`` (or ``A⁻ᵀ h``) for every h of a batch, shape ``(B, *event)``."""

    def precondition(self, right_side: Tensor) -> Tensor:
        """``A⁻¹ h`` to the precision of a's type, where :meth:`solve` is more accurate and slower.

        For iterations that correct it.
        """
        return self.solve(right_side)

    @abstractmethod
    def differentiable_gradient(self, weight: Tensor) -> Tensor:
        """:attr:`gradient` as a function of a.

        :param Tensor weight: the a that was factorized, with its autograd graph.
        """


class ControlVariate(NamedTuple):
    """A map P near A whose inverse and log-determinant are known."""

    factors: Factors
    """The factors of P."""
    trace_gradient: Tensor
    """``∂ tr(P⁻¹ A)/∂a``, of a's shape. A is linear in a, so it is the same for all a."""
    is_exact: bool
    """Whether P is A itself."""


def scale_and_shift(h: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``scale · h + bias``, the latter two broadcast."""
    return h * scale if bias is None else torch.addcmul(bias, h, scale)
