"""Mixtures of experts on DeepSpeed's MoE classes."""

import os

import torch

# before DeepSpeed is imported: it would warn about having to guess
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
