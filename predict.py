"""What a fine-tuned encoder says of texts: a label, marked entities, an answer, what is alike.

    python sample.py --checkpoint out/classify/best.pt --prompt "a gripping film"
    python sample.py --checkpoint out/tag/best.pt < lines.txt
    python sample.py --checkpoint out/answer/best.pt --context article.txt --prompt "Who was it?"
    python sample.py --checkpoint out/classify/best.pt --eval dev.tsv

Each text gets the answer that it would get alone, whatever shares its batch. Axes as in `model.py`;
k counts labels.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from data.buckets import pad_rows
from data.contexts import ask, read_answer
from data.encoding import PAD
from data.labelled import LabelledTexts, collate, encode_parts
from data.lines import answer_stdin, read_lines
from data.tagged import join_rows, sentence_rows
from data.tokens import AnyTokenizer
from engine import cli
from engine.checkpoint import TASKS
from engine.config import CONFIGS
from engine.evaluation import print_scores, score
from entities import marked, text_spans, words_of
from scores import confusion_table, draw_confusion


@dataclass
class PredictConfig:
    checkpoint: str = ""  # the file to load; empty: the newest below out/
    prompt: list[str] = field(default_factory=list)  # a text; may be repeated; none: read stdin
    eval: str = ""  # score a labelled file instead, of the kind that --data of train.py takes
    batch_size: int = 32  # texts at a time; --eval: as in training
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        cli.check_ranges(self, {"batch_size": (1, 2**20)})
        if self.eval and self.prompt:
            raise ValueError("--eval and --prompt are two things to do: give one of them")


@dataclass
class AskConfig(PredictConfig):
    prompt: list[str] = field(default_factory=list)  # a question; may be repeated; none: stdin
    context: str = ""  # the file with the text that holds the answers


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of rows of similar length, until all have come."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


# ---- a label -------------------------------------------------------------------------------------


@torch.no_grad()
def classify(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    config: PredictConfig,
    bar: tqdm | None = None,
    first: int = 0,
) -> list[str]:
    """For each text "positive 97.1%, negative 2.9%", the five likeliest labels at most; of a text
    without words, nothing. A tab divides the two texts of a model that labels pairs: ValueError if
    it is not there. `first`: prompts are lines of a text, this is the number of the first of them;
    such a line gets a note instead, and an empty answer."""
    rows, answers, n_cut = {}, [""] * len(prompts), 0
    for number, prompt in enumerate(prompts):
        parts = prompt.split("\t", 1) if model.config.pairs else [prompt]
        if not prompt.strip():
            continue
        if model.config.pairs and len(parts) < 2:
            wrong = "is one text, but this model labels pairs: put a tab between the two"
            if not first:
                raise ValueError(f"the prompt {prompt[:60]!r} {wrong}")
            tqdm.write(f"note: line {first + number:,} {wrong}", file=sys.stderr)
            continue
        rows[number], was_cut = encode_parts(tokenizer, parts, model.config.block_size)
        n_cut += was_cut
    if n_cut:
        most = model.config.block_size
        note = f"note: {n_cut:,} of {len(rows):,} texts are longer than the {most} tokens that the"
        tqdm.write(f"{note} model reads: their ends are left out", file=sys.stderr)
    numbers = list(rows)
    for batch in batches([sum(map(len, rows[i])) for i in numbers], config.batch_size):
        batch = [numbers[i] for i in batch]
        given = collate([rows[i] for i in batch], tokenizer)
        given = {name: tensor.to(device_of(model)) for name, tensor in given.items()}
        for i, shares in zip(batch, model(**given).softmax(-1), strict=True):
            best = shares.topk(min(5, len(model.config.labels)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            answers[i] = ", ".join(f"{model.config.labels[k]} {p:.1%}" for k, p in pairs)
        if bar is not None:
            bar.update(len(batch))
    if bar is not None:
        bar.update(len(prompts) - len(rows))
    return answers


def closing_confusion(
    model: nn.Module, tokenizer: AnyTokenizer, data: LabelledTexts, folder: Path
) -> list[str]:
    """What a training run of a classifier ends with: its confusions, as a table and a picture."""
    score(model, data)
    lines = [confusion_table(data.confusion, data.labels)]
    picture = draw_confusion(data.confusion, data.labels, folder / "confusion.png")
    return [*lines, f"as a picture: {picture}"] if picture else lines


# ---- entities ------------------------------------------------------------------------------------


@torch.no_grad()
def tag(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    config: PredictConfig,
    bar: tqdm | None = None,
    first: int = 1,
) -> list[str]:
    """Each text with its entities marked: [Barack Obama]person visited [Rome]location."""
    words = [words_of(text) for text in prompts]
    plain = [[word for word, _, _ in found] for found in words]
    rows = sentence_rows(plain, tokenizer, model.config.block_size)
    predicted: list[np.ndarray] = [np.empty(0)] * len(rows)
    for batch in batches([len(row.ids) for row in rows], config.batch_size):
        ids = [rows[i].ids for i in batch]
        tokens, keep = (
            x.to(device_of(model)) for x in pad_rows(ids, tokenizer.special_tokens[PAD])
        )
        labels = model(tokens, None if keep.all() else keep).argmax(-1).cpu().numpy()
        for i, found in zip(batch, labels, strict=True):
            predicted[i] = found
        if bar is not None:
            bar.update(len(batch))
    of_words, answers = join_rows(rows, predicted), []
    for number, (text, found) in enumerate(zip(prompts, words, strict=True)):
        tags = [model.config.labels[label] for label in of_words.get(number, [])]
        answers.append(marked(text, text_spans(tags, found)).rstrip("\n"))
    return answers


# ---- answers -------------------------------------------------------------------------------------


@torch.no_grad()
def answer_questions(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    asked: list[tuple[str, str]],
    config: PredictConfig,
) -> list[str]:
    """(question, context) -> "answer 87.3%: … the context around [answer] …"; of a model that may
    abstain also "no answer 65.0%"."""
    answers = []
    for question, text in asked:
        context, windows, rows = ask(tokenizer, question, text, model.config.block_size)
        logits: list[np.ndarray] = []
        for start in range(0, len(rows), config.batch_size):
            ids, segments = zip(*rows[start : start + config.batch_size], strict=True)
            tokens, keep = pad_rows(ids, tokenizer.special_tokens[PAD])
            given = [tokens, pad_rows(segments, 0)[0], keep]
            found = model(*(x.to(device_of(model)) for x in given))
            logits += list(found.cpu().numpy())
        best = read_answer(context, windows, logits, model.config.may_abstain)
        answers.append(shown_answer(text, best.start, best.end, best.probability))
    return answers


def shown_answer(text: str, start: int, end: int, probability: float, around: int = 40) -> str:
    if start == end:
        return f"no answer {probability:.1%}"
    before, behind = text[max(0, start - around) : start], text[end : end + around]
    before = f"…{before}" if start > around else before
    behind = f"{behind}…" if end + around < len(text) else behind
    place = " ".join(f"{before}[{text[start:end]}]{behind}".split())
    return f"{text[start:end]} {probability:.1%}: {place}"


def answer(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    config: AskConfig,
    bar: tqdm | None = None,
    first: int = 1,
) -> list[str]:
    """Answers to questions about --context, or, as a training run shows them, to a question and
    its context with a line end between."""
    if config.context:
        text = "\n".join(read_lines(Path(config.context)))
        asked = [(prompt.strip(), text) for prompt in prompts]
    else:
        asked = [tuple(prompt.split("\n", 1)) for prompt in prompts]
    found = answer_questions(model, tokenizer, asked, config)
    if bar is not None:
        bar.update(len(prompts))
    return found


def speak_answers(
    model: nn.Module, tokenizer: AnyTokenizer, config: AskConfig, checkpoint: dict
) -> None:
    if not config.eval and not Path(config.context).is_file():
        missing = f"{config.context} is no file here" if config.context else "is missing"
        raise ValueError(f"--context {missing}: name the text that holds the answers")
    speak(model, tokenizer, config, checkpoint)


# ---- the command line ----------------------------------------------------------------------------


def eval_data(checkpoint: dict, tokenizer: AnyTokenizer, config):
    """The data of the checkpoint's task in the file that --eval names, all of it."""
    if not Path(config.eval).is_file():
        raise ValueError(f"--eval {config.eval} is no file here: name one as for --data")
    Settings, (_, _, Data) = CONFIGS[checkpoint["task"]], TASKS[checkpoint["task"]]
    names = {f.name for f in fields(Settings)}
    said = {k: v for k, v in checkpoint["train_config"].items() if k in names}
    said |= {"data": config.eval, "valid": config.eval, "eval_tokens": 0}
    return Data.splits(Settings(**said), checkpoint["model_config"], tokenizer)[1]


def speak(
    model: nn.Module, tokenizer: AnyTokenizer, config: PredictConfig, checkpoint: dict
) -> None:
    """What `sample.py` does with these models: score a file, answer prompts, or lines of stdin."""
    respond = {"classify": classify, "tag": tag, "answer": answer}[checkpoint["task"]]
    if config.eval:
        data = eval_data(checkpoint, tokenizer, config)
        print_scores(model, data, config.eval)
        if checkpoint["task"] == "classify":
            print(confusion_table(data.confusion, data.labels))
    elif config.prompt:
        print("\n".join(respond(model, tokenizer, config.prompt, config)))
    else:

        def reply(lines: list[str], bar: tqdm, first: int) -> list[str]:
            return respond(model, tokenizer, lines, config, bar, first)

        answer_stdin(reply, 16 * config.batch_size, "line")
