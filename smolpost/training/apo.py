"""Anchored preference optimization: TRL's DPOTrainer on pairs that are already tokenized and masked."""

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from smolpost.data.collate import PreferenceCollator
from smolpost.schema import APOStage
from smolpost.training.optimizer import decayed_parameters


class PairTrainer(DPOTrainer):
    """DPOTrainer that leaves the rows as they are and does not decay embeddings."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset  # TRL would tokenize and truncate again

    def get_decay_parameter_names(self, model):
        return decayed_parameters(model)


def config(stage: APOStage, arguments: dict) -> DPOConfig:
    return DPOConfig(
        **arguments,
        loss_type=[stage.loss],
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        max_length=None,  # lengths were settled at preparation
    )


def trainer(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    arguments: DPOConfig,
    callbacks: list,
) -> PairTrainer:
    return PairTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=PreferenceCollator(pad_token_id=tokenizer.pad_token_id),
        callbacks=callbacks,
    )
