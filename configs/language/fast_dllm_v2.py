"""Fast-dLLM v2: a Qwen2.5 checkpoint into block diffusion with complementary masks, in about a billion
tokens.

  genmodels train --config configs/language/fast_dllm_v2.py:tiny --workdir runs/fast_dllm_v2

The default variant is Qwen2.5-7B shaped: blocks of 32, one level per block, unweighted shifted cross-entropy,
2500 steps of 256 rows of 2048 tokens at 1e-5 (1.5B: 2e-5, 6000 steps). A mask and its inverse are two noisy
streams over one clean stream, 3L slots in place of the 4L of a doubled batch; each token is predicted once
per pair, so the sum of both terms over all label tokens is the paper's mean over masked ones.

The first token of a block is read from the clean stream, as the paper's decoder does; its training code reads
it from the noisy block before (`objective.terms.a.align=shift objective.terms.b.align=shift`).

`:sft` learns the answers of conversations, every sample padded to whole blocks with MASK tokens that nothing
is asked of, as in the paper (docs/sft.md):

  genmodels prepare chats.jsonl --messages messages --out data/chat --tokenizer … --block 32 --anchor document
  genmodels train --config configs/language/fast_dllm_v2.py:sft_tiny --workdir runs/fast_dllm_v2_sft

Only blocks that hold a part of an answer are copied into the noisy streams.
"""

from genmodels import sections

VARIANTS = ("sft", "tiny", "sft_tiny")


def get_config(variant: str = ""):
  term = {"align": "shift_clean_boundary", "on": "hit", "weight": "one", "normaliser": "all_valid"}
  cfg = sections.system(
    "language/fast_dllm_v2",
    title="Fast-dLLM v2: Efficient Block-Diffusion LLM",
    arxiv="2509.26328",
    row=155,
    tests=(
      "tests/objectives/test_conversion.py::test_complementary_pair_predicts_every_token_once",
      "tests/objectives/test_conversion.py::test_two_noisy_streams_are_two_rows",
      "tests/objectives/test_sft.py::test_variants_learn_answers_only",
    ),
    model=sections.qwen2(3584, 28, 28, 4, 18944, remat={"preset": "full"}),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "absorb",
        "unit": "block",
        "blocks": {"size": 32},
        "count": "bernoulli",
        "schedule": "floor",
        "eps": 1e-3,
        "time": "uniform",
        "complement": True,
      },
      "layout": {"kind": "streams", "streams": ("n", "n1", "c")},
      "masks": {"full": "bd3"},
      "likelihood": "a",
      "terms": {"a": {"stream": "n", **term}, "b": {"stream": "n1", **term}},
    },
    data=sections.packed_text(2048),
    optim=sections.adamw(1e-5, warmup=100, kind="cosine"),
    train={"steps": 2500},
    sampler={"quota": {"kind": "threshold", "tau": 0.9}, "score": "prob"},
  )
  cfg.batch_size = 256
  if variant.startswith("sft"):
    cfg.objective.layout.update(copy="blocks", longest_block=32, copy_slots=1024)
  if variant == "tiny":
    sections.tiny_text(cfg)
  if variant == "sft_tiny":
    sections.sft(cfg, True, block=8, anchor="document")
    cfg.objective.layout.update(longest_block=8, copy_slots=192)
  if variant.endswith("tiny"):
    cfg.objective.corruption.blocks.size = 8
  return cfg
