"""Unconstrained dense layers whose log-determinant costs O(D²)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_snf.log_dets import LogDetMethod
from pyro_snf.maps import Dense
from pyro_snf.options import as_count, expect
from pyro_snf.recording import RecordedCall, RecordingSlot
from pyro_snf.transforms.base import check_input
from pyro_snf.transforms.self_normalizing import AffineSelfNormalizingTransform

__all__ = ["SelfNormalizingLinear", "self_normalizing_linear"]


class SelfNormalizingLinear(AffineSelfNormalizingTransform):
    r"""The unconstrained affine map of vectors.

    .. math::
        T(x) = W x + b, \qquad
        W = \operatorname{diag}(e^{s})\,A, \qquad A = I + \Theta / \sqrt D,

    with :math:`\log|\det W| = \sum_i s_i + \log|\det A|` (Keller et al., 2021). It starts as
    ``init_scale`` times the identity.

    ============  =====================================  ===========================  ============
    ``log_det``   gradient of :math:`\log|\det A|`       value in training            cost a step
    ============  =====================================  ===========================  ============
    "refined"     :math:`R^\top`, R tracks A⁻¹: close    estimate, error tr(E²)/2     O(BD²)
    "learned"     :math:`R^\top`, R a parameter: biased  exactly 0                    O(BD²)
    "exact"       :math:`A^{-\top}`                      exact                        O(D³)
    ============  =====================================  ===========================  ============

    where E = I − RA and B is the batch size. *In training* means in ``train()`` mode, with
    gradients recorded and parameters that require them. Otherwise, that is under ``no_grad``, in
    ``eval()`` mode or with frozen parameters, value and gradient are exact, O(D³) once and then
    cached until a parameter changes. ``T(x)`` is always exact.

    Each name stands for an object with options of its own: :class:`~pyro_snf.Refined`,
    :class:`~pyro_snf.Learned` and :class:`~pyro_snf.Exact`. ``Refined`` measures its error,
    :attr:`error_estimate`, and corrects R where the gradient is off by more than its tolerance.

    ``T.inv(y)`` solves to rounding, with implicit gradients: by LU factors, which cost O(D³) for
    every new W and are kept until a parameter changes. In training, where W is new at every step,
    ``inverse="iterative"`` starts from R and refines the solution where that is cheaper;
    ``"exact"`` always factorizes. ``"one_pass"`` is a product with R, the paper's fast sampler: an
    *approximate* inverse, whose error :func:`pyro_snf.diagnostics.inverse_error` measures.

    As a guide, samples pass through T:

    >>> transform = SelfNormalizingLinear(3, init_scale=0.1)
    >>> guide = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [transform])
    >>> guide.rsample().shape
    torch.Size([3])

    As a density model, data pass through T, from data to latent:

    >>> density = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [transform.inv])
    >>> loss = -density.log_prob(torch.ones(8, 3)).mean()
    >>> loss.backward()

    :param int input_dim: D, the number of features. Inputs have shape ``(..., D)``.
    :param log_det: ``"refined"``, ``"learned"``, ``"exact"``, or a
        :class:`~pyro_snf.LogDetMethod`, of which the layer takes a copy.
    :param inverse: ``"iterative"``, ``"exact"`` or ``"one_pass"``. By default the first that the
        method has; ``Exact`` has only ``"exact"``.
    :param bool bias: whether there is a b; it starts at 0.
    :param float init_scale: the scale :math:`e^s` to start from, positive. A guide does well to
        start narrow, at 0.1 say.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :raises ValueError: for options that are not of these, and for inputs that are not floating,
        empty, of another last dimension or another dtype.
    :raises torch.linalg.LinAlgError: where a log-determinant or an inverse is asked of a W that
        is singular or not finite.

    References:

    T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max
    Welling. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    event_shape: torch.Size

    def __init__(
        self,
        input_dim: int,
        *,
        log_det: str | LogDetMethod = "refined",
        inverse: str | None = None,
        bias: bool = True,
        init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        input_dim = as_count("input_dim", input_dim)
        super().__init__(
            Dense(),
            (input_dim, input_dim),
            log_det=log_det,
            inverse=inverse,
            bias=bias,
            init_scale=init_scale,
            device=device,
            dtype=dtype,
        )
        self.input_dim = input_dim
        self.event_shape = torch.Size([input_dim])
        #: Where an optimizer attaches a recording of single samples' gradients.
        self.recording = RecordingSlot()

    def extra_repr(self) -> str:
        return f"{self.input_dim}, {super().extra_repr()}"

    @property
    @torch.no_grad()
    def inverse_weight(self) -> Tensor:
        """R ≈ W⁻¹ as the method knows it, shape ``(D, D)``: tracked, learned or (in O(D³)) exact.

        A constant to autograd.
        """
        inverse = self.log_det.inverse_weight(self.theta, self.event_shape)
        factors = torch.exp(-self.log_scale).to(inverse.dtype)
        return self.log_det.linear_map.scale_rows(inverse.mT, factors).mT

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, Any]:
        recording = self.recording.get()
        if recording is None or not self.is_trained or not self._is_training(self.theta):
            return super()._call_with_memo(x)
        with torch.no_grad():
            y = self._call(x)
        call = RecordedCall(recording, self._pull, self._as_events(x))
        return call.output(x, y, self.theta), call

    def _log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        value = super()._log_abs_det_jacobian(x, y)
        return value if self.recorded_call(x, y) is None else value.detach()

    @property
    def is_trained(self) -> bool:
        """Whether all parameters require a gradient: only then samples are recorded."""
        return all(parameter.requires_grad for parameter in self._map_parameters())

    def recorded_call(self, x: Tensor, y: Tensor) -> RecordedCall | None:
        """The record of the call ``y = T(x)``, if there is one."""
        memo = self._memo_of(x, y)
        return memo if isinstance(memo, RecordedCall) else None

    @torch.no_grad()
    def multiply_input(self, left: Tensor, right: Tensor) -> None:
        """``W ← W (I + P Qᵀ)`` in place, in O(rD²); what is known of A⁻¹ follows exactly.

        :param Tensor left: ``Pᵀ``, shape ``(r, D)``.
        :param Tensor right: ``Qᵀ``, shape ``(r, D)``.
        """
        self.log_det.multiply_input(self.theta, left, right)

    @torch.no_grad()
    def rotate_input(self, start: Tensor) -> None:
        """``W ← W Q`` in place, Q orthogonal, so that ``V⁻¹ W`` is lower triangular. In O(D³).

        :param Tensor start: V, shape ``(D, D)``; the diagonal of ``V⁻¹ W`` becomes positive.
        """
        weight = self.weight.double()
        triangle = torch.linalg.qr(torch.linalg.solve(start.double(), weight).mT).R.mT
        self._set_weight(start.double() @ (triangle * triangle.diagonal().sign()), self.log_scale)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Make ``weight`` the layer's W; R becomes its inverse. In O(D³).

        :param Tensor weight: regular, shape ``(D, D)``.
        :raises ValueError: for another shape.
        """
        fits = isinstance(weight, Tensor) and weight.shape == self.theta.shape
        expect(f"weight, a tensor of shape {tuple(self.theta.shape)}", fits, weight)
        weight = weight.to(self.theta.device, torch.float64)
        # Rows of length 1 lose no digits to the identity in I + Θ/√D.
        log_lengths = weight.norm(dim=-1).log()
        self.log_scale.copy_(log_lengths)
        self._set_weight(weight, log_lengths)

    def _set_weight(self, weight: Tensor, log_scale: Tensor) -> None:
        scaled = weight * torch.exp(-log_scale.double()).unsqueeze(-1)
        self.theta.copy_(self.log_det.linear_map.theta_of(scaled))
        self.refactorize()

    @torch.no_grad()
    def shift_input(self, shift: Tensor) -> None:
        """``b ← b + W v`` in place.

        :param Tensor shift: v, shape ``(D,)``.
        """
        theta, linear_map = self.theta, self.log_det.linear_map
        image = linear_map.multiply(theta, shift.unsqueeze(0)).squeeze(0)
        self.bias.add_(self.log_scale.exp() * image)

    @torch.no_grad()
    def balance(self, limit: float, imbalance: float | None = None) -> None:
        """Move the lengths of A's rows to ``log_scale``, if one is not within a factor of 1.

        ``W`` stays as it is. With rows of length 1, ``I + Θ/√D`` loses no digits to the identity.

        :param float limit: the factor.
        :param imbalance: a recent :meth:`row_imbalance`, if it is known.
        """
        imbalance = self.row_imbalance().item() if imbalance is None else imbalance
        if imbalance <= limit:
            return
        log_lengths = self._log_row_lengths()
        self.log_scale.add_(log_lengths)
        self.log_det.scale_output(self.theta, -log_lengths)

    @torch.no_grad()
    def row_imbalance(self) -> Tensor:
        """The largest factor by which the length of a row of A differs from 1, shape ``()``."""
        return self._log_row_lengths().abs().max().exp()

    def _log_row_lengths(self) -> Tensor:
        return self.log_det.linear_map.weight(self.theta).norm(dim=-1).log()

    def _pull(self, gradient: Tensor) -> Tensor:
        """``Wᵀ g`` for rows g."""
        scaled = gradient * torch.exp(self.log_scale)
        return self.log_det.linear_map.multiply_transposed(self.theta, scaled)

    def _as_events(self, x: Tensor) -> Tensor:
        """Check an input of shape ``(..., D)`` and flatten it to ``(B, D)``."""
        check_input(self, x, (self.input_dim,), self.theta.dtype)
        return x if x.dim() == 2 else x.reshape(-1, self.input_dim)


def self_normalizing_linear(input_dim: int, **kwargs: Any) -> SelfNormalizingLinear:
    """A :class:`SelfNormalizingLinear`, in the style of Pyro's helper functions.

    >>> stack = dist.transforms.iterated(2, self_normalizing_linear, 3, init_scale=0.5)

    :param int input_dim: D, the number of features.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingLinear`.
    """
    return SelfNormalizingLinear(input_dim, **kwargs)
