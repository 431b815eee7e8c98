"""Dream-Coder: instruction tuning of Dream on code, the padding of a response masked as one unit.

  genmodels train --config configs/language/dream_coder.py:tiny --workdir runs/dream_coder

The default variant is Qwen2.5-7B shaped: the shifted head of Dream, CART weights (p = 0.1) averaged over
masked tokens, 5e-6, 576 rows of 4000 tokens, 7 epochs (the released run_sft.sh). Documents are questions with
one answer, padded with EOS (`genmodels prepare --messages … --learn each --block 512 --pad eos`). The EOS
that end a document are masked all or none with the probability of one token, and count as one token; the run
is cut to a random length in every draw, so that no length is learnt (docs/sft.md).

The paper's own remedies for padding are random truncation and a penalty in decoding (not done here); the unit
is an option of its released trainer (`treat_eos_as_one`, off in the script). That trainer counts every EOS of
a masked run in sum and normaliser, and cuts or pads all responses of a batch to the length of one of them, a
draw per batch. Number of steps: unverified.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  objective = sections.adapted_ar(schedule="linear")
  objective["corruption"].update(kind="eos_unit_absorb", cut=1.0)
  objective["terms"]["diffusion"].update(weight="cart", cart_p=0.1)
  cfg = sections.system(
    "language/dream_coder",
    title="Dream-Coder 7B: An Open Diffusion Language Model for Code",
    arxiv="2509.01142",
    row=242,
    tests=(
      "tests/corruption/test_eos_unit.py::test_the_run_is_masked_all_or_none_with_the_probability_of_a_token",
      "tests/corruption/test_eos_unit.py::test_the_run_counts_once",
      "tests/corruption/test_eos_unit.py::test_the_run_is_cut_to_a_uniform_length",
    ),
    model=sections.qwen2(3584, 28, 28, 4, 18944, remat={"preset": "full"}),
    objective=objective,
    data=sections.packed_text(4000),
    optim=sections.adamw(5e-6, warmup=100, kind="cosine", weight_decay=0.01),
    train={"steps": 10_000},
    sampler={
      "quota": {"kind": "linear", "steps": 512},
      "score": "neg_entropy",
      "temperature": 0.1,
      "top_p": 0.95,
    },
  )
  cfg.batch_size = 576
  if variant == "tiny":
    sections.sft(cfg, True, learn="each", block=32, pad="eos")
    cfg.sampler.quota.steps = 8
  return cfg
