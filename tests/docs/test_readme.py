"""What README.md says about the systems is what the configs say."""

import pathlib
import re

from genmodels import config, systems

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


def test_the_table_of_systems_is_the_generated_one():
  table = systems.markdown(systems.all_systems())
  assert table in README.read_text(encoding="utf-8"), "paste the output of `genmodels systems --markdown`"
  assert all(f"`{name}`" in table for name in config.names())


def test_pages_and_pictures_that_are_linked_exist():
  for page in [README, *README.parent.glob("docs/**/*.md")]:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
      if "://" not in target:
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pictures_are_small():
  pictures = list(README.parent.glob("docs/images/*"))
  assert pictures and all(p.stat().st_size < 200_000 for p in pictures)
