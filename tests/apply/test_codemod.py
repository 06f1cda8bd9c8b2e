"""A recipe as source code: what is edited, that it is the same model as the live patch, and what is refused."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import spikepatch
from spikepatch.apply.codemod import Codemod
from spikepatch.cli import main
from spikepatch.errors import BadSource, BadTarget, Refused, SpikepatchError
from spikepatch.plans import Fill, Plan
from spikepatch.runtime.embedding import install

MODELS = Path(__file__).parent / "models"
IDS = torch.arange(5, 16).unsqueeze(0)


@dataclass(frozen=True)
class Case:
    """One model and one recipe. ``removed``: the lines that the edit takes away; ``larger``: another size to build."""

    model: str
    recipe: str
    removed: tuple[str, ...]
    larger: dict[str, int]
    options: dict[str, Any]
    crlf: bool = False

    def __str__(self) -> str:
        return f"{self.model}-{self.recipe}"


WTE = "            wte = nn.Embedding(config.vocabulary, config.width), # token embeddings"
HELPED = ("        self.tokens = make_embedding(", "        )  # é, so that columns in bytes and in characters differ")
CASES = (
    Case("module_dict", "scaled-embed", (WTE,), {"layers": 5, "width": 48}, {}),
    Case(
        "module_dict",
        "embed-ln",
        (WTE, "        self.transformer.wte.weight = self.lm_head.weight # tied"),
        {"layers": 1, "width": 64},
        {"untie": True},
    ),
    Case("helper_factory", "embed-ln", HELPED, {"depth": 4, "width": 40}, {}),
    Case(
        "helper_factory",
        "scaled-embed",
        (*HELPED, "        self.positions = make_embedding(length, width)"),
        {"depth": 3, "width": 30},
        {"positions": True},
    ),
    Case("helper_factory", "vanilla", (), {"depth": 3, "width": 30}, {}),
    Case(
        "inheritance",
        "scaled-embed",
        ("\t\treturn (torch.nn", "\t\t\t.Embedding(vocabulary, width))"),
        {"depth": 4, "width": 36},
        {"factor": 3.5},
        crlf=True,
    ),
    Case(
        "copied_hf",
        "scaled-embed",
        ("        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)",),
        {"num_hidden_layers": 3, "hidden_size": 48},
        {},
    ),
)


@dataclass(frozen=True)
class Edited:
    """A case, edited: functions that build the original and the edited model, of any size."""

    case: Case
    result: Codemod
    original: Callable[..., Any]
    build: Callable[..., Any]


def module_of(folder: Path, name: str, text: bytes) -> Any:
    """Import ``text`` as a module of its own."""
    file = folder / f"{name}.py"
    file.write_bytes(text)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source(model: str, *, crlf: bool = False) -> bytes:
    data = (MODELS / f"{model}.py").read_bytes()
    return data.replace(b"\n", b"\r\n") if crlf else data


@pytest.fixture(scope="module", params=CASES, ids=str)
def edited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Edited:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.model)
    file = folder / f"{case.model}.py"
    file.write_bytes(source(case.model, crlf=case.crlf))
    result = spikepatch.codemod(file, f"{case.model}:build", case.recipe, **case.options)
    assert file.read_bytes() == result.before, "only --write writes"
    assert os.listdir(folder) == [file.name]
    tag = f"{case.model}_{CASES.index(case)}"
    before, after = (module_of(folder, f"{tag}_{kind}", getattr(result, kind)) for kind in ("before", "after"))
    return Edited(case, result, before.build, after.build)


def example(model: Any) -> dict[str, torch.Tensor]:
    name = {"Model": "ids", "GPT": "idx", "LanguageModel": "tokens", "OwnForCausalLM": "input_ids"}
    return {name[type(model).__name__]: IDS}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**example(model))
    found = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(found, torch.Tensor)
    return found


def planned(edited: Edited, model: nn.Module) -> Plan:
    """The recipe, worked out for the original model at hand."""
    return spikepatch.plan(
        model, edited.case.recipe, reinit="all", example_inputs=example(model), **edited.case.options
    )


def patched(edited: Edited) -> Any:
    """The original model with the live patch."""
    model = edited.original()
    plan = planned(edited, model)
    if edited.case.model == "copied_hf":  # of transformers models only its own classes are patched whole
        install(model, plan.record(spikepatch.__version__))
        return model
    return spikepatch.patch(model, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_live_patch_loads_strictly_with_equal_logits(edited: Edited, dtype: torch.dtype) -> None:
    reference, model = patched(edited).to(dtype), edited.build().to(dtype)
    expected = logits(reference)
    assert not torch.equal(logits(model), expected)
    model.load_state_dict(reference.state_dict(), strict=True)
    assert torch.equal(logits(model), expected)
    assert bool(expected.isfinite().all())


@pytest.mark.parametrize("size", ["as planned", "another size"])
def test_a_fresh_build_is_a_sample_of_the_recipe(edited: Edited, size: str) -> None:
    """Of any width and depth. The standard errors of a normal sample: std / sqrt(n), and std / sqrt(2 n)."""
    sizes = edited.case.larger if size == "another size" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = edited.build(**sizes)
        plan = planned(edited, edited.original(**sizes))
    fills = plan.select(Fill)
    assert len({fill.std for fill in fills}) == 2
    assert size == "as planned" or len(fills) != len(edited.result.plan.select(Fill))
    for fill in fills:
        values = model.get_parameter(fill.parameter).detach().double()
        error = fill.std / math.sqrt(values.numel())
        assert abs(values.mean()) <= 5 * error, fill
        assert abs(values.square().mean().sqrt() - fill.std) <= 5 * error / math.sqrt(2), fill
    rest = dict(model.named_parameters()).keys() - {fill.parameter for fill in fills}
    assert rest
    for name in rest:
        values = model.get_parameter(name)
        if "norm" in name or "ln_" in name or "final" in name:  # gains of 1 and biases of 0
            assert torch.equal(values, torch.full_like(values, float(not name.endswith("bias")))), name


def test_nothing_else_changes(edited: Edited) -> None:
    """Comments, blanks, tabs, and ends of lines."""
    end = "\r\n" if edited.case.crlf else "\n"
    changes = edited.result.diff.split("\n")[2:]
    assert [c[1:].rstrip("\r") for c in changes if c.startswith("-")] == list(edited.case.removed)
    after = edited.result.text
    assert after.count("\n") == after.count(end)
    for line in edited.result.before.decode().splitlines():
        assert line in edited.case.removed or line in after.splitlines()
    added = [c[1:] for c in changes if c.startswith("+")]
    assert added
    step = "\t" if edited.case.model == "inheritance" else "    "
    assert all(line.startswith((step, line.lstrip())) for line in added)
    assert f"{step}spike_no_more_init(self)" in after
    assert sum("spike_no_more_init(" in line for line in added) == 2  # its definition and one call
    tied = edited.case.model == "module_dict" and not edited.case.options
    assert ["the head is tied" in note for note in edited.result.notes] == [True] * tied


def test_the_diff_applies(edited: Edited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(edited.result.file.parent)
    (tmp_path / edited.result.file.name).write_bytes(edited.result.before)
    (tmp_path / "edit.diff").write_bytes(edited.result.diff.encode())
    subprocess.run(["git", "apply", "edit.diff"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / edited.result.file.name).read_bytes() == edited.result.after


def test_twice_is_refused(edited: Edited, tmp_path: Path) -> None:
    file = tmp_path / f"{edited.case.model}.py"
    file.write_bytes(edited.result.after)
    with pytest.raises(Refused, match="patched already") as refused:
        spikepatch.codemod(file, f"{edited.case.model}:build", edited.case.recipe)
    line = int(refused.value.where.rpartition(" ")[2])
    assert edited.result.text.splitlines()[line - 1] == "def spike_no_more_init(model):"
    assert file.read_bytes() == edited.result.after


@pytest.mark.parametrize("edited", [case for case in CASES if case.model == "copied_hf"], indirect=True, ids=str)
def test_a_saved_copy_of_a_transformers_model_loads(edited: Edited, tmp_path: Path) -> None:
    """``from_pretrained`` builds the model again: loaded values must survive the initialiser."""
    model = edited.build()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    fresh = type(model)._from_config(model.config)
    embedding = fresh.get_input_embeddings().weight
    assert abs(embedding.std().item() * math.sqrt(5 * 32 / 2) - 1) < 5 / math.sqrt(2 * embedding.numel())


# Writing.


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file, read-only for others, behind a link."""
    (tmp_path / "own").mkdir()
    file = tmp_path / "own/helper_factory.py"
    file.write_bytes(source("helper_factory"))
    file.chmod(0o640)
    link = tmp_path / "helper_factory.py"
    link.symlink_to(file)
    return link


def test_write_replaces_the_file(written: Path) -> None:
    words = ["codemod", str(written), "--factory", "helper_factory:build", "--recipe", "vanilla", "--write"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "wrote" in done.stdout
    assert written.is_symlink()
    real = written.resolve()
    assert real.stat().st_mode & 0o777 == 0o640
    assert os.listdir(real.parent) == [real.name]
    assert "spike_no_more_init(self)" in real.read_text()
    compile(real.read_text(), real, "exec")


def test_a_file_that_changes_meanwhile_is_left_alone(written: Path) -> None:
    """The factory itself changes it, each time that it runs."""
    factory = written.resolve().parent / "meddling.py"
    factory.write_text(
        "import helper_factory\n"
        "def build():\n"
        f"    open({str(written)!r}, 'a').write('# somebody was here\\n')\n"
        "    return helper_factory.build()\n"
    )
    with pytest.raises(BadTarget, match="changed while"):
        spikepatch.codemod(written, "meddling:build", "vanilla", write=True)
    expected = source("helper_factory") + 2 * b"# somebody was here\n"
    assert written.read_bytes() == expected
    assert sorted(set(os.listdir(factory.parent)) - {"__pycache__"}) == ["helper_factory.py", "meddling.py"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_file_that_may_not_be_written(written: Path) -> None:
    written.chmod(0o440)
    with pytest.raises(BadTarget, match="may not write"):
        spikepatch.codemod(written, "helper_factory:build", write=True)


# Refusals.

TOKENS = """        self.tokens = make_embedding(
            vocabulary,
            width,
        )  # é, so that columns in bytes and in characters differ
        self.positions = make_embedding(length, width)
"""
END = "bias=é is None)\n"
BUILD = "    return Model(**sizes)\n"


def check_refusal(
    folder: Path, changes: dict[str, str], kind: type[SpikepatchError], **options: Any
) -> SpikepatchError:
    """Write the helper-factory model with ``changes``, which is refused; the file stays as it is."""
    text = source("helper_factory").decode()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "helper_factory.py"
    file.write_text(text)
    before = sorted(os.listdir(folder))
    arguments: dict[str, Any] = {"factory": "helper_factory:build", "write": True} | options
    with pytest.raises(kind) as refused:
        spikepatch.codemod(file, **arguments)
    assert file.read_text() == text
    assert sorted(set(os.listdir(folder)) - {"__pycache__"}) == before
    return refused.value


def line_of(folder: Path, text: str) -> str:
    lines = (folder / "helper_factory.py").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if text in line]
    return f"{folder / 'helper_factory.py'}, line {number}"


LOOP = """        tables = [nn.Embedding(rows, width) for rows in (vocabulary, length)]
        self.tokens, self.positions = tables
"""
SUBCLASS = """        class Table(nn.Embedding):
            pass

        self.tokens, self.positions = Table(vocabulary, width), make_embedding(length, width)
"""
COPIED = """        import copy

        self.tokens, self.positions = copy.deepcopy(nn.Embedding(vocabulary, width)), make_embedding(length, width)
"""


@pytest.mark.parametrize(
    ("changes", "options", "what", "at"),
    [
        ({TOKENS: LOOP}, {}, "no expression constructs tokens alone", "tables = ["),
        ({TOKENS: SUBCLASS}, {}, "not a plain nn.Embedding", "Table(vocabulary"),
        ({TOKENS: COPIED}, {}, "no line constructs tokens", ""),
        ({END: f"{END}        if depth < 9:\n            return\n"}, {}, "can return early", "            return"),
        ({"class Feed": "ScaledEmbedding = 1\nclass Feed"}, {}, "a ScaledEmbedding of its own", "ScaledEmbedding ="),
        (
            {BUILD: "    model = Model()\n    return model.apply(lambda m: getattr(m, 'reset_parameters', int)())\n"},
            {},
            "does not build what the recipe says",
            "",
        ),
        (
            {END: f"{END}        setattr(self.head, 'weight', self.tokens.weight)\n"},
            {"untie": True},
            "cannot be taken out",
            "setattr",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_placed(
    changes: dict[str, str], options: dict[str, Any], what: str, at: str, tmp_path: Path
) -> None:
    error = check_refusal(tmp_path, changes, Refused, **options)
    assert what in error.what
    assert error.why
    assert error.where == (line_of(tmp_path, at) if at else str(tmp_path / "helper_factory.py"))


def test_an_embedding_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "tables.py").write_text("from torch import nn\n\n\nclass Tables(nn.Module):\n"
        "    def __init__(self, a, b, d):\n        super().__init__()\n"
        "        self.a, self.b = nn.Embedding(a, d), nn.Embedding(b, d)\n")  # fmt: skip
    changes = {
        TOKENS: "        import tables\n\n        self.t = tables.Tables(vocabulary, length, width)\n",
        "self.tokens(ids) + self.positions(": "self.t.a(ids) + self.t.b(",
    }
    error = check_refusal(tmp_path, changes, Refused)
    assert "t.a is constructed in another file" in error.what
    assert error.where == f"{tmp_path / 'tables.py'}, line 7"


@pytest.mark.parametrize(
    ("body", "what", "why"),
    [
        ("    raise RuntimeError('no such size')\n", "the factory raised an error", "RuntimeError: no such size at"),
        ("    return 'a model'\n", "the factory returns no model", "it returned str"),
        ("    return nn.Linear(2, 2)\n", "builds a model of another file", "Linear is defined in"),
        ("    import os\n\n    os._exit(7)\n", "ended early", "exit code 7"),
    ],
)
def test_factories_that_build_no_model_of_the_file(body: str, what: str, why: str, tmp_path: Path) -> None:
    options = {"recipe": "vanilla"}
    if "Linear" in body:  # which no recipe fits, so that the file is not reached; a real model of another file
        shutil.copy(MODELS / "inheritance.py", tmp_path)
        body, why = "    import inheritance\n\n    return inheritance.build()\n", "LanguageModel is defined in"
    error = check_refusal(tmp_path, {BUILD: body}, BadSource, **options)
    assert what in error.what
    assert why in error.why


def test_a_model_without_values(tmp_path: Path) -> None:
    changes = {BUILD: "    import torch\n\n    with torch.device('meta'):\n        return Model()\n"}
    assert "meta device" in check_refusal(tmp_path, changes, Refused).what


@pytest.mark.parametrize(
    ("text", "factory", "what"),
    [
        ("def f(:\n", "model:build", "line 1: the file is not valid Python"),
        ("x = 1\ny = \x00\n", "model:build", "the file is not valid Python"),
        ("# coding: latin-7\n", "model:build", "the file is no Python source"),
        ("x = 1\n", "model", "not of the form module:function"),
        ("x = 1\n", "model:build", "the factory cannot be imported"),
        ("x = 1\n", "nothing_of_this_name:build", "No module named"),
        ("import nothing_of_this_name\n", "model:build", "model.py, line 1"),
        (None, "model:build", "the file cannot be read"),
    ],
)
def test_bad_input_ends_with_exit_code_2(text: str | None, factory: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    if text is not None:
        file.write_text(text)
    done = CliRunner().invoke(main, ["codemod", str(file), "--factory", factory, "--write"])
    assert done.exit_code == 2, done.output
    assert what in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert text is None or file.read_text() == text


def test_the_help_says_that_it_runs_your_code() -> None:
    assert "This runs your code" in CliRunner().invoke(main, ["codemod", "--help"]).output


def test_the_factory_gives_the_example(tmp_path: Path) -> None:
    """A forward whose first argument is not the ids needs one. And a helper is not edited that has another use."""
    once = "make_embedding(length, width)"
    changes = {
        "forward(self, ids):\n        x =": "forward(self, shift, ids):\n        x = shift +",
        once: f"{once} if depth > 9 else nn.Embedding(length, width)",
        BUILD: "    import torch\n\n    return Model(), {'shift': torch.zeros(24), 'ids': arange(8)[None]}\n",
    }
    text = source("helper_factory").decode()
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    file = tmp_path / "helper_factory.py"
    file.write_text(text)
    result = spikepatch.codemod(file, "helper_factory:build")
    assert "ScaledEmbedding.of(make_embedding(" in result.text
