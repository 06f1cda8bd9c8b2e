"""What imports what, and what stays unimported, tried in fresh interpreters; no architecture is named in the engine."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING

from tests import ROOT
from tests.test_package import ENGINE, MODULES, TRANSFORMS

#: Run with modules' names; every one is imported in a fork of a process that has imported all that they need of others,
#: and nothing of ours. Prints what failed, as JSON.
IMPORT_EACH = """
import json, os, sys, traceback

def others():
    # Names of all modules but ours that are loaded once every one of ours is.
    for name in sys.argv[1:]:
        try:
            __import__(name)
        except BaseException:
            pass
    return [name for name in sys.modules if not name.startswith(("spikepatch", "__"))]

read, write = os.pipe()
if not os.fork():
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        pipe.write(json.dumps(others()))
    os._exit(0)
os.close(write)
with os.fdopen(read) as pipe:
    for name in json.load(pipe):
        try:
            __import__(name)
        except Exception:
            pass
os.wait()

failed = {}
for name in sys.argv[1:]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            __import__(name)
            report = ""
        except BaseException:
            report = traceback.format_exc()
        os.write(write, report.encode()[-4000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        report = pipe.read().decode()
    if report or os.waitpid(child, 0)[1]:
        failed[name] = report
print(json.dumps(failed))
"""


def python(code: str, *arguments: str) -> str:
    """Output of ``code`` in a fresh interpreter."""
    paths = f"import sys; sys.path[:0] = {[str(ENGINE.parent), str(TRANSFORMS.parent)]!r}\n"
    command = [sys.executable, "-W", "ignore", "-c", paths + code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.slow
def test_every_module_imports_first() -> None:
    """No cycle of imports depends on who comes first."""
    names = [name for name in MODULES if not name.endswith("__main__") and name != "spikepatch.runtime.template"]
    assert len(names) > 30
    assert json.loads(python(IMPORT_EACH, *names)) == {}


def test_import_is_light() -> None:
    """Of the package, of a source's module, and of what help and lists need."""
    heavy = {"torch", "transformers", "numpy", "libcst", "accelerate", "huggingface_hub", "safetensors", "rich"}
    code = """
import sys, spikepatch, spikepatch.cli, spikepatch.source.open
from click.testing import CliRunner
spikepatch.__version__, dir(spikepatch)
for words in (["--help"], ["convert", "--help"], ["inspect", "--help"], ["recipes"], ["--version"]):
    assert CliRunner().invoke(spikepatch.cli.main, words).exit_code == 0, words
print(*sys.modules)
"""
    loaded = set(python(code).split())
    assert "spikepatch" in loaded
    assert sorted(loaded & heavy) == []


def test_public_names_resolve() -> None:
    import spikepatch

    assert len(spikepatch.__all__) >= 12
    for name in spikepatch.__all__:
        assert getattr(spikepatch, name).__module__ == spikepatch._HOME[name], name
    assert set(spikepatch.__all__) <= set(dir(spikepatch))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spikepatch.nothing


def test_no_architecture_is_named() -> None:
    """No model type of transformers is a string in the code; in docstrings they may be, as examples."""
    types, checked = set(CONFIG_MAPPING.keys()), 0
    assert {"gpt2", "llama"} < types
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        checked += len(strings)
        if module == "spikepatch.apply.folder.hosts":  # the table of them, and nothing else
            assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.If, ast.IfExp))]
            continue
        words = {"blip"} if module.startswith("spikepatch.spikes.") else set()  # one row of a curve, not the model
        assert not types.intersection(strings) - words, module
    assert checked > 1000
