"""The Auto classes of transformers: which of them loads a class of models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

#: Where several load a class, or a config names no architecture, the one that names its task best.
PREFERRED = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq", "AutoModelForMultimodalLM", "AutoModel",
)  # fmt: skip

#: Before all others for a config that says that it is of an encoder and a decoder: the classes of both.
OF_BOTH = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText")


def in_order(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are for models; the preferred ones first."""
    known = {name for name in names if name.startswith("AutoModel")}
    return [*(name for name in PREFERRED if name in known), *sorted(known - {*PREFERRED})]


def auto_classes(config_class: type) -> Iterator[tuple[str, tuple[type, ...]]]:
    """The name of each, and the model classes that it has for a config of transformers; the preferred ones first."""
    from transformers.models.auto import modeling_auto

    from spikepatch.source.private import classes_for

    for name in in_order(vars(modeling_auto)):
        yield name, classes_for(getattr(modeling_auto, name), config_class)
