"""The schedule of corrections, in simulated regimes of which the cheapest policy is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from pyro_snf.dense.schedule import RefreshSchedule

# Long enough for what is learned at the start not to count.
STEPS = 4000
# How much dearer than the best policy, known beforehand, it may be: it has to try.
NEAR_OPTIMAL = 1.5


class Run:
    """What becomes of a schedule where a round lasts for some steps, and a refresh for others.

    :param int round_lasts: steps from a round until the next correction is due.
    :param int refresh_lasts: likewise from a refresh.
    :param events: steps at which R is lost, and has to be refreshed.
    :param first_due: the step of the first correction; of a whole life, if it is not given.
    """

    def __init__(
        self,
        refresh_cost: float,
        round_lasts: int,
        refresh_lasts: int,
        events: frozenset[int] = frozenset(),
        first_due: int | None = None,
    ) -> None:
        self.schedule = RefreshSchedule(refresh_cost=refresh_cost)
        self.round_lasts, self.refresh_lasts, self.events = round_lasts, refresh_lasts, events
        self.due = refresh_lasts if first_due is None else first_due
        self.refreshes: list[int] = []
        self.rounds: list[int] = []
        for step in range(1, STEPS):
            self._take(step)

    def _take(self, step: int) -> None:
        self.schedule.count_step()
        is_event = step in self.events
        if not is_event and step < self.due:
            return
        if is_event or self.schedule.refresh_pays():
            self.schedule.restart()
            self.refreshes.append(step)
            self.due = step + self.refresh_lasts
        else:
            self.schedule.count_round()
            self.rounds.append(step)
            self.due = step + self.round_lasts

    @property
    def cost(self) -> float:
        """In rounds a step."""
        return (len(self.rounds) + self.schedule.refresh_cost * len(self.refreshes)) / STEPS

    @property
    def best_cost(self) -> float:
        """Of rounds alone, or of a refresh at the end of every life."""
        return min(1 / self.round_lasts, self.schedule.refresh_cost / self.refresh_lasts)


COSTS = pytest.mark.parametrize("refresh_cost", [3.5, 10.0, 40.0])


@COSTS
@pytest.mark.parametrize("round_lasts", [10, 50, 300])
def test_rounds_that_last_are_rarely_replaced(refresh_cost: float, round_lasts: int) -> None:
    # Only to find out anew how long a refresh lasts.
    run = Run(refresh_cost, round_lasts, refresh_lasts=2 * round_lasts)
    assert len(run.refreshes) * refresh_cost <= len(run.rounds) / 4
    assert run.cost <= 1.3 * run.best_cost


@COSTS
@pytest.mark.parametrize("refresh_lasts", [100, 300])
@pytest.mark.parametrize("round_lasts", [1, 2])
def test_rounds_that_do_not_last_make_way_for_refreshes(
    refresh_cost: float, refresh_lasts: int, round_lasts: int
) -> None:
    run = Run(refresh_cost, round_lasts, refresh_lasts)
    assert run.cost <= NEAR_OPTIMAL * run.best_cost
    assert len(run.refreshes) > 0.7 * STEPS / refresh_lasts


@COSTS
@pytest.mark.parametrize("round_lasts", [1, 2, 5, 20])
@pytest.mark.parametrize("refresh_lasts", [1, 3, 10, 30, 100, 1000])
def test_never_much_dearer_than_the_best_policy(
    refresh_lasts: int, round_lasts: int, refresh_cost: float
) -> None:
    run = Run(refresh_cost, round_lasts, max(refresh_lasts, round_lasts))
    assert run.cost <= NEAR_OPTIMAL * run.best_cost + 1 / STEPS * refresh_cost


@COSTS
def test_first_correction_is_a_round(refresh_cost: float) -> None:
    # Nothing is known of how long they last.
    for round_lasts in (1, 100):
        run = Run(refresh_cost, round_lasts, refresh_lasts=50)
        assert run.rounds[0] == 50


@pytest.mark.parametrize("round_lasts", [1, 2, 3])
def test_life_that_was_cut_short_is_not_taken_for_the_rule(round_lasts: int) -> None:
    # The weights were edited at once: the rounds that mend it make a short, dear life, which must
    # not go on for ever where a refresh would last for a hundred steps.
    run = Run(4.0, round_lasts, refresh_lasts=100, first_due=1)
    assert run.refreshes
    assert run.cost <= 2 * run.best_cost


def test_worn_out_rounds_cost_no_more_than_four_refreshes() -> None:
    run = Run(10.0, 1, refresh_lasts=100, first_due=1)
    assert run.refreshes[0] <= 1 + 4 * 10


@pytest.mark.parametrize("every", [7, 50, 130])
def test_events_do_not_change_the_verdict(every: int) -> None:
    events = frozenset(range(every, STEPS, every))
    assert set(Run(10.0, 50, 100, events).refreshes) == events
    run = Run(10.0, 1, 100, events)
    assert set(run.refreshes) >= events
    assert len(run.rounds) <= 0.3 * STEPS


def test_change_of_regime_is_noticed() -> None:
    # Rounds last for one step while the learning rate is high, and for fifty when it has fallen.
    run = Run(10.0, 1, 100)
    run.round_lasts = run.refresh_lasts = 50
    run.rounds.clear()
    run.refreshes.clear()
    for step in range(STEPS, 2 * STEPS):
        run._take(step)
    assert run.cost <= NEAR_OPTIMAL * run.best_cost
    # And the other way round.
    run.round_lasts, run.refresh_lasts = 1, 100
    run.rounds.clear()
    run.refreshes.clear()
    for step in range(2 * STEPS, 3 * STEPS):
        run._take(step)
    assert run.cost <= 2 * run.best_cost


def test_many_refreshes_do_not_spoil_what_is_known() -> None:
    # By hand after every step: what fades must not grow beyond all bounds.
    schedule = RefreshSchedule(refresh_cost=4.0, round_lasts=1.0)
    for _ in range(5000):
        schedule.count_step()
        schedule.restart()
    assert math.isfinite(schedule.round_lasts)


def moments(schedule: RefreshSchedule) -> Iterator[bool]:
    for _ in range(100):
        schedule.count_step()
        pays = schedule.refresh_pays()
        schedule.restart() if pays else schedule.count_round()
        yield pays


def test_goes_on_from_its_state() -> None:
    schedule = Run(4.0, 1, 30).schedule
    other = RefreshSchedule(**asdict(schedule))
    assert list(moments(schedule)) == list(moments(other))


def test_nothing_is_divided_by_no_steps() -> None:
    assert not RefreshSchedule(refresh_cost=4.0).refresh_pays()
    schedule = RefreshSchedule(refresh_cost=4.0)
    schedule.count_round()
    assert not schedule.refresh_pays()
