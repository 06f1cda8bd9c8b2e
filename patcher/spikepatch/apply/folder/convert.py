"""``convert(source, out)``: a model in, a patched checkpoint folder out."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikepatch.apply.disk.manifest import MANIFEST, command_line, manifest, python_line
from spikepatch.apply.disk.publish import check_local_target, check_space, check_target, publishing, unwritable
from spikepatch.apply.disk.write import check_shard_size, parse_dtype, write_text
from spikepatch.apply.folder import notes
from spikepatch.apply.folder.conversion import Conversion, noted, with_casts, with_drift
from spikepatch.apply.folder.drift import drift_planned, drift_written, expected_initial_loss
from spikepatch.apply.folder.load_test import Wanted, check_loads, fits, outcome
from spikepatch.apply.folder.loader import Loader, loader
from spikepatch.apply.folder.routes import Route, Storage, check_storage, choose
from spikepatch.apply.folder.shards import Shards, plan_shards, write_folder
from spikepatch.apply.folder.small_twin import try_small
from spikepatch.apply.folder.texts import texts
from spikepatch.apply.generated.adopt import generated_classes
from spikepatch.apply.generated.patched_source import check_known, check_replaced
from spikepatch.apply.generated.structure import restructure
from spikepatch.apply.values.loading import stable_settings
from spikepatch.apply.values.numbers import absolute_maximum, check_numbers
from spikepatch.plans import in_words
from spikepatch.plans.plan import ModelPart, Plan, Recipe, Reinit, ScaleEmbedding
from spikepatch.progress import Progress, silent
from spikepatch.recipes import built_in
from spikepatch.recipes.plan_of import Mapped, check_weights, map_asked, plan_on
from spikepatch.recipes.request import Request, parse_request
from spikepatch.source.classes import original_in
from spikepatch.source.header import torch_dtype
from spikepatch.source.local import target_path, without_place
from spikepatch.source.match import Match
from spikepatch.source.meta import settings_read
from spikepatch.source.open import Source, build_meta, open_source
from spikepatch.source.pieces import pieces
from spikepatch.source.tied import first_names
from spikepatch.source.tokenizer import has_tokenizer

_log = logging.getLogger(__name__)


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
    request = parse_request(
        recipe, reinit=reinit, seed=seed, factor=factor, positions=positions, replace=replace, untie=untie, part=part
    )
    check_storage(storage)
    check_shard_size(max_shard_size)
    stored = None if dtype is None else parse_dtype(dtype)
    folder, report = target_path(out), progress or silent
    # Before anything is fetched, and again once it is known where in the cache a hub id lies.
    check_local_target(folder, source, overwrite=overwrite)
    kept = reinit != "all"
    with loader(load_test and not dry_run) as process:
        report("reading the source")
        found = open_source(
            source,
            revision=revision,
            trust_remote_code=trust_remote_code,
            weights=kept,
            learned=kept,
            report=report,
        )
        check_target(folder, found.folder, overwrite=overwrite)
        check_weights(found, reinit)
        check_known(found)
        found = dataclasses.replace(found, config=_with_dtype(found, stored))
        job = _job(found, request, storage, stored, max_shard_size, example_inputs, report)
        result = _result(job, folder)
        if result.discards:
            _log.warning("%s", result.discards)
        if dry_run:
            return _tried(job, result, report)
        for line in in_words.parts(job.plan) if reinit != "none" else ():
            _log.warning("%s", line)
        options = {"reinit": reinit, **request.options, "storage": storage, "seed": seed, "dtype": dtype}
        options |= {"max_shard_size": max_shard_size, "revision": revision, "trust_remote_code": trust_remote_code}
        options |= {"allow_nonfinite": allow_nonfinite, "example_inputs": example_inputs}
        command = _command(source, request, options, load_test=load_test)
        try:
            with publishing(folder, overwrite=overwrite) as scratch:
                return _written(
                    job, result, scratch, process, command, report, unsound=allow_nonfinite, load_test=load_test
                )
        except OSError as error:
            raise unwritable(folder, error) from error


@dataclass(frozen=True)
class _Job:
    """All that is worked out before the first byte is written. ``patched``: the structure that the plan makes."""

    source: Source
    request: Request
    mapped: Mapped
    plan: Plan
    patched: Any
    route: Route
    settings: Mapping[str, Any]
    shards: Shards
    texts: Mapping[str, str]

    @property
    def trust(self) -> bool:
        return self.route.kind == "code" or self.source.needs_code


def _job(
    source: Source,
    request: Request,
    storage: Storage,
    dtype: torch.dtype | None,
    max_shard_size: str | int | None,
    example_inputs: str | None,
    report: Progress,
) -> _Job:
    report("mapping the residual stream")
    with settings_read() as read:
        mapped = map_asked(source, request, example_inputs)
    source = mapped.source or source
    plan = plan_on(mapped, request)
    check_replaced(source, plan)
    report("choosing how it is stored")
    patched = build_meta(source)
    restructure(patched, plan)
    route = choose(source, plan, patched, storage, read=read)
    settings = stable_settings(mapped.model, plan) if route.kind != "code" else {}
    shards = plan_shards(
        plan, patched, checkpoint=source.checkpoint, match=mapped.match, dtype=dtype, max_shard_size=max_shard_size
    )
    _check_numbers(plan, shards, mapped.match, patched)
    files = texts(source, plan, route, settings, trust=route.kind == "code" or source.needs_code)
    return _Job(source, request, mapped, plan, patched, route, settings, shards, files)


def _result(job: _Job, folder: Path) -> Conversion:
    """The conversion as far as it is known before anything is written."""
    source, plan, residual = job.source, job.plan, job.mapped.residual
    vocabulary = getattr(source.config.get_text_config(), "vocab_size", None)
    log_vocab = math.log(vocabulary) if vocabulary else None
    expected_loss = expected_initial_loss(plan, residual) if plan.reinit == "all" else None
    return Conversion(
        out=folder,
        plan=plan,
        residual=residual,
        storage=job.route.kind,
        trust=job.trust,
        auto_class=source.auto_class,
        dtype=str(source.config.dtype).removeprefix("torch."),
        parameters=job.shards.elements,
        bytes=job.shards.bytes,
        expected_loss=expected_loss,
        log_vocab=log_vocab,
        discards=notes.unused(source.name) if source.has_weights and plan.reinit == "all" and not plan.kept else "",
        notes=(
            *notes.whose_weights(source, plan),
            notes.how_it_loads(plan, job.route, trust=job.trust),
            *notes.others(job.settings, job.mapped.match, expected_loss, log_vocab),
        ),
    )


def _tried(job: _Job, result: Conversion, report: Progress) -> Conversion:
    """What a dry run says; whatever would be refused is refused."""
    for name in job.shards.fresh:
        job.shards.produce(name)
    if job.plan.reinit == "all":
        return result
    report("measuring the loss over factors")
    drift = drift_planned(job.source, job.mapped.residual, job.plan, job.mapped.embedding_stds)
    return with_drift(result, drift)


def _written(
    job: _Job,
    result: Conversion,
    scratch: Path,
    process: Loader | None,
    command: str,
    report: Progress,
    *,
    unsound: bool,
    load_test: bool,
) -> Conversion:
    """Write the folder, and try what was written."""
    source, plan, route = job.source, job.plan, job.route
    model_class: Any = generated_classes(original_in(source)).model if route.kind == "code" else route.model_class
    wanted = Wanted(job.patched, model_class.__name__, source.auto_class, job.trust, unsound=unsound)
    check_space(result.out, job.shards.bytes, source.checkpoint)
    written, origin = write_folder(scratch, job.shards, job.texts, source, report, allow_nonfinite=unsound)
    if process is not None:
        report("loading what was written")
        check_loads(process, scratch, wanted, tokenizer=has_tokenizer(source.copied_files), out=result.out)
    test = outcome(process, wanted, lambda: try_small(source, fits, partial(_convert_small, job)))
    write_text(scratch / MANIFEST, manifest(plan, route.kind, origin, command, written.hashes, test))
    result = noted(with_casts(result, written), *notes.load_test(test, asked=load_test))
    if plan.reinit == "all":
        return result
    report("measuring the loss before and after")
    return with_drift(result, drift_written(source, job.mapped.residual, scratch, model_class))


def _convert_small(job: _Job, folder: str, out: Path) -> Conversion:
    """The same of a small folder without weights, with the factor that was worked out from the large one's."""
    scaled = [edit.factor for edit in job.plan.select(ScaleEmbedding)] if job.plan.reinit != "all" else []
    factor = {"factor": scaled[0]} if scaled and job.request.factor is None else {}
    options: dict[str, Any] = {"seed": job.plan.seed, "example_inputs": job.mapped.example, "storage": job.route.kind}
    options |= job.request.options | factor
    return convert(folder, out, recipe=job.request.base, trust_remote_code=job.source.needs_code, **options)


def _command(source: str, request: Request, options: Mapping[str, Any], *, load_test: bool) -> str:
    """What writes the folder again: a command, or Python for a recipe that has no name."""
    name = request.given if isinstance(request.given, str) else request.base.name
    if isinstance(request.given, str) or request.base == built_in.RECIPES.get(name):
        words = ("convert", without_place(source), "OUT")
        return command_line(words, recipe=without_place(name), **options, no_load_test=not load_test)
    return python_line(source, request.base, options)


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
