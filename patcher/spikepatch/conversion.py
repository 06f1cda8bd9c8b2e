"""``convert(source, out)``: a model in, a patched checkpoint folder out."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from spikepatch import __version__, recipes
from spikepatch.apply.generated import generated_classes
from spikepatch.apply.kept import Match, embedding_stds, match_source
from spikepatch.apply.loading import stable_settings
from spikepatch.apply.shards import Shards, check_shards, plan_shards
from spikepatch.apply.source_code import config_entries, original_of, render
from spikepatch.drift import Drift, expected_initial_loss, measure_drift, tokenizer_problem
from spikepatch.errors import BadTarget, Refused
from spikepatch.planner import make_plan
from spikepatch.planning import check_weights, checked_recipe, tensor_shapes
from spikepatch.plans import Plan, Recipe, Reinit, Untie
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.source import MODEL_CARD, Source, build_meta, open_source
from spikepatch.storage.header import DTYPES
from spikepatch.storage.manifest import MANIFEST, file_hash, fingerprint, inherited_metadata, manifest, model_card
from spikepatch.storage.publish import check_target, publishing
from spikepatch.storage.write import Planned, split, write_checkpoint, write_text

Storage = Literal["auto", "plain", "code"]
Route = Literal["plain", "code"]


class Progress(Protocol):
    """Told what is going on: a step's name, how much of it is done, how much there is (bytes; 0: not known)."""

    def __call__(self, step: str, done: int = 0, total: int = 0) -> None: ...


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        out: the folder; nothing is there after a dry run.
        storage: ``plain`` (the source's own architecture) or ``code`` (a generated subclass).
        auto_class: the class of transformers that loads it.
        parameters: number of elements written.
        bytes: of the weights.
        expected_loss: estimated initial loss where it is far from log V; see ``expected_initial_loss``.
        log_vocab: log V, the loss of a uniform guess.
        loss_before, loss_after: on the sample text, for learned weights; None where not measured.
        kl: of the two models' predictions on it, KL(before || after) per token.
        notes: what the user should know, one sentence each; the first says whose the weights are.
    """

    out: Path
    plan: Plan
    residual: ResidualMap
    storage: Route
    auto_class: str
    dtype: str
    parameters: int
    bytes: int
    expected_loss: float | None
    log_vocab: float | None
    notes: tuple[str, ...]
    loss_before: float | None = None
    loss_after: float | None = None
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {"out": str(self.out), "plan": self.plan.to_dict(), "residual": dataclasses.asdict(self.residual)}


def convert(
    source: str,
    out: str | os.PathLike[str],
    *,
    recipe: str | Recipe = recipes.DEFAULT,
    reinit: Reinit = "all",
    factor: float | None = None,
    positions: bool = False,
    replace: bool = False,
    untie: bool = False,
    storage: Storage = "auto",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Read SOURCE, plan, and write a patched checkpoint to ``out``, which appears whole or not at all.

    Args:
        source: a hub id, a folder, or ``arch:TYPE``; never written to.
        out: absent or empty, unless ``overwrite``.
        recipe, reinit, factor, positions, replace, untie, seed: as in ``spikepatch.plan``.
        storage: ``plain`` keeps the architecture (re-initialisation only), ``code`` writes a subclass beside the
            weights, ``auto`` takes plain where that is enough.
        dtype: of the float weights, as torch names it; by default the source's, else float32.
        max_shard_size: such as "5GB"; by default the source's own shards for kept weights, 5 GB for fresh ones.
        revision, trust_remote_code: of a hub id, of a source with its own code.
        overwrite: replace a folder at ``out``.
        dry_run: plan and check everything, write nothing.
        progress: told of long steps.

    Raises:
        SpikepatchError: nothing is at ``out``, or what was there before.
    """
    report: Progress = progress or (lambda step, done=0, total=0: None)
    asked_for = recipe if isinstance(recipe, str) else recipe.name
    recipe = checked_recipe(
        recipe, reinit=reinit, seed=seed, factor=factor, positions=positions, replace=replace, untie=untie
    )
    _check_storage(storage, max_shard_size)
    asked = None if dtype is None else _parse_dtype(dtype)
    folder, local = Path(out), Path(source).expanduser()
    # Before anything is fetched, and again once it is known where in the cache a hub id lies.
    check_target(folder, local if local.is_dir() else None, overwrite=overwrite)
    report("reading the source")
    found = open_source(source, revision=revision, trust_remote_code=trust_remote_code, weights=reinit != "all")
    check_target(folder, found.folder, overwrite=overwrite)
    check_weights(found, reinit)
    _check_source(found)
    found = dataclasses.replace(found, config=_with_dtype(found, asked))

    report("mapping the residual stream")
    model = build_meta(found)
    residual = inspect(model, source=source)
    match = None if reinit == "all" else match_source(found, model)
    stds = None if match is None else embedding_stds(match, residual)
    plan = make_plan(residual, tensor_shapes(model), recipe, reinit=reinit, seed=seed, embedding_stds=stds)
    route = _route(plan, storage)
    settings = stable_settings(model, plan) if route == "plain" else {}
    shards = plan_shards(
        plan, model, checkpoint=found.checkpoint, match=match, dtype=asked, max_shard_size=max_shard_size
    )
    texts = _texts(found, plan, route, settings)
    vocabulary = getattr(found.config.get_text_config(), "vocab_size", None)
    result = Conversion(
        out=folder,
        plan=plan,
        residual=residual,
        storage=route,
        auto_class=found.auto_class,
        dtype=str(found.config.dtype).removeprefix("torch."),
        parameters=shards.elements,
        bytes=shards.bytes,
        expected_loss=expected_initial_loss(plan, residual) if reinit == "all" else None,
        log_vocab=math.log(vocabulary) if vocabulary else None,
        notes=(),
    )
    result = _noted(result, *_notes(found, result, match, settings))
    if dry_run:
        for name in shards.fresh:
            shards.produce(name)
        return result

    command = _command(
        source,
        recipe=asked_for,
        reinit=reinit,
        factor=factor,
        positions=positions,
        replace=replace,
        untie=untie,
        storage=storage,
        seed=seed,
        dtype=dtype,
        max_shard_size=max_shard_size,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    try:
        with publishing(folder) as scratch:
            hashes = _write(scratch, shards, texts, found, report)
            write_text(scratch / MANIFEST, manifest(plan, route, fingerprint(found), command, hashes))
            report("checking what was written")
            check_shards(scratch, shards)
            return _measured(result, found, scratch, report)
    except OSError as error:
        raise BadTarget(
            "the output cannot be written",
            where=str(folder),
            why=str(error),
            remedy="check the disk's free space and the folder's permissions; nothing was left behind",
        ) from error


def _check_storage(storage: str, max_shard_size: str | int | None) -> None:
    if storage not in get_args(Storage):
        raise Refused(
            what=f"there is no storage route {storage!r}",
            where="--storage",
            why="the routes are " + ", ".join(get_args(Storage)),
            remedy="leave it out for auto",
        )
    try:
        bytes_ = [Planned(name, torch.uint8, (1,)) for name in "ab"]
        if max_shard_size is not None and len(split(bytes_, max_shard_size)) > 1:
            raise ValueError("nothing fits into that")
    except (ValueError, OverflowError) as error:
        raise Refused(
            what=f"{max_shard_size!r} is no shard size",
            where="--max-shard-size",
            why=str(error),
            remedy="a number with a unit, such as 5GB or 500MB",
        ) from error


def _parse_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise Refused(
            what=f"{name!r} is no dtype to store weights in",
            where="--dtype",
            why="weights are stored as float32, bfloat16, float16 or float64",
            remedy="--dtype bfloat16, or leave it out for the source's own",
        )
    return dtype


def _check_source(source: Source) -> None:
    for part in (source.model_class, type(source.config)):
        if not part.__module__.startswith("transformers.models."):
            raise Refused(
                what="models with their own modelling code are not converted yet",
                where=source.name,
                why=f"{part.__name__} comes from {part.__module__}",
                remedy="patch the loaded model in Python with spikepatch.patch",
            )
    record = getattr(source.config, "spikepatch", None)
    if record and record.get("embeddings"):
        raise Refused(
            what="this model is patched already",
            where=source.name,
            why=f"its config records the recipe {record.get('recipe')}",
            remedy="convert its original",
        )


def _with_dtype(source: Source, asked: torch.dtype | None) -> Any:
    """The config with the dtype asked for, its own, the most frequent one of the weights, or float32."""
    config: Any = copy.deepcopy(source.config)
    if asked is not None:
        config.dtype = asked
    elif config.dtype is None:
        stored = [entry.dtype for entry in source.checkpoint.tensors.values()] if source.checkpoint else []
        floats = [kind for kind in stored if kind in {"F64", "F32", "F16", "BF16"}]
        config.dtype = getattr(torch, DTYPES[max(floats, key=floats.count, default="F32")][0])
    return config


def _route(plan: Plan, storage: Storage) -> Route:
    if storage == "plain" and plan.structural:
        raise Refused(
            what="--storage plain cannot hold this recipe",
            where=plan.source,
            why=f"{plan.recipe} changes the forward pass, which the plain {plan.architecture} would leave out silently",
            remedy="use --storage code (or auto), or the recipe vanilla",
        )
    return "code" if storage == "code" or plan.structural else "plain"


def _texts(source: Source, plan: Plan, route: Route, settings: Mapping[str, Any]) -> dict[str, str]:
    """File name -> text of what is written beside the weights: config, code, and the model card."""
    config: Any = copy.deepcopy(source.config)
    for name, value in settings.items():
        setattr(config, name, value)
    if plan.select(Untie):
        config.tie_word_embeddings = False
    config.architectures = [source.model_class.__name__]
    config.spikepatch = plan.record(__version__)
    data = json.loads(config.to_json_string())
    texts = {}
    if route == "code":
        original = original_of(source.model_class, type(source.config))
        tokenizer_class = data.get("tokenizer_class")
        data |= config_entries(original) | ({"tokenizer_class": tokenizer_class} if tokenizer_class else {})
        texts = render(original)
    texts["config.json"] = json.dumps(data, indent=2, sort_keys=True) + "\n"
    texts[MODEL_CARD] = model_card(
        plan,
        route,
        auto_class=source.auto_class,
        title=source.short_name,
        inherited=inherited_metadata(
            source.folder / MODEL_CARD if source.folder else None, source.name if source.kind == "hub" else None
        ),
    )
    return texts


def _write(scratch: Path, shards: Shards, texts: Mapping[str, str], source: Source, report: Progress) -> dict[str, str]:
    """Everything but the manifest; returns file name -> SHA-256."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report("writing weights", done, shards.bytes)

    hashes = write_checkpoint(scratch, shards.tensors, shards.files, shards.produce, advance)
    hashes |= {name: write_text(scratch / name, text) for name, text in texts.items()}
    for path in source.copied_files:
        assert source.folder is not None
        name = path.relative_to(source.folder).as_posix()
        (scratch / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, scratch / name)
        hashes[name] = file_hash(scratch / name)
    return hashes


def _measured(result: Conversion, source: Source, folder: Path, report: Progress) -> Conversion:
    """What the patched model and its tokenizer do differently; ``source.folder`` is None for ``arch:TYPE``."""
    if source.folder is not None and any("tokenizer" in path.name for path in source.copied_files):
        report("comparing the tokenizers")
        problem = tokenizer_problem(source.folder, folder)
        result = _noted(result, *([f"tokenizer: {problem}"] if problem else []))
    if result.plan.reinit == "all":
        return result
    report("measuring the loss before and after")
    model_class: type = source.model_class
    if result.storage == "code":
        model_class = generated_classes(original_of(source.model_class, type(source.config))).model
    drift = measure_drift(source, folder, model_class)
    if not isinstance(drift, Drift):
        return _noted(result, f"the loss before and after is not measured: {drift}")
    head, uniform = result.residual.head, result.log_vocab
    if head is not None and head.tied and uniform is not None and drift.after > 1.1 * uniform:
        result = _noted(
            result,
            f"the loss is above log V = {uniform:.1f} now: the head is tied, so a stream that is mostly the token's own"
            " embedding makes it predict the current token",
        )
    return dataclasses.replace(result, loss_before=drift.before, loss_after=drift.after, kl=drift.kl)


def _noted(result: Conversion, *notes: str) -> Conversion:
    return dataclasses.replace(result, notes=(*result.notes, *notes))


def _notes(source: Source, result: Conversion, match: Match | None, settings: Mapping[str, Any]) -> Iterator[str]:
    reinit, loss, uniform = result.plan.reinit, result.expected_loss, result.log_vocab
    if reinit == "none":
        yield f"learned weights of {source.name}"
    elif reinit == "residual":
        yield (f"learned weights of {source.name}, residual projections drawn afresh: the learned function is lost")
    elif source.has_weights:
        yield f"fresh weights: the learned weights of {source.name} are NOT used; --reinit none keeps them"
    else:
        yield "fresh weights: a model to pre-train"
    if result.storage == "plain":
        yield "loads as the plain architecture; from_config would restore the architecture's own initialisation"
    elif reinit == "all":
        yield "loads with trust_remote_code=True; from_config draws the recipe's stds"
    else:
        yield "loads with trust_remote_code=True; from_config restores the architecture's own initialisation"
    if loss is not None and uniform is not None and loss > 1.1 * uniform:
        yield (
            f"expected initial loss about {loss:.1f}, against log V = {uniform:.1f}: the head is tied, so a"
            " large shortcut makes it predict the current token; --untie gives it its own matrix"
        )
    for name, value in settings.items():
        yield f"config.json sets {name} to {json.dumps(value)}: else transformers rescales the weights when it loads"
    if match is not None and match.unused:
        names = ", ".join(match.unused[:3]) + (" ..." if match.unused[3:] else "")
        yield f"{len(match.unused)} tensors of the source are not part of the architecture and left out: {names}"


def _command(source: str, **options: object) -> str:
    """The command that would write this folder again, with OUT for its path."""
    words = ["spikepatch", "convert", source, "OUT"]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
