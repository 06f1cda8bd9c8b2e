"""A residual map in words and rows, equal parts of all layers together. Names are there to be copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from spikepatch.residual.map import pattern

if TYPE_CHECKING:
    from spikepatch.residual.map import Matrix, Norm, ResidualMap, ResidualProjection


#: Rows of a table without headers.
Untitled = list[tuple[str, ...]]


def described(residual: ResidualMap) -> Iterator[str | Untitled]:
    """What the stream is, whether that is proven, and a table of its parts; then the same of every stream it reads."""
    yield f"{residual.architecture} ({residual.model_type or 'a plain module'}): {_summary(residual)}"
    tied = [("tied", name, "", f"is {first}") for first, *others in residual.tied for name in others]
    yield from _proof(residual)
    yield [*_rows(residual), *tied, *_unread(residual)]
    for stream in residual.streams:
        yield ""
        yield f"the stream that cross-attention reads: {_summary(stream)}"
        yield from _proof(stream)
        yield [*_rows(stream)]


def _unread(residual: ResidualMap) -> Iterator[tuple[str, str, str, str]]:
    """Modules whose parameters the traced pass did not read, equal ones of all layers together."""
    modules: dict[str, set[int]] = {}
    for name in dict.fromkeys(name.rpartition(".")[0] or name for name in residual.unread):
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        modules.setdefault(pattern(name), set()).update(numbers if len(numbers) == 1 else ())
    for module, layers in modules.items():
        yield "never read", module, _ranges(sorted(layers)), "by the inputs of the traced pass"


def _summary(residual: ResidualMap) -> str:
    return (
        f"{residual.placement}, width d = {residual.width}, N = {residual.layers} layers,"
        f" S = {residual.sublayers} sub-layers"
    )


def _proof(residual: ResidualMap) -> Iterator[str]:
    count = len(residual.residual_projections)
    if residual.proven:
        yield f"proven: with all {count} residual projections cut, the output depends only on the embedding path, on"
        yield "norms and gains on the stream, and on the head; any one given back brings its own sub-layer alive"
        if residual.conditions:
            yield "for inputs like the traced ones only:"
            yield from (f"  {condition}" for condition in residual.conditions)
    else:
        yield f"NOT proven: with all {count} residual projections cut,"
        yield from (f"  {leak}" for leak in residual.leaks)


def _rows(residual: ResidualMap) -> Iterator[tuple[str, str, str, str]]:
    """(part, name with * for numbers, layers, details)."""
    for e in residual.embeddings:
        factor = "normed" if e.normed else f"times {e.scale:g}"
        width = f", {e.width} wide" if e.width != residual.width else ""
        yield "embedding", e.parameter, "", f"{e.kind}, {factor}{width}"
    for entrance in residual.entrances:
        where = f"after {entrance.after}" if entrance.after else "at the start"
        normed = ", normed" if entrance.normed else ""
        name = entrance.parameter or "no single matrix"
        fresh = f", {entrance.size:.3g} large with fresh weights" if entrance.size is not None else ""
        yield "entrance", name, "", f"features of {', '.join(entrance.inputs)}, {where}{normed}{fresh}"
    layer_of = {p.sublayer: p.layer for p in residual.residual_projections}
    projections = {p.parameter: p for p in residual.residual_projections}
    found: dict[tuple[str, str, str], list[int | None]] = {}
    for m in residual.matrices:
        if m.parameter not in projections:
            detail = f"{m.kind}, {_fan(m)}{', reads the stream' if m.reads_stream else ''}"
            found.setdefault(("matrix", pattern(m.parameter), detail), []).append(layer_of.get(m.sublayer))
    matrices = {m.parameter: m for m in residual.matrices}
    for p in residual.residual_projections:
        row = ("residual projection", pattern(p.parameter), _projection(p, matrices.get(p.parameter)))
        found.setdefault(row, []).append(p.layer)
    for n in residual.norms:
        found.setdefault((f"{n.role} norm", pattern(n.module), _norm(n)), []).append(n.layer)
    for (part, name, detail), layers in found.items():
        yield part, name, _ranges(sorted({layer for layer in layers if layer is not None})), detail
    if residual.head is not None:
        yield "head", residual.head.parameter, "", "tied" if residual.head.tied else "its own matrix"


def _fan(matrix: Matrix) -> str:
    order = ", (in, out)" if matrix.in_axis < matrix.out_axis else ""
    return f"{matrix.fan_in} -> {matrix.fan_out}{order}"


def _projection(projection: ResidualProjection, matrix: Matrix | None) -> str:
    then = []
    for step in projection.between:
        if step.kind == "multiplier":
            then.append(f"times {projection.multiplier:g}")
        elif step.kind == "norm":
            then.append(f"the norm {_short(projection.branch_norm or '')}")
        else:
            then.append(f"{step.kind} {_short(step.parameter or '')}".rstrip())
    detail = [projection.kind, *([_fan(matrix)] if matrix is not None else [])]
    return ", ".join(detail) + (f", then {', '.join(then)}" if then else "")


def _norm(norm: Norm) -> str:
    gain = "no gain" if norm.gain == "none" else f"gain {norm.gain}"
    return f"{norm.kind}, eps {norm.eps:.6g}, {gain}{', bias' if norm.bias is not None else ''}"


def _short(name: str) -> str:
    """The name inside its layer: what follows the first number."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)


def _ranges(layers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``layers 0-2, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "layers " + ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) if runs else ""
