"""What is logged of the rewards of a step's pairs."""

from __future__ import annotations

Numbers = dict[str, float]


def average_rewards(sums: Numbers, pairs: int, answers: tuple[int, int]) -> Numbers:
    """What is logged of `sum_rewards`: shares of rows, means over answers; what there is no answer for is left out.

    Args:
        pairs: rows that were summed over.
        answers: chosen or desirable ones of them, and rejected or undesirable ones.

    Returns:
        `margin` (the difference of the two mean rewards), `accuracy`, `chosen_reward`, `rejected_reward`.
    """
    names = ("chosen_reward", "rejected_reward")
    rewards = {name: sums[name] / count for name, count in zip(names, answers, strict=True) if count}
    margin = {"margin": rewards["chosen_reward"] - rewards["rejected_reward"]} if all(answers) else {}
    return {**margin, "accuracy": sums["accuracy"] / pairs, **rewards}
