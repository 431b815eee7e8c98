"""Text that is already on the machine: the standard library of Python, its documentation, Perl's.

What is not installed is left out and said so. One document is one file; held-out documents are chosen by
their name, so that the split does not depend on what else is there.
"""

from __future__ import annotations

import glob
import html.parser
import os
import re
from collections.abc import Iterator

from genmodels.data import prepare

HTML = ("/usr/share/doc/python3*/html", "/usr/share/doc/python3*-doc/html")
PODS = ("/usr/share/perl/*/pod", "/usr/share/perl/*")
_LEFT_OUT = ("genindex", "search", "py-modindex", "whatsnew/changelog")


class _Text(html.parser.HTMLParser):
  """The text of a page, without scripts, styles and navigation."""

  BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "pre", "h1", "h2", "h3", "h4", "br", "table", "section"}
  SILENT = {"script", "style", "head", "nav", "footer"}

  def __init__(self):
    super().__init__()
    self.parts: list[str] = []
    self.silent = 0

  def handle_starttag(self, tag, attrs):
    at = dict(attrs)
    inside = (
      tag in self.SILENT or at.get("role") == "navigation" or "sphinxsidebar" in (at.get("class") or "")
    )
    if self.silent or inside:
      self.silent += tag not in ("br", "img", "link", "meta", "input", "hr")
    if tag in self.BLOCKS:
      self.parts.append("\n")

  def handle_endtag(self, tag):
    self.silent = max(self.silent - 1, 0) if self.silent else 0

  def handle_data(self, data):
    if not self.silent:
      self.parts.append(data)


def text_of_html(page: str) -> str:
  """The text of a page: one line a block, no blank lines in a row."""
  parser = _Text()
  parser.feed(page)
  text = "".join(parser.parts).replace("¶", "")
  return re.sub(r"\n\s*\n\s*\n+", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def documents(progress: prepare.Progress, found: dict[str, int]) -> Iterator[prepare.Text]:
  """Every document; `found` {source: documents} is filled as they pass."""
  for text in prepare.read_python(progress):
    found["python sources"] = found.get("python sources", 0) + 1
    yield text
  for source, paths, read in (
    ("python documentation", _files(HTML, ".html"), text_of_html),
    ("perl documentation", _files(PODS, ".pod"), str),
  ):
    for path in paths:
      try:
        with open(path, encoding="utf-8") as f:
          body = read(f.read())
      except (OSError, UnicodeDecodeError) as e:
        progress.bad.append(f"{path}: {e}")
        continue
      if len(body) > 200:
        found[source] = found.get(source, 0) + 1
        yield prepare.Text(body, key=f"{source}/{os.path.basename(path)}")


def _files(patterns, suffix) -> list[str]:
  roots = {os.path.realpath(r) for p in patterns for r in glob.glob(p)}
  names = {f for r in roots for f in glob.glob(os.path.join(r, "**", f"*{suffix}"), recursive=True)}
  return sorted(f for f in names if not any(left in f for left in _LEFT_OUT))
