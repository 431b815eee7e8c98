"""Visibility, the scan against an unrolled loop, remat, embeddings, segments."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import kernels, models
from genmodels.config import ConfigError
from genmodels.kernels import pallas_gpu_lists
from genmodels.models import layer_index, layer_path, trunk
from genmodels.models.layers import Layer

from . import cases


def test_causal_visibility_by_perturbation():
  model, params = cases.build(pattern=[dict(mask="local"), dict(mask="full")], layers=3)
  ids = cases.tokens(2, 12)
  x = cases.inputs(ids)
  a = cases.run(model, params, x)
  b = cases.run(model, params, x.replace(ids=ids.at[:, 5, 0].set((ids[:, 5, 0] + 1) % 19)))
  moved = np.abs(np.asarray(a - b)).max((0, 2)) > 0
  assert not moved[:5].any() and moved[5:].all()


def test_local_layers_see_their_window_only():
  model, params = cases.build(pattern=[dict(mask="local")], layers=2)
  ids = cases.tokens(1, 12)
  x = cases.inputs(ids)
  a = cases.run(model, params, x)
  b = cases.run(model, params, x.replace(ids=ids.at[:, 2, 0].set((ids[:, 2, 0] + 1) % 19)))
  moved = np.abs(np.asarray(a - b)).max((0, 2)) > 0
  assert moved.tolist() == [2 <= i <= 6 for i in range(12)]  # two layers of window 3 reach 4 back


def test_segments_of_26_layers():
  pattern = [dict(mask="local")] * 5 + [dict(mask="full")]
  model = models.build({**cases.BASE, "layers": 26, "pattern": pattern})
  assert [(len(s.pattern), s.repeats) for s in model.cfg.segments] == [(6, 4), (2, 1)]
  assert [layer_path(model.cfg, i) for i in (0, 5, 6, 23, 24, 25)] == [
    (0, 0, 0),
    (0, 0, 5),
    (0, 1, 0),
    (0, 3, 5),
    (1, 0, 0),
    (1, 0, 1),
  ]
  assert [layer_index(model.cfg, *layer_path(model.cfg, i)) for i in range(26)] == list(range(26))
  with pytest.raises(ValueError, match="26"):
    layer_path(model.cfg, 26)
  assert model.abstract_params()["stack"]["s0"]["l3"]["attn"]["q"]["kernel"].shape == (4, 16, 4, 4)


def test_scan_equals_a_loop_over_layers():
  """The loop applies one Layer at a time with the row of the stacked leaves that layer_path names."""
  pattern = [dict(mask="local", rope_base=1e2), dict(mask="full")]
  model, params = cases.build(pattern=pattern, layers=4)
  cfg, x = model.cfg, cases.inputs(cases.tokens(2, 12))

  class Loop(trunk.Stack):
    @nn.compact
    def __call__(self, x, cache, ctx):
      h, tapped = x
      for i in range(cfg.layers):
        segment, repeat, position = layer_path(cfg, i)
        leaves = self.variables["params"][f"s{segment}"][f"l{position}"]
        spec = cfg.segments[segment].pattern[position]
        one = jax.tree.map(lambda a: a[repeat], leaves)
        h, _ = Layer(cfg, spec, parent=None).apply({"params": one}, h, None, ctx)
      return (h, tapped), None, {}

  want = cases.run(model, params, x)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trunk, "Stack", Loop)
    got = cases.run(model, params, x)
  np.testing.assert_allclose(got, want, atol=2e-6)
  one_off = jax.tree.map(lambda a: a[::-1] if a.shape[0] == 2 else a, params)  # negative control
  assert np.abs(np.asarray(cases.run(model, one_off, x) - want)).max() > 1e-3


@pytest.mark.parametrize(
  "remat",
  [
    dict(preset="full"),
    pytest.param(dict(preset="dots"), marks=pytest.mark.slow),
    pytest.param(dict(preset="attn_out"), marks=pytest.mark.slow),
    pytest.param(dict(preset="full", save=("mlp_up",)), marks=pytest.mark.slow),
  ],
)
def test_remat_changes_memory_not_gradients(remat):
  ids = cases.tokens(2, 16)
  x, t = cases.inputs(ids), cases.everywhere(ids)
  fields = dict(layers=4, mlp=64)

  def compiled(remat):
    model, params = cases.build(remat=remat, **fields)
    loss = lambda p: model.apply(p, x, t).dists["t"].nll(ids[..., 0]).sum()
    f = jax.jit(jax.grad(loss)).lower(params).compile()
    return f(params), f.memory_analysis().temp_size_in_bytes

  (want, most), (got, less) = compiled({}), compiled(remat)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
  assert less < most


def test_the_attn_out_preset_saves_one_attention_output(capsys):
  model, params = cases.build(remat=dict(preset="attn_out"), layers=2)
  ids = cases.tokens(2, 24)
  x, t = cases.inputs(ids), cases.everywhere(ids)
  cfg = model.cfg
  jax.ad_checkpoint.print_saved_residuals(
    lambda p: model.apply(p, x, t).dists["t"].nll(ids[..., 0]).sum(), params
  )
  shape = f"[{cfg.segments[0].repeats},2,24,{cfg.num_heads},{cfg.head_dim}]"
  assert capsys.readouterr().out.count(shape) == len(cfg.segments[0].pattern)  # layers, rows, slots, heads


@pytest.mark.compat
@pytest.mark.parametrize("implementation, loop", [("xla", "scan["), ("pallas_tpu", "pallas_call[")])
def test_saved_attention_is_not_run_again(implementation, loop):
  """A policy that keeps the output and its log-sum-exp leaves no forward kernel in the backward pass."""
  ids = cases.tokens(2, 16)
  x, t = cases.inputs(ids), cases.everywhere(ids)

  def runs(**remat):
    """Loops (of layers, of kernels) in the program of the gradient."""
    model = models.build({**cases.BASE, "attention": implementation, "remat": remat, "layers": 3})
    loss = lambda p: model.apply(p, x, t).dists["t"].nll(ids[..., 0]).sum()
    return str(jax.make_jaxpr(jax.grad(loss))(model.abstract_params())).count(loop)

  tpu = kernels.Target("tpu", "TPU v5p", interpret=True)
  with kernels.building_for(tpu if implementation == "pallas_tpu" else kernels.current()):
    both = ("attn_out", "attn_lse")
    kept = runs(preset="attn_out")
    assert runs(preset="dots", save=both) == runs(preset="full", save=both) == kept
    assert runs(preset="full") == kept + 1  # negative control: recomputed
    assert runs(preset="full", save=("attn_out",)) == kept + 1  # one of the two is not enough
    if implementation == "pallas_tpu":
      assert kept == 3  # forward, dq, dk and dv


def test_layer_remat_overrides_the_preset():
  model, params = cases.build(pattern=[dict(remat="none"), dict(remat="full")], remat=dict(preset="dots"))
  x = cases.inputs(cases.tokens(1, 8))
  text = str(jax.make_jaxpr(lambda p: model.apply(p, x, {}).layers["hidden"])(params))
  assert text.count("prevent_cse=False") == 1


def test_several_id_tables_add_up_and_minus_one_is_nothing():
  model, params = cases.build(tables=(("level", 3), ("kind", 4)))
  assert model.cfg.channels == ("tokens", "level", "kind")
  ids = cases.tokens(2, 6, vocab=3, channels=3)
  x = cases.inputs(ids)
  tables = {n: params["embed"][n]["embedding"] for n in model.cfg.channels}
  got = trunk.Trunk(model.cfg).apply({"params": params}, x, tables, method=lambda m, x, t: m._embed(x, t))
  want = sum(tables[n][ids[..., i]] for i, n in enumerate(model.cfg.channels))
  np.testing.assert_allclose(got, want, atol=1e-6)
  a = cases.run(model, params, x.replace(ids=ids.at[..., 1].set(-1)))
  zero = jax.tree.map(lambda v: v, params)
  zero["embed"]["level"] = {"embedding": jnp.zeros((3, 16))}
  np.testing.assert_array_equal(a, cases.run(model, zero, x))
  with pytest.raises(ValueError, match=r"'tokens', 'level', 'kind'"):
    cases.run(model, params, x.replace(ids=ids[..., :2]))


def test_features_and_added_embeddings():
  model, params = cases.build(features=5, bias=("features",))
  ids = cases.tokens(1, 6)
  f = jax.random.normal(jax.random.key(0), (1, 6, 5))
  site = params["features"]
  as_features = cases.run(model, params, cases.inputs(ids, features=f))
  extra = f @ site["kernel"] + site["bias"]
  model2, _ = cases.build()
  bare = {k: v for k, v in params.items() if k != "features"}
  np.testing.assert_allclose(
    cases.run(model2, bare, cases.inputs(ids, add_embed=extra)), as_features, atol=1e-5
  )
  with pytest.raises(ValueError, match="features=0"):
    cases.run(model2, bare, cases.inputs(ids, features=f))


def test_empty_slots_change_nothing():
  """Slots with hidden codes and empty bounds, wherever they stand, leave the others alone."""
  model, params = cases.build()
  ids = cases.tokens(1, 6)
  want = cases.run(model, params, cases.inputs(ids))
  spread = jnp.asarray([0, -1, 1, 2, -1, 3, 4, 5])
  used = spread >= 0
  at = jnp.maximum(spread, 0)
  mask = models.model.AttnMask(
    jnp.where(used, at, -(2**30))[None],
    jnp.zeros((1, 1, 8), jnp.int32),
    jnp.where(used, at + 1, 0)[None, None],
  )
  x = cases.inputs(ids[:, at], {"full": mask}, pos=at[None, :, None].astype(jnp.float32))
  got = cases.run(model, params, x)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got[:, used], want, atol=1e-6)


def test_dropout_only_with_a_key():
  model, params = cases.build(dropout=0.5)
  x, t = cases.inputs(cases.tokens(1, 8)), {}
  f = jax.jit(lambda p, key: model.apply(p, x, t, key=key).layers["hidden"])
  off = jax.jit(lambda p: model.apply(p, x, t).layers["hidden"])(params)
  a, b = f(params, jax.random.key(0)), f(params, jax.random.key(1))
  assert np.abs(np.asarray(a - b)).max() > 1e-3 and np.abs(np.asarray(a - off)).max() > 1e-3
  np.testing.assert_array_equal(a, f(params, jax.random.key(0)))
  plain, _ = cases.build()
  np.testing.assert_array_equal(off, jax.jit(lambda p: plain.apply(p, x, t).layers["hidden"])(params))


def test_bf16_compute_over_fp32_masters():
  model, params = cases.build(dtype="bfloat16")
  ids = cases.tokens(2, 8)
  x, t = cases.inputs(ids), cases.everywhere(ids)

  def loss(model, p):
    out = model.apply(p, x, t)
    return out.dists["t"].nll(ids[..., 0]).mean(), (cases.logits(out.dists["t"]), out.layers["hidden"])

  grads, (got, hidden) = jax.jit(lambda p: jax.grad(loss, 1, has_aux=True)(model, p))(params)
  assert hidden.dtype == jnp.bfloat16 and got.dtype == jnp.float32
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  want = cases.run(cases.build()[0], params, x)
  np.testing.assert_allclose(got, want, atol=0.1 * float(jnp.abs(want).max()))


def test_work_counts_slots_and_pairs():
  model, params = cases.build(pattern=[dict(mask="local"), dict(mask="full")])
  x = cases.inputs(cases.tokens(2, 6))
  work = jax.jit(lambda p, x: model.apply(p, x, {}).work)(params, x.replace(doc=x.doc.at[0, 5].set(-1)))
  assert int(work["slots"]) == 11
  assert work["pairs"]["full"].tolist() == [[1, 2, 3, 4, 5, 6]] * 2
  assert work["pairs"]["local"].tolist() == [[1, 2, 3, 3, 3, 3]] * 2


def test_errors_name_key_value_and_fix():
  with pytest.raises(ConfigError, match="model.norm = 'rsm'.*\n.*did you mean 'rms'"):
    models.build({**cases.BASE, "norm": "rsm"})
  with pytest.raises(ConfigError, match="num_kv_heads"):
    models.build({**cases.BASE, "num_kv_heads": 3})
  with pytest.raises(ConfigError, match="model.heads.text.tide"):
    models.build({**cases.BASE, "heads": {"text": dict(tide=True)}})
  with pytest.raises(ConfigError, match="adaln"):
    models.build({**cases.BASE, "cond": {"class": dict(size=3)}})
  with pytest.raises(ConfigError, match="did you mean 'qwen3-8b'"):
    models.build(dict(preset="qwen-3-8b"))
  model, params = cases.build(pattern=[dict(mask="local")])
  with pytest.raises(ValueError, match="lacks .'local'."):
    model.apply(params, cases.inputs(cases.tokens(1, 4), {"full": cases.causal(4)}), {})


@pytest.mark.slow
def test_debug_names_every_layer_and_the_first_non_finite_one():
  model, params = cases.build(layers=3, pattern=[dict(mask="local"), dict()])
  ids = cases.tokens(1, 4)
  x, t = cases.inputs(ids), cases.everywhere(ids)
  grad = jax.grad(lambda p: model.apply(p, x, t).dists["t"].nll(ids[..., 0]).sum())
  lines = []
  with jax.disable_jit(), models.debug(lines.append):
    grad(params)
  assert "layer 2 attn/q: float32[1, 4, 4, 4]" in lines
  assert {f"layer {i}" for i in range(3)} <= {line.split(" attn")[0] for line in lines}
  leaf = params["stack"]["s0"]["l1"]["mlp"]["up"]["kernel"]
  params["stack"]["s0"]["l1"]["mlp"]["up"]["kernel"] = leaf.at[0, 3, 3].set(jnp.inf)
  with pytest.raises(FloatingPointError, match="layer 1 mlp/up.*from finite inputs"):
    with jax.disable_jit(), models.debug(lambda line: None):
      grad(params)


@pytest.mark.parametrize("deterministic", [True, False])
def test_attention_settings_reach_the_kernels(monkeypatch, deterministic):
  seen, attention = [], kernels.attention
  spy = lambda *args, deterministic, **kw: seen.append(deterministic) or attention(*args, **kw)
  monkeypatch.setattr(kernels, "attention", spy)
  monkeypatch.setattr(kernels, "safe_tiles", lambda name, tiles: seen.append(name) or (8, 8))
  cfg = {"attention": "xla", "attention_deterministic": deterministic, "attention_safe": True}
  model = models.build({**cases.BASE, **cfg})
  x, params = cases.inputs(cases.tokens(1, 12)), model.abstract_params()
  jax.eval_shape(lambda p: model.apply(p, x, {}).layers["hidden"], params)
  assert set(seen) == {"xla", deterministic}


def test_safe_tiles_only_where_there_is_such_a_mode():
  assert kernels.safe_tiles("pallas_gpu") == pallas_gpu_lists.Tiles(safe=True)
  assert kernels.safe_tiles("pallas_gpu", (64, 128)) == pallas_gpu_lists.Tiles(64, 128, safe=True)
  assert kernels.safe_tiles("xla", (64, 128)) == (64, 128)
  assert kernels.caution("xla") is None
