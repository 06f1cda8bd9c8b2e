"""Architectures that compute what another one does, with a setting for the embedding's factor besides.

Data, and the only place in spikepatch where architectures are named. That a host computes the same function, on every
layer, is proven for each model that is written (``routes.py``); what is here are candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Host:
    """How a config becomes one of ``model_type``.

    Attributes:
        model_type: of the host.
        factor: the host's setting that multiplies the token embedding.
        constants: host settings at which it does nothing else.
        powers: host setting -> (setting of the source, exponent).
        ignored: settings of the source that the host does not know, and that no forward pass reads.
    """

    model_type: str
    factor: str
    constants: Mapping[str, float]
    powers: Mapping[str, tuple[str, float]]
    ignored: frozenset[str]


_GRANITE = Host(
    model_type="granite",
    factor="embedding_multiplier",
    constants=MappingProxyType({"residual_multiplier": 1.0, "logits_scaling": 1.0}),
    powers=MappingProxyType({"attention_multiplier": ("head_dim", -0.5)}),
    ignored=frozenset({"head_dim", "pretraining_tp"}),  # head_dim is read where it is there
)

#: model_type of the source -> its host.
HOSTS: Mapping[str, Host] = MappingProxyType({"llama": _GRANITE, "mistral": _GRANITE})
