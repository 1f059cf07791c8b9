"""The one exception a user's mistake becomes."""


class UserError(Exception):
    """A mistake the user can mend: one line naming the key or file and row, the value, the limit and the remedy.

    Raised where the fact is known, printed in one place (`smolpost.cli.one_line_errors`), exit code 2, no traceback.
    """


class Wrong(UserError):
    """A value of a recipe that cannot be meant.

    Attributes:
        key: Its full key; `recipe` puts the file that wrote it before the message.
    """

    def __init__(self, key: str, what: str):
        super().__init__(f"{key}{what}")
        self.key = key
