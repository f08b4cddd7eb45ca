"""README and docs do not go stale: snippets run, commands parse, links and signatures hold."""

import argparse
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import spac
from spac import __main__ as cli
from spac.bench import __main__ as bench
from spac.testing import fault

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def code(page: Path, language: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)
    return "\n".join(blocks)


def commands(page: Path) -> list[list[str]]:
    """Command lines of indented blocks and inline code, without comments."""
    text = page.read_text()
    lines = [m.strip() for m in re.findall(r"^    +(\S.*)$", text, re.M)]
    lines += re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in lines:
        if re.match(r"(python -m spac|python docs|torchrun|make )", line):
            found.append(shlex.split(line, comments=True))
    return found


@by_name
def test_python_snippets_run(page):
    source = code(page, "python")
    if source:
        exec(compile(source, page.name, "exec"), {"__name__": "snippet"})


def parses(parser: argparse.ArgumentParser, words: list[str]) -> bool:
    try:
        parser.parse_args(words)
        return True
    except SystemExit as stop:
        return stop.code == 0  # --help


@by_name
def test_commands_exist(page, capsys):
    for words in commands(page):
        if words[0] == "make":
            targets = [w for w in words[1:] if re.fullmatch(r"[a-z-]+", w)]
            makefile = (ROOT / "Makefile").read_text()
            for target in targets:
                assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
        elif words[0] in ("torchrun", "python") and words[1] != "-m":
            script = next(w for w in words[1:] if w.endswith(".py"))
            assert (ROOT / script).exists() or (page.parent / script).exists(), script
        elif words[2] == "spac":
            assert parses(cli._parser(), words[3:]), words
        elif words[2] == "spac.bench":
            name, *rest = words[3:] or ["--help"]
            if name in ("NAME", "--help"):
                continue
            parser = bench._parser(bench._load(name))
            numbers = ["1" if re.fullmatch("[NS]", w) else w for w in rest]
            assert parses(parser, numbers), words
        else:
            importlib.import_module(words[2])


def slug(heading: str) -> str:
    """The anchor that GitHub and mkdocs give a heading."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@by_name
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page.name}: {target}"
    folders = "spac|kernels|csrc|bench|tests|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/]+\.(?:py|h|md|cpp))`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_pages_of_the_site_exist():
    nav = (ROOT / "mkdocs.yml").read_text()
    for name in re.findall(r": (\S+\.md)$", nav, re.M):
        assert (ROOT / "docs" / name).exists(), name


def test_signatures_of_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    blocks = " ".join(re.findall(r"^```text\n(.*?)^```", page, re.M | re.S))
    for function in (*(getattr(spac, name) for name in spac.__all__), fault):
        parameters = []
        for p in inspect.signature(function).parameters.values():
            text = p.name if p.kind != p.VAR_KEYWORD else f"**{p.name}"
            parameters.append(text if p.default is p.empty else f"{text}={p.default!r}")
            if p.kind == p.KEYWORD_ONLY and "*" not in parameters:
                parameters.insert(-1, "*")
        assert f"{function.__name__}({', '.join(parameters)})" in blocks, function.__name__


def test_settings_of_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    from spac.config import POLICIES, SpacConfig

    for name, default in vars(SpacConfig()).items():
        shown = f'"{default}"' if isinstance(default, str) else default
        assert re.search(rf"^\| `{name}` \| `?{shown}`? \|", page, re.M), name
    assert all(f"`{policy}`" in page for policy in POLICIES)


ELSEWHERE = {"ensurepip is not available", "externally-managed-environment", "CUDA out of memory"}
ELSEWHERE |= {"No module named 'spac.kernels'", "couldn't connect to 'https://huggingface.co'"}
# messages of others


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    sources = [path for path in (ROOT / "spac").glob("*.py")] + [ROOT / "Makefile"]
    text = "\n".join(path.read_text() for path in sources)
    text = re.sub(r'"\s*f?"', "", text)  # a message may stand on two lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    for row in re.findall(r"^\| (`.*?) \|", page, re.M):
        for message in set(re.findall(r"`(.+?)`", row)) - ELSEWHERE:
            for part in re.split(r" ?\.\.\.,? ?| [NM] | M$|\(|^N ", message):
                assert part.strip(" :)") in text, message
