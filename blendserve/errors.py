"""The errors that BlendServe raises on purpose, and the exit status each one ends a command with.

Every message says what is wrong, where, what was expected, what was found, and what to do about it.
"""

from __future__ import annotations


class BlendServeError(Exception):
    """Base of all errors that a user can act on. `exit_status` is what the command line returns for it."""

    exit_status = 3


class UsageError(BlendServeError):
    """A setting is wrong: an unknown key, a value out of range, two settings that exclude each other."""

    exit_status = 2


class InputError(BlendServeError):
    """The input data can't be used as it is: missing, unreadable, wrong columns, ids that aren't unique."""

    exit_status = 2


class ModelError(BlendServeError):
    """The model can't be used: not found, unsupported architecture, no tokenizer, unsafe weight files."""

    exit_status = 2


class OutputError(BlendServeError):
    """The output folder can't be used: not writable, not ours, or holding another job."""

    exit_status = 2


class InUseError(BlendServeError):
    """Another process works on the same job or shard, or has taken it over. Trying again later helps."""

    exit_status = 75


class StoreUnreachableError(BlendServeError):
    """An object store, or the way to it, is down or busy. Trying again later helps."""

    exit_status = 69


class PlanError(BlendServeError):
    """A plan or a shard can't be read or doesn't fit what is asked of it."""

    exit_status = 2


class EngineProcessError(BlendServeError):
    """The engine's process ended without finishing its shard; the text holds the last lines that it wrote."""


class EngineOutOfMemoryError(EngineProcessError):
    """The engine's process ended because memory, the GPU's or the machine's, ran out."""


class ReconciliationError(BlendServeError):
    """Rows went missing or came out twice: the counts of a job don't add up. Nothing is published."""

    exit_status = 3


class Interrupted(BlendServeError):  # noqa: N818 - not an error: the job was asked to stop and can go on later
    """The job was asked to stop (Ctrl-C, SIGTERM) and stopped cleanly; running it again goes on."""

    exit_status = 130
