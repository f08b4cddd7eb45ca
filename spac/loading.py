"""Load a checkpoint for offloading: experts go to host memory, never all of them to the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import spac.hf  # noqa: F401  (registers the backend)
from spac.attachment import attach


def from_pretrained(
    path: str | Path,
    gpu_budget: int | str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    draft: PreTrainedModel | None = None,
    device: str | torch.device | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """A causal LM from a local folder or hub name, attached to spac; see `spac.attach`.

    The checkpoint is read (memory-mapped) into host memory; layer by layer its experts move into
    the page-locked host store, and only the dense part and the slots go to the GPU. model_kwargs
    go to transformers' from_pretrained. Raises ValueError or OSError in one line for a missing,
    truncated or incomplete checkpoint.
    """
    model = load_model(path, dtype, experts_implementation="spac", **(model_kwargs or {}))
    return attach(model, gpu_budget, draft=draft, device=device, **settings)


def load_model(
    path: str | Path, dtype: torch.dtype | str = "auto", **kwargs: Any
) -> PreTrainedModel:
    """transformers' AutoModelForCausalLM on the CPU, files checked first, in eval mode.

    Of weights only safetensors are read. Whatever is wrong is one line of ValueError.
    """
    check_checkpoint(path)
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True} | kwargs
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # config classes and weight converters raise anything
        raise ValueError(f"{path}: cannot load the model: {_line(error)}") from error
    if report["mismatched_keys"]:
        name, found, needed = min(report["mismatched_keys"])
        raise ValueError(
            f"{path}: {len(report['mismatched_keys'])} weights have other shapes than the config "
            f"says, among them {name}: {list(found)} instead of {list(needed)}"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{path}: {len(missing)} weights are missing, among them {missing[0]}")
    return model.eval()


def load_tokenizer(path: str | Path) -> Any:
    """transformers' AutoTokenizer; one line of ValueError if there is none, or a broken one."""
    is_local(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"{path}: cannot load the tokenizer: {_line(error)}") from error


def _line(error: Exception) -> str:
    """What an exception says, on one line and not too long; its name if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_local(path: str | Path) -> bool:
    """Whether `path` is here; if not, it is a hub name. ValueError for what cannot be one."""
    if Path(path).exists():
        return True
    if Path(path).is_absolute() or str(path).startswith("."):
        raise ValueError(f"{path}: no such folder")
    return False


def check_config(path: str | Path) -> None:
    """ValueError unless `path` is the folder of a transformers checkpoint."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path}: no config.json; a transformers checkpoint folder is needed")


def check_checkpoint(path: str | Path) -> None:
    """Open every safetensors file of a local checkpoint folder; one line of ValueError if bad."""
    folder = Path(path)
    if not is_local(path):
        return
    check_config(path)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path}: no .safetensors file in this folder")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                types = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: truncated or not safetensors ({reason})") from error
        integers = sorted(t for t in types if t[0] in "IUB" and t != "BF16")
        if integers and "quantization_config" not in (folder / "config.json").read_text():
            raise ValueError(
                f"{file}: weights of {', '.join(integers)} without quantization_config"
            )
