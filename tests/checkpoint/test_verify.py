"""Digests: every flipped bit and every swap is seen, no mesh is."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from genmodels.checkpoint import verify
from genmodels.parallel.mesh import MeshConfig, make_mesh

DTYPES = [
  "float32",
  "bfloat16",
  "float16",
  "int32",
  "uint32",
  "int8",
  "uint8",
  "int16",
  "bool",
  "float8_e4m3fn",
]


def sample(dtype, shape=(6, 5), seed=0):
  rng = np.random.default_rng(seed)
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  if dtype == np.bool_:
    return rng.random(shape) < 0.5
  return rng.integers(0, 256, shape + (dtype.itemsize,), dtype=np.uint8).view(dtype)[..., 0]


def one(x):
  return verify.digest({"x": jnp.asarray(x)})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_both_sums(dtype):
  x = sample(dtype)
  flips = [x]
  raw = x.view(np.uint8).reshape(-1)
  for byte in range(raw.size):
    for bit in [0] if x.dtype == bool else [byte % 8, 7]:
      y = raw.copy()
      y[byte] ^= 1 << bit
      flips.append(y.view(x.dtype).reshape(x.shape))
  got = np.asarray(jax.jit(jax.vmap(verify.leaf_digest))(jnp.asarray(np.stack(flips))))
  assert (got[1:] != got[0]).all()


def test_all_32_bits_of_one_word():
  x = sample("float32")
  words = x.view(np.uint32)
  flips = np.stack(
    [words] + [words ^ (np.arange(30).reshape(6, 5) == 17) * np.uint32(1 << b) for b in range(32)]
  )
  got = np.asarray(jax.jit(jax.vmap(verify.leaf_digest))(jnp.asarray(flips)))
  assert (got[1:] != got[0]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swaps_and_permutations_change_it(dtype):
  x = jnp.arange(1, 65).astype(dtype).reshape(8, 8)
  a = np.asarray(x)
  variants = [a, a[::-1], a.T, np.roll(a, 1)]
  swap = a.copy()
  swap[0, 0], swap[3, 4] = a[3, 4], a[0, 0]
  variants.append(swap)
  got = {one(v) for v in variants}
  assert len(got) == len(variants)


def test_swapping_x_and_minus_x_is_seen_although_one_sum_is_blind_to_it():
  blind = 0
  for i in range(1, 16):
    x = np.ones(16, np.float32)
    x[0] = -1
    y = np.ones(16, np.float32)
    y[i] = -1
    a, b = one(x), one(y)
    blind += a[0] == b[0]
    assert a != b
  assert blind == 15  # negative control: without the rotation, both sums would be blind


def test_nans_denormals_and_negative_zero_count_as_bits():
  x = np.array([0x7FC00000, 0x7FC00001, 0x00000001, 0x80000000, 0], np.uint32).view(np.float32)
  got = np.asarray(jax.jit(jax.vmap(verify.leaf_digest))(jnp.asarray(x[:, None])))
  assert len({tuple(g) for g in got.tolist()}) == 5


def test_scalars_keys_empty_and_64_bits():
  assert one(np.float32(1)) != one(np.float32(2))
  key = lambda s: verify.digest({"k": jax.random.key(s)})["k"]
  assert key(0) != key(1) and key(0) == key(0)
  assert one(np.zeros((0, 3), np.float32)) == (0, 0)
  assert one(np.zeros(3, np.complex64)) != one(np.array([0, 1j, 0], np.complex64))
  with jax.enable_x64(True):
    a, b = np.array([1 << 40, 5], np.int64), np.array([1 << 41, 5], np.int64)
    assert one(a) != one(b)
  assert verify.digest({}) == {}


def test_same_on_every_mesh():
  assert jax.device_count() >= 8, "run with XLA_FLAGS=--xla_force_host_platform_device_count=8"
  tree = {
    "w": sample("float32", (16, 8)),
    "b": sample("bfloat16", (8,)),
    "n": np.int32(7),
    "m": sample("bool", (4, 8)),
  }
  want = verify.digest({k: jnp.asarray(v) for k, v in tree.items()})
  for cfg in (dict(data=8), dict(fsdp=8), dict(fsdp=4, tensor=2), dict(fsdp=2, tensor=2, context=2)):
    mesh = make_mesh(MeshConfig(**{"data": -1, **cfg}), jax.devices()[:8])
    specs = {
      "w": PartitionSpec("fsdp", "tensor"),
      "b": PartitionSpec("fsdp"),
      "n": PartitionSpec(),
      "m": PartitionSpec(None, ("fsdp", "tensor")),
    }
    placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in tree.items()}
    assert verify.digest(placed) == want
  changed = dict(placed, w=jax.device_put(tree["w"] + 1, placed["w"].sharding))
  assert verify.digest(changed)["w"] != want["w"] and verify.digest(changed)["b"] == want["b"]


def test_large_leaves_use_their_whole_index(monkeypatch):
  # 94 layers × 128 experts × 4096 × 1536: the linear index has 37 bits.
  plan = verify.strides((94, 128, 4096, 1536))
  assert plan == [(1, 1), (0, 4096 * 1536), (0, 1536), (0, 1)]
  assert max(s for _, s in plan) < 2**32
  assert verify.strides((1 << 16, 1 << 16)) == [(0, 1 << 16), (0, 1)]
  # Same low part, other high part → other coefficients (the split forced on a small shape).
  monkeypatch.setattr(verify, "strides", lambda shape: [(1, 1), (0, 1)])
  for c in verify.coefficients((64, 64)):
    c = np.asarray(c).reshape(-1)
    assert (c % 2 == 1).all() and len(set(c.tolist())) == c.size


@pytest.mark.parametrize("shape", [(40, 7), (5,), (), (2, 3, 4, 5)])
def test_sums_against_64_bit_integers(shape):
  x = sample("float32", shape)
  c1, c2 = (np.asarray(c).astype(np.uint64) for c in verify.coefficients(shape))
  w = x.view(np.uint32).astype(np.uint64)
  rot = ((w << np.uint64(16)) | (w >> np.uint64(16))) & np.uint64(0xFFFFFFFF)
  assert one(x) == (int((w * c1).sum()) % 2**32, int((rot * c2).sum()) % 2**32)


def test_seal():
  sealed = verify.seal({"step": 3, "cursor": [1, 2]})
  assert verify.unseal(sealed, "meta") == {"step": 3, "cursor": [1, 2]}
  broken = dict(sealed, body=sealed["body"].replace("3", "4"))
  for bad in (broken, {"body": "{}"}, [], None):
    with pytest.raises(verify.SealError, match="meta"):
      verify.unseal(bad, "meta")
