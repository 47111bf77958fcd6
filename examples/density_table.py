"""The density of a table with columns in different units, by `flows.tabular` and `fit_density`.

The rows are 569 tumours, the columns five measurements of their cells' nuclei, from 0.02 to 2501.
They are skewed, and they depend on each other by curves: the area is about π radius². For
comparison, a Gaussian and a mixture of Gaussians, by scikit-learn.

    python examples/density_table.py    # ten seconds; with seed 0:

    density   test NLL (nats)  behind     ±  area / radius²
    data                    –       –     –    3.01 to 3.15
    flow                 4.22       0     0    3.01 to 3.15
    mixture              4.64    0.42  0.13    2.98 to 3.18
    Gaussian             6.35    2.13   0.2    1.01 to 3.60

The negative log-likelihood is that of 150 rows that no density was fitted to, lower being better;
"behind" is by how much the flow is better, give or take a standard error. The last column has the
middle 90 % of area / radius², which is π for circles, in samples and in the data. In the picture,
density_table.png, the Gaussian has areas below zero, and misses the curves.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from common import finish, make_parser
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyro_snf import fit_density, flows

COLUMNS = ["mean radius", "mean area", "mean texture", "mean smoothness", "mean compactness"]
PAIRS = [(0, 1), (3, 4)]  # of columns, in the picture
NUM_TEST, BATCH_SIZE = 150, 128


def load_table() -> Tensor:
    """Shape ``(569, 5)``."""
    cells = load_breast_cancer()
    index = [list(cells.feature_names).index(name) for name in COLUMNS]
    return torch.tensor(cells.data[:, index], dtype=torch.get_default_dtype())


class Mixture:
    """Of Gaussians, as many as the Bayesian information criterion prefers."""

    def __init__(self, rows: Tensor, most: int, seed: int) -> None:
        self.mean, self.scale = rows.mean(0), rows.std(0)
        scaled = self._scaled(rows)
        options = {"n_init": 3, "random_state": seed, "reg_covar": 1e-4}
        fitted = [GaussianMixture(count + 1, **options).fit(scaled) for count in range(most)]
        self.fitted = min(fitted, key=lambda one: one.bic(scaled))

    def log_prob(self, rows: Tensor) -> Tensor:
        log_prob = torch.from_numpy(self.fitted.score_samples(self._scaled(rows)))
        return log_prob - self.scale.log().sum()

    def sample(self, shape: tuple[int]) -> Tensor:
        drawn = torch.from_numpy(self.fitted.sample(*shape)[0]).to(self.mean)
        return drawn * self.scale + self.mean

    def _scaled(self, rows: Tensor) -> np.ndarray:
        return ((rows - self.mean) / self.scale).double().numpy()


def plot(samples: dict[str, Tensor]) -> Figure:
    """Two pairs of columns; the axes are those of the data, in the first place, and a bit more."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    grid = figure.subplots(len(PAIRS), len(samples), sharex="row", sharey="row")
    for line, pair in zip(grid, PAIRS, strict=True):
        for axes, (name, rows) in zip(line, samples.items(), strict=True):
            color = "black" if name == "data" else "#0072B2" if name == "flow" else "#D55E00"
            axes.plot(*rows[:, pair].T, ".", color=color, markersize=3)
            axes.set(title=name if pair == PAIRS[0] else "", xlabel=COLUMNS[pair[0]])
        data = samples["data"][:, pair]
        low, high = data.amin(0), data.amax(0)
        (left, bottom), (right, top) = (low - 0.2 * (high - low)).tolist(), (1.1 * high).tolist()
        line[0].set(ylabel=COLUMNS[pair[1]], xlim=(left, right), ylim=(bottom, top))
    return figure


def main(argv: list[str] | None = None) -> list[dict]:
    args = make_parser(__doc__, num_steps=600).parse_args(argv)
    torch.manual_seed(args.seed)
    table = load_table()
    test, training = table[torch.randperm(len(table))].split([NUM_TEST, len(table) - NUM_TEST])

    flow = flows.tabular(len(COLUMNS))
    steps_an_epoch = math.ceil(0.9 * len(training) / BATCH_SIZE)  # a tenth is for validation
    num_epochs = math.ceil(args.num_steps / steps_an_epoch)
    options = {"num_epochs": num_epochs, "batch_size": BATCH_SIZE, "seed": args.seed}
    result = fit_density(flow, training, **options)
    print(result, end="\n\n")
    densities = {
        "flow": result.density,
        "mixture": Mixture(training, 8, args.seed),
        "Gaussian": Mixture(training, 1, args.seed),
    }
    rows, samples = [], {"data": table}
    with torch.no_grad():
        log_probs = {name: density.log_prob(test).double() for name, density in densities.items()}
        samples.update({name: one.sample((len(table),)) for name, one in densities.items()})
    for name, drawn in samples.items():
        low, high = np.quantile(drawn[:, 1] / drawn[:, 0].square(), [0.05, 0.95])
        row = {"density": name, "test NLL (nats)": "–", "behind": "–", "±": "–"}
        if name in log_probs:
            behind = log_probs["flow"] - log_probs[name]
            row["test NLL (nats)"] = -log_probs[name].mean().item()
            row["behind"] = behind.mean().item()
            row["±"] = behind.std().item() / NUM_TEST**0.5
        rows.append({**row, "area / radius²": f"{low:.2f} to {high:.2f}"})
    finish(rows, plot(samples), args.output_dir, "density_table")
    return rows


if __name__ == "__main__":
    main()
