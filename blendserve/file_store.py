"""A folder of small files, local or on an object store, with the few operations that leases and part files need.

A name appears with its whole content or not at all, and `create` succeeds for one caller only. On a local or shared
file system that takes exclusive creation and rename, on an object store a conditional PUT.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from blendserve.errors import BlendServeError, OutputError, StoreUnreachableError
from blendserve.manifest import replacing, sync

_DOWN_OR_BUSY = (errno.EBUSY, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH)
_THROTTLING_CODES = ("RequestLimitExceeded", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException")


class FileStore(Protocol):
    """Names are relative to the folder and use `/`."""

    def names(self, prefix: str) -> list[str]:
        """The files whose names start with `prefix`, sorted. Half-written ones are left out."""

    def read(self, name: str) -> bytes | None:
        """The content, or None when there is no such file."""

    def write(self, name: str, content: bytes) -> None:
        """Write the file, replacing what had its name."""

    def create(self, name: str, content: bytes) -> bool:
        """Write the file unless there is one of that name; says whether it was written."""

    def remove(self, name: str) -> None:
        """Remove the file if it is there."""

    def remove_unfinished(self) -> None:
        """Remove what killed processes left half-written. Only for who has the folder to itself."""


class LocalStore:
    """A folder of a file system; `create` needs no more of it than O_EXCL, which NFS has too."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, prefix: str) -> list[str]:
        folder = (self.root / prefix).parent if not prefix.endswith("/") else self.root / prefix
        try:
            found = [str(path.relative_to(self.root)) for path in folder.iterdir() if not path.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in found if name.startswith(prefix))

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        with replacing(self.root / name) as temporary:
            temporary.write_bytes(content)

    def create(self, name: str, content: bytes) -> bool:
        """A crash in here leaves an empty or cut file: whoever reads what was created has to expect that."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
        return True

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        for path in self.root.rglob(".*.tmp"):
            path.unlink(missing_ok=True)


class ObjectStore:
    """A prefix of an object store that fsspec reaches, such as `s3://bucket/jobs/1`.

    Raises StoreUnreachableError and OutputError as `reaching` does.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        self._files: Any
        with reaching(url):
            self._files, self._root = fsspec.core.url_to_fs(url)

    def names(self, prefix: str) -> list[str]:
        self._files.invalidate_cache()
        start = len(self._root) + 1
        with reaching(self._url):
            try:
                found = self._files.find(f"{self._root}/{prefix}".rpartition("/")[0])
            except FileNotFoundError:
                return []
        return sorted(name[start:] for name in found if name[start:].startswith(prefix))

    def read(self, name: str) -> bytes | None:
        with reaching(self._url):
            try:
                content: bytes = self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
        return content

    def write(self, name: str, content: bytes) -> None:
        with reaching(self._url):
            self._files.pipe_file(f"{self._root}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        with reaching(self._url):
            try:
                self._files.pipe_file(f"{self._root}/{name}", content, mode="create")
            except (FileExistsError, OSError) as error:
                if isinstance(error, FileExistsError) or "PreconditionFailed" in repr(error.__cause__ or error):
                    return False
                raise
        return True

    def remove(self, name: str) -> None:
        with reaching(self._url):
            try:
                self._files.rm_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return

    def remove_unfinished(self) -> None:
        """There is nothing of the kind: an object appears when all of it was sent."""


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """Turn what fsspec raises about the URL `place` into StoreUnreachableError or, where it refuses, OutputError."""
    try:
        yield
    except store_errors() as error:
        refused = OutputError(
            f"{place} can't be read or written: {error}. Check the address, and that this machine has the credentials."
        )
        raise store_error(place, error, refused) from error


def store_error(place: str, error: Exception, refused: BlendServeError) -> BlendServeError:
    """What to raise for an `error` of the store of `place`: StoreUnreachableError, or `refused` if it isn't that."""
    if not _is_down_or_busy(error):
        return refused
    return StoreUnreachableError(
        f"{place} doesn't answer: {error}. Try again later; if it stays so, check the address and the network."
    )


def store_errors() -> tuple[type[Exception], ...]:
    """What fsspec raises when a place can't be reached; botocore has errors of its own, where it is loaded."""
    return (OSError, ValueError, ImportError, asyncio.TimeoutError, *_botocore_errors("BotoCoreError"))


def _is_down_or_busy(error: BaseException | None) -> bool:
    if error is None:
        return False
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's, of a store that did answer
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status == 429 or status >= 500 or response.get("Error", {}).get("Code") in _THROTTLING_CODES
    unreachable = _botocore_errors("HTTPClientError", "ConnectionError", "IncompleteReadError")
    is_silent = isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError, *unreachable))
    return is_silent or getattr(error, "errno", None) in _DOWN_OR_BUSY or _is_down_or_busy(error.__cause__)


def _botocore_errors(*names: str) -> list[type[Exception]]:
    botocore = sys.modules.get("botocore.exceptions")
    return [getattr(botocore, name) for name in names] if botocore else []


def open_store(place: Path | str) -> FileStore:
    """The store of a local folder, or of the URL of one."""
    if isinstance(place, str) and "://" in place:
        return ObjectStore(place.rstrip("/"))
    return LocalStore(Path(place))
