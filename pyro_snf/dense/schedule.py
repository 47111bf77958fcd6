"""When a tracked inverse is corrected by rounds, and when it is cheaper to make it exact."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RefreshSchedule"]

# How long rounds last is tried again some lives later: it was the optimizer's doing.
_FADING = 1.25


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
    lasting: float = 0.0
    """Steps that a round lasts, a running mean; 0 where no round has been seen to wear off yet."""

    def count_step(self) -> None:
        self.age += 1

    def count_round(self) -> None:
        self.num_rounds += 1
        self.age_at_round = self.age

    def restart(self) -> None:
        """Count from now: R is exact."""
        self.age = self.num_rounds = self.age_at_round = 0
        self.lasting *= _FADING

    def refresh_pays(self) -> bool:
        """Whether a refresh is cheaper in the long run than a round; for when one is due.

        The rule of renewal theory: replace when the running cost of going on, one round in every
        ``lasting`` steps, exceeds the mean cost of a life that ends now. That mean is misleading
        where a life was cut short, by an edit of the weights say; so rounds that last one step
        each are ended as well when they have cost as much as two refreshes.
        """
        if self.num_rounds:
            lasted = self.age - self.age_at_round
            self.lasting = (self.lasting + lasted) / 2 if self.lasting else float(lasted)
        if not self.lasting:
            return False
        mean_cost = (self.refresh_cost + self.num_rounds) / max(self.age, 1)
        worn_out = self.lasting < 1.5 and self.num_rounds >= 2 * self.refresh_cost
        return 1 / max(self.lasting, 1.0) > mean_cost or worn_out
