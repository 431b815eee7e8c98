"""FLOPs of a step against counts by hand, and what two streams cost at the 8B shape; memory at long rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import aot, config, kernels
from genmodels.aot import flops
from genmodels.contracts import CONTEXT, TEXT, token_row

M, K, N = 8, 16, 32
X, W = jnp.zeros((M, K)), jnp.zeros((K, K))
ONE = 2 * M * K * K


def counted(fn, *args, **kw):
  return flops.count(jax.make_jaxpr(fn)(*args).jaxpr, **kw)


def layers(n, remat=False):
  def body(x, _):
    return jnp.tanh(x @ W), None

  body = jax.checkpoint(body, prevent_cse=False) if remat else body
  return lambda x: jax.lax.scan(body, x, None, length=n)[0].sum()


def test_products_by_hand():
  assert counted(lambda x: x @ W, X).matmul == ONE
  batched = jax.vmap(lambda x: x @ jnp.zeros((K, N)))
  assert counted(batched, jnp.zeros((5, M, K))).matmul == 5 * 2 * M * K * N
  assert counted(lambda x: jnp.einsum("mk,mk->m", x, x), X).matmul == 2 * M * K
  assert counted(jnp.tanh, X).matmul == 0


def test_loops_count_as_often_as_they_run():
  assert counted(layers(7), X).matmul == 7 * ONE
  nested = lambda x: jax.lax.scan(lambda c, _: (c + layers(3)(x), None), 0.0, None, length=5)[0]
  assert counted(nested, X).matmul == 15 * ONE
  # Of the input alone: forward and one product back; recomputed: one forward more.
  assert counted(jax.grad(layers(7)), X).matmul == 14 * ONE
  assert counted(jax.grad(layers(7, remat=True)), X).matmul == 21 * ONE
  assert counted(jax.jit(jax.grad(layers(7))), X).matmul == 14 * ONE


def test_branches_count_as_the_dearest_one():
  fn = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: (x @ W) @ W, lambda x: x @ W, x)
  assert counted(fn, X).matmul == 2 * ONE


def test_loops_of_unknown_length_are_asked_for():
  @jax.named_scope("head")
  def fn(x, n):
    return jax.lax.fori_loop(0, n, lambda i, x: x @ W, x)

  with pytest.raises(ValueError, match="no known length"):
    counted(fn, X, 3)
  got = counted(fn, X, 3, trips=lambda scope: 2.5 if "head" in scope else None)
  assert got.matmul == got.head == 2.5 * ONE


def test_kernels_count_what_they_say():
  x, w = jnp.zeros((M, K), jnp.bfloat16), jnp.zeros((4, K, N), jnp.bfloat16)
  loss = lambda x, w: kernels.grouped_matmul(x, w, jnp.asarray([5, 0, 1, 1])).sum()
  with kernels.building_for(kernels.Target("tpu", "TPU v5p")):
    assert counted(jax.grad(loss, (0, 1)), x, w).matmul == 3 * 2 * M * K * N  # not 4 matrices' worth


def test_attention_counts_passes_not_tiles():
  from genmodels.kernels import attention
  from genmodels.masks import builders
  from genmodels.models import attend

  q, k = jnp.zeros((1, 256, 4, 16)), jnp.zeros((1, 256, 2, 16))
  plan = attend.plans({"full": builders.causal(jnp.zeros((1, 256), jnp.int32))}, 1, "xla")["full"]
  options = dict(scale=1.0, soft_cap=None, implementation="xla")
  fn = lambda q, k: attend.attention(q, k, k, plan, **options).sum()
  assert counted(fn, q, k) == flops.Count(passes=2)
  assert counted(jax.grad(fn, (0, 1)), q, k) == flops.Count(passes=7)
  both = lambda q, k: jax.checkpoint(fn)(q, k)  # forward, again, and back
  assert counted(jax.grad(both, (0, 1)), q, k) == flops.Count(passes=9)
  # Outside of the scope its loops are loops of unknown length.
  with pytest.raises(ValueError, match="no known length"):
    counted(lambda q, k: attention(q, k, k, plan, implementation="xla"), q, k)


# ------------------------------------------------------------------------------------------ 8B, L = 4096

L, PROMPT = 4096, 0.6
SHAPE = (
  "model.width=4096", "model.layers=36", "model.num_heads=32", "model.num_kv_heads=8", "model.head_dim=128",
  "model.mlp=12288", "model.vocab=151936", "model.dtype=bfloat16", "model.remat={'preset': 'full'}",
  f"data.seq_len={L}", "batch_size=1", "eval.every=0",
)  # fmt: skip


def row(prompt=0.0):
  """One document of L tokens, its prompt first."""
  role = np.full((1, L), TEXT)
  role[:, : max(round(L * prompt), 1)] = CONTEXT
  return token_row(np.random.default_rng(0).integers(0, 256, (1, L)), role=role)


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
  """cost(system, overrides, prompt share) → FLOPs of a step at the shape of Qwen3-8B, traced only."""

  @functools.cache
  def of(name, overrides=(), prompt=0.0) -> flops.Step:
    cfg = config.load(name, [*SHAPE, *overrides])
    program = aot.program(cfg, jax.devices()[:1], workdir=str(tmp_path_factory.mktemp("plan")))
    return flops.step(program, row(prompt))

  return of


AR = "language/ar:tiny"
BLOCK = "objective.corruption.blocks.size=32"
SFT = "language/sdar:sft_tiny", (f"objective.layout.copy_slots={math.ceil(L * (1 - PROMPT)) + 6}",), PROMPT


@pytest.mark.slow
def test_an_ar_step_is_what_its_shape_says(cost):
  s = cost(AR)
  per_token = 36 * (4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288)
  # Forward, recomputed (but the MLP's last product, which no derivative needs), two products back; the head's
  # logits likewise, at all positions but the first.
  assert s.matmul - s.head == 2 * (4 * per_token - 36 * 4096 * 12288) * L
  assert s.head == 4 * 2 * 4096 * 151936 * L and s.reads == L - 1
  assert s.pairs == L * (L + 1) // 2
  assert s.attention == 36 * (2 + 2 + 5) * 2 * 32 * 128 * s.pairs


@pytest.mark.slow
def test_two_streams_cost_at_most_two_ar_steps(cost):
  s = cost("language/bd3lm:tiny", (BLOCK,))
  assert s.slots == 2 * L and s.pairs == L * L + L * 32
  assert 1.8 < s.total / cost(AR).total <= 2.0


@pytest.mark.slow
def test_tuning_on_answers_costs_at_most_1_4_ar_steps(cost):
  s = cost(*SFT)
  assert s.slots < 1.41 * L
  assert s.total / cost(AR).total <= 1.4
  assert s.total / cost(AR, (), PROMPT).total <= 1.4  # an AR step that scores the answers only
  # Control: with the prompt copied it is no cheaper than learning everything.
  assert cost("language/sdar:tiny", (), PROMPT).total / cost(AR).total > 1.8


@pytest.mark.slow
def test_a_complementary_pair_costs_at_most_three_ar_steps(cost):
  s = cost("language/fast_dllm_v2:tiny", (BLOCK,))
  assert s.slots == 3 * L and s.reads == L - 1
  assert s.total / cost(AR).total <= 3.0
  # Control: a doubled batch is two steps of two streams.
  assert 2 * cost("language/bd3lm:tiny", (BLOCK,)).total / cost(AR).total > 3.7


# -------------------------------------------------------------------------------------------- memory


def largest(jaxpr) -> tuple[int, str]:
  """Elements of the largest array of a jaxpr, its shape and what makes it."""
  best = 0, ""
  for eqn in jaxpr.eqns:
    for v in eqn.outvars:
      shape = getattr(v.aval, "shape", ())
      best = max(best, (math.prod(shape), f"{eqn.primitive.name} {shape}"))
    for inner in flops._inner(eqn):
      best = max(best, largest(inner))
  return best


def test_a_square_array_would_be_found():
  made = jax.make_jaxpr(lambda x: (x[:, None] < x[None]).sum())(jnp.zeros(512))
  assert largest(made.jaxpr)[0] == 512 * 512


LONG = 16384
SMALL = (
  f"data.seq_len={LONG}", "model.width=16", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16",
  "model.mlp=16", "batch_size=1", "eval.every=0",
)  # fmt: skip
MORE = (
  "language/bd3lm:tiny", "language/sdar:sft_tiny", "language/nbdiff:tiny", "language/d2f:tiny",
  "language/wedlm:tiny", "language/tidar:tiny", "language/idlm:tiny", "language/efficient_dlm:tiny",
  "language/llada:sft_tiny", "language/dream:tiny", "language/dream_coder:tiny", "language/as_arm:tiny",
)  # fmt: skip


PAIR = pytest.param("language/fast_dllm_v2:tiny", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [PAIR, *(pytest.param(n, marks=pytest.mark.full) for n in MORE)])
def test_no_array_of_a_step_has_an_element_for_every_pair(name, tmp_path):
  """At L = 16k: (2L)² would be 2³⁰; the largest array has a few hundred elements for each slot."""
  cfg = config.load(name, SMALL)
  program = aot.program(cfg, jax.devices()[:1], workdir=str(tmp_path))
  made = jax.make_jaxpr(program.step)(program.state, program.rows(), program.key)
  size, what = largest(made.jaxpr)
  assert size < LONG * 1024, what


@pytest.mark.full
def test_compiled_memory_grows_with_the_row_not_its_square(tmp_path):
  """Temporaries of the compiled two-stream step at L = 16k against 4k."""

  def temporaries(length):
    over = [*SMALL, f"data.seq_len={length}", "model.layers=1"]
    cfg = config.load("language/bd3lm:tiny", over)
    program = aot.program(cfg, jax.devices()[:1], workdir=str(tmp_path / str(length)))
    return program.lower().compile().memory_analysis().temp_size_in_bytes

  short, long = temporaries(LONG // 4), temporaries(LONG)
  assert long < 5 * short
  assert long < (2 * LONG) ** 2 / 4, f"{long / 2**20:.0f} MiB"  # bytes: a bit for every pair would be half
