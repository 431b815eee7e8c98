"""The sampler's plug-ins: their sources, what holds exactly, and its test: the table of docs/sampling.md.

python -m genmodels.sampling.table
"""

from __future__ import annotations

from typing import get_args, get_type_hints

from genmodels.sampling import cache, drafting, draw, partial, verify
from genmodels.sampling.config import PLUGINS

_STOP = "tests/sampling/test_stop.py::"
_UNIT = "tests/sampling/test_plugins.py::"
_LOOP = "tests/sampling/test_loop.py::"
_ACTIVE = "tests/sampling/test_active.py::"
_MIX = "tests/sampling/test_mix.py::"
_CACHE = "tests/sampling/test_cache.py::test_cached_logits_are_the_training_logits"
_PARTIAL = "tests/sampling/test_partial.py::"
_DRIFT = _PARTIAL + "test_drift_is_measured_and_bounded"
_SCORES = "tests/sampling/test_draw.py::test_scores"
_SPEC = "tests/sampling/test_speculate.py::"
_RULES = "tests/sampling/test_verify.py::"
_IDS = "greedy: the target's ids, whatever is drafted"

# (section, kind): (source, what holds exactly, test)
FACTS = {
  ("score", "prob"): ("LLaDA 2502.09992", "float32, before temperature and filters", _SCORES),
  ("score", "margin"): ("Dream 2508.15487", "p₁ − p₂", _SCORES),
  ("score", "neg_entropy"): ("Dream 2508.15487", "Σ p ln p", _SCORES),
  ("score", "random"): ("MDLM 2406.07524", "uniform, keyed by row and place", _SCORES),
  ("score", "distance"): ("WeDLM 2512.22737", "λ = 0: the score", _UNIT + "test_scores_know_the_place"),
  ("score", "eos"): ("EOSER 2509.23924", "γ = 1: the score", _UNIT + "test_scores_know_the_place"),
  ("score", "temperature"): (
    "Dream 2508.15487, alg_temp",
    "order drawn ∝ exp(score/T)",
    _UNIT + "test_scores_know_the_place",
  ),
  ("quota", "linear"): ("LLaDA 2502.09992", "Σ quotas = size", _LOOP + "test_quota_counts"),
  ("quota", "cosine"): ("MaskGIT 2202.04200", "⌊size·cos⌋ stay", _LOOP + "test_quota_counts"),
  ("quota", "shifted"): (
    "LaViDa 2505.16839",
    "α = 1: linear; 0, 1 fixed",
    _UNIT + "test_shifted_time",
  ),
  ("quota", "share"): ("Dream 2508.15487", "⌊masked·(1 − s/t)⌋", _UNIT + "test_share_is_dreams_rule"),
  ("quota", "doubling"): (
    "ASS 2509.23924",
    "Σ quotas = size in ⌊log₂ size⌋ steps",
    _UNIT + "test_doubling_commits_everything_in_log_steps",
  ),
  ("quota", "random_sizes"): (
    "2602.20126 (law unverified)",
    "a composition of the unit",
    _UNIT + "test_random_sizes_are_compositions",
  ),
  ("quota", "threshold"): (
    "Fast-dLLM 2505.22618, SDAR 2510.06303",
    "τ = 1: one token a step",
    _LOOP + "test_threshold_one_commits_one_token_a_step",
  ),
  ("quota", "factor"): (
    "Fast-dLLM 2505.22618",
    "largest n with (n+1)(1−p₍ₙ₎) < f",
    _UNIT + "test_factor_is_the_largest_n",
  ),
  ("quota", "entropy_budget"): (
    "EB-Sampler 2505.24857, SDAR 2510.06303",
    "Σ H − max H ≤ budget",
    _UNIT + "test_entropy_budget",
  ),
  ("quota", "all"): ("VAR 2404.02905", "one step a unit", _LOOP + "test_quota_counts"),
  ("quota", "first_hitting"): (
    "BD3-LM 2503.09573, 2409.02908",
    "law of ancestral sampling, T → ∞",
    _LOOP + "test_first_hitting_is_the_limit_of_ancestral_sampling",
  ),
  ("quota", "ancestral"): (
    "MDLM 2406.07524; linear: DiffuLLaMA 2410.17891",
    "reuse = no reuse; 1/(t + 1) when linear",
    _UNIT + "test_linear_ancestral_is_one_over_steps_left",
  ),
  ("quota", "binomial"): (
    "Eso-LM 2506.01928",
    "random score: law of ancestral sampling",
    _STOP + "test_random_counts_with_a_random_score_are_ancestral",
  ),
  ("commit", "anywhere"): ("MaskGIT 2202.04200", "ties go to the earlier token", _LOOP + "test_quota_counts"),
  ("commit", "leftmost"): (
    "WeDLM 2512.22737, FreeCache 2505.21467",
    "a prefix at every step",
    _UNIT + "test_leftmost_commits_a_prefix",
  ),
  ("commit", "hierarchical"): (
    "dInfer 2510.08666",
    "no long run after O(log n) steps",
    _UNIT + "test_hierarchical_splits_long_runs",
  ),
  ("remask", "never"): ("–", "committed tokens stay", _LOOP + "test_stopping_changes_no_committed_token"),
  ("remask", "remdm"): (
    "ReMDM 2503.00307",
    "P(clean at s) = α_s for every σ (not rule conf); eta = 0 is MDLM, bit by bit",
    _UNIT + "test_remdm_keeps_the_marginal",
  ),
  ("remask", "rcr"): (
    "MDPO 2508.13148",
    "Σ_{j≤i} n_j clean after step i",
    _STOP + "test_rcr_in_the_loop",
  ),
  ("active", "units"): (
    "LLaDA 2502.09992, BD3-LM 2503.09573",
    "cached = training logits",
    "tests/sampling/test_cache.py::test_cached_logits_are_the_training_logits",
  ),
  ("active", "runs"): (
    "MARIA 2502.06901",
    "one forward for each open token, between given ones",
    "tests/sampling/test_infilling.py::test_one_forward_for_each_open_token",
  ),
  ("active", "pipeline"): (
    "D2F 2508.09192",
    "cached = training logits; add = 1: sequential tokens",
    _ACTIVE + "test_a_pipeline_of_complete_blocks_is_sequential",
  ),
  ("active", "window"): (
    "WeDLM 2512.22737",
    "cached = training logits; cache = AR prefill",
    _ACTIVE + "test_a_window_leaves_an_ar_cache",
  ),
  ("cache", "none"): ("–", "training logits", _CACHE),
  ("cache", "causal_exact"): ("AR, NBDiff 2512.06776, TiDAR 2511.08923", "cached = training logits", _CACHE),
  ("cache", "block_exact"): ("BD3-LM 2503.09573, SDAR 2510.06303", "cached = training logits", _CACHE),
  ("cache", "prefix"): (
    "Fast-dLLM 2505.22618",
    "refresh = 1: no cache; prompts under Prefix-DLM",
    _PARTIAL + "test_the_law_finds_out_what_is_exact",
  ),
  ("cache", "dual"): (
    "Fast-dLLM 2505.22618; v2 2509.26328",
    "refresh = 1: no cache; blocks behind the front",
    _PARTIAL + "test_a_sub_block_cache_inside_an_exact_block_cache",
  ),
  ("cache", "vicinity"): ("dInfer 2510.08666", "refresh = 1: no cache", _DRIFT),
  ("cache", "free"): ("FreeCache 2505.21467 (details unverified)", "refresh = 1: no cache", _DRIFT),
  ("cache", "delayed"): (
    "dKV-Cache 2505.15781",
    "refresh = 1: no cache; read from the second step after the commit",
    _PARTIAL + "test_what_is_computed",
  ),
  ("cache", "delayed_greedy"): (
    "dKV-Cache-Greedy 2505.15781",
    "refresh = 1: no cache; 2 + window slots a token",
    _PARTIAL + "test_what_will_be_committed_is_computed",
  ),
  ("cache", "logit_selective"): ("Lumina-DiMOO 2510.06308", "ratio = 0: no cache", _DRIFT),
  ("cache", "value_similarity"): (
    "dLLM-Cache 2506.06295, one choice for all layers",
    "refresh = prompt = 1: no cache",
    _PARTIAL + "test_what_moved_most_is_computed",
  ),
  ("mix", "mask"): ("–", "the mask's embedding", _MIX + "test_weightless_mixtures_are_the_mask"),
  ("mix", "refine"): (
    "LRD 2510.11052 (coefficients unverified)",
    "strength = 0: bit by bit the mask",
    _MIX + "test_weightless_mixtures_are_the_mask",
  ),
  ("mix", "smooth"): ("dInfer 2510.08666", "weights by step", _MIX + "test_mixture_weights"),
  ("mix", "self_condition"): ("analog bits 2208.04202", "the mask stays", _MIX + "test_mixture_weights"),
  ("stop", "gap"): (
    "Prophet 2508.19982",
    "thresholds ∞: bit by bit the baseline; committed tokens stay",
    _STOP + "test_gap_commits_the_rest",
  ),
  ("stop", "converged"): (
    "LRD 2510.11052",
    "tol = 0: the baseline",
    _STOP + "test_convergence_is_measured_against_the_step_before",
  ),
  ("stop", "entropy_floor"): ("BD3-LM 2503.09573", "floor < 0: the baseline", _STOP + "test_entropy_floor"),
  ("draft", "plain"): ("–", "no drafts", _SPEC + "test_what_cannot_be_verified_is_refused"),
  ("draft", "ngram"): ("prompt lookup (Saxena 2023)", _IDS, _SPEC + "test_drafters_keep_the_targets_ids"),
  ("draft", "stand"): ("STAND 2506.04708", _IDS, "tests/sampling/test_stand.py::test_ids_and_law"),
  ("draft", "jacobi"): (
    "2305.10427, CLLM 2403.00835",
    _IDS + "; n tokens in at most n forwards",
    _SPEC + "test_drafters_keep_the_targets_ids",
  ),
  ("draft", "model"): ("2211.17192, SpecTr 2310.15141", _IDS, _SPEC + "test_a_smaller_model_drafts"),
  ("draft", "early_exit"): (
    "DEL 2504.05598",
    _IDS,
    "tests/sampling/test_early_exit.py::test_no_exit_changes_an_id",
  ),
  ("draft", "tidar"): ("TiDAR 2511.08923", _IDS, _SPEC + "test_tidar_keeps_the_targets_ids"),
  ("draft", "heads"): (
    "Medusa 2401.10774, Hydra 2402.05109",
    _IDS + "; in a tree too",
    "tests/sampling/test_draft_heads.py::test_untrained_drafts_keep_the_greedy_ids",
  ),
  ("draft", "masks"): (
    "multi-token prediction 2507.11851",
    _IDS,
    "tests/sampling/test_draft_heads.py::test_untrained_drafts_keep_the_greedy_ids",
  ),
  ("draft", "block"): (
    "DFlash 2602.06036",
    _IDS + "; drafts = those of the training view",
    "tests/sampling/test_block_draft.py::test_any_drafter_keeps_the_greedy_ids",
  ),
  ("draft", "diffuspec"): (
    "DiffuSpec 2510.02358",
    _IDS,
    "tests/sampling/test_joint.py::test_diffusion_drafts_keep_the_targets_ids",
  ),
  ("draft", "marginals"): (
    "AS-ARM 2504.20456",
    "the law of one token at a time",
    "tests/sampling/test_joint.py::test_the_joint_is_the_sequential_law",
  ),
  ("verify", "match"): ("–", "the ids of plain decoding", _RULES + "test_match_is_the_targets_own_draw"),
  ("verify", "rejection"): (
    "2211.17192, 2302.01318, SpecTr 2310.15141",
    "the law, enumerated to 1e-12",
    _RULES + "test_the_law_is_the_targets",
  ),
  ("verify", "recursive"): (
    "2402.14160",
    "the law, enumerated to 1e-12",
    _RULES + "test_children_without_replacement_keep_the_law",
  ),
  ("verify", "typical"): (
    "Medusa 2401.10774",
    "nothing: not exact",
    _RULES + "test_typical_acceptance_is_not_exact",
  ),
  ("verify", "rollback"): (
    "BiLD 2302.07863 (thresholds unverified)",
    "greedy ids for limit < ln 2; ∞ rejects nothing",
    "tests/sampling/test_big_little.py::test_what_is_taken_back",
  ),
}


def kinds() -> list[tuple[str, str]]:
  """(section, kind) of every plug-in, and of the parts of a score, in the order of the registries."""
  scores = [*get_args(get_type_hints(draw.Score)["kind"]), "distance", "eos", "temperature"]
  plugins = PLUGINS | {"cache": {**cache.POLICIES, **partial.REGISTRY}}
  plugins |= {"draft": drafting.DRAFTERS, "verify": verify.REGISTRY}
  return [("score", k) for k in scores] + [(s, k) for s, registry in plugins.items() for k in registry]


def markdown() -> str:
  """The table."""
  lines = ["| key | kind | source | what holds exactly | test |", "|---|---|---|---|---|"]
  for section, kind in kinds():
    source, exact, test = FACTS[section, kind]
    lines.append(
      f"| `{section}` | `{kind}` | {source} | {exact} | `{test.removeprefix('tests/sampling/')}` |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  print(markdown())
