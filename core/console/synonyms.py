"""What other programs call our flags: a wrong flag suggests the one that is meant, whatever its letters."""

from __future__ import annotations

from collections.abc import Collection

PATH = "PATH"
"""Stands for the path that a script takes without a flag."""

_MEANINGS: dict[str, str] = {
    "learning_rate": "lr max_lr peak_lr base_lr init_lr step_size",
    "min_lr": "lr_min eta_min final_lr end_lr min_learning_rate lr_end",
    "batch_size": "batch bs b mini_batch micro_batch micro_batch_size per_device_train_batch_size train_batch_size "
    "global_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_acc accum accumulation accumulate accumulate_grad_batches "
    "gradient_accumulation grad_accum_steps accumulation_steps",
    "max_iters": "iters iter iterations steps max_steps num_steps n_steps train_iters train_steps num_iterations "
    "num_train_steps total_steps total_iters n_iters max_iter epochs epoch num_epochs n_epochs max_epochs "
    "num_train_epochs",
    "warmup_iters": "warmup warmup_steps num_warmup_steps lr_warmup_iters lr_warmup_steps warmup_ratio",
    "lr_decay_iters": "decay_iters decay_steps lr_decay_steps t_max",
    "lr_schedule": "schedule scheduler lr_scheduler lr_scheduler_type decay_lr lr_decay_style",
    "weight_decay": "wd decay l2",
    "grad_clip": "clip clip_grad clip_grad_norm max_grad_norm max_norm gradient_clip gradient_clip_val",
    "block_size": "context context_length context_size ctx ctx_len n_ctx seq_len seq_length sequence_length "
    "max_seq_len max_seq_length n_positions block max_length",
    "n_layer": "layers layer depth num_layers num_hidden_layers n_layers nlayer",
    "n_head": "heads head num_heads num_attention_heads n_heads nhead",
    "n_embd": "dim d_model hidden hidden_size hidden_dim width embed_dim emb_dim embd n_embed model_dim",
    "dropout": "drop drop_rate dropout_rate p_drop",
    "arch": "architecture model_type family",
    "input_file": "data dataset text file input corpus train_file data_path data_file train_data input_path",
    "dataset_dir": "data_dir dataset_path dataset_folder bin_dir",
    "tokenization": "tokenizer tokenizer_name tokenizer_path vocab encoding vocab_file",
    "model_name": "name run_name run model exp_name experiment exp job_name",
    "out": "out_dir output output_dir save_dir output_path o",
    "output_path": "out output out_dir output_dir dst dest destination target save_path save_dir o",
    "checkpoint_root": "root out_dir output_dir save_dir ckpt_dir checkpoint_dir checkpoints log_dir "
    "default_root_dir save_path output",
    "init_from_checkpoint": "init_from from_pretrained pretrained finetune checkpoint ckpt ckpt_path "
    "checkpoint_path weights load model_path model_name_or_path load_from",
    "resume_from": "resume resume_from_checkpoint restart rollback go_back from_step",
    "save_interval": "save_every save_steps save_freq checkpoint_interval ckpt_every ckpt_interval "
    "checkpoint_every save_iters",
    "eval_interval": "eval_every eval_steps eval_freq val_interval val_every val_check_interval",
    "eval_iters": "eval_batches val_iters val_batches limit_val_batches",
    "keep": "keep_last save_total_limit max_to_keep save_top_k keep_n max_checkpoints",
    "dtype": "precision mixed_precision amp fp16 bf16 fp32 half float16 bfloat16 torch_dtype",
    "device": "gpu gpus cuda cpu accelerator",
    "compile": "torch_compile",
    "seed": "random_seed manual_seed",
    "parallel": "distributed strategy ddp fsdp",
    "ema": "ema_decay",
    "prompt": "start text input prefix begin",
    "max_new_tokens": "tokens max_tokens num_tokens n_tokens new_tokens length max_length n_predict",
    "num_samples": "samples n n_samples num_return_sequences num_sequences count",
    "temperature": "temp t",
    "top_k": "k topk",
    "top_p": "p topp nucleus",
    "stop": "stop_text stop_word stop_words stop_token stop_sequence stop_sequences stop_strings eos until",
    "step": "iteration iter steps at_step checkpoint_step",
    PATH: "checkpoint ckpt ckpt_path checkpoint_path weights model_path file src source input input_path load path",
    "to": "format output_format target_format to_format",
    "dry_run": "dry dryrun simulate plan n",
    "overwrite": "force f",
    "verify": "check checksum checksums checksum_check",
    "stats": "statistics stat",
    "html": "plot page report",
    "history": "log steps",
    "diff": "compare",
    "quiet": "silent q no_progress no_progress_bar disable_tqdm",
    "help_all": "full_help help_full all_flags",
}
"""Our flag, and the usual names for it; of several flags the first that a script has is meant."""

_REMARKS = {
    "epoch": "which counts steps, not passes over the text",
    "warmup_ratio": "a number below 1 is a fraction of --lr_decay_iters",
    "checkpoint_root": "the folder of all models; --model_name names the one in it",
    "resume_from": "the same command resumes by itself; this goes back to a kept step",
    PATH: "a path needs no flag",
}
"""What a flag does otherwise than the user may think: by our flag, or by a part of the name that was typed."""

_OTHERWISE = {"fp16": "--dtype fp16", "bf16": "--dtype bf16", "fp32": "--dtype fp32", "half": "--dtype fp16"}
_OTHERWISE |= {"float16": "--dtype fp16", "bfloat16": "--dtype bf16", "cpu": "--device cpu", "cuda": "--device cuda"}
_OTHERWISE |= {"ddp": "--parallel ddp", "fsdp": "--parallel fsdp"}
"""Names that are a value of our flag."""


def suggested(word: str, flags: Collection[str]) -> str | None:
    """Suggest what to type for the flag of another program: "--max_iters (...)"; None for a name that none has.

    `flags` are those of the script, without dashes, and PATH where it takes a path.
    """
    name = word.lstrip("-").replace("-", "_").lower()
    for ours, names in _MEANINGS.items():
        if ours not in flags or name not in names.split():
            continue
        spelling = ours if ours == PATH else _OTHERWISE.get(name, f"--{ours}")
        about = next((text for key, text in _REMARKS.items() if key == ours or key in name), None)
        return f"{spelling} ({about})" if about else spelling
    return None
