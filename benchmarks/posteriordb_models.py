"""Twelve posteriors of posteriordb as Pyro models, with their reference draws.

    https://github.com/stan-dev/posteriordb

Each model is that of the database, in its units and with its priors. It can be run by itself or
under a plate of particles, where every latent variable has the particles' dimension on the left.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median, init_to_value
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import biject_to

__all__ = ["POSTERIORS", "Posterior", "errors", "load", "read", "read_draws"]

#: What the reference draws are of, from draws of a model's latent variables.
Quantities = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

#: A model, what the reference draws are of, and where to start what has no proper prior.
Definition = tuple[Callable[[], None], Quantities, dict[str, Tensor]]


@dataclass(frozen=True)
class Posterior:
    """A model with draws from its posterior."""

    name: str
    model: Callable[[], None]
    quantities: Quantities
    reference: dict[str, Tensor]
    """``name → (S,)`` or ``(S, n)``, named as what ``quantities`` returns."""
    dim: int
    """Of the latent variables together, unconstrained."""
    start: dict[str, Tensor]
    """Where to start the latent variables that have no prior to draw from."""


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flat(support: constraints.Constraint, *event_shape: int) -> dist.ImproperUniform:
    return dist.ImproperUniform(support, (), event_shape)


def standard_normal(dim: int) -> dist.Distribution:
    return dist.Normal(torch.zeros(dim, dtype=torch.float64), 1.0).to_event(1)


def latents(*names: str) -> Quantities:
    """The latent variables of these names, as they are."""
    return lambda draws: {name: draws[name] for name in names}


def eight_schools_noncentered(data: Mapping[str, Any]) -> Definition:
    y, sigma = double(data["y"]), double(data["sigma"])

    def effects(mu: Tensor, tau: Tensor, standardized: Tensor) -> Tensor:
        return mu.unsqueeze(-1) + tau.unsqueeze(-1) * standardized

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        theta = effects(mu, tau, pyro.sample("standardized", standard_normal(len(y))))
        pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    def quantities(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theta = effects(draws["mu"], draws["tau"], draws["standardized"])
        return {"mu": draws["mu"], "tau": draws["tau"], "theta": theta}

    return model, quantities, {}


def eight_schools_centered(data: Mapping[str, Any]) -> Definition:
    y, sigma = double(data["y"]), double(data["sigma"])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0)).unsqueeze(-1)
        tau = pyro.sample("tau", dist.HalfCauchy(5.0)).unsqueeze(-1)
        effects = dist.Normal(mu.expand(*mu.shape[:-1], len(y)), tau).to_event(1)
        theta = pyro.sample("theta", effects)
        pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    return model, latents("mu", "tau", "theta"), {}


def linear_regression(
    y: Tensor, regressors: Sequence[Sequence[float]], sigma_prior: dist.Distribution
) -> Definition:
    """``y ~ N(β₁ + Σ_j β_{j+1} x_j, σ)``, flat in β."""
    columns = [double(column) for column in regressors]
    design = torch.stack([torch.ones_like(y), *columns], dim=-1)
    num_coefficients = design.shape[-1]

    def model() -> None:
        beta = pyro.sample("beta", flat(constraints.real_vector, num_coefficients))
        sigma = pyro.sample("sigma", sigma_prior).unsqueeze(-1)
        pyro.sample("y", dist.Normal(beta @ design.mT, sigma).to_event(1), obs=y)

    start = {"beta": torch.zeros(num_coefficients, dtype=torch.float64), "sigma": y.std()}
    return model, latents("beta", "sigma"), start


def kidscore_momhsiq(data: Mapping[str, Any]) -> Definition:
    regressors = [data["mom_hs"], data["mom_iq"]]
    return linear_regression(double(data["kid_score"]), regressors, dist.HalfCauchy(2.5))


def mesquite(data: Mapping[str, Any]) -> Definition:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    regressors = [data[name] for name in names]
    return linear_regression(double(data["weight"]), regressors, flat(constraints.positive))


def logearn_interaction(data: Mapping[str, Any]) -> Definition:
    height, male = data["height"], data["male"]
    regressors = [height, male, [h * m for h, m in zip(height, male, strict=True)]]
    return linear_regression(double(data["earn"]).log(), regressors, flat(constraints.positive))


def kilpisjarvi(data: Mapping[str, Any]) -> Definition:
    x, y = double(data["x"]), double(data["y"])

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Normal(data["pmualpha"], data["psalpha"]))
        beta = pyro.sample("beta", dist.Normal(data["pmubeta"], data["psbeta"]))
        sigma = pyro.sample("sigma", flat(constraints.positive)).unsqueeze(-1)
        mean = alpha.unsqueeze(-1) + beta.unsqueeze(-1) * x
        pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y)

    return model, latents("alpha", "beta", "sigma"), {"sigma": y.std()}


def gp_pois_regr(data: Mapping[str, Any]) -> Definition:
    x, counts = double(data["x"]), double(data["k"])
    squares = (x.unsqueeze(-1) - x).square()
    jitter = 1e-10 * torch.eye(len(x), dtype=torch.float64)

    def field(rho: Tensor, alpha: Tensor, standardized: Tensor) -> Tensor:
        rho, alpha = rho[..., None, None], alpha[..., None, None]
        covariance = alpha**2 * torch.exp(-0.5 * squares / rho**2)
        tril = torch.linalg.cholesky(covariance + jitter)
        return (tril @ standardized.unsqueeze(-1)).squeeze(-1)

    def model() -> None:
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        f = field(rho, alpha, pyro.sample("standardized", standard_normal(len(x))))
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=counts)

    def quantities(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        f = field(draws["rho"], draws["alpha"], draws["standardized"])
        return {"rho": draws["rho"], "alpha": draws["alpha"], "f": f}

    return model, quantities, {}


def autoregression(data: Mapping[str, Any]) -> Definition:
    y, order = double(data["y"]), data["K"]
    lagged = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], dim=-1)

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0)).unsqueeze(-1)
        zeros = torch.zeros(order, dtype=torch.float64)
        beta = pyro.sample("beta", dist.Normal(zeros, 10.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5)).unsqueeze(-1)
        mean = alpha + beta @ lagged.mT
        pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y[order:])

    return model, latents("alpha", "beta", "sigma"), {}


def linear_recurrence(first: Tensor, inputs: Tensor, factor: Tensor) -> Tensor:
    """``x_1 = first`` and ``x_t = inputs_{t−1} + factor · x_{t−1}``, in log₂(T) doublings.

    With ``c = (first, inputs)``, ``x_t = Σ_j factorʲ c_{t−j}``. The sum of the first 2m terms is
    that of the first m, plus ``factorᵐ`` times that of the first m at ``t − m``.

    :param Tensor first: with shape ``(..., 1)``.
    :param Tensor inputs: with shape ``(..., T − 1)``.
    :param Tensor factor: with shape ``(..., 1)``.
    """
    x = torch.cat([first, inputs], dim=-1)
    num_terms = 1
    while num_terms < x.shape[-1]:
        x = x + factor * F.pad(x[..., :-num_terms], (num_terms, 0))
        factor, num_terms = factor.square(), 2 * num_terms
    return x


def garch11(data: Mapping[str, Any]) -> Definition:
    y, first_variance = double(data["y"]), double([data["sigma1"] ** 2])

    def model() -> None:
        mu = pyro.sample("mu", flat(constraints.real)).unsqueeze(-1)
        alpha0 = pyro.sample("alpha0", flat(constraints.positive)).unsqueeze(-1)
        # (α₁, β₁, 1 − α₁ − β₁), uniform on the simplex
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))
        alpha1, beta1, _ = weights.split(1, dim=-1)
        inputs = alpha0 + alpha1 * (y[:-1] - mu).square()
        first = first_variance.expand(*inputs.shape[:-1], 1)
        variance = linear_recurrence(first, inputs, beta1)
        pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)

    def quantities(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        alpha1, beta1, _ = draws["weights"].unbind(-1)
        return {"mu": draws["mu"], "alpha0": draws["alpha0"], "alpha1": alpha1, "beta1": beta1}

    return model, quantities, {"mu": y.mean(), "alpha0": double(1.0)}


#: A splitting method of order 6: the parts of a step in which p moves, and those for q in between.
#: S. Blanes, P. C. Moan. Practical symplectic partitioned Runge–Kutta and Runge–Kutta–Nyström
#: methods. Journal of Computational and Applied Mathematics, 2002. S₁₀ there.
_P_PARTS = [0.0502627644003922, 0.413514300428344, 0.0450798897943977, -0.188054853819569]
_P_PARTS += [0.541960678450780]
_P_PARTS += [1 - 2 * sum(_P_PARTS), *reversed(_P_PARTS)]
_Q_PARTS = [0.148816447901042, -0.132385865767784, 0.067307604692185, 0.432666402578175]
_Q_PARTS += [0.5 - sum(_Q_PARTS)]
_Q_PARTS += reversed(_Q_PARTS)
#: At the posterior mean, relative errors are below 1e-6.
_STEPS_A_YEAR = 2
#: A year: which variable moves, for how long; negative for q, whose equation has the other signs.
_STAGES = [
    (moving, sign * part / _STEPS_A_YEAR)
    for _ in range(_STEPS_A_YEAR)
    for parts in zip_longest(_P_PARTS, _Q_PARTS)
    for moving, sign, part in zip((0, 1), (1, -1), parts, strict=True)
    if part is not None
]
#: A bound on exp(p) and exp(q), per year; both stay below 2.5 at the reference draws. With it, a
#: wrong parameter has a low likelihood, and not one that overflows.
_MAX_RATE = 20.0


class PredatorPrey(torch.autograd.Function):
    """``p' = r₁ − exp(q)``, ``q' = exp(p) − r₂``: the Lotka–Volterra equations in logarithms.

    A step alternates between the two equations, and solves each with the other variable fixed. The
    gradient is that of the numerical solution, back through the same stages.

    ``apply(rates, start, num_years)`` takes r and (p, q), with shape ``(..., 2)`` both, and returns
    (p, q) after 0, 1, ..., ``num_years`` years, with shape ``(..., num_years + 1, 2)``.
    """

    @staticmethod
    def forward(ctx: Any, rates: Tensor, start: Tensor, num_years: int) -> Tensor:
        growth = rates.reshape(-1, 2).T.numpy()
        state = start.reshape(-1, 2).T.numpy().copy()
        moves = [(moving, time, time * growth[moving]) for moving, time in _STAGES]
        path = np.empty((num_years + 1, *state.shape))
        slopes = np.empty((num_years, len(_STAGES), state.shape[1]))  # of what moves by the other
        path[0] = state
        with np.errstate(over="ignore"):  # of exp, before the bound
            for year in range(num_years):
                for slope, (moving, time, grown) in zip(slopes[year], moves, strict=True):
                    rate = np.exp(state[1 - moving], out=slope)
                    state[moving] += grown - time * np.minimum(rate, _MAX_RATE)
                path[year + 1] = state
        times = np.array([time for _, time in _STAGES])
        ctx.slopes = -times[:, None] * np.where(slopes < _MAX_RATE, slopes, 0.0)
        return torch.from_numpy(path).movedim(-1, 0).reshape(*rates.shape[:-1], num_years + 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        num_years = len(ctx.slopes)
        path_grad = grad.reshape(-1, num_years + 1, 2).permute(1, 2, 0).numpy()
        state_grad = path_grad[-1].copy()
        rates_grad = np.zeros_like(state_grad)
        for year in reversed(range(num_years)):
            for slope, (moving, time) in zip(ctx.slopes[year][::-1], _STAGES[::-1], strict=True):
                rates_grad[moving] += time * state_grad[moving]
                state_grad[1 - moving] += slope * state_grad[moving]
            state_grad += path_grad[year]
        shape = (*grad.shape[:-2], 2)
        rates_grad, start_grad = (
            torch.from_numpy(gradient.T).reshape(shape) for gradient in (rates_grad, state_grad)
        )
        return rates_grad, start_grad, None


def lotka_volterra(data: Mapping[str, Any]) -> Definition:
    y = double([data["y_init"], *data["y"]])  # (years, 2), prey and predators
    location, scale = double([1.0, 0.05, 1.0, 0.05]), double([0.5, 0.05, 0.5, 0.05])
    ones = torch.ones(2, dtype=torch.float64)

    def model() -> None:
        positive = constraints.independent(constraints.positive, 1)
        theta = pyro.sample("theta", flat(positive, 4))
        prior = dist.Normal(location, scale).to_event(1)
        pyro.factor("theta_prior", prior.log_prob(theta))
        z_init = pyro.sample("z_init", dist.LogNormal(math.log(10) * ones, 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(-ones, 1.0).to_event(1))
        # (p, q) = log (θ₄u, θ₂v), which leaves two parameters in the equations.
        log_scales = theta[..., [3, 1]].log()
        path = PredatorPrey.apply(theta[..., [0, 2]], z_init.log() + log_scales, len(y) - 1)
        log_z = path - log_scales.unsqueeze(-2)
        pyro.sample("y", dist.LogNormal(log_z, sigma.unsqueeze(-2)).to_event(2), obs=y)

    return model, latents("theta", "z_init", "sigma"), {"theta": location}


def low_dim_gauss_mix(data: Mapping[str, Any]) -> Definition:
    y = double(data["y"])
    ones = torch.ones(2, dtype=torch.float64)

    def model() -> None:
        mu = pyro.sample("mu", flat(constraints.ordered_vector, 2))
        pyro.factor("mu_prior", dist.Normal(0.0, 2.0 * ones).to_event(1).log_prob(mu))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * ones).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        weights = torch.stack([theta, 1 - theta], dim=-1).unsqueeze(-1)
        components = dist.Normal(mu.unsqueeze(-1), sigma.unsqueeze(-1)).log_prob(y)  # (..., 2, N)
        pyro.factor("y", (weights.log() + components).logsumexp(-2).sum(-1))

    return model, latents("mu", "sigma", "theta"), {"mu": double([-1.0, 1.0])}


def hmm_drive_0(data: Mapping[str, Any]) -> Definition:
    observed = torch.stack([double(data["u"]), double(data["v"])], dim=-1)  # (T, 2)
    concentrations = double(data["alpha"])
    prior = dist.Normal(double([0.0, 3.0]), 1.0).to_event(1)

    def ordered_rates(name: str) -> Tensor:
        # Positive and ordered: the sums of positive steps, whose Jacobian is 1.
        steps = flat(constraints.independent(constraints.positive, 1), 2)
        rates = pyro.sample(f"{name}_steps", steps).cumsum(-1)
        pyro.factor(f"{name}_prior", prior.log_prob(rates))
        return rates

    def model() -> None:
        theta1 = pyro.sample("theta1", dist.Dirichlet(concentrations[0]))
        theta2 = pyro.sample("theta2", dist.Dirichlet(concentrations[1]))
        transition = torch.stack([theta1, theta2], dim=-2).log()
        # (..., state, u or v)
        rates = torch.stack([ordered_rates("phi"), ordered_rates("lambda")], dim=-1)
        # p(x₁), then p(x₂, x₃, ... | x₁), which starts from the state's distribution given x₁.
        first = dist.Exponential(rates).to_event(1).log_prob(observed[0])
        pyro.factor("first", first.logsumexp(-1))
        emission = dist.Exponential(rates.unsqueeze(-3)).to_event(1)
        others = dist.DiscreteHMM(first, transition.unsqueeze(-3), emission)
        pyro.sample("others", others, obs=observed[1:])

    def quantities(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rates = {name: draws[f"{name}_steps"].cumsum(-1) for name in ("phi", "lambda")}
        return {"theta1": draws["theta1"], "theta2": draws["theta2"], **rates}

    return model, quantities, {"phi_steps": double([1.0, 2.0]), "lambda_steps": double([1.0, 2.0])}


#: By name: the name of its data, and what makes the model of them.
POSTERIORS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Definition]]] = {
    "eight_schools_noncentered": ("eight_schools", eight_schools_noncentered),
    "eight_schools_centered": ("eight_schools", eight_schools_centered),
    "kidscore_momhsiq": ("kidiq", kidscore_momhsiq),
    "gp_pois_regr": ("gp_pois_regr", gp_pois_regr),
    "arK": ("arK", autoregression),
    "mesquite": ("mesquite", mesquite),
    "kilpisjarvi": ("kilpisjarvi_mod", kilpisjarvi),
    "logearn_interaction": ("earnings", logearn_interaction),
    "garch11": ("garch", garch11),
    "lotka_volterra": ("hudson_lynx_hare", lotka_volterra),
    "low_dim_gauss_mix": ("low_dim_gauss_mix", low_dim_gauss_mix),
    "hmm_drive_0": ("bball_drive_event_0", hmm_drive_0),
}

#: The reference draws of another model: the same posterior in other coordinates.
_DRAWS_OF = {"eight_schools_centered": "eight_schools_noncentered"}


def load(name: str, data_dir: Path) -> Posterior:
    """A posterior, from the folder with ``data-*.json.zip`` and ``draws-*.json.zip``."""
    data_name, define = POSTERIORS[name]
    model, quantities, start = define(read(data_dir / f"data-{data_name}.json.zip"))
    reference = read_draws(data_dir / f"draws-{data_name}-{_DRAWS_OF.get(name, name)}.json.zip")
    return Posterior(name, model, quantities, reference, latent_dim(model, start), start)


def latent_dim(model: Callable[[], None], start: Mapping[str, Tensor]) -> int:
    """The dimension of all unconstrained latent variables together."""
    init = init_to_value(values=dict(start), fallback=init_to_median)
    with torch.random.fork_rng(devices=[]), InitMessenger(init):
        trace = poutine.trace(model).get_trace()
    sites = [trace.nodes[name] for name in trace.stochastic_nodes]
    return sum(biject_to(site["fn"].support).inv(site["value"]).numel() for site in sites)


def read(path: Path) -> Any:
    """The content of a zipped JSON file."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def read_draws(path: Path) -> dict[str, Tensor]:
    """The draws of all chains, ``name → (S,)`` or ``(S, n)``."""
    chains = read(path)
    result: dict[str, Any] = {}
    for name in chains[0]:
        values = double([value for chain in chains for value in chain[name]])
        stem = name.partition("[")[0]
        if stem == name:
            result[name] = values
        else:
            result.setdefault(stem, []).append(values)  # in the order of their indices
    return {
        name: torch.stack(values, dim=-1) if isinstance(values, list) else values
        for name, values in result.items()
    }


def errors(
    draws: Mapping[str, Tensor], weights: Tensor, reference: Mapping[str, Tensor]
) -> tuple[float, float]:
    """The largest errors of a mean and of the logarithm of a standard deviation.

    :param Tensor weights: of the draws, normalized.
    """
    mean_error, deviation_error = 0.0, 0.0
    for name, exact in reference.items():
        values = draws[name].reshape(len(weights), -1)
        exact = exact.reshape(len(exact), -1)
        mean = weights @ values
        deviation = (weights @ (values - mean).square()).sqrt()
        mean_error = max(mean_error, ((mean - exact.mean(0)) / exact.std(0)).abs().max().item())
        ratio = (deviation / exact.std(0)).log().abs().max().item()
        deviation_error = max(deviation_error, ratio)
    return mean_error, deviation_error
