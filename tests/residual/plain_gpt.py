"""A GPT in the style of small training scripts: a plain module. At the end the same as a transformers model, the way a
checkpoint brings its own code: this file is copied into a model's folder, so it imports torch and transformers only.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        parts = self.c_attn(x).split(width, dim=2)
        q, k, v = (part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).contiguous().view(batch, tokens, width))
        assert isinstance(y, torch.Tensor)
        return y


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c_proj(self.gelu(self.c_fc(x)))
        assert isinstance(y, torch.Tensor)
        return y


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), CausalSelfAttention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        y: torch.Tensor = x + self.mlp(self.ln_2(x))
        return y


class GPT(nn.Module):
    def __init__(self, *, vocabulary: int = 128, tokens: int = 32, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(tokens, width),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(Block(width, 4) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits and loss with ``targets``; the logits of the last token without."""
        positions = torch.arange(0, idx.shape[1], dtype=torch.long, device=idx.device)
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](positions))
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "plain_gpt"


class PlainForCausalLM(PreTrainedModel):  # type: ignore[misc]
    config_class = PlainConfig
    _tied_weights_keys: ClassVar = {"gpt.lm_head.weight": "gpt.transformer.wte.weight"}

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.gpt = GPT()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.transformer["wte"]

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        logits, loss = self.gpt(input_ids, input_ids if labels is None else labels)
        return CausalLMOutput(loss=loss, logits=logits)
