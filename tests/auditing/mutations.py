"""One group of parameters of a healthy model is broken; the audit has to name it, and nothing else.

python -m tests.auditing.mutations            all types
python -m tests.auditing.mutations llama t5   these
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import nn

import spikepatch
from spikepatch.quiet import quiet
from spikepatch.residual.map import pattern
from spikepatch.source.private import from_config
from tests.residual.configs import CLASSES, Mapping, model_class, tiny_config_for

Break = Callable[[list[nn.Parameter]], bool]


def _matrix(p: nn.Parameter) -> bool:
    return p.ndim >= 2 and min(p.shape[-1], p.numel() // p.shape[-1]) >= 32


def _scaled(factor: float) -> Break:
    def change(group: list[nn.Parameter]) -> bool:
        for p in group:
            p.mul_(factor)
        return all(map(_matrix, group)) and all(bool(p.any()) for p in group)

    return change


def _one(change: Callable[[nn.Parameter], object], *, at_least: int = 1) -> Break:
    def apply(group: list[nn.Parameter]) -> bool:
        if len(group) < at_least or not all(map(_matrix, group)) or not bool(group[-1].any()):
            return False
        change(group[-1])
        return True

    return apply


def _all(change: Callable[[nn.Parameter], object]) -> Break:
    def apply(group: list[nn.Parameter]) -> bool:
        if not all(map(_matrix, group)) or not bool(group[-1].any()):
            return False
        for p in group:
            change(p)
        return True

    return apply


def _half_copied(p: nn.Parameter) -> None:
    rows = p.view(-1, p.shape[-1])
    rows[len(rows) // 2 : len(rows) // 2 * 2] = rows[: len(rows) // 2].clone()


def _outlier(p: nn.Parameter) -> None:
    p.view(-1)[7] = 60 * p.std()


def _default(p: nn.Parameter) -> None:
    nn.init.uniform_(p, -(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5)


def _nan(p: nn.Parameter) -> None:
    p.view(-1)[3] = math.nan


#: name -> what is done to the matrices of one group.
MATRICES: dict[str, Break] = {
    "group times 3.7": _scaled(3.7),
    "group over 3.3": _scaled(1 / 3.3),
    "one zero": _one(lambda p: p.zero_(), at_least=2),
    "one constant": _one(lambda p: p.fill_(0.02)),
    "one NaN": _one(_nan),
    "one with an outlier": _one(_outlier),
    "half a copy": _one(_half_copied),
    "a tenth zero": _one(lambda p: p.view(-1, p.shape[-1])[: max(2, p.numel() // p.shape[-1] // 10)].zero_()),
    "all tiny": _all(lambda p: p.mul_(1e-5)),
}
#: The same for the gains of one norm in all layers.
GAINS: dict[str, Callable[[nn.Parameter], object]] = {
    "gain drawn": lambda p: p.normal_(0, 0.02),
    "gain 3": lambda p: p.fill_(3.0),
    "gain NaN": _nan,
}


@dataclass(frozen=True)
class Outcome:
    """Of one mutation. ``outside``: parameters that were named and not touched."""

    model: str
    mutation: str
    group: str
    named: bool
    outside: tuple[str, ...]


def outcomes(mapping: Mapping, model_type: str, *, count: int = 10, seed: int = 0) -> Iterator[Outcome]:
    """``count`` mutations of one type, each of a group drawn at random."""
    generator = random.Random(f"{model_type} {seed}")
    model = build(mapping, model_type)
    residual = spikepatch.inspect(model)
    maps = (residual, *residual.streams)
    inner = {m.parameter for each in maps for m in each.matrices if m.kind != "mixer" or m.reads_stream}
    gains = {n.parameter for each in maps for n in each.norms if n.parameter is not None and n.gain != "none"}
    groups: dict[tuple[str, torch.Size], list[str]] = {}
    for name, p in model.named_parameters():
        if name in inner | gains:
            groups.setdefault((pattern(name), p.shape), []).append(name)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = spikepatch.audit(model).findings
    kinds = {(f.name, n) for f in before for n in f.parameters}
    sentences = {(f.what, n) for f in before for n in f.parameters}
    makers = [(name, change, inner) for name, change in MATRICES.items()]
    makers += [(name, _every(change), gains) for name, change in GAINS.items()]
    done = 0
    for _ in range(20 * count):
        if done == count:
            return
        name, change, of = generator.choice(makers)
        fitting = [names for names in groups.values() if set(names) <= of]
        if not fitting:
            continue
        names = generator.choice(fitting)
        with torch.no_grad():
            torch.manual_seed(done)
            applies = change([model.get_parameter(n) for n in names])
            found = spikepatch.audit(model).findings if applies else ()
            model.load_state_dict(state)
        if applies:
            done += 1
            new = {n for f in found for n in f.parameters if (f.what, n) not in sentences}
            outside = {n for f in found for n in f.parameters if (f.name, n) not in kinds} - set(names)
            yield Outcome(model_type, name, names[0], bool(new & set(names)), tuple(sorted(outside)))


def _every(change: Callable[[nn.Parameter], object]) -> Break:
    def apply(group: list[nn.Parameter]) -> bool:
        for p in group:
            change(p)
        return group[0].numel() >= 8

    return apply


def build(mapping: Mapping, model_type: str) -> nn.Module:
    """A tiny model as transformers initialises it."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config_for(model_type, mapping)
        model: nn.Module = from_config(model_class(model_type, mapping), config)
        return model.eval().float()


def main(wanted: list[str]) -> None:
    """Print every miss, and the share."""
    total = missed = outside = models = 0
    for mapping in ("causal", "seq2seq", "masked"):
        for model_type in CLASSES[mapping]:
            if wanted and model_type not in wanted:
                continue
            try:
                found = list(outcomes(mapping, model_type))
            except Exception as error:
                click.echo(f"{model_type}: {type(error).__name__}: {str(error)[:80]}")
                continue
            models += bool(found)
            for each in found:
                total, missed, outside = total + 1, missed + (not each.named), outside + bool(each.outside)
                if not each.named or each.outside:
                    click.echo(
                        f"{each.model}: {each.mutation} of {each.group}: named {each.named}, outside {each.outside[:3]}"
                    )
            sys.stdout.flush()
    click.echo(f"{models} types, {total} mutations: {missed} not named, {outside} named something else")


if __name__ == "__main__":
    main(sys.argv[1:])
