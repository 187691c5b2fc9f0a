"""What other projects call our flags: `cli.Parser` answers such a name with ours.

The names are those of nanoGPT, Hugging Face's Trainer and models, PyTorch Lightning, fairseq and
llm.c, and what people type without any of them in mind.
"""

# Ours, with a note behind a comma where it is not the same thing: the names that others have. Of
# several lines with one name, the first whose flag the script has counts.
NAMES = {
    "row_length": "max_length max_seq_length max_seq_len",
    "max_new_tokens": "max_length max_tokens length n_tokens num_tokens new_tokens",
    "window": "sliding_window window_size",
    "block_size": "context_length context_len context_size context ctx ctx_len n_ctx seq_len "
    "seq_length sequence_length max_seq_len max_seq_length max_length max_position_embeddings "
    "n_positions model_max_length window_size",
    "n_layer": "n_layers num_layers num_layer num_hidden_layers layers depth n_blocks num_blocks",
    "n_head": "n_heads num_heads num_head num_attention_heads heads nhead",
    "n_kv_head": "num_key_value_heads n_kv_heads num_kv_heads kv_heads num_query_groups",
    "rope_theta": "rope_base theta",
    "n_embd": "hidden_size hidden_dim d_model dim model_dim embed_dim embedding_dim emb_dim "
    "n_embed n_emb embed_size embedding_size width",
    "n_ff": "intermediate_size d_ff ff_dim ffn_dim dim_feedforward n_inner mlp_dim hidden_ff",
    "dropout": "dropout_rate drop p_drop hidden_dropout_prob resid_pdrop embd_pdrop",
    "attention_dropout": "attention_probs_dropout_prob attn_pdrop attn_dropout",
    "label_smoothing": "label_smoothing_factor smoothing",
    "lr": "learning_rate learningrate max_lr base_lr peak_lr lr_max rate",
    "floor, a share of --lr": "min_lr lr_min final_lr min_learning_rate eta_min",
    "schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type decay_lr",
    "schedule cosine, which takes all of --steps": "lr_decay_iters lr_decay_steps",
    "cooldown, a share of the steps": "warmdown_iters warmdown_ratio cooldown_frac cooldown_steps",
    "warmup, in steps": "warmup_iters warmup_steps num_warmup_steps warmup_ratio warmup_updates",
    "steps": "max_iters iters iterations num_iters num_iterations n_iters max_steps num_steps "
    "n_steps train_steps num_train_steps total_steps max_updates",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs epoch",
    "minutes": "time max_time time_limit",
    "batch_size": "bs batch batchsize per_device_train_batch_size per_gpu_train_batch_size "
    "per_device_batch_size device_batch_size train_batch_size micro_batch_size mbs "
    "per_device_eval_batch_size eval_batch_size",
    "tokens_per_step, from which accumulation follows": "gradient_accumulation_steps "
    "gradient_accumulation grad_accum grad_accum_steps grad_accumulation accumulation_steps "
    "accumulate_grad_batches accumulate accum update_freq total_batch_size global_batch_size "
    "max_tokens",
    "optimizer": "optim optimiser opt",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2 betas adam_betas",
    "weight_decay": "wd decay l2",
    "clip": "grad_clip max_grad_norm gradient_clip_val gradient_clip clip_grad clip_norm",
    "eval_interval": "eval_steps eval_every eval_freq evaluation_interval val_interval val_every "
    "save_steps save_every save_interval checkpoint_every checkpoint_interval val_check_interval",
    "eval_tokens": "eval_iters val_iters val_loss_every val_max_steps limit_val_batches",
    "log_interval": "logging_steps log_every log_every_n_steps log_freq print_every",
    "keep": "save_total_limit keep_last keep_checkpoints",
    "seed": "random_seed manual_seed rng_seed",
    "data": "dataset dataset_name dataset_dir data_dir data_path data_file train_data train_file "
    "train_path train_bin training_file training_data corpus input input_file text file",
    "valid": "validation_file valid_file val_file eval_file val_data valid_data validation_data "
    "eval_data dev dev_file validation val",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_file tokenizer_name_or_path tok",
    "vocab_size": "vocab vocabulary_size n_vocab num_tokens",
    "out": "output_dir output out_dir outdir save_dir save_path log_dir logdir run_dir run_name",
    "checkpoint": "model model_path model_name_or_path ckpt ckpt_path checkpoint_path load weights "
    "out_dir run pretrained",
    "init, a checkpoint; python convert.py import makes one of a Hugging Face model": "init_from "
    "model_name_or_path model_name pretrained pretrained_model pretrained_model_name_or_path "
    "from_pretrained base_model checkpoint ckpt load load_from model_path finetune_from weights",
    "resume, with the run's folder as --out": "resume_from_checkpoint resume_from continue "
    "load_checkpoint ckpt_path restore always_save_checkpoint",
    "preset": "config config_file config_name config_path cfg recipe model_size size variant",
    "model": "model_type arch architecture task",
    "device": "gpu use_cuda cuda use_gpu no_cuda use_cpu cpu accelerator",
    "dtype": "bf16 fp16 fp32 half amp mixed_precision precision torch_dtype float16 bfloat16",
    "compile": "torch_compile use_compile",
    "recompute": "gradient_checkpointing activation_checkpointing grad_checkpoint checkpointing",
    "shard": "fsdp zero zero_stage deepspeed sharded_ddp",
    "lora_rank": "lora_r lora lora_alpha lora_dim rank",
    "layer_decay": "llrd layerwise_lr_decay lr_layer_decay",
    "freeze": "freeze_layers freeze_encoder num_freeze_layers",
    "seeds": "num_seeds n_seeds num_runs",
    "prompt": "start prompts input text sentence",
    "num_samples": "num_return_sequences n_samples samples n num",
    "temperature": "temp t do_sample",
    "top_k": "topk k",
    "top_p": "topp nucleus p",
    "beam": "num_beams beam_size beam_width beams",
    "length_penalty": "lenpen alpha",
    "stop": "stop_sequences stop_string stop_token stop_strings",
    "eval": "do_eval evaluate score test test_file",
}

# What has no flag here: the names, and what there is instead.
INSTEAD = {
    "wandb wandb_log wandb_project wandb_run_name use_wandb report_to tensorboard tensorboard_dir "
    "logger": "the figures of a run are in its folder, in log.jsonl and curves.png",
    "num_workers dataloader_num_workers workers": "batches are made without workers",
    "n_gpu num_gpus gpus ngpus devices num_gpu world_size nproc nproc_per_node num_processes ddp "
    "multi_gpu": "several processes are started by torchrun --standalone --nproc_per_node=N "
    "train.py, see docs/distributed.md",
    "adam_epsilon adam_eps eps": "Adam's epsilon is torch's, 1e-8",
    "do_train": "train.py trains and evaluates",
    "overwrite_output_dir overwrite": "no run is written over: choose another --out",
}


def ours(name: str, known: list[str]) -> str:
    """What to say of a flag's name without its dashes, given the flags that there are; "" where
    nobody is known to call a flag so."""
    for flag, names in NAMES.items():
        if name in names.split() and f"--{flag.partition(',')[0].partition(' ')[0]}" in known:
            return f"here it is --{flag}"
    return next((said for names, said in INSTEAD.items() if name in names.split()), "")
