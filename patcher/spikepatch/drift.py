"""What a conversion does to a model's behaviour: estimated for fresh weights, measured for learned ones."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikepatch.plans import Fill, NormEmbedding, Plan, ScaleEmbedding, Untie
from spikepatch.quiet import quiet

if TYPE_CHECKING:
    from spikepatch.residual.map import ResidualMap
    from spikepatch.source import Source

#: Public domain: Genesis 1, King James Version.
SAMPLE = """In the beginning God created the heaven and the earth. And the earth was without form, and void; and
darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God
said, Let there be light: and there was light. And God saw the light, that it was good: and God divided
the light from the darkness. And God called the light Day, and the darkness he called Night. And the
evening and the morning were the first day. And God said, Let there be a firmament in the midst of the
waters, and let it divide the waters from the waters. And God made the firmament, and divided the waters
which were under the firmament from the waters which were above the firmament: and it was so. And God
called the firmament Heaven. And the evening and the morning were the second day. And God said, Let the
waters under the heaven be gathered together unto one place, and let the dry land appear: and it was so.
And God called the dry land Earth; and the gathering together of the waters called he Seas: and God saw
that it was good."""

#: What tokenizers of one vocabulary split differently: runs of digits and spaces, case, accents, scripts, emoji.
PROBE = "In 2025, it's 31415.9 at  10:30.\n\n\tdef f(x): return x_1**2  # naïve Ünïcode 東京 🙂 <s></s>"


@dataclass(frozen=True)
class Drift:
    """On ``SAMPLE``, in nats per token: the next-token loss before and after, and KL(before || after)."""

    before: float
    after: float
    kl: float


def measure_drift(source: Source, folder: Path, model_class: Any) -> Drift | str:
    """Compare ``source`` with the patched model in ``folder``; in float32 on the CPU, one model in memory at a time.

    Args:
        model_class: of the patched model. Given rather than looked up, so that no code in ``folder`` is run.

    Returns:
        The drift, or why it was not measured.
    """
    assert source.folder is not None
    assert source.checkpoint is not None
    if source.auto_class != "AutoModelForCausalLM":
        return f"{source.model_class.__name__} is no causal language model"
    needed = 4 * sum(math.prod(entry.shape) for entry in source.checkpoint.tensors.values())
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        return f"in float32 the model takes {needed / 1e9:.0f} GB, more than half of this machine's memory"
    tokenizer = _load_tokenizer(source.folder)
    if isinstance(tokenizer, str):
        return f"{source.name} has no usable tokenizer: {tokenizer}"
    config = source.config.get_text_config()
    ids = tokenizer(SAMPLE, return_tensors="pt").input_ids[:, : getattr(config, "max_position_embeddings", None)]
    if ids.shape[1] < 2 or int(ids.max()) >= config.vocab_size:
        return f"its tokenizer does not fit its vocabulary of {config.vocab_size}"
    try:
        before = _log_probabilities(source.model_class, source.folder, ids)
    except Exception as error:  # whatever the source's own forward pass raises
        return f"{source.name} itself does not run ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    after = _log_probabilities(model_class, folder, ids)
    kl = (before.exp() * (before - after)).sum(-1)
    return Drift(_loss(before, ids), _loss(after, ids), float(kl.mean()))


def _log_probabilities(model_class: Any, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """(1, tokens, vocabulary)"""
    with quiet(), torch.no_grad():
        model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise RuntimeError(f"{folder} loads without {', '.join(sorted(info['missing_keys'])[:5])}")
        logits: torch.Tensor = model.eval()(ids).logits
        return logits.log_softmax(-1)


def _loss(log_probabilities: torch.Tensor, ids: torch.Tensor) -> float:
    return float(-log_probabilities[:, :-1].gather(-1, ids[:, 1:, None]).mean())


def tokenizer_problem(source: Path, folder: Path) -> str | None:
    """Why ``AutoTokenizer`` gives other ids for ``folder`` than for ``source``, whose tokenizer files it has; or None.

    AutoTokenizer overrides the class that the files name for some model types, and a patched model has another type.
    """
    original, copied = _load_tokenizer(source), _load_tokenizer(folder)
    if isinstance(original, str):
        return original
    ids = original(PROBE).input_ids
    if not isinstance(copied, str) and copied(PROBE).input_ids == ids:
        return None
    name = type(copied).__name__
    problem = copied if isinstance(copied, str) else f"AutoTokenizer takes it for a {name}, which gives other ids"
    direct = _load_tokenizer(folder, type(original))
    if isinstance(direct, str) or direct(PROBE).input_ids != ids:
        return f"{problem}; load the source's in its place"
    return f"{problem}; load it with transformers.{type(original).__name__}.from_pretrained"


def _load_tokenizer(folder: Path, tokenizer_class: Any = None) -> Any:
    """A tokenizer, or why there is none; code that comes with it is not run."""
    import transformers

    with quiet():
        try:
            return (tokenizer_class or transformers.AutoTokenizer).from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # whatever a tokenizer's own loading raises
            reason = " ".join(str(error).replace(str(folder), "the folder").split())[:200]
            return f"AutoTokenizer cannot load it ({type(error).__name__}: {reason})"


def expected_initial_loss(plan: Plan, residual: ResidualMap) -> float | None:
    """Initial loss of a tied head behind a large shortcut, estimated; None where it is about log V, or not known (some
    encoder-decoders divide the logits by sqrt(d)).

    The head's rows are the embedding E ~ N(0, s^2), and the last norm divides the stream by its std, so the current
    token's own logit is about c d s^2 / sigma_N, with sigma_N^2 about c^2 s^2 plus what the sub-layers add: 0.11,
    measured on GPT-2 classes of 12 and 24 layers. (c = 1/s behind a LayerNorm.) It is also the loss, as long as it is
    well above log V, since the next token is another one: 17.9 for GPT-2 at d = 1024, where 17.7 was measured.
    """
    tied = residual.head is not None and residual.head.tied and not plan.select(Untie)
    token = residual.token_embedding
    if not tied or token is None or residual.streams:
        return None
    std: float | None = next((fill.std for fill in plan.select(Fill) if fill.parameter == token.parameter), None)
    edit = next((e for e in plan.select(ScaleEmbedding | NormEmbedding) if e.module == token.module), None)
    if std is None or edit is None:
        return None
    factor: float = edit.factor * token.scale if isinstance(edit, ScaleEmbedding) else 1 / std
    return factor * residual.width * std**2 / math.sqrt((factor * std) ** 2 + 0.11)
