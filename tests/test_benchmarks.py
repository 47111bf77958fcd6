"""The benchmarks measure what they say, and print it: on small sizes.

The peers of one layer are an extra of their own; without them its tests skip themselves.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from scipy.integrate import solve_ivp

from pyro_snf.vectorization import can_vectorize

PEERS = ("FrEIA", "nflows", "normflows", "zuko")
# Float64; Pyro's exponential is a series that is cut off.
EXACT = 1e-6


def tables(text: str) -> list[list[list[str]]]:
    """Markdown tables, as rows of cells, the header among them: all rows are as long as it."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1] and not line.startswith("|--"):
            found.append([])
    found = [rows for rows in found if rows]
    assert all(len(row) == len(rows[0]) for rows in found for row in rows)
    return found


@pytest.fixture
def linear(benchmark_modules: None) -> ModuleType:
    for peer in PEERS:
        pytest.importorskip(peer)
    return importlib.import_module("linear")


@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_every_log_det_and_inverse(linear: ModuleType) -> None:
    dim = 6
    for name, entry in linear.METHODS.items():
        if "Householder" in name:  # more reflections than features
            continue
        method = entry.make(dim)
        with torch.no_grad():
            for parameter in method.parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(2, dim)
        method.evaluate(False)

        def forward(row: torch.Tensor, method: object = method) -> torch.Tensor:
            return method.forward(row[None])[0].reshape(dim)

        z, log_det = method.forward(x)
        if log_det is not None:
            jacobian = torch.autograd.functional.jacobian(forward, x[0])
            expected = torch.linalg.slogdet(jacobian).logabsdet
            assert abs(log_det.reshape(-1)[0] - expected) < EXACT, name
        # nflows' own inverse calls what torch has removed.
        if method.inverse is not None and name != "nflows NaiveLinear":
            with torch.no_grad():
                back = method.inverse(z.reshape(2, dim)).reshape(2, dim)
            assert torch.allclose(back, x, atol=EXACT), name


@pytest.mark.filterwarnings("ignore")
def test_small_run_writes_its_results(linear: ModuleType, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    arguments = [
        "--dims",
        "64",
        "128",
        "--batches",
        "1",
        "128",
        "--seconds",
        "0.01",
        "--turns",
        "1",
    ]
    methods = ["nn.Linear", "refined", "exact", "slogdet", "pyro Householder, 16"]
    linear.main([*arguments, "--methods", *methods, "--threads", "1", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "result.json").read_text())
    assert len(rows) == 4 * len(methods)
    assert all(row["step_ms"] > 0 and row["peak_matrices"] >= 0 for row in rows)
    inverses = [row for row in rows if "inverse_ms" in row and row["method"] in methods[1:4]]
    assert len(inverses) == 6
    assert all(row["inverse_residual"] < 1e-5 for row in inverses)
    assert (tmp_path / "batch1.png").stat().st_size > 1000


@pytest.fixture
def conv(benchmark_modules: None) -> ModuleType:
    return importlib.import_module("conv")


def test_kernels_have_the_condition_number_that_is_asked_for(conv: ModuleType) -> None:
    kernel = conv.kernel_of_condition(1, (6, 6), 50.0, torch.Generator().manual_seed(0))
    matrix = conv.kernels.matrix(kernel, (6, 6), "zeros")
    assert torch.linalg.cond(matrix).item() == pytest.approx(50.0, rel=EXACT)
    before = conv.moved(kernel, (6, 6), torch.Generator().manual_seed(0))
    change = matrix - conv.kernels.matrix(before, (6, 6), "zeros")
    drift = torch.linalg.solve(matrix - change, change, left=False).norm() / 6
    assert drift.item() == pytest.approx(conv.control_variate_log_det._MAX_DRIFT, rel=EXACT)


def test_gradients_of_convolutions(
    conv: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "gradient.png"
    arguments = ["--images", "1,6,6", "--num-kernels", "2", "--picture", str(picture)]
    conv.main(["gradient", *arguments])
    ((_, *rows),) = tables(capsys.readouterr().out)
    errors = {(name, count): row for name, count, *row in rows}
    at_100 = {key: float(row[2]) for key, row in errors.items() if key[1] in ("0", "3")}
    assert at_100["refined, factors", "3"] < at_100["learned kernel 3 × 3", "0"]
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("command", ["step", "exact"])
def test_times_of_convolutions(
    conv: ModuleType, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)
    arguments = ["--images", "1,6,6", "2,4,4", "--threads", "1"]
    if command == "step":
        arguments += ["--batch", "4", "--seconds", "0.01", "--turns", "1"]
    conv.main([command, *arguments])
    ((_, *rows),) = tables(capsys.readouterr().out)
    assert len(rows) == 2


@pytest.fixture
def free_form(benchmark_modules: None) -> ModuleType:
    torch.set_default_dtype(torch.float32)
    return importlib.import_module("free_form")


def test_the_bias_of_refined_falls(
    free_form: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dim", "6", "--batch", "3", "--sizes", "0.1", "0.3", "--num-steps", "2"]
    free_form.main(["bias", *arguments])
    ((_, *rows),) = tables(capsys.readouterr().out)
    assert len(rows) == 3
    for row in rows[:2]:
        errors = [float(cell.split(" ")[0]) for cell in row[1:]]
        assert all(after < before for before, after in pairwise(errors[1:6]))
        assert errors[-1] < EXACT


# torch's forward mode scripts its decompositions, in a way that torch itself warns of.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("command", "arguments", "num_rows"),
    [
        ("products", ["--dims", "3", "5", "--widths", "4", "4", "--turns", "1"], [2, 2]),
        ("probes", ["--krylov-steps", "0", "1", "--turns", "1"], [3, 3]),
        ("value", ["--turns", "1"], [5]),
        ("time", ["--dims", "2", "3", "--batch", "2", "--turns", "1", "--num-steps", "1"], [2]),
    ],
)
def test_tables_of_pairs(
    free_form: ModuleType,
    command: str,
    arguments: list[str],
    num_rows: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command != "time":
        arguments = [*arguments, "--num-steps", "2", "--num-draws", "2"]
    free_form.main([command, *arguments])
    found = tables(capsys.readouterr().out)
    assert [len(rows) - 1 for rows in found] == num_rows


@pytest.mark.usefixtures("benchmark_modules")
def test_folds_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    folds = importlib.import_module("folds")
    folds.main(["--data", "narrow", "eight", "--rates", "1e-3", "--num-steps", "2", "--batch", "4"])
    ((_, *rows),) = tables(capsys.readouterr().out)
    assert [row[4:6] for row in rows] == [["0.00 %", "0.00 %"]] * 4
    assert [row[6] for row in rows[2:]] == ["nan", "nan"]
    # Of x², at 1, −2, 3, halfway 2, −½, ½, and beyond 4, 2½, −4½.
    trial = folds.Trial("line", 1e-3, "exact", is_conditional=False, seed=0)
    trial.pair.forward_net = torch.nn.Identity()
    trial.pair.forward_net.forward = torch.square
    share = trial.share_of_other_signs(torch.tensor([[1.0], [-2.0], [3.0]]))
    assert share == pytest.approx(3 / 9)


@pytest.mark.usefixtures("benchmark_modules")
def test_folds_with_a_context_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    folds = importlib.import_module("folds")
    folds.main(["--conditional", "--rates", "1e-3", "--num-steps", "2", "--batch", "4"])
    ((_, *rows),) = tables(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["moons", "moons", "rings", "rings", "corners", "corners"]
    assert [row[4:6] for row in rows] == [["0.00 %", "0.00 %"]] * 6
    assert all(abs(float(row[6]) - 1) < 0.005 for row in rows)
    # f squares the first coordinate along the context, so that points of both signs fold.
    trial = folds.Trial("moons", 1e-3, "exact", is_conditional=True, seed=0)

    def along(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        first = (x * context).sum(1)
        second = x[:, 1] * context[:, 0] - x[:, 0] * context[:, 1]
        return torch.stack([first.square(), second], dim=1)

    trial.pair.transform.forward_net = torch.nn.Identity()
    trial.pair.transform.forward_net.forward = along
    points = torch.tensor([[1.0, 0.3], [-2.0, 0.1], [3.0, 0.2]])
    assert trial.share_of_other_signs(points) == pytest.approx(3 / 9)
    with pytest.raises(SystemExit):
        folds.main(["--conditional", "--data", "line"])


@pytest.mark.parametrize(
    ("network", "copula"), [("mlp", True), ("conv", False), ("conv + mlp", False)]
)
def test_densities_of_pairs(
    free_form: ModuleType,
    network: str,
    copula: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"network": network, "width": 8, "num_blocks": 1, "spline": True, "copula": copula}
    monkeypatch.setitem(free_form.SETTINGS, "learned", options)
    arguments = ["--settings", "learned", "--num-steps", "3", "--every", "2"]
    free_form.main(["digits", *arguments, "--output", str(tmp_path)])
    ((header, row),) = tables(capsys.readouterr().out)
    found = dict(zip(header, row, strict=True))
    # After three steps, the pair is the identity but for a little.
    assert found["det J > 0"] == found["T.inv(T(x)) = x"] == "100.0%"
    result = json.loads((tmp_path / "free_form_learned_0.json").read_text())
    assert float(found["test NLL"]) == pytest.approx(result["nll"], abs=0.01)
    assert list(result["validation"]) == ["2", "3"]


@pytest.fixture
def posteriordb_models(benchmark_modules: None) -> ModuleType:
    return importlib.import_module("posteriordb_models")


SCHOOLS = {"y": [28, 8, -3], "sigma": [15, 10, 16]}
SERIES = [1.0, 2.0, 4.0, 3.0, 5.0, 2.0]
POSTERIORDB = {
    "eight_schools_noncentered": SCHOOLS,
    "eight_schools_centered": SCHOOLS,
    "kidscore_momhsiq": {"kid_score": SERIES, "mom_hs": [0, 1, 0, 1, 1, 0], "mom_iq": SERIES[::-1]},
    "gp_pois_regr": {"x": [-2, 0, 2], "k": [3, 5, 1]},
    "arK": {"y": SERIES, "K": 2},
    "mesquite": dict.fromkeys(
        ["weight", "diam1", "diam2", "canopy_height", "total_height", "density", "group"], SERIES
    ),
    "kilpisjarvi": {"x": SERIES, "y": SERIES[::-1]}
    | {"pmualpha": 0.0, "psalpha": 1.0, "pmubeta": 0.0, "psbeta": 1.0},
    "logearn_interaction": {"earn": SERIES, "height": SERIES[::-1], "male": [0, 1, 0, 1, 1, 0]},
    "garch11": {"y": SERIES, "sigma1": 0.5},
    "lotka_volterra": {"y_init": [30, 4], "y": [[47.2, 6.1], [70.2, 9.8]]},
    "low_dim_gauss_mix": {"y": SERIES},
    "hmm_drive_0": {"u": SERIES, "v": SERIES[::-1], "alpha": [[4, 2], [2, 4]]},
}


@pytest.mark.parametrize("name", POSTERIORDB)
def test_particles_of_posteriordb_models(posteriordb_models: ModuleType, name: str) -> None:
    """Particles in a plate have the densities that they have one by one."""
    _, define = posteriordb_models.POSTERIORS[name]
    model, quantities, start = define(POSTERIORDB[name])
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=start))
    guide()
    particles = pyro.plate("particles", 3, dim=-1)
    with particles:
        draws = {name: value.detach() for name, value in guide().items()}

    def together() -> None:
        with particles:
            model()

    def log_density(model: Callable[[], None], draws: dict[str, torch.Tensor]) -> torch.Tensor:
        trace = poutine.trace(poutine.condition(model, draws)).get_trace()
        trace.compute_log_prob()
        sites = [trace.nodes[name] for name in trace.nodes if name != "particles"]
        return sum(site["log_prob"] for site in sites if site["type"] == "sample")

    apart = [
        log_density(model, {name: value[i] for name, value in draws.items()}) for i in range(3)
    ]
    assert torch.allclose(log_density(together, draws), torch.stack(apart), atol=EXACT)
    assert all(value.shape[0] == 3 for value in quantities(draws).values())


def test_predators_and_prey(posteriordb_models: ModuleType) -> None:
    rates, start = torch.tensor([[0.55, 0.8]]), torch.tensor([[-0.2, -1.8]])
    inputs = (rates.requires_grad_(), start.requires_grad_(), 20)
    path = posteriordb_models.PredatorPrey.apply(*inputs)
    ((r1, r2),) = rates.tolist()
    solution = solve_ivp(
        lambda _, state: [r1 - math.exp(state[1]), math.exp(state[0]) - r2],
        (0, 20),
        start[0].tolist(),
        method="DOP853",
        t_eval=range(21),
        rtol=1e-10,
        atol=1e-10,
    )
    assert torch.allclose(path[0], torch.from_numpy(solution.y.T), atol=EXACT)
    assert torch.autograd.gradcheck(posteriordb_models.PredatorPrey.apply, inputs)


def test_linear_recurrence(posteriordb_models: ModuleType) -> None:
    first, inputs, factor = torch.rand(2, 1), torch.rand(2, 6), torch.rand(2, 1)
    expected = [first]
    for column in inputs.split(1, dim=-1):
        expected.append(column + factor * expected[-1])
    found = posteriordb_models.linear_recurrence(first, inputs, factor)
    assert torch.allclose(found, torch.cat(expected, dim=-1))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def load(benchmark_modules: None) -> Callable[[str], ModuleType]:
    """Imports a benchmark by its name, for the length of a test."""
    return importlib.import_module


def write_zipped(path: Path, content: object) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.name.removesuffix(".zip"), json.dumps(content))


def test_posteriordb_is_not_repeated(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    posteriordb = load("posteriordb")
    monkeypatch.setattr(posteriordb, "NUM_STEPS", (4, 5, 6))
    monkeypatch.setattr(posteriordb, "NUM_DRAWS", 50)
    monkeypatch.setattr(posteriordb, "NUM_WARMUP", 2)
    write_zipped(tmp_path / "data-kidiq.json.zip", POSTERIORDB["kidscore_momhsiq"])
    names = ["beta[1]", "beta[2]", "beta[3]", "sigma"]
    draws = [{name: torch.randn(20).tolist() for name in names}]
    write_zipped(tmp_path / "draws-kidiq-kidscore_momhsiq.json.zip", draws)
    path = tmp_path / "results.jsonl"
    arguments = ["--posteriors", "kidscore_momhsiq", "--seeds", "0", "--results", str(path)]
    arguments += ["--data-dir", str(tmp_path), "--nuts-seconds", "0.01"]
    posteriordb.main(["run", *arguments])
    rows = rows_of(path)
    assert [row["method"] for row in rows] == ["fit"] * 3 + list(posteriordb.METHODS[1:])
    assert all(row["mean"] > 0 and row["seconds"] > 0 for row in rows)
    posteriordb.main(["run", *arguments])
    assert rows_of(path) == rows
    posteriordb.main(["run", "--methods", "fit", "--num-starts", "2", *arguments])
    assert len(rows_of(path)) == len(rows) + 3
    capsys.readouterr()
    posteriordb.main(["table", "--results", str(path)])
    for _, row, _ in tables(capsys.readouterr().out):
        assert row[:2] == ["kidscore_momhsiq", "4"]
        assert "–" not in row


@pytest.mark.parametrize(
    "make", ["horseshoe_regression", "neural_network", "banana", "funnel", "conjugate_gaussian"]
)
def test_particles_of_posteriors(load: Callable[[str], ModuleType], make: str) -> None:
    torch.set_default_dtype(torch.float32)
    options = {"dim": 6} if make == "conjugate_gaussian" else {}
    posterior = getattr(load("posteriors"), make)(**options)
    guide = AutoNormal(posterior.model)
    assert can_vectorize(posterior.model, guide, (), {}, 0)
    assert sum(value.numel() for value in guide().values()) == posterior.dim


def test_divergence_of_gaussians(load: Callable[[str], ModuleType]) -> None:
    posteriors = load("posteriors")
    posterior = posteriors.conjugate_gaussian(6, 1e3)
    covariance = posterior.gaussian.tril @ posterior.gaussian.tril.mT
    exact = torch.distributions.MultivariateNormal(posterior.gaussian.mean, covariance)
    guide = AutoMultivariateNormal(posterior.model)
    guide()
    expected = torch.distributions.kl_divergence(guide.get_posterior(), exact).item()
    assert posterior.gaussian.divergence_from(guide) == pytest.approx(expected)
    # −ELBO − (−log evidence) is the same, up to the noise of its estimate.
    loss, error = posteriors.evaluate(posterior.model, guide, 500)
    assert abs(loss - posterior.negative_log_evidence - expected) < 5 * error


def test_guides_take_turns(load: Callable[[str], ModuleType]) -> None:
    turns = load("turns")
    posterior = load("posteriors").conjugate_gaussian(4)
    with pyro.settings.context(module_local_params=True):
        guides = {
            "one": AutoNormal(posterior.model),
            "two": AutoMultivariateNormal(posterior.model),
        }
        before = load("posteriors").evaluate(posterior.model, guides["one"], 200)[0]
        lengths = turns.train(posterior.model, guides, learning_rate=0.01, seconds=0.5)
        assert load("posteriors").evaluate(posterior.model, guides["one"], 200)[0] < before
    for length in lengths.values():
        assert length.steps > 10
        assert length.seconds >= 0.5
        assert length.seconds < 0.5 + 100 * length.seconds / length.steps  # the last step ends late


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")  # Pyro's
def test_a_guide_that_diverges_is_left_as_it_is(load: Callable[[str], ModuleType]) -> None:
    turns, posteriors = load("turns"), load("posteriors")
    posterior = posteriors.banana()
    with pyro.settings.context(module_local_params=True):
        guides = {
            "one": AutoNormal(posterior.model),
            "two": AutoMultivariateNormal(posterior.model),
        }
        lengths = turns.train(posterior.model, guides, learning_rate=1e200, seconds=60.0)
        assert all(length.steps < 25 for length in lengths.values())
        for guide in guides.values():
            assert not math.isfinite(posteriors.evaluate(posterior.model, guide, 10)[0])


def test_fit_as_long_as_other_guides(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("zuko")
    torch.set_default_dtype(torch.float32)
    guides = load("guides")

    monkeypatch.setattr(guides, "NUM_TIMED_STEPS", 4)
    monkeypatch.setattr(guides, "seconds_for", lambda dim: 0.2)
    monkeypatch.setattr(guides, "CHOICES", {"all": {"AutoNormal": (AutoNormal, math.inf)}})
    path = tmp_path / "results.jsonl"
    arguments = ["--posteriors", "banana, D = 20", "--results", str(path), "--seeds", "0"]
    for command in ("fit", "fit", "run"):
        guides.main([command, *arguments])
    found, *others = rows_of(path)
    assert found["guide"] == "fit"
    assert found["seconds"] == pytest.approx(found["steps"] * found["ms_per_step"] / 1e3)
    assert [row["guide"] for row in others] == ["AutoNormal"] * 3
    capsys.readouterr()
    guides.main(["table", "--results", str(path)])
    assert tables(capsys.readouterr().out)


def test_a_conjugate_gaussian(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    conjugate = load("conjugate")

    monkeypatch.setattr(conjugate, "NUM_SAMPLES", 50)
    path = tmp_path / "results.jsonl"
    arguments = ["--dim", "4", "--conditions", "100", "--num-steps", "4", "60"]
    arguments += ["--results", str(path)]
    for _ in range(2):
        conjugate.main(["run", *arguments])
    rows = rows_of(path)
    assert len(rows) == 2 * len(conjugate.METHODS)
    divergences = [row["divergence"] for row in rows if row["method"] == "fit, num_layers=1"]
    assert divergences[1] < 0.1 < divergences[0]
    capsys.readouterr()
    conjugate.main(["table", *arguments])
    ((_, *lines),) = tables(capsys.readouterr().out)
    assert [line[1] for line in lines] == list(conjugate.METHODS)


def test_condition_numbers(
    load: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    condition = load("condition")

    target = condition.make_target(5, 1e4, seed=0)
    assert torch.linalg.cond(target.tril).item() ** 2 == pytest.approx(1e4)
    assert torch.linalg.det(target.tril).item() == pytest.approx(1.0)
    path, picture = tmp_path / "results.jsonl", tmp_path / "picture.png"
    arguments = ["--dims", "4", "--conditions", "1", "100", "--max-steps", "25"]
    arguments += ["--results", str(path), "--picture", str(picture)]
    for _ in range(2):
        condition.main(["run", *arguments])
    rows = rows_of(path)
    assert len(rows) == 2 * (2 + 3 * len(condition.RATES))
    assert all((row["divergence"] < condition.GOAL) == (row["steps"] < math.inf) for row in rows)
    assert rows[0]["steps"] < math.inf
    capsys.readouterr()
    condition.main(["table", *arguments])
    ((_, *lines),) = tables(capsys.readouterr().out)
    assert len(lines) == len(condition.METHODS)
    assert lines[-1][2:4] == ["> 25", "> 25"]
    condition.main(["plot", *arguments])
    assert picture.stat().st_size > 1000


def test_a_killed_process_costs_no_result_but_its_own(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    results, path = load("results"), tmp_path / "results.jsonl"
    results.append(path, {"seed": 0})
    with path.open("a") as file:
        file.write('{"seed": 1, "el')
    assert results.load(path) == [{"seed": 0}]
    results.append(path, {"seed": 2})
    assert results.load(path) == [{"seed": 0}, {"seed": 2}]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is read from /proc")
def test_long_runs_stay_accurate(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)
    path = tmp_path / "long_run.jsonl"
    arguments = ["--dim", "16", "--num-steps", "150", "--print-every", "50", "--output", str(path)]
    rows = load("long_run").main(arguments)
    assert rows == rows_of(path)
    assert [row["step"] for row in rows] == [50, 100, 150]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(0 < row["value_error"] < 0.1 for row in rows)
    assert all(row["ms"] > 0 and row["megabytes"] > 0 for row in rows)
    ((_, *lines),) = tables(capsys.readouterr().out)
    assert len(lines) == 3


def test_glow_has_a_loss_for_every_step(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)
    glow, path = load("glow"), tmp_path / "glow.jsonl"
    arguments = ["run", "--results", str(path), "--kinds", "blobs", "--rates", "3e-3"]
    arguments += ["--num-steps", "1", "--hidden-channels", "4", "--steps", "3"]
    glow.main(arguments)
    glow.main(arguments)  # does not repeat what is there
    (row,) = rows_of(path)
    assert (len(row["losses"]), row["error"]) == (3, None)
    assert all(0 < loss < 8 for loss in [*row["losses"], row["test"]])
    assert row["inverse error"] < 1e-5
    capsys.readouterr()
    glow.main(["table", "--results", str(path)])
    ((header, line),) = tables(capsys.readouterr().out)
    assert dict(zip(header, line, strict=True))["images"] == "blobs"


def test_sampling_measures_every_inverse(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)
    sampling, path = load("sampling"), tmp_path / "sampling.jsonl"
    maps = ["dense, D = 64", "pair, D = 10", "dense + autoregressive, 32 hidden, D = 64"]
    arguments = ["--train-steps", "3", "--turns", "1", "--batch", "4", "--results", str(path)]
    sampling.main(["run", "--maps", *maps, *arguments])
    rows = rows_of(path)
    found = [(row["map"], row["log_det"], row["inverse"]) for row in rows]
    every = ["iterative", "exact", "one_pass"]
    kinds = [
        *(("refined", name) for name in every),
        *(("learned", name) for name in every),
        ("exact", "exact"),
    ]
    pair = [(method, name) for method in ("refined", "learned") for name in every[::2]]
    assert found == [
        *((maps[0], *kind) for kind in kinds),
        *((maps[1], *kind) for kind in pair),
        *((maps[2], *kind) for kind in kinds[:3]),
    ]
    for row in rows:
        assert row["inverse"] == "one_pass" or row["error"] < 1e-4
        assert all(row[name] > 0 for name in ("first", "seconds", "T(x)", "error"))
    sampling.main(["table", "--results", str(path)])
    ((_, *lines),) = tables(capsys.readouterr().out)
    assert len(lines) == len(rows)


def test_densities(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: object,
) -> None:
    densities = load("densities")
    monkeypatch.setattr(densities.density_fitting, "_clock", densities.density_fitting._clock)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(count, 3, generator=generator) for count in (60, 20, 20)]
    monkeypatch.setattr(densities, "load", lambda name, seed: densities.Table(*parts))
    options = ["--seconds", "0.05", "--tables", "magic", "--output-dir", str(tmp_path)]
    for _ in range(2):  # what is there is not run again
        densities.main(["run", *options, "--models", "tabular", "pyro-spline-ar"])
    lines = (tmp_path / "seed-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == ["tabular", "pyro-spline-ar"]
    assert all(math.isfinite(json.loads(line)["test NLL"]) for line in lines)
    densities.main(["table", "--output-dir", str(tmp_path)])
    assert "| magic (60 × 3) |" in capsys.readouterr().out
    assert (tmp_path / "densities.png").exists()
    assert densities._roundings(
        torch.tensor([[1.0, 0.25, 1 / 3], [5.0, 0.5, 0.1]]).numpy()
    ).tolist() == [1.0, 0.01, 0.0]
