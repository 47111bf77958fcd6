"""The settings of a run, and the paper's experiments as presets of them (Keller et al., 2021)."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import NAMES
from rivals import KINDS as RIVALS

LOG_DETS = ("refined", "learned", "exact", *RIVALS)

#: What a checkpoint and the run that resumes it may differ in.
BUDGETS = ("max_seconds", "patience", "evaluate_every")


def _at_least(lowest: float, kind: type = float) -> Callable[[str], Any]:
    """The type of an option that is a finite number from ``lowest``."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value < math.inf:
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {noun} >= {lowest:g}; got {text!r}")
        return value

    return parse


def _setting(default: Any, text: str, **options: Any) -> Any:
    """A field with what argparse needs for its option."""
    if "choices" not in options and "type" not in options:
        options["type"] = type(default)
    return field(default=default, metadata={"help": f"{text} (default %(default)s)", **options})


def _count(default: int, text: str, lowest: int = 1) -> Any:
    return _setting(default, text, type=_at_least(lowest, int))


def _amount(default: float, text: str) -> Any:
    return _setting(default, text, type=_at_least(0.0))


@dataclass(frozen=True)
class Settings:
    """Every one is an option of the command line, and is in ``result.json``."""

    log_det: str = _setting("refined", "how log-determinants are had in training", choices=LOG_DETS)
    data: str = _setting("mnist", "the images", choices=NAMES)
    num_train: int = _count(0, "of training images that are used, 0 for all", 0)
    num_evaluated: int = _count(0, "of images of validation and test each, 0 for all", 0)
    model: str = _setting("fc", "the flow", choices=("fc", "conv", "glow"))
    activation: str = _setting(
        "smooth_leaky_relu", "of fc and conv", choices=("smooth_leaky_relu", "spline")
    )
    inputs: str = _setting(
        "logits",
        "of fc's first layer: whitened ones are decorrelated by a frozen layer before it",
        choices=("logits", "whitened"),
    )
    num_layers: int = _count(2, "of fc")
    num_blocks: int = _count(3, "of conv")
    layers_per_block: int = _count(3, "of conv")
    kernel_size: int = _count(3, "of conv and glow's self-normalizing convolutions, odd")
    num_levels: int = _count(2, "of glow")
    steps_per_level: int = _count(16, "of glow")
    hidden_channels: int = _count(512, "of glow's couplings")
    initial_noise: float = _amount(
        0.0, "of conv's kernels around the identity: a standard deviation, in units of 1/√inputs"
    )
    batch_size: int = _count(100, "images a step")
    learning_rate: float = _amount(1e-4, "of Adam, for raw weights and kernels")
    schedule: str = _setting(
        "constant",
        "of the rate after the warm-up: cosine falls to 0",
        choices=("constant", "cosine"),
    )
    warm_up_epochs: float = _amount(10.0, "in which the rate rises from 0")
    epochs: int = _count(1000, "passes through the training images")
    averaging: float = _amount(
        0.0, "epochs over which the evaluated weights are averaged, exponentially; 0 for none"
    )
    reconstruction_weight: float = _amount(1.0, "λ of learned")
    geco_tolerance: float = _amount(
        0.0, "reconstruction error that a controller of λ (GECO) holds; 0 for a constant λ"
    )
    geco_rate: float = _amount(1e-3, "of that controller")
    max_gradient_norm: float = _amount(0.0, "to which gradients are clipped, 0 for none")
    evaluate_every: int = _count(1, "epochs between evaluations")
    patience: int = _count(
        0, "epochs without a gain in validation after which to stop, 0 for none", 0
    )
    max_seconds: float = _amount(0.0, "of training, 0 for no limit")
    clock: str = _setting(
        "wall",
        "what seconds are of; a processor's do not count other processes",
        choices=("wall", "processor"),
    )
    dtype: str = _setting("float32", "of the parameters", choices=("float32", "float64"))
    seed: int = _count(0, "of everything random", 0)
    threads: int = _count(0, "of torch, 0 for its own choice", 0)
    device: str = _setting("cpu", "such as cuda")


#: Options that not all models, and not all methods, have.
_MODELS_WITH = {
    "activation": ("fc", "conv"),
    "inputs": ("fc",),
    "num_layers": ("fc",),
    "num_blocks": ("conv",),
    "layers_per_block": ("conv",),
    "initial_noise": ("conv",),
    "kernel_size": ("conv", "glow"),
    "num_levels": ("glow",),
    "steps_per_level": ("glow",),
    "hidden_channels": ("glow",),
}
_OF_LEARNED = ("reconstruction_weight", "geco_tolerance", "geco_rate")

_GLOW = {
    "model": "glow",
    "kernel_size": 1,
    "learning_rate": 1e-3,
    "reconstruction_weight": 100.0,
    "epochs": 250,
}

#: The paper's settings, section 5 and appendix.
PRESETS: dict[str, dict[str, Any]] = {
    "fc-mnist": {},
    "conv-mnist": {
        "model": "conv",
        "activation": "spline",
        "initial_noise": 0.01,
        "learning_rate": 1e-3,
    },
    "glow-mnist": _GLOW,
    "glow-cifar": {
        **_GLOW,
        "data": "cifar10",
        "num_levels": 3,
        "steps_per_level": 32,
        "reconstruction_weight": 1000.0,
        "max_gradient_norm": 1e4,
    },
    "glow-imagenet32": {
        **_GLOW,
        "data": "imagenet32",
        "num_levels": 3,
        "steps_per_level": 48,
        "batch_size": 64,
        "warm_up_epochs": 0.0,
    },
    "geco": {
        **_GLOW,
        "log_det": "learned",
        "steps_per_level": 4,
        "kernel_size": 5,
        "hidden_channels": 16,
        "reconstruction_weight": 1.0,
        "geco_tolerance": 0.02,
    },
}


@dataclass(frozen=True)
class TimescalingSettings:
    """Of the time of a step against dimension; see timescaling.py."""

    log_det: tuple[str, ...] = _setting(
        ("plain", "learned", "refined", "exact", "slogdet"), "what is timed", nargs="+", type=str
    )
    kinds: tuple[str, ...] = _setting(("dense", "conv"), "of layers", nargs="+", type=str)
    dims: tuple[int, ...] = _setting(
        tuple(32 * n for n in range(1, 128, 3)), "values of D", nargs="+", type=_at_least(1, int)
    )
    batch_size: int = _count(128, "images a step")
    seconds: float = _amount(0.3, "for a method at a size, about")
    turns: int = _count(3, "that the methods take at a size")
    max_seconds_per_step: float = _amount(2.0, "beyond which larger D are not timed")
    seed: int = _count(0, "of the data and the layers", 0)


@dataclass(frozen=True)
class Densities2dSettings:
    """Of the densities in the plane; see densities_2d.py."""

    log_det: str = _setting(
        "all",
        "of the dense flow; pair is the pair of networks alone",
        choices=("all", "exact", "refined", "learned", "pair"),
    )
    densities: tuple[str, ...] = _setting((), "by name, all unless given", nargs="+", type=str)
    num_layers: int = _count(8, "of the dense flow")
    num_bins: int = _count(16, "of the splines")
    num_steps: int = _count(400, "of Adam")
    batch_size: int = _count(256, "points a step")
    learning_rate: float = _amount(2e-2, "of Adam for the dense flow, at first")
    seed: int = _count(0, "of everything random", 0)


#: The settings of the experiments that are not training for images.
OTHERS: dict[str, type] = {
    "timescaling": TimescalingSettings,
    "densities-2d": Densities2dSettings,
}


def add_options(parser: argparse.ArgumentParser, preset: str) -> None:
    """An option for each setting of a preset; what is not given is not in the namespace."""
    defaults = make_settings(preset, {})
    for one in dataclasses.fields(defaults):
        default = getattr(defaults, one.name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        help_text = one.metadata["help"].replace("%(default)s", shown or "all")
        name = f"--{one.name.replace('_', '-')}"
        options = {**one.metadata, "help": help_text, "default": argparse.SUPPRESS}
        parser.add_argument(name, **options)


def make_settings(preset: str, options: dict[str, Any]) -> Any:
    """A preset's settings, with the options given in their place.

    :raises ValueError: for an option of another model or method.
    """
    if preset in OTHERS:
        return OTHERS[preset](**options)
    made = Settings(**{**PRESETS[preset], **options})
    for name in options:
        models = _MODELS_WITH.get(name, (made.model,))
        if made.model not in models:
            raise ValueError(f"expected {name} for {' or '.join(models)} only; got {made.model}")
        if name in _OF_LEARNED and made.log_det != "learned":
            raise ValueError(f"expected {name} for learned only; got {made.log_det}")
    if made.schedule == "cosine" and made.warm_up_epochs >= made.epochs:
        raise ValueError(
            f"expected warm_up_epochs below epochs, {made.epochs}, with the cosine schedule; "
            f"got {made.warm_up_epochs:g}"
        )
    return made
