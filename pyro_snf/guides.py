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

from pyro_snf.options import as_count, as_number, check_choice, expect
from pyro_snf.path_gradient import EqualWeightsCheck, PathGradientDistribution
from pyro_snf.precision import at_least_float32
from pyro_snf.recording import Recording, RecordingSlot
from pyro_snf.transforms.autoregressive import low_rank_autoregressive
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.linear import SelfNormalizingLinear

__all__ = ["AutoSelfNormalizingFlow"]

GRADIENTS = ("path", "total")

# The number of gradients in the moving average of their lengths.
_CLIP_MEMORY = 100

# Of draws for quantiles: the standard error of a normal median is then 2 % of a standard deviation.
_NUM_DRAWS = 4000


class AutoSelfNormalizingFlow(AutoContinuous):
    r"""A guide over the whole latent space of a model: a flow of dense layers.

    All latent variables, unconstrained and flattened into one vector x of D numbers, are

    .. math::
        x = T_n(\cdots T_1(z)), \qquad z \sim N(0, I),

    where dense layers (:class:`~pyro_snf.SelfNormalizingLinear`) and activations alternate; the
    last layer, :math:`T_n`, is dense. So ``num_layers=1`` is a Gaussian with a full covariance
    matrix, and 2, the default, is a :class:`~pyro_snf.LowRankAutoregressive` map followed by a
    dense layer. A step costs O(D²).

    If the activation starts as the identity, the guide starts as the mean-field Gaussian
    :math:`N(\text{init\_loc\_fn}, \text{init\_scale}^2)`.

    >>> def model():
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(torch.zeros(3), scale).to_event(1))
    >>> guide = AutoSelfNormalizingFlow(model)
    >>> guide()["x"].shape
    torch.Size([3])
    >>> guide.sample_posterior(1000)["x"].shape
    torch.Size([1000, 3])

    Differences from Pyro's guides:

    - ``gradient="path"``: the gradient of the ELBO without the term whose expectation is 0. Its
      variance decreases as the guide approaches the posterior (:mod:`pyro_snf.path_gradient`).
      Objectives that weight samples, such as ``RenyiELBO``, raise an error: they need
      ``gradient="total"``.
    - ``clip``: the gradient in a sample is shortened to ``clip`` times the typical length if it is
      longer. Heavy-tailed models have such gradients, each of which would affect dozens of Adam's
      steps.

    In ``eval()`` mode and under ``no_grad`` densities are exact. In training they are estimates
    whose error :class:`~pyro_snf.SelfNormalizingLinear` measures.

    The first call creates the flow. ``.to()`` and ``.double()`` may precede it (they take
    precedence over the model's device and dtype), and so may ``load_state_dict``.

    :param model: a Pyro model of static structure, whose latent variables are continuous, or
        enumerated and hidden from the guide.
    :param int num_layers: n, dense layers and activations together, at least 1.
    :param activation: ``activation(D)`` makes the transform before a dense layer, such as
        :func:`~pyro_snf.low_rank_autoregressive` or a Pyro factory. With one that has no cache,
        such as torch's ``AffineTransform``, every step inverts the flow.
    :param init_loc_fn: the initial location of each site, as in all of Pyro's guides.
    :param float init_scale: the initial standard deviation of each unconstrained number.
    :param str gradient: ``"path"`` or ``"total"``.
    :param clip: in units of the typical length, above 1; None for no clipping. With
        ``gradient="total"``, where samples may have unequal weights, nothing is clipped.
    :param kwargs: keyword arguments of every :class:`~pyro_snf.SelfNormalizingLinear`: ``log_det``
        and ``inverse``.
    :raises ValueError: for options outside these ranges; for ``gradient="path"`` with a ``log_det``
        that has parameters, such as ``"learned"``, which it would leave untrained.
    :raises TypeError: for keywords that the layers do not have.
    """

    # Private names of Pyro and torch here are those by which their subclasses extend them: neither
    # has public ones for the same.

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
        num_layers = as_count("num_layers", num_layers)
        expect("activation, a factory of transforms", callable(activation), activation)
        check_choice("gradient", gradient, GRADIENTS)
        if clip is not None:
            clip = as_number("clip > 1, or None", clip, lambda number: 1 < number < math.inf)
        for name in ("init_scale", "bias", "device", "dtype"):
            if name in kwargs:
                raise ValueError(f"expected options of the layers; got {name}={kwargs[name]!r}")
        with torch.random.fork_rng(devices=[]):  # a layer that only checks the options
            layer = SelfNormalizingLinear(1, init_scale=init_scale, **kwargs)
        if gradient == "path" and list(layer.log_det.parameters()):
            log_det = kwargs["log_det"]
            raise ValueError(f"expected gradient='total' with log_det={log_det!r}; got 'path'")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.num_layers = num_layers
        self.activation = activation
        self.init_scale = float(init_scale)
        self.gradient = gradient
        self.layer_options = kwargs
        self.clip = clip if gradient == "path" else None
        self.transform = None
        # A moving average of the logarithms of the gradients' lengths, and their number.
        self.register_buffer("log_gradient_length", torch.tensor(0.0))
        self.register_buffer("num_gradients", torch.tensor(0.0))
        self._weights_check = EqualWeightsCheck()
        self._recording = RecordingSlot()
        # The arguments of .to(), .double() and so on before the first call.
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
                    self.last_layer.bias.copy_(loc)
            elif self.last_layer.input_dim != len(loc):
                raise RuntimeError(
                    f"expected a model of latent dimension {self.last_layer.input_dim}, as in the "
                    f"state that was loaded; got {len(loc)}"
                )
            with self._pyro_context:
                self._share_parameters()
        except BaseException:
            self.prototype_trace = None  # so that the next call tries again
            raise

    def _make_transform(self, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        factory = {**self.layer_options, "device": device, "dtype": dtype}
        parts: list[Transform] = []
        for index in reversed(range(self.num_layers)):  # the last layer, of index 0, is dense
            if index % 2 == 0:
                scale = 1.0 if index else self.init_scale
                parts.append(SelfNormalizingLinear(dim, init_scale=scale, **factory))
            else:
                activation = self.activation(dim)
                if isinstance(activation, nn.Module):
                    activation = activation.to(device, dtype)
                parts.append(activation)
        self.transform = Compose(parts).train(self.training)
        self.last_layer.recording.set(self._recording.get())
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(device))

    def _share_parameters(self) -> None:
        """Register the parameters of the transform, and replace them by those of Pyro's store.

        As Pyro's guides do. Of a torch module, Pyro would only register the parameters.
        """
        if pyro.settings.get("module_local_params"):
            _ = self.transform  # the access registers them
            return
        name = self._pyro_get_fullname("transform")
        store = dict(pyro.get_param_store().named_parameters())
        for key, parameter in self._flow.named_parameters():
            stored = store.get(param_with_module_name(name, key), parameter)
            if stored.shape != parameter.shape:
                raise RuntimeError(
                    f"expected {name}.{key} of shape {tuple(parameter.shape)}; the parameter store "
                    f"has one of shape {tuple(stored.shape)}: pyro.clear_param_store() first"
                )
        pyro.module(name, self._flow, update_module_params=True)

    @property
    def _flow(self) -> Any:
        """The transform, without the registration of all parameters that Pyro adds to accesses."""
        children = dict(self.named_children())
        if "transform" not in children:
            raise RuntimeError("this guide has not been created yet: call it first")
        return children["transform"]

    @property
    def last_layer(self) -> SelfNormalizingLinear:
        """T_n, the dense layer that ends the flow."""
        return self._flow.parts[-1]

    def record(self, recording: Recording) -> None:
        """Let :attr:`last_layer` record the gradients of samples, in the place of its own.

        :param Recording recording: in which it does so for as long as its owner keeps it.
        """
        self._recording.set(recording)
        if self.transform is not None:
            self.last_layer.recording.set(recording)

    def get_base_dist(self) -> Distribution:
        """The distribution of z, ``N(0, I)`` in D dimensions."""
        bias = self.last_layer.bias
        return dist.Normal(torch.zeros_like(bias), torch.ones_like(bias)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The flow from z to x, all latent variables unconstrained and flattened."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        elif self._pyro_context.active:
            self._share_parameters()
        return self._flow

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The distribution of x; ``gradient`` says which gradient its log-density has."""
        transform = self.get_transform(*args, **kwargs)
        base = self.get_base_dist()
        if self.gradient == "total":
            return dist.TransformedDistribution(base, [transform])
        return PathGradientDistribution(base, [transform], weights_check=self._weights_check)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """A sample of x, in a model's or a guide's context."""
        latent = super().sample_latent(*args, **kwargs)
        is_recorded = self._recording.get() is not None  # then gradients are bounded there
        if self.clip is None or is_recorded or torch.jit.is_tracing():
            return latent
        if latent.requires_grad:
            latent.register_hook(self._clip_gradient)
        return latent

    @torch.no_grad()
    def _clip_gradient(self, gradient: Tensor) -> Tensor:
        """Shorten the rows, one for each sample, that are much longer than is typical."""
        assert self.clip is not None
        length = at_least_float32(gradient).norm(dim=-1, keepdim=True)
        is_usable = torch.isfinite(length) & (length > 0)
        log_length = torch.where(is_usable, length.log(), math.nan)
        average, count = self.log_gradient_length, self.num_gradients
        typical = torch.where(count == 0, log_length.nanmean(), average)
        # An extreme gradient changes the average no more than one at the limit.
        limit = math.log(self.clip)
        change = (log_length - typical).clamp(-limit, limit).nanmean().nan_to_num()
        count += torch.isfinite(typical)
        average.copy_(typical + change / count.clamp(1, _CLIP_MEMORY))
        longest = self.clip * typical.exp()
        return torch.where(length > longest, gradient * (longest / length), gradient).to(gradient)

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of all latent variables, each of shape ``(num_samples, *shape)``.

        :param int num_samples: the number of draws.
        :param args: arguments of the model, like ``kwargs``.
        """
        num_samples = as_count("num_samples", num_samples)
        return self._constrain(self._sample_latents(num_samples, *args, **kwargs))

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of every latent variable, from draws.

        :param args: arguments of the model, like ``kwargs``.
        """
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Tensor | Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of every latent variable, from 4,000 draws.

        They are the quantiles of each unconstrained number, mapped to the constrained space: those
        of each constrained number if the constraint is elementwise (as for a scale), not otherwise
        (as for a simplex).

        :param quantiles: numbers in [0, 1]; the first dimension of each result is theirs.
        :param args: arguments of the model, like ``kwargs``.
        """
        draws = self._sample_latents(_NUM_DRAWS, *args, **kwargs)
        latents = at_least_float32(draws)  # torch's quantile takes no half precision
        levels = torch.as_tensor(quantiles, dtype=latents.dtype, device=latents.device)
        if levels.dim() != 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"expected a list of quantiles in [0, 1]; got {quantiles!r}")
        # torch's quantile takes 16 million numbers at most.
        parts = [part.quantile(levels, dim=0) for part in latents.split(1024, dim=-1)]
        return self._constrain(torch.cat(parts, dim=-1).to(draws.dtype))

    def _sample_latents(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        return self.get_posterior(*args, **kwargs).sample(torch.Size([num_samples]))

    def _constrain(self, latents: Tensor) -> dict[str, Tensor]:
        """The values of all sites, from x of shape ``(N, D)``."""
        assert self.prototype_trace is not None
        sites, shapes = self.prototype_trace.nodes, self._unconstrained_shapes
        parts = latents.split([shape.numel() for shape in shapes.values()], dim=-1)
        return {
            name: biject_to(sites[name]["fn"].support)(part.reshape(-1, *shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> AutoSelfNormalizingFlow:
        if self.transform is None:  # for the transform that the first call makes
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
        # Pyro's version would also remove the model from this guide itself.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # a weak reference, which Pyro sets anew
        state = {**self.__dict__, "_model": None, "master": None}
        if self.transform is not None:
            state["activation"] = None  # not needed any more, and lambdas cannot be pickled
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoSelfNormalizingFlow:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        # Pyro's transforms keep tensors with a graph, which cannot be copied.
        for module in self.modules():
            for value in vars(module).values():
                for part in value if isinstance(value, tuple) else (value,):
                    if isinstance(part, Tensor) and part.grad_fn is not None:
                        memo[id(part)] = None
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other._model = self._model
        return other
