"""What can be wrong with rows whose one answer has a label: one function for each, which returns it in words, or None."""

from __future__ import annotations

from config.recipe_rules import TWO_ANSWER_METRICS
from utils.rule_checks import Facts

LOWEST_BALANCE, HIGHEST_BALANCE = 0.99, 1.34  # 1 to 4/3, and what rounding of a weight may do to it


def find_labelled_rows(facts: Facts) -> str | None:
    """Answers that may be bad ones under a method that would learn them all."""
    count, method = facts.formats.get("labelled", 0), facts.recipe.training.method
    if method == "kto" or (not count and facts.recipe.data.format != "labelled"):
        return None
    rows = f"{count} rows have" if count else "format labelled means rows with"
    learns = "would learn bad answers like good ones" if method == "sft" else "compares two answers of a row"
    return f"{rows} one answer and a label that says whether it is a good one, and method {method} {learns}"


def find_two_answer_metric(facts: Facts) -> str | None:
    """A metric that compares two answers, on rows that have one."""
    names = [name for name in facts.recipe.evaluation.metrics if name in TWO_ANSWER_METRICS]
    if not names or not facts.holds_out_labels:
        return None
    return f"held-out rows have one answer and its label, and these metrics compare two: {', '.join(names)}"


def find_no_desirable_answer(facts: Facts) -> str | None:
    """A metric on desirable answers, without any."""
    names = [name for name in facts.recipe.evaluation.metrics if name in ("loss", "perplexity")]
    if not names or not facts.holds_out_labels or facts.held_out_answers[0]:
        return None
    return f"no held-out row has label true, and these metrics are about desirable answers: {', '.join(names)}"


def find_one_label(facts: Facts) -> str | None:
    """Labels that are all the same."""
    if facts.recipe.kto is None or facts.answers is None or all(facts.answers):
        return None
    label = "true" if facts.answers[0] else "false"
    return f"all {sum(facts.answers)} training rows have label {label}, so there is nothing to tell good answers from"


def measure_balance(facts: Facts) -> float | None:
    """How much desirable training answers weigh, over the weight of undesirable ones."""
    if (kto := facts.recipe.kto) is None or facts.answers is None or not all(facts.answers):
        return None
    return kto.desirable_weight * facts.answers[0] / (kto.undesirable_weight * facts.answers[1])


def find_imbalance(facts: Facts) -> str | None:
    """Weights outside what KTO's authors advise (arXiv 2402.01306, section 4; TRL says the same)."""
    balance = measure_balance(facts)
    if balance is None or LOWEST_BALANCE <= balance <= HIGHEST_BALANCE:
        return None
    good, bad = facts.answers or (0, 0)
    weigh = f"{good} desirable answers weigh {balance:.2f} times as much as {bad} undesirable ones"
    return f"{weigh} with these weights; 1 to 1.33 times is advised"


def choose_weight(facts: Facts) -> str:
    """The weights, one or the other, that put the balance into the middle of its range."""
    kto, balance = facts.recipe.kto, measure_balance(facts)
    assert kto is not None
    assert balance is not None
    change = (LOWEST_BALANCE + HIGHEST_BALANCE) / 2 / balance
    good, bad = kto.desirable_weight * change, kto.undesirable_weight / change
    return f"set kto.desirable_weight: {good:.3g}, or kto.undesirable_weight: {bad:.3g}"
