"""Configs: what is refused and how the refusal reads; overrides; schedules; what is written."""

import dataclasses
import json
import subprocess
import sys
from typing import Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from genmodels import config
from genmodels.config import ConfigError, Schedule, build, build_kind, load, override, plain, resolved


@dataclasses.dataclass(frozen=True)
class Decay:
  kind: str = "cosine"
  floor: float = 0.1


@dataclasses.dataclass(frozen=True)
class Inner:
  width: int = 8


@dataclasses.dataclass(frozen=True)
class Adam:
  lr: float
  betas: tuple[float, float] = (0.9, 0.95)
  axes: tuple[str, ...] = ()
  nesterov: bool = False
  clip: float | None = None
  warmup: int | Schedule = 0
  block: Schedule = 4
  where: Literal["all", "matrices"] = "all"
  inner: Inner = Inner()
  decay: Decay = Decay()
  head: object = None
  weights: dict[str, float] = dataclasses.field(default_factory=dict)
  auto: float | Literal["auto"] = "auto"

  def __post_init__(self):
    if self.lr <= 0:
      raise ValueError(f"lr must be positive, got {self.lr}")
    if self.betas[0] > self.betas[1] and not self.nesterov:
      raise ValueError("betas must rise unless nesterov")
    if self.clip == 0:
      raise ConfigError("a clip of 0 stops training", key="clip", value=0.0, fix="clip=none")


@dataclasses.dataclass(frozen=True)
class Sgd:
  lr: float = 0.1


REGISTRY = {"adam": Adam, "sgd": Sgd}


def test_build_converts_and_fills_in():
  section = ml_collections.ConfigDict(
    dict(lr=1, axes=["a", "b"], clip=2, warmup=3, weights=dict(text=1), inner=dict(width=9), auto=0.5)
  )
  a = build(Adam, section, "optim")
  given = dict(axes=("a", "b"), clip=2.0, warmup=3, weights={"text": 1.0}, inner=Inner(9), auto=0.5)
  assert a == Adam(lr=1.0, block=Schedule.of(4), **given)
  assert isinstance(a.lr, float) and isinstance(a.clip, float) and isinstance(a.weights["text"], float)
  assert a.block(7) == 4  # a bare number as the default of a Schedule field is a schedule
  assert build(Adam, a, "optim") is a
  assert build(Inner, None, "x") == Inner()


def test_nested_kind_stays_with_its_owner():
  a = build(Adam, dict(lr=1.0, head=dict(kind="flow", steps=[1, 2])), "optim")
  assert a.head == {"kind": "flow", "steps": (1, 2)}
  assert build(Adam, dict(lr=1.0, decay=dict(kind="linear")), "optim").decay == Decay("linear")


LINE = dict(kind="linear", start=0, end=1)
OK = dict(lr=1.0)
# (section, key and value, words of the reason, words of the fix)
REFUSED = [
  (dict(OK, beta=(0.1, 0.2)), "optim.beta = (0.1, 0.2)", "unknown key of Adam", "did you mean 'betas'"),
  (dict(OK, inner=dict(widht=3)), "optim.inner.widht = 3", "unknown key of Inner", "did you mean 'width'"),
  (dict(), "optim.lr", "missing", "set optim.lr=float"),
  (dict(lr="1e-3"), "optim.lr = '1e-3'", "expected float, got str", "write a number"),
  (dict(lr=True), "optim.lr = True", "expected float, got bool", "number"),
  (dict(OK, inner=dict(width=9.0)), "optim.inner.width = 9.0", "expected int, got float", "write 9"),
  (dict(OK, inner=dict(width=True)), "optim.inner.width = True", "expected int, got bool", "whole number"),
  (dict(OK, nesterov=1), "optim.nesterov = 1", "expected bool, got int", "True or False"),
  (dict(OK, betas=(0.9,)), "optim.betas = (0.9,)", "expected tuple[float, float]", "2 entries"),
  (dict(OK, axes=("a", 1)), "optim.axes[1] = 1", "expected str, got int", "quote it"),
  (dict(OK, axes="ab"), "optim.axes = 'ab'", "got str", "tuple"),
  (dict(OK, weights=dict(text="x")), "optim.weights.text = 'x'", "expected float", "number"),
  (dict(OK, where="matrix"), "optim.where = 'matrix'", "unknown choice", "did you mean 'matrices'"),
  (dict(OK, auto="atuo"), "optim.auto = 'atuo'", "expected float |", "write a"),
  (dict(OK, clip="x"), "optim.clip = 'x'", "got str", "number"),
  (dict(lr=-1), "optim.lr = -1.0", "lr must be positive, got -1.0", "change optim.lr"),
  (dict(OK, betas=(0.9, 0.1)), "optim.betas = (0.9, 0.1)", "with optim.nesterov=False", "optim.nesterov"),
  (dict(OK, clip=0), "optim.clip = 0.0", "stops training", "clip=none"),
  (dict(OK, warmup=dict(kind="step", values=(1,))), "optim.warmup.kind = 'step'", "unknown kind", "steps"),
  (dict(OK, block=dict(kind="steps", value=(1,))), "optim.block.value", "unknown key", "'values'"),
  (dict(OK, block=dict(kind="steps", values=(1, 2))), "optim.block.at", "needs it", "dict(kind='steps'"),
  (dict(OK, block=dict(kind="steps", values=(1, 2), at=(0, 0))), "optim.block.at = (0, 0)", "rise", "at="),
  (dict(OK, block=dict(kind="steps", values=(1, 2), at=(1, 2))), "optim.block.at", "start at 0", "at="),
  (dict(OK, block=dict(LINE, over=(5, 5))), "optim.block.over", "first < last", "over="),
  (
    dict(OK, block=dict(kind="steps", values=("a",), at=(0,))),
    "optim.block.values",
    "numbers",
    "kind='steps'",
  ),
  (3, "optim = 3", "expected a section with the keys of Adam", "lr"),
]


@pytest.mark.parametrize("section, head, reason, fix", REFUSED)
def test_refusals_name_key_value_reason_and_fix(section, head, reason, fix):
  with pytest.raises(ConfigError) as e:
    build(Adam, section, "optim")
  first, last = str(e.value).split("\n")
  assert first.startswith(head) and reason in first, first
  assert last.startswith("  fix: ") and fix in last, last


def test_build_kind():
  assert build_kind(REGISTRY, dict(kind="sgd"), "optim") == Sgd()
  assert build_kind(REGISTRY, Sgd(2.0), "optim") == Sgd(2.0)
  section = ml_collections.ConfigDict(dict(kind="adam", lr=1.0))
  assert build_kind(REGISTRY, section, "optim").lr == 1.0
  assert section.kind == "adam"  # the caller's section is left alone
  with pytest.raises(ConfigError, match=r"optim.kind = 'adm': unknown kind\n.*did you mean 'adam'"):
    build_kind(REGISTRY, dict(kind="adm"), "optim")
  with pytest.raises(ConfigError, match=r"optim.*with a kind"):
    build_kind(REGISTRY, dict(lr=1.0), "optim")


STEPS = dict(kind="steps", values=(1, 4, 8), at=(0, 10, 20))


@pytest.mark.parametrize(
  "section, points, whole",
  [
    (3, {0: 3, 99: 3}, True),
    (0.5, {0: 0.5}, False),
    (STEPS, {0: 1, 9: 1, 10: 4, 19: 4, 20: 8, 1000: 8}, True),
    (dict(kind="linear", start=1, end=3, over=(10, 20)), {0: 1, 10: 1, 15: 2, 20: 3, 50: 3}, False),
    (
      dict(kind="cosine", start=1.0, end=0.0, over=(0, 4)),
      {0: 1, 1: 0.5 + 0.5**1.5, 2: 0.5, 4: 0, 9: 0},
      False,
    ),
  ],
)
def test_schedule_on_the_host_and_traced(section, points, whole):
  s = Schedule.of(section)
  steps = list(points)
  np.testing.assert_allclose([s(t) for t in steps], list(points.values()), rtol=1e-12)
  traced = jax.jit(jax.vmap(s))(jnp.asarray(steps, jnp.int32))
  assert traced.dtype == (jnp.int32 if whole else jnp.float32)
  np.testing.assert_allclose(traced, list(points.values()), rtol=1e-6, atol=1e-7)
  assert Schedule.of(plain(s.to_json())) == s
  assert hash(s) is not None


def test_schedule_bounds():
  assert Schedule.of(STEPS).values() == (1, 4, 8) and Schedule.of(STEPS).max() == 8
  assert Schedule.of(4).is_constant and Schedule.of(4).values() == (4,)
  line = Schedule.of(dict(kind="linear", start=1, end=3, over=(10, 20)))
  assert (line.min(), line.max(), line.is_constant) == (1, 3, False)
  with pytest.raises(ValueError, match="infinitely many"):
    line.values()


FILE = """
import ml_collections
VARIANTS = ("tiny", "long")
def get_config(variant=""):
  c = ml_collections.ConfigDict(dict(name="toy", seed=0, batch_size=4 if variant == "tiny" else 64))
  c.optim = dict(kind="adam", lr=1e-3, betas=(0.9, 0.95), block=4, clip=None)
  c.eval = dict(every=c.get_ref("batch_size"))
  return c.lock()
"""


@pytest.fixture
def toy(tmp_path):
  path = tmp_path / "toy.py"
  path.write_text(FILE)
  return str(path)


def test_load_path_variant_and_overrides(toy):
  assert load(toy).batch_size == 64
  cfg = load(
    toy + ":tiny", ["optim.lr=1", "optim.betas=[0.8,0.9]", "train.steps=3", "optim.clip=0.5", "name=12"]
  )
  assert cfg.batch_size == cfg.eval.every == 4
  assert isinstance(cfg.optim.lr, float) and cfg.optim.betas == (0.8, 0.9) and cfg.optim.clip == 0.5
  assert cfg.train.steps == 3 and cfg.name == "12"
  cfg = load(toy, ["optim.block={'kind': 'steps', 'values': (1, 4), 'at': (0, 9)}", "optim.nesterov=true"])
  assert build_kind(REGISTRY, cfg.optim, "optim").block(9) == 4
  assert build_kind(REGISTRY, cfg.optim, "optim").nesterov is True
  cfg = load(toy, ["optim.block=8", "optim.clip=none"])
  assert cfg.optim.block == 8 and cfg.optim.clip is None


@pytest.mark.parametrize(
  "text, words",
  [
    ("optim.lr=fast", "optim.lr = 'fast': the config has a float here (0.001), got str"),
    ("optim.betas=3", "the config has a tuple here"),
    ("seed=true", "the config has a int here (0), got bool"),
    ("optim=3", "the config has a dict here"),
    ("seed.x=3", "cannot set seed.x: seed is a value, not a section"),
    ("optim.lr", "malformed override 'optim.lr'"),
    ("=3", "malformed override"),
    ("optm.lr=3", "did you mean 'optim'"),
  ],
)
def test_override_refusals(toy, text, words):
  with pytest.raises(ConfigError) as e:
    load(toy, [text])
  assert words in str(e.value) and "fix: " in str(e.value)


def test_load_refusals(toy, tmp_path):
  with pytest.raises(ConfigError, match="unknown variant\n.*did you mean 'tiny'"):
    load(toy + ":tin")
  with pytest.raises(ConfigError, match="no such config"):
    load(str(tmp_path / "none.py"))
  with pytest.raises(ConfigError, match="no such config"):
    load("language/none")
  (tmp_path / "empty.py").write_text("x = 1\n")
  with pytest.raises(ConfigError, match="has no get_config"):
    load(str(tmp_path / "empty.py"))


def test_names_find_the_files_of_the_checkout(monkeypatch, tmp_path):
  (tmp_path / "language").mkdir()
  (tmp_path / "language" / "toy.py").write_text(FILE)
  (tmp_path / "language" / "_shared.py").write_text("")
  monkeypatch.setattr(config.files, "configs_root", lambda: tmp_path)
  assert config.names() == ["language/toy"]
  assert load("language/toy:tiny").batch_size == 4
  assert load("configs/language/toy.py:tiny").batch_size == 4  # from any folder
  with pytest.raises(ConfigError, match="did you mean language/toy|did you mean 'language/toy'"):
    load("language/toi")


def test_resolved_is_json_with_every_default(tmp_path):
  built = build_kind(
    REGISTRY, dict(kind="adam", lr=1, block=STEPS, clip=float("inf"), head=np.float32(2)), "optim"
  )
  out = resolved({"optim": built, "seed": 3, "dtype": jnp.bfloat16.dtype.name, "fn": test_schedule_bounds})
  assert out["optim"]["kind"] == "adam" and out["optim"]["betas"] == [0.9, 0.95]
  assert out["optim"]["block"] == {"kind": "steps", "values": [1, 4, 8], "at": [0, 10, 20]}
  assert out["optim"]["clip"] == "inf" and out["optim"]["head"] == 2.0
  assert out["fn"].endswith("test_schedule_bounds")
  assert set(out["optim"]) == {f.name for f in dataclasses.fields(Adam)} | {"kind"}
  config.write_json(tmp_path / "config.json", out)
  assert json.loads((tmp_path / "config.json").read_text()) == out
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
  again = build_kind(REGISTRY, {k: v for k, v in out["optim"].items() if k not in ("clip", "head")}, "optim")
  assert again.block == built.block and again.betas == built.betas
  with pytest.raises(ConfigError, match="optim.head = .*cannot be written"):
    resolved({"optim": Adam(1.0, head=object())})


def test_override_sets_a_new_section():
  cfg = ml_collections.ConfigDict()
  override(cfg, "train.every.samples=5")
  assert plain(cfg) == {"train": {"every": {"samples": 5}}}


def test_config_imports_no_jax(toy):
  code = f"from genmodels import config; import sys; config.load({toy!r}); assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_differences_name_leaves_and_both_values():
  old = {"a": 1, "rope": {"base": 1e4, "axes": [2, 2]}, "gone": {"x": 1}, "same": (1, (2,))}
  new = {"a": 1, "rope": {"base": 5e5, "axes": (2, 2)}, "new": None, "same": [1, [2]]}
  assert config.differences(old, new) == [
    "gone {'x': 1} → unset",
    "new unset → None",
    "rope.base 10000.0 → 500000.0",
  ]
  assert config.differences(1, 1.5, "lr") == ["lr 1 → 1.5"] and not config.differences(new, new)
