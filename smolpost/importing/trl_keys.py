"""What the keys of TRL's scripts become that no code of `trl` reads, and keys that are no longer TRL's.

Of TRL 1.16 and transformers 5.23; a test compares the names with the installed classes.
"""

# What is said -> keys that do not change what is trained.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "runs go to run_dir/PIPELINE, and nothing is pushed to the Hub": (
        "output_dir", "run_name", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo",
        "hub_always_push", "hub_revision", "save_only_model", "save_on_each_node", "enable_jit_checkpoint",
        "resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint", "do_train",
    ),
    "finished stages are evaluated, not steps: add evaluation.tasks, or use smolpost eval": (
        "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_packing",
        "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "per_device_eval_batch_size",
        "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
        "dataset_test_split", "metric_for_best_model", "greater_is_better", "label_names",
    ),
    "logging is ours: a line every logging_steps, and report_to": (
        "logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level",
        "log_level_replica", "include_num_input_tokens_seen", "disable_tqdm", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id",
    ),
    "speed and memory are ours: per-document attention, a tiled head, padding-free batches": (
        "attn_implementation", "use_liger_kernel", "liger_kernel_config", "torch_compile", "torch_compile_backend",
        "torch_compile_mode", "tf32", "use_cache", "torch_empty_cache_steps", "padding_free", "pad_to_multiple_of",
        "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs",
        "auto_find_batch_size", "skip_memory_metrics", "debug", "use_cpu", "precompute_ref_log_probs",
        "precompute_ref_batch_size", "full_determinism",
    ),
    "rows are read and shuffled by us": (
        "shuffle_dataset", "dataset_streaming", "streaming", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "dataloader_in_order", "remove_unused_columns", "length_column_name",
    ),
    "the ranks are those of recipes/accelerate": (
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
        "ddp_timeout", "local_rank", "accelerator_config", "ignore_bias_buffers", "config_file", "mixed_precision",
        "num_machines",
    ),
    "stop and padding tokens are those of the template and the tokenizer": ("eos_token", "pad_token"),
    "it is read together with another key that is off": (
        "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage", "ref_model_mixup_alpha",
        "ref_model_sync_steps", "lora_task_type",
    ),
    "export it in the shell": ("env",),
}  # fmt: skip

# Key -> (values at which it changes nothing, what is done instead).
DIFFERING: dict[str, tuple[tuple, str]] = {
    "label_smoothing_factor": ((0, 0.0), "there is no label smoothing here"),
    "neftune_noise_alpha": ((0,), "there is no NEFTune here"),
    "optim_args": ((), "AdamW's settings are weight_decay, the betas and epsilon"),
    "optim_target_modules": ((), "AdamW trains all weights, or the adapters"),
    "average_tokens_across_devices": ((True,), "a step's loss is divided by the trained tokens of the global batch"),
    "load_best_model_at_end": ((False,), "the weights after the last step are the result"),
    "train_sampling_strategy": (("random",), "rows come in a random order"),
    "dataloader_drop_last": ((False,), "the last rows of an epoch train too"),
    "data_seed": ((), "one seed decides the order of rows and all else"),
    "model_init_kwargs": (({},), "the model is loaded as it is saved"),
    "trust_remote_code": ((False,), "code of a checkpoint never runs; its architecture has to be in transformers"),
    "router_aux_loss_coef": ((), "there is no auxiliary loss of experts here"),
    "dataset_kwargs": (({},), "rows are prepared by us"),
    "parallelism_config": ((), "there is no tensor, context or sequence parallelism here"),
    "disable_dropout": ((True,), "dropout of the model is as its config says"),
    "lora_target_parameters": ((), "adapters are on linear layers"),
    "lora_modules_to_save": (([],), "adapters train alone, no further weights"),
    "use_dora": ((False,), "adapters are plain LoRA"),
    "load_in_8bit": ((False,), "the frozen weights are not quantized, which takes more memory"),
    "load_in_4bit": ((False,), "the frozen weights are not quantized (LoRA, not QLoRA), which takes more memory"),
    "sync_ref_model": ((False,), "the reference stays what it was at the start"),
    "truncation_mode": (("keep_start",), "samples are cut at their end"),
    "truncation_side": (("right",), "samples are cut at their end"),
    "tokenizer_name_or_path": ((), "the tokenizer is the checkpoint's"),
    "auto_insert_empty_system_msg": ((False,), "an empty system turn is not put before a conversation"),
    "reference_free": ((False,), "losses are measured against the reference"),
    "max_prompt_length": ((), "a pair is cut at its end, by max_seq_len alone"),
    "max_completion_length": ((), "a pair is cut at its end, by max_seq_len alone"),
    "force_use_ref_model": ((False,), "the reference is the stage's start"),
    "base_model_revision": ((), "adapters start on model.revision"),
}

# Method -> keys that not all methods have.
OWN: dict[str, tuple[str, ...]] = {
    "sft": (
        "chat_template_path", "dataset_text_field", "dataset_kwargs", "eos_token", "shuffle_dataset", "packing",
        "packing_strategy", "eval_packing", "completion_only_loss", "assistant_only_loss", "truncation_mode",
        "padding_free", "pad_token",
    ),
    "dpo": (
        "disable_dropout", "precompute_ref_log_probs", "precompute_ref_batch_size", "loss_weights", "ld_alpha",
        "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "beta", "use_weighting", "discopop_tau",
        "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "truncation_mode", "padding_free",
        "pad_token",
    ),
    "kto": (
        "disable_dropout", "precompute_ref_log_probs", "precompute_ref_batch_size", "beta", "desirable_weight",
        "undesirable_weight", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
    ),
}  # fmt: skip

# Keys of earlier versions, which `trl` reads or DIFFERING names.
RENAMED = {
    "warmup_ratio": "warmup_steps below 1",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy",
    "rpo_alpha": "loss_type [..., sft] with loss_weights",
    "max_prompt_length": "max_length",
    "max_completion_length": "max_length",
    "reference_free": "",
    "force_use_ref_model": "",
}

# Keys of earlier versions that change nothing that is trained.
REMOVED = (
    "overwrite_output_dir", "logging_dir", "save_safetensors", "no_cuda", "use_mps_device", "fp16_opt_level",
    "fp16_backend", "half_precision_backend", "jit_mode_eval", "use_ipex", "past_index", "mp_parameters", "ray_scope",
    "torchdynamo", "split_batches", "dispatch_batches", "include_inputs_for_metrics", "include_tokens_per_second",
    "tpu_num_cores", "tpu_metrics_debug", "hub_model_revision", "model_code_revision", "dataset_batch_size",
    "num_of_sequences", "chars_per_token", "is_encoder_decoder", "label_pad_token_id", "padding_value",
    "model_adapter_name", "ref_adapter_name", "generate_during_eval", "use_num_logits_to_keep", "use_logits_to_keep",
    "base_model_attribute_name", "tools", "ref_model_init_kwargs", "max_target_length", "use_flash_attention_2",
)  # fmt: skip
