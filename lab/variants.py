"""What if the Transformer had other parts? Each change is trained on the same text, and compared.

    python -m lab.variants               tables and pictures: three seeds of each row
    python -m lab.variants --quick       one seed, few steps, ten minutes on two cores
    python -m lab.variants --only swiglu,rotary,"attention alone"

All rows are runs of train.py on Tiny Shakespeare, character by character, with the network and the
optimizer of --preset gpt-shakespeare, for fewer steps, and scored on a part of the validation text.
Each changes what its flags say and nothing else. Nothing is tuned for a row: what a paper's change
needs beside itself (another rate, another warmup, more depth) it does not get. --flags gives other
settings to all rows.

Decoders are compared with GPT, and encoders, which fill in masked words, with BERT.

Last, the rank: how far the vectors of a text differ from each other, layer by layer, in networks at
their initialisation. In attention without skip connections they become one and the same, doubly
exponentially in depth (Dong et al. 2021, arXiv:2103.03404).
"""

import engine.waiting  # isort: skip  # noqa: F401  (before torch is loaded)
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import cli
from lab import sweep
from lab.pictures import new_figure, new_picture, save
from models.variants import Variant, VariantConfig
from tasks.flags import ranged

TEXT = "--data shakespeare --block_size 64 --batch_size 32 --tokens_per_step 2048 --dtype fp32"
RECIPE = "--optimizer muon --lr 7e-3 --cooldown 1 --eval_tokens 32768 --device cpu"
SIZES = "--n_layer 4 --n_embd 128"
DECODER = f"--model variant --pattern char --vocab_size 257 {TEXT} {RECIPE} {SIZES} --n_head 4"
ENCODER = f"--model bert --vocab_size 1024 --nsp false --dropout 0 {TEXT} {RECIPE} {SIZES}"

# row: the flags by which it differs from the first one
DECODERS = {
    "GPT": "",
    # inside the feed-forward layer
    "relu": "--act relu",
    "swish": "--act swish",
    "elu": "--act elu",
    "selu": "--act selu",
    "sigmoid": "--act sigmoid",
    "softplus": "--act softplus",
    "softmax": "--act softmax",
    "squared relu": "--act relu2",
    "glu": "--act glu",
    "reglu": "--act reglu",
    "geglu": "--act geglu",
    "swiglu": "--act swiglu",
    "bilinear": "--act bilinear",
    # norms and residual connections
    "RMSNorm": "--norm rms",
    "post-LN": "--residual post_ln",
    "DeepNorm": "--residual deepnorm",
    "ReZero": "--residual rezero",
    "Fixup": "--residual fixup",
    "no skip connections": "--residual none",
    # the order of the sublayers
    "sandwich 1": "--order ssfsfsff",
    "sandwich 2": "--order sssfsfff",
    "s before f": "--order ssssffff",
    "f before s": "--order ffffssss",
    "fsfs": "--order fsfsfsfs",
    # without one of the two, at the same number of parameters
    "attention alone": "--order ssssssssssss",
    "feed-forward alone": "--order ffffff",
    # other weights in place of attention's
    "dense Synthesizer": "--mixing dense",
    "random Synthesizer": "--mixing random",
    # positions
    "no positions": "--positions none",
    "sinusoidal": "--positions sinusoidal",
    "learned sinusoidal": "--positions learned_sinusoidal",
    "T5": "--positions t5",
    "Shaw": "--positions shaw",
    "ALiBi": "--positions alibi",
    "rotary": "--positions rotary",
    # shared weights
    "shared (ALBERT)": "--shared all",
    "shared (Universal)": "--shared universal --positions none",
    "shared at width 256": "--shared all --n_embd 256",
    # depth and width, at the same number of parameters in the blocks
    "1 layer of 256": "--n_layer 1 --n_embd 256",
    "2 layers of 180": "--n_layer 2 --n_embd 180",
    "8 layers of 92": "--n_layer 8 --n_embd 92",
    "16 layers of 64": "--n_layer 16 --n_embd 64",
    # embeddings and output
    "factorised embeddings": "--embedding_width 32",
    "untied": "--tied false",
    "factorised and untied": "--embedding_width 32 --tied false",
    "4 softmaxes": "--n_softmax 4",
    # sparse attention
    "window 8": "--model sparse_gpt --window 8 --sparse_block 16",
    "window 32": "--model sparse_gpt --window 32 --sparse_block 16",
    "dilated window 8": "--model sparse_gpt --window 8 --dilation 4 --sparse_block 16",
    # more than one change
    "Llama": "--model llama",
    "2 of 8 experts": "--model moe --n_ff 176",
}
ATTENTION = "--n_head 4 --attention_dropout 0"
ENCODERS = {
    "BERT": ATTENTION,
    "FNet": "--model fnet",
    "window 9": f"--model sparse_bert {ATTENTION} --window 9 --sparse_block 16 --n_global 0",
    "window 33": f"--model sparse_bert {ATTENTION} --window 33 --sparse_block 16 --n_global 0",
    "Linformer 16": f"--model linformer {ATTENTION} --n_keys 16",
}


@dataclass
class VariantsConfig(sweep.SweepConfig):
    seeds: int = ranged(0, 0, 1000)  # runs of each row; 0: 3, with --quick 1
    # 1: one run after the other, with all threads; more: so many at once, with a thread each
    workers: int = ranged(2, 1, 256)
    steps: int = ranged(0, 0)  # of each run; 0: 300, with --quick 60
    quick: bool = False  # ten minutes instead of an hour or two
    only: str = ""  # some of the rows, with commas; the first of their table is added; empty: all
    flags: str = ""  # of train.py, for all rows
    runs: str = "out/variants"  # where the runs are kept: those that are there are not repeated
    # the picture of the decoders; all else lies beside it: encoders, rank, tables, figures
    out: str = "out/variants.png"

    def __post_init__(self):
        super().__post_init__()
        self.seeds = self.seeds or (1 if self.quick else 3)
        self.steps = self.steps or (60 if self.quick else 300)
        names = [*DECODERS, *ENCODERS, RANK]
        self.chosen = [name.strip() for name in self.only.split(",")] if self.only else names
        for name in self.chosen:
            if name not in names:
                raise ValueError(f"--only {name} is no row: choose {', '.join(names)}")

    def wanted(self, rows: dict[str, str]) -> dict[str, str]:
        """The rows of a table that are to be trained, with what they are compared with in front."""
        found = {name: flags for name, flags in rows.items() if name in self.chosen}
        return {**dict([next(iter(rows.items()))]), **found} if found else {}


# ---- the rank ------------------------------------------------------------------------------------

RANK = "rank"  # its name for --only
DEEP = {"n_layer": 12, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 64}
NETWORKS = {
    "attention and feed-forward": {},
    "attention alone": {"order": "s" * 12},
    "attention and feed-forward, no skip connections": {"residual": "none"},
    "attention alone, no skip connections": {"order": "s" * 12, "residual": "none"},
}


def difference(x: Tensor) -> float:
    """x (B, T, C) -> |x - mean over the places| / |x|: 0 if all places have the same vector."""
    return ((x - x.mean(1, keepdim=True)).norm() / x.norm()).item()


def effective_rank(x: Tensor) -> float:
    """x (B, T, C) -> exp of the entropy of the singular values of each text's (T, C), as shares of
    their sum; a mean over the texts (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(x.double())
    p = values / values.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp().mean().item()


@torch.no_grad()
def layer_by_layer(network: Variant, tokens: Tensor) -> list[Tensor]:
    """The features behind the embeddings and behind each sublayer, each (B, T, C). All places see
    all others, as in the paper."""
    found: list[Tensor] = []
    network.blocks[0].register_forward_pre_hook(lambda block, inputs: found.append(inputs[0]))
    for block in network.blocks:
        block.register_forward_hook(lambda block, inputs, output: found.append(output))
    network.features(tokens, mask=None)
    return found


def ranks() -> dict[str, list[tuple[float, float]]]:
    """{network: (difference, effective rank) at the embeddings and behind each sublayer}, for
    random texts. The matrices are three times as large as usual: at 0.02 all scores are so near to
    0 that attention is nothing but a mean."""
    found = {}
    for name, settings in NETWORKS.items():
        torch.manual_seed(1337)
        network = Variant(VariantConfig(**DEEP, **settings)).double().eval()
        with torch.no_grad():
            for block in network.blocks:
                for p in block.sublayer.parameters():
                    p.mul_(3.0)
        tokens = torch.randint(DEEP["vocab_size"], (8, DEEP["block_size"]))
        layers = layer_by_layer(network, tokens)
        found[name] = [(difference(x), effective_rank(x)) for x in layers]
    return found


def rank_table(found: dict[str, list[tuple[float, float]]]) -> str:
    sublayers = (0, 1, 2, 3, 4, 6, 8, 12, 24)
    head = " | ".join(map(str, sublayers))
    lines = [f"| difference of the places behind sublayer | {head} | rank at the end |"]
    lines.append("|---" * (len(sublayers) + 2) + "|")
    for name, values in found.items():
        cells = [f"{values[i][0]:.2g}" if i < len(values) else "-" for i in sublayers]
        lines.append(f"| {name} | {' | '.join(cells)} | {values[-1][1]:.1f} |")
    return "\n".join(lines)


def draw_ranks(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    figure = new_figure(path, 7, 4)
    if figure is None:
        return
    panel = figure.subplots()
    for name, values in found.items():
        panel.plot([value for value, _ in values], "o-", markersize=3, label=name)
    panel.set(yscale="log", xlabel="sublayers", ylabel="difference of the places, |x - mean| / |x|")
    panel.set_ylim(bottom=1e-17)
    panel.legend(fontsize=8)
    figure.suptitle("Without skip connections attention makes all places alike", fontsize=9)
    save(figure, path, sweep.OURS)


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Train variants of the Transformer on the same text, and compare them.")
    cli.add_flags(parser, VariantsConfig, "variants")
    config = VariantsConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    length = f"--steps {config.steps} --eval_interval {max(1, config.steps // 4)} {config.flags}"
    decoders = sweep.new_files(config.out)  # all of them before an hour is spent
    stem = decoders[0].with_suffix("")
    encoders = sweep.new_files(f"{stem}-encoders.png")
    picture, beside = new_picture(f"{stem}-{RANK}.png", sweep.OURS, ".md")
    groups = (
        (config.wanted(DECODERS), f"{DECODER} {length}", decoders),
        (config.wanted(ENCODERS), f"{ENCODER} {length}", encoders),
    )
    for rows, base, _ in groups:  # what a row refuses is said now, too
        sweep.plan_jobs(rows, base, config)
    for rows, base, files in groups:
        if rows:
            sweep.show(sweep.run_rows(rows, base, config), base, files)
    if RANK in config.chosen:
        found = ranks()
        text = f"Measured by {sweep.OURS}.\n\n{rank_table(found)}"
        print(text)
        beside.write_text(f"{text}\n", encoding="utf-8")
        draw_ranks(found, picture)


if __name__ == "__main__":
    cli.run(main)
