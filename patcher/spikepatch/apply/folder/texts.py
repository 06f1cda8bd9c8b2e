"""The text files that are written beside converted weights: config.json, the modelling files, and the model card."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spikepatch._version import __version__
from spikepatch.apply.disk.manifest import inherited_metadata, model_card
from spikepatch.apply.generated.render import completed, config_entries, original_entries, render
from spikepatch.plans.plan import Plan, Untie
from spikepatch.source.classes import original_in
from spikepatch.source.open import MODEL_CARD
from spikepatch.source.tokenizer import has_tokenizer

if TYPE_CHECKING:
    from spikepatch.apply.folder.routes import Route
    from spikepatch.source.open import Source


def texts(source: Source, plan: Plan, route: Route, settings: Mapping[str, Any], *, trust: bool) -> dict[str, str]:
    """File name -> text.

    Args:
        settings: config values to write on top of the route's.
        trust: the folder loads with ``trust_remote_code=True`` only.
    """
    config: Any = copy.deepcopy(route.config)
    for name, value in settings.items():
        setattr(config, name, value)
    if plan.select(Untie):
        config.tie_word_embeddings = False
    config.architectures = [route.model_class.__name__]
    record = plan.record(__version__) | {"original": dict(route.original)}
    data = json.loads(config.to_json_string())
    files = {}
    if route.kind in ("host", "code"):
        original = original_in(source)
        entries = config_entries(original)
        # Where the source names none, AutoTokenizer would go by the model type, which is another one now.
        record["original"]["tokenizer_class"] = data.get("tokenizer_class")
        data["tokenizer_class"] = data.get("tokenizer_class") or entries["tokenizer_class"]
        if route.kind == "code":
            files = render(original)
            record = completed(record, original, record["original"] | original_entries(original, source.config))
            # Its tokenizer's code lies beside the weights, like the model's.
            others = {k: v for k, v in data.get("auto_map", {}).items() if source.needs_code and "Tokenizer" in k}
            data |= entries | {"auto_map": others | entries["auto_map"], "tokenizer_class": data["tokenizer_class"]}
    data["spikepatch"] = record
    files["config.json"] = json.dumps(data, indent=2, sort_keys=True) + "\n"
    files[MODEL_CARD] = model_card(
        plan,
        trust=trust,
        auto_class=source.auto_class,
        tokenizer=has_tokenizer(source.copied_files),
        title=source.short_name,
        inherited=inherited_metadata(
            source.folder / MODEL_CARD if source.folder else None,
            source.name if source.kind == "hub" else None,
            weights=plan.reinit != "all" or bool(plan.kept),
        ),
    )
    return files
