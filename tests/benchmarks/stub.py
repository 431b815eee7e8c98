"""A framework's half of the benchmark that misbehaves on request."""

import os
import time


class Stub:
  def double(self, x):
    return 2 * x

  def refuse(self):
    raise ValueError("no such kernel")

  def die(self):
    os._exit(3)

  def hang(self):
    time.sleep(60)


def make(device):
  return Stub()
