"""dInfer's credit decoder: what a slot predicted before counts, against a table over the whole vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.config import ConfigError
from genmodels.sampling import draw
from genmodels.sampling.credit import Credit
from tests.sampling import systems as S

KEY = jax.random.key(6)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def dense(table, z, rule):
  """The released rule over [c, V]: (fused logits, table)."""
  table = table * rule.decay
  p, c = softmax(z), np.arange(len(z))
  table[c, p.argmax(-1)] += p.max(-1) ** rule.gamma
  return z + rule.alpha * np.log1p(table), table


def test_credit_is_the_released_rule():
  rng = np.random.default_rng(0)
  steps, c, V = 7, 5, 9
  logits = (0.2 * rng.normal(size=(steps, c, V))).astype(np.float32)

  def fused(rule):
    table = tuple(rule.memory((1, c))[k][0] for k in ("ids", "value"))
    return jax.lax.scan(lambda t, z: rule.fused(z, *t)[::-1], table, logits)[1]

  full, small, off = jax.jit(
    lambda: [fused(r) for r in (Credit(top=steps), Credit(top=1), Credit(alpha=0.0))]
  )()
  table, want = np.zeros((c, V)), []
  for z in logits:
    out, table = dense(table, z, Credit())
    want.append(out)
  np.testing.assert_allclose(full, want, rtol=1e-5, atol=1e-6)
  assert np.abs(np.asarray(small) - want).max() > 0.05  # one entry forgets
  np.testing.assert_array_equal(off, logits)
  assert (np.asarray(full).argmax(-1) != logits.argmax(-1)).any(), "credit changes tokens"


@pytest.mark.slow
def test_credit_in_the_loop():
  """Step by step in windows of 7: the likeliest token of the fused logits, committed above the threshold of their
  own confidence; a slot's credit begins with its window and counts the steps in which it was open."""
  rule, tau = Credit(top=S.N), 0.55
  made = S.sampler(
    S.mdm(), quota={"kind": "threshold", "tau": tau}, temperature=0.0, sub_block=7, credit={"top": S.N}
  )
  row, params = S.row(), S.params()
  step = jax.jit(lambda s: (*made.logits(params, row, s), made.step(params, row, s, KEY)))
  s, table, differ = jax.jit(lambda: made.start(params, row, 0))(), np.zeros((4, S.N, S.V + 1)), 0
  while not np.asarray(s.done).all():
    logits, a, after = jax.tree.map(np.asarray, step(s))
    for b in range(4):
      can = a.at[b][a.can[b]]
      if can.size:
        z = logits[b][a.can[b]]
        fused, table[b, can] = dense(table[b, can], z, rule)
        p = softmax(fused)
        sure = p.max(-1) > tau
        sure[p.max(-1).argmax()] = True
        assert np.flatnonzero(after.committed[b] & ~np.asarray(s.committed)[b]).tolist() == can[sure].tolist()
        assert after.tokens[b, can[sure]].tolist() == fused[sure].argmax(-1).tolist()
        differ += (fused.argmax(-1) != z.argmax(-1)).sum() + (sure != (softmax(z).max(-1) > tau)).sum()
    s = jax.tree.map(jnp.asarray, after)
  assert differ, "without credit it would be another generation"


def test_refusals():
  with pytest.raises(ConfigError, match="predicted once"):
    S.sampler(S.ar(), credit={"alpha": 0.5})
  with pytest.raises(ConfigError, match="earn credit again"):
    S.sampler(S.mdm(), credit={"alpha": 0.5}, cache="logit_selective")
  with pytest.raises(ConfigError, match="by the predictions"):
    S.sampler(S.mdm(), credit={"alpha": 0.5}, cache="delayed_greedy", score="random")
  with pytest.raises(ConfigError, match="at least 1 entry"):
    S.sampler(S.mdm(), credit={"top": 0})
  assert draw.Choice().credit is None
