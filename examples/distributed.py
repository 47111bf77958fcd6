"""One model, trained by several processes: ``DistributedDataParallel``, ``fully_shard``, restarts.

Two models are wrapped in the same way, as modules that return a loss: a density of images, and the
guide of a Bayesian regression, of the ink in the lower half of an image on the pixels of the upper
half. All processes draw the same batches, and each takes its share of them.

    torchrun --nproc-per-node 2 examples/distributed.py               # less than a minute
    torchrun --nproc-per-node 2 examples/distributed.py --model guide --wrapper fully_shard
    torchrun --nproc-per-node 8 examples/distributed.py --device cuda --data-dir DIR  # MNIST
    torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed.py

With ``--max-restarts``, torchrun starts all processes again after one has died (``kill`` one), and
they go on from the latest checkpoint. It has all that the layers know, and random numbers depend on
the step and the process alone: the result is that of a run without failures.

With the default seed, the density ends at 98.86 nats with one process as with two. The ELBO of the
guide depends on its particles, of which two processes have twice as many: 3.26 nats.

Results are in outputs/distributed: result.json, and loss.png.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from common import (
    format_table,
    image_folder,
    make_parser,
    positive_float,
    positive_int,
    save_state,
    write_result,
)
from images import Data, load_data
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch import distributed as torch_distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pyro_snf import AutoSelfNormalizingFlow, flows, images, plotting
from pyro_snf.processes import mean_over_processes

#: Images in a batch of all processes, particles of the guide in each, steps between checkpoints.
BATCH_SIZE, NUM_PARTICLES, SAVE_EVERY = 128, 4, 100
#: In checkpoints tensors are whole, however the processes share them.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class DensityLoss(nn.Module):
    """The negative log-likelihood of images, in nats an image."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.flow = flows.fully_connected(data.event_shape)
        self.to_logits = images.LogitTransform(data.num_levels)
        self.register_buffer("zeros", torch.zeros(data.event_shape.numel()))

    def forward(self, pixels: Tensor) -> Tensor:
        base = dist.Normal(self.zeros, 1.0).to_event(1)
        density = dist.TransformedDistribution(base, [self.flow.inv, self.to_logits.inv])
        return -density.log_prob(pixels).mean()


class GuideLoss(nn.Module):
    """The negative ELBO of a regression, in nats an image."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.num_images, self.num_levels = len(data.train), data.num_levels
        guide = AutoSelfNormalizingFlow(self.model)
        guide(data.train[:1])  # makes its parameters
        elbo = Trace_ELBO(NUM_PARTICLES, max_plate_nesting=1, vectorize_particles=True)
        self.elbo = elbo(self.model, guide)

    def model(self, pixels: Tensor) -> None:
        upper, lower = (pixels / self.num_levels).flatten(1).chunk(2, -1)
        weights = pyro.sample("weights", dist.Normal(torch.zeros_like(upper[0]), 1.0).to_event(1))
        # Each process scales its own rows up to all images; the mean of the processes is right.
        with pyro.plate("images", self.num_images, subsample_size=len(pixels)):
            pyro.sample("ink", dist.Normal((weights * upper).sum(-1), 1.0), obs=lower.sum(-1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.elbo(pixels) / self.num_images


def wrap(loss: nn.Module, wrapper: str, device: torch.device) -> nn.Module:
    """The loss, whose forward pass the wrapper has to see. Wrapping layers would not do."""
    if wrapper == "ddp":
        return DistributedDataParallel(loss)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # of torch 2.6 on

    return fully_shard(
        loss, mesh=init_device_mesh(device.type, [torch_distributed.get_world_size()])
    )


def share_of_batch(pixels: Tensor, num_levels: int, args: argparse.Namespace, step: int) -> Tensor:
    """This process's part of a batch that is the same in all processes."""
    rank, num_processes = torch_distributed.get_rank(), torch_distributed.get_world_size()
    generator = torch.Generator().manual_seed(1_000_003 * args.seed + step)
    chosen = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
    batch = images.dequantize(pixels[chosen], num_levels=num_levels, generator=generator)
    pyro.set_rng_seed(1_009 * (1_000_003 * args.seed + step) + rank)  # of the guide's particles
    return batch.tensor_split(num_processes)[rank].to(args.device)


def train(module: nn.Module, data: Data, args: argparse.Namespace) -> list[float]:
    """The losses of all steps, those before a restart included."""
    is_first, checkpoint = torch_distributed.get_rank() == 0, args.output_dir / "checkpoint.pt"
    optimizer = torch.optim.Adam(module.parameters(), lr=args.learning_rate)
    losses: list[float] = []
    if checkpoint.exists():
        *states, losses = torch.load(checkpoint, weights_only=True).values()
        names = ("model_state_dict", "optim_state_dict")
        set_state_dict(module, optimizer, **dict(zip(names, states, strict=True)), options=WHOLE)
    with tqdm(initial=len(losses), total=args.num_steps, disable=not is_first) as bar:
        for step in range(len(losses), args.num_steps):
            optimizer.zero_grad()
            loss = module(share_of_batch(data.train, data.num_levels, args, step))
            loss.backward()
            optimizer.step()
            losses.append(mean_over_processes(loss).item())
            bar.set_postfix_str(f"{losses[-1]:.2f} nats", refresh=False)
            bar.update()
            if (step + 1) % SAVE_EVERY == 0:
                model, optim = get_state_dict(module, optimizer, options=WHOLE)  # of all processes
                if is_first:
                    save_state(checkpoint, {"model": model, "optim": optim, "losses": losses})
    return losses


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="outputs/distributed")
    parser.add_argument("--model", choices=("density", "guide"), default="density")
    parser.add_argument("--wrapper", choices=("ddp", "fully_shard"), default="ddp")
    parser.add_argument("--num-steps", type=positive_int, default=2000, help="default 2000")
    parser.add_argument("--learning-rate", type=positive_float, default=1e-2, help="default 0.01")
    parser.add_argument(
        "--data-dir", type=image_folder, help="IDX files or an NPZ file; default: 8 × 8 digits"
    )
    args = parser.parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        parser.error("expected to be started by torchrun")
    if args.device.type == "cuda":
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(args.device)
    return args


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch_distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    pyro.settings.set(module_local_params=True)  # the guide's parameters are the module's own
    data = load_data(args.data_dir)
    pyro.set_rng_seed(args.seed)  # all processes make the same model
    loss = {"density": DensityLoss, "guide": GuideLoss}[args.model](data).to(args.device)
    module = wrap(loss, args.wrapper, args.device)
    losses = train(module, data, args)
    module.eval()  # exact from here on
    with torch.no_grad():
        batches = [share_of_batch(data.test, data.num_levels, args, step) for step in range(10)]
        test_loss = mean_over_processes(torch.stack([module(batch) for batch in batches]).mean())
    row = {
        "model": args.model,
        "processes": torch_distributed.get_world_size(),
        "test loss (nats)": test_loss.item(),
    }
    is_first = torch_distributed.get_rank() == 0
    torch_distributed.destroy_process_group()
    if is_first:
        print(f"\n{format_table([row])}")
        curve = {args.model: (range(1, len(losses) + 1), losses)}
        figure = plotting.plot_curves(curve, xlabel="step", ylabel="loss (nats per image)")
        figure.savefig(args.output_dir / "loss.png", dpi=150)
        (args.output_dir / "checkpoint.pt").unlink(missing_ok=True)  # the next run starts anew
        write_result(args, [row])
    return row


if __name__ == "__main__":
    main()
