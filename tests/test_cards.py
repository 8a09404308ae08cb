"""Cards by name, and the time of a step at their rates."""

from dataclasses import replace

import pytest
import torch
from pcs_trainer.cli.entry import main
from pcs_trainer.memory.alternatives import alternatives, table
from pcs_trainer.memory.cards import CARDS, Card, card_named
from pcs_trainer.memory.ledger import Ledger
from pcs_trainer.memory.whole_run import plan_run


def test_cards_are_found_as_people_write_them():
    for name in ("3060", "RTX 3060", "rtx3060", "NVIDIA GeForce RTX 3060"):
        assert card_named(name).name == "RTX 3060"
    assert card_named("t4").dtype is torch.float16 and card_named("4060-Ti").dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"no data sheet of the card '3061'; did you mean RTX 3060\?"):
        card_named("3061")
    assert len({card.name for card in CARDS}) == len(CARDS)


def test_a_call_takes_the_slower_of_its_two_rates():
    card = Card("a card", 8, products=2, bandwidth=500, link=10)
    assert card.seconds([(4e12, 1.0), (1.0, 250e9), (2e12, 500e9)]) == pytest.approx(2 + 0.5 + 1)


def test_each_call_is_counted_with_what_it_reads_and_writes():
    a, b = torch.empty(30, 20, device="meta"), torch.empty(20, 10, device="meta")
    with Ledger() as ledger:
        y = (a.t().t() @ b).view(-1).add_(b.new_empty(1).expand(300))
    assert y.shape == (300,)
    product, added = ledger.result().calls  # views and memory without contents are no work
    assert product == (2 * 30 * 20 * 10, 4 * (600 + 200 + 300))
    assert added == (0, 4 * (300 + 1 + 300))


@pytest.mark.slow
def test_a_plan_for_a_card_has_its_memory_and_its_time(capsys):
    asked = dict(model="tiny", method="lora_fa", resolution=64, report=False)
    slow, fast = (plan_run(**asked, card=name) for name in ("RTX 3050", "H100"))
    assert slow.budget == 8 * 10**9 and fast.budget == 80 * 10**9 and slow.fits
    assert slow.seconds > 5 * fast.seconds > 0
    twice = plan_run(**asked, card="RTX 3050", batch=slow.step.batch, accumulate=2 * slow.step.accumulate)
    assert twice.seconds == pytest.approx(2 * slow.seconds, rel=0.05)
    assert f"at RTX 3050's full rates, call after call, a step takes {slow.seconds:.3g} s (modelled)" in str(slow)
    streamed = plan_run(**asked, card="RTX 3050", resident="streamed")
    assert streamed.seconds >= slow.seconds
    assert main(["plan", "--card", "3061"]) == 2 and main(["plan", "--card", "3060", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "--card: there is no data sheet of the card '3061'" in said and "with --device cuda" in said


@pytest.mark.slow
def test_other_budgets_are_answered_in_one_table(capsys):
    found = alternatives("tiny", "lora_fa", ("100MB", "600MB", "2GB"), resolution=64, report=False, card="3060")
    assert [budget for budget, _ in found] == ["100MB", "600MB"]  # more would change nothing
    assert not found[0][1].fits and found[1][1].fits
    lines = table(found).splitlines()
    assert "are missing" in lines[1] and "s a step" in lines[2] and "recomputation 24 eager" in lines[2]
    slow, fast = found[1][1], replace(found[1][1], seconds=found[1][1].seconds / 2, weights="int8", resident="streamed")
    lines = table([("4GB", slow), ("8GB", fast)]).splitlines()
    assert "(+100%)" in lines[1] and "weights int8, resident streamed, batch" in lines[2]
    assert main(["plan", "--method", "lora_fa", "--resolution", "64", "--no-report", "--alternatives"]) == 0
    assert "within other budgets:\n  4GB" in capsys.readouterr().out
