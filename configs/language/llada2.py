"""LLaDA2: an AR checkpoint into block diffusion by block sizes that warm up, stay and decay.

  genmodels train --config configs/language/llada2.py:tiny --workdir runs/llada2
  genmodels train --config configs/language/llada2.py:moe_tiny --workdir runs/llada2_moe

Blocks of 1, 4, 32 and 64 tokens, then whole documents (4096 tokens) for most of the run, then 2048, 256 and
32: warm-up, stable phase and decay in one traced number, nothing compiles again. One level in [0.3, 0.8] per
document, unweighted cross-entropy averaged over masked tokens, no shift, attention inside documents.

`:stable` is the stable phase as a run of its own (`init` names the run before it): one noisy stream in place
of two, half the slots for the same loss. `:cap` is the stage after it, at 32: two complementary masks over
one clean stream, and the confidence-aware loss, the entropy of predictions that are right, times 2.

The published models are mixtures of experts: `:moe` is the 16B one, a dense layer and 19 with 256 experts of
512 hidden units, of which a token takes 8 from 4 of 8 groups, and one shared; the default variant is a dense
trunk with its attention. The experts' loads are balanced without a loss: after each step an expert's bias
rises by u if it was chosen less often than the mean, and falls by u if more often. That its training does
so, with u = 0.001 as DeepSeek-V3, is unverified; the bias is in its checkpoints (`mlp.gate.expert_bias`),
which `genmodels import` and `export` carry.

From the authors' published code and its pages: band, mask id 156895, learning rate 1e-5, AdamW 0.9/0.999,
weight decay 0.1, λ = 2. Unverified: steps of each block size, batch, the order of the decay.
`init.average` merges checkpoints of the run before (which ones is unverified). Not here: noise on mask
embeddings early in the run (`init.mask_row="mean_noise"` sets the row), preference optimisation.
"""

from genmodels import sections

VARIANTS = ("tiny", "stable", "cap", "moe", "moe_tiny")

BLOCKS = {
  "kind": "steps",
  "values": (1, 4, 32, 64, 0, 2048, 256, 32),
  "at": (0, 1000, 2000, 4000, 8000, 32_000, 34_000, 36_000),
}
TINY_BLOCKS = {"kind": "steps", "values": (1, 4, 8, 0, 8), "at": (0, 8, 16, 24, 48)}
MASKED = {"stream": "n", "on": "hit", "weight": "one"}


def get_config(variant: str = ""):
  experts, variant = variant.startswith("moe"), {"moe": "", "moe_tiny": "tiny"}.get(variant, variant)
  size, pair = {
    "": (BLOCKS, None),
    "stable": (0, None),
    "cap": (32, 2.0),
    "tiny": (TINY_BLOCKS, {"kind": "steps", "values": (0.0, 2.0), "at": (0, 48)}),
  }[variant]
  streams = ("n", "n1", "c") if pair else ("n",) if variant == "stable" else ("n", "c")
  cfg = sections.system(
    "language/llada2",
    title="LLaDA2.0: Scaling Up Diffusion Language Models to 100B",
    arxiv="2512.15745",
    row=-1,
    tests=(
      "tests/objectives/test_llada2.py::test_blocks_warm_up_stay_and_decay",
      "tests/objectives/test_llada2.py::test_confidence_loss_by_hand",
      "tests/objectives/test_llada2.py::test_whole_documents_need_no_second_stream",
      "tests/objectives/test_llada2.py::test_the_experts_bias_is_all_that_balances",
      "tests/objectives/test_router.py::test_the_bias_balances_without_a_loss",
    ),
    model=sections.llama(
      2048, 20, 16, 5120, kv_heads=4, head_dim=128, qk_norm="rms",
      rope={"base": 6e5, "axes": (64,)}, eps=1e-6, remat={"preset": "full"},
    ),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "absorb",
        "unit": "doc",
        "count": "bernoulli",
        "time": "uniform",
        "band": (0.3, 0.8),
        "blocks": {"size": size},
        "complement": pair is not None,
      },
      "layout": {"kind": "streams", "streams": streams},
      "masks": {"full": "full" if variant == "stable" else "bd3"},
      "likelihood": "a" if pair else "diffusion",
      "terms": _pair(pair) if pair else {"diffusion": {**MASKED, "normaliser": "masked"}},
    },
    data=sections.packed_text(4096),
    optim=sections.adamw(1e-5, warmup=500, kind="wsd", weight_decay=0.1, b2=0.999),
    train={"steps": 40_000},
    sampler={"quota": {"kind": "threshold", "tau": 0.95}, "score": "prob", "temperature": 0.0},
  )  # fmt: skip
  cfg.batch_size = 512
  if variant == "cap":
    cfg.batch_size = 16
    cfg.data.seq_len = 2048
    cfg.train.steps = 2000
    cfg.optim.schedule = {"kind": "cosine", "warmup": 60}
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.rope = {"base": 6e5, "axes": (8,)}
  if experts:
    _mixture(cfg, tiny=variant == "tiny")
  return cfg


def _mixture(cfg, tiny: bool) -> None:
  """A mixture of experts with loss-free balancing in place of the dense trunk."""
  cfg.objective.router = {"bias": 0.001}
  if not tiny:
    cfg.model = {
      "preset": "llada2-mini", "vocab_multiple": 128, "dtype": "bfloat16", "remat": {"preset": "full"},
    }  # fmt: skip
    return
  cfg.objective.router.bias = 0.01
  layers = cfg.model.layers
  del cfg.model["layers"]
  cfg.model.segments = (
    {"pattern": ({},), "repeats": 1},
    {"pattern": ({"mlp": "moe"},), "repeats": layers - 1},
  )
  cfg.model.moe = {
    "experts": 8, "top_k": 2, "mlp": 32, "score": "sigmoid", "normalise": True, "groups": 2, "top_groups": 1,
    "bias": True, "scale": 2.5, "shared": 32,
  }  # fmt: skip


def _pair(scale) -> dict:
  """Terms of complementary masks in two noisy streams, and λ times the entropy of right predictions in both.

  Each token is masked in one of them: the sums over all label tokens are the mean over masked ones.
  """
  terms = {}
  for name, stream in (("a", "n"), ("b", "n1")):
    terms[name] = {**MASKED, "stream": stream, "normaliser": "all_valid"}
    terms[f"confidence_{name}"] = {**terms[name], "measure": "entropy_correct", "scale": scale}
  return terms
