"""What must still be as it was when the plan was made, and what may not be done to a parallel model."""
