"""What other libraries say that is no news to a user: silenced here and nowhere else, each with its reason.

Exactly these messages: whatever else a library says stays visible.
"""

import logging
import os
import sys
import warnings

WARNINGS = (  # category, regular expression for the start of the text
    # DeepSpeed calls torch's collectives by their former names, in every step; they do the same.
    (FutureWarning, r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"),
    # peft asks a model for its checkpointing by the former name, which answers as before.
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated"),
    # TRL switches checkpointing off while the reference scores, and on again, by the former names; they do the same.
    (FutureWarning, r"`gradient_checkpointing_(disable|enable)` is deprecated"),
)
RECORDS = (  # logger, start of the text
    # Checkpoints of fast steps have one mtime, and then the numbers in their names give the order, which is right.
    ("transformers.trainer_utils", "mtime may not be reliable on this filesystem"),
    # DeepSpeed looks for an accelerator when it is imported, also where nothing trains; a training says its device.
    ("DeepSpeed", "Setting accelerator to CPU."),
    # transformers accumulates gradients itself under TRL's trainers, and tells DeepSpeed over how many passes.
    ("accelerate.accelerator", "[RANK 0] Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1,"),
    # TRL advises several rows per forward pass; a row is a full pack here, and micro_batch_size says how many.
    ("trl.trainer.sft_trainer", "[RANK 0] You are using a per_device_train_batch_size of 1"),
)


def silence() -> None:
    """Let the messages above pass in silence, and keep bars out of log files. To be called before tqdm is imported."""
    for category, text in WARNINGS:
        warnings.filterwarnings("ignore", text, category)
    for name, text in RECORDS:
        logging.getLogger(name).addFilter(lambda record, text=text: not record.getMessage().startswith(text))
    if not sys.stderr.isatty():
        # The libraries' bars (weights loaded, shards written, rows mapped) redraw themselves with control characters.
        os.environ.setdefault("TQDM_DISABLE", "1")
