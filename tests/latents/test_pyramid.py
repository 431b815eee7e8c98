"""The integer pyramid: lossless, bounded, and VAR's identities between its parts."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import latents
from genmodels.config import ConfigError
from genmodels.latents import Pyramid


def images(count=64, side=8, levels=17, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.integers(0, levels, (count, side, side))
  x[0], x[1] = 0, levels - 1  # the extremes
  x[2] = (levels - 1) * (np.indices((side, side)).sum(0) % 2)  # every mean is a tie
  return x


@pytest.mark.parametrize("side, levels, sizes", [(8, 17, (1, 2, 4, 8)), (8, 256, (1, 2, 8)), (6, 3, (2, 6))])
def test_lossless(side, levels, sizes):
  p = Pyramid(side=side, levels=levels, sizes=sizes)
  x = images(side=side, levels=levels)
  codes = np.asarray(p.encode(jnp.asarray(x)))
  assert codes.shape == (64, sum(n * n for n in sizes)) and codes.dtype == np.int32
  np.testing.assert_array_equal(np.asarray(p.decode(codes)), x)
  assert not np.array_equal(np.asarray(p.decode(np.where(np.arange(p.length) < 1, codes + 1, codes))), x)


def test_every_image_of_two_by_two():
  """All 81 images of 2 × 2 pixels and 3 levels: lossless, residuals in range, codes injective."""
  p = Pyramid(side=2, levels=3, sizes=(1, 2))
  x = np.array(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 2)
  codes = np.asarray(p.encode(jnp.asarray(x)))
  np.testing.assert_array_equal(np.asarray(p.decode(codes)), x)
  assert codes.min() >= 0 and codes.max() < p.vocab == 5
  assert codes[:, 0].min() == p.levels - 1  # the first scale is a mean, never negative
  assert len(np.unique(codes, axis=0)) == 81


def test_var_identities():
  """Σ_k h_k = f̂, and the teacher-forced inputs are those of the chain, to the bit."""
  p = Pyramid()
  codes = p.encode(jnp.asarray(images()))
  parts = [p.part(k, c) for k, c in enumerate(p.split(codes))]
  np.testing.assert_array_equal(sum(np.asarray(h) for h in parts), np.asarray(p.reconstruct(codes)))
  state, chain = p.start(codes.shape[:-1]), []
  known = jnp.full_like(codes, 7)  # what is not known yet may hold anything
  edge = 0
  for k, c in enumerate(p.split(codes)):
    n = p.blocks[k]
    chain.append(np.asarray(p.shown(state, k)))
    np.testing.assert_array_equal(np.asarray(p.next_input(known))[:, edge : edge + n], chain[-1])
    state = p.accumulate(state, k, c)
    known = known.at[:, edge : edge + n].set(codes[:, edge : edge + n])
    edge += n
  np.testing.assert_array_equal(np.concatenate(chain, 1), np.asarray(p.next_input(codes)))
  np.testing.assert_array_equal(np.asarray(state), images())


def test_partial_sums_are_rounded_means():
  """f̂_k is the image's cell mean, rounded half up, so each residual is as small as its scale allows."""
  p, x = Pyramid(), images()
  state = p.start((len(x),))
  for k, c in enumerate(p.split(p.encode(jnp.asarray(x)))):
    state = p.accumulate(state, k, c)
    w = 8 // p.sizes[k]
    mean = x.reshape(-1, p.sizes[k], w, p.sizes[k], w).mean((2, 4))
    want = np.floor(mean + 0.5).repeat(w, 1).repeat(w, 2)
    np.testing.assert_array_equal(np.asarray(state), want)


def test_input_depends_on_earlier_scales_only():
  p = Pyramid()
  codes = np.asarray(p.encode(jnp.asarray(images(4))))
  base = np.asarray(p.next_input(codes))
  for n in range(p.length):
    changed = codes.copy()
    changed[:, n] = (changed[:, n] + 5) % p.vocab
    moved = np.abs(np.asarray(p.next_input(changed)) - base).max((0, 2)) > 0
    scale = p.scale_of[n]
    assert not moved[p.scale_of <= scale].any()
    assert moved[p.scale_of > scale].any() == (scale < 3)  # it can fail: later scales do move


def test_snap_and_grid_latents():
  p, r, q = Pyramid(), latents.build({"kind": "raster"}), latents.build({"kind": "patches"})
  x = jnp.asarray(images())
  np.testing.assert_array_equal(np.asarray(p.snap(np.array([-16, -0.4, 0.6, 99.0]))), [0, 16, 17, 32])
  for latent in (r, q):
    codes = latent.encode(x)
    np.testing.assert_array_equal(np.asarray(latent.decode(codes)), np.asarray(x))
    value = codes + 0.3 / (1 if latent is r else 8)
    np.testing.assert_allclose(np.asarray(latent.snap(value)), np.asarray(codes), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(latent.snap(latent.snap(value))), np.asarray(latent.snap(value)))
  patch = np.asarray(q.encode(x))[3, 5]  # row 1, column 1 of the 4 × 4 grid
  np.testing.assert_allclose(patch, np.asarray(x)[3, 2:4, 2:4].reshape(-1) / 8 - 1, rtol=1e-6)
  np.testing.assert_array_equal(r.positions[9], [1, 1])


@pytest.mark.parametrize(
  "section, names",
  [
    ({"kind": "pyramid", "sizes": (1, 3, 8)}, "latent.sizes"),
    ({"kind": "pyramid", "sizes": (1, 2, 4)}, "latent.sizes"),
    ({"kind": "patches", "patch": 3}, "latent.patch"),
    ({"kind": "raster", "levels": 1}, "levels"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(section, names):
  with pytest.raises(ConfigError, match=names):
    latents.build(section)


def test_side_table_of_another_size_is_refused():
  with pytest.raises(ValueError, match="latent.side"):
    Pyramid().encode_side({"pixels": jnp.zeros((2, 1, 16, 16))})


def test_png_grid(tmp_path):
  from PIL import Image

  from genmodels.latents import png

  x = images(5)
  png.save_grid(tmp_path / "grid.png", x, levels=17, columns=3, zoom=2)
  got = np.asarray(Image.open(tmp_path / "grid.png"))
  assert got.shape == (2 * 17 + 1, 3 * 17 + 1)
  np.testing.assert_array_equal(got[1:17:2, 18:34:2], x[1] * 255 // 16)  # the second image, white
  assert (got[0] == 128).all() and (got[18:34, 35:51] == 128).all()  # lines, and the empty cell
