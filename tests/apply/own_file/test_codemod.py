"""A recipe as source code: what is edited, that it is the same model as the live patch, and what is refused.

What takes place in processes of its own takes seconds each time; so most of it is tested without.
"""

from __future__ import annotations

import importlib.util
import math
import os
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
from spikepatch.apply.own_file.build import Built, observe
from spikepatch.apply.own_file.call_sites import watching
from spikepatch.apply.own_file.codemod import Codemod, rewrite
from spikepatch.apply.own_file.recheck import differences
from spikepatch.apply.own_file.syntax import parse
from spikepatch.cli import main
from spikepatch.errors import BadSource, BadTarget, Refused, SpikepatchError
from spikepatch.plans.plan import Fill, Plan, Recipe
from spikepatch.recipes.built_in import RECIPES
from spikepatch.recipes.request import parse_request
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
SLOW = pytest.mark.slow
#: One for each model, and more of them.
CASES = (
    Case(
        "module_dict",
        "embed-ln",
        (WTE, "        self.transformer.wte.weight = self.lm_head.weight # tied"),
        {"layers": 1, "width": 64},
        {"untie": True},
    ),
    Case(
        "helper_factory",
        "scaled-embed",
        (*HELPED, "        self.positions = make_embedding(length, width)"),
        {"depth": 3, "width": 30},
        {"positions": True},
    ),
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
MORE = (
    Case("module_dict", "scaled-embed", (WTE,), {"layers": 5, "width": 48}, {}),
    Case("helper_factory", "embed-ln", HELPED, {"depth": 4, "width": 40}, {}),
    Case("helper_factory", "vanilla", (), {"depth": 3, "width": 30}, {}),
)
PARAMETERS = [*CASES, *(pytest.param(case, marks=SLOW) for case in MORE)]


@dataclass(frozen=True)
class Edited:
    """A case, edited: what was and is built, and functions that build the original and the edited model, of any size.

    ``differences``: of the edited model from the plan, as the command checks them.
    """

    case: Case
    result: Codemod
    original: Callable[..., Any]
    build: Callable[..., Any]
    differences: list[str]


def module_of(file: Path, text: bytes) -> Any:
    """Write ``text`` to ``file`` and import it, as a module of its own."""
    file.write_bytes(text)
    name = "_".join(file.with_suffix("").parts[-2:])
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seen(factory: Callable[[], Any]) -> Built:
    """What the command sees of a model in a process of its own, seen in this one."""
    with watching() as watch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory()
    return observe(model, watch)


def source(model: str, *, crlf: bool = False) -> bytes:
    data = (MODELS / f"{model}.py").read_bytes()
    return data.replace(b"\n", b"\r\n") if crlf else data


@pytest.fixture(scope="module", params=PARAMETERS, ids=str)
def edited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Edited:
    case: Case = request.param
    file = tmp_path_factory.mktemp("before") / f"{case.model}.py"
    before = source(case.model, crlf=case.crlf)
    original = module_of(file, before).build
    built = seen(original)
    plan, text = rewrite(
        parse(str(file), before.decode()), built, parse_request(case.recipe, reinit="all", **case.options)
    )
    result = Codemod(file, before, text.encode(), "utf-8", plan, ())
    build = module_of(tmp_path_factory.mktemp("after") / file.name, result.after).build
    return Edited(case, result, original, build, list(differences(plan, built, seen(build))))


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


def test_the_edited_model_is_as_planned(edited: Edited) -> None:
    assert edited.differences == []


@pytest.mark.parametrize("size", ["as planned", "another size"])
def test_a_fresh_build_is_a_sample_of_the_recipe(edited: Edited, size: str) -> None:
    """Of any width and depth."""
    sizes = edited.case.larger if size == "another size" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = edited.build(**sizes)
        plan = planned(edited, edited.original(**sizes))
    fills = plan.select(Fill)
    assert len({fill.std for fill in fills}) == 2
    assert size == "as planned" or len(fills) != len(edited.result.plan.select(Fill))
    check_sample(model, fills)
    rest = dict(model.named_parameters()).keys() - {fill.parameter for fill in fills}
    assert rest
    for name in rest:
        values = model.get_parameter(name)
        if "norm" in name or "ln_" in name or "final" in name:  # gains of 1 and biases of 0
            assert torch.equal(values, torch.full_like(values, float(not name.endswith("bias")))), name


def check_sample(model: nn.Module, fills: list[Fill]) -> None:
    """By the standard errors of a normal sample, std / sqrt(n) and std / sqrt(2 n); those of the others are smaller."""
    assert fills
    for fill in fills:
        values = model.get_parameter(fill.parameter).detach().double()
        error = fill.std / math.sqrt(values.numel())
        assert abs(values.mean()) <= 5 * error, fill
        assert abs(values.square().mean().sqrt() - fill.std) <= 5 * error / math.sqrt(2), fill
        bound = {"normal": math.inf, "truncated": fill.cut * fill.size, "uniform": fill.size}[fill.distribution]
        assert values.abs().max() <= bound * (1 + torch.finfo(torch.float32).eps), fill


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


# Recipes.

TOML = """
name = "own"

[[transform]]
kind = "small_init"
base = "fan_in"
uniform = true

[[transform]]
kind = "residual_init"
scale = "mitchell"
cut = 2.5

[[transform]]
kind = "embed_norm"
norm = "rmsnorm"
affine = false
"""


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Built]:
    file = tmp_path_factory.mktemp("recipes") / "module_dict.py"
    module = module_of(file, source("module_dict"))
    return file, module, seen(module.build)


def rebuilt(gpt: tuple[Path, Any, Built], recipe: str | Recipe, folder: Path) -> Any:
    """The module with the recipe in it, once it builds what the recipe says."""
    file, _, built = gpt
    plan, text = rewrite(parse(str(file), file.read_text()), built, parse_request(recipe, reinit="all"))
    module = module_of(folder / file.name, text.encode())
    assert list(differences(plan, built, seen(module.build))) == []
    return module


@pytest.mark.parametrize("recipe", [pytest.param(recipe, id=name) for name, recipe in RECIPES.items()])
def test_every_recipe_at_another_size(recipe: Recipe, gpt: tuple[Path, Any, Built], tmp_path: Path) -> None:
    module = rebuilt(gpt, recipe, tmp_path)
    sizes = {"layers": 5, "width": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model, original = module.build(**sizes), gpt[1].build(**sizes)
    check_sample(model, spikepatch.plan(original, recipe, reinit="all", example_inputs=example(original)).select(Fill))
    assert "import re\n" in Path(module.__file__).read_text()


def test_a_recipe_with_a_std_for_every_layer(gpt: tuple[Path, Any, Built], tmp_path: Path) -> None:
    """It says nothing of layers that were not there, so a model with more of them is not built."""
    file = tmp_path / "own.toml"
    file.write_text(TOML)
    module = rebuilt(gpt, str(file), tmp_path)
    model, original = module.build(width=64), gpt[1].build(width=64)
    plan = spikepatch.plan(original, str(file), reinit="all", example_inputs=example(original))
    assert len({fill.std for fill in plan.select(Fill)}) > 3
    check_sample(model, plan.select(Fill))
    with pytest.raises(ValueError, match=r"listed one by one, for S = 6, not 8"):
        module.build(layers=4)


def test_a_factor_that_is_there_already(tmp_path: Path) -> None:
    text = source("inheritance").decode()
    old = "x = self.embed(tokens)\n"
    assert text.count(old) == 1
    file = tmp_path / "model.py"
    module = module_of(file, text.replace(old, "x = self.embed(tokens) * 2.0\n").encode())
    parsed, built = parse(str(file), file.read_text()), seen(module.build)
    with pytest.raises(Refused, match="already multiplied by 2"):
        rewrite(parsed, built, parse_request("scaled-embed", reinit="all"))
    plan, edited = rewrite(parsed, built, parse_request("scaled-embed", reinit="all", replace=True, factor=7.0))
    assert "super().forward(ids) * 3.5\n" in edited
    (tmp_path / "after").mkdir()
    assert list(differences(plan, built, seen(module_of(tmp_path / "after/model.py", edited.encode()).build))) == []


# Processes, and writing.


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c if c.model == "copied_hf" else pytest.param(c, marks=SLOW) for c in (*CASES, *MORE)], ids=str
)
def test_built_in_processes_of_their_own(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text comes of it; the folder is left as it was."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    file = tmp_path / f"{case.model}.py"
    file.write_bytes(source(case.model, crlf=case.crlf))
    result = spikepatch.codemod(file, f"{case.model}:build", case.recipe, **case.options)
    assert file.read_bytes() == result.before
    assert os.listdir(tmp_path) == [file.name]
    other = tmp_path / "here" / file.name
    other.parent.mkdir()
    built = seen(module_of(other, result.before).build)
    request = parse_request(case.recipe, reinit="all", **case.options)
    _, text = rewrite(parse(str(other), result.before.decode()), built, request)
    assert result.text == text
    tied = case.model == "module_dict" and not case.options
    assert ["the head is tied" in note for note in result.notes] == [True] * tied


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file, read-only for others, behind a link."""
    (tmp_path / "own").mkdir()
    file = tmp_path / "own/module_dict.py"
    file.write_bytes(source("module_dict"))
    file.chmod(0o640)
    link = tmp_path / "module_dict.py"
    link.symlink_to(file)
    return link


@pytest.mark.slow
def test_write_replaces_the_file(written: Path) -> None:
    words = ["codemod", str(written), "--factory", "module_dict:build", "--recipe", "embed-ln", "--untie", "--write"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "wrote" in done.stdout
    assert written.is_symlink()
    real = written.resolve()
    assert real.stat().st_mode & 0o777 == 0o640
    assert os.listdir(real.parent) == [real.name]
    assert "spike_no_more_init(self)" in real.read_text()
    compile(real.read_text(), real, "exec")


@pytest.mark.slow
def test_a_file_that_changes_meanwhile_is_left_alone(written: Path) -> None:
    """The factory itself changes it, each time that it runs."""
    factory = written.resolve().parent / "meddling.py"
    factory.write_text(
        "import module_dict\n"
        "def build():\n"
        f"    open({str(written)!r}, 'a').write('# somebody was here\\n')\n"
        "    return module_dict.build()\n"
    )
    with pytest.raises(BadTarget, match="changed while"):
        spikepatch.codemod(written, "meddling:build", "vanilla", write=True)
    expected = source("module_dict") + 2 * b"# somebody was here\n"
    assert written.read_bytes() == expected
    assert sorted(set(os.listdir(factory.parent)) - {"__pycache__"}) == ["meddling.py", "module_dict.py"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_file_that_may_not_be_written(written: Path) -> None:
    written.chmod(0o440)
    with pytest.raises(BadTarget, match="may not write"):
        spikepatch.codemod(written, "module_dict:build", write=True)


# Refusals.

TOKENS = """        self.tokens = make_embedding(
            vocabulary,
            width,
        )  # é, so that columns in bytes and in characters differ
        self.positions = make_embedding(length, width)
"""
END = "bias=é is None)\n"
BUILD = "    return Model(**sizes)\n"


def changed(changes: dict[str, str]) -> str:
    """The helper-factory model with ``changes``."""
    text = source("helper_factory").decode()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def rewritten(folder: Path, changes: dict[str, str], recipe: str = "scaled-embed", **options: Any) -> tuple[Plan, str]:
    file = folder / "helper_factory.py"
    built = seen(module_of(file, changed(changes).encode()).build)
    return rewrite(parse(str(file), file.read_text()), built, parse_request(recipe, reinit="all", **options))


def check_refusal(
    folder: Path, changes: dict[str, str], kind: type[SpikepatchError], **options: Any
) -> SpikepatchError:
    """By the command: what is refused leaves the file as it is."""
    text = changed(changes)
    file = folder / "helper_factory.py"
    file.write_text(text)
    before = sorted(os.listdir(folder))
    with pytest.raises(kind) as refused:
        spikepatch.codemod(file, "helper_factory:build", write=True, **options)
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
    with pytest.raises(Refused) as refused:
        rewritten(tmp_path, changes, **options)
    assert what in refused.value.what
    assert refused.value.why
    assert refused.value.where == (line_of(tmp_path, at) if at else str(tmp_path / "helper_factory.py"))


def test_an_embedding_of_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_tables.py").write_text("from torch import nn\n\n\nclass Tables(nn.Module):\n"
        "    def __init__(self, a, b, d):\n        super().__init__()\n"
        "        self.a, self.b = nn.Embedding(a, d), nn.Embedding(b, d)\n")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    changes = {
        TOKENS: "        import other_tables\n\n        self.t = other_tables.Tables(vocabulary, length, width)\n",
        "self.tokens(ids) + self.positions(": "self.t.a(ids) + self.t.b(",
    }
    with pytest.raises(Refused) as refused:
        rewritten(tmp_path, changes)
    assert "t.a is constructed in another file" in refused.value.what
    assert refused.value.where == f"{tmp_path / 'other_tables.py'}, line 7"


def test_a_model_of_another_file(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    built = seen(module_of(file, source("helper_factory")).build)
    with pytest.raises(BadSource, match="builds a model of another file") as refused:
        rewrite(parse(str(tmp_path / "other.py"), file.read_text()), built, parse_request("vanilla", reinit="all"))
    assert f"Model is defined in {file}" in refused.value.why


def test_embeddings_that_change_in_two_ways(tmp_path: Path) -> None:
    changes = {"self.tokens(ids) + ": "self.tokens(ids) * 2.0 + "}
    with pytest.raises(Refused, match="each in another way"):
        rewritten(tmp_path, changes, positions=True, replace=True)


@pytest.mark.slow
def test_weights_that_something_else_draws_again(tmp_path: Path) -> None:
    """By the command: the edited file is built, and its values are no sample of the recipe."""
    changes = {BUILD: "    model = Model()\n    return model.apply(lambda m: getattr(m, 'reset_parameters', int)())\n"}
    error = check_refusal(tmp_path, changes, Refused, recipe="vanilla")
    assert "does not build what the recipe says" in error.what
    assert "tokens.weight has mean" in error.why


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "what", "why"),
    [
        ("    raise RuntimeError('no such size')\n", "the factory raised an error", "RuntimeError: no such size at"),
        ("    return 'a model'\n", "the factory returns no model", "it returned str"),
        ("    import os\n\n    os._exit(7)\n", "ended early", "exit code 7"),
    ],
)
def test_factories_that_build_no_model_of_the_file(body: str, what: str, why: str, tmp_path: Path) -> None:
    error = check_refusal(tmp_path, {BUILD: body}, BadSource)
    assert what in error.what
    assert why in error.why


def test_a_model_without_values(tmp_path: Path) -> None:
    changes = {BUILD: "    import torch\n\n    with torch.device('meta'):\n        return Model()\n"}
    with pytest.raises(Refused, match="meta device"):
        rewritten(tmp_path, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "factory", "what"),
    [
        ("def f(:\n", "model:build", "line 1: the file is not valid Python"),
        ("x = 1\ny = \x00\n", "model:build", "the file is not valid Python"),
        ("# coding: latin-7\n", "model:build", "the file is no Python source"),
        ("x = 1\n", "model", "not of the form module:function"),
        ("x = 1\n", "model:build", "the factory cannot be imported"),
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


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--recipe", "nothing-of-this-name"], "there is no recipe"),
        (["--recipe", "missing.toml"], "the recipe file cannot be read"),
        (["--recipe", "nothing_of_this_name:RECIPE"], "the recipe cannot be imported"),
        (["--recipe", "vanilla", "--replace"], "are for recipes that scale the embedding"),
        (["--factor", "0"], "must be a positive number"),
    ],
)
def test_recipes_are_checked_before_your_code_runs(words: list[str], what: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["codemod", str(tmp_path / "missing.py"), "--factory", "a:b", *words])
    assert done.exit_code == 2, done.output
    assert what in done.stderr


def test_the_help_says_that_it_runs_your_code() -> None:
    assert "This runs your code" in CliRunner().invoke(main, ["codemod", "--help"]).output


def test_a_helper_with_another_use(tmp_path: Path) -> None:
    """It is left as it is, though that use is not one of this configuration."""
    once = "make_embedding(length, width)"
    _, text = rewritten(tmp_path, {once: f"{once} if depth > 9 else nn.Embedding(length, width)"})
    assert "ScaledEmbedding.of(make_embedding(" in text


@pytest.mark.slow
def test_the_factory_gives_the_example(tmp_path: Path) -> None:
    """A forward whose first argument is not the ids needs one."""
    changes = {
        "forward(self, ids):\n        x =": "forward(self, shift, ids):\n        x = shift +",
        BUILD: "    import torch\n\n    return Model(), {'shift': torch.zeros(24), 'ids': arange(8)[None]}\n",
    }
    file = tmp_path / "helper_factory.py"
    file.write_text(changed(changes))
    assert spikepatch.codemod(file, "helper_factory:build").text.count("ScaledEmbedding") == 2
