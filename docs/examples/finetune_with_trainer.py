"""Fine-tune with the transformers Trainer, experts forward and backward in spac's kernels.

    pip install accelerate
    python finetune_with_trainer.py [--model PATH --text FILE --steps 6]

Nothing is offloaded here: `experts_implementation="spac"` is all there is to it.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import spac.hf  # registers experts_implementation="spac"
from spac.demo_model import TARGET
from spac.loading import load_tokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(TARGET), help="default: the bundled model")
parser.add_argument("--text", default=spac.hf.__file__, help="what to learn; default: a source")
parser.add_argument("--steps", type=int, default=6)
args = parser.parse_args()

torch.manual_seed(0)
tokenizer = load_tokenizer(args.model)
model = AutoModelForCausalLM.from_pretrained(
    args.model, dtype=torch.float32, experts_implementation="spac"
)
ids = tokenizer(Path(args.text).read_text(), return_tensors="pt").input_ids[0]
blocks = [{"input_ids": block, "labels": block} for block in ids.unfold(0, 128, 32)]

with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_steps=args.steps,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=options, train_dataset=blocks)
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
