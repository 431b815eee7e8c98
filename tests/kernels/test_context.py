"""Attention over a context axis against dense attention over everything: both strategies, placed or not.

Legend: B rows · N tokens of a row · S slots · n context shards · M slots of a stream on a shard.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from genmodels import kernels
from genmodels.contracts import token_row
from genmodels.corruption.base import Blocks, Clean
from genmodels.kernels import context, xla
from genmodels.layouts import Streams
from genmodels.masks import AttnMask
from genmodels.objectives import relations
from genmodels.parallel import MeshConfig, make_mesh
from tests.kernels.test_attention import _assert_close, _programs, _pulled, _tensors

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 host devices")

B, N, BLOCK = 2, 44, 4
# Packed documents, ragged blocks, padding; another row has another mask.
DOC = np.array([[0] * 21 + [1] * 16 + [-1] * 7, [0] * 5 + [1] * 9 + [2] * 30])
SHARDS = dict(data=2, tensor=2, context=2)


def slots_of(shards, placement="none", whole_blocks=0, doc=DOC, block=BLOCK):
  """(Slots of [noisy | clean] on `shards`, Slots as arranged)."""
  row = token_row(np.zeros(doc.shape), doc, capacity=3)
  noise = Clean(blocks=Blocks(size=block)).draw(row, jax.random.key(0), 0)
  layout = Streams(("n", "c"), placement, pieces=2, whole_blocks=whole_blocks)
  slots = layout.arrange(row, noise)
  rule = relations.table("bd3", layout.streams)
  return layout.place(slots, shards, lambda: rule.mask(slots).pairs()), slots


def mask_of(*args, **kw) -> AttnMask:
  return relations.table("bd3", ("n", "c")).mask(slots_of(*args, **kw)[0])


def sharded(mesh, mask, strategy, local, tiles=(8, 8), implementation="xla", **options):
  """(q, k, v) -> (out, lse) over a mesh of data, tensor and context; global arrays."""
  heads = P("data", "context", "tensor")
  bounds = P("data", None, "context")
  inside = mask.replace(code=P("data", "context"), lo=bounds, hi=bounds)

  def build(m):
    return context.plan(m, "context", strategy, local, tiles=tiles, implementation=implementation)

  specs = context.specs(strategy, local, ("data", "context"))
  plan = jax.shard_map(build, mesh=mesh, in_specs=(inside,), out_specs=specs)(mask)
  attend = functools.partial(
    context.attention, axis="context", return_lse=True, implementation=implementation, **options
  )
  out = (heads, P("data", "tensor", "context"))
  # jax's interpreter of TPU kernels is not aware of varying types (0.10.2); the compiled kernels are.
  check = kernels.current().interpret is None
  f = jax.shard_map(attend, mesh=mesh, in_specs=(heads, heads, heads, specs), out_specs=out, check_vma=check)
  return lambda q, k, v: f(q, k, v, plan)


def mesh_of(**sizes):
  cfg = MeshConfig(**{"data": 1, **sizes})
  return make_mesh(cfg, jax.devices()[: cfg.data * cfg.tensor * cfg.context])


def compare(strategy, mask, local, tolerance=3e-6, sizes=SHARDS, heads=(4, 2, 8, 8), dtype=jnp.float32, **kw):
  """Output, LSE and three gradients, for cotangents of both outputs."""
  S = mask.code.shape[1]
  tensors = _tensors(S, S, *heads, rows=B, dtype=dtype)
  options = dict(scale=0.3, soft_cap=None) | kw
  got = jax.jit(lambda mask, *t: _pulled(sharded(mesh_of(**sizes), mask, strategy, local, **options), *t))(
    mask, *tensors
  )
  _, dense, _ = _programs((8, 8), "xla", (S, S, *heads, str(dtype)), options["soft_cap"])
  want = dense(tensors, mask.to_dense())
  _assert_close(got, want, tolerance)
  return got, want


@pytest.mark.compat
@pytest.mark.parametrize(
  "strategy, placement, whole",
  [
    ("gather", "none", 0),
    ("ring", "zigzag", BLOCK),
    pytest.param("gather", "zigzag", BLOCK, marks=pytest.mark.slow),
    pytest.param("ring", "none", 0, marks=pytest.mark.slow),
  ],
)
def test_shards_are_dense_attention(strategy, placement, whole):
  # Data, tensor and context at once; a mask of its own for every row; empty slots and padding.
  mask = mask_of(2, placement, whole)
  assert mask.local == (((0, mask.code.shape[1] // 4),) if whole else ())
  compare(strategy, mask, mask.local)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", context.STRATEGIES)
@pytest.mark.parametrize("placement, whole", [("zigzag", 0), ("balanced", 0), ("balanced", BLOCK)])
def test_four_shards_with_a_soft_cap(strategy, placement, whole):
  mask = mask_of(4, placement, whole)
  compare(strategy, mask, mask.local, sizes=dict(data=2, context=4), soft_cap=2.0, heads=(4, 1, 8, 16))


@pytest.mark.slow
@pytest.mark.parametrize("strategy, whole", [("gather", 0), ("ring", BLOCK)])
def test_tpu_kernels_drop_in(strategy, whole):
  mask = mask_of(2, "zigzag", whole)
  with kernels.building_for(kernels.Target("cpu", interpret=True)):
    compare(strategy, mask, mask.local, heads=(4, 2, 64, 64), tiles=None, implementation="pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", context.STRATEGIES)
def test_bfloat16_over_eight_shards(strategy):
  # Partial results are rounded to bfloat16 before they are merged; the merge itself is float32.
  mask = mask_of(8, "zigzag")
  compare(strategy, mask, (), 1e-2, dict(context=8), dtype=jnp.bfloat16)


def test_local_keys_of_another_shard_are_missed():
  """The negative control: keys declared local that are not (blocks cut by the border) change the result."""
  mask = mask_of(2, "zigzag")  # blocks are cut
  S = mask.code.shape[1]
  with pytest.raises(AssertionError, match="relative error"):
    compare("gather", mask, ((0, S // 4),))


@pytest.mark.slow
def test_gradients_of_an_implementation_without_its_own(monkeypatch):
  # The segment's forward pass is run again and weighted; the same gradients.
  own, _ = compare("ring", mask_of(2), ())
  monkeypatch.delattr(xla, "gradients")
  again, _ = compare("ring", mask_of(2), ())
  _assert_close(again, own, 1e-6)


@pytest.mark.slow
def test_gradients_of_segments_add_up():
  # Two key segments, one call each, against one call: with the backend's own function and without.
  mask = mask_of(2)
  S = mask.code.shape[1]
  q, k, v, d_out, d_lse = _tensors(S, S, 4, 2, 8, 8)
  options = dict(scale=0.3, implementation="xla")

  @functools.partial(jax.jit, static_argnums=0)
  def parts(own):
    whole = kernels.plan(mask, (8, 8), "xla")
    (out, lse), pull = jax.vjp(lambda *t: kernels.attention(*t, whole, return_lse=True, **options), q, k, v)
    d = jnp.where(lse > -jnp.inf, d_lse, 0)
    got = []
    for at in (slice(0, 40), slice(40, S)):
      plan = kernels.plan(AttnMask(mask.code[:, at], mask.lo, mask.hi), (8, 8), "xla")
      got.append(kernels.gradients(q, k[:, at], v[:, at], plan, out, lse, d_out, d, **options))
    return pull((d_out, d)), got

  for own in (True, False):
    with pytest.MonkeyPatch.context() as patch:
      if not own:
        patch.delattr(xla, "gradients")
      want, ((dq, *a), (more, *b)) = parts(own)
    got = dq + more, *(jnp.concatenate(x, 1) for x in zip(a, b))
    _assert_close((d_out, d_lse, *got), (d_out, d_lse, *want))


@pytest.mark.strict
def test_gathered_keys_in_order_change_no_bit():
  # Contiguous shards, gathered: every query meets the same keys in the same order and tiles.
  mask = mask_of(2, doc=np.repeat([[0] * 30 + [1] * 34], 2, 0))
  S = mask.code.shape[1]
  tensors = _tensors(S, S, 4, 2, 8, 8)
  options = dict(scale=0.3)
  got = jax.jit(lambda *t: _pulled(sharded(mesh_of(**SHARDS), mask, "gather", (), **options), *t))(*tensors)
  one = functools.partial(kernels.attention, mask=mask, return_lse=True, tiles=(8, 8), **options)
  want = jax.jit(lambda *t: _pulled(one, *t))(*tensors)
  for name, a, b in zip(("out", "lse"), got, want):
    np.testing.assert_array_equal(a, b, err_msg=name)
  _assert_close(got, want, 1e-6)  # dk, dv are sums over shards; dq's order is kept, its fusions are not


@functools.cache
def compiled(strategy, whole, n=8):
  """(HLO of two scanned layers of attention and their gradients on n shards, slots of a shard)."""
  mask = mask_of(n, "zigzag", whole, doc=np.zeros((1, 152), int), block=BLOCK)
  S = mask.code.shape[1]
  mesh = mesh_of(context=n)

  def loss(w, x, mask):
    attend = sharded(mesh, mask, strategy, mask.local, scale=0.3)
    layer = lambda x, w: (attend(x, w[0] * x, w[1] * x)[0], None)
    return jnp.square(jax.lax.scan(layer, x, w)[0]).sum()

  place = lambda spec, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  mask = jax.tree.map(lambda x: place(P(*[None] * (x.ndim - 1), "context"), x), mask)
  x = place(P(None, "context"), jnp.zeros((1, S, 2, 8)))
  return jax.jit(jax.grad(loss, 1)).lower(place(P(), jnp.zeros((2, 2))), x, mask).compile().as_text(), S // n


def collectives(text, kind) -> list[tuple[int, ...]]:
  """Sizes of the float results of every collective of a kind that has a token axis."""
  lines = re.findall(rf"= (.*) {kind}(?:-start)?\(", text)
  return [n for line in lines for n in sizes(line) if n > 100]


def sizes(text) -> list[int]:
  """Elements of every float32 array."""
  return [int(np.prod([int(d) for d in s.split(",")])) for s in re.findall(r"f32\[([\d,]+)\]", text)]


@pytest.mark.parametrize("whole, share", [pytest.param(0, 1, marks=pytest.mark.slow), (BLOCK, 2)])
def test_traffic_of_gathering(whole, share):
  # Keys and values are gathered once a pass, dk and dv reduce-scattered; whole blocks: the clean half alone.
  text, part = compiled("gather", whole)
  travel = part // share * 2 * 8
  assert collectives(text, "all-gather") == [8 * travel] * 4
  assert collectives(text, "reduce-scatter") == [travel] * 2
  assert not collectives(text, "all-reduce") + collectives(text, "all-to-all")


@pytest.mark.parametrize("whole, share", [pytest.param(0, 1, marks=pytest.mark.slow), (BLOCK, 2)])
def test_traffic_and_memory_of_the_ring(whole, share):
  # Forward: k, v in the loop. Backward: k, v twice before it (for its first step and its second), k, v, dk, dv
  # in it. Nothing is ever as large as the keys of all shards.
  text, part = compiled("ring", whole)
  travel = part // share * 2 * 8
  assert collectives(text, "collective-permute") == [travel] * (2 + 4 + 4)
  for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"):
    assert not collectives(text, kind), kind
  assert max(sizes(text)) < 8 * travel <= max(sizes(compiled("gather", whole)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", context.STRATEGIES)
def test_the_backward_pass_keeps_local_keys_only(strategy):
  mask = mask_of(4, doc=np.zeros((1, 152), int))
  S = mask.code.shape[1]
  q, k, v, d_out, _ = _tensors(S, S, 2, 2, 8, 8, rows=1)
  attend = sharded(mesh_of(context=4), mask, strategy, (), scale=0.3)
  kept = jax.tree.leaves(jax.eval_shape(lambda *t: jax.vjp(attend, *t)[1], q, k, v))
  floats = sum(x.size for x in kept if jnp.issubdtype(x.dtype, jnp.floating))
  assert floats <= q.size + k.size + v.size + d_out.size + 2 * 2 * S  # q, k, v, out, LSE (twice at most)


def test_split_is_undone():
  x = jnp.arange(24).reshape(2, 12)
  for local in ((), ((0, 6),), ((6, 12),), ((2, 5), (5, 6), (9, 11))):
    stay, travel = context.split(x, local)
    assert stay.shape[1] == sum(b - a for a, b in local)
    np.testing.assert_array_equal(context._joined(stay, travel, local), x)
  with pytest.raises(ValueError, match="disjoint, ascending"):
    context.split(x, ((4, 8), (6, 9)))


def test_an_unknown_strategy_is_named():
  with pytest.raises(ValueError, match="unknown strategy 'circle'; one of gather, ring"):
    context.plan(mask_of(2), "context", "circle")


@pytest.mark.slow
@pytest.mark.parametrize("strategy, forward", [("gather", "all_gather"), ("ring", "ppermute")])
def test_remat_by_name_keeps_the_merged_output(strategy, forward):
  # Saving attn_out and attn_lse spares the forward pass its repetition, not the second look at the keys; what a
  # ring step puts out is never kept, under no policy.
  mask = mask_of(4, doc=np.zeros((1, 152), int))
  S = mask.code.shape[1]
  x, w = jnp.zeros((1, S, 2, 8)), jnp.zeros((3, 8, 8))
  attend = sharded(mesh_of(context=4), mask, strategy, (), scale=0.3)

  def vjp(policy):
    def layer(x, w):
      y = x @ w
      return x + attend(y, 2 * y, 3 * y)[0], None

    body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return lambda w: jax.vjp(lambda w: jax.lax.scan(body, x, w)[0], w)

  policies = jax.checkpoint_policies
  keep = policies.save_only_these_names("attn_out", "attn_lse")
  count = {}
  for name, policy in (("keep", keep), ("again", policies.nothing_saveable)):
    gradient = lambda w, policy=policy: vjp(policy)(w)[1](x)
    text = str(jax.make_jaxpr(gradient)(w))
    count[name] = text.count("while[")
    assert text.count(f"{forward}[") >= 2
    kept = jax.tree.leaves(jax.eval_shape(lambda w, policy=policy: vjp(policy)(w)[1], w))
    floats = sum(a.size for a in kept if jnp.issubdtype(a.dtype, jnp.floating))
    per_layer = 2 * x.size + 2 * S if name == "keep" else x.size  # the layer's input, out and LSE
    assert floats <= 3 * per_layer + w.size, (name, floats)
  assert count["keep"] < count["again"], count


@pytest.mark.aot
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_transfers_of_the_ring_overlap_its_kernels_on_a_tpu(implementation):
  # In the schedule of a v5e: within a step, forward (k, v) and backward (k, v, dk, dv), every permute begins
  # before the kernels (XLA: the loop over tiles) and ends behind them.
  pytest.importorskip("libtpu")
  if implementation != "xla":
    pytest.importorskip(f"genmodels.kernels.{implementation}")
  from jax.experimental import topologies

  devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
  mesh = make_mesh(MeshConfig(data=1, context=4), list(devices))
  place = lambda spec, shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
  bounds = place(P(None, None, "context"), (1, 2, 4096), jnp.int32)
  mask = AttnMask(place(P(None, "context"), (1, 4096), jnp.int32), bounds, bounds)

  def loss(w, x, mask):
    attend = sharded(mesh, mask, "ring", (), (512, 512), implementation, scale=0.1)
    layer = lambda x, w: (x + attend(x @ w[0], x @ w[1], x @ w[2])[0], None)
    return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

  x = place(P(None, "context"), (1, 4096, 2, 128), jnp.bfloat16)
  w = place(P(), (3, 3, 128, 128), jnp.bfloat16)
  with kernels.building_for(kernels.Target.of(devices[0])):
    text = jax.jit(jax.grad(loss)).lower(w, x, mask).compile().as_text()
  begin, end = "collective-permute-start", "collective-permute-done"
  work = 'while|custom-call(?=.*"tpu_custom_call")'
  steps = [re.findall(rf" = .*? ({begin}|{end}|{work})\(", body) for body in text.split("\n\n")]
  steps = [[op if op in (begin, end) else "work" for op in s] for s in steps]
  steps = [
    [op for i, op in enumerate(s) if op != "work" or s[i - 1] != op] for s in steps
  ]  # kernels in a row
  overlapped = [n for n in (2, 4) for s in steps if s == [begin] * n + ["work"] + [end] * n]
  assert overlapped == [2, 4], [s for s in steps if s]
