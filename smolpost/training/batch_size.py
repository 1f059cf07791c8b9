"""The least that a global batch must hold. Apart from `batches`, as a plan is made without torch."""

from smolpost.errors import UserError


def check_global_batch(name: str, global_batch_size: int, num_processes: int) -> None:
    """Refuse a global batch with fewer rows than ranks.

    Args:
        name: The stage, for the message.
        global_batch_size: Rows per optimizer step over all ranks.
        num_processes: Ranks.
    Raises:
        UserError: There are more ranks than rows.
    """
    if global_batch_size < num_processes:
        raise UserError(
            f"stages.{name}.global_batch_size={global_batch_size} is below num_processes={num_processes}, and a rank "
            "without a row has nothing to do; raise it, or launch fewer processes"
        )
