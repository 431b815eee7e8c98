"""Several players in one step: each one trains as if it were alone, and sees the others stand still."""

import dataclasses
import io
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genmodels import config, models, optim, system, train
from genmodels import state as states
from genmodels import step as steps
from genmodels.config import ConfigError
from genmodels.objectives import Objective
from tests.objectives.test_text import KEY, rows, trunk


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


@dataclasses.dataclass(frozen=True)
class Twins(Objective):
  """A next-token loss for each of two networks: the second one's labels are predicted by the first's hidden
  states too, as a generator is trained through a discriminator."""

  def run(self, nets, row, key, step):
    inputs, targets, denominators = self.prepare(row, key, step)
    term = {"model": "text", "twin": "twin"}[nets.player]
    sums, aux = self.loss(nets[nets.player](inputs, {term: targets[term]}), {term: targets[term]})
    return sums, denominators, aux | {"stats": {term: jnp.float32(1)}}

  def stats(self):
    return {"text": jnp.float32(0), "twin": jnp.float32(0)}

  def update(self, stats, sums):
    return {k: v + sums.get(k, 0) for k, v in stats.items()}


def plain(tx):
  return optax.GradientTransformation(tx.init, lambda g, s, p, step=None: tx.update(g, s, p))


def build(players, cfg):
  model, _ = trunk()
  fns = {n: lambda trees, *a, n=n, **kw: model.apply(trees[n], *a, **kw) for n in ("model", "twin", "frozen")}
  obj = Twins(terms={t: {"align": "shift"} for t in ("text", "twin")}, likelihood="text")
  return obj, jax.jit(steps.make_train_step(obj, fns, None, cfg, players=players))


@pytest.mark.slow
def test_each_player_trains_as_if_alone():
  model, params = trunk()
  other = jax.jit(model.init)(jax.random.key(9))
  row = rows((10, 6), B=4)
  cfg = steps.StepConfig(accumulate=2, ema=0.5, guard_window=4)
  first = steps.Player("model", ("model",), ("text",), plain(optax.adam(1e-2)))
  second = steps.Player("twin", ("twin",), ("twin",), plain(optax.adam(3e-2)), 2)

  def start(players, trees):
    obj, step = build(players, cfg)
    trees = {**trees, "ema": trees["model"]}
    return step, states.create(trees, {p.name: p.tx for p in players}, steps.initial_stats(cfg, obj))

  step, state = start((first, second), {"model": params, "twin": other, "frozen": params})
  alone, one = start((first,), {"model": params, "twin": other, "frozen": params})
  # The twin on its own is a model of its own, at the steps at which it is due.
  solo, two = start(
    (dataclasses.replace(first, tx=second.tx),), {"model": other, "twin": params, "frozen": params}
  )
  near = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)
  for n in range(1, 5):
    state, m = step(state, row, KEY)
    one, _ = alone(one, row, KEY)
    if n % 2 == 0:
      two, m2 = solo(two.replace(step=jnp.int32(n - 1)), row, KEY)
      np.testing.assert_allclose(m["twin/loss"], m2["loss"], rtol=1e-5)
    else:
      assert float(m["twin/loss"]) == 0
    near(state.trees["model"], one.trees["model"])
    near(state.trees["twin"], two.trees["model"])
  near(state.trees["ema"], one.trees["ema"])
  jax.tree.map(np.testing.assert_array_equal, state.trees["frozen"], params)
  assert {k: float(v) for k, v in state.stats["objective"].items()} == {"text": 8, "twin": 4}  # micro-batches
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.trees["twin"], other)
  assert min(jax.tree.leaves(moved)) > 1e-3
  # A player's refused update moves nothing, keeps its statistics, and leaves the other one alone.
  broken = state.replace(trees={**state.trees, "twin": jax.tree.map(lambda x: x * jnp.nan, other)})
  after, m = step(broken.replace(step=jnp.int32(5)), row, KEY)
  assert int(m["twin/skipped"]) == 1 and int(m["skipped"]) == 0
  jax.tree.map(np.testing.assert_array_equal, after.opt["twin"], broken.opt["twin"])
  assert float(after.stats["objective"]["twin"]) == 4 and float(after.stats["objective"]["text"]) == 10


def test_a_player_of_two_trees():
  trees = {"a": {"w": jnp.ones(3)}, "b": {"w": jnp.ones(2)}, "model": {"w": jnp.ones(1)}}
  state = states.create(trees, {"model": optax.adam(1.0), "pair": optax.adam(1.0)}, owns={"pair": ("a", "b")})
  assert state.opt["pair"][0].mu["b"]["w"].shape == (2,) and state.opt["model"][0].mu["w"].shape == (1,)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  spec = lambda t: jax.tree.map(
    lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")), t
  )
  placed = states.shardings(state, {k: spec(v) for k, v in trees.items()}, mesh, {"pair": ("a", "b")})
  assert placed.opt["pair"][0].mu == {"a": spec(trees["a"]), "b": spec(trees["b"])}


def parts(players, nets=("policy",), terms=("text", "policy")):
  model, _ = trunk()
  made = {n: models.NETS["choice"](classes=2, width=4).network(model) for n in nets}
  obj = Objective(terms={t: {"align": "shift"} for t in terms}, likelihood=terms[0])
  return types.SimpleNamespace(cfg={"players": players}, model=model, nets=made, objective=obj)


def seats(*args, **kw):
  return steps.players(parts(*args, **kw), steps.Player("model", ("model",), (), optax.sgd(0.1)), 10)


def test_players_of_a_config():
  one, two = seats(
    {"policy": {"terms": ("policy",), "optimizer": {"lr": 0.1, "freeze": ("bias",)}, "every": 3}}
  )
  assert (one.name, one.trees, one.terms, one.every) == ("model", ("model",), ("text",), 1)
  assert (two.name, two.trees, two.terms, two.every) == ("policy", ("policy",), ("policy",), 3)
  assert not two.trainable["in"]["bias"] and two.trainable["in"]["kernel"]
  (only,) = seats({}, nets=())
  assert only.terms == ("text", "policy")  # a system without further players trains by all of its terms
  assert isinstance(seats({"policy": {"terms": ("policy",)}})[1].tx, optax.GradientTransformation | tuple)
  assert optim.OptimConfig() == steps.PlayerConfig().optimizer


@pytest.mark.parametrize(
  "section, words",
  [
    ({"critic": {"terms": ("policy",)}}, "players.critic.trees = ('critic',): no such tree"),
    ({"policy": {"terms": ("nothing",)}}, "the objective has no term 'nothing'"),
    ({"policy": {}}, "players.policy.terms = (): a player without terms"),
    ({"policy": {"terms": ("text", "policy")}}, "players.model.terms = (): a player without terms"),
    ({"a": {"trees": ("policy",), "terms": ("policy",)}, "b": {"trees": ("policy",), "terms": ("text",)}},
     "'policy' is 'a''s already"),
    ({"model": {"terms": ("text",), "optimizer": {"lr": 1.0}}}, "players.model.optimizer"),
    ({"policy": {"term": ("policy",)}}, "unknown key of PlayerConfig"),
    ({"policy": {"terms": ("policy",), "every": 0}}, "every is 0"),
  ],
)  # fmt: skip
def test_players_that_cannot_play(section, words):
  with pytest.raises(ConfigError) as e:
    seats(section)
  assert words in str(e.value)


@pytest.mark.full
def test_a_run_goes_on_with_its_players(tmp_path):
  """Trees, optimisers and statistics of all players are in the checkpoint: bit for bit the same run."""
  small = (
    "data.documents=40", "data.seq_len=32", "model.layers=1", "model.width=32", "train.tensorboard=False",
    "train.steps=4", "train.save_every=2", "eval.every=0", "optim.schedule.warmup=1",
    f"data.path={tmp_path / 'python'}",
  )  # fmt: skip
  cfg = config.load("language/ctrldiff:tiny", small)
  go = lambda folder: train.train(cfg, str(tmp_path / folder), out=io.StringIO())
  straight = go("straight")
  shutil.copytree(tmp_path / "straight/checkpoints/2", tmp_path / "parts/checkpoints/2")
  resumed = go("parts")
  bits = lambda x: np.asarray(x).tobytes()
  jax.tree.map(lambda x, y: bits(x) == bits(y) or pytest.fail("states differ"), straight.state, resumed.state)
  assert set(straight.state.trees) == set(straight.state.opt) == {"model", "policy"}
  kept = straight.state.stats["objective"]
  assert int(kept["gain_count"]) == 2 and float(kept["gain"]) < 0  # it moved at steps 2 and 4
  resolved = json.loads((tmp_path / "straight/resolved.json").read_text())
  assert resolved["players"]["policy"]["every"] == 2


# ---- copies of the model


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_copy_is_made_anew_at_every_so_many_th_step(ema):
  """It stands still in between and gets no gradient; the average is copied where one is kept."""
  model, params = trunk()
  fns = {n: lambda trees, *a, n=n, **kw: model.apply(trees[n], *a, **kw) for n in ("model", "teacher")}
  cfg, tx = steps.StepConfig(ema=ema, guard_window=0), plain(optax.sgd(1e-1))
  objective = Objective(terms={"text": {"align": "shift"}})
  step = jax.jit(steps.make_train_step(objective, fns, tx, cfg, copies={"teacher": 3}))
  trees = {"model": params, "teacher": params} | ({"ema": params} if ema else {})
  state = states.create(trees, {"model": tx}, steps.initial_stats(cfg, objective))
  same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
  before = params
  for n in range(1, 8):
    state, _ = step(state, rows((10, 6), B=4), KEY)
    if n % 3 == 0:
      before = state.trees["ema" if ema else "model"]
    assert same(state.trees["teacher"], before)
    assert same(state.trees["model"], before) == (n % 3 == 0 and not ema)


def test_nobody_else_moves_a_copy():
  trees = {"teacher": {"kind": "trunk", "refresh": 5}, "critic": {"kind": "trunk"}}
  assert system.copies({"trees": trees}) == {"teacher": 5}
  assert not system.copies({})
  wrong = (
    ({"players": {"teacher": {"terms": ("text",)}}}, "a player trains it"),
    ({"players": {"p": {"trees": ("critic", "teacher")}}}, "a player trains it"),
    ({"init": {"beside": {"teacher": {"path": "runs/x"}}}}, "init.beside loads another"),
  )
  for more, words in wrong:
    with pytest.raises(ConfigError, match=f"trees.teacher.refresh = 5: .*{words}"):
      system.copies({"trees": trees, **more})
