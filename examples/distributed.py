"""One density, trained by several processes at once: the result is that of one process.

    torchrun --nproc-per-node 2 examples/distributed.py    # half a minute; with seed 0:

    trained by   test NLL (nats)  weights off by
    one process            98.95               0
    2 processes            98.95         5.8e-06

All processes draw the same batches of digits, each takes its share, and DistributedDataParallel
averages the gradients; what a layer knows besides its weights stays the same in all of them. To
show it, the first process trains once more, alone, with whole batches: the weights differ by
rounding, and in the picture, distributed.png, the curves lie on each other.
With `--max-restarts 3`, torchrun starts all processes again after one has died, and they go on from
the latest checkpoint. With several GPUs, each process takes one.
"""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from pathlib import Path

import pyro.distributions as dist
import torch
from common import finish, make_parser
from density_images import NUM_LEVELS, load_data
from torch import Tensor, nn
from torch import distributed as processes
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from pyro_snf import flows
from pyro_snf.images import LogitTransform, dequantize
from pyro_snf.plotting import plot_curves
from pyro_snf.processes import mean_over_processes, num_processes, process_rank
from pyro_snf.progress import Progress

BATCH_SIZE, LEARNING_RATE, SAVE_EVERY = 128, 1e-2, 100
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class DensityLoss(nn.Module):
    """The negative log-likelihood of images, in nats: what is wrapped has to be what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = flows.fully_connected((1, 8, 8))

    def forward(self, pixels: Tensor) -> Tensor:
        base = dist.Normal(pixels.new_zeros(64), 1.0).to_event(1)
        to_pixels = [self.flow.inv, LogitTransform(NUM_LEVELS).inv]
        return -dist.TransformedDistribution(base, to_pixels).log_prob(pixels).mean()


def share_of_batch(images: Tensor, step: int, seed: int) -> Tensor:
    """This process's part of a batch that is the same in all of them, and after a restart."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
    batch = dequantize(images[chosen], num_levels=NUM_LEVELS, generator=generator)
    return batch.tensor_split(num_processes())[process_rank()]


def train(module: nn.Module, images: Tensor, args: Namespace, file: Path | None) -> list:
    """The losses of all steps, those before a restart included."""
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE), []
    is_first, device = process_rank() == 0, next(module.parameters()).device
    if file and file.exists():
        model, optim, losses = torch.load(file, weights_only=True)
        state = {"model_state_dict": model, "optim_state_dict": optim}
        set_state_dict(module, optimizer, **state, options=WHOLE)
    with Progress(is_first, args.num_steps, num_done=len(losses)) as progress:
        for step in range(len(losses), args.num_steps):
            optimizer.zero_grad()
            loss = module(share_of_batch(images, step, args.seed).to(device))
            loss.backward()
            optimizer.step()
            losses.append(mean_over_processes(loss).item())
            progress.update(f"−log p {losses[-1]:.2f}")
            if file and (step + 1) % SAVE_EVERY == 0:
                states = get_state_dict(module, optimizer, options=WHOLE)  # by all processes
                if is_first:
                    torch.save([*states, losses], file.with_suffix(".part"))
                    file.with_suffix(".part").replace(file)  # which is never seen half written
    return losses


def main(argv: list[str] | None = None) -> list[dict]:
    parser = make_parser(__doc__, num_steps=1000)
    args = parser.parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        parser.error("expected to be started by torchrun")
    has_gpus, rank = torch.cuda.device_count() > 1, int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if has_gpus else torch.device("cpu")
    training, test = load_data()
    torch.manual_seed(args.seed)  # all processes make the same model
    together, file = DensityLoss().to(device), args.output_dir / "distributed.pt"
    alone = copy.deepcopy(together)
    processes.init_process_group("nccl" if has_gpus else "gloo")
    is_first, name = processes.get_rank() == 0, f"{processes.get_world_size()} processes"
    losses = train(DistributedDataParallel(together), training, args, file)
    processes.destroy_process_group()
    if not is_first:
        return []
    steps, of_one = range(1, args.num_steps + 1), train(alone, training, args, None)
    file.unlink(missing_ok=True)  # the next run starts anew
    x = dequantize(test, num_levels=NUM_LEVELS).to(device)
    table, weights = [], nn.utils.parameters_to_vector(alone.parameters())
    for trainer, module in {"one process": alone, name: together}.items():
        off = (nn.utils.parameters_to_vector(module.parameters()) - weights).abs().max().item()
        exact = module.eval()(x).item()
        table.append({"trained by": trainer, "test NLL (nats)": exact, "weights off by": off})
    curves = {"one process": (steps, of_one), name: (steps, losses)}
    figure = plot_curves(curves, xlabel="step", ylabel="−log p (nats per image)", ylim=(90, 200))
    finish(table, figure, args.output_dir, "distributed")
    return table


if __name__ == "__main__":
    main()
