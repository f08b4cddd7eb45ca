"""The bundled model: a small Qwen3-MoE for Python code, its draft and their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from spac.loading import load_model

FOLDER = Path(__file__).parent / "demo"
TARGET = FOLDER / "target"
DRAFT = FOLDER / "draft"


def load_demo(
    dtype: torch.dtype = torch.float32, folder: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedModel, Any]:
    """(target, draft, tokenizer), in eval mode on the CPU; from `folder` instead of the bundle."""
    folder = folder or FOLDER
    target = load_model(folder / "target", dtype, experts_implementation="spac")
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    return target, load_model(folder / "draft", dtype), tokenizer
