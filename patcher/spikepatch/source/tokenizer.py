"""The tokenizer that lies beside a model: loaded without its own code, and compared with another; texts to do it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikepatch.quiet import quiet

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


def tokenizer_problem(source: Path, folder: Path) -> str | None:
    """Why ``AutoTokenizer`` gives other ids for ``folder`` than for ``source``, whose tokenizer files it has; or None.

    AutoTokenizer overrides the class that the files name for some model types, and a patched model has another type.
    """
    original, copied = load_tokenizer(source), load_tokenizer(folder)
    if isinstance(original, str):
        return original
    ids = original(PROBE).input_ids
    if not isinstance(copied, str) and copied(PROBE).input_ids == ids:
        return None
    name = type(copied).__name__
    problem = copied if isinstance(copied, str) else f"AutoTokenizer takes it for a {name}, which gives other ids"
    direct = load_tokenizer(folder, type(original))
    if isinstance(direct, str) or direct(PROBE).input_ids != ids:
        return f"{problem}; load the source's in its place"
    return f"{problem}; load it with transformers.{type(original).__name__}.from_pretrained"


def load_tokenizer(folder: Path, tokenizer_class: Any = None) -> Any:
    """A tokenizer, or why there is none; code that comes with it is not run."""
    import transformers

    with quiet():
        try:
            loader = tokenizer_class or transformers.AutoTokenizer
            tokenizer = loader.from_pretrained(folder, trust_remote_code=False)
            # From a config alone transformers may make one, of its special tokens and at most a space.
            words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
            return tokenizer if len(words) > 1 else "AutoTokenizer finds no vocabulary in the folder"
        except Exception as error:  # whatever a tokenizer's own loading raises
            reason = " ".join(str(error).replace(str(folder), "the folder").split())[:200]
            return f"AutoTokenizer cannot load it ({type(error).__name__}: {reason})"
