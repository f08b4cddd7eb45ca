"""The model card of the bundled demo models, written from their metrics."""

import textwrap


def card(metrics: dict) -> str:
    """Markdown with the front matter that model hubs read. `metrics` is what train_demo noted."""
    recipe, data, machine = metrics["recipe"], metrics["data"], metrics["machine"]
    loss, draft_loss = metrics["held_out_loss"], metrics["draft_held_out_loss"]
    size, load, accepted = metrics["parameters"], metrics["expert_load"], metrics["acceptance"]
    target, draft = metrics["target_training"], metrics["draft_training"]
    held_out, validation = (
        ", ".join(n.removesuffix(".py") for n in data[part]) for part in ("held_out", "validation")
    )
    commands = "\n".join(f"`{c}`" for c in dict.fromkeys((target["command"], draft["command"])))
    libraries = ", ".join(data["libraries"])
    rows = [
        ("", "target", "draft"),
        ("---", "---", "---"),
        ("architecture", "Qwen3-MoE", "Qwen3"),
        ("layers", recipe["layers"], recipe["draft_layers"]),
        ("experts", f"{recipe['experts']}, top-{recipe['top_k']}", "none"),
        ("parameters", f"{size['target']:,}", f"{size['draft']:,}"),
        ("parameters a token", f"{size['target_active']:,}", f"{size['draft']:,}"),
        ("held-out loss, nats a token", *_pair(loss, draft_loss, "nats_per_token", ".4f")),
        ("held-out loss, bits a byte", *_pair(loss, draft_loss, "bits_per_byte", ".4f")),
        ("training steps", *_pair(target, draft, "steps", ",")),
        ("training tokens", *_pair(target, draft, "tokens", ",")),
        ("training seconds", *_pair(target, draft, "seconds", ".0f")),
        ("training tokens/s", *_pair(target, draft, "tokens_per_second", ",")),
    ]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    figures = _paragraph(f"""
        The loss is over {loss["tokens"]:,} tokens of the held-out modules in windows of
        {metrics["context"]} tokens that do not see each other. In greedy speculative generation
        with {accepted["gamma"]} drafted tokens a window, on {accepted["prompts"]} held-out prompts
        of {accepted["new_tokens"]} new tokens, **{accepted["share"]:.1%}** of the drafted tokens
        are accepted. Load of an expert on held-out text, in units of an even load:
        {load["min"]} to {load["max"]}. All were measured in fp32 from these bf16 files.""")
    sources = _paragraph(f"""
        {data["files"]:,} source files of the Python standard library ({libraries}), tests
        included: {data["bytes"]:,} bytes, {data["tokens"]:,} tokens of a byte-level BPE with
        {recipe["vocab"]:,} tokens, {data["bytes_per_token"]} bytes a token. Left out: character
        tables, generated data, very large files. Never trained on, nor their tests, nor files that
        share a tenth of their long lines with them: the held-out modules, from which the figures
        above come, and the validation modules, which chose the weights to keep.""")
    training = _paragraph(f"""
        Seed {target["seed"]}, {machine["device"]}, torch {machine["torch"]}, transformers
        {machine["transformers"]}, experts backend "{metrics["experts_implementation"]}";
        {metrics["precision"]}. AdamW with a cosine schedule over wall-clock time, dropout
        {recipe["dropout"]}, weight decay {recipe["weight_decay"]}, a load-balancing loss for each
        layer (coefficient {recipe["balance"]}). The schedule follows the clock, so another run ends
        near these figures, not at them. The draft was distilled from the target, first on the
        training text, then on the target's own greedy and sampled continuations of training
        prompts. All settings and the scores over time are in metrics.json.""")
    sampling = metrics["sampling"]
    sample = _paragraph(f"""
        Temperature {sampling["temperature"]}, top-p {sampling["top_p"]}, behind a held-out prompt
        of 96 tokens (the first lines are the prompt). Greedy text of a model this small soon
        repeats itself.""")
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, moe, speculative-decoding]
---
# spac demo: a small Qwen3-MoE target and its draft

Made to show and to test expert offloading with speculative decoding. It continues Python source
in the manner of the standard library; it knows nothing else, and much of what it writes is wrong.

{table}

{figures}

## Data
{sources}

{_paragraph(f"Held out: {held_out}.")}

{_paragraph(f"Validation: {validation}.")}

## Training
{commands}

{training}

## Sample
{sample}
```python
{metrics["samples"][2]}
```

## Licence
Weights: Apache-2.0. The training data is the Python standard library, under the PSF License 2.0
and the licences named in its files.
"""


def _pair(target: dict, draft: dict, key: str, form: str) -> tuple[str, str]:
    return format(target[key], form), format(draft[key], form)


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 98, break_long_words=False, break_on_hyphens=False)
