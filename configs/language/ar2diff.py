"""AR2Diff: an AR checkpoint into a denoiser of random tokens behind a bidirectional prefix.

  genmodels train --config configs/language/ar2diff.py:tiny --workdir runs/ar2diff

Details unverified: there is no code. A prefix LM: the prefix is given, sees itself and the target and bears
no loss; a share of the target, uniform in [0, 1], becomes random tokens; the loss is the cross-entropy of
every target token, noised or not, averaged over the noised canvas and a canvas drawn from the model's own
output (SUNDAE). No shift: slot n predicts token n. On plain text the prefix is a random part of a document.

  genmodels import QWEN_OR_LLAMA FOLDER
  genmodels train --config configs/language/ar2diff.py --workdir RUN --from FOLDER

starts from an AR checkpoint (the paper adapts for 0, 10k or 100k steps, then fine-tunes). The paper decodes
in about ten parallel steps that draw all target tokens anew; the sampler here commits a tenth of them each
time. The default variant is a Llama-class one of about 3B parameters (unverified).
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/ar2diff",
    title="Transfer Learning for Text Diffusion Models",
    arxiv="2401.17181",
    row=263,
    tests=(
      "tests/objectives/test_uniform.py::test_bound_is_tight_for_independent_tokens",
      "tests/objectives/test_uniform.py::test_prefix_bears_no_loss",
      "tests/objectives/test_uniform.py::test_second_pass_reads_the_first_ones_output",
    ),
    model=sections.llama(2560, 32, 32, 6912),
    objective={
      "kind": "unrolled",
      "corruption": {"kind": "uniform", "unit": "doc", "time": "uniform", "prefix": 1.0},
      "layout": {"kind": "streams", "streams": ("n",)},
      "masks": {"full": "full"},
      "terms": {"diffusion": {"stream": "n", "on": "all"}},
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(1e-4, warmup=1000, kind="cosine"),
    train={"steps": 100_000},
    sampler={"quota": {"kind": "linear", "steps": 10}, "score": "prob"},
  )
  cfg.batch_size = 256
  return sections.tiny_text(cfg) if variant == "tiny" else cfg
