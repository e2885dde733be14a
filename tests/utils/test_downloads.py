"""Downloads from the hub, against a real HTTP server that answers as the hub does: what is fetched, shown, resumed, refused."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

ROOT = Path(__file__).resolve().parents[2]
WHERE = "recipes/x.yaml:3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "canary" * 5
CONFIG = b'{"model_type": "llama"}'
WEIGHTS = save({"model.layers.0.mlp.up_proj.weight": np.random.default_rng(0).random((1000, 1000), np.float32)})
SMALL = {"config.json": CONFIG, "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "chat_template.jinja": b"x"}
UNWANTED = {
    "README.md": b"hello",
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
    "modeling_custom.py": b"raise SystemExit",
    "consolidated.safetensors": b"a second copy",
    "original/model.safetensors": b"a third copy",
}
# Runs calls in one process, because huggingface_hub reads its environment once, when it is imported.
DRIVER = """
import json, sys, time
from config.structured_config import ModelSection
from utils import download_progress, downloads
from utils.exceptions import TunebookError
from utils.logging import set_up_logging
from utils.model_source import find_model
set_up_logging()
download_progress.SECONDS_BETWEEN_LINES = 0.5
downloads.SECONDS_TO_ANSWER = downloads.SECONDS_TO_MEASURE = 2.0
downloads.RETRIES, downloads.RETRY_SECONDS = 2, 0.1
for what, section in json.loads(sys.argv[1]):
    model, where, started = ModelSection(**section), "recipes/x.yaml:3", time.monotonic()
    try:
        if what == "measure":
            status = downloads.find_download(model, where)
            result = status and [status.cached, status.missing_bytes, status.files, str(status.target)]
        else:
            result = str(find_model(model, where, with_weights=what == "weights").folder)
    except TunebookError as error:
        problem = error.problems[0]
        result = {"exit": error.exit_code, "code": problem.code, "where": problem.where, "text": str(error)}
    print(json.dumps([result, time.monotonic() - started]), flush=True)
print(json.dumps([[name for name in ("torch", "transformers", "datasets") if name in sys.modules], 0]))
"""


@dataclass
class Hub:
    """A hub with models in memory, and notes of every request.

    Attributes:
        send: writes the body of a large file; tests replace it by a server that breaks off, stalls or lies.
    """

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    tokens: dict[str, list[str | None]] = field(default_factory=lambda: {"hub": [], "cdn": []})
    stalled: bool = False
    send: Callable[[BaseHTTPRequestHandler, bytes], None] | None = None
    cdn: str = ""
    address: str = ""

    def list_files(self, model: str, tree: bool) -> list[dict[str, Any]]:
        """The files as the hub lists them in model_info, or in the tree."""
        found = []
        for name, content in self.models[model].items():
            size, digest = self.sizes.get(name, len(content)), hashlib.sha256(content).hexdigest()
            blob = hashlib.sha1(content).hexdigest()
            entry = {"type": "file", "path": name, "oid": blob} if tree else {"rfilename": name, "blobId": blob}
            if name.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"size": size, "oid" if tree else "sha256": digest, "pointerSize": 130}
            found.append({**entry, "size": size})
        return found

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """The hub itself: metadata, small files, and redirects of large files to the CDN."""
        self.requests.append((request.command, request.path))
        self.tokens["hub"].append(request.headers.get("authorization"))
        while self.stalled:
            time.sleep(0.05)
        path = request.path.split("?")[0].lstrip("/")
        matched = re.fullmatch(
            r"(?:api/models/|api/datasets/|datasets/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?",
            path,
        )
        assert matched, path
        model, kind, revision, name = matched.groups()
        failure = self.failures.get(f"{model}/{name}") or self.failures.get(model)
        if not failure and model not in self.models:
            failure = (404, "RepoNotFound")
        if not failure and revision not in (None, "main", COMMIT):
            failure = (404, "RevisionNotFound")
        if failure:
            reply(request, failure[0], b"{}", {"X-Error-Code": failure[1]} if failure[1] else {})
        elif kind == "tree":
            reply(request, 200, json.dumps(self.list_files(model, True)).encode())
        elif kind != "resolve":
            info = {"id": model, "sha": COMMIT, "siblings": self.list_files(model, False)}
            reply(request, 200, json.dumps(info).encode())
        else:
            self.give_file(request, model, str(name))

    def give_file(self, request: BaseHTTPRequestHandler, model: str, name: str) -> None:
        """A small file, or where a large one lies."""
        content = self.models[model][name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if name.endswith((".safetensors", ".bin")):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            reply(request, 302, b"", {**headers, "Location": f"{self.cdn}/{model}/{name}"})
        else:
            reply(request, 200, content, headers)

    def answer_as_cdn(self, request: BaseHTTPRequestHandler) -> None:
        """The host of the large files, which knows ranges."""
        self.tokens["cdn"].append(request.headers.get("authorization"))
        self.ranges.append(request.headers.get("range"))
        model, name = re.fullmatch(r"/([^/]+/[^/]+)/(.+)", request.path).groups()  # type: ignore[union-attr]
        content = self.models[model][name]
        if self.send:
            self.send(request, content)
        else:
            send_range(request, content)


def reply(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def start_of(request: BaseHTTPRequestHandler) -> int:
    return int(re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "bytes=0-")).group(1))  # type: ignore[union-attr]


def send_range(request: BaseHTTPRequestHandler, content: bytes, until: int | None = None, pause: float = 0.0) -> None:
    """Answers a range, but breaks off at `until`; with a pause after each half megabyte."""
    start = start_of(request)
    request.send_response(206)
    request.send_header("Content-Length", str(len(content) - start))
    request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    request.end_headers()
    for at in range(start, until or len(content), 500_000):
        request.wfile.write(content[at : min(at + 500_000, until or len(content))])
        request.wfile.flush()
        time.sleep(pause)
    request.close_connection = True


def serve(answer: Callable[[BaseHTTPRequestHandler], None]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(models={"lab/good": {**SMALL, **UNWANTED, "model.safetensors": WEIGHTS}})
    servers = [serve(hub.answer), serve(hub.answer_as_cdn)]
    hub.address, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    yield hub
    hub.stalled = False
    for server in servers:
        server.shutdown()
        server.server_close()


def make_environment(hub: Hub | str, home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    address = hub if isinstance(hub, str) else hub.address
    return {**kept, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "NO_PROXY": "*", **more}


def make_command(*calls: tuple[str, str | dict[str, Any]]) -> list[str]:
    sections = [(what, {"name": model} if isinstance(model, str) else model) for what, model in calls]
    return [sys.executable, "-c", DRIVER, json.dumps(sections)]


def call(
    hub: Hub | str, home: Path, *calls: tuple[str, str | dict[str, Any]], **more: str
) -> tuple[list[Any], list[float], str]:
    """Results and seconds of each call, and what was logged."""
    environment = make_environment(hub, home, **more)
    done = subprocess.run(
        make_command(*calls), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    *lines, modules = [json.loads(line) for line in done.stdout.splitlines()]
    assert modules[0] == []
    return [line[0] for line in lines], [line[1] for line in lines], done.stderr


def list_fetched(hub: Hub) -> set[str]:
    return {
        path.split(f"/resolve/{COMMIT}/")[-1].split("/resolve/main/")[-1]
        for _, path in hub.requests
        if "resolve" in path
    }


def find_blob_folder(home: Path) -> Path:
    return home / "hub" / "models--lab--good" / "blobs"


def test_a_model_is_fetched_whole_and_nothing_else_and_then_never_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    (folder,), _, log = call(hub, tmp_path, ("weights", "lab/good"))
    assert {path.name for path in Path(folder).iterdir()} == {*SMALL, "model.safetensors"}
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
    assert list_fetched(hub) == {*SMALL, "model.safetensors"}
    storage = tmp_path / "hub" / "models--lab--good"
    assert re.search(rf"Downloading lab/good: 1 files?, 4 MB, to {storage}", log), log
    assert re.search(r"lab/good: 4 MB of 4 MB in \d s \(\S+ [kM]B/s\)", log), log

    asked = len(hub.requests)
    again, _, log = call(hub, tmp_path, ("weights", "lab/good"), ("small", "lab/good"), ("measure", "lab/good"))
    assert again == [folder, folder, [True, 0, 0, str(storage)]]
    assert (len(hub.requests), log) == (asked, "")
    assert call(hub, tmp_path, ("weights", "lab/good"), HF_HUB_OFFLINE="1")[0] == [folder]


def test_config_and_tokenizer_alone_are_not_a_cached_model(hub: Hub, tmp_path: Path) -> None:
    (before, folder, status), _, _ = call(
        hub, tmp_path, ("measure", "lab/good"), ("small", "lab/good"), ("measure", "lab/good")
    )
    storage = str(tmp_path / "hub" / "models--lab--good")
    small = sum(len(content) for content in SMALL.values())
    assert before == [False, len(WEIGHTS) + small, len(SMALL) + 1, storage]
    assert status == [False, len(WEIGHTS), 1, storage]
    assert not (Path(folder) / "model.safetensors").exists()
    assert hub.ranges == []
    (offline, unknown), seconds, _ = call(
        hub, tmp_path, ("weights", "lab/good"), ("measure", "lab/none"), HF_HUB_OFFLINE="1"
    )
    assert offline["code"] == "offline"
    assert unknown == [False, None, 0, str(tmp_path / "hub" / "models--lab--none")]
    assert max(seconds) < 2
    assert call(hub, tmp_path, ("weights", "lab/good"))[0] == [folder]


def test_weights_in_parts_are_those_that_the_index_names(hub: Hub, tmp_path: Path) -> None:
    names = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    index = json.dumps({"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}).encode()
    parts = {"model.safetensors.index.json": index, names[0]: WEIGHTS, names[1]: WEIGHTS[:-4] + b"last"}
    hub.models["lab/parts"] = {**SMALL, **parts, "model.fp16.safetensors": WEIGHTS}
    hub.failures["lab/parts/" + names[1]] = (503, "")
    results, _, _ = call(hub, tmp_path, ("weights", "lab/parts"), ("measure", "lab/parts"))
    assert results[0]["code"] == "hub"
    hub.failures.clear()
    # The snapshot holds one of two parts, or none yet: in both cases it is not complete.
    assert results[1][0] is False
    (folder,), _, _ = call(hub, tmp_path, ("weights", "lab/parts"))
    assert {path.name for path in Path(folder).glob("*.safetensors")} == set(names)
    assert "model.fp16.safetensors" not in list_fetched(hub)


# What the hub answers → exit code, code, and a word of the fix.
REFUSALS = [
    ("lab/missing", {}, 2, "no-model", "HF_TOKEN"),
    ("lab/good", {"revision": "v9"}, 2, "no-revision", "model.revision"),
    ("lab/gated", {}, 4, "gated", "HF_TOKEN"),
    ("lab/badtoken", {}, 4, "gated", "HF_TOKEN"),
    ("lab/private", {}, 4, "gated", "HF_TOKEN"),
    ("lab/down", {}, 4, "hub", "later"),
    ("lab/pickles", {}, 4, "no-weights", "safe_serialization"),
    ("lab/adapter", {}, 4, "no-weights", "base model"),
    ("lab/outside", {}, 4, "unsafe-index", "another copy"),
    ("lab/holes", {}, 4, "no-weights", "another model"),
    ("lab/huge", {}, 4, "disk", "HF_HOME"),
    ("lab/config", {}, 4, "no-config", ""),
]


def test_what_cannot_be_had_is_refused_with_a_fix_before_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    index = "model.safetensors.index.json"
    outside = json.dumps({"weight_map": {"a": "../../../outside.safetensors"}}).encode()
    holes = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
    hub.models |= {
        "lab/pickles": {**SMALL, "pytorch_model.bin": b"pickle"},
        "lab/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS},
        "lab/outside": {**SMALL, index: outside},
        "lab/holes": {**SMALL, index: holes},
        "lab/huge": {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": b"{ }"},
        "lab/config": {"config.json": b" " * 11_000_000, "model.safetensors": b"", "tokenizer.json": b"{}"},
        "lab/gated": {**SMALL, "model.safetensors": WEIGHTS},
    }
    hub.failures |= {
        "lab/gated/config.json": (403, "GatedRepo"),
        "lab/badtoken": (401, ""),
        "lab/private": (403, ""),
        "lab/down": (500, ""),
    }
    hub.sizes["tokenizer.json"] = 2
    calls: list[tuple[str, dict[str, Any]]] = [
        ("weights", {"name": name, **more}) for name, more, *_ in REFUSALS if name != "lab/huge"
    ]
    results, _, _ = call(hub, tmp_path, *calls)
    hub.sizes["model.safetensors"] = 10**16
    results.insert(10, call(hub, tmp_path, ("weights", "lab/huge"))[0][0])
    found = [(result["exit"], result["code"]) for result in results]
    assert found == [(exit_code, code) for _, _, exit_code, code, _ in REFUSALS]
    for (name, _, _, code, word), result in zip(REFUSALS, results, strict=True):
        assert word in result["text"], name
        assert result["where"] == WHERE or code in ("unsafe-index", "disk", "no-config"), name
    assert hub.ranges == []
    assert not [name for name in list_fetched(hub) if name.endswith((".bin", ".safetensors"))]


def test_code_of_a_model_is_fetched_only_where_the_recipe_trusts_it(hub: Hub, tmp_path: Path) -> None:
    (folder,), _, _ = call(hub, tmp_path, ("small", {"name": "lab/good", "trust_remote_code": True}))
    assert (Path(folder) / "modeling_custom.py").exists()
    assert "pytorch_model.bin" not in list_fetched(hub)


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub: Hub, tmp_path: Path) -> None:
    call(hub, tmp_path, ("weights", "lab/good"))
    assert set(hub.tokens["hub"]) == {f"Bearer {TOKEN}"}
    assert hub.tokens["cdn"] == [None]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_hub_that_is_unreachable_is_an_error_with_ways_on(tmp_path: Path, address: str) -> None:
    results, seconds, _ = call(address, tmp_path, ("weights", "lab/good"), ("measure", "lab/good"))
    assert (results[0]["exit"], results[0]["code"], results[0]["where"]) == (4, "offline", WHERE)
    assert "hf download lab/good" in results[0]["text"]
    assert "embedded/" in results[0]["text"]
    assert results[1][:3] == [False, None, 0]
    assert max(seconds) < 5


def test_a_hub_that_never_answers_delays_a_check_by_its_limit_only(hub: Hub, tmp_path: Path) -> None:
    hub.stalled = True
    (status, error), seconds, _ = call(hub, tmp_path, ("measure", "lab/good"), ("weights", "lab/good"))
    assert status[:3] == [False, None, 0]
    assert error["code"] == "offline"
    assert max(seconds) < 4  # the driver sets the limits to 2 seconds


def test_a_cache_that_another_tool_filled_serves_without_a_network(hub: Hub, tmp_path: Path) -> None:
    # transformers fetches file by file and leaves no list of what belongs to the snapshot.
    (folder,), _, _ = call(hub, tmp_path, ("weights", "lab/good"))
    for path in (tmp_path / "hub" / "models--lab--good" / "trees").iterdir():
        path.unlink()
    assert call(hub, tmp_path, ("weights", "lab/good"), HF_HUB_OFFLINE="1")[0] == [folder]
    (found,), _, log = call("http://127.0.0.1:9", tmp_path, ("weights", "lab/good"))
    assert found == folder
    assert "cannot be reached" in log


def test_a_connection_that_breaks_off_is_opened_again_where_it_ended(hub: Hub, tmp_path: Path) -> None:
    hub.send = lambda request, content: send_range(request, content, min(start_of(request) + 1_500_000, len(content)))
    (folder,), _, _ = call(hub, tmp_path, ("weights", "lab/good"))
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in hub.ranges if text]
    assert starts == [0, 1 << 20, 2 << 20, 3 << 20]  # whole pieces are kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_was_ended_goes_on_where_it_was(hub: Hub, tmp_path: Path, number: signal.Signals) -> None:
    # huggingface_hub 2.4 gives each attempt a file of its own and deletes it: 5 GB lost at every Ctrl-C.
    hub.send = lambda request, content: send_range(request, content, pause=1.0)
    environment = make_environment(hub, tmp_path)
    running = subprocess.Popen(
        make_command(("weights", "lab/good")),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell lets what it starts in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any(
        path.stat().st_size >= 1_000_000 for path in find_blob_folder(tmp_path).glob("*.incomplete")
    ):
        time.sleep(0.05)
    ended = time.monotonic()
    running.send_signal(number)
    running.communicate(timeout=20)
    assert time.monotonic() - ended < 5  # a read or two of the server that sends half a megabyte a second
    hub.send, hub.ranges = None, []
    (folder,), _, log = call(hub, tmp_path, ("weights", "lab/good"))
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.ranges) == 1
    assert int(re.findall(r"\d+", hub.ranges[0] or "")[0]) >= 1_000_000
    assert "are here already" in log
    assert not list(find_blob_folder(tmp_path).glob("*.incomplete"))


def test_a_server_without_ranges_makes_the_file_begin_again(hub: Hub, tmp_path: Path) -> None:
    find_blob_folder(tmp_path).mkdir(parents=True)
    partial = find_blob_folder(tmp_path) / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    partial.write_bytes(WEIGHTS[:1_000_000])
    hub.send = lambda request, content: reply(request, 200, content)
    (folder,), _, _ = call(hub, tmp_path, ("weights", "lab/good"))
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("body", [WEIGHTS[:-1] + b"?", WEIGHTS + b"more"], ids=["changed", "longer"])
def test_a_file_that_is_not_the_one_listed_is_refused_and_removed(hub: Hub, tmp_path: Path, body: bytes) -> None:
    hub.send = lambda request, content: reply(request, 200, body)
    (error,), _, _ = call(hub, tmp_path, ("weights", "lab/good"))
    assert (error["exit"], error["code"]) == (4, "damaged")
    assert not list(tmp_path.rglob("model.safetensors"))
    assert not list(find_blob_folder(tmp_path).glob("*.incomplete"))


def test_two_processes_download_a_file_once(hub: Hub, tmp_path: Path) -> None:
    hub.send = lambda request, content: send_range(request, content, pause=0.1)
    environment = make_environment(hub, tmp_path)
    both = [
        subprocess.Popen(
            make_command(("weights", "lab/good")), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    folders = [json.loads(process.communicate(timeout=60)[0].splitlines()[0])[0] for process in both]
    assert folders[0] == folders[1]
    assert hub.ranges == ["bytes=0-"]


def test_a_log_gets_lines_with_name_size_and_speed_as_the_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.send = lambda request, content: send_range(request, content, pause=0.2)
    _, _, log = call(hub, tmp_path, ("weights", "lab/good"))
    assert re.search(r"lab/good: \d\.?\d* MB of 4 MB, \d+\.?\d* [kM]B/s\n", log), log


def test_a_terminal_gets_a_bar_for_each_file(hub: Hub, tmp_path: Path) -> None:
    hub.send = lambda request, content: send_range(request, content, pause=0.1)
    ours, theirs = pty.openpty()
    command = make_command(("weights", "lab/good"))
    environment = make_environment(hub, tmp_path, TERM="xterm", COLUMNS="160")
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # Linux says that the other end is closed
        pass
    assert running.wait(timeout=30) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"model\.safetensors .*\d\.\d/4\.0 MB \d\.\d MB/s left", text), text
    assert TOKEN not in text
    assert "Reconstruct" not in text  # huggingface_hub's own bars


def test_random_bytes_from_a_server_are_an_error_and_no_traceback(hub: Hub, tmp_path: Path) -> None:
    source = random.Random(0)
    hub.models["lab/noise"] = {
        "config.json": source.randbytes(500),
        "tokenizer.json": source.randbytes(500),
        "model.safetensors.index.json": source.randbytes(500),
    }
    (error, small), _, _ = call(hub, tmp_path, ("weights", "lab/noise"), ("small", "lab/noise"))
    assert error["code"] == small["code"] == "no-config"
