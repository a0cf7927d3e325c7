"""Trees of the shapes of real models."""


def gpt2_small_shapes() -> dict:
    """The 148 parameters of GPT-2 small: 124 million entries."""
    width = 768
    norm = {"scale": (width,), "bias": (width,)}

    def dense(inputs, outputs):
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    block = {
        "norm_1": norm,
        "attention": dense(width, 3 * width),
        "projection": dense(width, width),
        "norm_2": norm,
        "up": dense(width, 4 * width),
        "down": dense(4 * width, width),
    }
    return {
        "tokens": (50257, width),
        "positions": (1024, width),
        "blocks": [block] * 12,
        "norm": norm,
    }
