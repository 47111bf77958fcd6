"""Log-Gaussian Cox processes: −ELBO of five guides at equal wall-clock, three learning rates each.

Sunspots (D = 309), and simulated grids of D = 256 and 900; the model, the data and the training
loop are those of ``examples/svi_guide.py``: one sample a step, Adam, guides in turns of 0.2 s.
One thread, for two would compete with whatever else the machine does, and some guides have no use
for a second one.

    python benchmarks/cox.py
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch
from pyro.infer.autoguide import AutoIAFNormal

from pyro_snf import diagnostics

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import svi_guide  # found through the line above


@pyro.settings.context(module_local_params=True)
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=25.0, help="a guide; twice that at D = 900"
    )
    parser.add_argument("--problem", nargs="+", help="of the three; all by default")
    parser.add_argument("--guides", nargs="+", help="of the five; all by default")
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/cox.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    # AutoIAFNormal diverges at the higher rates, and says so at every evaluation.
    warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)

    problems = {
        "sunspots, D = 309": (svi_guide.load_sunspots(), args.seconds),
        "grid, D = 256": (svi_guide.simulate_grid(16, args.seed), args.seconds),
        "grid, D = 900": (svi_guide.simulate_grid(30, args.seed), 2 * args.seconds),
    }
    rows = []
    for problem, (process, seconds) in problems.items():
        if args.problem and problem not in args.problem:
            continue
        model = svi_guide.make_model(process)
        for learning_rate in args.learning_rate:
            pyro.set_rng_seed(args.seed)
            guides = svi_guide.make_guides(model)
            guides["AutoIAFNormal"] = AutoIAFNormal(model)
            guides = {name: guides[name] for name in args.guides or guides}
            histories = svi_guide.train(
                model, guides, learning_rate=learning_rate, seconds=seconds, show_progress=False
            )
            for name, guide in guides.items():
                loss, error = svi_guide.evaluate(model, guide)
                rows.append(
                    {
                        "problem": problem,
                        "learning_rate": learning_rate,
                        "guide": name,
                        "loss": loss,
                        "error": error,
                        "steps": len(histories[name].losses),
                        "ms_per_step": histories[name].milliseconds_per_step,
                    }
                )
                print(rows[-1], flush=True)
            print(diagnostics.report(guides[svi_guide.SELF_NORMALIZING]), flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(rows, indent=1))

    names = list(dict.fromkeys(row["guide"] for row in rows))
    print("| problem | rate | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for start in range(0, len(rows), len(names)):
        group = rows[start : start + len(names)]
        cells = [f"{r['loss']:.1f} ({r['ms_per_step']:.1f} ms)" for r in group]
        print(f"| {group[0]['problem']} | {group[0]['learning_rate']:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
