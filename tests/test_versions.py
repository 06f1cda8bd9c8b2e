"""The oldest supported versions, all the floors of pyproject.toml at once, in an environment of their own: tests pass
there, and folders go from there to here and back. See ``oldest_python`` about torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from tests import ROOT

pytestmark = pytest.mark.slow

#: Type, the class that loads it, options of ``convert``; in how many products a sum may have another order: none, or,
#: where newer versions attend by another kernel, three in each of 12 sub-layers and one in the head.
CASES: list[tuple[str, str, list[str], int]] = [
    ("gpt2", "AutoModelForCausalLM", [], 0),
    ("llama", "AutoModelForCausalLM", ["--recipe", "embed-ln"], 0),
    ("mixtral", "AutoModelForCausalLM", [], 0),
    ("t5", "AutoModelForSeq2SeqLM", [], 37),
]

#: Terms of the longest sum in the tiny models.
LONGEST_SUM = 96

#: What touches the libraries most; without the real model, the local hub, the installed command, dozens of processes.
TESTS = [
    "apply/values/test_draw.py",
    "test_cli.py",
    "apply/folder/test_convert.py",
    "apply/own_file/test_codemod.py",
    "preflight/test_check.py",
    "report/test_svg.py",
]
#: And of trainings, which are slow ones, these.
SLOW, TRAINED = ("test_loop.py", "test_callback.py"), "bare_loop or free_of_events"
LEFT_OUT = "smollm2 or drift or hub or no_warning or switched_on"

#: Run with a JSON list: for every type a folder, which becomes a source of it, and the words of a command.
CONVERT = """
import json, sys
from transformers import GenerationConfig
from spikepatch.cli import main
from tests.architectures import encoder_decoder, tiny_config
for name, folder, words in json.loads(sys.argv[1]):
    (encoder_decoder("t5").config if name == "t5" else tiny_config(name)).save_pretrained(folder)
    tokens = dict(decoder_start_token_id=0, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    GenerationConfig(**tokens).save_pretrained(folder)
    main(words, standalone_mode=False)
"""

#: Run with a script and a JSON list of its arguments.
EACH = """
import json, runpy, sys
_, script, every = sys.argv
for words in json.loads(every):
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
"""


def run(python: Path, *arguments: str, **environment: str) -> str:
    """Run ``python`` on these sources."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("patcher", "transforms"))
    # One thread: its tests run in parallel, beside other slow ones.
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [str(python), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_its_tests_pass(oldest_python: Path, floors: dict[str, str]) -> None:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {[*floors]}}}))"
    found = {name: Version(at).release[:3] for name, at in json.loads(run(oldest_python, "-c", code)).items()}
    other = {name for name, floor in floors.items() if found[name] != (*Version(floor).release, 0, 0)[:3]}
    options = ["-q", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
    # Not behind what loads folders: their code is made again then, and what was made before cannot be pickled.
    output = run(oldest_python, "-m", "pytest", *options, "tests/runtime")
    output += run(oldest_python, "-m", "pytest", *options, *(f"tests/{name}" for name in TESTS))
    run(
        oldest_python,
        "-m",
        "pytest",
        *options[:-1],
        TRAINED,
        "-m",
        "slow",
        *(f"tests/training/{name}" for name in SLOW),
    )

    assert other <= {"torch"}
    assert version("transformers") != floors["transformers"]
    assert sum(map(int, re.findall(r"(\d+) passed", output))) > 20 * (len(TESTS) + 1)


def test_folders_go_both_ways(oldest_python: Path, tmp_path: Path) -> None:
    pythons = {"old": oldest_python, "new": Path(sys.executable)}
    for writer, python in pythons.items():
        sources = {name: str(tmp_path / f"{writer}-source" / name) for name, *_ in CASES}
        commands = [
            (t, sources[t], ["convert", sources[t], str(tmp_path / writer / t), *options]) for t, _, options, _ in CASES
        ]
        run(python, "-c", CONVERT, json.dumps(commands))
    loads = [(writer, *case) for writer in pythons for case in CASES]
    for reader, python in pythons.items():
        words = [
            [str(tmp_path / writer / t), auto_class, "trust", str(tmp_path / f"{writer}-{t}-{reader}.pt")]
            for writer, t, auto_class, *_ in loads
        ]
        script, home = str(ROOT / "tests" / "load_logits.py"), str(tmp_path / f"home-{reader}")
        run(python, "-c", EACH, script, json.dumps(words), PYTHONPATH="", HF_HOME=home)
    for writer, model_type, _, _, reordered in loads:
        there, here = (torch.load(tmp_path / f"{writer}-{model_type}-{reader}.pt") for reader in pythons)
        assert there["problems"] == here["problems"] == {}
        assert there["class"] == here["class"]
        assert torch.equal(there["inputs"]["input_ids"], here["inputs"]["input_ids"])
        error = (there["logits"] - here["logits"]).abs().max()
        eps = torch.finfo(here["logits"].dtype).eps
        assert error <= reordered * math.sqrt(LONGEST_SUM) * eps * here["logits"].abs().max()
    for model_type, *_ in CASES:
        folders = [tmp_path / writer / model_type for writer in pythons]
        old, new = (load_file(folder / "model.safetensors") for folder in folders)
        records = [json.loads((folder / "spikepatch.json").read_text()) for folder in folders]
        own = {skip["target"] for record in records for skip in record["plan"]["skips"]}
        # The same plan and seed draw the same bits; the architecture's own initialiser may be another one.
        assert old.keys() == new.keys()
        assert {name for name, tensor in new.items() if not torch.equal(old[name], tensor)} <= own
        assert len(new.keys() - own) > 0
