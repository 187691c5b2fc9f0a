"""What a run begins with: its data, network and optimizer, new or from a checkpoint."""

import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recomputed

import tasks
from bpe import count_merges
from data.tokens import check_special, lacking, load_tokenizer
from engine import checkpoint as checkpoints
from engine import losses, sharding
from engine.checkpoint import LATEST
from engine.config import from_data, padded
from engine.processes import Processes
from finetune import limit_what_learns, rate_scale, take_weights
from model import Block
from tasks.flags import FinetuneConfig, TrainConfig

Say = Callable[[str], None]


def origin(config: TrainConfig) -> Path | None:
    """The checkpoint that a run resumes (--resume) or begins from (--init); None for neither."""
    if config.resume:
        return Path(config.out) / LATEST
    return Path(config.init) if config.init else None


def check_sizes(config: TrainConfig, sizes: dict) -> None:
    """Raises ValueError for sizes that no network can have, before hours of tokenizing."""
    Model = tasks.network(config.model)
    with torch.device("meta"):
        Model(Model.Config(**sizes))


# ---- data ----------------------------------------------------------------------------------------


def open_data(
    config: TrainConfig,
    sizes: dict,
    micro_batch: int,
    checkpoint: dict | None,
    group: Processes,
    dtype: torch.dtype,
    say: Say,
) -> tuple:
    """(training data, validation data) of the task, in batches of micro_batch sequences, with the
    checkpoint's tokenizer if there is one. Raises ValueError if the data differs from what the
    checkpoint or another machine has."""
    Data, tokenizer, path = tasks.task(config.model).Data, None, origin(config)
    if checkpoint:
        tokenizer = checkpoints.restore_tokenizer(path, checkpoint)
        if missing := lacking(tokenizer, Data.special_tokens):
            raise ValueError(
                f"the tokenizer of {path} lacks the special token {missing} that "
                f"--model {config.model} needs: begin from another checkpoint"
            )
    elif config.tokenizer.endswith(".pt"):
        path = Path(config.tokenizer)
        tokenizer = checkpoints.restore_tokenizer(path, checkpoints.load(path))
    elif config.tokenizer and Path(config.tokenizer).is_file():
        tokenizer = load_tokenizer(Path(config.tokenizer))
    elif not config.tokenizer:
        count_merges(sizes["vocab_size"], len(Data.special_tokens))  # refuses one that is too small
    if tokenizer and not checkpoint:
        check_special(tokenizer, Data.special_tokens, config.tokenizer)
    if tokenizer and getattr(Data, "needs_bytes", False) and not hasattr(tokenizer, "bytes_of"):
        raise ValueError(
            f"--model {config.model} needs a tokenizer whose tokens are bytes, and that of "
            f"{path or config.tokenizer} has pieces: leave --tokenizer out to train one"
        )
    say(f"preparing {config.data}")
    # One process of each machine prepares the data; then the others find it in the cache.
    if group.local_rank > 0:
        group.barrier()
    data, validation = Data.splits(replace(config, batch_size=micro_batch), sizes, tokenizer)
    if group.local_rank == 0:
        group.barrier()
    step = checkpoint["step"] if config.resume else 0
    compare_machines(config, {**sizes, "dtype": dtype}, data, step, group)
    if config.resume and data.fingerprint != checkpoint["data"]:
        raise ValueError(
            f"the text of --data {config.data} is not the one that {config.out} was trained on: "
            "restore it, or begin a new run with --init"
        )
    return data, validation


def compare_micro_batches(checkpoint: dict, micro_batch: int, say: Say) -> None:
    """Says where a resumed run has micro-batches of another size than before: not the same run."""
    # Older checkpoints have the size itself as their batch_size.
    before = checkpoint["train_config"].get("batch_size", micro_batch)
    before = checkpoint.get("micro_batch", before)
    if micro_batch != before:
        say(
            f"note: micro-batches have {micro_batch} sequences now, {before} before: with dropout, "
            "negatives from the same batch, or balanced experts, this is another run from here on; "
            "to go on with the same one, choose a --batch_size and a number of processes that give "
            f"{before}"
        )


def compare_machines(config: TrainConfig, sizes: dict, data, step: int, group: Processes) -> None:
    """Raises ValueError where machines differ: each has its own files and its own command."""
    paths = {"out", "cache_dir", "data", "valid", "init", "tokenizer"}
    settings = {k: v for k, v in asdict(config).items() if k not in paths}
    for what, value in (
        ("checkpoint to go on with", step),
        ("flags", {**settings, **sizes}),
        (f"text in --data {config.data}", data.fingerprint),
        ("tokenizer", data.tokenizer.hash),
    ):
        if not group.all_equal(str(value)):
            raise ValueError(
                f"the machines do not have the same {what}: give each the same files and flags"
            )


# ---- network -------------------------------------------------------------------------------------


def make_network(
    config: TrainConfig,
    sizes: dict,
    checkpoint: dict | None,
    data,
    group: Processes,
    dtype: torch.dtype,
    say: Say,
) -> nn.Module:
    """The network on the device, ready to be trained: new, or with the checkpoint's weights."""
    Model, path = tasks.network(config.model), origin(config)
    torch.manual_seed(config.seed)
    # What a head must know about the data: its labels, whether its texts are pairs, …
    sizes = {**sizes, **{name: getattr(data, name) for name in from_data(Model.Config)}}
    if checkpoint and checkpoint["task"] == config.model:
        saved = {**checkpoint, "model_config": sizes}
        model, _ = checkpoints.restore(path, saved, keep_adapters=config.resume)
    elif checkpoint:
        model = Model(Model.Config(**sizes))
        other, _ = checkpoints.restore(path, checkpoint)
        fresh = take_weights(model, other.state_dict())
        say(f"from {path}; freshly initialised: {', '.join(fresh) or 'nothing'}")
    else:
        vocab_size = data.tokenizer.vocab_size
        if not tasks.counts(config.model):  # what is counted is no matrix, and needs no padding
            vocab_size = padded(vocab_size)
        model = Model(Model.Config(**{**sizes, "vocab_size": vocab_size}))
    if group.world > 1 and checkpoint and not group.all_equal(digest(model)):
        raise ValueError(f"the machines do not have the same {path}: give each the same files")
    if isinstance(config, FinetuneConfig):
        limit_what_learns(model, config.lora_rank, config.freeze)
    if config.recompute:
        recompute_blocks(model)
    sharding.divide_model(config.shard, group, model, dtype)
    return model.to(group.device).train()


def digest(model: nn.Module) -> str:
    """A checksum of the bits of the model's weights, which lie on the CPU."""
    total = 0
    for tensor in model.state_dict().values():
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), total)
    return str(total)


def recompute_blocks(model: nn.Module) -> None:
    """Lets every Block free its activations, and compute them once more in the backward pass."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(
            "--recompute computes the Blocks of model.py again, and this network has none: leave "
            "it out"
        )
    for block in blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


# ---- optimizer, forward --------------------------------------------------------------------------


def optimizer_for(config: TrainConfig, model: nn.Module, group: Processes, dtype: torch.dtype):
    """The optimizer that a run's flags ask for, divided over the processes if --shard says so."""
    scale = {}
    if isinstance(config, FinetuneConfig):
        scale = {"rate_scale": rate_scale(model, config.layer_decay)}
    return sharding.make_sharded_optimizer(
        config.shard,
        group,
        model,
        config.optimizer,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        dtype=dtype,
        **scale,
    )


def restore_training(
    config: TrainConfig, checkpoint: dict, model: nn.Module, optimizer, group: Processes, say: Say
) -> None:
    """Loads the optimizer's state of a resumed run, and if the tensors lie in parts, its weights
    too. A damaged latest.pt is replaced by previous.pt. Raises ValueError for a checkpoint without
    optimizer state."""
    path = origin(config)
    if not checkpoint["optimizer"]:
        raise ValueError(
            f"{path} has no optimizer state, as every best.pt: use it with --init, or "
            "resume from a latest.pt"
        )
    if "parts" in checkpoint:
        sharding.load_weights(path, model, checkpoint["model"])
    sharding.load_optimizer(optimizer, checkpoint["optimizer"])
    if reason := checkpoint.get("instead"):
        checkpoints.put_previous_in_place(path, reason, checkpoint["step"], group.main, say)


def autocast_for(device: torch.device, dtype: torch.dtype) -> Callable:
    """A function that makes the context in which a network computes: with products in bf16 if dtype
    is bf16."""
    enabled = dtype == torch.bfloat16
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=enabled)


def wants_compiler(config: TrainConfig, device: torch.device) -> bool:
    """What --compile says; by default it is on for CUDA on Linux."""
    if config.compile is not None:
        return config.compile
    return device.type == "cuda" and sys.platform == "linux"


def compiled(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    autocast: Callable,
    group: Processes | None = None,
) -> nn.Module:
    """The compiled model, after a trial on these batches; a divided one is compiled in place, layer
    by layer. If that fails in any process, a line says so, and all go on with the model itself.

    A process whose compiler fails must not leave the others waiting: nothing that may fail sends
    anything, and afterwards the processes tell each other how it went.
    """
    group, errors = group or Processes(0, 1, next(model.parameters()).device), []
    buffers = dict(model.named_buffers())
    with noted(errors):
        losses.use_compiler(group.device)
        torch._dynamo.config.suppress_errors = False
        # The layers of all blocks share one list of graphs: in seq2seq three attentions, with and
        # without padding, a gradient, another number of rows. At the 9th torch would give them up.
        torch._dynamo.config.cache_size_limit = 64
    shapes = {tuple(tensor.shape for tensor in batch.values()) for batch in batches}
    # Otherwise a graph for each length of a batch would be compiled, until torch gives up.
    dynamic = True if len(shapes) > 1 else None
    divided = any(sharding.is_divided(p) for p in model.parameters())
    compiler = compiled_layers if divided else compiled_whole
    fast = compiler(model, batches, autocast, dynamic, errors)
    failed = group.all_reduce([float(bool(errors) and i == group.rank) for i in range(group.world)])
    if any(failed):
        if failed.index(1) == group.rank:
            error = getattr(errors[0], "inner_exception", errors[0])  # a backend's own, unwrapped
            reason = str(error).strip().partition("\n")[0][:120]
            line = f"torch.compile failed ({type(error).__name__}: {reason}): going on without it"
            print(line, flush=True)
        losses.use_compiler(None)
        for layer in chain(*sharding.layers_of_blocks(model)):
            vars(layer).pop("forward", None)
        fast = model
    else:  # from now on a graph that cannot be compiled, for a batch unlike these, ends no run
        torch._dynamo.config.suppress_errors = True
    fast.train()
    model.zero_grad(set_to_none=True)
    for name, buffer in buffers.items():  # a state that the trial has carried on
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)
    return fast


@contextmanager
def noted(errors: list[Exception]) -> Iterator[None]:
    """A context that an error ends and is noted: compilers fail in ways that cannot be listed."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def compiled_whole(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    autocast: Callable,
    dynamic: bool | None,
    errors: list[Exception],
) -> nn.Module:
    """The compiled model; what goes wrong in its trial is added to the errors."""
    fast = model
    with noted(errors):
        fast = torch.compile(model, dynamic=dynamic)
        for batch in batches:
            with autocast():
                sums = fast(**batch)
            sum(sums.values()).backward()
        with torch.no_grad(), autocast():  # evaluation compiles a graph of its own
            fast.eval()(**batches[0])
    return fast


# ---- the compiler and a divided model ------------------------------------------------------------


def compiled_layers(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    autocast: Callable,
    dynamic: bool | None,
    errors: list[Exception],
) -> nn.Module:
    """The model, its attentions and MLPs compiled; what goes wrong is added to the errors.

    No graph can hold what gathers a layer's weights, so the layers are compiled one by one and are
    gathered in between; LayerNorms and residual sums remain eager. In the trial the model computes
    as without a compiler, and each layer, while it is gathered, tries the compiled form too.
    """
    layers, chunk = [*chain(*sharding.layers_of_blocks(model))], losses.chunk_function
    plain = fast = [layer.forward for layer in layers]
    with noted(errors):
        fast = [torch.compile(forward, dynamic=dynamic) for forward in plain]
    for i, layer in enumerate(layers):
        layer.forward = partial(try_layer, errors, layer, plain[i], fast[i])
    losses.chunk_function = partial(try_chunk, errors, losses.of_chunk, chunk)
    with torch.no_grad():
        for training, some in ((True, batches), (False, batches[:1])):
            model.train(training)
            for batch in some:
                with autocast():
                    model(**batch)
    losses.chunk_function = chunk
    for layer, forward in zip(layers, fast, strict=True):
        layer.forward = forward
    return model


def layers_are_compiled(model: nn.Module) -> bool:
    """Whether compiled_layers has compiled the layers of this model."""
    return any("forward" in vars(layer) for layer in chain(*sharding.layers_of_blocks(model)))


def try_layer(errors: list[Exception], layer: nn.Module, plain, fast, *inputs):
    """plain(*inputs), after a trial of `fast` unless one has failed: in training with its gradient,
    which is not kept."""
    if errors:
        return plain(*inputs)
    with noted(errors):
        if layer.training:
            leaves = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
            learning = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
            learning = [x.requires_grad_() for x in learning]
            learning += [p for p in layer.parameters() if p.requires_grad]
            with torch.enable_grad():
                out = [x for x in tree_leaves(fast(*leaves)) if x.is_floating_point()]
                torch.autograd.grad(sum(x.sum() for x in out), learning, allow_unused=True)
        else:
            fast(*inputs)
    return plain(*inputs)


def try_chunk(errors: list[Exception], plain, fast, logits: Tensor, *others) -> tuple:
    """plain(logits, *others), after a trial of `fast` with and without a gradient. Both may change
    the logits in place."""
    if errors:
        return plain(logits, *others)
    with noted(errors):
        for wants_gradient in (True, False):
            fast(logits.clone(), *others[:-1], wants_gradient)
    return plain(logits, *others)
