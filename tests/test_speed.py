"""The speed benchmark's own arithmetic: what a step needs, what is the same work, and what is counted."""

import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks import speed_bound
from benchmarks.profile_pass import ADAPTERS, ATTENTION, HEAD, LAYERS, REST, classify
from benchmarks.speed_bound import NeededWork
from benchmarks.speed_process import Attempt, execute, watch_lines
from benchmarks.speed_report import format_work
from benchmarks.speed_results import WorkResult, find_faults, load_results, save_results, summarise, take_up
from benchmarks.speed_runs import PEERS, Measurement
from benchmarks.speed_sides import OUR_SIDES, SIDES, Side
from benchmarks.speed_work import WORKS, convert_example, measure_rows, measure_square
from benchmarks.tiny_models import make_llama_config
from utils.piece_encoder import EncodedExample

TOKENS = 24


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(make_llama_config(100, 32, intermediate_size=48, attn_implementation="eager"))


def count_with_torch(model: torch.nn.Module) -> int:
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("r", [None, 4], ids=["all weights", "adapters"])
def test_the_needed_operations_are_those_that_torch_counts(tmp_path: Path, r: int | None) -> None:
    model = build_model()
    model.config.save_pretrained(tmp_path)
    network: torch.nn.Module = model
    if r:
        model.enable_input_require_grads()  # else the lowest layer needs a little less
        network = get_peft_model(model, LoraConfig(r=r, target_modules="all-linear"))
    needed = NeededWork(tmp_path, r)
    # Eager attention computes the whole square and a causal one needs half of it, so that twice the squares is what torch counts.
    expected = needed.count(TOKENS, TOKENS, 2 * TOKENS**2, reference=False)
    assert count_with_torch(network) == pytest.approx(expected, rel=1e-3)
    assert needed.adapters == (0 if r is None else sum(p.numel() for p in network.parameters() if p.requires_grad))


def test_a_reference_costs_one_more_pass_forwards(tmp_path: Path) -> None:
    build_model().config.save_pretrained(tmp_path)
    needed = NeededWork(tmp_path, 4)
    with_adapters = needed.count(TOKENS, TOKENS, TOKENS**2, reference=False)
    alone = with_adapters - 6.0 * needed.adapters * TOKENS
    linear = alone - 3 * 2.0 * needed.queries * needed.layers * TOKENS**2
    forward = linear / 2 + 2.0 * needed.queries * needed.layers * TOKENS**2
    assert needed.count(TOKENS, TOKENS, TOKENS**2, reference=True) == pytest.approx(with_adapters + forward)


def make_pair() -> EncodedExample:
    # Prompt 10 11 12, answers 20 21 and 30 31 32; each branch begins with a copy of the prompt's last token.
    ids = np.array([10, 11, 12, 20, 21, 12, 30, 31, 32])
    mask = np.array([0, 0, 0, 1, 1, 0, 1, 1, 1], dtype=np.bool_)
    return EncodedExample(ids, mask, "", branch_starts=(2, 5))


class Letters:
    eos_token = "!"

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(str(i) for i in ids)


def test_a_pair_counts_as_two_conversations_that_share_their_prompt() -> None:
    pair = make_pair()
    assert measure_rows(pair) == [5, 6]
    assert measure_square(pair) == 5**2 + 6**2 - 2**2
    assert convert_example(pair, Letters()) == {"prompt": "10 11 12", "chosen": "20 21", "rejected": "30 31 32"}


def test_labels_hide_what_is_not_learned_and_the_first_token() -> None:
    row = convert_example(EncodedExample(np.array([7, 8, 9]), np.array([True, False, True]), ""), Letters())
    assert row == {"input_ids": [7, 8, 9], "labels": [-100, -100, 9]}


def make_run(side: str, **changes: object) -> Measurement:
    run = Measurement(
        side=side,
        work="medium",
        round=0,
        cold=True,
        started=100.0,
        ends=[110.0, 112.0, 116.0],
        tokens=[10, 20, 30],
        supervised=[1, 2, 3],
        losses=[2.0, 1.5, 1.0],
        norms=[1.0, 1.0, 1.0],
        trainable=99,
        peak_bytes=10**9,
        dtype="float32",
        versions={},
    )
    return replace(run, **changes)


def make_result(*runs: Measurement) -> WorkResult:
    return WorkResult(
        work="medium",
        date="2026-01-01",
        source="rows",
        tokens=[10, 20, 30],
        own_tokens=[10, 20, 30],
        supervised=[1, 2, 3],
        needed=[1e9, 2e9, 3e9],
        trainable=99,
        peak_flops=1e9,
        kept_up_flops=[0.7e9, 0.9e9, 0.8e9],
        runs=list(runs),
    )


def test_speed_leaves_the_first_step_out_and_is_compared_with_the_bound() -> None:
    result = make_result(make_run("tunebook"), make_run("tunebook", round=1, cold=False, ends=[105.0, 106.0, 108.0]))
    summary = summarise(result, "tunebook")
    assert summary.speeds == [50 / 6, 50 / 3]
    assert summary.first == {True: 10.0, False: 5.0}
    assert summary.bound == pytest.approx(5 / 4.5)
    assert summary.kept_up == pytest.approx(5 / 4.5 / 0.8)
    page = "\n".join(format_work(result))
    assert "| 111 % | 139 % |" in page
    assert "Kept up for 10 s, products reach 1 GFLOP/s (1 to 1)." in page
    old = format_work(replace(result, kept_up_flops=[]))  # of a session that did not measure it
    assert "Kept up" not in "\n".join(old)


def test_products_kept_up_are_no_faster_than_the_fastest_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_bound, "SIZES", ((64, 64, 64), (128, 128, 128)))
    monkeypatch.setattr(speed_bound, "SECONDS", 0.05)
    monkeypatch.setattr(speed_bound, "KEPT_UP_SECONDS", 0.2)
    fastest, kept_up = speed_bound.measure_peak("float32")
    assert 1e8 < kept_up < 2 * fastest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": [10, 20, 31]}, "saw 61 tokens and not 60"),
        ({"supervised": [1, 2, 4]}, "learned 7 tokens and not 6"),
        ({"trainable": 0}, "trained 0 parameters and not 99"),
        ({"norms": [1.0, 0.0, 1.0]}, "a gradient is zero"),
        ({"losses": [2.1, 1.5, 1.0]}, "its first loss is 5.0 % from that of TRL tuned"),
        ({"losses": [2.0, 1.8, 1.3]}, "its losses are 13.3 % from those of TRL tuned"),
        ({"losses": [2.0, float("nan"), 1.0]}, "finite losses"),
        ({"error": "Killed"}, "stopped: Killed"),
    ],
)
def test_a_side_that_did_other_work_has_no_speed(changes: dict[str, object], words: str) -> None:
    result = make_result(make_run("tunebook", **changes), make_run("trl_tuned"))
    assert words in "; ".join(find_faults(result, result.runs[0]))
    assert find_faults(result, result.runs[1]) == []
    page = "\n".join(format_work(result))
    assert "| Tunebook | **INVALID**" in page
    assert "×" not in page  # nothing is compared with an invalid side


@pytest.mark.parametrize(
    ("dtype", "losses", "is_valid"),
    [
        ("float32, bfloat16 autocast", [2.0, 1.8, 1.3], True),
        ("bf16-true", [2.0, 1.8, 1.3], True),
        ("float32, bfloat16 autocast", [2.1, 1.5, 1.0], False),
        ("32-true", [2.0, 1.8, 1.3], False),
    ],
)
def test_sixteen_bits_are_held_to_the_first_loss_of_a_reference_in_thirty_two(
    dtype: str, losses: list[float], is_valid: bool
) -> None:
    result = make_result(make_run("trl", dtype=dtype, losses=losses), make_run("trl_tuned"))
    assert (find_faults(result, result.runs[0]) == []) == is_valid
    if is_valid:
        assert "1.7000 (1.5000)" in "\n".join(format_work(result))


def test_a_side_may_take_fewer_steps_and_is_measured_on_those() -> None:
    few = {name: getattr(make_run("trl"), name)[:2] for name in ("ends", "tokens", "supervised", "losses", "norms")}
    summary = summarise(make_result(make_run("tunebook"), make_run("trl", **few)), "trl")
    assert (summary.faults, summary.steps, summary.speeds) == ([], 2, [10.0])


def test_results_survive_being_written_and_read(tmp_path: Path) -> None:
    result = make_result(make_run("tunebook"))
    save_results([result], tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == [result]
    assert load_results(tmp_path / "none.json") == []


def test_an_earlier_session_is_taken_up_only_if_its_work_was_the_same() -> None:
    result, earlier = make_result(make_run("tunebook")), make_result(make_run("litgpt"))
    take_up(result, earlier)
    assert ([run.side for run in result.runs], result.sessions) == (["tunebook", "litgpt"], 2)
    other = make_result()
    take_up(other, replace(earlier, tokens=[10, 20]))
    assert (other.runs, other.sessions) == ([], 1)
    take_up(other, make_result(make_run("litgpt", error="no room")))
    assert (other.runs, other.sessions) == ([], 2)  # what failed is tried again


def test_each_line_of_a_growing_file_gets_the_time_at_which_it_was_complete(tmp_path: Path) -> None:
    path, ends = tmp_path / "metrics.jsonl", list[float]()
    look = watch_lines(path, ends)
    look()
    path.write_text("one\ntw")
    look()
    assert len(ends) == 1
    path.write_text("one\ntwo\nthree\n")
    look()
    assert len(ends) == 3
    assert ends == sorted(ends)


def test_a_command_is_measured_from_outside_and_its_last_words_are_kept(tmp_path: Path) -> None:
    hungry = ["python3", "-c", "x = bytearray(300_000_000)"]
    attempt = Attempt(0, tmp_path, tmp_path, 60.0)
    done = execute(hungry, {}, attempt, lambda: None)
    assert done.error is None
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert 300e6 < done.peak_bytes < max(500e6, 1.1 * ours)
    assert execute(["python3", "-c", "raise SystemExit('no room')"], {}, attempt, lambda: None).error == "no room"


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    attempt = Attempt(0, tmp_path, tmp_path, 0.3)
    done = execute(["python3", "-c", "import time; time.sleep(60)"], {}, attempt, lambda: None)
    assert done.error == "not done after 0 s"
    assert time.time() - done.started < 10


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say how busy it is")
def test_what_others_do_during_a_run_is_seen(tmp_path: Path) -> None:
    code = "import time; ends = time.time() + 1.5\nwhile time.time() < ends: pass"
    attempt = Attempt(0, tmp_path, tmp_path, 60.0)
    with subprocess.Popen(["python3", "-c", code]) as neighbour:
        beside = execute(["python3", "-c", code], {}, attempt, lambda: None)
        neighbour.wait()
    assert beside.foreign is not None
    # The neighbour works all the while, on a core of its own or on ours.
    assert beside.foreign > 0.4 / (os.cpu_count() or 1)


def test_sides_say_why_they_cannot_do_a_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBOOK_DEVICE", "cpu")
    assert SIDES["unsloth"].find_obstacle("medium") == "needs an NVIDIA GPU"
    assert SIDES["mlx_lm"].find_obstacle("long") == "not a work of this side"
    assert SIDES["tunebook"].find_obstacle("nf4") is None


@pytest.mark.parametrize("side", SIDES.values(), ids=list(SIDES))
def test_every_peer_has_a_script_and_an_environment_of_its_own(side: Side) -> None:
    if side.name in OUR_SIDES:
        assert side.script is None
    else:
        assert (PEERS / str(side.script)).is_file()
        assert (PEERS / f"requirements_{side.environment}.txt").is_file()
    assert set(side.works) <= set(WORKS)


@pytest.mark.parametrize(
    ("name", "shapes", "group", "flops"),
    [
        ("aten::mm", [[319, 576], [576, 1536]], LAYERS, 2 * 319 * 576 * 1536),
        ("aten::mm", [[319, 576], [576, 16]], ADAPTERS, 2 * 319 * 576 * 16),
        ("aten::addmm_", [[319, 1536], [319, 16], [16, 1536], [], []], ADAPTERS, 2 * 319 * 16 * 1536),
        ("aten::mm", [[60, 576], [576, 1024], [60, 1024]], HEAD, 2 * 60 * 576 * 1024),
        ("aten::mm", [[60, 49152], [49152, 576]], HEAD, 2 * 60 * 49152 * 576),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[1, 9, 319, 64]], ATTENTION, 0),
        ("aten::silu", [[1, 319, 1536]], REST, 0),
    ],
)
def test_a_profile_puts_each_operation_where_it_belongs(
    name: str, shapes: list[list[int]], group: str, flops: int
) -> None:
    assert classify(name, shapes, 49152) == (group, flops)
