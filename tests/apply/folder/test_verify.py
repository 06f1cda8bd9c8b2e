"""A converted folder, whole and damaged in every way that ``verify`` is to find."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import spikepatch
from spikepatch.apply.disk.manifest import MANIFEST, digest
from spikepatch.cli import main
from tests.architectures import tiny_config, tiny_model


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded, with a generated module beside the weights."""
    folder = tmp_path_factory.mktemp("verify")
    tiny_config("gpt2").save_pretrained(folder / "source")
    out = spikepatch.convert(str(folder / "source"), folder / "out", max_shard_size="200KB").out
    assert len(list(out.glob("model-*.safetensors"))) > 2
    return out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "out"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def with_nan(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].reshape(-1)[:2] = torch.tensor([float("nan"), -float("inf")])
    save_file(tensors, path, {"format": "pt"})


def make_unreadable(path: Path) -> None:
    """For root too: reading the first page of a process's memory is an error of input and output."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def rewrite_manifest(folder: Path, **changes: object) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**data, **changes}))


def planted(path: Path) -> None:
    path.parent.mkdir()
    path.touch()


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked(path: Path) -> None:
    """To the same bytes, elsewhere."""
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def edit_plan(folder: Path, *, hashed: bool = False, **changes: object) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data["plan"] |= changes
    rewrite_manifest(folder, plan=data["plan"], **({"sha256": digest(data)} if hashed else {}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a weight": (lambda f: flip(shard(f)), ".safetensors: is not the file that was written"),
    "a bit of a header": (lambda f: flip(shard(f), 9), ".safetensors: is not the file that was written"),
    "a truncated shard": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-1]), ".safetensors: is truncated"),
    "a missing shard": (lambda f: shard(f).unlink(), ".safetensors: is missing"),
    "a file that cannot be read": (
        lambda f: make_unreadable(f / "config.json"),
        "config.json: is a link that leads out of the folder",
    ),
    "a missing config": (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
    "another config": (lambda f: (f / "config.json").write_text("{}"), "config.json: is not the file that was written"),
    "other code": (lambda f: flip(next(f.glob("modeling*.py"))), ".py: is not the file that was written"),
    "code beside it": (lambda f: (f / "evil.py").touch(), "evil.py: code that was not written"),
    "weights beside it": (
        lambda f: (f / "model.safetensors").write_bytes(shard(f).read_bytes()),
        "model.safetensors: weights that were not written",
    ),
    "a file of no use beside it": (lambda f: (f / "notes.txt").touch(), "notes.txt: a file that was not written"),
    "an adapter beside it": (lambda f: (f / "adapter_config.json").touch(), "adapter_config.json: a file that was not"),
    "a tokenizer beside it": (
        lambda f: (f / "tokenizer_config.json").touch(),
        "tokenizer_config.json: a file that",
    ),
    "code in a folder beside it": (lambda f: planted(f / "sub/x.py"), "sub/x.py: code that was not written"),
    "a library beside it": (lambda f: planted(f / "sub/.x.so"), "sub/.x.so: code that was not written"),
    "a pipe beside it": (lambda f: os.mkfifo(f / "chat_template.jinja"), "chat_template.jinja: a file that was not"),
    "a folder elsewhere beside it": (lambda f: (f / "sub").symlink_to("/usr"), "sub: a file that was not written"),
    "a pipe in place of a file": (lambda f: piped(f / "README.md"), "README.md: is no file"),
    "a link in place of a file": (
        lambda f: linked(f / "README.md"),
        "README.md: is a link that leads out of",
    ),
    "another seed in the plan": (lambda f: edit_plan(f, seed=5), "has been edited, its own SHA-256 differs"),
    "another seed in the plan, with its hash": (
        lambda f: edit_plan(f, hashed=True, seed=5),
        "its plan and config.json say another seed",
    ),
    "a plan that is none": (
        lambda f: edit_plan(f, hashed=True, seed="x"),
        "its plan cannot be read: TypeError: seed",
    ),
    "another command in the manifest": (lambda f: rewrite_manifest(f, command="rm"), "has been edited, its own SHA"),
    "a manifest without its hash": (lambda f: rewrite_manifest(f, sha256=None), "has been edited, its own SHA-256"),
    "pickles beside it": (lambda f: (f / "pytorch_model.bin").touch(), "pytorch_model.bin: weights that were not"),
    "NaN": (lambda f: with_nan(shard(f)), "holds NaN or infinite values: "),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "No such file"),
    "a manifest that is not JSON": (lambda f: (f / MANIFEST).write_text("{"), "Expecting property name"),
    "a manifest of something else": (lambda f: (f / MANIFEST).write_text("[]"), "it has no files"),
    "a manifest without hashes": (lambda f: rewrite_manifest(f, files={"x": 1}), "it has no files"),
    "a manifest that leads outside": (lambda f: rewrite_manifest(f, files={"../x": "0"}), "'../x'"),
    "a manifest with a name that no file can have": (
        lambda f: rewrite_manifest(f, files={"x" * 300: "0"}),
        f"{'x' * 300}: is missing",
    ),
    "an absolute manifest": (lambda f: rewrite_manifest(f, files={"/etc/passwd": "0"}), "'/etc/passwd'"),
}


def test_a_folder_as_it_was_written(folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = spikepatch.verify(folder, progress=lambda step, done=0, total=0: steps.append((done, total)))
    files = [path for path in folder.iterdir() if path.is_file()]

    assert found.files == len(files)
    assert found.tensors == sum(len(load_file(path)) for path in folder.glob("*.safetensors")) > 10
    assert found.bytes == sum(t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values())
    assert steps == sorted(steps)
    assert steps[-1] == (steps[0][1],) * 2
    assert steps[-1][0] == sum(path.stat().st_size for path in files if path.name != MANIFEST)


@pytest.mark.parametrize(("damage", "why"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder(folder: Path, damage: Callable[[Path], object], why: str) -> None:
    damage(folder)
    with pytest.raises(spikepatch.BadSource) as caught:
        spikepatch.verify(folder)

    assert caught.value.where == str(folder)
    assert why in caught.value.why
    assert caught.value.remedy


def test_what_comes_with_a_copy(folder: Path) -> None:
    """From git and from the Hub."""
    for name in (".gitattributes", ".git/config", ".cache/huggingface/download/config.json.metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    spikepatch.verify(folder)


def test_a_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    """It has no manifest: patch, code, structure and values are looked at."""
    model = tiny_model("gpt2")
    spikepatch.patch(model, spikepatch.plan(model, "scaled-embed", reinit="all"))
    model.save_pretrained(tmp_path / "x")
    with pytest.raises(spikepatch.BadSource, match=r"has no spikepatch\.json"):
        spikepatch.verify(tmp_path / "x")
    (tmp_path / "x/trainer_state.json").write_text("{}")
    found = spikepatch.verify(tmp_path / "x")
    assert (found.manifest, found.tensors, found.bytes > 10_000) == (False, len(load_file(shard_of(tmp_path))), True)
    assert "it has no manifest of its files" in CliRunner().invoke(main, ["verify", str(tmp_path / "x")]).stdout

    for damage, why in (
        (lambda f: with_nan(f / "model.safetensors"), "holds NaN or infinite values"),
        (lambda f: flip(next(f.glob("modeling*.py"))), "is not the file that this version of spikepatch writes"),
        (drop_a_tensor, "does not fit the architecture"),
        (unpatch, "config.json has no usable record of the patch"),
    ):
        copy = Path(shutil.copytree(tmp_path / "x", tmp_path / why.replace(" ", "")))
        damage(copy)
        with pytest.raises(spikepatch.SpikepatchError, match=why):
            spikepatch.verify(copy)


def shard_of(folder: Path) -> Path:
    return folder / "x/model.safetensors"


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def unpatch(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["spikepatch"]["embeddings"] = {"transformer.absent": {"factor": 3.0}}
    (folder / "config.json").write_text(json.dumps(data))


def test_everything_is_named_at_once(folder: Path) -> None:
    for name in ("a bit of a weight", "another config", "code beside it", "pickles beside it"):
        DAMAGE[name][0](folder)
    with pytest.raises(spikepatch.BadSource) as caught:
        spikepatch.verify(folder)

    assert len(caught.value.why.split("; ")) == 4


def test_the_command(folder: Path) -> None:
    whole = CliRunner().invoke(main, ["verify", str(folder)])
    as_json = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    flip(shard(folder))
    damaged = CliRunner().invoke(main, ["verify", str(folder)])

    assert whole.exit_code == 0
    assert f"{folder} is what was written: " in whole.output
    assert json.loads(as_json.stdout)["files"] == len(list(folder.iterdir()))
    assert damaged.exit_code == 2
    assert "error: " in damaged.output
    assert "SHA-256 differs" in damaged.output


def test_weights_that_are_not_finite_on_purpose(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "source")
    with_nan(tmp_path / "source" / "model.safetensors")
    out = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none", allow_nonfinite=True).out
    with pytest.raises(spikepatch.BadSource, match="holds NaN or infinite"):
        spikepatch.verify(out)

    assert spikepatch.verify(out, allow_nonfinite=True).tensors > 10


def test_a_live_model_that_was_saved(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    spikepatch.save(spikepatch.patch(model, spikepatch.plan(model, "scaled-embed", reinit="all")), tmp_path / "out")

    assert spikepatch.verify(tmp_path / "out").tensors > 10
