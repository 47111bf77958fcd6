"""Autoguides: a flow over all latent variables of a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.transforms import BatchNorm, Sylvester
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, biject_to

from pyro_snf.log_dets import LogDetMethod
from pyro_snf.options import (
    as_count,
    as_number,
    check_choice,
    check_factory,
    expect,
    has_values,
    shown,
)
from pyro_snf.path_gradient import EqualWeightsCheck, PathGradientDistribution
from pyro_snf.precision import at_least_float32
from pyro_snf.processes import gather
from pyro_snf.recording import Recording, RecordingSlot
from pyro_snf.tracing import is_traced
from pyro_snf.transforms.autoregressive import low_rank_autoregressive
from pyro_snf.transforms.base import InvertibleTransformModule
from pyro_snf.transforms.compose import Compose
from pyro_snf.transforms.linear import SelfNormalizingLinear
from pyro_snf.vectorization import is_subsampled

__all__ = ["AutoSelfNormalizingFlow"]

GRADIENTS = ("path", "total")

# The number of gradients in the moving average of their lengths.
_CLIP_MEMORY = 100

# Of draws for quantiles. With 2,000 independent ones and their reflections, the standard error of a
# median is at most that of 2,000 draws, 2.8 % of a standard deviation.
_NUM_DRAWS = 4000

# Transforms of Pyro 1.9 whose log-det is not that of their map.
_WRONG_LOG_DETS = (
    BatchNorm,  # in training: it is that of the inverse, with the moments of a batch of data
    Sylvester,  # its formula is for column vectors, its map for row vectors
)


def init_to_median_or_zero(site: Any) -> Tensor:
    """Pyro's ``init_to_median``, or 0 in unconstrained space for priors that cannot be sampled.

    :param dict site: a sample site of a Pyro trace.
    """
    try:
        return init_to_median(site)
    except NotImplementedError:
        transform = biject_to(site["fn"].support)
        return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


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
    :math:`N(\mu_0, \sigma_0^2)`, with the location of ``init_loc_fn`` and the scale ``init_scale``.

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
      ``gradient="total"``, as do activations with kinks, such as leaky ReLUs, and those without an
      inverse, such as Pyro's ``planar``.
    - ``clip``: the gradient in a sample is shortened to ``clip`` times the typical length if it is
      longer. Heavy-tailed models have such gradients, each of which would affect dozens of Adam's
      steps.

    In ``eval()`` mode and under ``no_grad`` densities are exact. In training they are estimates
    whose error :class:`~pyro_snf.SelfNormalizingLinear` measures.

    :func:`pyro_snf.fit` trains the guide, by natural gradients; ``SVI`` does with any optimizer.

    The first call creates the flow. ``.to()`` and ``.double()`` may precede it (they take
    precedence over the model's device and dtype), and so may ``load_state_dict``.

    In a site that is partly masked, as that of missing values (``obs_mask``) is, elements that
    neither the prior nor the data reach have no posterior. Unconstrained, they get the prior
    :math:`N(\mu_0, 1)`: the ELBO remains a bound on the same evidence.

    :param model: a Pyro model of static structure, whose latent variables are continuous, or
        enumerated and hidden from the guide, and outside of subsampled plates.
    :param int num_layers: n, dense layers and activations together, at least 1.
    :param activation: ``activation(D)`` makes the transform before a dense layer, such as
        :func:`~pyro_snf.low_rank_autoregressive` or a Pyro factory. With one that has no cache,
        such as torch's ``AffineTransform``, every step inverts the flow.
    :param init_loc_fn: the initial location of each site, as in all of Pyro's guides; by default,
        the prior median, or 0 in unconstrained space for flat priors (``ImproperUniform``).
    :param float init_scale: the initial standard deviation of each unconstrained number.
    :param gradient: ``"path"``, ``"total"``, or None for ``"path"`` where it is known to be right:
        with an activation that declares ``has_continuous_log_det``, as those of this library do
        (see :mod:`pyro_snf.path_gradient`), and a ``log_det`` without parameters. The first call
        replaces None by the choice.
    :param clip: in units of the typical length, above 1; None for no clipping. With
        ``gradient="total"``, where samples may have unequal weights, nothing is clipped.
    :param log_det: the method of every :class:`~pyro_snf.SelfNormalizingLinear`.
    :param inverse: that of every :class:`~pyro_snf.SelfNormalizingLinear`.
    :raises ValueError: for options outside these ranges; for ``gradient="path"`` with a ``log_det``
        that has parameters, such as ``"learned"``, which it would leave untrained. In the first
        call: for ``gradient="path"`` with other activations; for activations that are not bijective
        or have a wrong log-det, as Pyro's ``batchnorm`` and ``sylvester``; for latent variables in
        subsampled plates, and for those that neither the prior nor the data reach.
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
        init_loc_fn: Callable[..., Any] = init_to_median_or_zero,
        init_scale: float = 0.1,
        gradient: str | None = None,
        clip: float | None = 10.0,
        log_det: str | LogDetMethod = "refined",
        inverse: str | None = None,
    ) -> None:
        num_layers = as_count("num_layers", num_layers)
        check_factory("activation, a factory of transforms", activation)
        expect("init_loc_fn, a function of a site", callable(init_loc_fn), init_loc_fn)
        if gradient is not None:
            check_choice("gradient, if not None,", gradient, GRADIENTS)
        if clip is not None:
            clip = as_number("clip > 1, or None", clip, lambda number: 1 < number < math.inf)
        options: dict[str, Any] = {"log_det": log_det, "inverse": inverse}
        with torch.random.fork_rng(devices=[]):  # a layer that only checks the options
            layer = SelfNormalizingLinear(1, init_scale=init_scale, **options)
        trains_log_det = bool(list(layer.log_det.parameters()))
        if gradient == "path" and trains_log_det:
            raise ValueError(f"expected gradient='total' with log_det={shown(log_det)}; got 'path'")
        super().__init__(model, init_loc_fn=init_loc_fn)
        #: Whether the dense layers' ``log_det`` has parameters, as "learned" has.
        self.trains_log_det = trains_log_det
        self.num_layers = num_layers
        self.activation = activation
        self.init_scale = float(init_scale)
        self.gradient = gradient
        self.layer_options = options
        self.clip = None if gradient == "total" else clip
        self.transform = None
        # The indices in x that neither the prior nor the data reach.
        self._unreached: list[int] = []
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
            # A trace with a graph could not be copied.
            with torch.inference_mode(False), torch.no_grad():
                super()._setup_prototype(*args, **kwargs)
                self._check_plates()
                loc = self._init_loc()
                self._unreached = self._find_unreached(*args, **kwargs)
            if self.transform is None:
                device, dtype = self._device or loc.device, self._dtype or loc.dtype
                with torch.inference_mode(False):  # buffers that autograd can use later
                    self._make_transform(len(loc), device, dtype)
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
                _check_activation(activation, dim)
                if isinstance(activation, nn.Module):
                    activation = activation.to(device, dtype)
                parts.append(activation)
        transform = Compose(parts).train(self.training)
        self._choose_gradient(transform)
        self.transform = transform
        self.record(self._recording.get())
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(device))

    def _choose_gradient(self, transform: Compose) -> None:
        """Set ``gradient``, if it is None, or check it."""
        methods = [module for module in transform.modules() if isinstance(module, LogDetMethod)]
        has_parameters = any(list(method.parameters()) for method in methods)
        if self.gradient is None:
            is_right = transform.has_continuous_log_det and not has_parameters
            self.gradient = "path" if is_right else "total"
            self.clip = self.clip if is_right else None
        elif self.gradient == "path":
            for part in transform.parts:
                expect(
                    f"gradient='total' with {part}, whose log-det is not known to be continuous "
                    "(has_continuous_log_det)",
                    getattr(part, "has_continuous_log_det", False),
                    "path",
                )
            expect("gradient='total' if a log_det has parameters", not has_parameters, "path")

    def _check_plates(self) -> None:
        """Raise a ValueError for a latent variable in a subsampled plate."""
        for name, stack in self._cond_indep_stacks.items():
            for frame in stack:
                if is_subsampled(frame):
                    raise ValueError(
                        "expected latent variables outside of subsampled plates; got "
                        f"{name!r} in plate {frame.name!r}, {frame.size} of {frame.full_size}: use "
                        "AutoNormal or an amortized guide for it, beside this one in AutoGuideList"
                    )

    def _find_unreached(self, *args: Any, **kwargs: Any) -> list[int]:
        """The indices in x of which the density of the model is independent.

        :raises ValueError: if a site has no others.
        """
        assert self.prototype_trace is not None
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        if not any(map(_may_be_flat, sites.values())):
            return []
        with torch.enable_grad():
            leaves, values = {}, {}
            for name, site in sites.items():
                transform = biject_to(site["fn"].support)
                start = transform.inv(site["value"])
                # Where a fresh guide would draw it: at the start, a gradient may be 0 by symmetry.
                start = start + self.init_scale * torch.randn_like(start)
                leaves[name] = start.requires_grad_()
                values[name] = transform(start)
            conditioned = poutine.trace(poutine.condition(self.model, values))
            log_density = poutine.block(conditioned.get_trace)(*args, **kwargs).log_prob_sum()
            log_density = log_density + sum(0.0 * leaf.sum() for leaf in leaves.values())
            gradients = torch.autograd.grad(log_density, list(leaves.values()))
        unreached: list[int] = []
        offset = 0
        for (name, site), gradient in zip(sites.items(), gradients, strict=True):
            indices = (gradient.flatten() == 0).nonzero().flatten().tolist()
            if indices and _may_be_flat(site) and _is_unbounded(site):
                if len(indices) == gradient.numel():
                    raise ValueError(
                        f"expected a prior or data for {name!r}; got neither, so it has no "
                        "posterior: give it a prior that is not masked, or hide it from the guide "
                        f"by poutine.block(model, hide=[{name!r}])"
                    )
                unreached.extend(offset + index for index in indices)
            offset += gradient.numel()
        return unreached

    def _share_parameters(self) -> None:
        """Register the parameters of the transform, and replace them by those of Pyro's store.

        As Pyro's guides do. Of a torch module, Pyro would only register the parameters. Frozen ones
        are left alone; ``pyro.module`` would warn of them in every step.
        """
        if pyro.settings.get("module_local_params"):
            _ = self.transform  # the access registers them
            return
        name = self._pyro_get_fullname("transform")
        store = dict(pyro.get_param_store().named_parameters())
        for key, parameter in list(self._flow.named_parameters()):
            full_name = param_with_module_name(name, key)
            stored = store.get(full_name, parameter)
            if stored.shape != parameter.shape:
                raise RuntimeError(
                    f"expected {name}.{key} of shape {tuple(parameter.shape)}; the parameter store "
                    f"has one of shape {tuple(stored.shape)}: pyro.clear_param_store() first"
                )
            if parameter.requires_grad:
                owner, _, short_name = key.rpartition(".")
                # Past nn.Module.__setattr__: a store that was loaded holds no nn.Parameters.
                self._flow.get_submodule(owner)._parameters[short_name] = pyro.param(
                    full_name, parameter
                )

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

    def record(self, recording: Recording | None) -> None:
        """Let :attr:`last_layer` record the gradients of samples, in the place of its own.

        :param recording: in which it does so for as long as its owner keeps it; None to stop.
        """
        self._recording.set(recording)
        if self.transform is not None:
            self.last_layer.recording.set(recording)
            for module in self._flow.modules():
                if isinstance(module, InvertibleTransformModule):
                    # Whose owner returns to where gradients were finite.
                    module.checks_gradients = recording is None

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
        is_path = self.gradient == "path"
        if not is_path and self._recording.get() is None:
            return dist.TransformedDistribution(base, [transform])
        return PathGradientDistribution(
            base, [transform], weights_check=self._weights_check, is_path=is_path
        )

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """A sample of x, in a model's or a guide's context."""
        latent = super().sample_latent(*args, **kwargs)
        # A recording bounds the gradients itself.
        clips = self.clip is not None and self._recording.get() is None
        if clips and latent.requires_grad and not is_traced():
            latent.register_hook(self._clip_gradient)
        if self._unreached:
            log_prior = dist.Normal(self._init_loc().to(latent)[self._unreached], 1.0).log_prob(
                latent[..., self._unreached]
            )
            # A factor of the guide, hence negative. pyro.factor would warn outside of inference.
            pyro.sample(
                f"_{self._pyro_name}_unreached",
                dist.Unit(-log_prior.sum(-1), has_rsample=True),
                infer={"is_auxiliary": True},
            )
        return latent

    @torch.no_grad()
    def _clip_gradient(self, gradient: Tensor) -> Tensor:
        """Shorten the rows, one for each sample, that are much longer than is typical."""
        assert self.clip is not None
        length = at_least_float32(gradient).norm(dim=-1, keepdim=True)
        is_usable = torch.isfinite(length) & (length > 0)
        # Of the samples of all processes, so that the average is the same in each.
        log_length = gather(torch.where(is_usable, length.log(), math.nan))
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
        posterior = self.get_posterior(*args, **kwargs)
        return self._constrain(posterior.sample(torch.Size([num_samples])))

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of every latent variable, as :meth:`quantiles` finds it.

        :param args: arguments of the model, like ``kwargs``.
        """
        return self.quantiles(0.5, *args, **kwargs)

    @torch.no_grad()
    def quantiles(
        self, quantiles: float | Tensor | Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of every latent variable.

        They are the quantiles of each unconstrained number, mapped to the constrained space: those
        of each constrained number if the constraint is elementwise (as for a scale), not otherwise
        (as for a simplex). With ``num_layers=1`` they are exact. Otherwise they are those of 4,000
        draws, z and −z in pairs: if the flow is still affine, as in a fresh guide, the median is
        exact.

        :param quantiles: a number in [0, 1], or several, to which then the first dimension of each
            result belongs.
        :param args: arguments of the model, like ``kwargs``.
        """
        transform, base = self.get_transform(*args, **kwargs), self.get_base_dist()
        dtype = self.last_layer.bias.dtype
        bias = at_least_float32(self.last_layer.bias)  # torch's quantile takes no half precision
        levels = _as_levels(quantiles).to(bias)
        if self.num_layers == 1:
            deviation = at_least_float32(self.last_layer.weight).norm(dim=-1)
            latents = dist.Normal(bias, deviation).icdf(levels.unsqueeze(-1))
        else:
            z = base.sample(torch.Size([_NUM_DRAWS // 2]))
            draws = at_least_float32(transform(torch.cat([z, -z])))
            # torch's quantile takes 16 million numbers at most.
            parts = [part.quantile(levels, dim=0) for part in draws.split(1024, dim=-1)]
            latents = torch.cat(parts, dim=-1)
        values = self._constrain(latents.to(dtype).reshape(-1, latents.shape[-1]))
        if levels.dim() == 0:
            values = {name: value[0] for name, value in values.items()}
        return values

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


def _as_levels(quantiles: Any) -> Tensor:
    """The levels of quantiles in float64, shape ``()`` or ``(n,)``.

    :raises ValueError: unless they are numbers in [0, 1].
    """
    levels, fits = torch.tensor(0.0), False
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):  # for torch to say
        levels = torch.as_tensor(quantiles)
        is_real = levels.dtype is not torch.bool and not levels.is_complex()
        fits = has_values(levels) and is_real and levels.dim() <= 1 and levels.numel() > 0
        fits = fits and bool(((levels >= 0) & (levels <= 1)).all())
    expect("quantiles in [0, 1], a number or a list", fits, quantiles)
    return levels


def _check_activation(activation: Any, dim: int) -> None:
    """Raise a ValueError unless it is a bijective transform of all vectors of ``dim`` numbers."""
    fits = (
        isinstance(activation, Transform)
        and activation.bijective
        and activation.domain.event_dim <= 1
        and activation.forward_shape(torch.Size([dim])) == (dim,)
        and all(activation.domain.check(torch.full([dim], x)).all() for x in (-2.0, 2.0))
    )
    expect(f"activation({dim}), a bijective transform of vectors of length {dim}", fits, activation)
    for module in activation.modules() if isinstance(activation, nn.Module) else ():
        is_right = not isinstance(module, _WRONG_LOG_DETS)
        expect("an activation whose log-det is that of its map", is_right, module)


def _may_be_flat(site: Any) -> bool:
    """Whether the prior of a site may be constant in some elements, on an infinite space."""
    fn = site["fn"]
    while fn is not None:
        if isinstance(fn, dist.ImproperUniform | MaskedDistribution):
            return True
        fn = getattr(fn, "base_dist", None)
    return site["mask"] is not None


def _is_unbounded(site: Any) -> bool:
    """Whether the support of a site is unbounded, so that a constant has no integral."""
    transform = biject_to(site["fn"].support)
    # On bounded supports, transforms are as good as constant this far out.
    far = torch.full_like(transform.inv(site["value"]), 10.0)
    return not torch.allclose(transform(far), transform(2 * far), rtol=1e-2, atol=1e-2)
