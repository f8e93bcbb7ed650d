"""A file layer that writes down what is done, and the disks that a power cut could leave at any moment of it.

POSIX promises little: data is there once its file was fsynced, a name (made, moved, removed) once its folder was.
Until then each may be there or not, whatever happened first.
"""

from __future__ import annotations

import io
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Call = tuple[Any, ...]  # ("write", path, data), ("sync", path), …, or ("mark", anything)
Tree = dict[str, Any]  # name -> bytes, or the tree of a folder


@contextmanager
def recorded(root: Path, before: Callable[[Call], None] = lambda call: None) -> Iterator[list[Call]]:
    """Every call below ``root`` that changes the disk, in order. ``before`` sees a call first, and may raise."""
    calls: list[Call] = []
    top = os.path.realpath(root)

    def place(path: Any, folder: int | None = None) -> str | None:
        """Relative to the root; None outside it."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        elif folder is not None:
            full = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))
        else:
            full = os.path.abspath(os.fspath(path))
        inside = full == top or full.startswith(top + "/")
        return os.path.relpath(full, top) if inside else None

    def noting(act: Callable[[], Any], kind: str, *what: Any) -> Any:
        if what[0] is None:
            return act()
        before((kind, *what))
        result = act()
        calls.append((kind, *what))  # not where it failed
        return result

    def noted(name: str, kind: str, paths: int = 1) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            folder = options.get("dir_fd")
            where = [place(path, folder) for path in arguments[:paths]]
            return noting(lambda: original(*arguments, **options), kind, *where)

        return call

    os_open, io_open = os.open, io.open

    def open_descriptor(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        makes = flags & os.O_CREAT and not os.path.exists(path)
        where = place(path, options.get("dir_fd")) if makes else None
        return noting(lambda: os_open(path, flags, *arguments, **options), "create", where)

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        where = place(file) if set(mode) & set("wxa") else None
        made = where if not isinstance(file, int) else None
        opened = noting(lambda: io_open(file, mode, *arguments, **options), "create", made)
        return opened if where is None else Written(opened, lambda act, data: noting(act, "write", where, data))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "fsync", "unlink", "remove", "rmdir"):
            kind = {"fsync": "sync", "unlink": "drop", "remove": "drop", "rmdir": "drop"}.get(name, name)
            patch.setattr(os, name, noted(name, kind))
        for name, kind in (("rename", "move"), ("replace", "move"), ("link", "link")):
            patch.setattr(os, name, noted(name, kind, paths=2))
        patch.setattr(os, "open", open_descriptor)
        patch.setattr(io, "open", open_file)
        yield calls


class Written:
    """A file that tells of its writes."""

    def __init__(self, file: Any, noting: Callable[[Callable[[], Any], bytes], Any]) -> None:
        self.file, self.noting = file, noting

    def write(self, data: Any) -> int:
        content = data.encode() if isinstance(data, str) else bytes(data)
        return self.noting(lambda: self.file.write(data), content)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


# ------------------------------------------------------------------------------------------------ what stays


@dataclass(eq=False)
class Data:
    written: bytes = b""
    safe: int = 0  # bytes that are on the disk


@dataclass(eq=False)
class Folder:
    now: dict[str, Data | Folder] = field(default_factory=dict)
    safe: dict[str, Data | Folder] = field(default_factory=dict)
    pending: list[dict[str, Data | Folder | None]] = field(default_factory=list)  # each whole or not at all

    def change(self, names: dict[str, Data | Folder | None]) -> None:
        apply(self.now, names)
        self.pending.append(names)

    def sync(self) -> None:
        self.safe, self.pending = dict(self.now), []


def apply(entries: dict[str, Data | Folder], names: dict[str, Data | Folder | None]) -> None:
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class Disk:
    """A disk after some calls."""

    def __init__(self) -> None:
        self.root = Folder()

    def find(self, path: str) -> Any:
        node: Any = self.root
        for part in Path(path).parts:
            node = node.now[part]
        return node

    def perform(self, call: Call) -> None:
        kind, *what = call
        if kind == "mark":
            return
        path = Path(what[0])
        if kind == "write":
            self.find(what[0]).written += what[1]
        elif kind == "sync":
            node = self.find(what[0])
            if isinstance(node, Folder):
                node.sync()
            else:
                node.safe = len(node.written)
        elif kind in ("mkdir", "create"):
            self.find(str(path.parent)).change({path.name: Folder() if kind == "mkdir" else Data()})
        elif kind == "drop":
            self.find(str(path.parent)).change({path.name: None})
        else:
            other = Path(what[1])
            assert other.parent == path.parent, call
            old: dict[str, Any] = {path.name: None} if kind == "move" else {}
            self.find(str(path.parent)).change({**old, other.name: self.find(what[0])})

    def cuts(self, dice: random.Random | None = None) -> Iterator[Tree]:
        """What a power cut now could leave: in every combination, or (``dice``) one at random."""
        open_names = [(folder, index) for folder in self.folders(self.root) for index in range(len(folder.pending))]
        count = len(open_names)
        if dice:
            subsets: Any = [{index for index in range(count) if dice.random() < 0.5}]
        elif count <= 10:
            bits = itertools.product((False, True), repeat=count)
            subsets = [set(itertools.compress(range(count), chosen)) for chosen in bits]
        else:
            own, every = random.Random(count), set(range(count))
            subsets = [set(), every, *({one} for one in every), *(every - {one} for one in every)]
            subsets += [{index for index in every if own.random() < 0.5} for _ in range(200)]
        for chosen in subsets:
            kept = {(id(open_names[index][0]), open_names[index][1]) for index in chosen}
            for fate in [dice.choice(FATES)] if dice else FATES:
                yield self.tree(self.root, kept, fate)

    def folders(self, folder: Folder, seen: set[int] | None = None) -> Iterator[Folder]:
        """Those whose names may be lost; not those that nothing leads to."""
        seen = set() if seen is None else seen
        if id(folder) in seen:
            return
        seen.add(id(folder))
        yield folder
        for node in [*folder.safe.values(), *(node for names in folder.pending for node in names.values())]:
            if isinstance(node, Folder):
                yield from self.folders(node, seen)

    def tree(self, folder: Folder, kept: set[tuple[int, int]], fate: Callable[[Data], bytes]) -> Tree:
        entries = dict(folder.safe)
        for index, names in enumerate(folder.pending):
            if (id(folder), index) in kept:
                apply(entries, names)
        return {
            name: self.tree(node, kept, fate) if isinstance(node, Folder) else fate(node)
            for name, node in sorted(entries.items())
        }


FATES: tuple[Callable[[Data], bytes], ...] = (  # of data that was not fsynced
    lambda data: data.written[: data.safe],
    lambda data: data.written,
    lambda data: data.written[: (data.safe + len(data.written)) // 2],
    lambda data: data.written[: data.safe].ljust(len(data.written), b"\0"),
)


def put(tree: Tree, folder: Path) -> None:
    """Make a tree real."""
    folder.mkdir()
    for name, node in tree.items():
        if isinstance(node, dict):
            put(node, folder / name)
        else:
            (folder / name).write_bytes(node)
