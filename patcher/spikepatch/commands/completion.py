"""Completion in bash of words with a colon, such as ``arch:gpt2``: bash takes the colon for the end of a word."""

from __future__ import annotations

from click.shell_completion import BashComplete, CompletionItem, add_completion_class


class ColonBash(BashComplete):
    """The words put together again; what is offered is what bash still has to write, behind the colon."""

    _begun = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        before, last = super().get_completion_args()
        words: list[str] = []
        for word in [*before, last]:
            if words and (word == ":" or words[-1].endswith(":")):
                words[-1] += word
            else:
                words.append(word)
        self._begun = words[-1].rpartition(":")[0]
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        item.value = item.value.removeprefix(f"{self._begun}:" if self._begun else "")
        return super().format_completion(item)


def switch_on() -> None:
    """From here on bash is answered so."""
    add_completion_class(ColonBash)
