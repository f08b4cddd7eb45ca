"""Training loops of the demo models, and the state that lets a stage go on after a stop.

Schedules run on wall-clock time, not on steps, so that a run uses the time it is given on any
machine. Parameters, activations and optimiser are fp32 with TF32 products on CUDA: the models are
so small that lower precision saves little, and the experts see one dtype throughout.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from spac.bench.demo_data import Stream
from spac.bench.demo_eval import acceptance, continuations, evaluating, held_out_loss
from spac.bench.demo_recipe import Recipe


class Clock:
    """Time spent on a stage, over restarts, as a share of what it was given."""

    def __init__(self, seconds: float, spent: float = 0.0):
        self.budget, self.start = spent + seconds, time.monotonic() - spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        return min(1.0, self.spent / self.budget) if self.budget > 0 else 1.0


def rate(recipe: Recipe, share: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine."""
    if share < recipe.warm_up:
        return max(share / recipe.warm_up, 0.01)
    done = (share - recipe.warm_up) / (1 - recipe.warm_up)
    return recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def optimiser(model: PreTrainedModel, recipe: Recipe, learning_rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-10, fused=fused)


def descend(
    model: PreTrainedModel, optim: torch.optim.Optimizer, loss: Tensor, learning_rate: float
) -> None:
    for group in optim.param_groups:
        group["lr"] = learning_rate
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    optim.zero_grad(set_to_none=True)


def crops(stream: Stream, recipe: Recipe, length: int, count: int) -> Tensor:
    """Random pieces [count, length] of the stream; `recipe.aligned` of them begin with BOS."""
    device = stream.tokens.device
    last = len(stream.tokens) - length
    starts = torch.randint(0, last + 1, (count,), device=device)
    documents = stream.starts[torch.randint(0, len(stream.starts), (count,), device=device)]
    aligned = torch.rand(count, device=device) < recipe.aligned
    starts = torch.where(aligned, documents.clamp(max=last), starts)
    return stream.tokens[starts[:, None] + torch.arange(length, device=device)]


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4), each layer for itself.

    Mean over layers of E * sum_e share_e * probability_e; `top_k` when the load is even. The loss
    that transformers computes pools the layers first, where one layer can hide another's skew.
    """
    losses = []
    for logits in router_logits:
        tokens, experts = logits.shape
        picks = logits.topk(top_k).indices.flatten()
        counts = torch.zeros(experts, device=logits.device)
        counts.scatter_add_(0, picks, torch.ones_like(picks, dtype=counts.dtype))
        probability = logits.float().softmax(-1).mean(0)
        losses.append(experts * (counts / tokens * probability).sum())
    return torch.stack(losses).mean()


@contextmanager
def dropped(model: PreTrainedModel, p: float) -> Iterator[None]:
    """Dropout on the embeddings and on what each attention and MoE block adds, while training."""

    def drop(module: nn.Module, _: tuple, output):
        if not model.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], p), *output[1:])
        return F.dropout(output, p)

    blocks = [b for layer in model.model.layers for b in (layer.self_attn, layer.mlp)]
    handles = [b.register_forward_hook(drop) for b in [model.model.embed_tokens, *blocks]]
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = p
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0


@dataclass
class State:
    """A stage that can stop at any time and go on: weights, optimiser, best weights, history."""

    model: PreTrainedModel
    optim: torch.optim.Optimizer
    path: Path
    spent: float = 0.0
    step: int = 0
    tokens: int = 0
    best: float = math.inf  # lower is better
    best_weights: dict[str, Tensor] | None = None
    history: list[dict] | None = None

    def note(self, score: float, **entry: float) -> None:
        entry = {"step": self.step, "seconds": round(self.spent, 1), **entry}
        self.history = [*(self.history or []), entry]
        if score < self.best:
            self.best = score
            self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def save(self) -> None:
        names = ("spent", "step", "tokens", "best", "best_weights", "history")
        kept = {name: getattr(self, name) for name in names}
        state = {"model": self.model.state_dict(), "optim": self.optim.state_dict(), **kept}
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)  # a kill while writing leaves the older state

    def restore(self) -> "State":
        if self.path.exists():
            device = next(self.model.parameters()).device
            state = torch.load(self.path, map_location=device, weights_only=True)
            self.model.load_state_dict(state.pop("model"))
            self.optim.load_state_dict(state.pop("optim"))
            for name, value in state.items():
                setattr(self, name, value)
        return self


Report = Callable[[float, str], None]  # share of the stage done, one line
Release = Callable[[State], None]  # writes the best weights as a checkpoint


def train_target(
    state: State, train: Stream, validation: Stream, recipe: Recipe, seconds: float,
    report: Report, release: Release,
) -> None:  # fmt: skip
    """Next-token loss plus load balancing, until `seconds` more have passed."""
    model, clock, next_check = state.model, Clock(seconds, state.spent), 0.0
    least = state.step + recipe.least
    model.train()
    with dropped(model, recipe.dropout):
        while True:
            state.spent = clock.spent
            done = clock.share >= 1 and state.step >= least
            if clock.share >= next_check or done:
                next_check = clock.share + 1 / recipe.checks
                score = held_out_loss(model, validation, recipe.context)["nats_per_token"]
                state.note(score, validation_loss=round(score, 4))
                line = f"target step {state.step} validation {score:.4f} best {state.best:.4f}"
                report(clock.share, line)
                state.save()
                release(state)
                if done:
                    return
            batch = crops(train, recipe, recipe.context + 1, recipe.batch)
            out = model(batch[:, :-1], use_cache=False, output_router_logits=True)
            text = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
            loss = text + recipe.balance * balance_loss(out.router_logits, recipe.top_k)
            descend(model, state.optim, loss, recipe.learning_rate * rate(recipe, clock.share))
            state.step += 1
            state.tokens += batch[:, 1:].numel()
            if state.step % 50 == 0:  # reading the loss also keeps the clock true to the device
                line = f"target step {state.step} loss {text.item():.4f} {pace(state)}"
                report(clock.share, line)


def train_draft(
    state: State, target: PreTrainedModel, train: Stream, prompts: Tensor, recipe: Recipe,
    seconds: float, report: Report, release: Release,
) -> None:  # fmt: skip
    """Distils the target: first on the training text, then on text that the target wrote itself.

    Both parts lower KL(target, draft) plus the cross-entropy of the target's own first choice,
    which is what greedy acceptance asks for. `prompts` are of the validation modules.
    """
    model, clock, next_check = state.model, Clock(seconds, state.spent), 0.0
    least = state.step + recipe.least
    texts: list[tuple[int, Tensor]] = []  # (prompt tokens, [N, prompt + new])
    examined = continuations(target, prompts, recipe.new_tokens + recipe.gamma)
    model.train()
    while True:
        state.spent = clock.spent
        done = clock.share >= 1 and state.step >= least
        if clock.share >= next_check or done:
            next_check = clock.share + 1 / recipe.checks
            share = acceptance(model, examined, prompts.shape[1], recipe.gamma)
            state.note(-share, validation_acceptance=round(share, 4))
            line = f"draft step {state.step} accepted {share:.3f} best {-state.best:.3f}"
            report(clock.share, line)
            state.save()
            release(state)
            if done:
                return
        written = (clock.share - recipe.base_share) / (1 - recipe.base_share)
        if written >= 0 and len(texts) < min(recipe.rounds, 1 + int(written * (recipe.rounds + 1))):
            texts.append(write(target, train, recipe, len(texts)))
            report(clock.share, f"target wrote {sum(len(t) for _, t in texts)} texts for the draft")
        if texts:
            place, rows = texts[int(torch.randint(len(texts), ()))]
            count = max(1, recipe.batch * recipe.context // rows.shape[1])
            batch = rows[torch.randint(len(rows), (min(count, len(rows)),), device=rows.device)]
        else:
            place, batch = 1, crops(train, recipe, recipe.context, recipe.batch)
        with evaluating(target):
            teacher = target(batch, use_cache=False).logits[:, place - 1 :].flatten(0, 1).float()
        logits = model(batch, use_cache=False).logits[:, place - 1 :].flatten(0, 1).float()
        divergence = F.kl_div(
            logits.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
        )
        loss = divergence + F.cross_entropy(logits, teacher.argmax(-1))
        descend(model, state.optim, loss, recipe.draft_learning_rate * rate(recipe, clock.share))
        state.step += 1
        state.tokens += batch.numel()
        if state.step % 50 == 0:
            report(clock.share, f"draft step {state.step} loss {loss.item():.4f} {pace(state)}")


def write(target: PreTrainedModel, train: Stream, recipe: Recipe, turn: int) -> tuple[int, Tensor]:
    """Text of the target behind training prompts: greedy, every third turn sampled.

    Prompts are a quarter, half, three quarters or all of `recipe.new_tokens` long, by turn.
    """
    place = recipe.new_tokens * (1 + turn % 4) // 4
    starts = crops(train, recipe, place, recipe.round_size)
    temperature = 1.0 if turn % 3 == 2 else 0.0
    return place, continuations(target, starts, recipe.new_tokens, temperature)


def record(state: State) -> dict:
    """What the metrics keep of a stage."""
    return {
        "steps": state.step,
        "seconds": round(state.spent, 1),
        "tokens": state.tokens,
        "tokens_per_second": round(state.tokens / max(state.spent, 1e-9)),
        "history": state.history,
    }


def pace(state: State) -> str:
    return f"{state.tokens / max(state.spent, 1e-9) / 1e3:.0f}k tokens/s"
