"""Any network as a layer of a flow, beside a second one that learns to be its inverse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_snf.caching import version
from pyro_snf.free_form.estimator import PairEstimator, Weight
from pyro_snf.free_form.linearization import Linearization, linearize
from pyro_snf.free_form.log_det import exact_slogdet
from pyro_snf.free_form.pair import NetworkPair
from pyro_snf.free_form.solve import Convergence, implicit_inverse, invert
from pyro_snf.networks import ResidualMLP
from pyro_snf.precision import without_autocast
from pyro_snf.probes import PROBES
from pyro_snf.transforms.base import InvertibleTransformModule, check_input
from pyro_snf.transforms.options import as_event_shape, check_count, expect

__all__ = [
    "ConditionalSelfNormalizing",
    "SelfNormalizing",
    "conditional_self_normalizing",
    "self_normalizing",
]


class _Evaluation(NamedTuple):
    """``y = f(x)`` with the graph that products with the Jacobian are taken from."""

    near: Linearization
    handle: Tensor


class SelfNormalizing(InvertibleTransformModule):
    r"""Any network as a bijection, with a second network as its approximate inverse,

    .. math::
        T(x) = f(x), \qquad g(f(x)) \approx x,

    after Keller et al. (2021) and Draxler et al. (2024). Both map a batch of events, of shape
    ``(B, *event)``, to one of the same shape, each event for itself.

    ============  =======================================  =======================  ================
    ``log_det``   gradient of :math:`\log|\det J_f|`       value in training        cost a step
    ============  =======================================  =======================  ================
    "refined"     of probes, :math:`J_f^\top w = v`        estimate (an upper one)  some passes each
                  solved by g and a few iterations                                  through f and g
    "learned"     of probes, :math:`w = J_g^\top v`:       exactly 0                a pass or two
                  biased                                                            through each
    "exact"       exact                                    exact                    D passes, O(D³)
    ============  =======================================  =======================  ================

    *In training* means in ``train()`` mode, with gradients recorded and parameters that require
    them. Otherwise value and gradient are exact, by D backward passes for every event. ``T(x)`` is
    always exact, and so is a density at x: g has no part in it, nor has the reconstruction of x.

    **What is approximate** is the gradient in training: unbiased where the residual of the probes'
    systems is 0, which :attr:`certificate` measures. What makes it small is the penalty

    .. math::
        \lambda \left( \|g(f(x)) - x\|^2 + \|g(f(\tilde x)) - \tilde x\|^2
        + \|f(g(\tilde y)) - \tilde y\|^2 \right), \qquad
        \tilde x = x + \sigma_x \varepsilon, \quad \tilde y = f(x) + \sigma_y \varepsilon',

    the second term with ``data_noise``, the third with ``latent_noise``, and once more with samples
    of a ``base``. It rides on the log-determinant, in all three modes, and never changes its value.

    **What is not guaranteed** is that f is invertible at all. Where two events have the same image,
    densities do not integrate to 1. The penalty works against it; exact log-determinants of both
    signs give it away, and are warned of; :attr:`convergence` counts the samples for which an
    inverse was found; and see :func:`~pyro_snf.diagnostics.pair_report`.

    ``T.inv(y)`` starts from g(y) and iterates to rounding, by fixed points and Newton's method,
    with implicit gradients; ``inverse="learned"`` is one pass through g, an *approximate* inverse.

    >>> f, g = ResidualMLP(2, [32]), ResidualMLP(2, [32])
    >>> transform = SelfNormalizing(f, g, event_shape=2)
    >>> density = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [transform.inv])
    >>> loss = -density.log_prob(torch.ones(8, 2)).mean()
    >>> loss.backward()

    :param forward_net: f, twice differentiable, deterministic, event by event. Attention, dense
        layers and convolutions will do; dropout and batch statistics will not.
    :param inverse_net: g, likewise; once differentiable will do.
    :param event_shape: of events, an integer for vectors. Give this,
    :param event_dim: or the number of dimensions alone, for networks that take events of any size.
    :param str log_det: ``"refined"``, ``"learned"`` or ``"exact"``. For D up to ten or so,
        ``"exact"`` is as cheap.
    :param str inverse: ``"refined"`` or ``"learned"``.
    :param int num_probes: k, for each event.
    :param str probe: ``"gaussian"``, ``"rademacher"`` or ``"orthogonal"``; see
        :func:`~pyro_snf.probes.draw_probes`.
    :param float tolerance: in (0, 1), for ``"refined"``: of the residuals of the probes' systems,
    :param int max_iterations: and how many Krylov iterations there may be to get there. The first
        one alone gains next to nothing.
    :param value_iterations: of Lanczos' process for the value in training; 0 for the value 0. By
        default 8 for ``"refined"``, and 0 for ``"learned"``.
    :param int seed: of the probes, the noise and the samples of the base.
    :param reconstruction_weight: λ: a number, a function of the number of steps taken, or a
        :class:`~pyro_snf.GECO`. By default 10 for ``"learned"`` and 1 otherwise, which suits events
        of some tens of entries with a variance of about 1; more, for larger ones.
    :param str reconstruction: what the penalty trains, ``"both"`` networks, or the ``"inverse"``
        alone, which does nothing to keep f invertible.
    :param float reconstruction_tolerance: τ, the root mean square error of an element up to which
        an event's penalty trains g alone. With it, latents' terms train g alone too.
    :param float data_noise: :math:`\sigma_x`; 0 for no such term. It is what keeps f from folding
        what lies beside the data onto their latents.
    :param float latent_noise: :math:`\sigma_y`; 0 for no such term.
    :param base: a distribution of latents, whose samples are to be reconstructed too.
    :param inverse_tolerance: of ``‖y − T(x)‖ / (‖y‖ + √D)`` in ``T.inv``; by default the 3/4th
        power of the unit roundoff, 6e-6 in float32 and 2e-12 in float64.
    :raises ValueError: for options that are not of these; for inputs that are not floating, empty,
        or of another shape or dtype; and for networks that map to another shape, are random, or mix
        the events of a batch.
    :warns RuntimeWarning: where ``T.inv`` leaves samples that have not converged, and where exact
        log-determinants show that f is not invertible.

    References:

    T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max
    Welling. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]

    Felix Draxler, Peter Sorrenson, Lea Zimmermann, Armand Rousselot, Ullrich Köthe. Free-form
    Flows: Make Any Architecture a Normalizing Flow. AISTATS 2024. [arXiv:2310.16624]
    """

    LOG_DETS = ("refined", "learned", "exact")
    INVERSES = ("refined", "learned")

    #: λ, by default.
    RECONSTRUCTION_WEIGHTS: ClassVar[dict[str, float]] = {
        "refined": 1.0,
        "learned": 10.0,  # g has to be better where it is all that there is
        "exact": 1.0,
    }

    #: Lanczos iterations for the value in training, by default.
    VALUE_ITERATIONS: ClassVar[dict[str, int]] = {"refined": 8, "learned": 0, "exact": 0}

    def __init__(
        self,
        forward_net: nn.Module,
        inverse_net: nn.Module,
        *,
        event_shape: int | Sequence[int] | None = None,
        event_dim: int | None = None,
        log_det: str = "refined",
        inverse: str = "refined",
        num_probes: int = 1,
        probe: str = "orthogonal",
        tolerance: float = 0.02,
        max_iterations: int = 4,
        value_iterations: int | None = None,
        seed: int = 0,
        reconstruction_weight: Weight | None = None,
        reconstruction: str = "both",
        reconstruction_tolerance: float = 0.0,
        data_noise: float = 0.0,
        latent_noise: float = 0.0,
        base: Distribution | None = None,
        inverse_tolerance: float | None = None,
    ) -> None:
        super().__init__()
        for name, network in (("forward_net", forward_net), ("inverse_net", inverse_net)):
            expect(f"{name}, a torch.nn.Module", isinstance(network, nn.Module), network)
        given = (event_shape, event_dim)
        expect("one of event_shape and event_dim", given.count(None) == 1, given)
        expect(f"log_det to be one of {self.LOG_DETS}", log_det in self.LOG_DETS, log_det)
        expect(f"inverse to be one of {self.INVERSES}", inverse in self.INVERSES, inverse)
        _check_options(
            num_probes=num_probes,
            probe=probe,
            tolerance=tolerance,
            max_iterations=max_iterations,
            value_iterations=value_iterations,
            seed=seed,
            reconstruction_weight=reconstruction_weight,
            reconstruction=reconstruction,
            reconstruction_tolerance=reconstruction_tolerance,
            data_noise=data_noise,
            latent_noise=latent_noise,
            base=base,
            inverse_tolerance=inverse_tolerance,
        )
        self.event_shape = None if event_shape is None else as_event_shape(event_shape)
        if self.event_shape is not None:
            event_dim = len(self.event_shape)
        check_count("event_dim", event_dim)
        self._event_dim: int = event_dim  # type: ignore[assignment]  # one of the two is given
        self.log_det = log_det
        self.inverse = inverse
        self.inverse_tolerance = inverse_tolerance
        self.forward_net = forward_net
        self.inverse_net = inverse_net
        if reconstruction_weight is None:
            reconstruction_weight = self.RECONSTRUCTION_WEIGHTS[log_det]
        if value_iterations is None:
            value_iterations = self.VALUE_ITERATIONS[log_det]
        self.estimator = PairEstimator(
            log_det=log_det,
            num_probes=num_probes,
            probe=probe,
            tolerance=tolerance,
            max_iterations=max_iterations if log_det == "refined" else 0,
            value_iterations=value_iterations,
            seed=seed,
            reconstruction_weight=reconstruction_weight,
            reconstruction=reconstruction,
            reconstruction_tolerance=reconstruction_tolerance,
            data_noise=data_noise,
            latent_noise=latent_noise,
            base=base,
        )
        self._context: tuple[Tensor, ...] = ()
        self._context_dim = 0

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    def extra_repr(self) -> str:
        shape = f"event_dim={self._event_dim}" if self.event_shape is None else ""
        estimator = self.estimator
        value = "estimate" if estimator.value_iterations else "0"
        return (
            f"{shape or tuple(self.event_shape or ())}, log_det={self.log_det!r}, "
            f"inverse={self.inverse!r}, num_probes={estimator.num_probes}, "
            f"training value: {'exact' if self.log_det == 'exact' else value}"
        )

    def _call(self, x: Tensor) -> Tensor:
        rows, context, shape = self._as_rows(x)
        return self._networks().forward(rows, *context).view(shape)

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, _Evaluation | None]:
        if self._training_estimator() is None:
            return self._call(x), None
        rows, context, shape = self._as_rows(x)
        if torch.is_autocast_enabled(x.device.type):
            return self._networks().forward(rows, *context).view(shape), None
        near = linearize(self._networks().forward, rows, context, keep_graph=True)
        # A tensor of its own: a hook tells when *its* gradient is computed, not products with J.
        y = near.output.view(shape)
        return y, _Evaluation(near, y)

    def _inverse(self, y: Tensor) -> Tensor:
        rows, context, shape = self._as_rows(y)
        pair = self._networks()
        if self.inverse == "learned":
            # g is a map of its own here: gradients go to its parameters.
            return pair.inverse(rows, *context).view(shape)
        self._refuse_trace()
        with without_autocast(y.device):
            rows, context = self._in_own_dtype(rows, context)
            tolerance = self.inverse_tolerance or torch.finfo(rows.dtype).eps ** 0.75
            found = invert(pair.forward, pair.inverse, rows, context, tolerance=tolerance)
            self._note_convergence(found.residual, found.converged)
            if not torch.is_grad_enabled():
                return found.x.view(shape)
            x = implicit_inverse(
                pair.forward, pair.inverse, rows, found.x, context, tolerance=tolerance
            )
            return x.view(shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self._refuse_trace()
        rows, context, shape = self._as_rows(x)
        pair = self._networks()
        with without_autocast(x.device):
            rows, context = self._in_own_dtype(rows, context)
            estimator = self._training_estimator()
            if estimator is None:
                parameters = tuple(pair.forward_net.parameters())
                sign, value = exact_slogdet(pair.forward, rows, context, parameters)
                self._check_orientation(sign)
            else:
                remembered = self._near(x, y)
                near = remembered or linearize(pair.forward, rows, context, keep_graph=True)
                value = estimator.training_log_abs_det(
                    pair,
                    near,
                    context,
                    is_constant=not any(one.requires_grad for one in (rows, *context)),
                    parameters=[one for one in self._network_parameters() if one.requires_grad],
                )
                if remembered is not None:  # its backward pass uses the pair's graph up
                    self._pair.end_with(value)
            return value.view(shape[: len(shape) - self._event_dim])

    @property
    def certificate(self) -> float | None:
        """The latest ``‖v − J_fᵀ w‖/‖v‖`` of the probes, a root mean square over events.

        0 is an unbiased gradient. None with ``log_det="exact"``; NaN before the first step.
        """
        return None if self.log_det == "exact" else self.estimator.certificate

    @property
    def convergence(self) -> Convergence | None:
        """What came of the latest refined ``T.inv(y)``; None before the first."""
        return self.estimator.convergence

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """``shape``, its batch broadcast with that of the context, if there is one."""
        if not self._context:
            return shape
        batch = shape[: len(shape) - self._event_dim]
        event = shape[len(shape) - self._event_dim :]
        context_batch = self._context[0].shape[: self._context[0].dim() - self._context_dim]
        try:
            return torch.broadcast_shapes(batch, context_batch) + event
        except RuntimeError:
            raise ValueError(
                f"{self}: expected a batch that broadcasts with the context's "
                f"{tuple(context_batch)}; got {tuple(batch)}"
            ) from None

    inverse_shape = forward_shape

    def train(self, mode: bool = True) -> SelfNormalizing:
        # The other mode may turn on what a network must not have.
        self.estimator.checked = None
        return super().train(mode)

    def conditioned(self, context: Tensor, context_dim: int) -> SelfNormalizing:
        """This transform, its networks being given a context too.

        It shares all parameters and states. See :class:`ConditionalSelfNormalizing`.

        :param Tensor context: of shape ``(*batch, *event)``.
        :param int context_dim: the number of dimensions of the latter.
        """
        twin = self.twin()
        twin._context = (context,)
        twin._context_dim = context_dim
        return twin

    def rows_of(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x as a batch of events, shape ``(B, *event)``, and the contexts that go with it."""
        rows, context, _ = self._as_rows(x)
        return rows, context

    def _networks(self) -> NetworkPair:
        return NetworkPair(self.forward_net, self.inverse_net)

    def _training_estimator(self) -> PairEstimator | None:
        """What stands in for the exact log-determinant now; None where nothing does."""
        if (
            # The estimator's mode is the layer's, and that of its twins (see with_cache) too.
            self.estimator.training
            and torch.is_grad_enabled()
            and not torch.jit.is_tracing()  # there is none: see _refuse_trace
            and any(one.requires_grad for one in self._network_parameters())
        ):
            return self.estimator
        return None

    def _network_parameters(self) -> Iterator[Tensor]:
        return chain(self.forward_net.parameters(), self.inverse_net.parameters())

    def _map_parameters(self) -> list[Tensor]:
        return [*self.forward_net.parameters(), *self.forward_net.buffers(), *self._context]

    def _inverse_is_exact(self) -> bool:
        convergence = self.convergence
        return (
            self.inverse != "learned"
            and convergence is not None
            and convergence.num_converged == convergence.num_samples
        )

    def _near(self, x: Tensor, y: Tensor) -> Linearization | None:
        """What the computation of y has left behind, if the parameters are what they were."""
        parameters = self._map_parameters()
        found: Any = self._pair.memo_of(x, y, parameters)
        if found is None:
            return None
        versions = [state.version for state in found[1]]
        return found[0].near if versions == list(map(version, parameters)) else None

    def _as_rows(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], torch.Size]:
        """Check an input of shape ``(..., *event)`` and flatten it to ``(B, *event)``.

        :return: the rows, the contexts of as many rows, and the shape of the output.
        """
        event_shape = self.event_shape
        if event_shape is None:
            if isinstance(x, Tensor) and x.dim() < self._event_dim:
                raise ValueError(
                    f"{self}: expected at least {self._event_dim} dimensions; got {tuple(x.shape)}"
                )
            event_shape = x.shape[x.dim() - self._event_dim :] if isinstance(x, Tensor) else ()
        check_input(self, x, event_shape, self._dtype())
        shape = self.forward_shape(x.shape)
        batch = shape[: len(shape) - self._event_dim]
        context = tuple(
            one.expand(*batch, *one.shape[one.dim() - self._context_dim :]).reshape(
                -1, *one.shape[one.dim() - self._context_dim :]
            )
            for one in self._context
        )
        rows = x.expand(shape).reshape(-1, *event_shape)
        wanted = "derivatives" if torch.is_grad_enabled() else "values"
        if self.estimator.checked not in (wanted, "derivatives") and not torch.jit.is_tracing():
            with without_autocast(x.device):
                self._networks().check(
                    *self._in_own_dtype(rows, context), derivatives=wanted == "derivatives"
                )
            self.estimator.checked = wanted
        return rows, context, shape

    def _dtype(self) -> torch.dtype | None:
        """Of the networks; None if they have no parameters."""
        return next((p.dtype for p in self.forward_net.parameters()), None)

    def _in_own_dtype(
        self, rows: Tensor, context: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Under autocast, what comes in may be of another one."""
        dtype = self._dtype() or rows.dtype
        return rows.to(dtype), tuple(one.to(dtype) for one in context)

    def _check_orientation(self, sign: Tensor) -> None:
        """Say so where f is seen not to be invertible: det J of a bijection of ℝᴰ has one sign."""
        if self._context:  # each has a map of its own
            return
        positive, negative = int((sign > 0).sum()), int((sign < 0).sum())
        if positive > 0 and negative > 0:
            warnings.warn(
                f"forward_net is not invertible: its Jacobian's determinant is positive at "
                f"{positive} events and negative at {negative}, so that the density does not "
                "integrate to 1; a larger reconstruction_weight and data_noise work against it",
                RuntimeWarning,
                stacklevel=3,
            )

    def _refuse_trace(self) -> None:
        # It would take what a backward pass within it computes for constants.
        if torch.jit.is_tracing():
            raise RuntimeError(
                f"{self}: torch.jit cannot trace the derivatives of a network: use no jit, "
                "Trace_ELBO for JitTrace_ELBO"
            )

    def _note_convergence(self, residual: Tensor, converged: Tensor) -> None:
        count = int(converged.sum())
        self.estimator.convergence = Convergence(len(converged), count, residual.max().item())
        if count < len(converged):
            warnings.warn(
                f"T.inv did not converge for {len(converged) - count} of {len(converged)} samples: "
                f"‖y − T(x)‖/(‖y‖ + √D) is {residual.max().item():.2g} at most",
                RuntimeWarning,
                stacklevel=2,
            )


def _check_options(
    *,
    num_probes: int,
    probe: str,
    tolerance: float,
    max_iterations: int,
    value_iterations: int | None,
    seed: int,
    reconstruction_weight: Weight | None,
    reconstruction: str,
    reconstruction_tolerance: float,
    data_noise: float,
    latent_noise: float,
    base: Distribution | None,
    inverse_tolerance: float | None,
) -> None:
    weight = reconstruction_weight
    is_number = isinstance(weight, float | int) and 0 <= weight < math.inf
    reconstructions = PairEstimator.RECONSTRUCTIONS
    check_count("num_probes", num_probes)
    expect(f"probe to be one of {PROBES}", probe in PROBES, probe)
    expect("tolerance in (0, 1)", 0 < tolerance < 1, tolerance)
    check_count("max_iterations", max_iterations)
    if value_iterations is not None:
        check_count("value_iterations", value_iterations, 0)
    check_count("seed", seed, 0)
    expect(
        "reconstruction_weight >= 0, a function of the number of steps, or a GECO",
        weight is None or is_number or callable(weight),  # a module is callable, too
        weight,
    )
    expect(
        f"reconstruction to be one of {reconstructions}",
        reconstruction in reconstructions,
        reconstruction,
    )
    tau = reconstruction_tolerance
    expect("reconstruction_tolerance >= 0", 0 <= tau < math.inf, tau)
    expect("data_noise >= 0", 0 <= data_noise < math.inf, data_noise)
    expect("latent_noise >= 0", 0 <= latent_noise < math.inf, latent_noise)
    expect("base, a distribution or None", base is None or isinstance(base, Distribution), base)
    fits = inverse_tolerance is None or 0 < inverse_tolerance < 1
    expect("inverse_tolerance in (0, 1), or None", fits, inverse_tolerance)


class ConditionalSelfNormalizing(ConditionalTransformModule):
    r"""A :class:`SelfNormalizing` whose networks are given a context c besides,

    .. math::
        T(x; c) = f(x, c), \qquad g(f(x, c), c) \approx x.

    Gradients go to c as they go to x: the surrogate's do, the penalty's do not.

    >>> f, g = (ResidualMLP(2, [32], context_dim=3) for _ in range(2))
    >>> transform = ConditionalSelfNormalizing(f, g, event_shape=2)
    >>> transform.condition(torch.ones(4, 3))(torch.zeros(2)).shape
    torch.Size([4, 2])

    :param forward_net: f, called as ``f(x, c)`` with as many rows of c as of x.
    :param inverse_net: g, likewise.
    :param int context_dim: the number of dimensions of a context, 1 for vectors.
    :param kwargs: the keyword arguments of :class:`SelfNormalizing`.
    :raises ValueError: for options that are not of these, for contexts that are not floating or of
        another dtype, and as :class:`SelfNormalizing`.
    """

    bijective = True

    def __init__(
        self,
        forward_net: nn.Module,
        inverse_net: nn.Module,
        *,
        context_dim: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_count("context_dim", context_dim, 0)
        self.context_dim = context_dim
        #: The transform that all contexts share.
        self.transform = SelfNormalizing(forward_net, inverse_net, **kwargs)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        return self.transform.domain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> Constraint:
        return self.transform.codomain

    def condition(self, context: Tensor) -> SelfNormalizing:
        """The transform ``T(·; c)`` of a context, or of a batch of contexts.

        It is a new one each time, with a cache of its own, and shares the networks and all states.

        :param Tensor context: c, of shape ``(*batch, *context_event)``. Inputs of the transform
            have shape ``(..., *event)``, and ``...`` broadcasts with ``batch``.
        """
        if not isinstance(context, Tensor) or not context.is_floating_point():
            got = context.dtype if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"expected a floating-point context; got {got}")
        if context.dim() < self.context_dim or context.numel() == 0:
            raise ValueError(
                f"expected a non-empty context of at least {self.context_dim} dimensions; "
                f"got {tuple(context.shape)}"
            )
        dtype = self.transform._dtype()
        under_autocast = torch.is_autocast_enabled(context.device.type)
        if dtype not in (None, context.dtype) and not under_autocast:
            raise ValueError(f"expected a context of dtype {dtype}; got {context.dtype}")
        return self.transform.conditioned(context, self.context_dim)


def self_normalizing(
    input_dim: int,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    num_blocks: int = 2,
    activation: Callable[[], nn.Module] = nn.SiLU,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> SelfNormalizing:
    """A :class:`SelfNormalizing` of two :class:`~pyro_snf.ResidualMLP`, in the style of Pyro's
    helper functions. It starts as the identity.

    >>> transform = self_normalizing(3, [32], log_det="learned")

    :param int input_dim: D, the number of features.
    :param hidden_dims: the widths of the hidden layers of a block.
    :param int num_blocks: of each network.
    :param activation: makes the activations.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param kwargs: the keyword arguments of :class:`SelfNormalizing`.
    """
    make = partial(
        ResidualMLP,
        input_dim,
        hidden_dims,
        num_blocks=num_blocks,
        activation=activation,
        device=device,
        dtype=dtype,
    )
    return SelfNormalizing(make(), make(), event_shape=input_dim, **kwargs)


def conditional_self_normalizing(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    num_blocks: int = 2,
    activation: Callable[[], nn.Module] = nn.SiLU,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> ConditionalSelfNormalizing:
    """A :class:`ConditionalSelfNormalizing` of two :class:`~pyro_snf.ResidualMLP`, in the style of
    Pyro's helper functions. It starts as the identity, whatever the context.

    >>> transform = conditional_self_normalizing(3, 2, [32])
    >>> transform.condition(torch.randn(4, 2))(torch.ones(3)).shape
    torch.Size([4, 3])

    :param int input_dim: D, the number of features.
    :param int context_dim: the number of features of a context.
    :param hidden_dims: the widths of the hidden layers of a block.
    :param int num_blocks: of each network.
    :param activation: makes the activations.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param kwargs: the keyword arguments of :class:`SelfNormalizing`.
    """
    check_count("context_dim", context_dim)
    make = partial(
        ResidualMLP,
        input_dim,
        hidden_dims,
        num_blocks=num_blocks,
        context_dim=context_dim,
        activation=activation,
        device=device,
        dtype=dtype,
    )
    return ConditionalSelfNormalizing(make(), make(), event_shape=input_dim, **kwargs)
