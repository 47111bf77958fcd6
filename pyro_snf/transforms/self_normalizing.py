"""What the self-normalizing layers share: the surface of all, and the affine layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from pyro_snf.caching import Memo, TensorState
from pyro_snf.log_dets import Exact, Learned, LogDetMethod, Refined
from pyro_snf.log_dets.base import as_method
from pyro_snf.maps.base import LinearMap
from pyro_snf.options import as_positive, check_choice, check_device, check_dtype, check_flag
from pyro_snf.precision import at_least_float32, singular, without_autocast
from pyro_snf.surrogate import SharedParameter
from pyro_snf.tracing import is_plain, is_traced, run_eagerly
from pyro_snf.transforms.base import InvertibleTransformModule

__all__ = ["AffineSelfNormalizingTransform", "SelfNormalizingTransform"]

# What a method's value in training can be.
_VALUES = ("exact", "estimate", "0")


class SelfNormalizingTransform(InvertibleTransformModule):
    """A transform that gets its log-determinant in training by a method, :attr:`log_det`.

    Subclasses set :attr:`log_det`, :attr:`inverse` and :attr:`event_shape`.
    """

    #: The method. It has an ``error_estimate``, ``num_refactorizations`` and a ``training_value``.
    log_det: Any

    #: How ``T.inv`` inverts.
    inverse: str

    #: That of events, the latest if it varies; None if it is not known.
    event_shape: torch.Size | None

    def extra_repr(self) -> str:
        return (
            f"log_det={self.log_det!r}, inverse={self.inverse!r}, "
            f"training_value={self.log_det.training_value!r}"
        )

    @property
    def error_estimate(self) -> float | None:
        """The method's latest estimate of its error; None where it makes none."""
        return self.log_det.error_estimate

    @property
    def num_refactorizations(self) -> int | None:
        """How often the method has factorized in training; None where it never does."""
        return self.log_det.num_refactorizations

    def __call__(self, x: Tensor) -> Tensor:
        if self._leaves_compiled_graph():
            return run_eagerly(super().__call__, x)
        return super().__call__(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        if self._leaves_compiled_graph():
            return run_eagerly(super()._inv_call, y)
        return super()._inv_call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._leaves_compiled_graph():
            return run_eagerly(self._log_abs_det_jacobian, x, y)
        return self._log_abs_det_jacobian(x, y)

    @abstractmethod
    def _log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """:meth:`log_abs_det_jacobian`, outside of the graph of torch.compile in training."""

    def _leaves_compiled_graph(self) -> bool:
        """Whether torch.compile, if it is at work, is to call this transform as it is.

        In training, what a method does depends on the values of tensors, and changes its state.
        """
        if not torch.compiler.is_dynamo_compiling():
            return False
        return self._is_in_training_mode(*self._map_parameters())

    def _is_training(self, *parameters: Tensor) -> bool:
        """Whether the log-determinant is that of training, not the exact one.

        :param parameters: one of which has to require a gradient.
        """
        # A trace could not repeat what the method does, nor may a functional transform do it.
        return is_plain() and self._is_in_training_mode(*parameters)

    def _is_in_training_mode(self, *parameters: Tensor) -> bool:
        return (
            torch.is_grad_enabled()
            # Not self.training: copies with a cache of their own share the method, and its mode.
            and self.log_det.training
            and any([one.requires_grad for one in parameters])
        )

    def _inverse_is_exact(self) -> bool:
        return self.inverse != "one_pass"

    def _named_errors(self) -> _NamedErrors:
        return _NamedErrors(self)


class _NamedErrors:
    """A context that adds the name of a layer to errors of linear algebra."""

    def __init__(self, layer: SelfNormalizingTransform) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, torch.linalg.LinAlgError):
            raise torch.linalg.LinAlgError(f"{self.layer}: {error}") from error


class AffineSelfNormalizingTransform(SelfNormalizingTransform):
    """A layer ``T(x) = diag(e^s) A x + b`` with a linear map A, and its parameters θ, s and b.

    To write one:

    1. Subclass, with ``domain`` and ``codomain``, and call this constructor with the map and the
       shape of θ.
    2. Set :attr:`event_shape`, in the constructor if it is known there, else in 3.
    3. Define :meth:`_as_events`, which checks and flattens inputs.

    :param LinearMap linear_map: A, as a function of θ.
    :param theta_shape: of θ, which starts at 0; the first of it is the number of channels.
    """

    log_det: LogDetMethod

    has_continuous_log_det = True

    def __init__(
        self,
        linear_map: LinearMap,
        theta_shape: tuple[int, ...],
        *,
        log_det: str | LogDetMethod = "refined",
        inverse: str | None = None,
        bias: bool = True,
        init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_flag("bias", bias)
        self.init_scale = as_positive("init_scale", init_scale)
        check_device(device)
        check_dtype(dtype)
        methods = {"refined": Refined, "learned": Learned, "exact": Exact}
        method: LogDetMethod = as_method(log_det, methods, LogDetMethod)
        check_choice(f"{type(method).__name__}.training_value", method.training_value, _VALUES)
        self.inverse = method.inverses[0] if inverse is None else inverse
        name = f"inverse, with log_det={type(method).__name__},"
        check_choice(name, self.inverse, method.inverses)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        count = theta_shape[0]
        self.theta = nn.Parameter(torch.empty(theta_shape, **factory))
        self.log_scale = nn.Parameter(torch.empty(count, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(count, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()
        method.setup(linear_map, self.theta.detach())
        self.log_det = method

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``init_scale`` times the identity. The method's state is its own."""
        self.theta.zero_()
        self.log_scale.fill_(math.log(self.init_scale))
        if self.bias is not None:
            self.bias.zero_()
        self.clear_cache()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"

    def _call(self, x: Tensor) -> Tensor:
        arguments = self.theta, self.log_scale, self.bias, self._as_events(x)
        y = self.log_det.affine(*arguments, is_training=self._is_training(self.theta))
        return y if y.shape == x.shape else y.view(x.shape)

    def _call_with_memo(self, x: Tensor) -> tuple[Tensor, Memo | None]:
        if not self._is_training(self.theta):
            return self._call(x), None
        arguments = self.theta, self.log_scale, self.bias, self._as_events(x)
        y, memo = self.log_det.affine_with_memo(*arguments)
        return y if y.shape == x.shape else y.view(x.shape), memo

    def _inverse(self, y: Tensor) -> Tensor:
        h = self._as_events(y)
        per_channel = self.log_det.linear_map.per_channel
        if self.bias is not None:
            h = h - per_channel(self.bias)
        h = h * per_channel(torch.exp(-self.log_scale))
        is_training = self._is_training(self.theta)
        with without_autocast(y.device), self._named_errors():
            x = self.log_det.invert(self.theta, h, self.inverse, is_training=is_training)
            return x.reshape(y.shape)

    def _log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self._update_reparametrized()
        events, theta = self._as_events(x), self.theta
        event_shape = events.shape[1:]
        with without_autocast(x.device), self._named_errors():
            state, memo = self._known_of(x, y)
            total = self._sum_of_log_scale(event_shape)
            if not self._is_training(theta):
                value = self.log_det.exact_log_abs_det(theta, event_shape, state)
            else:
                value = self.log_det.log_abs_det_with_memo(theta, events, state, memo)
                if value.shape not in ((), (len(events),)):
                    raise ValueError(
                        f"expected {type(self.log_det).__name__}.training_log_abs_det to return a "
                        f"tensor of shape () or ({len(events)},); got {tuple(value.shape)}"
                    )
                if self.log_det.training_value == "0":
                    total = total - total.detach()  # the whole term adds exactly 0 to the value
            value = value + total
            batch_shape = x.shape[: x.dim() - len(event_shape)]
            return value.expand(batch_shape) if value.dim() == 0 else value.view(batch_shape)

    def push_score(self, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
        """See :func:`pyro_snf.path_gradient.push_score`: ``J⁻ᵀ`` times the score.

        As accurate as the method's gradient of the log-determinant is.
        """
        events = self._as_events(score)
        is_training, (state, _) = self._is_training(self.theta), self._known_of(x, y)
        with torch.no_grad(), without_autocast(x.device), self._named_errors():
            solve = self.log_det.score_solver(
                self.theta, events.shape[1:], state, is_training=is_training
            )
            scale = self.log_det.linear_map.per_channel(torch.exp(-self.log_scale))
            return (solve(events, True) * scale).view(score.shape)

    @property
    def weight(self) -> Tensor:
        """The effective weight ``diag(e^s) a``, of θ's shape: a matrix or a kernel."""
        linear_map = self.log_det.linear_map
        return linear_map.scale_rows(linear_map.weight(self.theta), self.log_scale.exp())

    @property
    def uses_approximate_inverse(self) -> bool:
        """Whether the gradient in training, or ``T.inv``, is by an approximate inverse."""
        return self.inverse == "one_pass" or self.log_det.follows_inverse(self.theta)

    def refactorize(self) -> None:
        """Make the method's state exact for the current parameters, where it has one."""
        with self._named_errors():
            self.log_det.refactorize(self.theta)

    @abstractmethod
    def _as_events(self, x: Tensor) -> Tensor:
        """Check an input of shape ``(..., *event)`` and flatten it to ``(B, *event)``."""

    def _known_of(self, x: Tensor, y: Tensor) -> tuple[TensorState, Memo | None]:
        """The state of θ, and the by-product of the computation of y, if it is known."""
        state, memo = self._state_at(x, y)
        if state is None or (isinstance(memo, SharedParameter) and memo.pending.is_used):
            return TensorState(self.theta), None
        return state[0], memo

    def _sum_of_log_scale(self, event_shape: torch.Size) -> Tensor:
        """``log|det diag(e^s)|``, shape ``()``."""
        log_scale = at_least_float32(self.log_scale)
        total = log_scale.sum()
        # A GPU is not waited for: there the caller gets a NaN.
        if not total.is_cuda and not is_traced() and not math.isfinite(total.item()):
            raise singular("log_scale has NaN or infinite entries")
        copies = event_shape.numel() // len(log_scale)
        return total if copies == 1 else copies * total

    def _map_parameters(self) -> list[Tensor]:
        parameters = [self.theta, self.log_scale]
        return parameters if self.bias is None else [*parameters, self.bias]
