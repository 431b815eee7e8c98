"""What `benchmarks/attention.py` compares, and how: cases, worker processes, the contenders of JAX and PyTorch."""
