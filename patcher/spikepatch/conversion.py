"""``convert(source, out)``: a model in, a patched checkpoint folder out."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from spikepatch import __version__, recipes
from spikepatch.apply.kept import Match, embedding_std, match_source
from spikepatch.apply.module import restructure
from spikepatch.apply.tensors import Target, layout, values
from spikepatch.errors import BadSource, Refused, SpikepatchError
from spikepatch.planning import check_weights, checked_transforms, tensor_names
from spikepatch.plans import Fill, NormEmbedding, Plan, Reinit, ScaleEmbedding, Untie, make_plan
from spikepatch.residual.inspect import inspect
from spikepatch.residual.map import ResidualMap
from spikepatch.residual.trace import skeleton
from spikepatch.source import Source, build_meta, open_source
from spikepatch.storage.header import DTYPES
from spikepatch.storage.manifest import MANIFEST, file_hash, manifest, model_card
from spikepatch.storage.publish import check_target, publishing
from spikepatch.storage.read import read_checkpoint, read_tensor
from spikepatch.storage.write import Planned, split, write_checkpoint, write_text

Storage = Literal["auto", "plain", "code"]


class Progress(Protocol):
    """Told what is going on: a step's name, how much of it is done, how much there is (bytes)."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        out: the folder; nothing is there after a dry run.
        storage: ``plain`` (the source's own architecture) or ``code`` (a generated subclass).
        parameters: number of elements written.
        bytes: of the weights.
        expected_loss: estimated initial loss where it is far from log V; see ``expected_initial_loss``.
        log_vocab: log V, the loss of a uniform guess.
        loss_before, loss_after: on the sample text, for learned weights; None where not measured.
        notes: what the user should know, one sentence each; the first says whose the weights are.
    """

    out: Path
    plan: Plan
    residual: ResidualMap
    storage: Literal["plain", "code"]
    dtype: str
    parameters: int
    bytes: int
    expected_loss: float | None
    log_vocab: float | None
    loss_before: float | None
    loss_after: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {"out": str(self.out), "plan": self.plan.to_dict(), "residual": dataclasses.asdict(self.residual)}


def convert(
    source: str,
    out: str | os.PathLike[str],
    *,
    recipe: str = recipes.DEFAULT,
    reinit: Reinit = "all",
    factor: float | None = None,
    positions: bool = False,
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
        recipe, reinit, factor, positions, untie, seed: as in ``spikepatch.plan``.
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
    report = progress or (lambda step, done, total: None)
    transforms = checked_transforms(recipe, reinit=reinit, seed=seed, factor=factor, positions=positions, untie=untie)
    report("reading the source", 0, 0)
    found = open_source(source, revision=revision, trust_remote_code=trust_remote_code, weights=reinit != "all")
    folder = Path(out)
    check_target(folder, found.folder, overwrite=overwrite)
    check_weights(found, reinit)
    _check_source(found)
    found = dataclasses.replace(found, config=_with_dtype(found, dtype))

    report("mapping the residual stream", 0, 0)
    model = build_meta(found)
    residual = inspect(model, source=source)
    match = None if reinit == "all" else match_source(found, model)
    std = None if match is None else embedding_std(match, residual)
    plan = make_plan(residual, tensor_names(model), recipe, transforms, reinit=reinit, seed=seed, embedding_std=std)
    route = _route(plan, storage)
    code = _generated_files(found, plan) if route == "code" else _Code({}, {})

    twin = skeleton(model)
    restructure(twin, plan)
    targets = layout(twin)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in set(model.state_dict())}
    planned = [Planned(t.name, _stored_dtype(t, plan, match, dtype), t.shape) for t in targets]
    files = _files(planned, match, found, max_shard_size)
    total = sum(tensor.bytes for tensor in planned)
    loss = expected_initial_loss(plan, residual) if reinit == "all" else None
    vocab = _vocabulary(found)
    result = Conversion(
        out=folder,
        plan=plan,
        residual=residual,
        storage=route,
        dtype=str(found.config.dtype).removeprefix("torch."),
        parameters=sum(target.elements for target in targets),
        bytes=total,
        expected_loss=loss,
        log_vocab=math.log(vocab) if vocab else None,
        loss_before=None,
        loss_after=None,
        notes=tuple(_notes(found, plan, route, loss, vocab, match)),
    )
    if dry_run:
        return result

    command = _command(source, recipe, reinit, factor, positions, untie, storage, seed, dtype, max_shard_size, revision)
    produce = _producer(plan, twin, buffers, targets, planned, match)
    with publishing(folder) as scratch:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report("writing weights", done, total)

        hashes = write_checkpoint(scratch, planned, files, produce, advance)
        hashes["config.json"] = write_text(scratch / "config.json", _config_text(found, plan, code.entries))
        for name, text in code.files.items():
            hashes[name] = write_text(scratch / name, text)
        for path in found.copied_files:
            assert found.folder is not None
            name = path.relative_to(found.folder).as_posix()
            (scratch / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, scratch / name)
            hashes[name] = file_hash(scratch / name)
        card = model_card(plan, route, base_model=source if found.kind == "hub" else None, auto_class=found.auto_class)
        hashes["README.md"] = write_text(scratch / "README.md", card)
        write_text(scratch / MANIFEST, manifest(plan, route, _fingerprint(found, reinit), command, hashes))
        report("checking what was written", 0, 0)
        _verify(scratch, planned, {t.name: t for t in targets}, plan, match)
        if reinit != "all":
            report("measuring the loss before and after", 0, 0)
            from spikepatch.drift import sample_loss

            assert found.folder is not None
            before, after = sample_loss(found.folder, found.auto_class), sample_loss(scratch, found.auto_class)
            result = dataclasses.replace(result, loss_before=before, loss_after=after)
    return result


def expected_initial_loss(plan: Plan, residual: ResidualMap) -> float | None:
    """Initial loss of a tied head behind a large shortcut, estimated; None where it is about log V.

    The head's rows are the embedding E ~ N(0, s^2), and the last norm divides the stream by its std, so the current
    token's own logit is about c d s^2 / sigma_N, with sigma_N^2 about c^2 s^2 plus what the sub-layers add: 0.11,
    measured on GPT-2 classes of 12 and 24 layers. (c = 1/s behind a LayerNorm.) It is also the loss, as long as it is
    well above log V, since the next token is another one: 17.9 for GPT-2 at d = 1024, where 17.7 was measured.
    """
    tied = residual.head is not None and residual.head.tied and not plan.select(Untie)
    edits = [e for e in plan.edits if isinstance(e, (ScaleEmbedding, NormEmbedding))]
    token = residual.token_embedding
    if not tied or not edits or token is None:
        return None
    std: float = next(fill.std for fill in plan.select(Fill) if fill.parameter == token.parameter)
    edit = next(e for e in edits if e.module == token.module)
    factor: float = edit.factor if isinstance(edit, ScaleEmbedding) else 1 / std
    return factor * residual.width * std**2 / math.sqrt((factor * std) ** 2 + 0.11)


@dataclass(frozen=True)
class _Code:
    files: Mapping[str, str]
    entries: Mapping[str, Any]


def _generated_files(source: Source, plan: Plan) -> _Code:
    from spikepatch.apply.source_code import config_entries, original_of, render

    del plan
    architecture = original_of(source.model_class, type(source.config))
    return _Code(render(architecture), config_entries(architecture))


def _check_source(source: Source) -> None:
    if not source.model_class.__module__.startswith("transformers.models."):
        raise Refused(
            what="models with their own modelling code are not converted yet",
            where=source.name,
            why=f"{source.model_class.__name__} comes from {source.model_class.__module__}",
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


def _with_dtype(source: Source, dtype: str | None) -> Any:
    config = copy.deepcopy(source.config)
    if dtype is not None:
        wanted = getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point or wanted.itemsize < 2:
            raise Refused(
                what=f"{dtype!r} is no dtype to store weights in",
                where="--dtype",
                why="weights are stored as float32, bfloat16, float16 or float64",
                remedy="--dtype bfloat16, or leave it out for the source's own",
            )
        config.dtype = wanted
    elif config.dtype is None:
        kinds = [entry.dtype for entry in source.checkpoint.tensors.values()] if source.checkpoint else []
        floats = [kind for kind in kinds if kind in {"F64", "F32", "F16", "BF16"}]
        name = DTYPES[max(set(floats), key=floats.count)][0] if floats else "float32"
        config.dtype = getattr(torch, name)
    return config


def _route(plan: Plan, storage: Storage) -> Literal["plain", "code"]:
    if storage == "plain" and plan.structural:
        raise Refused(
            what="--storage plain cannot hold this recipe",
            where=plan.source,
            why=f"{plan.recipe} changes the forward pass, which the plain {plan.architecture} would leave out silently",
            remedy="use --storage code (or auto), or the recipe vanilla",
        )
    if storage not in {"auto", "plain", "code"}:
        raise Refused(
            what=f"there is no storage route {storage!r}",
            where="--storage",
            why="the routes are auto, plain and code",
            remedy="leave it out for auto",
        )
    return "code" if storage == "code" or plan.structural else "plain"


def _stored_dtype(target: Target, plan: Plan, match: Match | None, dtype: str | None) -> torch.dtype:
    if match is None or dtype is not None or not target.dtype.is_floating_point:
        return target.dtype
    entry = _kept_entry(target, plan, match)
    stored: torch.dtype = target.dtype if entry is None else getattr(torch, DTYPES[entry.dtype][0])
    return stored


def _kept_entry(target: Target, plan: Plan, match: Match) -> Any:
    """The source's tensor for a target; an untied head starts as the embedding's."""
    copies = {edit.head: edit.embedding for edit in plan.select(Untie)}
    return match.targets.get(target.name) or match.owners.get(copies.get(target.owner, ""))


def _files(
    planned: list[Planned], match: Match | None, source: Source, max_shard_size: str | int | None
) -> Mapping[str, list[str]]:
    if match is None or max_shard_size is not None:
        try:
            return split(planned, max_shard_size or "5GB")
        except ValueError as error:
            raise Refused(
                what=f"{max_shard_size!r} is no shard size",
                where="--max-shard-size",
                why=str(error),
                remedy="a number with a unit, such as 5GB or 500MB",
            ) from error
    assert source.checkpoint is not None
    files: dict[str, list[str]] = {shard: [] for shard in source.checkpoint.shards}
    last = source.checkpoint.shards[-1]
    for tensor in planned:
        entry = match.targets.get(tensor.name)
        files[entry.file.name if entry is not None else last].append(tensor.name)
    return {file: names for file, names in files.items() if names}


def _producer(
    plan: Plan,
    twin: torch.nn.Module,
    buffers: Mapping[str, torch.Tensor],
    targets: tuple[Target, ...],
    planned: list[Planned],
    match: Match | None,
) -> Callable[[str], torch.Tensor]:
    value = values(plan, twin, buffers)
    by_name = {target.name: target for target in targets}
    dtypes = {tensor.name: tensor.dtype for tensor in planned}

    def produce(name: str) -> torch.Tensor:
        target = by_name[name]
        fresh = value(target)
        if fresh is None:
            assert match is not None
            fresh = read_tensor(_kept_entry(target, plan, match))
        return fresh.to(dtypes[name])

    return produce


def _config_text(source: Source, plan: Plan, entries: Mapping[str, Any]) -> str:
    config = copy.deepcopy(source.config)
    if plan.select(Untie):
        config.tie_word_embeddings = False
    config.architectures = [source.model_class.__name__]
    config.spikepatch = plan.record(__version__)
    data = json.loads(config.to_json_string())
    kept = {"tokenizer_class": data["tokenizer_class"]} if data.get("tokenizer_class") else {}
    return json.dumps({**data, **entries, **kept}, indent=2, sort_keys=True) + "\n"


def _verify(
    folder: Path, planned: list[Planned], targets: Mapping[str, Target], plan: Plan, match: Match | None
) -> None:
    """Re-open the folder: every tensor there as planned, finite; fills with the planned mean and std."""
    checkpoint = read_checkpoint(folder)
    expected = {t.name: (t.shape, t.dtype) for t in planned}
    present = {n: (e.shape, getattr(torch, DTYPES[e.dtype][0])) for n, e in checkpoint.tensors.items()}
    if expected != present:
        raise SpikepatchError(
            "wrong tensors written", where=str(folder), why="not as planned", remedy="report this bug"
        )
    fills = {fill.parameter: fill for fill in plan.select(Fill)}
    for name, entry in checkpoint.tensors.items():
        target, value = targets[name], read_tensor(entry)
        fill = fills.get(target.owner)
        if not torch.isfinite(value).all():
            kept = match is not None and fill is None
            raise BadSource(
                f"{name} holds NaN or infinite values",
                where=str(match.targets[name].file) if kept and match is not None and name in match.targets else name,
                why="the source's weights are not finite" if kept else f"overflow in {value.dtype}",
                remedy="use a sound checkpoint" if kept else "choose a wider --dtype",
            )
        if fill is not None and value.numel() >= 1000:
            n, x = value.numel(), value.double()
            # Sampling error of mean and std at 7 sigma, plus rounding to the stored dtype.
            slack = 7 / math.sqrt(n) + torch.finfo(value.dtype).eps
            assert abs(float(x.mean())) <= slack * fill.std, name
            assert abs(float(x.std()) / fill.std - 1) <= slack, name


def _vocabulary(source: Source) -> int | None:
    size = getattr(source.config.get_text_config(), "vocab_size", None)
    return int(size) if size else None


def _notes(
    source: Source, plan: Plan, route: str, loss: float | None, vocab: int | None, match: Match | None
) -> list[str]:
    if plan.reinit != "all":
        first = f"learned weights of {source.name}"
        first += (
            ", residual projections drawn afresh (the learned function is lost)" if plan.reinit == "residual" else ""
        )
    elif source.has_weights:
        first = f"fresh weights: the learned weights of {source.name} are NOT used; --reinit none keeps them"
    else:
        first = "fresh weights: a model to pre-train"
    notes = [first]
    if route == "code":
        notes.append(
            "loads with trust_remote_code=True; from_config "
            + ("draws the recipe's stds" if plan.reinit == "all" else "restores the architecture's own initialisation")
        )
    else:
        notes.append("loads as the plain architecture; from_config would restore the architecture's own initialisation")
    if loss is not None and vocab is not None and loss > 1.1 * math.log(vocab):
        notes.append(
            f"expected initial loss about {loss:.1f}, against log V = {math.log(vocab):.1f}: the head is tied, so a"
            " large shortcut makes it predict the current token; --untie gives it its own matrix"
        )
    if match is not None and match.unused:
        notes.append(
            f"{len(match.unused)} tensors of the source are not part of the architecture and left out: "
            + ", ".join(match.unused[:3])
            + (" ..." if match.unused[3:] else "")
        )
    return notes


def _fingerprint(source: Source, reinit: Reinit) -> dict[str, Any]:
    import hashlib

    config = hashlib.sha256(source.config.to_json_string().encode()).hexdigest()
    data: dict[str, Any] = {"name": source.name, "kind": source.kind, "commit": source.commit, "config": config}
    if reinit != "all" and source.checkpoint is not None:
        data["weights"] = {shard: file_hash(source.checkpoint.folder / shard) for shard in source.checkpoint.shards}
    if source.kind == "folder":
        data["name"] = Path(source.name).name
    return data


def _command(
    source: str,
    recipe: str,
    reinit: str,
    factor: float | None,
    positions: bool,
    untie: bool,
    storage: str,
    seed: int,
    dtype: str | None,
    max_shard_size: str | int | None,
    revision: str | None,
) -> str:
    """The command that would write this folder again, with OUT for its path."""
    words = ["spikepatch", "convert", source, "OUT", "--recipe", recipe, "--reinit", reinit, "--seed", str(seed)]
    options = {"--factor": factor, "--storage": storage if storage != "auto" else None, "--dtype": dtype}
    options |= {"--max-shard-size": max_shard_size, "--revision": revision}
    for name, value in options.items():
        words += [name, str(value)] if value is not None else []
    words += ["--positions"] * positions + ["--untie"] * untie
    return " ".join(words)
