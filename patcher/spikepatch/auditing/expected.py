"""The stds that a plan says, against those that a model has: the gate for a team that owns its initialiser."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spikepatch.auditing.fault import Fault
from spikepatch.auditing.groups import Evidence
from spikepatch.auditing.laws import close
from spikepatch.plans.plan import Constant, Fill, NormEmbedding, Plan, ScaleEmbedding, Untie
from spikepatch.residual.map import pattern


def expected(evidence: Evidence, plan: Plan, *, replaced: bool) -> Iterator[Fault]:
    """Where the model is not as ``plan`` would make it, within the tolerance of sampling.

    Args:
        replaced: the plan divides out a factor that the model has, so factors are not compared.
    """
    wrong: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for edit in plan.edits:
        match edit:
            case Fill():
                found = evidence.contents.get(edit.parameter)
                if found is None or found.nonfinite:
                    continue
                limit = 5 * edit.std / math.sqrt(found.sampled)
                text = f"a std of {edit.std:.4g}"
                if not close(found.std, edit.std, found.error):
                    wrong.setdefault((pattern(edit.parameter), text), []).append(
                        (edit.parameter, f"a std of {found.std:.4g}, {found.std / edit.std:.3g} times that")
                    )
                elif abs(found.mean) > max(limit, 0.01 * edit.std):
                    wrong.setdefault((pattern(edit.parameter), f"{text} and a mean of 0"), []).append(
                        (edit.parameter, f"a mean of {found.mean:.3g}")
                    )
            case Constant():
                found = evidence.contents.get(edit.parameter)
                value = edit.written
                if found is not None and not (
                    found.is_constant and math.isclose(found.mean, value, rel_tol=4e-3, abs_tol=1e-6)
                ):
                    wrong.setdefault((pattern(edit.parameter), f"{value:.4g} everywhere"), []).append(
                        (edit.parameter, f"a mean of {found.mean:.4g} and a std of {found.std:.3g}")
                    )
            case Untie() if edit.head not in evidence.contents:
                wrong.setdefault((edit.head, "a head of its own"), []).append((edit.embedding, "a tied one"))
    if not replaced:
        wrong |= _factors(evidence, plan)
    for (_, text), entries in wrong.items():
        yield Fault(
            "not-as-planned",
            "at-risk",
            tuple(name for name, _ in entries),
            f"it is not as {plan.recipe} makes it: {text}, and it has {entries[0][1]}",
            text,
            entries[0][1],
            "draw it as the plan says, which has every number (spikepatch.plan)",
        )


def _factors(evidence: Evidence, plan: Plan) -> dict[tuple[str, str], list[tuple[str, str]]]:
    wrong: dict[tuple[str, str], list[tuple[str, str]]] = {}
    tables = {e.module: e for e in evidence.embeddings}
    for edit in plan.edits:
        if isinstance(edit, ScaleEmbedding) and (e := tables.get(edit.module)) is not None:
            if not e.normed and not math.isclose(e.scale, edit.factor, rel_tol=0.01):
                text = f"an embedding times {edit.factor:.4g}"
                wrong[(e.parameter, text)] = [(e.parameter, f"a factor of {e.scale:.4g}")]
        elif isinstance(edit, NormEmbedding) and (e := tables.get(edit.module)) is not None and not e.normed:
            wrong[(e.parameter, "a norm behind the embedding")] = [(e.parameter, "none")]
    return wrong
