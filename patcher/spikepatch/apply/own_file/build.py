"""What a user's factory builds, seen in a process of its own: the module objects, and which line built each of them.

A map names modules by their paths in the built model. Which expression of the file made the module at a path is not
guessed from names but seen: see ``call_sites.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.machinery
import inspect as python
import json
import linecache
import os
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from spikepatch.apply.own_file.call_sites import Span, Watch, watching
from spikepatch.errors import BadSource, Refused, SpikepatchError
from spikepatch.residual.map import ResidualMap
from spikepatch.source.typed import parsed


@dataclass(frozen=True)
class Built:
    """The built model, as data.

    Attributes:
        class_name: qualified name of its class.
        class_file: where that class is defined.
        init_line: first line of the ``__init__`` that the class itself defines in that file; 0: it defines none, and
            -1: it does, elsewhere.
        shapes: of every parameter and persistent buffer, tied ones once.
        moments: parameter -> (number of elements, mean, std about 0).
        embeddings: path of each ``nn.Embedding`` -> its class.
        calls: path of each ``nn.Embedding`` -> the calls whose value it was, from its constructor outwards.
        ties: name of a parameter -> the assignment that put it in place of another one.
        residual: its map.
    """

    class_name: str
    class_file: str
    init_line: int
    shapes: Mapping[str, tuple[int, ...]]
    moments: Mapping[str, tuple[int, float, float]]
    embeddings: Mapping[str, str]
    calls: Mapping[str, tuple[Span, ...]]
    ties: Mapping[str, Span]
    residual: ResidualMap


def build(file: Path, text: str, factory: str) -> Built:
    """Run the factory in a fresh process in which ``file`` holds ``text``, whatever is on disk.

    Args:
        file: absolute, without links.
        text: of the file.
        factory: ``module:function``.

    Raises:
        BadSource: the factory cannot be found, raises, or returns no model.
        Refused: the model cannot be mapped.
    """
    request = {"file": str(file), "text": text, "factory": factory}
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONNODEBUGRANGES"}
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "request"), Path(scratch, "reply")
        asked.write_text(json.dumps(request), encoding="utf-8")
        # Not the caller's folder first on the path: what we import ourselves is not to be found there.
        command = [sys.executable, "-P", "-m", __name__, str(asked), str(answered)]
        done = subprocess.run(command, env={**kept, "PYTHONPATH": paths}, capture_output=True, check=False)
        try:
            reply = json.loads(answered.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:  # it was not written, or not to its end
            raise BadSource(
                "the process that builds the model ended early",
                where=f"--factory {factory}",
                why=f"exit code {done.returncode}; {_last_line(done.stderr) or 'it printed nothing'}",
                remedy="check that the factory runs, in a process of its own and without arguments",
            ) from error
    if "bug" in reply:
        raise RuntimeError(reply["bug"])
    if "error" in reply:
        kind = {"BadSource": BadSource, "Refused": Refused}.get(reply.pop("error"), SpikepatchError)
        raise kind(reply.pop("what"), **reply)
    return parsed(Built, reply)


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def main(asked: str, answered: str) -> None:
    """The other process: read a request, build, write the reply."""
    request = json.loads(Path(asked).read_text(encoding="utf-8"))
    try:
        reply = dataclasses.asdict(_answer(**request))
    except SpikepatchError as error:
        reply = {"error": type(error).__name__, "what": error.what, "where": error.where}
        reply |= {"why": error.why, "remedy": error.remedy}
    except Exception:
        reply = {"bug": traceback.format_exc()}
    Path(answered).write_text(json.dumps(reply), encoding="utf-8")


def _answer(file: str, text: str, factory: str) -> Built:
    import torch

    torch.manual_seed(0)
    sys.meta_path.insert(0, _Edited(file, text))
    # As inspect.getsource sees the file; an entry without a time is never compared with the disk.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    sys.path[:0] = list(dict.fromkeys((_import_root(file), os.getcwd())))
    importlib.invalidate_caches()
    with watching() as watch:
        model, example = _call(factory, file)
    return observe(model, watch, example)


def observe(model: Any, watch: Watch, example: Mapping[str, Any] | None = None) -> Built:
    """What was built, under ``watch``; ``example``: keyword arguments of its forward, for a module that needs them."""
    import torch

    from spikepatch.residual.inspect import inspect
    from spikepatch.source.layout import tensor_shapes

    parameters = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise Refused(
            "the factory builds a model on the meta device",
            where=type(model).__name__,
            why="the edited file is checked by the values that its initialiser draws",
            remedy="build a small model on the CPU: what is written works for any width and depth",
        )
    if example is None and not _is_transformers(model):
        example = {_first_argument(model): torch.arange(5, 16).unsqueeze(0)}  # (batch, tokens)
    named = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    return Built(
        *_class_of(model),
        shapes=tensor_shapes(model),
        moments={name: _moments(parameter) for name, parameter in parameters.items()},
        embeddings={name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in named.items()},
        calls={name: tuple(watch.calls.get(id(m), ())) for name, m in named.items()},
        ties=dict(_ties(model, watch)),
        residual=inspect(model.eval(), example_inputs=example),
    )


def _call(factory: str, file: str) -> tuple[Any, Mapping[str, Any] | None]:
    """The model that the factory returns, and the keyword arguments for its forward if it returns an example."""
    import torch

    name, _, attribute = factory.partition(":")
    where = f"--factory {factory}"
    try:
        function: Any = importlib.import_module(name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:
        roots = " or ".join(dict.fromkeys((os.getcwd(), _import_root(file))))
        raise BadSource(
            "the factory cannot be imported",
            where=where,
            why=_reason(error),
            remedy=f"give module:function, where the module can be imported from {roots}",
        ) from error
    try:
        result = function()
    except (Exception, SystemExit) as error:
        raise BadSource(
            "the factory raised an error",
            where=where,
            why=_reason(error),
            remedy="it is called without arguments, and returns the model, or the model and its example inputs",
        ) from error
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if isinstance(example, torch.Tensor):
        example = {_first_argument(model): example}
    tensors = isinstance(example, Mapping) and all(isinstance(value, torch.Tensor) for value in example.values())
    if not isinstance(model, torch.nn.Module) or not (example is None or tensors):
        raise BadSource(
            "the factory returns no model",
            where=where,
            why=f"it returned {type(result).__name__}",
            remedy="return an nn.Module, or (model, ids), or (model, {argument of forward: tensor})",
        )
    return model, example


def _first_argument(model: Any) -> str:
    return next(iter(python.signature(model.forward).parameters), "") if hasattr(model, "forward") else ""


def _is_transformers(model: object) -> bool:
    transformers: Any = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _reason(error: BaseException) -> str:
    """The error, and the innermost line of code that is not part of Python or of an installed package."""
    installed = ("<frozen", sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), __file__)
    lines = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(installed)]
    place = f" at {lines[-1].filename}, line {lines[-1].lineno}" if lines else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" at {error.filename}, line {error.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _class_of(model: object) -> tuple[str, str, int]:
    cls = type(model)
    home = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    own = cls.__dict__.get("__init__")
    line = 0
    if own is not None:
        code = getattr(python.unwrap(own), "__code__", None)
        line = code.co_firstlineno if code is not None and _same(code.co_filename, home) else -1
    return cls.__qualname__, os.path.realpath(home) if home else "", line


def _moments(parameter: Any) -> tuple[int, float, float]:
    values = parameter.detach().double()
    return values.numel(), float(values.mean()), float(values.square().mean().sqrt())


def _ties(model: Any, watch: Watch) -> Iterator[tuple[str, Span]]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found = watch.replacements.get((id(module), name))
            if found is not None and found[0] is parameter:
                yield (f"{path}.{name}" if path else name), found[1]


def _import_root(file: str) -> str:
    """The folder from which the file is imported: the first one above it that is no package."""
    folder = Path(file).parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return str(folder)


@functools.cache
def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


class _Edited(importlib.machinery.PathFinder):
    """Finds modules as Python does; the one that lies at ``file`` gets ``text`` as its source."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text

    def find_spec(  # type: ignore[override]
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not _same(spec.origin, self.file):
            return None
        spec.loader = _TextLoader(fullname, self.file, self.text)
        spec.cached = None
        return spec


class _TextLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, text: str) -> None:
        super().__init__(fullname, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)

    def get_source(self, fullname: str) -> str:
        return self.text


if __name__ == "__main__":
    main(*sys.argv[1:])
