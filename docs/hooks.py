"""What MkDocs is taught beside its plugins: formulae, and links that leave the documentation's folder."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

REPOSITORY = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?:#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Fences of the language ``math`` (which GitHub draws too) become MathML, which browsers draw by themselves."""
    fence = {"name": "math", "class": "math", "format": _math}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to what the repository has and the site has not: those to modules lead to their reference, others go."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def replace(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        found = REPOSITORY / path
        if not found.exists() or (path.startswith("docs/") and not found.is_dir()):
            return link[0]
        module = path.removesuffix(".py").replace("/", ".")
        is_module = path.startswith("symphony_vlm") and (path.endswith(".py") or found.is_dir())
        return f"[{link['text']}][{module}]" if is_module else link["text"]

    return LINK.sub(replace, markdown)


def _math(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    lines = [convert(line, display="block") for line in source.strip().splitlines() if line.strip()]
    return f'<div class="{css_class}">{"".join(lines)}</div>'
