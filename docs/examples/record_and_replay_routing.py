"""Record which experts a rollout used, and train with exactly that routing (R3 style).

    python record_and_replay_routing.py [--model PATH]

In reinforcement learning the engine that generates and the model that trains may route a token
differently (other kernels, other precision), which makes the policy gradient noisy. Rollout
Routing Replay keeps the recorded experts and lets the router of the training model weigh them, so
that its gradient still flows. The trace also feeds `python -m spac.bench replay`.
"""

import argparse
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import spac
import spac.hf  # registers experts_implementation="spac"
from spac.demo_model import TARGET
from spac.loading import load_tokenizer
from spac.record import Recorder
from spac.trace import load_trace, save_trace


@contextmanager
def replay_routing(model, trace):
    """Routers of a Qwen3-MoE `model` take the experts of `trace`, weighted by their own logits."""
    text = model.config
    trace.check_model(text.num_hidden_layers, text.num_experts, text.num_experts_per_tok)
    experts = torch.from_numpy(trace.expert_ids).long().to(model.device)

    def hook(layer):
        def choose(router, _args, output):
            logits, weights, _ = output
            chosen = experts[: len(logits), layer]
            scores = logits.float().softmax(-1).gather(1, chosen)
            if text.norm_topk_prob:
                scores = scores / scores.sum(-1, keepdim=True)
            return logits, scores.to(weights.dtype), chosen

        return choose

    with ExitStack() as hooks:
        for layer, block in enumerate(model.model.layers):
            handle = block.mlp.gate.register_forward_hook(hook(layer))
            hooks.callback(handle.remove)
        yield


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(TARGET), help="a Qwen3-MoE; default: the bundled model")
parser.add_argument("--gpu-budget", default="8MiB", help="for the rollout")
args = parser.parse_args()
tokenizer = load_tokenizer(args.model)
ids = tokenizer("def flatten(items):", return_tensors="pt").input_ids

# 1. The rollout, offloaded; the last token passes no expert, so the trace has one token less.
rollout = spac.from_pretrained(args.model, args.gpu_budget, dtype=torch.bfloat16, max_length=256)
with Recorder(rollout) as recorder:
    text = spac.generate(rollout, ids, max_new_tokens=40, do_sample=True, seed=1, eos_token_id=[])
with tempfile.TemporaryDirectory() as folder:  # between processes a trace is a file
    save_trace(Path(folder) / "routing.npz", recorder.trace())
    trace = load_trace(Path(folder) / "routing.npz")

# 2. The training model, in another precision, with the rollout's routing.
trainer = AutoModelForCausalLM.from_pretrained(
    args.model, dtype=torch.float32, experts_implementation="spac"
)
inputs = text[:, :-1].to(trainer.device)
with Recorder(trainer) as own:
    trainer(inputs)
with replay_routing(trainer, trace), Recorder(trainer) as replayed:
    loss = trainer(inputs, labels=inputs).loss
    loss.backward()
router = trainer.model.layers[0].mlp.gate.weight
same = (own.trace().expert_ids == trace.expert_ids).mean()
print(f"{len(trace.expert_ids)} tokens; {same:.2%} of the choices agree by themselves")
agree = (replayed.trace().expert_ids == trace.expert_ids).all()
print(f"with replay all agree: {bool(agree)}; loss {loss.item():.3f}")
print(f"gradient of the first router: {router.grad.norm().item():.3f}")
