"""docs/attention.md: its code runs, and its pictures are those of the masks."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from genmodels.masks import AttnMask, builders, draw

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
PICTURES = DOCS / "images" / "masks"


def test_the_pages_code_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"```python\n(.*?)```", (DOCS / "attention.md").read_text(encoding="utf-8"), re.S)
  assert len(blocks) == 4
  names = {}
  for block in blocks:
    exec(block, names)
  assert names["mask"].lo.shape == (1, 2, 64) and (tmp_path / "window_and_sink.png").exists()
  assert names["out"].shape == names["q"].shape and names["lse"].shape == (1, 4, 128)
  assert 6 <= int(names["tiles"]) < 16


def test_every_builder_has_a_picture_and_the_page_shows_it():
  made = {
    name
    for name, f in inspect.getmembers(builders, inspect.isfunction)
    if f.__module__ == builders.__name__ and not name.startswith("_")
    if inspect.signature(f).return_annotation in ("AttnMask", AttnMask)
  }
  assert "bd3" in made and len(made) >= 23
  assert set(draw.GALLERY) == made - {"dual"}, (
    "dual is what bd3, context_causal, idlm and wedlm are made with"
  )
  assert {p.stem for p in PICTURES.glob("*")} == set(draw.GALLERY)
  shown = re.findall(r"images/masks/(\w+)\.png", (DOCS / "attention.md").read_text(encoding="utf-8"))
  assert sorted(shown) == sorted(draw.GALLERY)
  assert sum(p.stat().st_size for p in PICTURES.glob("*")) < 300 * 1024


def test_pictures_show_todays_masks():
  shown = {name: Image.open(PICTURES / f"{name}.png").text["Mask"] for name in draw.GALLERY}
  # Compiled as one program: operation by operation takes a minute.
  masks = jax.jit(lambda: {name: make() for name, (_, make) in draw.GALLERY.items()})()
  today = {name: draw.digest(mask) for name, mask in masks.items()}
  assert shown == today, "run `python -m genmodels.masks.draw docs/images/masks`"


def test_cells_are_the_mask():
  bd3 = jax.jit(builders.bd3)
  mask = bd3(jnp.asarray([[0] * 6 + [-1] * 2]), 2)
  cells = draw.cells(mask)
  np.testing.assert_array_equal((cells > 0) & (cells < 255), np.asarray(mask.to_dense())[0])
  assert set(np.unique(cells)) == {0, 1, 2, 255}
  assert (cells[:, [6, 7, 14, 15]] == 255).all()
  assert draw.digest(mask) != draw.digest(bd3(jnp.asarray([[0] * 8]), 2))
