"""What a conversion does to a model's behaviour: estimated for fresh weights, measured for learned ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spikepatch.apply.generated.patched_source import load_as_it_is, load_learned, load_unpatched
from spikepatch.apply.live.patch import patch
from spikepatch.errors import on_one_line
from spikepatch.plans.plan import Fill, NormEmbedding, Plan, ScaleEmbedding, Untie
from spikepatch.quiet import quiet
from spikepatch.residual.points import points_in, watching
from spikepatch.source.formats import fits_in_memory, size
from spikepatch.source.tokenizer import SAMPLE, source_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from spikepatch.residual.map import ResidualMap
    from spikepatch.source.open import Source

#: Embedding factors that a dry run compares, beside 1/std and the planned one.
FACTORS = (1.0, 1.5, 2.0, 4.0)


@dataclass(frozen=True)
class Behaviour:
    """What one model does on ``SAMPLE``, in float32.

    Attributes:
        model: ``source``, ``written``, or ``factor C`` for the source with its embedding multiplied by C.
        loss: of the next token, in nats per token.
        kl: KL(source || this model), in nats per token.
        stream: its size where the first sub-layer of each layer reads it, by ``residual/points.py``; empty where the
            layers do not show it.
    """

    model: str
    loss: float
    kl: float
    stream: tuple[float, ...]


def drift_written(source: Source, residual: ResidualMap, folder: Path, model_class: Any) -> tuple[Behaviour, ...] | str:
    """Compare ``source`` with the patched model in ``folder``, one model in memory at a time.

    Args:
        model_class: of the patched model. Given rather than looked up, so that no code in ``folder`` is run.

    Returns:
        The source's behaviour and the written model's; or why they are not measured.
    """
    return _compare(source, residual, lambda: [("written", load_learned(model_class, folder))])


def drift_planned(
    source: Source, residual: ResidualMap, plan: Plan, embedding_stds: Mapping[str, float]
) -> tuple[Behaviour, ...] | str:
    """The same before anything is written: over ``FACTORS``, 1/std and the planned one, where a factor is planned."""
    scaled = {edit.module: edit.factor for edit in plan.select(ScaleEmbedding)}
    others = tuple(edit for edit in plan.edits if not isinstance(edit, ScaleEmbedding))
    unchanged = plan.reinit == "none" and source.patched is None

    def models() -> Iterator[tuple[str, Any]]:
        model = load_unpatched(source)
        if others:
            patch(model, dataclasses.replace(plan, edits=others))
        factors = (
            {*FACTORS, *scaled.values(), *(1 / std for std in embedding_stds.values() if std)} if scaled else {1.0}
        )
        for factor in sorted(factors - ({1.0} if unchanged and not others else set())):
            hooks = [
                model.get_submodule(module).register_forward_hook(lambda m, a, rows, c=factor: rows * c)
                for module in scaled
            ]
            yield (f"factor {factor:.6g}" if scaled else "planned"), model
            for hook in hooks:
                hook.remove()

    return _compare(source, residual, models)


def _compare(
    source: Source, residual: ResidualMap, models: Callable[[], Iterable[tuple[str, Any]]]
) -> tuple[Behaviour, ...] | str:
    ids = _sample(source)
    if isinstance(ids, str):
        return ids
    source.fetch_weights()
    try:
        before, stream = _run(load_as_it_is(source), residual, ids)
    except Exception as error:  # whatever the source's own forward pass raises
        return f"{source.name} itself does not run ({on_one_line(error, 200)})"
    found = [Behaviour("source", _loss(before, ids), 0.0, stream)]
    for name, model in models():
        after, stream = _run(model, residual, ids)
        kl = (before.exp() * (before - after)).sum(-1)
        found.append(Behaviour(name, _loss(after, ids), float(kl.mean()), stream))
    return tuple(found)


def _sample(source: Source) -> torch.Tensor | str:
    """The ids of ``SAMPLE``, (1, tokens); or why nothing is measured."""
    assert source.checkpoint is not None
    if source.auto_class != "AutoModelForCausalLM":
        return f"{source.model_class.__name__} is no causal language model"
    needed = 4 * sum(math.prod(entry.shape) for entry in source.checkpoint.tensors.values())
    if not fits_in_memory(needed):
        return f"in float32 the model takes {size(needed)}, more than half of this machine's memory"
    assert source.folder is not None
    tokenizer = source_tokenizer(source)
    if isinstance(tokenizer, str):
        return f"{source.name} has no usable tokenizer: {tokenizer}"
    config = source.config.get_text_config()
    ids: torch.Tensor = tokenizer(SAMPLE, return_tensors="pt").input_ids
    ids = ids[:, : getattr(config, "max_position_embeddings", None)]
    if ids.shape[1] < 2 or int(ids.max()) >= config.vocab_size:
        return f"its tokenizer does not fit its vocabulary of {config.vocab_size}"
    return ids


def _run(model: Any, residual: ResidualMap, ids: torch.Tensor) -> tuple[torch.Tensor, tuple[float, ...]]:
    """Log-probabilities, (1, tokens, vocabulary), and the stream's size in each layer."""
    points = points_in(model, residual)
    found: dict[str, torch.Tensor] = {}
    with quiet(), torch.no_grad(), watching(model, points, found):
        logits: torch.Tensor = model(ids).logits
    first: dict[int, float] = {}
    for point in points.streams:
        if point.layer is not None and point.module in found:
            first.setdefault(point.layer, float(found[point.module]))
    stream = tuple(first[layer] for layer in sorted(first)) if len(first) == residual.layers else ()
    return logits.log_softmax(-1), stream


def _loss(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    return float(-log_probabilities[:, :-1].gather(-1, ids[:, 1:, None]).mean())


def expected_initial_loss(plan: Plan, residual: ResidualMap) -> float | None:
    """Initial loss of a tied head behind a large shortcut, estimated; None where it is about log V, or not known (some
    encoder-decoders divide the logits by sqrt(d)).

    The head's rows are the embedding E ~ N(0, s^2), and the last norm divides the stream by its std, so the current
    token's own logit is about c d s^2 / sigma_N, with sigma_N^2 about c^2 s^2 plus what the sub-layers add: 0.11,
    measured on GPT-2 classes of 12 and 24 layers. (c = 1/s behind a LayerNorm.) It is also the loss, as long as it is
    well above log V, since the next token is another one: 17.9 for GPT-2 at d = 1024, where 17.7 was measured.
    """
    tied = residual.head is not None and residual.head.tied and not plan.select(Untie)
    token = residual.token_embedding
    if not tied or token is None or residual.streams:
        return None
    std: float | None = next((fill.std for fill in plan.select(Fill) if fill.parameter == token.parameter), None)
    edit = next((e for e in plan.select(ScaleEmbedding | NormEmbedding) if e.module == token.module), None)
    if std is None or edit is None:
        return None
    factor: float = edit.factor * token.scale if isinstance(edit, ScaleEmbedding) else 1 / std
    return factor * residual.width * std**2 / math.sqrt((factor * std) ** 2 + 0.11)
