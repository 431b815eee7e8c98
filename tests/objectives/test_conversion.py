"""Conversion recipes, from their configs: what each one's paper says, asserted on its own objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, corruption, models, objectives
from genmodels import rows as row_geometry
from genmodels.contracts import CONTEXT, TEXT, Inputs, Target
from genmodels.masks import AttnMask
from genmodels.objectives import laws
from tests.objectives.test_text import KEY, MASK, ar, logits, loss, rows, trunk


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


@functools.cache
def objective(ref: str):
  return objectives.build(config.load(f"language/{ref}").objective, {"mask_id": MASK})


def drawn(ref, row, step=3):
  """(noise, targets, denominators) of one draw."""
  obj = objective(ref)
  return obj.corruption.draw(row, KEY, step), *obj.prepare(row, KEY, step)[1:]


def test_complementary_pair_predicts_every_token_once():
  row = rows((24, 11), B=4)
  noise, targets, denominators = drawn("fast_dllm_v2:tiny", row)
  asked = [np.asarray(targets[t].weight > 0).astype(int) for t in ("a", "b")]
  label = np.asarray(row.role == 1)
  np.testing.assert_array_equal(asked[0] + asked[1], label)
  assert min(a.sum() for a in asked) > 5
  # Two masks, one clean stream: three slots per token, and the mean over the labels of the pair.
  obj = objective("fast_dllm_v2:tiny")
  assert obj.view(row, noise)[0].ids.shape[1] == 3 * row.tokens.shape[1]
  assert float(denominators["a"]) == float(denominators["b"]) == label.sum()


def test_two_noisy_streams_are_two_rows():
  """Each copy's losses over the shared clean stream are those of that copy alone (a doubled batch)."""
  row = rows((16,), B=2)
  obj = objective("fast_dllm_v2:tiny")
  noise = obj.corruption.draw(row, KEY, 3)
  _, pair = loss(obj, row, term="a")
  _, other = loss(obj, row, term="b")

  @dataclasses.dataclass(frozen=True)
  class Given(corruption.Corruption):
    """The copy of the pair, as a corruption of one copy."""

    copy: int = 0

    def draw(self, row, key, step, latent=None, bound=None):
      one = lambda x: x[:, self.copy : self.copy + 1]
      return noise.replace(
        level=one(noise.level), hit=one(noise.hit), marginal=one(noise.marginal), nelbo=one(noise.nelbo)
      )

  for copy, want in enumerate((pair, other)):
    alone = objectives.Objective(
      corruption=Given(blocks=obj.corruption.blocks, copy=copy),
      layout={"kind": "streams", "streams": ("n", "c")},
      masks={"full": "bd3"},
      terms={"a": dataclasses.replace(obj.terms["a"], stream="n")},
      mask_id=MASK,
    )
    np.testing.assert_allclose(loss(alone, row)[1], want, atol=1e-5)
  assert np.abs(np.asarray(pair) - np.asarray(other)).max() > 0.1


@pytest.mark.parametrize("name", ["tidar", "idlm"])
def test_all_mask_systems_mask_everything(name):
  row = rows((15, 9), B=2)
  for step in (0, 40):
    noise, targets, _ = drawn(f"{name}:tiny", row, step)
    np.testing.assert_array_equal(noise.hit[:, 0], row.role == 1)
    np.testing.assert_array_equal(np.unique(targets["diffusion"].weight), [0, 1])
  size = np.asarray(noise.blk_hi - noise.blk_lo).max()
  assert size == 4
  scale = {n: float(t.scale(0)) for n, t in objective(f"{name}:tiny").terms.items()}
  assert scale == {"tidar": {"ar": 0.5, "diffusion": 0.5}, "idlm": {"ar": 0.2, "diffusion": 1.0}}[name]


@pytest.mark.parametrize("name", ["tidar", "idlm", "wedlm"])
def test_clean_stream_keeps_the_ar_loss(name):
  """The AR term is the AR model's loss, whatever the noisy stream shows (T8, T25)."""
  row = rows()
  np.testing.assert_allclose(
    np.asarray(loss(objective(f"{name}:tiny"), row, term="ar")[1]), np.asarray(loss(ar(), row)[1]), atol=1e-5
  )
  blind = dataclasses.replace(objective(f"{name}:tiny"), masks={"full": "bd3"})
  with pytest.raises(config.ConfigError, match="clean identity"):
    laws.check(blind)


@pytest.mark.slow
def test_observed_first_is_causal_in_physical_order():
  """The noisy block, physically reordered under a plain causal mask, gives the same predictions (WeDLM)."""
  obj, row = objective("wedlm:tiny"), rows((16,), B=1)
  noise = obj.corruption.draw(row, KEY, 3)
  model, params = trunk()
  inputs, targets, _ = obj.prepare(row, KEY, 3)
  every = Target("text", jnp.arange(32)[None], jnp.zeros((1, 32), jnp.int32), jnp.ones((1, 32)))
  got = model.apply(params, inputs, {"x": every}).dists["x"].map(lambda x: x)[0, :16]
  order = np.argsort(np.asarray(noise.order[0]))
  shown = np.asarray(jnp.where(noise.hit[0, 0], MASK, row.tokens[0]))
  for lo in (0, 8):
    # Physical row: the clean prefix, then the block in generation order; then slots that nobody reads.
    src = np.concatenate([np.arange(lo), order[lo : lo + 8], np.zeros(8 - lo, int)])
    ids = np.concatenate([np.asarray(row.tokens[0, :lo]), shown[order[lo : lo + 8]], np.zeros(8 - lo, int)])
    n = jnp.arange(16, dtype=jnp.int32)
    causal = AttnMask(n[None], jnp.zeros((1, 1, 16), jnp.int32), (n + 1)[None, None])
    want = logits(jnp.asarray(ids)[None], causal, jnp.asarray(src, jnp.float32)[None, :, None])[0]
    np.testing.assert_allclose(got[order[lo : lo + 8]], want[lo : lo + 8], atol=2e-5)
  assert (order != np.arange(16)).any()
  # Control: without the reordering a masked token would see what is not there to its left only.
  plain = dataclasses.replace(obj, corruption=dataclasses.replace(obj.corruption, order="logical"))
  inputs, _, _ = plain.prepare(row, KEY, 3)
  left = model.apply(params, inputs, {"x": every}).dists["x"].map(lambda x: x)[0, :16]
  assert np.abs(np.asarray(left - got)[:, :MASK]).max() > 1e-3


def test_wedlm_weights_sum_to_one():
  noise, targets, denominators = drawn("wedlm:tiny", rows((16, 16), B=4))
  weight = np.asarray(targets["diffusion"].weight)
  np.testing.assert_allclose(weight.sum(), float(denominators["diffusion"]), rtol=1e-5)
  hit, block = np.asarray(noise.hit[:, 0]), np.asarray(noise.blk_lo)
  text = np.asarray(rows((16, 16), B=4).role == 1)
  for b in range(4):
    for lo in np.unique(block[b]):
      inside = block[b] == lo
      share = (hit[b] & inside).sum() / (text[b] & inside).sum()
      np.testing.assert_allclose(weight[b][hit[b] & inside], 1 / share, rtol=1e-5)


def test_cart_weights():
  """½ Σ_j p(1−p)^(|i−j|−1) over the shown tokens: .15, .105, .0735 at distances 1, 2, 3 for p = .3."""
  doc = jnp.asarray([[0] * 9 + [1] * 4 + [-1]])
  shown = jnp.zeros((1, 14), bool).at[0, jnp.array([4, 10])].set(True)
  got = np.asarray(row_geometry.geometric_context(doc, shown, 0.3))[0]
  near = [0.15, 0.105, 0.0735, 0.05145]
  np.testing.assert_allclose(got[5:9], near, rtol=1e-5)
  np.testing.assert_allclose(got[:4][::-1], near, rtol=1e-5)  # both sides alike
  np.testing.assert_allclose(got[[9, 11, 12]], [0.15, 0.15, 0.105], rtol=1e-5)  # the document's own only
  assert got[4] == got[10] == got[13] == 0
  two = np.asarray(row_geometry.geometric_context(doc, shown.at[0, 6].set(True), 0.3))[0]
  np.testing.assert_allclose(two[5], 0.3, rtol=1e-5)

  row = rows((16,), B=2)
  noise, targets, _ = drawn("dream:cart", row)
  want = row_geometry.geometric_context(row.doc, ~noise.hit[:, 0], 0.1) * noise.hit[:, 0]
  np.testing.assert_allclose(targets["diffusion"].weight, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["dream", "diffullama", "diffucoder"])
def test_adapted_ar_losses_by_hand(name):
  """Σ over masked of CE_i/p read at slot i−1, over the number of masked tokens, under full attention."""
  row = rows((12,), B=3)
  noise = objective(f"{name}:tiny").corruption.draw(row, KEY, 3)
  hit, N = np.asarray(noise.hit[:, 0]), 12
  n = jnp.arange(N, dtype=jnp.int32)
  everything = AttnMask(n[None], jnp.zeros((1, 1, N), jnp.int32), jnp.full((1, 1, N), N, jnp.int32))
  shown = jnp.where(noise.hit[:, 0], MASK, row.tokens)
  logp = np.asarray(jax.nn.log_softmax(logits(shown, everything, row.pos)))
  total = sum(
    -logp[b, i - 1, row.tokens[b, i]] / noise.marginal[b, 0, i]
    for b in range(3)
    for i in range(1, N)
    if hit[b, i]
  )
  np.testing.assert_allclose(loss(objective(f"{name}:tiny"), row)[0], total / hit[:, 1:].sum(), rtol=1e-4)
  eps = 1e-3 if name == "dream" else 0.0
  np.testing.assert_allclose(noise.marginal, (1 - eps) * noise.level, rtol=1e-5)


@pytest.mark.slow
def test_meap_without_masks_is_next_token_prediction():
  row = rows()
  obj = objective("meap:tiny")
  off = dataclasses.replace(obj, corruption=dataclasses.replace(obj.corruption, ratio=0.0))
  np.testing.assert_allclose(loss(off, row)[0], loss(ar(), row)[0], rtol=1e-6)
  assert abs(loss(obj, row)[0] - loss(ar(), row)[0]) > 1e-3
  # Likelihoods see clean inputs.
  _, targets, _ = obj.prepare(row, KEY, 3, bound=(0, 1))
  inputs, _, _ = obj.prepare(row, KEY, 3, bound=(0, 1))
  np.testing.assert_array_equal(inputs.ids[..., 0], row.tokens)
  assert float(targets["text"].weight.sum()) == 3 * 11


def test_meap_masks_inputs_and_no_targets():
  row = rows((200,), B=8)
  obj = objective("meap:tiny")
  inputs, targets, denominators = obj.prepare(row, KEY, 3)
  masked = np.asarray(inputs.ids[..., 0] == MASK)
  assert abs(masked[:, 1:].mean() - 0.15) < 0.03 and not masked[:, 0].any()
  np.testing.assert_array_equal(targets["text"].value, row.tokens)
  assert float(targets["text"].weight.sum()) == float(denominators["text"]) == 8 * 199
  assert isinstance(inputs, Inputs) and (np.asarray(targets["text"].value) != MASK).all()


def test_biased_masks_have_no_bound_weight():
  """The law: a bound weight on tokens that are not masked uniformly is refused, the true marginal is not."""
  obj = objective("efficient_dlm:tiny")
  assert laws.check(obj) == []
  wrong = dataclasses.replace(
    obj, terms={"diffusion": dataclasses.replace(obj.terms["diffusion"], weight="nelbo")}
  )
  with pytest.raises(config.ConfigError, match="no bound weight"):
    laws.check(wrong)


def test_models_of_the_recipes_build():
  for name in ("fast_dllm_v2", "wedlm:tiny"):
    cfg = config.load(f"language/{name}")
    assert models.build(dict(config.plain(cfg.model)) | {"vocab": 384}).cfg.layers in (28, 2)


def test_one_pass_is_the_chain_rule():
  """Σ log p of the masked tokens in one pass = their conditionals, one forward each, in generation order."""
  obj, row = objective("as_arm:tiny"), rows((10,), B=1)
  noise = obj.corruption.draw(row, KEY, 2)
  want = np.asarray(loss(obj, row, step=2)[1])[0]
  model, params = trunk()
  given = row.replace(role=jnp.where(noise.hit[:, 0], TEXT, CONTEXT))

  @jax.jit
  def conditional(committed):
    """nll of every token, given the committed ones only: what a sampler asks before it commits the next."""
    state = obj.corruption.state(given, committed)
    # Content of tokens that are not there yet is left out, as a sampler leaves it out.
    n = jnp.arange(10)
    pairs = jnp.concatenate(
      [jnp.stack([0 * n, n], -1), jnp.where(committed[0, :, None], jnp.stack([0 * n + 1, n], -1), -1)]
    )
    inputs, read = obj.view(given, state, pairs[None])
    target = Target("text", read["subset"], row.tokens, jnp.ones((1, 10)))
    return model.apply(params, inputs, {"x": target}).dists["x"].nll(row.tokens)[0]

  hit = np.asarray(noise.hit[0, 0])
  assert 3 <= hit.sum() <= 8
  committed = jnp.asarray(~hit)[None]
  for n in np.flatnonzero(hit):  # text order inside the masked part
    np.testing.assert_allclose(want[n], conditional(committed)[n], atol=2e-5)
    committed = committed.at[0, n].set(True)
  # Control: another order is another factorisation.
  assert (
    abs(float(conditional(jnp.asarray(~hit)[None])[np.flatnonzero(hit)[-1]]) - want[np.flatnonzero(hit)[-1]])
    > 1e-3
  )


@pytest.mark.slow
def test_any_subset_likelihood_asks_for_every_token_once():
  row = rows((9, 6), B=2)
  obj = objective("as_arm:tiny")
  inputs, targets, _ = obj.prepare(row, KEY, 0, bound=(2, 5))
  np.testing.assert_array_equal(targets["subset"].weight, row.role == 1)
  assert (np.asarray(inputs.ids[:, :15, 0])[np.asarray(row.role == 1)] == MASK).all()
  noise = obj.corruption.draw(row, KEY, 0, bound=(2, 5))
  within = np.asarray(noise.order)
  np.testing.assert_array_equal(within, np.tile(np.r_[0:9, 0:6], (2, 1)))  # nothing given: left to right
  with pytest.raises(config.ConfigError, match="order='observed_first'"):
    objectives.Objective(corruption={"kind": "subset", "order": "logical"})
