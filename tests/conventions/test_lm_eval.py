"""lm-eval scores a converted and a folded SmolLM2: a local task, no download, and no spikepatch in its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikepatch

pytest.importorskip("lm_eval", reason="needs the extra 'conventions'")

TASKS = Path(__file__).with_name("tasks")
#: Run with a JSON list of commands' words.
EVALUATE = """
import json, sys
for absent in ("spikepatch", "spikepatch_transforms"):
    sys.modules[absent] = None
from lm_eval.__main__ import cli_evaluate
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    cli_evaluate()
"""


def evaluated(home: Path, *models: tuple[Path, list[str]]) -> list[tuple[float, list[list[float]]]]:
    """Of each folder, with options of its own: accuracy, and the log-likelihood of each choice of each question."""
    same = ["--tasks", "spikepatch_capitals", "--include_path", str(TASKS), "--device", "cpu", "--batch_size", "1"]
    commands = [
        ["run", "--model", "hf", "--model_args", f"pretrained={folder}", *same, "--log_samples",
         "--output_path", str(home / f"{folder.name}-scores"), *options]
        for folder, options in models
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, json.dumps(commands)],
        cwd=TASKS,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [scores_in(home / f"{folder.name}-scores") for folder, _ in models]


def scores_in(out: Path) -> tuple[float, list[list[float]]]:
    (results,), (samples,) = out.rglob("results_*.json"), out.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    scores = [[float(score) for ((score, _),) in row["resps"]] for row in rows]
    return json.loads(results.read_text())["results"]["spikepatch_capitals"]["acc,none"], scores


def test_a_converted_and_a_folded_smollm2(smollm2: Path, tmp_path: Path) -> None:
    converted = spikepatch.convert(str(smollm2), tmp_path / "converted", reinit="none", factor=2.0).out
    folded = spikepatch.fold(str(converted), tmp_path / "folded").out
    of_folded, (accuracy, scores) = evaluated(tmp_path, (folded, []), (converted, ["--trust_remote_code"]))
    questions = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()]
    model: Any = AutoModelForCausalLM.from_pretrained(folded)
    tokenizer: Any = AutoTokenizer.from_pretrained(folded)

    assert of_folded == (accuracy, scores)
    assert accuracy > 1 / 3  # chance
    eps = torch.finfo(model.dtype).eps
    assert len(scores) == len(questions) > 0
    for question, found in zip(questions, scores, strict=True):
        context = f"The capital of {question['country']} is"
        start = len(tokenizer(context).input_ids)
        for city, score in zip(question["cities"], found, strict=True):
            ids = tokenizer(f"{context} {city}", return_tensors="pt").input_ids
            with torch.no_grad():
                terms = model(ids[:, :-1]).logits[0].float().log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
            # It takes the logarithms, and their sum, in the model's dtype; one of the terms is a difference of the
            # logit and log-sum-exp, of which each is at most some 40.
            assert score == pytest.approx(float(terms.sum()), abs=eps * (len(terms) + 1) * (40 + float(-terms.sum())))
