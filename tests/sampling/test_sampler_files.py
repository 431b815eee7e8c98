"""Sampler files: each fits the systems it is written for, and finds its way from the command line."""

import json

import pytest

from genmodels import config, models, system
from genmodels.config import ConfigError
from genmodels.sampling import main as sample_main
from genmodels.sampling.run import load_run, sampler_of
from tests.sampling.test_run import workdir

FITS = {
  "dimoo_cache": "llada", "dinfer": "llada", "dkv_cache": "llada", "dllm_cache": "llada", "eb_sampler": "bd3lm", "eoser": "llada",
  "fast_dllm": "llada", "freecache": "llada", "jacobi": "ar", "longllada": "llada", "lrd": "llada", "medusa": "medusa",
  "del_exit": "ar", "ngram": "ar", "prophet": "llada", "rcr": "llada", "remdm": "mdlm", "stand": "ar",
}  # fmt: skip
# draft.path, energy.path, guide.path, sizes.path
NEED_ANOTHER_RUN = {
  "bild": "ar", "ctrldiff": "ctrldiff", "diffuspec": "ar", "edlm": "mdlm", "freecache:guided": "llada", "spectr": "ar",
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  """system name → System of its tiny variant, made once."""
  made = {}

  def of(name):
    if name not in made:
      cfg = config.load(f"language/{name}:tiny", ["data.documents=40", "model.layers=1"])
      made[name] = system.build(cfg, workdir=str(tmp_path_factory.mktemp(name)))
    return made[name]

  return of


def refs():
  for name in config.names(samplers=True):
    for variant in config.variants(config.load_module(config.find(name)[0])):
      yield f"{name}:{variant}" if variant else name


def test_every_file_is_tried():
  files = {n.split("/")[1] for n in config.names(samplers=True)}
  assert files == FITS.keys() | {n.split(":")[0] for n in NEED_ANOTHER_RUN}
  assert not set(config.names()) & set(config.names(samplers=True))


def marked():
  """The refs; those with a cache run it against none, which is slow."""
  for ref in refs():
    if ref.split("/")[1].split(":")[0] in FITS and ref.split("/")[1] not in NEED_ANOTHER_RUN:
      cached = "cache" in (config.plain(config.load(ref).get("sampler")) or {})
      yield pytest.param(ref, marks=pytest.mark.slow if cached else ())


@pytest.mark.parametrize("ref", list(marked()))
def test_a_file_fits_its_systems(ref, parts):
  """Every law of the sampler holds: plug-ins fit each other and the objective, and no key is unknown."""
  cfg = config.load(ref)
  base = parts(FITS[ref.split("/")[1].split(":")[0]])
  section = config.merged(config.plain(base.cfg.sampler), config.plain(cfg.get("sampler")) or {})
  made = sampler_of(base, 0, section)
  wanted = (config.plain(cfg.get("sampler")) or {}).get("cache")
  if wanted is not None:
    assert made.policy.partial is not None and not made.policy.exact  # approximate, and found to be
  if cfg.get("model"):
    model = config.merged(config.plain(base.cfg.model), config.plain(cfg.model)) | {"vocab": 260}
    built = models.build(model)
    assert built.cfg.segments[0].pattern[0].rope_base == built.cfg.rope.base * cfg.model.extend.factor


@pytest.mark.parametrize("name", sorted(NEED_ANOTHER_RUN))
def test_drafts_of_another_run_ask_for_it(name, parts):
  base = parts(NEED_ANOTHER_RUN[name])
  section = config.merged(
    config.plain(base.cfg.sampler), config.plain(config.load(f"samplers/{name}").sampler)
  )
  with pytest.raises(ConfigError, match="path"):
    sampler_of(base, 0, section)


@pytest.mark.slow
def test_from_the_command_line(tmp_path, capsys):
  workdir(tmp_path, "language/llada:tiny", ["data.documents=40", "model.layers=1"])
  run = load_run(tmp_path, sampler="samplers/prophet")
  stored = config.plain(load_run(tmp_path).cfg.sampler)
  assert config.plain(run.cfg.sampler) == stored | config.plain(config.load("samplers/prophet").sampler)
  args = ["--workdir", str(tmp_path), "--prompt", "def ", "--length", "24", "--json", "quota.steps=4"]
  assert sample_main.main([*args, "--sampler", "samplers/dkv_cache"]) == 0
  assert json.loads(capsys.readouterr().out)["cache"] == "delayed"
  with pytest.raises(ConfigError, match="did you mean"):
    sample_main.main([*args, "--sampler", "samplers/prophett"])
