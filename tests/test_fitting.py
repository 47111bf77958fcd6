"""fit: guides of all kinds, how it stops, what it reports, several starts, bad options."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro import infer, poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints

from pyro_snf import AutoSelfNormalizingFlow, Fit, fit, fitting
from pyro_snf import progress as progress_bar
from pyro_snf.optim import NaturalGradient
from tests.registry import all_equal
from tests.test_guides import parameters_of

# Posterior means and deviations, of 1 or so: Adam's last steps are of 10⁻⁴, and so is their noise.
TRAINED = 0.03
# A loss in nats, averaged over 20 steps of 8 draws, the deviation of which is below 0.2.
LOSS = 0.06
# Means of 4,000 draws: five standard errors.
SAMPLED = 0.08

OBSERVED = 1.0
MEAN, SCALE = 0.5, 0.5**0.5
LOG_EVIDENCE = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(OBSERVED)).item()

quietly = pytest.mark.filterwarnings("ignore:the loss was still falling")


def gaussian() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(OBSERVED))


def skewed() -> None:
    pyro.sample("rate", dist.Exponential(1.0))


def by_hand() -> None:
    """A guide without a class."""
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.6), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def start(values: dict[str, Any]) -> dict[str, Any]:
    """An option of Pyro's guides."""
    return {"init_loc_fn": init_to_value(values=values)}


NEAR = start({"z": torch.tensor(0.3, dtype=torch.float64)})


def one_start(model: Any, guide: Any, *args: Any, **options: Any) -> Fit:
    """From the guide's own location."""
    return quiet(model, guide, *args, num_starts=1, **options)


def ours(model: Callable[..., Any] = gaussian, num_layers: int = 1, **options: Any) -> Any:
    return AutoSelfNormalizingFlow(model, num_layers, **options)


GUIDES: dict[str, Callable[[], Any]] = {
    "ours": ours,
    "ours learned": lambda: ours(log_det="learned", init_scale=0.6, **NEAR),
    "AutoNormal": lambda: AutoNormal(gaussian, init_scale=0.6, **NEAR),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(gaussian, init_scale=0.6, **NEAR),
    "by hand": lambda: by_hand,
}


def quiet(model: Any, guide: Any, *args: Any, **options: Any) -> Fit:
    return fit(model, guide, *args, **{"progress": False, "seed": 0, **options})


def draws_of(guide: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([guide(*args, **kwargs)["z"] for _ in range(4000)])


class Counting:
    """A model that counts the calls with gradients, and does something in them.

    :param action: called with the number of the call, from 1.
    """

    def __init__(self, action: Callable[[int], None] = lambda number: None, model: Any = gaussian):
        self.action, self.model = action, model
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.model(*args, **kwargs)
        if torch.is_grad_enabled():
            self.count += 1
            self.action(self.count)


def failing(at: Callable[[int], bool], error: BaseException) -> Counting:
    """A model that raises an error at some steps."""

    def action(number: int) -> None:
        if at(number):
            raise error

    return Counting(action)


# --- Guides and models --------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
def test_guide(name: str) -> None:
    guide = GUIDES[name]()
    num_steps = 60 if name == "ours" else 200
    result = quiet(gaussian, guide, num_steps=num_steps, tolerance=None)
    assert result.reason == "num_steps"
    if name != "ours learned":  # which has no value of the log-determinant
        assert result.loss == pytest.approx(-LOG_EVIDENCE, abs=LOSS)
    trace = poutine.trace(guide).get_trace()
    if name == "by hand":
        found = pyro.param("loc").item(), pyro.param("scale").item()
    elif name.startswith("ours"):
        layer = guide.last_layer
        found = layer.bias.item(), layer.weight.abs().item()
    else:
        levels = guide.quantiles([0.5, 0.841344746])["z"]
        found = levels[0].item(), (levels[1] - levels[0]).item()
    assert trace.nodes["z"]["value"].shape == ()
    assert found == pytest.approx((MEAN, SCALE), abs=2 * TRAINED)


@quietly
@pytest.mark.parametrize("num_particles", [1, 8])
def test_particles_are_drawn_in_one_call_where_the_model_allows_it(num_particles: int) -> None:
    model = Counting()
    one_start(model, ours(model), num_steps=10, num_particles=num_particles)
    assert model.count == 10


def wide() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(600), 1.0).to_event(1))


def wide_sums() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(600), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(4.0))


@quietly
@pytest.mark.parametrize(
    ("make", "model", "num_particles", "is_vectorized"),
    [
        (ours, wide, 18, True),  # 600/32
        (ours, wide_sums, 8, False),
        (AutoNormal, wide, 8, True),
        (ours, gaussian, 8, True),
    ],
)
def test_default_number_of_particles(
    make: Any,
    model: Any,
    num_particles: int,
    is_vectorized: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []

    class Recorded(infer.Trace_ELBO):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.append((self.num_particles, self.vectorize_particles))

    monkeypatch.setattr(fitting, "Trace_ELBO", Recorded)
    counting = Counting(model=model)
    guide = make(counting)
    one_start(counting, guide, num_steps=2)
    assert found == [(num_particles, is_vectorized)]
    assert counting.count == 2 * (1 if is_vectorized else num_particles)


def test_most_particles_are_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_DIMENSIONS_PER_PARTICLE", 8)
    guide = ours(wide)
    guide()
    for num_particles, expected in ((None, 64), (100, 100), (1, 1)):
        elbo = fitting._make_elbo(wide, guide, (), {}, num_particles)
        assert elbo.num_particles == expected


def sums() -> None:
    """A sum over all draws, if there are several."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(4.0))


def test_particles_are_drawn_in_turn_where_the_model_mixes_them() -> None:
    model = Counting(model=sums)
    guide = ours(model)
    result = one_start(model, guide, num_steps=100, num_particles=4, tolerance=None)
    assert model.count == 400
    # The posterior covariance is I − 11ᵀ/4, its mean 1.
    layer = guide.last_layer
    covariance = torch.eye(3) - 0.25
    assert torch.allclose(layer.bias, torch.ones(3), atol=TRAINED)
    assert torch.allclose(layer.weight @ layer.weight.mT, covariance, atol=TRAINED)
    evidence = dist.Normal(0.0, 2.0).log_prob(torch.tensor(4.0)).item()
    assert result.losses[-10:].mean() == pytest.approx(-evidence, abs=LOSS)


def test_enumerated_site_is_summed_out() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z + 2 * k, 2.0), obs=torch.tensor(1.0))

    result = quiet(model, ours(poutine.block(model, hide=["k"])), num_steps=100, tolerance=None)
    marginal = dist.Normal(torch.tensor([0.0, 2.0]), 5**0.5).log_prob(torch.tensor(1.0))
    evidence = (marginal + torch.tensor([0.7, 0.3]).log()).logsumexp(0).item()
    assert result.loss == pytest.approx(-evidence, abs=LOSS)  # the posterior is almost Gaussian


@quietly
def test_subsampled_data() -> None:
    data = torch.linspace(1.0, 3.0, 40)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 40, subsample_size=20) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    guide = ours(model)
    quiet(model, guide, num_steps=150)
    # The noise of 20 rows is half of that of the posterior, in variance.
    assert guide.last_layer.bias.item() == pytest.approx(2.0, abs=40**-0.5)


@quietly
def test_arguments_are_passed_on() -> None:
    def model(data: Tensor, scale: float = 1.0) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(z, scale), obs=data)

    def guide(data: Tensor, scale: float = 1.0) -> None:
        seen.append((len(data), scale))
        by_hand()

    seen: list[tuple[int, float]] = []
    data = torch.tensor([1.0, 2.0, 3.0])
    flow = ours(model)
    quiet(model, flow, data, num_steps=80, scale=0.5)
    assert flow.last_layer.bias.item() == pytest.approx(6 / 3.25, abs=TRAINED)
    assert flow.last_layer.weight.abs().item() == pytest.approx(13**-0.5, abs=TRAINED)
    quiet(model, guide, data, num_steps=2, scale=0.5)
    assert set(seen) == {(3, 0.5)}


def test_parameters_are_trained_in_place() -> None:
    guide = ours()
    guide()
    before = list(guide.parameters())
    quiet(gaussian, guide, num_steps=60)
    assert all(one is other for one, other in zip(before, guide.parameters(), strict=True))
    assert guide.last_layer.recording.get() is None


class WithParameter(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.mean = PyroParam(torch.tensor(1.5))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(self.mean, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=torch.tensor([0.0, 1.0, 3.0, 4.0]))


@quietly
@pytest.mark.parametrize("name", ["ours", "AutoNormal"])
def test_modules_that_own_their_parameters(name: str) -> None:
    runs = []
    for is_local in (False, True):
        pyro.clear_param_store()
        with pyro.settings.context(module_local_params=is_local):
            model = WithParameter()
            guide = ours(model, 2) if name == "ours" else AutoNormal(model, init_scale=0.5)
            optim = None if name == "ours" else Adam({"lr": 0.05})
            result = quiet(model, guide, num_steps=60, optim=optim, tolerance=None)
            assert (len(pyro.get_param_store()) == 0) == is_local
            assert abs(model.mean.item() - 1.5) > 0.05  # they have been trained
            assert abs(model.scale.item() - 0.5) > 0.05
            parameters = [*guide.parameters(), *model.parameters()]
            assert all(
                parameter.grad is None or not parameter.grad.any() for parameter in parameters
            )
            runs.append((result.losses.tolist(), result.start_losses))
    assert runs[0] == runs[1]


@quietly
def test_guide_in_eval_mode_is_trained() -> None:
    guide = ours().eval()
    quiet(gaussian, guide, num_steps=60)
    assert guide.last_layer.bias.item() == pytest.approx(MEAN, abs=TRAINED)


@quietly
def test_guide_is_in_eval_mode_afterwards() -> None:
    guide = ours(skewed)
    fit(skewed, guide, num_steps=30, seed=0, progress=False, tolerance=None)
    assert not any(module.training for module in guide.modules())

    def differentiate() -> None:  # at an extreme point, to which samplers go
        guide.transform(torch.full((1,), 1e3)).exp().sum().backward()

    differentiate()
    guide.train()
    with pytest.raises(torch.linalg.LinAlgError, match="NaN, infinite"):
        differentiate()


@quietly
def test_guide_of_a_plate_of_another_size_is_refused() -> None:
    def model(count: int, num_data: int = 3) -> None:
        with pyro.plate("groups", count):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", num_data):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(num_data))

    options = {"num_steps": 3, "seed": 0, "progress": False, "tolerance": None}
    for guide in (AutoSelfNormalizingFlow(model), AutoNormal(model)):
        fit(model, guide, 3, **options)
        fit(model, guide, 3, num_data=5, **options)  # in which no site is sampled
        with pytest.raises(ValueError, match=r"plate 'groups' to be of size 3.*; got 4: make"):
            fit(model, guide, 4, **options)


@quietly
def test_optimizer_of_the_user() -> None:
    for make in (lambda guide: Adam({"lr": 1e-2}), lambda guide: NaturalGradient(guide, 60)):
        pyro.clear_param_store()
        guide = ours()
        guide()
        optim = make(guide)
        before = parameters_of(guide)
        result = quiet(gaussian, guide, num_steps=20, optim=optim, tolerance=None)
        assert result.num_steps == 20
        assert not all_equal(before, parameters_of(guide))
    assert optim.num_calls == 20


def test_nothing_to_train_is_an_error() -> None:
    guide = ours()
    with pytest.raises(RuntimeError, match="expected gradients to be recorded"), torch.no_grad():
        one_start(gaussian, guide, num_steps=3)
    guide()
    guide.requires_grad_(False)
    with pytest.raises(RuntimeError, match="expected parameters to train"):
        one_start(gaussian, guide, num_steps=3)


# --- How it stops -------------------------------------------------------------------------------


def test_natural_gradients_stop_at_the_posterior() -> None:
    guide = ours()
    result = one_start(gaussian, guide, num_steps=2000)
    assert result.reason == "converged"
    assert result.num_steps < 60
    assert not result.is_falling
    assert guide.last_layer.bias.item() == pytest.approx(MEAN, abs=TRAINED)
    assert guide.last_layer.weight.abs().item() == pytest.approx(SCALE, abs=TRAINED)


def test_two_steps_at_the_posterior_may_be_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    step = NaturalGradient._step_dense

    def with_luck(self: NaturalGradient) -> bool:
        found = step(self)
        self.is_at_posterior = self.num_calls in (3, 4)
        return found

    monkeypatch.setattr(NaturalGradient, "_step_dense", with_luck)
    result = fit(skewed, AutoSelfNormalizingFlow(skewed), num_steps=20, seed=0, progress=False)
    assert (result.num_steps, result.reason) == (20, "num_steps")


def test_other_optimizers_stop_when_converged() -> None:
    def exact() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(MEAN)), SCALE))

    result = quiet(gaussian, exact, num_steps=2000, tolerance=0.1)
    assert result.reason == "converged"
    assert result.num_steps % 25 == 0
    assert 200 <= result.num_steps <= 300


def test_no_stop_without_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_FIRST_CHECK", 50)
    # The logarithm of an exponential variable: no Gaussian, so that the gradient's noise remains.
    result = one_start(skewed, ours(skewed), num_steps=300, tolerance=10.0)
    assert (result.num_steps, result.reason) == (150, "converged")  # 50, and 100 for the decay
    result = one_start(gaussian, ours(), num_steps=160, tolerance=None)
    assert (result.num_steps, result.reason) == (160, "num_steps")


@pytest.mark.parametrize("number", [2, 5, 30])
def test_interrupt_returns_what_there_is(number: int) -> None:
    model = failing(lambda count: count == number, KeyboardInterrupt())
    guide = ours(model, 2)
    result = one_start(model, guide, num_steps=100, tolerance=None)
    assert result.reason == "interrupted"
    assert result.losses.shape == (number - 1,)
    assert np.isfinite(result.losses).all()
    assert guide.sample_posterior(3)["z"].shape == (3,)
    assert isinstance(result.plot(), Figure)
    assert f"{number - 1} steps in" in str(result)
    result = one_start(gaussian, guide, num_steps=50, tolerance=None)
    assert result.num_steps == 50  # and it goes on


@pytest.mark.parametrize("num_starts", [1, 4])
def test_interrupt_in_the_first_step(num_starts: int) -> None:
    model = failing(lambda count: True, KeyboardInterrupt())
    result = quiet(model, ours(model), num_steps=100, num_starts=num_starts)
    assert result.num_steps == 0
    assert model.count == 1
    assert result.reason == "interrupted"
    assert math.isnan(result.loss)
    assert "stopped: interrupted" in str(result)
    with pytest.raises(ValueError, match="at least one of each"):  # there is nothing to be seen
        result.plot()


def broken(is_bad: Callable[[int], bool]) -> Counting:
    """The Gaussian model; its density is NaN at some steps."""

    def action(number: int) -> None:
        log_factor = torch.tensor(math.nan if is_bad(number) else 0.0)
        pyro.sample("bad", dist.Unit(log_factor, validate_args=False), obs=torch.empty(0))

    return Counting(action)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("name", ["ours", "AutoNormal"])
def test_divergence(name: str) -> None:
    model = broken(lambda number: number > 5)
    guide = GUIDES[name]()
    with pytest.warns(UserWarning, match="the loss was not finite in 100 steps in a row"):
        result = quiet(model, guide, num_starts=1, num_steps=200)
    assert result.reason == "diverged"
    assert result.losses.shape == (105,)
    assert np.isnan(result.losses[5:]).all()
    assert "stopped: diverged" in str(result)


@pytest.mark.filterwarnings("ignore:Encountered NaN", "ignore:the loss was not finite")
def test_plot_of_a_divergence() -> None:
    model = broken(lambda number: True)
    assert isinstance(one_start(model, ours(model), num_steps=200).plot(), Figure)


@pytest.mark.parametrize(("rise", "is_told"), [(0.0, False), (0.5, False), (3.0, True)])
def test_warning_if_the_loss_has_risen(rise: float, is_told: bool) -> None:
    noise = np.random.default_rng(0).standard_t(2, 1000)
    losses = np.where(np.arange(1000) < 600, 5.0, 5.0 + rise) + noise
    losses[[10, 900]] = math.nan, math.inf
    assert (fitting._rise(losses) > 0) == is_told
    assert fitting._rise(losses[::-1]) == 0
    assert fitting._rise(losses[::10]) == 0  # too few to tell


def test_warning_if_the_loss_is_still_falling() -> None:
    guide = AutoNormal(gaussian, init_scale=1e-3, **start({"z": torch.tensor(50.0)}))
    with pytest.warns(UserWarning, match="still falling after 40 steps: take more"):
        result = quiet(gaussian, guide, num_steps=40, optim=Adam({"lr": 1e-2}))
    assert result.is_falling
    assert "nats, still falling" in str(result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not one_start(gaussian, ours(), num_steps=100).is_falling


EVERY_ERROR = pytest.mark.parametrize(
    "error",
    [torch.linalg.LinAlgError("not positive definite"), ValueError("not in the support")],
    ids=["LinAlgError", "ValueError"],
)


@EVERY_ERROR
def test_errors_of_the_model_at_some_steps(error: Exception) -> None:
    model = failing(lambda count: 2 <= count < 40 and count % 7 == 0, error)
    guide = ours(model)
    result = one_start(model, guide, num_steps=150)
    assert np.flatnonzero(np.isnan(result.losses)).tolist() == [6, 13, 20, 27, 34]
    assert result.loss == pytest.approx(-LOG_EVIDENCE, abs=LOSS)
    assert guide.last_layer.bias.item() == pytest.approx(MEAN, abs=TRAINED)


@pytest.mark.parametrize("case", ["at the first step", "another guide", "another error"])
def test_errors_that_are_raised(case: str) -> None:
    error: Exception = torch.linalg.LinAlgError("singular")
    if case == "another error":
        error = RuntimeError("singular")
    model = failing(lambda count: count == (1 if case == "at the first step" else 3), error)
    guide = AutoNormal(model) if case == "another guide" else ours(model)
    with pytest.raises(type(error), match="singular"):
        quiet(model, guide, num_starts=1, num_steps=10)


def test_error_at_every_step_is_a_divergence() -> None:
    model = failing(lambda count: count > 1, torch.linalg.LinAlgError("singular"))
    with pytest.warns(UserWarning, match="the loss was not finite in 100 steps in a row"):
        assert one_start(model, ours(model), num_steps=200).reason == "diverged"


# --- Seeds --------------------------------------------------------------------------------------


@quietly
def test_seed_makes_it_reproducible() -> None:
    def losses(seed: int | None) -> list[float]:
        pyro.clear_param_store()
        return quiet(gaussian, ours(num_layers=2), num_steps=20, seed=seed).losses.tolist()

    expected = losses(3)
    assert losses(3) == expected
    pyro.set_rng_seed(3)
    assert losses(None) == expected
    assert losses(None) != expected  # the generators went on, and were not seeded anew


# --- What it shows ------------------------------------------------------------------------------


@quietly
@pytest.mark.parametrize(
    ("progress", "seconds", "num_lines"), [(True, 0.0, 6), (True, 10.0, 0), (False, 0.0, 0)]
)
def test_progress_without_a_terminal(
    progress: bool,
    seconds: float,
    num_lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_LINES", seconds)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    fit(gaussian, ours(), num_steps=6, progress=progress)
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == num_lines
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"step {number} of 6, −ELBO [-\d.e+]+", line)


@quietly
def test_progress_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(gaussian, ours(), num_steps=6)
    output = capsys.readouterr()
    assert output.out == ""
    assert "6/6" in output.err
    assert "−ELBO" in output.err


def test_figure() -> None:
    result = one_start(gaussian, ours(), num_steps=120, tolerance=None)
    (axes,) = result.plot().axes
    assert axes.get_xlabel() == "step"
    (line,) = axes.get_lines()
    assert line.get_label() == "−ELBO"
    assert np.array_equal(line.get_xydata(), np.stack([np.arange(1, 121), result.losses], axis=1))
    low, high = axes.get_ylim()
    assert low < result.loss < high


@quietly
@pytest.mark.parametrize("num_steps", [1, 7])
def test_figure_of_a_few_steps(num_steps: int) -> None:
    assert isinstance(one_start(gaussian, ours(), num_steps=num_steps).plot(), Figure)


def test_result() -> None:
    result = Fit(np.arange(30.0), "num_steps", False, 1.25)
    assert result.num_steps == 30
    assert result.loss == 28.0  # of the last three
    assert str(result) == repr(result) == "30 steps in 1.2 s, stopped: num_steps\n−ELBO: 28 nats"
    result = Fit(np.ones(5), "converged", True, 1.0, [1.0, 2.5])
    assert str(result).splitlines()[1:] == ["−ELBO: 1 nats, still falling", "of the starts: 1, 2.5"]


# --- Several starts -----------------------------------------------------------------------------


class Bimodal:
    """Modes of deviation 0.1 at −0.3, with a weight of 2 %, and at 1.5."""

    modes = (-0.3, 1.5)
    weights = (0.02, 0.98)

    def __call__(self) -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        parts = [
            math.log(weight) + dist.Normal(mode, 0.1).log_prob(z)
            for mode, weight in zip(self.modes, self.weights, strict=True)
        ]
        pyro.factor("density", torch.stack(torch.broadcast_tensors(*parts)).logsumexp(0))


@pytest.mark.parametrize("num_starts", [1, 5])
def test_several_starts_find_the_higher_mode(num_starts: int) -> None:
    model = Bimodal()
    guide = ours(model)
    result = quiet(model, guide, num_steps=200, num_starts=num_starts, tolerance=None)
    index = int(num_starts > 1)
    assert guide.last_layer.bias.item() == pytest.approx(model.modes[index], abs=0.01)
    # At each mode, what is missing is the other one.
    assert result.loss == pytest.approx(-math.log(model.weights[index]), abs=LOSS)
    # Each of the others has taken 10 of the 200 steps.
    assert result.num_steps == 200 - 10 * (num_starts - 1)
    if num_starts == 1:
        assert result.start_losses == []
        return
    assert len(result.start_losses) == 5
    assert result.start_losses[0] == pytest.approx(-math.log(0.02), abs=0.3)
    assert min(result.start_losses) == pytest.approx(-math.log(0.98), abs=0.3)
    assert "of the starts: " in str(result)


@pytest.mark.parametrize(
    ("num_steps", "num_starts", "num_trial_steps"),
    [(41, 4, 3), (40, 20, 2), (4, 4, 1)],
)
@quietly
def test_trials_are_part_of_the_steps(
    num_steps: int, num_starts: int, num_trial_steps: int
) -> None:
    model = Counting()
    result = quiet(model, ours(model), num_steps=num_steps, num_starts=num_starts, tolerance=None)
    assert model.count == num_steps
    assert len(result.start_losses) == num_starts
    assert result.num_steps == num_steps - (num_starts - 1) * num_trial_steps


@quietly
@pytest.mark.parametrize(
    ("case", "num_starts"),
    [("fresh", 4), ("called", 1), ("optim", 1), ("learned", 1), ("AutoNormal", 1)],
)
def test_default_number_of_starts(case: str, num_starts: int) -> None:
    guide = GUIDES[{"learned": "ours learned"}.get(case, case if case in GUIDES else "ours")]()
    if case == "called":
        guide()
    optim = NaturalGradient(guide, 20) if case == "optim" else None
    result = quiet(gaussian, guide, num_steps=500, optim=optim, tolerance=None)
    assert len(result.start_losses) == (0 if num_starts == 1 else num_starts)
    assert result.num_steps == 500 - 25 * (num_starts - 1)


@quietly
def test_first_of_several_starts_is_the_guides_own() -> None:
    # The same random numbers, and no decay so early: the first trial is the run of one start.
    losses = quiet(gaussian, ours(), num_steps=100, num_starts=1).losses[:5]
    pyro.clear_param_store()
    result = quiet(gaussian, ours(), num_steps=100, num_starts=2)
    assert result.start_losses[0] == pytest.approx(losses[-1], rel=1e-9)


@pytest.mark.parametrize("number", [2, 7])
def test_interrupt_in_a_trial_stops(number: int) -> None:
    # Of two starts with 5 steps each; the second one is some 100 deviations away.
    def narrow() -> None:
        pyro.sample("z", dist.Normal(0.0, 0.01))

    def interrupt(count: int) -> None:
        if count == number:
            raise KeyboardInterrupt

    model = Counting(interrupt, narrow)
    guide = ours(model)
    result = quiet(model, guide, num_steps=100, num_starts=2)
    assert result.reason == "interrupted"
    assert model.count == number
    assert result.num_steps == min(number - 1, 5)  # those of the first start, which is better
    assert guide.sample_posterior(3)["z"].shape == (3,)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_start_that_diverges_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # It was the last one of two: what goes on has not diverged.
    monkeypatch.setattr(fitting, "_MAX_FAILURES", 5)
    model = broken(lambda number: 5 < number <= 10)
    result = quiet(model, ours(model), num_steps=100, num_starts=2, tolerance=None)
    assert result.start_losses[1] == math.inf
    assert result.reason == "num_steps"
    assert result.num_steps == 95
    assert np.isfinite(result.losses).all()


@EVERY_ERROR
def test_start_at_which_the_model_raises_an_error_is_not_kept(error: Exception) -> None:
    # At all steps of the second and the fourth start, the first ones included.
    model = failing(lambda count: 5 < count <= 10 or 15 < count <= 20, error)
    result = quiet(model, ours(model), num_steps=100, num_starts=4, tolerance=None)
    assert [math.isfinite(loss) for loss in result.start_losses] == [True, False, True, False]
    assert result.num_steps == 85
    assert result.loss == pytest.approx(-LOG_EVIDENCE, abs=LOSS)


# --- Bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({name: value}, f"expected {name}, an integer >= 1; got {value!r}")
            for name in ("num_steps", "num_particles", "num_starts")
            for value in (0, 2.5)
        ],
        ({"num_steps": None}, "expected num_steps, an integer >= 1; got None"),
        ({"num_steps": 3, "num_starts": 4}, "expected fewer starts"),
        ({"num_steps": 1, "num_starts": 2}, "expected fewer starts"),
        *[
            ({"tolerance": value}, f"expected tolerance > 0; got {value!r}")
            for value in (0, -1.0, math.nan, "a")
        ],
        ({"progress": "yes"}, "expected progress to be True or False; got 'yes'"),
        ({"optim": "adam"}, "expected optim, one of Pyro's, or None; got 'adam'"),
        ({"optim": torch.optim.Adam}, "expected optim, one of Pyro's, or None; got"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(gaussian, ours(), **options)


def test_several_starts_of_another_guide() -> None:
    message = "expected num_starts=1 with an optim, and for guides that NaturalGradient is not for"
    adam = Adam({"lr": 0.1})
    for guide, optim in [
        (AutoNormal(gaussian), None),
        (ours(log_det="learned"), None),
        (ours(), adam),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(gaussian, guide, num_starts=2, optim=optim)
