"""Row shapes: what the columns of a file's rows mean, a file for each. Importing this registers the library's own."""

from smolpost.data.row_shapes import alpaca, gsm8k, sharegpt, smoltalk2

__all__ = ["alpaca", "gsm8k", "sharegpt", "smoltalk2"]
