"""What a network is trained for, one file each, and the one table of what `--model NAME` may be.

A row is a name, the network's class and the task's module, as strings that are imported when asked
for, so that a script loads what it uses and nothing else. A new language model is a file in models/
and a row here; a new task is a file in tasks/ and a row here; see docs/your-own.md.

A network's class has

    Config       the dataclass of its sizes, vocab_size and block_size among them; the network keeps
                 it as .config. A field with the metadata flag=False is no flag of train.py; with
                 free=True may be changed by --init; with
                 from_data=True the run takes it from the attribute of the same name of its training
                 data (the labels of a classifier)
    forward      **batch -> {name: summed loss} for each "…targets" of the batch ("mlm_targets" has
                 the loss "mlm", plain "targets" the loss "loss"). It may add losses of its own,
                 named "…_loss", which training makes smaller too, and other sums, which are
                 reported. In evaluation it may also return "predicted", for Data.measure
    flops_per_token()  floating-point operations that training takes, for the plan

and, where it is to do more:

    features, head, make_caches      as GPT has them: tasks/text.py and complete.py write with them;
                                     captured steps of a GPU (engine/graphs.py) need `positions` too
    model.Block inside               for --recompute, and for the blocks of --shard model
    begins_from = (classes,)         --init may begin from a checkpoint of these networks too; then
                                     no other network begins from one of this
    names as in finetune.py          (blocks, …embedding, HEADS) to be fine-tuned
    count(ids)                       reads all of Data.ids once instead of learning by steps
                                     (engine/counting.py); then it has buffers, not parameters
    endless = True                   what writes goes on past block_size: nothing is dropped
    keep, a tensor of the batch      says which rows go on from the last batch (tasks/stream.py).
                                     The state is a buffer, another one in evaluations, and new in
                                     each call, so that the compiler's trial can be undone

A task's module has

    Flags        the dataclass of train.py's flags: TrainConfig or FinetuneConfig of tasks/flags.py,
                 with defaults and fields of its own
    Data         what becomes batches; see below
    GOAL         the figure of Data.report or Data.measure by which best.pt is chosen
    LOWER_IS_BETTER  whether a lower figure is the better one
    SampleFlags  the dataclass of sample.py's flags
    sample(model, tokenizer, flags, checkpoint, score)  does what sample.py is asked to, and prints
                 it; score(data) prints the model's figures on --eval's data. checkpoint: all of it
                 but the tensors
    show(model, tokenizer, data, folder) -> [text]  what is printed when a run ends, from its best
                 model; data are those that validate; pictures go into folder, the run's
    ask(prompts) -> the flags with which sample.py prints more of that kind
    batch_shapes(flags, config, B, T) -> {argument of forward: shape} of a full micro-batch of
                 B rows of T tokens, for the plan of memory. Names that end in "keep" are bool,
                 "weights" are floats, and all others ids

Data has

    special_tokens                      the special tokens that its tokenizer needs
    needs_bytes                         True, optional: only tokens that are bytes will do
    splits(flags, sizes, tokenizer)     (training data, validation data). sizes are the network's
                                        settings as a dict; tokenizer None: see data/tokens.py
    batch(i)     a pure function of (seed, split, i) -> {argument of the network's forward: tensor};
                 a tensor whose name ends in "targets" marks "no target" with -100
    tokens_per_batch, tokens_per_epoch, n_batches       the last of an evaluation
    report(sums, counts) -> {name: figure}, "loss" among them; both are sums over an evaluation,
                 of what forward returns and of targets
    measure(predicted) -> {name: figure}, optional: figures that need all predictions together;
                 predicted[i] is the array that the network returned as "predicted" for batch i
    details() -> text, optional: more about the last evaluation, printed behind --eval's figures
    tokenizer, fingerprint              the latter a hash of the text and its division
    prompts      a few inputs as a user would write them, of the text that validates
    rule, describe()                    for the plan: how the text was divided, how much there is
"""

import importlib
from types import ModuleType

TABLE = {
    "gpt": ("model.GPT", "tasks.text"),
    "llama": ("models.llama.Llama", "tasks.text"),
    "moe": ("models.moe.MoE", "tasks.text"),
    "variant": ("models.variants.Variant", "tasks.text"),
    "sparse_gpt": ("models.sparse.SparseGPT", "tasks.text"),
    # Before the Transformer.
    "ngram": ("models.ngram.NGram", "tasks.text"),
    "cbow": ("models.feedforward.CBOW", "tasks.text"),
    "nnlm": ("models.feedforward.NNLM", "tasks.text"),
    "cnn": ("models.feedforward.GatedCNN", "tasks.text"),
    "rnn": ("models.recurrent.RNN", "tasks.stream"),
    "gru": ("models.recurrent.GRU", "tasks.stream"),
    "lstm": ("models.recurrent.LSTM", "tasks.stream"),
    "bert": ("bert.BERT", "tasks.masked"),
    "fnet": ("models.fnet.FNet", "tasks.masked"),
    "sparse_bert": ("models.sparse.SparseBERT", "tasks.masked"),
    "linformer": ("models.sparse.Linformer", "tasks.masked"),
    "seq2seq": ("seq2seq.Seq2Seq", "tasks.translation"),
    # Fine-tuning: a pretrained encoder, or a decoder, with labelled data.
    "classify": ("tasks.classify.Classifier", "tasks.classify"),
    "tag": ("tasks.tag.Tagger", "tasks.tag"),
    "answer": ("tasks.answer.Answerer", "tasks.answer"),
    "similar": ("tasks.similar.Similarity", "tasks.similar"),
    "complete": ("model.GPT", "tasks.complete"),
    "complete_llama": ("models.llama.Llama", "tasks.complete"),
    "complete_moe": ("models.moe.MoE", "tasks.complete"),
}


def network(name: str) -> type:
    """The class of the network in the row `name`."""
    module, _, cls = TABLE[name][0].rpartition(".")
    return getattr(importlib.import_module(module), cls)


def counts(name: str) -> bool:
    """Whether the network in the row `name` counts its text once instead of learning by steps."""
    return hasattr(network(name), "count")


def task(name: str) -> ModuleType:
    """The module of the task in the row `name`."""
    return importlib.import_module(TABLE[name][1])
