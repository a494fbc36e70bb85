"""What the docs site makes of the repository: pages that lie elsewhere, the reference by wing, formulas."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Files of the repository by the page that they are on the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "freqprune/networks/weights/README.md": "model_card.md",
}
WINGS = ("networks", "tagging", "attribution", "pruning", "reports", "training")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$((?:(?!\n\n)[^$])+?)\$", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name in ("freqprune", *WINGS):
        files.append(File.generated(config, f"reference/{name}.md", content=reference(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site, formulas as MathML, which every browser draws by itself."""
    there = page.file.src_uri
    source = next((path for path, name in PAGES.items() if name == there), f"docs/{there}")
    text = _LINK.sub(lambda link: f"]({_on_the_site(link[1], source, there)}{link[2] or ''})", markdown)
    if not there.startswith(("how/", "explain.")):
        return text
    pieces = _CODE.split(text)
    return "".join(piece if i % 2 else _FORMULA.sub(_mathml, piece) for i, piece in enumerate(pieces))


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Links in notebooks, which are no Markdown when they come."""
    there = page.file.src_uri
    if not there.endswith(".ipynb"):
        return html

    def led(link: re.Match[str]) -> str:
        return f'href="{Path(_on_the_site(link[1], f"docs/{there}", there)).with_suffix(".html").as_posix()}{link[2]}"'

    return re.sub(r'href="(?!https?:)([^"#:]+\.(?:md|ipynb))(#[^"]*|)"', led, html)


def _on_the_site(link: str, source: str, there: str) -> str:
    target = os.path.normpath(os.path.join(os.path.dirname(source), link))
    page = PAGES.get(target, target.removeprefix("docs/"))
    return os.path.relpath(page, os.path.dirname(there) or ".")


def _mathml(formula: re.Match[str]) -> str:
    block = formula[1] is not None
    return convert(formula[1] or formula[2], display="block" if block else "inline").replace("\n", " ")


def reference(wing: str) -> str:
    """The page of a wing: all that its front door hands on, in the words of the docstrings."""
    folder = ROOT / "freqprune" if wing == "freqprune" else ROOT / "freqprune" / wing
    package = "freqprune" if wing == "freqprune" else f"freqprune.{wing}"
    said = " ".join((ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").split())
    lines = [f"# {package}", "", said, ""]
    for module, name in handed_on(folder):
        if wing != "freqprune" or module == "errors":
            lines += ["", f"::: {package}.{module}.{name}" if module else f"::: {package}.{name}", ""]
        else:  # told in its wing
            lines.append(f"- [`{name}`]({module}.md)" if name in WINGS else f"- [`{name}`][{_home(module, name)}]")
    return "\n".join(lines) + "\n"


def handed_on(folder: Path) -> list[tuple[str, str]]:
    """Module (empty: the wing itself) and name of all that a stub hands on; ``(wing, wing)`` for a wing."""
    stub = ast.parse((folder / "__init__.pyi").read_text())
    found = []
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            wings = folder.name == "freqprune" and not node.module
            found += [(alias.name if wings else node.module or "", alias.name) for alias in node.names]
    return found


def _home(wing: str, name: str) -> str:
    """Where something that the package hands on is defined."""
    module = next(module for module, there in handed_on(ROOT / "freqprune" / wing) if there == name)
    return f"freqprune.{wing}.{module}.{name}"
