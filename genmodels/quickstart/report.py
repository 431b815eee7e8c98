"""The report of a quickstart: summary.json as one HTML file that needs nothing else.

Figures are inline SVG, styles are inline, there is no script and no external resource, so the page can be
mailed, archived, and read on a phone.
"""

from __future__ import annotations

import html
import io
import json
import math
import pathlib
import re
from collections.abc import Sequence

from genmodels import metrics
from genmodels.quickstart import recipes

COLOURS = {"ar": "#2b6cb0", "convert": "#d2691e", "scratch": "#64748b"}
# Early → late; every shade is legible under black text.
RAMP = ("#fff3b0", "#c9e7a9", "#8fd3b6", "#7fbcd9", "#a3a7e0", "#cfa3d8")

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fbfaf8; color: #1c1f23;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 2.2rem 1.1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; font-weight: 600; }
p { margin: .5rem 0; }
.lead { font-size: 1.05rem; color: #3a4048; }
.small, figcaption, .legend { font-size: .85rem; color: #5a626c; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .42rem .55rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; font-size: .8rem; color: #5a626c; border-bottom: 1.5px solid #c9cdd3; }
td { border-bottom: 1px solid #e7e5e1; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 8.5rem; }
@media (min-width: 44rem) { td:first-child { white-space: nowrap; } }
.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .45em; }
.sample { background: #fff; border: 1px solid #e7e5e1; border-radius: 6px; padding: .6rem .75rem;
  margin: .5rem 0; font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.sample b { font-weight: 700; color: #111; }
.bar { display: inline-block; width: 9rem; height: .7rem; border-radius: 3px; vertical-align: middle;
  margin: 0 .4rem; }
details { border-top: 1px solid #e7e5e1; padding: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre.config { font: .78rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-x: auto; background: #fff; border: 1px solid #e7e5e1; border-radius: 6px; padding: .7rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem;
  margin: .5rem 0; }
dt { color: #5a626c; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def write(summary: dict, root: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the report.

  Args:
    summary: as `run.quickstart` returns it.
    root: the quickstart's workdir, for the metrics and resolved configs of its runs.
    path: the HTML file.
  """
  path.write_text(page(summary, curves(root), _configs(root, summary)), encoding="utf-8")


def page(summary: dict, loss: dict[str, list[dict]], configs: dict[str, str]) -> str:
  """The report as HTML.

  Args:
    loss: {run: records of its metrics.jsonl}.
    configs: {run: text of its resolved config}.
  """
  runs = summary["runs"]
  parts = [
    "<!doctype html><html lang=en><head><meta charset=utf-8>",
    '<meta name=viewport content="width=device-width, initial-scale=1">',
    f"<title>genmodels quickstart</title><style>{STYLE}{_ramp_css()}</style></head><body><main>",
    "<h1>From next token to block diffusion</h1>",
    f"<p class=lead>{_lead(summary)}</p>",
    "<h2>Held-out bits per byte</h2>",
    f"<div class=scroll>{_table(summary)}</div>",
    f"<p class=small>{_table_note(summary)}</p>",
    f"<figure>{figure(summary, loss)}<figcaption>{_caption(summary)}</figcaption></figure>",
    "<h2>Samples</h2>",
    _samples(summary),
    "<h2>Runs</h2>",
    f"<p>{_setting(summary)}</p>",
    *(
      f"<details><summary>{html.escape(recipes.TITLES[part])} · {runs[part]['steps']} steps</summary>"
      f"<pre class=config>{html.escape(text)}</pre></details>"
      for part, text in configs.items()
    ),
    "<h2>Machine</h2>",
    _machine(summary["measured"]),
    "</main></body></html>\n",
  ]
  return "\n".join(parts)


# --------------------------------------------------------------------------------------------- text


def _lead(summary: dict) -> str:
  bound = {r["name"]: r["bits_per_byte"] for r in summary["results"]}
  ar, convert = summary["runs"]["ar"], summary["runs"]["convert"]
  share = convert["flops"] / (ar["flops"] + convert["flops"])
  join = lambda words: ", ".join(words[:-1]) + f" and {words[-1]}"
  blocks = join([str(b) for b in recipes.BLOCKS])
  found = join([f"{bound[f'b{b}']:.2f}" for b in recipes.BLOCKS])
  verdict = "less than" if summary["converted_beats_scratch"] else "not all less than"
  return (
    f"A small autoregressive model was pretrained for {ar['steps']} steps, then converted to block diffusion "
    f"in {convert['steps']} more ({100 * share:.0f} % of the compute). At blocks of {blocks} tokens it needs "
    f"{found} bits per byte, {verdict} the {bound['scratch']:.2f} of a masked-diffusion model trained from "
    "scratch with the same total FLOPs."
  )


def _setting(summary: dict) -> str:
  train, held, cfg = summary["data"]["train"], summary["data"]["heldout"], summary["configs"]["ar"]
  return (
    f"One trunk of {summary['runs']['ar']['parameters']:,} parameters on {train['tokens']:,} tokens "
    f"({train['source_bytes'] / 1e6:.1f} MB, {train['documents']} files) of the Python standard library; "
    f"{held['documents']} files are held out. Vocabulary {train['vocab_size']}, rows of "
    f"{cfg['data']['seq_len']} tokens, batch {cfg['batch_size']}."
  )


def _table(summary: dict) -> str:
  clock = summary["measured"]
  cpu = {
    "ar": clock["cpu_seconds"]["ar"],
    "convert": clock["cpu_seconds"]["ar"] + clock["cpu_seconds"]["convert"],
    "scratch": clock["cpu_seconds"]["scratch"],
  }
  head = ("model", "bits per byte", "± s.e.", "tokens", "TFLOPs", "seconds", "CPU s")
  lines = ["<table><thead><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr></thead><tbody>"]
  for r in summary["results"]:
    stderr = r["stderr"] * r["tokens"] / r["bytes"]
    cells = (
      f"<span class=dot style='background:{COLOURS[r['run']]}'></span>{html.escape(r['title'])}",
      ("" if r["exact"] else "≤ ") + f"{r['bits_per_byte']:.3f}",
      f"{stderr:.3f}",
      f"{r['train']['tokens']:,}",
      f"{r['train']['flops'] / 1e12:.2f}",
      f"{clock['training_seconds'][r['name']]:.0f}",
      f"{cpu[r['run']]:.0f}",
    )
    lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
  return "".join(lines) + "</tbody></table>"


def _table_note(summary: dict) -> str:
  first = summary["results"][0]
  draws = next(r["draws"] for r in summary["results"] if not r["exact"])
  return (
    f"On {first['documents']} pieces of held-out files ({first['bytes']:,} bytes), the same for every model. "
    "The autoregressive likelihood is exact; for diffusion it is a bound (≤), estimated with exact counts of "
    f"masked tokens in {draws} stratified draws a piece. Tokens, FLOPs and seconds are those of training, "
    "pretraining included; FLOPs count weights, allowed attention pairs and read positions."
  )


def _caption(summary: dict) -> str:
  return (
    "Training loss in bits per byte (thin: every step, bold: running mean) against counted compute; dots "
    "are the held-out values of the table. The conversion starts where pretraining ends; its loss is the "
    "bound at the block size of the step, which the curriculum raises at the ticks."
  )


def _samples(summary: dict) -> str:
  titles = {r["name"]: (r["title"], r["run"]) for r in summary["results"]}
  bar = f"<span class=bar style='background:linear-gradient(90deg,{', '.join(RAMP)})'></span>"
  parts = [
    "<p class=small>The prompt in bold, then what the model wrote. Colour is the step at which a token was "
    f"committed: <span class=legend>first{bar}last</span>. Where colours do not run from left to right, a "
    "later token came first; tokens of one colour side by side came together.</p>"
  ]
  for name, drawn in summary["samples"]["models"].items():
    title, part = titles[name]
    parts.append(
      f"<h3><span class=dot style='background:{COLOURS[part]}'></span>{html.escape(title)} "
      f"<span class=small>· {tokens_per_step(drawn):.2f} tokens a step</span></h3>"
    )
    parts += [_sample(row) for row in drawn["rows"]]
  return "\n".join(parts)


def tokens_per_step(drawn: dict) -> float:
  """Generated tokens over steps that committed any, over all rows."""
  steps = [[s for s in row["step"] if s >= 0] for row in drawn["rows"]]
  return sum(map(len, steps)) / max(sum(len(set(s)) for s in steps), 1)


def _sample(row: dict) -> str:
  """One generation: tokens of equal colour share a span."""
  last = max([s for s in row["step"] if s >= 0], default=0)
  first = min([s for s in row["step"] if s >= 0], default=0)
  shade = [-1 if s < 0 else shade_of(s - first, last - first) for s in row["step"]]
  out, i = [], 0
  while i < len(shade):
    j = i
    while j < len(shade) and shade[j] == shade[i]:
      j += 1
    text = html.escape("".join(row["text"][i:j]))
    out.append(f"<b>{text}</b>" if shade[i] < 0 else f"<span class=k{shade[i]}>{text}</span>")
    i = j
  return f"<div class=sample>{''.join(out)}</div>"


SHADES = 24


def shade_of(step: int, last: int) -> int:
  """Shade 0 … SHADES − 1 of a step in 0 … last."""
  return min(step * SHADES // (last + 1), SHADES - 1)


def _ramp_css() -> str:
  return "".join(f".k{i}{{background:{mix(RAMP, i / (SHADES - 1))}}}" for i in range(SHADES))


def mix(ramp: Sequence[str], x: float) -> str:
  """The colour at x in [0, 1] of a ramp of "#rrggbb"."""
  at = x * (len(ramp) - 1)
  i = min(int(at), len(ramp) - 2)
  a, b = (tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in ramp[i : i + 2])
  return "#" + "".join(f"{round(p + (q - p) * (at - i)):02x}" for p, q in zip(a, b))


def _machine(measured: dict) -> str:
  m = measured["machine"]
  total, cpu = (metrics.duration(sum(measured[k].values())) for k in ("seconds", "cpu_seconds"))
  rows = {
    "hardware": f"{m['cpu']}, {m['cores']} cores; jax devices: {m['devices']}",
    "system": f"{m['system']}, Python {m['python']}",
    "versions": ", ".join(f"{k} {v}" for k, v in m["versions"].items()),
    "genmodels": m["genmodels"] + (f", commit {m['commit']}" if m["commit"] else ""),
    "time": f"{total} in all, {cpu} of CPU; {m['date']}",
    "by stage": ", ".join(f"{k} {v:.0f} s" for k, v in measured["seconds"].items()),
  }
  return "<dl>" + "".join(f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items()) + "</dl>"


# ------------------------------------------------------------------------------------------- figure


def curves(root: pathlib.Path) -> dict[str, list[dict]]:
  """{run: records of its metrics.jsonl}."""
  out = {}
  for part in recipes.PARTS:
    text = (root / part / "metrics.jsonl").read_text(encoding="utf-8")
    out[part] = [json.loads(line) for line in text.splitlines()]
  return out


def plot(summary: dict, loss: dict[str, list[dict]]):
  """The matplotlib figure of losses and held-out values against compute."""
  from matplotlib.figure import Figure  # no pyplot: no global state, no display

  runs, data = summary["runs"], summary["data"]["train"]
  per_byte = data["tokens"] / data["source_bytes"] / math.log(2)
  fig = Figure(figsize=(6.0, 4.2), layout="constrained")
  ax = fig.add_subplot()
  names = {"ar": "autoregressive", "convert": "converted", "scratch": "from scratch"}
  start = {"ar": 0.0, "convert": runs["ar"]["flops"], "scratch": 0.0}
  keys = {"ar": "loss/text", "convert": "loss/diffusion", "scratch": "loss/diffusion"}
  low = min(r["bits_per_byte"] for r in summary["results"])
  top = low
  for part in recipes.PARTS:
    records = [r for r in loss[part] if keys[part] in r]
    x = [(start[part] + runs[part]["flops"] * r["step"] / runs[part]["steps"]) / 1e12 for r in records]
    y = [float(r[keys[part]]) * per_byte for r in records]
    smooth = running_mean(y, 0.85)
    low, top = min([low, *smooth[3:]]), max([top, *smooth[3 : 3 + len(smooth) // 8]])
    ax.plot(x, y, color=COLOURS[part], lw=0.7, alpha=0.3)
    ax.plot(x, smooth, color=COLOURS[part], lw=2, label=names[part])
  for r in summary["results"]:
    at = r["train"]["flops"] / 1e12
    ax.plot([at], [r["bits_per_byte"]], "o", ms=6, color=COLOURS[r["run"]], mec="white", mew=1, zorder=5)
  at = max(r["train"]["flops"] for r in summary["results"]) / 1e12
  span = top - low
  ax.set_xlim(0, at * 1.2)
  ax.set_ylim(low - 0.14 * span, top + 0.05 * span)
  ends = sorted((r for r in summary["results"] if r["run"] != "ar"), key=lambda r: r["bits_per_byte"])
  heights = spread([r["bits_per_byte"] for r in ends], 0.045 * 1.19 * span)
  found = [(r, y) for r, y in zip(ends, heights)]
  found += [(r, r["bits_per_byte"]) for r in summary["results"] if r["run"] == "ar"]
  for r, y in found:
    text = f"{r['bits_per_byte']:.2f}" + (f"  B={r['block']}" if r["block"] else "")
    x = r["train"]["flops"] / 1e12 + 0.015 * at
    ax.text(x, y, text, va="center", fontsize=8.5, color=COLOURS[r["run"]])
  size = summary["configs"]["convert"]["objective"]["corruption"]["blocks"]["size"]
  for b, s in zip(size["values"], size["at"]):
    x = (start["convert"] + runs["convert"]["flops"] * s / runs["convert"]["steps"]) / 1e12
    ax.plot([x, x], [0, 0.018], transform=ax.get_xaxis_transform(), color=COLOURS["convert"], lw=1)
    style = {"ha": "center", "fontsize": 7.5, "color": COLOURS["convert"]}
    ax.text(x, 0.025, f"{b}", transform=ax.get_xaxis_transform(), **style)
  ax.set_xlabel("training compute, counted TFLOPs (pretraining included)")
  ax.set_ylabel("bits per byte")
  ax.spines[["top", "right"]].set_visible(False)
  ax.grid(axis="y", color="#e7e5e1", lw=0.8)
  ax.set_axisbelow(True)
  ax.legend(frameon=False, loc="upper right")
  return fig


def spread(values: Sequence[float], gap: float) -> list[float]:
  """Rising values moved apart so that neighbours are at least `gap` apart, around where they were."""
  out = list(values)
  for _ in range(100):
    for i in range(len(out) - 1):
      if (short := gap - (out[i + 1] - out[i])) > 1e-9:
        out[i], out[i + 1] = out[i] - short / 2, out[i + 1] + short / 2
  return out


def running_mean(y: Sequence[float], keep: float) -> list[float]:
  """Exponential mean without start-up bias."""
  out, total, weight = [], 0.0, 0.0
  for v in y:
    total, weight = keep * total + (1 - keep) * v, keep * weight + (1 - keep)
    out.append(total / weight)
  return out


def figure(summary: dict, loss: dict[str, list[dict]]) -> str:
  """The figure as inline SVG: the same bytes for the same numbers."""
  import matplotlib

  with matplotlib.rc_context({"svg.hashsalt": "genmodels", "svg.fonttype": "path", "font.size": 10}):
    out = io.StringIO()
    plot(summary, loss).savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
  svg = out.getvalue()
  svg = svg[svg.index("<svg") :]
  # Without its fixed size the drawing takes the width of the page.
  for size in ("width", "height"):
    svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
  return svg


def _configs(root: pathlib.Path, summary: dict) -> dict[str, str]:
  """{run: its config as resolved, every default written out}."""
  out = {}
  for part in recipes.PARTS:
    whole = json.loads((root / part / "config.json").read_text())
    whole |= json.loads((root / part / "resolved.json").read_text())
    out[part] = json.dumps(whole, indent=2, ensure_ascii=False)
  return out
