"""Texts of errors on one line, for code that imports nothing of the pipeline."""


def join_error_lines(error: BaseException, limit: int = 200) -> str:
    """Returns the text of an error on one line of at most `limit` characters, as `pipeline.errors.one_line`."""
    return " ".join(str(error).split())[:limit]


def take_last_line(error: BaseException) -> str:
    """Returns the last line of the text of an error, where its cause stands after others; "" if it has no text."""
    return str(error).strip().rpartition("\n")[2].strip()
