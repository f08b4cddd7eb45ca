"""Experts spread over processes by transformers' expert-parallel plan, run by spac's kernels.

    torchrun --nproc-per-node 2 expert_parallel.py [--model PATH]

(transformers 5.17 also needs accelerate.) Each process holds its share of the experts of every
layer; ids of experts that live elsewhere arrive as a sentinel, which spac's backend skips. The
result is compared with one process that holds everything. With a GPU for every process they talk
through NCCL, without one through gloo.
"""

import argparse
import inspect
import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from spac.demo_model import TARGET

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(TARGET), help="default: the bundled model")
args = parser.parse_args()

if "RANK" not in os.environ:
    raise SystemExit("start it with torchrun --nproc-per-node 2")
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
gpus = torch.cuda.device_count()
if 0 < gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
    raise SystemExit(
        f"a GPU for every process is needed, there are {gpus}; CUDA_VISIBLE_DEVICES= "
        "in front of the command leaves them out"
    )
if "ep_size" in inspect.signature(DistributedConfig).parameters:  # transformers 5.20 and newer
    plan = DistributedConfig(tp_size=world, ep_size=world)
else:
    plan = DistributedConfig(tp_size=world, enable_expert_parallel=True)
options = {"dtype": torch.float32, "experts_implementation": "spac"}
model = AutoModelForCausalLM.from_pretrained(args.model, distributed_config=plan, **options).eval()

experts = model.model.layers[0].mlp.experts
local = experts.gate_up_proj
local = local.to_local() if hasattr(local, "to_local") else local
torch.manual_seed(0)
ids = torch.randint(2, model.config.vocab_size, (1, 40), device=model.device)
with torch.no_grad():
    logits = model(ids).logits
    whole = AutoModelForCausalLM.from_pretrained(args.model, **options).eval().to(model.device)
    error = (logits - whole(ids).logits).abs().max().item()
share = f"{len(local)} of {model.config.num_experts} experts"
print(f"process {rank}: {share}, error {error:.1e}, {dist.get_backend()}, {model.device}")
dist.barrier()
dist.destroy_process_group()
if not error < 1e-3:
    raise SystemExit(f"process {rank}: the logits differ by {error}")
