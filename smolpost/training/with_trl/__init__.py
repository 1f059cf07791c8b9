"""The engine `trl`: TRL's trainers on our prepared rows, in our order, with our checkpoints.

Each module is a `training.train.Method`. TRL computes the loss and the metrics, transformers runs the loop.
"""
