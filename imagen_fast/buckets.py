"""The lengths to which texts are padded, so that one graph serves all of about a length."""


def bucket(length: int) -> int:
    """The next multiple of 32 up to 128 tokens, of 64 beyond."""
    step = 32 if length <= 128 else 64
    return -(-length // step) * step
