"""Whatever is wrong with the input: one message with the remedy, exit code 2, nothing written, nothing touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import spikepatch
from spikepatch.apply.disk.publish import publishing
from spikepatch.cli import main
from spikepatch.source.open import open_source
from tests.architectures import tiny_config, tiny_model
from tests.folders import hashes
from tests.source.test_checkpoint import BAD_FILES, BAD_INDEXES

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """``prepare`` makes the folder "source"; ``words`` follow SOURCE and OUT; the message holds all of ``message``."""

    prepare: Callable[[Path], None]
    message: tuple[str, ...]
    words: tuple[str, ...] = ()
    source: str = "source"
    out: str = "out"


def config(folder: Path) -> None:
    tiny_config("gpt2").save_pretrained(folder)


def weights(folder: Path) -> None:
    tiny_model("gpt2").save_pretrained(folder)


def nothing(folder: Path) -> None:
    pass


def empty(folder: Path) -> None:
    folder.mkdir()


def other_type(folder: Path) -> None:
    config(folder)
    edit_config(folder, model_type="gtp2", architectures=None)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def quantised_config(folder: Path) -> None:
    weights(folder)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def quantised_tensors(folder: Path) -> None:
    weights(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "transformer.h.0.x.qweight": torch.ones(2, 2, dtype=torch.int32),
        "transformer.h.0.x.scales": torch.ones(2),
    }
    save_file(tensors, folder / "model.safetensors")


def truncated(folder: Path) -> None:
    tiny_model("gpt2").save_pretrained(folder, max_shard_size="200KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 10)


def pointing_outside(folder: Path) -> None:
    config(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


def pickled(folder: Path) -> None:
    config(folder)
    torch.save(tiny_model("gpt2").state_dict(), folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    """Its file would leave a trace beside the source."""
    config(folder)
    (folder / "modeling_own.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.OwnConfig"})


def out_is_a_file(folder: Path) -> None:
    config(folder)
    (folder.parent / "out").write_text("x")


def out_is_used(folder: Path) -> None:
    config(folder)
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "x").write_text("x")


def out_is_a_link_to_the_source(folder: Path) -> None:
    config(folder)
    (folder.parent / "out").symlink_to(folder, target_is_directory=True)


def config_of(model_type: str) -> Callable[[Path], None]:
    return lambda folder: tiny_config(model_type).save_pretrained(folder)


def not_json(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("<!DOCTYPE html>")


def named(**changes: object) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        config(folder)
        edit_config(folder, **changes)

    return prepare


def beside_config(*names: str) -> Callable[[Path], None]:
    """Files of other formats, which are never opened."""

    def prepare(folder: Path) -> None:
        config(folder)
        for name in names:
            (folder / name).write_bytes(b"\x80")

    return prepare


def adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def both_kinds(folder: Path) -> None:
    weights(folder)
    (folder / INDEX).write_text("{}")


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        weights(folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return prepare


EMBEDDING = "transformer.wte.weight"


def damaged(tensors: dict[str, torch.Tensor]) -> None:
    """Missing, of another shape, of another kind, and stored twice with different values."""
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.wpe.weight"] = torch.zeros(3, 64)
    tensors["transformer.ln_f.weight"] = torch.ones(64, dtype=torch.int32)
    tensors["lm_head.weight"] = tensors[EMBEDDING] + 1


KEEP = ("--reinit", "none")

CASES = {
    "wrong type of a value": Case(named(n_embd="wide"), ("does not describe a model", "n_embd", "correct the value")),
    "code of another repository": Case(
        named(auto_map={"AutoModelForCausalLM": "evil/repo--modeling.Evil"}),
        ("needs code that comes with the model", "evil/repo--modeling.Evil", "--trust-remote-code"),
    ),
    "code as a bare string": Case(named(auto_map="evil/repo--modeling.Evil"), ("needs code", "--trust-remote-code")),
    "a class with a newline": Case(
        named(architectures=["GPT2LMHeadModel\nimport os"]), ("no model of transformers", "correct `architectures`")
    ),
    "a class that is a keyword": Case(named(architectures=["class"]), ("no model of transformers", "`architectures`")),
    "a class with a quote": Case(
        named(architectures=['x"); print("']), ("no model of transformers", "`architectures`")
    ),
    "no list of classes": Case(named(architectures=True), ("the architecture True", "correct `architectures`")),
    "a type with a quote": Case(named(model_type="gpt2\"'\n"), ("is unknown", "did you mean gpt2", "config.json")),
    "an adapter": Case(adapter, ("is an adapter, not a model", "merge_and_unload"), KEEP),
    "DCP": Case(
        beside_config("__0_0.distcp", ".metadata"), ("a distributed (DCP) checkpoint", "save_pretrained"), KEEP
    ),
    "TensorFlow": Case(beside_config("tf_model.h5"), ("tf_model.h5 (TensorFlow weights)", "save_pretrained"), KEEP),
    "ONNX": Case(beside_config("model.onnx"), ("model.onnx (an ONNX graph)", "save_pretrained"), KEEP),
    "GGUF": Case(beside_config("model.Q4_1.gguf"), ("model.Q4_1.gguf (GGUF)", "save_pretrained"), KEEP),
    "single file and index": Case(both_kinds, (INDEX, "are present", "delete the one that is out of date"), KEEP),
    "does not fit the architecture": Case(
        changed_tensors(damaged),
        (
            "does not fit the architecture",
            "transformer.ln_f.bias is missing",
            "transformer.wpe.weight has shape (3, 64)",
            "transformer.ln_f.weight is I32, the architecture's is torch.float32",
            "config.json belongs to these weights",
        ),
        KEEP,
    ),
    "NaN in the embedding": Case(
        changed_tensors(lambda tensors: tensors[EMBEDDING][3].fill_(torch.nan)),
        (f"{EMBEDDING} holds NaN", "are not finite", "use a sound checkpoint"),
        KEEP,
    ),
    "missing folder": Case(nothing, ("does not exist", "arch:TYPE"), source="./source"),
    "no config": Case(empty, ("has no config.json", "save_pretrained")),
    "config not JSON": Case(not_json, ("config.json is not JSON", "download the file again")),
    "unknown type": Case(other_type, ("the model type 'gtp2' is unknown", "did you mean gpt2", "update transformers")),
    "unknown arch": Case(
        nothing, ("the model type 'lama' is unknown", "llama", "correct the type"), source="arch:lama"
    ),
    "no weights to keep": Case(config, ("no learned weights to keep", "--reinit all"), ("--reinit", "none")),
    "pickles": Case(pickled, ("pytorch_model.bin (PyTorch pickles)", "save_pretrained"), ("--reinit", "none")),
    "truncated shard": Case(
        truncated, ("model-00002-of-", "is truncated", "download the file again"), ("--reinit", "residual")
    ),
    "index outside": Case(pointing_outside, (INDEX, "points outside the folder", "do not trust"), ("--reinit", "none")),
    "quantised": Case(quantised_config, ("is quantised", "quantization_config", "unquantised original")),
    "packed tensors": Case(quantised_tensors, ("quantised weights", "qweight", "dequantise"), ("--reinit", "none")),
    "remote code": Case(remote_code, ("needs code that comes with the model", "--trust-remote-code")),
    "scaled already": Case(config_of("gemma2"), ("already multiplied by 8", "recipe vanilla")),
    "normed already": Case(config_of("bloom"), ("already normalised", "recipe vanilla")),
    "OUT not empty": Case(out_is_used, ("is not empty", "--overwrite")),
    "OUT a file": Case(out_is_a_file, ("is a file or a link", "another output folder")),
    "OUT a file, overwritten": Case(out_is_a_file, ("is a file or a link", "another"), ("--overwrite",)),
    "OUT below a file": Case(out_is_a_file, ("cannot be made", "another place"), out="out/below"),
    "OUT = SOURCE": Case(config, ("is the source", "another output folder"), ("--overwrite",), out="source"),
    "OUT = SOURCE, spelt otherwise": Case(
        config, ("is the source", "never written to"), ("--overwrite",), out="source/../source/."
    ),
    "OUT inside SOURCE": Case(config, ("lies inside the source", "another output folder"), out="source/out"),
    "OUT around SOURCE": Case(config, ("contains the source", "another output folder"), ("--overwrite",), out="."),
    "OUT a link to SOURCE": Case(out_is_a_link_to_the_source, ("is the source", "another"), ("--overwrite",)),
    "misspelt recipe": Case(
        config, ("no recipe 'scaled-embedd'", "did you mean scaled-embed?"), ("--recipe", "scaled-embedd")
    ),
    "factor 0": Case(config, ("must be a positive number", "leave it out"), ("--factor", "0")),
    "factor nan": Case(config, ("must be a positive number", "leave it out"), ("--factor", "nan")),
    "factor inf": Case(config, ("must be a positive number", "leave it out"), ("--factor", "inf")),
    "factor of embed-ln": Case(
        config, ("are for recipes that scale", "leave them out"), ("--factor", "2", "--recipe", "embed-ln")
    ),
    "dtype int8": Case(config, ("'int8' is no dtype to store weights in", "--dtype bfloat16"), ("--dtype", "int8")),
    "dtype nonsense": Case(config, ("'nn' is no dtype", "--dtype bfloat16"), ("--dtype", "nn")),
    "shard size": Case(config, ("'much' is no shard size", "a number with a unit"), ("--max-shard-size", "much")),
    "shard size of nothing": Case(
        config, ("'0GB' is no shard size", "a number with a unit"), ("--max-shard-size", "0GB")
    ),
    "shard size without end": Case(
        config, ("'infGB' is no shard size", "a number with a unit"), ("--max-shard-size", "infGB")
    ),
    "plain": Case(config, ("--storage plain cannot hold", "--storage auto"), ("--storage", "plain")),
    "nothing to untie": Case(config_of("gpt_neox"), ("no tied head", "leave --untie out"), ("--untie",)),
    "nothing to replace": Case(config, ("no factor to replace", "leave --replace"), ("--replace",)),
    "nothing to change": Case(
        weights, ("changes nothing", "scaled-embed"), ("--recipe", "vanilla", "--reinit", "none")
    ),
    "revision of a folder": Case(config, ("has no revision 'v1'", "leave out --revision"), ("--revision", "v1")),
}


def everything(folder: Path) -> tuple[list[str], dict[str, str]]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")), hashes(folder)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case.prepare(tmp_path / "source")
    before = everything(tmp_path)
    done = CliRunner().invoke(main, ["convert", case.source, case.out, *case.words])

    assert done.exit_code == 2, done.output
    assert done.output.count("error: ") == done.output.count("\n  why: ") == done.output.count("\n  remedy: ") == 1
    for part in case.message:
        assert part in done.output
    assert "Traceback" not in done.output
    assert everything(tmp_path) == before


@pytest.mark.slow
def test_a_real_bert(minilm: Path, tmp_path: Path) -> None:
    before = hashes(minilm)
    command = [sys.executable, "-m", "spikepatch", "convert", str(minilm), str(tmp_path / "out")]
    for words in ([], ["--reinit", "none", "--json"]):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)

        assert done.returncode == 2
        assert done.stdout == ""
        assert f"error: {minilm}: a large shortcut does not apply to a post-norm model" in done.stderr
        assert "  why: " in done.stderr
        assert "  remedy: use the recipe on a pre-norm model" in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert hashes(minilm) == before


@pytest.mark.parametrize("option", [("--seed", "-1"), ("--seed", "x"), ("--factor", "x"), ("--reinit", "some")])
def test_nonsense_is_refused_by_the_parser(option: tuple[str, str], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", "arch:gpt2", str(tmp_path / "out"), *option])

    assert done.exit_code == 2
    assert f"Invalid value for '{option[0]}'" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_patched_folder_is_not_patched_again(tmp_path: Path) -> None:
    config(tmp_path / "source")
    assert CliRunner().invoke(main, ["convert", str(tmp_path / "source"), str(tmp_path / "out")]).exit_code == 0
    for words in ([], ["--trust-remote-code"]):
        line = ["convert", str(tmp_path / "out"), str(tmp_path / "again"), "--reinit", "none", "--factor", "8", *words]
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 2
        assert "patched already, with just this" in done.output
    assert not (tmp_path / "again").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    done = CliRunner().invoke(main, ["convert", "arch:gpt2", str(tmp_path / "locked" / "out")])

    assert done.exit_code == 2
    assert "cannot be made" in done.output


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a limit on file sizes")
def test_a_full_disk(tmp_path: Path) -> None:
    config(tmp_path / "source")
    before = everything(tmp_path)
    script = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from spikepatch.cli import main
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", script, "convert", str(tmp_path / "source"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "the output cannot be written" in done.stderr
    assert "free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert everything(tmp_path) == before


def test_the_remains_of_nothing(tmp_path: Path) -> None:
    """The helper that the other tests rely on sees a leftover."""
    config(tmp_path / "source")
    before = everything(tmp_path)
    shutil.copytree(tmp_path / "source", tmp_path / ".out.abc.spikepatch")

    assert everything(tmp_path) != before


# Bad files and indexes as the command meets them; tests/source/test_checkpoint.py has them all


@pytest.fixture(scope="module")
def config_alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("config") / "source"
    config(folder)
    return (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("file", "content", "why", "remedy"),
    [
        pytest.param(file, *case, id=f"{file}, {name}")
        for file, cases in (("model.safetensors", BAD_FILES), (INDEX, BAD_INDEXES))
        for name, case in [*cases.items()][:2]
    ],
)
def test_a_bad_checkpoint(
    file: str,
    content: bytes,
    why: str,
    remedy: str,
    config_alone: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_bytes(config_alone)
    (tmp_path / "source" / file).write_bytes(content)
    before = everything(tmp_path)
    done = CliRunner().invoke(main, ["convert", "source", "out", "--reinit", "none"])

    assert done.exit_code == 2, done.output
    assert done.output.count("error: ") == 1
    assert why in done.output
    assert remedy in done.output
    assert "Traceback" not in done.output
    assert everything(tmp_path) == before


# What looks bad and is not


def test_odd_tensors_are_left_out(tmp_path: Path) -> None:
    """Names that no code could have, no elements, no dimensions, integers: not part of the architecture."""
    odd = {
        "'); import os #": torch.ones(2),
        "line\nbreak": torch.ones(2),
        "class": torch.ones(2),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        "steps": torch.arange(3),
    }
    changed_tensors(lambda tensors: tensors.update(odd))(tmp_path / "source")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none")
    written, source = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "source"))

    assert written.keys() == source.keys() - odd.keys()
    assert all(torch.equal(written[name], source[name]) for name in written)
    assert f"{len(odd)} tensors of the source are not part of the architecture" in " ".join(result.notes)


def test_weights_that_are_not_finite_are_kept_on_request(tmp_path: Path) -> None:
    name, bias = "transformer.h.1.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, :2] = torch.tensor([torch.nan, -torch.inf])
        tensors[bias][1] = torch.inf

    changed_tensors(spoil)(tmp_path / "source")
    with pytest.raises(spikepatch.BadSource, match="2 tensors hold NaN or infinity") as caught:
        spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none")
    assert f"{name} (2 of " in caught.value.why
    assert f"{bias} (1 of " in caught.value.why
    assert "--allow-nonfinite" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none", allow_nonfinite=True)
    note = next(note for note in result.notes if "as in the source" in note)
    assert f"'{name}' (2)" in note
    assert f"'{bias}' (1)" in note


def test_what_a_cast_loses_is_said(tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    changed_tensors(lambda tensors: tensors[name][0, :3].fill_(1e-12))(tmp_path / "source")
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none", dtype="float16")
    tiny = {
        n: int(((t.half() == 0) & (t != 0)).sum()) for n, t in load_file(tmp_path / "source/model.safetensors").items()
    }

    assert tiny[name] >= 3
    assert result.casts == {n: {"overflow": 0, "underflow": count} for n, count in tiny.items() if count}
    assert json.loads(json.dumps(result.to_dict()))["casts"] == result.casts
    assert any("became 0 in float16" in note for note in result.notes)


# What happens meanwhile


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    weights(tmp_path / "source")

    def progress(step: str, done: int = 0, total: int = 0) -> None:
        if step == "checking what was written":
            os.utime(tmp_path / "source/model.safetensors", (1, 1))

    with pytest.raises(spikepatch.BadSource, match="has changed while it was read") as caught:
        spikepatch.convert(str(tmp_path / "source"), tmp_path / "out", reinit="none", progress=progress)
    assert "while nothing writes to the source" in caught.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_second_run_to_one_folder(tmp_path: Path) -> None:
    config(tmp_path / "source")
    with publishing(tmp_path / "out"):
        done = CliRunner().invoke(main, ["convert", str(tmp_path / "source"), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "another run is writing the output folder" in done.output
    assert "wait until it has ended" in done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"), [("size=64k", "the disk is too full"), ("ro", "cannot be made")], ids=["full", "read-only"]
)
def test_a_disk_that_cannot_take_it(options: str, message: str, tmp_path: Path) -> None:
    config(tmp_path / "source")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        done = CliRunner().invoke(main, ["convert", str(tmp_path / "source"), str(disk / "out")])
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "named", [5, ["a.B"], "x", {"AutoModel": 5}, {"AutoModel": {"x": 1}}, {"AutoModel": ["a.B", 1]}]
)
def test_an_auto_map_that_is_none(named: object, tmp_path: Path) -> None:
    config(tmp_path / "source")
    edit_config(tmp_path / "source", auto_map=named)
    with pytest.raises(spikepatch.BadSource, match="has an auto_map that is none"):
        open_source(str(tmp_path / "source"), weights=False, trust_remote_code=True)
