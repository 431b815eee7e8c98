"""Every system and variant: as resolved, where its parameters lie on one mesh, and under which laws (T7).

The goldens make a changed default visible in a review. To write them anew, and then read the diff:

  python -m tests.test_golden
"""

import dataclasses
import functools
import json
import pathlib
import unittest.mock

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from genmodels import config, data, evals, optim, sampling, system, train
from genmodels import step as steps
from genmodels.checkpoint import manager as checkpoints
from genmodels.data import tokenizers
from genmodels.objectives import laws
from genmodels.parallel import mesh as meshes
from genmodels.parallel import rules
from genmodels.state import param_paths

GOLDEN = pathlib.Path(__file__).parent / "golden"
REFS = [
  f"{n}:{v}" if v else n
  for n in config.names()
  for v in config.variants(config.load_module(config.find(n)[0]))
]
# 64 devices, an axis of every kind that splits parameters.
MESH = {"data": 2, "fsdp": 8, "tensor": 4, "context": 1}


class Bytes:
  """Prepared byte text that nobody prepared: the facts of it, which are all that a system's parts ask for."""

  def __init__(self, seq_len: int):
    t = tokenizers.ByteTokenizer()
    self.meta = data.Meta(t.vocab_size, t.specials, 256, seq_len)


def build(section, cost=None, **kw):
  """data.build, without data on disk."""
  if section["kind"] == "digits":
    return data.build(section, cost, **kw)
  return Bytes(section["seq_len"])


@functools.cache
def parts(ref: str) -> system.System:
  """The system of a config, its laws not checked yet."""
  with (
    unittest.mock.patch.object(system, "data", unittest.mock.Mock(build=build)),
    unittest.mock.patch.object(laws, "check", lambda objective: []),
  ):
    return system.build(config.load(ref))


def resolved(ref: str) -> dict:
  """Everything that decides a run: every knob of every component, defaults included."""
  s = parts(ref)
  cfg = s.cfg
  # As configured, not as this machine resolves it.
  model = dataclasses.replace(s.model.cfg, attention=config.plain(cfg.model).get("attention", "auto"))
  source = config.plain(cfg.data)
  if source["kind"] == "text" and not source["path"]:
    source["path"] = "<prepared data>"
  return config.resolved(
    {
      "name": cfg.name,
      "paper": config.plain(cfg.paper),
      "seed": cfg.seed,
      "batch_size": cfg.batch_size,
      "model": model,
      "latent": config.plain(cfg.get("latent")),
      "objective": s.objective,
      "data": config.build_kind(data.pipeline.REGISTRY, source, "data"),
      "optim": config.build(optim.OptimConfig, cfg.optim, "optim"),
      "train": config.build(train.TrainConfig, cfg.train, "train"),
      "eval": config.build(evals.EvalConfig, cfg.eval, "eval"),
      "sampler": config.build(sampling.SamplerConfig, cfg.sampler, "sampler"),
      "mesh": config.build(meshes.MeshConfig, cfg.mesh, "mesh"),
      "checkpoint": config.build(checkpoints.CheckpointConfig, cfg.checkpoint, "checkpoint"),
      "init": config.plain(cfg.init),
      "trees": config.plain(cfg.get("trees")),
    }
    # Only some systems have further players.
    | ({"players": steps.player_configs(cfg)} if cfg.get("players") else {})
  )


def shardings(ref: str) -> dict[str, str]:
  """{parameter: "shape @ partition spec"} on MESH, and what stays whole although a rule would split it."""
  mesh = AbstractMesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * len(MESH))
  model, dropped = parts(ref).model, []
  placed = rules.sharding_tree(mesh, model.logical_axes(), model.abstract_params(), dropped=dropped)
  shapes = param_paths(model.abstract_params())
  specs = param_paths(placed, is_leaf=lambda x: isinstance(x, jax.sharding.NamedSharding))
  out = {name: f"{list(shapes[name].shape)} @ {', '.join(map(str, specs[name].spec))}" for name in shapes}
  return out | ({"(whole)": dropped} if dropped else {})


def text(value) -> str:
  return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def path(kind: str, ref: str) -> pathlib.Path:
  return GOLDEN / kind / (ref.replace("/", ".").replace(":", ".") + ".json")


HINT = "if the change is meant: python -m tests.test_golden"


@pytest.mark.parametrize("ref", REFS)
def test_resolved_config(ref):
  assert path("configs", ref).exists(), HINT
  assert json.loads(text(resolved(ref))) == json.loads(path("configs", ref).read_text()), HINT


@pytest.mark.parametrize("ref", [r for r in REFS if ":" not in r])
def test_shardings(ref):
  assert path("shardings", ref).exists(), HINT
  assert shardings(ref) == json.loads(path("shardings", ref).read_text()), HINT


def test_no_golden_is_left_over():
  want = {path("configs", r) for r in REFS} | {path("shardings", r) for r in REFS if ":" not in r}
  assert set(GOLDEN.rglob("*.json")) == want, HINT


def test_a_changed_default_is_seen(monkeypatch):
  """The control: another default of one knob is another text."""
  ref = "language/ar:tiny"
  before = resolved(ref)
  monkeypatch.setattr(optim, "OptimConfig", dataclasses.make_dataclass(
    "OptimConfig", [("eps", float, 1e-6)], bases=(optim.OptimConfig,), frozen=True,
  ))  # fmt: skip
  after = resolved(ref)
  assert {k for k in before if before[k] != after[k]} == {"optim"}


@functools.cache
def _laws(ref: str) -> str:
  """What the laws look at; variants that differ elsewhere are checked once."""
  return text({k: resolved(ref)[k] for k in ("objective", "latent")})


@pytest.mark.parametrize("ref", REFS)
def test_every_shipped_system_is_lawful(ref):
  """No leak, a pure clean stream, true marginals (T7): the negative controls are the refusals of test_train."""
  first = next(r for r in REFS if _laws(r) == _laws(ref))
  if ref == first:
    laws.check(parts(ref).objective)


def write() -> None:
  """Writes all goldens anew."""
  for old in GOLDEN.rglob("*.json"):
    old.unlink()
  for ref in REFS:
    out = [("configs", resolved(ref))] + ([] if ":" in ref else [("shardings", shardings(ref))])
    for kind, value in out:
      path(kind, ref).parent.mkdir(parents=True, exist_ok=True)
      path(kind, ref).write_text(text(value), encoding="utf-8")


if __name__ == "__main__":
  write()
