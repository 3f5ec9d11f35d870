"""Lays the pages of the documentation site out in build/docs: README and docs, with links that fit. For `make docs-site`.

A link to a file that is no page of the site becomes plain text: the site has the words, a clone has the file.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build" / "docs"
# Pages from outside docs/, by their place on the site.
OTHERS = {
    "README.md": "index.md",
    "README.zh.md": "zh.md",
    "configs/README.md": "configs.md",
    "benchmarks/README.md": "benchmarks.md",
    "deploy/README.md": "deploy.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PICTURES = (".svg", ".png", ".jpg", ".webp")
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def sources() -> dict[Path, str]:
    """Every page and picture, and its place on the site."""
    found = {ROOT / source: place for source, place in OTHERS.items() if (ROOT / source).is_file()}
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix == ".md" or path.suffix in PICTURES:
            found[path] = str(path.relative_to(ROOT / "docs"))
    for path in sorted((ROOT / "benchmarks").rglob("*")):
        if path.suffix in PICTURES:
            found[path] = str(path.relative_to(ROOT))
    return found


def rewritten(text: str, source: Path, places: dict[Path, str]) -> str:
    """A page with its links as they are on the site; blocks of code stay as they are."""
    here = Path(places[source]).parent

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        place = places.get(path, places.get(path / "README.md"))
        if place is None:
            if not path.exists():
                raise SystemExit(f"{source.relative_to(ROOT)}: links to {target}, which is not there")
            return match["text"]
        to = os.path.relpath(place, here) + (f"#{anchor}" if anchor else "")
        return f"{match['picture']}[{match['text']}]({to})"

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def lay_out() -> None:
    """Write build/docs anew."""
    shutil.rmtree(TARGET, ignore_errors=True)
    places = sources()
    for source, place in places.items():
        (TARGET / place).parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = rewritten(source.read_text(encoding="utf-8"), source, places)
            (TARGET / place).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source, TARGET / place)


if __name__ == "__main__":
    lay_out()
