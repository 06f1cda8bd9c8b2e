"""Forty types of the sweep, in CI; the whole table is in docs/loads.md, and made by ``python -m tests.sweep``."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.sweep import TABLE, cases, switched_on, tried

TYPES = (
    "bamba bert bloom cohere deepseek_v3 falcon falcon_h1 gemma gemma2 gemma3_text glm4 gpt2 gpt_bigcode gpt_neox gptj"
    " granite jamba llama mamba mamba2 mistral mixtral mpt mt5 nemotron_h olmo2 olmoe opt phi3 qwen2 qwen3 qwen3_moe"
    " stablelm starcoder2 t5 umt5 zamba2"
).split()

#: Of the general heads, one of each kind.
HEADS = ("LlamaForSequenceClassification", "Qwen3ForTokenClassification", "MistralForQuestionAnswering")


@pytest.mark.slow
def test_forty_types(tmp_path: Path) -> None:
    first = {case.model_type: case for case in reversed(cases())}
    wanted = [*(first[model_type] for model_type in TYPES), *(c for c in cases() if c.model_class in HEADS)]
    assert len(wanted) == 40
    rows = []
    with switched_on() as process:
        for case in wanted:
            rows.append(tried(case, process, tmp_path))
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert [row for row in rows if not row.sound] == []
    assert sum(row.loads == "yes" for row in rows) == 40
    assert sum(row.folds == "yes" for row in rows) >= 25


def test_the_table_is_of_this_transformers() -> None:
    text = TABLE.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "| type |" not in line]
    assert f"transformers {version('transformers')}" in text
    assert len(lines) == len(cases())
    assert not [line for line in lines if "NO" in line.split("|")[5:]]
    assert sum("| yes |" in line for line in lines) > 200
