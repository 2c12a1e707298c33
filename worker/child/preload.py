"""Imported first by the fork server: bitsandbytes, without opening the GPU; and a short way out.

On import bitsandbytes asks torch for the compute capability of each GPU, only to see that there is
one. The question opens CUDA, and a process forked from one with CUDA open can never use it.
"""

import atexit
import os

import torch

# Taking the libraries' million objects apart takes ten seconds, in which ended trainers wait to be buried.
atexit.register(os._exit, 0)

_ask = torch.cuda.get_device_capability
torch.cuda.get_device_capability = lambda device=None: (8, 0)  # noqa: ARG005 - as torch names it
try:
    import bitsandbytes  # noqa: F401
finally:
    torch.cuda.get_device_capability = _ask

if torch.cuda.is_initialized():
    raise RuntimeError("the fork server has opened the GPU, so no trainer could use it")
