"""Bad input to the real scripts: code, one clear line, nothing left behind, nothing heavy imported, at once.

Hundreds of further cases stand in `bad_inputs/`.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import Finished, ScriptServer

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
HEAVY = ("torch", "transformers", "numpy", "peft", "accelerate", "tokenizers", "huggingface_hub", "matplotlib")
GOOD_ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}) + "\n"
    for n in range(12)
)
HELP_SECONDS = 0.6  # of the contract; 0.35 on an idle machine


def make_environment(folder: Path) -> dict[str, str]:
    """Offline, with empty caches: whatever a script would fetch or convert shows up as an error or a folder."""
    caches = {"HF_HOME": str(folder / "hub"), "TUNEBOOK_CACHE": str(folder / "cache")}
    return {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **caches}


RunIn = Callable[..., Finished]


@pytest.fixture
def run_in(script_server: ScriptServer) -> RunIn:
    """`run_in(folder, "train", "--recipe", path)` runs a script in `folder/work`, an empty working directory."""

    def run(folder: Path, name: str, *arguments: object, **environment: str) -> Finished:
        work = folder / "work"
        work.mkdir(exist_ok=True)
        return script_server.run(name, *arguments, cwd=work, **make_environment(folder), **environment)

    return run


def write_recipe(folder: Path, text: str = "", **replaced: str) -> Path:
    """A valid recipe with good rows, some sections replaced and text added at its end."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text(GOOD_ROWS, encoding="utf-8")
    sections = {
        "model": "\n  name: embedded/smollm2-135m-instruct",
        "data": f"\n  train: {rows}",
        "training": "\n  method: sft\n  epochs: 1",
        **replaced,
    }
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{name}:{body}\n" for name, body in sections.items()) + text, encoding="utf-8")
    return path


def assert_refused(done: Finished, folder: Path, code: int, *words: str, count: int = 1) -> None:
    """The exit code, `count` error lines that hold all words, no traceback, and no trace of a run."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code, done.stderr
    assert len(errors) == count, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines() == errors, "more than the errors was printed"
    for word in words:
        assert word in done.stderr
    assert list((folder / "work").iterdir()) == [], "something was left in the working directory"
    assert not (folder / "cache").exists(), "a model was converted before the problem was found"


READERS = ("validate", "train", "baseline_inference")
WANT_RUNS = ("merge", "infer", "evaluate_run", "reproduce")


@pytest.mark.parametrize("script", READERS)
def test_every_script_that_reads_a_recipe_answers_a_typo_with_its_line(
    tmp_path: Path, run_in: RunIn, script: str
) -> None:
    path = write_recipe(tmp_path, "lora:\n  ranc: 8\n")
    done = run_in(tmp_path, script, "--recipe", path)
    assert_refused(done, tmp_path, 2, f"{path}:9: unknown key lora.ranc")
    assert done.stdout == ""


def test_strategy_chat_is_refused_for_models_without_a_chat_template_before_any_download(
    tmp_path: Path, run_in: RunIn
) -> None:
    commands = []
    for name in ("openai-community/gpt2", "EleutherAI/gpt-neo-125m", "EleutherAI/gpt-j-6b"):
        folder = tmp_path / name.partition("/")[2]
        folder.mkdir()
        data = f"\n  train: {folder / 'rows.jsonl'}\n  strategy: chat"
        path = write_recipe(folder, model=f"\n  name: {name}", data=data)
        commands.append(("train", "--recipe", path))
        assert_refused(run_in(folder, *commands[-1]), folder, 2, f"{path}:5", "no chat template", "strategy: standard")
    # The hub's library reads the name of its folder when it is imported.
    list_heavy_imports(tmp_path, *commands)
    assert not (tmp_path / "hub").exists()


def test_a_hub_model_that_is_not_in_the_cache_offline_is_a_machine_error_with_a_way_out(
    tmp_path: Path, run_in: RunIn
) -> None:
    path = write_recipe(tmp_path, model="\n  name: nobody/no-such-model")
    done = run_in(tmp_path, "train", "--recipe", path)
    assert_refused(done, tmp_path, 4, f"{path}:2", "nobody/no-such-model", "embedded/smollm2-135m-instruct")


@pytest.mark.parametrize("script", WANT_RUNS)
def test_scripts_that_need_a_run_say_that_there_is_none(tmp_path: Path, run_in: RunIn, script: str) -> None:
    assert_refused(run_in(tmp_path, script), tmp_path, 5, "there is no run yet", "scripts/train.py")
    (tmp_path / "bogus").mkdir()
    done = run_in(tmp_path, script, "--run", tmp_path / "bogus")
    assert_refused(done, tmp_path, 5, f"error: {tmp_path / 'bogus'}: ", "not a run folder")
    done = run_in(tmp_path, script, "--run", tmp_path / "nowhere")
    assert_refused(done, tmp_path, 5, f"error: {tmp_path / 'nowhere'}: ")


@pytest.mark.parametrize("script", WANT_RUNS)
def test_a_run_that_failed_has_nothing_to_give(tmp_path: Path, run_in: RunIn, script: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(write_recipe(tmp_path).read_text(encoding="utf-8"), encoding="utf-8")
    (run / "run.json").write_text('{"status": "failed"}', encoding="utf-8")
    done = run_in(tmp_path, script, "--run", run)
    assert_refused(done, tmp_path, 5, f"error: {run}: ", "failed")


def test_a_plain_model_takes_generation_settings_only(tmp_path: Path, run_in: RunIn) -> None:
    arguments = ("--model", "embedded/x", "--prompt", "hi")
    done = run_in(tmp_path, "infer", *arguments, "--set", "training.epochs=1")
    assert_refused(done, tmp_path, 2, "--set training.epochs=1", "generation")
    done = run_in(tmp_path, "infer", *arguments, "--set", "generation.temperature=-1")
    assert_refused(done, tmp_path, 2, "--set generation.temperature: ", "at least 0")
    done = run_in(tmp_path, "infer", *arguments)
    assert_refused(done, tmp_path, 2, "'embedded/x'", "embedded/smollm2-135m-instruct")


def test_settings_that_a_plain_model_would_ignore_are_refused(tmp_path: Path, run_in: RunIn) -> None:
    # top_p under greedy decoding was a traceback of pydantic.
    arguments = (
        "--model",
        "embedded/smollm2-135m-instruct",
        "--prompts",
        write_recipe(tmp_path).with_name("rows.jsonl"),
    )
    done = run_in(tmp_path, "infer", *arguments, "--set", "generation.top_p=0.5")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --set generation.top_p: top_p only acts when sampling")


@pytest.mark.parametrize("override", ["data.template=alpaca", "model.name=other", "lora.r=4", "data.loss_on=all"])
def test_what_a_finished_run_was_trained_with_cannot_be_overridden(
    tmp_path: Path, run_in: RunIn, override: str
) -> None:
    # Another template was ignored, and another model.name took another base, both in silence.
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(write_recipe(tmp_path).read_text(encoding="utf-8"), encoding="utf-8")
    (run / "run.json").write_text('{"status": "finished"}', encoding="utf-8")
    done = run_in(tmp_path, "infer", "--run", run, "--prompt", "hi", "--set", override)
    assert_refused(done, tmp_path, 2, f"error: --set {override.partition('=')[0]}: ", "generation.…")
    done = run_in(tmp_path, "infer", "--run", run, "--prompt", "hi", "--set", "generation.max_new_tokens=3")
    assert_refused(done, tmp_path, 5, "no trained weights")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("new_recipe", ("--model", "", "--data", "rows.jsonl")),
        ("new_recipe", ("--model", "x", "--data", " ")),
        ("prepare_data", ("--in", "", "--out", "x.jsonl")),
        ("prepare_data", ("--in", "a.jsonl", "--against", "", "--out", "x.jsonl")),
        ("infer", ("--model", "", "--prompt", "hi")),
    ],
)
def test_an_empty_name_is_refused_where_it_is_read(
    tmp_path: Path, run_in: RunIn, script: str, arguments: tuple[str, ...]
) -> None:
    # An unset shell variable was a traceback, and `infer.py --model ""` asked the latest run instead.
    done = run_in(tmp_path, script, *arguments)
    assert done.returncode == 2
    assert "the name is empty" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["lengths.xyz", "lengths"])
def test_a_picture_of_no_known_kind_is_refused_at_once(tmp_path: Path, run_in: RunIn, name: str) -> None:
    # It was a traceback after everything else; without a suffix, another file was written than the one that was named.
    done = run_in(tmp_path, "preview_data", "--recipe", write_recipe(tmp_path), "--picture", name)
    assert done.returncode == 2
    assert f"'{name}' does not end in .png" in done.stderr
    assert done.stdout == ""


def test_a_new_recipe_for_one_long_text_is_refused_with_a_way_out(tmp_path: Path, run_in: RunIn) -> None:
    (tmp_path / "corpus.txt").write_text("It was a dark night. " * 50, encoding="utf-8")
    out = tmp_path / "new.yaml"
    arguments = ("--model", "Qwen/Qwen2.5-0.5B-Instruct", "--data", tmp_path / "corpus.txt", "--out", out)
    done = run_in(tmp_path, "new_recipe", *arguments)
    assert_refused(done, tmp_path, 2, "error: --data: ", "one text without rows")
    assert not out.exists()


def test_problems_for_programs_are_json_on_stdout(tmp_path: Path, run_in: RunIn) -> None:
    path = write_recipe(tmp_path, "generation:\n  top_p: 0.9\nlora:\n  rr: 1\n")
    done = run_in(tmp_path, "validate", "--recipe", path, "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 2
    assert done.stderr == ""
    assert answer["ok"] is False
    assert [set(problem) for problem in answer["problems"]] == [{"code", "where", "message", "fix", "severity"}]
    assert answer["problems"][0]["code"] == "unknown-key"
    assert answer["problems"][0]["where"] == f"{path}:11"


def test_a_data_problem_for_programs_is_json_as_well(tmp_path: Path, run_in: RunIn) -> None:
    path = write_recipe(tmp_path, data="\n  train: nowhere.jsonl")
    done = run_in(tmp_path, "validate", "--recipe", path, "--json")
    assert done.returncode == 3
    assert [problem["code"] for problem in json.loads(done.stdout)["problems"]] == ["no-file"]


def test_a_secret_in_the_environment_is_never_printed(tmp_path: Path, run_in: RunIn) -> None:
    path = write_recipe(tmp_path, training="\n  method: sft\n  lr_scheduler: my-very-secret-value")
    done = run_in(tmp_path, "train", "--recipe", path, MY_API_KEY="my-very-secret-value")
    assert done.returncode == 2
    assert "training.lr_scheduler" in done.stderr
    assert "my-very-secret-value" not in done.stderr + done.stdout


def list_heavy_imports(folder: Path, *commands: Sequence[object]) -> list[list[str]]:
    """Heavy packages in sys.modules after each script has answered, one after the other in a new process."""
    code = (
        "import json, runpy, sys\n"
        "for sys.argv in json.loads(sys.argv[1]):\n"
        "    try:\n        runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit:\n        pass\n"
        f"    print('MODULES ' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    full = [[str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)] for name, *arguments in commands]
    environment = {**os.environ, **make_environment(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(full)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("MODULES ")]
    assert len(lines) == len(commands), done.stderr
    return [json.loads(line.removeprefix("MODULES ")) for line in lines]


def test_help_a_typo_and_a_missing_run_are_answered_without_importing_anything_heavy(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "lora:\n  ranc: 8\n")
    commands: list[Sequence[object]] = [(script.stem, "--help") for script in SCRIPTS]
    commands += [(name, "--recipe", path) for name in READERS]
    commands += [(name,) for name in WANT_RUNS]
    found = list_heavy_imports(tmp_path, *commands)
    assert {str(command): heavy for command, heavy in zip(commands, found, strict=True) if heavy} == {}


def measure_seconds(folder: Path, *command: object) -> float:
    """Processor time of a command, the shortest of five: on an idle machine its duration, and on a busy one the same."""
    best = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, timeout=60, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best < HELP_SECONDS:
            break
    return best


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_answers_at_once(tmp_path: Path, script: Path) -> None:
    assert measure_seconds(tmp_path, sys.executable, script, "--help") < HELP_SECONDS


def test_a_typo_is_answered_in_less_than_a_second(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "lora:\n  ranc: 8\n")
    assert measure_seconds(tmp_path, sys.executable, ROOT / "scripts" / "train.py", "--recipe", path) < 1.0
