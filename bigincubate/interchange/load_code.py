"""Where an exported model is loaded from, for the Python code that loads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A folder with an exported model, or the repository of a hub that it was pushed to.

    Attributes:
        name: Path of the folder, or name of the repository (``OWNER/NAME``).
        on_hub: Whether it is a repository.
        tokenizer: Whether it has a tokenizer.
    """

    name: str
    on_hub: bool = False
    tokenizer: bool = False

    @property
    def imports(self) -> list[str]:
        """Return the lines that the code of :meth:`file` needs before it."""
        return ["from huggingface_hub import hf_hub_download"] if self.on_hub else []

    def file(self, name: str) -> str:
        """Return the code of an expression for the local path of a file."""
        return f"hf_hub_download({self.name!r}, {name!r})" if self.on_hub else repr(f"{self.name}/{name}")
