"""When a tracked inverse is corrected by rounds, and when it is cheaper to make it exact."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RefreshSchedule"]

# How long rounds last is tried again some refreshes later: it was the optimizer's doing.
_FADING = 1.25
_LONG = 1000.0

# A refresh at the latest when rounds have cost so many of them.
_RENEWAL = 4


@dataclass
class RefreshSchedule:
    """What the corrections since the last refresh have cost, and how long they last.

    A round removes the error where it is concentrated. Where an optimizer leaves it in a few
    directions, a round lasts for many steps. Where it is spread over all of them (a high learning
    rate, noisy gradients), a round lasts for one, and a refresh lasts much longer: its O(D³), paid
    once in a hundred steps, are then the cheaper way.
    """

    refresh_cost: float
    """The cost of a refresh, in rounds."""
    age: int = 0
    """Steps since R was exact."""
    num_rounds: int = 0
    """Rounds since R was exact."""
    age_at_round: int = 0
    """The age at the latest round."""
    round_lasts: float = 0.0
    """Steps until the next correction after a round, a running mean; 0 where not known yet."""
    refresh_lasts: float = 0.0
    """The same after a refresh."""

    def count_step(self) -> None:
        self.age += 1

    def count_round(self) -> None:
        self.num_rounds += 1
        self.age_at_round = self.age

    def restart(self) -> None:
        """Count from now: R is exact."""
        self.age = self.num_rounds = self.age_at_round = 0
        self.round_lasts = min(_FADING * self.round_lasts, _LONG)

    def refresh_pays(self) -> bool:
        """Whether a refresh is cheaper in the long run than a round; for when one is due."""
        if self.num_rounds:
            self.round_lasts = _mean(self.round_lasts, self.age - self.age_at_round)
        else:
            self.refresh_lasts = _mean(self.refresh_lasts, self.age)
        if not self.round_lasts:
            return False
        # How long a refresh lasts is found out anew now and then: an edit of the weights, say, cuts
        # one short.
        if self.num_rounds >= _RENEWAL * self.refresh_cost:
            return True
        return self.refresh_cost * self.round_lasts < self.refresh_lasts


def _mean(known: float, new: int) -> float:
    new = max(new, 1)
    return (known + new) / 2 if known else float(new)
