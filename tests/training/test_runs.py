"""The command: its folder, its refusals, what it leaves behind, and that two processes do what one does."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch
from spikepatch.cli import main
from spikepatch.errors import BadTarget, Refused
from spikepatch.source.open import open_source
from spikepatch.training.folder import check_out
from spikepatch.training.going_on import write_record
from spikepatch.training.log import read
from spikepatch.training.run_identity import run_folder
from spikepatch.training.settings import Settings, TrainingCommand
from tests import ROOT
from tests.counting import counted
from tests.folders import hashes
from tests.training.models import config_folder, text

if TYPE_CHECKING:
    from tests.conftest import LocalHub

pytestmark = pytest.mark.slow  # processes, trainings, or models at full size


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    config_folder(folder / "gpt2", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config_folder(folder / "llama", "llama")
    text(folder)
    return folder


def arguments(inputs: Path, out: Path, *more: str, models: tuple[str, ...] = ("gpt2",), steps: int = 6) -> list[str]:
    return [
        "train", *(m.replace(":", f"{inputs}/") if ":" in m else f"{m}={inputs / m}" for m in models),
        "--data", str(inputs / "text.txt"), "--out", str(out), "--steps", str(steps), "--lr", "3e-3",
        "--batch-tokens", "256", "--seq-len", "32", "--watch-every", "0", *more,
    ]  # fmt: skip


def run(*given: Any, code: int, **options: Any) -> Result:
    result = CliRunner().invoke(main, arguments(*given, **options))
    assert result.exit_code == code, result.output
    return result


def refused(*given: Any, match: str, **options: Any) -> None:
    assert match in run(*given, code=2, **options).output


@pytest.fixture(scope="module")
def pair(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its patched twin at two rates and two seeds: eight runs."""
    out = tmp_path_factory.mktemp("pair") / "x"
    more = ("--lr-multipliers", "1,2", "--seeds", "0,1")
    run(inputs, out, *more, models=("plain=:gpt2", "patched=:gpt2@scaled-embed"), code=1)
    return out


RUNS = [f"{name}/lr{lr}-seed{seed}" for lr in ("3e-3", "6e-3") for seed in (0, 1) for name in ("plain", "patched")]


def test_what_a_folder_holds(pair: Path) -> None:
    found = {path.parent.relative_to(pair).as_posix() for path in pair.rglob("log.jsonl")}
    assert found == set(RUNS)
    for name in RUNS:
        assert {"log.jsonl", "model", "result.json"} <= {path.name for path in (pair / name).iterdir()}
        log = read(pair / name / "log.jsonl")
        assert len(log.steps) == 6
        assert json.loads((pair / name / "result.json").read_text())["verdict"] == "cannot tell"
    whole = json.loads((pair / "run.json").read_text())
    assert whole["commands"][0].startswith("spikepatch")
    assert {"torch", "transformers", "spikepatch"} <= set(whole["versions"])
    verdict = json.loads((pair / "verdict.json").read_text())
    assert verdict["exit_code"] == 1
    assert [f"{r['name']}/lr{r['lr'] * 1e3:g}e-3-seed{r['seed']}" for r in verdict["runs"]] == RUNS


def test_batches_are_the_seeds_alone(pair: Path) -> None:
    """The first loss of a model that gives every byte the same chance is the same on the same batch: log 256 and noise;
    so the batches are read from the logs of both, and weights differ by seed."""
    logs = {name: read(pair / name / "log.jsonl") for name in RUNS}
    assert {tuple(s.batch for s in log.steps) for log in logs.values()} == {tuple(range(6))}
    first = {name: log.steps[0].loss for name, log in logs.items()}
    for name in RUNS[:4]:
        assert first[name] == first[name.replace("3e-3", "6e-3")]
    assert first["plain/lr3e-3-seed0"] != first["plain/lr3e-3-seed1"]
    assert all(loss is not None and abs(loss - math.log(256)) < 1 for loss in first.values())


def test_the_trained_model_loads(pair: Path, inputs: Path) -> None:
    for name in ("plain", "patched"):
        folder = pair / f"{name}/lr3e-3-seed0/model"
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=name == "patched")
        assert model.config.use_cache
        assert all(p.dtype == torch.float32 for p in model.parameters())
        evals = read(folder.parent / "log.jsonl").evals
        assert evals[-1].loss is not None
    spikepatch.verify(pair / "patched/lr3e-3-seed0/model")


def test_the_trained_model_folds(pair: Path, tmp_path: Path) -> None:
    folder = pair / "patched/lr3e-3-seed0/model"
    spikepatch.fold(str(folder), tmp_path / "plain")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        patched = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    assert torch.equal(patched, plain)


def test_a_folder_with_weights_goes_on_with_them(pair: Path, inputs: Path, tmp_path: Path) -> None:
    """Its first loss is what the trained model has; a tokenizer that lies there is taken along."""
    folder = pair / "patched/lr3e-3-seed0/model"
    out = tmp_path / "x"
    more = ("--trust-remote-code",)
    result = CliRunner().invoke(main, [*arguments(inputs, out, *more, models=()), f"again={folder}"])
    assert result.exit_code == 1, result.output
    log = read(out / "again/lr3e-3-seed0/log.jsonl")
    assert log.run.patched
    assert log.run.recipe is None
    last = read(folder.parent / "log.jsonl").evals[-1].loss
    assert log.steps[0].loss is not None
    assert last is not None
    assert abs(log.steps[0].loss - last) < 0.5 < math.log(256) - last
    spikepatch.fold(str(out / "again/lr3e-3-seed0/model"), tmp_path / "plain")


def test_done_runs_are_not_run_again(pair: Path, inputs: Path) -> None:
    before = hashes(pair)
    more = ("--lr-multipliers", "1,2", "--seeds", "0,1", "--resume")
    run(inputs, pair, *more, models=("plain=:gpt2", "patched=:gpt2@scaled-embed"), code=1)
    changed = {name for name, value in hashes(pair).items() if before[name] != value}
    assert changed == {"run.json", "report.html"}  # which have one more command


def test_exit_code_0(inputs: Path, tmp_path: Path) -> None:
    result = run(inputs, tmp_path / "x", "--warmup", "2", "--json", models=("llama",), steps=66, code=0)
    verdict = json.loads(result.stdout)
    assert [r["verdict"] for r in verdict["runs"]] == ["healthy"]
    assert verdict == json.loads((tmp_path / "x/verdict.json").read_text())


def test_a_folder_that_is_not_empty(inputs: Path, pair: Path, tmp_path: Path) -> None:
    refused(inputs, pair, match="--resume goes on with them")
    (tmp_path / "notes.txt").touch()
    refused(inputs, tmp_path, match="what is in it is not of a training")
    refused(inputs, tmp_path, "--resume", match="it has no run.json")
    refused(inputs, tmp_path / "notes.txt", match="it is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_has_changed_is_named(inputs: Path, pair: Path) -> None:
    """By its option; what is not given is as it was."""
    before = hashes(pair)
    models = ("plain=:gpt2", "patched=:gpt2@scaled-embed")
    refused(inputs, pair, "--resume", "--grad-clip", "0", models=models, match="--grad-clip was 1.0 and is 0.0")
    refused(inputs, pair, "--resume", models=models, steps=7, match="with --schedule cosine the rate of every step")
    refused(inputs, pair, "--resume", models=models, steps=5, match="can only be raised")
    refused(inputs, pair, "--resume", "--seeds", "0", models=models, match="--seeds was [0, 1] and is [0]")
    refused(inputs, pair, "--resume", models=models[:1], match="the model patched was {")
    other = inputs / "other.txt"
    other.write_text("something else " * 1000)
    refused(inputs, pair, "--resume", "--data", str(other), models=models, match="the content of --data")
    config = inputs / "gpt2/config.json"
    kept = config.read_text()
    config.write_text(kept.replace('"n_layer": 2', '"n_layer": 3'))
    refused(inputs, pair, "--resume", models=models, match="config of the model plain was")
    config.write_text(kept)
    assert {n for n, v in before.items() if hashes(pair)[n] != v} == set()


def resumed(out: Path, *more: str, code: int) -> str:
    done = CliRunner().invoke(main, ["train", "--resume", str(out), *more])
    assert done.exit_code == code, done.output
    return done.output


def test_a_folder_is_all_that_resuming_needs(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped half way ends as one that was not; also the longer one that it becomes."""
    whole, out = tmp_path / "whole", tmp_path / "x"
    more = ("--schedule", "constant", "--warmup", "2", "--checkpoint-every", "2", "--bos", "never")
    models = ("a=:gpt2@scaled-embed",)
    run(inputs, whole, *more, models=models, steps=8, code=1)
    run(inputs, out, *more, models=models, steps=6, code=1)
    folder = out / "a/lr3e-3-seed0"
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "model")
    (folder / "checkpoints/step-00000006").rename(tmp_path / "gone")
    (folder / "checkpoints/notes.txt").write_text("mine")
    (folder / "checkpoints/step-00000006").write_text("a file")  # as is no checkpoint
    record = json.loads((out / "run.json").read_text())
    record["versions"]["numpy"] = "1.0"
    (out / "run.json").write_text(json.dumps(record))
    said = resumed(out, "--steps", "8", code=1)
    assert "step-00000006: damaged, and kept as damaged-step-00000006 (step-00000006 is no folder)" in said
    assert "numpy was 1.0 and is " in said
    one, other = (read(path / "a/lr3e-3-seed0/log.jsonl") for path in (whole, out))
    assert [step.loss for step in one.steps] == [step.loss for step in other.steps]
    assert other.run.steps == 8
    weights = [load_file(path / "a/lr3e-3-seed0/model/model.safetensors") for path in (whole, out)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    after = json.loads((out / "run.json").read_text())
    assert after["versions"]["numpy"] == "1.0"
    assert after["versions_since"][-1]["numpy"] != "1.0"
    before = hashes(folder)
    assert "since this run" not in resumed(out, code=1)
    assert hashes(folder) == before
    monkeypatch.chdir(tmp_path)
    record = json.loads((out / "run.json").read_text())
    record["folder"], record["asked"]["data"] = str(inputs), ["text.txt"]
    (out / "run.json").write_text(json.dumps(record))
    assert f"text.txt is meant as seen from {inputs}\n  remedy: cd {inputs}" in resumed(out, code=2)
    del record["asked"]
    (out / "run.json").write_text(json.dumps(record))
    assert "what was asked for is not written down" in resumed(out, code=2)
    assert "MODEL and --data and --steps and --lr are missing" in resumed(tmp_path / "nothing", code=2)


def test_damaged_checkpoints(inputs: Path, tmp_path: Path) -> None:
    """The one before is taken where it is whole; what is damaged is named, and kept."""
    out = tmp_path / "x"
    run(inputs, out, "--checkpoint-every", "2", models=("a=:gpt2",), code=1)
    folder = out / "a/lr3e-3-seed0"
    store = folder / "checkpoints"
    expected = load_file(folder / "model/model.safetensors")

    def again(code: int) -> str:
        (folder / "result.json").unlink(missing_ok=True)
        return resumed(out, code=code)

    for name in ("__0_0.distcp", "rank-0.pt", ".metadata", "state.json"):
        path = store / "step-00000006" / name
        content = bytearray(path.read_bytes())
        place = content.index(b'"step": 6') + 8 if name == "state.json" else len(content) // 2
        content[place] ^= 1
        path.write_bytes(content)
        said = again(code=1)
        assert f"damaged, and kept as damaged-step-00000006 ({name} is not as it was written)" in said
        found = load_file(folder / "model/model.safetensors")
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    for path in store.glob("step-*/rank-0.pt"):
        path.unlink()
    said = again(code=2)
    assert "no checkpoint of the run is as it was written" in said
    assert f"remedy: put a copy of one back; or rm -r {store}, and the run begins anew" in said
    shutil.rmtree(store)
    again(code=1)
    (tokens,) = (out / "data").glob("tokens-*.bin")
    tokens.write_bytes(bytes(tokens.stat().st_size))
    said = again(code=2)
    assert f"{tokens}: the tokens are not as they were written" in said
    for path in (out / "data").glob("tokens-*"):
        path.unlink()
    again(code=1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("log.jsonl", "log.jsonl: something else has the name of what the training writes"),
        ("checkpoints", "checkpoints: something else has the name of what the training writes"),
        ("verdict.json", "verdict.json: something else has the name of what the training writes"),
        ("versions", "run.json: the record of the training is not as it was written"),
        ("warmup", "run.json: the record of the training is not as it was written"),
        ("asked", "why: asked: TypeError: models: 3 is no list"),
        ("seq_len", "seq_len cannot be 0"),
    ],
)
def test_what_is_in_the_way(damage: str, said: str, pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    shutil.copytree(pair, out)
    record = json.loads((out / "run.json").read_text())
    match damage:
        case "log.jsonl" | "checkpoints":
            place = out / RUNS[3] / damage
            if damage == "log.jsonl":
                place.unlink()
                place.mkdir()
            else:
                place.write_text("mine")
        case "verdict.json":
            (out / damage).unlink()
            (out / damage).mkdir()
        case "versions":
            record["versions_since"] = "abc"
        case "warmup":
            record["settings"]["warmup"] = "abc"
        case "asked":
            record["asked"]["models"] = 3
        case "seq_len":
            record["asked"]["settings"]["seq_len"] = 0
    (out / "run.json").write_text(json.dumps(record))
    before = hashes(out)
    assert said in resumed(out, code=2)
    assert hashes(out) == before


def test_documents_kept_apart(inputs: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{i} squared is {i * i}"}) + "\n" for i in range(400)))
    more = ("--data", str(lines), "--reset-positions", "--bos", "never")
    run(inputs, tmp_path / "x", *more, models=("a=:gpt2", "b=:llama"), steps=2, code=1)


@pytest.mark.parametrize(
    ("variables", "engine"),
    [
        (("ACCELERATE_USE_DEEPSPEED",), "DeepSpeed (accelerate launch"),
        (("ACCELERATE_USE_MEGATRON_LM",), "Megatron-LM (accelerate launch"),
        (("CROSS_SIZE", "LOCAL_SIZE"), "the launcher deepspeed"),  # deepspeed/launcher/launch.py
    ],
)
def test_engines_that_would_do_nothing(
    variables: tuple[str, ...], engine: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in variables:
        monkeypatch.setenv(variable, "true")
    done = CliRunner().invoke(main, ["--local_rank=0", *arguments(inputs, tmp_path / "x")])
    assert done.exit_code == 2
    assert engine in done.output


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--batch-tokens", "250"), "--batch-tokens 256"),
        (("--seq-len", "128", "--batch-tokens", "128"), "its config has 64 positions"),
        (("--precision", "fp16"), "fp16 cannot be trained in on a CPU"),
        (("--warmup", "6"), "the warm-up never ends"),
        (("--grad-clip", "nan"), "nan is not finite"),
        (("--lr", "inf"), "inf is not finite"),
        (("--betas", "0.9", "1"), "Invalid value for '--betas'"),
        (("--seeds", "0,x"), "'0,x' is no list of numbers"),
        (("--lr-multipliers", "0"), "each must be at least"),
        (("--lr-multipliers", "1,1e308", "--lr", "10"), "cannot be inf"),
        (("--log-with", "wandb"), "pip install wandb"),
        (("--batch-tokens", "1048576"), "too few for one batch"),
    ],
)
def test_refused_before_anything_is_trained(more: tuple[str, ...], match: str, inputs: Path, tmp_path: Path) -> None:
    refused(inputs, tmp_path / "x", *more, match=match)
    assert not (tmp_path / "x/run.json").exists()


def test_a_full_disk_is_no_bug(inputs: Path, tmp_path: Path) -> None:
    """The limit of a file's size stands for it; what was there before can be gone on with."""
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from spikepatch.cli import main;"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1)); main()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    more = ("--checkpoint-every", "2")
    done = subprocess.run(
        [*command, *arguments(inputs, tmp_path / "x", *more)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "the checkpoint cannot be written" in done.stderr
    assert "go on with --resume" in done.stderr
    run(inputs, tmp_path / "x", *more, "--resume", code=1)


def test_one_command_at_a_time(inputs: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "x"
    run(inputs, out, steps=1, code=1)
    with FileLock(out / ".lock"):
        refused(inputs, out, "--resume", steps=1, match="another command is training into the output folder")


def test_what_is_said_before_the_first_step(inputs: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(main, arguments(inputs, tmp_path / "x", steps=2)).stderr.splitlines()
    (data,) = [line for line in said if "held out for evaluation" in line]
    assert re.fullmatch(
        r"[\d,]+ tokens of 1 document \(bytes, since no model has a tokenizer\); [\d,]+ of them .*", data
    )
    assert "2 steps after warm-up will be too few to tell: 32 are needed for a verdict" in said
    assert said.index(data) < next(i for i, line in enumerate(said) if line.startswith("run 1 of 1"))
    assert any("evaluating on" in line for line in said)


@pytest.mark.parametrize("there", [None, "empty", "tokens"])
def test_bad_input_leaves_nothing(inputs: Path, tmp_path: Path, there: str | None) -> None:
    out = tmp_path / "runs" / "x"
    if there is not None:
        (out / "data" if there == "tokens" else out).mkdir(parents=True)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    refused(inputs, out, models=("a=:gpt2@scaled-embd",), match="did you mean scaled-embed?")
    refused(inputs, out, "--batch-tokens", "65536", match="the data are too few for one batch")
    if there != "tokens":  # those of an earlier command stay, with what was added
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    run(inputs, out, steps=1, code=1)


@pytest.mark.parametrize(
    ("lr", "name"),
    [
        (5e-4, "lr5e-4"),
        (3e-3 * 2, "lr6e-3"),
        (0.1 + 0.2, "lr3e-1"),
        (1.0, "lr1e0"),
        (1.25e-5, "lr1.25e-5"),
        (1.0000001e-3, "lr1.0000001e-3"),
        (1.0000002e-3, "lr1.0000002e-3"),
    ],
)
def test_names_of_runs(lr: float, name: str) -> None:
    assert run_folder("a", lr, 7) == f"a/{name}-seed7"


def test_a_long_seed_is_a_name_of_its_own() -> None:
    names = {run_folder("a", 0.1, seed) for seed in (10**300, 10**300 + 1, 10**39)}
    assert len(names) == 3
    assert max(map(len, names)) < 100


def test_seeds_of_any_size(inputs: Path, tmp_path: Path) -> None:
    """Longer than what numpy's and torch's generators take; each draws weights and batches of its own."""
    out, seeds = tmp_path / "x", (0, 5_000_000_000, 2**64)
    run(inputs, out, "--seeds", ",".join(map(str, seeds)), models=("gpt2=:gpt2@scaled-embed",), steps=1, code=1)
    losses = {read(out / f"gpt2/lr3e-3-seed{seed}/log.jsonl").steps[0].loss for seed in seeds}
    assert len(losses) == 3


def test_learning_rates_that_differ_in_the_seventh_digit(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    run(inputs, out, "--lr-multipliers", "1,1.0000001", steps=1, code=1)
    assert len(list(out.rglob("log.jsonl"))) == 2
    refused(inputs, tmp_path / "y", "--lr-multipliers", f"1,{1 + 2**-52}", steps=1, match="would be trained twice")
    assert list((tmp_path / "y").rglob("*")) == []


@pytest.mark.parametrize("place", ["folder", "full"])
def test_the_verdict_comes_before_the_page(place: str, inputs: Path, tmp_path: Path) -> None:
    """The page cannot be written: a folder has its name, or the disk is full. What was measured is printed."""
    out = tmp_path / "x"
    run(inputs, out, steps=1, code=1)
    page = out / "report.html"
    page.unlink()
    if place == "folder":
        page.mkdir()
    elif Path("/dev/full").exists():
        page.symlink_to("/dev/full")
    done = run(inputs, out, "--resume", steps=1, code=2)
    assert "cannot tell" in done.stdout
    assert "its verdict stands" in done.stderr
    remedy = re.search(r"remedy: spikepatch (report .*) --out PAGE.html", done.stderr)
    assert remedy is not None
    again = CliRunner().invoke(main, [*remedy[1].split(), "--out", str(tmp_path / "page.html")])
    assert again.exit_code == 0
    assert (tmp_path / "page.html").exists()
    shown = CliRunner().invoke(main, ["report", str(out)])
    assert shown.exit_code == 2
    assert "cannot tell" in shown.stdout


def test_the_record(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".tokens-0.bin.new.spikepatch").touch()
    for resume in (True, False):
        check_out(tmp_path, resume=resume)  # as a command leaves it that was killed before its first step
    (tmp_path / "data" / "mine.txt").touch()
    for resume in (True, False):
        with pytest.raises(BadTarget):
            check_out(tmp_path, resume=resume)
    (tmp_path / "data" / "mine.txt").unlink()
    whole = {"lr": 1e-3, "multipliers": [1.0], "seeds": [0], "models": {}, "data": {}}

    def record(settings: dict[str, Any], command: str) -> None:
        wanted = whole | {"settings": {"steps": 1, "batch_tokens": 1, **settings}}
        write_record(tmp_path, wanted, TrainingCommand((), (), Settings(1), 1e-3), command)

    record({"a": (1, 2), "b": {"c": None}}, "one")
    check_out(tmp_path, resume=True)
    record({"a": [1, 2], "b": {"c": None}}, "two")
    assert json.loads((tmp_path / "run.json").read_text())["commands"] == ["one", "two"]
    with pytest.raises(Refused, match=r"--a was \[1, 2\] and is \[1\]; --b\.c was null and is 3"):
        record({"a": [1], "b": {"c": 3}}, "three")
    assert json.loads((tmp_path / "run.json").read_text())["commands"] == ["one", "two"]


def test_launchers(inputs: Path, tmp_path: Path) -> None:
    """Two processes with a copy each, by torchrun, and two with a part each, by accelerate: the first step is that of
    one process, up to rounding.

    A mean over n tokens in another order differs by at most n eps; so do the sums that the gradients are.
    """
    outs = {}
    for kind in ("one", "replicated", "sharded"):
        outs[kind] = tmp_path / kind
        if kind == "one":
            run(inputs, outs[kind], "--watch-every", "3", models=("a=:llama@vanilla",), code=1)
            continue
        accelerate = [
            "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines",
            "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        ]  # fmt: skip
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [
            sys.executable, "-W", "ignore", "-m", *(accelerate if kind == "sharded" else torchrun),
            "-m", "spikepatch", *arguments(inputs, outs[kind], "--watch-every", "3", models=("a=:llama@vanilla",)),
        ]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        said = "shards the models itself" if kind == "sharded" else "2 processes on cpu, each with a copy"
        assert said in done.stderr
        assert done.stdout.count("page: ") == 1
        assert json.loads((outs[kind] / "run.json").read_text())["sharded"] == (kind == "sharded")
    logs = {kind: read(out / "a/lr3e-3-seed0/log.jsonl") for kind, out in outs.items()}
    steps = {kind: log.steps for kind, log in logs.items()}
    layers = {kind: log.layers[0] for kind, log in logs.items()}
    models = {kind: load_file(out / "a/lr3e-3-seed0/model/model.safetensors") for kind, out in outs.items()}
    bound = 256 * torch.finfo(torch.float32).eps
    for kind in ("replicated", "sharded"):
        assert len(steps[kind]) == 6
        assert steps[kind][0].loss == pytest.approx(steps["one"][0].loss, rel=bound)
        assert steps[kind][0].gradient_norm == pytest.approx(steps["one"][0].gradient_norm, rel=bound)
        assert len(layers[kind].stream) == 4
        assert layers[kind].stream == pytest.approx(layers["one"].stream, rel=bound)
        assert layers[kind].gradients == pytest.approx(layers["one"].gradients, rel=bound)
        assert models[kind].keys() == models["one"].keys()
        assert {n: t.shape for n, t in models[kind].items()} == {n: t.shape for n, t in models["one"].items()}
        fresh = AutoModelForCausalLM.from_pretrained(outs[kind] / "a/lr3e-3-seed0/model")
        assert all(bool(p.isfinite().all()) for p in fresh.parameters())


def test_every_source_is_opened_once(inputs: Path, tmp_path: Path) -> None:
    """Three models of two sources, with two seeds."""
    models = ("plain=:gpt2", "patched=:gpt2@scaled-embed", "other=:llama@vanilla")
    with counted(open_source) as counts:
        run(inputs, tmp_path / "x", "--seeds", "0,1", models=models, steps=1, code=1)
    assert counts == {"open_source": 2}


def test_a_factor_of_the_model_is_replaced(tmp_path: Path, inputs: Path) -> None:
    """As the refusal says; the baseline beside it takes no such option."""
    source = config_folder(tmp_path / "gemma", "gemma")
    models = (f"scaled={source}@scaled-embed", f"small={source}@vanilla")
    more = arguments(inputs, tmp_path / "x", models=(), steps=1)
    refused = CliRunner().invoke(main, [*more, *models])
    assert refused.exit_code == 2
    assert "--replace divides that factor out" in refused.output
    shutil.rmtree(tmp_path / "x")
    assert CliRunner().invoke(main, [*more, *models, "--replace", "--factor", "3"]).exit_code == 1
    record = json.loads((tmp_path / "x/run.json").read_text())["models"]
    assert [model.get("replace") for model in record.values()] == [True, None]
    plan = json.loads((tmp_path / "x/scaled/lr3e-3-seed0/model/spikepatch.json").read_text())["plan"]
    (edit,) = (edit for edit in plan["edits"] if edit["edit"] == "ScaleEmbedding")
    assert edit["factor"] == pytest.approx(3 / math.sqrt(32))
    other = CliRunner().invoke(main, [*more, *models, "--factor", "4", "--resume"])
    assert "factor of the model scaled was 3.0 and is 4.0" in other.output


def test_a_branch_that_moves(inputs: Path, tmp_path: Path, hub: LocalHub) -> None:
    """Both models and both seeds have the commit that was there when the training began; after it is resumed, too."""
    for name, seed in (("first", 0), ("second", 1)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(inputs / "gpt2")).save_pretrained(tmp_path / name)
    commit = hub.add("org/model", tmp_path / "first")
    hub.before["model.safetensors"] = lambda: hub.add("org/model", tmp_path / "second")
    models = ("plain=org/model", "patched=org/model@scaled-embed")
    words = [*arguments(inputs, tmp_path / "x", "--seeds", "0,1", models=(), steps=1), *models]
    environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}

    def train(*more: str) -> str:
        command = [sys.executable, "-m", "spikepatch", *words, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        record = json.loads((tmp_path / "x/run.json").read_text())
        assert {model["commit"] for model in record["models"].values()} == {commit}
        losses = [read(log).steps[0].loss for log in sorted(tmp_path.glob("x/plain/*/log.jsonl"))]
        assert len(losses) == 2
        return str(losses)

    first = train()
    assert not hub.before
    by_name = [line for line in hub.requests if "/main/" in line]
    # Whether the Hub answers at all; what the name stands for; and that.
    assert by_name == [f"{how} /org/model/resolve/main/config.json" for how in ("HEAD", "HEAD", "GET")]
    shutil.rmtree(tmp_path / "x/plain")
    shutil.rmtree(tmp_path / "home")
    assert train("--resume") == first
