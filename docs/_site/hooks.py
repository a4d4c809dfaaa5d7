"""Pages of the site that lie elsewhere in the repository, and links that work in both places.

The texts of the repository link to each other by relative paths. Here the ones outside of docs/ become pages as well,
links between pages are rewritten to them, and a link to a file that is no page becomes the file's path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "measured.md": "recipes/RESULTS.md",
    "packages/repvitok.md": "packages/repvitok/README.md",
    "packages/latent-action.md": "packages/latent-action/README.md",
    "packages/repwam-client.md": "packages/repwam-client/README.md",
    "packages/repwam-core.md": "packages/repwam-core/README.md",
    "packages/repwam-weights.md": "packages/repwam-weights/README.md",
}
PICTURES = {"packages/docs/reconstructions.png": "packages/repvitok/docs/reconstructions.png"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/, their pictures, and every file of benchmarks/results."""
    for page, source in {**ELSEWHERE, **_benchmarks()}.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for place, source in PICTURES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site; what is no page is named by its path."""
    del config
    here = page.file.src_uri
    source = {**ELSEWHERE, **_benchmarks()}.get(here, f"docs/{here}")
    pages = {path: uri for uri, path in {**ELSEWHERE, **_benchmarks()}.items()}
    pages |= {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages() if not file.generated_by}

    def rewritten(match: re.Match[str]) -> str:
        text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group(0)
        path, _, anchor = target.partition("#")
        at = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if at in pages:
            uri = posixpath.relpath(pages[at], posixpath.dirname(here) or ".")
            return f"[{text}]({uri}{'#' + anchor if anchor else ''})"
        if not (ROOT / at).exists():
            raise ValueError(f"{source}: the link to {target} leads nowhere")
        return f"{text} (`{at}`)" if text.strip("`") != at else f"`{at}`"

    return LINK.sub(rewritten, markdown)


def _benchmarks() -> dict[str, str]:
    results = sorted((ROOT / "benchmarks/results").glob("*.md"))
    return {f"benchmarks/{path.name}": str(path.relative_to(ROOT)) for path in results}
