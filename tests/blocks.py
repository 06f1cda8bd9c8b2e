"""The blocks of a page, and a process that runs their commands without importing torch for each.

Everything in a page's fences is tried. In order and in one empty folder of the page's own, each ``bash`` block is run
by ``bash -eu`` and each ``python`` block by Python. A comment on the line before the fence says what else a block is:

    <!-- file: NAME -->                 what stands in NAME from here on; it is not run
    <!-- exits with N -->               run, and ends with this code
    <!-- not run: REASON -->            as it says; its lines of ``spikepatch`` are parsed all the same
    <!-- prints -->                     the whole of what the last block that was run wrote to stdout
    <!-- prints, among others -->       each of its lines is in it, but for white space and the frames of tables
    <!-- prints, at the end -->         it ends like this
    <!-- setup ... -->                  bash that the reader does not see: what stands for files of his own; $REPOSITORY

Other fences (``text``, ``toml``, ``diff``) are not run and need no mark. What is different on each machine (a duration,
a temporary folder) is not shown.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

_COMMENT = r"<!-- (?!setup\n)((?:(?!-->).)*?) ?-->"
_PIECE = re.compile(rf"(?:^{_COMMENT}\n)?^```(\w*)\n(.*?)^```$|^<!-- setup\n(.*?)-->$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fence and its mark. ``language`` is ``setup`` for what the reader does not see."""

    language: str
    text: str
    mark: str = ""

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python", "setup") and not self.mark.startswith(("not run: ", "file: "))


def blocks(page: str) -> list[Block]:
    return [
        Block("setup", setup) if setup else Block(language, text, mark or "")
        for mark, language, text, setup in _PIECE.findall(page)
    ]


def prose(page: str) -> str:
    """Without fences, tables and comments: what is counted and read as text."""
    page = re.sub(r"^```.*?^```$|<!--.*?-->", "", page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^\|.*$|<[^>]+>", "", page, flags=re.MULTILINE)


def squeezed(line: str) -> str:
    return " ".join(re.sub(r"[│┃]", " ", line).split())


def compare(block: Block, printed: str) -> None:
    if block.mark == "prints":
        assert printed == block.text, printed
    elif block.mark == "prints, at the end":
        assert printed.endswith(block.text), printed
    elif block.mark == "prints, among others":
        lines = {squeezed(line) for line in printed.splitlines()}
        assert [line for line in block.text.splitlines() if squeezed(line) not in lines] == [], printed


def run(page: str, folder: Path, environment: dict[str, str]) -> int:
    """Every block of it, in ``folder``; the number of those that ran."""
    printed, ran = "", 0
    for number, block in enumerate(blocks(page)):
        if block.mark.startswith("file: "):
            file = folder / block.mark.removeprefix("file: ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.mark.startswith("prints"):
            compare(block, printed)
        elif block.runs:
            words = ["bash", "-euc", block.text]
            if block.language == "python":
                (folder / f".block{number}.py").write_text(block.text, encoding="utf-8")
                words = ["python", f".block{number}.py"]
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            wanted = int(found[1]) if (found := re.fullmatch(r"exits with (\d+)", block.mark)) else 0
            assert done.returncode == wanted, f"{block.text}\n{done.stdout}\n{done.stderr}"
            printed, ran = done.stdout, ran + 1
    return ran


# What stands in place of `spikepatch` and `python` on the PATH of a block: it asks the prepared process, and hands it
# its streams. It is Python without `site`, which starts in milliseconds.
_STUB = """#!{python} -SE
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
message = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [len(message).to_bytes(8, "big")], [0, 1, 2])
link.sendall(message)
code = link.recv(1)
sys.exit(code[0] if code else 70)
"""


@contextmanager
def prepared() -> Iterator[dict[str, str]]:
    """An environment whose ``spikepatch``, ``python`` and ``torchrun`` are forks of one process that has imported
    torch, transformers and spikepatch.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        with subprocess.Popen(
            [sys.executable, "-m", "tests.blocks", address], cwd=ROOT, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            for name in ("spikepatch", "python", "torchrun"):
                stub = Path(folder, "bin", name)
                stub.parent.mkdir(exist_ok=True)
                stub.write_text(_STUB.format(python=sys.executable, address=address, name=name))
                stub.chmod(0o755)
            path = os.pathsep.join([f"{folder}/bin", str(Path(sys.executable).parent), os.environ["PATH"]])
            own = {
                "SPIKEPATCH_LOAD_TEST": "0",
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "REPOSITORY": str(ROOT),
            }
            try:
                yield {**os.environ, **own, "PATH": path, "PYTHON_EXEC": f"{folder}/bin/python"}  # that is torchrun's
            finally:
                process.terminate()


def _execute(name: str, words: Sequence[str]) -> None:
    """As the program, or Python with a file, ``-m``, ``-c`` or ``-``."""
    sys.path[0] = ""
    sys.executable = os.environ["PYTHON_EXEC"]  # what it starts is a fork as well
    module = {"spikepatch": "spikepatch", "torchrun": "torch.distributed.run"}.get(name)
    first, *rest = ["-m", module, *words] if module else [word for word in words if word not in ("-u", "-P")]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<block>", "exec"), {"__name__": "__main__"})
    elif first == "-":
        exec(compile(sys.stdin.read(), "<block>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def _child(link: socket.socket) -> int:
    """Serves one call: becomes that process."""
    size, streams, _, _ = socket.recv_fds(link, 8, 3)
    message = b""
    while len(message) < int.from_bytes(size, "big"):
        message += link.recv(1 << 16)
    name, words, folder, environment = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", 1)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        _execute(name, words)
        code: object = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def _serve(address: str) -> None:
    import torch
    import transformers

    import spikepatch.cli

    assert spikepatch.cli.main.commands
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "Trainer"):
        getattr(transformers, name)  # a lazy module imports them by this
    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)  # noqa: T201
        while True:
            link, _ = server.accept()
            if os.fork() == 0:  # the caller's process, which waits for its own child and says how it ended
                child = os.fork()
                if child == 0:
                    os._exit(_child(link))
                link.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255]))
                os._exit(0)
            link.close()


if __name__ == "__main__":
    _serve(sys.argv[1])
