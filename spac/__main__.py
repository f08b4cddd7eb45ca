"""Command line: `python -m spac generate`, `trace` and `plan`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from spac.outputs import check_output, one_line, pipe_closed

DEMO_PROMPT = '''"""Find files and copy them."""

import os
import shutil
import sys


def find_files(path, pattern):
    """Return the names of the files under path that match pattern."""'''


class _Parser(argparse.ArgumentParser):
    """Bad usage is one line, as bad input is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"spac: {message}; {self.prog} --help shows the options\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; bad input is one line on stderr and exit code 2."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()  # or a closed pipe would show only at exit
        return code
    except BrokenPipeError:
        return pipe_closed()
    except (ValueError, OSError, MemoryError) as error:
        print(f"spac: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        text = one_line(error)
        if type(error).__name__ != "OutOfMemoryError" and not text.startswith("spac: "):
            raise  # a defect: its traceback is wanted
        print(f"spac: {text.removeprefix('spac: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spac: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from spac import plan  # loads torch: Ctrl-C meanwhile is one line too

    parser = _Parser(prog="python -m spac", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate", help="generate text with experts offloaded and speculative decoding"
    )
    _add_model_arguments(generate)
    generate.add_argument("--json", metavar="FILE", help="write the figures of the run as JSON")
    generate.add_argument(
        "--no-compare",
        dest="compare",
        action="store_false",
        help="skip the second run, without speculation, that the table compares with",
    )
    generate.set_defaults(run=_generate)
    trace = commands.add_parser("trace", help="record which experts a generation used (npz)")
    _add_model_arguments(trace)
    trace.add_argument("--output", required=True, metavar="FILE", help="the trace to write")
    trace.set_defaults(run=_trace)
    forecast = commands.add_parser("plan", help="predict the speed of a model by GPU budget")
    plan.add_arguments(forecast)
    forecast.set_defaults(run=plan.run)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    from spac.config import POLICIES

    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="PATH", help="checkpoint folder or hub name")
    model.add_argument("--demo", action="store_true", help="the bundled model and its draft")
    parser.add_argument("--draft", metavar="PATH|ngram|none", help="draft model, or prompt lookup")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--gpu-budget", metavar="SIZE", help='GPU bytes, such as "8GiB"')
    memory.add_argument(
        "--cache-ratio",
        type=float,
        metavar="SHARE",
        help="instead of bytes: the share of all experts that gets a slot, such as 0.25",
    )
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"))
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--num-draft-tokens", default="auto", metavar="N|auto")
    parser.add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        help="sample instead of greedy; --demo samples by itself, with temperature 0.8, top-p 0.95",
    )
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=1, help="sampled text depends on it alone")
    parser.add_argument("--policy", default="spac", help=f"of residency: {', '.join(POLICIES)}")
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="of spac.save_profile, or a routing trace: what fills the slots first",
    )


class _Session:
    """The loaded, attached model of one command."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import transformers

        from spac.attachment import attach
        from spac.budget import bytes_for_ratio
        from spac.config import SpacConfig
        from spac.demo_model import DRAFT, TARGET
        from spac.draft_length import parse_draft_length
        from spac.loading import load_model, load_tokenizer

        transformers.logging.set_verbosity_error()
        if args.demo or not sys.stderr.isatty():
            transformers.logging.disable_progress_bar()
        path = TARGET if args.demo else args.model
        self.gamma = parse_draft_length(args.num_draft_tokens)
        temperature, top_p = (0.8, 0.95) if args.demo else (1.0, 1.0)
        self.options = {
            "max_new_tokens": args.max_new_tokens,
            "do_sample": args.demo if args.sample is None else args.sample,
            "temperature": temperature if args.temperature is None else args.temperature,
            "top_k": args.top_k,
            "top_p": top_p if args.top_p is None else args.top_p,
            "seed": args.seed,
        }
        text = _prompt(args)
        _check_before_loading(args, self.gamma, self.options)
        dtype = args.dtype or ("float32" if args.demo else "auto")
        self.model = load_model(path, _torch_dtype(dtype), experts_implementation="spac")
        self.tokenizer = load_tokenizer(path)
        self.input_ids = self.tokenizer(text, return_tensors="pt").input_ids
        source = args.draft or (str(DRAFT) if args.demo else "none")
        self.draft: Any = {"none": None, "ngram": "ngram"}.get(source, source)
        if isinstance(self.draft, str) and self.draft != "ngram":
            self.draft = load_model(self.draft, _torch_dtype(dtype))
            _check_vocabulary(self.model, self.draft)
        helper = self.draft if isinstance(self.draft, torch.nn.Module) else None
        settings = SpacConfig(
            policy=args.policy, max_length=self.input_ids.shape[1] + args.max_new_tokens + 32
        )
        budget = args.gpu_budget
        ratio = 0.25 if args.demo and budget is None else None
        ratio = ratio if args.cache_ratio is None else args.cache_ratio
        if ratio is not None:
            budget = bytes_for_ratio(self.model, ratio, settings, helper)
        attach(self.model, budget, draft=helper, profile=args.profile, **asdict(settings))

    def warm_up(self) -> None:
        """First calls load libraries and size buffers; no figure should hold that."""
        with contextlib.suppress(ImportError):
            import cvxpy  # noqa: F401  the balancer's thread is at it, seconds on a slow machine
        tokens, self.options["max_new_tokens"] = self.options["max_new_tokens"], 4
        self.generate()
        self.options["max_new_tokens"] = tokens

    def generate(self, streamer: Any = None, draft: bool = True) -> Any:
        from spac.speculative import generate

        return generate(
            self.model,
            self.input_ids,
            draft=self.draft if draft else None,
            num_draft_tokens=self.gamma,
            streamer=streamer,
            return_result=True,
            **self.options,
        )


def _generate(args: argparse.Namespace) -> int:
    from transformers import TextStreamer

    from spac.status import between, stats
    from spac.summary import print_summary

    check_output("--json", args.json)
    session = _Session(args)
    session.warm_up()
    before = stats(session.model)
    result = session.generate(TextStreamer(session.tokenizer, skip_special_tokens=True))
    figures = {"with": stats(session.model)}
    timed = between(before, figures["with"]) if before["offloaded"] else None
    if timed is not None:
        figures["timed"] = timed
    plain = None
    if args.compare and session.draft is not None:
        plain = session.generate(draft=False)
        figures["without"] = stats(session.model)["generation"]
    print_summary(figures["with"], timed, result, plain)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _trace(args: argparse.Namespace) -> int:
    from spac.record import Recorder
    from spac.trace import save_trace

    check_output("--output", args.output)
    session = _Session(args)
    with Recorder(session.model) as recorder:
        session.generate(draft=False)  # or rows of rejected tokens would be among those of the text
    trace = recorder.trace()
    save_trace(args.output, trace)
    tokens, layers, k = trace.shape
    print(f"{args.output}: {tokens} tokens, {layers} layers, top-{k} of {trace.num_experts}")
    return 0


def _check_before_loading(
    args: argparse.Namespace, gamma: int | str, options: dict[str, Any]
) -> None:
    """Refuse what would otherwise fail only when a large model has been loaded."""
    from spac.config import SpacConfig, parse_bytes
    from spac.loading import check_checkpoint
    from spac.speculative import check_options

    SpacConfig(policy=args.policy)
    check_options(gamma, *(v for k, v in options.items() if k not in ("do_sample", "seed")))
    if args.gpu_budget is not None:
        parse_bytes(args.gpu_budget)
    if args.cache_ratio is not None and not 0 <= args.cache_ratio <= 1:
        raise ValueError(f"--cache-ratio: expected 0 to 1, got {args.cache_ratio}")
    if args.draft not in (None, "none", "ngram"):  # the model itself is loaded next
        check_checkpoint(args.draft)
    if args.profile is not None:
        open(args.profile, "rb").close()


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt_file:
        return Path(args.prompt_file).read_text()
    if args.prompt is None and not args.demo:
        raise ValueError("--prompt or --prompt-file: one of them is needed with --model")
    return DEMO_PROMPT if args.prompt is None else args.prompt


def _torch_dtype(name: str) -> Any:
    import torch

    return name if name == "auto" else getattr(torch, name)


def _check_vocabulary(model: Any, draft: Any) -> None:
    from spac.draft import ModelDraft

    ModelDraft(draft, model.config.get_text_config().vocab_size)


if __name__ == "__main__":
    sys.exit(main())
