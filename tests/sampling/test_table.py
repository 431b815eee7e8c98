"""The table of plug-ins is in step with the registries, the tests and the page."""

import pathlib
import re

from genmodels.sampling import table

ROOT = pathlib.Path(__file__).parents[2]


def test_every_plug_in_says_its_source_and_its_test():
  assert set(table.kinds()) == set(table.FACTS) and len(table.kinds()) == len(table.FACTS)
  for name, (source, exact, test) in table.FACTS.items():
    path, _, function = test.partition("::")
    assert source and exact, name
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), test


def test_the_page_shows_the_table():
  page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
  shown = re.search(r"<!-- plug-ins -->\n(.*?)\n<!-- end of plug-ins -->", page, re.S)[1]
  assert shown == table.markdown(), "python -m genmodels.sampling.table"
