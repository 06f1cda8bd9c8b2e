"""``convert(source, out)``: a model in, a patched checkpoint folder out."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikepatch.apply.disk.manifest import MANIFEST, command_line, manifest, python_line
from spikepatch.apply.disk.publish import check_local_target, check_space, check_target, publishing, unwritable
from spikepatch.apply.disk.write import Written, check_shard_size, parse_dtype, write_text
from spikepatch.apply.folder import notes
from spikepatch.apply.folder.drift import Behaviour, drift_planned, drift_written, expected_initial_loss
from spikepatch.apply.folder.load_test import Wanted, check_loads, fits, outcome
from spikepatch.apply.folder.loader import Loader, loader
from spikepatch.apply.folder.routes import RouteKind, Storage, check_storage, choose
from spikepatch.apply.folder.shards import Shards, plan_shards, write_folder
from spikepatch.apply.folder.small_twin import try_small
from spikepatch.apply.folder.texts import texts
from spikepatch.apply.generated.adopt import generated_classes
from spikepatch.apply.generated.patched_source import check_known, check_replaced
from spikepatch.apply.generated.structure import restructure
from spikepatch.apply.values.loading import stable_settings
from spikepatch.apply.values.numbers import absolute_maximum, check_numbers
from spikepatch.plans.plan import ModelPart, Plan, Recipe, Reinit, ScaleEmbedding
from spikepatch.progress import Progress, silent
from spikepatch.recipes import built_in
from spikepatch.recipes.built_in import checked_recipe
from spikepatch.recipes.plan_of import check_weights, embedding_stds, plan_on
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.source.classes import original_in
from spikepatch.source.header import torch_dtype
from spikepatch.source.match import Match, match_source
from spikepatch.source.meta import settings_read
from spikepatch.source.open import Source, build_meta, open_source
from spikepatch.source.pieces import pieces
from spikepatch.source.tied import first_names
from spikepatch.source.tokenizer import has_tokenizer


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        out: the folder; nothing is there after a dry run.
        plan, residual: every edit and skip, and the proven map that they were planned on.
        storage: how it is stored; see ``routes.py``.
        trust: it loads with ``trust_remote_code=True`` only.
        auto_class: the class of transformers that loads it.
        dtype: of the float weights.
        parameters: number of elements written.
        bytes: of the weights.
        expected_loss: estimated initial loss where it is far from log V; see ``expected_initial_loss``.
        log_vocab: log V, the loss of a uniform guess.
        notes: what the user should know, one sentence each; the first says whose the weights are.
        casts: tensor name -> how many learned values overflowed and underflowed in the dtype asked for, where any did.
        drift: for learned weights, what the source does on a sample text and what the written model does; after a dry
            run, what the source would do with other factors. Empty where not measured.
    """

    out: Path
    plan: Plan
    residual: ResidualMap
    storage: RouteKind
    trust: bool
    auto_class: str
    dtype: str
    parameters: int
    bytes: int
    expected_loss: float | None
    log_vocab: float | None
    notes: tuple[str, ...]
    casts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    drift: tuple[Behaviour, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        return dataclasses.asdict(self) | {"out": str(self.out), "plan": self.plan.to_dict()}


def convert(
    source: str,
    out: str | os.PathLike[str],
    *,
    recipe: str | Recipe = built_in.DEFAULT,
    reinit: Reinit = "all",
    factor: float | None = None,
    positions: bool = False,
    replace: bool = False,
    untie: bool = False,
    part: ModelPart | None = None,
    storage: Storage = "auto",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_nonfinite: bool = False,
    example_inputs: str | None = None,
    overwrite: bool = False,
    load_test: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Read SOURCE, plan, and write a patched checkpoint to ``out``, which appears whole or not at all.

    Args:
        source: a hub id, a folder, or ``arch:TYPE``; never written to. A folder that is patched already is taken for
            the model that it was made from: the new plan takes the old one's place, nothing is applied twice.
        out: absent or empty, unless ``overwrite``.
        recipe, reinit, factor, positions, replace, untie, part, seed: as in ``spikepatch.plan``.
        storage: ``plain`` keeps the architecture (re-initialisation only), ``native`` uses a setting of its config,
            ``host`` another architecture with the same tensors, ``code`` writes a subclass beside the weights;
            ``auto`` takes the first possible one of plain, native and code.
        dtype: of the float weights, as torch names it; by default the source's, else float32.
        max_shard_size: such as "5GB"; by default the source's own shards for kept weights, 5 GB for fresh ones.
        revision, trust_remote_code: of a hub id, of a source with its own code.
        allow_nonfinite: keep learned weights that are NaN or infinite, instead of refusing them.
        example_inputs: ``module:NAME``, as in ``spikepatch.inspect``.
        overwrite: replace a folder at ``out``.
        load_test: before the folder appears, let a fresh process without spikepatch load it, and compare with the model
            that was meant; see ``load_test.py``.
        dry_run: plan and check everything, write nothing; with learned weights, compare embedding factors.
        progress: told of long steps.

    Raises:
        SpikepatchError: nothing is at ``out``, or what was there before.
    """
    asked: dict[str, Any] = dict(locals())
    with loader(load_test and not dry_run) as process:
        return _convert(**asked, process=process)


def _convert(
    source: str,
    out: str | os.PathLike[str],
    recipe: str | Recipe,
    reinit: Reinit,
    factor: float | None,
    positions: bool,
    replace: bool,
    untie: bool,
    part: ModelPart | None,
    storage: Storage,
    seed: int,
    dtype: str | None,
    max_shard_size: str | int | None,
    revision: str | None,
    trust_remote_code: bool,
    allow_nonfinite: bool,
    example_inputs: str | None,
    overwrite: bool,
    load_test: bool,
    dry_run: bool,
    progress: Progress | None,
    process: Loader | None,
) -> Conversion:
    report: Progress = progress or silent
    given = recipe
    recipe = checked_recipe(
        recipe, reinit=reinit, seed=seed, factor=factor, positions=positions, replace=replace, untie=untie
    )
    check_storage(storage)
    check_shard_size(max_shard_size)
    asked = None if dtype is None else parse_dtype(dtype)
    folder = Path(out)
    # Before anything is fetched, and again once it is known where in the cache a hub id lies.
    check_local_target(folder, source, overwrite=overwrite)
    report("reading the source")
    found = open_source(
        source,
        revision=revision,
        trust_remote_code=trust_remote_code,
        weights=reinit != "all",
        learned=reinit != "all",
        report=report,
    )
    check_target(folder, found.folder, overwrite=overwrite)
    check_weights(found, reinit)
    check_known(found)
    found = dataclasses.replace(found, config=_with_dtype(found, asked))

    report("mapping the residual stream")
    with settings_read() as read:
        model = build_meta(found)
        residual = inspect(model, example_inputs=example_inputs, source=source)
    match = None if reinit == "all" else match_source(found, model)
    stds = {} if match is None else embedding_stds(found, match, residual)
    plan = plan_on(model, residual, recipe, reinit=reinit, seed=seed, stds=stds, part=part, example=example_inputs)
    check_replaced(found, plan)
    report("choosing how it is stored")
    patched = build_meta(found)
    restructure(patched, plan)
    route = choose(found, plan, patched, storage, read=read)
    trust = route.kind == "code" or found.needs_code
    settings = stable_settings(model, plan) if route.kind != "code" else {}
    shards = plan_shards(
        plan, model, checkpoint=found.checkpoint, match=match, dtype=asked, max_shard_size=max_shard_size
    )
    _check_numbers(plan, shards, match, patched)
    files = texts(found, plan, route, settings, trust=trust)
    vocabulary = getattr(found.config.get_text_config(), "vocab_size", None)
    log_vocab = math.log(vocabulary) if vocabulary else None
    expected_loss = expected_initial_loss(plan, residual) if reinit == "all" else None
    result = Conversion(
        out=folder,
        plan=plan,
        residual=residual,
        storage=route.kind,
        trust=trust,
        auto_class=found.auto_class,
        dtype=str(found.config.dtype).removeprefix("torch."),
        parameters=shards.elements,
        bytes=shards.bytes,
        expected_loss=expected_loss,
        log_vocab=log_vocab,
        notes=(
            *notes.whose_weights(found, plan),
            notes.how_it_loads(plan, route, trust=trust),
            *notes.others(settings, match, expected_loss, log_vocab),
        ),
    )
    if dry_run:
        for name in shards.fresh:
            shards.produce(name)
        if reinit == "all":
            return result
        report("measuring the loss over factors")
        return _with_drift(result, drift_planned(found, residual, plan, stds))

    options = {
        "reinit": reinit,
        "factor": factor,
        "positions": positions,
        "replace": replace,
        "untie": untie,
        "part": part,
        "storage": storage,
        "seed": seed,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "allow_nonfinite": allow_nonfinite,
        "example_inputs": example_inputs,
    }
    model_class = generated_classes(original_in(found)).model if route.kind == "code" else route.model_class
    scaled = [edit.factor for edit in plan.select(ScaleEmbedding)]

    def small(folder: str, target: Path) -> object:
        own: dict[str, Any] = {"positions": positions, "replace": replace, "untie": untie, "dtype": dtype, "seed": seed}
        own["factor"] = factor if factor is not None or reinit == "all" or not scaled else scaled[0]
        own |= {"storage": route.kind, "part": part, "example_inputs": example_inputs}
        return convert(folder, target, recipe=given, trust_remote_code=trust_remote_code, **own)

    wanted = Wanted(patched, model_class.__name__, found.auto_class, trust, unsound=allow_nonfinite)
    if isinstance(given, str) or given == built_in.RECIPES.get(given.name):
        named = given if isinstance(given, str) else given.name
        command = command_line("convert", source, recipe=named, **options, no_load_test=not load_test)
    else:
        command = python_line(source, given, options)
    try:
        with publishing(folder, overwrite=overwrite) as scratch:
            check_space(folder, shards.bytes, found.checkpoint)
            written, origin = write_folder(scratch, shards, files, found, report, allow_nonfinite=allow_nonfinite)
            if process is not None:
                report("loading what was written")
                check_loads(process, scratch, wanted, tokenizer=has_tokenizer(found.copied_files), out=folder)
            test = outcome(process, wanted, lambda: try_small(found, fits, small))
            write_text(scratch / MANIFEST, manifest(plan, route.kind, origin, command, written.hashes, test))
            result = _noted(_with_casts(result, written), *notes.load_test(test, asked=load_test))
            if reinit == "all":
                return result
            report("measuring the loss before and after")
            return _with_drift(result, drift_written(found, residual, scratch, model_class))
    except OSError as error:
        raise unwritable(folder, error) from error


def _check_numbers(plan: Plan, shards: Shards, match: Match | None, model: nn.Module) -> None:
    stored = {tensor.name: tensor.dtype for tensor in shards.tensors}
    tables = dict(model.named_parameters(remove_duplicate=False))
    first = first_names(model)

    def of(name: str) -> str:
        return first.get(name, name)

    names = {*plan.written, *(f"{edit.module}.weight" for edit in plan.select(ScaleEmbedding))}
    dtypes = {name: stored.get(of(name), tables[name].dtype) for name in names if name in tables}

    def largest(name: str) -> float:
        entry = None if match is None else match.owners.get(of(name))
        return 0.0 if entry is None else absolute_maximum(pieces(entry))

    check_numbers(plan, dtypes, largest)


def _with_dtype(source: Source, asked: torch.dtype | None) -> Any:
    """The config with the dtype asked for, its own, the most frequent one of the weights, or float32."""
    config: Any = copy.deepcopy(source.config)
    if asked is not None:
        config.dtype = asked
    elif config.dtype is None:
        stored = [entry.dtype for entry in source.checkpoint.tensors.values()] if source.checkpoint else []
        floats = [kind for kind in stored if kind in {"F64", "F32", "F16", "BF16"}]
        config.dtype = torch_dtype(max(floats, key=floats.count, default="F32"))
    return config


def _with_drift(result: Conversion, drift: tuple[Behaviour, ...] | str) -> Conversion:
    if isinstance(drift, str):
        return _noted(result, f"what the patch does to the loss is not measured: {drift}")
    head, uniform, last = result.residual.head, result.log_vocab, drift[-1]
    above = uniform is not None and last.model == "written" and last.loss > 1.1 * uniform
    if above and head is not None and head.tied:
        result = _noted(
            result,
            f"the loss is above log V = {uniform:.1f} now: the head is tied, so a stream that is mostly the token's own"
            " embedding makes it predict the current token",
        )
    return dataclasses.replace(result, drift=drift)


def _with_casts(result: Conversion, written: Written) -> Conversion:
    casts = {n: {"overflow": t.overflow, "underflow": t.underflow} for n, t in written.tallies.items()}
    casts = {name: counts for name, counts in casts.items() if any(counts.values())}
    result = _noted(result, *notes.unsound_values(written.tallies, result.dtype), *written.notes)
    return dataclasses.replace(result, casts=casts)


def _noted(result: Conversion, *notes: str) -> Conversion:
    return dataclasses.replace(result, notes=(*result.notes, *notes))
