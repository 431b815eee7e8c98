"""Tables and figures of a conversion study: Markdown, and PNG beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

TITLES = {
  "ar": "AR model",
  "nbdiff": "NBDiff",
  "bd3lm": "BD3-LM",
  "sdar": "SDAR",
  "fast_dllm_v2": "Fast-dLLM v2",
  "efficient_dlm": "Efficient-DLM",
  "wedlm": "WeDLM",
  "tidar": "TiDAR",
  "dream": "Dream",
  "diffullama": "DiffuLLaMA",
  "llada": "LLaDA objective",
  "scratch": "MDLM from scratch",
  "scratch_all": "MDLM from scratch, all tokens",
}


def write(summary: Mapping, root: pathlib.Path) -> None:
  """report.md and its figures in `root`."""
  _likelihood_figure(summary, root / "study_likelihood.png")
  _curve_figure(summary, root / "study_curves.png")
  (root / "report.md").write_text(page(summary), encoding="utf-8")


def page(summary: Mapping) -> str:
  """The report as Markdown."""
  o, data, runs = summary["options"], summary["data"], summary["runs"]
  train, held = data["train"], data["heldout"]
  sources = ", ".join(f"{n} files of {k}" for k, n in data["sources"].items()) or "as prepared before"
  ar = runs["ar"]
  machine = summary["machine"]
  recipes = [r for r in runs if r not in ("ar", "scratch_all")]
  budget = f"{runs[recipes[0]]['tokens']:,}" if recipes else "no"
  parts = [
    "# From an AR model to diffusion: every recipe on one token budget",
    f"An AR model of {ar['parameters']:,} parameters was trained on {ar['tokens']:,} tokens; each recipe "
    f"then had {budget} tokens more. Text: {sources}; {train['tokens']:,} tokens to train on, "
    f"{held['documents']} documents ({held['tokens']:,} tokens) held out. Vocabulary {train['vocab_size']}, "
    f"block size {o['block']} in training. Diffusion numbers are upper bounds by exact counts; "
    "± is the standard error over documents.",
    "## Held-out bits per byte by block size",
    likelihood_table(summary),
    "![bits per byte by block size](study_likelihood.png)",
    "## Quality against tokens per forward",
    f"{o['prompts']} held-out beginnings continued at temperature 1, nucleus 0.95; the judge is the AR "
    f"model. It finds {summary['curves']['ar']['held_out']:.3f} bits per byte in the true continuations.",
    curve_table(summary),
    "![quality against parallelism](study_curves.png)",
    "## Cost",
    cost_table(summary),
    f"{machine['cpu']}, {machine['cores']} cores, {machine['devices']}; Python {machine['python']}, jax "
    f"{machine['versions']['jax']}; commit {machine['commit'] or 'unknown'}, {machine['date']}.",
  ]
  return "\n\n".join(parts) + "\n"


def _rows(header, rows) -> str:
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  return "\n".join(lines + ["| " + " | ".join(map(str, r)) + " |" for r in rows])


def likelihood_table(summary: Mapping) -> str:
  """Bits per byte of every model: at its block sizes, whole, and of its clean stream read as an AR model."""
  found = summary["likelihood"]
  sizes = sorted({int(b) for x in found.values() for b in x["blocks"] if int(b)})
  number = lambda r: f"{r['bits_per_byte']:.3f} ± {r['stderr'] * r['tokens'] / r['bytes']:.3f}"
  rows = []
  for name, x in found.items():
    exact = x["exact"]
    own = number(x["blocks"]["0"]) if "0" in x["blocks"] else ""
    ar = own if exact else number(x["ar"]) if x["ar"] else ""
    whole = "" if exact else own
    by = [number(x["blocks"][str(b)]) if str(b) in x["blocks"] else "" for b in sizes]
    rows.append([TITLES[name], ar, *by, whole])
  return _rows(["model", "as AR", *(f"B = {b}" for b in sizes), "whole"], rows)


def curve_table(summary: Mapping) -> str:
  """Every point of the curves."""
  rows = []
  for name, x in summary["curves"].items():
    for p in x["points"]:
      rate = "–" if p["tokens_per_second"] is None else f"{p['tokens_per_second']:.0f}"
      rows.append([
        TITLES[name], p["setting"] or "–", f"{p['tokens_per_forward']:.2f}", rate,
        f"{p['bits_per_byte']:.3f} ± {p['stderr']:.3f}", f"{p['entropy']:.2f}", f"{p['repeated']:.1%}",
      ])  # fmt: skip
  header = [
    "model",
    "setting",
    "tokens per forward",
    "tokens/s",
    "judge's bits per byte",
    "token entropy",
    "repeated",
  ]
  return _rows(header, rows)


def cost_table(summary: Mapping) -> str:
  """Tokens and steps of every run, its pace, and compiled temporaries where they were measured."""
  rows, pace = [], summary["pace"]
  temp = summary["memory"]["ar"]["temp_bytes"]
  for name, r in summary["runs"].items():
    took = pace[name]["step_seconds"]
    ratio = took / pace["ar"]["step_seconds"]
    memory = summary["memory"].get(name)
    share = f"{memory['temp_bytes'] / 2**20:.0f} MiB ({memory['temp_bytes'] / temp:.2f}×)" if memory else ""
    rows.append([
      TITLES[name], f"{r['tokens']:,}", r["steps"], f"{took:.3f}", f"{ratio:.2f}×", share,
    ])  # fmt: skip
  return _rows(["run", "tokens", "steps", "seconds a step", "against AR", "temporaries of a step"], rows)


def _likelihood_figure(summary: Mapping, path: pathlib.Path) -> None:
  figure, axes = _figure()
  for name, x in summary["likelihood"].items():
    sizes = sorted(int(b) for b in x["blocks"] if int(b))
    if sizes:
      values = [x["blocks"][str(b)]["bits_per_byte"] for b in sizes]
      axes.plot(sizes, values, marker="o", label=TITLES[name], color=_colour(name))
    else:
      style = "-" if x["exact"] else ":"
      axes.axhline(
        x["blocks"]["0"]["bits_per_byte"], linestyle=style, label=TITLES[name], color=_colour(name)
      )
  axes.set_xscale("log", base=2)
  axes.set_xlabel("block size at evaluation")
  axes.set_ylabel("held-out bits per byte")
  _save(figure, axes, path)


def _curve_figure(summary: Mapping, path: pathlib.Path) -> None:
  figure, axes = _figure()
  for name, x in summary["curves"].items():
    points = sorted(x["points"], key=lambda p: p["tokens_per_forward"])
    axes.errorbar(
      [p["tokens_per_forward"] for p in points], [p["bits_per_byte"] for p in points],
      [p["stderr"] for p in points], marker="o", capsize=2, label=TITLES[name],
      color=_colour(name),
    )  # fmt: skip
  axes.axhline(summary["curves"]["ar"]["held_out"], linestyle=":", color="grey", label="held-out text")
  axes.set_xscale("log", base=2)
  axes.set_xlabel("tokens per forward")
  axes.set_ylabel("bits per byte, judged by the AR model")
  _save(figure, axes, path)


def _figure():
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 5), layout="constrained")
  return figure, figure.subplots()


def _colour(name: str) -> str:
  from matplotlib import colormaps

  return colormaps["tab20"](list(TITLES).index(name))


def _save(figure, axes, path) -> None:
  axes.xaxis.set_major_formatter("{x:g}")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=140)
