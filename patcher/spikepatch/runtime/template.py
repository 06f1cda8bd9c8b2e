"""PatchedForCausalLM is GPT2LMHeadModel with the patch that `config.spikepatch` records.

Written by spikepatch, which need not be installed to use it:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`from_config` draws fresh weights with the stds of the recorded recipe, for any number of layers and any width.
"""

from typing import Any

from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model

from .embedding import convert_like_parent, initialise, install, keep_patched, patched_embeddings


class PatchedConfig(GPT2Config):  # type: ignore[misc]
    """A type of its own: as plain GPT2Config the folder would load without the patch, and without an error."""

    model_type = "spikepatch_gpt2"

    spikepatch: dict[str, Any] | None = None


@convert_like_parent
class PatchedModel(GPT2Model):  # type: ignore[misc]
    """GPT2Model with patched embeddings."""

    config_class: type[PatchedConfig] = PatchedConfig

    def __init__(self, config: PatchedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, config.spikepatch)
        self.post_init()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        initialise(self, self.config.spikepatch)

    def set_input_embeddings(self, value: Any) -> None:
        patched = patched_embeddings(self)
        super().set_input_embeddings(value)
        keep_patched(self, patched)


@convert_like_parent
class PatchedForCausalLM(GPT2LMHeadModel):  # type: ignore[misc]
    """GPT2LMHeadModel with patched embeddings."""

    config_class: type[PatchedConfig] = PatchedConfig

    def __init__(self, config: PatchedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, config.spikepatch)
        self.post_init()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        initialise(self, self.config.spikepatch)

    def set_input_embeddings(self, value: Any) -> None:
        patched = patched_embeddings(self)
        super().set_input_embeddings(value)
        keep_patched(self, patched)
