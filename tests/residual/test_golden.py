"""The map of every type in short form, so that a change of behaviour shows as a diff of ``golden.json``.

The file is of one version of transformers, which it names: other versions have other types, and other code in them.
``python -m tests.residual.test_golden [TEXT ...]`` writes it anew, all of it or the keys that contain a TEXT.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers

import spikepatch
from spikepatch.errors import SpikepatchError
from spikepatch.residual.map import ResidualMap
from spikepatch.source.meta import build_meta
from tests.residual import configs
from tests.residual.configs import config_for, entries, model_class

FILE = Path(__file__).with_name("golden.json")

#: Proven at least: what has been reached, of 196, 38, 51 and 8.
PROVEN = {"causal": 185, "seq2seq": 37, "masked": 48, "tower": 8}

#: One of each structure, in the default suite; all the others are slow.
SAMPLE = frozenset(
    f"causal/{name}"
    for name in (
        "bart bert bloom cohere2_moe ctrl deepseek_v3 falcon falcon_h1 flex_olmo gemma3_text gemma4_text glm4 gpt2"
        " gpt_neox gpt_oss granite granitemoehybrid jamba lfm2 llama llama4_text mamba mamba2 minicpm3 minimax"
        " modernbert-decoder nemotron_h olmo2 openai-gpt opt phi qwen2_moe recurrent_gemma stablelm zamba2 zaya"
    ).split()
) | {"seq2seq/t5", "seq2seq/bart", "masked/albert", "masked/distilbert"}

#: What only we understand: names of graph nodes and of the tracer's symbols, code, exceptions.
JARGON = re.compile(r"\b(torch|u\d+|\w+_\d+|unhinted|NoneType|None|\w+Error|_\w+|dtype|guard|meta tensor)\b|[`{}=<>]")


def short_form(mapping: configs.Mapping, model_type: str) -> dict[str, Any]:
    """The map of one type, or the reason why there is none."""
    try:
        model = build_meta(model_class(model_type, mapping), config_for(model_type, mapping), where=model_type)
    except SpikepatchError as error:
        return {"unbuildable": error.why}
    except ValueError as error:  # the config refuses its own default values
        return {"unbuildable": " ".join(str(error).split())}
    try:
        residual = spikepatch.inspect(model)
    except SpikepatchError as error:
        return {"refused": f"{error.what}: {error.why}"}
    return {**_short(residual), **({"leaks": list(residual.leaks[:2])} if residual.leaks else {})}


def _short(residual: ResidualMap) -> dict[str, Any]:
    kind_of = {p.sublayer: p.kind for p in residual.residual_projections}
    found: dict[str, Any] = {
        "placement": residual.placement,
        "width": residual.width,
        "layers": residual.layers,
        "sublayers": residual.sublayers,
        "kinds": dict(sorted(Counter(kind_of.values()).items())),
        "embeddings": [[e.kind, e.scale, e.normed] for e in residual.embeddings],
        "head": ("tied" if residual.head.tied else "own") if residual.head else None,
        "proven": residual.proven,
    }
    factors = sorted({float(f"{abs(p.multiplier):.6g}") for p in residual.residual_projections} - {1.0})
    between = Counter(step.kind for p in residual.residual_projections for step in p.between)
    found |= {"between": dict(sorted(between.items()))} if between else {}
    found |= {"factors": factors} if factors else {}
    if residual.uses:
        found["uses"] = dict(sorted(Counter(f"{use.role} {use.stream}" for use in residual.uses).items()))
    if residual.streams:
        found["streams"] = [_short(stream) for stream in residual.streams]
    return found


def golden() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = _file()["maps"]
    return found


def _file() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FILE.read_text())
    return data


of_this_version = pytest.mark.skipif(
    _file()["transformers"] != transformers.__version__,
    reason=f"golden.json is of transformers {_file()['transformers']}",
)


def cases() -> list[Any]:
    keys = [f"{mapping}/{model_type}" for mapping, model_type in entries()]
    return [pytest.param(key, marks=() if key in SAMPLE else pytest.mark.slow) for key in keys]


@pytest.mark.slow
@of_this_version
@pytest.mark.parametrize("key", cases())
def test_golden(key: str) -> None:
    mapping = next(m for m in get_args(configs.Mapping) if key.startswith(f"{m}/"))
    assert short_form(mapping, key.removeprefix(f"{mapping}/")) == golden()[key]


@of_this_version
def test_golden_covers_every_entry() -> None:
    assert list(golden()) == [f"{mapping}/{model_type}" for mapping, model_type in entries()]


def test_sample() -> None:
    assert len(SAMPLE) == 40
    assert all(golden()[key]["proven"] for key in SAMPLE)


def test_as_many_are_proven_as_before() -> None:
    proven = Counter(key.partition("/")[0] for key, value in golden().items() if value.get("proven"))
    assert all(proven[mapping] >= reached for mapping, reached in PROVEN.items()), proven


def test_no_map_is_vacuous() -> None:
    for key, value in golden().items():
        if not value.get("proven"):
            continue
        assert sum(value["kinds"].values()) >= value["layers"] >= 1, key
        assert value["sublayers"] >= value["layers"], key
        assert value["embeddings"] or key == "tower/wav2vec2", key  # a wave has no table
        assert all(normed or scale > 0 for _, scale, normed in value["embeddings"]), key


def test_reasons_can_be_understood() -> None:
    reasons = {key: value["refused"] for key, value in golden().items() if "refused" in value}
    reasons |= {key: "; ".join(value["leaks"]) for key, value in golden().items() if value.get("leaks")}
    assert reasons
    for key, reason in reasons.items():
        ours = re.sub(r'"[^"]*"|[\w.]*\.[\w.]*', "", reason)  # without the model's own words, and its modules' names
        assert not JARGON.search(ours), f"{key}: {reason}"
        assert len(ours.split()) > 5, f"{key}: {reason}"


def write(wanted: list[str]) -> None:
    maps = golden()
    for mapping, model_type in entries():
        key = f"{mapping}/{model_type}"
        if key not in maps or not wanted or any(text in key for text in wanted):
            sys.stderr.write(f"{key}\n")
            maps[key] = short_form(mapping, model_type)
            _write({f"{m}/{t}": maps[f"{m}/{t}"] for m, t in entries() if f"{m}/{t}" in maps})


def _write(maps: Mapping[str, dict[str, Any]]) -> None:
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in maps.items())  # one line per type
    FILE.write_text(f'{{"transformers": "{transformers.__version__}", "maps": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    write(sys.argv[1:])
