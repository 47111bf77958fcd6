"""The interface of log-determinant methods, and what all of them share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_snf.caching import Memo, StateCache, TensorState
from pyro_snf.extra_state import SavesAttributes
from pyro_snf.iteration import refine_linear_solution
from pyro_snf.maps.base import Factors, LinearMap
from pyro_snf.maps.dense import Dense
from pyro_snf.options import shown
from pyro_snf.surrogate import (
    SharedParameter,
    Solver,
    Surrogate,
    implicit_solve,
    share_gradient,
)
from pyro_snf.tracing import is_traced, is_wrapped

__all__ = ["LogDetMethod", "as_method", "own_copy"]


# Of factors that are kept for several shapes of events: 16 MB in float32. Those of images of many
# sizes would else take gigabytes.
_MAX_ENTRIES = 2**22


class LogDetMethod(SavesAttributes, ABC):
    """How a layer gets ``log|det A|`` in training, and its gradient; A is a linear map.

    A layer takes a copy of the method that it is given, and calls :meth:`setup` with its map. In
    ``eval()`` mode, under ``no_grad`` and with frozen parameters log-determinants are exact,
    whatever the method. To write one:

    1. Subclass, with options that are keyword-only, and say with :attr:`training_value` what the
       value in training is.
    2. Define :meth:`training_log_abs_det`. The gradient may be that of autograd, or a surrogate.
    3. If there is a state, make its buffers and parameters in :meth:`setup`, and name plain
       values to be saved, each with its check, in ``saved_attributes``.

    Optional: :attr:`inverses` and :meth:`inverse_weight`, where the method knows an approximate
    inverse, :meth:`follows_inverse`, where that is kept up to date in training, and
    :meth:`score_solver`, where it can solve for path gradients; :attr:`error_estimate`,
    :attr:`num_refactorizations` and :meth:`refactorize`, where it measures its error;
    :meth:`multiply_input` and :meth:`scale_output`, where a state can follow such a change of A;
    :attr:`has_surrogate`; :meth:`affine` and :meth:`invert`, where the gradient of the map itself
    changes; :meth:`affine_with_memo` and :meth:`log_abs_det_with_memo`, where the two have
    something in common.
    """

    #: The value in training, for a layer's repr: "exact", "estimate", or "0" if there is no value.
    training_value: ClassVar[str] = "estimate"

    #: What a layer can have as ``inverse`` with this method; the first is the default.
    inverses: ClassVar[tuple[str, ...]] = ("exact",)

    #: Whether the method returns surrogates, so that their gradients can be added in place.
    has_surrogate: ClassVar[bool] = False

    linear_map: LinearMap

    def __init__(self) -> None:
        super().__init__()
        self._factors: StateCache[Factors] = StateCache()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def reset_parameters(self) -> None:
        """Forget what is known of A. A subclass with a state starts it anew, too.

        That of submodules is their own: after ``to_empty`` torch calls this method of each module.
        """
        self._factors.clear()

    def setup(self, linear_map: LinearMap, theta: Tensor) -> None:
        """Make the state for a map; called when a layer is made, and when it is sharded.

        :param Tensor theta: the layer's parameter θ = 0, for its shape, device and dtype.
        """
        self.linear_map = linear_map
        self._factors.clear()

    def affine_with_memo(
        self, theta: Tensor, log_scale: Tensor, bias: Tensor | None, x: Tensor
    ) -> tuple[Tensor, Memo | None]:
        """:meth:`affine` in training, and what :meth:`log_abs_det_with_memo` can use of it.

        A backward pass through the graph of the memo's handle drops it.
        """
        shared = share_gradient(theta, x) if self.has_surrogate else None
        parameter = theta if shared is None else shared.parameter
        return self.affine(parameter, log_scale, bias, x, is_training=True), shared

    def log_abs_det_with_memo(
        self, theta: Tensor, x: Tensor, state: TensorState, memo: Memo | None
    ) -> Tensor:
        """:meth:`training_log_abs_det` as a tensor with a graph.

        :param memo: from :meth:`affine_with_memo`, of another class if the layer has kept one of
            its own, or None.
        """
        value = self.training_log_abs_det(theta, x, state)
        if not isinstance(value, Surrogate):
            return value
        return memo.attach(value) if isinstance(memo, SharedParameter) else value.attach_to(theta)

    @abstractmethod
    def training_log_abs_det(
        self, theta: Tensor, x: Tensor, state: TensorState
    ) -> Tensor | Surrogate:
        """``log|det A|`` with its gradient in θ, shape ``()``, or ``(B,)`` if it depends on x.

        Either a tensor with an autograd graph, or a value and a surrogate gradient.

        :param Tensor x: a batch of B events, shape ``(B, *event)``.
        :param TensorState state: that of θ. What was computed for an equal state is still valid.
        :raises torch.linalg.LinAlgError: if A is singular or not finite, as far as that is seen.
        """

    def exact_log_abs_det(
        self, theta: Tensor, event_shape: torch.Size, state: TensorState
    ) -> Tensor:
        """``log|det A|``, shape ``()``, with all its derivatives in θ where gradients are recorded.

        :raises torch.linalg.LinAlgError: if A is singular or not finite.
        """
        if is_traced() or is_wrapped(theta):
            return self.linear_map.exact_log_abs_det(theta, event_shape)
        factors = self.factors(theta, event_shape, state)
        if torch.is_grad_enabled() and theta.requires_grad:
            return self.linear_map.log_abs_det(factors).attach_to(theta)
        return factors.log_abs_det

    def affine(
        self,
        theta: Tensor,
        log_scale: Tensor,
        bias: Tensor | None,
        x: Tensor,
        *,
        is_training: bool,
    ) -> Tensor:
        """``diag(e^s) A x + b`` for every event, shape ``(B, *event)``."""
        return self.linear_map.affine(theta, log_scale, bias, x)

    def invert(self, theta: Tensor, h: Tensor, inverse: str, *, is_training: bool) -> Tensor:
        """``A⁻¹ h`` for every event, with implicit gradients in θ and h.

        :param str inverse: one of :attr:`inverses`. With ``"one_pass"`` the result is approximate.
        :param bool is_training: whether θ changes after every few solves, so that factors may cost
            more than they save.
        """
        if is_traced() or is_wrapped(theta):
            return self.linear_map.exact_solve(theta, h)
        solver = self._solver(theta, h, inverse, is_training=is_training)
        if torch.is_grad_enabled():
            return implicit_solve(theta, h, solver, self.linear_map.gradient)
        return solver(h, False)

    def score_solver(
        self, theta: Tensor, event_shape: torch.Size, state: TensorState, *, is_training: bool
    ) -> Solver:
        """Solves ``Aᵀ u = h`` as accurately as the gradient in training is."""
        return self._solver_to_rounding(theta, event_shape)

    def follows_inverse(self, theta: Tensor) -> bool:
        """Whether the method keeps an approximate inverse up to date in training."""
        return False

    def inverse_weight(self, theta: Tensor, event_shape: torch.Size) -> Tensor:
        """The weight of the approximate inverse of A, a constant to autograd.

        By default the best one of its size.
        """
        return self.linear_map.inverse_weight(theta, event_shape)

    @property
    def error_estimate(self) -> float | None:
        """The latest estimate of the error of the method; None where it has none."""
        return None

    @property
    def num_refactorizations(self) -> int | None:
        """How often the method has factorized A in training; None where it never does."""
        return None

    def refactorize(self, theta: Tensor) -> None:
        """Bring the state up to date with θ exactly, where there is one that follows θ."""
        return None

    def multiply_input(self, theta: Tensor, left: Tensor, right: Tensor) -> None:
        """``A ← A (I + P Qᵀ)`` in place, for a dense map. A state that follows θ follows exactly.

        :param Tensor left: ``Pᵀ``, shape ``(r, D)``, like ``right``, which is ``Qᵀ``.
        """
        self._dense_map.multiply_input(theta, left, right)

    def scale_output(self, theta: Tensor, log_factors: Tensor) -> None:
        """``A ← diag(e^c) A`` in place, likewise.

        :param Tensor log_factors: c, shape ``(D,)``.
        """
        self._dense_map.scale_output(theta, log_factors)

    @property
    def _dense_map(self) -> Dense:
        assert isinstance(self.linear_map, Dense)
        return self.linear_map

    def factors(
        self, theta: Tensor, event_shape: torch.Size, state: TensorState | None = None
    ) -> Factors:
        """The factors of A, kept until θ changes; those for the latest four shapes of events.

        Large ones are kept alone.
        """
        state = TensorState(theta) if state is None else state
        make = partial(self.linear_map.factorize, theta, event_shape)
        if self.linear_map.num_factor_entries(theta, event_shape) > _MAX_ENTRIES:
            # Of another state than those for all other shapes.
            return self._factors.get((state, tuple(event_shape)), make)
        return self._factors.get(state, make, tuple(event_shape))

    def one_pass_solver(self, theta: Tensor, event_shape: torch.Size) -> Solver:
        """Products with the approximate inverse, in the place of solutions."""
        weight = self.inverse_weight(theta, event_shape)
        if torch.is_grad_enabled():
            weight = weight.clone()  # a backward pass is to use the same
        return partial(_multiply, self.linear_map, weight)

    def _solver(self, theta: Tensor, h: Tensor, inverse: str, *, is_training: bool) -> Solver:
        event_shape = h.shape[1:]
        if inverse == "one_pass":
            return self.one_pass_solver(theta, event_shape)
        if inverse == "exact":
            return self.factors(theta, event_shape).solve
        if is_training and self.linear_map.refinement_pays(len(h), event_shape):
            return self._refining_solver(theta, event_shape)
        return self._solver_to_rounding(theta, event_shape)

    def _solver_to_rounding(self, theta: Tensor, event_shape: torch.Size) -> Solver:
        if self.linear_map.is_cheap_to_factorize(theta, event_shape):
            return self.factors(theta, event_shape).solve
        return self.linear_map.iterative_solver(theta, event_shape)

    def _refining_solver(self, theta: Tensor, event_shape: torch.Size) -> Solver:
        """Iterative refinement from the approximate inverse."""
        # A backward pass solves with the A of its forward pass.
        theta = theta.detach().clone()
        linear_map, approximate = self.linear_map, self.one_pass_solver(theta, event_shape)
        factors, norm = linear_map.factorize(theta, event_shape), linear_map.norm_bound(theta)

        def solve(h: Tensor, transposed: bool) -> Tensor:
            multiply = linear_map.multiply_transposed if transposed else linear_map.multiply
            return refine_linear_solution(
                partial(multiply, theta),
                lambda h: approximate(h, transposed),
                lambda h: factors.solve(h, transposed),
                h,
                norm=norm,
            )

        return solve


@torch.no_grad()
def _multiply(linear_map: LinearMap, weight: Tensor, h: Tensor, transposed: bool) -> Tensor:
    return linear_map.apply_weight(weight.to(h.dtype), h, transposed)


def as_method(value: object, methods: Mapping[str, Any], base: type) -> Any:
    """A layer's own method, from its option ``log_det``: of a name, or a copy of an object.

    :param methods: the classes that names stand for.
    :param base: the class of such objects.
    :raises ValueError: for anything else.
    """
    if isinstance(value, str) and value in methods:
        return methods[value]()
    if isinstance(value, base):
        return own_copy(value)
    names = ", ".join(map(repr, methods))
    classes = ", ".join(f"{method.__name__}(…)" for method in methods.values())
    raise ValueError(f"expected log_det to be {names}, or an object, {classes}; got {shown(value)}")


def own_copy(value: Any) -> Any:
    """A deep copy for a layer, which shares functions, such as a schedule, and distributions."""
    shared = [
        one
        for one in vars(value).values()
        if isinstance(one, Distribution) or (callable(one) and not isinstance(one, nn.Module))
    ]
    return copy.deepcopy(value, {id(one): one for one in shared})
