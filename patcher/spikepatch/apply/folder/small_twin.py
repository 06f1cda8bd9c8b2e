"""The same classes and config at a small size: what a model is tried with that is too large to be run here."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikepatch.errors import SpikepatchError
from spikepatch.source.meta import as_read, build_meta

if TYPE_CHECKING:
    from spikepatch.source.open import Source

_LAYERS, _WORDS = 2, 512

#: ``what`` of the refusal of a folder that loads as something else; all others say nothing of loading.
UNLIKE = "what was written does not load as the same model"


def try_small(source: Source, fits: Callable[[Any], bool], convert: Callable[[str, Path], object]) -> bool:
    """Convert a model of two layers and a small vocabulary, with the load test; False where there is none to be had.

    Args:
        fits: whether a model, on meta, can be run here.
        convert: (folder, out), as the large one is converted.

    Raises:
        Refused: it does not load as the same model.
    """
    for config in _smaller(source.config):
        try:
            if not fits(build_meta(source.model_class, config, where=source.name)):
                continue
            with tempfile.TemporaryDirectory(prefix="spikepatch-small-") as scratch:
                folder = Path(scratch, "small")
                folder.mkdir()
                data = json.loads(config.to_json_string()) | {"architectures": [source.model_class.__name__]}
                (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
                for path in source.copied_files:
                    if path.suffix == ".py":
                        shutil.copyfile(path, folder / path.name)
                convert(str(folder), Path(scratch, "out"))
                return True
        except SpikepatchError as error:
            if error.what == UNLIKE:
                raise
    return False


def _smaller(config: Any) -> Iterator[Any]:
    """Configs with few layers, and where that is possible few tokens too: settings that count layers, and lists of
    them.
    """
    settings = json.loads(config.to_json_string())
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    few: dict[str, Any] = {}
    for name, value in settings.items():
        if "layer" in name and isinstance(value, int) and not isinstance(value, bool) and value > _LAYERS:
            few[name] = _LAYERS
        elif isinstance(value, list) and layers and len(value) == layers:
            few[name] = value[:_LAYERS]
    words = {"vocab_size": _WORDS} if settings.get("vocab_size", 0) > _WORDS else {}
    tokens = {n: 0 for n, v in settings.items() if n.endswith("token_id") and isinstance(v, int) and v >= _WORDS}
    for changes in (few | words | tokens, few):
        try:
            yield as_read(config, changes)
        except Exception:  # whatever a config's own checks raise
            continue
