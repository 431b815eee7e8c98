"""Noisy streams that hold the response only: the same losses on fewer slots, no leak, no overflow.

Legend: B rows · N tokens of a row · M slots of a noisy stream.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import data, sampling
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, FILLER, TEXT, token_row
from genmodels.corruption.base import Blocks
from genmodels.data import prepare, records
from genmodels.layouts import Streams
from genmodels.objectives import Objective, laws
from genmodels.system import _with_rooms
from tests.objectives.test_text import KEY, MASK, loss, nets, trunk

# A text behind its prompt, and a conversation of two turns whose second answer ends in fillers.
ROLES = "C" * 7 + "T" * 9, "CCCCC" + "TTTTTT" + "CCC" + "TTTTT" + "FF"


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


def conversations(B=2, pad=3):
  """B rows of the two documents and padding."""
  code = {"C": CONTEXT, "T": TEXT, "F": FILLER}
  role = np.array([code[c] for c in "".join(ROLES)] + [CONTEXT] * pad)
  doc = np.array([0] * len(ROLES[0]) + [1] * len(ROLES[1]) + [-1] * pad)
  tokens = np.random.default_rng(3).integers(0, MASK, (B, len(doc)))
  wide = lambda x: np.broadcast_to(x, tokens.shape)
  return token_row(tokens, wide(doc), role=wide(role), capacity=2)


@functools.cache
def objective(copy="all", anchor="response", mask="bd3", streams=("n", "c"), align="same", slots=0, block=4):
  layout = {"kind": "streams", "streams": streams, "copy": copy, "copy_slots": slots}
  return Objective(
    corruption={
      "kind": "absorb", "unit": "block", "blocks": {"size": block, "anchor": anchor},
      "complement": len(streams) == 3,
    },
    layout=layout | ({"longest_block": block} if copy == "blocks" else {}),
    masks={"full": mask},
    likelihood="n",
    terms={s: {"stream": s, "on": "hit", "weight": "nelbo", "align": align} for s in streams if s != "c"},
    mask_id=MASK,
  )  # fmt: skip


slow = pytest.mark.slow
SAME = [  # (copy, anchor, mask, streams, align)
  ("blocks", "document", "bd3", ("n", "c"), "same"),
  pytest.param(("text", "response", "bd3", ("n", "c"), "same"), marks=slow),
  pytest.param(("text", "response", "bd3", ("n", "n1", "c"), "shift_clean_boundary"), marks=slow),
]


@pytest.mark.parametrize("case", SAME, ids=lambda c: "-".join((c[0], c[1], c[4])))
def test_losses_are_those_of_a_full_copy(case):
  copy, anchor, mask, streams, align = case
  row = conversations()
  N, text = row.tokens.shape[1], int((row.role[0] == TEXT).sum())
  M = {"text": text + 2, "blocks": text + 12}[copy]  # two fillers; four borders of blocks of four
  whole = objective("all", anchor, mask, streams, align)
  small = objective(copy, anchor, mask, streams, align, M)
  slots = jax.eval_shape(lambda r: small.prepare(r, KEY, 3)[0].ids, row).shape[1]
  assert slots == N + (len(streams) - 1) * M
  for term in whole.terms:
    want, per_token = loss(whole, row, term=term)
    got, other = loss(small, row, term=term)
    assert np.asarray(per_token > 0).sum() > 10
    np.testing.assert_allclose(other, per_token, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_noisy_slots_hold_the_response_in_order():
  row = conversations(B=1)
  o = objective("text", slots=24)
  slots = jax.jit(lambda r: o.layout.arrange(r, o.corruption.draw(r, KEY, 0)))(row)
  src, asked = np.asarray(slots.src[0, :24]), np.flatnonzero(np.asarray(row.role[0] != CONTEXT))
  assert src[: len(asked)].tolist() == asked.tolist() and (src[len(asked) :] == -1).all()
  where = np.asarray(slots.where[0, 0])
  assert (where[asked] == np.arange(len(asked))).all() and (np.delete(where, asked) == -1).all()
  assert (np.asarray(slots.doc[0, len(asked) : 24]) == -1).all()


def test_blocks_anchored_at_the_response_never_straddle():
  row = conversations(B=1)
  bounds = jax.jit(lambda r: Blocks(size=4, anchor="response").bounds(r, 0))
  lo, hi = (np.asarray(x[0]) for x in bounds(row))
  role = np.asarray(row.role[0])
  for n in range(len(ROLES[0] + ROLES[1])):
    assert len({role[m] == CONTEXT for m in range(lo[n], hi[n])}) == 1 and lo[n] <= n < hi[n] <= lo[n] + 4
  # A prompt's blocks are counted backwards from its answer, an answer's from its start; fillers are in them.
  assert sorted(set(zip(lo.tolist(), hi.tolist())))[:4] == [(0, 3), (3, 7), (7, 11), (11, 15)]
  assert (lo[30], hi[30], lo[34], hi[34]) == (30, 34, 34, 37)


@pytest.mark.parametrize(
  "copy, anchor, mask, align, wrong",
  [
    ("text", "response", "bd3", "same", None),
    ("text", "document", "context_causal", "same", None),
    pytest.param("blocks", "document", "bd3", "same", None, marks=slow),
    pytest.param("text", "response", "bd3", "shift_clean_boundary", None, marks=slow),
    ("text", "document", "bd3", "same", "clean identity"),  # straddling block: two hops
    ("text", "response", "bd3", "shift", "learnt by no slot"),
  ],
)
def test_laws_know_which_economies_are_sound(copy, anchor, mask, align, wrong):
  o = objective(copy, anchor, mask, align=align)
  if wrong is None:
    laws.check(o)
    return
  with pytest.raises(ConfigError, match=wrong):
    laws.check(o)


def test_bad_options_are_named():
  for wrong, name in (
    ({"copy": "answer"}, "copy"),
    ({"copy_slots": 8}, "copy_slots"),
    ({"copy": "blocks"}, "longest_block"),
    ({"copy": "text", "streams": ("n",)}, "'c'"),
    ({"copy": "text", "placement": "zigzag"}, "placement"),
  ):
    with pytest.raises(ValueError, match=name):
      Streams(**({"streams": ("n", "c")} | wrong))
  with pytest.raises(ConfigError, match="longest block has 8"):
    Objective(
      corruption={"kind": "absorb", "blocks": {"size": 8}},
      layout={"kind": "streams", "streams": ("n", "c"), "copy": "blocks", "longest_block": 4},
      masks={"full": "bd3"}, terms={"d": {"stream": "n"}}, mask_id=MASK,
    )  # fmt: skip


@pytest.mark.parametrize("copy, slots", [("text", 24), ("blocks", 50)])
def test_packed_rows_never_need_more_slots_than_there_are(copy, slots, tmp_path):
  rng = np.random.default_rng(0)

  def document():
    turns = [(int(rng.integers(1, 9)), int(rng.integers(1, 7))) for _ in range(int(rng.integers(1, 4)))]
    spans, at = [], 0
    for given, said in turns:
      spans.append((at, at + given, records.CONTEXT))
      at += given + said
    return records.Document(rng.integers(0, 250, at), spans=tuple(spans), source_bytes=at)

  out = str(tmp_path / "d")
  prepare.prepare([document() for _ in range(300)], out, vocab_size=256)
  layout = objective(copy, "document", slots=slots).layout
  section = _with_rooms({"kind": "text", "path": out, "seq_len": 64}, layout.rooms())
  d = data.build(section, layout.cost, batch_size=8)
  corruption, most = objective(copy, "document").corruption, 0
  used = jax.jit(lambda doc, role: layout.copied(
    row := token_row(jnp.zeros_like(doc), doc, role=role, capacity=64), corruption.draw(row, KEY, 0)
  ).sum(1))  # fmt: skip
  for step in range(12):
    batch = d.batch(step)
    most = max(most, int(used(batch["doc"], batch["role"]).max()))
  assert 0.7 * slots <= most <= slots
  # The same rows under the tokens' budget alone would not fit.
  free = data.build({"kind": "text", "path": out, "seq_len": 64}, layout.cost, batch_size=8).batch(0)
  assert int(used(free["doc"], free["role"]).max()) > slots or copy == "blocks"
  with pytest.raises(ConfigError, match="copy_slots"):
    _with_rooms(section | {"budgets": {"copy": 9}}, layout.rooms())
  with pytest.raises(records.DataError, match="copy_slots"):
    small = Streams(("n", "c"), copy="text", copy_slots=4)
    data.build(_with_rooms(dict(section, budgets={}), small.rooms()), small.cost, batch_size=8)


def test_a_row_that_no_packer_made_is_loud():
  prepare = jax.jit(lambda r: objective("text", slots=10).prepare(r, KEY, 3)[1])
  assert np.isnan(prepare(conversations())["n"].weight).all()


def test_evaluation_and_sampling_do_not_depend_on_the_economy():
  """A bound needs no packer's row; a sampler may take longer blocks; what it cannot decode is refused."""
  small = objective("blocks", "document", slots=8)
  row = conversations()
  one = lambda r: small.bound(nets(), r, KEY, 0, 1)[0]
  assert np.isfinite(jax.jit(one)(row)).all()
  other, trained = sampling.at_step(small, 0, 8)
  assert trained == 4 and other.layout.longest_block == other.corruption.blocks.longest == 8
  model, _ = trunk()
  sampling.build({}, small, model)
  sampling.build({}, objective("text"), model)
  with pytest.raises(ConfigError, match="layout.copy"):
    sampling.build({}, objective("text", "document", "context_causal"), model)
