"""What a command does once: a source is opened, a structure proven, a patched one built, a checkpoint matched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from spikepatch.apply.generated.structure import restructure
from spikepatch.cli import main
from spikepatch.residual.inspect import followed
from spikepatch.source.match import match_source
from spikepatch.source.open import open_source
from tests.architectures import tiny_config
from tests.counting import counted
from tests.training.models import SMALL, config_folder, text

RECIPES = ("--recipe", "scaled-embed", "--recipe", "embed-ln")


@pytest.mark.parametrize(
    ("words", "proofs", "structures", "matches"),
    [
        (("convert", "{learned}", "{out}", "--reinit", "none"), 1, 1, 1),
        (("check", "{fresh}", "--tokens", "16", *RECIPES), 3, 2, 0),
        (("check", "{learned}", "--tokens", "16", "--reinit", "residual", *RECIPES[:2]), 2, 1, 1),
        (("audit", "{learned}", "--expect", "scaled-embed"), 1, 0, 1),
    ],
)
def test_once(
    words: tuple[str, ...], proofs: int, structures: int, matches: int, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A model, and what each recipe makes of it, is a structure of its own."""
    config = tiny_config("llama")
    config.save_pretrained(tmp_path / "fresh")
    small = {n: v for n, v in config.to_diff_dict().items() if n not in ("architectures", "model_type")}
    places = {"fresh": tmp_path / "fresh", "out": tmp_path / "out", "learned": save_tiny("llama", **small)}
    with counted(open_source, followed, restructure, match_source) as counts:
        done = CliRunner().invoke(main, [word.format(**places) for word in words])
    assert done.exit_code == 0, done.output
    assert counts == {"open_source": 1, "followed": proofs, "restructure": structures, "match_source": matches}


@pytest.mark.slow
def test_once_for_all_seeds(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Three models and two seeds: two sources, two maps to plan on, and one of each model to measure it at."""
    text(tmp_path)
    config_folder(tmp_path / "fresh", "gpt2")
    learned = save_tiny("llama", vocab_size=256, **SMALL["llama"])
    models = (f"a={tmp_path / 'fresh'}", f"b={tmp_path / 'fresh'}@scaled-embed", f"c={learned}@embed-ln")
    words = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "runs"), "--steps", "1", "--lr", "1e-3"]
    words += ["--batch-tokens", "64", "--seq-len", "16", "--seeds", "0,1"]
    with counted(open_source, followed, restructure) as counts:
        done = CliRunner().invoke(main, ["train", *models, *words])
    assert done.exit_code == 1, done.output
    assert counts == {"open_source": 2, "followed": 2 + 3, "restructure": 4}  # a model that is trained each
