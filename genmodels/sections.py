"""Ready-made config sections that system files share: trunks, optimisers, data, objectives.

A system file states what its paper states; what many of them share stands here once. Plain values only.
"""

from __future__ import annotations

import ml_collections


def system(
  name: str, *, title: str, arxiv: str, row: int, tests: tuple[str, ...], **sections
) -> ml_collections.ConfigDict:
  """A whole system file's config.

  Args:
    name: "<group>/<file>".
    title, arxiv, row: the paper, and its row in the triage of published systems (−1: none).
    tests: pytest node ids that pin the system.
    sections: model, objective, data, optim, train, …
  """
  cfg = ml_collections.ConfigDict(
    {
      "name": name,
      "paper": {"title": title, "arxiv": arxiv, "row": row},
      "tests": tuple(tests),
      "seed": 0,
      "batch_size": 8,
      "data": {},
      "optim": {},
      "train": {},
      "eval": {},
      "sampler": {},
      "mesh": {},
      "checkpoint": {},
      "init": {},
    },
    convert_dict=True,
  )
  cfg.update(ml_collections.ConfigDict(sections))
  return cfg


def sampler(
  name: str, *, title: str, arxiv: str, row: int, tests: tuple[str, ...], **sections
) -> ml_collections.ConfigDict:
  """A sampler file: its paper, its tests, and the sections that decoding changes (sampler, model)."""
  paper = {"title": title, "arxiv": arxiv, "row": row}
  return ml_collections.ConfigDict(
    {"name": name, "paper": paper, "tests": tuple(tests), **sections}, convert_dict=True
  )


def llama(width: int, layers: int, heads: int, mlp: int, *, kv_heads: int | None = None, **kw) -> dict:
  """A Llama-class trunk: RMS norm, RoPE, SwiGLU, no biases; bf16 compute over fp32 masters."""
  return {
    "width": width,
    "layers": layers,
    "num_heads": heads,
    "num_kv_heads": kv_heads or heads,
    "mlp": mlp,
    "vocab_multiple": 128,
    "dtype": "bfloat16",
    "remat": {"preset": "attn_out"},
    **kw,
  }


def qwen3(width: int, layers: int, heads: int, kv_heads: int, mlp: int, **kw) -> dict:
  """A Qwen3-class trunk: as Llama, with normalised queries and keys and 128-wide heads."""
  rope = {"base": 1e6}
  return llama(width, layers, heads, mlp, kv_heads=kv_heads, head_dim=128, qk_norm="rms", rope=rope, **kw)


def qwen2(width: int, layers: int, heads: int, kv_heads: int, mlp: int, **kw) -> dict:
  """A Qwen2 or 2.5 class trunk: as Llama, with biases on queries, keys and values."""
  bias = ("q", "k", "v")
  return llama(width, layers, heads, mlp, kv_heads=kv_heads, bias=bias, rope={"base": 1e6}, **kw)


def masked_diffusion(weight: str, **schedule) -> dict:
  """Full-attention masked diffusion: every token of a document is masked with one probability.

  Args:
    weight: of a masked token's cross-entropy.
    schedule: of the corruption: `schedule`, `eps`, `time`.
  """
  return {
    "kind": "tokens",
    "corruption": {"kind": "absorb", "unit": "doc", "count": "bernoulli", **schedule},
    "layout": {"kind": "streams", "streams": ("n",)},
    "masks": {"full": "full"},
    "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": weight}},
  }


def mdlm() -> dict:
  """MDLM's objective: log-linear noise and the weights of the bound."""
  return masked_diffusion("nelbo", schedule="loglinear", eps=1e-3)


def llada() -> dict:
  """LLaDA's objective: t uniform, masking probability at least eps, weights 1/p."""
  return masked_diffusion("inverse_marginal", schedule="floor", eps=1e-3, time="uniform")


def adapted_ar(**schedule) -> dict:
  """Full-attention masked diffusion that keeps an AR head's shift: 1/p weights, averaged over masked tokens.

  Args:
    schedule: of the corruption, `schedule` and `eps`.
  """
  objective = masked_diffusion("inverse_marginal", time="uniform", **schedule)
  objective["terms"]["diffusion"] |= {"align": "shift", "normaliser": "masked"}
  return objective


def consistency(span: int, window: int = 1) -> dict:
  """States of Jacobi trajectories (`genmodels collect`) pulled to their fixed points, beside ten times the
  next-token loss: CLLM, and, with windows of several spans, Jacobi Forcing."""
  forced = window > 1
  return {
    "kind": "consistency",
    "corruption": {
      "kind": "jacobi_state",
      "span": span,
      "law": "progressive" if forced else "uniform",
      "blocks": {"size": span * window, "anchor": "response"},
    },
    "layout": {"kind": "streams", "streams": ("n", "c"), "copy": "text"},
    "masks": {"full": {"n>n": "BLK_EQ&POS_LE", "n>c": "BLK_LT", "c>c": "POS_LE"}},
    "likelihood": "ar",
    "since": "slot" if forced else "token",
    "mean": "tokens" if forced else "spans",
    "terms": {
      "ar": {"stream": "c", "align": "shift", "scale": 10.0},
      "consistency": {"stream": "n", "align": "shift" if forced else "shift_clean_boundary"},
    },
  }


def adamw(lr: float, *, warmup: int, kind: str = "constant", weight_decay: float = 0.0, **kw) -> dict:
  """AdamW with clipping at 1.0 and a schedule of the given kind."""
  return {
    "name": "adamw",
    "lr": lr,
    "weight_decay": weight_decay,
    "schedule": {"kind": kind, "warmup": warmup},
    **kw,
  }


def packed_text(seq_len: int, **kw) -> dict:
  """Shards of `genmodels prepare`, packed; `data.path=<folder>` names them."""
  return {"kind": "text", "path": "", "seq_len": seq_len, **kw}


def sft(cfg: ml_collections.ConfigDict, tiny: bool, **chat) -> ml_collections.ConfigDict:
  """A system's variant for conversations (`genmodels prepare --messages`), or its tiny one, on questions
  about the Python standard library.

  Args:
    chat: fields of data.chat.Encoder for the tiny one's documents.
  """
  if tiny:
    tiny_text(cfg)
    chat = {"max_length": 192} | chat
    cfg.data = {"kind": "python", "content": "documentation", "chat": chat, "seq_len": 256}
    cfg.train.steps = 80
  return cfg


def tiny_text(cfg: ml_collections.ConfigDict, steps: int = 60) -> ml_collections.ConfigDict:
  """The `:tiny` variant of a text system: 2 layers of width 64 on bytes of the Python standard library."""
  cfg.model.update(
    width=64, layers=2, num_heads=4, num_kv_heads=2, mlp=128, dtype="float32", vocab_multiple=8
  )
  cfg.model.head_dim = 16
  cfg.model.remat = {"preset": "none"}
  cfg.data = {"kind": "python", "seq_len": 64, "documents": 200}
  cfg.optim.update(lr=3e-3, schedule={"kind": "cosine", "warmup": 5})
  cfg.train.update(steps=steps, log_every=10, save_every=30)
  cfg.eval.update(every=30, documents=32, draws=8)
  cfg.batch_size = 8
  return cfg
