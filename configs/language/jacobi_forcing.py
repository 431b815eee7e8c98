"""Jacobi Forcing: an autoregressive model learns to decode behind text that is itself still being iterated.

  genmodels train --config configs/language/ar.py:tiny --workdir runs/ar train.steps=600
  genmodels collect --workdir runs/ar --out data/jacobi --span 8
  genmodels train --config configs/language/jacobi_forcing.py:tiny --workdir runs/jacobi_forcing \\
    data.path=data/jacobi init.kind=workdir init.path=runs/ar

As language/cllm, with spans of 32 tokens in windows of 16: the share of wrong tokens rises from 0 to 1 along
a window, and a noisy span sees the noisy ones before it in its window and the clean text before the window.
Ten times the next-token loss on the fixed points. Shape of Qwen2.5-Coder-7B; 1e-5 falling as a cosine is
unverified (the published script has 1e-6), and so is the window in the mask: in the published batched trainer
noisy spans see every noisy one from the prompt on (here: a window as long as the answers), and its mean over
tokens is divided once more by the number of spans in the batch. `:tiny` has windows of 4 spans of 8 tokens.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/jacobi_forcing",
    title="Fast and Accurate Causal Parallel Decoding using Jacobi Forcing",
    arxiv="2512.14681",
    row=156,
    tests=(
      "tests/objectives/test_consistency.py::test_windows_see_their_own_noise_and_clean_text_before",
      "tests/objectives/test_consistency.py::test_clean_stream_is_a_causal_model",
      "tests/objectives/test_consistency.py::test_wrong_shares_rise_along_a_window",
      "tests/objectives/test_consistency.py::test_loss_of_two_streams_equals_separate_forwards",
    ),
    model=sections.qwen2(3584, 28, 28, 4, 18944, remat={"preset": "full"})
    | {"heads": {"text": {"forbid": ()}}},
    objective=sections.consistency(32, window=16),
    data=sections.packed_text(2048),
    optim=sections.adamw(1e-5, warmup=300, kind="cosine", b2=0.95),
    train={"steps": 10_000},
    sampler={"temperature": 0.0, "draft": {"kind": "jacobi", "size": 31}},
  )
  cfg.batch_size = 32
  if variant == "tiny":
    # The trunk of language/ar:tiny, which it starts from: no biases, another RoPE base.
    del cfg.model["bias"], cfg.model["rope"]
    sections.tiny_text(cfg)
    cfg.data = sections.packed_text(64)
    cfg.objective.corruption.update(span=8)
    cfg.objective.corruption.blocks.size = 32
    cfg.optim.update(lr=1e-3)
    cfg.sampler.draft.size = 7
  return cfg
