"""The faster forms of functions that the concept files have in a plain form.

`model.py`, `models/recurrent.py`, `decoding.py` and `bpe.py` have named places for them. `install`
fills these once, at the start of a process, for the device that it computes on; never per call.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import decoding
import model
from engine import cpu, graphs, losses, splitting
from models import moe, recurrent


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
    moe.experts_kernel = torch.compiler.disable(moe.plain_experts)
    recurrent.layer_kernel = torch.compiler.disable(layer_by_torch)  # it would unroll the loop
    decoding.text_steps = graphs.TextSteps if on_cuda else None
    decoding.pair_steps = graphs.StaticAdvance if on_cuda else None
    if on_cuda:
        torch.backends.cuda.enable_cudnn_sdp(False)  # until `prefer_cudnn` has seen the batches


def layer_by_torch(
    cell: recurrent.Cell,
    x: Tensor,
    state: recurrent.State,
    W: Tensor,
    U: Tensor,
    b_w: Tensor,
    b_u: Tensor,
) -> tuple[Tensor, recurrent.State]:
    """The same as plain_layer of models/recurrent.py, by the functions behind torch.nn's LSTM, GRU
    and RNN, which loop over places in C++, or on a GPU in cuDNN."""
    if cell not in LAYERS:  # somebody's own
        return recurrent.plain_layer(cell, x, state, W, U, b_w, b_u)
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):  # by itself, on CUDA, it would compute in fp16
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        before = [h[None].to(dtype) for h in state]
        # has_biases, layers, dropout, train, bidirectional, batch_first
        settings = True, 1, 0.0, torch.is_grad_enabled(), False, True
        y, *after = LAYERS[cell](
            x.to(dtype),
            before if len(before) > 1 else before[0],
            [parameter.to(dtype) for parameter in (W, U, b_w, b_u)],
            *settings,
        )
    return y, tuple(h[0] for h in after)


LAYERS = {
    recurrent.rnn_cell: torch.rnn_tanh,
    recurrent.gru_cell: torch.gru,
    recurrent.lstm_cell: torch.lstm,
}


def prefer_cudnn(network: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Lets torch choose cuDNN's attention for training, in bf16 on Hopper a quarter faster than the
    others, where these batches allow it. It plans for up to a second for each new shape, so all
    must have one; it may round the probability of dropout to sixteenths (pytorch issue 174245), and
    its gradient may be NaN with a mask (196678), so there must be neither."""
    shapes = {next(iter(batch.values())).shape for batch in batches}
    masked = any(tensor.dtype == torch.bool for batch in batches for tensor in batch.values())
    plain = len(shapes) == 1 and not masked
    plain &= getattr(network.config, "attention_dropout", 1.0) == 0
    torch.backends.cuda.enable_cudnn_sdp(plain)
