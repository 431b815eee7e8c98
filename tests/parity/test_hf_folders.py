"""Folders against transformers: logits of every layout through the objective's own view, `eval --text`, and
transformers reading what was exported. Random weights: no norm at one, no bias at zero."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import cli, system
from genmodels.checkpoint import hf_export, hf_import, tensors
from genmodels.contracts import Target
from genmodels.evals import heldout
from genmodels.sampling.run import load_run
from tests.checkpoint import folders
from tests.models import cases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

N = 24

# layout → (transformers class, rename of its tensors, which keys a query sees)
REFERENCE = {
  "llama": ("Llama", None, "causal"),
  "llama_tied": ("Llama", None, "causal"),
  "mistral": ("Mistral", None, "causal"),
  "qwen2": ("Qwen2", None, "causal"),
  "qwen2_window": ("Qwen2", None, "causal"),
  "qwen3": ("Qwen3", None, "causal"),
  "gpt2": ("GPT2", None, "causal"),
  "gemma": ("Gemma", None, "causal"),
  "gemma2": ("Gemma2", None, "causal"),
  "gemma3_text": ("Gemma3", None, "causal"),
  "llada": ("Llama", "llada", "full"),
  "dream": ("Qwen2", None, "full"),
  "sdar": ("Qwen3", None, "blocks"),
  "fast_dllm_v2": ("Qwen2", None, "blocks"),
  "diffullama": ("Llama", "diffullama", "full"),
  "diffugpt": ("GPT2", "diffugpt", "full"),
  "qwen3_moe": ("Qwen3Moe", None, "causal"),
  "sdar_moe": ("Qwen3Moe", None, "blocks"),
  "llada_moe": ("Qwen3Moe", None, "full"),
  "llada2_moe": ("Glm4Moe", "llada2", "blocks"),
}
RENAME = {
  "llada": (
    ("model.transformer.wte", "model.embed_tokens"), ("model.transformer.ln_f", "model.norm"),
    ("model.transformer.ff_out", "lm_head"), ("model.transformer.blocks", "model.layers"),
    (".q_proj", ".self_attn.q_proj"), (".k_proj", ".self_attn.k_proj"), (".v_proj", ".self_attn.v_proj"),
    ("attn_out", "self_attn.o_proj"), ("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj"),
    ("ff_out", "mlp.down_proj"), ("attn_norm", "input_layernorm"), ("ff_norm", "post_attention_layernorm"),
  ),
  "diffullama": (("embed_tokens", "model.embed_tokens"), ("denoise_model", "model")),
  "diffugpt": (("embed_tokens", "transformer.wte"), ("denoise_model", "transformer")),
  # transformers has no LLaDA2; GLM-4.5 computes the same: grouped sigmoid routing with a bias, a shared expert,
  # half of each head rotated, normalised queries and keys.
  "llada2": (
    ("word_embeddings", "embed_tokens"), ("attention.dense", "self_attn.o_proj"),
    ("attention.query_layernorm", "self_attn.q_norm"), ("attention.key_layernorm", "self_attn.k_norm"),
    ("expert_bias", "e_score_correction_bias"),
  ),
}  # fmt: skip


def split_qkv(named, config):
  """LLaDA2's fused projection as three."""
  out = {}
  sizes = np.array([config["num_attention_heads"], *[config["num_key_value_heads"]] * 2]) * config["head_dim"]
  for n, x in named.items():
    if "query_key_value" in n:
      parts = np.split(x, np.cumsum(sizes)[:-1])
      base = n.replace("attention.query_key_value", "self_attn.{}_proj")
      out |= {base.format(k): part for k, part in zip("qkv", parts)}
    else:
      out[n] = x
  return out


def fuse_experts(state):
  """Per-expert tensors as transformers holds them in memory (its save_pretrained writes them apart again)."""
  for gate in [n for n in state if ".experts.0.gate_proj" in n]:
    base = gate.removesuffix("0.gate_proj.weight")
    count = sum(n.startswith(base) and "gate_proj" in n for n in state)
    take = lambda i, site: state.pop(f"{base}{i}.{site}_proj.weight")
    state[f"{base}gate_up_proj"] = torch.stack(
      [torch.cat([take(i, "gate"), take(i, "up")]) for i in range(count)]
    )
    state[f"{base}down_proj"] = torch.stack([take(i, "down") for i in range(count)])


def reference(case, named, config):
  """The transformers model of a folder's tensors."""
  kind, rename, _ = REFERENCE[case]
  fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "auto_map")}
  if case == "llada":
    fields = dict(
      hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=40,
      vocab_size=304, rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=False,
    )  # fmt: skip
  if case == "llada_moe":
    fields |= dict(moe_intermediate_size=20, intermediate_size=40, norm_topk_prob=False)
  if case == "llada2_moe":
    fields |= dict(n_routed_experts=8, n_shared_experts=2)
    fields["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    named = split_qkv(named, config)
  name = "Gemma3Text" if kind == "Gemma3" else kind
  made = getattr(transformers, f"{name}Config")(**fields, attn_implementation="eager")
  hf = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(made).eval()
  state = {}
  for n, x in named.items():
    for a, b in RENAME.get(rename, ()):
      n = n.replace(a, b)
    state[n] = torch.tensor(np.asarray(x, np.float32))
  fuse_experts(state)
  missing, extra = hf.load_state_dict(state, strict=False)
  assert not extra and set(missing) <= {"lm_head.weight"}, (missing, extra)
  hf.tie_weights()
  return hf


def visible(case, config):
  """float32[1, 1, N, N] additive mask, or None: the model's own."""
  rule, at = REFERENCE[case][2], np.arange(N)
  if rule == "causal":
    return None
  block = config.get("bd_size") or config.get("block_size") or N
  see = np.ones((N, N), bool) if rule == "full" else at[None] // block <= at[:, None] // block
  return torch.tensor(np.where(see, 0.0, -np.inf).astype(np.float32))[None, None]


def logits(run, ids):
  """float32[N, V] at every token of the last stream, through the objective's view of a row without noise."""
  objective = run.parts.objective
  batch = next(heldout.piece_batches([(0, 0, ids, 0)], len(ids), 1, run.parts.data.meta))  # as `eval --text`
  row = system.row_of(jax.tree.map(jnp.asarray, batch))
  noise = objective.corruption.draw(row, jax.random.key(0), 0, None)
  noise = noise.replace(hit=jnp.zeros_like(noise.hit))
  inputs, _ = objective.view(row, noise)
  first = (len(objective.layout.streams) - 1) * len(ids)
  slot = first + jnp.arange(len(ids), dtype=jnp.int32)[None]
  target = {"t": Target("text", slot, row.tokens, jnp.ones_like(row.tokens, jnp.float32))}
  apply = lambda p, x: cases.logits(run.parts.model.apply(p, x, target).dists["t"])
  return np.asarray(jax.jit(apply)(run.trees["model"], inputs))[0]


@pytest.mark.parametrize("case", REFERENCE)
def test_logits(case, tmp_path, monkeypatch):
  monkeypatch.setattr(tensors, "sync", lambda path: None)
  src, named = folders.make(tmp_path / "src", case)
  config = folders.CONFIGS[case]
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  run = load_run(tmp_path / "dst", overrides=("model.heads.text.forbid=()",))
  ids = np.random.default_rng(0).integers(0, 290, N).astype(np.int32)
  with torch.no_grad():
    mask = visible(case, config)
    want = reference(case, named, config)(
      torch.tensor(ids[None].astype(np.int64)), attention_mask=mask
    ).logits[0]
  got = logits(run, ids)
  assert np.abs(want.numpy()).max() > 1
  assert np.abs(got - want.numpy()).max() <= 1e-4


@pytest.mark.parametrize(
  "case, dtype, bos",
  [("llama_tied", np.float32, True), ("gemma3_text", np.float32, True), ("qwen2", folders.BF16, False)],
)
def test_eval_text_is_what_transformers_gives(case, dtype, bos, tmp_path, monkeypatch, capsys):
  """Mean negative log-likelihood per token: same BOS, same truncation; a bfloat16 checkpoint in float32."""
  monkeypatch.setattr(tensors, "sync", lambda path: None)
  src, _ = folders.make(tmp_path / "src", case, dtype, shards=2)
  folders.tokenizer(src, bos=bos)
  (tmp_path / "text.txt").write_text(folders.TEXT)
  assert cli.main(["import", str(src), str(tmp_path / "dst")]) == 0
  capsys.readouterr()
  command = ["eval", str(tmp_path / "dst"), "--text", str(tmp_path / "text.txt"), "--json", "--length", "48"]
  assert cli.main([*command, "model.dtype=float32"]) == 0
  got = json.loads(capsys.readouterr().out)
  hf = transformers.AutoModelForCausalLM.from_pretrained(
    src, dtype=torch.float32, attn_implementation="eager"
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(src)
  ids = tokenizer(folders.TEXT, return_tensors="pt", truncation=True, max_length=48).input_ids
  assert ids.shape == (1, 48) and (int(ids[0, 0]) == 0) == bos
  with torch.no_grad():
    want = hf.eval()(ids, labels=ids).loss.item()
  assert got["tokens"] == 47 and got["exact"]
  rest = len(tokenizer(folders.TEXT).input_ids) - 48
  assert rest > 0 and got["notes"] == [f"1 of 1 texts cut at 48 tokens: {rest} tokens were not read"]
  assert got["nats_per_token"] == pytest.approx(want, rel=1e-5)
  # What differs in BOS or truncation is seen at this tolerance.
  with torch.no_grad():
    assert hf(ids[:, 1:], labels=ids[:, 1:]).loss.item() != pytest.approx(want, rel=1e-3)


AR = [
  "llama",
  "llama_tied",
  "mistral",
  "qwen2",
  "qwen2_window",
  "qwen3_tied",
  "gpt2",
  "gemma",
  "gemma2",
  "gemma3_text",
  "qwen3_moe",
]


@pytest.mark.parametrize("case", AR)
def test_transformers_reads_an_export(case, tmp_path, monkeypatch):
  """As imported, and with a config.json written from our model alone (another layout's folder gives none)."""
  monkeypatch.setattr(tensors, "sync", lambda path: None)
  src, named = folders.make(tmp_path / "src", case)
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"), shard_bytes=20_000)
  assert (tmp_path / "out" / tensors.INDEX).is_file()
  from genmodels.checkpoint import hf_config

  source = hf_export.open_source(str(tmp_path / "dst"))
  config = hf_config.write(source.cfg, source.layout, {}, folders.CONFIGS[case].get("sliding_window") or 0)
  bare = folders.write(tmp_path / "bare", config, named)
  ids = torch.tensor(np.random.default_rng(0).integers(0, 290, (1, N)))
  out = []
  for path in (src, tmp_path / "out", bare):
    model = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
      out.append(model.eval()(ids).logits)
  assert torch.equal(out[0], out[1])
  assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("case", ["gemma3_text", "qwen3_tied"])
def test_greedy_sampling_is_generate(case, tmp_path, monkeypatch, capsys):
  """`sample` on an import, through the cache and its local layers, gives the tokens that generate gives."""
  monkeypatch.setattr(tensors, "sync", lambda path: None)
  src, _ = folders.make(tmp_path / "src", case, eos_token_id=1, pad_token_id=1)
  folders.tokenizer(src)
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  command = [
    "sample",
    "--workdir",
    str(tmp_path / "dst"),
    "--prompt",
    "the cat sat on",
    "--length",
    "32",
    "--json",
  ]
  assert cli.main([*command, "temperature=0.0"]) == 0
  got = json.loads(capsys.readouterr().out)["samples"][0]["tokens"]
  hf = transformers.AutoModelForCausalLM.from_pretrained(
    src, dtype=torch.float32, attn_implementation="eager"
  )
  ids = transformers.AutoTokenizer.from_pretrained(src)("the cat sat on", return_tensors="pt").input_ids
  want = hf.generate(
    ids,
    max_length=len(got),
    do_sample=False,
    attention_mask=torch.ones_like(ids),
    suppress_tokens=[0, 290, 291],
  )
  assert len(got) > ids.shape[1] + 5
  assert got == want[0].tolist()


@pytest.mark.parametrize("case", AR)
def test_configs_that_transformers_writes(case):
  """What save_pretrained writes today (rope_parameters, layer_types) says the same as the published files."""
  from genmodels.checkpoint import hf_config

  config = folders.CONFIGS[case]
  kind = REFERENCE.get(case, ("Qwen3",))[0]
  written = getattr(transformers, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")(**config).to_dict()
  assert "rope_theta" not in written or case == "gpt2"
  read = lambda c: hf_config.section(json.loads(json.dumps(c)))
  assert not hf_config.differences(
    hf_config.trunk_config.from_section(read(written)), hf_config.trunk_config.from_section(read(config))
  )
  assert hf_config.window(written, read(written)) == hf_config.window(config, read(config))
