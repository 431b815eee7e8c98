"""Multi-token prediction and draft heads: the model itself stays as it is, drafts see what they may see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, objectives, optim, system
from genmodels import state as states
from genmodels.contracts import Inputs, Target
from genmodels.masks import AttnMask
from genmodels.masks import laws as mask_laws
from genmodels.models import lora
from genmodels.objectives import laws
from genmodels.step import StepConfig, make_train_step
from tests.objectives.test_text import KEY, MASK, V, rows

SYSTEMS = ("mtp", "medusa", "hydra", "dflash")
SMALL = dict(width=32, layers=2, num_heads=4, num_kv_heads=2, mlp=48, init_std=0.3)


@functools.cache
def built(name: str, seed: int = 1):
  """(objective, model, parameters with random adapters and blocks) of a system's tiny variant, smaller."""
  cfg = config.load(f"language/{name}:tiny")
  objective = objectives.build(cfg.objective, {"mask_id": MASK})
  section = config.plain(cfg.model) | SMALL | {"vocab": V, "head_dim": 8}
  for head in section["heads"].values():
    if head.get("kind") != "latent":
      head["forbid"] = (MASK,)
  model = models.build(section)
  with jax.ensure_compile_time_eval():
    params = jax.jit(model.init)(jax.random.key(seed))
  return objective, model, params


def shaken(params, seed=2, scale=0.3, only=""):
  """Every leaf whose path holds `only`, moved by a normal draw."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    name = jax.tree_util.keystr(path)
    return jnp.asarray(x + scale * rng.standard_normal(x.shape).astype(np.float32)) if only in name else x

  return jax.tree_util.tree_map_with_path(leaf, params)


def all_slots(inputs: Inputs, head: str = "text", given=None) -> dict:
  B, S = inputs.doc.shape
  slot = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
  return {"x": Target(head, slot, jnp.zeros((B, S), jnp.int32), jnp.ones((B, S)), given)}


def logits(model, params, inputs, head="text", given=None):
  return model.apply(params, inputs, all_slots(inputs, head, given)).dists["x"].map(lambda z: z)


# ---- multi-token prediction


@pytest.mark.strict
def test_own_predictions_keep_their_bits():
  """Clean slots of a row with mask groups: the bits of the base model, whatever the adapters hold."""
  objective, model, params = built("mtp")
  inputs, _, _ = objective.prepare(rows((13, 9), B=2), KEY, 3)
  N = 22
  np.testing.assert_array_equal(inputs.route[:, N:], 0)
  assert np.asarray(inputs.route[:, :N]).mean() > 0.7
  states_of = jax.jit(lambda p, route: model.apply(p, inputs.replace(route=route), {}).layers["hidden"])
  run = lambda p, route=inputs.route: states_of(p, route)
  bits = lambda x: np.asarray(x).view(np.uint32)
  base = bits(run(lora.strip(params)))
  for adapted in (params, shaken(params, only="lora_"), shaken(params, scale=30, only="lora_")):
    got = bits(run(adapted))
    np.testing.assert_array_equal(got[:, N:], base[:, N:])
  # The masks do move, and where the gate is open everything does.
  adapted = shaken(params, only="lora_")
  assert (bits(run(adapted))[:, :N] != base[:, :N]).mean() > 0.5
  assert (bits(run(adapted, jnp.ones_like(inputs.route)))[:, N:] != base[:, N:]).mean() > 0.5
  with pytest.raises(ValueError, match="stack/s0/l0/attn/q: the adapter is gated"):
    logits(model, params, inputs.replace(route=None))


@pytest.mark.slow
def test_groups_of_one_row_equal_separate_forwards():
  """A group of masks in the packed row = its prefix and its masks alone under a causal mask."""
  objective, model, params = built("mtp")
  params = shaken(params, only="lora_")
  row, N = rows((14,), B=1), 14
  noise = objective.corruption.draw(row, KEY, 3)
  inputs, _ = objective.view(row, noise)
  packed = np.asarray(jax.jit(lambda p: logits(model, p, inputs))(params))[0, :N]
  lo, hit = np.asarray(noise.blk_lo[0]), np.asarray(noise.hit[0, 0])
  starts = np.unique(lo[hit])
  assert len(starts) >= 3 and hit[starts].all() and not hit[: starts[0]].any() and 1 <= starts[0] <= 4
  n, G = np.arange(N), len(starts)
  masked = n[None] >= starts[:, None]
  at = jnp.arange(N, dtype=jnp.int32)[None]
  alone = Inputs(
    ids=jnp.where(masked, MASK, row.tokens)[..., None],
    pos=jnp.broadcast_to(row.pos, (G, N, 1)),
    doc=jnp.zeros((G, N), jnp.int32),
    masks={"full": AttnMask(at, jnp.zeros((1, 1, N), jnp.int32), at[:, None] + 1)},
    route=jnp.asarray(masked, jnp.int32),
  )
  want = np.asarray(jax.jit(lambda p: logits(model, p, alone))(params))
  for g, start in enumerate(starts):
    mine = hit & (lo == start)
    np.testing.assert_allclose(packed[mine], want[g][mine], atol=2e-5)
  assert (
    np.abs(packed[hit][:, :MASK] - want[0][hit][:, :MASK]).max() > 1e-2
  )  # another group's prefix is not the same


def test_no_group_sees_another():
  """Any number of layers: a mask knows the clean tokens before its group and the masks before it, no more."""
  objective, _, _ = built("mtp")
  row = rows((13, 9), B=1)
  noise = objective.corruption.draw(row, KEY, 3)

  def foreign(objective):
    """How many (mask, slot) pairs reach what they must not."""
    slots = objective.slots(row, noise)
    reach = mask_laws.reach(objective.relations["full"].mask(slots).to_dense()[0])
    N = row.tokens.shape[1]
    group = np.asarray(noise.blk_lo[0])
    hit, doc, at = np.asarray(noise.hit[0, 0]), np.asarray(row.doc[0]), np.arange(N)
    same = doc[:, None] == doc[None]
    noisy = same & (group[:, None] == group[None]) & (at[None] <= at[:, None])
    clean = same & (at[None] < group[:, None])
    allowed = np.concatenate([noisy, clean], 1)
    return int((reach[:N][hit] & ~allowed[hit]).sum()), int((~reach[:N][hit] & allowed[hit]).sum())

  assert foreign(objective) == (0, 0)
  assert laws.check(objective) == []
  wrong = dataclasses.replace(objective, masks={"full": {"n>n": "POS_LE", "n>c": "BLK_LT", "c>c": "POS_LE"}})
  assert foreign(wrong)[0] > 0


@pytest.mark.slow
def test_masks_are_asked_for_the_token_behind_them():
  """Targets: slot of token j's mask → token j + 1; the sampler is told token j, the hidden state compared is that
  of clean slot j; nothing is asked of slots before the first group."""
  objective, _, _ = built("mtp")
  row = rows((13, 9), B=3)
  N = 22
  noise = objective.corruption.draw(row, KEY, 3)
  _, targets, denominators = objective.prepare(row, KEY, 3)
  hit, doc = np.asarray(noise.hit[:, 0]), np.asarray(row.doc)
  slot = np.asarray(targets["masks"].slot)
  for b in range(3):
    for n in range(N):
      asked = n > 0 and doc[b, n] == doc[b, n - 1] and hit[b, n - 1]
      assert slot[b, n] == (n - 1 if asked else -1)
  on = slot >= 0
  tokens = np.asarray(row.tokens)
  np.testing.assert_array_equal(targets["sampler"].given["ids"][..., 0][on], np.roll(tokens, 1, 1)[on])
  np.testing.assert_array_equal(targets["latent"].given["slot"][on], N + slot[on])
  assert float(denominators["masks"]) == float(denominators["latent"]) == on.sum()
  # Every place of a document begins a group equally often.
  origin = lambda step: objective.corruption.draw(row, KEY, step).hit[:, 0].argmax(1)
  found = np.asarray(jax.jit(jax.vmap(origin))(jnp.arange(200))).reshape(-1)
  assert np.bincount(found, minlength=5)[0] == 0 and (np.bincount(found)[1:5] > 100).all()


# ---- heads on an AR trunk


@pytest.mark.parametrize(
  "name, tied",
  [("medusa", False), *(pytest.param("hydra", tied, marks=pytest.mark.slow) for tied in (False, True))],
)
def test_fresh_heads_are_the_language_model(name, tied):
  _, model, params = built(name)
  if tied:
    heads = tuple((n, dataclasses.replace(h, tied=n == "text")) for n, h in model.cfg.heads)
    model = models.build(dataclasses.replace(model.cfg, heads=heads))
    params = jax.jit(model.init)(jax.random.key(1))
  row = rows((12,), B=2)
  inputs = objectives.Objective(terms={"text": {"align": "shift"}}).view(row, _clean(row))[0]

  @jax.jit
  def both(params):
    targets = all_slots(inputs)
    for head, spec in model.cfg.heads:
      ids = jnp.broadcast_to(row.tokens[..., None], (*row.tokens.shape, spec.given))
      targets |= {head: all_slots(inputs, head, {"ids": ids})["x"]}
    return {k: d.map(lambda z: z) for k, d in model.apply(params, inputs, targets).dists.items()}

  out = both(params)
  assert len(out) == 2 + {"medusa": 5, "hydra": 4}[name]
  for head in out:
    np.testing.assert_array_equal(out[head], out["x"])
  moved = both(shaken(params, only=f"{name}2"))
  assert np.abs(moved[f"{name}2"] - out["x"])[..., :MASK].max() > 1e-2
  np.testing.assert_array_equal(moved[f"{name}1"], out["x"])


def _clean(row):
  from genmodels.corruption import Clean

  return Clean().draw(row, KEY, 0)


@pytest.mark.parametrize("name", ["medusa", pytest.param("hydra", marks=pytest.mark.slow)])
def test_a_head_predicts_the_token_it_is_named_after(name):
  objective, _, _ = built(name)
  row = rows((13, 9), B=2)
  _, targets, denominators = objective.prepare(row, KEY, 0)
  doc, tokens = np.asarray(row.doc), np.asarray(row.tokens)
  for k in range(1, 5):
    t = targets[f"{name}{k}"]
    assert t.head == f"{name}{k}"
    np.testing.assert_array_equal(t.value, tokens)
    want = np.full_like(doc, -1)
    for b, n in np.argwhere(doc >= 0):
      at = n - 1 - k
      want[b, n] = at if at >= 0 and doc[b, at] == doc[b, n] else -1
    np.testing.assert_array_equal(t.slot, want)
    np.testing.assert_array_equal(t.weight, want >= 0)
    assert float(denominators[f"{name}{k}"]) == (want >= 0).sum() == 2 * (22 - 2 * (1 + k))
  scale = {n: t.scale(0) for n, t in objective.terms.items() if n != "ar"}
  assert list(scale.values()) == pytest.approx(
    {"medusa": [0.8, 0.64, 0.512, 0.4096, 0.32768]}.get(name, [1] * 4)
  )
  assert laws.check(objective) == []


@pytest.mark.slow
def test_heads_are_fed_the_tokens_before_theirs():
  """Hydra's head k depends on its slot and the k tokens behind it, not on the token that it predicts."""
  objective, model, params = built("hydra")
  params = shaken(params, only="hydra")
  row, n, k = rows((12,), B=1), 8, 3

  @jax.jit
  def asked(tokens):
    inputs, targets, _ = objective.prepare(row.replace(tokens=tokens), KEY, 0)
    dists = model.apply(params, inputs, targets).dists
    return dists[f"hydra{k}"].map(lambda z: z)[0, n], targets[f"hydra{k}"].given["ids"][0, n]

  want, fed = asked(row.tokens)
  np.testing.assert_array_equal(fed, row.tokens[0, n - k : n])
  for at in range(12):
    got, _ = asked(row.tokens.at[0, at].set((row.tokens[0, at] + 1) % MASK))
    moved = np.abs(np.asarray(got - want))[:MASK].max()
    assert (moved > 1e-4) == (at < n), at
  wrong = {"kind": "tokens", "terms": {"x": {"head": "hydra3", "align": "shift", "ahead": 1, "given": 3}}}
  with pytest.raises(config.ConfigError, match="fed at most the 2 tokens since its slot"):
    objectives.build(wrong)


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=pytest.mark.full if n == "medusa" else pytest.mark.slow) for n in SYSTEMS],
)
def test_steps_leave_the_frozen_model_alone(name):
  """Some steps move what the system trains and no bit of anything else; what it drafts gets better."""
  objective, model, params = built(name)
  cfg = config.load(f"language/{name}:tiny")
  cfg.optim.schedule = {"kind": "constant"}
  ocfg = config.build(optim.OptimConfig, cfg.optim, "optim")
  tx, _ = optim.build(ocfg, model.abstract_params(), model.logical_axes(), 20)
  moving = optim.trainable(ocfg, model.abstract_params())
  fns = {"model": lambda trees, *a, **kw: model.apply(trees["model"], *a, **kw)}
  step = jax.jit(make_train_step(objective, fns, tx, StepConfig(guard_window=0), trainable=moving))
  state = states.create({"model": params}, {"model": tx})
  row = rows((13, 9), B=4)
  losses = []
  for _ in range(12):
    state, m = step(state.replace(step=jnp.int32(0)), row, KEY)  # the same noise every time
    losses.append(float(m["loss"]))
  before, after = states.param_paths(params), states.param_paths(state.trees["model"])
  trained = states.param_paths(moving)
  for path, x in before.items():
    same = np.array_equal(np.asarray(x).view(np.uint32), np.asarray(after[path]).view(np.uint32))
    assert same != trained[path], path
  assert 0 < sum(trained.values()) < len(trained)
  assert losses[-1] < losses[0] - 0.05
  assert float(m["loss/ar"]) > 0


def test_a_gate_needs_both_sides():
  cfg = config.load("language/mtp:tiny")
  objective, _, _ = built("mtp")
  with pytest.raises(config.ConfigError, match="gated adapter needs an objective"):
    system._agree(
      dataclasses.replace(objective, adapters="all"), models.build(config.plain(cfg.model) | {"vocab": 300})
    )
  terms = dict(objective.terms, sampler=dataclasses.replace(objective.terms["sampler"], given=0))
  with pytest.raises(config.ConfigError, match="its head takes 1 tokens"):
    system._agree(
      dataclasses.replace(objective, terms=terms), models.build(config.plain(cfg.model) | {"vocab": 300})
    )
