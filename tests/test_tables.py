"""Flows of tables: a copula, splines that depend on what comes before, and a fit in one line."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import ConditionalTransformModule
from torch import Tensor, nn

from pyro_snf import (
    ActNorm,
    Compose,
    ConditionalCompose,
    ConditionalSplineAutoregressive,
    GaussianCopula,
    SelfNormalizingLinear,
    SplineAutoregressive,
    conditional_self_normalizing_linear,
    conditional_self_normalizing_pair,
    density_fitting,
    fit_density,
    flows,
    self_normalizing_pair,
)
from tests.registry import CONDITIONAL_SPLINES, by_pickle

# Float64: a few operations.
EXACT = 1e-9
# Of inverses, times the condition numbers of random splines.
INVERSE = 1e-6

CONDITIONAL = pytest.mark.parametrize(
    "make", CONDITIONAL_SPLINES.values(), ids=list(CONDITIONAL_SPLINES)
)
Make = Callable[[], ConditionalTransformModule]


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def skewed(count: int = 400, seed: int = 0) -> Tensor:
    """Columns in different units: skewed, bounded, and one that depends on them."""
    first, second, noise = rows(count, 3, seed).unbind(1)
    return torch.stack([1e4 * first.exp(), 1e-3 * second.sigmoid(), 3 * first + second + noise], 1)


def density_of(
    flow: nn.Module, dim: int, dtype: torch.dtype | None = None
) -> dist.TransformedDistribution:
    base = dist.Normal(torch.zeros(dim, dtype=dtype), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [flow.inv])


# --- Conditional splines ------------------------------------------------------------------------


@CONDITIONAL
def test_values_of_each_context(make: Make) -> None:
    module = make().double().eval()
    dim = 3 if hasattr(module, "parts") else module.transform.input_dim
    x, context = rows(5, dim), rows(5, 2, 1)
    transform = module.condition(context)
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    assert log_det.shape == (5,)
    for row in range(5):
        single = module.condition(context[row])
        jacobian = torch.autograd.functional.jacobian(single, x[row])
        assert torch.allclose(single(x[row]), y[row], atol=EXACT)
        value = torch.linalg.slogdet(jacobian).logabsdet
        assert torch.allclose(value, log_det[row], atol=EXACT)
    assert torch.allclose(transform.inv(y.detach().clone()), x, atol=INVERSE)
    # One context for many events, and many contexts for one event.
    assert module.condition(context[0])(x).shape == (5, dim)
    assert transform(x[0]).shape == transform.forward_shape(x[0].shape) == (5, dim)
    assert transform.inv(x[0]).shape == (5, dim)
    assert not torch.allclose(module.condition(context + 1)(x), y)
    for other in (copy.deepcopy(module), by_pickle(module)):
        assert torch.equal(other.condition(context)(x), transform(x))


@CONDITIONAL
def test_gradients_reach_contexts_and_networks(make: Make) -> None:
    module = make().double()
    dim = 3 if hasattr(module, "parts") else module.transform.input_dim
    x, context = rows(5, dim), rows(5, 2, 1).requires_grad_()

    def value() -> Tensor:
        transform = module.condition(context)
        y = transform(x)
        return (y.square().sum(-1) / 2 - transform.log_abs_det_jacobian(x, y)).sum()

    (gradient,) = torch.autograd.grad(value(), context)
    step = 1e-6 * rows(5, 2, 2)
    with torch.no_grad():
        context += step
        above = module.eval() and value()
        context -= 2 * step
        below = value()
    assert math.isclose(above - below, 2 * (gradient * step).sum(), rel_tol=1e-5)


def test_refused_contexts() -> None:
    flow = flows.tabular(3, hidden_dim=8, context_dim=2)
    for bad, message in [
        (torch.ones(4, 3), r"shape \(..., 2\)"),
        (torch.ones(4, 2).long(), "floating-point context"),
        (torch.ones(4, 2, dtype=torch.float16), "dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow.condition(bad)
    with pytest.raises(ValueError, match="broadcasts with the context's"):
        flow.condition(torch.ones(4, 2))(rows(5, 3))
    with pytest.raises(ValueError, match="expected to be conditioned"):
        SplineAutoregressive(3, context_dim=2)(torch.ones(5, 3))


# --- The copula ---------------------------------------------------------------------------------


def test_copula_makes_columns_normal() -> None:
    x = skewed(4000)
    copula = GaussianCopula(3)
    copula.initialize(x)
    y = copula(x)
    assert torch.allclose(y.mT.cov(), torch.eye(3), atol=0.02)
    skewness = ((y - y.mean(0)) / y.std(0)).pow(3).mean(0)
    assert skewness.abs().max() < 0.15
    # The density of new rows is near the truth, -E log p of the three columns.
    new = skewed(4000, 1)
    first, second, _ = rows(4000, 3, 1).unbind(1)
    entropy = 1.5 * (1 + math.log(2 * math.pi))
    jacobian = (math.log(1e4) + first).mean() + math.log(1e-3)
    jacobian += (second.sigmoid().log() + (-second).sigmoid().log()).mean()
    found = -density_of(copula.eval(), 3).log_prob(new).mean().item()
    assert found == pytest.approx((entropy + jacobian).item(), abs=0.06)


def test_copula_leaves_what_is_normal() -> None:
    x = rows(2000, 3) @ torch.tensor([[1.0, 2.0, 3.0], [0.0, 1e-2, 1.0], [0.0, 0.0, 0.1]])
    copula = GaussianCopula(3)
    copula.initialize(x)
    found = -density_of(copula.eval(), 3).log_prob(x).mean()
    normal = torch.distributions.MultivariateNormal(x.mean(0), x.mT.cov())
    assert found <= -normal.log_prob(x).mean() + 1e-3
    assert torch.allclose(copula.linear.weight.triu(1), torch.zeros(3, 3), atol=1e-9)


@pytest.mark.parametrize("correlation", [0.5, -0.9])
def test_copula_decorrelates_where_that_gains_enough(correlation: float) -> None:
    first, second = rows(20_000, 2).unbind(1)
    second = correlation * first + (1 - correlation**2) ** 0.5 * second
    x = torch.stack([first, 5 + 10 * second], dim=1)
    # The second feature becomes narrower by √(1 − ρ²).
    gain = -0.5 * math.log(1 - correlation**2)
    for min_gain, expected in [
        (0.9 * gain, 0.0),
        (1.1 * gain, correlation),
        (math.inf, correlation),
    ]:
        copula = GaussianCopula(2, min_gain=min_gain)
        copula.initialize(x)
        y = copula(x)
        assert torch.allclose(y.mean(0), torch.zeros(2), atol=1e-4)
        covariance = torch.tensor([[1.0, expected], [expected, 1.0]])
        assert torch.allclose(y.mT.cov(), covariance, atol=0.02)


def test_copula_decorrelates_all_where_that_gains_enough_on_average() -> None:
    first, second, third = rows(5000, 3).unbind(1)
    x = torch.stack([first, first + 0.1 * second, first + third], dim=1)
    # ½ log 2 for the third feature, some 2.3 for the second: 0.9 on average.
    for min_gain, expected in [(0.8, 0.0), (1.2, 0.5**0.5)]:
        copula = GaussianCopula(3, min_gain=min_gain)
        copula.initialize(x)
        assert torch.allclose(copula(x).mT.cov()[2, 0], torch.tensor(expected), atol=0.03)


@pytest.mark.parametrize("count", [2, 7, 20])
def test_copula_of_few_rows(count: int) -> None:
    copula = GaussianCopula(4)
    y = copula(rows(count, 4))
    assert torch.isfinite(y).all()
    assert copula.initialized


def test_copula_does_not_trust_the_ends_of_a_column() -> None:
    # Zeros, but for some rows: beyond them, a straight line that is not steep.
    x = torch.where(rows(3000, 1) > 1.5, rows(3000, 1, 1).exp(), 1e-3 * torch.rand(3000, 1))
    copula = GaussianCopula(1)
    copula.initialize(x)
    with torch.no_grad():
        far = torch.tensor([[3 * x.max()]])
        before = copula(far)
        assert before.abs() < 100
    # Nor does training make that line steeper.
    density, optimizer = density_of(copula, 1), torch.optim.Adam(copula.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (-density.log_prob(x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        assert copula(far).abs() < 2 * before.abs()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, 1].fill_(2.0), r"columns that vary; got equal values in the columns \[1\]"),
        (lambda x: x[:, 2].copy_(x[:, 0]), r"linear functions of others.* columns \[2\]"),
        (lambda x: x[:, 2].copy_(x[:, 0] - 2 * x[:, 1]), r"linear functions of .*columns \[2\]"),
        (lambda x: x[3, 1].fill_(math.nan), r"NaN or infinity in the columns \[1\]"),
    ],
)
def test_copula_of_bad_columns(change: Callable[[Tensor], object], message: str) -> None:
    x = rows(50, 3)
    change(x)
    flow = flows.tabular(3, hidden_dim=8)
    with pytest.raises(ValueError, match=message):
        flow.initialize(x)
    with pytest.raises(ValueError, match=message):
        flow(x)


def test_copula_warns_of_rounded_columns() -> None:
    x = rows(200, 2)
    x[:, 1] = x[:, 1].round()
    with pytest.warns(UserWarning, match=r"in the columns \[1\], one value .*rand_like"):
        GaussianCopula(2).initialize(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaussianCopula(2).initialize(rows(200, 2))


def test_set_weight() -> None:
    layer = SelfNormalizingLinear(3, log_det="refined")
    weight = torch.tensor([[1e3, 2.0, 0.0], [0.0, 1e-3, 0.0], [1.0, 1.0, 1.0]])
    layer.set_weight(weight)
    assert torch.allclose(layer.weight, weight, rtol=1e-9)
    assert torch.allclose(layer.inverse_weight @ weight, torch.eye(3), atol=1e-6)
    with pytest.raises(ValueError, match=r"weight, a tensor of shape \(3, 3\)"):
        layer.set_weight(torch.eye(2))


# --- fit_density --------------------------------------------------------------------------------


class Normal(nn.Module):
    """Normal in the plane, with a mean that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))

    def log_prob(self, x: Tensor) -> Tensor:
        return dist.Normal(self.mean, 1.0).to_event(1).log_prob(x)


def quick(data: Tensor, **options: object) -> density_fitting.DensityFit:
    torch.manual_seed(0)
    flow = flows.tabular(data.shape[1], hidden_dim=16, num_layers=1)
    return fit_density(flow, data, seed=0, progress=False, **{"num_epochs": 8, **options})


def test_fit_comes_to_the_entropy() -> None:
    angle = 6 * torch.rand(1500, generator=torch.Generator().manual_seed(0))
    data = torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * rows(1500, 2)
    copula = GaussianCopula(2)
    copula.initialize(data)
    before = -density_of(copula.eval(), 2).log_prob(data).mean()
    result = quick(data, num_epochs=25)
    assert result.loss < before - 0.5
    assert result.losses.shape == result.validation_losses.shape == (25,)
    assert (
        result.loss
        == result.validation_losses.min()
        == result.validation_losses[result.best_epoch - 1]
    )
    assert f"−log p(x) in validation: {result.loss:.4f} nats" in str(result)
    result.plot()
    # In eval() mode, the best parameters, whose samples are like the data.
    radius = result.density.sample((500,)).norm(dim=1)
    assert abs(radius.mean() - 1) < 0.15


def test_fit_keeps_what_it_starts_from_where_nothing_is_better() -> None:
    data, held_out = (rows(500, 1, seed) for seed in (0, 1))
    data, held_out = (torch.cat([x, x + 1e-5 * rows(500, 1, 2)], 1) for x in (data, held_out))
    copula = GaussianCopula(2)
    copula.initialize(data)
    before = -density_of(copula.eval(), 2).log_prob(held_out).mean().item()
    result = quick(data, num_epochs=1, validation=held_out)
    assert result.best_epoch == 0
    assert result.loss == pytest.approx(before, abs=1e-6)
    after = -result.density.log_prob(held_out).mean().item()
    assert after == pytest.approx(before, abs=1e-6)


def single_copula(x: Tensor) -> GaussianCopula:
    """In float32, which has seven digits."""
    copula = GaussianCopula(x.shape[1], dtype=torch.float32)
    copula.initialize(x.float())
    return copula.eval()


def loss_of(copula: GaussianCopula, x: Tensor) -> float:
    density = density_of(copula, x.shape[1], torch.float32)
    return -density.log_prob(x.float()).mean().item()


@pytest.mark.parametrize("outlier", [1e4, 1e8, 1e20])
def test_copula_of_a_column_with_an_outlier(outlier: float) -> None:
    x = rows(1000, 2, 1)
    x[0, 0] = outlier
    copula = single_copula(x)
    assert loss_of(copula, rows(1000, 2, 2)) == pytest.approx(2 * 1.4189, abs=0.15)
    sample = density_of(copula, 2, torch.float32).sample((4000,))[:, 0].double()
    quantiles = sample.quantile(torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(quantiles, torch.tensor([-1.28, 0.0, 1.28]), atol=0.15)


def test_copula_of_columns_over_many_orders_of_magnitude() -> None:
    # The entropy of a log-normal variable is ½ log 2πe + log σ + μ.
    for sigma in (1.0, 4.0, 6.0):
        x = (sigma * rows(3000, 2)).exp()
        assert loss_of(single_copula(x), x) == pytest.approx(
            2 * (1.4189 + math.log(sigma)), abs=0.25
        )


def test_copula_of_columns_whose_squares_are_no_numbers() -> None:
    x, units = rows(500, 3), torch.tensor([1e-170, 1.0, 1e170])
    x[:, 2] += 2 * x[:, 0]
    copulas = GaussianCopula(3), GaussianCopula(3)
    for copula, given in zip(copulas, (x, x * units), strict=True):
        copula.initialize(given)
    assert torch.allclose(copulas[0](x), copulas[1](x * units))
    with pytest.raises(ValueError, match="linear functions of others"):
        GaussianCopula(3).initialize(torch.stack([x[:, 0], x[:, 1], 1e170 * x[:, 0]], dim=1))


def test_copula_of_a_row_of_codes() -> None:
    x = rows(1000, 4)
    x[0] = 99999.0  # by itself, it makes all columns proportional
    assert loss_of(single_copula(x), rows(1000, 4, 1)) == pytest.approx(4 * 1.4189, abs=0.3)
    # Columns that are linear functions of others in all rows are refused all the same.
    x[:, 3] = x[:, 0] - 2 * x[:, 1]
    with pytest.raises(ValueError, match=r"in the columns \[3\]"):
        single_copula(x)


def test_copula_from_the_parameter_store_is_told() -> None:
    x, flow, other = skewed(), flows.tabular(3, hidden_dim=8), flows.tabular(3, hidden_dim=8)
    flow.initialize(x)
    other.eval()(x)  # new, and not a word of that
    pyro.module("flow", flow)
    saved = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(saved)
    pyro.module("flow", other, update_module_params=True)
    for use, is_training in [(other, False), (other.inv, False), (other.inv, True), (other, True)]:
        other.train(is_training).parts[0]._has_warned = False
        with pytest.warns(UserWarning, match="buffers, .* load the state_dict"):
            use(x)
        use(x)
    other.eval()
    other.load_state_dict(flow.state_dict())
    other.parts[0]._has_warned = False
    assert torch.equal(other(x), flow.eval()(x))


def test_copula_of_many_rows_in_a_periodic_order() -> None:
    period, count = 24, 24 * 2000
    x = rows(count, 2)
    x[:, 0] = torch.arange(count) % period + torch.rand(count)
    copula = GaussianCopula(2)
    state = torch.get_rng_state()
    copula.initialize(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert copula.mean[0].item() == pytest.approx(period / 2, abs=0.3)


def test_initialization_ends_with_the_last_part_that_needs_it() -> None:
    class Counting(ActNorm):
        calls = 0

        def _call(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super()._call(x)

    x = rows(300, 2)
    first, middle, last = (
        Counting(2, event_dim=1),
        ActNorm(2, event_dim=1),
        Counting(2, event_dim=1),
    )
    last.initialized.fill_(True)
    flow = Compose([first, Compose([middle]), last])
    flow.initialize(x)
    assert (first.calls, last.calls) == (1, 0)
    assert middle.initialized
    flow.initialize(x)
    assert (first.calls, last.calls) == (1, 0)


@pytest.mark.filterwarnings("ignore:training begins with latents far")
def test_fit_of_a_trained_flow_goes_on_from_it() -> None:
    context, other = rows(300, 2, 1), 5 + 3 * rows(300, 2, 2)
    options = {"validation": 0, "num_epochs": 1, "seed": 0, "progress": False}
    for flow, contexts in [
        (flows.tabular(2, hidden_dim=8, num_layers=1), [None, None]),
        (flows.tabular(2, hidden_dim=8, num_layers=1, context_dim=2), [context, other]),
        (Compose([ActNorm(2, event_dim=1), flows.tabular(2, hidden_dim=8)]), [None, None]),
        (ActNorm(2, event_dim=1), [None, None]),
        (GaussianCopula(2), [None, None]),
    ]:
        fit_density(flow, rows(300, 2), context=contexts[0], **options)
        before = copy.deepcopy(flow.state_dict())
        data = 100 + 9 * rows(300, 2, 3)
        fit_density(flow, data, context=contexts[1], learning_rate=1e-30, **options)
        after = flow.state_dict()
        names = [name for name in before if ".log_det." not in name]  # which has seen new weights
        assert [name for name in names if not torch.equal(before[name], after[name])] == []


def test_fit_warns_of_whole_numbers() -> None:
    data = 3 * rows(300, 2).round()
    flow = ActNorm(2, event_dim=1)
    with pytest.warns(UserWarning, match="whole numbers.*dequantize"):
        fit_density(flow, data, num_epochs=1, progress=False)
    with pytest.warns(UserWarning, match=r"few distinct values, \d+ among 600 .*dequantize"):
        fit_density(ActNorm(2, event_dim=1), data / 16, num_epochs=1, progress=False)
    fit_density(flow, data + torch.rand_like(data), num_epochs=1, progress=False)
    fit_density(Normal(), data, num_epochs=1, progress=False)  # which might dequantize


@pytest.mark.parametrize("factor", [1e4, 1e-4])
def test_fit_warns_of_latents_far_from_unit_scale(factor: float) -> None:
    data, options = factor * rows(300, 2), {"num_epochs": 1, "progress": False}
    flow = flows.fully_connected(2)
    with pytest.warns(UserWarning, match="latents far from unit scale: .* an ActNorm or"):
        fit_density(flow, data, **options)
    fit_density(Compose([ActNorm(2, event_dim=1), flow]), data, **options)
    base = dist.Normal(torch.zeros(2), factor).to_event(1)
    fit_density(flows.fully_connected(2), data, base=base, **options)
    images = factor * rows(20, 16).view(20, 1, 4, 4)  # the first batch initializes its layers
    fit_density(flows.glow((1, 4, 4), num_steps=1, hidden_channels=2), images, **options)


def test_fit_warns_of_latents_far_from_unit_scale_given_a_context() -> None:
    data, context = 1e4 * rows(300, 2), rows(300, 1, 1)
    flow = conditional_self_normalizing_linear(2, 1)
    options = {"context": context, "num_epochs": 1, "progress": False}
    with pytest.warns(UserWarning, match="latents far from unit scale: .* an ActNorm or"):
        fit_density(flow, data, **options)
    fit_density(ConditionalCompose([ActNorm(2, event_dim=1), flow]), data, **options)


@pytest.mark.parametrize("folds_at_the_end", [False, True])
def test_fit_tells_of_folds_that_last(folds_at_the_end: bool) -> None:
    class Square(nn.Module):
        """Folds at 0, until ``is_mended``."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += not torch.is_grad_enabled()
            is_mended = not folds_at_the_end and self.calls > 4
            return self.weight * (x if is_mended else x + x.square())

    flow = self_normalizing_pair(1, [4], log_det="refined")
    flow.forward_net = Square()
    options = {"validation": 0.5, "num_epochs": 3, "seed": 0, "progress": False}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit_density(flow, rows(200, 1), **options)
    told = [one for one in found if "not invertible" in str(one.message)]
    assert len(told) == folds_at_the_end


def test_fit_standardizes_the_contexts_of_every_conditional_flow() -> None:
    context = 1e6 + 1e5 * rows(300, 2, 1)
    for part in [
        conditional_self_normalizing_pair(2, 2, [8]),
        conditional_self_normalizing_linear(2, 2),
        ConditionalSplineAutoregressive(2, 2, 8),
    ]:
        for flow in (
            part,
            ConditionalCompose([ConditionalCompose([ActNorm(2, event_dim=1), part])]),
        ):
            part.context_scale.reset_parameters()
            options = {"validation": 0, "num_epochs": 1, "seed": 0, "progress": False}
            fit_density(flow, rows(300, 2), context=context, **options)
            scale = part.context_scale
            assert torch.allclose(scale.mean, context.mean(0))
            assert torch.allclose(scale.deviation, context.std(0, correction=0))


def test_fit_warns_of_validation_that_is_never_finite() -> None:
    held_out = rows(50, 2)
    held_out[3, 1] = 1e300
    with pytest.warns(UserWarning, match="validation data was not finite"):
        result = quick(rows(500, 2), validation=held_out)
    # What is there after all epochs, as without validation.
    assert result.best_epoch == len(result.losses) == 8
    other = quick(rows(500, 2), validation=0)
    found, expected = (one.density.log_prob(rows(9, 2)) for one in (result, other))
    assert torch.allclose(found, expected, atol=1e-5)


class Untested(Normal):
    """Has no finite loss outside training at first."""

    def log_prob(self, x: Tensor) -> Tensor:
        found = super().log_prob(x)
        is_early = not self.training and next(self.parameters()).norm() < 0.05
        return found * math.nan if is_early else found


def test_fit_keeps_the_first_that_can_be_validated_at_all() -> None:
    module, data = Untested(), 3 + 0.1 * rows(2000, 2)
    result = fit_density(module, data, num_epochs=60, learning_rate=0.05, seed=0, progress=False)
    assert result.best_epoch > 0
    assert torch.allclose(module.mean, torch.full((2,), 3.0), atol=0.1)
    assert result.loss == pytest.approx(1.838 + 0.01, abs=0.02)


def test_fit_that_is_interrupted_in_its_first_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(density_fitting._Run, "_mean_loss", interrupt)
    result = quick(skewed(), num_epochs=2)
    assert (result.reason, result.best_epoch, len(result.losses)) == ("interrupted", 0, 0)
    assert math.isnan(result.loss)


def test_fit_is_repeated_by_its_seed() -> None:
    first, second = (quick(skewed(), num_epochs=2) for _ in range(2))
    assert (first.losses == second.losses).all()


def test_fit_of_a_conditional_flow_from_images_to_vectors() -> None:
    data, context = rows(200, 4).unflatten(1, (1, 2, 2)), rows(200, 3, 1)
    parts = [flows.fully_connected((1, 2, 2)), conditional_self_normalizing_linear(4, 3)]
    flow = ConditionalCompose(parts)
    result = fit_density(flow, data, context=context, num_epochs=1, progress=False)
    density = result.density.condition(context[:5])
    assert density.log_prob(data[:5]).shape == (5,)
    assert density.event_shape == (1, 2, 2)


def test_fit_with_a_context() -> None:
    context = rows(1000, 1)
    data = 5 * context + rows(1000, 1, 1)
    flow = flows.tabular(1, hidden_dim=16, num_layers=1, context_dim=1)
    result = fit_density(flow, data, context=context, num_epochs=30, seed=0, progress=False)
    assert result.loss < 1.42 + 0.15  # that of the noise is ½ log 2πe = 1.42
    sample = result.density.condition(torch.tensor([[1.0], [-1.0]])).sample((400,))
    assert torch.allclose(sample.mean(0).flatten(), torch.tensor([5.0, -5.0]), atol=0.4)


class Scaled(Normal):
    """Divides by the latest batch's width, in ``eval()`` mode by the last one that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("width", torch.tensor(1e-3))

    def log_prob(self, x: Tensor) -> Tensor:
        if self.training:
            self.width.copy_(x.detach().std())
        return super().log_prob(x / self.width) - 2 * self.width.log()


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_fit_keeps_the_latest_buffers(validation: float) -> None:
    module, data = Scaled(), 100 * rows(1000, 2)
    options = {"validation": validation, "num_epochs": 20, "seed": 0, "progress": False}
    result = fit_density(module, data, **options)
    assert module.width.item() == pytest.approx(100, rel=0.1)
    assert result.best_epoch > 0
    assert result.loss == pytest.approx(2 * (1.419 + math.log(100)), abs=0.2)


def test_fit_goes_back_to_the_buffers_of_the_latest_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Normal):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(0))

        def log_prob(self, x: Tensor) -> Tensor:
            self.count += self.training
            return super().log_prob(x) + (math.nan if fails and self.training else 0)

    fails, calls, original = False, iter(range(100)), density_fitting._Run._step

    def fail_once(self: object, batch: object, share: float) -> float:
        nonlocal fails
        fails = next(calls) == 10
        return original(self, batch, share)

    monkeypatch.setattr(density_fitting._Run, "_step", fail_once)
    module = Counting()
    options = {"validation": 0, "batch_size": 25, "num_epochs": 4, "progress": False}
    fit_density(module, rows(100, 2), **options)
    # The eleventh of 16 steps goes back to the eighth.
    assert module.count == 8 + 5


@pytest.mark.parametrize(("failures", "share"), [([250, 500, 750], 1.0), ([250, 300, 301], 0.25)])
def test_fit_lowers_the_rate_where_failures_repeat(
    failures: list[int], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Normal):
        def log_prob(self, x: Tensor) -> Tensor:
            is_bad = self.training and next(calls) in failures
            return super().log_prob(x) + (math.nan if is_bad else 0)

    runs, calls, original = [], iter(range(1000)), density_fitting._Run.__init__

    def recorded(self: object, *arguments: object) -> None:
        runs.append(self)
        original(self, *arguments)

    monkeypatch.setattr(density_fitting._Run, "__init__", recorded)
    options = {"validation": 0, "batch_size": 25, "num_epochs": 225, "progress": False}
    result = fit_density(Failing(), rows(100, 2), learning_rate=1e-3, **options)
    assert runs[0].learning_rate == pytest.approx(1e-3 * share)
    assert result.reason == "num_epochs"


def test_fit_keeps_what_a_controller_has_found() -> None:
    flow = self_normalizing_pair(2, [16], log_det="exact")
    fit_density(flow, rows(500, 2), validation=0, num_epochs=20, seed=0, progress=False)
    # From where it starts, 7.07, it falls as f is almost linear; 40 steps are a factor of 0.45.
    assert flow.reconstruction.weight.weight.item() < 4
    assert flow.reconstruction.remembered_steps.norm() > 0


def test_fit_stops_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forty rows are soon learned by heart.
    monkeypatch.setattr(density_fitting, "_STEPS_OF_PATIENCE", 10)
    result = quick(rows(40, 3), validation=rows(40, 3, 1), num_epochs=1000)
    assert result.reason == "converged"
    assert len(result.losses) < 500
    assert result.loss == min(result.validation_losses)
    kept = -result.density.log_prob(rows(40, 3, 1)).mean().item()
    assert kept == pytest.approx(result.loss, abs=1e-6)


def changes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, bool]]:
    """The learning rate and the decay of weights after each change, and whether it was one."""
    found, original = [], density_fitting._Run._change

    def change(self: object, rows: object) -> bool:
        has_changed = original(self, rows)
        found.append((self.learning_rate, self.weight_decay, has_changed))
        return has_changed

    monkeypatch.setattr(density_fitting._Run, "_change", change)
    monkeypatch.setattr(density_fitting, "_STEPS_OF_PATIENCE", 10)
    return found


def test_fit_lowers_a_rate_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    changes, data = changes_of(monkeypatch), rows(512, 2)
    module = Normal()
    options = {"validation": data, "batch_size": 16, "learning_rate": 3.0, "seed": 0}
    result = fit_density(module, data, num_epochs=1000, progress=False, **options)
    assert result.reason == "converged"
    assert [one[0] for one in changes] == pytest.approx([0.9, 0.27, 0.27])
    assert [one[2] for one in changes] == [True, True, False]
    assert len({one[1] for one in changes}) == 1
    assert torch.allclose(module.mean, data.mean(0), atol=0.02)


def test_fit_takes_back_a_decay_that_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density_fitting, "_WEIGHT_DECAYS", (1e-3, 5.0, 25.0))
    changes = changes_of(monkeypatch)
    data = rows(40, 3)
    result = quick(data, validation=rows(40, 3, 1), num_epochs=1000)
    assert result.reason == "converged"
    # 1000/40 times 5; and then training stops.
    assert changes == [(6e-3, 125.0, True), (6e-3, 0.025, False)]


def test_fit_without_validation_and_with_little_time() -> None:
    result = quick(skewed(), validation=0, num_epochs=3)
    assert (result.best_epoch, len(result.validation_losses), result.reason) == (3, 0, "num_epochs")
    assert len(quick(rows(4, 3)).validation_losses) == 8  # a row, which is more than a tenth
    result = quick(skewed(), max_seconds=0.05, num_epochs=10_000)
    assert result.reason == "max_seconds"
    assert math.isfinite(result.loss)


def test_fit_of_any_module_with_a_log_prob() -> None:
    module, data = Normal(), 0.3 + rows(500, 2)
    result = fit_density(
        module, data, learning_rate=0.05, validation=0, num_epochs=60, progress=False
    )
    assert result.density is module
    assert torch.allclose(module.mean, data.mean(0), atol=0.1)


def test_fit_recovers_from_losses_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10_000))
    original = density_fitting._Run._step

    def fail_at_times(self: object, batch: object, share: float) -> float:
        if next(calls) in (5, 6):
            with torch.no_grad():
                next(iter(self.flow.parameters())).fill_(math.nan)
        return original(self, batch, share)

    monkeypatch.setattr(density_fitting._Run, "_step", fail_at_times)
    result = quick(skewed(), num_epochs=8)
    assert math.isfinite(result.loss)
    assert all(torch.isfinite(one).all() for one in result.density.transforms[0].parameters())
    monkeypatch.setattr(
        density_fitting._Run, "_step", lambda self, *_: setattr(self, "num_failures", 8) or math.nan
    )
    with pytest.warns(UserWarning, match="not finite 8 times"):
        assert quick(skewed()).reason == "diverged"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "num_epochs"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"validation": 1.0}, "validation"),
        ({"validation": "some"}, "validation"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"seed": -1}, "seed"),
        ({"base": 3}, "base"),
        ({"base": dist.Normal(0.0, 1.0)}, r"base, a distribution of shape \(3,\)"),
        ({"context": torch.ones(400, 1)}, "expected a conditional flow"),
        ({"context": torch.ones(400, 1)}, "got a context for Compose, which has none"),
        ({"context": torch.ones(3, 1)}, "as many contexts"),
        ({"data": torch.ones(5)}, r"shape \(N, ...\)"),
        ({"data": torch.full((5, 3), math.inf)}, "finite"),
        ({"data": torch.ones(5)}, r"got torch.float32 of shape \(5,\); one column is x.unsqueeze"),
        ({"data": torch.ones(5, 3).long()}, r"got torch.int64 of shape \(5, 3\), to be converted"),
        ({"data": skewed().numpy()}, "got ndarray"),
        (
            {"data": skewed().index_fill(0, torch.tensor([2, 7]), math.inf)},
            r"in 2 of 400 rows, in the columns \[0, 1, 2\]",
        ),
        ({"validation": rows(9, 2)}, r"shape \(N, 3\), as for training; got .* \(9, 2\)"),
        ({"validation": rows(9, 3).float()}, "float64 .* as for training; got torch.float32"),
        (
            {"data": rows(9, 3).float()},
            r"use data.to\(torch.float64\), or make the flow with dtype",
        ),
        ({"data": rows(9, 3).to_sparse()}, "got one of layout torch.sparse_coo"),
        ({"data": rows(1, 3).double(), "validation": 0}, "expected at least two rows"),
    ],
)
def test_fit_refuses(options: dict[str, object], message: str) -> None:
    given = {"data": skewed(), **options}
    with pytest.raises(ValueError, match=message):
        fit_density(flows.tabular(3, hidden_dim=8), progress=False, **given)
    with pytest.raises(ValueError, match="flow, a module"):
        fit_density(object(), skewed())


def test_fit_needs_gradients() -> None:
    flow = flows.tabular(3, hidden_dim=8)
    before = copy.deepcopy(flow.state_dict())
    with pytest.raises(RuntimeError, match="gradients to be recorded"), torch.no_grad():
        fit_density(flow, skewed())
    with pytest.raises(ValueError, match="parameters to train"):
        fit_density(flow.requires_grad_(False), skewed())
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())
