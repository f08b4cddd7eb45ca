"""Generate with experts offloaded: a budget in bytes, a draft, sampling by a seed, the figures.

python generate_with_offload.py [--model PATH --draft PATH --gpu-budget 8GiB --prompt TEXT]
"""

import argparse

import spac
from spac.demo_model import DRAFT, TARGET
from spac.loading import load_model, load_tokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(TARGET), help="default: the bundled model")
parser.add_argument("--draft", default=str(DRAFT), help="a causal LM of the same tokenizer")
parser.add_argument("--gpu-budget", default="9MiB", help="for everything: weights, cache, experts")
parser.add_argument("--prompt", default="import os\n\n\ndef read_lines(path):")
parser.add_argument("--max-new-tokens", type=int, default=48)
args = parser.parse_args()

tokenizer = load_tokenizer(args.model)
draft = load_model(args.draft)
model = spac.from_pretrained(args.model, args.gpu_budget, draft=draft, max_length=512)
ids = tokenizer(args.prompt, return_tensors="pt").input_ids
sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 3}
text = spac.generate(model, ids, draft=draft, max_new_tokens=args.max_new_tokens, **sampling)
print(tokenizer.decode(text[0]))

stats = spac.stats(model)
print(f"{stats['budget']['slots']} slots, coverage {stats['coverage']:.0%}")
print(f"{stats['generation']['acceptance']:.0%} of the drafted tokens accepted")
print(f"{(stats['bytes_copied'] + stats['streamed_bytes']) / 1e6:.1f} MB moved")
spac.detach(model)
