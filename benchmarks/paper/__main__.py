"""The runner of the paper's experiments: ``python benchmarks/paper --help``."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from command_line import main  # noqa: E402  (found through the line above)

main()
