"""What a learner raises."""

from ember_ray.config.errors import UserError


class LearnerError(UserError):
    """Learning cannot go on or cannot start; the text says what is wrong and what to do."""
