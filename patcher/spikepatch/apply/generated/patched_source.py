"""A source that is patched already: what stands for it, and when a new plan can take the old one's place."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikepatch.apply.generated.adopt import generated_classes
from spikepatch.apply.generated.render import check_generated
from spikepatch.errors import BadSource, Refused
from spikepatch.plans.plan import EmbeddingEdit, NormEmbedding, Plan, ScaleEmbedding, Untie, recorded_edit
from spikepatch.quiet import quiet
from spikepatch.runtime.embedding import install, patched_embeddings
from spikepatch.source import meta
from spikepatch.source.classes import is_remote, original_in
from spikepatch.source.open import Source, build_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_as_it_is(source: Source) -> PreTrainedModel:
    """``build_meta`` of the source, and where it is patched, with its patch.

    Raises:
        BadSource: its config records a patch that does not fit the model.
    """
    model = build_meta(source)
    if source.patched is not None:
        try:
            install(model, source.patched.entries)
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # it may have been edited by hand
            raise BadSource(
                "config.json has no usable record of the patch",
                where=source.name,
                why=str(error),
                remedy="restore config.json as spikepatch or save_pretrained wrote it",
            ) from error
    return model


def load_as_it_is(source: Source) -> Any:
    """The source's model with its learned weights in float32, in eval mode; with its patch, if it is patched.

    Of a patched folder's own code nothing is run: ``check_known`` says whether ours does the same.
    """
    assert source.folder is not None
    if source.patched is None:
        return load_learned(source.model_class, source.folder)
    if source.patched.as_code:
        return load_learned(generated_classes(original_in(source)).model, source.folder)
    from transformers import AutoModelForCausalLM

    return load_learned(AutoModelForCausalLM, source.folder, trust_remote_code=source.needs_code)


def load_unpatched(source: Source) -> Any:
    """The same without the patch."""
    assert source.folder is not None
    return load_learned(source.model_class, source.folder, config=copy.deepcopy(source.config))


def load_learned(model_class: Any, folder: Path, **options: Any) -> Any:
    """``from_pretrained`` in float32, with every weight from the folder; in eval mode.

    Raises:
        RuntimeError: the folder lacks a weight.
    """
    with quiet():
        model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise RuntimeError(f"{folder} loads without {', '.join(sorted(info['missing_keys'])[:5])}")
    if is_remote(type(model)) and not patched_embeddings(model):
        _construct_buffers(model)
    return model.eval()


@torch.no_grad()
def _construct_buffers(model: Any) -> None:
    """What no checkpoint has, as the constructor makes it: code from before transformers 5 fills it nowhere else."""
    constructed = dict(meta.build_meta(type(model), model.config, where=type(model).__name__).named_buffers())
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name not in stored:
            buffer.copy_(constructed[name])


def check_known(source: Source) -> None:
    """A patched source is read as what it was before the patch; so its patch must be known.

    Raises:
        BadSource, Refused: what is recorded does not fit the model, or is not what the folder's own code does.
    """
    record = getattr(source.config, "spikepatch", None)
    if isinstance(record, dict) and record.get("embeddings"):
        raise Refused(
            what="this model is patched already, and its config does not say what it was before",
            where=source.name,
            why=f"it records the recipe {record.get('recipe')}, and a second factor or norm would multiply with it",
            remedy="convert its original",
        )
    if source.patched is None:
        return
    build_as_it_is(source)
    if source.patched.as_code:
        assert source.folder is not None
        check_generated(source.folder, original_in(source))


def check_replaced(source: Source, plan: Plan) -> None:
    """Of a patched source with its learned weights, the new plan takes the old one's place."""
    if source.patched is None or plan.reinit == "all":
        return
    before = {_fixed(recorded_edit(name, entry, plan.width)) for name, entry in source.patched.embeddings.items()}
    after = {_fixed(edit) for edit in plan.select(EmbeddingEdit)}
    if any(isinstance(edit, NormEmbedding) and edit.affine for edit in before):
        raise Refused(
            what="the learned norm behind the embedding cannot be replaced",
            where=source.name,
            why=f"it is patched already ({source.patched.recipe}), and the norm's gain and bias are learned weights",
            remedy="put the norm into the embedding with `spikepatch fold` first, or use --reinit all",
        )
    if plan.reinit == "none" and before == after and not plan.select(Untie):
        raise Refused(
            what="the model is patched already, with just this",
            where=source.name,
            why=f"its recipe is {source.patched.recipe}; what is planned takes the old patch's place, and is equal",
            remedy="give another --factor, or --reinit residual or all",
        )


def _fixed(edit: EmbeddingEdit) -> EmbeddingEdit:
    """With the factor as a number: two that are equal at this width do the same."""
    return dataclasses.replace(edit, per_width=False) if isinstance(edit, ScaleEmbedding) else edit
