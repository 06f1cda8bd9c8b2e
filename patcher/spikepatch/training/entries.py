"""What MODEL means: ``[NAME=]SOURCE[@RECIPE]`` -> a model in memory, ready to be trained."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Unpack

import torch

from spikepatch.apply.generated.patched_source import check_known, check_replaced, load_as_it_is, load_unpatched
from spikepatch.apply.live.patch import patch
from spikepatch.data.tokenizing import Tokenizing, of_given_ids, of_source, shared
from spikepatch.errors import Refused
from spikepatch.plans.plan import Plan, Recipe
from spikepatch.preflight.values import fresh
from spikepatch.quiet import quiet
from spikepatch.recipes import built_in
from spikepatch.recipes.plan_of import Mapped, map_source, plan_on
from spikepatch.recipes.request import Options, Request, parse_requests
from spikepatch.source.local import local_path
from spikepatch.source.match import match_source
from spikepatch.source.open import Source, build_meta, open_source
from spikepatch.source.private import from_config
from spikepatch.training.folder import DATA, RECORD
from spikepatch.training.run_identity import TrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

#: What else lies in the folder of a run.
_TAKEN = (DATA, RECORD, "verdict.json", "report.html")


@dataclass(frozen=True)
class Entry:
    """A model that is to be trained: as every record names it, its source, and what is to be made of it in memory."""

    model: TrainedModel
    source: Source
    request: Request | None

    @property
    def name(self) -> str:
        return self.model.name

    @functools.cached_property
    def mapped(self) -> Mapped:
        """What its plans, of whatever seed, are worked out on."""
        return map_source(self.source)

    def plan(self, seed: int) -> Plan | None:
        """What the recipe asks for; None without one."""
        if self.request is None:
            return None
        found = plan_on(self.mapped, replace(self.request, seed=seed))
        return replace(found, source=self.source.short_name)


def parse_entries(
    arguments: Sequence[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    commits: Mapping[str, str | None] = MappingProxyType({}),
    **options: Unpack[Options],
) -> tuple[Entry, ...]:
    """What the arguments MODEL stand for; each source is found and checked once, and no weight is read.

    An argument is ``SOURCE``, ``NAME=SOURCE``, ``SOURCE@RECIPE`` or ``NAME=SOURCE@RECIPE``. The default name is the
    last part of the source's, with the recipe's: ``arch:gpt2@embed-ln`` is ``gpt2-embed-ln``.

    Args:
        revision, trust_remote_code: of the sources.
        commits: source -> the commit that it stands for, where that is known already.
        options: of the recipes; see ``parse_requests``.

    Raises:
        BadSource: a source is missing or malformed.
        Refused: a source is not trusted or is no causal language model, there is no such recipe, or two models have the
            same name.
    """
    models = [(argument, *split(argument)) for argument in arguments]
    recipes = {recipe: argument for argument, _, _, recipe in reversed(models) if recipe is not None}
    requests = {str(r.given): r for r in parse_requests([*recipes], recipes, reinit="all", **options)}
    sources: dict[str, Source] = {}
    entries: dict[str, Entry] = {}
    for argument, name, spec, recipe in models:
        if spec not in sources:
            at = commits.get(spec) or revision
            sources[spec] = open_source(spec, revision=at, trust_remote_code=trust_remote_code, weights=True)
            _check_causal(sources[spec])
            check_known(sources[spec])
        if name in entries:
            raise Refused(
                what=f"two models have the name {name!r}",
                where=argument,
                why="each has a folder of its own under --out",
                remedy=f"name one of them: NAME={argument}",
            )
        source, request = sources[spec], requests[recipe] if recipe is not None else None
        if request is not None and source.checkpoint is not None:
            request = replace(request, reinit="none")
        model = TrainedModel(name, spec, recipe, _is_patched(source, request))
        entries[name] = Entry(model, source, request)
    return tuple(entries.values())


def tokenizer_of(entries: Sequence[Entry], *, for_text: bool = True) -> Tokenizing:
    """The one tokenizer of all models: what lies in their folders; bytes, where none of them has one.

    Args:
        for_text: else the data are token ids, and all that counts is which ids the models have.

    Raises:
        BadSource: a tokenizer cannot be used.
        Refused: the models have different ones, or one has a vocabulary that is too small.
    """
    of = of_source if for_text else of_given_ids
    return shared([(entry.name, of(entry.source, entry.name)) for entry in entries])


def build(entry: Entry, *, seed: int) -> PreTrainedModel:
    """The model, on the CPU, with weights in float32 and in training mode.

    A source with weights keeps them, and a recipe is planned with ``reinit="none"``. One without is initialised afresh:
    by the recipe with ``reinit="all"``, or by the architecture's own initialiser. The weights are, bit for bit, those
    that ``convert(..., dtype="float32")`` writes for the same recipe and seed; they do not depend on torch's generator.
    A folder that is patched already keeps its patch, or gets the recipe's in place of it.

    Args:
        seed: of every random weight.

    Raises:
        SpikepatchError: the source cannot be read, or the recipe does not apply to it.
    """
    plan = entry.plan(seed)
    made = _learned(entry.source, plan) if entry.source.checkpoint is not None else _fresh(entry, plan, seed)
    model: PreTrainedModel = made.train()
    return model


def check_causal(model: PreTrainedModel, name: str, length: int) -> None:
    """Refuse a model whose logits depend on later tokens: measured, since ``AutoModelForCausalLM`` loads encoders too.

    One forward pass of two sequences that differ in their second half; of 16 tokens, or of ``length`` if that is less.

    Raises:
        Refused: the logits of the first half differ by more than rounding, sqrt(eps) of the largest of them; or it does
            not run on token ids alone.
    """
    try:
        first, second = _beginnings(model, min(16, length))
    except Exception as error:  # whatever its own forward pass raises
        raise Refused(
            what="it does not run on token ids alone",
            where=name,
            why=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            remedy="give a language model of text",
        ) from error
    change = (first - second).abs().max()
    if change > torch.finfo(torch.float32).eps ** 0.5 * first.abs().max():
        raise Refused(
            what="it reads later tokens",
            where=name,
            why=f"logits change by up to {change:.2g} with tokens that come after them, so that predicting the next"
            " token is no task for it",
            remedy="give a causal model; some architectures become one by a setting of their config, as BERT's does by"
            " is_decoder",
        )


@torch.no_grad()
def _beginnings(model: PreTrainedModel, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the first half of two sequences with the same first half."""
    embedding: Any = model.get_input_embeddings()
    rows = torch.randint(embedding.num_embeddings, (2, length), generator=torch.Generator().manual_seed(0))
    rows[1, : length // 2] = rows[0, : length // 2]
    training = model.training
    try:
        with quiet():
            first, second = model.eval()(input_ids=rows).logits[:, : length // 2].float()
    finally:
        model.train(training)
    return first, second


def _learned(source: Source, plan: Plan | None) -> Any:
    if plan is None:
        match_source(source, build_meta(source))  # names every tensor that is missing or misshapen
        source.fetch_weights()
        return load_as_it_is(source)
    source.fetch_weights()
    check_replaced(source, plan)
    return patch(load_unpatched(source), plan)


def _fresh(entry: Entry, plan: Plan | None, seed: int) -> Any:
    source = entry.source
    if source.patched is not None and plan is None:
        raise Refused(
            what="it is patched, and has no weights",
            where=source.name,
            why="its config records a patch, which is made together with the weights",
            remedy=f"{entry.name}={source.name}@{source.patched.recipe} draws them afresh",
        )
    config: Any = copy.deepcopy(source.config)
    config.dtype = torch.float32
    # A constructor that draws a buffer draws the same one every time; all parameters are written after it.
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = from_config(source.model_class, config)
    model.float()
    if plan is not None:
        return patch(model, plan)
    weight = fresh(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name))
    return model


def split(argument: str) -> tuple[str, str, str | None]:
    """Name, source and recipe. A path that exists is a source as it stands, whatever characters it has."""
    name, equals, rest = argument.partition("=")
    named = bool(equals) and not local_path(argument).exists() and "/" not in name
    spec = rest if named else argument
    recipe = None
    if not local_path(spec).exists():
        source, at, after = spec.rpartition("@")
        spec, recipe = (source, after) if at else (spec, None)
    if not named:
        last = local_path(spec.removeprefix("arch:"))
        parts = [last.name or last.resolve().name, *([Path(recipe).name.removesuffix(".toml")] if recipe else [])]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._")
    if _NAME.fullmatch(name) is None or name in _TAKEN:
        raise Refused(
            what=f"{name!r} cannot be the name of a model",
            where=argument,
            why="that is another file of the run" if name in _TAKEN else "its folder under --out is called so",
            remedy=f"give one of letters, digits, . _ and -: NAME={spec}" + (f"@{recipe}" if recipe else ""),
        )
    return name, spec, recipe


def _check_causal(source: Source) -> None:
    if source.auto_class != "AutoModelForCausalLM":
        raise Refused(
            what="it is no causal language model",
            where=source.name,
            why=f"{source.model_class.__name__} is loaded by {source.auto_class}; what is trained is the prediction of"
            " the next token",
            remedy="give a model that AutoModelForCausalLM loads",
        )


def _is_patched(source: Source, request: Request | None) -> bool:
    if request is not None:
        known: Recipe | None = request.base
    else:
        if source.patched is None:
            return False
        known = built_in.RECIPES.get(source.patched.recipe)
    return known is None or (known.small_sublayers is not False and known.large_shortcut is not False)
