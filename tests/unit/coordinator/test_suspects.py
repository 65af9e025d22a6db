"""A request that kills is found, and those that were only there when it did are cleared."""

from __future__ import annotations

from tprt.coordinator.suspects import Suspects, Verdict


def died(suspects: Suspects, epoch: int, *keys: str, is_from_outside: bool = False) -> Verdict | None:
    return suspects.step_died(epoch, keys, is_from_outside)


def test_nothing_is_done_about_requests_of_one_step_that_died() -> None:
    suspects = Suspects()
    assert died(suspects, 0, "a", "b") is None
    assert suspects.to_isolate() == []


def test_requests_that_were_in_two_steps_that_died_are_isolated_and_others_are_not() -> None:
    suspects = Suspects()
    died(suspects, 0, "a", "b", "c")
    died(suspects, 1, "b", "c", "d")
    assert suspects.to_isolate() == ["b", "c"]


def test_a_suspect_whose_step_alone_dies_is_guilty_of_all_epochs_that_died_with_it() -> None:
    suspects = Suspects()
    died(suspects, 0, "a", "b")
    died(suspects, 1, "a", "b")
    assert suspects.was_alone(["b"])
    assert died(suspects, 2, "b") == Verdict("b", (0, 1, 2))
    assert suspects.to_isolate() == ["a"]


def test_a_request_that_happens_to_be_alone_is_not_guilty_before_it_is_a_suspect() -> None:
    suspects = Suspects()
    assert died(suspects, 0, "a") is None
    assert died(suspects, 1, "a") is None
    assert died(suspects, 2, "a") == Verdict("a", (0, 1, 2))


def test_a_signal_from_outside_must_come_twice_to_a_request_that_is_alone() -> None:
    suspects = Suspects()
    for epoch in range(2):
        died(suspects, epoch, "a", is_from_outside=True)
    assert died(suspects, 2, "a", is_from_outside=True) is None
    assert suspects.to_isolate() == ["a"]
    assert died(suspects, 3, "a", is_from_outside=True) == Verdict("a", (0, 1, 2, 3))


def test_a_suspect_is_cleared_by_a_prefill_and_a_decode_that_it_survives() -> None:
    suspects = Suspects()
    for epoch in range(2):
        died(suspects, epoch, "a", "b")
    assert not suspects.got_tokens(["a"])
    assert suspects.to_isolate() == ["a", "b"]
    assert suspects.got_tokens(["a"])
    assert suspects.to_isolate() == ["b"]


def test_a_request_that_has_gone_on_for_a_while_starts_anew() -> None:
    suspects = Suspects()
    died(suspects, 0, "a", "b")
    for _ in range(8):
        suspects.got_tokens(["a"])
    died(suspects, 1, "a", "b")
    assert suspects.to_isolate() == ["b"]


def test_after_signals_from_outside_alone_one_token_clears() -> None:
    suspects = Suspects()
    for epoch in range(2):
        died(suspects, epoch, "a", "b", is_from_outside=True)
    assert suspects.got_tokens(["a"])
    assert suspects.to_isolate() == ["b"]
    died(suspects, 2, "a", "b")
    suspects.got_tokens(["b"])
    assert suspects.to_isolate() == ["b"], "an error among them counts more"


def test_requests_that_have_ended_are_forgotten() -> None:
    suspects = Suspects()
    for epoch in range(2):
        died(suspects, epoch, "a", "b")
    suspects.keep_only({"b"})
    assert suspects.to_isolate() == ["b"]
    suspects.keep_only(set())
    assert not suspects
