"""The command itself: what it prints where, how fast it answers, and how it ends."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from packaging.version import Version

import spikepatch
from spikepatch.cli import main
from spikepatch.commands import options
from spikepatch.recipes.built_in import RECIPES
from spikepatch.recipes.files import KINDS
from tests import ROOT
from tests.architectures import tiny_config, tiny_model
from tests.cli_surface import surface

COMMAND = [sys.executable, "-m", "spikepatch"]

#: What scripts rely on in `inspect --json`: fields, and the types of their values.
CONTRACT: dict[str, Any] = {
    "source": str,
    "model_type": str,
    "architecture": str,
    "width": int,
    "layers": int,
    "sublayers": int,
    "placement": str,
    "proven": bool,
    "leaks": list,
    "embeddings": [{"module": str, "parameter": str, "kind": str, "scale": float, "normed": bool}],
    "residual_projections": [{"parameter": str, "layer": int, "sublayer": int, "kind": str, "between": list}],
    "norms": [{"module": str, "role": str, "kind": str, "eps": float, "layer": (int, type(None)), "gain": str}],
    "head": {"parameter": str, "tied": bool},
    "matrices": [{"parameter": str, "fan_in": int, "fan_out": int, "in_axis": int, "out_axis": int}],
    "tied": [list],
    "streams": list,
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it who has asked Python for every warning."""
    shown = os.environ | {"PYTHONWARNINGS": "default"}
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, env=shown)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    tiny_config("gpt2").save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "Usage: python -m spikepatch" in done.stdout

    assert min(seconds) < 0.5


def test_the_surface_is_what_it_was() -> None:
    """Commands, options, types and defaults. What is changed on purpose is written anew: see ``cli_surface.py``."""
    assert surface() == Path(__file__).with_name("cli_surface.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", main.commands)
def test_every_option_is_explained(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"], terminal_width=100).output
    found = [p for p in main.commands[command].params if isinstance(p, click.Option)]
    assert {"-v", "-q"} <= {name for option in found for name in option.opts}
    for option in found:
        assert option.help is not None
        assert option.help.endswith((".", "]"))
        assert option.opts[-1] in shown
    if any(p.human_readable_name == "SOURCE" for p in main.commands[command].params):
        assert "arch:TYPE" in shown


def test_one_name_has_one_meaning() -> None:
    """What several commands share is written, typed and explained alike wherever it is."""
    uses: dict[str, list[click.Option]] = {}
    for command in main.commands.values():
        for option in command.params:
            if isinstance(option, click.Option):
                uses.setdefault(option.opts[-1], []).append(option)
    several = {name: found for name, found in uses.items() if len(found) > 1}
    assert several.keys() >= {"--recipe", "--reinit", "--factor", "--seed", "--json", "--revision", "--overwrite"}
    for name, found in several.items():
        kinds = {option.type.name.removesuffix(" range").replace("file", "path") for option in found}
        assert len(kinds) == len({(tuple(option.opts), option.is_flag) for option in found}) == 1, name
    shared = {
        "--json" if name == "as_json" else f"--{name.replace('_', '-')}" for name in vars(options)
    } & several.keys()
    assert len(shared) >= 10
    for name in shared - {"--recipe", "--out"}:  # check compares any number of recipes; OUT is an argument elsewhere
        assert len({(option.name, option.help, str(option.default), option.metavar) for option in several[name]}) == 1


@pytest.mark.parametrize("command", ["audit", "check", "codemod", "convert", "fold", "verify"])
def test_options_are_the_arguments_of_the_function(command: str) -> None:
    """The command and the Python API are twins: what one can be told, the other can."""
    parameters = set(inspect.signature(getattr(spikepatch, command)).parameters)
    parameters |= {"source", "sources"} if "model" in parameters else {"out"} if "folder" in parameters else set()
    only_printed = {"as_json", "verbose", "quiet", "report", "fail_on", "style"}
    only_printed |= {"overwrite"} if command == "check" else set()  # of --report
    assert {p.name for p in main.commands[command].params} - only_printed <= parameters


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        pytest.param(
            ["convret", "arch:gpt2", "out"],
            "did you mean convert?",
            marks=pytest.mark.skipif(
                Version(version("click")) < Version("8.4"), reason="older ones suggest no command"
            ),
        ),
        (["convert", "arch:gpt2", "out", "--reciep", "vanilla"], "--recipe"),
        (["convert", "arch:gpt2", "out", "--recipe", "scaled-embedd"], "did you mean scaled-embed?"),
        (["convert", "arch:gpt2", "out", "--dtype", "bfloat"], "did you mean bfloat16"),
        (["convert", "arch:gtp2", "out"], "did you mean gpt2"),
        (["check", "arch:gpt2", "--threshold", "ratio_atrisk=2"], "did you mean ratio_at_risk"),
        (["recipes", "emebd-ln"], "did you mean embed-ln?"),
    ],
)
def test_what_is_misspelt_is_suggested(
    words: list[str], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert meant in done.stderr


def test_recipes() -> None:
    shown = CliRunner().invoke(main, ["recipes"]).output
    blocks = {block.split()[0]: block for block in shown.split("\n\n")}

    for name, conditions in {
        "scaled-embed": ("small sub-layers: yes", "large shortcut: yes"),
        "embed-ln": ("small sub-layers: yes", "large shortcut: yes"),
        "vanilla": ("small sub-layers: yes", "large shortcut: no"),
    }.items():
        assert all(condition in blocks[name] for condition in conditions)
        assert "N(0, 2/(5d))" in blocks[name]
        assert "arXiv 2312.16903" in blocks[name]
    assert shown.startswith("scaled-embed (default)\n")
    assert CliRunner().invoke(main, ["recipes", "-q"]).output.split() == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_one_recipe(name: str) -> None:
    recipe, shown = RECIPES[name], CliRunner().invoke(main, ["recipes", name]).output
    assert shown.startswith(name)
    assert recipe.equation in shown
    kinds = re.findall(r"^(\w+)\(.*\)$", shown, re.MULTILINE)
    assert [KINDS[kind] for kind in kinds] == [type(transform) for transform in recipe.transforms]
    data = json.loads(CliRunner().invoke(main, ["recipes", name, "--json"]).output)
    assert (data["name"], data["large_shortcut"], len(data["transforms"])) == (name, recipe.large_shortcut, len(kinds))


def test_a_recipe_of_ones_own_in_detail(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[[transform]]\nkind = "small_init"\nbase = "normal"\nstd = 0.01\n')
    assert "small_init(base='normal', std=0.01)" in CliRunner().invoke(main, ["recipes", str(file)]).output


def test_learned_weights_are_not_left_out_in_silence(tmp_path: Path) -> None:
    """By default one line on stderr says so, however quiet; who asked for it by name is told with -q no more."""
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    words = ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--dry-run"]
    line = f"fresh weights: the learned weights of {tmp_path}/model are NOT used; --reinit none keeps them"
    for more, silent in (([], False), (["-q"], False), (["-q", "--json"], False), (["-q", "--reinit", "all"], True)):
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 0, done.output
        assert done.stderr.count(line) == (0 if silent else 1), more
        assert done.stdout.count(line) == ("--json" in more)
        assert "-q" not in more or done.stderr == line * (not silent) + "\n" * (not silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quiet_prints_the_result_and_nothing_else(source: str, tmp_path: Path) -> None:
    done = run("convert", source, str(tmp_path / "out"), "-q")
    assert (done.returncode, done.stderr) == (0, "")
    wrote, load = done.stdout.splitlines()
    assert wrote.startswith(f"wrote {tmp_path}/out: ")
    assert load.startswith("load it with ")
    refused = run("convert", source, str(tmp_path / "out"), "-q")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert "\n  remedy: " in refused.stderr


def test_verbose_tells_what_is_left_alone_and_how_long_it_took(source: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", source, str(tmp_path / "out"), "-v"])
    assert done.exit_code == 0
    assert re.search(r"^  transformer\.h\.0\.ln_1\.weight +not a weight", done.stdout, re.MULTILINE)
    timed = re.findall(r"^(.*): \d+\.\d\d s$", done.stderr, re.MULTILINE)
    assert timed == re.findall(r"^(.*) \.\.\.$", done.stderr, re.MULTILINE)
    assert "writing weights" in timed


def test_levels_of_the_other_commands(source: str) -> None:
    quiet = CliRunner().invoke(main, ["check", source, "--tokens", "8", "-q"])
    assert (quiet.stdout, quiet.stderr) == ("as it is: at-risk\n", "")
    shown = CliRunner().invoke(main, ["inspect", source, "-q"])
    assert shown.stderr == ""
    verbose = CliRunner().invoke(main, ["inspect", source, "-v"])
    assert verbose.stdout.startswith(shown.stdout)
    reached = verbose.stdout.removeprefix(shown.stdout).split()
    assert {"transformer.wte.weight", "transformer.ln_f.weight"} <= set(reached)
    assert not any("c_proj" in name for name in reached)


@pytest.mark.parametrize(("words", "missing"), [([], "--width and --layers"), (["--layers", "2"], "--width")])
def test_what_megatron_lacks_is_named_and_nothing_else(words: list[str], missing: str) -> None:
    done = CliRunner().invoke(main, ["recipes", "vanilla", "--for", "megatron", *words])
    assert done.exit_code == 2
    assert f"--for needs {missing}\n" in done.stderr


@pytest.mark.slow
def test_a_used_folder_is_refused_before_torch_is_loaded(source: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").touch()
    script = f"""
import sys
from click.testing import CliRunner
from spikepatch.cli import main
for command in ("convert", "fold"):
    done = CliRunner().invoke(main, [command, {source!r}, {str(tmp_path / "out")!r}])
    assert done.exit_code == 2 and "is not empty" in done.stderr, done.output
    done = CliRunner().invoke(main, [command, {source!r}, {source + "/out"!r}])
    assert done.exit_code == 2 and "lies inside the source" in done.stderr, done.output
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_verbose_and_quiet_exclude_each_other() -> None:
    done = CliRunner().invoke(main, ["recipes", "-v", "-q"])
    assert done.exit_code == 2
    assert "-v and -q cannot be given together" in done.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("con", {"convert"}),
        ("convert --max", {"--max-shard-size"}),
        ("convert arch:gpt2 out --recipe sc", {"scaled-embed"}),
        ("check arch:gpt2 --recipe embed-", {"embed-ln", "embed-detach"}),
        ("recipes uni", {"unit-embed"}),
        ("convert arch:gpt2 out --dtype bf", {"bfloat16"}),
        ("convert arch:gpt2 out --reinit r", {"residual"}),
    ],
)
def test_completion(words: str, offered: set[str]) -> None:
    *before, incomplete = words.split()
    found = ShellComplete(main, {}, "spikepatch", "_SPIKEPATCH_COMPLETE").get_completions(before, incomplete)
    assert {item.value for item in found} == offered


def test_completion_is_switched_on_as_the_help_says() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    switch = re.search(r"^ *(eval .*bash_source.*?)  ", shown, re.MULTILINE)
    assert switch is not None
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{switch[1]}; complete -p spikepatch"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | path,
    )
    assert done.stdout.startswith("complete ")
    assert done.stderr == ""


@pytest.mark.slow
def test_convert_prints_the_result_on_stdout_and_progress_on_stderr(source: str, tmp_path: Path) -> None:
    done = run("convert", source, str(tmp_path / "out"))

    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "reading the source ...",
        "mapping the residual stream ...",
        "choosing how it is stored ...",
        "writing weights ...",
        "checking what was written ...",
    ]
    lines = done.stdout.splitlines()
    assert lines[0] == "fresh weights: a model to pre-train"
    assert "GPT2LMHeadModel: width d = 64, S = 6 sub-layers, proven" in lines
    assert "  transformer.wte: output * 8 = sqrt(d)" in lines
    assert lines[-1] == f'load it with AutoModelForCausalLM.from_pretrained("{tmp_path}/out", trust_remote_code=True)'


@pytest.mark.slow
def test_convert_as_json(source: str, tmp_path: Path) -> None:
    done = run("convert", source, str(tmp_path / "out"), "--json")
    result = json.loads(done.stdout)

    assert done.returncode == 0
    assert (result["storage"], result["dtype"], result["out"]) == ("code", "float32", str(tmp_path / "out"))
    assert result["notes"][0] == "fresh weights: a model to pre-train"
    assert result["plan"]["recipe"] == "scaled-embed"
    assert result["residual"]["proven"]


def test_a_dry_run_says_what_is_left_alone(source: str, tmp_path: Path) -> None:
    command = ["convert", source, str(tmp_path / "out"), "--dry-run"]
    done, verbose = (CliRunner().invoke(main, [*command, *more]) for more in ([], ["-v"]))
    plan = json.loads(CliRunner().invoke(main, [*command, "--json", "-q"]).stdout)["plan"]
    names = {skip["target"] for skip in plan["skips"]}
    listed = re.findall(r"^  (\S+) +not a weight that this recipe draws$", verbose.output, re.MULTILINE)

    assert (done.exit_code, verbose.exit_code) == (0, 0)
    assert "dry run, nothing written" in done.output
    first = f"  transformer.h.0.ln_1.weight and {len(listed) - 1} more: not a weight that this recipe draws"
    assert first in done.output.splitlines()
    assert len(listed) == len(names) > 20
    assert set(listed) == names
    assert not (tmp_path / "out").exists()


def assert_has(data: Any, contract: Any) -> None:
    if isinstance(contract, dict):
        assert contract.keys() <= data.keys()
        for name, part in contract.items():
            assert_has(data[name], part)
    elif isinstance(contract, list):
        assert data
        for item in data:
            assert_has(item, contract[0])
    else:
        assert isinstance(data, contract), (data, contract)


@pytest.mark.slow
def test_inspect_as_json() -> None:
    done = run("inspect", "arch:gpt2", "--json")
    data = json.loads(done.stdout)

    assert done.returncode == 0
    assert_has(data, CONTRACT)
    assert (data["source"], data["model_type"], data["architecture"]) == ("arch:gpt2", "gpt2", "GPT2LMHeadModel")
    assert (data["width"], data["layers"], data["sublayers"], data["placement"]) == (768, 12, 24, "pre-norm")
    assert (data["proven"], data["leaks"], data["streams"]) == (True, [], [])
    assert data["head"] == {"parameter": "lm_head.weight", "tied": True}
    token = {"module": "transformer.wte", "parameter": "transformer.wte.weight", "kind": "token"}
    token_as_it_is = token | {"scale": 1.0, "normed": False}
    assert token_as_it_is.items() <= data["embeddings"][0].items()
    projection = {"parameter": "transformer.h.0.attn.c_proj.weight", "layer": 0, "sublayer": 0, "kind": "attention"}
    assert projection.items() <= data["residual_projections"][0].items()
    norm = {"module": "transformer.h.0.ln_1", "role": "pre", "kind": "layernorm", "eps": 1e-05, "layer": 0}
    assert any(norm.items() <= found.items() for found in data["norms"])


@pytest.mark.slow
def test_inspect_cuts_no_name(tmp_path: Path) -> None:
    tiny_config("gemma2").save_pretrained(tmp_path)
    done = subprocess.run(
        [*COMMAND, "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "40"},
    )

    for name in ("model.layers.*.self_attn.o_proj.weight", "model.layers.*.post_feedforward_layernorm"):
        assert any(name in line.split() for line in done.stdout.splitlines())
    assert "layers 0-2" in done.stdout
    assert any(line.startswith("proven: ") for line in done.stdout.splitlines())
    assert max(map(len, done.stdout.splitlines())) <= 50  # a name of 48 letters has a line of its own
    assert done.stderr == "reading the source ...\nmapping the residual stream ...\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["convert"], 2),
        (["convert", "arch:gpt2", "out", "--reinit", "some"], 2),
        (["convert", "arch:nothing", "out"], 2),
        (["no-such-command"], 2),
    ],
)
def test_exit_codes(words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert CliRunner().invoke(main, words).exit_code == code
    assert list(tmp_path.iterdir()) == []


def test_an_exception_of_our_own_is_reported_as_a_bug(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("of our own")

    monkeypatch.setattr("spikepatch.apply.folder.shards.check_shards", fail)
    done = CliRunner().invoke(main, ["convert", source, str(tmp_path / "out")])

    assert done.exit_code == 3
    assert "KeyError: 'of our own'" in done.output
    assert "this is a bug in spikepatch" in done.output
    assert "report it" in done.output
    assert list(tmp_path.iterdir()) == []


def on_a_terminal(*words: str, **variables: str) -> str:
    """What the command writes to a terminal of 200 columns."""
    import pty

    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"} | variables
    process = subprocess.Popen([*COMMAND, *words], stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    received = bytearray()
    while True:
        try:
            data = os.read(leader, 1 << 16)
        except OSError:  # Linux reports the end of a pseudo-terminal so
            break
        if not data:
            break
        received += data
    os.close(leader)
    assert process.wait() == 0
    return received.decode()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_gets_a_bar_and_whole_lines(source: str, tmp_path: Path) -> None:
    text = on_a_terminal("convert", source, str(tmp_path / "out"))
    assert "\x1b[" in text
    assert "━" in text
    assert "mapping the residual stream" in text
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in text.split("\n")]
    result = lines[next(i for i, line in enumerate(lines) if line.endswith("fresh weights: a model to pre-train")) :]
    assert any("loads with trust_remote_code=True" in line for line in result)
    assert any(line.startswith("load it with AutoModelForCausalLM") for line in result)
    assert not any("━" in line for line in result[1:])
    assert "it/s]" not in text


#: A colour of text or background, as terminals are told it.
COLOUR = r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_no_color(source: str) -> None:
    assert re.search(COLOUR, on_a_terminal("inspect", source))
    assert not re.search(COLOUR, on_a_terminal("inspect", source, NO_COLOR="1"))


def test_architectures() -> None:
    result = CliRunner().invoke(main, ["architectures", "--filter", "openai-gpt", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["type"], row["proven"], row["placement"]) == ("openai-gpt", True, "post-norm")
    table = CliRunner().invoke(main, ["architectures", "--filter", "openai-gpt"]).stdout
    assert "1 of 1 proven" in table
    narrow = CliRunner(env={"COLUMNS": "60"}).invoke(main, ["architectures", "--filter", "openai-gpt"]).stdout
    assert narrow.splitlines()[0] == "type: openai-gpt"  # a block: its columns do not fit
    assert "  embedding as found: token x 1" in narrow


@pytest.mark.slow
def test_no_warning_of_a_dependency_is_shown(source: str, tmp_path: Path) -> None:
    """Every command, as a process in which Python shows every warning, says on stderr what it does and nothing else."""
    out, plain = str(tmp_path / "out"), str(tmp_path / "plain")
    model, log = ROOT / "examples/own_modelling_file/model.py", tmp_path / "log.csv"
    log.write_text("step,loss\n" + "".join(f"{i},{3 + i * 7 % 5 / 50}\n" for i in range(200)))
    calls = [
        ["convert", source, out],
        ["verify", out],
        ["fold", out, plain],
        ["inspect", out],
        ["audit", source],
        ["check", source, "--recipe", "embed-ln", "--tokens", "8", "--deep"],
        ["codemod", str(model), "--factory", "model:small"],
        ["recipes", "vanilla", "--for", "megatron", "--width", "64", "--layers", "2"],
        ["architectures", "--filter", "openai-gpt"],
        ["spikes", str(log)],
    ]
    assert {words[0] for words in calls} == {*main.commands} - {"train", "report"}
    for words in calls:
        done = run(*words)
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if not line.endswith(" ...")], (words, done.stderr)


@pytest.mark.slow
def test_no_warning_of_a_dependency_is_shown_in_training(source: str, tmp_path: Path) -> None:
    text, runs = tmp_path / "text.txt", str(tmp_path / "runs")
    text.write_text(Path(__file__).read_text(encoding="utf-8"))
    sizes = ["--steps", "3", "--lr", "1e-3", "--seq-len", "8", "--batch-tokens", "32", "--checkpoint-every", "2"]
    models = [source, f"patched={source}@embed-ln"]
    done = run("train", *models, "--data", str(text), "--out", runs, *sizes, "--watch-every", "1", "-q")
    assert (done.returncode, done.stderr) == (1, "")
    assert "cannot tell: 0 rows are judged, 32 are needed" in done.stdout
    again = run("report", runs, "-q")
    assert (again.returncode, again.stderr, again.stdout) == (0, "", done.stdout)


def test_a_reader_that_stops_reading_is_no_bug() -> None:
    """``spikepatch recipes | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_other_systems_are_refused() -> None:
    """Before anything of the system is asked for that it does not have: every command, and the Python names."""
    code = (
        "import sys; sys.modules['fcntl'] = None; import spikepatch; from spikepatch.cli import main\n"
        "try: spikepatch.convert\nexcept spikepatch.Refused as error: print(error)\n"
        "sys.argv = ['spikepatch', 'recipes']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    for text in (done.stdout, done.stderr):
        assert "runs on Linux and macOS only" in text
    assert "Traceback" not in done.stderr
