"""The one exception a user's mistake becomes."""


class UserError(Exception):
    """A mistake the user can mend: one line naming the key or file and row, the value, the limit and the remedy.

    Raised where the fact is known, printed in one place (`smolpost.cli.one_line_errors`), exit code 2, no traceback.
    """
