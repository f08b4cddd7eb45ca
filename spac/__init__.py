"""spac: Mixture-of-Experts models larger than the GPU, fast, without changing their answers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported at first use: `import spac` loads neither transformers nor Triton, CUDA or cvxpy.
_HOME = {
    "attach": "spac.attachment",
    "detach": "spac.attachment",
    "from_pretrained": "spac.loading",
    "generate": "spac.speculative",
    "load_profile": "spac.profile",
    "save_profile": "spac.profile",
    "prometheus": "spac.status",
    "stats": "spac.status",
    "timeline": "spac.spans",
}
__all__ = ["attach", "detach", "from_pretrained", "generate", "load_profile", "save_profile"]
__all__ += ["prometheus", "stats", "timeline"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spac' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
