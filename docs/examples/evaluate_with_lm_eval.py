"""Evaluate an offloaded model with lm-evaluation-harness.

    pip install lm_eval
    python evaluate_with_lm_eval.py [--model PATH --gpu-budget 8GiB --tasks hellaswag]

An attached model is still a transformers model, so the harness takes it as it is. Without --tasks
a task of this file is used, on text that every Python has: bits per byte of some modules.
"""

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

import spac
from spac.demo_model import TARGET
from spac.loading import load_tokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(TARGET), help="default: the bundled model")
parser.add_argument("--gpu-budget", default="16MiB")
parser.add_argument("--tasks", nargs="+", help="tasks of the harness")
parser.add_argument("--modules", nargs="+", default=["bisect", "colorsys", "reprlib"])
args = parser.parse_args()


def python_source(folder: Path) -> ConfigurableTask:
    """Rolling log-likelihood of modules of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows = [{"text": (library / f"{name}.py").read_text()} for name in args.modules]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ConfigurableTask(
        config={
            "task": "python_source",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "text.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte"}],
        }
    )


tokenizer = load_tokenizer(args.model)
model = spac.from_pretrained(args.model, args.gpu_budget, max_length=1024)
harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=512)
with tempfile.TemporaryDirectory() as folder:
    tasks = args.tasks or [python_source(Path(folder))]
    results = simple_evaluate(model=harness, tasks=tasks, bootstrap_iters=0)["results"]
for task, figures in results.items():
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{task} {name.partition(',')[0]} {value:.4f}")
print(f"{spac.stats(model)['prefill_tokens']} tokens passed the offloaded experts")
spac.detach(model)
