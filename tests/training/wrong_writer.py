"""`smolpost.train` with a fault in what it writes: a layer's weights a hundredth too large."""

from transformers import PreTrainedModel

from smolpost.train import main

save_pretrained = PreTrainedModel.save_pretrained


def spoiled(self, folder, state_dict=None, **more):
    if state_dict is not None:  # the stage's own weights, not the trainer's checkpoints
        name = "model.layers.0.mlp.down_proj.weight"
        if more.get("is_main_process", True) and name in state_dict:
            state_dict[name] = state_dict[name] * 1.5
    return save_pretrained(self, folder, state_dict=state_dict, **more)


PreTrainedModel.save_pretrained = spoiled

if __name__ == "__main__":
    main()
