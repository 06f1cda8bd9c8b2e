"""What ``check`` returns: frozen data with stable JSON keys."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from spikepatch.auditing.fault import Audit
from spikepatch.source.typed import finite

Stability = Literal["stable", "learned", "at-risk", "unstable", "unknown"]
Severity = Literal["note", "at-risk", "unstable"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: stable, for scripts.
        severity: a ``note`` does not change the verdict.
        what: one sentence.
        measured, limit: the number, and what it is compared with; None where it is no comparison.
        equation: of the paper, where it comes from one.
        remedy: what to do.
    """

    name: str
    severity: Severity
    what: str
    measured: float | None = None
    limit: float | None = None
    equation: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.what}"


@dataclass(frozen=True)
class EmbeddingReport:
    """``std``: of the table. ``small_init``: the paper's sqrt(2/(5d)). ``scale``: what its rows are multiplied by on
    their way; 1 and ``normed`` behind a norm.
    """

    parameter: str
    kind: str
    std: float
    small_init: float
    scale: float
    normed: bool


@dataclass(frozen=True)
class EntranceReport:
    """Where features of images or sounds enter the stream at its start: its size at their positions and at all others.
    None: there are none, or the model writes over its tokens, so that they cannot be told apart.
    """

    inputs: tuple[str, ...]
    sigma: float | None
    others: float | None


@dataclass(frozen=True)
class WeightReport:
    """A matrix of a sub-layer: its std over the paper's sqrt(2/(5d)), and ||W|| over that of a Gaussian (None: 3-D)."""

    parameter: str
    residual: bool
    std: float
    over_small_init: float
    gaussianity: float | None


@dataclass(frozen=True)
class SublayerReport:
    """sigma: per-token std (RMS where an RMSNorm reads it), mean and least over tokens; ``ratio`` branch over input.

    ``bound``: Eq. 15 or Eq. 20 with the least sigma; ``bound_norms``: the same with measured ||W_1||, ||W_2|| and the
    activation's steepest slope. ``not_covered`` says why there is none. ``jacobian``: measured, shortcut included.
    """

    kind: str
    sigma_in: float
    sigma_in_least: float
    sigma_branch: float
    ratio: float
    bound: float | None
    bound_norms: float | None
    not_covered: str
    jacobian: float | None
    gradient_norm: float
    weights: tuple[WeightReport, ...]


@dataclass(frozen=True)
class LayerReport:
    """``sigma_in`` and ``gradient_norm`` at the layer's input, ``sigma_branch`` of its largest sub-layer; ``jacobian``:
    the product over its sub-layers. None: not covered (a bound), not measured (a Jacobian)."""

    layer: int
    sigma_in: float
    sigma_branch: float
    bound_attention: float | None
    bound_mlp: float | None
    jacobian: float | None
    gradient_norm: float
    sublayers: tuple[SublayerReport, ...]


@dataclass(frozen=True)
class TrialStep:
    """One optimiser step: values before it."""

    step: int
    loss: float
    gradient_norm: float
    sigma_first: float
    sigma_last: float
    attention_logit: float | None


@dataclass(frozen=True)
class ShortenedRun:
    """The first ``layers`` ``of`` all were run: what was measured on them."""

    layers: int
    of: int
    gradient_ratio: float | None
    sigma_end: float | None


@dataclass(frozen=True)
class StabilityReport:
    """The verdict on one model, and what it rests on. It predicts, it does not promise: a run without spikes depends on
    data, optimiser and precision as well.

    Attributes:
        source: as the user named it.
        recipe: None for the model as it is.
        architecture: class of the model.
        weights: where they come from, in words.
        placement, width, sublayers: of the map; S counts the sub-layers.
        device, tokens, batch, seed: of the measurement.
        verdict: ``stable``, ``at-risk``, ``unstable``; ``learned``: the weights have been trained, and nothing is wrong
            with them; ``unknown`` where the measurements failed, or the recipe was refused.
        refused: why the recipe does not apply; then nothing else is filled in.
        audit: of the weights as they are; None for a recipe and for a further stream.
        findings: what it rests on.
        embeddings, layers: what was measured at each table, and at each sub-layer of each layer.
        entrances: the stream's size at each kind of position, where images or sounds enter it.
        sigma_start, sigma_end: of the stream entering the first sub-layer and after the last.
        initial_loss, log_vocab: next-token loss on random or given tokens; None where the output holds no logits.
        gradient_ratio: ||dL/dx|| at the first layer's input over that at the last layer's.
        relative_gradient_ratio: the same of ||dL/dx|| sigma_x, the gradient of changes relative to the stream's size.
        growth_activations, growth_gradients: (1/N) log of last over first, and of first over last; 0 is ideal (OLMo 2).
        eq15_excess_layer1: excess of Eq. 15 at layer 1; sigma_x' = sigma of the token embedding's output after its
            factor or norm, before positions.
        eq15_excess_layer1_stream: the same with sigma_x' of the stream that enters layer 1.
        bound_product: Eq. 7; None where a factor is not covered.
        jacobian_product: of the measured Jacobians.
        gradients: parameter group -> norm of its gradient.
        steps: of ``--steps``.
        shortened: only the first layers were run; sizes at the end and the gradient ratio are extrapolated from these.
        not_measured: what could not be, and why.
        stream: ``output`` (the one that feeds the output) or ``encoder``.
        streams: of an encoder-decoder the encoder's own report. It is measured with the same loss, its gradients come
            through the decoder; its findings count in the verdict above it.
        models: the same model with each of the recipes compared.
    """

    source: str
    recipe: str | None
    architecture: str
    weights: str
    placement: str
    width: int
    sublayers: int
    device: str
    tokens: int
    batch: int
    seed: int
    verdict: Stability = "unknown"
    refused: str = ""
    audit: Audit | None = None
    findings: tuple[Finding, ...] = ()
    embeddings: tuple[EmbeddingReport, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    entrances: tuple[EntranceReport, ...] = ()
    sigma_start: float | None = None
    sigma_end: float | None = None
    initial_loss: float | None = None
    log_vocab: float | None = None
    gradient_ratio: float | None = None
    relative_gradient_ratio: float | None = None
    growth_activations: float | None = None
    growth_gradients: float | None = None
    eq15_excess_layer1: float | None = None
    eq15_excess_layer1_stream: float | None = None
    bound_product: float | None = None
    jacobian_product: float | None = None
    gradients: dict[str, float] = field(default_factory=dict)
    steps: tuple[TrialStep, ...] = ()
    shortened: ShortenedRun | None = None
    not_measured: tuple[str, ...] = ()
    stream: Literal["output", "encoder"] = "output"
    streams: tuple[StabilityReport, ...] = ()
    models: tuple[StabilityReport, ...] = ()

    @property
    def name(self) -> str:
        """The recipe, or ``as it is``; then the stream, where it is not the one that feeds the output."""
        return (self.recipe or "as it is") + (f", {self.stream}" if self.stream != "output" else "")

    @property
    def every(self) -> tuple[StabilityReport, ...]:
        """This one, those of its further streams, then the same of each compared recipe."""
        return (self, *self.streams, *(part for model in self.models for part in model.every))

    def to_dict(self) -> dict[str, Any]:
        """JSON without the numbers that JSON does not have: those become None, and are findings."""
        data: dict[str, Any] = finite(dataclasses.asdict(self))
        return data

    def to_json(self) -> str:
        """``to_dict`` as text, as ``spikepatch check --json`` prints it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)
