"""Where the kernel tests run: compiled on a GPU if there is one, else on CPU tensors under Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this where a function is decorated: its own when triton is first imported, ours with the kernels.
    # transformers imports triton, so tests collected earlier may have done so: decorate its own functions again.
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton.language" in sys.modules:
        importlib.reload(sys.modules["triton.language.standard"])
        importlib.reload(sys.modules["triton.language"])


@pytest.fixture
def device() -> torch.device:
    torch.manual_seed(0)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
