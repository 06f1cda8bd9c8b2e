"""The tokenizer that lies beside a model: loaded without its own code, and compared with another; texts to do it on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikepatch.errors import Refused
from spikepatch.quiet import quiet
from spikepatch.source.formats import parse_json
from spikepatch.source.local import in_utf8, read_file
from spikepatch.source.redirects import code_files

if TYPE_CHECKING:
    from spikepatch.source.open import Source

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


#: Names of tokenizer files, beside those that end in the suffixes.
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
_SUFFIXES = (".model", ".tiktoken")

_CONFIG = "tokenizer_config.json"


def has_tokenizer(files: Iterable[Path]) -> bool:
    """There is one among the files of a folder."""
    return any(path.name in _FILES or path.suffix in _SUFFIXES for path in files)


def refit(original: Any, folder: Path, *, trusted: bool = False) -> tuple[str, ...]:
    """Make ``AutoTokenizer`` give for ``folder``, to which the tokenizer's files were copied, what it gives for its
    source.

    It chooses the class by the model's type, and takes the one that the files name literally for a type that it does
    not know, such as a patched model's. Where that gives other ids, the files name the class that the source's
    tokenizer is of; where that is not enough, they are written anew by that tokenizer. Code that was not copied is not
    named.

    Args:
        original: the source's tokenizer.
        folder: it has the config.json that it will have.
        trusted: code that comes with the tokenizer may be run.

    Returns:
        Names of the files that were changed.

    Raises:
        Refused: it cannot be done.
    """
    config = folder / _CONFIG
    named = parse_json(read_file(config)) if config.exists() else {}
    orphaned = [file for file in code_files(named) if not (folder / file).exists()]
    if orphaned:
        del named["auto_map"]
        _write(config, named)
    problem = _difference(original, load_tokenizer(folder, trusted=trusted))
    if problem is None:
        return (_CONFIG,) if orphaned else ()
    named["tokenizer_class"] = type(original).__name__
    _write(config, named)
    if _difference(original, load_tokenizer(folder, trusted=trusted)) is None:
        return (_CONFIG,)
    with quiet():
        saved = original.save_pretrained(folder)
    again = _difference(original, load_tokenizer(folder, trusted=trusted))
    if again is None:
        return tuple(sorted({path.relative_to(folder).as_posix() for path in map(Path, saved) if path.exists()}))
    raise Refused(
        what="the tokenizer would give other ids than the source's",
        where=str(original.name_or_path),
        why=f"AutoTokenizer chooses its class by the model's type, and for the patched model {problem}",
        remedy="remove the tokenizer's files from the source, and load the tokenizer from the source",
    )


def _write(config: Path, data: Any) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = text if in_utf8(text) else json.dumps(data, indent=2)
    config.write_text(text + "\n", encoding="utf-8")


def _difference(original: Any, copied: Any) -> str | None:
    """What a copied tokenizer does unlike the original; None where it does the same on a sample."""
    if isinstance(copied, str):
        return copied
    if copied.get_vocab() != original.get_vocab():
        return f"{type(copied).__name__} has another vocabulary"
    for text in (PROBE, SAMPLE):
        if copied(text).input_ids != original(text).input_ids:
            return f"{type(copied).__name__} gives other ids"
    if copied.all_special_ids != original.all_special_ids or copied.eos_token_id != original.eos_token_id:
        return f"{type(copied).__name__} has other special tokens"
    return None


def known_ids(source: Source) -> set[int] | None:
    """The ids of the source's tokenizer; None where it has none that can be loaded."""
    if source.folder is None or not has_tokenizer(source.copied_files):
        return None
    tokenizer = source_tokenizer(source)
    return None if isinstance(tokenizer, str) else set(tokenizer.get_vocab().values())


def source_tokenizer(source: Source) -> Any:
    """As somebody gets it who loads ``source`` by its name; or why there is none. Code of its own is not run."""
    assert source.folder is not None
    return load_tokenizer(source.folder, name=source.name if source.kind == "hub" else None)


def load_tokenizer(folder: Path, *, name: str | None = None, trusted: bool = False) -> Any:
    """A tokenizer, or why there is none.

    Args:
        name: the hub id that the folder is the snapshot of: for some, transformers chooses the class by it.
        trusted: code that comes with it may be run.
    """
    import transformers

    with quiet():
        try:
            options = {} if name is None else {"config": _named_config(folder, name)}
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, **options)
            # From a config alone transformers may make one, of its special tokens and at most a space.
            words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
            return tokenizer if len(words) > 1 else "AutoTokenizer finds no vocabulary in the folder"
        except Exception as error:  # whatever a tokenizer's own loading raises
            reason = " ".join(str(error).replace(str(folder), "the folder").split())[:200]
            return f"AutoTokenizer cannot load it ({type(error).__name__}: {reason})"


def _named_config(folder: Path, name: str) -> Any:
    """What AutoTokenizer reads as the config of ``name``."""
    import transformers

    from spikepatch.source.private import name_config

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError):
        config = transformers.PreTrainedConfig.from_pretrained(folder)
    name_config(config, name)
    return config
