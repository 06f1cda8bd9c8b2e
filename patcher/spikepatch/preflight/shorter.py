"""``--layers L``: a model of full width cut to its first layers, and what their growth says of the whole.

A norm stands before each sub-layer, so that a fresh layer adds about the same to every stream, and its Jacobian goes
with 1/sigma (Eq. 14). Of sigma_i and g_i = ||dL/dx_i|| at the input of layer i,

    v_i = sigma_{i+1}^2 - sigma_i^2                         (1)
    a_i = (g_i^2 / g_{i+1}^2 - 1) sigma_i^2                 (2)

hardly change from layer to layer (after the first); where norms stand on the stream, v is about 0. The layers that are
left out get the median v and a of the measured ones but the first, over the period in which kinds of layers return.

``OFF`` is how far the gradient ratio and the last sigma were off; ``python -m tests.benchmarks.bench_layers`` measures.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from torch import nn

from spikepatch.errors import Refused
from spikepatch.preflight.assemble import growth
from spikepatch.preflight.result import LayerReport, ShortenedRun, StabilityReport
from spikepatch.preflight.subject import Subject
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.names import layers as blocks_of
from spikepatch.source.meta import skeleton

#: (model, layers of the whole, gradient ratio and last sigma from its first eight over those of the whole).
OFF: tuple[tuple[str, int, float, float], ...] = (
    ("GPT-2", 24, 0.92, 0.97),
    ("OPT", 24, 0.87, 0.95),
    ("Llama", 24, 0.59, 1.0),
)


def shortened(subject: Subject, residual: ResidualMap, keep: int, source: str) -> Subject:
    """The same structure with the first ``keep`` blocks of every stream; names, config and weights are the whole's.

    Raises:
        Refused: its blocks stand in no lists, or are used again.
    """
    structure = skeleton(subject.structure, keep_buffers=True)
    for stream in (residual, *residual.streams):
        blocks = blocks_of(structure, [p.parameter for p in stream.residual_projections])
        if not blocks or len(set(blocks.values())) * _most(stream) < stream.sublayers:
            raise _cannot(source, "its blocks stand in no list, or run several times")
        for path in sorted((p for p, layer in blocks.items() if layer >= keep), key=_index, reverse=True):
            holder, _, index = path.rpartition(".")
            entries = structure.get_submodule(holder)
            if not isinstance(entries, (nn.ModuleList, nn.Sequential)):
                raise _cannot(source, f"{holder} is no list of blocks")
            del entries[int(index)]
    return dataclasses.replace(subject, structure=structure)


def _most(stream: ResidualMap) -> int:
    """Sub-layers of the layer that has most."""
    held: dict[int | None, set[int]] = {}
    for p in stream.residual_projections:
        held.setdefault(p.layer, set()).add(p.sublayer)
    return max(map(len, held.values()))


def _index(path: str) -> int:
    return int(path.rpartition(".")[2])


def _cannot(source: str, why: str) -> Refused:
    return Refused(
        what="it cannot be cut to fewer layers",
        where=f"{source} with --layers",
        why=why,
        remedy="leave --layers out, or check a config with fewer layers",
    )


def extended(report: StabilityReport, whole: ResidualMap, source: str) -> StabilityReport:
    """What was measured on the first layers, with the sizes at the end and the gradient ratio of the whole model.

    Args:
        report: of the shortened model.
        whole: the map of the whole one, of the same stream.

    Raises:
        Refused: blocks are used again.
    """
    short, count = report.layers, whole.layers
    if len(short) >= count:
        return report
    if len(short) < 2 or report.sigma_end is None:
        raise _cannot(source, f"{len(short)} layers show no growth")
    sigmas = [layer.sigma_in for layer in short] + [report.sigma_end]
    squares = [(b**2 - a**2) for a, b in itertools.pairwise(sigmas)]
    factors = [
        ((a.gradient_norm / b.gradient_norm) ** 2 - 1) * a.sigma_in**2
        for a, b in itertools.pairwise(short)
        if b.gradient_norm
    ]
    period = _period(short)
    added, carried = _usual(squares, period), _usual(factors, period)
    ratio = short[0].gradient_norm / short[-1].gradient_norm if short[-1].gradient_norm else math.inf
    start, end = report.sigma_start, report.sigma_end
    last = sigmas[-2]
    for i in range(len(short), count):  # from the input of layer i - 1 to that of layer i
        ratio *= math.sqrt(max(1 + carried[(i - 1) % period] / last**2, 0.0))
        last = end
        end = math.sqrt(max(end**2 + added[i % period], 0.0))
    return dataclasses.replace(
        report,
        sublayers=whole.sublayers,
        shortened=ShortenedRun(len(short), count, report.gradient_ratio, report.sigma_end),
        gradient_ratio=ratio,
        relative_gradient_ratio=ratio * short[0].sigma_in / last,
        sigma_end=end,
        growth_activations=growth(start, end, count) if start is not None else None,
        growth_gradients=math.log(ratio) / count if 0 < ratio < math.inf else None,
        bound_product=None,
        jacobian_product=None,
        gradients={},
    )


def _period(layers: Sequence[LayerReport]) -> int:
    """After how many layers the kinds of their sub-layers return; all of them, if they do not."""
    kinds = [tuple(s.kind for s in layer.sublayers) for layer in layers]
    return next(p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False)))


def _usual(values: Sequence[float], period: int) -> list[float]:
    """For each place in a period the median of the measured ones, without the first layer where there are others."""
    later = [[v for i, v in enumerate(values) if i and i % period == place] for place in range(period)]
    return [statistics.median(own or values) if values else 0.0 for own in later]


def in_words(run: ShortenedRun) -> Iterator[str]:
    """What was run, and how far such numbers were off."""
    yield (
        f"the first {run.layers} of {run.of} layers were run: gradient ratio and the stream's end are extrapolated by"
        " their growth; the loss is that of the short model"
    )
    off = ", ".join(f"{name} {ratio - 1:+.0%} and {sigma - 1:+.0%}" for name, _, ratio, sigma in OFF)
    yield f"from 8 of 24 layers, the gradient ratio and the stream's end were off by: {off}"
