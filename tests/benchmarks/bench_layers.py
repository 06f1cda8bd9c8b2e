"""How far ``check --layers 8`` is off: three models of 24 layers, run whole and cut; ``preflight.shorter.OFF``.

python -m tests.benchmarks.bench_layers
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import click
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from spikepatch.preflight.check import check
from spikepatch.source.meta import build_meta

_SIZES = {"num_hidden_layers": 24, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 8000}

MODELS: Mapping[str, Callable[[], torch.nn.Module]] = {
    "GPT-2": lambda: build_meta(GPT2LMHeadModel, GPT2Config(**_SIZES), where="gpt2"),
    "OPT": lambda: build_meta(OPTForCausalLM, OPTConfig(**_SIZES, ffn_dim=2048, word_embed_proj_dim=512), where="opt"),
    "Llama": lambda: build_meta(LlamaForCausalLM, LlamaConfig(**_SIZES, intermediate_size=1376), where="llama"),
}


def main(layers: int = 8) -> None:
    for name, build in MODELS.items():
        start = time.process_time()
        whole = check(build(), tokens=64, batch=1)
        middle = time.process_time()
        short = check(build(), tokens=64, batch=1, layers=layers)
        end = time.process_time()
        assert whole.gradient_ratio is not None
        assert short.gradient_ratio is not None
        assert whole.sigma_end is not None
        assert short.sigma_end is not None
        assert short.shortened is not None
        click.echo(
            f"{name}: {layers} of {short.shortened.of} layers, {end - middle:.0f} s of processor in place of"
            f" {middle - start:.0f}: gradient ratio {short.gradient_ratio:.3g} of {whole.gradient_ratio:.3g}"
            f" ({short.gradient_ratio / whole.gradient_ratio:.2f}), stream {short.sigma_end:.3g} of"
            f" {whole.sigma_end:.3g} ({short.sigma_end / whole.sigma_end:.2f}), {short.verdict} and {whole.verdict}"
        )


if __name__ == "__main__":
    main()
