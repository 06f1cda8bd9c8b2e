"""Models with code of their own, in the styles in which the Hub's are written: a dozen small decoders.

Each is a ``Style``: files, and the entries of config.json. They share ``BLOCKS``, a pre-norm decoder with RMSNorms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BLOCKS = """
import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, d, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.o = nn.Linear(d, d, bias=False)

    def forward(self, x, rotate=None):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, d, heads=4):
        super().__init__()
        self.n1, self.attn, self.n2 = RMSNorm(d), Attention(d, heads), RMSNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)

    def forward(self, x, rotate=None):
        x = x + self.attn(self.n1(x), rotate)
        return x + self.down(F.silu(self.up(self.n2(x))))
"""

CONFIG = """
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "ownlm"

    def __init__(self, vocab_size=300, hidden_size=64, num_hidden_layers=2, initializer_range=0.02, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
"""

MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from .blocks_own import Block, RMSNorm
from .configuration_own import OwnConfig


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, RMSNorm):
            module.weight.data.fill_(1.0)


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(self.norm(x))


class OwnForCausalLM(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def set_input_embeddings(self, value):
        self.model.embed = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, **kwargs).last_hidden_state))
"""

AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


@dataclass(frozen=True)
class Style:
    """``files``: name -> text. ``entries``: of config.json, beside type, ``auto_map`` and ``tie_word_embeddings``."""

    files: Mapping[str, str]
    entries: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = "ownlm"
    auto_map: Mapping[str, str] = field(default_factory=lambda: AUTO_MAP)


def _files(config: str = CONFIG, model: str = MODEL, **others: str) -> dict[str, str]:
    return {"configuration_own.py": config, "modeling_own.py": model, "blocks_own.py": BLOCKS, **others}


def _changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


_SUPER = "        super().__init__(**kwargs)"

#: As nearly all of them do: the forward asks the config for ``use_cache``.
READS_USE_CACHE = Style(
    _files(
        _changed(
            CONFIG,
            (_SUPER, "        self.use_cache = kwargs.pop('use_cache', True)\n        self._derived = 2\n" + _SUPER),
        ),
        _changed(
            MODEL,
            (
                "labels=None, **kwargs):\n",
                "labels=None, use_cache=None, **kwargs):\n"
                "        use_cache = use_cache if use_cache is not None else self.config.use_cache\n"
                "        assert self.config._derived == 2\n",
            ),
        ),
    )
)

#: The constructor works values out, and passes some on by name.
DERIVED = Style(
    _files(
        _changed(
            CONFIG,
            (
                "initializer_range=0.02, **kwargs",
                "initializer_range=0.02, ffn=None, scale=None, pad_token_id=0, bos_token_id=1,"
                " tie_word_embeddings=False, **kwargs",
            ),
            (
                _SUPER,
                "        self.ffn = ffn or 2 * hidden_size\n"
                "        self.scale = scale\n"
                "        if scale is None:\n"
                "            self.scale = 0.5\n"
                "        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id,"
                " tie_word_embeddings=tie_word_embeddings, **kwargs)\n"
                "        self.head_dim = hidden_size // 4\n"
                "        self.layer_kinds = ['full'] * num_hidden_layers\n\n"
                "    @property\n"
                "    def depth(self):\n"
                "        return len(self.layer_kinds)",
            ),
        ),
        _changed(
            MODEL,
            ("range(config.num_hidden_layers)", "range(config.depth)"),
            ("logits=self.lm_head(", "logits=self.config.scale * self.config.head_dim / 8 * self.lm_head("),
        ),
    )
)

#: Names of its own, by ``attribute_map``, and a list of tied keys as before transformers 5.
OLD_NAMES = Style(
    _files(
        _changed(
            CONFIG,
            ('    model_type = "ownlm"\n', '    model_type = "ownlm"\n    attribute_map = {"hidden_size": "n_embd",'
             ' "num_hidden_layers": "n_layer"}\n    keys_to_ignore_at_inference = ["past_key_values"]\n'),
            ("hidden_size=64, num_hidden_layers=2", "n_embd=64, n_layer=2"),
            ("self.hidden_size = hidden_size", "self.n_embd = n_embd"),
            ("self.num_hidden_layers = num_hidden_layers", "self.n_layer = n_layer"),
        ),
        _changed(MODEL, ("class OwnForCausalLM(OwnPreTrainedModel):\n", 'class OwnForCausalLM(OwnPreTrainedModel):\n'
                         '    _tied_weights_keys = ["lm_head.weight"]\n\n'),
                 ("config.hidden_size", "config.n_embd"), ("config.num_hidden_layers", "config.n_layer")),
    ),
    {"n_embd": 64},
)  # fmt: skip

#: The text model's settings are a config in the config.
SUB_CONFIG = Style(
    _files(
        CONFIG.replace("OwnConfig", "OwnTextConfig").replace('"ownlm"', '"ownlm_text"')
        + """

class OwnConfig(PretrainedConfig):
    model_type = "ownlm"
    sub_configs = {"text_config": OwnTextConfig}

    def __init__(self, text_config=None, initializer_range=0.02, **kwargs):
        if isinstance(text_config, dict):
            text_config = OwnTextConfig(**text_config)
        self.text_config = text_config or OwnTextConfig()
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
""",
        _changed(MODEL, ("config.hidden_size", "config.text_config.hidden_size"),
                 ("config.vocab_size", "config.text_config.vocab_size"),
                 ("config.num_hidden_layers", "config.text_config.num_hidden_layers")),
    ),
    {"text_config": {"hidden_size": 64, "vocab_size": 300}},
)  # fmt: skip

#: Declared fields, as transformers 5 writes its own.
FIELDS = Style(
    _files(
        """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "ownlm"

    vocab_size: int = 300
    hidden_size: int = 64
    num_hidden_layers: int = 2
    initializer_range: float = 0.02
    use_cache: bool = True
    ffn: int | None = None

    def __post_init__(self, **kwargs):
        self.ffn = self.ffn if self.ffn is not None else 2 * self.hidden_size
        super().__post_init__(**kwargs)
""",
        _changed(
            MODEL,
            (
                "labels=None, **kwargs):\n",
                "labels=None, **kwargs):\n"
                "        assert self.config.ffn == 128 and self.config.use_cache is not None\n",
            ),
        ),
    )
)  # fmt: skip

#: A subclass of an architecture of transformers, without a constructor.
DERIVED_FROM_LLAMA = Style(
    {
        "configuration_own.py": """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "ownlm"
    extra = 2.0
""",
        "modeling_own.py": """
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_own import OwnConfig


class OwnModel(LlamaModel):
    config_class = OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * self.config.extra
        return found
""",
    },
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
     "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
)  # fmt: skip

_ROTARY = """
import torch
from torch import nn


class Rotary(nn.Module):
    def __init__(self, dim, base=10000.0, length=64):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        angles = torch.outer(torch.arange(length).float(), inv_freq)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self, x):
        n, half = x.shape[-2], x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * self.cos_cached[:n] + turned * self.sin_cached[:n]
"""

#: Buffers that no checkpoint has, filled by the constructor alone.
ROTARY = Style(
    _files(
        model=_changed(
            MODEL,
            ("from .configuration_own", "from .rotary_own import Rotary\nfrom .configuration_own"),
            (
                "        self.norm = RMSNorm(",
                "        self.rotary = Rotary(config.hidden_size // 4)\n        self.norm = RMSNorm(",
            ),
            ("x = layer(x)", "x = layer(x, self.rotary)"),
        ),
        **{"rotary_own.py": _ROTARY},
    )
)  # fmt: skip

#: All in one file, and the head is tied by the new kind of keys; with ``generate``.
ONE_FILE = Style(
    {
        "modeling_own.py": BLOCKS + CONFIG + _changed(
            MODEL,
            ("from .blocks_own import Block, RMSNorm\nfrom .configuration_own import OwnConfig\n", ""),
            ("import PreTrainedModel", "import GenerationMixin, PreTrainedModel"),
            ("class OwnForCausalLM(OwnPreTrainedModel):", "class OwnForCausalLM(OwnPreTrainedModel, GenerationMixin):\n"
             '    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}\n'),
        )
    },
    {"tie_word_embeddings": True},
    auto_map={**AUTO_MAP, "AutoConfig": "modeling_own.OwnConfig"},
)  # fmt: skip

#: The config class names no type; and there is no headless model.
NO_TYPE = Style(
    _files(_changed(CONFIG, ('    model_type = "ownlm"\n\n', ""))),
    auto_map={name: place for name, place in AUTO_MAP.items() if name != "AutoModel"},
)

#: A head that asks an auto class for its backbone, and a constructor that asks for its type.
AUTO_BACKBONE = Style(
    _files(
        model=_changed(
            MODEL,
            ("import PreTrainedModel", "import AutoModel, PreTrainedModel"),
            (
                "self.model = OwnModel(config)",
                "assert config.model_type == 'ownlm', config.model_type\n"
                "        self.model = AutoModel.from_config(config, trust_remote_code=True)",
            ),
        )
    )
)  # fmt: skip

#: Modules in a dict, a fused matrix, linear biases for positions; no constructor calls ``post_init``.
MODULE_DICT = Style(
    _files(
        model="""
import math
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .blocks_own import RMSNorm
from .configuration_own import OwnConfig


class AlibiBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.Wqkv, self.out_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ffn = nn.ModuleDict({"up_proj": nn.Linear(d, 2 * d), "down_proj": nn.Linear(2 * d, d)})

    def forward(self, x, bias):
        b, n, d = x.shape
        q, k, v = (t.view(b, n, 4, -1).transpose(1, 2) for t in self.Wqkv(self.norm_1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out_proj(mixed.transpose(1, 2).reshape(b, n, d))
        return x + self.ffn["down_proj"](F.gelu(self.ffn["up_proj"](self.norm_2(x))))


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        d = config.hidden_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, d),
                "blocks": nn.ModuleList([AlibiBlock(d) for _ in range(config.num_hidden_layers)]),
                "norm_f": nn.LayerNorm(d),
            }
        )
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def set_input_embeddings(self, value):
        self.transformer["wte"] = value

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        x, n = self.transformer["wte"](input_ids), input_ids.shape[1]
        at = torch.arange(n, device=x.device)
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(4)], device=x.device)
        bias = -(at[:, None] - at).abs()[None] * slopes[:, None, None]
        bias = bias.masked_fill(at[None] > at[:, None], float("-inf")).to(x.dtype)
        for block in self.transformer["blocks"]:
            x = block(x, bias)
        return CausalLMOutputWithPast(logits=self.lm_head(self.transformer["norm_f"](x)))
"""
    ),
    auto_map={name: place for name, place in AUTO_MAP.items() if name != "AutoModel"},
)

#: The config keeps its extra arguments to itself.
KEEPS_ARGUMENTS = Style(
    _files(
        _changed(
            CONFIG,
            (_SUPER, "        super().__init__(**{k: v for k, v in kwargs.items() if k in ('auto_map', 'architectures',"
             " 'dtype', 'torch_dtype', 'name_or_path', 'tie_word_embeddings')})"),
        )
    )
)  # fmt: skip

#: A tokenizer of its own: byte values, written in Python.
TOKENIZER = """
from transformers import PreTrainedTokenizer


class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs):
        self.words = {f"<{i:02x}>": i for i in range(256)} | {"<end>": 256}
        super().__init__(eos_token="<end>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text):
        return [f"<{byte:02x}>" for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return self.words[token]

    def _convert_id_to_token(self, index):
        return list(self.words)[index]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
"""
OWN_TOKENIZER = Style(
    _files(
        **{
            "tokenization_own.py": TOKENIZER,
            "tokenizer_config.json": json.dumps(
                {
                    "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
                    "tokenizer_class": "OwnTokenizer",
                }
            ),
        }
    )
)

STYLES: dict[str, Style] = {
    "reads use_cache": READS_USE_CACHE,
    "derived values": DERIVED,
    "attribute_map": OLD_NAMES,
    "sub-config": SUB_CONFIG,
    "declared fields": FIELDS,
    "derived from llama": DERIVED_FROM_LLAMA,
    "rotary buffers": ROTARY,
    "one file": ONE_FILE,
    "no type": NO_TYPE,
    "auto backbone": AUTO_BACKBONE,
    "module dict": MODULE_DICT,
    "keeps arguments": KEEPS_ARGUMENTS,
    "own tokenizer": OWN_TOKENIZER,
}


def save_style(folder: Path, name: str) -> Path:
    """The model as its author would publish it, with weights; ``name`` as in ``STYLES``."""
    style = STYLES[name]
    folder.mkdir(parents=True)
    for file, text in style.files.items():
        (folder / file).write_text(text)
    data = {"tie_word_embeddings": False, **style.entries}
    data |= {"model_type": style.model_type, "architectures": ["OwnForCausalLM"], "auto_map": dict(style.auto_map)}
    (folder / "config.json").write_text(json.dumps(data))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model._tied_weights_keys = {} if isinstance(model._tied_weights_keys, list) else model._tied_weights_keys
    model.save_pretrained(folder)  # with a list, by an earlier version
    (folder / "config.json").write_text(json.dumps(data))  # the author's own
    return folder


def built(folder: Path) -> Any:
    """The author's model, with its weights, and its buffers as its constructor makes them."""
    from safetensors.torch import load_file

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    lacking = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not lacking.unexpected_keys
    assert set(lacking.missing_keys) <= {"lm_head.weight"}
    return model.eval()
