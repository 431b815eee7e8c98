"""Whole texts drafted by a denoiser and taken by an energy (EDLM)."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, sampling, system
from genmodels import state as states
from genmodels.checkpoint import manager as checkpoints
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, token_row
from genmodels.objectives import Nets, Objective
from genmodels.sampling.run import load_network
from tests.sampling import systems as S

V, L = 3, 3  # tokens 0 … 2, the mask is 3; a given first token and three that are asked for
KEY = jax.random.key(0)


def build(vocab, **kw):
  return models.build(
    {
      "width": 8,
      "layers": 1,
      "num_heads": 2,
      "num_kv_heads": 1,
      "mlp": 8,
      "vocab": vocab,
      "init_std": 0.6,
      **kw,
    }
  )


@functools.cache
def models_of():
  """((objective, model, parameters) of an autoregressive model, the same of a masked denoiser)."""
  with jax.ensure_compile_time_eval():
    ar = S.ar(), build(V + 1, heads={"text": {"forbid": (V,)}})
    mdm = (
      Objective(
        corruption={"kind": "absorb"},
        layout={"kind": "streams", "streams": ("n",)},
        masks={"full": "full"},
        terms={"text": {"stream": "n", "on": "hit", "weight": "nelbo"}},
        mask_id=V,
      ),
      build(V + 1, heads={"text": {"forbid": (V,)}}),
    )
    return tuple((*x, jax.jit(x[1].init)(jax.random.key(i))) for i, x in enumerate((ar, mdm)))


def load(path, tree=""):
  """The autoregressive run, or a fresh energy network."""
  ar, mdm = models_of()
  if tree:
    net = models.NETS["energy"]().network(mdm[1])
    return net, jax.jit(net.init)(jax.random.key(7))
  return sampling.build({"eos": -2}, ar[0], ar[1]), ar[2]


def sampler(steps=1, **energy):
  section = {"eos": -2, "quota": {"kind": "ancestral", "steps": steps}}
  if energy:
    section["energy"] = {"kind": "ar", "path": "ar", "stop": 0.0, **energy}
  _, (objective, model, _) = models_of()
  return sampling.build(section, objective, model, load=load)


def prompts(B):
  return sampling.prompt_row([[1]] * B, L + 1, L)


@functools.cache
def joint():
  """p_AR float64[27] of all completions of the prompt."""
  objective, model, params = models_of()[0]
  text = np.array([[1, *x] for x in itertools.product(range(V), repeat=L)])
  row = token_row(text, role=np.where(np.arange(L + 1) == 0, CONTEXT, 1) + 0 * text)
  nets = Nets({"model": lambda *a: model.apply(params, *a)})
  nll, _ = jax.jit(lambda: objective.bound(nets, row, KEY, 0, 1))()
  return np.exp(-np.asarray(nll, np.float64)[:, 0])


def law(s, B=4096):
  out = np.asarray(s(models_of()[1][2], prompts(B), KEY).tokens)[:, 1:]
  return np.bincount(out @ V ** np.arange(L)[::-1], minlength=V**L) / B


def distance(p, q):
  return 0.5 * np.abs(p - q).sum()


@pytest.mark.slow
def test_more_candidates_are_nearer_to_the_joint():
  """One step of the reverse process draws the joint as k grows, though the denoiser knows marginals only."""
  p = joint()
  assert p.sum() == pytest.approx(1, abs=1e-5)
  far, near, nearest = (distance(law(sampler(size=k)), p) for k in (1, 8, 128))
  assert far > 0.4 and near < 0.6 * far and nearest < 0.06, (far, near, nearest)


@pytest.mark.slow
def test_one_candidate_is_the_denoiser():
  """k = 1 and steps outside of the window are masked diffusion bit by bit; inside the window they are not."""
  row, params = prompts(16), models_of()[1][2]
  plain = sampler(3)(params, row, KEY)
  of = lambda **kw: sampler(3, **kw)(params, row, KEY)
  late = of(size=4, start=0.0)
  for same in (of(size=1), late):
    np.testing.assert_array_equal(same.tokens, plain.tokens)
    np.testing.assert_array_equal(same.committed_at, plain.committed_at)
    assert int(same.forwards) == int(plain.forwards)
  early = of(size=4, stop=0.5)
  assert (np.asarray(early.tokens) != np.asarray(plain.tokens)).any()
  # Steps are at t = 1, 2/3, 1/3; at two of them the energy looks at four candidates.
  assert int(early.forwards) == int(plain.forwards) + 8


@pytest.mark.slow
def test_a_fresh_network_leaves_the_law():
  """E = 0 takes any candidate: the law of masked diffusion, tokens of other draws."""
  plain = law(sampler(1))
  fresh = law(sampler(1, kind="nce", size=4))
  noise = distance(*np.random.default_rng(0).multinomial(4096, plain, 2) / 4096)
  assert distance(plain, fresh) < 2 * noise + 0.01 and (plain != fresh).any()


@pytest.mark.slow
def test_a_network_comes_from_its_run(tmp_path):
  """The tree beside the model is read, and nothing else; E of what was saved is E of what is loaded."""
  cfg = config.load("language/edlm:tiny", ["data.documents=40", "model.layers=1"])
  parts = system.build(cfg, workdir=str(tmp_path))
  saved = jax.jit(parts.nets["energy"].init)(jax.random.key(2))
  config.write_json(tmp_path / "config.json", config.plain(cfg))
  saver = checkpoints.Manager(tmp_path / "checkpoints")
  saver.save(3, states.create({"model": jnp.zeros(3), "energy": saved}, {}))
  saver.close()
  net, loaded = load_network(tmp_path, "energy")
  jax.tree.map(np.testing.assert_array_equal, loaded, saved)
  assert net.model.cfg.channels == ("tokens", "shown")
  with pytest.raises(ConfigError, match="no such network"):
    load_network(tmp_path, "policy")
  with pytest.raises(FileNotFoundError, match="config.json"):
    load_network(tmp_path / "nowhere", "energy")


def test_refusals():
  with pytest.raises(ConfigError, match="has no run"):
    sampler(path="")
  _, (objective, model, _) = models_of()
  energy = {"kind": "ar", "path": "ar"}
  make = lambda **kw: sampling.build({"eos": -2, "energy": energy, **kw}, objective, model, load=load)
  with pytest.raises(ConfigError, match="times of the reverse process"):
    make(quota={"kind": "linear", "steps": 3})
  with pytest.raises(ConfigError, match="all candidates are the same"):
    make(quota="ancestral", temperature=0.0)
  with pytest.raises(ConfigError, match="whole text"):
    S.sampler(S.bd(), quota="ancestral", energy=energy)
  bound = lambda path, tree="": (SimpleNamespace(objective=objective), None)
  with pytest.raises(ConfigError, match="a bound, not a probability"):
    sampling.build({"eos": -2, "quota": "ancestral", "energy": energy}, objective, model, load=bound)
  with pytest.raises(ValueError, match="start with BOS|start every prompt"):
    sampler(size=2).check(sampling.prompt_row([[]], L + 1, L + 1))
  with pytest.raises(ConfigError, match="stop <= start"):
    sampler(start=0.2, stop=0.5)
