"""A new model through the real scripts: trained from a text file, evaluated, asked, and again the same."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.conftest import Finished, RunScript

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "the cat sat on the mat and the dog ran to the sea.\n"


def write_recipe(folder: Path, architecture: str) -> Path:
    """A recipe for a tiny new model and its corpus."""
    (folder / "corpus.txt").write_text(SENTENCE * 80, encoding="utf-8")
    steps = {"llama": 100, "gpt2": 150}[architecture]
    recipe = {
        "model": {"name": "tiny", "init": "scratch"},
        "data": {"train": str(folder / "corpus.txt")},
        # 32 and the sentence's 51 characters share no factor: windows begin at each of its letters.
        "scratch": {"architecture": architecture, "layers": 2, "heads": 2, "width": 32, "context": 64, "stride": 32},
        "training": {
            "method": "sft",
            "batch_size": 16,
            "learning_rate": 1e-2,
            "max_steps": steps,
            "eval_every": steps // 2,
        },
        "generation": {"max_new_tokens": 150},
        "evaluation": {"metrics": ["loss", "perplexity"]},
    }
    path = folder / f"tiny_{architecture}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_apart(run_script: RunScript) -> RunScript:
    """Runs a script with a cache of its own in the working folder."""

    def run(*arguments: object, cwd: Path, stdin: str = "") -> Finished:
        return run_script(*arguments, cwd=cwd, stdin=stdin, TUNEBOOK_CACHE=str(cwd / "cache"))

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, run_apart: RunScript) -> Path:
    """A working folder with a finished run called `run`."""
    work = tmp_path_factory.mktemp("work")
    done = run_apart("train", "--recipe", write_recipe(work, "llama"), "--run", work / "run", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on: " in done.stderr
    return work


@pytest.fixture(scope="module")
def followed_up(finished: Path, run_apart: RunScript) -> list[Finished]:
    """That run evaluated, its model folder asked, and its recipe trained once more into `again`."""
    ask = ("infer", "--model", finished / "run" / "model", "--prompt", "the dog")
    commands = [
        ("evaluate_run", "--run", finished / "run"),
        (*ask, "--set", "generation.max_new_tokens=20"),
        ("train", "--recipe", finished / "tiny_llama.yaml", "--run", finished / "again"),
    ]
    return [run_apart(*command, cwd=finished) for command in commands]


def test_a_new_model_learns_its_text(finished: Path) -> None:
    facts = json.loads((finished / "run" / "run.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert facts["status"] == "finished"
    assert facts["dtype"] == "float32"
    assert facts["trainable_parameters"] == facts["parameters"]
    assert rows[0]["loss"] > 2.5
    assert facts["eval_loss"] < 0.5
    names = {path.name for path in (finished / "run" / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".pt"))]


def test_the_report_compares_the_random_model_with_the_trained_one(finished: Path, followed_up: list[Finished]) -> None:
    done = followed_up[0]
    assert done.returncode == 0, done.stderr
    report = json.loads((finished / "run" / "report.json").read_text(encoding="utf-8"))
    loss, perplexity = report["metrics"]["loss"], report["metrics"]["perplexity"]
    assert loss["base"] == pytest.approx(3.0, abs=0.3)  # ln of 19 characters and 2 control tokens
    assert loss["tuned"] < 0.5
    assert perplexity["tuned"] < 1.7 < 15 < perplexity["base"]
    assert "the cat sat" in report["text"]["tuned"]
    assert "the cat sat" not in report["text"]["base"]
    assert "infer.py" in done.stdout
    assert "merge.py" not in done.stdout  # which refuses a run that has no base
    assert "Text before and after" in (finished / "run" / "report.md").read_text(encoding="utf-8")


def test_infer_goes_on_beyond_the_context_and_needs_no_corpus(finished: Path, run_apart: RunScript) -> None:
    (finished / "corpus.txt").rename(finished / "gone.txt")
    done = run_apart("infer", "--run", finished / "run", "--prompt", "the cat", cwd=finished)
    (finished / "gone.txt").rename(finished / "corpus.txt")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.rstrip("\n")) >= 140
    assert "dog ran to the sea" in done.stdout


def test_a_conversation_takes_each_prompt_by_itself_and_goes_on_after_an_unknown_character(
    finished: Path, run_apart: RunScript
) -> None:
    talk = "the dog\nQuick\nthe dog\n/exit\n"
    done = run_apart("infer", "--run", finished / "run", cwd=finished, stdin=talk)
    assert done.returncode == 0, done.stderr
    assert "does not know 'Q'" in done.stderr
    answers = done.stdout.split("> ")
    assert "ran to the sea" in answers[1]
    assert answers[1] == answers[3]


def test_infer_loads_the_model_folder_alone(followed_up: list[Finished]) -> None:
    asked = followed_up[1]
    assert asked.returncode == 0, asked.stderr
    assert "ran to the sea" in asked.stdout


def test_merge_says_that_there_is_nothing_to_merge(finished: Path, run_apart: RunScript) -> None:
    done = run_apart("merge", "--run", finished / "run", cwd=finished)
    assert done.returncode == 5
    assert str(finished / "run" / "model") in done.stderr


def test_two_runs_give_equal_weights(finished: Path, followed_up: list[Finished]) -> None:
    done = followed_up[2]
    assert done.returncode == 0, done.stderr
    first, second = (load_file(finished / name / "model" / "model.safetensors") for name in ("run", "again"))
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)


def test_gpt2_trains_and_answers_beyond_its_last_position(tmp_path: Path, run_apart: RunScript) -> None:
    # GPT-2 has an embedding for each position: without a sliding window the 65th token would be an IndexError.
    run = ("--run", tmp_path / "run")
    train = ("train", "--recipe", write_recipe(tmp_path, "gpt2"), *run)
    done, asked = run_apart(*train, cwd=tmp_path), run_apart("infer", *run, "--prompt", "the cat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["eval_loss"] < 0.5
    assert asked.returncode == 0, asked.stderr
    assert len(asked.stdout) >= 140
    assert "sat on the mat" in asked.stdout
