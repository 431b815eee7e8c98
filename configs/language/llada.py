"""LLaDA: large-scale masked diffusion, one level per sequence, weight 1/p over all tokens.

  genmodels train --config configs/language/llada.py:tiny --workdir runs/llada

The default variant is the 8B pretraining setting: 4,096 tokens, batch 1,280, AdamW 4e-4 with
warm-up–stable–decay, weight decay 0.1.

`:sft` is the supervised stage: only the answer is masked, and each document's sum is divided by the length of
its answer, the EOS that pad it included, then averaged over documents; 2.5e-5, batch 256, 3 epochs of 4.5M
pairs (unverified). The paper pads to the longest of a mini-batch, which depends on who shares it; here to a
multiple. Attention is full, so a conversation is cut into one document per answer (docs/sft.md):

  genmodels prepare chats.jsonl --messages messages --out data/chat --tokenizer …
    --learn each --block 64 --pad eos
  genmodels train --config configs/language/llada.py:sft_tiny --workdir runs/llada_sft
"""

from genmodels import sections

VARIANTS = ("sft", "tiny", "sft_tiny")


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/llada",
    title="Large Language Diffusion Models",
    arxiv="2502.09992",
    row=-1,
    tests=(
      "tests/objectives/test_text.py::test_mdlm_and_llada_settings",
      "tests/objectives/test_sft.py::test_llada_divides_by_the_answer_with_its_padding",
    ),
    model=sections.llama(4096, 32, 32, 12288, remat={"preset": "full"}),
    objective=sections.llada(),
    data=sections.packed_text(4096),
    optim=sections.adamw(4e-4, warmup=2000, kind="wsd", weight_decay=0.1),
    train={"steps": 440_000},
    sampler={"quota": {"kind": "linear", "steps": 32}, "score": "prob", "sub_block": 32, "temperature": 0.0},
  )
  cfg.batch_size = 1280
  if variant.startswith("sft"):
    cfg.objective.terms.diffusion.normaliser = "answer_len"
    cfg.optim.update(lr=2.5e-5, schedule={"kind": "wsd", "warmup": 50})
    cfg.train.steps = 53_000
    cfg.batch_size = 256
  if variant == "tiny":
    sections.tiny_text(cfg)
  if variant == "sft_tiny":
    sections.sft(cfg, True, learn="each", block=16, pad="eos")
  if variant.endswith("tiny"):
    cfg.sampler.quota.steps = 8
    cfg.sampler.sub_block = 16
  return cfg
