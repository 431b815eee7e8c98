"""A finished or running run, opened for sampling and evaluation; samples during training.

Legend: B rows.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from genmodels import config, models, optim, system
from genmodels import state as states
from genmodels.checkpoint import init as initialisation
from genmodels.contracts import Row
from genmodels.data import chat
from genmodels.data.records import DataError
from genmodels.parallel import mesh as meshes
from genmodels.parallel import rules
from genmodels.sampling.config import SamplerConfig, at_step, build
from genmodels.sampling.loop import Sampler
from genmodels.sampling.state import Result, prompt_row


@dataclasses.dataclass(frozen=True)
class Run:
  """An opened run.

  Fields:
    cfg: ConfigDict. parts: system.System. trees: {"model": parameters to evaluate}, and those of the networks
      that its heads read. step, mesh.
  """

  cfg: Any
  parts: Any
  trees: dict
  step: int
  mesh: Any


def load_run(workdir, step: int | None = None, overrides: Sequence[str] = (), sampler: str = "") -> Run:
  """Opens a workdir: its config, its system, its newest verified parameters (the average, where one is kept).

  Args:
    step: this checkpoint and no other.
    overrides: "key.path=value" on the stored config.
    sampler: a sampler file (`configs/samplers`), whose sections are merged into the stored ones first.

  Raises:
    FileNotFoundError: no config.json. RestoreError: no checkpoint verifies. ConfigError.
  """
  path = pathlib.Path(workdir)
  if not (path / "config.json").is_file():
    raise FileNotFoundError(
      f"{path}/config.json does not exist: is {path} the --workdir of a training run, or an import?"
    )
  stored = _tuples(json.loads((path / "config.json").read_text()))
  if sampler:
    changes = config.plain(config.load(sampler))
    stored = config.merged(stored, {k: v for k, v in changes.items() if k not in ("name", "paper", "tests")})
  cfg = ml_collections.ConfigDict(stored)
  for text in overrides:
    config.override(cfg, text)
  mesh = _mesh(cfg)
  parts = system.build(cfg, workdir=str(path), mesh=mesh)
  shapes, axes = parts.model.abstract_params(), parts.model.logical_axes()
  with rules.use_mesh(mesh):
    trees, step = _trees(cfg, path, step, mesh, shapes, axes)
    for name in models.joint.names(parts.model.cfg):
      trees[name] = _network(path, name, parts.nets[name], mesh, step)
  return Run(cfg, parts, trees, step, mesh)


def parameters(parts, trees: dict) -> Any:
  """What a sampler of the system takes as its parameters: the model's, or {"model": …} with those of the
  networks that its heads read."""
  names = models.joint.names(parts.model.cfg)
  return {name: trees[name] for name in ("model", *names)} if names else trees["model"]


def _tuples(x):
  """JSON has no tuples; configs have no lists."""
  if isinstance(x, dict):
    return {k: _tuples(v) for k, v in x.items()}
  return tuple(map(_tuples, x)) if isinstance(x, list) else x


def _mesh(cfg):
  """The run's mesh, or, where these devices do not make it up, plain data parallelism."""
  section = config.build(meshes.MeshConfig, cfg.get("mesh"), "mesh")
  try:
    return meshes.make_mesh(section)
  except ValueError as e:
    warnings.warn(
      f"the run's mesh does not fit {jax.device_count()} devices ({e}); rows are spread instead", stacklevel=3
    )
    return meshes.make_mesh(meshes.MeshConfig())


def load_network(workdir, name: str) -> tuple[Any, dict]:
  """A network beside a run's model, and its newest verified parameters; nothing else is read.

  Raises:
    FileNotFoundError: no config.json. RestoreError: no checkpoint verifies. ConfigError: no such network.
  """
  path = pathlib.Path(workdir)
  if not (path / "config.json").is_file():
    raise FileNotFoundError(f"{path}/config.json does not exist: is {path} the --workdir of a training run?")
  cfg = ml_collections.ConfigDict(_tuples(json.loads((path / "config.json").read_text())))
  mesh = _mesh(cfg)
  nets = system.build(cfg, workdir=str(path), mesh=mesh).nets
  if name not in nets:
    raise config.ConfigError(
      "the run has no such network", key="trees", value=name, fix=f"one of {', '.join(nets) or '(none)'}"
    )
  with rules.use_mesh(mesh):
    return nets[name], _network(path, name, nets[name], mesh)


def _network(path, name: str, net, mesh, step: int | None = None) -> dict:
  """The parameters of a network beside a run's model."""
  prefix = f"trees/{name}/"
  shapes = {prefix + k: v for k, v in states.param_paths(net.abstract_params()).items()}
  places = rules.sharding_tree(mesh, net.logical_axes(), net.abstract_params())
  where = {prefix + k: v for k, v in states.param_paths(places).items()}
  values, _, _ = initialisation.open_folder(str(path)).read(step, lambda leaf, _: where.get(leaf))
  missing = [n for n in shapes if n not in values or values[n].shape != shapes[n].shape]
  if missing:
    raise config.ConfigError(
      f"the checkpoint does not hold the network: {missing[0]} and {len(missing) - 1} more are missing or of "
      "another shape", key=f"trees.{name}", fix="use the config of the run itself",
    )  # fmt: skip
  return jax.tree.unflatten(jax.tree.structure(net.abstract_params()), [values[n] for n in shapes])


def _trees(cfg, path, step, mesh, shapes, axes):
  """The parameters to evaluate: the average where one is kept, and schedule-free's from its state."""
  ema = bool(cfg.train.get("ema"))
  names = ["model", "ema"] if ema else ["model"]
  ocfg = config.build(optim.OptimConfig, cfg.optim, "optim")
  averaged = ocfg.name == "schedule_free" and not ema
  txs = {}
  if averaged:
    txs = {"model": optim.build(ocfg, shapes, axes, int(cfg.train.get("steps", 1)))[0]}
  abstract = states.abstract(lambda: states.create({n: _zeros(shapes) for n in names}, txs))
  placed = {"model": rules.sharding_tree(mesh, axes, shapes)}
  where = states.param_paths(states.shardings(abstract, placed, mesh))
  want = states.param_paths(abstract)
  needed = ("trees/ema/",) if ema else ("trees/model/", "opt/model/")
  reads = {n: s for n, s in where.items() if n.startswith(needed)}
  values, step, _ = initialisation.open_folder(str(path)).read(step, lambda name, _: reads.get(name))
  missing = [n for n in reads if n not in values or values[n].shape != want[n].shape]
  if missing:
    raise config.ConfigError(
      f"the checkpoint of step {step} does not hold the parameters of this config: {missing[0]} and "
      f"{len(missing) - 1} more are missing or of another shape", key="model",
      fix="use the config of the run itself",
    )  # fmt: skip
  # An imported folder keeps the dtypes of its checkpoint, the config says those of this model.
  cast = {n for n in reads if values[n].dtype != want[n].dtype}
  for n in cast:
    values[n] = jax.jit(lambda x, d=want[n].dtype: x.astype(d), out_shardings=reads[n])(values[n])
  state = jax.tree.unflatten(jax.tree.structure(abstract), [values.get(n) for n in want])
  model = state.trees["ema" if ema else "model"]
  return {"model": optim.eval_params(state.opt["model"], model) if averaged else model}, step


def _zeros(shapes):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


# -- samplers of a system ---------------------------------------------------------------------------

_SAMPLERS: dict[tuple, tuple] = {}  # of the last systems seen: compiling is most of a short sampling's time


def sampler_of(parts, step: int, section=None) -> Sampler:
  """The sampler of a system at a training step; the same one as long as the block size stays.

  Args:
    section: SamplerConfig; default: the config's `sampler` section.
  """
  cfg = config.build(SamplerConfig, parts.cfg.get("sampler") if section is None else section, "sampler")
  _, block = at_step(parts.objective, step, 0)
  key = id(parts), block, cfg
  if key not in _SAMPLERS:
    while len(_SAMPLERS) >= 8:
      _SAMPLERS.pop(next(iter(_SAMPLERS)))
    # A latent's codes are no ids of the data's vocabulary: its specials mean nothing there.
    meta = {} if parts.latent is not None else _meta(parts.data.meta.specials)
    nets = system.networks(parts.cfg, parts.exact)
    options = dict(latent=parts.latent, meta=meta, step=step, load=_drafting, nets=nets)
    made = build(cfg, parts.objective, parts.exact, **options)
    _SAMPLERS[key] = (parts, made)  # holding the system keeps its id from being used again
  return _SAMPLERS[key][1]


def _drafting(workdir: str, tree: str = "") -> tuple[Any, Any]:
  """A run that helps another one: its plain sampler and its parameters, or a network beside its model
  (`trees.<tree>`) and that one's parameters."""
  if tree:
    return load_network(workdir, tree)
  run = load_run(workdir)
  return sampler_of(run.parts, run.step, {}), parameters(run.parts, run.trees)


def _meta(specials) -> dict:
  """Where a row ends, and the ids that no text contains."""
  eos = specials.get("eos", -1)
  never = (specials.get(name, -1) for name in ("bos", "pad", "mask"))
  return {"eos": eos, "forbid": tuple(i for i in never if i >= 0 and i != eos)}


def chat_ids(
  parts, talks: Sequence[Sequence[dict]], template: str = "", carried: str = ""
) -> tuple[list[list[int]], int]:
  """Ids of conversations up to an answer, rendered as the run's data, and the id that ends an answer.

  Args:
    talks: turns {"role", "content"} of each.
    template: as of `genmodels prepare --template`; "": that of the data, else of the folder `carried`.

  Raises:
    ConfigError: no tokenizer, no template, or turns that it cannot render.
  """
  tokenizer, found = parts.data.tokenizer, None
  if tokenizer is None:
    raise config.ConfigError("these data have no tokenizer, so there is no chat", key="data", fix="no --chat")
  try:
    if template:
      found = chat.load(template, carried)
    else:
      found = chat.kept(parts.data.folder) or (chat.load(carried, carried) if carried else None)
    if found is None:
      raise config.ConfigError(
        "the run was not trained on conversations, and its tokenizer came without a chat template",
        key="--template", value=template, fix="--template chatml, plain, or a Jinja file",
      )  # fmt: skip
    made = [chat.prompt(found, turns, tokenizer) for turns in talks]
  except (chat.Malformed, DataError) as e:
    raise config.ConfigError(str(e), key="--chat", fix="see docs/sft.md") from None
  return [list(map(int, ids)) for ids, _ in made], made[0][1]


def text_row(
  parts,
  sampler: Sampler,
  prompts: Sequence[str],
  new: int = 0,
  example_ids=None,
  suffix: str = "",
  ids: Sequence[Sequence[int]] | None = None,
) -> Row:
  """Rows from texts: BOS (where the tokenizer has one), the prompt, what is to be generated, and the suffix.

  Args:
    ids: of the prompts, where they are made already (`chat_ids`).

  Raises:
    ConfigError: the data have no tokenizer.
    ValueError: a prompt and a suffix that leave no room.
  """
  tokenizer, meta = parts.data.tokenizer, parts.data.meta
  if tokenizer is None and any((*prompts, suffix)):
    raise config.ConfigError(
      "these data have no tokenizer, so there are no text prompts", key="data", fix="sample without --prompt"
    )
  head = [meta.specials["bos"]] if meta.specials.get("bos", -1) >= 0 else []
  if ids is None:
    ids = [head + (list(map(int, tokenizer.encode(p))) if p else []) for p in prompts]
  length = sampler.cfg.length or meta.seq_len
  if 0 < parts.model.cfg.learned_pos < length:
    raise config.ConfigError(
      f"the model has {parts.model.cfg.learned_pos} learned positions", key="sampler.length", value=length,
      fix=f"at most {parts.model.cfg.learned_pos}",
    )  # fmt: skip
  pad = max(meta.specials.get("pad", 0), 0)
  behind = list(map(int, tokenizer.encode(suffix))) if suffix else []
  new = new or length
  return prompt_row(ids, length, new, suffix=behind, example_ids=example_ids, pad=pad, axes=meta.axes)


def image_row(parts, labels, example_ids=None) -> Row:
  """Empty images of classes `labels` int[B], from the objective's own `blank`."""
  return parts.objective.blank(np.asarray(labels, np.int32), parts.latent, example_ids)


def draws_images(parts) -> bool:
  """The objective makes rows of its own: images."""
  return hasattr(parts.objective, "blank")


def decode(parts, row: Row, result: Result) -> list:
  """Per row: the text behind the prompt, a suffix included, or the image uint8[H, W]."""
  if draws_images(parts):
    row = jax.tree.map(np.asarray, row).replace(tokens=np.asarray(result.tokens))
    return list(np.asarray(parts.objective.images(jax.tree.map(jnp.asarray, row), parts.latent))[:, 0])
  tokens, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
  given = np.cumprod(np.asarray(row.role) == 0, 1).sum(1)
  if parts.data.tokenizer is None:
    return [" ".join(map(str, t[g:n])) for t, g, n in zip(tokens, given, lengths)]
  return [parts.data.tokenizer.decode(t[g:n]) for t, g, n in zip(tokens, given, lengths)]


def save(parts, items: Sequence, path: pathlib.Path) -> pathlib.Path:
  """Writes samples beside `path`: a PNG grid of images, or a text file. Returns the file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if draws_images(parts):
    from genmodels.latents import png

    path = path.with_suffix(".png")
    png.save_grid(path, np.stack(items), parts.latent.levels)
    return path
  path = path.with_suffix(".txt")
  path.write_text("".join(f"=== {i}\n{text}\n" for i, text in enumerate(items)), encoding="utf-8")
  return path


def during_training(cfg, parts, trees, folder: pathlib.Path, step: int, n: int) -> pathlib.Path | None:
  """`n` samples of the parameters at a step, written to `folder`: text without a prompt, or one image per
  class in turn. The same keys at every step, so that samples of a run can be compared.

  Returns:
    The file, on process 0; None elsewhere.
  """
  sampler = sampler_of(parts, step)
  if draws_images(parts):
    row = image_row(parts, np.arange(n) % parts.objective.classes)
  else:
    row = text_row(parts, sampler, [""] * n)
  result = sampler(parameters(parts, trees), row, jax.random.key(int(cfg.seed)))
  items = decode(parts, row, result)
  return save(parts, items, pathlib.Path(folder) / f"step-{step:07d}") if jax.process_index() == 0 else None
