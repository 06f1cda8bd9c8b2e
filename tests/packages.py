"""Models from packages on PyPI, as they are: ``python -m tests.packages`` prints the table of docs/foreign.md.

An environment of its own is made in a temporary folder: it sees the packages of the one that runs this, torch among
them, and gets the others at fixed versions without their dependencies. ``python -m tests.packages PREFIX`` runs those
models alone whose package begins so.

What is true is measured here, with hooks and on the tensors: the std of every residual projection, the size of the
stream where the first block reads it, and every tensor that the recipe leaves alone, beside the package's own
construction by two other seeds.
"""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, attr-defined"

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import itertools
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spikepatch
from spikepatch.plans.plan import Plan, ScaleEmbedding

#: And what they import, by the package that needs it; ``pip install --no-deps`` takes them all.
PACKAGES = (
    "x-transformers==2.31.10", "torch-einops-utils", "einx", "einops", "loguru", "frozendict",
    "ibm-fms==1.13.1",
    "mambapy==1.2.0",
    "litgpt==0.5.13", "lightning", "lightning-utilities", "torchmetrics", "pytorch-lightning",
    "torchtune==0.6.1", "torchao==0.9.0", "sentencepiece", "tiktoken", "blobfile", "omegaconf", "torchdata",
    "antlr4-python3-runtime",
    "curated-transformers==2.0.1", "curated-tokenizers", "catalogue",
    "performer-pytorch==1.1.4", "axial-positional-embedding", "local-attention==1.11.2", "hyper-connections",
    "reformer-pytorch==1.4.4", "product-key-memory", "colt5-attention",
    "linear-attention-transformer==0.19.1", "linformer",
    "lightning-gpt==0.1.1",
    "gateloop-transformer==0.2.5", "rotary-embedding-torch",
    "yet-another-retnet==0.5.1",
    "fair-esm==2.0.0",
    "routing-transformer==1.6.1", "mixture-of-experts",
    "ring-attention-pytorch==0.5.20", "beartype", "jaxtyping", "wadler-lindig",
    "memory-efficient-attention-pytorch==0.1.6",
)  # fmt: skip

D, V, T = 64, 96, 16


@dataclasses.dataclass(frozen=True)
class Package:
    """``make`` builds a model of width 64 with two layers; ``arguments``: what its forward takes beside ids, which it
    calls ``ids``. ``first``: the module that reads the stream first. ``sublayers``: of a proven map, else ``refused``:
    what is said. ``unscaled``: why its embedding is not scaled.
    """

    package: str
    model: str
    make: Callable[[], nn.Module]
    ids: str
    first: str
    sublayers: int = 4
    refused: str = ""
    unscaled: str = ""
    arguments: Callable[[], dict[str, Any]] = dict


def _x_transformers(**options: Any) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=V, max_seq_len=32, attn_layers=Decoder(dim=D, depth=2, heads=4, attn_dim_head=16, **options)
    )


def _fms_llama() -> nn.Module:
    from fms.models.llama import LLaMA, LLaMAConfig

    model = LLaMA(LLaMAConfig(src_vocab_size=V, emb_dim=D, nheads=4, kvheads=2, nlayers=2, max_expected_seq_len=32))
    model.reset_parameters()
    return model


def _fms_bigcode() -> nn.Module:
    from fms.models.gpt_bigcode import GPTBigCode, GPTBigCodeConfig

    model = GPTBigCode(GPTBigCodeConfig(src_vocab_size=V, emb_dim=D, nheads=4, nlayers=2, max_expected_seq_len=32))
    model.reset_parameters()
    return model


def _mambapy() -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    class Between(nn.Module):
        """An embedding, ``Mamba``, and a head."""

        def __init__(self) -> None:
            super().__init__()
            self.wte, self.mamba = nn.Embedding(V, D), Mamba(MambaConfig(d_model=D, n_layers=2))
            self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.norm(self.mamba(self.wte(ids))))
            return logits

    return Between()


def _litgpt(name: str) -> nn.Module:
    from litgpt import GPT, Config

    sizes = {"n_layer": 2, "n_head": 4, "n_embd": D, "intermediate_size": 96, "block_size": 32, "padded_vocab_size": V}
    return GPT(Config.from_name(name, **sizes, n_query_groups=4))


def _torchtune(builder: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module(f"torchtune.models.{builder}"), builder)(
        vocab_size=V, num_layers=2, num_heads=4, embed_dim=D, max_seq_len=32, **options
    )


def _curated(kind: str) -> nn.Module:
    import curated_transformers.models as models

    sizes: dict[str, Any] = {"hidden_width": D, "intermediate_width": 96, "n_hidden_layers": 2, "n_pieces": V}
    heads = {"n_query_heads": 4, "n_key_value_heads": 4} if kind == "Llama" else {"n_attention_heads": 4}
    config = getattr(models, f"{kind}Config")(**sizes, **heads, dtype=torch.float32)
    return getattr(models, f"{kind}CausalLM")(config)


def _mask() -> dict[str, Any]:
    from curated_transformers.layers import AttentionMask

    return {"attention_mask": AttentionMask(torch.ones(1, T, dtype=torch.bool))}


def _performer() -> nn.Module:
    from performer_pytorch import PerformerLM

    return PerformerLM(num_tokens=V, max_seq_len=32, dim=D, depth=2, heads=4, dim_head=16, causal=True)


def _reformer() -> nn.Module:
    from reformer_pytorch import ReformerLM

    return ReformerLM(V, D, 2, 32, heads=4, dim_head=16, bucket_size=4, causal=True)


def _linear_attention() -> nn.Module:
    from linear_attention_transformer import LinearAttentionTransformerLM

    return LinearAttentionTransformerLM(
        V, D, 2, 32, heads=4, dim_head=16, causal=True, blindspot_size=1, use_axial_pos_emb=False
    )


def _mingpt() -> nn.Module:
    from mingpt.model import GPT

    config = GPT.get_default_config()
    config.model_type, config.n_layer, config.n_head, config.n_embd = None, 2, 4, D
    config.vocab_size, config.block_size = V, 32
    return GPT(config)


def _nanogpt() -> nn.Module:
    from nanogpt.model import GPT, GPTConfig

    return GPT(GPTConfig(block_size=32, vocab_size=V, n_layer=2, n_head=4, n_embd=D))


def _local() -> nn.Module:
    from local_attention import LocalTransformer

    sizes = {"dim": D, "depth": 2, "heads": 4, "dim_head": 16, "local_attn_window_size": 4}
    return LocalTransformer(num_tokens=V, max_seq_len=32, **sizes)


def _gateloop() -> nn.Module:
    from gateloop_transformer import Transformer

    return Transformer(num_tokens=V, dim=D, depth=2, use_gate_looped_attn=True)


def _retnet() -> nn.Module:
    from yet_another_retnet.retnet import RetNet

    return RetNet(num_tokens=V, d_model=D, nhead=4, num_layers=2, dim_feedforward=128)


def _esm2() -> nn.Module:
    from esm.model.esm2 import ESM2

    return ESM2(num_layers=2, embed_dim=D, attention_heads=4)


def _routing() -> nn.Module:
    from routing_transformer import RoutingTransformerLM

    return RoutingTransformerLM(num_tokens=V, dim=D, heads=4, depth=2, max_seq_len=32, causal=True, window_size=8)


def _ring() -> nn.Module:
    from ring_attention_pytorch import RingTransformer

    sizes = {"dim": D, "depth": 2, "dim_head": 16, "heads": 4}
    return RingTransformer(num_tokens=V, causal=True, ring_attn=False, striped_ring_attn=False, **sizes)


def _reversible() -> nn.Module:
    from memory_efficient_attention_pytorch.transformer import Transformer

    return Transformer(num_tokens=V, dim=D, depth=2, heads=4, dim_head=16, causal=True, max_seq_len=32)


MODELS = (
    Package("x-transformers", "`Decoder`", _x_transformers, "x", "attn_layers.layers.0.0.0"),
    Package(
        "x-transformers", "`Decoder`, rotary positions, RMSNorm, SwiGLU",
        lambda: _x_transformers(rotary_pos_emb=True, use_rmsnorm=True, ff_swish=True, ff_glu=True),
        "x", "attn_layers.layers.0.0.0",
    ),
    Package(
        "x-transformers", "`Decoder`, sandwich norms", lambda: _x_transformers(sandwich_norm=True),
        "x", "attn_layers.layers.0.0.0",
    ),
    Package(
        "x-transformers", "`Decoder`, macaron", lambda: _x_transformers(macaron=True),
        "x", "attn_layers.layers.0.0.0", sublayers=6,
    ),
    Package("ibm-fms", "`LLaMA`", _fms_llama, "x", "base_model.layers.0"),
    Package("ibm-fms", "`GPTBigCode`", _fms_bigcode, "x", "base_model.layers.0"),
    Package("mambapy", "`Mamba` between an embedding and a head", _mambapy, "ids", "mamba.layers.0", sublayers=2),
    Package("litgpt", "`GPT`, Llama 3's settings", lambda: _litgpt("Llama-3-8B"), "idx", "transformer.h.0"),
    Package("litgpt", "`GPT`, Pythia's settings", lambda: _litgpt("pythia-14m"), "idx", "transformer.h.0"),
    Package(
        "torchtune", "`llama3`", lambda: _torchtune("llama3", num_kv_heads=2, intermediate_dim=96), "tokens", "layers.0"
    ),
    Package(
        "torchtune", "`qwen2`", lambda: _torchtune("qwen2", num_kv_heads=2, intermediate_dim=96), "tokens", "layers.0"
    ),
    Package("curated-transformers", "`LlamaCausalLM`", lambda: _curated("Llama"), "piece_ids", "decoder.layers.0",
            arguments=_mask),
    Package("curated-transformers", "`GPTNeoXCausalLM`", lambda: _curated("GPTNeoX"), "piece_ids", "decoder.layers.0",
            arguments=_mask),
    Package("performer-pytorch", "`PerformerLM`", _performer, "x", "performer.net.layers.0.0"),
    Package("reformer-pytorch", "`ReformerLM`, reversible", _reformer, "x", "", refused="past the stream"),
    Package(
        "linear-attention-transformer", "`LinearAttentionTransformerLM`", _linear_attention, "x",
        "transformer.layers.layers.0.0",
    ),
    Package("lightning-gpt", "minGPT's `GPT`", _mingpt, "idx", "transformer.h.0"),
    Package("lightning-gpt", "nanoGPT's `GPT`", _nanogpt, "idx", "transformer.h.0"),
    Package(
        "local-attention", "`LocalTransformer`, with hyper-connections", _local, "x", "",
        refused="hyper-connections: the stream is a set of 4 mixed copies",
    ),
    Package("gateloop-transformer", "`Transformer`", _gateloop, "x", "layers.0.0"),
    Package(
        "yet-another-retnet", "`RetNet`, which gives its loss alone", _retnet, "inputs", "decoder.layers.0.norm1",
        arguments=lambda: {"labels": torch.arange(T)[None] * 7 % V},
    ),
    Package(
        "fair-esm", "`ESM2`", _esm2, "tokens", "layers.0", unscaled=r"multiplied by 0\.88",
        arguments=lambda: {"tokens": torch.arange(T)[None] * 7 % 30},
    ),
    Package(
        "routing-transformer", "`RoutingTransformerLM`", _routing, "x", "routing_transformer.layers.layers.0.0"
    ),
    Package("ring-attention-pytorch", "`RingTransformer`, in blocks", _ring, "x", "layers.0.0"),
    Package(
        "memory-efficient-attention-pytorch", "`Transformer`, reversible", _reversible, "x", "",
        refused="past the stream",
    ),
)  # fmt: skip


def made(case: Package, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.make().eval()


def row(case: Package) -> tuple[str, ...]:
    """A row of the table; an AssertionError says what is not so."""
    version = importlib.metadata.version(case.package)
    head = (f"{case.package} {version}", case.model)
    example = {case.ids: torch.arange(T)[None] * 7 % V, **case.arguments()}
    model = made(case, 0)
    if case.refused:
        try:
            found = spikepatch.inspect(model, example_inputs=example)
            why = "; ".join(found.leaks)
        except spikepatch.Refused as error:
            why = error.why
        assert case.refused in why, why
        return (*head, f"refused: {why}", "", "", "", "", "")
    found = spikepatch.inspect(model, example_inputs=example)
    assert found.proven, found.leaks
    assert (found.sublayers, found.width, found.conditions) == (case.sublayers, D, ()), found
    if case.unscaled:
        with pytest.raises(spikepatch.Refused, match=case.unscaled):
            spikepatch.plan(made(case, 0), "scaled-embed", reinit="all", example_inputs=example)
    recipe = "vanilla" if case.unscaled else "scaled-embed"
    plan = spikepatch.plan(model, recipe, reinit="all", example_inputs=example)
    _learn(model, plan)
    spikepatch.patch(model, plan)
    _check_drawn(model, found, plan)
    stream = _stream(model, case, example)
    assert case.unscaled or 0.5 < stream < 1.0, stream
    compared = _compare(model, case, plan)
    report = spikepatch.check(made(case, 0), example_inputs=example)
    return (
        *head, "yes", str(found.sublayers), found.placement, f"{stream:.2f}", f"{compared} of {compared}",
        report.verdict,
    )  # fmt: skip


def _learn(model: nn.Module, plan: Plan) -> None:
    """No parameter that the recipe leaves alone is as it began."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if name not in plan.written:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.01)


def _check_drawn(model: nn.Module, found: spikepatch.ResidualMap, plan: Plan) -> None:
    """Every residual projection has std sqrt(2 / (5 d)) / sqrt(S), counted here, over the model's own factor behind it;
    one with a norm behind it sqrt(2 / (5 d)).
    """
    stds = {}
    for p in found.residual_projections:
        depth = 1.0 if p.branch_norm is not None else found.sublayers**0.5 * p.multiplier
        stds[p.parameter] = (2 / (5 * D)) ** 0.5 / depth
    assert len(stds) >= found.sublayers
    for name, wanted in stds.items():
        weight = model.get_parameter(name).detach()
        assert abs(float(weight.std()) / wanted - 1) < 7 / weight.numel() ** 0.5, (name, float(weight.std()), wanted)


@torch.no_grad()
def _stream(model: nn.Module, case: Package, example: dict[str, Any]) -> float:
    """std of what the first block reads."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        seen.append(next(v for v in values if v.shape[-1] == D))

    handle = model.get_submodule(case.first).register_forward_pre_hook(hook, with_kwargs=True)
    model(**example)
    handle.remove()
    return float(seen[0].std())


def _compare(model: nn.Module, case: Package, plan: Plan) -> int:
    """Tensors that the recipe leaves alone, beside the package's own construction: constants (equal by two seeds) have
    the same bits, random ones the same mean and std, to within what so many draws allow. How many.
    """
    one, other = (dict(made(case, seed).named_parameters()) for seed in (1, 2))
    scaled = {f"{edit.module}.weight" for edit in plan.select(ScaleEmbedding)}
    compared = 0
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name in plan.written | scaled or name not in one:
            continue
        first, second = one[name].detach(), other[name].detach()
        if torch.equal(first, second):
            assert torch.equal(value, first), (name, value.flatten()[:4], first.flatten()[:4])
        else:
            std, n = float(torch.stack((first, second)).std()), first.numel()
            assert abs(float(value.mean() - first.mean())) < 8 * std / n**0.5, name
            assert n < 16 or abs(float(value.std()) / std - 1) < 8 / n**0.5, name
            assert not torch.equal(value, first), name
        compared += 1
    return compared


def rows(prefix: str) -> Iterator[tuple[str, ...]]:
    for case in MODELS:
        if case.package.startswith(prefix):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    cells = row(case)
                yield cells
            except Exception as error:
                yield case.package, case.model, f"FAILED: {type(error).__name__}: {error}", "", "", "", "", ""


def run(prefix: str) -> int:
    titles = ("package", "model", "proven", "S", "placement", "stream", "as built", "`check` as it is")
    failed = 0
    for cells in itertools.chain([titles, ["---"] * len(titles)], rows(prefix)):
        sys.stdout.write("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |\n")
        sys.stdout.flush()
        failed += cells[2].startswith("FAILED")
    return 1 if failed else 0


def main(prefix: str = "") -> int:
    """Make the environment, and run this file in it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, symlinks=True)
        python = Path(folder) / "bin" / "python"
        purelib = sysconfig.get_path("purelib")
        (site,) = Path(folder).glob("lib/python*/site-packages")
        # ``site.addsitedir`` reads the .pth files there too, by which an editable install is found.
        (site / "others.pth").write_text(f"import site; site.addsitedir({purelib!r})\n", encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)
        return subprocess.run([python, "-m", "tests.packages", "--here", prefix], check=False).returncode


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(run("".join(words[1:2])) if words[:1] == ["--here"] else main("".join(words[:1])))
