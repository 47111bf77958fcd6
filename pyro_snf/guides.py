"""Autoguides: a flow over all latent variables of a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, biject_to

from pyro_snf.path_gradient import PathGradientDistribution, SampleWeights
from pyro_snf.precision import at_least_float32
from pyro_snf.transforms.autoregressive import low_rank_autoregressive
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.linear import SelfNormalizingLinear

__all__ = ["AutoSelfNormalizingFlow"]

GRADIENTS = ("path", "total")

# The typical length of gradients is a moving average over about so many of them.
_CLIP_MEMORY = 100

# For quantiles: the standard error of a median is then 2 % of a standard deviation.
_NUM_DRAWS = 4000


class AutoSelfNormalizingFlow(AutoContinuous):
    r"""A guide over the whole latent space of a model: a flow of dense layers.

    All latent variables, unconstrained and flattened into one vector x of D numbers, are

    .. math::
        x = T_n(\cdots T_1(z)), \qquad z \sim N(0, I),

    where dense layers (:class:`~pyro_snf.SelfNormalizingLinear`) and activations alternate, a dense
    layer being the last. So ``num_layers=1`` is a Gaussian with a full covariance, and 2, the
    default, a :class:`~pyro_snf.LowRankAutoregressive` map and a dense layer. A step costs O(D²).

    It starts as the mean-field Gaussian :math:`N(\text{init\_loc\_fn}, \text{init\_scale}^2)`, if
    the activation starts as the identity.

    >>> def model():
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), scale).to_event(1))
    >>> guide = AutoSelfNormalizingFlow(model)
    >>> guide()["x"].shape
    torch.Size([3])
    >>> guide.sample_posterior(1000)["x"].shape
    torch.Size([1000, 3])

    What it does that Pyro's guides do not:

    - ``gradient="path"``: the ELBO's gradient without the term that is 0 in expectation, so with
      less noise the closer the guide is to the posterior (:mod:`pyro_snf.path_gradient`). Where
      samples are weighed (``RenyiELBO``), an error asks for ``gradient="total"``.
    - ``clip``: where the gradient in a sample is longer than so many times what is typical, it is
      cut to that length. In heavy-tailed models some are, and Adam moves every weight for dozens of
      steps after each.

    In ``eval()`` mode and under ``no_grad`` densities are exact. They are estimates in training,
    with a measured error, as :class:`~pyro_snf.SelfNormalizingLinear` has it.

    The guide is created when it is called first. ``.to()`` and ``.double()`` may come before that
    (they win over the model's device and dtype), and so may ``load_state_dict``.

    :param model: a Pyro model. Its structure is static, its latent variables continuous, or
        enumerated and hidden from the guide.
    :param int num_layers: of dense layers and activations together, at least 1.
    :param activation: ``activation(D)`` makes the transform that comes before a dense layer, such
        as :func:`~pyro_snf.low_rank_autoregressive`, or a Pyro factory. One that keeps no cache,
        such as torch's ``AffineTransform``, has the flow inverted in every step.
    :param init_loc_fn: where each site starts, as in all of Pyro's guides.
    :param float init_scale: the standard deviation to start from, of each unconstrained number.
    :param str gradient: ``"path"`` or ``"total"``.
    :param clip: in units of a typical gradient, above 1; None not to cut. It is for path gradients:
        with ``gradient="total"``, where samples may be weighed, nothing is cut.
    :param kwargs: keyword arguments of every :class:`~pyro_snf.SelfNormalizingLinear`: ``log_det``,
        ``num_probes``, ``tolerance``, ``seed``, ….
    :raises ValueError: for options that are not of these; for ``log_det="learned"`` with
        ``gradient="path"``, which would leave the learned inverse untrained.
    :raises TypeError: for keywords that no layer has.
    """

    transform: Compose | None

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 2,
        *,
        activation: Callable[[int], Transform] = low_rank_autoregressive,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        gradient: str = "path",
        clip: float | None = 10.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"expected num_layers, an integer >= 1; got {num_layers!r}")
        if not callable(activation):
            raise ValueError(f"expected activation, a factory of transforms; got {activation!r}")
        if gradient not in GRADIENTS:
            raise ValueError(f"expected gradient to be one of {GRADIENTS}; got {gradient!r}")
        if clip is not None and not 1 < clip < math.inf:
            raise ValueError(f"expected clip > 1, or None; got {clip!r}")
        if gradient == "path" and kwargs.get("log_det") == "learned":
            raise ValueError("expected gradient='total' with log_det='learned'; got 'path'")
        for name in ("init_scale", "bias", "device", "dtype"):
            if name in kwargs:
                raise ValueError(f"expected options of the layers; got {name}={kwargs[name]!r}")
        SelfNormalizingLinear(1, init_scale=init_scale, **kwargs)  # raises now, not in a first call
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.num_layers = num_layers
        self.activation = activation
        self.init_scale = init_scale
        self.gradient = gradient
        self.layer_options = kwargs
        self.clip = clip if gradient == "path" else None
        self.transform = None
        # A moving average of the logarithms of gradients' lengths, and how many there have been.
        self.register_buffer("log_gradient_length", torch.tensor(0.0))
        self.register_buffer("num_gradients", torch.tensor(0.0))
        self._sample_weights = SampleWeights()
        # What .to(), .double() and so on have asked for before there was anything to move.
        self._device: torch.device | None = None
        self._dtype: torch.dtype | None = None

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, gradient={self.gradient!r}, clip={self.clip}"

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None:
            raise RuntimeError(
                "this guide was pickled before its first call, and models are left out of pickles: "
                "make it anew"
            )
        try:
            with torch.no_grad():  # a trace with a graph could not be copied
                super()._setup_prototype(*args, **kwargs)
                loc = self._init_loc()
            if self.transform is None:
                self._make_transform(len(loc), self._device or loc.device, self._dtype or loc.dtype)
                with torch.no_grad():
                    self._last_layer.bias.copy_(loc)
            elif self._last_layer.input_dim != len(loc):
                raise RuntimeError(
                    f"expected a model of latent dimension {self._last_layer.input_dim}, as in the "
                    f"state that was loaded; got {len(loc)}"
                )
            with self._pyro_context:
                self._share_parameters()
        except BaseException:
            self.prototype_trace = None  # the next call starts anew
            raise

    def _make_transform(self, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        factory = {**self.layer_options, "device": device, "dtype": dtype}
        parts: list[Transform] = []
        for index in reversed(range(self.num_layers)):  # the last layer is a dense one
            if index % 2 == 0:
                scale = 1.0 if index else self.init_scale
                parts.append(SelfNormalizingLinear(dim, init_scale=scale, **factory))
            else:
                activation = self.activation(dim)
                if isinstance(activation, nn.Module):
                    activation = activation.to(device, dtype)
                parts.append(activation)
        self.transform = Compose(parts).train(self.training)
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(device))

    def _share_parameters(self) -> None:
        """Let the transform have the parameters of the parameter store, where that has them.

        As for the parameters of Pyro's guides; those of a mere torch module Pyro only registers.
        """
        if pyro.settings.get("module_local_params"):
            _ = self.transform  # PyroModule tells Pyro of what is accessed
            return
        transform: Any = self._modules["transform"]  # past it: here it is told
        name = self._pyro_get_fullname("transform")
        store = pyro.get_param_store()
        for key, parameter in transform.named_parameters():
            stored = store._params.get(param_with_module_name(name, key), parameter)
            if stored.shape != parameter.shape:
                raise RuntimeError(
                    f"expected {name}.{key} of shape {tuple(parameter.shape)}; the parameter store "
                    f"has one of shape {tuple(stored.shape)}: pyro.clear_param_store() first"
                )
        pyro.module(name, transform, update_module_params=True)

    @property
    def _last_layer(self) -> Any:
        # Past PyroModule, which registers all parameters at every access.
        transform: Any = self._modules.get("transform")
        if transform is None:
            raise RuntimeError("this guide has not been created yet: call it first")
        return transform.parts[-1]

    def get_base_dist(self) -> Distribution:
        """The distribution of z, ``N(0, I)`` in D dimensions."""
        bias = self._last_layer.bias
        return dist.Normal(torch.zeros_like(bias), torch.ones_like(bias)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The flow from z to x, all latent variables unconstrained and flattened."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        elif self._pyro_context.active:
            self._share_parameters()
        transform: Any = self._modules["transform"]
        return transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The distribution of x. Its samples are scored as ``gradient`` says."""
        transform = self.get_transform(*args, **kwargs)
        if self.gradient == "total":
            return dist.TransformedDistribution(self.get_base_dist(), [transform])
        return PathGradientDistribution(
            self.get_base_dist(), [transform], weights=self._sample_weights
        )

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """A sample of x, in a model's or a guide's context."""
        latent = super().sample_latent(*args, **kwargs)
        if self.clip is not None and latent.requires_grad and not torch.jit.is_tracing():
            latent.register_hook(self._clip_gradient)
        return latent

    @torch.no_grad()
    def _clip_gradient(self, gradient: Tensor) -> Tensor:
        """Cut the rows that are much longer than is typical; a row is a sample's."""
        assert self.clip is not None
        length = at_least_float32(gradient).norm(dim=-1, keepdim=True)
        is_usable = torch.isfinite(length) & (length > 0)
        log_length = torch.where(is_usable, length.log(), math.nan)
        average, count = self.log_gradient_length, self.num_gradients
        typical = torch.where(count == 0, log_length.nanmean(), average)
        # Whatever its size, a gradient moves the average no more than one at the limit does.
        limit = math.log(self.clip)
        change = (log_length - typical).clamp(-limit, limit).nanmean().nan_to_num()
        count += torch.isfinite(typical)
        average.copy_(typical + change / count.clamp(1, _CLIP_MEMORY))
        longest = self.clip * typical.exp()
        return torch.where(length > longest, gradient * (longest / length), gradient).to(gradient)

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of all latent variables, each of shape ``(num_samples, *shape)``.

        :param int num_samples: how many.
        :param args: of the model, as for the guide; so ``kwargs``.
        """
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"expected num_samples, an integer >= 1; got {num_samples!r}")
        return self._constrain(self._sample_latents(num_samples, *args, **kwargs))

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of every latent variable, from draws.

        :param args: of the model, as for the guide; so ``kwargs``.
        """
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Tensor | Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of every latent variable, from 4,000 draws.

        They are those of each unconstrained number, constrained: of each number by itself where
        the constraint is one of each number (as for a scale), not for a simplex.

        :param quantiles: numbers in [0, 1]; each result has them along its first dimension.
        :param args: of the model, as for the guide; so ``kwargs``.
        """
        draws = self._sample_latents(_NUM_DRAWS, *args, **kwargs)
        latents = at_least_float32(draws)  # torch's quantile takes no half precision
        levels = torch.as_tensor(quantiles, dtype=latents.dtype, device=latents.device)
        if levels.dim() != 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"expected a list of quantiles in [0, 1]; got {quantiles!r}")
        # torch's quantile takes 16 million numbers at most.
        columns = latents.split(1024, dim=-1)
        found = torch.cat([one.quantile(levels, dim=0) for one in columns], dim=-1)
        return self._constrain(found.to(draws.dtype))

    def _sample_latents(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        return self.get_posterior(*args, **kwargs).sample(torch.Size([num_samples]))

    def _constrain(self, latents: Tensor) -> dict[str, Tensor]:
        """The values of all sites, from x of shape ``(N, D)``."""
        assert self.prototype_trace is not None
        result = {}
        start = 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            values = latents[:, start : start + shape.numel()]
            start += shape.numel()
            result[name] = biject_to(site["fn"].support)(values.reshape(-1, *shape))
        return result

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> AutoSelfNormalizingFlow:
        if self.transform is None:  # to be remembered until there is something to move
            probes = [fn(torch.empty(0, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
            if probes[0].dtype == probes[1].dtype:
                self._dtype = probes[0].dtype
            if probes[0].device != torch.empty(0).device:
                self._device = probes[0].device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.transform is None:
            bias = state_dict.get(f"{prefix}transform.{self.num_layers - 1}.bias")
            if bias is not None:
                self._make_transform(
                    len(bias), self._device or torch.device("cpu"), self._dtype or bias.dtype
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own would take the model from this guide as well as from the pickle.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # a weak reference, anew in each use
        state = {**self.__dict__, "_model": None, "master": None}
        if self.transform is not None:
            state["activation"] = None  # it has been used, and a lambda could not be pickled
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoSelfNormalizingFlow:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        # What Pyro's transforms remember has a graph, and could not be copied.
        for module in self.modules():
            for value in vars(module).values():
                for part in value if isinstance(value, tuple) else (value,):
                    if isinstance(part, Tensor) and part.grad_fn is not None:
                        memo[id(part)] = None
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._model = self._model
        return twin
