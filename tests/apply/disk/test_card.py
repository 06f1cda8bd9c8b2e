"""The model card obeys the hub's metadata rules, as far as they can be checked without the hub.

``ModelCard.validate`` asks the hub. What stays here is the server's own expression for the front matter, which
huggingface_hub carries, its parsers, the keys and types of ``ModelCardData``, and its rule for repository ids.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK, metadata_load
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

import spikepatch
from spikepatch.apply.disk.manifest import fold_card, inherited_metadata, model_card
from spikepatch.plans.plan import Plan
from tests.architectures import tiny_config, tiny_model

KEYS = set(inspect.signature(ModelCardData).parameters) - {"ignore_metadata_errors", "kwargs"}

#: A front matter and what of it an output takes over.
SOURCES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"license": "mit"}, {"license": "mit"}),
    ({"license": "apache-2.0", "base_model": "org/base"}, {"license": "apache-2.0", "base_model": "org/base"}),
    ({"base_model": ["org/a", "org/b"]}, {"base_model": ["org/a", "org/b"]}),
    ({"base_model": ["org/a"]}, {"base_model": "org/a"}),
    ({"base_model": ["org/a", "../b", 7]}, {"base_model": "org/a"}),
    (
        {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        {"license": "other", "license_name": "own", "license_link": "LICENSE"},
    ),
    (
        {"license": "mit", "language": ["en", "de"], "datasets": ["org/d"], "pipeline_tag": "text-generation"},
        {"license": "mit", "language": ["en", "de"], "pipeline_tag": "text-generation"},
    ),
    ({"language": "en"}, {"language": "en"}),
    ({"language": ["en", 7], "pipeline_tag": ["x"]}, {}),
    ({"model-index": [{"name": "m"}], "tags": ["a"], "widget": [{"text": "x"}]}, {}),
]


def checked(card: str) -> dict[str, Any]:
    """The metadata of a card that the hub takes."""
    match = REGEX_YAML_BLOCK.match(card)
    assert match is not None
    data = yaml.safe_load(match.group(2))
    assert ModelCard(card).data.to_dict() == data  # type: ignore[no-untyped-call]
    assert str(ModelCard(card)) == card
    assert data.keys() <= KEYS
    assert data["library_name"] == "transformers"
    assert all(isinstance(tag, str) and tag for tag in data["tags"])
    assert data["tags"][0] == "spikepatch"
    assert len(set(data["tags"])) == len(data["tags"])
    for key in ("license", "license_name", "license_link"):
        assert isinstance(data.get(key, ""), str)
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        validate_repo_id(base)
    return dict(data)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return spikepatch.plan(tiny_model("gpt2"), "scaled-embed", reinit="all")


@pytest.mark.parametrize(("front", "taken"), SOURCES)
def test_licence_and_base_model_are_inherited(
    front: dict[str, Any], taken: dict[str, Any], plan: Plan, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# A model\n")
    inherited = inherited_metadata(tmp_path / "README.md", None)
    converted = checked(model_card(plan, trust=True, auto_class="AutoModelForCausalLM", inherited=inherited))
    folded = checked(
        fold_card(["table"], trust=False, auto_class="AutoModelForCausalLM", title="a", inherited=inherited)
    )

    assert converted == taken | {"library_name": "transformers", "tags": ["spikepatch", "scaled-embed"]}
    assert folded == taken | {"library_name": "transformers", "tags": ["spikepatch"]}
    of_the_hub = inherited_metadata(tmp_path / "README.md", "org/source")
    assert of_the_hub == taken | {"base_model": "org/source"}
    fresh = inherited_metadata(tmp_path / "README.md", "org/source", weights=False)
    assert fresh == {key: value for key, value in taken.items() if key != "base_model"}
    assert "not to be merged" in model_card(plan, trust=True, auto_class="AutoModelForCausalLM")


#: Lines of printable text.
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]) | st.just("\n"), min_size=1)
LICENCE = dict.fromkeys(("license", "license_name", "license_link"), TEXT)


@given(recipe=TEXT, title=TEXT, inherited=st.fixed_dictionaries({}, optional=LICENCE))
def test_no_text_breaks_the_front_matter(plan: Plan, recipe: str, title: str, inherited: dict[str, str]) -> None:
    named = dataclasses.replace(plan, recipe=recipe)
    card = model_card(named, trust=False, auto_class="AutoModelForCausalLM", title=title, inherited=inherited)

    assert checked(card) == inherited | {
        "library_name": "transformers",
        "tags": list(dict.fromkeys(["spikepatch", recipe])),
    }


@pytest.mark.slow
def test_the_lines_of_the_card_load_and_ask_nothing(gpt2_tokenizer: Path, tmp_path: Path) -> None:
    """AutoTokenizer asks of a folder with code, and waits 15 s for an answer, where it is not told."""
    tiny_config("gpt2", vocab_size=50257).save_pretrained(tmp_path / "source")
    for file in gpt2_tokenizer.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    result = spikepatch.convert(str(tmp_path / "source"), tmp_path / "out")
    assert result.trust
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    assert "AutoTokenizer" in code
    code = code.replace("PATH", "out") + "print(type(model).__name__, tokenizer('a b').input_ids)"
    reader, writer = os.pipe()  # open, and nothing comes
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=reader, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    os.close(writer)
    assert done.stdout == f"SpikepatchGPT2LMHeadModel {[64, 275]}\n"
    assert "Do you wish" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"recipe": "embed-ln"}),
        ("gpt2", {"recipe": "vanilla"}),
        ("granite", {}),
        ("llama", {"storage": "host"}),
    ],
)
def test_every_route_writes_such_a_card(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_config(model_type).save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n")
    out = spikepatch.convert(str(source), tmp_path / "out", **options).out
    again = spikepatch.convert(str(out), tmp_path / "again", **options).out

    for folder in (out, again):
        data = checked((folder / "README.md").read_text())
        assert metadata_load(folder / "README.md") == data
        assert (data["license"], "base_model" in data) == ("mit", False)  # its weights are fresh
