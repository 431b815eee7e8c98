"""The PyTorch contenders: FlexAttention with several settings, SDPA's cuDNN, flash and efficient kernels."""

from __future__ import annotations

import functools
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.contenders.worker import Contender, Side, Unsupported


def make(device: str) -> Side:
  return TorchSide(device)


class TorchSide(Side):
  xp = torch

  def __init__(self, device: str):
    super().__init__(device)
    if device == "gpu" and not torch.cuda.is_available():
      raise RuntimeError("this PyTorch finds no CUDA device; install a CUDA build")
    self.at = "cuda" if device == "gpu" else "cpu"

  def put(self, x, dtype=None):
    x = x if torch.is_tensor(x) else torch.from_numpy(np.ascontiguousarray(x))
    return x.to(self.at).to(getattr(torch, dtype or "bfloat16"))

  def wait(self, x=None):
    if self.device == "gpu":
      torch.cuda.synchronize()

  def numpy(self, x):
    return x.float().cpu().numpy() if torch.is_tensor(x) else x

  def same(self, a, b):
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))

  def _reference(self, case, inputs):
    with torch.no_grad():
      return super()._reference(case, inputs)

  def make(self, name, case):
    return CONTENDERS[name](self, case)

  def drop(self):
    super().drop()
    torch.compiler.reset()
    if self.device == "gpu":
      torch.cuda.empty_cache()

  def versions(self):
    out = {"torch": torch.__version__, "torch CUDA": torch.version.cuda}
    if self.device == "gpu":
      import triton

      out |= {
        "triton": triton.__version__,
        "torch cuDNN": torch.backends.cudnn.version(),
        "device": torch.cuda.get_device_name(),
      }
    return out

  def ceilings(self):
    n = 8192 if self.device == "gpu" else 256
    generator = torch.Generator(self.at).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=self.at).bfloat16() for _ in range(2))
    x = torch.randn(n, n, generator=generator, device=self.at)
    y = torch.empty_like(x)
    seconds, moved = self._rate(lambda: a @ b), self._rate(lambda: y.copy_(x))
    return {
      "gemm_tflops": 2 * n**3 / seconds / 1e12,
      "copy_gb_s": 2 * x.nelement() * x.element_size() / moved / 1e9,
    }

  def _rate(self, fn, calls=20, repeats=5):
    fn()
    self.wait()
    spent = []
    for _ in range(repeats):
      start = time.perf_counter()
      for _ in range(calls):
        fn()
      self.wait()
      spent.append((time.perf_counter() - start) / calls)
    return float(np.median(spent))


class _Eager(Contender):
  """attend(q, k, v) -> out on [B, H, S, D]; the backward goes through autograd over a kept graph."""

  def __init__(self, side, attend):
    self.side, self.attend = side, attend
    self.inputs = []
    for x in side.inputs:
      q, k, v, d_out = (y.transpose(1, 2).contiguous() for y in x)
      self.inputs.append([q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out])
    self.outs = [None] * len(self.inputs)
    gpu = side.device == "gpu"
    self.run("both", 0)  # compiles
    if gpu:
      torch.cuda.synchronize()
      torch.cuda.reset_peak_memory_stats()
      before = torch.cuda.memory_allocated()
    kept = self.run("both", 0)
    if gpu:
      torch.cuda.synchronize()
      self.memory = float(torch.cuda.max_memory_allocated() - before)
    del kept
    self.outs = [attend(*x[:3]) for x in self.inputs]

  def run(self, what, at):
    q, k, v, d_out = self.inputs[at]
    if what == "bwd":
      return torch.autograd.grad(self.outs[at], (q, k, v), d_out, retain_graph=True)
    out = self.attend(q, k, v)
    if what == "fwd":
      return out.detach()
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), d_out))

  def results(self, at):
    # The allocator hands freed blocks of a size to the next that asks for it: these hold NaN.
    nan = [torch.full_like(x, float("nan")) for x in self.inputs[at][:3] * 4]
    self.side.wait()
    del nan
    return [x.transpose(1, 2) for x in self.run("both", at)]


def _tables(side, case):
  return {name: side.put(t, "int32") for name, t in case.tables().items()}


def _flex(side, case, block=128, options=None, mode=None):
  """FlexAttention, compiled; block masks are rebuilt by the quicker of torch's two ways."""
  if side.device != "gpu":
    raise Unsupported("compiled FlexAttention is only timed on a GPU")
  tables = _tables(side, case)

  def mask_mod(b, h, i, j):
    return case.visible(tables, b if case.documents else 0, i, j)

  rows = case.rows if case.documents else None
  arguments = dict(B=rows, H=None, Q_LEN=case.slots, KV_LEN=case.slots, device=side.at, BLOCK_SIZE=block)
  builds = [functools.partial(create_block_mask, mask_mod, **arguments)]
  builds.append(functools.partial(torch.compile(create_block_mask), mask_mod, **arguments))
  spent, mask = [], None
  for build in builds:
    try:
      made = build()
      spent.append(side.timed_build(build))
      mask = mask or made
    except Exception:  # either may fail: eager on memory, compiled on the mask
      continue
  if mask is None:
    raise RuntimeError("create_block_mask failed, eager and compiled")
  compiled = torch.compile(flex_attention, dynamic=False, mode=mode)

  def attend(q, k, v):
    return compiled(q, k, v, block_mask=mask, enable_gqa=case.heads != case.key_heads, kernel_options=options)

  contender = _Eager(side, attend)
  contender.build_ms = min(spent)
  counts = sum(int(x.sum()) for x in (mask.kv_num_blocks, mask.full_kv_num_blocks) if x is not None)
  contender.executed = float(counts * block * block * (1 if case.documents else case.rows))
  return contender


def _flash4(side, case):
  try:
    import flash_attn.cute  # noqa: F401
  except ImportError as e:
    raise Unsupported(f"flash-attn-4 is not installed ({e})") from e
  return _flex(side, case, options={"BACKEND": "FLASH"})


def _sdpa(side, case, backend):
  """SDPA with its own causal mask, or none."""
  if case.mask not in ("causal", "full") or case.documents:
    raise Unsupported("its own masks are none and causal")
  if side.device != "gpu":
    raise Unsupported("needs a CUDA GPU")

  def attend(q, k, v):
    with sdpa_kernel(backend):
      return F.scaled_dot_product_attention(
        q, k, v, is_causal=case.mask == "causal", enable_gqa=case.heads != case.key_heads
      )

  made = _Eager(side, attend)
  made.executed = float(case.rows * case.slots**2) if case.mask == "full" else None
  return made


def _sdpa_masked(side, case, backend):
  """SDPA with a dense boolean mask; the efficient kernel knows no groups and gets repeated key heads."""
  gqa = case.heads != case.key_heads
  if side.device != "gpu" and backend != SDPBackend.MATH:
    raise Unsupported("needs a CUDA GPU")
  if backend == SDPBackend.MATH and case.rows * case.heads * case.slots**2 > 2**34:
    raise Unsupported("the logits of dense attention would take more than 64 GiB")
  tables = _tables(side, case)
  at = torch.arange(case.slots, device=side.at, dtype=torch.int32)
  rows = torch.arange(case.mask_rows, device=side.at)[:, None, None]

  def build():
    return case.visible(tables, rows, at[None, :, None], at[None, None, :])[:, None]

  mask = build().expand(case.rows, 1, case.slots, case.slots)
  repeat = gqa and backend == SDPBackend.EFFICIENT_ATTENTION

  def attend(q, k, v):
    if repeat:
      k, v = (x.repeat_interleave(case.heads // case.key_heads, 1) for x in (k, v))
    with sdpa_kernel(backend):
      return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa and not repeat)

  made = _Eager(side, attend)
  made.build_ms, made.executed = side.timed_build(build), float(case.rows * case.slots**2)
  return made


CONTENDERS = {
  "flex": _flex,
  "flex-64": functools.partial(_flex, block=64, options={"BLOCK_M": 64, "BLOCK_N": 64}),
  "flex-autotuned": functools.partial(_flex, mode="max-autotune-no-cudagraphs"),
  "flex-flash4": _flash4,
  "sdpa-cudnn": functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
  "sdpa-flash": functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
  "sdpa-cudnn-masked": functools.partial(_sdpa_masked, backend=SDPBackend.CUDNN_ATTENTION),
  "sdpa-math-masked": functools.partial(_sdpa_masked, backend=SDPBackend.MATH),
  "sdpa-efficient-masked": functools.partial(_sdpa_masked, backend=SDPBackend.EFFICIENT_ATTENTION),
}
