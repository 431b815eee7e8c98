"""What `benchmarks/attention.py` compares: cases, worker processes, the contenders of JAX and PyTorch."""
