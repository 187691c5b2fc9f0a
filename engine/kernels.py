"""The faster forms of functions that the concept files have in a plain form.

`model.py`, `decoding.py` and `bpe.py` have named places for them. `install` fills these once, at
the start of a process, for the device that it computes on; never per call.
"""

import torch
import torch.nn.functional as F

import decoding
import model
from engine import cpu, graphs, losses, splitting


def install(device: torch.device) -> None:
    """Puts into every named place what is fastest on this device; it may be called repeatedly.

    On any device the loss never holds all the logits, text is split faster, and its chunks are
    counted on all cores. A CPU has its own attention and dropout; a GPU decodes by captured steps.
    """
    splitting.use_in_bpe()
    on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
    model.cross_entropy = losses.linear_cross_entropy
    model.attention_kernel = cpu.attention if on_cpu else F.scaled_dot_product_attention
    model.dropout_kernel = cpu.dropout if on_cpu else F.dropout
    decoding.text_steps = graphs.GPTSteps if on_cuda else None
    decoding.pair_steps = graphs.StaticAdvance if on_cuda else None
