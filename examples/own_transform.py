"""A transform and a recipe of one's own, in a file of one's own: nothing is registered anywhere.

A transform is a frozen config that, called with the map of a residual stream, says which tensors it changes. It names
no module and no architecture: the map knows the residual projections of any model. This one sets them to zero, so that
every sub-layer starts as the identity, and composes with the built-in small initialisation and scaled embedding.

Run as a script, on any machine; or from this directory, by the command:

    spikepatch convert arch:gpt2 out/ --recipe own_transform:RECIPE
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import spikepatch
from spikepatch.plans.plan import Constant, Context, Edit, Recipe, Skip
from spikepatch.residual.map import ResidualMap
from spikepatch_transforms.embed_scale import EmbedScale
from spikepatch_transforms.small_init import SmallInit


@dataclass(frozen=True)
class ZeroResidual:
    """Residual projections = 0: at first the output is the embedding's alone, and the gradient of every other
    sub-layer weight is zero. Preserves nothing learned in them; acts with ``reinit`` all and residual.
    """

    def __call__(self, residual: ResidualMap, context: Context) -> Iterator[Edit | Skip]:
        if context.reinit == "none":
            return
        for projection in residual.residual_projections:
            yield Constant(projection.parameter, 0.0)


RECIPE = Recipe(
    "zero-residual",
    (SmallInit(), ZeroResidual(), EmbedScale()),
    equation="W, E ~ N(0, 2/(5d)); residual projections = 0; E(x) * sqrt(d)",
    small_sublayers=True,
    large_shortcut=True,
)


def main() -> None:
    for model_type in ("gpt2", "llama"):
        config = AutoConfig.for_model(
            model_type, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=128, vocab_size=256, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
        spikepatch.patch(model, RECIPE, reinit="all", seed=0)
        with torch.no_grad():
            states = model(torch.arange(64)[None], output_hidden_states=True).hidden_states
        # The last entry is behind the final norm.
        assert all(torch.equal(states[0], state) for state in states[1:-1]), "a sub-layer added something"
        print(f"{model_type}: the stream has a std of {states[0].std():.3f} in every block")  # noqa: T201


if __name__ == "__main__":
    main()
