"""Words of other tools: those that mean one of our keys, those that need no key, and those that nothing here corresponds to.

From transformers, TRL, PEFT, Unsloth, LLaMA-Factory, Axolotl, the papers' scripts and RWKV-PEFT. Words whose values change
too are in `bonetune.training.aliases`.
"""

# Our key, and other words for it that take the same values.
RENAMED = {
    "model_name_or_path": "model model_name model_id base_model base_model_name_or_path load_model",
    "tokenizer_name_or_path": "tokenizer tokenizer_name tokenizer_path tokenizer_config",
    "output_dir": "output output_path save_dir proj_dir",
    "dataset_name": "data data_path train_file train_data data_file",
    "dataset_split": "dataset_train_split train_split split sft_split",
    "dataset_format": "data_format",
    "dataset_field": "dataset_fields sft_field",
    "streaming": "dataset_streaming",
    "shuffle_buffer_size": "buffer_size streaming_buffer_size",
    "eval_dataset_name": "eval_dataset eval_data eval_file validation_file test_file",
    "eval_dataset_split": "dataset_test_split eval_split",
    "completion_only_loss": "assistant_only_loss train_on_responses_only",
    "max_length": "max_seq_length max_seq_len model_max_length cutoff_len sequence_len seq_len block_size "
    "context_length ctx_len",
    "r": "rank lora_r lora_rank bone_r bone_b miss_r",
    "target_parameters": "lora_target_parameters",
    "bone_dropout": "dropout lora_dropout miss_dropout",
    "modules_to_save": "lora_modules_to_save additional_target",
    "learning_rate": "lr lr_init",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "lr_scheduler_kwargs": "lr_scheduler_args",
    "per_device_train_batch_size": "batch_size micro_batch_size micro_bsz per_gpu_train_batch_size train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accumulation accumulation_steps accumulate_grad_batches",
    "num_train_epochs": "epochs num_epochs epoch_count",
    "max_steps": "steps max_train_steps",
    "packing": "padding_free sample_packing neat_packing",
    "gradient_checkpointing": "activation_checkpointing",
    "torch_compile": "compile",
    "optim": "optimizer",
    "weight_decay": "wd",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "adam_eps",
    "max_grad_norm": "gradient_clipping gradient_clip_val clip_grad_norm",
    "seed": "random_state",
    "run_name": "wandb_name wandb_run_name",
    "attn_implementation": "attention_implementation",
}

# Words that ask for something if they are true, and for nothing if they are not.
FALSE_ASKS_NOTHING = ("assistant_only_loss", "train_on_responses_only", "padding_free")

# Why words are not used, and which.
IGNORED = {
    "data are read in the process of the run": "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataset_num_proc preprocessing_num_workers dataset_processes preprocessing_batch_size "
    "dataloader_multiprocessing_context dataloader_in_order",
    "a step's loss is the mean over its supervised tokens": "avg_loss",
    "tokens are kept by content (cache_tokens)": "overwrite_cache dataset_prepared_path tokenized_path",
    "metrics.jsonl and loss.png are always written, in output_dir": "logging_dir logging_first_step logging_strategy "
    "logging_nan_inf_filter plot_loss include_num_input_tokens_seen disable_tqdm log_level "
    "log_level_replica log_on_each_node debug skip_memory_metrics",
    "a checkpoint is written each save_steps optimizer steps": "save_strategy save_safetensors save_only_model "
    "save_on_each_node epoch_save enable_jit_checkpoint",
    "held-out rows are evaluated each eval_steps steps, or each epoch without it; without eval_dataset_name and eval_size "
    "there are none": "eval_strategy evaluation_strategy do_eval eval_on_start eval_delay eval_accumulation_steps "
    "metric_for_best_model greater_is_better eval_packing "
    "prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches eval_use_gather_object",
    "`bonetune train` trains, and nothing else": "do_train do_predict use_peft strict inference_mode auto_mapping peft_version "
    "restore_callback_states_from_checkpoint ignore_data_skip",
    "the adapter is kept by itself; `bonetune merge` merges it, and proves the merge": "merge merge_and_save",
    "the number of processes is torchrun's or accelerate's": "local_rank ddp_timeout ddp_backend ddp_find_unused_parameters "
    "device_map low_cpu_mem_usage accelerator devices num_nodes ds_bucket_mb ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ignore_bias_buffers accelerator_config average_tokens_across_devices",
    "the model's own configuration and tokenizer say it": "model_type tokenizer_type use_fast_tokenizer tokenizer_use_fast "
    "fan_in_fan_out lora_fan_in_fan_out n_layer n_embd vocab_size my_testing rwkv_version pre_ffn head_qk dim_att dim_ffn "
    "head_size_a head_size_divisor tiny_att_layer my_pos_emb my_ffn_shift my_att_shift",
    "batches are laid out here, by packing or to the longest example": "pad_to_sequence_len pad_to_multiple_of "
    "packing_strategy remove_unused_columns length_column_name label_names shuffle_dataset dataload",
    "torch's own setting holds; results change in rounding only": "tf32 full_determinism half_precision_backend fp16_opt_level "
    "bnb_4bit_compute_dtype bnb_4bit_quant_storage quantization_method infer_dtype "
    "bf16_full_eval fp16_full_eval",
    "a choice of speed alone, made here": "use_liger_kernel gradient_checkpointing_kwargs torch_compile_backend "
    "torch_compile_mode torch_empty_cache_steps "
    "activation_checkpointing_kwargs liger_kernel_config use_cache runtime_config fla l2warp_sparse",
    "it is set by the service's own environment variables": "cache_dir wandb_project wandb_entity wandb_watch wandb_log_model "
    "wandb_run_id hub_token token use_auth_token hf_token hub_model_id hub_strategy hub_private_repo hub_always_push "
    "hub_revision project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "seed is of the data order, too": "data_seed",
}

_NO_ALPHA = (
    "no adapter here has a factor before its update: r and learning_rate do its work; a baseline has one, in baseline_kwargs"
)
_NEW_ADAPTER = "a run starts with a new adapter; `--resume` (resume=True) goes on from a checkpoint"
_ZERO = (
    "adapters start at zero; the variants bat, bat-row and bat-left are what the frozen weight guides; baseline_kwargs has it "
    "for LoRA's baselines"
)
_DATA_CONFIGURATION = "save that configuration's rows to a file and name it in dataset_name"
_TEMPLATE = "messages are rendered by the tokenizer's own chat template, other rows by prompt_template"
_ROWS = "take a slice, such as dataset_split: train[:1000]"
_TOKENIZER = "the tokenizer is used as it is, but for eos_token: save a changed one, and name it in tokenizer_name_or_path"
_LORA = "bonetune trains adapters of the Bone family: leave it out, or say baseline, for a comparison"
# What RWKV-PEFT's train.py has from there.
_OF_PRETRAINING = (
    *("my_pile_version", "my_pile_stage", "my_pile_shift", "my_pile_edecay", "magic_prime", "my_qa_mask"),
    *("my_random_steps", "my_sample_len", "my_exit", "my_exit_tokens", "load_partial", "layerwise_lr"),
    *("weight_decay_final", "tiny_att_dim"),
)
_LOSS = "the loss is the mean cross-entropy of the supervised tokens, and nothing is added to it"
# Words that nothing here corresponds to, and why. A value that asks for nothing (false, empty) is let pass.
REFUSED = {
    **dict.fromkeys(("lora_alpha", "alpha", "alpha_pattern", "use_rslora"), _NO_ALPHA),
    **dict.fromkeys(
        ("use_dora", "use_lora", "apply_lora", "lora_bias", "loftq_config", "loraplus_lr_ratio", "use_qalora"), _LORA
    ),
    **dict.fromkeys(("init_lora_weights", "pissa_init", "pissa_iter"), _ZERO),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir", "load_bone", "lora_path", "bone_load"), _NEW_ADAPTER),
    **dict.fromkeys(
        ("template", "chat_template", "chat_template_path", "response_template", "instruction_template"), _TEMPLATE
    ),
    **dict.fromkeys(("special_tokens", "tokens", "pad_token", "resize_vocab"), _TOKENIZER),
    **dict.fromkeys(("dataset_config", "dataset_config_name"), _DATA_CONFIGURATION),
    **dict.fromkeys(("max_samples", "max_train_samples", "max_eval_samples"), _ROWS),
    **dict.fromkeys(("label_smoothing_factor", "neftune_noise_alpha", "loss_type", "router_aux_loss_coef"), _LOSS),
    "resume_from_checkpoint": "pass --resume on the command line, or resume=True to bonetune.train",
    "overwrite_output_dir": "pass --overwrite on the command line, or overwrite=True to bonetune.train",
    "no_cuda": "hide the GPUs instead: CUDA_VISIBLE_DEVICES= bonetune train ...",
    "use_cpu": "hide the GPUs instead: CUDA_VISIBLE_DEVICES= bonetune train ...",
    "dataset_dir": "dataset_name is the file itself, with its folder, or an id on the hub",
    "stage": "bonetune does supervised fine-tuning (sft); for pre-training on text, dataset_format: text",
    "rl": "bonetune does supervised fine-tuning",
    "mix_strategy": "name dataset_weights instead",
    "mask_history": "every answer of a conversation is supervised",
    **dict.fromkeys(("model_revision", "revision"), "download that revision and name its folder in model_name_or_path"),
    "parallelism_config": "say fsdp or deepspeed",
    "dataset_kwargs": "say dataset_format and dataset_field",
    "layer_replication": _LORA,
    "load_best_model_at_end": "the run's last state is kept; checkpoints are in output_dir",
    "early_stopping_patience": "a run goes to its end; checkpoints are in output_dir",
    "auto_find_batch_size": "choose per_device_train_batch_size; `--dry-run` and rehearsal show what fits",
    "dataloader_drop_last": "the last batch of an epoch is trained on, whatever its size",
    "push_to_hub": "upload output_dir after the run: huggingface-cli upload",
    "saves_per_epoch": "say save_steps, in optimizer steps",
    "evals_per_epoch": "say eval_steps, in optimizer steps",
    "model_init_kwargs": "say dtype, quantization, attn_implementation and trust_remote_code by themselves",
    "max_source_length": "max_length is of prompt and answer together",
    "max_target_length": "max_length is of prompt and answer together",
    "rope_scaling": "change the model's own configuration: max_length goes as far as the model does",
    "optim_target_modules": "target_modules says what is trained",
    "activation_offloading": "gradient_checkpointing saves that memory",
    "mask_id": "completion_only_loss masks prompts by where they end, not by token ids",
    **dict.fromkeys(_OF_PRETRAINING, "it belongs to RWKV-LM's pre-training, which is not done here"),
    "strategy": "say deepspeed, with its configuration, or fsdp",
    "epoch_steps": "an epoch goes through the data once; max_steps counts optimizer steps",
    "epoch_begin": "`--resume` goes on from a checkpoint",
    "lora_checkpoint": "that is an argument of `bonetune merge`",
}
# Values besides false ones with which a refused word asks for what is the case anyway.
THE_CASE_ANYWAY = {
    "init_lora_weights": True,
    "stage": "sft",
    "mix_strategy": "concat",
    "loss_type": "nll",
    "model_revision": "main",
    "revision": "main",
}
