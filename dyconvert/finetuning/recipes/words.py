"""The recipe's key for each argument of the library's functions: their errors then name the key that sets it."""

KEYS = {
    "arguments": "model.arguments",
    "data": "data.root",
    "example": "model.input_size",
    "init": "narrow.init",
    "keep": "narrow.keep",
    "mean": "data.mean",
    "std": "data.std",
    "weights": "model.weights",
}
# The recipe's keys for a teacher that is another network; it takes no arguments.
TEACHER = {"arguments": None, "example": "data.size", "weights": "distill.teacher_weights"}
