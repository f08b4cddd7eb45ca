"""What the demo's model card reports: held-out loss, drafted tokens accepted, expert load."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import TopPLogitsWarper

from spac.bench.demo_data import Stream

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 0}


@contextmanager
def evaluating(*modules: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no gradients inside, each module's own mode again afterwards."""
    modes = [m.training for m in modules]
    try:
        for m in modules:
            m.eval()
        with torch.no_grad():
            yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.train(mode)


def held_out_loss(
    model: PreTrainedModel, stream: Stream, context: int, batch: int = 32
) -> dict[str, float]:
    """Next-token loss over the whole stream, every token but the first predicted once.

    Windows of `context` tokens do not see each other. Returns nats_per_token,
    bits_per_byte, tokens, bytes.
    """
    tokens = stream.tokens
    count = len(tokens) - 1
    nats = torch.zeros((), dtype=torch.float64, device=tokens.device)
    with evaluating(model):
        full = count // context * context
        rows = torch.stack([tokens[:full], tokens[1 : full + 1]]).view(2, -1, context)
        pairs = [
            (rows[0, i : i + batch], rows[1, i : i + batch]) for i in range(0, rows.shape[1], batch)
        ]
        if full < count:
            pairs.append((tokens[None, full:count], tokens[None, full + 1 : count + 1]))
        for inputs, labels in pairs:
            logits = model(inputs, use_cache=False).logits.float()
            nats += F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            ).double()
    total = nats.item()
    return {
        "nats_per_token": total / count,
        "bits_per_byte": total / math.log(2) / stream.bytes,
        "tokens": count,
        "bytes": stream.bytes,
    }


def continuations(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> torch.Tensor:
    """prompts [N, P] with the model's own next `new_tokens` behind: [N, P + new_tokens].

    Greedy at temperature 0; sampling draws from torch's global random numbers, or by `seed`. Goes
    on behind an end of text, so that batches stay rectangular.
    """
    sequence, step, cache = prompts, prompts, None
    generator = None
    if seed is not None:
        generator = torch.Generator(prompts.device).manual_seed(seed)
    nucleus = TopPLogitsWarper(top_p)
    with evaluating(model):
        for _ in range(new_tokens):
            out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            if temperature > 0:
                probs = nucleus(sequence, logits / temperature).softmax(-1)
                step = torch.multinomial(probs, 1, generator=generator)
            else:
                step = logits.argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, step], dim=1)
    return sequence


def sampled(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """`continuations` as the card shows them: greedy text of small models soon repeats itself."""
    return continuations(model, prompts, new_tokens, **SAMPLING)


def accepted_share(matches: torch.Tensor, gamma: int, new_tokens: int) -> float:
    """Mean share of `gamma` drafted tokens accepted a verify window.

    matches [N, >= new_tokens + gamma - 1] bool: whether the draft, given the target's text so far,
    picks the target's next token. A window accepts the run of matches at its place, and the target
    then adds one token of its own; windows start while less than `new_tokens` are written.
    """
    accepted = windows = 0
    for row in matches.tolist():
        place = 0
        while place < new_tokens:
            run = 0
            while run < gamma and row[place + run]:
                run += 1
            accepted, windows, place = accepted + run, windows + 1, place + run + 1
    return accepted / (gamma * windows)


def acceptance(draft: PreTrainedModel, text: torch.Tensor, place: int, gamma: int = 4) -> float:
    """Share of drafted tokens that greedy speculative generation accepts, mean over windows.

    text [N, place + new + gamma] is the target's greedy text behind prompts of `place` tokens; its
    last `gamma` tokens only serve the last windows. What a window accepts equals the target's own
    text, so one forward of the draft over that text shows every choice that the draft would make:
    the figure that the loop itself would give.
    """
    with evaluating(draft):
        choices = draft(text, use_cache=False).logits.argmax(-1)
    matches = choices[:, place - 1 : -1] == text[:, place:]
    return accepted_share(matches, gamma, text.shape[1] - place - gamma)


def expert_shares(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    """Share of each layer's (token, expert) pairs that each expert got: [layers, experts]."""
    with evaluating(model):
        logits = model(inputs, use_cache=False, output_router_logits=True).router_logits
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    picks = [x.topk(top_k).indices.flatten().cpu() for x in logits]
    rows = [torch.bincount(p, minlength=experts) for p in picks]
    counts = torch.stack(rows).float()
    return counts / counts.sum(1, keepdim=True)


def load(folder: Path, device: str, experts: str | None = None) -> PreTrainedModel:
    """A saved checkpoint in fp32, ready to evaluate; `experts` names the experts backend."""
    if experts == "spac":
        import spac.hf  # noqa: F401  registers the backend
    options = {"experts_implementation": experts} if experts else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.to(device).eval()


def measure(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Stream,
    prompts: torch.Tensor,
    gamma: int,
    new_tokens: int,
    experts: str,
) -> dict:
    """The card's figures from the files in folder/target and folder/draft, computed in fp32.

    held_out and prompts [N, P] are of the held-out modules, on the device to use.
    """
    device = str(prompts.device)
    target, draft = load(folder / "target", device, experts), load(folder / "draft", device)
    config = target.config
    context, pairs = config.max_position_embeddings, len(held_out.tokens)
    text = continuations(target, prompts, new_tokens + gamma)
    rows = held_out.tokens[: pairs // context * context].view(-1, context)[:32]
    load_shares = expert_shares(target, rows) * config.num_experts
    idle = config.num_experts - config.num_experts_per_tok
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    parameters = sum(p.numel() for p in target.parameters())
    return {
        "held_out_loss": held_out_loss(target, held_out, context),
        "draft_held_out_loss": held_out_loss(draft, held_out, context),
        "context": context,
        "acceptance": {
            "gamma": gamma,
            "prompts": len(prompts),
            "new_tokens": new_tokens,
            "share": acceptance(draft, text, prompts.shape[1], gamma),
        },
        "parameters": {
            "target": parameters,
            "target_active": parameters - idle * per_expert,
            "draft": sum(p.numel() for p in draft.parameters()),
        },
        "expert_load": {  # in units of an even load, worst layer
            "max": round(load_shares.max().item(), 2),
            "min": round(load_shares.min().item(), 2),
        },
        "sampling": SAMPLING,
        "samples": [
            tokenizer.decode(t, skip_special_tokens=True)
            for t in sampled(target, prompts[:8], new_tokens).tolist()
        ],
    }
