"""What a learner raises."""


class LearnerError(RuntimeError):
    """Learning cannot go on or cannot start; the text says what is wrong and what to do."""
