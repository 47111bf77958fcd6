"""A variational autoencoder of digits, with a mean-field guide and with self-normalizing ones.

    z ~ Normal(0, I),    pixels ~ Binomial(16, logits = decoder(z))

A pixel of scikit-learn's 8 × 8 digits counts the black ones in a block of 4 × 4 of the scanned
image, so it is 0 to 16. ``--data-dir`` takes MNIST instead, each pixel black with the probability
of its grey value, drawn once, and Bernoulli. An encoder network turns an image c into the guide's

    mean field                z = diag(exp s(c)) ε + b(c),    ε ~ Normal(0, I)
    self-normalizing, rank 0  z = diag(exp s(c)) W ε + b(c)
    self-normalizing, rank r  z = diag(exp s(c)) W (I + U(c) V(c)ᵀ) ε + b(c)

Each guide has a decoder of its own. All start with the same weights and with the posterior
Normal(0, I), and see the same images in the same order, with the same noise and learning rates.

    python examples/vae.py                                # about a minute
    python examples/vae.py --data-dir DIR --epochs 10     # MNIST, about three

On one core, −ELBO in nats per test image, in brackets over the mean field, and the standard error
of that, which is of the images alone: another seed makes as much of a difference.

                        mean field    rank 0                  rank 2
    digits, seed 0         92.8       92.8  (0.1 ± 0.3)       93.0  (0.2 ± 0.4)
    digits, seed 1         93.1       93.9  (0.8 ± 0.5)       92.6 (−0.5 ± 0.5)
    digits, seed 2         93.5       93.4 (−0.2 ± 0.4)       92.6 (−1.0 ± 0.4)
    MNIST, seed 0         104.7      107.5  (2.8 ± 0.1)      107.0  (2.3 ± 0.1)

So a dense guide gains little or nothing here, and loses on MNIST. It fits the images it was trained
with better (digits, seed 0: 78.5, 77.5 and 77.2), but there are only 1297 of them. The likely
reason is that the decoder adapts. Trained along with a mean-field guide, it turns z until the
posteriors hardly have correlations: kept fixed then, it left 0.1 nats for a new guide with a W to
gain, on MNIST. Where W turned as well, fewer directions of z were in use after as many epochs.
Dense guides are for models that do not adapt to them, as in svi_guide.py.

Results are in outputs/vae: result.json, training.png, reconstructions.png, and samples.png.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from common import (
    format_table,
    late_limits,
    load_mnist,
    make_parser,
    mnist_folder,
    positive_float,
    positive_int,
    write_result,
)
from density_digits import load_data as load_digits
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import DenseNN, PyroModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from pyro_snf import conditional_self_normalizing_linear, plotting

MEAN_FIELD = "mean field"

#: Of MNIST's training images, for the curves.
NUM_VALIDATION = 1000
#: MNIST's grey values are made black or white once and for all, whatever the seed of the training.
BINARIZATION_SEED = 0

#: The share of the training in which the weight of z in the loss rises from 0 to 1.
ANNEALING = 0.3
#: Evaluations in a run, and the draws of z for each image in them and in the one at the end.
NUM_EVALUATIONS, NUM_DRAWS, NUM_FINAL_DRAWS = 30, 5, 100
#: Training images of which the final −ELBO is reported too.
NUM_SEEN = 1000
#: Images that are evaluated at once, and in a row of a picture.
EVALUATION_BATCH, COLUMNS = 50, 14


class Data(NamedTuple):
    """Images as rows of integers from 0 to ``levels``, in floating point, shape ``(N, pixels)``."""

    train: Tensor
    validation: Tensor
    test: Tensor
    levels: int


def load_data(args: argparse.Namespace) -> Data:
    """The images of the settings, on their device."""
    if args.data_dir is None:
        parts, levels = load_digits(), 16
    else:
        images, test = load_mnist(args.data_dir)
        generator = torch.Generator().manual_seed(BINARIZATION_SEED)
        grey = torch.cat([images, test]).to(torch.get_default_dtype()) / 255
        pixels = torch.bernoulli(grey, generator=generator)
        sizes = [len(images) - NUM_VALIDATION, NUM_VALIDATION, len(test)]
        parts, levels = pixels.split(sizes), 1
    return Data(*(part.to(args.device) for part in parts), levels)


class Decoder(PyroModule):
    """The model: latents z of shape ``(N, latent_dim)``, and given z independent pixels."""

    def __init__(self, num_pixels: int, levels: int, latent_dim: int, hidden: int) -> None:
        super().__init__()
        self.levels = levels
        self.latent_dim = latent_dim
        self.network = DenseNN(latent_dim, [hidden, hidden], [num_pixels])

    def forward(self, images: Tensor, annealing_factor: float = 1.0) -> None:
        prior = dist.Normal(images.new_zeros(self.latent_dim), 1.0).to_event(1)
        with pyro.plate("images", len(images), dim=-1):
            with poutine.scale(scale=annealing_factor):
                z = pyro.sample("z", prior)
            pyro.sample("pixels", self.pixels(z).to_event(1), obs=images)

    def pixels(self, z: Tensor) -> dist.Distribution:
        logits = self.network(z)
        if self.levels == 1:  # the same as a binomial distribution, in a tenth of the time
            return dist.Bernoulli(logits=logits)
        return dist.Binomial(self.levels, logits=logits)


class Guide(PyroModule):
    """Draws z of shape ``(N, latent_dim)`` from the posteriors of N images."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def posterior(self, context: Tensor) -> dist.Distribution:
        """The distribution of z given images with values from 0 to 1."""
        raise NotImplementedError

    def forward(self, images: Tensor, annealing_factor: float = 1.0) -> Tensor:
        posterior = self.posterior(images / self.levels)
        with pyro.plate("images", len(images), dim=-1), poutine.scale(scale=annealing_factor):
            return pyro.sample("z", posterior)


class MeanFieldGuide(Guide):
    """The usual one: independent normal distributions."""

    def __init__(self, num_pixels: int, levels: int, latent_dim: int, hidden: int) -> None:
        super().__init__(levels)
        self.encoder = DenseNN(num_pixels, [hidden, hidden], [latent_dim, latent_dim])
        nn.init.zeros_(self.encoder.layers[-1].weight)  # to start as the others do, at N(0, I)
        nn.init.zeros_(self.encoder.layers[-1].bias)

    def posterior(self, context: Tensor) -> dist.Distribution:
        loc, log_scale = self.encoder(context)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class SelfNormalizingGuide(Guide):
    """Normal distributions with a covariance each, for which all images share a matrix W."""

    def __init__(
        self, num_pixels: int, levels: int, latent_dim: int, hidden: int, *, rank: int
    ) -> None:
        super().__init__(levels)
        self.latent_dim = latent_dim
        self.transform = conditional_self_normalizing_linear(
            latent_dim, num_pixels, [hidden, hidden], rank=rank
        )

    def posterior(self, context: Tensor) -> dist.Distribution:
        base = dist.Normal(context.new_zeros(self.latent_dim), 1.0).to_event(1)
        conditional = dist.ConditionalTransformedDistribution(base, [self.transform])
        return conditional.condition(context)


class Run:
    """A model and its guide in training, and what was measured on the way."""

    def __init__(
        self, model: Decoder, guide: Guide, *, learning_rate: float, num_steps: int
    ) -> None:
        self.model = model
        self.guide = guide
        self.objective = Trace_ELBO()(model, guide)
        self.optimizer = torch.optim.Adam(self.objective.parameters(), lr=learning_rate)
        self.schedule = LinearLR(self.optimizer, 1.0, 0.0, total_iters=num_steps)
        self.num_steps = 0
        self.seconds = 0.0
        """Of training alone."""
        self.epochs: list[float] = []
        self.losses: list[float] = []
        """−ELBO of the validation images, in nats per image."""

    def step(self, batch: Tensor, annealing_factor: float) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        try:
            loss = self.objective(batch, annealing_factor) / len(batch)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            value = loss.item()  # waits for the device
        except torch.linalg.LinAlgError:  # a W that is singular or not finite
            value = math.nan
        self.seconds += time.perf_counter() - start
        self.num_steps += 1
        return value

    @torch.no_grad()
    def log_weights(self, images: Tensor, num_draws: int) -> Tensor:
        """``log p(image, z) − log q(z | image)``, shape ``(num_draws, N)``; exact log-dets."""
        self.objective.eval()
        chunks = []
        for batch in images.split(EVALUATION_BATCH):
            guide_trace = poutine.trace(_repeat(self.guide, num_draws)).get_trace(batch)
            replayed = poutine.replay(_repeat(self.model, num_draws), guide_trace)
            model_trace = poutine.trace(replayed).get_trace(batch)
            for trace in (guide_trace, model_trace):
                trace.compute_log_prob()
            joint = sum(model_trace.nodes[name]["log_prob"] for name in ("z", "pixels"))
            chunks.append(joint - guide_trace.nodes["z"]["log_prob"])
        self.objective.train()
        return torch.cat(chunks, dim=1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The mean pixels for a draw of z from each image's posterior."""
        self.objective.eval()
        return self.model.pixels(self.guide(images)).mean


def _repeat(program: Callable[[Tensor], object], num_draws: int) -> Callable[[Tensor], None]:
    """A model or a guide under a plate of independent draws."""

    def repeated(images: Tensor) -> None:
        with pyro.plate("draws", num_draws, dim=-2):
            program(images)

    return repeated


def make_runs(
    data: Data,
    *,
    latent_dim: int,
    hidden: int,
    rank: int,
    num_steps: int,
    learning_rate: float,
    seed: int = 0,
) -> dict[str, Run]:
    """Three models and guides that start alike: with the same weights, and posteriors N(0, I)."""
    shape = (data.train.shape[1], data.levels, latent_dim, hidden)
    guides = {
        MEAN_FIELD: lambda: MeanFieldGuide(*shape),
        **{
            f"self-normalizing, rank {one}": lambda one=one: SelfNormalizingGuide(*shape, rank=one)
            for one in (0, rank)
        },
    }
    runs = {}
    for name, make_guide in guides.items():
        pyro.set_rng_seed(seed)
        model, guide = (module.to(data.train.device) for module in (Decoder(*shape), make_guide()))
        runs[name] = Run(model, guide, learning_rate=learning_rate, num_steps=num_steps)
    return runs


@pyro.validation_enabled(False)  # for the checks would cost some guides more than others
def train(
    data: Data,
    *,
    num_epochs: int,
    batch_size: int = 100,
    latent_dim: int = 16,
    hidden: int = 200,
    rank: int = 2,
    learning_rate: float = 2e-3,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, Run]:
    """Train the guides side by side: they share every batch and its noise.

    The learning rate falls to 0 in a straight line, and the weight of z rises at the start, so that
    no guide gives up latents early. Ctrl-C ends the training early.

    :raises SystemExit: where a loss is not finite.
    """
    steps_per_epoch = math.ceil(len(data.train) / batch_size)
    num_steps = num_epochs * steps_per_epoch
    runs = make_runs(
        data,
        latent_dim=latent_dim,
        hidden=hidden,
        rank=rank,
        num_steps=num_steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)

    def evaluate(step: int) -> None:
        for run in runs.values():
            pyro.set_rng_seed(seed)
            run.epochs.append(step / steps_per_epoch)
            run.losses.append(-run.log_weights(data.validation, NUM_DRAWS).mean().item())

    evaluate(0)
    interval = max(num_steps // NUM_EVALUATIONS, 1)
    step = 0
    with tqdm(
        total=num_steps, disable=not show_progress, desc=f"training {len(runs)} guides"
    ) as bar:
        try:
            while step < num_steps:
                for chosen in torch.randperm(len(data.train), generator=generator).split(
                    batch_size
                ):
                    step += 1
                    batch = data.train[chosen.to(data.train.device)]
                    factor = min(1.0, step / (ANNEALING * num_steps))
                    noise_seed = int(torch.randint(2**31, (), generator=generator))
                    for name, run in runs.items():
                        pyro.set_rng_seed(noise_seed)
                        loss = run.step(batch, factor)
                        if not math.isfinite(loss):
                            raise SystemExit(
                                f"{name}: the loss is {loss} in step {step}; "
                                f"try a --learning-rate below {learning_rate:g}"
                            )
                    if step % interval == 0 or step == num_steps:
                        evaluate(step)
                    bar.update()
        except KeyboardInterrupt:
            bar.write("Interrupted: going on with the guides as they are.")
            evaluate(step)
    return runs


def make_table(runs: Mapping[str, Run], data: Data, seed: int = 0) -> list[dict[str, object]]:
    """A row for each guide. Its difference from the mean field is paired, image by image."""
    table = []
    for name, run in runs.items():
        pyro.set_rng_seed(seed)
        log_weights = run.log_weights(data.test, NUM_FINAL_DRAWS)
        losses = -log_weights.mean(0)
        bounds = math.log(NUM_FINAL_DRAWS) - log_weights.logsumexp(0)
        seen = -run.log_weights(data.train[:NUM_SEEN], NUM_FINAL_DRAWS).mean()
        if name == MEAN_FIELD:  # the first
            mean_field_losses = losses
        difference = losses - mean_field_losses
        table.append(
            {
                "guide": name,
                "-ELBO (nats)": losses.mean().item(),
                "standard error": _standard_error(losses),
                "over mean field": difference.mean().item(),
                "its standard error": _standard_error(difference),
                f"IW bound, K = {NUM_FINAL_DRAWS}": bounds.mean().item(),
                "training images": seen.item(),
                "ms/step": 1e3 * run.seconds / run.num_steps if run.num_steps else math.nan,
                "parameters": sum(parameter.numel() for parameter in run.objective.parameters()),
            }
        )
    return table


def _standard_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


@torch.no_grad()
def sample_images(model: Decoder, count: int, seed: int) -> Tensor:
    """The mean pixels for latents from the prior that depend on the seed alone."""
    latents = torch.randn(count, model.latent_dim, generator=torch.Generator().manual_seed(seed))
    return model.pixels(latents.to(next(model.parameters()).device)).mean


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="outputs/vae")
    parser.add_argument(
        "--data-dir",
        type=mnist_folder,
        metavar="DIR",
        help="MNIST from a folder with its IDX files, gzipped or not, instead of the small digits",
    )
    for option, default, text in [
        ("--latent-dim", 16, "latent features"),
        ("--hidden", 200, "units in each of two hidden layers, of decoder and encoder"),
        ("--rank", 2, "rank of the third guide"),
        ("--epochs", 400, "passes through the training images"),
        ("--batch-size", 100, "images a step"),
    ]:
        parser.add_argument(
            option, type=positive_int, default=default, help=f"{text} (default {default})"
        )
    parser.add_argument(
        "--learning-rate", type=positive_float, default=2e-3, help="of Adam (default 0.002)"
    )
    args = parser.parse_args(argv)
    if args.rank > args.latent_dim:
        parser.error(f"expected --rank <= --latent-dim; got {args.rank} and {args.latent_dim}")
    return args


# Models and guides own their parameters, instead of sharing Pyro's global store of them.
@pyro.settings.context(module_local_params=True)
def main(argv: Sequence[str] | None = None) -> dict:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = load_data(args)
    runs = train(
        data,
        num_epochs=args.epochs,
        batch_size=args.batch_size,
        latent_dim=args.latent_dim,
        hidden=args.hidden,
        rank=args.rank,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    table = make_table(runs, data, args.seed)
    print(
        f"\n{len(data.test)} test images, and the first {NUM_SEEN} training images; "
        f"lower is better:\n{format_table(table)}"
    )

    _plot_training(runs).savefig(args.output_dir / "training.png", dpi=150)
    shown = data.test[:COLUMNS]
    pictures = {
        "reconstructions": {
            "test images": shown / data.levels,
            **{name: run.reconstruct(shown) / data.levels for name, run in runs.items()},
        },
        "samples": {
            name: sample_images(run.model, COLUMNS, args.seed) / data.levels
            for name, run in runs.items()
        },
    }
    titles = {
        "reconstructions": "Test images, and the mean pixels for a draw from each guide",
        "samples": "Mean pixels for the same draws from the prior",
    }
    for name, rows in pictures.items():
        _plot_images(rows, titles[name]).savefig(args.output_dir / f"{name}.png", dpi=150)
    result = write_result(args, table)
    print(f"\nPictures and result.json are in {args.output_dir}")
    return result


def _plot_training(runs: Mapping[str, Run]) -> Figure:
    curves = {name: (run.epochs, run.losses) for name, run in runs.items()}
    return plotting.plot_curves(
        curves,
        xlabel="epoch",
        ylabel="validation −ELBO (nats per image)",
        title="Variational autoencoder: guides in training",
        ylim=late_limits(curves, skip=ANNEALING),
    )


def _plot_images(rows: Mapping[str, Tensor], title: str) -> Figure:
    images = torch.stack(list(rows.values()))
    size = math.isqrt(images.shape[-1])
    return plotting.plot_image_grid(
        images.reshape(-1, size, size),
        columns=images.shape[1],
        row_labels=list(rows),
        title=title,
    )


if __name__ == "__main__":
    main()
