"""Guards check that the model still is as it was when the plan was made, and refuse what may not be done to a parallel model."""
