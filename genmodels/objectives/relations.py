"""Relation tables by name: who may see whom, stream by stream (papers in the comments).

`table(name, streams)` expands a named rule to the layout's streams: every noisy copy sees itself under
the first relation and the clean stream under the second; different copies never see each other.
"""

from __future__ import annotations

from genmodels.contracts import CLEAN
from genmodels.masks import Relations

# name → (noisy→own copy, noisy→clean, clean→clean)
NAMED = {
  "causal": (None, None, "POS_LE"),
  "full": ("ALL", None, "ALL"),  # MDLM, LLaDA, Dream
  "block_causal": ("BLK_LE", None, "BLK_LE"),  # VAR; D2F's student on noisy blocks
  "bd3": ("BLK_EQ", "BLK_LT", "BLK_LE"),  # BD3-LM, SDAR, Fast-dLLM v2, Efficient-DLM, LLaDA2
  "context_causal": ("BLK_EQ", "BLK_LT", "POS_LE"),  # NBDiff, TiDAR
  "idlm": ("BLK_EQ&POS_LE", "BLK_LT", "POS_LE"),  # I-DLM
  "wedlm": ("BLK_EQ&ORD_LE", "BLK_LT", "POS_LE"),  # WeDLM: causal in observed-first order
  "any_order": (None, None, "ORD_LE"),
  "any_subset": (None, "ORD_LT", "ORD_LE"),  # AS-ARM: queries see given and earlier tokens' content
  "infill": ("ALL", None, "POS_LE"),  # MARIA: two networks, a stream each
  # Eso-LM; blocks are groups of generation ranks (corruption.hybrid): (A) shown tokens see all shown ones,
  # (B) all is causal.
  "eso_a": ("BLK_EQ&ORD_LE", "BLK_LT", "ORD_LE|BLK_LE"),
  "eso_b": ("BLK_EQ&ORD_LE", "BLK_LT", "ORD_LE"),
}


def table(rule, streams: tuple[str, ...]) -> Relations:
  """Relations of `streams` under a named rule, or under a mapping {"n>c": "BLK_LT", …}.

  "bd3&NEAR(511)" is the named rule with every relation narrowed: what the sliding-window layers of a model
  see where the others see "bd3".

  Raises:
    ValueError: unknown rule, or a rule that leaves a stream blind.
  """
  if isinstance(rule, str):
    rule, _, narrow = rule.partition("&")
    if rule not in NAMED:
      raise ValueError(
        f"mask is {rule!r}; it must be one of {', '.join(NAMED)}, or a mapping such as {{'c>c': 'POS_LE'}}"
      )
    own, to_clean, clean = NAMED[rule]
    pairs = {}
    for s in streams:
      if s == CLEAN:
        pairs[s, s] = clean
      else:
        if own:
          pairs[s, s] = own
        if CLEAN in streams and to_clean:
          pairs[s, CLEAN] = to_clean
    if narrow:
      pairs = {k: " | ".join(f"{c}&{narrow}" for c in v.split("|")) for k, v in pairs.items() if v}
  else:
    pairs = {tuple(k.split(">")): v for k, v in dict(rule).items()}
  pairs = {k: v for k, v in pairs.items() if v}
  blind = [s for s in streams if not any(q == s for q, _ in pairs)]
  if blind:
    raise ValueError(f"mask {rule!r} gives the stream(s) {', '.join(blind)} of {streams} nothing to see")
  # Relations of generation order need their keys coded by it.
  coord = {key: "order" for (_, key), relation in pairs.items() if "ORD_" in relation}
  return Relations(pairs, streams, coord)
