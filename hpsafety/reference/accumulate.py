"""Oracle of accumulate_: returns a new tensor where the op writes in place."""


def accumulate(total, grad):
    """total + grad in total's dtype."""
    return total + grad.to(total.dtype)
