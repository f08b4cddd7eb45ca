"""Text of the bundled demo models: the standard library, held-out modules, tokenizer, prompts."""

import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|eos|>"

# Never trained on and never used for a choice: the reported loss and acceptance come from these.
HELD_OUT = (
    "bisect", "calendar", "cmd", "codeop", "colorsys", "copy", "csv", "filecmp", "fileinput",
    "fnmatch", "fractions", "getopt", "getpass", "graphlib", "heapq", "hmac", "netrc", "pprint",
    "queue", "quopri", "reprlib", "sched", "shelve", "shlex", "statistics", "textwrap", "timeit",
    "zipapp",
)  # fmt: skip
# Never trained on, but read during training to keep the best weights.
VALIDATION = (
    "base64", "code", "configparser", "glob", "mailcap", "pkgutil", "pyclbr", "socketserver",
    "tabnanny", "tempfile", "uuid", "wave",
)  # fmt: skip

# Copies of data rather than text that a person wrote; the encodings are character tables.
SKIPPED_FOLDERS = frozenset({
    "__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib-dynload",
    "cjkencodings", "encoded_modules", "data", "tokenizedata", "crashers",
})  # fmt: skip
SKIPPED_NAMES = re.compile(r"(?:_sysconfigdata|badsyntax_|bad_coding|stringprep|_casefix).*")
MAX_BYTES = 320_000
MAX_DIGITS = 0.12  # share of digits from which a file is a table
MAX_NON_ASCII = 0.02
LONG_LINE = 40  # characters from which a line is unlikely to be shared by chance
MAX_SHARED = 0.1  # share of long lines in common with a kept-out module

# Newlines stay with the indentation after them, a dot or a space with the name after it.
PIECES = r"(?:\r?\n[ \t]*)+|[ .]?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|[ \t\f]+|\s"


@dataclass(frozen=True)
class Corpus:
    """Documents as (name, text), name being the path below the library folder it came from."""

    train: list[tuple[str, str]]
    validation: list[tuple[str, str]]
    held_out: list[tuple[str, str]]
    roots: list[str] = field(default_factory=list)


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(roots: Sequence[Path] = (), limit: int | None = None) -> Corpus:
    """Reads the Python sources below `roots` (default: this interpreter's standard library).

    Where several roots hold the same relative path, the first wins. `limit` keeps that many
    training files, spread evenly. Raises FileNotFoundError if a root has no Python sources.
    """
    roots = list(roots) or [standard_library()]
    documents: dict[str, str] = {}
    for root in roots:
        found = {n: t for n, t in _sources(root) if n not in documents}
        if not found and root == roots[0]:
            raise FileNotFoundError(f"{root}: no Python sources below, a library folder is needed")
        documents.update(found)
    kept_out = {f"{m}.py" for m in HELD_OUT + VALIDATION}
    copied = {ln for n in kept_out & documents.keys() for ln in _long_lines(documents[n])}
    names = "|".join(HELD_OUT + VALIDATION)
    related = re.compile(rf"(?:^|/)(?:test_)?(?:{names})(?:_tests?)?(?:\.py$|/)")
    train = [
        (n, t)
        for n, t in sorted(documents.items())
        if not related.search(n) and _shared(t, copied) <= MAX_SHARED
    ]
    if limit is not None:
        train = train[:: max(1, len(train) // limit)][:limit]
    validation, held_out = (
        [(f"{m}.py", documents[f"{m}.py"]) for m in modules if f"{m}.py" in documents]
        for modules in (VALIDATION, HELD_OUT)
    )
    return Corpus(train, validation, held_out, [r.name for r in roots])


def _sources(root: Path) -> Iterable[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if SKIPPED_FOLDERS & set(folders) or any(p.startswith("config-") for p in folders):
            continue
        if SKIPPED_NAMES.fullmatch(path.name) or not 64 <= path.stat().st_size <= MAX_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # sources that test other encodings
        digits = sum(map(text.count, "0123456789")) / len(text)
        non_ascii = 1 - len(text.encode("ascii", "ignore")) / len(text)
        if digits <= MAX_DIGITS and non_ascii <= MAX_NON_ASCII:
            yield relative.as_posix(), text


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE}


def _shared(text: str, lines: set[str]) -> float:
    own = _long_lines(text)
    return len(own & lines) / len(own) if own else 0.0


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token, so any text round-trips and none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Stream:
    """Documents one after another, each as BOS text EOS."""

    tokens: torch.Tensor  # [N] int64
    starts: torch.Tensor  # [D] int64, the places of BOS
    bytes: int  # UTF-8 bytes of the text

    def to(self, device: str) -> "Stream":
        return Stream(self.tokens.to(device), self.starts.to(device), self.bytes)


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[tuple[str, str]]) -> Stream:
    """The documents as one token stream on the CPU."""
    texts = [text for _, text in documents]
    # The backend itself: the wrapper warns of texts longer than the context, which are meant here.
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    rows = [[*e.ids, tokenizer.eos_token_id] for e in encodings]
    lengths = torch.tensor([0] + [len(r) for r in rows])
    tokens = torch.tensor([i for row in rows for i in row])
    return Stream(tokens, lengths.cumsum(0)[:-1], sum(len(t.encode()) for t in texts))


def prompts(
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[tuple[str, str]],
    count: int,
    length: int,
) -> torch.Tensor:
    """Prompts [count, length] int64: BOS, then text from a line that starts a def or class.

    Walks the documents in order, one prompt of each a round, later definitions in later rounds.
    Raises ValueError if the documents hold fewer than `count` such places.
    """
    places = []
    for index, (_, text) in enumerate(documents):
        for turn, match in enumerate(re.finditer(r"^ *(?:def|class) ", text, re.M)):
            places.append((turn, index, text[match.start() : match.start() + 16 * length]))
    rows: list[list[int]] = []
    for _, _, piece in sorted(places):
        ids = tokenizer.backend_tokenizer.encode(piece).ids[:length]
        if len(ids) == length and len(rows) < count:
            rows.append(ids)
    if len(rows) < count:
        raise ValueError(
            f"{count} prompts of {length} tokens needed, the documents hold {len(rows)}"
        )
    return torch.tensor(rows)


def held_out_documents() -> list[tuple[str, str]]:
    """The held-out modules as this interpreter has them."""
    paths = (standard_library() / f"{m}.py" for m in HELD_OUT)
    return [(p.name, p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def held_out_prompts(
    tokenizer: PreTrainedTokenizerFast, count: int = 20, length: int = 96
) -> torch.Tensor:
    """Prompts [count, length] int64 from the held-out modules of this interpreter."""
    return prompts(tokenizer, held_out_documents(), count, length)
