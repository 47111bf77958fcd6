"""A progress bar where there is a terminal, and lines of text elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm.auto import tqdm  # type: ignore[import-untyped]

__all__ = ["Progress"]

# Where there is no terminal, a line every so many seconds.
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar in terminals and notebooks; elsewhere a line every ten seconds; or nothing.

    :param bool is_shown: whether there is any.
    :param int total: of what is counted.
    :param str unit: what is counted.
    :param int num_done: how many are done at the start.
    """

    def __init__(
        self, is_shown: bool, total: int, unit: str = "step", *, num_done: int = 0
    ) -> None:
        self.total = total
        self.unit = unit
        self.num_done = num_done
        has_bar = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.bar = tqdm(total=total, initial=num_done, unit=unit) if is_shown and has_bar else None
        self.prints = is_shown and not has_bar
        self.last_line = time.monotonic()

    def update(self, text: str) -> None:
        """One more is done.

        :param str text: the latest figures.
        """
        self.num_done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.prints and time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            line = f"{self.unit} {self.num_done} of {self.total}, {text}"
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
