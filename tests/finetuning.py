"""What the tests of fine-tuning share: random models with their batches, and small problems, as
files, that can be learnt in seconds."""

import json
from pathlib import Path
from random import Random

import torch
import torch.nn as nn
from converting import noisy
from test_seq2seq import without

from bert import BERT, BERTConfig, EncoderConfig
from model import GPT, GPTConfig
from tasks.answer import AnswerConfig, Answerer
from tasks.classify import Classifier, LabelConfig
from tasks.similar import Similarity
from tasks.tag import TagConfig, Tagger

# ---- models --------------------------------------------------------------------------------------

# Sizes that are all different, so that swapped axes show.
V, T, L, H, C, N_FF, B, K = 37, 13, 3, 4, 28, 44, 5, 6
SIZES = {"vocab_size": V, "block_size": T + 2, "n_layer": L, "n_head": H, "n_embd": C}
SIZES |= {"n_ff": N_FF, "dropout": 0.0, "attention_dropout": 0.0}
LENGTHS = torch.tensor([T, 6, 9, 4, 11])
LABELS = tuple("abcdef")


def model_of(task: str, **changes) -> nn.Module:
    sizes = {**SIZES, **changes}
    model = {
        "classify": lambda: Classifier(LabelConfig(**sizes, labels=LABELS)),
        "tag": lambda: Tagger(TagConfig(**sizes, labels=LABELS)),
        "answer": lambda: Answerer(AnswerConfig(**sizes)),
        "similar": lambda: Similarity(EncoderConfig(**sizes)),
        "bert": lambda: BERT(BERTConfig(**sizes)),
        "masked": lambda: BERT(BERTConfig(**sizes, nsp=False)),
        "complete": lambda: GPT(GPTConfig(**without(sizes, "attention_dropout"))),
    }[task]()
    return noisy(model)


def batch_of(task: str) -> dict[str, torch.Tensor]:
    """Rows of unlike lengths; what stands at padding is as random as the rest. Row 2 has no target,
    and of a pair's rows neither of the two."""
    keep = torch.arange(T) < LENGTHS[:, None]
    batch = {"tokens": torch.randint(V, (B, T)), "keep": keep}
    if task in ("classify", "answer"):
        batch["segments"] = (torch.arange(T) >= LENGTHS[:, None] // 2).long()
    row = torch.arange(B)
    if task == "classify":
        batch["targets"] = torch.where(row == 2, -100, torch.randint(K, (B,)))
    elif task == "tag":
        asked = keep & (torch.rand(B, T) < 0.7) & (row != 2)[:, None]
        batch["targets"] = torch.where(asked, torch.randint(K, (B, T)), -100)
    elif task == "answer":
        for name in ("start_targets", "end_targets"):
            batch[name] = torch.where(row == 2, -100, (torch.rand(B) * LENGTHS).long())
    elif task == "similar":
        batch["tokens"] = torch.randint(V, (2 * B, T))
        batch["keep"] = torch.cat([keep, keep.flip(0)])
        batch["targets"] = torch.where(row == 2, -100, row)
    return batch


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if not name.endswith("targets")}


def losses_in(sums: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(value for name, value in sums.items() if name in ("loss", "start", "end"))


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


# ---- problems ------------------------------------------------------------------------------------

FILLERS = [
    "the",
    "red",
    "old",
    "small",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "park",
    "today",
    "very",
    "slow",
    "again",
]
PEOPLE, PLACES = ["Anna", "Berta", "Carl", "Dora", "Emil"], ["Rome", "Paris", "Oslo", "Bonn"]
THINGS = ["hat", "key", "cup", "pen", "map"]

# Of a run.
RUN_SIZES = ["--block_size=24", "--n_layer=2", "--n_head=2", "--n_embd=28", "--n_ff=40"]
RUN = ["--batch_size=64", "--tokens_per_step=768", "--warmup=5", "--log_interval=1", "--lr=0.003"]
RUN += ["--device=cpu", "--dtype=fp32"]
FILES = {
    "classify": "labels.tsv",
    "tag": "tags.conll",
    "answer": "squad.json",
    "similar": "pairs.tsv",
    "complete": "prompts.jsonl",
}
TASKS = tuple(FILES)


def flags(task: str, *more: str) -> list[str]:
    """A run of the task from random weights, on its files."""
    dropout = ["--dropout=0"] if task == "complete" else ["--dropout=0", "--attention_dropout=0"]
    return [f"--model={task}", *of(task), "--vocab_size=420", *RUN_SIZES, *RUN, *dropout, *more]


def of(task: str) -> list[str]:
    """The data of the task; alone, for a run that has --init."""
    return [f"--data={FILES[task]}", f"--valid=valid-{FILES[task]}"]


def write_files(folder: Path) -> Path:
    """For each task a file to learn from and one to validate with."""
    random = Random(7)
    for start, number in (("", 150), ("valid-", 37)):
        for task, make in MAKERS.items():
            content = make(random, number)
            (folder / f"{start}{FILES[task]}").write_text(content, encoding="utf-8")
    return folder


def words(random: Random, least: int, most: int) -> list[str]:
    return random.choices(FILLERS, k=random.randint(least, most))


def labels(random: Random, number: int) -> str:
    """One word decides, wherever it stands."""
    kinds = {"good": "plus", "fine": "plus", "bad": "minus", "poor": "minus", "odd": "other"}
    rows = ["text\tlabel"]
    for _ in range(number):
        word, text = random.choice(list(kinds)), words(random, 0, 6)
        text.insert(random.randint(0, len(text)), word)
        rows.append(f"{' '.join(text)}\t{kinds[word]}")
    return "\n".join(rows)


def tags(random: Random, number: int) -> str:
    """Names out of two lists; a place has two words."""
    sentences = []
    for _ in range(number):
        parts = [f"{word}\tO" for word in words(random, 1, 4)]
        parts.append(f"{random.choice(PEOPLE)}\tB-person")
        parts.append(f"New\tB-place\n{random.choice(PLACES)}\tI-place")
        random.shuffle(parts)
        sentences.append("\n".join(parts))
    return "\n\n".join(sentences)


def squad(random: Random, number: int, nobody: float = 0.0) -> str:
    """The person of the context, who stands anywhere; of a share of the contexts it is nobody."""
    paragraphs = []
    for n in range(number):
        person, thing = random.choice(PEOPLE), random.choice(THINGS)
        person = "nobody" if n < nobody * number else person
        context = [*words(random, 0, 6), person, "has", "the", thing, *words(random, 0, 3)]
        context = " ".join(context)
        answer = {"text": person, "answer_start": context.index(person)}
        qa = {"question": f"who has the {thing}?", "answers": [answer]}
        if nobody:
            nothing = person == "nobody"
            qa |= {"is_impossible": nothing, "answers": [] if nothing else [answer]}
        paragraphs.append({"context": context, "qas": [qa]})
    return json.dumps({"data": [{"paragraphs": paragraphs}]})


def pairs(random: Random, number: int) -> str:
    """The same words in another order."""
    rows = ["text\ttext_b"]
    for _ in range(number):
        some = random.sample(FILLERS, 3)
        rows.append(f"{' '.join(some)}\t{' '.join(random.sample(some, 3))}")
    return "\n".join(rows)


def prompts(random: Random, number: int) -> str:
    """A word and its answer, behind a word that says nothing."""
    rows = []
    for _ in range(number):
        n = random.randrange(len(THINGS))
        prompt, answer = f"{random.choice(FILLERS)} {THINGS[n]} of", f" {PEOPLE[n]} {THINGS[n]}"
        rows.append(json.dumps({"prompt": prompt, "completion": answer}))
    return "\n".join(rows)


MAKERS = {"classify": labels, "tag": tags, "answer": squad, "similar": pairs, "complete": prompts}
