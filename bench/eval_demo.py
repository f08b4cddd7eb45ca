"""Measures the bundled demo models again: `python -m spac.bench.eval_demo [--folder DIR]`.

Prints the figures beside those of the model card. The text is the held-out modules of the running
Python, which differ a little from one version to the next.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import spac
from spac.bench import demo_data as data
from spac.bench.demo_eval import measure

BUNDLED = Path(spac.__file__).parent / "demo"


def remeasure(folder: Path, device: str, experts: str) -> tuple[dict, dict]:
    """(figures now, figures of the card). Raises FileNotFoundError if `folder` holds no models."""
    path = folder / "target" / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found, spac.bench.train_demo makes the models")
    noted = json.loads(path.read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    held_out = data.encode(tokenizer, data.held_out_documents()).to(device)
    accepted = noted["acceptance"]
    prompts = data.held_out_prompts(tokenizer, accepted["prompts"]).to(device)
    gamma, new_tokens = accepted["gamma"], accepted["new_tokens"]
    return measure(folder, tokenizer, held_out, prompts, gamma, new_tokens, experts), noted


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m spac.bench.eval_demo", description=__doc__)
    p.add_argument("--folder", type=Path, default=BUNDLED, help="holds target/ and draft/")
    p.add_argument("--experts", choices=("eager", "grouped_mm", "spac"), default="spac")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    try:
        now, noted = remeasure(args.folder, args.device, args.experts)
    except (FileNotFoundError, ValueError) as error:
        print(f"eval_demo: {error}", file=sys.stderr)
        return 1
    print(f"{'':28} {'now':>9} {'card':>9}")
    for part in ("held_out_loss", "draft_held_out_loss"):
        for key in ("nats_per_token", "bits_per_byte"):
            name = f"{part.removesuffix('_held_out_loss')} {key}".replace("held_out_loss", "target")
            print(f"{name:28} {now[part][key]:9.4f} {noted[part][key]:9.4f}")
    print(f"{'accepted':28} {now['acceptance']['share']:9.3f} {noted['acceptance']['share']:9.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
