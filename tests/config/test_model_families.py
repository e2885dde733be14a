"""The two tables: families and learning rates."""

import pytest

from config.model_families import FAMILIES, LEARNING_RATES, find_family_by_name, find_learning_rate

QWEN = next(family for family in FAMILIES if family.name == "qwen")


@pytest.mark.parametrize(
    ("parameters", "family", "method", "with_lora", "rate"),
    [
        (135e6, None, "sft", True, 4e-4),
        (1.24e9, None, "sft", True, 4e-4),  # Llama 3.2 «1B»
        (494e6, QWEN, "sft", True, 5e-4),
        (7.6e9, QWEN, "sft", True, 2e-4),
        (70e9, None, "sft", True, 1.3e-4),
        (3e9, QWEN, "sft", False, 2e-5),
        (8e9, None, "dpo", True, 5e-6),
        (8e9, None, "kto", False, 5e-7),
        (8e9, None, "orpo", True, 2e-4),  # its loss is the supervised one with a term beside it
        (494e6, None, "reward", True, 1e-4),  # as in TRL's example of that size
        (8e9, None, "reward", False, 2.5e-6),
        (8e9, None, "unheard-of", True, None),
    ],
)
def test_a_rate_follows_size_family_method_and_what_is_trained(
    parameters: float, family: object, method: str, with_lora: bool, rate: float | None
) -> None:
    assert find_learning_rate(parameters, family, method, with_lora=with_lora) == rate  # type: ignore[arg-type]


def test_larger_models_never_learn_faster_and_adapters_always_faster_than_all_weights() -> None:
    for row in LEARNING_RATES:
        assert row.lora >= 5 * row.full
        assert row.lora_preference >= 5 * row.full_preference
        assert set(row.lora_of_family) <= {family.name for family in FAMILIES}
    for key in ("lora", "full", "lora_preference", "full_preference"):
        column = [row.__dict__[key] for row in LEARNING_RATES]
        assert column == sorted(column, reverse=True)


def test_no_hint_belongs_to_two_families() -> None:
    hints = [hint for family in FAMILIES for hint in (*family.name_parts, *family.name_hints)]
    assert len(set(hints)) == len(hints)


def test_what_is_only_likely_never_refuses_a_recipe() -> None:
    # A fine-tune called my-llama-3 may be anything; only names that cannot mislead are refused by.
    assert find_family_by_name("me/my-llama-3-8b") is None
    assert find_family_by_name("me/qwen2.5-like") is None
