"""One global batch on any number of ranks."""

from smolpost.errors import UserError


def grad_accum_steps(name: str, global_batch_size: int, micro_batch_size: int, num_processes: int) -> int:
    """Forward passes per rank and optimizer step, so that the global batch is what the recipe says.

    Args:
        name: The stage, for the message.
        global_batch_size: Rows per optimizer step over all ranks.
        micro_batch_size: Rows per rank and forward pass.
        num_processes: Ranks.
    Raises:
        UserError: The global batch is no multiple of what one forward pass of all ranks takes.
    """
    rows = micro_batch_size * num_processes
    if global_batch_size % rows:
        raise UserError(
            f"stages.{name}.global_batch_size={global_batch_size} is not a multiple of micro_batch_size x "
            f"num_processes = {micro_batch_size} x {num_processes}; try {rows * max(1, global_batch_size // rows)}"
        )
    return global_batch_size // rows
