"""Which requests end with the tokens that have come back, and the completions that they leave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blendserve.engine.detokenizer import Detokenizer, GrowingText
from blendserve.engine.model_runner import StepOutput
from blendserve.engine.request import Completion, FinishReason, Request
from blendserve.engine.running import IntArray, RunningRequests
from blendserve.engine.scheduled_batch import ScheduledBatch
from blendserve.engine.scheduler import Scheduler


class CompletionMaker:
    """Takes new tokens into their requests and takes out those that a stop token, stop string or limit ends."""

    def __init__(self, detokenizer: Detokenizer, eos_token_ids: Sequence[int]) -> None:
        self._detokenizer = detokenizer
        self._eos_token_ids = eos_token_ids
        self._texts: dict[int, GrowingText] = {}  # by row_index, where stop strings have to be looked for

    def clear(self) -> None:
        """Forget the texts of requests that were dropped."""
        self._texts.clear()

    def take_tokens(self, scheduler: Scheduler, batch: ScheduledBatch, output: StepOutput) -> list[Completion]:
        """Take new tokens into their requests, but for those that have ended or were preempted since."""
        running = scheduler.running
        is_live = running.serials[batch.sampled_rows] == batch.sampled_serials
        rows, token_ids, is_valid = batch.sampled_rows[is_live], output.token_ids[is_live], output.is_valid[is_live]
        running.record(rows, token_ids)
        is_end = np.isin(token_ids, self._eos_token_ids)
        is_ended = is_end | (running.known_tokens[rows] >= running.max_tokens[rows]) | ~is_valid
        texts = self._stopped_texts(running, rows, token_ids) if self._detokenizer.has_stop_strings else {}
        completions = []
        for index in np.flatnonzero(is_ended | np.isin(rows, list(texts))).tolist():
            row = int(rows[index])
            request = scheduler.finish(row, is_reusable=bool(is_valid[index]))
            self._texts.pop(request.row_index, None)
            if not is_valid[index]:
                completions.append(_not_finite(request))
            elif is_end[index]:
                text = self._detokenizer.decode(request.output_token_ids[:-1])
                completions.append(Completion.of(request, FinishReason.STOP, text))
            elif row in texts:
                completions.append(Completion.of(request, FinishReason.STOP, texts[row]))
            else:
                text = self._detokenizer.decode(request.output_token_ids)
                completions.append(Completion.of(request, FinishReason.LENGTH, text))
        return completions

    def _stopped_texts(self, running: RunningRequests, rows: IntArray, token_ids: NDArray[np.int32]) -> dict[int, str]:
        """The texts of the rows that a stop string ends with these tokens."""
        texts = {}
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            row_index = running.request(row).row_index
            text = self._texts.setdefault(row_index, GrowingText(self._detokenizer)).append(token_id)
            if text is not None:
                texts[row] = text
        return texts


def _not_finite(request: Request) -> Completion:
    return Completion.failed(
        request,
        f"the model gave logits that are not finite for token {len(request.output_token_ids)} of the completion. "
        "Try --dtype float32, and check the model's weights",
    )
