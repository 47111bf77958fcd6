"""Any network as a layer of a flow, with a second network that learns its inverse."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from pyro.distributions import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_snf.caching import fixed_directions, state_of
from pyro_snf.free_form.linearization import Linearization, linearize
from pyro_snf.free_form.log_det import exact_slogdet
from pyro_snf.free_form.methods import PairExact, PairLearned, PairMethod, PairRefined
from pyro_snf.free_form.network_pair import NetworkPair
from pyro_snf.free_form.reconstruction import Reconstruction
from pyro_snf.free_form.solve import Convergence, implicit_inverse, invert
from pyro_snf.log_dets.base import as_method, own_copy
from pyro_snf.networks import ResidualMLP
from pyro_snf.options import (
    as_count,
    as_event_shape,
    as_number,
    check_choice,
    check_context,
    expect,
)
from pyro_snf.precision import without_autocast
from pyro_snf.surrogate import attach_penalty
from pyro_snf.tracing import (
    is_plain,
    is_traced,
    is_transformed,
    is_wrapped,
    without_saved_tensor_hooks,
)
from pyro_snf.transfer import read
from pyro_snf.transforms.base import broadcast_with_context, check_events, check_input
from pyro_snf.transforms.context_scale import ContextScale, StandardizesContexts
from pyro_snf.transforms.self_normalizing import SelfNormalizingTransform

__all__ = [
    "ConditionalSelfNormalizingPair",
    "SelfNormalizingPair",
    "conditional_self_normalizing_pair",
    "self_normalizing_pair",
]


# What is about unit scale: standard deviations between a tenth and ten, and means up to ten and up
# to so many standard deviations, over so many events at least. With means of 9 and 24 standard
# deviations, f folded where no event was: the integral was 2, all determinants had one sign.
_MAX_SCALE = 10.0
_MAX_OFFSET = 5.0
_MIN_ROWS = 16

# The D up to which exact determinants are as cheap as their estimates.
_MAX_EXACT = 3


class _Evaluation(NamedTuple):
    """``y = f(x)``, with the graph for products with the Jacobian."""

    near: Linearization
    handle: Tensor


@dataclass
class _Status:
    """State that copies of a transform with other contexts share, besides modules."""

    #: The check that the networks have passed in their current mode: None, "values", or
    #: "derivatives", which includes the values.
    checked: str | None = None
    #: The outcome of the latest inverse; None before the first.
    convergence: Convergence | None = None
    #: Whether training has warned of a fold.
    is_warned: bool = False
    #: Whether the scale of what training gives to f has been looked at.
    is_scale_checked: bool = False


class SelfNormalizingPair(SelfNormalizingTransform):
    r"""Any network as a bijection, with a second network as its approximate inverse.

    .. math::
        T(x) = f(x), \qquad g(f(x)) \approx x,

    The idea is that of Keller et al. (2021) and Draxler et al. (2024). Both networks map a batch of
    events, of shape ``(B, *event)``, to one of the same shape, each event independently of the
    others.

    ============  =======================================  =======================  ================
    ``log_det``   gradient of :math:`\log|\det J_f|`       value in training        cost a step
    ============  =======================================  =======================  ================
    "refined"     by probes, :math:`J_f^\top w = v`        exactly 0 (an estimate   some passes each
                  solved with g and Krylov steps           on request)              through f and g
    "learned"     by probes, :math:`w = J_g^\top v`:       exactly 0                a pass or two
                  biased                                                            through each
    "exact"       exact                                    exact                    D passes, O(D³)
    ============  =======================================  =======================  ================

    *In training* means in ``train()`` mode, with gradients recorded and parameters that require
    them. Otherwise value and gradient are exact, with D backward passes for every event. ``T(x)``
    is always exact, and so is a density at x, which does not depend on g.

    **What is approximate** is the gradient in training. It is unbiased where the residual of the
    probes' systems, which :attr:`error_estimate` measures, is 0. A penalty on the errors of
    ``g(f(x))``, :class:`~pyro_snf.Reconstruction`, makes the residual small and keeps f invertible,
    on the data and around them. Its weight finds itself. It is attached to the log-determinant,
    with all three methods, and never changes its value.

    **What is not guaranteed** is that f is invertible everywhere. Where two events have the same
    image, densities do not integrate to 1. Exact determinants of both signs prove it, and cause a
    warning, in training with ``"exact"`` as well; :attr:`convergence` counts the samples whose
    inverse was found; and see :func:`~pyro_snf.diagnostics.pair_report`.

    ``T.inv(y)`` starts from g(y) and iterates to rounding, by a fixed-point iteration and Newton's
    method, with implicit gradients. ``inverse="one_pass"`` is one pass through g, an *approximate*
    inverse.

    >>> f, g = ResidualMLP(2, [32]), ResidualMLP(2, [32])
    >>> transform = SelfNormalizingPair(f, g, event_shape=2)
    >>> density = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [transform.inv])
    >>> loss = -density.log_prob(torch.ones(8, 2)).mean()
    >>> loss.backward()

    :param forward_net: f, twice differentiable and deterministic. It has to map each event
        independently of the others, as dense layers, convolutions and attention do; dropout and
        batch statistics are refused.
    :param inverse_net: g, likewise; it may be differentiable once only.
    :param event_shape: the shape of events, an integer for vectors. Either this is given,
    :param event_dim: or their number of dimensions, for networks that take events of any size.
    :param log_det: ``"refined"``, ``"learned"``, ``"exact"``, or an object with options of its own,
        of which the layer takes a copy: :class:`~pyro_snf.PairRefined`,
        :class:`~pyro_snf.PairLearned`, :class:`~pyro_snf.PairExact`. By default ``"exact"`` for an
        ``event_shape`` of up to three dimensions, where it is as cheap as the others and sees
        folds, and ``"refined"`` for others: at D = 10 ``"exact"`` takes twice as long.
    :param reconstruction: the penalty, of which the layer takes a copy; by default
        ``Reconstruction()``.
    :param str inverse: ``"iterative"`` or ``"one_pass"``.
    :param inverse_tolerance: of ``‖y − T(x)‖ / (‖y‖ + √D)`` in ``T.inv``, in (0, 1); by default
        ``ε^(3/4)`` with the machine epsilon ε, 6e-6 in float32 and 2e-12 in float64.
    :raises ValueError: for options that are not of these; for inputs that are not floating, empty,
        or of another shape or dtype; and for networks that map to another shape, are random, or mix
        the events of a batch.
    :warns RuntimeWarning: where samples of ``T.inv`` have not converged; where the signs of exact
        determinants show that f is not invertible; and where training begins on numbers that are
        not of about unit scale.

    References:

    T. Anderson Keller, Jorn W.T. Peters, Priyank Jaini, Emiel Hoogeboom, Patrick Forré, Max
    Welling. Self Normalizing Flows. ICML 2021. [arXiv:2011.07248]

    Felix Draxler, Peter Sorrenson, Lea Zimmermann, Armand Rousselot, Ullrich Köthe. Free-form
    Flows: Make Any Architecture a Normalizing Flow. AISTATS 2024. [arXiv:2310.16624]
    """

    INVERSES = ("iterative", "one_pass")

    log_det: PairMethod

    def __init__(
        self,
        forward_net: nn.Module,
        inverse_net: nn.Module,
        *,
        event_shape: int | Sequence[int] | None = None,
        event_dim: int | None = None,
        log_det: str | PairMethod | None = None,
        reconstruction: Reconstruction | None = None,
        inverse: str = "iterative",
        inverse_tolerance: float | None = None,
    ) -> None:
        super().__init__()
        for name, network in (("forward_net", forward_net), ("inverse_net", inverse_net)):
            expect(f"{name}, a torch.nn.Module", isinstance(network, nn.Module), network)
        expect("two networks; got the same", forward_net is not inverse_net, forward_net)
        given = (event_shape, event_dim)
        fits = (event_shape is None) != (event_dim is None)
        expect("exactly one of event_shape and event_dim", fits, given)
        self.event_shape = None if event_shape is None else as_event_shape(event_shape)
        if log_det is None:
            is_small = self.event_shape is not None and self.event_shape.numel() <= _MAX_EXACT
            log_det = "exact" if is_small else "refined"
        methods = {"refined": PairRefined, "learned": PairLearned, "exact": PairExact}
        method: PairMethod = as_method(log_det, methods, PairMethod)
        fits = reconstruction is None or isinstance(reconstruction, Reconstruction)
        expect("reconstruction, a Reconstruction or None", fits, reconstruction)
        check_choice("inverse", inverse, self.INVERSES)
        if inverse_tolerance is not None:
            inverse_tolerance = as_number(
                "inverse_tolerance in (0, 1), or None",
                inverse_tolerance,
                lambda number: 0 < number < 1,
            )
        if self.event_shape is not None:
            event_dim = len(self.event_shape)
        self._event_dim = as_count("event_dim", event_dim)
        self.inverse = inverse
        self.inverse_tolerance = inverse_tolerance
        self.forward_net = forward_net
        self.inverse_net = inverse_net
        parameters = chain(forward_net.parameters(), inverse_net.parameters())
        like = next(parameters, torch.empty(0))
        method.setup(like.device)
        self.log_det = method
        self.reconstruction = (
            Reconstruction() if reconstruction is None else own_copy(reconstruction)
        )
        self.reconstruction.setup(self.event_shape, like)
        self._status = _Status()
        self._context: tuple[Tensor, ...] = ()
        self._context_event_dim = 0
        self._context_scale: tuple[ContextScale, ...] = ()  # in a tuple, not to be registered

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    def extra_repr(self) -> str:
        shape = f"event_dim={self._event_dim}" if self.event_shape is None else ""
        return (
            f"{shape or tuple(self.event_shape or ())}, {super().extra_repr()}, "
            f"reconstruction={self.reconstruction}"
        )

    def _call(self, x: Tensor) -> Tensor:
        rows, context, shape = self._as_rows(x)
        return self._networks().forward(rows, *context).view(shape)

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, _Evaluation | None]:
        is_autocast = torch.is_autocast_enabled(x.device.type) if isinstance(x, Tensor) else False
        if is_autocast or not self._is_training(*self._network_parameters()):
            return self._call(x), None
        rows, context, shape = self._as_rows(x)
        near = linearize(self._networks().forward, rows, context, keep_graph=True)
        # Another tensor than the output: a hook on it is called by backward passes from y, and not
        # by products with J.
        y = near.output.view(shape)
        return y, _Evaluation(near, y)

    def _inverse(self, y: Tensor) -> Tensor:
        rows, context, shape = self._as_rows(y)
        pair = self._networks()
        if self.inverse == "one_pass":
            # g is a map of its own here: gradients go to its parameters.
            return pair.inverse(rows, *context).view(shape)
        self._refuse_trace(is_possible=not is_transformed())
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

    def _log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self._refuse_trace(is_possible=is_wrapped(x) or not is_transformed())
        rows, context, shape = self._as_rows(x)
        pair = self._networks()
        with without_autocast(x.device), without_saved_tensor_hooks():
            rows, context = self._in_own_dtype(rows, context)
            if self._is_training(*self._network_parameters()):
                value = self._training_log_abs_det(x, y, rows, context)
            else:
                parameters = tuple(pair.forward_net.parameters())
                sign, value = exact_slogdet(pair.forward, rows, context, parameters)
                self._check_orientation(sign, context)
            return value.view(shape[: len(shape) - self._event_dim])

    def _training_log_abs_det(
        self, x: Tensor, y: Tensor, rows: Tensor, context: tuple[Tensor, ...]
    ) -> Tensor:
        """The value, shape ``(B,)``, with its gradient in all that f depends on, and the penalty.

        :param Tensor rows: x, as a batch of events.
        """
        self._check_scale(rows)
        pair, method, reconstruction = self._networks(), self.log_det, self.reconstruction
        evaluation = self._evaluation_of(x, y)
        if evaluation is None:
            near = linearize(pair.forward, rows, context, keep_graph=True)
        else:
            near = evaluation.near
        parameters = [one for one in self._network_parameters() if one.requires_grad]
        state = functools.cache(lambda: state_of(parameters))

        # The penalty's gradient goes to f, but not to x or the context.
        source, fixed = near.source.detach(), tuple(one.detach() for one in context)
        is_constant = not any(one.requires_grad for one in (rows, *context))
        latent, back, is_folded = near.output, None, None
        if method.uses_inverse or not reconstruction.is_off:
            if reconstruction.trains_forward and not is_constant:
                latent = pair.forward(source, *fixed)
            back = reconstruction.reconstruct(pair, latent, fixed)
        value = method.training_log_abs_det(pair, near, back, context, state)
        if isinstance(value, tuple):
            sign, value = value
            is_folded = self._check_orientation(sign, context)
        if back is not None and not reconstruction.is_off:
            penalty = reconstruction.penalty(pair, source, back, fixed, state, is_folded)
            value = attach_penalty(value, penalty.to(value))
        if evaluation is not None:  # a backward pass from the value frees the cached pair's graph
            self._pair.drop_at_backward(value)
        return value

    @property
    def convergence(self) -> Convergence | None:
        """The outcome of the latest iterative ``T.inv(y)``; None before the first."""
        return self._status.convergence

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """``shape``, its batch broadcast with that of the context, if there is one."""
        if not self._context:
            return shape
        (context,) = self._context
        batch_shape = context.shape[: context.dim() - self._context_event_dim]
        return broadcast_with_context(self, shape, self._event_dim, batch_shape)

    inverse_shape = forward_shape

    def train(self, mode: bool = True) -> SelfNormalizingPair:
        # The networks are checked again: in the other mode they may be random, for example.
        self._status.checked = None
        return super().train(mode)

    def conditioned(
        self, context: Tensor, event_dim: int, scale: ContextScale | None = None
    ) -> SelfNormalizingPair:
        """This transform, with a context as the second argument of its networks.

        It shares all parameters and states. See :class:`ConditionalSelfNormalizingPair`.

        :param Tensor context: shape ``(*batch, *context_event)``.
        :param int event_dim: the number of dimensions of ``context_event``.
        :param scale: of the contexts, for the networks.
        """
        other = self.copy_with_own_cache()
        other._context = (context,)
        other._context_event_dim = event_dim
        other._context_scale = () if scale is None else (scale,)
        return other

    def rows_of(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x as a batch of events, shape ``(B, *event)``, and the contexts that go with it."""
        rows, context, _ = self._as_rows(x)
        return rows, context

    def _networks(self) -> NetworkPair:
        return NetworkPair(self.forward_net, self.inverse_net)

    def _network_parameters(self) -> Iterator[Tensor]:
        return chain(self.forward_net.parameters(), self.inverse_net.parameters())

    def _map_parameters(self) -> list[Tensor]:
        scales = (buffer for scale in self._context_scale for buffer in scale.buffers())
        return [
            *self.forward_net.parameters(),
            *self.forward_net.buffers(),
            *self._context,
            *scales,
        ]

    def _inverse_is_exact(self) -> bool:
        convergence = self.convergence
        return (
            super()._inverse_is_exact()
            and convergence is not None
            and convergence.num_converged == convergence.num_samples
        )

    def _evaluation_of(self, x: Tensor, y: Tensor) -> _Evaluation | None:
        """The by-product of the computation of y, if the parameters have not changed since."""
        _, memo = self._state_at(x, y)
        return memo  # type: ignore[return-value]  # see _call_with_memo

    def _as_rows(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], torch.Size]:
        """Check an input of shape ``(..., *event)`` and flatten it to ``(B, *event)``.

        :return: the rows, the contexts of as many rows, and the shape of the output.
        """
        event_shape = self.event_shape
        if event_shape is None:
            event_shape = check_events(self, x, self._event_dim)
        check_input(self, x, event_shape, self._dtype())
        shape = self.forward_shape(x.shape)
        batch = shape[: len(shape) - self._event_dim]
        context = self._context
        for scale in self._context_scale:
            context = tuple(map(scale, context))
        context = tuple(
            one.expand(*batch, *one.shape[one.dim() - self._context_event_dim :]).reshape(
                -1, *one.shape[one.dim() - self._context_event_dim :]
            )
            for one in context
        )
        rows = x.expand(shape).reshape(-1, *event_shape)
        wanted = "derivatives" if torch.is_grad_enabled() else "values"
        if self._status.checked not in (wanted, "derivatives") and is_plain():
            with without_autocast(x.device), without_saved_tensor_hooks():
                self._networks().check(
                    *self._in_own_dtype(rows, context), derivatives=wanted == "derivatives"
                )
            self._status.checked = wanted
        return rows, context, shape

    def _dtype(self) -> torch.dtype | None:
        """The dtype of f's parameters; None if it has none."""
        return next((p.dtype for p in self.forward_net.parameters()), None)

    def _in_own_dtype(
        self, rows: Tensor, context: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The inputs in the dtype of the networks: under autocast they may have another one."""
        dtype = self._dtype() or rows.dtype
        return rows.to(dtype), tuple(one.to(dtype) for one in context)

    def _check_scale(self, rows: Tensor) -> None:
        """Warn, once, where the first batch is not of about unit scale."""
        if self._status.is_scale_checked or len(rows) < _MIN_ROWS or not is_plain():
            return
        self._status.is_scale_checked = True
        rows = rows.detach().flatten(1).double()
        mean = rows.mean(0)
        measured = read((rows - mean).square().mean().sqrt(), mean.square().mean().sqrt())
        scale, offset = (one.item() for one in measured)
        are_copies = scale <= 1e-6 * offset  # of one event
        fits = 1 / _MAX_SCALE <= scale <= _MAX_SCALE
        fits = fits and offset <= min(_MAX_SCALE, _MAX_OFFSET * scale)
        if not (fits or are_copies):
            warnings.warn(
                f"the pair is trained on numbers with a mean of {offset:.2g} in size and a "
                f"standard deviation of {scale:.2g}: networks suit those of about unit scale, and "
                f"fold, or learn slowly, on others; put ActNorm(…, event_dim={self._event_dim}) "
                "before it",
                RuntimeWarning,
                stacklevel=3,
            )

    def _check_orientation(self, sign: Tensor, context: tuple[Tensor, ...]) -> Tensor | None:
        """Warn where det J has both signs: that of a bijection of ℝᴰ has one. In training once.

        :param context: of the events, in as many rows.
        :return: whether it has, shape ``()``; None where nothing is known.
        """
        if not is_plain():
            return None
        is_training = self._is_training(*self._network_parameters())
        is_folded = _has_both_signs(sign, context)
        if is_training and self._status.is_warned:
            return is_folded
        has_both, *counts = map(int, read(is_folded, (sign > 0).sum(), (sign < 0).sum()))
        if has_both:
            self._status.is_warned = True
            advice = (
                "the weight of its Reconstruction rises, to its bound, until that has ended; "
                "where it does not end, a smaller learning rate prevents it"
                if is_training
                else "train longer, or anew with a smaller learning rate; a fixed weight of its "
                "Reconstruction, if it has one, is too small"
            )
            where = "; compared were events of equal contexts" if context else ""
            warnings.warn(
                f"forward_net is not invertible: its Jacobian's determinant is positive at "
                f"{counts[0]} events and negative at {counts[1]}, so that the density does not "
                f"integrate to 1; {advice}{where}",
                RuntimeWarning,
                stacklevel=3,
            )
        return is_folded

    def _refuse_trace(self, *, is_possible: bool) -> None:
        """Raise a RuntimeError where derivatives cannot be taken within a forward pass.

        :param bool is_possible: in a functional transform, if that is at work.
        """
        # A trace would record the result of a backward pass within it as a constant.
        if is_traced() or not is_possible:
            raise RuntimeError(
                f"{self}: torch.jit, torch.export and torch.func cannot record the derivatives of "
                "a network: use torch.autograd, and Trace_ELBO for JitTrace_ELBO"
            )

    def _leaves_compiled_graph(self) -> bool:
        return torch.compiler.is_dynamo_compiling()

    def _note_convergence(self, residual: Tensor, converged: Tensor) -> None:
        count, largest = (one.item() for one in read(converged.sum(), residual.max()))
        self._status.convergence = Convergence(len(converged), int(count), largest)
        if count < len(converged):
            warnings.warn(
                f"T.inv did not converge for {len(converged) - int(count)} of {len(converged)} "
                f"samples: ‖y − T(x)‖/(‖y‖ + √D) is {largest:.2g} at most",
                RuntimeWarning,
                stacklevel=2,
            )


def _has_both_signs(sign: Tensor, context: tuple[Tensor, ...]) -> Tensor:
    """Whether events of one context have determinants of both signs, shape ``()``.

    Each context has a map of its own, whose determinants may have a sign of their own.

    :param Tensor sign: shape ``(B,)``.
    :param context: none, or the contexts, shape ``(B, *context_event)``.
    """
    if not context:
        return (sign > 0).any() & (sign < 0).any()
    columns = context[0].reshape(len(sign), -1).double()
    (direction,) = fixed_directions(1, columns.shape[1], columns.dtype, columns.device)
    # Equal contexts have equal products, and are neighbours in their order.
    products, order = (columns * direction).sum(1).sort()
    differs = sign[order][1:] != sign[order][:-1]
    return ((products[1:] == products[:-1]) & differs).any()


class ConditionalSelfNormalizingPair(StandardizesContexts, ConditionalTransformModule):
    r"""A :class:`SelfNormalizingPair` whose networks have a context c as their second argument.

    .. math::
        T(x; c) = f(x, c), \qquad g(f(x, c), c) \approx x.

    Gradients go to c as they do to x: that of the surrogate does, that of the penalty does not.

    The networks expect contexts of about unit scale. Of contexts that are vectors, two
    :class:`~pyro_snf.ResidualMLP` can be given such ones: :meth:`standardize_contexts`.

    >>> f, g = (ResidualMLP(2, [32], context_dim=3) for _ in range(2))
    >>> transform = ConditionalSelfNormalizingPair(f, g, event_shape=2)
    >>> transform.condition(torch.ones(4, 3))(torch.zeros(2)).shape
    torch.Size([4, 2])

    :param forward_net: f, called as ``f(x, c)`` with as many rows of c as of x.
    :param inverse_net: g, likewise.
    :param int context_event_dim: the number of dimensions of a context, 1 for vectors.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingPair`.
    :raises ValueError: for options that are not of these, for contexts that are not floating or of
        another dtype, and as :class:`SelfNormalizingPair`.
    """

    bijective = True

    def __init__(
        self,
        forward_net: nn.Module,
        inverse_net: nn.Module,
        *,
        context_event_dim: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.context_event_dim = as_count("context_event_dim", context_event_dim, 0)
        #: The transform that all contexts share.
        self.transform = SelfNormalizingPair(forward_net, inverse_net, **kwargs)
        is_vector = self.context_event_dim == 1
        width = _width_of_contexts(forward_net, inverse_net) if is_vector else 0
        like = next(forward_net.parameters(), torch.empty(0))
        self.context_scale = ContextScale(width, like) if width else None

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> Constraint:
        return self.transform.domain

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> Constraint:
        return self.transform.codomain

    def _wanted_networks(self) -> str:
        found = (self.transform.forward_net, self.transform.inverse_net)
        names = " and ".join(type(one).__name__ for one in found)
        return f"two ResidualMLP of the same context_dim; got {names}"

    def condition(self, context: Tensor) -> SelfNormalizingPair:
        """The transform ``T(·; c)`` of a context, or of a batch of contexts.

        It is a new one each time, with a cache of its own, and shares the networks and all states.

        :param Tensor context: c, of shape ``(*batch, *context_event)``. Inputs of the transform
            have shape ``(..., *event)``, and ``...`` broadcasts with ``batch``.
        """
        if self.context_scale is not None:
            self.context_scale.check(context)
            return self.transform.conditioned(context, 1, self.context_scale)
        check_context(context, self.transform._dtype(), event_dim=self.context_event_dim)
        return self.transform.conditioned(context, self.context_event_dim)


def _width_of_contexts(*networks: nn.Module) -> int:
    """The number of features of a context, where it is known; else 0."""
    widths = {one.context_dim if isinstance(one, ResidualMLP) else 0 for one in networks}
    return widths.pop() if len(widths) == 1 else 0


def self_normalizing_pair(
    input_dim: int,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    num_blocks: int = 2,
    activation: Callable[[], nn.Module] = nn.SiLU,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> SelfNormalizingPair:
    """A :class:`SelfNormalizingPair` of two :class:`~pyro_snf.ResidualMLP`, in the style of Pyro's
    helper functions. It starts as the identity.

    >>> transform = self_normalizing_pair(3, [32], log_det="learned")

    :param int input_dim: D, the number of features.
    :param hidden_dims: the widths of the hidden layers of a block.
    :param int num_blocks: of each network.
    :param activation: makes the activations.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingPair`.
    """
    make = functools.partial(
        ResidualMLP,
        input_dim,
        hidden_dims,
        num_blocks=num_blocks,
        activation=activation,
        device=device,
        dtype=dtype,
    )
    return SelfNormalizingPair(make(), make(), event_shape=input_dim, **kwargs)


def conditional_self_normalizing_pair(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    num_blocks: int = 2,
    activation: Callable[[], nn.Module] = nn.SiLU,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> ConditionalSelfNormalizingPair:
    """A :class:`ConditionalSelfNormalizingPair` of two :class:`~pyro_snf.ResidualMLP`, in the style
    of Pyro's helper functions. It starts as the identity, whatever the context.

    >>> transform = conditional_self_normalizing_pair(3, 2, [32])
    >>> transform.condition(torch.randn(4, 2))(torch.ones(3)).shape
    torch.Size([4, 3])

    :param int input_dim: D, the number of features.
    :param int context_dim: the number of features of a context.
    :param hidden_dims: the widths of the hidden layers of a block.
    :param int num_blocks: of each network.
    :param activation: makes the activations.
    :param device: of the parameters.
    :param dtype: of the parameters.
    :param kwargs: the keyword arguments of :class:`SelfNormalizingPair`.
    """
    context_dim = as_count("context_dim", context_dim)
    make = functools.partial(
        ResidualMLP,
        input_dim,
        hidden_dims,
        num_blocks=num_blocks,
        context_dim=context_dim,
        activation=activation,
        device=device,
        dtype=dtype,
    )
    return ConditionalSelfNormalizingPair(make(), make(), event_shape=input_dim, **kwargs)
