"""Adapters as PEFT reads them: the exported folder on the transformers model gives our logits."""

import numpy as np
import pytest

from genmodels import models
from genmodels.checkpoint import hf_export
from genmodels.checkpoint.manager import nested
from tests.checkpoint.test_hf_runs import adapted
from tests.models import cases

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def test_exported_adapters_load_in_peft(tmp_path):
  src, leaves, run = adapted(tmp_path)
  section = hf_export.open_source(str(run)).cfg
  ids = cases.tokens(2, 7, vocab=300)
  x = cases.inputs(ids)
  params = nested({n: np.asarray(v, np.float32) for n, v in leaves.items()})
  want = np.asarray(cases.run(models.build(section), params, x))
  hf_export.export_folder(str(run), str(tmp_path / "peft"), layout="qwen3", adapters="peft")
  base = transformers.AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32).eval()
  with torch.no_grad():
    tokens = torch.tensor(np.asarray(ids[..., 0]))
    plain = base(tokens).logits.numpy()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    got = loaded(tokens).logits.numpy()
  assert np.abs(plain - want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-4)
  hf_export.export_folder(str(run), str(tmp_path / "merged"), layout="qwen3", like=str(src))
  merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
  with torch.no_grad():
    np.testing.assert_allclose(merged(tokens).logits.numpy(), want, atol=1e-4)
