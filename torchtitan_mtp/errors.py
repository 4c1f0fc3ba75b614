"""The one exception that speaks to the user."""


class UserError(Exception):
    """Something the user can mend, said in one line.

    The message names the file, key, rank or tensor, what was found, what was expected and what to
    do. Entry points print it without a traceback and exit with status 1. What it quotes may have
    several lines; the message has one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))
