"""What libraries say about a fault, in one line."""


def one_line(error: BaseException) -> str:
    """An error's message in at most 300 characters without line breaks."""
    return " ".join(str(error).split())[:300] or type(error).__name__
