"""The density of images by one flow of Keller et al. (2021): dense, convolutional or Glow-like.

    x + U[0, 1)  →  ÷ levels  →  squeeze by 1e-6  →  logit  →  flow  →  standard normal

All Jacobians count: the likelihood is that of the pixels. Training maximizes it; after each epoch
the likelihood of validation images is measured, exactly, with noise that is always the same, and in
the end that of the test images, by the flow that was best in validation.

    python examples/images.py                             # scikit-learn's digits: about a minute
    python examples/images.py --model glow
    python examples/images.py --data-dir DIR --epochs 20  # MNIST
    python examples/images.py --data-dir DIR --epochs 40 --resume

DIR has IDX files, as MNIST's are, gzipped or not, or an NPZ file. ``--model glow --steps-per-level
16 --hidden-channels 512`` is as large as the paper's Glow; it is for a GPU.

With the default seed 0, exact test NLL of the digits in nats per image, 2.18 bits per dimension for
the convolutions and 2.03 for Glow; below it, by how many of 17 levels a pixel of a sample is off,
on average, where the flow is inverted in one pass.

                        refined    learned    exact
    conv                   96.5       96.9     96.5
      one-pass samples     0.44       0.09
    fc                     97.5       97.8     97.5
      one-pass samples     0.07       0.05
    glow                   90.2       90.3     90.5
      one-pass samples     0.00       0.01

Another seed makes a difference of up to 0.4. One pass of ``"refined"`` convolutions is by a kernel
that is fitted to the trained one; that of ``"learned"`` ones has been trained along with it.

Results are in outputs/images: result.json; history.csv and curves.png; samples.png and
reconstructions.png, in which the flow is inverted in one pass, approximately, and exactly, from the
same latents; kernels.png, of the layers and of their approximate inverses; and checkpoint.pt, from
which ``--resume`` goes on as if nothing had happened: after Ctrl-C from the latest step, after a
killed process or a power cut from the latest epoch.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from common import (
    deferred_interrupt,
    image_folder,
    late_limits,
    load_images,
    make_parser,
    positive_float,
    positive_int,
    save_figure,
    save_state,
    write_result,
    write_whole,
)
from density_digits import LEVELS as DIGIT_LEVELS
from density_digits import LOG_DETS
from density_digits import load_data as load_digits
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from pyro_snf import (
    Learned,
    MultiScale,
    SelfNormalizingConv2d,
    SelfNormalizingLinear,
    diagnostics,
    flows,
    images,
    plotting,
)

#: Of Adam, for each model. On Θ; on a raw kernel or matrix that is a small fraction.
LEARNING_RATES = {"fc": 3e-3, "conv": 1e-2, "glow": 3e-3}
#: Options that not all models have, and what they are unless given.
MODEL_OPTIONS = {
    "fc": {"activation": "spline"},
    "conv": {"activation": "spline"},
    "glow": {"steps_per_level": 4, "hidden_channels": 64},
}
#: Options that a checkpoint and the run that resumes it must have in common.
SETTINGS = (
    "model",
    "log_det",
    "activation",
    "steps_per_level",
    "hidden_channels",
    "batch_size",
    "learning_rate",
    "warm_up_epochs",
    "reconstruction_weight",
    "seed",
)

#: Of other images than digits, the last training images are for validation: a sixth.
VALIDATION_SHARE = 6
#: Blocks of convolutions, where the images are large enough; and levels of Glow.
MAX_BLOCKS, NUM_LEVELS = 3, 2
#: The smallest images for kernels of 3 × 3.
MIN_SIZE = 3
#: Evaluations have the same noise whatever the seed of the training.
EVALUATION_SEED = 0
#: Images that are evaluated at once.
EVALUATION_BATCH = 500
#: Images, or kernels, in a row of a picture, and rows of samples of each kind.
COLUMNS, SAMPLE_ROWS = 12, 2
#: Of images whose layers are reported on, which takes their singular values.
MAX_REPORTED_DIM = 1000

Layer = SelfNormalizingLinear | SelfNormalizingConv2d


class Data(NamedTuple):
    """Images of integers from 0 to ``num_levels`` − 1, bytes of shape ``(N, C, H, W)``."""

    train: Tensor
    validation: Tensor
    test: Tensor
    num_levels: int

    @property
    def event_shape(self) -> torch.Size:
        return self.train.shape[1:]


def load_data(data_dir: Path | None) -> Data:
    """The digits, or the images of a folder."""
    if data_dir is None:
        parts = [part.to(torch.uint8).view(-1, 1, 8, 8) for part in load_digits()]
        return Data(*parts, DIGIT_LEVELS)
    train, test = load_images(data_dir)
    count = max(len(train) // VALIDATION_SHARE, 1)
    return Data(train[:-count], train[-count:], test, 256)


def make_flow(args: argparse.Namespace, event_shape: torch.Size) -> Any:
    """The flow of the options, from logits to latents.

    :raises ValueError: for images that do not fit.
    """
    torch.manual_seed(args.seed)  # of the layers' probes, Glow's rotations, and its networks
    log_det: str | Learned = args.log_det
    if log_det == "learned":
        log_det = Learned(reconstruction_weight=args.reconstruction_weight)
    options = {"log_det": log_det, "device": args.device}
    if args.model == "fc":
        return flows.fully_connected(event_shape, activation=args.activation, **options)
    if args.model == "conv":
        return flows.convolutional(
            event_shape,
            num_blocks=_num_blocks(event_shape),
            activation=args.activation,
            **options,
        )
    return flows.glow(
        event_shape,
        num_levels=NUM_LEVELS,
        num_steps=args.steps_per_level,
        hidden_channels=args.hidden_channels,
        **options,
    )


def _num_blocks(event_shape: torch.Size) -> int:
    """As many as the images can be halved for, with room for a kernel in the last."""
    _, height, width = event_shape
    count = 1
    while (
        count < MAX_BLOCKS and height % 2 == width % 2 == 0 and min(height, width) // 2 >= MIN_SIZE
    ):
        height, width, count = height // 2, width // 2, count + 1
    return count


def make_density(flow: Any, data: Data) -> dist.TransformedDistribution:
    """The density of dequantized images that the flow defines."""
    zeros = next(flow.parameters()).new_zeros(data.event_shape.numel())
    base = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
    transforms = [flow.inv, images.LogitTransform(data.num_levels).inv]
    # Where a flow diverges, its loss says so.
    return dist.TransformedDistribution(base, transforms, validate_args=False)


class Epoch(NamedTuple):
    """What was measured after so many passes through the training images."""

    epoch: float
    training: float
    """The mean loss since the last one, NaN at the start; for "learned", without log-dets."""
    validation: float
    """Exact, in nats per image."""
    bits_per_dim: float
    """The same in other units."""
    seconds: float
    """Of training alone, from the start."""


class Best(NamedTuple):
    """The flow that was best in validation."""

    epoch: float
    validation: float
    state: dict[str, Any]


class Run:
    """A flow in training, and what was measured on the way."""

    def __init__(self, args: argparse.Namespace, data: Data) -> None:
        self.data = data
        self.batch_size = args.batch_size
        self.device = args.device
        self.flow = make_flow(args, data.event_shape)
        self.density = make_density(self.flow, data)
        self.optimizer = torch.optim.Adam(self.flow.parameters(), lr=args.learning_rate)
        self.steps_per_epoch = math.ceil(len(data.train) / args.batch_size)
        warm_up = args.warm_up_epochs * self.steps_per_epoch
        self.schedule = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warm_up))
        self.generator = torch.Generator().manual_seed(args.seed)
        self.settings = {name: getattr(args, name) for name in SETTINGS} | {
            "images": [list(part.shape) for part in data[:3]]
        }
        self.num_steps = 0
        self.seconds = 0.0
        self.order = torch.empty(0, dtype=torch.long)
        """In which the images are taken in this epoch."""
        self.losses: list[float] = []
        """Since the last evaluation."""
        self.history: list[Epoch] = []
        self.best: Best | None = None

    @property
    def epoch(self) -> float:
        return self.num_steps / self.steps_per_epoch

    def step(self) -> float:
        position = self.num_steps % self.steps_per_epoch
        if position == 0:
            self.order = torch.randperm(len(self.data.train), generator=self.generator)
        chosen = self.order[position * self.batch_size :][: self.batch_size]
        batch = self._dequantize(self.data.train[chosen], self.generator)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        try:
            loss = -self.density.log_prob(batch).mean()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            value = loss.item()  # waits for the device
        except torch.linalg.LinAlgError:  # a layer that is singular or not finite
            value = math.nan
        self.seconds += time.perf_counter() - start
        self.num_steps += 1
        self.losses.append(value)
        return value

    def evaluate(self) -> None:
        loss = self.negative_log_likelihood(self.data.validation)
        bits = images.bits_per_dim(torch.tensor(-loss), self.data.event_shape).item()
        training = sum(self.losses) / len(self.losses) if self.losses else math.nan
        self.losses = []
        self.history.append(Epoch(self.epoch, training, loss, bits, self.seconds))
        if self.best is None or loss < self.best.validation:
            state = {name: _copy(value) for name, value in self.flow.state_dict().items()}
            self.best = Best(self.epoch, loss, state)

    @torch.no_grad()
    def negative_log_likelihood(self, pixels: Tensor) -> float:
        """The mean over dequantized images, in nats; exact, as always in ``eval()`` mode."""
        self.flow.eval()
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        total = 0.0
        for batch in pixels.split(EVALUATION_BATCH):
            log_prob = self.density.log_prob(self._dequantize(batch, generator))
            total -= log_prob.double().sum().item()
        self.flow.train()
        return total / len(pixels)

    def _dequantize(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """On the device; but the noise is of the CPU, so that it is the same on every device."""
        levels = self.data.num_levels
        return images.dequantize(pixels, num_levels=levels, generator=generator).to(self.device)

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        assert self.best is not None
        return {
            "settings": self.settings,
            "flow": self.flow.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "order": self.order,
            "losses": self.losses,
            "history": [tuple(epoch) for epoch in self.history],
            "best": tuple(self.best),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        :raises ValueError: if it is that of a run with other settings.
        """
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"expected {name} to be {state['settings'].get(name)!r}, as in the "
                    f"checkpoint; got {value!r}"
                )
        self.flow.load_state_dict(state["flow"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"].cpu())
        self.num_steps = state["num_steps"]
        self.seconds = state["seconds"]
        self.order = state["order"].cpu()
        self.losses = state["losses"]
        self.history = [Epoch(*epoch) for epoch in state["history"]]
        self.best = Best(*state["best"])


def _copy(value: object) -> object:
    """Of an entry of a state_dict: layers' extra states are made anew each time."""
    return value.clone() if isinstance(value, Tensor) else value


def train(run: Run, *, num_epochs: int, checkpoint: Path, show_progress: bool = True) -> None:
    """Train until so many epochs are over, from wherever the run is.

    There is a checkpoint at the start, and each epoch ends with an evaluation and a checkpoint.
    Ctrl-C ends the training early: with a checkpoint, and an evaluation that is not in it.

    :raises SystemExit: where a loss is not finite.
    """
    if not run.history:
        run.evaluate()
        save_state(checkpoint, run.state())  # now, for a disk that is full should show at once
    num_steps = num_epochs * run.steps_per_epoch
    with (
        tqdm(
            total=num_steps, initial=run.num_steps, disable=not show_progress, desc="training"
        ) as bar,
        deferred_interrupt() as is_interrupted,
    ):
        while run.num_steps < num_steps and not is_interrupted():
            loss = run.step()
            if not math.isfinite(loss):
                raise SystemExit(
                    f"the loss is {loss} in step {run.num_steps}; "
                    f"try a --learning-rate below {run.settings['learning_rate']:g}"
                )
            if run.num_steps % run.steps_per_epoch == 0:
                run.evaluate()
                save_state(checkpoint, run.state())
            latest = run.history[-1]
            bar.set_postfix_str(
                f"loss {loss:.1f}, validation {latest.validation:.2f} nats, "
                f"{latest.bits_per_dim:.3f} bits/dim",
                refresh=False,
            )
            bar.update()
        if run.num_steps < num_steps:
            save_state(checkpoint, run.state())
            bar.write("Interrupted: going on with the flow as it is; --resume continues.")
            run.evaluate()


# --- Pictures -----------------------------------------------------------------------------------


def layers_of(flow: Any) -> list[Layer]:
    """The self-normalizing layers, in their order."""
    return [module for module in flow.modules() if isinstance(module, Layer)]


@contextmanager
def inverted(flow: Any, method: str) -> Iterator[None]:
    """All layers' inverses are by the same method meanwhile."""
    layers = layers_of(flow)
    before = [layer.inverse for layer in layers]
    for layer in layers:
        layer.inverse = method
    flow.clear_cache()
    try:
        yield
    finally:
        for layer, inverse in zip(layers, before, strict=True):
            layer.inverse = inverse
        flow.clear_cache()


@torch.no_grad()
def decode(run: Run, latents: Tensor, method: str) -> Tensor:
    """Integer pixels for latents, by the layers' ``"one_pass"`` or ``"exact"`` inverses.

    A pixel that is NaN, for approximate inverses may diverge, is black.
    """
    run.flow.eval()
    with inverted(run.flow, method):
        # A clone, for a latent that comes of an image would find that image again.
        logits = run.flow.inv(latents.clone())
    pixels = images.LogitTransform(run.data.num_levels).inv(logits).nan_to_num(0.0)
    return images.quantize(pixels, num_levels=run.data.num_levels).cpu()


def draw_latents(run: Run, count: int, seed: int) -> Tensor:
    """Latents that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, run.data.event_shape.numel(), generator=generator).to(run.device)


@torch.no_grad()
def encode(run: Run, pixels: Tensor) -> Tensor:
    """The latents of images, dequantized by ½."""
    run.flow.eval()
    values = pixels.to(torch.get_default_dtype()).to(run.device) + 0.5
    return run.flow(images.LogitTransform(run.data.num_levels)(values))


def layers_with_shapes(flow: Any, event_shape: torch.Size) -> Iterator[tuple[Layer, torch.Size]]:
    """The self-normalizing layers, with the shapes of what they are given."""
    stacks: Sequence[Any] = flow.levels if isinstance(flow, MultiScale) else [flow]
    for index, stack in enumerate(stacks):
        if index > 0:
            event_shape = torch.Size([event_shape[0] // 2, *event_shape[1:]])
        for part in stack.parts:
            if isinstance(part, Layer):
                yield part, event_shape
            event_shape = part.forward_shape(event_shape)


@torch.no_grad()
def kernel_rows(run: Run) -> dict[str, Tensor]:
    """For each layer W and its approximate inverse R, as rows of small images.

    Of a convolution, the first kernels, and of a dense layer, rows at equal distances, as images;
    both less the identity, which they start from and which would outshine the rest. Of 1 × 1
    convolutions, the matrices.
    """
    rows: dict[str, list[Tensor]] = {}
    for index, (layer, shape) in enumerate(layers_with_shapes(run.flow, run.data.event_shape)):
        place = f"layer {index + 1}"
        if isinstance(layer, SelfNormalizingLinear):
            image = run.data.event_shape
            step = max(layer.input_dim // COLUMNS, 1)
            for name, matrix in [("W", layer.weight), ("R", layer.inverse_weight)]:
                chosen = (matrix - torch.eye(len(matrix)).to(matrix))[step // 2 :: step][:COLUMNS]
                rows[f"{place}, {name} − I"] = list(chosen.view(-1, *image)[:, 0])
            continue
        size = (shape[1], shape[2])
        for name, kernel in [("w", layer.weight), ("r", layer.inverse_weight(size))]:
            if layer.kernel_size == (1, 1):
                label = f"1 × 1 at {'×'.join(map(str, shape))}, {name.upper()}"
                rows.setdefault(label, []).append(kernel[:, :, 0, 0])
            else:
                height, width = kernel.shape[-2:]
                kernel[:, :, height // 2, width // 2] -= torch.eye(len(kernel)).to(kernel)
                rows[f"{place}, {name} − δ"] = list(kernel.flatten(0, 1)[:COLUMNS])
    return {label: torch.stack(row[:COLUMNS]) for label, row in rows.items()}


def draw_pictures(run: Run, seed: int, folder: Path) -> dict[str, float]:
    """Write the pictures of a flow; return how far its one-pass inverse is off."""
    latents = draw_latents(run, COLUMNS * SAMPLE_ROWS, seed)
    shown = run.data.test[:COLUMNS]
    samples = [decode(run, latents, method) for method in ("one_pass", "exact")]
    again = [decode(run, encode(run, shown), method) for method in ("one_pass", "exact")]
    labels = ["one pass", "exact"]
    sample_labels = [label if row == 0 else "" for label in labels for row in range(SAMPLE_ROWS)]
    pictures = {
        "samples": plotting.plot_image_grid(
            torch.cat(samples),
            columns=COLUMNS,
            row_labels=sample_labels,
            title="Samples from the same latents: the flow inverted in one pass, and exactly",
        ),
        "reconstructions": plotting.plot_image_grid(
            torch.cat([shown, *again]),
            columns=COLUMNS,
            row_labels=["test images", *labels],
            title="Test images, to latents and back, in one pass and exactly",
        ),
        "kernels": plotting.plot_kernels(
            kernel_rows(run), title="Layers, and below each its approximate inverse"
        ),
        "curves": _plot_training(run),
    }
    for name, figure in pictures.items():
        save_figure(folder / f"{name}.png", figure)
    return {
        "one-pass samples off by": _mean_difference(*samples),
        "one-pass reconstructions off by": _mean_difference(shown, again[0]),
        "exact reconstructions off by": _mean_difference(shown, again[1]),
    }


def _mean_difference(first: Tensor, second: Tensor) -> float:
    """The mean absolute difference of pixels, in levels."""
    return (first.double() - second.double()).abs().mean().item()


def _plot_training(run: Run) -> Figure:
    curves = {
        "validation, exact": (
            [one.epoch for one in run.history],
            [one.validation for one in run.history],
        )
    }
    if run.settings["log_det"] != "learned":  # whose loss has no log-dets
        later = [one for one in run.history if math.isfinite(one.training)]
        if later:
            curves["training"] = ([one.epoch for one in later], [one.training for one in later])
    return plotting.plot_curves(
        curves,
        xlabel="epoch",
        ylabel="NLL (nats per image)",
        title=f"{run.settings['model']}, log_det={run.settings['log_det']!r}",
        ylim=late_limits(curves, skip=0.1),
    )


# --- The command line ---------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="outputs/images")
    parser.add_argument(
        "--data-dir",
        type=image_folder,
        metavar="DIR",
        help="images from a folder with IDX files or an NPZ file, instead of the small digits",
    )
    parser.add_argument(
        "--model", choices=LEARNING_RATES, default="conv", help="the stack (default conv)"
    )
    parser.add_argument(
        "--log-det",
        choices=LOG_DETS,
        default="refined",
        help="how log-determinants are had in training (default refined)",
    )
    parser.add_argument(
        "--activation", choices=flows.ACTIVATIONS, help="of fc and conv (default spline)"
    )
    for option, text in [
        ("--steps-per-level", "of glow (default 4)"),
        ("--hidden-channels", "of glow's couplings (default 64)"),
    ]:
        parser.add_argument(option, type=positive_int, help=text)
    for option, default, text in [
        ("--epochs", 100, "passes through the training images"),
        ("--warm-up-epochs", 10, "in which the learning rate rises from 0"),
        ("--batch-size", 100, "images a step"),
    ]:
        parser.add_argument(
            option, type=positive_int, default=default, help=f"{text} (default {default})"
        )
    rates = ", ".join(f"{rate:g} for {model}" for model, rate in LEARNING_RATES.items())
    parser.add_argument("--learning-rate", type=positive_float, help=f"of Adam (default {rates})")
    parser.add_argument(
        "--reconstruction-weight",
        type=positive_float,
        default=1.0,
        help="λ, for --log-det learned (default 1)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder"
    )
    args = parser.parse_args(argv)
    for model, options in MODEL_OPTIONS.items():
        for name in options:
            if getattr(args, name) is not None and name not in MODEL_OPTIONS[args.model]:
                option = name.replace("_", "-")
                parser.error(f"expected --{option} with --model {model} only; got {args.model}")
    for name, default in MODEL_OPTIONS[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.model]
    return args


def make_run(args: argparse.Namespace, checkpoint: Path) -> Run:
    """The run of the options: a new one, or the one that the checkpoint is of.

    :raises SystemExit: for images that do not fit, and a checkpoint that does not.
    """
    try:
        run = Run(args, load_data(args.data_dir))
        if args.resume:
            if not checkpoint.is_file():
                raise ValueError(f"expected a checkpoint to resume from; got no {checkpoint}")
            run.load_state(_load(checkpoint, args.device))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    return run


def _load(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    try:
        return torch.load(checkpoint, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = "".join(str(error).splitlines()[:1])
        raise ValueError(f"{checkpoint}: expected a whole checkpoint; got {reason}") from error


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse_args(argv)
    checkpoint = args.output_dir / "checkpoint.pt"
    run = make_run(args, checkpoint)
    train(run, num_epochs=args.epochs, checkpoint=checkpoint)

    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Epoch._fields)
    writer.writerows(run.history)
    write_whole(args.output_dir / "history.csv", text.getvalue().encode())
    assert run.best is not None
    run.flow.load_state_dict(run.best.state)
    loss = run.negative_log_likelihood(run.data.test)
    differences = draw_pictures(run, args.seed, args.output_dir)
    row: dict[str, object] = {
        "model": args.model,
        "log_det": args.log_det,
        "test NLL (nats)": loss,
        "bits/dim": images.bits_per_dim(torch.tensor(-loss), run.data.event_shape).item(),
        "validation NLL": run.best.validation,
        "at epoch": run.best.epoch,
        "ms/step": 1e3 * run.seconds / run.num_steps if run.num_steps else math.nan,
        "parameters": sum(parameter.numel() for parameter in run.flow.parameters()),
        **differences,
    }
    print(f"\nExact NLL of {len(run.data.test)} test images, by the flow best in validation:")
    print("\n".join(f"  {key}: {value}" for key, value in row.items()))
    if run.data.event_shape.numel() <= MAX_REPORTED_DIM:
        print(f"\n{diagnostics.report(run.flow)}")
    result = write_result(args, [row])
    print(f"\nPictures and result.json are in {args.output_dir}")
    return result


if __name__ == "__main__":
    main()
