"""Methods that compute ``log|det J_f|`` of a pair of networks, and its gradient, in training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from pyro_snf.caching import ParameterState
from pyro_snf.extra_state import SavesAttributes, saved_number
from pyro_snf.free_form.linearization import Context, Linearization
from pyro_snf.free_form.log_det import ValueEstimate, exact_slogdet, probe_gradient
from pyro_snf.free_form.network_pair import NetworkPair
from pyro_snf.krylov import recent_steps
from pyro_snf.options import as_count, as_number, as_seed, check_choice, expect
from pyro_snf.penalty import StepCounter
from pyro_snf.probes import PROBES, ProbeStream, draw_probes
from pyro_snf.surrogate import with_surrogate

__all__ = ["PairExact", "PairLearned", "PairMethod", "PairRefined"]

# The stream of the value's probes; that of the gradient's is 0.
_VALUE = 1


class PairMethod(SavesAttributes, ABC):
    """A way to compute ``log|det J_f|`` of a pair of networks in training, and its gradient.

    A layer takes a copy of the method that it is given. To write one:

    1. Subclass, with options that are keyword-only, and set :attr:`training_value`.
    2. Define :meth:`training_log_abs_det`.
    3. If there is a state, make its buffers in :meth:`setup`, and name the plain values to be
       saved, each with its check, in ``saved_attributes``.

    Optional: :attr:`uses_inverse` and :attr:`error_estimate`.
    """

    #: The value in training, for a layer's repr: "exact", "estimate", or "0" if there is no value.
    training_value: str = "estimate"

    #: Whether the method needs g.
    uses_inverse: ClassVar[bool] = True

    #: None: no method of pairs makes factorizations.
    num_refactorizations: None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def setup(self, device: torch.device) -> None:
        """Make the state; called once by each layer.

        :param device: of the networks.
        """
        return None

    @property
    def error_estimate(self) -> float | None:
        """The latest estimate of the error of the gradient; None where the method has none."""
        return None

    @abstractmethod
    def training_log_abs_det(
        self,
        pair: NetworkPair,
        near: Linearization,
        back: Linearization | None,
        context: Context,
        state: Callable[[], ParameterState],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``log|det J_f|`` with its gradient in all that f depends on, shape ``(B,)``.

        A method that knows the signs of ``det J_f`` returns them first, as ``torch.linalg.slogdet``
        does: where both occur, f is not invertible, and the penalty becomes larger.

        :param near: f, linearized at x, with the graph of x and the context.
        :param back: g, linearized at f(x), a constant; it may be None unless :attr:`uses_inverse`.
        :param state: returns the state of the networks' parameters.
        """


class PairExact(PairMethod):
    """Exact values and gradients, with D backward passes and O(D³) operations for every event:
    ``log_det="exact"``, the default for D up to 3.

    There, it is as cheap as the other methods; at D = 10 it takes twice as long as
    :class:`PairRefined` (batches of 256). Its gradient has no noise, and the signs of the
    determinants are known at every step.

    >>> transform = self_normalizing_pair(3, [32], log_det=PairExact())
    """

    training_value = "exact"
    uses_inverse = False

    def training_log_abs_det(
        self,
        pair: NetworkPair,
        near: Linearization,
        back: Linearization | None,
        context: Context,
        state: Callable[[], ParameterState],
    ) -> tuple[Tensor, Tensor]:
        parameters = tuple(pair.forward_net.parameters())
        return exact_slogdet(pair.forward, near.source, context, parameters)


class PairLearned(PairMethod):
    r"""Gradients by random probes, with :math:`J_g` in the place of :math:`J_f^{-1}`:
    ``log_det="learned"``.

    The gradient :math:`\mathbb E[w^\top \partial J_f\, v]`, :math:`w = J_g^\top v`, is biased where
    g is not the inverse of f. The residual :math:`\|v - J_f^\top w\|/\|v\|` of the probes measures
    the error. The value is 0, or, with ``lanczos_steps``, an estimate.

    >>> transform = self_normalizing_pair(3, [32], log_det=PairLearned(num_probes=2))

    :param int num_probes: k, for each event.
    :param str probe: ``"gaussian"``, ``"rademacher"`` or ``"orthogonal"``; see
        :func:`~pyro_snf.probes.draw_probes`.
    :param int lanczos_steps: for an estimate of the value, an upper one on average; 0 for none.
    :param seed: of the probes, an integer from 0. By default one is drawn from torch's global
        random stream when a layer is made, so that no two layers share their probes.
    :raises ValueError: for options that are not of these.

    References:

    Felix Draxler, Peter Sorrenson, Lea Zimmermann, Armand Rousselot, Ullrich Köthe. Free-form
    Flows: Make Any Architecture a Normalizing Flow. AISTATS 2024. [arXiv:2310.16624]
    """

    saved_attributes: ClassVar = {"error_estimate": saved_number}

    #: The most Krylov steps for a probe, and the residual at which they end.
    krylov_steps: int = 0
    tolerance: float = 1.0

    def __init__(
        self,
        *,
        num_probes: int = 1,
        probe: str = "orthogonal",
        lanczos_steps: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.num_probes = as_count("num_probes", num_probes)
        check_choice("probe", probe, PROBES)
        self.probe = probe
        self.lanczos_steps = as_count("lanczos_steps", lanczos_steps, 0)
        self.seed = as_seed(seed)
        self.training_value = "estimate" if self.lanczos_steps else "0"
        self.error_estimate = math.nan

    def extra_repr(self) -> str:
        return (
            f"num_probes={self.num_probes}, probe={self.probe!r}, "
            f"lanczos_steps={self.lanczos_steps}"
        )

    def setup(self, device: torch.device) -> None:
        self.probes = ProbeStream(self.seed, device=device, differs_by_process=True)
        self.steps = StepCounter()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Before the first estimate."""
        self.error_estimate = math.nan
        self._recent_steps = recent_steps(self.krylov_steps)

    def training_log_abs_det(
        self,
        pair: NetworkPair,
        near: Linearization,
        back: Linearization | None,
        context: Context,
        state: Callable[[], ParameterState],
    ) -> Tensor:
        assert back is not None
        probes = self._draw(near, self.probes.next_generator(near.output.device))
        estimate = self._start_estimate(near, state) if self.lanczos_steps else None
        found = probe_gradient(
            near,
            back,
            probes,
            tolerance=self.tolerance,
            krylov_steps=self.krylov_steps,
            expected_steps=max(self._recent_steps),
            beside=None if estimate is None else estimate.numbers,
        )
        self._recent_steps.append(found.num_steps)
        self._mean_square_residual = found.residual.square().mean()
        value = torch.zeros_like(found.surrogate)
        if estimate is not None:
            value = estimate.value(found.beside, found.surrogate)
        inputs = (near.source, *context, *pair.forward_net.parameters())
        return with_surrogate(value, found.surrogate, inputs)

    @property
    def error_estimate(self) -> float:
        """The root mean square of the latest ``‖v − J_fᵀ w‖/‖v‖``; NaN before the first."""
        return self._mean_square_residual.sqrt().item()

    @error_estimate.setter
    def error_estimate(self, value: float) -> None:
        # On a CPU, whatever the default: a layer that is made on the "meta" device has it, too.
        self._mean_square_residual = torch.tensor(value, device="cpu").square()

    def _start_estimate(
        self, near: Linearization, state: Callable[[], ParameterState]
    ) -> ValueEstimate:
        # The probes depend on the parameters' state alone: the same density is the same number.
        self.steps.count(state())
        generator = self.probes.generator(self.steps.num_states, near.output.device, stream=_VALUE)
        return ValueEstimate(near, self._draw(near, generator), lanczos_steps=self.lanczos_steps)

    def _draw(self, near: Linearization, generator: torch.Generator) -> Tensor:
        dim = near.output[0].numel()
        fits = self.probe != "orthogonal" or self.num_probes <= dim
        expect(f"num_probes <= D = {dim} orthogonal probes", fits, self.num_probes)
        return draw_probes(
            self.probe, self.num_probes, near.output.shape, generator, near.output.dtype
        )


class PairRefined(PairLearned):
    r"""Gradients by random probes, whose residual a few Krylov steps reduce:
    ``log_det="refined"``, the default for D above 3.

    The gradient :math:`\mathbb E[w^\top \partial J_f\, v]` is unbiased where
    :math:`J_f^\top w = v`. The system is solved by generalized conjugate residuals, preconditioned
    by :math:`J_g^\top`, and last a step ``w + J_gᵀ (v − J_fᵀ w)`` where that is predicted to
    suffice. Its residual is computed all the same: see :attr:`error_estimate`. The value is 0, or,
    with ``lanczos_steps``, an estimate by Lanczos quadrature, an upper one on average. Eight of
    them are accurate, and take longer than all the rest.

    >>> transform = self_normalizing_pair(3, [32], log_det=PairRefined(krylov_steps=8))

    :param int num_probes: k, for each event.
    :param str probe: as for :class:`PairLearned`.
    :param float tolerance: in (0, 1), of the root mean square of the residuals
        :math:`\|v - J_f^\top w\|/\|v\|` over the batch.
    :param int krylov_steps: the most for each probe.
    :param int lanczos_steps: for the estimate of the value; 0 for none, and the value 0.
    :param seed: as for :class:`PairLearned`.
    :raises ValueError: for options that are not of these.
    """

    def __init__(
        self,
        *,
        num_probes: int = 1,
        probe: str = "orthogonal",
        tolerance: float = 0.15,
        krylov_steps: int = 4,
        lanczos_steps: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_probes=num_probes, probe=probe, lanczos_steps=lanczos_steps, seed=seed)
        self.tolerance = as_number("tolerance in (0, 1)", tolerance, lambda number: 0 < number < 1)
        self.krylov_steps = as_count("krylov_steps", krylov_steps)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, tolerance={self.tolerance}, krylov_steps={self.krylov_steps}"
        )
