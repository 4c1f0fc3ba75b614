"""Names of keys: finding the key that a dotted name means, or the one that was probably meant."""

from difflib import get_close_matches

from torchtitan_mtp.config.setting import Option
from torchtitan_mtp.config.values import printable
from torchtitan_mtp.errors import UserError

# What others call a key: Hugging Face's TrainingArguments and config.json, Megatron, nanoGPT; and
# TorchTitan v0.1, where neither the key nor its spelling leads from there to today's.
ELSEWHERE = {
    "optimizer.lr": "learning_rate max_lr peak_lr",
    "lr_scheduler.warmup_steps": "warmup_ratio warmup_iters num_warmup_steps lr_warmup_iters",
    "lr_scheduler.decay_type": "lr_scheduler_type lr_decay_style",
    "lr_scheduler.min_lr_factor": "min_lr lr_min",
    "optimizer.implementation": "fused",
    "training.local_batch_size": "per_device_train_batch_size train_batch_size micro_batch_size",
    "training.global_batch_size": "gradient_accumulation_steps total_batch_size",
    "training.seq_len": "max_seq_length max_length block_size context_length seq_length",
    "training.steps": "max_steps max_iters train_iters num_train_epochs num_epochs epochs",
    "training.max_norm": "max_grad_norm grad_clip clip_grad gradient_clip_val",
    "training.mixed_precision_param": "bf16 fp16 torch_dtype",
    "training.dataset_path": "train_file data_path data_dir",
    "validation.local_batch_size": "per_device_eval_batch_size eval_batch_size",
    "validation.freq": "eval_steps eval_interval",
    "checkpoint.enable": "enable_checkpoint",
    "checkpoint.last_save_model_only": "model_weights_only",
    "checkpoint.interval": "save_steps save_interval checkpoint_interval",
    "checkpoint.keep_latest_k": "save_total_limit",
    "checkpoint.load_step": "resume_from_checkpoint resume",
    "compile.enable": "compile",
    "job.print_config": "print_args",
    "job.dump_folder": "output_dir out_dir save_dir",
    "metrics.log_freq": "logging_steps log_interval",
    "activation_checkpoint.mode": "gradient_checkpointing recompute_granularity",
    "model.hf_assets_path": "tokenizer_name_or_path tokenizer",
    "model.args.dim": "hidden_size n_embd",
    "model.args.n_layers": "num_hidden_layers n_layer num_layers",
    "model.args.n_heads": "num_attention_heads n_head",
    "model.args.n_kv_heads": "num_key_value_heads num_query_groups",
    "model.args.hidden_dim": "intermediate_size ffn_hidden_size",
    "mtp.num_future_tokens": "num_nextn_predict_layers mtp_num_layers n_future_tokens",
    "mtp.loss_scale": "mtp_loss_scaling_factor mtp_loss_weight",
}


def find(name: str, options: dict[str, Option], where: str, kind: str, prefix: str = "") -> Option:
    """The table or key of a dotted name.

    `where` starts a message ("run.toml: "), `kind` and `prefix` are its words for a name ("key" and
    "" in a file, "option" and "--" on the command line).

    Raises:
        UserError: there is no such name; with the nearest one.
    """
    if name in options:
        return options[name]
    for option in options.values():
        if name in option.rule.also_named:
            return option
    found = f"{where}unknown {kind} {prefix}{printable(name)}"
    if nearest := _nearest(name, options, tables=kind == "table"):
        raise UserError(f"{found}; did you mean {prefix}{nearest}?")
    raise UserError(f"{found}; docs/config.md lists all {kind}s")


def _nearest(name: str, options: dict[str, Option], tables: bool) -> str:
    """The table, or else key, that was probably meant: what the word means elsewhere, the same key
    of another table, then the closest spelling in its table, then in any; or an empty string."""
    table, _, key = name.rpartition(".")
    wanted = [option for option in options.values() if option.is_table == tables]
    for ours, words in ELSEWHERE.items():
        if key in words.split() and not tables:
            return ours
    others = [option.name for option in wanted if option.path[-1] == key]
    if len(others) == 1:
        return others[0]
    spelled = get_close_matches(table, [o.name for o in options.values() if o.is_table], n=1)
    anywhere = {option.path[-1]: option.name for option in reversed(wanted)}
    siblings = {o.path[-1]: o.name for o in wanted if ".".join(o.path[:-1]) in spelled}
    for candidates, cutoff in ((anywhere if tables else siblings, 0.6), (anywhere, 0.75)):
        if matches := get_close_matches(key, candidates, n=1, cutoff=cutoff):
            return candidates[matches[0]]
    return ""
