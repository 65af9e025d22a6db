"""How many restarts an engine has, and which do not count."""

from __future__ import annotations

from tprt.coordinator.restart_budget import RestartBudget


def test_there_are_so_many_restarts_and_no_more() -> None:
    budget = RestartBudget(2, 10.0)
    assert [budget.try_spend(0.0, epoch) for epoch in range(3)] == [True, True, False]
    assert budget.num_spent == 2


def test_with_none_there_is_none_at_all() -> None:
    budget = RestartBudget(0, 10.0)
    assert not budget.try_spend(0.0, 0)
    assert not budget.try_spend_on_trial()


def test_restarts_before_the_window_do_not_count() -> None:
    budget = RestartBudget(2, 10.0)
    times_s = [0.0, 5.0, 9.9, 10.0, 14.9, 15.0]
    granted = [budget.try_spend(time_s, n) for n, time_s in enumerate(times_s)]
    assert granted == [True, True, False, True, False, True]


def test_the_deaths_of_suspects_that_are_alone_are_counted_apart() -> None:
    budget = RestartBudget(1, 10.0)
    assert budget.try_spend_on_trial()
    assert budget.try_spend(0.0, 0)


def test_a_group_in_which_nothing_but_trials_die_is_given_up() -> None:
    budget = RestartBudget(2, 10.0)
    assert [budget.try_spend_on_trial() for _ in range(3)] == [True, True, False]
    budget.step_finished()
    assert budget.try_spend_on_trial()


def test_restarts_that_a_guilty_request_has_caused_are_given_back() -> None:
    budget = RestartBudget(2, 10.0)
    assert budget.try_spend(0.0, 4)
    assert budget.try_spend(0.0, 5)
    budget.give_back((5, 6))
    assert [budget.try_spend(0.0, epoch) for epoch in (7, 8)] == [True, False]
