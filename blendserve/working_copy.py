"""The local folder that a step works in when its job lies on an object store: staged before, published after.

A step gets the files that it reads, and of all others the names, as empty files, so that what is there counts as there.
Afterwards what it removed, changed and left new is done to the object store too: removals first, then job.json, and
manifests after what they speak of. An object appears whole, so a crash between two of them leaves what a crash between
two files leaves in a local folder. Completions of a running shard don't wait for this: see `ShardFolder`.
"""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blendserve.errors import BlendServeError
from blendserve.file_store import reaching

EVERYTHING = ("*",)
_ALWAYS_READ = ("*.json",)
_FIRST = "job.json"
_LAST = ("plan.json", "shard.json", "manifest.json", "_SUCCESS")


def is_url(place: str) -> bool:
    return "://" in place


@contextmanager
def working_copy(place: str, reads: Sequence[str] = EVERYTHING) -> Iterator[Path]:
    """The folder `place` itself where it is local; else a copy of the URL, published when the block ends, error or not.

    `reads`: patterns of the names whose content is needed; `*` matches `/` as well. JSON files always come along.
    Errors that name the copy come out with `place` instead.
    Raises StoreUnreachableError when the object store doesn't answer, OutputError when it refuses.
    """
    if not is_url(place):
        yield Path(place).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="blendserve-") as folder:
        with reaching(place):
            copy = _Copy(place, Path(folder))
            copy.stage((*reads, *_ALWAYS_READ))
        try:
            yield copy.root
        except BlendServeError as error:
            if not isinstance(error.__cause__, OSError):  # which would be this machine's: a full disk
                error.args = (str(error).replace(str(copy.root), place.rstrip("/")),)
            raise
        finally:
            with reaching(place):
                copy.publish()


class _Copy:
    """A local copy of a URL, and what it looked like when it was staged."""

    def __init__(self, url: str, root: Path) -> None:
        import fsspec

        self.root = root
        self._files: Any
        self._files, self._place = fsspec.core.url_to_fs(url.rstrip("/"))
        self._staged: dict[str, tuple[int, int]] = {}

    def stage(self, patterns: Sequence[str]) -> None:
        self._files.invalidate_cache()
        for remote in self._files.find(self._place):
            name = remote[len(self._place) + 1 :]
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                self._files.get_file(remote, str(path))
            else:
                path.touch()
        self._staged = self._state()

    def publish(self) -> None:
        state = self._state()
        for name in sorted(self._staged.keys() - state.keys()):
            self._files.rm_file(f"{self._place}/{name}")
        changed = [name for name, seen in state.items() if self._staged.get(name) != seen]
        for name in sorted(changed, key=_rank):
            self._files.put_file(str(self.root / name), f"{self._place}/{name}")

    def _state(self) -> dict[str, tuple[int, int]]:
        """Size and time of every whole file; hidden ones are half-written or nobody else's business."""
        found = {}
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                stat = path.stat()
                found[str(name)] = (stat.st_size, stat.st_mtime_ns)
        return found


def _rank(name: str) -> tuple[int, str]:
    if name == _FIRST:
        return -1, name
    last = name.rpartition("/")[2]
    return (_LAST.index(last) + 1 if last in _LAST else 0), name
