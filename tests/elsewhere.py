"""What a folder is to a process that cannot import spikepatch."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

#: Serves a request a line: words of a command, and files for its stdout and stderr. Each is run in a fork of this
#: process, which has imported the libraries that it needs for seconds; answered with its exit code.
SERVER = """
import json, os, runpy, sys, traceback, warnings
for absent in ("spikepatch", "spikepatch_transforms"):
    sys.modules[absent] = None
warnings.simplefilter("error")
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
for line in sys.stdin:
    words, *streams = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, name in enumerate(streams, 1):
                with open(name, "w") as file:
                    os.dup2(file.fileno(), number)
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> tuple[subprocess.Popen[str], Path]:
    """It, and the folder of its module cache, which is empty before each request."""
    home = Path(tempfile.mkdtemp(prefix="spikepatch-elsewhere-"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    atexit.register(process.communicate)  # its input ends, and it with it
    return process, home


def run_elsewhere(script: Path, *arguments: str) -> str:
    """What the script prints in a process of its own without spikepatch, with an empty module cache."""
    process, home = _server()
    assert process.stdin is not None
    assert process.stdout is not None
    shutil.rmtree(home / "modules", ignore_errors=True)
    printed, errors = home / "stdout", home / "stderr"
    process.stdin.write(json.dumps([[str(script), *arguments], str(printed), str(errors)]) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "0\n", errors.read_text()
    return printed.read_text()


def logits_elsewhere(
    folder: Path, *, trust: bool, auto_class: str = "AutoModelForCausalLM", dtype: str | None = None
) -> dict[str, Any]:
    """What ``load_logits.py`` finds."""
    file = folder.with_name(f"{folder.name}.logits.pt")
    script = Path(__file__).with_name("load_logits.py")
    words = [str(folder), auto_class, "trust" if trust else "plain", str(file), *([dtype] if dtype else [])]
    run_elsewhere(script, *words)
    found: dict[str, Any] = torch.load(file)
    file.unlink()
    return found
