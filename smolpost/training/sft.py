"""Mid-training and SFT: TRL's SFTTrainer on packs that are already tokenized, masked and packed."""

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from smolpost.data.collate import SFTCollator
from smolpost.schema import SFTStage
from smolpost.training.optimizer import decayed_parameters


class PackTrainer(SFTTrainer):
    """SFTTrainer that leaves the rows as they are and does not decay embeddings."""

    def get_decay_parameter_names(self, model):
        return decayed_parameters(model)


def config(stage: SFTStage, arguments: dict) -> SFTConfig:
    return SFTConfig(
        **arguments,
        # TRL must neither tokenize, truncate nor pack again: the rows are final.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        train_sampling_strategy="random" if stage.shuffle_packs else "sequential",
    )


def trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, arguments: SFTConfig, callbacks: list
) -> PackTrainer:
    return PackTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=SFTCollator(),
        callbacks=callbacks,
    )
