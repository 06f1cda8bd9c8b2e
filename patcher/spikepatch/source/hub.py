"""The Hugging Face Hub: what a repository holds, and only the files that are needed. Its errors, in our words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikepatch.errors import BadSource, first_line
from spikepatch.quiet import quiet
from spikepatch.source.local import is_path, local_path, nearby
from spikepatch.source.type_names import model_types

_REQUEST_SECONDS = 20


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository in the local Hub cache.

    Attributes:
        commit: the commit's hash.
        folder: holds what has been fetched of it so far.
        files: everything the commit holds; what the cache holds when the Hub could not be asked.
        online: the Hub could be asked.
    """

    repository: str
    commit: str
    folder: Path
    files: frozenset[str]
    online: bool


def locate(repository: str, revision: str | None, *, learned: bool = False) -> Snapshot:
    """Fetch config.json of a revision, which says its commit; and list what that commit holds, with one request.
    Without the Hub, use the cache.

    Args:
        learned: only a trained model will do, so ``arch:TYPE`` is no remedy.

    Raises:
        BadSource: no such repository or revision, no access, no config.json, or neither Hub nor cache has it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    silence: Exception | None = None
    with _silent():
        try:
            silence = _silence(repository, revision)
            config = hf_hub_download(repository, "config.json", revision=revision, local_files_only=silence is not None)
        except HFValidationError as error:
            raise BadSource(
                "is neither a folder nor a model id",
                where=repository,
                why=first_line(error),
                remedy="give a folder that exists, or a hub id such as org/name"
                + ("" if learned else "; or arch:TYPE"),
            ) from error
        except LocalEntryNotFoundError as error:  # the Hub did not answer
            cause: Any = silence or error.__cause__ or error
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500:
                raise _refusal(cause, repository, revision) from error
            what = "is no folder here, cannot be fetched, and is not"
            raise not_reachable(repository, cause, what, learned=learned) from error
        except EntryNotFoundError as error:
            raise no_config(_listed(repository, revision) or (), repository) from error
        except HfHubHTTPError as error:
            raise _refusal(error, repository, revision) from error
        folder = Path(config).parent
        listing = _listed(repository, folder.name)
    cached = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Snapshot(repository, folder.name, folder, listing or cached, online=listing is not None)


def _silence(repository: str, revision: str | None) -> Exception | None:
    """Why the Hub cannot be asked for what is not in the cache; hf_hub_download would try for half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(try_to_load_from_cache(repository, "config.json", revision=revision), str):
        return None  # which it then takes at once
    url = hf_hub_url(repository, "config.json", revision=revision)
    try:
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        return None  # it answers, and is asked again
    except Exception as error:  # of httpx or requests, whichever this huggingface_hub is built on
        return error
    return None


def _listed(repository: str, revision: str | None) -> frozenset[str] | None:
    """The files of a commit; None where the Hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repository, revision=revision, timeout=_REQUEST_SECONDS)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise _refusal(error, repository, revision) from error
        return None
    except Exception:  # of httpx or requests, whichever this huggingface_hub is built on
        return None
    return frozenset(sibling.rfilename for sibling in info.siblings or ())


def fetch(snapshot: Snapshot, files: Sequence[str]) -> None:
    """Bring ``files`` of the snapshot into its folder.

    Raises:
        BadSource: the Hub became unreachable, or refuses a file.
    """
    if not snapshot.online or not files:
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with _silent():
        try:
            snapshot_download(snapshot.repository, revision=snapshot.commit, allow_patterns=list(files))
        except HfHubHTTPError as error:
            raise _refusal(error, snapshot.repository, snapshot.commit) from error
        except Exception as error:
            raise not_reachable(snapshot.repository, error) from error


def first_bytes(snapshot: Snapshot, file: str, count: int) -> tuple[bytes, int]:
    """The first ``count`` bytes of a file of the snapshot, or all that it has, and its size; nothing is stored.

    It takes one request, for a range. Where a server knows no ranges, the rest of its answer is not read:
    ``HfApi.parse_safetensors_file_metadata`` would take it all. It gives neither the file's size, which the tensors
    have to fill, nor the bytes, in which a key may occur twice, or which may be a pickle or a page of HTML.

    Raises:
        BadSource: the Hub became unreachable, or refuses the file.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its __init__ re-exports them without saying so
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    url = hf_hub_url(snapshot.repository, file, revision=snapshot.commit)
    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with (
        _of_file(snapshot, file),
        # Its retries after broken connections would begin an answer anew that is half read.
        http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response,
    ):
        if response.status_code == 416:  # an empty file has no such range
            return b"", 0
        hf_raise_for_status(response)
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= count:
                break
        total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length")
        size = int(total) if total and total.isdecimal() else get_hf_file_metadata(url).size
        if size is None:
            raise ValueError("the server does not say how large it is")
        return bytes(data[:count]), size


def download(snapshot: Snapshot, file: str, arrived: Callable[[int], None]) -> None:
    """Bring one file of the snapshot into its folder. It may be called in a thread, within ``quiet``.

    Args:
        arrived: told how many bytes are there; what it raises ends the download.

    Raises:
        BadSource: the Hub became unreachable, or refuses the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Counts, and shows nothing. A download may have two: of what the network brings, and of what is written."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.arrived = 0

        def update(self, count: float | None = 1) -> None:
            self.arrived += int(count or 0)
            arrived(self.arrived)

    with _of_file(snapshot, file):
        hf_hub_download(snapshot.repository, file, revision=snapshot.commit, tqdm_class=Bar)


def may_be_id(source: str) -> bool:
    """Whether a SOURCE that is no folder here may be on the Hub: an id is NAME or OWNER/NAME."""
    return not is_path(source) and source.count("/") < 2


def no_folder(source: str, *, learned: bool = False) -> BadSource:
    """The error for a path at which there is no folder; see ``locate``."""
    return BadSource(
        "is a file, not a folder" if os.path.exists(local_path(source)) else "does not exist",
        where=source,
        why="a local source is a folder as save_pretrained writes it",
        remedy=or_near(
            source, "give that folder, or a hub id such as org/name" + ("" if learned else "; or arch:TYPE")
        ),
    )


def no_config(names: Iterable[str], where: str) -> BadSource:
    """The error for a folder or repository without config.json, told from its other files."""
    present = set(names)
    if "adapter_config.json" in present:
        return BadSource(
            "is an adapter, not a model",
            where=where,
            why="it has adapter_config.json and no config.json: its weights are a difference to a base model",
            remedy="merge it into its base model with peft's merge_and_unload and save_pretrained, or give the base",
        )
    return BadSource(
        "has no config.json",
        where=where,
        why="the architecture of a transformers model is read from it"
        + ("; this is a diffusers pipeline" if "model_index.json" in present else ""),
        remedy="give the folder that save_pretrained wrote",
    )


def not_reachable(
    repository: str, error: Exception | None, what: str = "cannot be fetched, and is not", *, learned: bool = False
) -> BadSource:
    """The error for what neither the Hub nor the local cache can give."""
    from huggingface_hub import constants

    state = f"HF_ENDPOINT is {os.environ.get('HF_ENDPOINT') or 'not set'}"
    state += f", HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE') or 'not set'}"
    why = "the Hub is switched off" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    if error is not None and not constants.HF_HUB_OFFLINE:
        why += f": {first_line(error)}"
    return BadSource(
        f"{what} in the local cache",
        where=repository,
        why=f"{why} ({state})",
        remedy=or_near(
            repository,
            "check the connection, or the spelling of a local folder"
            + ("" if learned else "; or use arch:TYPE, a default configuration that needs no download (arch:gpt2)"),
        ),
    )


def or_near(source: str, remedy: str) -> str:
    """``remedy``, behind the folders here, and the types, that have a name near to ``source``."""
    near = nearby(source)
    if "/" not in source and source in model_types():
        near.append(f"arch:{source}")
    return f"did you mean {' or '.join(near)}? Otherwise: {remedy}" if near else remedy


def _refusal(error: Exception, repository: str, revision: str | None) -> BadSource:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return BadSource(
            "is gated, and access was refused",
            where=repository,
            why="its owner grants access to logged-in users who accept its terms",
            remedy=f"accept the terms on the model's page, then {log_in}",
        )
    if isinstance(error, RevisionNotFoundError):
        return BadSource(
            f"has no revision {revision!r}",
            where=repository,
            why="it is not a branch, tag or commit of the repository",
            remedy="check --revision against the branches and tags on the model's page",
        )
    if isinstance(error, RepositoryNotFoundError):
        return BadSource(
            "is not a model on the Hub, or is private",
            where=repository,
            why="the Hub does not tell a missing repository from a private one, and no folder has this name",
            remedy=or_near(repository, f"check the spelling; if it is private, {log_in}"),
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return BadSource("access was refused", where=repository, why=first_line(error), remedy=log_in)
    return not_reachable(repository, error)


@contextlib.contextmanager
def _of_file(snapshot: Snapshot, file: str) -> Iterator[None]:
    """Errors of a request for one file of many."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise _refusal(error, snapshot.repository, snapshot.commit) from error
        raise BadSource(
            f"{file} cannot be fetched",
            where=snapshot.repository,
            why=first_line(error),
            remedy="check the connection, and run again: what has arrived is kept in the Hub's cache",
        ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    with quiet():
        disable_progress_bars()
        try:
            yield
        finally:
            if shown:
                enable_progress_bars()
