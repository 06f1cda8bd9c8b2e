"""PatchedForCausalLM is GPT2LMHeadModel with the patch that `config.spikepatch` records.

Written by spikepatch, which need not be installed to use it:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`from_config` draws fresh weights with the stds of the recorded recipe, for any number of layers and any width.
"""

from typing import Any

from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model

from .embedding import install as install  # older versions of transformers take only the files that are named here
from .fresh import initialise as initialise
from .model import Patched, PatchedSettings, convert_like_parent


class PatchedConfig(PatchedSettings, GPT2Config):  # type: ignore[misc]
    """A type of its own: as plain GPT2Config the folder would load without the patch, and without an error."""

    model_type = "spikepatch_gpt2"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # of this very class, or transformers would make one


@convert_like_parent
class PatchedModel(Patched, GPT2Model):  # type: ignore[misc]
    """GPT2Model with patched embeddings."""

    config_class: type[PatchedConfig] = PatchedConfig


@convert_like_parent
class PatchedForCausalLM(Patched, GPT2LMHeadModel):  # type: ignore[misc]
    """GPT2LMHeadModel with patched embeddings."""

    config_class: type[PatchedConfig] = PatchedConfig
