"""From token ids back to text: whole completions, and text as it grows where a stop string may end it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from blendserve.errors import ModelError

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class Detokenizer:
    """Decodes completions, special tokens left out, and knows the stop strings."""

    def __init__(self, model_folder: Path, stop: tuple[str, ...]) -> None:
        """Raises ModelError when the folder has no readable tokenizer.json."""
        path = model_folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelError(
                f"{path} can't be read as a tokenizer: {error}. Save the model's fast tokenizer."
            ) from error
        self._stop = stop
        self._max_stop_length = max((len(text) for text in stop), default=0)

    @property
    def has_stop_strings(self) -> bool:
        return bool(self._stop)

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def cut(self, text: str, start: int = 0) -> str | None:
        """`text` up to its first stop string, looked for from character `start` on; None when there is none."""
        found = [index for index in (text.find(stop, start) for stop in self._stop) if index >= 0]
        return text[: min(found)] if found else None

    def first_stop_index(self, num_known: int) -> int:
        """Where a stop string may begin that wasn't complete within the first `num_known` characters."""
        return max(num_known - self._max_stop_length + 1, 0)


class GrowingText:
    """The text of one request so far. Each token costs the decoding of a few tokens, not of all.

    The last tokens, of which `num_read` are in the text already, are decoded once more with every new one, because a
    token's text can depend on its neighbours.
    """

    __slots__ = ("_detokenizer", "_num_read", "_text", "_token_ids")

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._text = ""
        self._token_ids: list[int] = []
        self._num_read = 0

    def append(self, token_id: int) -> str | None:
        """Take in one more token. Returns the text up to a stop string once there is one."""
        self._token_ids.append(token_id)
        known = self._detokenizer.decode(self._token_ids[: self._num_read])
        extended = self._detokenizer.decode(self._token_ids)
        if len(extended) <= len(known) or extended.endswith(_REPLACEMENT):
            return None
        num_known = len(self._text)
        self._text += extended[len(known) :]
        del self._token_ids[: self._num_read]
        self._num_read = len(self._token_ids)
        return self._detokenizer.cut(self._text, self._detokenizer.first_stop_index(num_known))
