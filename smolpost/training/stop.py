"""Ends of training before its last step: at a signal, or because nothing is left to do."""

from transformers import TrainerCallback

from smolpost.signals import Kept


class NothingLeft(Exception):
    """Training was interrupted between its last step and the end of its stage."""


class EndOnce(TrainerCallback):
    """Prevents an extra step when training resumes from the checkpoint of its last step."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise NothingLeft


class StopAtStep(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint.

    No other checkpoint is of the last step: the stage's final weights follow at once.

    Attributes:
        asked: What came to this rank.
        agreed: A signal has come to some rank: all ranks know it at the same step.
    """

    def __init__(self):
        self.asked, self.agreed = Kept(), False

    def on_train_begin(self, args, state, control, **kwargs):
        self.asked.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed |= args.world_size == 1 and self.asked.signum is not None  # a single rank agrees with itself
        if self.agreed:
            control.should_log = control.should_save = control.should_training_stop = True
        elif state.global_step >= state.max_steps:
            control.should_save = False
