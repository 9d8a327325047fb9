"""Budgets say what they mean, and refuse what they cannot."""

import pytest

from samplers import Budget, Ledger


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("20s", 20, "s"),
        ("1.5 min", 90, "s"),
        ("400nfe", 400, "nfe"),
        ("64 rewards", 64, "rewards"),
        ("2e3NFE", 2000, "nfe"),
    ],
)
def test_budgets_are_read(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)
    assert Budget.parse(str(Budget(amount, unit))) == Budget(amount, unit)


@pytest.mark.parametrize("text", ["0s", "-3nfe", "20", "s", "20 bananas", "nan s", ""])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


def test_a_gradient_costs_two_more_evaluations():
    ledger = Ledger()
    ledger.counts |= {"network": 10, "gradient": 3, "reward": 5}
    assert Budget(1, "nfe").spent(ledger, 9.0) == 16
    assert Budget(1, "rewards").spent(ledger, 9.0) == 5
    assert Budget(1, "s").spent(ledger, 9.0) == 9.0
