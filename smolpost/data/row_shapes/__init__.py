"""Row shapes: what the columns of a file's rows mean, a file for each. Importing this registers the library's own."""

from smolpost.data.row_shapes import alpaca, sharegpt, smoltalk2

__all__ = ["alpaca", "sharegpt", "smoltalk2"]
