"""Stopping: the first signal asks for an end, the second leaves; what the caller answers is left to the caller."""

from __future__ import annotations

import signal
import threading

import pytest
from pcs_trainer.training.stop import Stop


@pytest.fixture(autouse=True)
def unanswered():
    """As in a program that was started on a terminal, whatever started the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_an_end_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_signal_that_the_caller_answers_is_left_to_the_caller_unless_it_is_taken_over():
    answered = []
    signal.signal(signal.SIGINT, lambda *_: answered.append("caller"))
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert answered == ["caller"] and not stop()
    with Stop(take_over=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert answered == ["caller"] and stop()
    signal.raise_signal(signal.SIGINT)
    assert answered == ["caller", "caller"]


def test_the_command_line_says_what_happens_and_leaves_in_its_own_way(capfd):
    left = []
    with Stop(signals=(signal.SIGINT,), message="stopping", leave=lambda: left.append(True)) as stop:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)
        assert stop() and not left and capfd.readouterr().err == "\nstopping\n"
        signal.raise_signal(signal.SIGINT)
        assert left == [True]


def test_a_question_is_asked_until_it_is_answered_with_yes():
    answers = iter([False, True, False])
    stop = Stop(lambda: next(answers))
    assert [stop(), stop(), stop()] == [False, True, True]


def test_outside_the_main_thread_no_signal_is_answered():
    seen = []

    def work():
        with Stop():
            seen.append(signal.getsignal(signal.SIGINT))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert seen == [signal.default_int_handler]
