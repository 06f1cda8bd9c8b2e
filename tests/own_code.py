"""A model with its own modelling code: three files, a helper among them, and a config type of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

CONFIG = """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own-decoder"

    def __init__(self, vocab_size=500, width=64, layers=2, signal=1.0, mixed=False, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, width, layers
        self.signal, self.mixed = signal, mixed
        super().__init__(**kwargs)
"""

LAYERS = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden):
        past = torch.cumsum(hidden, 1) / torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        return hidden + self.down(torch.nn.functional.gelu(self.up(self.norm(past))))


class MixedEmbedding(nn.Embedding):
    """Its output is no single row: that of the token before is added."""

    def forward(self, ids):
        rows = super().forward(ids)
        return rows + 0.5 * torch.roll(rows, 1, 1)
'''

MODEL = """
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_own import OwnConfig
from .layers_own import Block, MixedEmbedding


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        kind = MixedEmbedding if config.mixed else nn.Embedding
        self.tokens = kind(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.last = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def set_input_embeddings(self, value):
        self.tokens = value

    def forward(self, input_ids, **kwargs):
        hidden = self.tokens(input_ids) * self.config.signal
        for block in self.blocks:
            hidden = block(hidden)
        return BaseModelOutput(self.last(hidden))


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"head.weight": "model.tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tokens

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        return CausalLMOutput(logits=self.head(self.model(input_ids).last_hidden_state))
"""

#: File name -> text, as they lie beside the config.
FILES = {"configuration_own.py": CONFIG, "layers_own.py": LAYERS, "modeling_own.py": MODEL}

AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


def save_own(folder: Path, **settings: object) -> Path:
    """Such a model with learned weights, tied, as its author would publish it."""
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    data = {"model_type": "own-decoder", "auto_map": AUTO_MAP, "tie_word_embeddings": True, **settings}
    (folder / "config.json").write_text(json.dumps(data))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(folder)
    return folder
