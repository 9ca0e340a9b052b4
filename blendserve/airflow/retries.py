"""Which failures are worth another attempt: lost memory, a shard in other hands and a store that doesn't answer are, a
wrong setting isn't."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

from blendserve.errors import (
    EngineOutOfMemoryError,
    InputError,
    InUseError,
    ModelError,
    OutputError,
    PlanError,
    StoreUnreachableError,
    UsageError,
)
from blendserve.lease import LEASE_SECONDS

RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(
            exception=[UsageError, InputError, ModelError, OutputError, PlanError],
            action=RetryAction.FAIL,
            reason="Another attempt would fail in the same way: mend what the message names, then clear the task.",
        ),
        RetryRule(
            exception=EngineOutOfMemoryError,
            action=RetryAction.RETRY,
            reason="Memory ran out, perhaps because of others on the machine; finished rows are kept.",
        ),
        RetryRule(
            exception=StoreUnreachableError,
            action=RetryAction.RETRY,
            reason="The object store, or the way to it, was down or busy; finished rows are kept.",
        ),
        RetryRule(
            exception=InUseError,
            action=RetryAction.RETRY,
            retry_delay=timedelta(seconds=LEASE_SECONDS),
            reason="Another process has the job or the shard; once it ends or its lease runs out, this one goes on.",
        ),
    ]
)
