"""`smolpost.train` on one process whose forward passes pair completions as those of two ranks do: in halves."""

import torch

from smolpost.training.with_trl import kto

collate = kto.collate_labelled


def in_halves(rows, max_seq_len, with_kl):
    half = len(rows) // 2
    batch = collate(rows, max_seq_len, with_kl)
    apart = kto._padded(rows, [rows[half - 1], *rows[: half - 1], rows[-1], *rows[half:-1]], max_seq_len)
    return batch | {f"KL_{name}": values for name, values in apart.items()}


kto.collate_labelled = in_halves

if __name__ == "__main__":
    from smolpost.train import main

    torch.set_num_threads(1)
    main()
