"""A plan in words: what ``convert`` prints, and what the card of its output says."""

from __future__ import annotations

from collections.abc import Iterator

from spikepatch.plans.plan import Plan, ValueEdit


def streams(plan: Plan) -> str:
    """The width and the depth of each residual stream."""
    return "; ".join(f"width d = {s.width}, S = {len(s.sublayers)} sub-layers" for s in plan.streams)


def parts(plan: Plan) -> Iterator[str]:
    """A line for each part of a model of several modalities: what it is, and what becomes of it."""
    for part in plan.parts:
        more = f" and {len(part.modules) - 2} more" if part.modules[2:] else ""
        where = f" ({', '.join(part.modules[:2])}{more})"
        yield f"{part.part}: {part.weights}: {part.tensors} tensors, {part.elements:,} values{where}"


def changes(plan: Plan, quote: str = "") -> Iterator[str]:
    """A line for each change of structure, for all parameters that get equal values, and for the rest.

    Args:
        quote: stands on both sides of every name.
    """
    alike: dict[str, list[str]] = {}
    for edit in plan.edits:
        _, name = edit.target
        if isinstance(edit, ValueEdit):
            alike.setdefault(edit.words, []).append(name)
        else:
            yield f"{quote}{name}{quote}: {edit.words}"
    for words, names in alike.items():
        yield f"{words}: {len(names)} parameters, such as {quote}{names[-1]}{quote}"
    others = {skip.target for skip in plan.skips} - plan.written - {*plan.kept}
    yield f"{len(others)} other tensors: " + (
        "by the architecture's own initialiser" if plan.reinit == "all" else "kept as learned"
    )
    if plan.kept:
        yield f"{len(plan.kept)} tensors of towers: kept as they are"
