"""Maps of real models as JSON, beside the golden file: for tests that plan, and build nothing.

    python -m tests.residual.maps      writes maps.json again, from models of the installed transformers

``test_maps.py`` compares them with what ``inspect`` says today.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikepatch.plans.plan import Plan, Recipe, Reinit
from spikepatch.plans.work_out import make_plan
from spikepatch.recipes.request import parse_request
from spikepatch.residual.map import ResidualMap

FILE = Path(__file__).with_name("maps.json")

#: Decoder-only language models of every structure that the first version supports.
TYPES = (
    "gpt2", "gpt_neox", "gptj", "falcon", "llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "opt", "bloom",
    "phi", "stablelm", "mamba", "mixtral", "granite",
)  # fmt: skip

#: Types whose embedding already meets the large-shortcut condition, so that scaled-embed refuses them.
SCALED_ALREADY = ("gemma2", "bloom")

Shapes = dict[str, tuple[int, ...]]


def mapped(model_type: str, **changes: Any) -> tuple[ResidualMap, Shapes]:
    """A tiny model's map and the shapes of its tensors: three layers, a width of 64, but for ``changes``."""
    return _read()[_key(model_type, changes)]


def plan_of(
    model_type: str,
    recipe: str | Recipe = "scaled-embed",
    *,
    reinit: Reinit = "all",
    std: float | None = None,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """``spikepatch.plan`` of a model whose map is known; ``std``: of its learned token embeddings."""
    residual, shapes = mapped(model_type, **changes or {})
    tables = [stream.token_embedding for stream in (residual, *residual.streams)]
    stds = {table.parameter: std for table in tables if table is not None and std is not None}
    asked = parse_request(recipe, reinit=reinit, **options)
    return make_plan(residual, shapes, asked.recipe, reinit=reinit, seed=asked.seed, embedding_stds=stds)


def _key(model_type: str, changes: dict[str, Any]) -> str:
    return " ".join([model_type, *(f"{name}={value}" for name, value in sorted(changes.items()))])


@functools.cache
def _read() -> dict[str, tuple[ResidualMap, Shapes]]:
    data = json.loads(FILE.read_text())["maps"]
    return {
        key: (ResidualMap.from_dict(entry["map"]), {name: tuple(shape) for name, shape in entry["shapes"].items()})
        for key, entry in data.items()
    }


_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("granite", {"embedding_multiplier": 12.0}),
    ("granite", {"residual_multiplier": 0.25}),
    ("granite", {"residual_multiplier": 1.5}),
    ("opt", {"word_embed_proj_dim": 32}),
    ("opt", {"do_layer_norm_before": False}),
    ("gpt2", {"hidden_size": 96, "n_embd": 96, "vocab_size": 640}),
    ("qwen2_moe", {"num_experts": 4}),
    ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}),
)
_SEQ2SEQ: tuple[tuple[str, dict[str, Any]], ...] = (
    ("t5", {}),
    ("t5", {"num_layers": 4}),
    ("bart", {}),
    ("whisper", {}),
)


def builders() -> dict[str, Callable[[], Any]]:
    """Key -> what builds the model; for those that may import torch."""
    from tests.architectures import encoder_decoder, tiny_model, tiny_whisper

    causal: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in TYPES), *_VARIANTS]
    found: dict[str, Callable[[], Any]] = {_key(n, c): functools.partial(tiny_model, n, **c) for n, c in causal}
    for name, changes in _SEQ2SEQ:
        build = tiny_whisper if name == "whisper" else functools.partial(encoder_decoder, name, **changes)
        found[_key(name, changes)] = build
    return found


def entry(model: Any) -> dict[str, Any]:
    """What is stored of a model."""
    import spikepatch
    from spikepatch.source.layout import tensor_shapes

    data: dict[str, Any] = json.loads(spikepatch.inspect(model).to_json())
    return {"map": data, "shapes": {name: list(shape) for name, shape in tensor_shapes(model).items()}}


def _write() -> None:
    import transformers

    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry(build()))}" for key, build in builders().items())
    FILE.write_text(f'{{"transformers": "{transformers.__version__}", "maps": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    _write()
