"""The posteriors that guides are compared on: Pyro models with their data.

A model's −ELBO is at least ``−log p(data)``, which is known for some, and 0 where nothing is
observed: there −ELBO is the Kullback–Leibler divergence itself. A model can be run by itself or
under a plate of particles, where every latent variable has the particles' dimension on the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoContinuous, AutoMultivariateNormal
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor

__all__ = ["POSTERIORS", "Gaussian", "Posterior", "conjugate_gaussian", "evaluate"]


@dataclass(frozen=True)
class Gaussian:
    """``N(mean, tril trilᵀ)``, tril lower triangular."""

    mean: Tensor
    tril: Tensor

    @torch.no_grad()
    def divergence_from(self, guide: AutoContinuous) -> float:
        """The Kullback–Leibler divergence from a Gaussian guide to this posterior, in nats."""
        if isinstance(guide, AutoMultivariateNormal):
            mean, factor = guide.loc, guide.scale.unsqueeze(-1) * guide.scale_tril
        else:
            mean, factor = guide.last_layer.bias, guide.last_layer.weight
        difference = (self.mean - mean).unsqueeze(-1)
        white = torch.linalg.solve_triangular(
            self.tril, torch.cat([factor, difference], -1), upper=False
        )
        log_det = self.tril.diagonal().abs().log().sum() - torch.linalg.slogdet(factor).logabsdet
        return (log_det + 0.5 * (white.square().sum() - len(mean))).item()


@dataclass(frozen=True)
class Posterior:
    """A model of latent dimension D, with its data."""

    dim: int
    model: Callable[[], object]
    negative_log_evidence: float | None = None
    """``−log p(data)``, the lowest −ELBO there is; None where it is not known."""
    gaussian: Gaussian | None = None
    """The posterior itself, if it is Gaussian."""


@pyro.validation_enabled(False)
@torch.no_grad()
def evaluate(
    model: Callable[[], object], guide: AutoContinuous, num_samples: int
) -> tuple[float, float]:
    """An estimate of −ELBO from fresh samples, with exact log-dets, and its standard error.

    NaN for a guide that has diverged.
    """
    was_training = guide.training
    guide.eval()
    objective = Trace_ELBO()(model, guide)
    try:
        losses = torch.stack([objective() for _ in range(num_samples)])
    except torch.linalg.LinAlgError:  # a matrix that is singular or not finite
        return math.nan, math.nan
    finally:
        guide.train(was_training)
    return losses.mean().item(), losses.std().item() / math.sqrt(num_samples)


@dataclass(frozen=True)
class Grid:
    """Counts on D cells of the unit square, and the log-Gaussian Cox process that they are from."""

    counts: Tensor
    """Shape ``(D,)``."""
    intensity: Tensor
    """The true expected counts, ``exp(mean + field)``, shape ``(D,)``."""
    mean: float
    scale_tril: Tensor
    """The Cholesky factor of the field's prior covariance, shape ``(D, D)``."""


def simulate_grid(size: int) -> Grid:
    """A draw from the prior on ``size`` × ``size`` cells, whose counts average 3 at any size."""
    centers = (torch.arange(size) + 0.5) / size
    positions = torch.cartesian_prod(centers, centers)
    scale_tril = matern_cholesky(positions, length_scale=0.1)
    mean = math.log(3.0) - 0.5  # E exp(field) = exp(½)
    generator = torch.Generator().manual_seed(0)
    intensity = torch.exp(mean + scale_tril @ torch.randn(size**2, generator=generator))
    counts = torch.poisson(intensity, generator=generator)
    return Grid(counts, intensity, mean, scale_tril)


def matern_cholesky(positions: Tensor, *, length_scale: float) -> Tensor:
    """The Cholesky factor of the Matérn 3/2 covariance with variance 1, shape ``(D, D)``.

    :param Tensor positions: shape ``(D, d)``.
    """
    distance = (positions.double().unsqueeze(1) - positions.double()).norm(dim=-1)
    scaled = math.sqrt(3) * distance / length_scale
    covariance = (1 + scaled) * torch.exp(-scaled)
    covariance.diagonal().add_(1e-6)  # for the factorization of fine grids
    return torch.linalg.cholesky(covariance).to(positions.dtype)


def cox_process(size: int) -> Posterior:
    """A log-Gaussian Cox process on ``size`` × ``size`` cells, counts of 3 a cell on average."""
    grid = simulate_grid(size)
    prior = dist.MultivariateNormal(torch.zeros_like(grid.counts), scale_tril=grid.scale_tril)

    def model() -> None:
        field = pyro.sample("field", prior)
        intensity = torch.exp(grid.mean + field)
        pyro.sample("counts", dist.Poisson(intensity).to_event(1), obs=grid.counts)

    return Posterior(size**2, model)


def conjugate_gaussian(dim: int = 512, condition: float = 100.0) -> Posterior:
    """``z ~ N(0, Σ)``, ``y ~ N(z, I)``: Σ dense, its eigenvalues log-uniform up to 1."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(noise).Q
    eigenvalues = torch.logspace(-math.log10(condition), 0, dim, dtype=torch.float64)
    prior_covariance = (rotation * eigenvalues) @ rotation.mT
    marginal = dist.MultivariateNormal(
        torch.zeros(dim, dtype=torch.float64),
        prior_covariance + torch.eye(dim, dtype=torch.float64),
    )
    noise = torch.randn(dim, generator=generator, dtype=torch.float64)
    observed = marginal.loc + marginal.scale_tril @ noise
    evidence = marginal.log_prob(observed).item()
    # Σ (Σ + I)⁻¹ is the posterior covariance, and maps y to the posterior mean.
    covariance = (rotation * (eigenvalues / (1 + eigenvalues))) @ rotation.mT
    gaussian = Gaussian(covariance @ observed, torch.linalg.cholesky(covariance))
    dtype = torch.get_default_dtype()
    data = observed.to(dtype)
    prior = dist.MultivariateNormal(
        torch.zeros(dim), scale_tril=torch.linalg.cholesky(prior_covariance).to(dtype)
    )

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=data)

    return Posterior(dim, model, -evidence, gaussian)


def horseshoe_regression() -> Posterior:
    """Logistic regression of scikit-learn's breast cancer data, horseshoe prior, non-centered.

    Carvalho, Polson, Scott. The horseshoe estimator for sparse signals. Biometrika, 2010.
    """
    features, labels = load_breast_cancer(return_X_y=True)
    x = torch.as_tensor(features, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    y = torch.as_tensor(labels, dtype=torch.float32)
    num_features = x.shape[1]

    def model() -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0)).unsqueeze(-1)
        overall = pyro.sample("overall", dist.HalfCauchy(1.0)).unsqueeze(-1)
        ones = torch.ones(num_features)
        local = pyro.sample("local", dist.HalfCauchy(ones).to_event(1))
        standardized = pyro.sample("standardized", dist.Normal(0.0, ones).to_event(1))
        logits = intercept + (overall * local * standardized) @ x.mT
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return Posterior(2 * num_features + 2, model)


def neural_network(hidden: int = 20) -> Posterior:
    """A Bayesian neural network with one hidden layer on scikit-learn's diabetes data."""
    features, targets = load_diabetes(return_X_y=True)
    x = torch.as_tensor(features, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    y = torch.as_tensor(targets, dtype=torch.float32)
    y = (y - y.mean()) / y.std()
    width = x.shape[1]

    def model() -> None:
        first = pyro.sample(
            "first", dist.Normal(torch.zeros(width, hidden), width**-0.5).to_event(2)
        )
        offset = pyro.sample("offset", dist.Normal(torch.zeros(hidden), 1.0).to_event(1))
        last = pyro.sample("last", dist.Normal(torch.zeros(hidden), hidden**-0.5).to_event(1))
        level = pyro.sample("level", dist.Normal(0.0, 1.0)).unsqueeze(-1)
        noise = pyro.sample("noise", dist.LogNormal(-0.5, 0.5)).unsqueeze(-1)
        hidden_values = torch.tanh(x @ first + offset.unsqueeze(-2))
        mean = (hidden_values @ last.unsqueeze(-1)).squeeze(-1) + level
        pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    return Posterior(width * hidden + 2 * hidden + 2, model)


def banana(dim: int = 20, curvature: float = 0.03) -> Posterior:
    """``x₁ ~ N(0, 10²)``, ``x₂ ~ N(curvature (x₁² − 10²), 1)``, the others N(0, 1).

    Haario, Saksman, Tamminen. Adaptive proposal distribution for random walk Metropolis
    algorithm. Computational Statistics, 1999.
    """

    def model() -> None:
        first = pyro.sample("first", dist.Normal(0.0, 10.0))
        pyro.sample("second", dist.Normal(curvature * (first.square() - 100.0), 1.0))
        pyro.sample("others", dist.Normal(torch.zeros(dim - 2), 1.0).to_event(1))

    return Posterior(dim, model, 0.0)


def funnel(dim: int = 20) -> Posterior:
    """``v ~ N(0, 3²)``, ``x_i ~ N(0, eᵛ)``. Neal. Slice sampling. Annals of Statistics, 2003."""

    def model() -> None:
        log_variance = pyro.sample("log_variance", dist.Normal(0.0, 3.0))
        scale = torch.exp(log_variance / 2).unsqueeze(-1)
        pyro.sample("x", dist.Normal(torch.zeros(dim - 1), scale).to_event(1))

    return Posterior(dim, model, 0.0)


#: By name, each made when it is wanted.
POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "Cox process, D = 256": lambda: cox_process(16),
    "Cox process, D = 900": lambda: cox_process(30),
    "Cox process, D = 2500": lambda: cox_process(50),
    "horseshoe regression, D = 62": horseshoe_regression,
    "neural network, D = 242": neural_network,
    "conjugate Gaussian, D = 512": conjugate_gaussian,
    "banana, D = 20": banana,
    "funnel, D = 20": funnel,
}
